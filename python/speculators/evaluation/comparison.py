"""Whether a decoding gave the tokens that it should, and where it did not, by how little.

A drafter changes no token in float32. In bfloat16 two tokens may be closer to each other than
rounding is; the gap of their logits at the first difference tells such a tie from an error.
"""

from collections.abc import Sequence

from speculators.decoding.divergence import first_divergence
from speculators.evaluation.prompts import Prompt
from speculators.evaluation.results import Comparison, DivergenceResult
from speculators.models.verifier.verifier import Verifier

SHOWN = 5


def compare(
    verifier: Verifier,
    prompts: Sequence[Prompt],
    expected: Sequence[Sequence[int]],
    found: Sequence[Sequence[int]],
    shown: int = SHOWN,
) -> Comparison:
    """Compares continuations token for token.

    Args:
        verifier: whose continuations they should be.
        prompts: what was continued.
        expected: for each prompt the new tokens, as plain decoding gives them.
        found: for each prompt the new tokens to judge.
        shown: of so many prompts that differ the first difference is looked into.
    """
    pairs = zip(expected, found, strict=True)
    different = [number for number, (one, other) in enumerate(pairs) if list(one) != list(other)]
    return Comparison(
        identical=not different,
        different_prompts=len(different),
        divergences=[
            _divergence(verifier, number, prompts[number], expected[number], found[number])
            for number in different[:shown]
        ],
    )


def _divergence(
    verifier: Verifier, number: int, prompt: Prompt, expected: Sequence[int], found: Sequence[int]
) -> DivergenceResult:
    first = first_divergence(verifier, prompt.ids.tolist(), expected, found)
    result = DivergenceResult(prompt=number, line=prompt.line, index=0)
    if first is not None:
        return result.model_copy(
            update={
                "index": first.index,
                "expected": first.expected,
                "found": first.found,
                "logit_gap": first.logit_gap,
            }
        )
    # One of the two ends where the other goes on.
    index = min(len(expected), len(found))
    return result.model_copy(
        update={
            "index": index,
            "expected": expected[index] if index < len(expected) else None,
            "found": found[index] if index < len(found) else None,
        }
    )
