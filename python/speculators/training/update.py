"""One update: the batches that make it up, their gradient, clipping, the optimizer's step.

The loss is a mean over the learnable rows of ALL batches of the update, so these are counted before
the first pass: accumulation then gives what one large batch would have given, however the learnable
tokens are spread. Weights and gradients are float32; under autocast only the computation is in
bfloat16.
"""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from speculators.models.objective import ObjectiveOutput, ObjectiveSettings, TrainingBatch
from speculators.training.optimizers import Optimizer
from speculators.training.random_state import random_numbers
from speculators.training.settings import TrainingSettings
from speculators.training.sums import RowSums


class Objective(Protocol):
    """What is minimised; ``models.objective.StepwiseObjective`` is one."""

    @property
    def settings(self) -> ObjectiveSettings:
        """What it was made with."""

    def capture_layers(self, num_layers: int) -> tuple[int, ...]:
        """The residual streams that a batch must have."""

    def rows(self, batch: TrainingBatch) -> Tensor:
        """How many rows learn at each step: int64 ``[K]``."""

    def __call__(self, batch: TrainingBatch, total_rows: Tensor | None = None) -> ObjectiveOutput:
        """The loss of a batch, each step's sum divided by ``total_rows``."""


class TrainableBatch(TrainingBatch, Protocol):
    """A batch that can be moved."""

    @property
    def tokens(self) -> int:
        """The number of tokens that are no padding."""

    def to(self, device: torch.device) -> TrainingBatch:
        """The same batch on a device."""


class NotFiniteError(ArithmeticError):
    """A loss or a gradient is infinite or not a number; no update was made with it."""


@dataclasses.dataclass(frozen=True)
class UpdateOutput:
    """What an update did.

    Attributes:
        loss: of all batches together.
        gradient_norm: of the whole gradient, before clipping.
        sums: over the rows of all batches.
        tokens: that were read, without padding.
    """

    loss: float
    gradient_norm: float
    sums: RowSums
    tokens: int


class Updater:
    """Makes updates.

    Args:
        objective: what is minimised.
        parameters: what is changed; float32.
        optimizer: how.
        settings: seed, clipping and autocast.
    """

    def __init__(
        self,
        objective: Objective,
        parameters: Sequence[nn.Parameter],
        optimizer: Optimizer,
        settings: TrainingSettings,
    ) -> None:
        self.objective = objective
        self.optimizer = optimizer
        self._parameters = list(parameters)
        self._settings = settings
        self._device = parameters[0].device

    def __call__(
        self, batches: Sequence[TrainableBatch], update: int, factor: float
    ) -> UpdateOutput:
        """Makes an update.

        Args:
            batches: what it learns from.
            update: its number; with the seed it decides about the noise.
            factor: of the learning rate.

        Raises:
            NotFiniteError: the loss or the gradient is not finite; the weights are as before.
        """
        self.optimizer.zero_grad()
        with random_numbers(self._device, self._settings.seed, "update", update):
            loss, sums = self._gradient(batches)
        norm = self._clip()
        if not math.isfinite(norm) or not math.isfinite(loss):
            self.optimizer.zero_grad()
            raise NotFiniteError(
                f"update {update + 1} has the loss {loss} and a gradient of norm {norm}; expected "
                "finite numbers. Go on from the last checkpoint with a lower learning rate or a "
                "longer warm-up"
            )
        if sums.rows is not None:
            self.optimizer.step(factor)
        self.optimizer.zero_grad()
        return UpdateOutput(loss, norm, sums, sum(batch.tokens for batch in batches))

    def _gradient(self, batches: Sequence[TrainableBatch]) -> tuple[float, RowSums]:
        """Adds up the gradient; the loss and the sums over all rows."""
        rows = [self.objective.rows(batch) for batch in batches]
        total_rows = torch.stack(rows).sum(0).to(self._device)
        sums = RowSums()
        losses = []
        for batch, batch_rows in zip(batches, rows, strict=True):
            if not bool(batch_rows.any()):
                continue
            with autocast(self._device, self._settings.autocast):
                output = self.objective(batch.to(self._device), total_rows)
            output.loss.backward()
            sums.add(output)
            losses.append(output.loss.detach())
        return float(torch.stack(losses).sum()) if losses else 0.0, sums

    def _clip(self) -> float:
        """Clips the gradient in place, and returns the norm that it had."""
        limit = self._settings.clip_limit
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._settings.clip == "norm":
            torch.nn.utils.clip_grads_with_norm_(self._parameters, limit, norm)
        elif self._settings.clip == "value":
            torch.nn.utils.clip_grad_value_(self._parameters, limit)
        return float(norm)


def autocast(
    device: torch.device, choice: Literal["auto", "none", "bf16"]
) -> contextlib.AbstractContextManager[object]:
    """The context in which a pass is computed."""
    if choice == "none" or (choice == "auto" and device.type == "cpu"):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
