"""``ChainDrafter`` against the forward of training, which has no cache: the same q everywhere.

In float64, because untrained drafts make much of a rounding after some steps.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.decoding.drafts import make_draft
from tests.models import verifier_models
from torch import Tensor

from speculators.decoding.chain import ChainDrafter
from speculators.decoding.drafters import Proposal
from speculators.decoding.sampling import Sampling
from speculators.models.draft_attention import TrainTimeTestAttention
from speculators.models.speculator_model import SpeculatorModel
from speculators.models.verifier.verifier import Verifier

LENGTHS = [5, 9, 2]
TOTAL = 24
SETTINGS = Sampling(0.8, top_k=20, top_p=0.95)
DRAFTS: dict[str, tuple[str, dict[str, Any]]] = {
    "eagle": ("eagle", {}),
    "hass": ("hass", {}),
    "eagle with norms": ("eagle", {"layernorms": True}),
    "eagle3": ("eagle3", {"draft_vocab_size": 30}),
    "eagle3 of two layers": ("eagle3", {"num_layers": 2, "aux_layer_ids": [0, 2, 3, 4]}),
    "eagle3.1": ("eagle3", {"norm_output": True, "fc_norm": True, "draft_vocab_size": 61}),
}


@pytest.fixture(scope="module")
def verifier() -> Verifier:
    return Verifier(verifier_models.make("llama").double())


@pytest.fixture(params=list(DRAFTS), scope="module")
def draft(request: pytest.FixtureRequest, verifier: Verifier) -> SpeculatorModel:
    algorithm, options = DRAFTS[request.param]
    return make_draft(algorithm, verifier, **options).double()


@dataclasses.dataclass
class Batch:
    """Sequences, how much of each is known, and the verifier's states of all their tokens."""

    tokens: Tensor  # [B, TOTAL]
    known: list[int]
    streams: dict[int, Tensor]  # [B, TOTAL, H]

    def select(self, rows: list[int]) -> "Batch":
        """Some of the sequences."""
        return Batch(
            self.tokens[rows],
            [self.known[row] for row in rows],
            {k: stream[rows] for k, stream in self.streams.items()},
        )


def prefilled(drafter: ChainDrafter, verifier: Verifier) -> Batch:
    """Begins with prompts of different lengths, padded on the left; what lies there is garbage."""
    tokens = verifier_models.tokens(len(LENGTHS), TOTAL)
    streams = verifier.prefill(tokens, capture=drafter.capture, logits="none").captured
    width = max(LENGTHS)
    ids = torch.full((len(LENGTHS), width), 7)
    shown = {k: s.new_full((len(LENGTHS), width, s.shape[2]), 1e3) for k, s in streams.items()}
    for row, length in enumerate(LENGTHS):
        ids[row, width - length :] = tokens[row, :length]
        for k, stream in streams.items():
            shown[k][row, width - length :] = stream[row, :length]
    next_tokens = tokens[torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)]
    drafter.prefill(ids, LENGTHS, next_tokens, shown)
    return Batch(tokens, [length + 1 for length in LENGTHS], streams)


def update(drafter: ChainDrafter, batch: Batch, counts: Sequence[int]) -> None:
    """Tells it the next tokens, ``counts`` for each row; what lies behind them is garbage."""
    width = max(counts)
    tokens = torch.full((len(counts), width), 7)
    shown = {k: s.new_full((len(counts), width, s.shape[2]), 1e3) for k, s in batch.streams.items()}
    for row, count in enumerate(counts):
        first = batch.known[row]
        tokens[row, :count] = batch.tokens[row, first : first + count]
        for k, stream in batch.streams.items():
            shown[k][row, :count] = stream[row, first - 1 : first - 1 + count]
        batch.known[row] += count
    drafter.update(tokens, counts, shown)


@torch.no_grad()
def logits_without_cache(
    model: SpeculatorModel, verifier: Verifier, batch: Batch, row: int, drafted: list[int]
) -> list[Tensor]:
    """The draft's logits for each drafted token, by the forward pass of training."""
    rows = batch.known[row] - 1
    streams = {k: stream[row : row + 1, :rows] for k, stream in batch.streams.items()}
    attention = TrainTimeTestAttention(torch.zeros(1, rows, dtype=torch.long))
    states = model.combine_hidden_states(
        model.spec.draft_input(streams, verifier.head, model.config)
    )
    tokens = batch.tokens[row : row + 1, 1 : rows + 1]
    found = []
    for step, token in enumerate(drafted):
        output = model(tokens, states, torch.arange(rows)[None] + step, attention)
        found.append(model.logits(output.head_input[:, -1]))
        states, tokens = output.states, torch.full((1, rows), token)
    return found


def check(proposal: Proposal, model: SpeculatorModel, verifier: Verifier, batch: Batch) -> None:
    """Each token's q, or that it is the most likely."""
    ids = model.to_verifier_ids(torch.arange(model.draft_vocab_size))
    for row, drafted in enumerate(proposal.tokens.tolist()):
        expected = logits_without_cache(model, verifier, batch, row, drafted)
        for place, logits in enumerate(expected):
            if proposal.probabilities is None:
                assert drafted[place] == int(ids[logits.argmax()])
                continue
            q = torch.zeros(verifier.vocab_size)
            q[ids] = SETTINGS.distribution(logits)[0]
            torch.testing.assert_close(proposal.probabilities[row, place], q, rtol=1e-4, atol=1e-5)
            assert float(q[drafted[place]]) > 0


@pytest.mark.parametrize("sampling", [Sampling(), SETTINGS])
def test_proposals_are_those_of_training(
    draft: SpeculatorModel, verifier: Verifier, sampling: Sampling
) -> None:
    generator = torch.Generator().manual_seed(0)

    def propose(count: int, rows: int) -> Proposal:
        uniforms = torch.rand(rows, count, generator=generator, dtype=torch.float64)
        proposal = drafter.propose(count, uniforms)
        assert proposal.tokens.shape == (rows, count)
        assert (proposal.probabilities is None) == sampling.greedy
        return proposal

    drafter = ChainDrafter(draft, verifier, sampling)
    batch = prefilled(drafter, verifier)
    check(propose(4, 3), draft, verifier, batch)
    update(drafter, batch, [1, 4, 2])
    check(propose(3, 3), draft, verifier, batch)
    drafter.select([2, 0])
    batch = batch.select([2, 0])
    update(drafter, batch, [3, 1])
    check(propose(4, 2), draft, verifier, batch)
    check(propose(2, 2), draft, verifier, batch)  # asked again, it forgets what it drafted
    update(drafter, batch, [1, 1])
    drafter.select([1])
    batch = batch.select([1])
    check(propose(5, 1), draft, verifier, batch)
    update(drafter, batch, [4])
    check(propose(1, 1), draft, verifier, batch)


def test_no_row_is_computed_twice(verifier: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = make_draft("eagle", verifier).double()
    drafter = ChainDrafter(draft, verifier)
    widths: list[int] = []
    forward = draft.forward

    def counted(input_ids: Tensor, *rest: Any) -> Any:
        widths.append(input_ids.shape[1])
        return forward(input_ids, *rest)

    monkeypatch.setattr(draft, "forward", counted)
    batch = prefilled(drafter, verifier)
    drafter.propose(3, None)
    update(drafter, batch, [2, 4, 1])
    drafter.propose(2, None)
    # The prompts, two drafted rows after the first, the new tokens, one drafted row.
    assert widths == [max(LENGTHS), 1, 1, 4, 1]


def test_ended_sequences_cost_nothing(verifier: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = make_draft("eagle", verifier).double()
    drafter = ChainDrafter(draft, verifier)
    rows: list[int] = []
    forward = draft.forward

    def counted(input_ids: Tensor, *rest: Any) -> Any:
        rows.append(input_ids.shape[0])
        return forward(input_ids, *rest)

    monkeypatch.setattr(draft, "forward", counted)
    batch = prefilled(drafter, verifier)
    drafter.propose(2, None)
    drafter.select([2, 0])
    update(drafter, batch.select([2, 0]), [3, 1])
    drafter.propose(2, None)
    drafter.select([1])
    drafter.propose(2, None)
    assert rows == [3, 3, 2, 2, 1]


def test_a_greedy_verifier_gets_the_most_likely_tokens(verifier: Verifier) -> None:
    draft = make_draft("eagle", verifier).double()
    drafter = ChainDrafter(draft, verifier, SETTINGS)
    batch = prefilled(drafter, verifier)
    proposal = drafter.propose(3, None)
    assert proposal.probabilities is None
    check(proposal, draft, verifier, batch)


def test_a_verifier_of_another_size_is_refused(verifier: Verifier) -> None:
    draft = make_draft("eagle", verifier).double()
    config = verifier.config.__class__(**{**verifier_models.BASE, "vocab_size": 70})
    other = Verifier(type(verifier.model)(config))
    with pytest.raises(ValueError, match=r"is \[70, 32\]"):
        ChainDrafter(draft, other)
