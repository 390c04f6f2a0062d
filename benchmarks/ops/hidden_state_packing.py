"""Hidden-state packing against torch's operators, eager and compiled.

Rows of L layers are picked and put side by side. The floor is a copy of the bytes that must be
moved: each picked row is read once, and what becomes of it is written once. To add a mode is to add
a line to ``MODES``.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from benchmarks.measurement import Call, dtype_of
from benchmarks.ops.bench import Bench, compiled
from benchmarks.report import Row
from torch import Tensor

from speculators.ops.hidden_state_packing import gather, gather_reference

Pack = Callable[[Sequence[Tensor], Tensor], object]


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way to pack.

    Attributes:
        operator: ours, called with the layers and the index.
        reference: the same in torch's operators; compiled it is the peer.
        written: bytes written for a row of a layer, of H.
        least_speedup: over ``torch.compile``, the goal; None: there is none.
        most_of_floor: times the copy's time, the goal.
    """

    operator: Pack
    reference: Pack
    written: Callable[[int], int]
    least_speedup: float | None = None
    most_of_floor: float | None = None


MODES: dict[str, Mode] = {
    "bfloat16": Mode(gather, gather_reference, lambda width: 2 * width, most_of_floor=1.3),
}
"""By name. The states that are packed are bfloat16, as verifiers leave them."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One size: some rows of L layers ``[T, H]``, in random or in rising order."""

    mode: str
    layers: int
    tokens: int
    hidden: int
    rows: int
    rising: bool
    device: str

    def __str__(self) -> str:
        order = "rising" if self.rising else "random"
        return (
            f"{self.mode} L={self.layers} T={self.tokens} H={self.hidden} rows={self.rows} {order}"
        )

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        read = self.hidden * dtype_of("bfloat16").itemsize
        return self.rows * self.layers * (read + MODES[self.mode].written(self.hidden))

    def inputs(self) -> tuple[list[Tensor], Tensor]:
        """Layers and index, always the same."""
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (self.tokens, self.hidden)
        layers = [
            torch.randn(shape, generator=generator, device=self.device).bfloat16()
            for _ in range(self.layers)
        ]
        index = torch.randperm(self.tokens, generator=generator, device=self.device)[: self.rows]
        return layers, index.sort().values if self.rising else index


def pack(case: Case, by: str) -> Call:
    """One packing, by ``"operator"``, ``"torch"`` or ``"torch.compile"``."""
    mode = MODES[case.mode]
    layers, index = case.inputs()
    chosen = mode.operator if by == "operator" else mode.reference
    function = compiled(chosen) if by == "torch.compile" else chosen
    return lambda: function(layers, index)


def run(bench: Bench) -> None:
    """All modes and sizes."""
    sizes = [(3, 4096, 1024, 3000), (3, 4096, 4096, 3000), (4, 16384, 4096, 16384)]
    if bench.quick:
        sizes = [(3, 256, 128, 200)]
    for mode, size, rising in itertools.product(MODES, sizes, (True, False)):
        _measure(bench, Case(mode, *size, rising, bench.device))


def _measure(bench: Bench, case: Case) -> None:
    floor = bench.floors.copy_seconds(case.moved)
    found = {}
    for by in ("operator", "torch", *(["torch.compile"] if bench.compiled else [])):
        time, note = bench.try_seconds(f"{by} {case}", case.rows, functools.partial(pack, case, by))
        row = Row("hidden_state_packing", str(case), by, time, floor, moved=case.moved, note=note)
        found[by] = bench.report.add(row).time
    mode, ours, peer = MODES[case.mode], found["operator"], found.get("torch.compile")
    name = f"hidden_state_packing, {case}"
    if ours is not None and mode.most_of_floor is not None:
        ratio = ours.median / floor
        bench.report.goal(f"{name}: times the copy of its bytes", ratio, most=mode.most_of_floor)
    if ours is not None and peer is not None and mode.least_speedup is not None:
        speed = peer.median / ours.median
        bench.report.goal(f"{name}: times torch.compile's speed", speed, least=mode.least_speedup)
