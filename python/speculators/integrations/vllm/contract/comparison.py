"""vLLM's trace beside that of our own decoder: the same tokens, accepted in the same steps.

Greedily and in float32 the two must agree, but that sums are taken in another order: where the
verifier's two best logits are closer than the rounding, either may be right. So each difference
comes with that margin, and only as many are forgiven as can be chance. vLLM need not be here.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import torch

from speculators.decoding.generation import GenerationOutput
from speculators.integrations.vllm.contract.trace_format import CaseResult
from speculators.models.verifier.verifier import Verifier

# Of float32 logits: what is closer may be rounding. And the share of steps where that may happen.
MARGIN = 1e-4
SHARE = 0.01


@dataclasses.dataclass(frozen=True)
class TraceDifference:
    """The first step in which a prompt's two traces part.

    Attributes:
        prompt: its number.
        step: the verification.
        expected: drafted tokens that our decoder accepted; None if it was at its end.
        found: those that vLLM accepted.
        margin: how much larger the verifier's best logit was than its second, where they part.
    """

    prompt: int
    step: int
    expected: int | None
    found: int | None
    margin: float


@dataclasses.dataclass(frozen=True)
class TraceComparison:
    """All prompts' traces.

    Attributes:
        steps: verifications that were compared; of a prompt that parts, none after it.
        differences: at most one for each prompt.
    """

    steps: int
    differences: list[TraceDifference]

    @property
    def agrees(self) -> bool:
        """Whether every difference can be rounding, and there are few."""
        close = all(difference.margin < MARGIN for difference in self.differences)
        return close and len(self.differences) <= SHARE * self.steps


def compare_traces(
    verifier: Verifier,
    prompts: Sequence[Sequence[int]],
    expected: GenerationOutput,
    found: CaseResult,
) -> TraceComparison:
    """Compares what two decoders did with the same prompts, draft and limit of tokens.

    Args:
        verifier: the model whose logits decide what can be rounding.
        prompts: token ids.
        expected: of our own decoder.
        found: of vLLM.

    Raises:
        ValueError: they are not of as many prompts, or vLLM's has an error.
    """
    if found.error is not None or len(found.token_ids) != len(prompts):
        raise ValueError(
            f"the trace {found.name!r} is of {len(found.token_ids)} prompts"
            + (f" and failed: {found.error}" if found.error else "")
            + f"; expected one of {len(prompts)}"
        )
    steps, differences = 0, []
    for number, prompt in enumerate(prompts):
        ours = _Trace(expected.sequences[number], expected.traces[number])
        theirs = _Trace(found.token_ids[number], found.accepted[number])
        parted = ours.parts_from(theirs)
        if parted is None:
            steps += len(ours.accepted)
            continue
        step, place = parted
        steps += step + 1
        margin = _margin(verifier, [*prompt, *ours.tokens[:place]])
        difference = TraceDifference(number, step, ours.at(step), theirs.at(step), margin)
        differences.append(difference)
    return TraceComparison(steps, differences)


@dataclasses.dataclass(frozen=True)
class _Trace:
    tokens: Sequence[int]
    accepted: Sequence[int]

    def at(self, step: int) -> int | None:
        return self.accepted[step] if step < len(self.accepted) else None

    def parts_from(self, other: "_Trace") -> tuple[int, int] | None:
        """The step in which the two part, and the place of the token that decides; None if none."""
        begin = 1  # the prompt's own pass gives the first token
        pairs = itertools.zip_longest(self.accepted, other.accepted)
        first = self._first_other_token(other)
        if first == 0:
            return 0, 0
        for step, (one, two) in enumerate(pairs):
            # Where nothing is accepted the token there is the verifier's own, and so on.
            decided = begin + min(one or 0, two or 0)
            if one != two:
                return step, min(decided, len(self.tokens) if first is None else first)
            if first is not None and first <= decided:
                return step, first
            begin = decided + 1
        return None if first is None else (len(self.accepted), first)

    def _first_other_token(self, other: "_Trace") -> int | None:
        for place, (one, two) in enumerate(itertools.zip_longest(self.tokens, other.tokens)):
            if one != two:
                return place
        return None


def _margin(verifier: Verifier, before: Sequence[int]) -> float:
    logits = verifier.prefill(torch.tensor([before]), use_cache=False).logits
    assert logits is not None  # noqa: S101 - for the type checker
    best = logits[0, -1].float().topk(2).values
    return float(best[0] - best[1])
