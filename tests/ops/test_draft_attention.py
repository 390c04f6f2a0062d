"""Draft attention against its definition: one row at a time, one softmax, in float64."""

import dataclasses
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch import Tensor

from speculators.ops import backend, packed_rows, step_zero_attention
from speculators.ops.backend import Backend
from speculators.ops.draft_attention import draft_attention, draft_attention_reference
from speculators.ops.draft_attention_operator import MAX_DIAGONALS, serves
from speculators.ops.packed_rows import PackedRows

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.float32, torch.bfloat16]
LENGTHS = ((5, 1, 9), (1, 12))  # of the documents in each row, then padding


@dataclasses.dataclass
class Case:
    """Queries of the last step, keys and values of all, and the rows that they stand for."""

    q: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    rows: PackedRows
    grad: Tensor  # of the output [B, R, Nq, D]
    window: int | None = None
    scale: float = 0.3

    def output_and_gradients(self) -> tuple[Tensor, list[Tensor]]:
        """Of the function, from leaves of the case's dtype."""
        leaves = [t.detach().requires_grad_() for t in (self.q, *self.keys, *self.values)]
        steps = len(self.keys)
        q, keys, values = leaves[0], leaves[1 : steps + 1], leaves[steps + 1 :]
        output = draft_attention(q, keys, values, self.rows, self.scale, self.window)
        gradients = torch.autograd.grad(output, leaves, self.grad, allow_unused=True)
        pairs = zip(gradients, leaves, strict=True)
        return output.detach(), [torch.zeros_like(x) if g is None else g for g, x in pairs]

    def exact(self) -> tuple[Tensor, list[Tensor]]:
        """The same from the definition, in float64; 0 for padding."""
        leaves = [t.detach().double().requires_grad_() for t in (self.q, *self.keys, *self.values)]
        steps = len(self.keys)
        q, keys, values = leaves[0], leaves[1 : steps + 1], leaves[steps + 1 :]
        output = definition(q, keys, values, self.rows, self.scale, self.window)
        gradients = torch.autograd.grad(output, leaves, self.grad.double(), allow_unused=True)
        pairs = zip(gradients, leaves, strict=True)
        return output.detach(), [torch.zeros_like(x) if g is None else g for g, x in pairs]

    def check(self) -> None:
        """Output and gradients are the exact ones; nothing flows from or to padding."""
        real = real_rows(self.rows)
        self.grad = self.grad * real[..., None, None]
        output, gradients = self.output_and_gradients()
        exact, exact_gradients = self.exact()
        assert output.dtype == self.q.dtype
        assert output.isfinite().all()
        half = self.q.dtype == torch.bfloat16
        # A gradient of scores is a difference of two products as large as this.
        products = _longest(self.grad) * max(_longest(value) for value in self.values)
        for name, found, expected in (
            ("output", output[real], exact[real]),
            ("gradient of q", gradients[0], exact_gradients[0]),
            *(
                (f"gradient {number} of keys and values", found, expected)
                for number, (found, expected) in enumerate(
                    zip(gradients[1:], exact_gradients[1:], strict=True)
                )
            ),
        ):
            assert found.dtype == self.q.dtype
            most = max([self.scale * products, *expected.abs().flatten().tolist()])
            rtol, atol = (2**-7, 2**-7 * most) if half else (1e-4, 2e-6 + 1e-6 * most)
            assert_close(found.double(), expected, name, rtol=rtol, atol=atol)


def assert_close(found: Tensor, expected: Tensor, name: str, rtol: float, atol: float) -> None:
    """As torch has it, and says what differs."""
    torch.testing.assert_close(
        found, expected, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}"
    )


def _longest(vectors: Tensor) -> float:
    return float(vectors.float().norm(dim=-1).max()) if vectors.numel() else 0.0


def real_rows(rows: PackedRows) -> Tensor:
    """Which queries are no padding: bool [B, R]."""
    documents = rows.document_ids
    if rows.selected is not None:
        documents = documents.gather(1, rows.selected)
    return documents >= 0


def definition(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    rows: PackedRows,
    scale: float,
    window: int | None,
) -> Tensor:
    """Row by row and head by head; no operator in common with what is tested. [B, R, Nq, D]."""
    documents = rows.document_ids.tolist()
    batch, count, width = rows.shape
    places = [list(range(width))] * batch if rows.selected is None else rows.selected.tolist()
    heads, group, step = q.shape[1], q.shape[1] // keys[0].shape[1], len(keys) - 1
    results = []
    for b in range(batch):
        for r in range(count):
            t = places[b][r]
            for h in range(heads):
                if documents[b][t] < 0:
                    results.append(q[b, h, r] * 0)
                    continue
                seen = [
                    (keys[0][b, h // group, j], values[0][b, h // group, j], j)
                    for j in range(t + 1)
                    if documents[b][j] == documents[b][t]
                ]
                seen += [
                    (keys[i][b, h // group, r], values[i][b, h // group, r], t + i)
                    for i in range(1, step + 1)
                ]
                seen = [s for s in seen if window is None or s[2] > t + step - window]
                scores = torch.stack([(q[b, h, r] * key).sum() for key, _, _ in seen]) * scale
                value = torch.stack([v for _, v, _ in seen])
                results.append((scores.softmax(0)[:, None] * value).sum(0))
    if not results:
        return q.transpose(1, 2)
    return torch.stack(results).view(batch, count, heads, q.shape[3])


def documents_of(lengths: tuple[tuple[int, ...], ...], width: int) -> Tensor:
    ids = torch.full((len(lengths), width), -1)
    for row, of_row in enumerate(lengths):
        start = 0
        for number, length in enumerate(of_row):
            ids[row, start : start + length] = number
            start += length
    return ids


def make_case(
    steps: int = 3,
    heads: tuple[int, int] = (4, 2),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    select: Tensor | None = None,
    window: int | None = None,
    size: int = 8,
    seed: int = 0,
    documents: Tensor | None = None,
) -> Case:
    """Random vectors in the order of memory that a model makes: a row's heads side by side."""
    generator = torch.Generator().manual_seed(seed)
    if documents is None:
        documents = documents_of(LENGTHS, 17)
    rows = PackedRows(documents.to(device))
    batch, width = documents.shape
    count = width
    if select is not None:
        rows, count = rows.select(select.to(device)), select.shape[1]

    def random(number: int, of: int) -> Tensor:
        values = torch.randn(batch, number, of, size, generator=generator)
        return values.to(dtype).to(device).transpose(1, 2)

    lengths = [width] + [count] * (steps - 1)
    return Case(
        random(count, heads[0]),
        [random(length, heads[1]) for length in lengths],
        [random(length, heads[1]) for length in lengths],
        rows,
        random(count, heads[0]).transpose(1, 2),
        window,
    )


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# Rising, as an objective selects them: answers at the end of documents, then some that fill up,
# padding among them.
RISING = torch.tensor([[2, 3, 4, 5, 10, 11, 0, 16], [4, 5, 7, 9, 12, 0, 1, 2]])
# Any order, with repeats.
MIXED = torch.tensor([[14, 2, 2, 7, 6, 16, 0, 2], [12, 12, 12, 0, 5, 4, 16, 15]])
WHOLE = torch.arange(17).expand(2, -1)


@pytest.mark.parametrize("steps", range(1, 8))
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_dense_attention(
    steps: int, dtype: torch.dtype, device: str
) -> None:
    """The lse of a flash kernel is not differentiable: a merge that forgets it fails here."""
    case = make_case(steps, dtype=dtype, device=device)
    if device == "cpu" or dtype == torch.bfloat16:
        assert serves(case.q, case.keys, case.values, case.rows), backend.report()
    case.check()


@pytest.mark.parametrize("heads", [(4, 2), (8, 2), (3, 3), (6, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("select", [None, RISING])
def test_heads_that_share_keys(
    heads: tuple[int, int], dtype: torch.dtype, select: Tensor | None, device: str
) -> None:
    make_case(3, heads, dtype, device, select).check()


@pytest.mark.parametrize("select", [RISING, MIXED, WHOLE], ids=["rising", "mixed", "whole"])
@pytest.mark.parametrize("window", [None, 1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_selected_rows(select: Tensor, window: int | None, dtype: torch.dtype, device: str) -> None:
    make_case(4, dtype=dtype, device=device, select=select, window=window).check()


@pytest.mark.parametrize("steps", [1, 2, 4, 6])
@pytest.mark.parametrize("window", [1, 3, 100])
def test_a_window_counts_the_steps_too(steps: int, window: int, device: str) -> None:
    make_case(steps, device=device, window=window).check()


def test_selecting_all_rows_changes_nothing(device: str) -> None:
    one, other = make_case(3, device=device), make_case(3, device=device, select=WHOLE)
    for a, b in zip(one.output_and_gradients()[1], other.output_and_gradients()[1], strict=True):
        torch.testing.assert_close(a, b)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    lengths=strategies.lists(
        strategies.lists(strategies.integers(1, 7), min_size=0, max_size=3).map(tuple),
        min_size=1,
        max_size=3,
    ).map(tuple),
    padding=strategies.integers(0, 3),
    count=strategies.integers(0, 9),
    steps=strategies.integers(1, 4),
    heads=strategies.sampled_from([(1, 1), (2, 1), (4, 2)]),
    size=strategies.sampled_from([1, 3, 16, 33]),
    window=strategies.one_of(strategies.none(), strategies.integers(1, 6)),
    dtype=strategies.sampled_from(DTYPES),
    seed=strategies.integers(0, 1000),
)
def test_documents_and_rows_of_any_kind(
    lengths: tuple[tuple[int, ...], ...],
    padding: int,
    count: int,
    steps: int,
    heads: tuple[int, int],
    size: int,
    window: int | None,
    dtype: torch.dtype,
    seed: int,
) -> None:
    width = max(1, max(sum(of_row) for of_row in lengths) + padding)
    generator = torch.Generator().manual_seed(seed)
    select = torch.randint(width, (len(lengths), count), generator=generator)
    if seed % 2:
        select = select.sort(1).values
    documents = documents_of(lengths, width)
    make_case(steps, heads, dtype, "cpu", select, window, size, seed, documents).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_rows_than_a_piece_and_more_keys_than_are_computed_in_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_rows, "QUERIES_PER_PIECE", 3)
    monkeypatch.setattr(step_zero_attention, "FLOAT32_KEYS", 6)
    for select in (RISING, MIXED):
        make_case(3, dtype=dtype, select=select).check()
        make_case(3, dtype=dtype, select=select, window=5).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_in_any_order(dtype: torch.dtype, device: str) -> None:
    case = make_case(3, dtype=dtype, device=device, select=RISING)
    expected = case.output_and_gradients()

    def in_a_wider_one(tensor: Tensor) -> Tensor:
        sizes = [size + 3 for size in tensor.shape]
        part = tensor.new_zeros(sizes)[tuple(slice(2, 2 + size) for size in tensor.shape)]
        return part.copy_(tensor)

    def with_elements_apart(tensor: Tensor) -> Tensor:
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)

    orders: dict[str, Callable[[Tensor], Tensor]] = {
        "heads first": torch.Tensor.contiguous,
        "elements apart": with_elements_apart,
        "a slice": in_a_wider_one,
    }
    for name, order in orders.items():
        changed = dataclasses.replace(
            case,
            q=order(case.q),
            keys=[order(t) for t in case.keys],
            values=[order(t) for t in case.values],
            grad=order(case.grad),
        )
        found = changed.output_and_gradients()
        assert_close(found[0], expected[0], name, rtol=1e-5, atol=1e-5)
        for one, other in zip(found[1], expected[1], strict=True):
            assert_close(one, other, name, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_sum_is_a_tensor_without_memory_of_its_own(device: str) -> None:
    """What backward gets is then one number, expanded."""
    case = make_case(3, device=device)
    q = case.q.requires_grad_()
    output = draft_attention(q, case.keys, case.values, case.rows, 0.3)
    (found,) = torch.autograd.grad(output.sum(), q)
    expected = dataclasses.replace(case, grad=torch.ones_like(case.grad)).exact()[1][0]
    found, expected = (t.transpose(1, 2)[real_rows(case.rows)] for t in (found, expected))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
@pytest.mark.parametrize("steps", [1, 3])
def test_no_rows_at_all(shape: tuple[int, int], steps: int, device: str) -> None:
    documents = torch.zeros(shape, dtype=torch.int64)
    case = make_case(steps, device=device, documents=documents)
    output, gradients = case.output_and_gradients()
    assert output.shape == (*shape, 4, 8)
    assert all(gradient.numel() == 0 for gradient in gradients)
    chosen = make_case(steps, device=device, documents=documents, select=documents[:, :0])
    assert chosen.output_and_gradients()[0].shape == (shape[0], 0, 4, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_is_finite_and_nobodys_business(dtype: torch.dtype, device: str) -> None:
    """A row of nothing but padding, too; what stands in padding changes no other row."""
    documents = torch.cat([documents_of(LENGTHS, 17), torch.full((1, 17), -1)])
    case = make_case(2, dtype=dtype, device=device, documents=documents)
    real = real_rows(case.rows)
    output, _ = case.output_and_gradients()
    gradients = dataclasses.replace(case, grad=case.grad * real[..., None, None])
    expected = gradients.output_and_gradients()[1]
    assert output.isfinite().all()
    for tensor in (case.q, *case.keys, *case.values):
        tensor.transpose(1, 2)[~real] = 50.0
    assert torch.equal(case.output_and_gradients()[0][real], output[real])
    for found, other in zip(gradients.output_and_gradients()[1], expected, strict=True):
        assert torch.equal(found, other)
        assert not found.transpose(1, 2)[~real].any()


def test_twice_the_same(device: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        results = [make_case(4, device=device, select=RISING).output_and_gradients() for _ in "ab"]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_the_number_of_threads_changes_nothing() -> None:
    documents = documents_of(((60, 70),), 130)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(make_case(4, size=64, documents=documents).output_and_gradients())
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)
    for one, many in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, many, rtol=1e-6, atol=1e-6)


def test_there_is_no_second_derivative() -> None:
    case = make_case(2)
    q = case.q.requires_grad_()
    output = draft_attention(q, case.keys, case.values, case.rows, 0.3)
    (gradient,) = torch.autograd.grad(output.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_what_the_operator_does_not_take_goes_to_the_reference() -> None:
    case = make_case(2, select=MIXED)
    assert serves(case.q, case.keys, case.values, case.rows)
    with backend.forced("reference"):
        assert not serves(case.q, case.keys, case.values, case.rows)
        case.check()
    for dtype in (torch.float64, torch.float16):
        other = make_case(2, dtype=dtype, select=MIXED)
        assert not serves(other.q, other.keys, other.values, other.rows)
        output, gradients = other.output_and_gradients()
        exact, exact_gradients = other.exact()
        real = real_rows(other.rows)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-2
        torch.testing.assert_close(
            output[real].double(), exact[real], rtol=tolerance, atol=tolerance
        )
        if dtype == torch.float64:
            other.grad = other.grad * real[..., None, None]
            gradients, exact_gradients = other.output_and_gradients()[1], other.exact()[1]
            for found, expected in zip(gradients, exact_gradients, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    many = make_case(MAX_DIAGONALS + 2, documents=documents_of(((2,),), 2))
    assert not serves(many.q, many.keys, many.values, many.rows)
    many.check()


def test_the_reference_is_the_definition_in_float64() -> None:
    for select in (None, RISING, MIXED):
        for window in (None, 3):
            case = make_case(4, dtype=torch.float64, select=select, window=window)
            first = 1 if window is None else max(1, 4 - window)
            reach = None if window is None else window - 3
            found = draft_attention_reference(
                case.q,
                case.keys[0],
                case.values[0],
                case.keys[first:],
                case.values[first:],
                case.rows.mask(reach),
                0.3,
            ).transpose(1, 2)
            real = real_rows(case.rows)
            torch.testing.assert_close(found[real], case.exact()[0][real])


CASE = make_case(2)


@pytest.mark.parametrize("name", [Backend.CPU, Backend.REFERENCE])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": CASE.q[:, :, :5]}, ValueError, r"q has the shape \[2, 4, 5, 8\], expected \[2, Nq"),
        ({"q": CASE.q[0]}, ValueError, r"q has the shape \[4, 17, 8\]"),
        ({"q": CASE.q[:, :0]}, ValueError, r"q has the shape \[2, 0, 17, 8\]"),
        ({"q": CASE.q[:, :3]}, ValueError, "q's 3 heads a multiple of Nkv"),
        ({"q": CASE.q.long()}, TypeError, "q is torch.int64"),
        ({"q": CASE.q.to("meta")}, ValueError, "q is on meta, expected cpu"),
        ({"keys": []}, ValueError, "keys of 0 steps and values of 2"),
        ({"keys": CASE.keys[:1]}, ValueError, "keys of 1 steps and values of 2"),
        ({"keys": [CASE.keys[0][0], CASE.keys[1]]}, ValueError, r"keys\[0\] has the shape \[2, 17"),
        (
            {"keys": [CASE.keys[0], CASE.keys[1][:, :1]]},
            ValueError,
            r"keys\[1\] has the shape \[2, 1, 17, 8\], expected \[2, 2, 17, 8\]",
        ),
        ({"values": [CASE.values[0][..., :4], CASE.values[1]]}, ValueError, r"values\[0\] has"),
        ({"values": [v.bfloat16() for v in CASE.values]}, TypeError, r"values\[0\] is torch.bf"),
        ({"values": [v.to("meta") for v in CASE.values]}, ValueError, r"values\[0\] is on meta"),
        ({"window": 0}, ValueError, "window is 0, expected at least 1"),
    ],
)
def test_wrong_arguments_are_named(
    change: dict[str, Any], error: type[Exception], message: str, name: Backend
) -> None:
    good = {"q": CASE.q, "keys": CASE.keys, "values": CASE.values, "rows": CASE.rows, "scale": 0.3}
    with backend.forced(name), pytest.raises(error, match=message):
        draft_attention(**{**good, **change})


IDS = torch.tensor([[0, 0, 1, 1, -1]])


@pytest.mark.parametrize(
    ("documents", "rows", "error", "message"),
    [
        (IDS.int(), None, TypeError, "document_ids is torch.int32"),
        (IDS[0], None, ValueError, r"document_ids has the shape \[5\], expected \[B, T\]"),
        (torch.tensor([[0, 1, 0]]), None, ValueError, "document 0 of row 0 begins at 0 and again"),
        (IDS, IDS.int(), TypeError, "rows is torch.int32"),
        (IDS, IDS[0], ValueError, r"rows has the shape \[5\], expected \[1, R\]"),
        (IDS, torch.zeros(2, 1, dtype=torch.int64), ValueError, r"expected \[1, R\]"),
        (IDS, IDS.to("meta"), ValueError, "rows is on meta, expected cpu"),
        (IDS, IDS, IndexError, "rows has -1, expected 0 <= row < 5"),
        (IDS, IDS.abs() * 5, IndexError, "rows has 5, expected 0 <= row < 5"),
    ],
)
def test_wrong_rows_are_named(
    documents: Tensor, rows: Tensor | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        PackedRows(documents, rows)
