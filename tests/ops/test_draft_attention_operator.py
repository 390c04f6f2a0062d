"""The bare operators, torch's view of them, and how the kernels of torch are called."""

from typing import Any

import pytest
import torch
from tests.ops.test_draft_attention import MIXED, RISING, Case, definition, make_case, real_rows
from torch import Tensor

from speculators.ops import backend, step_zero_attention
from speculators.ops.backend import Backend
from speculators.ops.draft_attention_operator import MAX_DIAGONALS, serves
from speculators.ops.packed_rows import PackedRows
from speculators.ops.step_zero_attention import Attended, StepZero

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
OPERATORS = torch.ops.speculators
VECTORS = ("grad_output", "output", "query")


def _arguments(dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    """Of the backward operator; the forward one takes those but for the gradients."""
    generator = torch.Generator().manual_seed(0)

    def random(heads: int) -> Tensor:
        values = torch.randn(2, 5, heads, 8, generator=generator)
        return values.to(dtype).to(device).transpose(1, 2)

    return {
        "grad_query": random(4),
        **{name: random(4) for name in VECTORS},
        "logsumexp": torch.randn(2, 5, 4, generator=generator).to(device).transpose(1, 2),
        "keys": [random(2) for _ in range(3)],
        "values": [random(2) for _ in range(3)],
        "scale": 0.3,
    }


def _forward_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if not name.startswith("grad")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    arguments = _arguments(dtype, device)
    torch.library.opcheck(
        OPERATORS.draft_attention_merge_.default, (), _forward_arguments(arguments)
    )
    torch.library.opcheck(OPERATORS.draft_attention_merge_backward_.default, (), arguments)


def test_merging_is_attention_to_one_more_key_each() -> None:
    """A merge of o, lse with s diagonals: step by step or at once, and by the formula."""
    arguments = _forward_arguments(_arguments())
    output, lse = arguments["output"].clone(), arguments["logsumexp"].clone()
    OPERATORS.draft_attention_merge_(**arguments)
    one, one_lse = output.clone(), lse.clone()
    for key, value in zip(arguments["keys"], arguments["values"], strict=True):
        OPERATORS.draft_attention_merge_(one, one_lse, arguments["query"], [key], [value], 0.3)
    torch.testing.assert_close(arguments["output"], one)
    torch.testing.assert_close(arguments["logsumexp"], one_lse)
    keys, values = (
        torch.stack(arguments[name]).repeat_interleave(2, 2).double() for name in ("keys", "values")
    )
    scores = torch.cat([lse.double()[None], (keys * arguments["query"]).sum(-1) * 0.3])
    values = torch.cat([output.double()[None], values])
    expected = (scores.softmax(0)[..., None] * values).sum(0)
    torch.testing.assert_close(arguments["output"].double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        arguments["logsumexp"].double(), scores.logsumexp(0), rtol=1e-5, atol=1e-6
    )


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": _zeros(2, 4, 5, 8).double()}, "query must be float32 or bfloat16"),
        ({"query": _zeros(4, 5, 8)}, r"query must have the shape \[batch, heads, rows, D\]"),
        ({"query": _zeros(2, 4, 6, 8)}, r"keys\[0\] must have the shape \[2, 2, 6, 8\]"),
        ({"query": _zeros(2, 3, 5, 8)}, "query a multiple of their heads"),
        ({"query": _zeros(2, 0, 5, 8)}, "query must have the shape"),
        ({"query": _zeros(2, 4, 5, 8).bfloat16()}, r"keys\[0\] must have the dtype of query"),
        ({"keys": []}, "as many values as keys"),
        ({"keys": [_zeros(2, 2, 5, 8)]}, "as many values as keys"),
        ({"keys": [_zeros(2, 5, 8)] * 3}, "keys must have the shape"),
        ({"keys": [_zeros(2, 2, 5, 8), _zeros(2, 2, 5, 4), _zeros(2, 2, 5, 8)]}, r"keys\[1\]"),
        ({"values": [_zeros(2, 2, 5, 8), _zeros(2, 2, 5, 8), _zeros(1, 2, 5, 8)]}, r"values\[2\]"),
        (
            {name: [_zeros(2, 2, 5, 8)] * (MAX_DIAGONALS + 1) for name in ("keys", "values")},
            "from 1 to 32",
        ),
        ({"logsumexp": _zeros(2, 4, 6)}, r"logsumexp must have the shape \[2, 4, 5\]"),
        ({"logsumexp": _zeros(2, 4, 5).double()}, "logsumexp must be float32"),
        ({"output": _zeros(2, 4, 5, 7)}, r"output must have the shape \[2, 4, 5, 8\]"),
        ({"output": _zeros(2, 4, 5, 8).bfloat16()}, "output must have the dtype of query"),
        ({"grad_output": _zeros(2, 4, 4, 8)}, r"grad_output must have the shape"),
        ({"grad_query": _zeros(2, 5, 5, 8)}, r"grad_query must have the shape"),
        ({"grad_query": _zeros(2, 4, 8, 5).transpose(2, 3)}, "grad_query must be contiguous in"),
    ],
)
def test_the_bare_operators_protect_memory(change: dict[str, Any], message: str) -> None:
    arguments = _arguments() | change
    with pytest.raises(RuntimeError, match=message):
        OPERATORS.draft_attention_merge_backward_(**arguments)
    if not any(name.startswith("grad") for name in change):
        with pytest.raises(RuntimeError, match=message):
            OPERATORS.draft_attention_merge_(**_forward_arguments(arguments))


def test_what_is_written_in_place_must_have_its_vectors_whole() -> None:
    arguments = _forward_arguments(_arguments())
    arguments["output"] = _zeros(2, 4, 8, 5).transpose(2, 3)
    with pytest.raises(RuntimeError, match="output must be contiguous in its last dimension"):
        OPERATORS.draft_attention_merge_(**arguments)


def test_what_is_written_in_place_must_not_overlap_itself() -> None:
    good = _arguments()
    for name, shape in {"output": (2, 4, 5, 8), "logsumexp": (2, 4, 5)}.items():
        for whole in (torch.zeros(shape)[:, :1].expand(shape), torch.zeros(shape)[..., :1, :]):
            arguments = _forward_arguments(good | {name: whole.expand(shape)})
            with pytest.raises(RuntimeError, match=f"{name} must not overlap itself"):
                OPERATORS.draft_attention_merge_(**arguments)
    # Nor partly; what is only read may.
    partly = torch.zeros(2 * 4 * 5 * 8).as_strided((2, 4, 5, 8), (160, 40, 7, 1))
    with pytest.raises(RuntimeError, match="grad_query must not overlap itself"):
        OPERATORS.draft_attention_merge_backward_(**good | {"grad_query": partly})
    OPERATORS.draft_attention_merge_backward_(**good | {"grad_output": partly})
    OPERATORS.draft_attention_merge_backward_(
        **good | {"logsumexp": torch.zeros(2, 4, 1).expand(2, 4, 5)}
    )


def test_memory_that_is_shared_until_it_is_written() -> None:
    before = _arguments()
    written = ("output", "logsumexp", "grad_query")
    # There is no public way to make one.
    lazy = {name: torch._lazy_clone(before[name]) for name in written}
    expected = {name: before[name].clone() for name in written}
    OPERATORS.draft_attention_merge_(**_forward_arguments(before | lazy))
    OPERATORS.draft_attention_merge_backward_(**before | lazy)
    for name in written:
        assert torch.equal(before[name], expected[name]), name
        assert not torch.equal(lazy[name], expected[name]), name


def _dense(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, left: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """What the varlen kernel computes, ``[rows, N, D]`` and lse ``[N, rows]``."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    rows = torch.arange(len(q))
    document = torch.bucketize(rows, lengths, right=True)
    visible = (document[:, None] == document) & (rows <= rows[:, None])
    if left is not None:
        visible &= rows >= rows[:, None] - left
    scores = torch.einsum("rnd,tnd->nrt", q, k) * scale
    scores = scores.masked_fill(~visible, -torch.inf)
    return torch.einsum("nrt,tnd->rnd", scores.softmax(-1), v), scores.logsumexp(-1)


def _expect_aligned(*tensors: Tensor) -> None:
    for tensor in tensors:
        places = (tensor.data_ptr(), *(step * tensor.itemsize for step in tensor.stride()[:-1]))
        assert all(place % 16 == 0 for place in places), places


def _unaligned(tensor: Tensor) -> Tensor:
    """``[B, N, R, D]`` in vectors of one element more, from the second on."""
    batch, heads, count, size = tensor.shape
    whole = tensor.new_zeros(batch, count, heads, size + 1)[..., 1:].transpose(1, 2)
    return whole.copy_(tensor)


def _stand_in(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *rest: Any, **options: Any) -> Any:
    """For ``aten::_flash_attention_forward``: the same arguments, results and checks."""
    lengths_k, longest_q, longest_k, dropout, causal, debug = rest
    assert torch.equal(lengths, lengths_k)
    assert lengths.dtype == torch.int32
    _expect_aligned(q, k, v)
    assert longest_q == longest_k == int(lengths.diff().max())
    assert (dropout, causal, debug) == (0.0, True, False)
    assert (options["window_size_left"] is None) == (options["window_size_right"] is None)
    assert options["window_size_right"] in {None, 0}
    o, lse = _dense(q, k, v, lengths, options["window_size_left"], options["scale"])
    return o, lse, torch.zeros(2), torch.ones(()), None


def _stand_in_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    *rest: Any,
    **options: Any,
) -> tuple[Tensor, ...]:
    """For ``aten::_flash_attention_backward``, from the merged o and lse."""
    lengths, _, _, _, _, causal, seed, offset = rest
    _expect_aligned(grad, q, k, v, o)
    assert causal
    assert seed.tolist() == [0, 0]
    assert offset.item() == 1
    assert lse.is_contiguous()
    assert lse.shape == (q.shape[1], len(q))
    group = q.shape[1] // k.shape[1]
    wide = v.repeat_interleave(group, 1)
    leaves = [t.detach().requires_grad_() for t in (q, k)]
    with torch.enable_grad():
        left, scale = options["window_size_left"], options["scale"]
        _, own = _dense(leaves[0], leaves[1], v, lengths, left, scale)
        rows = torch.arange(len(q))
        document = torch.bucketize(rows, lengths, right=True)
        visible = (document[:, None] == document) & (rows <= rows[:, None])
        if left is not None:
            visible &= rows >= rows[:, None] - left
        keys = leaves[1].repeat_interleave(group, 1)
        scores = torch.einsum("rnd,tnd->nrt", leaves[0], keys) * scale
    del own
    p = (scores.detach() - lse[..., None]).exp().masked_fill(~visible, 0)
    delta = (grad * o).sum(-1).t()[..., None]
    ds = p * (torch.einsum("rnd,tnd->nrt", grad, wide) - delta)
    dq, dk = torch.autograd.grad(scores, leaves, ds)
    dv = torch.einsum("nrt,rnd->tnd", p, grad)
    return dq, dk, dv.unflatten(1, (-1, group)).sum(2)


@pytest.mark.parametrize("select", [None, RISING, MIXED], ids=["all", "rising", "mixed"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("aligned", [True, False])
def test_how_the_kernel_for_cuda_is_called(
    select: Tensor | None, window: int | None, aligned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packing, scattering, addresses and the window's width, with a stand-in for the kernel."""
    monkeypatch.setattr(step_zero_attention, "_CUDA", _stand_in)
    monkeypatch.setattr(step_zero_attention, "_CUDA_BACKWARD", _stand_in_backward)
    if select is not None:
        select = torch.stack([row.unique()[:5] for row in select])  # it takes distinct rows alone
    case = make_case(1, dtype=torch.float64, select=select, window=window)
    if not aligned:
        case.q, case.keys, case.values = (
            _unaligned(case.q),
            [_unaligned(key) for key in case.keys],
            [_unaligned(value) for value in case.values],
        )
    step_zero = StepZero(case.rows, window, case.scale)
    monkeypatch.setattr(StepZero, "_is_for_cuda", lambda _, q: q.numel() > 0)
    attended = step_zero.forward(case.q, case.keys[0], case.values[0])
    real = real_rows(case.rows)
    case.grad = case.grad * real[..., None, None]
    exact, gradients = case.exact()
    torch.testing.assert_close(attended.output.transpose(1, 2)[real], exact[real])
    grad = case.grad.transpose(1, 2)
    grad = grad if aligned else _unaligned(grad)
    found = step_zero.backward(grad, case.q, case.keys[0], case.values[0], attended)
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_the_kernel_for_cuda_gets_no_more_pairs_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "choose", lambda _: backend.Choice(Backend.CUDA, "for the test"))
    rows = PackedRows(torch.zeros(1, 2, dtype=torch.int64))

    def takes(heads: int, key_heads: int) -> bool:
        q, key = (torch.zeros(1, number, 2, 8).bfloat16() for number in (heads, key_heads))
        many = [key] * (1 + MAX_DIAGONALS)
        return serves(q, many, many, rows)

    assert takes(192, 1)  # 192 * 32 pairs of 8 bytes are 48 KiB
    assert not takes(193, 1)
    assert takes(386, 193)


def test_the_kernel_for_cuda_gets_rows_that_are_distinct() -> None:
    documents = torch.zeros(2, 4, dtype=torch.int64)
    assert PackedRows(documents).are_distinct
    assert PackedRows(documents, torch.tensor([[0, 2], [2, 0]])).are_distinct
    assert not PackedRows(documents, torch.tensor([[0, 2], [1, 1]])).are_distinct


def test_the_merged_logsumexp_is_what_backward_needs() -> None:
    """With step 0's own output and lse the gradient is another: that is the trap."""
    case: Case = make_case(2)
    first = StepZero(case.rows, None, case.scale)
    q, key, value = case.q, case.keys[0], case.values[0]
    alone = first.forward(q, key, value)
    o, lse = alone.output.clone(), alone.logsumexp.clone()
    OPERATORS.draft_attention_merge_(o, lse, q, case.keys[1:], case.values[1:], case.scale)
    real = real_rows(case.rows)
    grad = (case.grad * real[..., None, None]).transpose(1, 2)
    leaf = value.detach().double().requires_grad_()
    others = [t.double() for t in (q, *case.keys, case.values[1])]
    output = definition(
        others[0], others[1:3], [leaf, others[3]], case.rows, case.scale, None
    ).transpose(1, 2)
    (expected,) = torch.autograd.grad(output, leaf, grad.double())
    merged = first.backward(grad, q, key, value, Attended(o, lse, ()))[2]
    wrong = first.backward(grad, q, key, value, alone)[2]
    torch.testing.assert_close(merged.double(), expected, rtol=1e-4, atol=1e-5)
    assert (wrong.double() - expected).abs().max() > 0.1
