"""What the benchmarks of all operators are given."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from benchmarks.measurement import Call, Floors, Measured, Series
from benchmarks.report import Report

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Bench:
    """One run.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        quick: the smallest cases, to see that everything runs.
        full: all combinations, which takes hours, in place of a selection.
        compiled: whether peers are measured that ``torch.compile`` makes, half a minute each.
        floors: what the machine can do.
        series: measures.
        report: takes the results.
    """

    device: str
    quick: bool
    full: bool
    compiled: bool
    floors: Floors
    series: Series
    report: Report

    def try_seconds(
        self, name: str, work: float, make: Callable[[], Call], needed: int = 0
    ) -> tuple[Measured | None, str]:
        """As ``Series.seconds``, for a peer that may not run here; the reason beside it."""
        try:
            return self.series.seconds(name, work, make, needed), ""
        except Exception as error:  # whatever stops a peer is a result
            lines = str(error).splitlines() or [""]
            return None, f"does not run: {type(error).__name__}: {lines[0][:80]}"


def compiled(function: _Function) -> _Function:
    """``torch.compile``, as for the first time.

    For one function it gives up after a few sizes, and what follows would be measured uncompiled.
    """
    torch.compiler.reset()
    fast: Any = torch.compile(function, dynamic=False)
    return cast("_Function", fast)
