"""Where a causal language model of transformers keeps its layers, its final norm and its head.

Nothing here lists models. Layers and norm go by a handful of attribute names, and a model that has
none of them, or more than one, is refused. What a model does to its logits AFTER the head is
written in its forward only, so the configuration fields that stand for it are listed with the
families that give them a meaning: Granite divides by ``logits_scaling``, HyperCLOVA X multiplies.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn, tanh
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

LAYER_NAMES = ("layers", "h", "blocks")
NORM_NAMES = (
    "norm",
    "final_layernorm",
    "final_layer_norm",
    "ln_f",
    "norm_f",
    "final_norm",
    "embedding_norm",
)

# Families (the start of model_type) in which a field multiplies or divides the logits.
_MULTIPLIERS: dict[str, tuple[str, ...]] = {
    "logit_scale": ("cohere",),
    "logits_scaling": ("hyperclovax",),
    "output_multiplier": ("muse_glimmer",),
    "lm_head_multiplier": ("falcon_h1",),
}
_DIVISORS: dict[str, tuple[str, ...]] = {"logits_scaling": ("granite", "minicpm3")}
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
_REFUSED = ("unpadded_vocab_size",)  # logits that are cut after the head


class UnsupportedVerifierError(ValueError):
    """The model is of a kind that cannot serve as a verifier; the message says why."""


@dataclasses.dataclass(frozen=True)
class LogitTransform:
    """What happens to the logits after the head: ``cap * tanh(multiplier * x / divisor / cap)``.

    The multiplier and the divisor are two, so that the arithmetic is the model's to the last bit.
    """

    multiplier: float = 1.0
    divisor: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Applies it to logits of any shape and dtype; both are kept."""
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        if self.divisor != 1.0:
            logits = logits / self.divisor
        if self.softcap is not None:
            logits = tanh(logits / self.softcap) * self.softcap
        return logits


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The parts of a model that this package touches; ``config`` is the text part's."""

    config: PreTrainedConfig
    decoder: nn.Module
    layers: nn.ModuleList
    final_norm: nn.Module
    lm_head: nn.Module
    logit_transform: LogitTransform


def find_architecture(model: PreTrainedModel) -> Architecture:
    """Finds the parts of a causal language model, or of a multimodal model's text part.

    Raises:
        UnsupportedVerifierError: a part is missing, ambiguous or of an unknown kind.
    """
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedVerifierError(
            f"{name} is an encoder-decoder model; expected a decoder-only language model"
        )
    bidirectional = getattr(config, "use_bidirectional_attention", None) is True
    if bidirectional or not getattr(config, "is_causal", True):
        raise UnsupportedVerifierError(
            f"{name} attends in both directions; expected a causal language model"
        )
    lm_head = model.get_output_embeddings()
    if lm_head is None:
        raise UnsupportedVerifierError(
            f"{name} has no output head; expected a class such as LlamaForCausalLM or "
            "Qwen3VLForConditionalGeneration"
        )
    decoder = model.get_decoder()
    inner = getattr(decoder, "model", None)
    if decoder is model and isinstance(inner, nn.Module):
        decoder = inner  # get_decoder found none and returned the model (Llama4ForCausalLM)
    layers = _the_one(decoder, LAYER_NAMES, "a list of decoder layers")
    if not isinstance(layers, nn.ModuleList) or len(layers) != config.num_hidden_layers:
        raise UnsupportedVerifierError(
            f"{type(decoder).__name__} holds its layers as {type(layers).__name__}; expected a "
            f"ModuleList of the configuration's {config.num_hidden_layers} layers"
        )
    final_norm = _the_one(decoder, NORM_NAMES, "a final norm")
    kind = type(final_norm).__name__
    if not any(known in kind.lower() for known in ("rmsnorm", "layernorm")):
        raise UnsupportedVerifierError(
            f"the final norm of {type(decoder).__name__} is a {kind}; expected an RMSNorm "
            "(the 1 + w kind included) or a LayerNorm"
        )
    return Architecture(config, decoder, layers, final_norm, lm_head, logit_transform(config))


def logit_transform(config: PreTrainedConfig) -> LogitTransform:
    """What a model of this text configuration does to its logits after the head.

    Raises:
        UnsupportedVerifierError: a field changes the logits in a way unknown for this model type.
    """

    def factor(rules: dict[str, tuple[str, ...]]) -> float:
        factors = [
            float(getattr(config, field))
            for field, families in rules.items()
            if getattr(config, field, None) is not None and config.model_type.startswith(families)
        ]
        return factors[0] if factors else 1.0

    for field in {*_MULTIPLIERS, *_DIVISORS, *_REFUSED}:
        families = _MULTIPLIERS.get(field, ()) + _DIVISORS.get(field, ())
        value = getattr(config, field, None)
        if value not in {None, 1} and not config.model_type.startswith(families):
            raise UnsupportedVerifierError(
                f"model type {config.model_type!r} has {field} = {value!r} in its configuration; "
                f"what it does to the logits is known for {', '.join(families) or 'no model'} only"
            )
    caps = [getattr(config, field, None) for field in _SOFTCAPS]
    softcap = next((float(cap) for cap in caps if cap is not None), None)
    return LogitTransform(factor(_MULTIPLIERS), factor(_DIVISORS), softcap)


def rotary_length(config: PreTrainedConfig) -> tuple[int, bool] | None:
    """Up to how many positions a pass may reach without other rotary embeddings for all of them.

    ``longrope`` (Phi-3) has two sets of frequencies, for passes up to a length and for longer ones;
    those of ``dynamic`` go on changing with the length beyond it.

    Args:
        config: the text configuration.

    Returns:
        The length, and whether one set serves everything beyond; None where nothing changes.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    found = []
    for kind in (parameters, *parameters.values()):  # one for all layers, or one for each type
        name = kind.get("rope_type") if isinstance(kind, Mapping) else None
        if name == "longrope":
            found.append((int(kind["original_max_position_embeddings"]), True))
        elif name == "dynamic":
            found.append((int(config.max_position_embeddings), False))
    return min(found, default=None)


def default_aux_layer_ids(num_layers: int) -> tuple[int, int, int]:
    """The residual streams that a draft reads unless told otherwise: early, middle, late.

    ``(2, n // 2, n - 3)``, as EAGLE-3's reference code has it, for n >= 7 layers. Below that these
    would repeat, so models of 4 to 6 layers get ``(1, n // 2, n - 1)``. Always sorted and distinct.

    Raises:
        ValueError: there are fewer than 4 layers.
    """
    if num_layers < 4:
        raise ValueError(
            f"a verifier of {num_layers} layers has no default auxiliary layers (4 are needed); "
            "give their ids, from 0 (the embedding) to the number of layers"
        )
    if num_layers < 7:
        return (1, num_layers // 2, num_layers - 1)
    return (2, num_layers // 2, num_layers - 3)


def auto_class(config: PreTrainedConfig) -> Any:
    """The Auto class of transformers that loads this configuration with a language-model head.

    Raises:
        UnsupportedVerifierError: there is none.
    """
    auto_map = getattr(config, "auto_map", None) or {}
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in auto_map:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise UnsupportedVerifierError(
        f"{type(config).__name__} (model type {config.model_type!r}) has no causal language model "
        "in this version of transformers; expected a decoder-only or image-text-to-text model"
    )


def _the_one(module: nn.Module, names: tuple[str, ...], what: str) -> nn.Module:
    found = [name for name in names if isinstance(getattr(module, name, None), nn.Module)]
    if len(found) != 1:
        raise UnsupportedVerifierError(
            f"{type(module).__name__} has {' and '.join(found) or 'nothing'} where {what} was "
            f"expected; supported are models with exactly one of {', '.join(names)}"
        )
    part = getattr(module, found[0])
    assert isinstance(part, nn.Module)  # noqa: S101 - for the type checker
    return part
