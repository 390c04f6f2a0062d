"""Verifier: logits, residual streams and the cache, against transformers' own forward."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import verifier_models
from tests.models.verifier_models import HIDDEN, LAYERS, MODELS, VOCABULARY, WINDOW
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from speculators.models.verifier.verifier import Verifier

LONG = 3 * WINDOW  # beyond the sliding window of the models that have one
SLIDING = ["mistral", "gemma2", "gemma3", "gpt_oss", "gemma3_multimodal"]


@dataclasses.dataclass
class Case:
    """A model, and the verifier that it is."""

    model: Any
    verifier: Verifier


@pytest.fixture(params=list(MODELS), scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    model = verifier_models.make(request.param)
    return Case(model, Verifier(model))


def close(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def own_logits(model: Any, input_ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits


def test_logits_and_head_of_the_captured_stream_equal_the_models_own(case: Case) -> None:
    input_ids = verifier_models.tokens(2, LONG)
    output = case.verifier.prefill(input_ids, capture=[LAYERS], logits="all")
    expected = own_logits(case.model, input_ids)
    assert expected.shape == (2, LONG, VOCABULARY)
    close(output.logits, expected)
    close(case.verifier.head(output.captured[LAYERS]), expected)
    assert expected.std() > 0.05  # the comparison is not one of zeros


def test_captured_streams_are_transformers_hidden_states(case: Case) -> None:
    input_ids = verifier_models.tokens(2, 9)
    with torch.no_grad():
        expected = case.model(
            input_ids=input_ids, use_cache=False, output_hidden_states=True
        ).hidden_states
    streams = case.verifier.prefill(
        input_ids, capture=range(LAYERS + 1), logits="none", use_cache=False
    ).captured
    assert list(streams) == list(range(LAYERS + 1))
    for k in range(LAYERS):
        assert streams[k].shape == (2, 9, HIDDEN)
        close(streams[k], expected[k])
    close(case.verifier.head.norm(streams[LAYERS]), expected[LAYERS])
    for k in range(LAYERS):
        assert not torch.allclose(streams[k], streams[k + 1], atol=1e-2)


def test_prefill_then_steps_equal_one_forward(case: Case) -> None:
    input_ids = verifier_models.tokens(2, LONG)
    expected = own_logits(case.model, input_ids)
    streams = case.verifier.prefill(input_ids, capture=[2], logits="none").captured[2]
    output = case.verifier.prefill(input_ids[:, :5])
    close(output.logits, expected[:, 4:5])
    state = output.state
    assert state is not None
    at = 5
    for k in (1, 4, 1, 9, 4):  # steps of several tokens, across the window's edge
        stepped = case.verifier.step(input_ids[:, at : at + k], state, capture=[2])
        close(stepped.logits, expected[:, at : at + k])
        close(stepped.captured[2], streams[:, at : at + k])
        at += k
    assert at == LONG
    assert state.lengths.tolist() == [LONG, LONG]


def test_cropped_tokens_leave_no_trace(case: Case) -> None:
    input_ids = verifier_models.tokens(1, LONG)
    expected = own_logits(case.model, input_ids)
    state = case.verifier.prefill(input_ids[:, :14]).state
    assert state is not None
    case.verifier.step(verifier_models.tokens(1, 6, seed=9), state)  # a draft, rejected from 1 on
    case.verifier.crop(state, 14)
    close(case.verifier.step(input_ids[:, 14:18], state).logits, expected[:, 14:18])
    case.verifier.crop(state, 3)
    close(case.verifier.step(input_ids[:, 3:20], state).logits, expected[:, 3:20])


def test_rows_may_keep_different_numbers_of_tokens(case: Case) -> None:
    lengths = [4, 17, 12]
    input_ids = verifier_models.tokens(3, LONG)
    state = case.verifier.prefill(input_ids[:, :20]).state
    assert state is not None
    case.verifier.crop(state, torch.tensor(lengths))
    assert state.slots == max(lengths)
    new = verifier_models.tokens(3, 6, seed=5)
    output = case.verifier.step(new, state, capture=[LAYERS])
    case.verifier.crop(state, torch.tensor([6, 17, 15]))  # again, from rows that are padded
    last = verifier_models.tokens(3, 3, seed=6)
    again = case.verifier.step(last, state)
    for row, length in enumerate(lengths):
        whole = torch.cat([input_ids[row, :length], new[row]])[None]
        close(output.logits[row : row + 1] if output.logits is not None else None,
              own_logits(case.model, whole)[:, length:])  # fmt: skip
        kept = [6, 17, 15][row]
        whole = torch.cat([whole[0, :kept], last[row]])[None]
        close(again.logits[row : row + 1] if again.logits is not None else None,
              own_logits(case.model, whole)[:, kept:])  # fmt: skip


def test_greedy_tokens_are_those_of_generate(case: Case) -> None:
    prompt = verifier_models.tokens(1, 6)
    expected = case.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False,
        eos_token_id=VOCABULARY - 1, pad_token_id=0,
    )[0, 6:].tolist()  # fmt: skip
    output = case.verifier.prefill(prompt)
    found: list[int] = []
    while len(found) < len(expected):
        assert output.logits is not None
        assert output.state is not None
        found.append(int(output.logits[0, -1].argmax()))
        output = case.verifier.step(torch.tensor([[found[-1]]]), output.state)
    assert found == expected


@pytest.mark.parametrize("name", SLIDING)
def test_the_sliding_window_matters_here(name: str) -> None:
    """Else the tests beyond the window would compare nothing."""
    model = verifier_models.make(name)
    input_ids = verifier_models.tokens(1, LONG)
    changed = input_ids.clone()
    changed[:, 0] = 3 + (changed[:, 0] - 2) % (VOCABULARY - 3)
    layers = model.get_decoder().layers
    with torch.no_grad():
        seen = []
        hook = layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for ids in (input_ids, changed):
            model(input_ids=ids)
        hook.remove()
    differs = (seen[0] - seen[1]).abs().amax(-1)[0] > 1e-6  # layer 0 slides in all of them
    assert differs[:WINDOW].all()
    assert not differs[WINDOW:].any()


def test_hooks_are_gone_after_a_call_and_after_an_exception() -> None:
    model = verifier_models.make("llama")
    verifier = Verifier(model)

    def hooks() -> int:
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())

    before = hooks()
    verifier.prefill(verifier_models.tokens(1, 3), capture=[0, 2, LAYERS])
    assert hooks() == before

    def fail(*_: object) -> None:
        raise RuntimeError("planted")

    planted = model.get_decoder().layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        verifier.prefill(verifier_models.tokens(1, 3), capture=[0, 2, LAYERS])
    planted.remove()
    assert hooks() == before


def test_what_is_asked_for_is_what_comes() -> None:
    verifier = Verifier(verifier_models.make("llama"))
    input_ids = verifier_models.tokens(2, 5)
    output = verifier.prefill(input_ids, capture=[4, 1], logits="none")
    assert output.logits is None
    assert list(output.captured) == [4, 1]
    assert not output.captured[1].requires_grad
    assert verifier.prefill(input_ids, use_cache=False).state is None
    last = verifier.prefill(input_ids).logits
    everything = verifier.prefill(input_ids, logits="all").logits
    assert everything is not None
    close(last, everything[:, -1:])


def test_properties() -> None:
    model = verifier_models.make("qwen2_5_vl")
    verifier = Verifier(model)
    assert verifier.config is model.config.text_config
    assert verifier.hidden_size == HIDDEN
    assert verifier.vocab_size == VOCABULARY
    assert verifier.num_layers == LAYERS
    assert list(verifier.eos_token_ids) == [2]
    assert verifier.default_aux_layer_ids() == (1, 2, 3)
    assert verifier.device == torch.device("cpu")
    with pytest.raises(ValueError, match="without a tokenizer"):
        _ = verifier.tokenizer
    model.generation_config.eos_token_id = [2, 7]
    assert list(verifier.eos_token_ids) == [2, 7]


def test_the_model_is_put_in_evaluation_mode() -> None:
    assert not Verifier(verifier_models.make("gpt_neox").train()).model.training


@pytest.mark.parametrize("name", ["gemma2", "qwen3_vl"])
def test_from_pretrained(name: str, tmp_path: Path) -> None:
    model = verifier_models.make(name)
    model.save_pretrained(tmp_path)
    input_ids = verifier_models.tokens(1, LONG)
    verifier = Verifier.from_pretrained(tmp_path, local_files_only=True)
    assert type(verifier.model) is type(model)
    close(verifier.prefill(input_ids, logits="all").logits, own_logits(model, input_ids))
    verifier = Verifier.from_pretrained(
        tmp_path, device="cpu", dtype=torch.bfloat16, attn_implementation="eager"
    )
    output = verifier.prefill(input_ids, capture=[1])
    assert output.logits is not None
    assert output.logits.dtype == output.captured[1].dtype == torch.bfloat16
    assert verifier.model.config._attn_implementation == "eager"


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    model = verifier_models.make("llama")
    weights = model.state_dict()
    del weights["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"lacks 1 weights .*layers\.1\.mlp\.up_proj"):
        Verifier.from_pretrained(tmp_path)


def test_code_of_a_checkpoint_is_not_run_unasked(tmp_path: Path) -> None:
    model = verifier_models.make("llama")
    model.save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text("raise SystemExit('ran')")
    config = (tmp_path / "config.json").read_text().replace('"llama"', '"own_kind"')
    auto_map = '{"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},'
    (tmp_path / "config.json").write_text(config.replace("{", auto_map, 1))
    with pytest.raises(ValueError, match="trust_remote_code"):
        Verifier.from_pretrained(tmp_path)


def test_deep_models_have_the_usual_auxiliary_layers() -> None:
    config = verifier_models.make("llama").config
    config.num_hidden_layers = 8
    verifier = Verifier(LlamaForCausalLM(config))
    assert isinstance(verifier.head, nn.Module)
    assert verifier.default_aux_layer_ids() == (2, 4, 5)
