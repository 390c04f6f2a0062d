"""The decoder layers of drafts: transformers' own, by the model type of the draft's configuration.

A draft's layer is a Llama or Qwen3 layer whatever the verifier is, because these are the drafts
that servers know. It works with the verifier's rotary embedding and at the verifier's width.
"""

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)

from speculators.configs.errors import ConfigError
from speculators.models.draft_attention import ATTENTION, DraftAttention


@dataclasses.dataclass(frozen=True)
class DecoderKind:
    """The parts that decoders of one model type are made of."""

    config: type[PreTrainedConfig]
    layer: type[nn.Module]
    norm: type[nn.Module]
    rotary_embedding: type[nn.Module]


KINDS = {
    "llama": DecoderKind(LlamaConfig, LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding),
    "qwen3": DecoderKind(Qwen3Config, Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding),
}

# Keys of a verifier's RoPE that mean something to text alone, at the whole of a head's width.
_ROPE_OF_OTHERS = ("mrope_section", "mrope_interleaved", "partial_rotary_factor")


class DecoderParts:
    """Makes the parts of one draft.

    Args:
        layer_config: the draft's ``transformer_layer_config``; it is copied.

    Raises:
        ConfigError: there are no draft layers of this model type.
    """

    def __init__(self, layer_config: PreTrainedConfig) -> None:
        self._kind = _kind(layer_config.model_type)
        self.config = copy.deepcopy(layer_config)
        self.config._attn_implementation = ATTENTION  # noqa: SLF001 - transformers' way to say it

    @property
    def layer_class(self) -> str:
        """The name of the layers' class, such as ``"LlamaDecoderLayer"``."""
        return self._kind.layer.__name__

    def layer(self, index: int) -> nn.Module:
        """A decoder layer at normal width."""
        return self._kind.layer(self.config, index)

    def norm(self, width: int | None = None) -> nn.Module:
        """An RMS norm, H wide unless told otherwise."""
        return self._kind.norm(width or self.config.hidden_size, eps=self.config.rms_norm_eps)

    def rotary_embedding(self) -> nn.Module:
        """From states and positions to ``(cos, sin)``; never on the meta device, as it has data."""
        with torch.device("cpu"):
            return self._kind.rotary_embedding(self.config)


def run_layer(
    layer: nn.Module,
    states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention: DraftAttention,
) -> Tensor:
    """Runs a decoder layer of ours or of transformers with the draft's attention.

    Args:
        layer: of :meth:`DecoderParts.layer`, or one that takes the same arguments.
        states: ``[B, R, H]``, or wider where the layer takes it.
        position_embeddings: cosine and sine of the rows' positions.
        attention: of this batch.

    Returns:
        ``[B, R, H]``.
    """
    output: Tensor = layer(
        states,
        attention_mask=None,
        position_embeddings=position_embeddings,
        draft_attention=attention,
    )
    return output


def draft_layer_config(
    verifier: PreTrainedConfig, *, model_type: str = "llama", num_layers: int = 1, **changes: Any
) -> PreTrainedConfig:
    """The configuration of a draft's decoder that fits a verifier.

    Width, heads, rotary embedding (its scaling included) and vocabulary are the verifier's.

    Args:
        verifier: the verifier's configuration; of a multimodal model, the text part counts.
        model_type: ``"llama"`` or ``"qwen3"``.
        num_layers: decoder layers of the draft.
        **changes: any field of the layers' configuration.

    Raises:
        ConfigError: there are no draft layers of this model type.
    """
    text = verifier.get_text_config(decoder=True)
    heads = text.num_attention_heads
    fields: dict[str, Any] = {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "rms_norm_eps": getattr(text, "rms_norm_eps", 1e-6),
        "max_position_embeddings": text.max_position_embeddings,
        "rope_parameters": _rope_parameters(text),
        "initializer_range": getattr(text, "initializer_range", 0.02),
        "tie_word_embeddings": False,
    }
    return _kind(model_type).config(**(fields | changes))


def _rope_parameters(text: PreTrainedConfig) -> dict[str, Any]:
    found = dict(getattr(text, "rope_parameters", None) or {})
    if found and all(isinstance(value, dict) for value in found.values()):
        # One set per type of layer (Gemma 3): a draft attends to everything.
        found = dict(found.get("full_attention") or next(iter(found.values())))
    kept = {key: value for key, value in found.items() if key not in _ROPE_OF_OTHERS}
    return {"rope_type": "default", "rope_theta": 10000.0, **kept}


def _kind(model_type: str) -> DecoderKind:
    kind = KINDS.get(model_type)
    if kind is None:
        raise ConfigError(
            f"transformer_layer_config.model_type: found {model_type!r}; expected one of "
            f"{', '.join(KINDS)}, the layers that drafts are made of"
        )
    return kind
