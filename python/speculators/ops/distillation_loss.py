"""Row losses between a draft's logits and the verifier's, with acceptance measured alongside.

Everything is computed in log space and in float32 (float64 where an input is float64), whatever the
dtype of the logits: bfloat16 has 8 bits, and a loss that ends training at 1e-3 needs more.

``row_losses_reference`` is the definition in torch's own operators: each loss is one short function
of two distributions, and what several of them share is computed once for all. That is ten or more
passes over ``[R, W]`` tensors, and as many again in backward. ``row_losses`` leaves the work to a
compiled operator that reads each row once, where there is one for the device and the dtypes;
``row_losses_and_gradient_`` is the same for callers that form gradients themselves.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from speculators.ops.row_loss_operator import (
    RowLossInputs,
    compiled_row_losses,
    compiled_row_losses_,
    serves,
)
from speculators.ops.target_distribution import (
    TargetDistribution,
    arithmetic_dtype,
    check_logits,
    target_distribution,
)

LK_DECAY: Final = 3.0
"""lk_hybrid's weight of kl is ``exp(-LK_DECAY * alpha)``."""

MIN_LOG_P: Final = -100.0
"""log p is taken no lower, as torch's binary cross-entropy does: in rkl a token with p = 0 costs
100 nats, not infinitely many. In kl and jsd p itself multiplies it, and exp(-100) vanishes."""


@dataclasses.dataclass(frozen=True)
class RowLosses:
    """Loss and acceptance, each ``[R]``; ``loss`` alone carries gradient, to the draft's logits.

    Attributes:
        loss: the weighted sum of the losses, float32 or float64; 0 in rows that are masked.
        alpha: the acceptance of a token sampled from the draft: ``sum_v min(p(v), q(v))``, full p.
        greedy_acceptance: the acceptance of the draft's most likely token: the full p of it.
        agreement: bool, whether the most likely tokens of verifier (of V) and draft are the same.
        in_vocabulary: bool, whether the draft's vocabulary has the verifier's most likely token.
    """

    loss: Tensor
    alpha: Tensor
    greedy_acceptance: Tensor
    agreement: Tensor
    in_vocabulary: Tensor


def distillation_loss(
    draft_logits: Tensor,
    target_logits: Tensor,
    losses: Mapping[str, float],
    *,
    draft_to_verifier: Tensor | None = None,
    data_tokens: Tensor | None = None,
    weights: Tensor | None = None,
    top_k: int = 10,
    mask_out_of_vocabulary: bool = True,
) -> RowLosses:
    """``row_losses`` of a draft's logits ``[R, W]`` against a verifier's ``[R, V]``.

    ``target_distribution`` describes ``target_logits`` and ``draft_to_verifier``, ``row_losses``
    the other arguments; what they raise, this raises.

    Example:
        >>> p = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> q = torch.tensor([[0.25, 0.5, 0.25]]).log()
        >>> rows = distillation_loss(q, p, {"tv": 1.0})
        >>> rows.loss, rows.alpha, rows.agreement
        (tensor([0.2500]), tensor([0.7500]), tensor([False]))
    """
    return row_losses(
        draft_logits,
        target_distribution(target_logits, draft_to_verifier),
        losses,
        data_tokens=data_tokens,
        weights=weights,
        top_k=top_k,
        mask_out_of_vocabulary=mask_out_of_vocabulary,
    )


def row_losses(
    draft_logits: Tensor,
    target: TargetDistribution,
    losses: Mapping[str, float],
    *,
    data_tokens: Tensor | None = None,
    weights: Tensor | None = None,
    top_k: int = 10,
    mask_out_of_vocabulary: bool = True,
) -> RowLosses:
    """A weighted sum of losses between ``q = softmax(draft_logits)`` and p, row by row.

    ==============  ============================================================================
    ``kl``          ``sum p log(p / q)``
    ``rkl``         ``sum q log(q / p)``, with log p no lower than ``MIN_LOG_P``
    ``jsd``         ``(KL(p, m) + KL(q, m)) / 2`` with ``m = (p + q) / 2``
    ``ce_soft``     ``-sum p log q`` (EAGLE-1, arXiv 2401.15077)
    ``ce_argmax``   ``-log q`` of p's most likely token
    ``ce_data``     ``-log q`` of the data's token; 0 where the draft's vocabulary lacks it
    ``tv``          ``1 - alpha``, the total variation; alpha here with the p of the loss
    ``nla``         ``-log alpha`` (arXiv 2602.23881)
    ``lk_hybrid``   ``l kl + (1 - l) tv`` with ``l = exp(-3 alpha)``, l without gradient (the same)
    ``topk``        ``-sum p log q`` over p's ``top_k`` most likely tokens (HASS, arXiv 2408.15766)
    ==============  ============================================================================

    Here p is restricted to the draft's vocabulary and renormalised. A row in which p gives that
    vocabulary no probability has no loss, whatever is masked.

    Args:
        draft_logits: ``[R, W]``, finite, any float dtype; the gradient has that dtype.
        target: of the same R rows and W tokens.
        losses: name -> weight, at least one; a weight of 0 leaves the loss out.
        data_tokens: int64 ``[R]``, the verifier's ids of the tokens in the data; for ``ce_data``.
        weights: ``[R]``, multiplies the rows' losses; no gradient.
        top_k: how many tokens ``topk`` takes, at least 1 (all where there are fewer).
        mask_out_of_vocabulary: no loss in rows whose most likely verifier token is outside of the
            draft's vocabulary.

    Raises:
        ValueError: a loss is unknown, ``ce_data`` lacks its tokens, or a shape is wrong.
        TypeError: the logits are not of a float dtype, or the tokens not int64.
    """
    check_losses(losses, data_tokens, top_k)
    check_logits("draft_logits", draft_logits)
    _check_shapes(draft_logits, target, None, data_tokens, weights)
    if serves(draft_logits, target, losses, top_k):
        inputs = RowLossInputs(
            target, losses, None, data_tokens, None, top_k, mask_out_of_vocabulary
        )
        result = RowLosses(*compiled_row_losses(draft_logits, inputs))
    else:
        result = row_losses_reference(
            draft_logits, target, losses, data_tokens, top_k, mask_out_of_vocabulary
        )
    if weights is None:
        return result
    return dataclasses.replace(result, loss=result.loss * weights.detach().to(result.loss.dtype))


def row_losses_and_gradient_(
    draft_logits: Tensor,
    target: TargetDistribution,
    losses: Mapping[str, float],
    *,
    positions: Tensor | None = None,
    data_tokens: Tensor | None = None,
    weights: float | Tensor = 1.0,
    top_k: int = 10,
    mask_out_of_vocabulary: bool = True,
) -> RowLosses:
    """``row_losses``; in place of the logits, the gradient of ``sum_r weights[r] loss[r]``.

    For a walk over many chunks that forms gradients itself: no graph, no second ``[R, W]`` tensor,
    and no copy of the target's rows. The losses that it returns are *without* the weights.

    Args:
        draft_logits: ``[R, W]``, as in ``row_losses``; overwritten by the gradient with respect to
            them, in their dtype. They may belong to a graph: what that has saved of them is then
            invalid, which autograd notices (a matrix product saves nothing of its result).
        target: of T rows and the same W tokens.
        losses: as in ``row_losses``.
        positions: int64 ``[R]``, which row of the target each row learns from, in any order,
            repeats allowed; None where R = T and each row has its own.
        data_tokens: int64 ``[R]``, as in ``row_losses``: of the rows, not of the target's.
        weights: of the rows in the gradient: a number, ``[]`` or ``[R]``.
        top_k: as in ``row_losses``.
        mask_out_of_vocabulary: as in ``row_losses``.

    Returns:
        The same as ``row_losses``, all of it without gradient.

    Raises:
        ValueError: as ``row_losses``, or the logits' rows overlap.
        TypeError: as ``row_losses``, or ``positions`` are not int64.
        IndexError: a position is out of range (on CPU).
    """
    check_losses(losses, data_tokens, top_k)
    check_logits("draft_logits", draft_logits)
    row_weights = _row_weights(draft_logits, weights)
    _check_shapes(draft_logits, target, positions, data_tokens, row_weights)
    rows, width = draft_logits.shape
    contiguous_rows = draft_logits.stride(1) == 1 or width == 1
    if contiguous_rows and draft_logits.stride(0) < width and rows > 1:
        raise ValueError(
            f"draft_logits has rows of {width} logits that lie {draft_logits.stride(0)} apart, "
            "expected rows that do not overlap, since each is overwritten; clone it first"
        )
    if contiguous_rows and serves(draft_logits, target, losses, top_k):
        weights = row_weights.float()
        inputs = RowLossInputs(
            target, losses, positions, data_tokens, weights, top_k, mask_out_of_vocabulary
        )
        return RowLosses(*compiled_row_losses_(draft_logits, inputs))
    logits = draft_logits.detach().requires_grad_()
    with torch.enable_grad():
        result = row_losses_reference(
            logits,
            target if positions is None else target.select(positions),
            losses,
            data_tokens,
            top_k,
            mask_out_of_vocabulary,
        )
        weighted = (result.loss * row_weights.to(result.loss.dtype)).sum()
    (gradient,) = torch.autograd.grad(weighted, logits)
    with torch.no_grad():
        draft_logits.copy_(gradient)
    return dataclasses.replace(result, loss=result.loss.detach())


def row_losses_reference(
    draft_logits: Tensor,
    target: TargetDistribution,
    losses: Mapping[str, float],
    data_tokens: Tensor | None = None,
    top_k: int = 10,
    mask_out_of_vocabulary: bool = True,
) -> RowLosses:
    """What ``row_losses`` computes, in torch's own operators, without checks and weights."""
    dtype = arithmetic_dtype(draft_logits, target.log_p)
    log_q = torch.log_softmax(draft_logits, -1, dtype=dtype)
    pair = _Pair(target, target.log_p.to(dtype), log_q, data_tokens, top_k)
    loss = torch.zeros_like(log_q[:, 0])
    wanted = {name: factor for name, factor in losses.items() if factor != 0}
    for name, factor in (wanted or losses).items():  # all 0: still a loss, with a gradient of 0
        loss = loss + factor * _LOSSES[name](pair)
    learnable = target.coverage > 0
    if mask_out_of_vocabulary:
        learnable &= target.best >= 0
    loss = loss.masked_fill(~learnable, 0)
    with torch.no_grad():
        guess = draft_logits.argmax(-1)
        full_p = pair.p * target.coverage.to(dtype)[:, None]
        return RowLosses(
            loss,
            alpha=torch.minimum(full_p, pair.q).sum(-1).clamp(max=1),
            greedy_acceptance=_take(full_p, guess),
            agreement=guess == target.best,
            in_vocabulary=target.best >= 0,
        )


def smooth_l1_rows(predicted: Tensor, target: Tensor, beta: float = 1.0) -> Tensor:
    """EAGLE-1's loss on features: SmoothL1, averaged over the width H.

    Args:
        predicted: ``[R, H]``, any float dtype.
        target: ``[R, H]``; no gradient. A ValueError says where the shapes differ.
        beta: the distance from which on the loss is linear.

    Returns:
        ``[R]`` float32 (float64 where an input is), differentiable in ``predicted``.
    """
    if predicted.dim() != 2 or predicted.shape != target.shape:
        found = f"{list(predicted.shape)} and {list(target.shape)}"
        raise ValueError(f"predicted and target have the shapes {found}, expected one [R, H]")
    dtype = arithmetic_dtype(predicted, target)
    return functional.smooth_l1_loss(
        predicted.to(dtype), target.detach().to(dtype), reduction="none", beta=beta
    ).mean(-1)


def check_losses(losses: Mapping[str, float], data_tokens: Tensor | None, top_k: int) -> None:
    """Refuses, with a ValueError, what ``row_losses`` cannot compute."""
    known = ", ".join(_LOSSES)
    if not losses:
        raise ValueError(f"losses is empty, expected at least one of {known}")
    for name, factor in losses.items():
        if name not in _LOSSES:
            raise ValueError(f"unknown loss {name!r}, expected one of {known}")
        if not math.isfinite(factor):
            raise ValueError(f"the loss {name!r} has the weight {factor}, expected a finite number")
    if "ce_data" in losses and data_tokens is None:
        raise ValueError("the loss 'ce_data' needs data_tokens, int64 [R]; got None")
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}, expected at least 1")


def _check_shapes(
    draft_logits: Tensor,
    target: TargetDistribution,
    positions: Tensor | None,
    data_tokens: Tensor | None,
    weights: Tensor | None,
) -> None:
    found, (targets, width) = list(draft_logits.shape), target.log_p.shape
    expected = [targets if positions is None else found[0], width]
    if found != expected:
        raise ValueError(
            f"draft_logits has the shape {found}, expected {expected} as the target; a draft "
            "vocabulary of its own needs draft_to_verifier"
        )
    for name, ids in (("data_tokens", data_tokens), ("positions", positions)):
        if ids is not None and ids.dtype != torch.int64:
            raise TypeError(f"{name} is {ids.dtype}, expected torch.int64")
    columns = (("data_tokens", data_tokens), ("positions", positions), ("weights", weights))
    for name, tensor in columns:
        if tensor is not None and list(tensor.shape) != found[:1]:
            raise ValueError(f"{name} has the shape {list(tensor.shape)}, expected {found[:1]}")
    # On a CUDA device this would wait for it; there the kernel checks.
    if positions is not None and positions.device.type == "cpu":
        outside = ((positions < 0) | (positions >= targets)).nonzero()
        if outside.numel():
            row = int(outside[0])
            raise IndexError(
                f"positions[{row}] is {int(positions[row])}, expected 0 <= position < {targets}, "
                "the target's rows"
            )


def _row_weights(draft_logits: Tensor, weights: float | Tensor) -> Tensor:
    """The weights as float32 or float64 ``[R]``; a shape but for ``[]`` is left to a check."""
    if not isinstance(weights, Tensor):
        return draft_logits.new_full(draft_logits.shape[:1], weights, dtype=torch.float32)
    weights = weights.detach().to(torch.promote_types(weights.dtype, torch.float32))
    return weights.expand(draft_logits.shape[0]) if weights.dim() == 0 else weights


def _take(table: Tensor, ids: Tensor) -> Tensor:
    """One column of each row: ``[R, W]``, int64 ``[R]`` -> ``[R]``."""
    return table.gather(-1, ids[:, None])[:, 0]


@dataclasses.dataclass(frozen=True)
class _Pair:
    """The two distributions ``[R, W]``, and what several losses share, made on first use."""

    target: TargetDistribution
    log_p: Tensor
    log_q: Tensor
    data_tokens: Tensor | None
    top_k: int

    @cached_property
    def p(self) -> Tensor:
        return self.log_p.exp()

    @cached_property
    def q(self) -> Tensor:
        return self.log_q.exp()

    @cached_property
    def bounded_log_p(self) -> Tensor:
        return self.log_p.clamp(min=MIN_LOG_P)

    @cached_property
    def kl(self) -> Tensor:
        return (self.p * (self.bounded_log_p - self.log_q)).sum(-1)

    @cached_property
    def tv(self) -> Tensor:
        return (self.p - self.q).abs().sum(-1) / 2


def _jsd(pair: _Pair) -> Tensor:
    log_m = torch.logaddexp(pair.log_p, pair.log_q) - math.log(2)
    from_p = (pair.p * (pair.bounded_log_p - log_m)).sum(-1)
    from_q = (pair.q * (pair.log_q - log_m)).sum(-1)
    return (from_p + from_q) / 2


def _ce_argmax(pair: _Pair) -> Tensor:
    # Where the verifier's own choice is out of reach, the best of what is within.
    return -_take(pair.log_q, pair.target.likeliest)


def _ce_data(pair: _Pair) -> Tensor:
    assert pair.data_tokens is not None  # noqa: S101 - check_losses has refused it
    ids = pair.target.to_draft_ids(pair.data_tokens)
    return -_take(pair.log_q, ids.clamp(min=0)).masked_fill(ids < 0, 0)


def _nla(pair: _Pair) -> Tensor:
    # In log space: where p and q hardly overlap, alpha itself would be 0 and its gradient 0 / 0.
    return -torch.minimum(pair.log_p, pair.log_q).logsumexp(-1)


def _lk_hybrid(pair: _Pair) -> Tensor:
    kl_weight = torch.exp(-LK_DECAY * (1 - pair.tv.detach()))
    return kl_weight * pair.kl + (1 - kl_weight) * pair.tv


def _topk(pair: _Pair) -> Tensor:
    best = pair.target.top(pair.top_k)
    return -(pair.p.gather(-1, best) * pair.log_q.gather(-1, best)).sum(-1)


_LOSSES: Final[Mapping[str, Callable[[_Pair], Tensor]]] = {
    "kl": lambda pair: pair.kl,
    "rkl": lambda pair: (pair.q * (pair.log_q - pair.bounded_log_p)).sum(-1),
    "jsd": _jsd,
    "ce_soft": lambda pair: -(pair.p * pair.log_q).sum(-1),
    "ce_argmax": _ce_argmax,
    "ce_data": _ce_data,
    "tv": lambda pair: pair.tv,
    "nla": _nla,
    "lk_hybrid": _lk_hybrid,
    "topk": _topk,
}
