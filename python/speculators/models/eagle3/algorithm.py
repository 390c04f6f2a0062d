"""EAGLE-3's record, and how a draft is configured for a verifier."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from speculators.configs.model_config import Eagle3SpeculatorConfig
from speculators.models.algorithm import AlgorithmSpec, HiddenStates, register_algorithm
from speculators.models.decoder import draft_layer_config
from speculators.models.eagle3.model import Eagle3DraftModel
from speculators.models.eagle3.objective import SETTINGS
from speculators.models.new_config import speculators_config
from speculators.models.objective import StepwiseObjective
from speculators.models.verifier.architecture import default_aux_layer_ids


def new_eagle3_config(
    verifier: PreTrainedConfig,
    name_or_path: str | None = None,
    *,
    speculative_tokens: int = 5,
    aux_layer_ids: Sequence[int] | None = None,
    draft_vocab_size: int | None = None,
    num_layers: int = 1,
    layer_type: str = "llama",
    intermediate_size: int | None = None,
    norm_before_residual: bool = False,
    norm_before_fc: bool = False,
    fc_norm: bool = False,
    norm_output: bool = False,
    embed_requires_grad: bool = False,
) -> Eagle3SpeculatorConfig:
    """The configuration of an EAGLE-3 draft for a verifier.

    Args:
        verifier: the verifier's configuration.
        name_or_path: where the verifier is.
        speculative_tokens: drafted before each verification.
        aux_layer_ids: residual streams that the draft reads, in any order; by default an early, a
            middle and a late one.
        draft_vocab_size: tokens that it can propose; by default 32,000, or all if there are fewer.
        num_layers: decoder layers.
        layer_type: of the decoder layers: ``"llama"`` or ``"qwen3"``.
        intermediate_size: of their MLP; by default the verifier's.
        norm_before_residual: whether the residual is the normed state.
        norm_before_fc: one norm over all streams before they are fused.
        fc_norm: one norm for each of them instead.
        norm_output: whether the next step takes the normed state.
        embed_requires_grad: whether the embedding is trained.

    Raises:
        ConfigError: an option is not valid.
        ValueError: the verifier has too few layers for a default.
    """
    text = verifier.get_text_config(decoder=True)
    ids = sorted(aux_layer_ids or default_aux_layer_ids(text.num_hidden_layers))
    # Servers that read Llama drafts take 3 streams unless the decoder's configuration says more.
    changes: dict[str, Any] = {} if len(ids) == 3 else {"num_aux_hidden_states": len(ids)}
    if intermediate_size is not None:
        changes["intermediate_size"] = intermediate_size
    return Eagle3SpeculatorConfig(
        transformer_layer_config=draft_layer_config(
            verifier, model_type=layer_type, num_layers=num_layers, **changes
        ),
        speculators_config=speculators_config("eagle3", verifier, name_or_path, speculative_tokens),
        draft_vocab_size=draft_vocab_size or min(32000, text.vocab_size),
        eagle_aux_hidden_state_layer_ids=ids,
        norm_before_residual=norm_before_residual,
        norm_before_fc=norm_before_fc,
        fc_norm=fc_norm,
        norm_output=norm_output,
        embed_requires_grad=embed_requires_grad,
    )


EAGLE3 = register_algorithm(
    AlgorithmSpec(
        name="eagle3",
        config_class=Eagle3SpeculatorConfig,
        model_class=Eagle3DraftModel,
        hidden_states=HiddenStates.AUXILIARY,
        new_config=new_eagle3_config,
        objective=StepwiseObjective,
        objective_settings=SETTINGS,
        vllm_method="eagle3",
    )
)
