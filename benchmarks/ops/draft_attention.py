"""``draft_attention`` against flash attention alone, dense masked attention and flex attention.

One row of one document, in the layout that projections leave: heads side by side in a token. The
floor is a causal flash attention to step 0, torch's own, plus a copy's time for the bytes of the
later steps' keys and values, which nobody can do without. Dense masked attention is what trainers
do without a kernel: all steps' keys side by side, and torch's attention with a mask. Flex attention
gets the same mask as a block mask, and is compiled beforehand.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from benchmarks.measurement import Call, Measured, dtype_of
from benchmarks.ops.bench import Bench, compiled
from benchmarks.report import Row
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from speculators.ops.draft_attention import draft_attention
from speculators.ops.packed_rows import PackedRows

OURS, FLASH, DENSE, FLEX = "draft_attention", "flash alone", "dense masked", "flex"

TOKENS = (512, 1024, 2048, 4096, 8192)
HEADS = ((8, 4), (32, 8))
HEAD_SIZES = (64, 128)
STEPS = 6
DTYPES = ("float32", "bfloat16")

# The cases for which peak memory and flex attention are measured, and of the goals.
HEADS_OF_GOALS, HEAD_SIZE_OF_GOALS, TOKENS_OF_GOALS = (8, 4), 64, 2048


@dataclasses.dataclass(frozen=True)
class Case:
    """One size.

    Attributes:
        tokens: T, of step 0 and of every later step.
        heads: Nq and Nkv.
        head_size: D.
        steps: s, later steps that a row sees.
        dtype: of all tensors.
        backward: whether gradients of queries, keys and values are computed as well.
        device: where.
    """

    tokens: int
    heads: tuple[int, int]
    head_size: int
    steps: int
    dtype: str
    backward: bool
    device: str

    def __str__(self) -> str:
        both = ", with backward" if self.backward else ""
        queries, keys = self.heads
        return (
            f"{self.dtype} T={self.tokens} heads={queries}/{keys} D={self.head_size} "
            f"s={self.steps}{both}"
        )

    @property
    def series(self) -> str:
        """The same for cases that differ in the number of tokens alone."""
        return str(dataclasses.replace(self, tokens=0))

    @property
    def flash_flops(self) -> int:
        """Of causal attention to step 0: two products forward, five more backward."""
        products = 7 if self.backward else 2
        pairs = self.tokens * (self.tokens + 1) // 2
        return products * 2 * pairs * self.heads[0] * self.head_size

    @property
    def diagonal_bytes(self) -> int:
        """Keys and values of the later steps, read; with backward read again, gradients written."""
        elements = 2 * self.steps * self.tokens * self.heads[1] * self.head_size
        return elements * dtype_of(self.dtype).itemsize * (3 if self.backward else 1)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Random tensors of a case: q ``[1, Nq, T, D]``, keys and values ``[1, Nkv, T, D]``."""

    case: Case
    q: Tensor
    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def of(cls, case: Case) -> "Inputs":
        """Always the same ones."""
        generator = torch.Generator(case.device).manual_seed(0)

        def random(heads: int) -> Tensor:
            shape = (1, case.tokens, heads, case.head_size)
            made = torch.randn(
                shape, generator=generator, device=case.device, dtype=dtype_of(case.dtype)
            )
            return made.transpose(1, 2).requires_grad_(case.backward)

        queries, keys = case.heads
        count = case.steps + 1
        return cls(
            case, random(queries), [random(keys) for _ in range(count)],
            [random(keys) for _ in range(count)],
        )  # fmt: skip

    @property
    def scale(self) -> float:
        """Of the scores."""
        return 1 / math.sqrt(self.case.head_size)

    def call(self, attend: Callable[[], Tensor], *tensors: Tensor) -> Call:
        """The attention, and the gradient of the tensors where the case has one."""
        if not self.case.backward:
            return torch.no_grad()(attend)
        gradient = torch.randn_like(attend())
        return lambda: torch.autograd.grad(attend(), tensors, gradient)


def ours(case: Case) -> Call:
    """The operator."""
    made = Inputs.of(case)
    rows = PackedRows(torch.zeros(1, case.tokens, dtype=torch.int64, device=case.device))
    return made.call(
        lambda: draft_attention(made.q, made.keys, made.values, rows, made.scale),
        made.q, *made.keys, *made.values,
    )  # fmt: skip


def flash(case: Case) -> Call:
    """Torch's causal attention to step 0; keys are shared by query heads without a copy."""
    made = Inputs.of(dataclasses.replace(case, steps=0))
    queries, keys = case.heads
    group = queries // keys

    def attend() -> Tensor:
        q = made.q.unflatten(1, (keys, group))[0]
        k, v = (t[0, :, None].expand(-1, group, -1, -1) for t in (made.keys[0], made.values[0]))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=made.scale)

    return made.call(attend, made.q, *made.keys, *made.values)


def dense(case: Case) -> Call:
    """Torch's attention with a mask; the mask is made once, as for the layers of a batch."""
    made = Inputs.of(case)

    @functools.cache
    def mask() -> Tensor:
        rows = torch.arange(case.tokens, device=case.device)
        columns = torch.arange((case.steps + 1) * case.tokens, device=case.device)
        causal = (columns <= rows[:, None]) & (columns < case.tokens)
        diagonal = (columns >= case.tokens) & (columns % case.tokens == rows[:, None])
        return causal | diagonal

    def attend() -> Tensor:
        return functional.scaled_dot_product_attention(
            made.q,
            torch.cat(made.keys, 2),
            torch.cat(made.values, 2),
            attn_mask=mask(),
            scale=made.scale,
            enable_gqa=True,
        )

    return made.call(attend, made.q, *made.keys, *made.values)


def flex(case: Case) -> Call:
    """Compiled flex attention."""
    made = Inputs.of(case)
    tokens = case.tokens

    def visible(_: Tensor, __: Tensor, row: Tensor, column: Tensor) -> Tensor:
        causal = (column < tokens) & (column <= row)
        return causal | ((column >= tokens) & (column % tokens == row))

    keys = (case.steps + 1) * tokens
    blocks = create_block_mask(visible, None, None, tokens, keys, device=case.device)
    attention: Callable[..., Tensor] = compiled(flex_attention)

    def attend() -> Tensor:
        return attention(
            made.q,
            torch.cat(made.keys, 2),
            torch.cat(made.values, 2),
            block_mask=blocks,
            scale=made.scale,
            enable_gqa=True,
        )

    return made.call(attend, made.q, *made.keys, *made.values)


def cases(bench: Bench) -> Iterator[Case]:
    """Rising in T; by default s = 6 over all sizes, then every s in the middle."""
    if bench.quick:
        for dtype, backward in itertools.product(DTYPES, (False, True)):
            for tokens in (128, 256):
                yield Case(tokens, (8, 4), 64, 2, dtype, backward, bench.device)
        return
    all_steps = range(STEPS + 1) if bench.full else [STEPS]
    directions = (False, True)
    for sizes in itertools.product(HEADS, HEAD_SIZES, all_steps, DTYPES, directions, TOKENS):
        heads, size, steps, dtype, backward, tokens = sizes
        if bench.full or not backward or (heads, size) == (HEADS_OF_GOALS, HEAD_SIZE_OF_GOALS):
            yield Case(tokens, heads, size, steps, dtype, backward, bench.device)
    if not bench.full:
        for dtype, steps in itertools.product(DTYPES, range(STEPS)):
            yield Case(
                TOKENS_OF_GOALS, HEADS_OF_GOALS, HEAD_SIZE_OF_GOALS, steps, dtype, False,
                bench.device,
            )  # fmt: skip


def run(bench: Bench) -> None:
    """All cases by all implementations."""
    worst: dict[str, float] = {}
    for case in cases(bench):
        _check(case)
        found = _measure(bench, case)
        kind = f"{case.dtype}{', with backward' if case.backward else ''}"
        goal = f"draft_attention, {kind}: times its floor, the worst"
        ratio = _seconds(found[OURS]) / (found[OURS].floor or math.nan)
        worst[goal] = max(worst.get(goal, 0.0), ratio)
        is_goal = (case.tokens, case.heads, case.head_size, case.steps) == (
            TOKENS_OF_GOALS, HEADS_OF_GOALS, HEAD_SIZE_OF_GOALS, STEPS,
        )  # fmt: skip
        if is_goal:
            speed = _seconds(found[DENSE]) / _seconds(found[OURS])
            bench.report.goal(f"draft_attention: times dense's speed, {case}", speed, least=3)
            share = _peak(found[OURS]) / _peak(found[DENSE])
            bench.report.goal(f"draft_attention: part of dense's peak, {case}", share, most=0.2)
    for goal, ratio in worst.items():
        bench.report.goal(goal, ratio, most=1.15)


def _measure(bench: Bench, case: Case) -> dict[str, Row]:
    selected = (case.heads, case.head_size) == (HEADS_OF_GOALS, HEAD_SIZE_OF_GOALS)
    selected = selected and (bench.quick or case.steps == STEPS)
    columns = case.steps + 1
    alone = bench.series.seconds(
        f"{FLASH} {case.series}", case.flash_flops, functools.partial(flash, case)
    )
    floor = alone.median + bench.floors.copy_seconds(case.diagonal_bytes)
    rows = {FLASH: Row("draft_attention", str(case), FLASH, alone, floor, flops=case.flash_flops)}
    for name, make, work in ((OURS, ours, case.flash_flops), (DENSE, dense, case.tokens**2)):
        series = f"{name} {case.series}"
        time = bench.series.seconds(series, work * columns, functools.partial(make, case))
        peak: Measured | None = None
        if selected:
            small = dataclasses.replace(case, tokens=64)
            peak = bench.series.peak(series, work * columns, make, case, small)
        rows[name] = Row(
            "draft_attention", str(case), name, time, floor, flops=case.flash_flops, peak=peak
        )
    if selected and bench.compiled:
        time_, note = bench.try_seconds(
            f"{FLEX} {case.series}", case.tokens**2, functools.partial(flex, case)
        )
        rows[FLEX] = Row(
            "draft_attention", str(case), FLEX, time_, floor, flops=case.flash_flops, note=note
        )
    for row in rows.values():
        bench.report.add(row)
    return rows


def _check(case: Case) -> None:
    """A benchmark of something else would be worse than none: the smallest sizes are compared."""
    if case.tokens > TOKENS[0] or case.backward:
        return
    found, expected = ours(case)(), dense(case)()
    assert isinstance(found, Tensor)  # noqa: S101 - for the type checker
    assert isinstance(expected, Tensor)  # noqa: S101 - for the type checker
    tolerance = 1e-5 if case.dtype == "float32" else 2e-2
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=tolerance, atol=tolerance)


def _seconds(row: Row) -> float:
    return math.nan if row.time is None else row.time.median


def _peak(row: Row) -> float:
    return math.nan if row.peak is None else row.peak.median
