"""Where continuations part; in bfloat16 only ties may."""

import dataclasses

import pytest
import torch
from tests.decoding.drafts import make_draft
from tests.models import verifier_models

from speculators.decoding.divergence import Divergence, first_divergence
from speculators.decoding.drafters import NgramDrafter
from speculators.decoding.generation import generate
from speculators.decoding.settings import GenerationSettings
from speculators.models.verifier.verifier import Verifier

PROMPT = verifier_models.tokens(9).tolist()


def test_the_first_difference_and_its_gap() -> None:
    verifier = Verifier(verifier_models.make("llama"))
    settings = GenerationSettings(max_new_tokens=8, eos_token_ids=())
    expected = generate(verifier, None, [PROMPT], settings).sequences[0]
    found = list(expected)
    found[5], found[7] = (found[5] + 1) % 61, 0
    with torch.no_grad():
        logits = verifier.model(torch.tensor([[*PROMPT, *expected[:5]]])).logits[0, -1]
    gap = float(logits[expected[5]] - logits[found[5]])
    assert gap > 0
    parted = first_divergence(verifier, PROMPT, expected, found)
    assert parted is not None
    assert dataclasses.astuple(parted)[:3] == (5, expected[5], found[5])
    assert parted.logit_gap == pytest.approx(gap, abs=1e-4)
    other_way = first_divergence(verifier, PROMPT, found, expected)
    assert other_way == Divergence(5, found[5], expected[5], -parted.logit_gap)


def test_equal_continuations_do_not_part() -> None:
    verifier = Verifier(verifier_models.make("llama"))
    assert first_divergence(verifier, PROMPT, [1, 2, 3], [1, 2, 3]) is None
    assert first_divergence(verifier, PROMPT, [1, 2, 3], [1, 2]) is None


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_in_bfloat16_only_ties_differ(name: str) -> None:
    verifier = Verifier(verifier_models.make(name).bfloat16())
    settings = GenerationSettings(max_new_tokens=40, eos_token_ids=(), num_draft_tokens=4)
    plain = generate(verifier, None, [PROMPT], settings).sequences[0]
    for draft in (NgramDrafter(2, 1), make_draft("eagle", verifier).bfloat16()):
        found = generate(verifier, draft, [PROMPT], settings).sequences[0]
        parted = first_divergence(verifier, PROMPT, plain, found)
        # Logits of this size are 2**-6 apart in bfloat16; their errors are a few times that.
        assert parted is None or abs(parted.logit_gap) < 0.25
