"""Sums over rows, kept until somebody wants the mean: of several batches, updates or documents.

Means of means would give a short batch the weight of a long one.
"""

import dataclasses

import torch
from torch import Tensor

from speculators.models.objective import ObjectiveOutput


@dataclasses.dataclass
class RowSums:
    """Sums over the learnable rows of each drafting step.

    Attributes:
        rows: how many rows, ``[K]``; None before the first.
        sums: by name, float64 ``[K]``, on the device where they were made.
    """

    rows: Tensor | None = None
    sums: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def add(self, other: "ObjectiveOutput | RowSums") -> None:
        """Adds the rows of a batch, or other sums."""
        if other.rows is None:
            return
        self.rows = other.rows if self.rows is None else self.rows + other.rows
        for name, sums in other.sums.items():
            self.sums[name] = self.sums[name] + sums if name in self.sums else sums

    def means(self) -> dict[str, list[float]]:
        """By name, the mean of each step's rows; NaN for a step without any."""
        if self.rows is None:
            return {}
        names = list(self.sums)
        means = torch.stack([self.sums[name] for name in names]) / self.rows  # one copy to the host
        return dict(zip(names, means.tolist(), strict=True))

    def metrics(self, prefix: str) -> dict[str, float]:
        """The means as numbers by name: of the first drafting step ``PREFIX/NAME_1``, and so on."""
        return {
            f"{prefix}/{name}_{step}": mean
            for name, means in self.means().items()
            for step, mean in enumerate(means, 1)
        }
