"""The compiled row losses against their definition, which runs in float64 here."""

import dataclasses
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch import Tensor

from speculators.ops import backend
from speculators.ops.backend import Backend
from speculators.ops.distillation_loss import (
    RowLosses,
    row_losses,
    row_losses_and_gradient_,
    row_losses_reference,
)
from speculators.ops.row_loss_operator import LOSSES, MAX_TOP_K, RowLossInputs, serves
from speculators.ops.target_distribution import TargetDistribution, target_distribution

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.float32, torch.bfloat16]
FIELDS = ("loss", "alpha", "greedy_acceptance", "agreement", "in_vocabulary")
EVERY = {name: 0.3 + 0.1 * number for number, name in enumerate(LOSSES)}


@dataclasses.dataclass
class Case:
    """Logits and the target that they are compared with, once for the operator and once exact."""

    logits: Tensor
    target: TargetDistribution
    losses: dict[str, float]
    tokens: Tensor
    weights: Tensor
    top_k: int = 3
    mask: bool = True

    def options(self) -> dict[str, Any]:
        """The arguments by name that the functions have in common."""
        return {
            "data_tokens": self.tokens,
            "weights": self.weights,
            "top_k": self.top_k,
            "mask_out_of_vocabulary": self.mask,
        }

    def exact(self) -> tuple[RowLosses, Tensor]:
        """The definition and its gradient in float64, with the same p."""
        logits = self.logits.detach().double().requires_grad_()
        target = dataclasses.replace(self.target, log_p=self.target.log_p.double())
        rows = row_losses_reference(logits, target, self.losses, self.tokens, self.top_k, self.mask)
        loss = rows.loss * self.weights.double()
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        return dataclasses.replace(rows, loss=rows.loss.detach()), gradient

    def assert_close(self, found: RowLosses, gradient: Tensor, roundings: int = 1) -> None:
        """The losses without weights, and the gradient with them, are the exact ones.

        Args:
            found: of the function that is tested.
            gradient: of it.
            roundings: how often the gradient was rounded to the dtype of the logits.
        """
        rows, exact_gradient = self.exact()
        for field in FIELDS[:3]:
            expected = getattr(rows, field).float()
            torch.testing.assert_close(
                getattr(found, field).detach(), expected, rtol=1e-5, atol=5e-6, msg=field.format
            )
        for field in FIELDS[3:]:
            assert torch.equal(getattr(found, field), getattr(rows, field)), field
        rounding = roundings * 2**-8 if self.logits.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(
            gradient.double(), exact_gradient, rtol=rounding, atol=4e-6, check_dtype=False
        )


def make_case(
    losses: dict[str, float],
    rows: int = 7,
    width: int = 37,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    restricted: bool = True,
    seed: int = 0,
) -> Case:
    """Logits [R, W], and p over W of W + 9 tokens with some at 0, or over all W."""
    generator = torch.Generator().manual_seed(seed)
    whole = width + 9 if restricted else width
    target = torch.randn(rows, whole, generator=generator) * 3
    target[:, ::6] = -float("inf")
    target[:, -1] = target[:, -1].clamp(min=0)  # some token is possible
    selection = torch.randperm(whole, generator=generator)[:width].sort().values
    if restricted and rows > 2:
        target[2, selection] = -float("inf")  # the draft's vocabulary has no probability
        target[2, (whole - 1 if whole - 1 not in selection else 0)] = 1.0
    tokens = torch.randint(whole, (rows,), generator=generator)
    logits = (torch.randn(rows, width, generator=generator) * 3).to(dtype)
    return Case(
        logits.to(device),
        target_distribution(target.to(device), selection.to(device) if restricted else None),
        losses,
        tokens.to(device),
        torch.rand(rows, generator=generator).to(device),
    )


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def both(case: Case) -> None:
    """Checks row_losses under autograd, and the gradient in place of the logits."""
    assert serves(case.logits, case.target, case.losses, case.top_k), backend.report()
    logits = case.logits.clone().requires_grad_()
    options = case.options()
    weights = options.pop("weights")
    rows = row_losses(logits, case.target, case.losses, **options)
    (gradient,) = torch.autograd.grad((rows.loss * weights).sum(), logits)
    assert gradient.dtype == case.logits.dtype
    case.assert_close(rows, gradient, roundings=2)
    buffer = case.logits.clone()
    found = row_losses_and_gradient_(buffer, case.target, case.losses, weights=weights, **options)
    case.assert_close(found, buffer)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("restricted", [False, True])
def test_each_loss(name: str, dtype: torch.dtype, restricted: bool, device: str) -> None:
    case = make_case({name: 1.0}, dtype=dtype, device=device, restricted=restricted)
    both(case)
    both(dataclasses.replace(case, mask=False))


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    losses=strategies.dictionaries(
        strategies.sampled_from(LOSSES), strategies.floats(-2, 2), min_size=1, max_size=5
    ),
    rows=strategies.integers(0, 9),
    width=strategies.integers(2, 70),
    top_k=strategies.integers(1, 12),
    dtype=strategies.sampled_from(DTYPES),
    seed=strategies.integers(0, 1000),
)
def test_weighted_sums_of_any_shape(
    losses: dict[str, float], rows: int, width: int, top_k: int, dtype: torch.dtype, seed: int
) -> None:
    case = make_case(losses, rows, width, dtype, seed=seed)
    both(dataclasses.replace(case, top_k=top_k))


@pytest.mark.parametrize("width", [1, 511, 512, 513, 2000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_widths_about_a_block(width: int, dtype: torch.dtype, device: str) -> None:
    both(make_case(EVERY, 3, width, dtype, device, restricted=False))


def test_positions_name_the_targets_rows(device: str) -> None:
    case = make_case(EVERY, rows=6, device=device)
    positions = torch.tensor([5, 0, 3, 3, 4, 0, 1], device=device)
    logits = case.logits[[0, 1, 2, 3, 4, 5, 0]]
    tokens, weights = case.tokens[positions], case.weights[positions]
    found, expected = logits.clone(), logits.clone()
    rows = row_losses_and_gradient_(
        found, case.target, EVERY, positions=positions, data_tokens=tokens, weights=weights
    )
    selected = row_losses_and_gradient_(
        expected, case.target.select(positions), EVERY, data_tokens=tokens, weights=weights
    )
    assert torch.equal(found, expected)
    for field in FIELDS:
        assert torch.equal(getattr(rows, field), getattr(selected, field)), field


@pytest.mark.parametrize("name", ["compiled", "reference"])
@pytest.mark.parametrize("weight", [0.25, torch.tensor(0.25)])
def test_one_weight_for_all_rows(name: str, weight: float | Tensor) -> None:
    case = dataclasses.replace(make_case(EVERY), weights=torch.full((7,), 0.25))
    with backend.forced(Backend.CPU if name == "compiled" else Backend.REFERENCE):
        buffer = case.logits.clone()
        options = {**case.options(), "weights": weight}
        rows = row_losses_and_gradient_(buffer, case.target, EVERY, **options)
    case.assert_close(rows, buffer)
    assert not rows.loss.requires_grad


@pytest.mark.parametrize("name", ["compiled", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_weights_of_any_dtype(name: str, dtype: torch.dtype, device: str) -> None:
    case = make_case(EVERY, device=device)
    case.weights = (case.weights * 4).to(dtype)
    compiled = backend.choose(device).backend
    with backend.forced(compiled if name == "compiled" else Backend.REFERENCE):
        buffer = case.logits.clone()
        rows = row_losses_and_gradient_(buffer, case.target, EVERY, **case.options())
    case.assert_close(rows, buffer)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("spoilt", ["draft", "target"])
def test_what_is_no_number_is_no_acceptance(
    name: str, value: float, spoilt: str, device: str
) -> None:
    case = make_case({name: 1.0}, rows=3, width=600, restricted=False, device=device)
    if spoilt == "draft":
        case.logits[1, 17] = value
    else:
        logits = case.target.log_p.clone()
        logits[1, 17] = value
        case.target = target_distribution(logits)
    rows, _ = case.exact()
    found = row_losses_and_gradient_(case.logits, case.target, case.losses, **case.options())
    assert rows.alpha.isnan().tolist() == [False, True, False]
    for field in ("loss", "alpha"):
        torch.testing.assert_close(
            getattr(found, field).isnan(), getattr(rows, field).isnan(), msg=field.format
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_logits(dtype: torch.dtype, device: str) -> None:
    case = make_case(EVERY, dtype=dtype, device=device)
    apart = torch.zeros(7, 50, dtype=dtype, device=device)[:, 5:42]  # rows lie apart
    across = torch.zeros(37, 7, dtype=dtype, device=device).t()  # elements of a row do
    for logits in (apart, across):
        logits.copy_(case.logits)
        assert not logits.is_contiguous()
        both_options = case.options()
        rows = row_losses_and_gradient_(logits, case.target, EVERY, **both_options)
        case.assert_close(rows, logits)
    across = case.logits.t().contiguous().t().requires_grad_()
    options = case.options()
    weights = options.pop("weights")
    rows = row_losses(across, case.target, EVERY, **options)
    (gradient,) = torch.autograd.grad((rows.loss * weights).sum(), across)
    case.assert_close(rows, gradient, roundings=2)


def test_the_rows_around_a_view_stay() -> None:
    case = make_case(EVERY)
    whole = torch.full((9, 41), 7.0)
    view = whole[1:8, 2:39]
    view.copy_(case.logits)
    row_losses_and_gradient_(view, case.target, EVERY, **case.options())
    view.fill_(7)
    assert (whole == 7).all()


def test_the_number_of_threads_changes_nothing() -> None:
    case = make_case(EVERY, rows=40, width=3000, restricted=False)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            buffer = case.logits.clone()
            rows = row_losses_and_gradient_(buffer, case.target, EVERY, **case.options())
            results.append((buffer, rows.loss, rows.alpha))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, many) for one, many in zip(*results, strict=True))


def test_the_gradient_goes_on_through_a_matrix_product() -> None:
    case = make_case(EVERY)
    head, states = torch.randn(37, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    options = case.options()
    weights = options.pop("weights")
    rows = row_losses(states @ head.t(), case.target, EVERY, **options)
    expected = torch.autograd.grad((rows.loss * weights).sum(), [head, states])
    logits = states @ head.t()
    row_losses_and_gradient_(logits, case.target, EVERY, weights=weights, **options)
    found = torch.autograd.grad(logits, [head, states], logits.detach())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_graph_that_needs_the_logits_notices() -> None:
    case = make_case({"kl": 1.0})
    states = case.logits.clone().requires_grad_()
    logits = states.tanh()  # its gradient is computed from its result
    row_losses_and_gradient_(logits, case.target, {"kl": 1.0})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(logits, states, logits.detach())


def test_there_is_no_second_derivative() -> None:
    case = make_case({"kl": 1.0})
    logits = case.logits.requires_grad_()
    loss = row_losses(logits, case.target, {"kl": 1.0}).loss.sum()
    (gradient,) = torch.autograd.grad(loss.square(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(dtype: torch.dtype, requires_grad: bool, device: str) -> None:
    case = make_case(EVERY, dtype=dtype, device=device)
    positions = torch.arange(7, device=device).flip(0)
    inputs = RowLossInputs(
        case.target, EVERY, positions, case.tokens, case.weights, 3, mask_out_of_vocabulary=True
    ).arguments()
    logits = case.logits.requires_grad_(requires_grad)
    operators = torch.ops.speculators
    torch.library.opcheck(operators.distillation_loss.default, (logits, *inputs, requires_grad))
    torch.library.opcheck(operators.distillation_loss_.default, (logits.detach(), *inputs))


def test_one_graph_under_torch_compile(device: str) -> None:
    case = make_case(EVERY, device=device)
    arguments = RowLossInputs(
        case.target, EVERY, None, case.tokens, None, 3, mask_out_of_vocabulary=True
    ).arguments()

    def loss(logits: Tensor) -> Tensor:
        result: Tensor = torch.ops.speculators.distillation_loss(logits, *arguments, True)[0]
        return result.sum()

    gradients: list[Tensor] = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        logits = case.logits.clone().requires_grad_()
        gradients += torch.autograd.grad(function(logits), logits)
    assert torch.equal(*gradients)


def test_what_the_operator_does_not_take_goes_to_the_definition() -> None:
    case = make_case({"kl": 1.0})
    double = dataclasses.replace(case.target, log_p=case.target.log_p.double())
    kl = {"kl": 1.0}
    assert not serves(case.logits.double(), case.target, kl, 3)
    assert not serves(case.logits.half(), case.target, kl, 3)
    assert not serves(case.logits, double, kl, 3)
    assert not serves(case.logits, case.target, {**kl, "a loss of tomorrow": 1.0}, 3)
    assert serves(case.logits, case.target, kl, MAX_TOP_K + 1), "there are fewer tokens than that"
    with backend.forced("reference"):
        assert not serves(case.logits, case.target, kl, 3)
    for logits in (case.logits.double(), case.logits.half()):
        buffer = logits.clone()
        rows = row_losses_and_gradient_(buffer, case.target, {"kl": 1.0}, weights=case.weights)
        assert buffer.dtype == logits.dtype
        half = logits.dtype == torch.float16
        exact, gradient = dataclasses.replace(case, logits=logits).exact()
        torch.testing.assert_close(rows.loss.double(), exact.loss, rtol=1e-5, atol=1e-6)
        rtol, atol = (1e-3, 1e-6) if half else (1e-9, 1e-12)
        torch.testing.assert_close(buffer.double(), gradient, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", [Backend.CPU, Backend.REFERENCE])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"positions": torch.tensor([0, 1])}, ValueError, r"positions has the shape \[2\]"),
        ({"positions": torch.arange(7).int()}, TypeError, "positions is torch.int32"),
        ({"positions": torch.arange(7) + 1}, IndexError, r"positions\[6\] is 7, expected 0 <="),
        ({"positions": torch.arange(7) - 1}, IndexError, r"positions\[0\] is -1"),
        ({"weights": torch.ones(3)}, ValueError, r"weights has the shape \[3\]"),
        ({"weights": torch.ones(1, 7)}, ValueError, r"weights has the shape \[1, 7\]"),
        ({"data_tokens": torch.zeros(7)}, TypeError, "data_tokens is torch.float32"),
        ({"draft_logits": torch.zeros(7, 36)}, ValueError, r"\[7, 36\], expected \[7, 37\]"),
        ({"draft_logits": torch.zeros(6, 37)}, ValueError, r"\[6, 37\], expected \[7, 37\]"),
        ({"draft_logits": torch.zeros(37).expand(7, 37)}, ValueError, "rows of 37 .* lie 0 apart"),
        ({"losses": {"ce_data": 1.0}}, ValueError, "needs data_tokens"),
    ],
)
def test_wrong_arguments_are_named(
    change: dict[str, Any], error: type[Exception], message: str, name: Backend
) -> None:
    case = make_case({"kl": 1.0})
    good = {"draft_logits": case.logits, "target": case.target, "losses": case.losses}
    with backend.forced(name), pytest.raises(error, match=message):
        row_losses_and_gradient_(**{**good, **change})
    assert torch.equal(case.logits, make_case({"kl": 1.0}).logits), "nothing was overwritten"


GOOD: dict[str, Any] = {
    "logits": torch.zeros(2, 3),
    "log_p": torch.zeros(2, 3),
    "coverage": torch.ones(2),
    "best": torch.zeros(2, dtype=torch.int64),
    "likeliest": torch.zeros(2, dtype=torch.int64),
    "top": torch.zeros(2, 1, dtype=torch.int64),
    "positions": None,
    "data_tokens": torch.zeros(2, dtype=torch.int64),
    "weights": None,
    "factors": [1.0] * 10,
    "only_in_vocabulary": True,
}
FAR = torch.tensor([0, 3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3).half()}, "must be float32 or bfloat16"),
        ({"logits": torch.zeros(3)}, "logits must have the shape"),
        ({"logits": torch.zeros(2, 0)}, "logits must have the shape"),
        ({"logits": torch.zeros(3, 3)}, "as many rows as logits"),
        ({"logits": torch.zeros(3, 2).t()}, "must be contiguous"),
        ({"logits": torch.zeros(3).expand(2, 3)}, "must not overlap"),
        ({"logits": torch.zeros(5).unfold(0, 3, 2)}, "must not overlap"),
        ({"log_p": torch.zeros(2, 4)}, r"log_p must have the shape \[2, 3\]"),
        ({"log_p": torch.zeros(2, 3).double()}, "log_p must be float32"),
        ({"coverage": torch.ones(1)}, r"coverage must have the shape \[2\]"),
        ({"best": torch.zeros(2)}, "best must be int64"),
        ({"best": FAR}, "best has an index out of range"),
        ({"likeliest": None}, "likeliest is missing"),
        ({"likeliest": FAR - 1}, "likeliest has an index out of range"),
        ({"top": None}, "top is missing"),
        ({"top": torch.zeros(3, 1, dtype=torch.int64)}, r"top must have the shape \[2, 1\]"),
        ({"top": FAR[:, None]}, "top has an index out of range"),
        ({"positions": torch.tensor([0, 2])}, "positions has an index out of range"),
        ({"data_tokens": None}, "data_tokens is missing"),
        ({"data_tokens": FAR - 2}, "data_tokens has an index out of range"),
        ({"weights": torch.ones(3)}, r"weights must have the shape \[2\]"),
        ({"factors": [1.0] * 9}, "factors must be 10 numbers"),
    ],
)
def test_the_bare_operator_protects_memory(change: dict[str, Any], message: str) -> None:
    torch.ops.speculators.distillation_loss_(**{**GOOD, "logits": torch.zeros(2, 3)})
    with pytest.raises(RuntimeError, match=message):
        torch.ops.speculators.distillation_loss_(**{**GOOD, **change})
