"""Rotary embeddings that change with the length: no pass and no cache mixes two kinds of them."""

from typing import Any

import pytest
import torch
import transformers
from tests.decoding.drafts import make_draft
from tests.models import verifier_models
from tests.models.verifier_models import BASE, SHORT, tokens

from speculators.data.regenerate import RegenerateSettings, write_responses
from speculators.data.sources import TransformersSource
from speculators.decoding.generation import generate
from speculators.decoding.settings import GenerationSettings
from speculators.models.verifier.architecture import UnsupportedVerifierError
from speculators.models.verifier.verifier import Verifier

NEW = 12


@pytest.fixture(scope="module")
def model() -> Any:
    return verifier_models.make("phi3")


@pytest.fixture(scope="module")
def verifier(model: Any) -> Verifier:
    return Verifier(model)


def without_cache(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens, each from a pass over the whole text."""
    text = list(prompt)
    for _ in range(count):
        logits = model(input_ids=torch.tensor([text]), use_cache=False).logits
        text.append(int(logits[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("length", [SHORT - 5, SHORT + 1])
@pytest.mark.parametrize("draft", [None, "eagle"])
def test_texts_are_those_of_passes_without_a_cache(
    verifier: Verifier, model: Any, length: int, draft: str | None
) -> None:
    prompt = tokens(length).tolist()
    made = None if draft is None else make_draft(draft, verifier)
    settings = GenerationSettings(max_new_tokens=NEW, eos_token_ids=())
    output = generate(verifier, made, [prompt], settings)
    room = NEW if length > SHORT else SHORT - length
    assert output.sequences == [without_cache(model, prompt, room)]
    assert output.finish_reasons == ["length"]
    longer = GenerationSettings(max_new_tokens=NEW, max_length=2 * SHORT, eos_token_ids=())
    assert generate(verifier, made, [prompt], longer).sequences == output.sequences


def test_short_and_long_prompts_are_no_batch(verifier: Verifier) -> None:
    prompts = [tokens(SHORT).tolist(), tokens(SHORT + 1).tolist()]
    with pytest.raises(UnsupportedVerifierError, match="shorter and longer ones apart"):
        generate(verifier, None, prompts)


@pytest.mark.parametrize("packing", [False, True])
def test_hidden_states_are_those_of_documents_alone(verifier: Verifier, packing: bool) -> None:
    source = TransformersSource(verifier, (0, 2, 4), packing=packing)
    documents = [tokens(n, seed=n) for n in (SHORT + 9, SHORT + 1, SHORT, 20, 3)]
    together = list(source.hidden_states(documents, 10_000))
    for document, states in zip(documents, together, strict=True):
        (alone,) = TransformersSource(verifier, (0, 2, 4), packing=False).hidden_states(
            [document], 10_000
        )
        for k, expected in alone.items():
            torch.testing.assert_close(states[k], expected, rtol=1e-4, atol=1e-4)


def test_responses_are_written_apart(verifier: Verifier) -> None:
    prompts = [tokens(n, seed=n) for n in (SHORT + 3, SHORT + 1, 30, 20)]
    settings = RegenerateSettings(max_new_tokens=NEW)
    together = write_responses(verifier, prompts, settings, 0)
    alone = [write_responses(verifier, [prompt], settings, 0)[0] for prompt in prompts]
    assert [row.tolist() for row in together] == [row.tolist() for row in alone]


def test_embeddings_that_go_on_changing_end_with_the_positions() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = transformers.LlamaConfig(
        **BASE | {"max_position_embeddings": 32}, rope_parameters=rope
    )
    torch.manual_seed(0)
    verifier = Verifier(transformers.LlamaForCausalLM(config))
    settings = GenerationSettings(max_new_tokens=NEW, max_length=64, eos_token_ids=())
    output = generate(verifier, None, [tokens(30).tolist()], settings)
    assert [len(row) for row in output.sequences] == [2]
    with pytest.raises(UnsupportedVerifierError, match="expected at most 32 tokens"):
        verifier.prefill(tokens(33)[None])
