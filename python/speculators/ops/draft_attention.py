"""Attention of drafts in training: a causal step 0, and one key per later step.

In train-time test (EAGLE-3, section 3.2) and in harmonised context alignment (HASS, section 3.2)
row t of step s sees the rows of step 0 up to t, and of every later step row t alone. So the scores
of step s are one matrix for step 0 and s diagonals, and nothing of size ``[T, s T]`` is needed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def draft_attention_reference(
    q: Tensor,
    k0: Tensor,
    v0: Tensor,
    later_keys: Sequence[Tensor],
    later_values: Sequence[Tensor],
    mask: Tensor,
    diagonal_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """The attention of one step, in plain torch; scores and softmax in float32 at least.

    Args:
        q: queries of step s ``[B, Nq, R, D]``; R is T, or fewer rows from step 1 on.
        k0: keys of step 0 ``[B, Nkv, T, D]``; Nq is a multiple of Nkv.
        v0: values of step 0 ``[B, Nkv, T, D]``.
        later_keys: keys of steps 1 to s, each ``[B, Nkv, R, D]``.
        later_values: values of steps 1 to s.
        mask: bool, broadcast to ``[B, 1, R, T]``: which rows of step 0 each row sees, at least one
            unless it sees a later step's.
        diagonal_mask: bool ``[B, R, s]``: whether row t sees row t of steps 1 to s; None for yes.
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
        if diagonal_mask is not None:
            diagonals = diagonals.masked_fill(~diagonal_mask[:, None, None], -torch.inf)
        scores = torch.cat([scores, diagonals], -1)
    weights = scores.softmax(-1).to(v0.dtype)
    output = weights[..., :T] @ v0[:, :, None]
    if later_keys:
        values = torch.stack(tuple(later_values), -2)[:, :, None]
        output = output + (weights[..., T:, None] * values).sum(-2)
    return output.reshape(B, Nq, R, D)
