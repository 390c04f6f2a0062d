"""The draft of EAGLE-1, EAGLE-2 and HASS on vLLM's parallel layers.

vLLM has an EAGLE-1 of its own, for the files of the paper's authors: it has no norms and no bias in
the fusion, and knows Llama layers alone. This one reads our directories as they are and computes
what ``speculators.models.eagle`` does. Its modules have the names of the format, so that the file's
tensors find their places without a table.

vLLM gives row t the token t + 1, the verifier's state of token t after its final norm, and position
t, and each further step the token just drafted and the row's own state at the next position.
Embedding and head are the verifier's; vLLM puts them in once both models are loaded.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_pp_group
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.models.interfaces import LocalArgmaxMixin
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    get_draft_quant_config,
    maybe_prefix,
)

from speculators.configs.model_config import SpeculatorModelConfig
from speculators.integrations.vllm.plugin.speculator_types import METHOD, OWN_CONFIG
from speculators.integrations.vllm.plugin.strict_weights import StrictWeights, expected_shapes


class _LlamaLayer(LlamaDecoderLayer):  # type: ignore[misc]  # vLLM may be absent
    def get_quant_config(self, vllm_config: VllmConfig) -> Any:
        """The draft's, where vLLM's own layer takes the verifier's."""
        return get_draft_quant_config(vllm_config)


def _llama_layer(vllm_config: VllmConfig, config: Any, prefix: str) -> nn.Module:
    layer: nn.Module = _LlamaLayer(vllm_config, prefix=prefix, config=config)
    return layer


def _qwen3_layer(vllm_config: VllmConfig, config: Any, prefix: str) -> nn.Module:
    slides = (getattr(config, "layer_types", None) or [None])[0] == "sliding_attention"
    layer: nn.Module = Qwen3DecoderLayer(
        config=config,
        cache_config=vllm_config.cache_config,
        quant_config=get_draft_quant_config(vllm_config),
        prefix=prefix,
        per_layer_sliding_window=config.sliding_window if slides else None,
    )
    return layer


LAYERS = {"llama": _llama_layer, "qwen3": _qwen3_layer}


class _Borrowed(nn.Module):
    """Where vLLM puts the verifier's embedding; it takes no memory until then.

    Args:
        vocab_size: V.
        hidden_size: H; vLLM compares it with the verifier's.
    """

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = torch.empty(vocab_size, hidden_size, device="meta")

    def forward(self, input_ids: Tensor) -> Tensor:
        """Is not called once vLLM has put in the embedding."""
        raise RuntimeError(
            f"the draft has no embedding for {input_ids.numel()} tokens: vLLM did not put in the "
            "verifier's; expected a verifier with model.embed_tokens"
        )


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "hidden_states": 0})
class EagleDraft(nn.Module):
    """The draft without a head.

    Args:
        vllm_config: the verifier's, with the draft's in it.
        prefix: of the names of its layers.
    """

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.speculative_config.draft_model_config.hf_config
        own = SpeculatorModelConfig.from_dict(getattr(config, OWN_CONFIG))
        width = config.hidden_size
        self.embed_tokens: nn.Module = _Borrowed(config.vocab_size, width)
        self.fusion_fc = ReplicatedLinear(
            2 * width,
            width,
            bias=own.fusion_bias,
            params_dtype=vllm_config.model_config.dtype,
            quant_config=get_draft_quant_config(vllm_config),
            prefix=maybe_prefix(prefix, "fusion_fc"),
            return_bias=False,
        )
        # vLLM numbers the layers of both models through.
        number = vllm_config.model_config.get_total_num_hidden_layers()
        config.target_layer_count = number
        layer_type = own.transformer_layer_config.model_type
        self.transformer = LAYERS[layer_type](
            vllm_config, config, maybe_prefix(prefix, f"layers.{number}")
        )
        self.embedding_layernorm: nn.Module = nn.Identity()
        self.pre_lm_head_layernorm: nn.Module = nn.Identity()
        if own.layernorms:
            self.embedding_layernorm = RMSNorm(width, eps=config.rms_norm_eps)
            self.pre_lm_head_layernorm = RMSNorm(width, eps=config.rms_norm_eps)
        else:
            self.transformer.input_layernorm = nn.Identity()

    def forward(
        self, input_ids: Tensor, positions: Tensor, hidden_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One step of T rows; see :meth:`SpeculatorsEagleForCausalLM.forward`."""
        embeddings = self.embedding_layernorm(self.embed_tokens(input_ids))
        fused = self.fusion_fc(torch.cat([embeddings, hidden_states], -1))
        output, residual = self.transformer(positions, fused, None)
        states = output + residual
        return self.pre_lm_head_layernorm(states), states


class SpeculatorsEagleForCausalLM(LocalArgmaxMixin, nn.Module):  # type: ignore[misc]
    """The draft as vLLM's proposer calls it.

    Args:
        vllm_config: the verifier's, with the draft's in it.
        prefix: of the names of its layers.

    Raises:
        ValueError: vLLM shall run the draft by another method, the verifier's sizes are not those
            that the draft was made for, or it runs as a pipeline, whose stages vLLM gives no
            embedding of another.
    """

    # By these vLLM knows that it must put in the verifier's.
    has_own_embed_tokens = False
    has_own_lm_head = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        draft = vllm_config.speculative_config.draft_model_config
        self.config = draft.hf_config
        _check_fit(self.config, vllm_config)
        self._source = str(draft.model)
        self.model = EagleDraft(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.logits_processor = LogitsProcessor(self.config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """The verifier's embedding of int64 ``[T]``."""
        embeddings: Tensor = self.model.embed_tokens(input_ids)
        return embeddings

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        hidden_states: Tensor,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One step of T rows.

        Args:
            input_ids: ``[T]``, of row t the token t + 1.
            positions: ``[T]`` (or ``[3, T]`` for several dimensions): t, one more in each step.
            hidden_states: ``[T, H]``, the verifier's after its final norm, or the step before's.
            inputs_embeds: must be None.

        Returns:
            ``[T, H]`` twice: what the head takes, and what the next step takes.
        """
        if inputs_embeds is not None:
            raise NotImplementedError("the draft reads tokens; expected inputs_embeds=None")
        output: tuple[Tensor, Tensor] = self.model(input_ids, positions, hidden_states)
        return output

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The verifier's head on ``[T, H]``: ``[T, V]``."""
        # Some verifiers of vLLM's that tie their head to the embedding have no lm_head.
        head = getattr(self, "lm_head", None) or self.model.embed_tokens
        logits: Tensor | None = self.logits_processor(head, hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads a draft's file.

        Args:
            weights: its tensors, by the format's names.

        Returns:
            The parameters that were loaded: all of them.

        Raises:
            CheckpointError: tensors are missing, unexpected or of another shape; all are named.
        """
        own = SpeculatorModelConfig.from_dict(getattr(self.config, OWN_CONFIG))
        expected = expected_shapes(own)
        mapper = EagleDraft.hf_to_vllm_mapper
        strict = StrictWeights(expected, self._source)
        loaded: set[str] = AutoWeightsLoader(self.model).load_weights(
            strict.checked(weights), mapper=mapper
        )
        strict.finish({name: mapper.map_name(name) for name in expected}, loaded)
        return {f"model.{name}" for name in loaded}


def _check_fit(config: Any, vllm_config: VllmConfig) -> None:
    method = vllm_config.speculative_config.method
    if method != METHOD:  # what vLLM takes where nobody names one
        raise ValueError(
            f"the draft is to be run by the method {method!r}; expected "
            f'"method": "{METHOD}" in the speculative configuration'
        )
    verifier = vllm_config.model_config
    found = (config.vocab_size, config.hidden_size)
    expected = (verifier.get_vocab_size(), verifier.get_hidden_size())
    if found != expected:
        raise ValueError(
            f"the draft was made for a verifier of {list(found)} (vocabulary, hidden size), and "
            f"the verifier has {list(expected)}; give the verifier that the draft belongs to"
        )
    if get_pp_group().world_size > 1:
        raise ValueError(
            f"the verifier runs as a pipeline of {get_pp_group().world_size} stages; expected "
            "pipeline_parallel_size=1, as the draft takes embedding and head from the verifier"
        )
