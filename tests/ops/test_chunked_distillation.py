"""Chunks change nothing but memory: the loss and every gradient equal the materialised ones."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch import Tensor, nn

from speculators.ops import chunked_distillation as chunked
from speculators.ops.chunked_distillation import (
    ChunkedLoss,
    DraftStep,
    chunked_distillation,
    default_chunk_rows,
)
from speculators.ops.distillation_loss import distillation_loss

TOKENS, DRAFT_ROWS, HIDDEN, VERIFIER_HIDDEN, VOCABULARY, DRAFT_VOCABULARY = 23, 25, 6, 5, 17, 9
LOSSES = {"kl": 1.0, "tv": 0.5, "ce_data": 0.25}
ROW_FIELDS = ("loss", "alpha", "greedy_acceptance", "agreement", "in_vocabulary")


class RecordingHead(nn.Linear):
    """A head that notes how many rows it is given at a time."""

    def __init__(self, width: int, vocabulary: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(width, vocabulary, bias=bias, dtype=dtype)
        self.calls: list[int] = []
        self.dtypes: set[torch.dtype] = set()

    def forward(self, states: Tensor) -> Tensor:
        """Logits, and notes."""
        logits = super().forward(states)
        self.calls.append(len(logits))
        self.dtypes.add(logits.dtype)
        return logits


@dataclasses.dataclass
class Case:
    """Three steps of random rows, two heads, and what else the loss takes."""

    steps: list[DraftStep]
    target_states: Tensor
    draft_head: RecordingHead
    target_head: RecordingHead
    selection: Tensor
    tokens: Tensor

    def run(self, chunk_rows: int | None, **options: Any) -> ChunkedLoss:
        """The loss in chunks."""
        arguments: dict[str, Any] = {
            "draft_head": self.draft_head,
            "target_head": self.target_head,
            "losses": LOSSES,
            "draft_parameters": self.draft_head.parameters(),
            "draft_to_verifier": self.selection,
            "data_tokens": self.tokens,
            "chunk_rows": chunk_rows,
        }
        return chunked_distillation(self.steps, self.target_states, **{**arguments, **options})

    def materialised(self) -> Tensor:
        """The definition: all logits whole, one step after the other, torch's own autograd."""
        with torch.no_grad():
            target_logits = self.target_head(self.target_states)
        total = torch.zeros((), dtype=self.target_states.dtype)
        for step in self.steps:
            rows = distillation_loss(
                self.draft_head(step.head_input)[step.draft_rows],
                target_logits[step.target_rows],
                LOSSES,
                draft_to_verifier=self.selection,
                data_tokens=self.tokens[step.target_rows],
            )
            total = total + (rows.loss * step.weight).sum()
        return total

    @property
    def inputs(self) -> list[Tensor]:
        """What is to learn."""
        learned = [step.head_input for step in self.steps if step.head_input.requires_grad]
        return [*learned, *(p for p in self.draft_head.parameters() if p.requires_grad)]


def make_case(
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    counts: tuple[int, ...] = (14, 0, 31),
    bias: bool = True,
) -> Case:
    torch.manual_seed(seed)
    steps = []
    for number, count in enumerate(counts):
        weights: list[float | Tensor] = [0.5, torch.rand(count), torch.tensor(0.125)]
        draft_rows = torch.randint(DRAFT_ROWS, (count,))
        target_rows = torch.randint(3, TOKENS, (count,))  # some rows are nobody's
        states = torch.randn(DRAFT_ROWS, HIDDEN, dtype=dtype, requires_grad=True)
        steps.append(DraftStep(states, draft_rows, target_rows, weights[number % 3]))
    case = Case(
        steps,
        torch.randn(TOKENS, VERIFIER_HIDDEN, dtype=dtype) * 2,
        RecordingHead(HIDDEN, DRAFT_VOCABULARY, bias=bias, dtype=dtype),
        RecordingHead(VERIFIER_HIDDEN, VOCABULARY, bias=False, dtype=dtype),
        torch.randperm(VOCABULARY)[:DRAFT_VOCABULARY].sort().values,
        torch.randint(VOCABULARY, (TOKENS,)),
    )
    case.target_head.requires_grad_(False)
    return case


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk_rows", [1, 7, 1000, None])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("counts", [(14, 0, 31), (60, 3, 1), (0, 0, 0)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_materialised_loss(
    chunk_rows: int | None,
    dtype: torch.dtype,
    tolerance: float,
    counts: tuple[int, ...],
    bias: bool,
) -> None:
    case = make_case(0, dtype, counts, bias)
    expected = case.materialised()
    gradients = torch.autograd.grad(expected, case.inputs)
    result = case.run(chunk_rows)
    assert result.loss.dtype == dtype
    torch.testing.assert_close(result.loss, expected, rtol=tolerance, atol=tolerance)
    found = torch.autograd.grad(result.loss * 2, case.inputs)
    assert_same(found, [2 * gradient for gradient in gradients], tolerance)
    assert result.rows.tolist() == list(counts)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    seed=strategies.integers(0, 999),
    counts=strategies.lists(strategies.integers(0, 40), min_size=1, max_size=5).map(tuple),
    chunk_rows=strategies.integers(1, 30),
)
def test_any_rows_in_any_chunks(seed: int, counts: tuple[int, ...], chunk_rows: int) -> None:
    case = make_case(seed, counts=counts)
    expected = torch.autograd.grad(case.materialised(), case.inputs)
    found, again = (torch.autograd.grad(case.run(chunk_rows).loss, case.inputs) for _ in "12")
    assert_same(found, expected, 1e-11)
    assert_same(again, found, 0)


def test_gradcheck() -> None:
    case = make_case(counts=(4, 3))

    def loss(first: Tensor, second: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        states = (first, second)
        case.steps = [
            dataclasses.replace(step, head_input=state)
            for step, state in zip(case.steps, states, strict=True)
        ]
        options = {"draft_head": lambda rows: rows @ weight.T + bias}
        return case.run(5, draft_parameters=[weight, bias], **options).loss

    assert torch.autograd.gradcheck(loss, case.inputs, fast_mode=True)


@pytest.mark.parametrize("chunk_rows", [1, 4, 10])
def test_no_logits_are_larger_than_a_chunk_and_none_are_computed_twice(
    chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "ROW_MULTIPLE", 1)
    case = make_case(counts=(14, 25, 40))
    used = torch.cat([step.target_rows for step in case.steps]).unique()
    result = case.run(chunk_rows)
    result.loss.backward()
    assert max(case.draft_head.calls) <= chunk_rows
    assert max(case.target_head.calls) <= chunk_rows
    assert sum(case.draft_head.calls) == 14 + 25 + 40
    assert sum(case.target_head.calls) == len(used) < TOKENS


def test_heads_see_few_different_numbers_of_rows() -> None:
    case = make_case(counts=(14, 25, 40))
    case.run(10)
    calls = {*case.draft_head.calls, *case.target_head.calls}
    assert calls - {0} == {chunked.ROW_MULTIPLE}


def test_the_sums_are_those_of_the_rows() -> None:
    case = make_case()
    result = case.run(5)
    for number, step in enumerate(case.steps):
        rows = distillation_loss(
            case.draft_head(step.head_input)[step.draft_rows],
            case.target_head(case.target_states)[step.target_rows],
            LOSSES,
            draft_to_verifier=case.selection,
            data_tokens=case.tokens[step.target_rows],
        )
        for name in ROW_FIELDS:
            found, expected = getattr(result, f"{name}_sum"), getattr(rows, name).double().sum()
            torch.testing.assert_close(found[number], expected)
            assert not found.requires_grad


def test_no_list_is_copied_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that waits for all that is enqueued before it."""
    case = make_case()
    with monkeypatch.context() as patched:
        patched.delattr(torch, "tensor")
        result = case.run(5)
    assert result.rows.dtype == torch.int64
    assert result.rows.tolist() == [14, 0, 31]


def test_a_frozen_head_passes_the_gradient_on() -> None:
    case = make_case()
    case.draft_head.requires_grad_(False)
    expected = torch.autograd.grad(case.materialised(), case.inputs)
    found = torch.autograd.grad(case.run(4, draft_parameters=()).loss, case.inputs)
    assert_same(found, expected, 1e-12)


def test_shared_tensors_add_up() -> None:
    """One state in two steps, a head used outside as well, and the loss used twice."""
    case = make_case(counts=(14, 9, 31))
    shared = case.steps[0].head_input
    case.steps[2] = dataclasses.replace(case.steps[2], head_input=shared * 2)
    case.steps[1] = dataclasses.replace(case.steps[1], head_input=shared)

    def twice(loss: Callable[[], Tensor]) -> Tensor:
        outside: Tensor = case.draft_head(shared).square().sum()
        return loss() + 3 * loss() + outside

    leaves = [shared, *case.draft_head.parameters()]
    expected = torch.autograd.grad(twice(case.materialised), leaves, retain_graph=True)
    found = torch.autograd.grad(twice(lambda: case.run(6).loss), leaves)
    assert_same(found, expected, 1e-12)


def test_without_gradient_nothing_is_kept() -> None:
    case = make_case()
    with torch.no_grad():
        result = case.run(4)
    assert not result.loss.requires_grad
    torch.testing.assert_close(result.loss, case.materialised().detach())
    case.steps[0].head_input.requires_grad_(False)
    expected = torch.autograd.grad(case.materialised(), case.inputs)
    assert_same(torch.autograd.grad(case.run(4).loss, case.inputs), expected, 1e-12)


def test_autocast_computes_logits_in_bfloat16_and_the_loss_in_float32() -> None:
    case = make_case(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = case.run(4)
        expected = case.materialised()
    assert case.draft_head.dtypes == {torch.bfloat16}
    exact = torch.autograd.grad(case.run(4).loss, case.inputs)
    assert result.loss.dtype == torch.float32
    torch.testing.assert_close(result.loss, expected, rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad(result.loss, case.inputs)
    for one, other, tensor in zip(found, exact, case.inputs, strict=True):
        assert one.dtype == tensor.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.02)


def test_a_tied_head_learns_under_autocast() -> None:
    """The head runs without gradient first; that copy of its weight must not be used later."""
    case = make_case(dtype=torch.float32, bias=False)
    head = case.draft_head
    with torch.autocast("cpu", dtype=torch.bfloat16):
        case.target_states = torch.randn(TOKENS, HIDDEN)
        loss = case.run(4, target_head=head, draft_to_verifier=None, losses={"kl": 1.0}).loss
        outside = head(case.target_states).float().square().mean()
    for result in (loss, outside):
        assert torch.autograd.grad(result, head.weight)[0].abs().max() > 0


def test_bfloat16_parameters_add_up_in_float32() -> None:
    case = make_case(dtype=torch.bfloat16, counts=(400,))
    found = torch.autograd.grad(case.run(1).loss, case.inputs)
    expected = torch.autograd.grad(case.run(1000).loss, case.inputs)
    assert found[1].dtype == torch.bfloat16
    torch.testing.assert_close(found[1], expected[1], rtol=0.02, atol=1e-3)


def test_the_default_chunk_fits_the_vocabulary() -> None:
    assert [default_chunk_rows(size) for size in (4096, 32000, 10**6)] == [1024, 524, 256]


def test_wrong_arguments_are_named() -> None:
    case = make_case()
    good = case.steps[0]
    for change, error, message in (
        ({"draft_rows": good.draft_rows.int()}, TypeError, r"steps\[0\].draft_rows is torch.int32"),
        ({"target_rows": good.target_rows[1:]}, ValueError, r"target_rows has the shape \[13\]"),
        ({"head_input": good.head_input[None]}, ValueError, r"\[1, 25, 6\], expected \[N, H\]"),
        ({"weight": torch.ones(3)}, ValueError, r"weight has the shape \[3\]"),
        ({"target_rows": good.target_rows + TOKENS}, IndexError, "out of range"),
    ):
        case.steps = [dataclasses.replace(good, **change)]
        with pytest.raises(error, match=message):
            case.run(4)
    case.steps = [good]
    for chunk_rows, options, message in (
        (0, {}, "chunk_rows is 0"),
        (4, {"losses": {"mse": 1.0}}, "unknown loss 'mse'"),
        (4, {"data_tokens": case.tokens[1:]}, "data_tokens has the shape"),
        (4, {"draft_parameters": [case.draft_head.weight]}, r"_parameters .* lacks 1 .* \[\[9\]\]"),
    ):
        with pytest.raises(ValueError, match=message):
            case.run(chunk_rows, **options)
    case.steps = []
    with pytest.raises(ValueError, match="steps is empty"):
        case.run(4)
