"""Draft models: training and drafting compute the same; a draft is saved and loaded whole."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.verifier_models import HIDDEN, LAYERS, VOCABULARY, make, tokens
from torch import Tensor
from transformers import LlamaConfig

from speculators import ConfigError, SpeculatorModelConfig
from speculators.models import (
    CheckpointError,
    DraftCache,
    SpeculatorModel,
    TrainTimeTestAttention,
    VocabularyMapping,
    find_algorithm,
)
from speculators.models.decoder import draft_layer_config
from speculators.models.verifier import Verifier, VerifierParts

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "eagle": ("eagle", {}),
    "eagle_layernorms": ("eagle", {"layernorms": True}),
    "hass": ("hass", {}),
    "hass_qwen3": ("hass", {"layer_type": "qwen3"}),
    "eagle3": ("eagle3", {"draft_vocab_size": 40}),
    "eagle3_full_vocabulary": ("eagle3", {"layer_type": "qwen3", "norm_output": True}),
    "eagle3_two_layers": ("eagle3", {"num_layers": 2, "norm_before_residual": True}),
    "eagle3_fc_norm": ("eagle3", {"fc_norm": True, "aux_layer_ids": [0, 1, 3, LAYERS]}),
    "eagle3_norm_before_fc": ("eagle3", {"norm_before_fc": True, "aux_layer_ids": [2]}),
}


@pytest.fixture(scope="module")
def verifier() -> Verifier:
    return Verifier(make("llama"))


def _draft(name: str, verifier: Verifier, **changes: Any) -> SpeculatorModel:
    torch.manual_seed(1)
    algorithm, options = OPTIONS[name]
    spec = find_algorithm(algorithm)
    config = spec.new_config(verifier.config, **(options | changes))
    mapping = None
    if config.to_dict().get("draft_vocab_size", VOCABULARY) != VOCABULARY:
        mapping = VocabularyMapping.from_counts(tokens(VOCABULARY), config.draft_vocab_size)
    draft = SpeculatorModel.from_config(config, verifier, vocabulary=mapping)
    with torch.no_grad():
        for parameter in draft.parameters():  # larger than at the start, so that all of it matters
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return draft.eval()


def _close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)


def _draft_input(draft: SpeculatorModel, verifier: Verifier, input_ids: Tensor) -> Tensor:
    layers = draft.spec.capture_layers(draft.config, verifier.num_layers)
    streams: Mapping[int, Tensor] = verifier.prefill(input_ids, capture=layers).captured
    return draft.spec.draft_input(streams, verifier.head, draft.config)


@torch.no_grad()
def _drafted_alone(
    draft: SpeculatorModel, input_ids: Tensor, states: Tensor, row: int, steps: int
) -> list[Tensor]:
    """Logits of each step from one row, with a cache, as it is done while drafting."""
    cache = DraftCache(1)
    cache.extend()
    rows = torch.arange(row + 1)[None]
    output = draft(input_ids[:, 1 : row + 2], states[:, : row + 1], rows, cache)
    logits = [draft.logits(output.head_input)[0, -1]]
    for step in range(1, steps):
        cache.draft()
        output = draft(
            input_ids[:, row + 1 + step, None],
            output.states[:, -1:],
            torch.tensor([[row + step]]),
            cache,
        )
        logits.append(draft.logits(output.head_input)[0, -1])
    return logits


@pytest.mark.parametrize(
    ("name", "window"),
    [(name, None) for name in OPTIONS] + [("hass_qwen3", 3), ("eagle3_full_vocabulary", 3)],
)
def test_training_and_drafting_compute_the_same(
    name: str, window: int | None, verifier: Verifier
) -> None:
    draft = _draft(name, verifier)
    for module in draft.modules():
        if hasattr(module, "sliding_window"):  # Qwen3's attention has one
            setattr(module, "sliding_window", window)  # noqa: B010 - of an unknown type
    lengths, steps = (9, 6), 4
    documents = [tokens(1, length, seed=length) for length in lengths]
    states = [draft.combine_hidden_states(_draft_input(draft, verifier, d)) for d in documents]
    # Packed: rows t with token t + 1, at position t, the documents one after the other.
    following = torch.cat([torch.cat([d[:, 1:], d[:, :1]], 1) for d in documents], 1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    numbers = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])[None]
    attention = TrainTimeTestAttention(numbers)
    state = torch.cat(states, 1)
    for step in range(steps):
        with torch.no_grad():
            output = draft(following.roll(-step, 1), state, positions + step, attention)
        state = output.states
        start = 0
        for document, own, length in zip(documents, states, lengths, strict=True):
            for row in range(length - 1 - step):
                expected = _drafted_alone(draft, document, own, row, step + 1)[step]
                found = draft.logits(output.head_input)[0, start + row]
                _close(found, expected)
            start += length


@pytest.mark.parametrize("name", ["hass", "eagle3", "eagle3_two_layers"])
def test_a_batch_drafts_as_each_sequence_does_alone(name: str, verifier: Verifier) -> None:
    """Two rounds: sequences of different lengths, drafted tokens dropped, more rows committed."""
    draft = _draft(name, verifier)
    lengths, more = [5, 8, 3], [2, 1, 4]
    documents = [tokens(1, a + b + 4, seed=a) for a, b in zip(lengths, more, strict=True)]
    states = [draft.combine_hidden_states(_draft_input(draft, verifier, d)) for d in documents]
    cache = DraftCache(3)
    begin = [0, 0, 0]
    for counts in (lengths, more):
        width = max(counts)
        ids, inputs = torch.zeros(3, width, dtype=torch.int64), torch.zeros(3, width, HIDDEN)
        for row, count in enumerate(counts):
            part = slice(begin[row], begin[row] + count)
            ids[row, :count] = documents[row][0, 1:][part]
            inputs[row, :count] = states[row][0, part]
        cache.extend(counts)
        first = torch.tensor(begin)[:, None]
        with torch.no_grad():
            output = draft(ids, inputs, first + torch.arange(width), cache)
        begin = [b + count for b, count in zip(begin, counts, strict=True)]
        assert cache.lengths == begin
        last = torch.tensor(counts) - 1
        state = output.states[torch.arange(3), last][:, None]
        head_input = output.head_input[torch.arange(3), last]
        for step in range(3):
            for row, document in enumerate(documents):
                alone = _drafted_alone(draft, document, states[row], begin[row] - 1, step + 1)
                _close(draft.logits(head_input)[row], alone[step])
            drafted = torch.cat([d[:, b + step + 1] for d, b in zip(documents, begin, strict=True)])
            cache.draft()
            with torch.no_grad():
                output = draft(drafted[:, None], state, torch.tensor(begin)[:, None] + step, cache)
            state, head_input = output.states, output.head_input[:, 0]
        cache.drop_drafted()


def test_a_tree_drafts_as_each_of_its_chains_does(verifier: Verifier) -> None:
    draft = _draft("hass", verifier)
    document = tokens(1, 8)
    states = draft.combine_hidden_states(_draft_input(draft, verifier, document))
    cache = DraftCache(1)
    cache.extend()
    rows = 5
    with torch.no_grad():
        output = draft(document[:, 1 : rows + 1], states[:, :rows], torch.arange(rows)[None], cache)
        # Two children of the last row, then two children of the second of them.
        cache.draft(torch.eye(2, dtype=torch.bool)[None])
        children = torch.tensor([[11, 12]])
        level1 = draft(
            children, output.states[:, -1:].expand(-1, 2, -1), torch.full((1, 2), rows), cache
        )
        mask = torch.tensor([[[False, True, True, False], [False, True, False, True]]])
        cache.draft(mask)
        level2 = draft(
            torch.tensor([[13, 14]]),
            level1.states[:, 1:].expand(-1, 2, -1),
            torch.full((1, 2), rows + 1),
            cache,
        )
    for output_, index, chain in ((level1, 0, [11]), (level2, 0, [12, 13]), (level2, 1, [12, 14])):
        text = torch.cat([document[:, : rows + 1], torch.tensor([chain])], 1)
        expected = _drafted_alone(draft, text, states, rows - 1, len(chain) + 1)[-1]
        found = draft.logits(output_.head_input)[0, index]
        _close(found, expected)


def test_a_cache_says_what_is_wrong(verifier: Verifier) -> None:
    draft = _draft("hass", verifier)
    cache = DraftCache(2)
    with pytest.raises(ValueError, match="counts for 3 sequences; expected 2"):
        cache.extend([1, 2, 3])
    ids, states = tokens(2, 1), torch.zeros(2, 1, HIDDEN)
    cache.draft()
    draft(ids, states, torch.zeros(2, 1, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="1 drafted rows follow"):
        cache.extend()
    with pytest.raises(ValueError, match="rows of 1 sequences for a cache of 2"):
        draft(ids[:1], states[:1], torch.zeros(1, 1, dtype=torch.int64), cache)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_draft_comes_back_as_it_was_saved(
    name: str, verifier: Verifier, tmp_path: pathlib.Path
) -> None:
    draft = _draft(name, verifier)
    draft.save_pretrained(tmp_path / "draft", max_shard_size="20KB")
    assert (tmp_path / "draft/model.safetensors.index.json").exists()
    assert "speculators" in (tmp_path / "draft/README.md").read_text()
    loaded = SpeculatorModel.from_pretrained(tmp_path / "draft", verifier=verifier)
    assert type(loaded) is type(draft)
    assert loaded.config == draft.config
    expected = draft.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    frozen = {key for key, value in draft.named_parameters() if not value.requires_grad}
    assert frozen == {key for key, value in loaded.named_parameters() if not value.requires_grad}
    ids, states = tokens(1, 5), torch.randn(1, 5, HIDDEN)
    rows = torch.arange(5)[None]
    with torch.no_grad():
        outputs = [
            model.logits(model(ids, states, rows, TrainTimeTestAttention(rows * 0)).head_input)
            for model in (draft, loaded)
        ]
    assert torch.equal(*outputs)


def test_a_directory_that_is_not_empty_is_not_written_over(
    verifier: Verifier, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    draft = _draft("hass", verifier)
    with pytest.raises(FileExistsError, match="not empty"):
        draft.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    draft.save_pretrained(tmp_path, overwrite=True)
    assert "mine.txt" not in [path.name for path in tmp_path.iterdir()]


def test_casting_a_draft_leaves_the_verifier_alone(verifier: Verifier) -> None:
    draft = _draft("hass", verifier).to(torch.bfloat16)
    assert draft.embed(tokens(1, 2), torch.bfloat16).dtype == torch.bfloat16
    assert verifier.model.dtype == torch.float32
    assert not any("embed" in name or "lm_head" in name for name in draft.state_dict())
    head_input = torch.zeros(1, HIDDEN, dtype=torch.bfloat16)
    assert draft.logits(head_input).dtype == torch.float32, "the verifier's head computes"


def test_the_dtype_is_written_and_can_be_chosen(verifier: Verifier, tmp_path: pathlib.Path) -> None:
    _draft("eagle3", verifier).to(torch.bfloat16).save_pretrained(tmp_path / "draft")
    assert json.loads((tmp_path / "draft/config.json").read_text())["dtype"] == "bfloat16"
    stored = SpeculatorModel.from_pretrained(tmp_path / "draft")
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    chosen = SpeculatorModel.from_pretrained(tmp_path / "draft", dtype=torch.float32)
    assert {p.dtype for p in chosen.parameters()} == {torch.float32}
    assert chosen.to_verifier_ids(torch.tensor(3)).dtype == torch.int64


def test_eagle3_takes_embedding_and_head_from_the_verifier(
    verifier: Verifier, tmp_path: pathlib.Path
) -> None:
    draft = _draft("eagle3", verifier)
    draft.save_pretrained(tmp_path / "draft")
    file = tmp_path / "draft/model.safetensors"
    kept = {k: v for k, v in load_file(file).items() if "embed_tokens" not in k and "lm_" not in k}
    save_file(kept, file)
    with pytest.raises(CheckpointError) as error:
        SpeculatorModel.from_pretrained(tmp_path / "draft")
    assert "embed_tokens.weight" in str(error.value)
    assert "lm_head.weight" in str(error.value)
    make("llama").save_pretrained(tmp_path / "verifier")
    for source in (verifier, tmp_path / "verifier", VerifierParts.of(verifier)):
        loaded: Any = SpeculatorModel.from_pretrained(tmp_path / "draft", verifier=source)
        assert torch.equal(loaded.embed_tokens.weight, loaded.verifier_parts.embedding)
        weight = verifier.head.lm_head.weight
        assert isinstance(weight, Tensor)
        assert torch.equal(loaded.lm_head.weight, weight[loaded.vocabulary.draft_to_verifier])
        assert loaded.lm_head.weight.requires_grad
        assert not loaded.embed_tokens.weight.requires_grad


def test_without_a_verifier_eagle_cannot_draft(verifier: Verifier, tmp_path: pathlib.Path) -> None:
    _draft("hass", verifier).save_pretrained(tmp_path / "draft")
    loaded = SpeculatorModel.from_pretrained(tmp_path / "draft")
    rows = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="has no verifier"):
        loaded(rows, torch.zeros(1, 1, HIDDEN), rows, TrainTimeTestAttention(rows))


def test_another_verifier_is_refused(verifier: Verifier) -> None:
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN * 2, num_hidden_layers=8)
    for name in ("hass", "eagle3"):
        wide = find_algorithm(name).new_config(config)
        with pytest.raises(ValueError, match=r"\[61, 32\], but .* was made for \[61, 64\]"):
            SpeculatorModel.from_config(wide, verifier)


def test_a_wrong_mapping_is_refused(verifier: Verifier, tmp_path: pathlib.Path) -> None:
    draft: Any = _draft("eagle3", verifier)
    with pytest.raises(ValueError, match="for 30 of 61 tokens; expected 40 of 61"):
        draft.set_vocabulary(VocabularyMapping.from_counts(tokens(VOCABULARY), 30))
    with pytest.raises(ValueError, match="proposes all tokens"):
        _draft("hass", verifier).set_vocabulary(draft.vocabulary)
    draft.d2t[0] = 1000
    draft.save_pretrained(tmp_path / "draft")
    with pytest.raises(CheckpointError, match="d2t sends the draft's token 0"):
        SpeculatorModel.from_pretrained(tmp_path / "draft")


def test_the_class_must_be_the_configurations(verifier: Verifier) -> None:
    from speculators.models.eagle import EagleSpeculator

    config = find_algorithm("eagle3").new_config(verifier.config)
    with pytest.raises(TypeError, match="whose class is Eagle3DraftModel; expected EagleSpec"):
        EagleSpeculator.from_config(config)


def test_layers_of_an_unknown_type_are_refused(verifier: Verifier) -> None:
    config = find_algorithm("eagle").new_config(verifier.config)
    config.transformer_layer_config = {"model_type": "gpt2"}
    with pytest.raises(ConfigError, match="found 'gpt2'; expected one of llama, qwen3"):
        SpeculatorModel.from_config(config)
    config = find_algorithm("eagle").new_config(verifier.config)
    config.transformer_layer_architecture = "Qwen3DecoderLayer"
    with pytest.raises(ConfigError, match="expected 'auto' or 'LlamaDecoderLayer'"):
        SpeculatorModel.from_config(config)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "qwen3_vl", "gpt_oss", "phi"])
def test_a_draft_turns_with_its_verifiers_rope(name: str) -> None:
    """The cosines of the draft are those of the verifier's full-attention layers."""
    model = make(name)
    text = model.config.get_text_config()
    parameters = dict(text.rope_parameters)
    nested = "full_attention" in parameters
    (parameters["full_attention"] if nested else parameters)["rope_theta"] = 5e5
    text.rope_parameters = parameters
    layer = draft_layer_config(model.config)
    assert layer.rope_parameters["rope_theta"] == 5e5
    assert layer.head_dim == getattr(text, "head_dim", None) or HIDDEN // 4
    assert "mrope_section" not in layer.rope_parameters


def test_rope_scaling_is_copied() -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    verifier = LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=8,
        vocab_size=61,
        rope_parameters=scaling,
        max_position_embeddings=512,
    )
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for name in ("hass", "eagle3"):
        draft = SpeculatorModel.from_config(find_algorithm(name).new_config(verifier))
        x, positions = torch.zeros(1, 1), torch.arange(300)[None]
        expected = LlamaRotaryEmbedding(verifier)(x, positions)
        found = draft.rotary_emb(x, positions)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_auxiliary_layers_are_sorted_counted_and_checked(verifier: Verifier) -> None:
    spec = find_algorithm("eagle3")
    config = spec.new_config(verifier.config, aux_layer_ids=[3, 1])
    assert config.eagle_aux_hidden_state_layer_ids == [1, 3]
    assert config.transformer_layer_config.num_aux_hidden_states == 2
    assert spec.capture_layers(config, 3) == (1, 3)
    with pytest.raises(ConfigError, match=r"\[1, 3\]; expected numbers from 0 to 2"):
        spec.capture_layers(config, 2)
    config.eagle_aux_hidden_state_layer_ids = None
    with pytest.raises(ConfigError, match="are None"):
        spec.capture_layers(config, 8)


def test_the_input_is_the_verifiers_state(verifier: Verifier) -> None:
    ids = tokens(2, 5)
    output = verifier.model(ids, output_hidden_states=True)
    hass, eagle3 = _draft("hass", verifier), _draft("eagle3_fc_norm", verifier)
    torch.testing.assert_close(_draft_input(hass, verifier, ids), output.hidden_states[-1])
    found = _draft_input(eagle3, verifier, ids)
    streams = [output.hidden_states[k] for k in (0, 1, 3)]
    torch.testing.assert_close(found[..., : 3 * HIDDEN], torch.cat(streams, -1))
    torch.testing.assert_close(
        verifier.head.norm(found[..., 3 * HIDDEN :]), output.hidden_states[-1]
    )


def test_the_configuration_alone_gives_back_the_class(
    tmp_path: pathlib.Path,
) -> None:
    verifier = LlamaConfig(num_hidden_layers=8, architectures=["LlamaForCausalLM"])
    for name in ("eagle", "hass", "eagle3"):
        spec = find_algorithm(name)
        config = spec.new_config(verifier, "some/verifier", speculative_tokens=3)
        config.save_pretrained(tmp_path / name)
        read = SpeculatorModelConfig.from_pretrained(tmp_path / name)
        assert read == config
        assert type(read) is spec.config_class
        block = read.speculators_config
        assert block.verifier.name_or_path == "some/verifier"
        assert block.verifier.architectures == ["LlamaForCausalLM"]
        assert block.proposal_methods[0].speculative_tokens == 3
