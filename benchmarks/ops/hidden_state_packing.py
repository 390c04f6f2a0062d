"""Hidden-state packing and unpacking against torch's operators, eager and compiled.

Rows of L layers are picked and put side by side, as they are or in a byte an entry, and put back
into a tensor for each layer. The floor is a copy of the bytes that must be moved: each picked row
is read once, and what becomes of it is written once. To add a mode is to add a line to ``MODES``.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from benchmarks.measurement import Call, dtype_of
from benchmarks.ops.bench import Bench, compiled
from benchmarks.report import Row
from torch import Tensor

from speculators.ops.hidden_state_packing import (
    LARGEST_CODE,
    PackedStates,
    gather,
    gather_reference,
    pack,
    pack_reference,
    unpack_into,
    unpack_reference,
)

SCALE_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way to pack or to unpack.

    Attributes:
        operator: ours.
        reference: the same in torch's operators; compiled it is the peer.
        arguments: what both are called with, from the layers and the index.
        packed: bytes of a packed row of a layer, of H; the other side is bfloat16.
        least_speedup: over ``torch.compile``, the goal; None: there is none.
        most_of_floor: times the copy's time, the goal.
    """

    operator: Callable[..., object]
    reference: Callable[..., object]
    arguments: Callable[[Sequence[Tensor], Tensor], tuple[Any, ...]]
    packed: Callable[[int], int]
    least_speedup: float | None = None
    most_of_floor: float | None = None


def _two_bytes(width: int) -> int:
    return 2 * width


def _one_byte(width: int) -> int:
    return width + SCALE_BYTES


def _layers_and_index(layers: Sequence[Tensor], index: Tensor) -> tuple[Any, ...]:
    return layers, index


def _pack_mode(
    dtype: torch.dtype, least_speedup: float | None = None, most_of_floor: float | None = None
) -> Mode:
    return Mode(
        functools.partial(pack, dtype=dtype),
        functools.partial(pack_reference, dtype=dtype),
        _layers_and_index,
        _one_byte,
        least_speedup,
        most_of_floor,
    )


def _unpack_mode(dtype: torch.dtype) -> Mode:
    def arguments(layers: Sequence[Tensor], index: Tensor) -> tuple[Any, ...]:
        packed = pack(layers, index, dtype=dtype)
        return [torch.zeros_like(layer) for layer in layers], packed.data, packed.scales, index

    def operator(
        outputs: Sequence[Tensor], data: Tensor, scales: Tensor | None, index: Tensor
    ) -> None:
        unpack_into(outputs, PackedStates(data, scales), index)

    packed = _one_byte if dtype in LARGEST_CODE else _two_bytes
    return Mode(operator, unpack_reference, arguments, packed)


MODES: dict[str, Mode] = {
    "bfloat16": Mode(gather, gather_reference, _layers_and_index, _two_bytes, most_of_floor=1.3),
    "int8": _pack_mode(torch.int8, least_speedup=2.5, most_of_floor=1.3),
    "fp8": _pack_mode(torch.float8_e4m3fn),
    "unpack bfloat16": _unpack_mode(torch.bfloat16),
    "unpack int8": _unpack_mode(torch.int8),
    "unpack fp8": _unpack_mode(torch.float8_e4m3fn),
}
"""By name. The states on the other side are bfloat16, as verifiers leave them."""


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
        unpacked = self.hidden * dtype_of("bfloat16").itemsize
        return self.rows * self.layers * (unpacked + MODES[self.mode].packed(self.hidden))

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


def call(case: Case, by: str) -> Call:
    """One packing or unpacking, by ``"operator"``, ``"torch"`` or ``"torch.compile"``."""
    mode = MODES[case.mode]
    arguments = mode.arguments(*case.inputs())
    chosen = mode.operator if by == "operator" else mode.reference
    function = compiled(chosen) if by == "torch.compile" else chosen
    return lambda: function(*arguments)


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
        time, note = bench.try_seconds(f"{by} {case}", case.rows, functools.partial(call, case, by))
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
