"""The distillation loss: heads and loss in chunks, and the row losses by themselves.

The first table is a whole loss, forward and backward, from the states of K drafting steps and of
the verifier. Its peer is the textbook: the verifier's logits and those of every step as whole
matrices, softmax in float32, autograd for the rest. The floor is the time of the heads' matrix
products. The second table is the loss of given logits, whose floor is the copying of its bytes: the
two logits of every row are read and the gradient is written.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import torch
from benchmarks.measurement import Call, dtype_of
from benchmarks.ops.bench import Bench, compiled
from benchmarks.report import Row
from torch import Tensor
from torch.nn import functional

from speculators.ops.chunked_distillation import DraftStep, chunked_distillation
from speculators.ops.distillation_loss import row_losses_and_gradient_, row_losses_reference
from speculators.ops.target_distribution import TargetDistribution, target_distribution

HEADS_AND_LOSS, ROWS = "distillation_loss: heads and loss", "distillation_loss: given logits"
OURS, MATERIALISED = "in chunks", "whole logits"

# The case of the goals, and the rows in which equality is checked.
TOKENS, HIDDEN, STEPS, VOCABULARY = 2048, 1024, 3, 151936
CHECKED_TOKENS = 128

LOSSES: Mapping[str, Mapping[str, float]] = {
    "kl": {"kl": 1.0},
    "ce_soft + topk": {"ce_soft": 1.0, "topk": 1.0},
    "lk_hybrid": {"lk_hybrid": 1.0},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One size of heads and loss.

    Attributes:
        tokens: T, the verifier's rows; step k learns in the T - 1 - k rows that have a target.
        hidden: H.
        steps: K.
        vocabulary: V, the draft's as well.
        trained: whether the draft's head is trained, or frozen.
        dtype: of states, weights and logits.
        device: where.
    """

    tokens: int
    hidden: int
    steps: int
    vocabulary: int
    trained: bool
    dtype: str
    device: str

    def __str__(self) -> str:
        head = "trained" if self.trained else "frozen"
        return (
            f"{self.dtype} T={self.tokens} H={self.hidden} K={self.steps} V={self.vocabulary} "
            f"head {head}"
        )

    @property
    def series(self) -> str:
        """The same for cases that differ in the number of tokens alone."""
        return str(dataclasses.replace(self, tokens=0))

    @property
    def flops(self) -> int:
        """Of the heads: the verifier's, the draft's, and the gradients of states and weight."""
        rows = sum(self.tokens - 1 - step for step in range(self.steps))
        products = 3 if self.trained else 2
        return 2 * self.hidden * self.vocabulary * (self.tokens + products * rows)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Random states and heads: logits of size 2, so that the distributions are far from even."""

    case: Case
    target_states: Tensor
    states: list[Tensor]
    target_head: Tensor
    draft_head: Tensor

    @classmethod
    def of(cls, case: Case) -> "Inputs":
        """Always the same ones."""
        generator = torch.Generator(case.device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(
                shape, generator=generator, device=case.device, dtype=dtype_of(case.dtype)
            )

        size = 2 / case.hidden**0.5
        return cls(
            case,
            random(case.tokens, case.hidden),
            [random(case.tokens, case.hidden).requires_grad_() for _ in range(case.steps)],
            random(case.vocabulary, case.hidden) * size,
            (random(case.vocabulary, case.hidden) * size).requires_grad_(case.trained),
        )

    @property
    def wanted(self) -> list[Tensor]:
        """What gets a gradient."""
        return [*self.states, *([self.draft_head] if self.case.trained else [])]

    def pairs(self, step: int) -> tuple[Tensor, Tensor, float]:
        """Draft rows and target rows of a step, and the weight of each."""
        rows = torch.arange(self.case.tokens - 1 - step, device=self.case.device)
        return rows, rows + 1 + step, 1 / len(rows)


def loss_in_chunks(made: Inputs) -> Tensor:
    """By the operator."""
    steps = [DraftStep(states, *made.pairs(step)) for step, states in enumerate(made.states)]
    return chunked_distillation(
        steps,
        made.target_states,
        draft_head=lambda states: functional.linear(states, made.draft_head),
        target_head=lambda states: functional.linear(states, made.target_head),
        losses={"kl": 1.0},
        draft_parameters=[made.draft_head],
    ).loss


def loss_of_whole_logits(made: Inputs) -> Tensor:
    """As a textbook has it."""
    logits = functional.linear(made.target_states, made.target_head)
    log_p = functional.log_softmax(logits, -1, dtype=torch.float32)
    total = torch.zeros((), device=made.case.device)
    for step, states in enumerate(made.states):
        rows, targets, weight = made.pairs(step)
        logits = functional.linear(states[rows], made.draft_head)
        log_q = functional.log_softmax(logits, -1, dtype=torch.float32)
        divergence = functional.kl_div(log_q, log_p[targets], reduction="none", log_target=True)
        total = total + weight * divergence.sum()
    return total


def in_chunks(case: Case) -> Call:
    """Loss and gradient by the operator."""
    made = Inputs.of(case)
    return lambda: torch.autograd.grad(loss_in_chunks(made), made.wanted)


def whole_logits(case: Case) -> Call:
    """Loss and gradient as a textbook has it."""
    made = Inputs.of(case)
    return lambda: torch.autograd.grad(loss_of_whole_logits(made), made.wanted)


def cases(bench: Bench) -> Iterator[Case]:
    """Rising in T."""
    if bench.quick:
        for dtype in ("float32", "bfloat16"):
            yield Case(64, 32, 2, 512, True, dtype, bench.device)
        return
    for trained in (False, True):
        for dtype in ("float32", "bfloat16"):
            for tokens in (TOKENS // 8, TOKENS):
                yield Case(tokens, HIDDEN, STEPS, VOCABULARY, trained, dtype, bench.device)


def run(bench: Bench) -> None:
    """Both tables, and whether the losses are equal."""
    for case in cases(bench):
        found: dict[str, Row] = {}
        for name, make in ((OURS, in_chunks), (MATERIALISED, whole_logits)):
            series = f"{name} {case.series}"
            time = bench.series.seconds(series, case.tokens, functools.partial(make, case))
            small = dataclasses.replace(case, tokens=32, hidden=64, vocabulary=512)
            peak = bench.series.peak(series, case.tokens, make, case, small)
            floor = case.flops / bench.floors.matmul_rate(case.dtype)
            row = Row(
                HEADS_AND_LOSS, str(case), name, time, floor, flops=case.flops, peak=peak
            )  # fmt: skip
            found[name] = bench.report.add(row)
        if case.tokens == TOKENS:
            ours, peer = found[OURS], found[MATERIALISED]
            assert ours.time and peer.time and ours.peak and peer.peak  # noqa: PT018, S101
            speed = peer.time.median / ours.time.median
            bench.report.goal(
                f"distillation_loss: times whole logits' speed, {case}", speed, least=2
            )
            share = ours.peak.median / peer.peak.median
            bench.report.goal(f"distillation_loss: part of its peak, {case}", share, most=0.2)
    _check(bench)
    _rows(bench)


def _check(bench: Bench) -> None:
    """The two losses, and their gradients, in float32."""
    vocabulary = 512 if bench.quick else VOCABULARY
    case = Case(CHECKED_TOKENS, HIDDEN, STEPS, vocabulary, True, "float32", bench.device)
    made = Inputs.of(case)
    ours, peer = loss_in_chunks(made), loss_of_whole_logits(made)
    distance = float((ours - peer).detach().abs() / peer.detach().abs())
    gradients = zip(
        torch.autograd.grad(ours, made.wanted), torch.autograd.grad(peer, made.wanted), strict=True
    )
    for found, expected in gradients:
        distance = max(distance, float((found - expected).abs().max() / expected.abs().max()))
    bench.report.goal(f"distillation_loss: distance to whole logits, {case}", distance, most=1e-5)


@dataclasses.dataclass(frozen=True)
class RowCase:
    """One size of the loss of given logits: R rows, W tokens."""

    rows: int
    vocabulary: int
    losses: str
    dtype: str
    device: str

    def __str__(self) -> str:
        return f"{self.losses}, {self.dtype} R={self.rows} W={self.vocabulary}"

    @property
    def moved(self) -> int:
        """Draft logits in, gradient out, and the target's log p, in float32."""
        return self.rows * self.vocabulary * (2 * dtype_of(self.dtype).itemsize + 4)

    def inputs(self) -> tuple[Tensor, TargetDistribution]:
        """Draft logits and target, always the same."""
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (self.rows, self.vocabulary)
        draft, target = (
            3 * torch.randn(shape, generator=generator, device=self.device) for _ in range(2)
        )
        distribution = target_distribution(target)
        distribution.top(10)  # every drafting step asks again; only the first has to look
        return draft.to(dtype_of(self.dtype)), distribution


def row_operator(case: RowCase) -> Call:
    """The operator; the logits that it overwrites are gradients after the first time."""
    draft, target = case.inputs()
    losses = LOSSES[case.losses]
    return lambda: row_losses_and_gradient_(draft, target, losses)


def row_torch(case: RowCase, *, is_compiled: bool) -> Call:
    """The definition, in torch's operators, and autograd."""
    draft, target = case.inputs()
    draft.requires_grad_()
    losses = LOSSES[case.losses]

    def loss(draft: Tensor) -> Tensor:
        return row_losses_reference(draft, target, losses).loss.sum()

    function = compiled(loss) if is_compiled else loss
    return lambda: torch.autograd.grad(function(draft), draft)


def _rows(bench: Bench) -> None:
    sizes = [(32, 512)] if bench.quick else [(512, 32000), (256, VOCABULARY)]
    for rows, vocabulary in sizes:
        for losses in LOSSES:
            for dtype in ("float32", "bfloat16"):
                _row(bench, RowCase(rows, vocabulary, losses, dtype, bench.device))


def _row(bench: Bench, case: RowCase) -> None:
    floor = bench.floors.copy_seconds(case.moved)
    peers = {
        "operator": functools.partial(row_operator, case),
        "torch": functools.partial(row_torch, case, is_compiled=False),
    }
    if bench.compiled:
        peers["torch.compile"] = functools.partial(row_torch, case, is_compiled=True)
    for name, make in peers.items():
        time, note = bench.try_seconds(f"{name} {case}", case.rows, make)
        bench.report.add(Row(ROWS, str(case), name, time, floor, moved=case.moved, note=note))
