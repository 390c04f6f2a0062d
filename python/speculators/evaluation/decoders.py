"""The decoders that an evaluation compares: plain, with a drafter, and transformers' own.

Each is a function of the number of a batch, so that they can take turns. Greedily they all should
write the same tokens. When sampling, each sequence has random numbers of its own, which depend on
the seed and on the prompt's number alone, so that the batch size changes nothing.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from speculators.data.ordering import derived_seed
from speculators.decoding.acceptance import AcceptanceCounts
from speculators.decoding.draft_models import Shaped, WithSuffix, drafter_for, num_draft_tokens
from speculators.decoding.drafters import Drafter
from speculators.decoding.generation import generate
from speculators.decoding.sampling import Sampling
from speculators.decoding.settings import GenerationSettings
from speculators.evaluation.prompts import Prompt
from speculators.evaluation.results import EvaluationSettings
from speculators.evaluation.speed import TimedDrafter
from speculators.evaluation.transformers_generate import transformers_generate
from speculators.models.speculator_model import SpeculatorModel
from speculators.models.verifier.verifier import Verifier


@dataclasses.dataclass(frozen=True)
class Decoded:
    """One decoder's output for one batch; what a decoder does not count is empty.

    Attributes:
        sequences: for each prompt the new tokens.
        traces: for each prompt, how many tokens each verification accepted.
        counts: of all of them together.
        draft_seconds: time spent in the drafter.
    """

    sequences: list[list[int]]
    traces: list[list[int]] = dataclasses.field(default_factory=list)
    counts: AcceptanceCounts = dataclasses.field(default_factory=AcceptanceCounts)
    draft_seconds: float = 0.0


Run = Callable[[int], Decoded]
AnyDraft = SpeculatorModel | Shaped | WithSuffix | Drafter


class Batches:
    """The prompts in batches, and the decoders that take the number of one.

    Args:
        verifier: the model whose text it is.
        prompts: what to continue.
        settings: what the caller chose.

    Attributes:
        seed: of the sampling.
        device: where the decoders compute.
    """

    def __init__(
        self, verifier: Verifier, prompts: Sequence[Prompt], settings: EvaluationSettings
    ) -> None:
        self._size = size = settings.batch_size
        self.device = verifier.device
        self._verifier = verifier
        self.seed = settings.seed
        self._batches = [prompts[begin : begin + size] for begin in range(0, len(prompts), size)]
        self._settings = GenerationSettings(
            max_new_tokens=settings.max_new_tokens,
            sampling=Sampling(temperature=settings.temperature),
            num_draft_tokens=settings.k,
        )

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> Sequence[Prompt]:
        return self._batches[number]

    def k(self, draft: AnyDraft) -> int:
        """Tokens that a drafter drafts each time."""
        return num_draft_tokens(draft, self._settings)

    def plain(self) -> Run:
        """Our engine without a drafter."""
        return self._ours(None, self._settings)

    def speculative(self, draft: AnyDraft) -> Run:
        """Our engine with a drafter."""
        settings = dataclasses.replace(self._settings, num_draft_tokens=self.k(draft))
        drafter = drafter_for(draft, self._verifier, settings)
        assert drafter is not None  # noqa: S101 - for the type checker
        return self._ours(TimedDrafter(drafter), settings)

    def transformers(self, options: Mapping[str, Any] | None = None) -> Run:
        """Transformers' own ``generate``.

        Args:
            options: further settings of it, such as ``prompt_lookup_num_tokens``.
        """
        settings = self._settings

        def run(number: int) -> Decoded:
            ids = [prompt.ids.tolist() for prompt in self._batches[number]]
            seed = derived_seed(self.seed, number)
            return Decoded(
                transformers_generate(
                    self._verifier, ids, settings.sampling, settings.max_new_tokens, seed, options
                )
            )

        return run

    def _ours(self, drafter: TimedDrafter | None, settings: GenerationSettings) -> Run:
        def run(number: int) -> Decoded:
            ids = [prompt.ids.tolist() for prompt in self._batches[number]]
            generators = None
            if not settings.sampling.greedy:
                generators = [
                    torch.Generator().manual_seed(derived_seed(self.seed, number * self._size + i))
                    for i in range(len(ids))
                ]
            before = 0.0 if drafter is None else drafter.seconds
            output = generate(self._verifier, drafter, ids, settings, generator=generators)
            drafting = 0.0 if drafter is None else drafter.seconds - before
            return Decoded(output.sequences, output.traces, output.acceptance, drafting)

        return run
