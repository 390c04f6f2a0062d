"""The peer's training step, timed; see driver.py. It runs in the peer's environment.

The peer is the library of the same name, ``speculators`` 0.9.0 of vllm-project, imported here by
name at run time. Its own trainer runs its own loop, on one batch at a time; its own functions shift
and pack the documents. On a CPU three things stand in its way, which are changed from outside: its
timer wants an accelerator to wait for, its local rank is a GPU's number, and autocast's device is
``"cuda"`` where there is no accelerator.

Its later steps look beyond the end of a document, and would learn there from the next document's
first targets; so these are out of the loss mask, of both libraries. Attention and losses are those
that it has for machines without Triton.
"""

import importlib
import json
import logging
import tempfile
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig

if TYPE_CHECKING:
    from benchmarks.training.driver import STEPS, Options, Training, drive
else:  # this file is run as a script, and finds what lies beside it
    from driver import STEPS, Options, Training, drive


class LastLoss(logging.Handler):
    """Remembers the loss that the trainer logs after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.value = float("nan")

    def emit(self, record: logging.LogRecord) -> None:
        """Takes a dictionary of numbers."""
        if isinstance(record.msg, dict):
            self.value = record.msg["train"]["loss"]


def make(options: Options) -> Training:
    """The updates of a run."""
    data = importlib.import_module("speculators.train.data")
    shift_batch = importlib.import_module("speculators.models.eagle3.data").shift_batch
    trainer = _trainer(options)
    loss = LastLoss()
    metrics = logging.getLogger("speculators.metrics")
    metrics.setLevel(logging.INFO)
    metrics.addHandler(loss)
    dtype = getattr(torch, options.dtype)
    collate = data.CollateFn(
        options.case["row_tokens"], options.case["hidden"], STEPS, dtype, shift_batch
    )

    def pack(input_ids: Tensor, states: Tensor, mask: Tensor) -> Any:
        return collate([
            {
                "input_ids": tokens,
                "hidden_states": streams[:, :-1].flatten(1),
                "verifier_last_hidden_states": streams[:, -1],
                "loss_mask": learned,
                "lengths": torch.tensor([len(tokens)]),
                "position_ids": torch.arange(len(tokens)),
            }
            for tokens, streams, learned in zip(input_ids, states, mask, strict=True)
        ])  # fmt: skip

    def step(batch: Any) -> float:
        trainer.train_loader = _loader([batch])
        trainer.train_epoch(0)
        return loss.value

    return Training(pack, step)


def _loader(batches: list[Any]) -> DataLoader[Any]:
    dataset: Any = batches  # has what a dataset must have
    return DataLoader(dataset, batch_size=None)


def _trainer(options: Options) -> Any:
    module: Any = importlib.import_module("speculators.train.trainer")
    if options.device == "cpu":
        torch.accelerator.synchronize = lambda *_, **__: None
        module.get_local_rank = lambda: torch.device("cpu")
    model = _model(options)
    arguments, _ = type(model).get_trainer_kwargs(
        loss_fn="kl_div", loss_implementation="eager", ttt_steps=STEPS, ttt_step_loss_decay=1.0
    )
    config = module.TrainerConfig(
        lr=options.learning_rate,
        num_epochs=1,
        save_path=tempfile.mkdtemp(),
        train_call_kwargs=arguments,
        weight_decay=0.0,
        scheduler_type="none",
        hidden_states_dtype=getattr(torch, options.dtype),
        log_freq=1,
    )
    trainer = module.Trainer(model, config, _loader([]))
    trainer.device_type = options.device
    trainer.rank = 1  # of others it shows no progress bar, which would be timed
    return trainer


def _model(options: Options) -> Any:
    eagle3 = importlib.import_module("speculators.models.eagle3.core").Eagle3DraftModel
    draft = options.folder / "draft"
    config = json.loads((draft / "config.json").read_text())
    model = eagle3.from_training_args(
        LlamaConfig(**config["transformer_layer_config"]),
        draft_vocab_size=options.case["vocabulary"],
        norm_before_residual=config["norm_before_residual"],
        target_layer_ids=list(options.case["streams"]),
        verifier_name_or_path=str(options.folder / "verifier"),
        ttt_steps=STEPS,
        draft_attn_impl="sdpa",
    )
    found = model.load_state_dict(load_file(draft / "model.safetensors"), strict=False)
    missing = [name for name in found.missing_keys if not name.startswith("verifier_")]
    if missing or found.unexpected_keys:
        raise ValueError(
            f"the draft lacks {missing} and has {found.unexpected_keys} beside; expected the "
            "weights of the peer's model"
        )
    return model


if __name__ == "__main__":
    drive(make)
