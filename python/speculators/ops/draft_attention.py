"""Attention of drafts in training: a causal step 0, and one key per later step.

In train-time test (EAGLE-3, section 3.2) and in harmonised context alignment (HASS, section 3.2)
row t of step s sees the rows of step 0 up to t, and of every later step row t alone. So the scores
of step s are one matrix for step 0 and s diagonals, and nothing of size ``[T, s T]`` is needed.

``draft_attention_reference`` writes the scores out and is the definition. ``draft_attention``
leaves step 0 to a flash kernel and folds the diagonals into its result in one pass over memory,
where there is a compiled operator for the device and the dtype.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from speculators.ops.draft_attention_operator import compiled_draft_attention, serves
from speculators.ops.packed_rows import PackedRows
from speculators.ops.step_zero_attention import StepZero


def draft_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    rows: PackedRows,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """The attention of one step.

    Args:
        q: queries of step s ``[B, Nq, R, D]``, any float dtype.
        keys: of step 0 ``[B, Nkv, T, D]``, then of steps 1 to s, each ``[B, Nkv, R, D]``; Nq is a
            multiple of Nkv. All of one dtype with q and the values; memory in any order.
        values: as keys.
        rows: the R queries among the T rows of step 0, and their documents.
        scale: of the scores.
        window: a sliding window: a key is seen if its position is more than the query's minus
            this, where positions rise by 1 from row to row and from step to step. None for all.

    Returns:
        ``[B, R, Nq, D]``, differentiable (once) in queries, keys and values. Padding has some
        finite output.

    Raises:
        ValueError: a shape, a device or the window is wrong.
        TypeError: a dtype is not a float's, or not that of the others.

    Example:
        >>> rows = PackedRows(torch.tensor([[0, 0, 1]]))
        >>> q, v = torch.zeros(1, 1, 3, 2), torch.tensor([[[[2.0, 0], [4, 0], [6, 0]]]])
        >>> draft_attention(q, [q], [v], rows, scale=1.0)[0, :, 0, 0]
        tensor([2., 3., 6.])
        >>> draft_attention(q, [q, q], [v, v + 4], rows, scale=1.0)[0, :, 0, 0]
        tensor([4.0000, 4.6667, 8.0000])
    """
    _check(q, keys, values, rows, window)
    step = len(keys) - 1
    reach, first = None, 1
    if window is not None:
        reach = window - step
        first = max(1, 1 - reach)  # step i is seen by step s if i > s - window
    seen = slice(first, None)
    if serves(q, keys, values, rows):
        keys, values = [keys[0], *keys[seen]], [values[0], *values[seen]]
        output = compiled_draft_attention(q, keys, values, StepZero(rows, reach, scale))
    else:
        output = draft_attention_reference(
            q, keys[0], values[0], keys[seen], values[seen], rows.mask(reach), scale
        )
    return output.transpose(1, 2)


def draft_attention_reference(
    q: Tensor,
    k0: Tensor,
    v0: Tensor,
    later_keys: Sequence[Tensor],
    later_values: Sequence[Tensor],
    mask: Tensor,
    scale: float,
) -> Tensor:
    """The attention of one step, in plain torch; scores and softmax in float32 at least.

    Args:
        q: queries of step s ``[B, Nq, R, D]``; R is T, or fewer rows from step 1 on.
        k0: keys of step 0 ``[B, Nkv, T, D]``; Nq is a multiple of Nkv.
        v0: values of step 0 ``[B, Nkv, T, D]``.
        later_keys: keys of those of steps 1 to s that are seen, each ``[B, Nkv, R, D]``.
        later_values: values of the same steps.
        mask: bool, broadcast to ``[B, 1, R, T]``: which rows of step 0 each row sees, at least one
            unless it sees a later step's.
        scale: of the scores.

    Returns:
        ``[B, Nq, R, D]`` in the dtype of ``v0``.
    """
    B, Nq, R, D = q.shape
    T = k0.shape[2]
    q = q.reshape(B, k0.shape[1], Nq // k0.shape[1], R, D)
    precise = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k0[:, :, None].transpose(-1, -2)).to(precise) * scale
    scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
    if later_keys:
        keys = torch.stack(tuple(later_keys), -2)[:, :, None]  # [B, Nkv, 1, R, s, D]
        diagonals = (keys * q[..., None, :]).sum(-1, dtype=precise) * scale
        scores = torch.cat([scores, diagonals], -1)
    weights = scores.softmax(-1).to(v0.dtype)
    output = weights[..., :T] @ v0[:, :, None]
    if later_keys:
        values = torch.stack(tuple(later_values), -2)[:, :, None]
        output = output + (weights[..., T:, None] * values).sum(-2)
    return output.reshape(B, Nq, R, D)


def _check(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    rows: PackedRows,
    window: int | None,
) -> None:
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, expected at least 1, the row itself, or None")
    if not keys or len(keys) != len(values):
        raise ValueError(
            f"got keys of {len(keys)} steps and values of {len(values)}; expected those of step 0 "
            "and of every step up to this one"
        )
    batch, count, width = rows.shape
    if q.dim() != 4 or (q.shape[0], q.shape[2]) != (batch, count) or 0 in (q.shape[1], q.shape[3]):
        raise ValueError(
            f"q has the shape {list(q.shape)}, expected [{batch}, Nq, {count}, D] as the rows"
        )
    if not q.dtype.is_floating_point:
        raise TypeError(f"q is {q.dtype}, expected a float dtype")
    if q.device != rows.document_ids.device:
        raise ValueError(f"q is on {q.device}, expected {rows.document_ids.device}, as the rows")
    heads = keys[0].shape[1] if keys[0].dim() == 4 else 0
    if heads == 0 or q.shape[1] % heads:
        raise ValueError(
            f"keys[0] has the shape {list(keys[0].shape)}, expected [{batch}, Nkv, {width}, "
            f"{q.shape[3]}], with q's {q.shape[1]} heads a multiple of Nkv"
        )
    for step, pair in enumerate(zip(keys, values, strict=True)):
        expected = [batch, heads, count if step else width, q.shape[3]]
        for name, tensor in zip(("keys", "values"), pair, strict=True):
            _check_like(f"{name}[{step}]", tensor, expected, q)


def _check_like(name: str, tensor: Tensor, shape: list[int], q: Tensor) -> None:
    if list(tensor.shape) != shape:
        raise ValueError(f"{name} has the shape {list(tensor.shape)}, expected {shape}")
    if tensor.dtype != q.dtype:
        raise TypeError(f"{name} is {tensor.dtype}, expected {q.dtype}, as q")
    if tensor.device != q.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {q.device}, as q")
