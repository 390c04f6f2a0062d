"""The tiny verifier as it is shipped, and the recipe that made it, in miniature."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from examples.tiny_verifier.conversations import CONTINUE
from examples.tiny_verifier.corpus import (
    SourceFile,
    distinct_share,
    is_held_out,
    is_repetitive,
    read_corpus,
    split,
    standard_library,
)
from examples.tiny_verifier.data import Batches, token_stream
from examples.tiny_verifier.export import export
from examples.tiny_verifier.json_lines import read_lines
from examples.tiny_verifier.measure import (
    bits_per_byte,
    greedy_continuations,
    share_without_loops,
)
from examples.tiny_verifier.recipe import Recipe
from examples.tiny_verifier.repetition import FADING, add_loops, faded_loss, no_repetition
from examples.tiny_verifier.tokenizer import SPECIAL_TOKENS, train_tokenizer
from examples.tiny_verifier.trainer import Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path("examples/tiny_verifier")
MODEL = HERE / "model"
MAXIMUM_BYTES = 12_000_000
MAXIMUM_BITS_PER_BYTE = 1.30
MINIATURE = Recipe(
    vocabulary_size=512,
    hidden_size=32,
    intermediate_size=64,
    layers=2,
    heads=2,
    key_value_heads=1,
    head_size=16,
    context_length=64,
    stages=((0.5, 32), (1.0, 64)),
    tokens_per_step=2048,
    steps=12,
    warm_up=2,
    validate_every=3,
    own_loops_from=0.6,
    own_loops_every=2,
    own_loops_answers=8,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def files() -> list[SourceFile]:
    """A small corpus: one package of the standard library."""
    return read_corpus(standard_library() / "asyncio")


def test_directory_is_complete_and_small() -> None:
    sizes = {p.name: p.stat().st_size for p in MODEL.iterdir()}
    expected = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert set(sizes) == expected
    assert sum(sizes.values()) < MAXIMUM_BYTES, sizes


def test_architecture(model: Any, tokenizer: Any) -> None:
    config = model.config
    assert config.model_type == "llama"
    assert config.num_hidden_layers == 12
    assert config.tie_word_embeddings
    assert config.vocab_size == len(tokenizer)
    assert config.max_position_embeddings == tokenizer.model_max_length == 2048
    assert config.eos_token_id == tokenizer.eos_token_id
    stored = AutoModelForCausalLM.from_pretrained(MODEL)
    assert stored.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n\treturn x\r\n",
        "  leading and trailing  ",
        "".join(map(chr, range(0x250))),
        "日本語 \U0001f40d e\u0301 \u202e \ufeff",
        "".join(chr(c) for c in range(0x1F600, 0x1F640)),
    ],
)
def test_tokenizer_round_trip(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text


def test_special_tokens(tokenizer: Any) -> None:
    assert [tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert tokenizer.decode([1, 2], skip_special_tokens=True) == ""
    assert tokenizer.mask_token_id == 4


def test_chat_template_marks_what_the_assistant_says(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "You write Python."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "x = 1\n"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "y = 2"},
    ]
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    said = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
    assert said == "x = 1\n<|im_end|>y = 2<|im_end|>"
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole.startswith(prompt + "x = 1\n<|im_end|>\n")


def test_prompts_are_disjoint_and_evaluation_is_held_out(tokenizer: Any) -> None:
    training = read_lines(HERE / "prompts_train.jsonl")
    evaluation = read_lines(HERE / "prompts_eval.jsonl")
    excerpt = read_lines(HERE / "held_out.jsonl")
    assert len(evaluation) >= 64
    assert len(training) >= 1000
    assert not any(is_held_out(str(r["source"])) for r in training)
    assert all(is_held_out(str(r["source"])) for r in [*evaluation, *excerpt])
    texts = [{json.dumps(r["messages"]) for r in rs} for rs in (training, evaluation)]
    assert [len(t) for t in texts] == [len(training), len(evaluation)]
    assert not texts[0] & texts[1]
    for record in evaluation:
        prompt = tokenizer.apply_chat_template(record["messages"], add_generation_prompt=True)
        assert len(prompt["input_ids"]) + 128 <= tokenizer.model_max_length


def test_bits_per_byte_on_the_held_out_excerpt(model: Any, tokenizer: Any) -> None:
    excerpt = read_lines(HERE / "held_out.jsonl")
    texts = [str(r["text"]) for r in excerpt]
    assert (HERE / "held_out.jsonl").stat().st_size < 200_000
    assert bits_per_byte(model, tokenizer, texts, length=512) < MAXIMUM_BITS_PER_BYTE


def test_later_positions_are_predicted_no_worse(model: Any, tokenizer: Any) -> None:
    texts = [str(r["text"]) for r in read_lines(HERE / "held_out.jsonl")]
    texts = [max(texts, key=len)]
    short = bits_per_byte(model, tokenizer, texts, length=512)
    assert bits_per_byte(model, tokenizer, texts, length=2048, batch=2) < short + 0.02


def test_greedy_continuations_do_not_loop(model: Any, tokenizer: Any) -> None:
    records = read_lines(HERE / "prompts_eval.jsonl")[::2]  # for the test's time; 64 of them
    prompts: list[Any] = [r["messages"] for r in records]
    answers = greedy_continuations(model, tokenizer, prompts, tokens=128, batch=64)
    assert {len(a) for a in answers} == {128}
    assert share_without_loops(answers, least=0.5) >= 0.9


def test_measures() -> None:
    assert distinct_share([1, 2, 3, 4], 4) == 1.0
    assert distinct_share([1, 1, 1, 1, 1, 1], 4) == pytest.approx(1 / 3)
    assert share_without_loops([[1] * 128, list(range(128))]) == 0.5
    assert is_repetitive("self.assertEqual(a, 1)\n" * 100)
    assert not is_repetitive((standard_library() / "heapq.py").read_text())


def test_artificial_loops_point_one_repetition_back() -> None:
    window = torch.randint(100, (8, 129), generator=torch.Generator().manual_seed(0))
    for seed in range(20):
        looped, earlier = add_loops(window, 0.5, frozenset({1, 2}), random.Random(seed))
        targets, own = looped[:, 1:], no_repetition(looped)
        assert torch.equal(targets.gather(1, earlier), targets)
        assert torch.equal(looped[4:], window[4:])
        assert torch.equal(earlier[4:], own[4:])
        assert (earlier[:4] <= own[:4]).all()
        assert (earlier[:4] < own[:4]).any(1).all()


def test_faded_loss_pushes_repetitions_down_until_they_fade() -> None:
    earlier = torch.tensor([[0, 1, 0, 1]])
    first = torch.tensor([0.9, 0.5])

    def loss(second: torch.Tensor) -> float:
        return faded_loss(-torch.cat((first, second)).log()[None], earlier).item()

    likelihood = -first.log().sum().item() / 4
    assert loss(0.9 * FADING * first) == pytest.approx(likelihood)
    assert loss(first) > loss(0.7 * first) > likelihood
    sure = torch.zeros(1, 2, requires_grad=True)
    faded_loss(torch.cat((torch.zeros(1, 2), sure + 1e-4), 1), earlier).backward()
    assert sure.grad is not None
    assert (sure.grad < -1).all()


def test_nothing_held_out_reaches_training(files: list[SourceFile]) -> None:
    training, held_out = split(files)
    assert held_out, "this package must have a held-out file for the test to mean anything"
    tokenizer = train_tokenizer((f.text for f in training), 512, 64)
    batches = Batches(training, tokenizer, seed=0)
    assert batches.files == training
    text = tokenizer.decode(token_stream(training, batches.names, tokenizer, 0, 0).tolist())
    for file in held_out:
        lines = [x for x in file.text.splitlines() if len(x) > 60]
        assert not [x for x in lines if x in text and not any(x in f.text for f in training)]


def test_passes_differ_and_repeat_exactly(files: list[SourceFile]) -> None:
    training, _ = split(files)
    tokenizer = train_tokenizer((f.text for f in training), 512, 64)
    names = ["alpha", "beta"]
    first, again, second = (token_stream(training, names, tokenizer, 0, n) for n in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first[:1000], second[:1000])
    assert CONTINUE in tokenizer.decode(first.tolist())


def test_resumed_run_equals_uninterrupted_run(files: list[SourceFile], tmp_path: Path) -> None:
    training = sorted(split(files)[0], key=lambda f: len(f.text))[5:9]
    files = [*training, *split(files)[1][:1]]  # few enough for more than one pass
    whole = Trainer(MINIATURE, files, tmp_path / "whole")
    whole.run(compiled=False)

    Trainer(MINIATURE, files, tmp_path / "parts").run(until=3, compiled=False)
    (tmp_path / "parts" / "checkpoint.tmp").write_bytes(b"torn by a kill")
    later = Trainer(MINIATURE, files, tmp_path / "parts")
    assert later.step == 3
    later.run(compiled=False)

    states = [torch.load(t.checkpoint, weights_only=True) for t in (whole, later)]
    assert states[0]["place"] == states[1]["place"]
    assert states[0]["place"][0] >= 1, "the run must reach a second pass"
    for name, tensor in states[0]["model"].items():
        assert torch.equal(tensor, states[1]["model"][name]), name


def test_another_corpus_is_refused(files: list[SourceFile], tmp_path: Path) -> None:
    Trainer(MINIATURE, files, tmp_path).run(until=1, compiled=False)
    with pytest.raises(ValueError, match="was made from corpus"):
        Trainer(MINIATURE, files[:-1], tmp_path)


def test_export_is_whole_or_refused(files: list[SourceFile], tmp_path: Path) -> None:
    trainer = Trainer(replace(MINIATURE, steps=1), files, tmp_path / "work")
    target = tmp_path / "model"
    export(trainer.model, trainer.tokenizer, {"a": 1}, target)
    with pytest.raises(FileExistsError, match="is not empty"):
        export(trainer.model, trainer.tokenizer, {"a": 2}, target)
    export(trainer.model, trainer.tokenizer, {"a": 3}, target, overwrite=True)
    assert json.loads((target / "training.json").read_text()) == {"a": 3}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "work"]
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert loaded.num_parameters() == trainer.model.num_parameters()
    shutil.rmtree(target)
