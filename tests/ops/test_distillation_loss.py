"""Row losses: each against its formula, written plainly in probabilities and float64.

All of it for what serves by itself and for the definition in torch's own operators.
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch import Tensor

from speculators.ops import backend
from speculators.ops.distillation_loss import (
    MIN_LOG_P,
    RowLosses,
    distillation_loss,
    smooth_l1_rows,
)

ROWS, DRAFT_VOCABULARY, VOCABULARY = 9, 12, 20
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


# Of the module and not of each test: hypothesis runs a test many times with one fixture.
@pytest.fixture(autouse=True, params=["what serves", "reference"], scope="module")
def back_end(request: pytest.FixtureRequest) -> Iterator[None]:
    force = backend.forced("reference") if request.param == "reference" else None
    with force or contextlib.nullcontext():
        yield


def overlap(p: Tensor, q: Tensor) -> Tensor:
    return torch.minimum(p, q).sum()


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p[p > 0] * (p[p > 0] / q[p > 0]).log()).sum()


def lk_hybrid(p: Tensor, q: Tensor) -> Tensor:
    share = math.exp(-3 * overlap(p, q).item())
    return share * kl(p, q) + (1 - share) * (1 - overlap(p, q))


# One row each: p and q are float64 [W], q carries the gradient, token is the data's or None.
FORMULAS: dict[str, Callable[[Tensor, Tensor, int | None], Tensor]] = {
    "kl": lambda p, q, _: kl(p, q),
    "rkl": lambda p, q, _: (q * (q.log() - p.log().clamp(min=MIN_LOG_P))).sum(),
    "jsd": lambda p, q, _: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
    "ce_soft": lambda p, q, _: -(p * q.log()).sum(),
    "ce_argmax": lambda p, q, _: -q[p.argmax()].log(),
    "ce_data": lambda _, q, token: q.sum() * 0 if token is None else -q[token].log(),
    "tv": lambda p, q, _: 1 - overlap(p, q),
    "nla": lambda p, q, _: -overlap(p, q).log(),
    "lk_hybrid": lambda p, q, _: lk_hybrid(p, q),
    "topk": lambda p, q, _: -(p * q.log())[p.argsort(descending=True)[:10]].sum(),
}


def random_case(seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draft logits [R, W], target logits [R, V], draft_to_verifier [W], data tokens [R]."""
    generator = torch.Generator().manual_seed(seed)
    draft = torch.randn(ROWS, DRAFT_VOCABULARY, generator=generator) * scale
    target = torch.randn(ROWS, VOCABULARY, generator=generator) * scale
    selection = torch.randperm(VOCABULARY, generator=generator)[:DRAFT_VOCABULARY].sort().values
    tokens = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    return draft, target, selection, tokens


def expected_rows(
    draft: Tensor,
    target: Tensor,
    losses: dict[str, float],
    selection: Tensor | None = None,
    tokens: Tensor | None = None,
    mask: bool = True,
) -> tuple[Tensor, Tensor]:
    """Losses [R] and their gradient [R, W], in float64, row by row."""
    chosen = list(range(target.shape[1])) if selection is None else selection.tolist()
    logits = draft.detach().double().requires_grad_()
    rows = []
    for row in range(len(draft)):
        full_p = target[row].double().softmax(-1)
        p = full_p[chosen] / full_p[chosen].sum()
        token = None
        if tokens is not None and tokens[row].item() in chosen:
            token = chosen.index(tokens[row].item())
        q = logits[row].softmax(-1)
        loss = sum(
            (factor * FORMULAS[name](p, q, token) for name, factor in losses.items()),
            start=torch.zeros((), dtype=torch.float64),
        )
        rows.append(loss * 0 if mask and int(full_p.argmax()) not in chosen else loss)
    result = torch.stack(rows)
    (gradient,) = torch.autograd.grad(result.sum(), logits)
    return result.detach(), gradient


def restricted(
    draft: Tensor, target: Tensor, losses: dict[str, float], selection: Tensor, tokens: Tensor
) -> RowLosses:
    return distillation_loss(draft, target, losses, draft_to_verifier=selection, data_tokens=tokens)


def gradient_of(result: RowLosses, logits: Tensor) -> Tensor:
    return torch.autograd.grad(result.loss.sum(), logits)[0]


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_equals_the_formula_and_its_gradient(name: str, restricted: bool, device: str) -> None:
    draft, target, selection, tokens = random_case()
    if not restricted:
        target, tokens = target[:, :DRAFT_VOCABULARY].contiguous(), tokens % DRAFT_VOCABULARY
    for mask in (True, False):
        chosen = selection if restricted else None
        loss, gradient = expected_rows(draft, target, {name: 1.0}, chosen, tokens, mask)
        logits = draft.to(device).requires_grad_()
        result = distillation_loss(
            logits,
            target.to(device),
            {name: 1.0},
            draft_to_verifier=None if chosen is None else chosen.to(device),
            data_tokens=tokens.to(device),
            mask_out_of_vocabulary=mask,
        )
        assert result.loss.dtype == torch.float32
        torch.testing.assert_close(result.loss.detach().cpu().double(), loss, rtol=1e-5, atol=2e-6)
        found = gradient_of(result, logits).cpu().double()
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", FORMULAS)
def test_float64_is_kept(name: str) -> None:
    draft, target, selection, tokens = random_case(seed=1)
    logits = draft.double().requires_grad_()
    loss, gradient = expected_rows(draft, target, {name: 1.0}, selection, tokens)
    result = restricted(logits, target.double(), {name: 1.0}, selection, tokens)
    torch.testing.assert_close(result.loss.detach(), loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient_of(result, logits), gradient, rtol=1e-11, atol=1e-12)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    losses=strategies.dictionaries(
        strategies.sampled_from(sorted(FORMULAS)), strategies.floats(-2, 2), min_size=1, max_size=4
    ),
    seed=strategies.integers(0, 1000),
    mask=strategies.booleans(),
)
def test_a_weighted_sum_is_the_sum(losses: dict[str, float], seed: int, mask: bool) -> None:
    draft, target, selection, tokens = random_case(seed)
    draft, target = draft.double().requires_grad_(), target.double()
    row_weights = torch.rand(ROWS, generator=torch.Generator().manual_seed(seed))
    loss, gradient = expected_rows(draft, target, losses, selection, tokens, mask)
    result = distillation_loss(
        draft,
        target,
        losses,
        draft_to_verifier=selection,
        data_tokens=tokens,
        weights=row_weights,
        mask_out_of_vocabulary=mask,
    )
    weights = row_weights.double()
    torch.testing.assert_close(result.loss.detach(), loss * weights, rtol=1e-10, atol=1e-11)
    found = gradient_of(result, draft)
    torch.testing.assert_close(found, gradient * weights[:, None], rtol=1e-9, atol=1e-11)


def test_acceptance_is_measured_against_the_full_distribution() -> None:
    # The verifier: 0.4 on token 4, which the draft lacks; the draft's tokens are 1, 2 and 5.
    p = torch.tensor([[0.1, 0.3, 0.1, 0.0, 0.4, 0.1], [0.1, 0.6, 0.1, 0.0, 0.1, 0.1]])
    q = torch.tensor([[0.2, 0.6, 0.2], [0.5, 0.25, 0.25]])
    result = distillation_loss(
        q.log(), p.log(), {"kl": 1.0}, draft_to_verifier=torch.tensor([1, 2, 5])
    )
    torch.testing.assert_close(result.alpha, torch.tensor([0.2 + 0.1 + 0.1, 0.5 + 0.1 + 0.1]))
    torch.testing.assert_close(result.greedy_acceptance, torch.tensor([0.1, 0.6]))
    assert result.agreement.tolist() == [False, True]
    assert result.in_vocabulary.tolist() == [False, True]
    assert result.loss[0] == 0
    assert result.loss[1] > 0


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    draft, target, selection, tokens = random_case(seed=2)
    draft, target = draft.to(dtype), target.to(dtype)
    loss, gradient = expected_rows(draft, target, {name: 1.0}, selection, tokens)
    logits = draft.clone().requires_grad_()
    result = restricted(logits, target, {name: 1.0}, selection, tokens)
    torch.testing.assert_close(result.loss.detach().double(), loss, rtol=1e-5, atol=2e-6)
    found = gradient_of(result, logits)
    assert found.dtype == dtype
    # Only the gradient's last step, to the logits' dtype, rounds.
    torch.testing.assert_close(found, gradient.to(dtype), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_extreme_logits_stay_finite(name: str, dtype: torch.dtype) -> None:
    infinity = float("inf")
    target = torch.tensor(
        [[1e4, -1e4, 0, 5], [-infinity, 3, -infinity, 1], [0, -infinity, -infinity, -infinity]]
    ).repeat(3, 1)
    draft = torch.tensor([[1e4, -1e4, 0, 5], [-1e4, 1e4, 0, 0], [0, 0, 0, 0]])
    draft = draft.repeat_interleave(3, dim=0)
    tokens = torch.arange(9) % 4
    logits = draft.to(dtype).requires_grad_()
    result = distillation_loss(logits, target.to(dtype), {name: 1.0}, data_tokens=tokens)
    gradient = gradient_of(result, logits)
    assert result.loss.isfinite().all()
    assert gradient.isfinite().all()
    assert (gradient.float().sum(-1).abs() < 1e-2 * (1 + gradient.float().abs().sum(-1))).all()


def test_no_overlap_has_a_gradient_that_helps() -> None:
    """No token has both p and q: alpha is 0 in float32, but nla still says where to go."""
    target = torch.tensor([[300.0, 0.0, -200.0], [300.0, -float("inf"), 0.0]])
    logits = torch.tensor([[0.0, 200.0, -50.0], [0.0, 200.0, -50.0]], requires_grad=True)
    result = distillation_loss(logits, target, {"nla": 1.0})
    assert result.alpha.tolist() == [0, 0]
    torch.testing.assert_close(result.loss.detach(), torch.tensor([200.0, 200.0]))
    # -log alpha = -log q(0) = 200: up with token 0, down with token 1.
    expected = torch.tensor([[-1.0, 1.0, 0.0], [-1.0, 1.0, 0.0]])
    torch.testing.assert_close(gradient_of(result, logits), expected)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("mask", [True, False])
def test_a_row_out_of_reach_has_no_loss(name: str, mask: bool) -> None:
    """All of p is on tokens that the draft cannot say: nothing to renormalise."""
    target = torch.tensor([[0.0, -float("inf"), -float("inf")], [0.0, 1.0, 2.0]])
    logits = torch.tensor([[1.0, 2.0], [1.0, 2.0]], requires_grad=True)
    result = distillation_loss(
        logits,
        target,
        {name: 1.0},
        draft_to_verifier=torch.tensor([1, 2]),
        data_tokens=torch.tensor([2, 2]),
        mask_out_of_vocabulary=mask,
    )
    gradient = gradient_of(result, logits)
    assert result.loss[0] == result.alpha[0] == result.greedy_acceptance[0] == 0
    assert gradient[0].tolist() == [0, 0]
    assert result.loss.isfinite().all()
    assert gradient.isfinite().all()


def test_topk_takes_k_tokens_of_p() -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.3, 0.5]])
    for k, expected in ((1, 0.5 * math.log(5)), (2, 0.5 * math.log(5) - 0.3 * math.log(0.3))):
        found = distillation_loss(q.log(), p.log(), {"topk": 1.0}, top_k=k).loss.item()
        assert found == pytest.approx(expected, rel=1e-6)


def test_smooth_l1_is_averaged_over_the_width() -> None:
    predicted = torch.tensor([[0.5, 3.0], [0.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(2, 2, requires_grad=True)
    rows = smooth_l1_rows(predicted, target)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.detach(), torch.tensor([(0.125 + 2.5) / 2, 0.0]))
    rows.sum().backward()
    assert predicted.grad is not None
    assert predicted.grad.tolist() == [[0.25, 0.5], [0, 0]]
    assert target.grad is None
    with pytest.raises(ValueError, match=r"\[2, 2\] and \[2, 3\]"):
        smooth_l1_rows(predicted, torch.zeros(2, 3))


def test_no_rows() -> None:
    logits = torch.zeros(0, 4, requires_grad=True)
    tokens = torch.zeros(0, dtype=torch.int64)
    every = dict.fromkeys(FORMULAS, 1.0)
    result = distillation_loss(logits, torch.zeros(0, 4), every, data_tokens=tokens)
    assert result.loss.shape == result.alpha.shape == (0,)
    assert gradient_of(result, logits).shape == (0, 4)


def test_wrong_arguments_are_named() -> None:
    draft, target, selection, tokens = random_case()
    good = {"draft_logits": draft, "target_logits": target, "losses": {"kl": 1.0}}
    good["draft_to_verifier"] = selection
    wrong: list[tuple[dict[str, object], type[Exception], str]] = [
        ({"losses": {"kl_divergence": 1.0}}, ValueError, "'kl_divergence', expected one of kl, rk"),
        ({"losses": {}}, ValueError, "losses is empty"),
        ({"losses": {"kl": math.nan}}, ValueError, "weight nan"),
        ({"losses": {"ce_data": 1.0}}, ValueError, "needs data_tokens"),
        ({"draft_to_verifier": None}, ValueError, r"\[9, 12\], expected \[9, 20\]"),
        ({"draft_to_verifier": selection.int()}, TypeError, "int32, expected torch.int64"),
        ({"draft_to_verifier": selection[None]}, ValueError, r"expected \[W\]"),
        ({"draft_logits": draft[1:]}, ValueError, r"\[8, 12\], expected \[9, 12\]"),
        ({"draft_logits": draft.int()}, TypeError, "expected a float dtype"),
        ({"target_logits": target[0]}, ValueError, "expected .rows, vocabulary"),
        ({"data_tokens": tokens.int()}, TypeError, "data_tokens is torch.int32"),
        ({"weights": torch.ones(3)}, ValueError, r"weights has the shape \[3\]"),
        ({"top_k": 0}, ValueError, "top_k is 0"),
    ]
    for change, error, message in wrong:
        with pytest.raises(error, match=message):
            distillation_loss(**{**good, **change})  # type: ignore[arg-type]
