"""Where two continuations part, and how close the verifier's logits were there.

Equality is claimed in float32. In bfloat16 a pass over several rows rounds otherwise than one over
a single row, and where the two best logits are about equal the argmax may change; this tells such a
tie from an error.
"""

import dataclasses
from collections.abc import Sequence

import torch

from speculators.models.verifier.verifier import Verifier


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The first place where two continuations of a prompt differ.

    Attributes:
        index: the place, counted from the first token after the prompt.
        expected: the token there in the one.
        found: the token there in the other.
        logit_gap: how much larger the verifier's logit of ``expected`` is than that of ``found``,
            in one pass over all that comes before. About zero, of either sign: a tie.
    """

    index: int
    expected: int
    found: int
    logit_gap: float


def first_divergence(
    verifier: Verifier, prompt: Sequence[int], expected: Sequence[int], found: Sequence[int]
) -> Divergence | None:
    """Compares two continuations of a prompt, as far as both go.

    Args:
        verifier: the model whose continuations they should be.
        prompt: its token ids.
        expected: the new tokens of the one, such as plain decoding's.
        found: the new tokens of the other.

    Returns:
        The first difference, or None.
    """
    for index, (one, other) in enumerate(zip(expected, found, strict=False)):
        if one != other:
            before = torch.tensor([[*prompt, *expected[:index]]])
            logits = verifier.prefill(before, use_cache=False).logits
            assert logits is not None  # noqa: S101 - for the type checker
            gap = float(logits[0, -1, one].float() - logits[0, -1, other].float())
            return Divergence(index, one, other, gap)
    return None
