"""Which batches make up which update: epochs one after the other, ``accumulation`` batches at once.

An update does not reach into the next epoch; the last of an epoch has the batches that are left.
Where a run stands is two numbers, the epoch and its next batch.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Generator, Iterator
from typing import cast

from speculators.data.batch import PackedBatch
from speculators.data.loader import PackedBatches


@dataclasses.dataclass(frozen=True)
class UpdateData:
    """What one update learns from.

    Attributes:
        batches: at least one, on the CPU.
        epoch: the number of the epoch in which the next update begins.
        batch: the number of its first batch.
    """

    batches: list[PackedBatch]
    epoch: int
    batch: int

    @property
    def ends_epoch(self) -> bool:
        """Whether the epoch ends with this update."""
        return self.batch == 0


class UpdateBatches:
    """The batches of all updates.

    Args:
        batches: of an epoch.
        accumulation: how many make up an update.
    """

    def __init__(self, batches: PackedBatches, accumulation: int) -> None:
        self.batches = batches
        self.accumulation = accumulation

    def total(self, epochs: int, max_steps: int | None) -> int:
        """How many updates a run of so many epochs has, at most ``max_steps``."""
        updates = 0
        for epoch in range(epochs):
            updates += -(-self.batches.num_batches(epoch) // self.accumulation)
            if max_steps is not None and updates >= max_steps:
                return max_steps
        return updates

    def go_on(self, epoch: int, batch: int) -> Generator[UpdateData]:
        """The updates from a place on, without end."""
        for number in itertools.count(epoch):
            begin = batch if number == epoch else 0
            count = self.batches.num_batches(number)
            read = cast("Generator[PackedBatch]", self.batches.epoch(number, begin))
            with contextlib.closing(read):  # ends the thread that reads ahead
                for group in _groups(read, self.accumulation):
                    begin += len(group)
                    over = begin == count
                    yield UpdateData(group, number + over, 0 if over else begin)


def _groups(batches: Iterator[PackedBatch], size: int) -> Iterator[list[PackedBatch]]:
    while group := list(itertools.islice(batches, size)):
        yield group
