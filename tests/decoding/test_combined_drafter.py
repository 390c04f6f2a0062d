"""A model and matches in one drafter: the better one drafts, and the model's cache stays right."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tests.decoding.drafts import make_draft
from tests.models.verifier_models import make, tokens
from torch import Tensor

from speculators.decoding.chain import ChainDrafter
from speculators.decoding.combined_drafter import CombinedDrafter
from speculators.decoding.draft_models import WithSuffix, drafter_for
from speculators.decoding.drafters import Proposal
from speculators.decoding.generation import generate
from speculators.decoding.sampling import Sampling
from speculators.decoding.settings import GenerationSettings
from speculators.decoding.suffix_drafter import SuffixDrafter
from speculators.models.verifier.verifier import Verifier
from speculators.ops.host import SuffixDraft

PROMPTS = [tokens(n, seed=n).tolist() for n in (5, 11, 3)]
HOT = Sampling(1.0)
SETTINGS = GenerationSettings(max_new_tokens=14, num_draft_tokens=3, eos_token_ids=())


@pytest.fixture(scope="module")
def verifier() -> Verifier:
    return Verifier(make("llama"))


class Scripted(SuffixDrafter):
    """Promises as many tokens as a script says, the same token over and over."""

    def __init__(self, promises: Sequence[Sequence[float]]) -> None:
        super().__init__()
        self._promises = promises
        self._steps = 0

    def propose_chains(self, count: int) -> list[SuffixDraft]:
        """See ``SuffixDrafter``."""
        promised = self._promises[self._steps % len(self._promises)]
        self._steps += 1
        return [
            SuffixDraft(
                np.full(count - 1, 7, np.int32),
                np.arange(-1, count - 2, dtype=np.int32),
                np.full(count - 1, promise / (count - 1)),
                promise,
                1,
            )
            for promise in promised[: len(self._rows)]
        ]


class Recorded(CombinedDrafter):
    """Keeps the text, and compares the model's drafts with those of one that read it anew."""

    def __init__(self, verifier: Verifier, model: Any, suffix: SuffixDrafter) -> None:
        super().__init__(ChainDrafter(model, verifier, HOT), suffix)
        self._verifier = verifier
        self._draft = model
        self.texts: list[list[int]] = []
        self.compared = 0
        self.winners: list[list[bool]] = []

    def prefill(
        self,
        input_ids: Tensor,
        lengths: Sequence[int],
        next_tokens: Tensor,
        streams: Mapping[int, Tensor],
    ) -> None:
        """See ``CombinedDrafter``."""
        super().prefill(input_ids, lengths, next_tokens, streams)
        batch = zip(input_ids.tolist(), lengths, next_tokens.tolist(), strict=True)
        self.texts = [[*row[len(row) - length :], token] for row, length, token in batch]

    def propose(self, count: int, uniforms: Tensor | None) -> Proposal:
        """See ``CombinedDrafter``."""
        middle = torch.full((len(self.texts), count), 0.5, dtype=torch.float64)
        found = self._model.propose(count, middle)
        assert found.probabilities is not None
        for row, text in enumerate(self.texts):
            fresh = ChainDrafter(self._draft, self._verifier, HOT)
            ids = torch.tensor([text[:-1]])
            streams = self._verifier.prefill(ids, capture=self.capture).captured
            fresh.prefill(ids, [len(text) - 1], torch.tensor(text[-1:]), streams)
            expected = fresh.propose(count, middle[:1])
            assert expected.probabilities is not None
            assert found.tokens[row].tolist() == expected.tokens[0].tolist()
            torch.testing.assert_close(
                found.probabilities[row], expected.probabilities[0], rtol=1e-4, atol=1e-5
            )
            self.compared += 1
        proposal = super().propose(count, uniforms)
        self.winners.append(list(self._was_model))
        return proposal

    def update(self, tokens: Tensor, counts: Sequence[int], streams: Mapping[int, Tensor]) -> None:
        """See ``CombinedDrafter``."""
        super().update(tokens, counts, streams)
        for text, row, count in zip(self.texts, tokens.tolist(), counts, strict=True):
            text.extend(row[:count])

    def select(self, rows: Sequence[int]) -> None:
        """See ``CombinedDrafter``."""
        super().select(rows)
        self.texts = [self.texts[row] for row in rows]


@pytest.mark.parametrize("algorithm", ["eagle", "eagle3"])
@pytest.mark.parametrize(
    "promises",
    [
        [[99, 99, 99]],  # matches always win, and the model never runs
        [[99, 0, 99], [0, 99, 0], [0, 0, 0], [99, 99, 99]],
    ],
)
def test_the_models_cache_follows_the_text_whoever_drafts(
    verifier: Verifier, algorithm: str, promises: list[list[float]]
) -> None:
    options = {"draft_vocab_size": 32} if algorithm == "eagle3" else {}
    drafter = Recorded(verifier, make_draft(algorithm, verifier, **options), Scripted(promises))
    plain = generate(verifier, None, PROMPTS, SETTINGS)
    # One text ends early, so that rows leave.
    ends = GenerationSettings(
        max_new_tokens=14, num_draft_tokens=3, eos_token_ids=(plain.sequences[1][4],)
    )
    expected = generate(verifier, None, PROMPTS, ends).sequences
    assert len({len(row) for row in expected}) > 1
    assert generate(verifier, drafter, PROMPTS, ends).sequences == expected
    assert drafter.compared > 20
    for step, winners in enumerate(drafter.winners):
        promised = promises[step % len(promises)]
        assert winners == [promise == 0 for promise in promised[: len(winners)]]


def test_where_tokens_are_drawn_their_luck_does_not_choose(verifier: Verifier) -> None:
    """Only the past does: whatever is drawn, the same rows are the model's."""
    sampling = Sampling(1.5)
    settings = GenerationSettings(sampling=sampling)
    combined = drafter_for(
        WithSuffix(make_draft("eagle", verifier), Scripted([[1.9, 1.4, 0.9]])), verifier, settings
    )
    assert isinstance(combined, CombinedDrafter)
    ids = torch.tensor([tokens(6, seed=3).tolist()] * 3)
    nexts = torch.tensor([1, 1, 1])
    streams = verifier.prefill(ids, capture=combined.capture).captured
    choices = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(3, 3, generator=generator, dtype=torch.float64)
        combined.prefill(ids, [6] * 3, nexts, streams)
        first = combined.propose(3, uniforms)
        assert first.counts is None  # all are the model's: 3 tokens are expected of each
        new = {k: stream[:, -2:] for k, stream in streams.items()}
        combined.update(torch.tensor([[4, 5]] * 3), [1, 1, 2], new)
        second = combined.propose(3, uniforms)  # expected: 1.5, 1.5, 2
        choices.append(second.counts)
        assert second.probabilities is not None
        torch.testing.assert_close(second.probabilities.sum(-1), torch.ones(3, 3))
        assert second.probabilities[0, :2, 7].tolist() == [1.0, 1.0]
        assert second.tokens[0, :2].tolist() == [7, 7]
        drawn = second.probabilities[1:].gather(2, second.tokens[1:, :, None])
        assert bool((drawn > 0).all())
        assert bool((drawn < 1).all())
    assert choices == [[2, 3, 3]] * 8


def test_the_model_does_not_run_where_matches_win_in_all_rows(
    verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = GenerationSettings(sampling=Sampling(1.5))
    draft = WithSuffix(make_draft("eagle", verifier), Scripted([[99.0, 99.0]]))
    combined = drafter_for(draft, verifier, settings)
    assert isinstance(combined, CombinedDrafter)
    ids = torch.tensor([tokens(6, seed=3).tolist()] * 2)
    streams = verifier.prefill(ids, capture=combined.capture).captured
    combined.prefill(ids, [6] * 2, torch.tensor([1, 1]), streams)
    monkeypatch.setattr(ChainDrafter, "propose", None)
    found = combined.propose(3, torch.rand(2, 3, dtype=torch.float64))
    assert found.probabilities is None
    assert (found.counts, found.tokens.tolist()) == ([2, 2], [[7, 7]] * 2)


def test_rows_that_leave_take_their_means_along(verifier: Verifier) -> None:
    """The first of three leaves; what is promised lies between the means of the other two."""
    combined = CombinedDrafter(
        ChainDrafter(make_draft("eagle", verifier), verifier), Scripted([[0.0] * 3, [1.6, 1.6]])
    )
    ids = torch.tensor([tokens(6, seed=3).tolist()] * 3)
    streams = verifier.prefill(ids, capture=combined.capture).captured
    combined.prefill(ids, [6] * 3, torch.tensor([1, 1, 1]), streams)
    assert combined.propose(2, None).counts is None
    combined.select([2, 1])
    new = {k: stream[:2, -3:] for k, stream in streams.items()}
    combined.update(torch.tensor([[4, 5, 6]] * 2), [2, 3], new)
    assert combined.propose(2, None).counts == [1, 2]  # the means are 1.5 and 2
