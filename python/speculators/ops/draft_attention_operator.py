"""The compiled draft attention: when it serves, and its gradient.

``csrc/draft_attention/merge.h`` says what is computed, and from what the gradient follows. A trap
that is avoided here: the lse that a flash kernel returns is not differentiable, so a merge written
in autograd's operators loses the gradient that flows through it, without a word. Here autograd sees
one function, whose backward gives the merged output and lse to the flash kernel.

``torch.ops.speculators.draft_attention_merge_`` folds the diagonals into output and lse in place;
``draft_attention_merge_backward_`` adds to the gradient of the queries, and returns those of the
keys and values, ``[2, s, B, R, Nkv, D]``.
"""

from collections.abc import Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor

from speculators.ops import backend
from speculators.ops.backend import Backend
from speculators.ops.packed_rows import PackedRows
from speculators.ops.step_zero_attention import (
    CUDA_HEAD_MULTIPLE,
    CUDA_HEAD_SIZE,
    Attended,
    StepZero,
)

MAX_DIAGONALS: Final = 32
"""The most later steps that a row may see, as in merge.h."""

MAX_CUDA_PAIRS: Final = 6144
"""The most pairs of a later step and a query head of one key head on CUDA, as in merge.h."""


def serves(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], rows: PackedRows) -> bool:
    """Whether the compiled operator takes these arguments, and is there and not ruled out.

    It takes float32 and bfloat16 on the CPU. On CUDA it takes bfloat16, heads that torch's flash
    kernel takes, at most ``MAX_CUDA_PAIRS``, and rows that are selected once. A compiled back end
    may be forced; what the operator does not take goes to the reference all the same.

    Raises:
        BackendError: a back end is forced that does not serve the device.
    """
    chosen = backend.choose(q.device.type).backend
    dtypes = {tensor.dtype for tensor in (q, *keys, *values)}
    if chosen is Backend.REFERENCE or len(dtypes) > 1 or len(keys) > MAX_DIAGONALS + 1:
        return False
    if chosen is Backend.CPU:
        return q.dtype in {torch.float32, torch.bfloat16}
    fits = q.shape[-1] <= CUDA_HEAD_SIZE and q.shape[-1] % CUDA_HEAD_MULTIPLE == 0
    pairs = q.shape[1] // keys[0].shape[1] * (len(keys) - 1)
    few = pairs <= MAX_CUDA_PAIRS
    return q.dtype == torch.bfloat16 and fits and few and rows.are_distinct


def compiled_draft_attention(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], step_zero: StepZero
) -> Tensor:
    """The attention ``[B, Nq, R, D]``, differentiable (once) in q, keys and values.

    Args:
        q: ``[B, Nq, R, D]``.
        keys: of step 0 ``[B, Nkv, T, D]``, then of the later steps that are seen
            ``[B, Nkv, R, D]``.
        values: as keys.
        step_zero: what the queries see of step 0.
    """
    function: Any = _DraftAttention
    return cast("Tensor", function.apply(step_zero, q, *keys, *values))


class _DraftAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step_zero: StepZero, q: Tensor, *keys_values: Tensor) -> Tensor:
        q, *keys_values_ = (_whole_vectors(tensor) for tensor in (q, *keys_values))
        steps = len(keys_values_) // 2
        keys, values = keys_values_[:steps], keys_values_[steps:]
        attended = step_zero.forward(q, keys[0], values[0])
        o, lse = attended.output, attended.logsumexp
        if steps > 1:
            torch.ops.speculators.draft_attention_merge_(
                o, lse, q, keys[1:], values[1:], step_zero.scale
            )
        ctx.save_for_backward(o, lse, q, *keys, *values, *attended.rest)
        ctx.step_zero, ctx.steps = step_zero, steps
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        o, lse, q, *tensors = ctx.saved_tensors
        step_zero, steps = ctx.step_zero, ctx.steps
        keys, values, rest = tensors[:steps], tensors[steps : 2 * steps], tensors[2 * steps :]
        grad = _whole_vectors(grad)
        merged = Attended(o, lse, tuple(rest))
        dq, first_dk, first_dv = step_zero.backward(grad, q, keys[0], values[0], merged)
        dks: tuple[Tensor, ...] = ()
        dvs: tuple[Tensor, ...] = ()
        if steps > 1:
            found = torch.ops.speculators.draft_attention_merge_backward_(
                dq, grad, o, lse, q, keys[1:], values[1:], step_zero.scale
            )
            dks, dvs = (part.unbind() for part in found.transpose(3, 4))
        return None, dq, first_dk, *dks, first_dv, *dvs


def _whole_vectors(tensor: Tensor) -> Tensor:
    """With the D elements of a vector side by side, as all kernels want them."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _fake(
    output: Tensor,
    logsumexp: Tensor,
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    scale: float,
) -> None:
    del output, logsumexp, query, keys, values, scale  # it writes in place, and makes nothing


def _fake_backward(
    grad_query: Tensor,
    grad_output: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    scale: float,
) -> Tensor:
    del grad_query, grad_output, output, logsumexp, values, scale
    batch, heads, count, size = keys[0].shape
    return query.new_empty(2, len(keys), batch, count, heads, size)


if backend.LIBRARIES[Backend.CPU].loaded:
    torch.library.register_fake("speculators::draft_attention_merge_", _fake)
    torch.library.register_fake("speculators::draft_attention_merge_backward_", _fake_backward)
