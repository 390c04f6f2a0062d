"""VerifierHead from a checkpoint against the model's own; what cannot be served is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.models import verifier_models
from tests.models.verifier_models import BASE, HIDDEN, LAYERS, MODELS, VOCABULARY
from torch import nn

from speculators.models.verifier import checkpoint
from speculators.models.verifier.architecture import (
    LogitTransform,
    UnsupportedVerifierError,
    default_aux_layer_ids,
    find_architecture,
    logit_transform,
)
from speculators.models.verifier.head import VerifierHead
from speculators.models.verifier.verifier import Verifier


def same(found: VerifierHead, expected: VerifierHead) -> None:
    hidden = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(0)) * 3
    with torch.no_grad():
        torch.testing.assert_close(found(hidden), expected(hidden), rtol=0, atol=0)
        torch.testing.assert_close(found.norm(hidden), expected.norm(hidden), rtol=0, atol=0)
        assert found.logits(found.norm(hidden)).equal(found(hidden))


@pytest.mark.parametrize(
    ("name", "size"),
    [*((name, "9KB") for name in MODELS), ("llama", "50GB"), ("gemma2", "50GB")],
)
def test_the_head_of_a_directory_is_the_models(name: str, size: str, tmp_path: Path) -> None:
    model = verifier_models.make(name)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / checkpoint.INDEX).exists() == (size == "9KB")
    head = VerifierHead.from_pretrained(tmp_path, local_files_only=True)
    same(head, VerifierHead.from_model(model))
    assert not any(parameter.requires_grad for parameter in head.parameters())
    assert not any(parameter.is_meta for parameter in head.parameters())


def test_only_the_files_that_hold_the_head_are_read(tmp_path: Path) -> None:
    model = verifier_models.make("llama_tied")
    model.save_pretrained(tmp_path, max_shard_size="9KB")
    files = json.loads((tmp_path / checkpoint.INDEX).read_text())["weight_map"]
    needed = {files["model.embed_tokens.weight"], files["model.norm.weight"]}
    others = set(files.values()) - needed
    assert others
    for file in others:
        (tmp_path / file).unlink()
    same(VerifierHead.from_pretrained(tmp_path), VerifierHead.from_model(model))


def test_the_dtype_is_the_stored_one_unless_given(tmp_path: Path) -> None:
    verifier_models.make("llama").bfloat16().save_pretrained(tmp_path)
    assert VerifierHead.from_pretrained(tmp_path).lm_head.weight.dtype == torch.bfloat16
    head = VerifierHead.from_pretrained(tmp_path, device="cpu", dtype=torch.float32)
    assert {parameter.dtype for parameter in head.parameters()} == {torch.float32}


def test_older_names_of_multimodal_checkpoints_are_translated(tmp_path: Path) -> None:
    model = verifier_models.make("qwen2_5_vl")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / checkpoint.SINGLE)
    older = {name.replace("model.language_model.", "model."): w for name, w in weights.items()}
    assert "model.norm.weight" in older
    save_file(older, tmp_path / checkpoint.SINGLE, {"format": "pt"})
    same(VerifierHead.from_pretrained(tmp_path), VerifierHead.from_model(model))


def rewrite(directory: Path, **changes: torch.Tensor | None) -> None:
    weights = load_file(directory / checkpoint.SINGLE)
    for name, tensor in changes.items():
        full = {"head": "lm_head.weight", "norm": "model.norm.weight"}[name]
        weights.pop(full)
        if tensor is not None:
            weights[full] = tensor
    save_file(weights, directory / checkpoint.SINGLE, {"format": "pt"})


def test_checkpoints_without_a_usable_head_are_refused(tmp_path: Path) -> None:
    verifier_models.make("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, head=torch.zeros(VOCABULARY, HIDDEN, dtype=torch.int8))
    with pytest.raises(UnsupportedVerifierError, match=r"'lm_head.weight' .* torch.int8"):
        VerifierHead.from_pretrained(tmp_path)
    rewrite(tmp_path, head=torch.zeros(VOCABULARY, HIDDEN // 2))
    with pytest.raises(UnsupportedVerifierError, match=r"floating-point tensor \[61, 32\]"):
        VerifierHead.from_pretrained(tmp_path)
    rewrite(tmp_path, head=None)
    with pytest.raises(ValueError, match=r"no tensor 'lm_head\.weight'; expected"):
        VerifierHead.from_pretrained(tmp_path)
    (tmp_path / checkpoint.SINGLE).unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors\.index\.json nor"):
        VerifierHead.from_pretrained(tmp_path)


def test_the_transform_is_scale_then_softcap() -> None:
    logits = torch.randn(50, dtype=torch.float64) * 20
    found = LogitTransform(multiplier=0.5, divisor=4.0, softcap=3.0)(logits)
    torch.testing.assert_close(found, 3.0 * torch.tanh(logits / 8 / 3.0))
    assert LogitTransform()(logits) is logits


def test_a_field_means_what_its_family_means_by_it() -> None:
    granite = transformers.GraniteConfig(logits_scaling=8.0)
    assert logit_transform(granite) == LogitTransform(divisor=8.0)
    cohere = transformers.CohereConfig(logit_scale=0.0625)
    assert logit_transform(cohere) == LogitTransform(multiplier=0.0625)
    gemma = transformers.Gemma2Config(final_logit_softcapping=30.0)
    assert logit_transform(gemma) == LogitTransform(softcap=30.0)
    for field in ("logit_scale", "logits_scaling", "unpadded_vocab_size"):
        llama = transformers.LlamaConfig()
        setattr(llama, field, 2.0)
        with pytest.raises(UnsupportedVerifierError, match=f"'llama' has {field} = 2.0"):
            logit_transform(llama)
        setattr(llama, field, None)
        assert logit_transform(llama) == LogitTransform()


def test_default_auxiliary_layers() -> None:
    expected = {4: (1, 2, 3), 5: (1, 2, 4), 6: (1, 3, 5), 7: (2, 3, 4), 32: (2, 16, 29)}
    for layers, ids in expected.items():
        assert default_aux_layer_ids(layers) == ids
    for layers in range(4, 100):
        ids = default_aux_layer_ids(layers)
        assert sorted(set(ids)) == list(ids)
        assert ids[0] >= 0
        assert ids[2] <= layers
    with pytest.raises(ValueError, match="3 layers has no default"):
        default_aux_layer_ids(3)


RECURRENT: dict[str, dict[str, Any]] = {
    "Mamba": {"num_hidden_layers": 2, "state_size": 4},
    "Rwkv": {"num_hidden_layers": 2, "attention_hidden_size": 32},
    "Qwen3Next": {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "Lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 32},
    "RecurrentGemma": {"lru_width": 32, "head_dim": 8},
    "Jamba": {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
    | {"use_mamba_kernels": False, "mamba_dt_rank": 4},
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_state_is_refused(name: str) -> None:
    config = getattr(transformers, f"{name}Config")(**(BASE | RECURRENT[name]))
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    with pytest.raises(UnsupportedVerifierError, match="recurrent state"):
        Verifier(model)


def test_the_head_of_a_model_with_recurrent_layers_is_served(tmp_path: Path) -> None:
    """Its hidden states can come from another engine; Qwen3-Next's norm is of the 1 + w kind."""
    config = transformers.Qwen3NextConfig(**(BASE | RECURRENT["Qwen3Next"]))
    torch.manual_seed(0)
    model: Any = transformers.Qwen3NextForCausalLM(config)
    model.eval()
    nn.init.normal_(model.model.norm.weight)
    model.save_pretrained(tmp_path)
    head = VerifierHead.from_pretrained(tmp_path)
    same(head, VerifierHead.from_model(model))
    streams = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
    with torch.no_grad():
        expected = model(verifier_models.tokens(1, 5)).logits
        hook.remove()
        torch.testing.assert_close(head(streams[0]), expected, rtol=1e-5, atol=1e-5)


class Halved(nn.Module):
    """A module that is no norm that anyone knows."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Halves."""
        return hidden_states / 2


def test_unknown_parts_are_named() -> None:
    model = verifier_models.make("llama")
    decoder = model.get_decoder()
    norm = decoder.norm
    decoder.norm = Halved()
    with pytest.raises(UnsupportedVerifierError, match="LlamaModel is a Halved; expected an RMS"):
        find_architecture(model)
    decoder.norm = norm
    decoder.final_norm = norm
    with pytest.raises(UnsupportedVerifierError, match="norm and final_norm where a final norm"):
        find_architecture(model)
    del decoder.norm, decoder.final_norm
    with pytest.raises(UnsupportedVerifierError, match="nothing where a final norm"):
        VerifierHead.from_model(model)
    decoder.norm = norm
    decoder.layers = nn.Sequential(*decoder.layers)
    with pytest.raises(UnsupportedVerifierError, match="holds its layers as Sequential"):
        find_architecture(model)
    with pytest.raises(UnsupportedVerifierError, match="LlamaModel has no output head"):
        find_architecture(decoder)


def test_other_kinds_of_models_are_refused(tmp_path: Path) -> None:
    small: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**small))
    with pytest.raises(UnsupportedVerifierError, match="T5ForConditionalGeneration is an encoder"):
        find_architecture(model)
    transformers.T5Config(**small).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedVerifierError, match=r"T5Config .* has no causal language model"):
        Verifier.from_pretrained(tmp_path)
    config = transformers.Gemma3TextConfig(**BASE, head_dim=8, use_bidirectional_attention=True)
    with torch.device("meta"):
        both_ways = transformers.Gemma3ForCausalLM(config)
    with pytest.raises(UnsupportedVerifierError, match="both directions"):
        find_architecture(both_ways)


class Doubled(transformers.LlamaForCausalLM):
    """A model whose forward does something to its logits that no configuration field says."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Llama's, its logits doubled."""
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * 2
        return outputs


def test_logits_that_are_not_the_heads_are_noticed() -> None:
    config = verifier_models.make("llama").config
    torch.manual_seed(0)
    with pytest.raises(UnsupportedVerifierError, match="the logits of Doubled are not those"):
        Verifier(Doubled(config))  # type: ignore[no-untyped-call]


def test_streams_that_pass_more_than_once_are_noticed() -> None:
    model = verifier_models.make("llama")
    decoder = model.get_decoder()
    decoder.layers[LAYERS - 1] = decoder.layers[0]
    with pytest.raises(UnsupportedVerifierError, match=r"residual stream 0 .* passed 2 times"):
        Verifier(model)
