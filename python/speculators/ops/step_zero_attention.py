"""Causal attention over the rows of step 0, by the best flash kernel that torch has.

It gives what merging needs, the output and the logarithm of the sum of exponentials, and takes
both back, merged, to form the gradients: ``p = exp(score - lse)`` and ``delta = do . o`` are then
those of the whole softmax.

On the CPU torch's kernel knows neither documents nor windows nor query heads that share keys. So it
is called document by document; the shared keys are a view with stride 0, of which the kernel makes
no copy; and a mask is given where the queries are not a document's beginning. (Queries that are
half of their document take about half as long with a mask as all of its rows do without.) On CUDA
one call does all documents, but of each of them all rows: those that are not selected are zeros.
"""

import dataclasses
from typing import Any, Final

import torch
from torch import Tensor

from speculators.ops.packed_rows import PackedRows

CUDA_HEAD_SIZE: Final = 256
"""The largest head of the kernel for CUDA; also a multiple of ``CUDA_HEAD_MULTIPLE``."""

CUDA_HEAD_MULTIPLE: Final = 8

CUDA_ALIGNMENT: Final = 16
"""Bytes that the kernel for CUDA loads at a time, of which addresses must be multiples."""

FLOAT32_KEYS: Final = 512
"""Up to so many keys, bfloat16 gradients are computed in float32 on the CPU, which is quicker: many
small matrix products in bfloat16 cost more to prepare than to compute."""

# torch calls them private; their public twins do not return the logsumexp, or do not take it back.
_ATEN: Final[Any] = torch.ops.aten
_CPU: Final = _ATEN._scaled_dot_product_flash_attention_for_cpu.default  # noqa: SLF001 - see above
_CPU_BACKWARD: Final = (
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default  # noqa: SLF001 - see above
)
_CUDA: Final = _ATEN._flash_attention_forward.default  # noqa: SLF001 - see above
_CUDA_BACKWARD: Final = _ATEN._flash_attention_backward.default  # noqa: SLF001 - see above


@dataclasses.dataclass(frozen=True)
class Attended:
    """What attention leaves behind, of step 0 or, merged, of all steps.

    Attributes:
        output: ``[B, Nq, R, D]``; 0 where a query sees nothing.
        logsumexp: float32 ``[B, Nq, R]``; -inf where a query sees nothing.
        rest: what the kernel's backward wants of its forward.
    """

    output: Tensor
    logsumexp: Tensor
    rest: tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class StepZero:
    """The part of draft attention that is one matrix of scores.

    Attributes:
        rows: the R queries of the T rows.
        reach: how many rows back a row sees, itself included; None for all.
        scale: of the scores.
    """

    rows: PackedRows
    reach: int | None
    scale: float

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Attended:
        """The attention to step 0 alone.

        Args:
            q: ``[B, Nq, R, D]``, whose last dimension is contiguous, as of all tensors here.
            k: ``[B, Nkv, T, D]``.
            v: ``[B, Nkv, T, D]``.
        """
        if self._is_for_cuda(q):
            return self._forward_cuda(q, k, v)
        batch, heads, count, size = q.shape
        o = q.new_empty(batch, count, heads, size).transpose(1, 2)
        lse = q.new_empty(batch, count, heads, dtype=torch.float32).transpose(1, 2)
        pieces = self.rows.pieces(self.reach)
        if not pieces or not self.rows.covers_all:
            o.zero_()
            lse.fill_(-torch.inf)
        q_, o_, lse_ = (_grouped(t, k.shape[1]) for t in (q, o, lse))
        k_, v_ = _shared(k, heads), _shared(v, heads)
        for piece in pieces:
            queries, keys = piece.queries, piece.keys
            o_[queries], lse_[queries] = _CPU(
                q_[queries],
                k_[keys],
                v_[keys],
                0.0,
                piece.mask is None,
                attn_mask=piece.mask,
                scale=self.scale,
            )
        return Attended(o, lse, ())

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, merged: Attended
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, k and v, as far as step 0's scores and values are concerned.

        Args:
            grad: of the whole output, ``[B, Nq, R, D]``.
            q: as in :meth:`forward`.
            k: as in :meth:`forward`.
            v: as in :meth:`forward`.
            merged: of the whole softmax, with the rest of :meth:`forward`.
        """
        if self._is_for_cuda(q):
            return self._backward_cuda(grad, q, k, v, merged)
        pieces = self.rows.pieces(self.reach)
        # dq is written piece by piece; what dk and dv get from several pieces is added up.
        whole = bool(pieces) and self.rows.covers_all
        dq = (torch.empty_like if whole else torch.zeros_like)(merged.output)
        shape = (k.shape[0], k.shape[2], k.shape[1], k.shape[3])
        dk, dv = (k.new_zeros(shape, dtype=torch.float32).transpose(1, 2) for _ in "kv")
        q_, grad_, dq_, o_, lse_ = (
            _grouped(t, k.shape[1]) for t in (q, grad, dq, merged.output, merged.logsumexp)
        )
        k_, v_ = _shared(k, q.shape[1]), _shared(v, q.shape[1])
        dk_, dv_ = dk[:, :, None], dv[:, :, None]
        for piece in pieces:
            queries, keys = piece.queries, piece.keys
            tensors = [grad_[queries], q_[queries], k_[keys], v_[keys], o_[queries]]
            if q.dtype == torch.bfloat16 and piece.num_keys <= FLOAT32_KEYS:
                tensors = [tensor.float() for tensor in tensors]
            dq_[queries], found_k, found_v = _CPU_BACKWARD(
                *tensors,
                lse_[queries],
                0.0,
                piece.mask is None,
                attn_mask=piece.mask,
                scale=self.scale,
            )
            _add_heads(found_k, dk_[keys], piece.is_first)
            _add_heads(found_v, dv_[keys], piece.is_first)
        return dq, dk.to(k.dtype), dv.to(v.dtype)

    def _is_for_cuda(self, q: Tensor) -> bool:
        sees = self.reach is None or self.reach > 0
        return q.device.type == "cuda" and q.numel() > 0 and sees

    def _forward_cuda(self, q: Tensor, k: Tensor, v: Tensor) -> Attended:
        lengths, longest = self.rows.cumulative_lengths
        left, right = (None, None) if self.reach is None else (self.reach - 1, 0)
        o, lse, seed, offset, _ = _CUDA(
            _all_rows(q, self.rows),
            _aligned(_flat(k)),
            _aligned(_flat(v)),
            lengths,
            lengths,
            longest,
            longest,
            0.0,
            True,
            False,
            scale=self.scale,
            window_size_left=left,
            window_size_right=right,
        )
        if self.rows.selected is not None:
            o, lse = o[self.rows.places], lse[:, self.rows.places]
        shape = self.rows.shape[:2]
        o, lse = o.unflatten(0, shape), lse.t().unflatten(0, shape)
        return Attended(o.transpose(1, 2), lse.transpose(1, 2), (seed, offset))

    def _backward_cuda(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, merged: Attended
    ) -> tuple[Tensor, Tensor, Tensor]:
        lengths, longest = self.rows.cumulative_lengths
        left, right = (None, None) if self.reach is None else (self.reach - 1, 0)
        # Of rows that are not selected all is 0: p = exp(0 - lse) with lse 0, times 0.
        lse = _all_rows(merged.logsumexp[..., None], self.rows)[..., 0]
        dq, dk, dv = _CUDA_BACKWARD(
            _all_rows(grad, self.rows),
            _all_rows(q, self.rows),
            _aligned(_flat(k)),
            _aligned(_flat(v)),
            _all_rows(merged.output, self.rows),
            lse.t().contiguous(),
            lengths,
            lengths,
            longest,
            longest,
            0.0,
            True,
            *merged.rest,
            scale=self.scale,
            window_size_left=left,
            window_size_right=right,
        )
        if self.rows.selected is not None:
            dq = dq[self.rows.places]
        batch, count, width = self.rows.shape
        dq = dq.unflatten(0, (batch, count)).transpose(1, 2)
        dk, dv = (t.unflatten(0, (batch, width)).transpose(1, 2) for t in (dk, dv))
        return dq, dk, dv


def _add_heads(of_heads: Tensor, total: Tensor, is_first: bool) -> None:
    """Adds up ``[Nkv, Nq / Nkv, keys, D]`` over heads into ``[Nkv, 1, keys, D]``, 0 at first.

    A few additions are quicker than a sum over a dimension of few elements.
    """
    parts, total = of_heads.unbind(1), total[:, 0]
    if is_first and len(parts) > 1:
        torch.add(parts[0], parts[1], out=total)
        parts = parts[2:]
    for part in parts:
        total.add_(part)


def _grouped(tensor: Tensor, key_heads: int) -> Tensor:
    """The heads that share keys apart: ``[B, Nq, ...]`` -> ``[B, Nkv, Nq / Nkv, ...]``."""
    grouped: Tensor = tensor.unflatten(1, (key_heads, tensor.shape[1] // key_heads))
    return grouped


def _shared(tensor: Tensor, heads: int) -> Tensor:
    """Keys for each of those heads, without a copy: ``[B, Nkv, Nq / Nkv, T, D]``."""
    return tensor[:, :, None].expand(-1, -1, heads // tensor.shape[1], -1, -1)


def _flat(tensor: Tensor) -> Tensor:
    """``[B, N, R, D]`` -> ``[B R, N, D]``."""
    return tensor.transpose(1, 2).flatten(0, 1)


def _aligned(tensor: Tensor) -> Tensor:
    """Itself, or a copy whose vectors (of a multiple of 8 elements) begin where CUDA wants them."""
    steps = [step * tensor.element_size() for step in tensor.stride()[:-1]]
    if any(place % CUDA_ALIGNMENT for place in (tensor.data_ptr(), *steps)):
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def _all_rows(tensor: Tensor, rows: PackedRows) -> Tensor:
    """``[B, N, R, D]`` -> ``[B T, N, D]``, 0 in rows that are not selected."""
    flat = _flat(tensor)
    if rows.selected is None:
        return _aligned(flat.contiguous())
    batch, _, width = rows.shape
    whole: Tensor = flat.new_zeros(batch * width, *flat.shape[1:])
    return whole.index_copy_(0, rows.places, flat)
