"""From what the decoding loop counted to the figures of a report: tau, its interval, positions.

The counting itself, and with it the definition of tau, is ``speculators.decoding.acceptance``'s.
"""

import math
import statistics
from collections.abc import Sequence

import torch

from speculators.decoding.acceptance import AcceptanceCounts
from speculators.evaluation.results import AcceptanceResult, Spread

RESAMPLES = 2000


def acceptance_result(
    counts: AcceptanceCounts, traces: Sequence[Sequence[int]], k: int, seed: int = 0
) -> AcceptanceResult:
    """The figures of one drafter.

    Args:
        counts: of all prompts together.
        traces: for each prompt, how many tokens each verification accepted.
        k: tokens that were to be drafted each time.
        seed: of the interval's resampling.
    """
    accepted = counts.accepted_by_position + [0] * (k - len(counts.accepted_by_position))
    before = [counts.drafts, *accepted]
    taus = [1.0 + sum(trace) / len(trace) for trace in traces if trace]
    return AcceptanceResult(
        k=k,
        tau=_number(counts.tau),
        tau_interval=tau_interval(traces, seed),
        tau_of_drafts=_number(counts.tau_of_drafts),
        tau_of_prompts=Spread(min=min(taus), median=statistics.median(taus), max=max(taus))
        if taus
        else None,
        mean_accepted=_number(counts.tau - 1.0),
        acceptance_by_position=[n / counts.drafts for n in accepted] if counts.drafts else [],
        conditional_acceptance_by_position=[
            n / earlier if earlier else None for n, earlier in zip(accepted, before, strict=False)
        ]
        if counts.drafts
        else [],
        verifications=counts.verifications,
        drafts=counts.drafts,
        drafted_by_position=list(counts.drafted_by_position),
        accepted_by_position=list(counts.accepted_by_position),
    )


def tau_interval(
    traces: Sequence[Sequence[int]], seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """The 95 % interval of tau, for other prompts of the same kind.

    The percentile bootstrap (Efron and Tibshirani, "An introduction to the bootstrap", 1993,
    section 13.3), which draws prompts with replacement: the verifications of one prompt are no
    independent samples, prompts are.

    Args:
        traces: for each prompt, how many tokens each verification accepted.
        seed: of the drawing.
        resamples: how often as many prompts are drawn as there are.

    Returns:
        The lower and the upper end; None if nothing was verified.
    """
    kept = [trace for trace in traces if trace]
    if not kept:
        return None
    accepted = torch.tensor([sum(trace) for trace in kept], dtype=torch.float64)
    verifications = torch.tensor([len(trace) for trace in kept], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(kept), (resamples, len(kept)), generator=generator)
    taus = 1.0 + accepted[drawn].sum(1) / verifications[drawn].sum(1)
    low, high = taus.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value  # JSON has no NaN
