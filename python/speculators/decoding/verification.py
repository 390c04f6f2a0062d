"""Which drafted tokens the verifier accepts, and which token it adds: chains, in pure torch.

The verifier has read the last token and K drafted ones, so that row i of its logits is the
distribution of drafted token i, and row K that of the token after them. Tokens are accepted from
the first on, until one is not; the row there (or row K) then gives one token more. What is emitted
is what the verifier alone would have emitted: the same tokens when it is greedy, tokens of the same
distribution when it samples (Leviathan et al., "Fast inference from transformers via speculative
decoding", 2023, appendix A.1; Chen et al., "Accelerating large language model decoding with
speculative sampling", 2023, theorem 1).
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from speculators.decoding.sampling import draw


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of the drafted tokens.

    Attributes:
        accepted: int64 ``[B]``, how many of them are accepted, from the first on.
        next_tokens: int64 ``[B]``, the verifier's token after the accepted ones.
    """

    accepted: Tensor
    next_tokens: Tensor


def verify_greedy(logits: Tensor, drafted: Tensor, counts: Sequence[int] | None = None) -> Verdict:
    """Accepts while the drafted token is the verifier's most likely one, the lowest id on ties.

    Args:
        logits: ``[B, K + 1, V]``, compared in their own dtype.
        drafted: int64 ``[B, K]``, K >= 0.
        counts: how many of the drafted tokens are real in each row, the first ones; None: all.
    """
    best = logits.argmax(-1)
    accepted = _leading(best[:, :-1] == drafted, counts)
    return Verdict(accepted, best.gather(1, accepted[:, None])[:, 0])


def verify_sampling(
    probabilities: Tensor,
    drafted: Tensor,
    draft_probabilities: Tensor | None,
    uniforms: Tensor,
    counts: Sequence[int] | None = None,
) -> Verdict:
    """Accepts at random, such that what is emitted has the verifier's distribution p.

    A token x that was drawn from q is accepted with probability min(1, p(x) / q(x)); at the first
    rejection the token is drawn from (p - q)+. A token that was not drawn but chosen (the most
    likely of a draft, an n-gram's continuation) is a draw from the distribution that has all its
    mass there, whatever the draft's probabilities were: it is accepted with probability p(x), and
    after a rejection the token is drawn from p without x.

    Args:
        probabilities: p, ``[B, K + 1, V]``, with the settings of sampling applied.
        drafted: int64 ``[B, K]``, K >= 0.
        draft_probabilities: q, ``[B, K, V]``, exactly what each token was drawn from; None where
            the tokens were not drawn.
        uniforms: float64 ``[B, K + 1]`` in [0, 1), drawn independently of ``drafted``.
        counts: how many of the drafted tokens are real in each row, the first ones; None: all.
    """
    width = drafted.shape[1]
    p = probabilities[:, :width].gather(2, drafted[..., None])[..., 0]
    q: Tensor | float = 1.0
    if draft_probabilities is not None:
        q = draft_probabilities.gather(2, drafted[..., None])[..., 0].double()
    accepted = _leading(uniforms[:, :width] * q < p, counts)
    rows = torch.arange(len(accepted), device=accepted.device)
    weights = probabilities[rows, accepted]
    if width:
        weights = _residual(weights, drafted, draft_probabilities, accepted, counts)
    return Verdict(accepted, draw(weights, uniforms[:, -1]))


def _leading(accept: Tensor, counts: Sequence[int] | None) -> Tensor:
    """How many of the first entries of each row are true: bool ``[B, K]`` to int64 ``[B]``."""
    if counts is not None:
        limits = torch.tensor(counts, device=accept.device)[:, None]
        accept = accept & (torch.arange(accept.shape[1], device=accept.device) < limits)
    return accept.long().cumprod(1).sum(1)


def _residual(
    p: Tensor,
    drafted: Tensor,
    draft_probabilities: Tensor | None,
    accepted: Tensor,
    counts: Sequence[int] | None,
) -> Tensor:
    """What the token after the accepted ones is drawn from: ``[B, V]``, not normalised.

    Where everything was accepted nothing was rejected, and it is p itself.
    """
    width = drafted.shape[1]
    limits = width if counts is None else torch.tensor(counts, device=accepted.device)
    place = accepted.clamp(max=width - 1)[:, None]
    if draft_probabilities is None:
        residual = p.scatter(1, drafted.gather(1, place), 0.0)
    else:
        rows = torch.arange(len(place), device=place.device)
        residual = (p - draft_probabilities[rows, place[:, 0]]).clamp(min=0.0)
    # Nothing is left if p is q but for rounding; then the rejection was rounding, too.
    rejected = (accepted < limits) & (residual.sum(-1) > 0)
    return torch.where(rejected[:, None], residual, p)
