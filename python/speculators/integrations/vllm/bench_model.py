"""How many tokens to draft: what a server was measured to do, and what follows for fewer tokens.

A verification with k drafted tokens emits 1 + a_1 + ... + a_k tokens, where a_i is the share of the
drafts whose i-th token was accepted (Leviathan et al., 2023, section 3, without their assumption
that all positions are alike). In a greedy chain the first k tokens are what they are whatever comes
after them, so shares that were measured with K tokens hold for every k up to K, but that drafts
begin at other places of the text then, which changes them by a little.

The time of a step follows from the tokens per second at two points: without a draft, where a step
emits one token, and with K. What lies between is taken to be on a straight line. A part of what
drafting costs does not depend on k, so that small k are slower than the line has it, and the more
so the more requests there are at a time. Beyond K nothing is said, because nothing was measured.
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class DraftLength:
    """How many tokens to draft.

    Attributes:
        recommended: the k with the highest rate; 0 is to serve without the draft.
        tokens_per_second: for k = 0, 1, ..., K; the first and the last as measured.
    """

    recommended: int
    tokens_per_second: list[float]


def recommend(
    plain_tokens_per_second: float,
    tokens_per_second: float,
    acceptance_by_position: Sequence[float],
) -> DraftLength:
    """Finds the k that gives the most tokens per second.

    Args:
        plain_tokens_per_second: without a draft.
        tokens_per_second: with K drafted tokens, at the same concurrency.
        acceptance_by_position: the share of the drafts accepted up to the first, ..., K-th token.

    Raises:
        ValueError: a rate is not positive, or no position was measured.
    """
    count = len(acceptance_by_position)
    if min(plain_tokens_per_second, tokens_per_second) <= 0 or not count:
        raise ValueError(
            f"found {plain_tokens_per_second} and {tokens_per_second} tokens per second and "
            f"{count} positions; expected rates above 0 and at least one position"
        )
    emitted = [1.0]
    for share in acceptance_by_position:
        emitted.append(emitted[-1] + share)
    first, last = 1 / plain_tokens_per_second, emitted[-1] / tokens_per_second
    rates = [tokens / (first + (last - first) * k / count) for k, tokens in enumerate(emitted)]
    return DraftLength(max(range(count + 1), key=rates.__getitem__), rates)
