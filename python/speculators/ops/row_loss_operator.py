"""The compiled row losses: which calls they serve, what they are given, and their gradient.

``distillation_loss`` decides between this and its definition in torch's operators. The operator
takes the target's rows by index, so that a draft trained several steps ahead copies none of them,
and forms the gradient along with the losses. ``speculators::distillation_loss`` returns it, for
autograd to keep; ``speculators::distillation_loss_`` writes it over the logits, and no second
``[R, W]`` tensor exists.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from speculators.ops import backend
from speculators.ops.backend import Backend
from speculators.ops.target_distribution import TargetDistribution

LOSSES: Final = (
    "kl",
    "rkl",
    "jsd",
    "ce_soft",
    "ce_argmax",
    "ce_data",
    "tv",
    "nla",
    "lk_hybrid",
    "topk",
)
"""The order of the operator's factors."""

MAX_TOP_K: Final = 1024
"""The most tokens of ``topk``: the CUDA kernel holds them in shared memory."""

Columns = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Loss, alpha, greedy acceptance, agreement, in vocabulary: ``[R]`` each."""

_RESULTS = (torch.float32, torch.float32, torch.float32, torch.bool, torch.bool)


def serves(
    logits: Tensor, target: TargetDistribution, losses: Mapping[str, float], top_k: int
) -> bool:
    """Whether the compiled operator takes these arguments, and is there and not ruled out.

    It takes float32 and bfloat16 logits and a float32 target. A compiled back end may be forced;
    what the operator does not take goes to the definition all the same.

    Raises:
        BackendError: a back end is forced that does not serve the logits' device.
    """
    compiled = backend.choose(logits.device.type).backend is not Backend.REFERENCE
    return (
        compiled
        and logits.dtype in {torch.float32, torch.bfloat16}
        and target.log_p.dtype == torch.float32
        and logits.device == target.log_p.device
        and losses.keys() <= set(LOSSES)
        and min(top_k, logits.shape[1]) <= MAX_TOP_K
    )


@dataclasses.dataclass(frozen=True)
class RowLossInputs:
    """What both operators take beside the logits.

    Attributes:
        target: T rows, W tokens.
        losses: name -> weight.
        positions: int64 ``[R]``, each row's target; None where R = T and each has its own.
        data_tokens: int64 ``[R]``, the verifier's ids, or None.
        weights: float32 ``[R]``, of the gradient only, or None.
        top_k: of the loss of that name.
        mask_out_of_vocabulary: no loss where the draft lacks the verifier's most likely token.
    """

    target: TargetDistribution
    losses: Mapping[str, float]
    positions: Tensor | None
    data_tokens: Tensor | None
    weights: Tensor | None
    top_k: int
    mask_out_of_vocabulary: bool

    def arguments(self) -> tuple[Any, ...]:
        """The operators' arguments from the second on, up to ``only_in_vocabulary``."""
        target = self.target
        factors = [float(self.losses.get(name, 0.0)) for name in LOSSES]
        wanted = {name for name, factor in zip(LOSSES, factors, strict=True) if factor != 0}
        tokens = None
        if "ce_data" in wanted and self.data_tokens is not None:
            tokens = target.to_draft_ids(self.data_tokens).clamp(min=-1)
        return (
            target.log_p,
            target.coverage,
            target.best,
            target.likeliest if "ce_argmax" in wanted else None,
            target.top(self.top_k) if "topk" in wanted else None,
            self.positions,
            tokens,
            self.weights,
            factors,
            self.mask_out_of_vocabulary,
        )


def compiled_row_losses(logits: Tensor, inputs: RowLossInputs) -> Columns:
    """The losses, differentiable (once) in the logits; without the weights."""
    wanted = torch.is_grad_enabled() and logits.requires_grad
    results = torch.ops.speculators.distillation_loss(logits, *inputs.arguments(), wanted)
    loss, alpha, greedy_acceptance, agreement, in_vocabulary, _ = results
    return loss, alpha.detach(), greedy_acceptance.detach(), agreement, in_vocabulary


def compiled_row_losses_(logits: Tensor, inputs: RowLossInputs) -> Columns:
    """The losses; the logits, whose rows must be contiguous, become the gradient."""
    with torch.no_grad():
        columns: Columns = torch.ops.speculators.distillation_loss_(
            logits.detach(), *inputs.arguments()
        )
    if not torch.compiler.is_compiling():
        # Whoever saved the logits for a backward pass learns that they are gone.
        torch.autograd.graph.increment_version(logits)
    return columns


def _new_columns(logits: Tensor) -> Columns:
    loss, alpha, greedy, agreement, inside = (
        logits.new_empty(logits.shape[0], dtype=dtype) for dtype in _RESULTS
    )
    return loss, alpha, greedy, agreement, inside


def _fake(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    with_gradient = arguments[-1]
    return *_new_columns(logits), logits.new_empty(
        logits.shape[0] if with_gradient else 0, logits.shape[1]
    )


def _fake_(logits: Tensor, *arguments: Any) -> Columns:
    del arguments  # the results have the logits' rows
    return _new_columns(logits)


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.arguments = len(inputs)
    ctx.save_for_backward(output[-1])


@torch.autograd.function.once_differentiable
def _scale_gradient(ctx: Any, grad_loss: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
    del others  # acceptance has no gradient
    (gradient,) = ctx.saved_tensors
    # Into the logits' dtype: bfloat16 times float32 would be float32, and is rounded only here.
    scaled = torch.mul(gradient, grad_loss[:, None], out=torch.empty_like(gradient))
    return scaled, *[None] * (ctx.arguments - 1)


if backend.LIBRARIES[Backend.CPU].loaded:
    torch.library.register_fake("speculators::distillation_loss", _fake)
    torch.library.register_fake("speculators::distillation_loss_", _fake_)
    torch.library.register_autograd(
        "speculators::distillation_loss", _scale_gradient, setup_context=_save_gradient
    )
