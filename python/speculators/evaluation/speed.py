"""Clocks: decoders that take turns, and a drafter whose own time is known.

A machine is not equally fast all the time. So the decoders that are compared take turns batch by
batch, and whoever went first goes last the next time: what slows the machine down slows all of them
down. Of several repeats each batch counts with its median.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor

from speculators.decoding.drafters import (
    Drafter,
    Finishing,
    Proposal,
    TreeDrafting,
    TreeProposal,
)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Timed(Generic[T]):
    """One decoder's work on one batch.

    Attributes:
        result: what the first repeat gave.
        seconds: wall-clock seconds of each repeat.
    """

    result: T
    seconds: list[float]

    @property
    def median(self) -> float:
        """The median of the repeats."""
        return statistics.median(self.seconds)


def timed(run: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What a function returns, and the seconds until its work on the device is done."""
    _finish(device)
    begin = time.perf_counter()
    result = run()
    _finish(device)
    return result, time.perf_counter() - begin


def take_turns(
    runs: Sequence[Callable[[int], T]],
    batches: int,
    *,
    repeats: int,
    warmup: int,
    device: torch.device,
    after_batch: Callable[[int], None],
) -> list[list[Timed[T]]]:
    """Lets every decoder do every batch, in turns.

    Args:
        runs: the decoders, called with the number of a batch.
        batches: how many there are.
        repeats: how often each does each of them.
        warmup: how many batches all of them do first, with no clock running.
        device: where they compute.
        after_batch: called with a batch's number when all are done with it.

    Returns:
        For each decoder its work on each batch.
    """
    for number in range(min(warmup, batches)):
        for run in runs:
            run(number)
    done: list[list[Timed[T]]] = [[] for _ in runs]
    for number in range(batches):
        for repeat in range(repeats):
            for turn in range(len(runs)):
                decoder = (turn + number + repeat) % len(runs)
                result, seconds = timed(functools.partial(runs[decoder], number), device)
                if repeat == 0:
                    done[decoder].append(Timed(result, []))
                done[decoder][number].seconds.append(seconds)
        after_batch(number)
    return done


class TimedDrafter:
    """A drafter, and the time that it takes; a :class:`~speculators.decoding.drafters.Drafter`.

    Right where calls return when their work is done, which on an accelerator they do not.

    Attributes:
        capture: the drafter's.
        tree_nodes: the drafter's, 0 if it drafts chains.
        tree_depth: the drafter's, likewise.
        seconds: time spent in it since it was made.
    """

    def __init__(self, drafter: Drafter) -> None:
        self.capture: tuple[int, ...] = drafter.capture
        self.tree_nodes: int = getattr(drafter, "tree_nodes", 0)
        self.tree_depth: int = getattr(drafter, "tree_depth", 0)
        self.seconds = 0.0
        self._drafter = drafter

    def prefill(
        self,
        input_ids: Tensor,
        lengths: Sequence[int],
        next_tokens: Tensor,
        streams: Mapping[int, Tensor],
    ) -> None:
        """See :class:`~speculators.decoding.drafters.Drafter`."""
        begin = time.perf_counter()
        self._drafter.prefill(input_ids, lengths, next_tokens, streams)
        self.seconds += time.perf_counter() - begin

    def propose(self, count: int, uniforms: Tensor | None) -> Proposal:
        """See :class:`~speculators.decoding.drafters.Drafter`."""
        begin = time.perf_counter()
        proposal = self._drafter.propose(count, uniforms)
        self.seconds += time.perf_counter() - begin
        return proposal

    def propose_tree(self, roots: Tensor, uniforms: Tensor | None) -> TreeProposal:
        """See :class:`~speculators.decoding.drafters.TreeDrafting`."""
        begin = time.perf_counter()
        proposal = cast("TreeDrafting", self._drafter).propose_tree(roots, uniforms)
        self.seconds += time.perf_counter() - begin
        return proposal

    def update(self, tokens: Tensor, counts: Sequence[int], streams: Mapping[int, Tensor]) -> None:
        """See :class:`~speculators.decoding.drafters.Drafter`."""
        begin = time.perf_counter()
        self._drafter.update(tokens, counts, streams)
        self.seconds += time.perf_counter() - begin

    def select(self, rows: Sequence[int]) -> None:
        """See :class:`~speculators.decoding.drafters.Drafter`."""
        self._drafter.select(rows)

    def finish(self, row: int, tokens: Sequence[int]) -> None:
        """See :class:`~speculators.decoding.drafters.Finishing`."""
        if hasattr(self._drafter, "finish"):
            cast("Finishing", self._drafter).finish(row, tokens)


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
