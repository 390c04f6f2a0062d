"""This library's training step, timed; see driver.py.

Here a row learns where the peer lets it learn: where the token of its target is the assistant's,
whether or not the text goes on after it and whatever its first token is. That changes which rows
count, by less than a hundredth, and nothing of how they are computed.
"""

import torch
from benchmarks.training.driver import STEPS, Options, Training, drive
from torch import Tensor

from speculators.data.batch import PackedBatch
from speculators.models import SpeculatorModel
from speculators.models import objective as objectives
from speculators.models.objective import ObjectiveSettings, StepwiseObjective, TrainingBatch
from speculators.models.verifier.parts import VerifierParts
from speculators.training.optimizers import OPTIMIZERS, Parameters
from speculators.training.settings import TrainingSettings, merge_settings
from speculators.training.update import Updater


def peers_rows(batch: TrainingBatch, step: int) -> Tensor:
    """Which rows learn at a step, bool ``[B, T]``; in place of ``objective.learnable``."""
    target = 1 + step
    learning = torch.zeros_like(batch.loss_mask)
    documents, mask = batch.document_ids, batch.loss_mask
    inside = (documents[:, target:] == documents[:, :-target]) & (documents[:, target:] >= 0)
    learning[:, :-target] = inside & mask[:, target:]
    return learning


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
    objectives.learnable = peers_rows
    objective = StepwiseObjective(draft, parts.head, ObjectiveSettings(steps=STEPS))
    parameters = Parameters.of(draft)
    optimizer = OPTIMIZERS["adamw"](parameters, settings.optimizer)
    updater = Updater(objective, parameters.all, optimizer, settings)
    streams = (*options.case["streams"], options.case["layers"])

    row_tokens = options.case["row_tokens"]

    def pack(input_ids: Tensor, states: Tensor, mask: Tensor) -> PackedBatch:
        documents, length = input_ids.shape

        def row(values: Tensor, fill: int = 0) -> Tensor:
            """``[documents, length, ...]`` as one padded row."""
            whole = values.new_full((1, row_tokens, *values.shape[2:]), fill)
            whole[0, : documents * length] = values.flatten(0, 1)
            return whole

        numbers = torch.arange(documents)[:, None].expand(-1, length)
        return PackedBatch(
            input_ids=row(input_ids),
            loss_mask=row(mask),
            position_ids=row(torch.arange(length).expand(documents, -1)),
            document_ids=row(numbers, -1),
            hidden_states={
                stream: row(states[:, :, place]) for place, stream in enumerate(streams)
            },
        )

    updates = iter(range(10**9))
    return Training(pack, lambda batch: updater([batch], next(updates), 1.0).loss)


if __name__ == "__main__":
    drive(make)
