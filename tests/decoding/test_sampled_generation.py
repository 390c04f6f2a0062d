"""Sampling through the whole loop: the joint distribution of three tokens is the verifier's own.

10,000 sequences of a verifier with 8 tokens, so that all 512 continuations can be enumerated;
false-alarm rate 1e-4 per test. Three planted errors are rejected at that size, each with a power
above 0.999.
"""

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from tests.decoding.chi_square import ChiSquare, chi_square
from tests.decoding.drafts import make_draft
from torch import Tensor

from speculators.decoding import combined_drafter
from speculators.decoding.chain import ChainDrafter
from speculators.decoding.combined_drafter import CombinedDrafter
from speculators.decoding.draft_models import Draft
from speculators.decoding.drafters import NgramDrafter, Proposal
from speculators.decoding.generation import generate
from speculators.decoding.sampling import GREEDY, Sampling
from speculators.decoding.settings import GenerationSettings
from speculators.decoding.suffix_drafter import SuffixDrafter, suffix_corpus
from speculators.models.verifier.verifier import Verifier
from speculators.ops import tree_verification
from speculators.ops.draft_tree import DraftTree
from speculators.ops.tree_verification import TreeVerdict

V = 8
SAMPLES = 10_000
PROMPT = [1, 3, 5, 1, 3]
PLAIN = Sampling(0.9)
CUT = Sampling(1.2, top_k=6, top_p=0.9)


@pytest.fixture(scope="module")
def verifier() -> Verifier:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model: Any = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return Verifier(model)


def exact(verifier: Verifier, sampling: Sampling) -> Tensor:
    """The distribution of the three tokens after the prompt, float64 ``[V ** 3]``."""
    pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    rows = torch.cat([torch.tensor([PROMPT]).expand(len(pairs), -1), pairs], 1)
    logits = verifier.prefill(rows, logits="all").logits
    assert logits is not None
    p = sampling.distribution(logits[:, -3:]).double()  # after the prompt, one, two tokens
    first = p[:, 0].gather(1, pairs[:, :1])
    second = p[:, 1].gather(1, pairs[:, 1:])
    return (first * second * p[:, 2]).flatten()


def run(
    verifier: Verifier, draft: Draft, sampling: Sampling, **options: Any
) -> tuple[ChiSquare, float]:
    """The test of the emitted tokens, and the acceptance length."""
    settings = GenerationSettings(
        max_new_tokens=3, sampling=sampling, num_draft_tokens=2, **options
    )
    generator = torch.Generator().manual_seed(0)
    output = generate(verifier, draft, [PROMPT] * SAMPLES, settings, generator=generator)
    sequences = torch.tensor(output.sequences)
    cells = sequences @ torch.tensor([V * V, V, 1])
    return chi_square(cells, exact(verifier, sampling)), output.acceptance.tau


@pytest.mark.parametrize("sampling", [PLAIN, CUT])
def test_plain_sampling(verifier: Verifier, sampling: Sampling) -> None:
    found, tau = run(verifier, None, sampling)
    assert not found.rejected
    assert tau == 1.0


@pytest.mark.parametrize("sampling", [PLAIN, CUT])
@pytest.mark.parametrize("draft_sampling", ["sample", "greedy"])
@pytest.mark.parametrize("algorithm", ["eagle", "eagle3"])
def test_a_draft_model_changes_nothing(
    verifier: Verifier, algorithm: str, draft_sampling: str, sampling: Sampling
) -> None:
    options: dict[str, Any] = {}
    if algorithm == "eagle3":
        options = {"draft_vocab_size": 5, "aux_layer_ids": [0, 1, 2]}
    draft = make_draft(algorithm, verifier, **options)
    found, tau = run(verifier, draft, sampling, draft_sampling=draft_sampling)
    assert not found.rejected
    assert tau > 1.02  # something was accepted


def test_an_n_gram_drafter_changes_nothing(verifier: Verifier) -> None:
    found, tau = run(verifier, NgramDrafter(2, 1), PLAIN)
    assert not found.rejected
    assert tau > 1.05


def test_a_suffix_drafter_changes_nothing(verifier: Verifier) -> None:
    drafter = SuffixDrafter(suffix_corpus([[5, 2, 2, 3, 3, 1]]), doubt=0.0)
    found, tau = run(verifier, drafter, PLAIN)
    assert not found.rejected
    assert tau > 1.05


class Mixed(CombinedDrafter):
    """Of every three rows the first expects nothing of the model, so that matches draft."""

    def _expected(self, count: int) -> list[float]:
        expected = super()._expected(count)
        return [mean * (row % 3 > 0) for row, mean in enumerate(expected)]


class Lucky(Mixed):
    """Lets matches draft where a token was drawn that the model found unlikely."""

    def propose(self, count: int, uniforms: Tensor | None) -> Proposal:
        """See ``CombinedDrafter``."""
        found = self._model.propose(count, uniforms)
        assert found.probabilities is not None
        q = found.probabilities.gather(2, found.tokens[..., None])[:, 0, 0]
        chains = self._suffix.propose_chains(count)
        wins = [bool(chain.score > 0 and p < 1 / V) for chain, p in zip(chains, q, strict=True)]
        self._was_model = [not won for won in wins]
        return combined_drafter._exchange(found, chains, wins)


def combined(verifier: Verifier, kind: type[CombinedDrafter], sampling: Sampling) -> Any:
    model = ChainDrafter(make_draft("eagle", verifier), verifier, sampling)
    return kind(model, SuffixDrafter(suffix_corpus([[3, 2, 2, 2, 3, 6]]), doubt=0.0))


@pytest.mark.parametrize("sampling", [PLAIN, CUT])
@pytest.mark.parametrize("draft_sampling", ["sample", "greedy"])
def test_a_draft_model_with_matches_changes_nothing(
    verifier: Verifier, draft_sampling: str, sampling: Sampling
) -> None:
    settings: Any = GREEDY if draft_sampling == "greedy" else sampling
    found, tau = run(verifier, combined(verifier, Mixed, settings), sampling)
    assert not found.rejected
    assert tau > 1.02


def test_a_choice_that_looks_at_drawn_tokens_is_noticed(verifier: Verifier) -> None:
    found, _ = run(verifier, combined(verifier, Lucky, PLAIN), PLAIN)
    assert found.rejected
    assert found.power > 0.999


class ChosenWithQ(ChainDrafter):
    """Takes the most likely tokens, and says that they were drawn."""

    def _choose(self, logits: Tensor, uniforms: Tensor | None) -> tuple[Tensor, Tensor | None]:
        _, q = super()._choose(logits, uniforms)
        assert q is not None
        return q.argmax(-1), q


def test_a_q_that_was_not_drawn_from_is_noticed(verifier: Verifier) -> None:
    found, _ = run(verifier, ChosenWithQ(make_draft("eagle", verifier), verifier, PLAIN), PLAIN)
    assert found.rejected
    assert found.power > 0.999


def test_numbers_that_are_used_twice_are_noticed(
    verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = tree_verification.verify_sampling

    def one_number_for_all(
        logits: Tensor, tree: DraftTree, uniforms: Tensor, **options: Any
    ) -> TreeVerdict:
        return right(logits, tree, uniforms[:, :1].expand_as(uniforms), **options)

    monkeypatch.setattr(tree_verification, "verify_sampling", one_number_for_all)
    found, _ = run(verifier, make_draft("eagle", verifier), PLAIN)
    assert found.rejected
    assert found.power > 0.999


def test_settings_of_the_draft_do_not_matter(verifier: Verifier) -> None:
    # A draft that draws at another temperature, and says so, is slower but not wrong.
    hot = dataclasses.replace(PLAIN, temperature=3.0)
    draft = ChainDrafter(make_draft("eagle", verifier), verifier, hot)
    found, _ = run(verifier, draft, PLAIN)
    assert not found.rejected
