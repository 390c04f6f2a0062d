"""This library's training step, timed; see driver.py."""

import torch
from benchmarks.training.driver import Options, Training, drive
from torch import Tensor

from speculators.data.batch import PackedBatch
from speculators.models import SpeculatorModel
from speculators.models.objective import ObjectiveSettings, StepwiseObjective
from speculators.models.verifier.parts import VerifierParts
from speculators.training.optimizers import OPTIMIZERS, Parameters
from speculators.training.settings import TrainingSettings, merge_settings
from speculators.training.update import Updater


def make(options: Options) -> Training:
    """The updates of a run."""
    parts = VerifierParts.from_pretrained(options.folder / "verifier", device=options.device)
    draft = SpeculatorModel.from_pretrained(
        options.folder / "draft", verifier=parts, dtype=torch.float32, device=options.device
    ).train()
    for parameter in draft.head_parameters():
        parameter.requires_grad_(False)  # as the peer has it
    settings = merge_settings(
        TrainingSettings,
        {
            "optimizer.learning_rate": options.learning_rate,
            "optimizer.betas": (0.9, 0.999),  # torch's, and so the peer's
            "optimizer.weight_decay": 0.0,
            "clip_limit": options.clip,
            "autocast": "bf16" if options.dtype == "bfloat16" else "none",
        },
    )
    objective = StepwiseObjective(draft, parts.head, ObjectiveSettings(steps=3))
    parameters = Parameters.of(draft)
    optimizer = OPTIMIZERS["adamw"](parameters, settings.optimizer)
    updater = Updater(objective, parameters.all, optimizer, settings)
    streams = (*options.case["streams"], options.case["layers"])

    def pack(input_ids: Tensor, states: Tensor) -> PackedBatch:
        documents, length = input_ids.shape
        places = torch.arange(length).repeat(documents)[None]
        return PackedBatch(
            input_ids=input_ids.reshape(1, -1),
            loss_mask=torch.ones_like(places, dtype=torch.bool),
            position_ids=places,
            document_ids=torch.arange(documents).repeat_interleave(length)[None],
            hidden_states={
                stream: states[:, :, place].reshape(1, documents * length, -1)
                for place, stream in enumerate(streams)
            },
        )

    updates = iter(range(10**9))
    return Training(pack, lambda batch: updater([batch], next(updates), 1.0).loss)


if __name__ == "__main__":
    drive(make)
