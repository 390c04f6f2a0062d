"""The transformers source gives a document the states it has alone; responses are the model's."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.models import verifier_models
from tests.models.verifier_models import HIDDEN, LAYERS, VOCABULARY, WINDOW
from torch import Tensor

from speculators.data import sources
from speculators.data.regenerate import (
    RegenerateSettings,
    prompt_length,
    with_response,
    write_responses,
)
from speculators.data.sources import TransformersSource, hash_weights, make_source, register_source
from speculators.models.verifier.architecture import UnsupportedVerifierError
from speculators.models.verifier.verifier import Verifier

IDS = (0, 2, LAYERS)
DOCUMENTS = [verifier_models.tokens(n, seed=n) for n in (3, 3 * WINDOW, 1, 7, 7, 12)]


@pytest.fixture(scope="module")
def llama() -> Verifier:
    return Verifier(verifier_models.make("llama"))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("batch_tokens", [1, 30, 1000])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2_5_vl", "gpt_oss"])
def test_states_are_those_of_each_document_alone(
    name: str, batch_tokens: int, packing: bool
) -> None:
    verifier = Verifier(verifier_models.make(name))
    source = TransformersSource(verifier, reversed(IDS), packing=packing)
    assert source.layer_ids == IDS
    found = list(source.hidden_states(DOCUMENTS, batch_tokens))
    for document, states in zip(DOCUMENTS, found, strict=True):
        alone = verifier.prefill(document[None], capture=IDS, logits="none").captured
        assert list(states) == list(IDS)
        for k in IDS:
            torch.testing.assert_close(states[k], alone[k][0], rtol=1e-5, atol=2e-5)


def test_rows_are_shared_where_the_verifier_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, packs in (("llama", [True]), ("gpt_oss", [True, False])):
        verifier = Verifier(verifier_models.make(name))
        calls: list[bool] = []

        def spy(
            *args: Any, prefill: Any = verifier.prefill, calls: Any = calls, **options: Any
        ) -> Any:
            calls.append("cu_seqlens" in options)
            return prefill(*args, **options)

        source = TransformersSource(verifier, IDS, packing=True)
        monkeypatch.setattr(verifier, "prefill", spy)
        list(source.hidden_states(DOCUMENTS, 1000))
        assert calls == packs
        list(source.hidden_states(DOCUMENTS, 1000))
        assert calls == packs + packs[-1:]  # a refusal is remembered


def test_a_wrong_layer_is_refused_before_any_work(llama: Verifier) -> None:
    with pytest.raises(ValueError, match="layer id 5 is out of range"):
        TransformersSource(llama, [2, LAYERS + 1])
    with pytest.raises(ValueError, match="repeat"):
        TransformersSource(llama, [2, 2])


def test_identity_is_the_model_and_not_its_place(tmp_path: Any) -> None:
    def identity(model: Any) -> Any:
        return TransformersSource(Verifier(model), IDS).identity

    model = verifier_models.make("llama")
    original = identity(model)
    model.save_pretrained(tmp_path / "copy")
    copy = make_source("transformers", tmp_path / "copy", IDS)
    assert copy.identity == original
    assert copy.verifier == str(tmp_path / "copy")
    assert copy.hidden_size == HIDDEN
    assert identity(verifier_models.make("llama", seed=1)) != original
    assert identity(verifier_models.make("qwen3")) != original
    assert identity(verifier_models.make("llama").bfloat16()) != original
    tuned = verifier_models.make("llama")
    with torch.no_grad():
        tuned.model.layers[2].mlp.up_proj.weight[24:].mul_(1 + 1e-6)
    assert identity(tuned) != original
    assert hash_weights(model) == original["weights"]


def test_sources_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_FACTORIES", dict(sources._FACTORIES))

    def factory(verifier: Any, layer_ids: Any, **options: Any) -> Any:
        return (verifier, layer_ids, options)

    register_source("other", factory)
    register_source("other", factory)  # imported twice
    made: Any = make_source("other", "model", [1, 2], port=3)
    assert made == ("model", [1, 2], {"port": 3})
    with pytest.raises(ValueError, match="'other' is registered already"):
        register_source("other", TransformersSource)
    with pytest.raises(ValueError, match="unknown hidden-state source 'x'; known are other, trans"):
        make_source("x", "model", [1])


@pytest.mark.parametrize(
    ("mask", "length"),
    [
        ("0011", 2),
        ("0110", 1),
        ("01100110", 5),
        ("01011001", 7),
        ("0001", 3),
        ("000", 3),
        ("1101", 3),
        ("11", 0),
    ],
)
def test_a_prompt_ends_before_the_last_learnable_run(mask: str, length: int) -> None:
    assert prompt_length(torch.tensor([digit == "1" for digit in mask])) == length


def test_a_response_alone_is_learnable() -> None:
    ids, mask = with_response(torch.tensor([5, 6, 7]), torch.tensor([8, 2]))
    assert ids.tolist() == [5, 6, 7, 8, 2]
    assert mask.tolist() == [False, False, False, True, True]


def greedy(verifier: Verifier, prompt: Tensor, count: int) -> list[int]:
    """The likeliest tokens, one by one and without a cache."""
    tokens = prompt.tolist()
    while len(tokens) < len(prompt) + count and (
        len(tokens) == len(prompt) or tokens[-1] not in verifier.eos_token_ids
    ):
        output = verifier.prefill(torch.tensor([tokens]), use_cache=False)
        assert output.logits is not None
        tokens.append(int(output.logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2_5_vl", "gpt_oss"])
def test_greedy_responses_are_the_models_own(name: str) -> None:
    verifier = Verifier(verifier_models.make(name))
    settings = RegenerateSettings(max_new_tokens=6)
    found = write_responses(verifier, DOCUMENTS, settings, seed=0)
    expected = [greedy(verifier, document, 6) for document in DOCUMENTS]
    assert [response.tolist() for response in found] == expected


def test_a_response_ends_with_its_end(llama: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = RegenerateSettings(max_new_tokens=8)
    free = [greedy(llama, document, 8) for document in DOCUMENTS]
    end = free[0][3]
    monkeypatch.setattr(llama.model.generation_config, "eos_token_id", [end, 2])
    assert llama.eos_token_ids == (end, 2)
    found = [r.tolist() for r in write_responses(llama, DOCUMENTS, settings, seed=0)]
    assert found == [greedy(llama, document, 8) for document in DOCUMENTS]
    assert found[0] == free[0][: free[0].index(end) + 1]
    assert any(len(response) == 8 for response in found)


def sampled(verifier: Verifier, settings: RegenerateSettings, rows: int) -> Sequence[int]:
    prompts = [DOCUMENTS[0]] * rows
    return [int(r[0]) for r in write_responses(verifier, prompts, settings, seed=3)]


def test_sampling_has_the_distribution_asked_for(llama: Verifier) -> None:
    rows, temperature, top_p = 20000, 0.7, 0.8
    logits = llama.prefill(DOCUMENTS[0][None]).logits
    assert logits is not None
    p = (logits[0, -1].double() / temperature).softmax(-1)
    # The likeliest tokens that reach top_p together: all before the sum had reached it.
    values, order = p.sort(descending=True)
    kept = order[values.cumsum(0) - values < top_p]
    expected = torch.zeros(VOCABULARY, dtype=torch.float64)
    expected[kept] = p[kept] / p[kept].sum()
    assert 3 < len(kept) < VOCABULARY
    settings = RegenerateSettings(temperature=temperature, top_p=top_p, max_new_tokens=1)
    found = torch.tensor(sampled(llama, settings, rows)).bincount(minlength=VOCABULARY) / rows
    bound = 5 * (expected * (1 - expected) / rows).sqrt()
    assert bool(((found - expected).abs() <= bound).all())


def test_all_tokens_can_be_sampled(llama: Verifier) -> None:
    settings = RegenerateSettings(temperature=20.0, max_new_tokens=1)
    assert len(set(sampled(llama, settings, 3000))) == VOCABULARY


def test_sampling_follows_from_its_seed_and_disturbs_no_other(llama: Verifier) -> None:
    settings = RegenerateSettings(temperature=1.0, max_new_tokens=5)

    def write(seed: int) -> list[list[int]]:
        return [r.tolist() for r in write_responses(llama, DOCUMENTS, settings, seed)]

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = write(1)
    assert torch.equal(torch.rand(3), expected)
    assert write(1) == first
    assert write(2) != first


def test_wrong_settings_are_refused() -> None:
    for changes, message in (
        ({"temperature": -0.1}, "temperature is -0.1; expected 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0; expected more than 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            RegenerateSettings(**changes)


def test_packing_alone_would_be_refused() -> None:
    """The premise of the fallback above: this verifier does not separate packed documents."""
    verifier = Verifier(verifier_models.make("gpt_oss"))
    with pytest.raises(UnsupportedVerifierError):
        verifier.prefill(
            torch.cat(DOCUMENTS[:2])[None], cu_seqlens=torch.tensor([0, 3, 27]), logits="none"
        )
