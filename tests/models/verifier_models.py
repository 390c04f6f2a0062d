"""Tiny random language models of the kinds that a verifier can be, in float32 and without files."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

# Threads cost these tiny models far more time than they save.
torch.set_num_threads(1)

VOCABULARY = 61
HIDDEN = 32
LAYERS = 4
WINDOW = 8

BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 16}
ALTERNATING = ["sliding_attention", "full_attention"] * (LAYERS // 2)
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
SHORT = 64  # tokens; longer texts have other rotary embeddings
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": SHORT,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [3.0, 4.0, 5.0, 6.0],
}


def _plain(name: str, /, **changes: Any) -> Callable[[], PreTrainedModel]:
    """A maker of ``NAMEForCausalLM``, its configuration the base with some changes."""

    def make() -> PreTrainedModel:
        config = getattr(transformers, f"{name}Config")
        head = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")
        model: PreTrainedModel = head(config(**(BASE | changes)))
        return model

    return make


def _multimodal(name: str, vision: dict[str, Any], **text: Any) -> Callable[[], PreTrainedModel]:
    """A maker of ``NAMEForConditionalGeneration`` with a small vision tower that is never run."""

    def make() -> PreTrainedModel:
        config = getattr(transformers, f"{name}Config")(
            text_config=BASE | text, vision_config=vision, tie_word_embeddings=False
        )
        model: PreTrainedModel = getattr(transformers, f"{name}ForConditionalGeneration")(config)
        return model

    return make


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _plain("Llama"),
    "llama_tied": _plain("Llama", tie_word_embeddings=True),
    "qwen3": _plain("Qwen3", head_dim=8),
    "qwen3_moe": _plain("Qwen3Moe", head_dim=8, **EXPERTS),
    "mistral": _plain("Mistral", sliding_window=WINDOW),
    "gemma2": _plain(
        "Gemma2",
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=ALTERNATING,
        final_logit_softcapping=2.0,
        tie_word_embeddings=True,
    ),
    "gemma3": _plain(
        "Gemma3Text",
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=ALTERNATING,
        tie_word_embeddings=True,
    ),
    "gpt_oss": _plain(
        "GptOss",
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        layer_types=ALTERNATING,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "phi3": _plain("Phi3", original_max_position_embeddings=SHORT, rope_parameters=LONG_ROPE),
    "qwen2_5_vl": _multimodal(
        "Qwen2_5_VL",
        {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": HIDDEN}
        | {"intermediate_size": 32, "fullatt_block_indexes": [0]},
        rope_parameters=MROPE,
    ),
    "qwen3_vl": _multimodal(
        "Qwen3VL",
        {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": HIDDEN}
        | {"intermediate_size": 32, "deepstack_visual_indexes": [0]},
        head_dim=8,
        rope_parameters=MROPE,
    ),
    "gemma3_multimodal": _multimodal(
        "Gemma3",
        {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"intermediate_size": 32, "image_size": 28, "patch_size": 14},
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=ALTERNATING,
    ),
    "gpt_neox": _plain("GPTNeoX"),
    "phi": _plain("Phi"),
    "stablelm": _plain("StableLm"),
    "cohere": _plain("Cohere", logit_scale=0.25),
    "granite": _plain("Granite", logits_scaling=3.0, embedding_multiplier=2.0),
    "nanochat": _plain("NanoChat", final_logit_softcapping=3.0),
    "gemma4": _plain(
        "Gemma4Text",
        head_dim=8,
        global_head_dim=8,
        sliding_window=WINDOW,
        layer_types=ALTERNATING,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
    ),
    "deepseek_v3": _plain(
        "DeepseekV3",
        num_key_value_heads=4,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
}


def make(name: str, seed: int = 0) -> Any:
    """The model of that name, with weights large enough that its tokens and layers differ."""
    torch.manual_seed(seed)
    model: Any = MODELS[name]()  # transformers' methods have no types
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:  # else all weights of norms are alike, and none matters
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.tie_weights()
    return model.eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, none of them padding, begin or end."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
