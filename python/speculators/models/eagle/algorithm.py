"""EAGLE-1's record, and how a draft of its architecture is configured for a verifier."""

import functools

from transformers import PreTrainedConfig

from speculators.configs.model_config import EagleSpeculatorConfig, SpeculatorModelConfig
from speculators.models.algorithm import AlgorithmSpec, HiddenStates, register_algorithm
from speculators.models.decoder import draft_layer_config
from speculators.models.eagle.model import EagleSpeculator
from speculators.models.eagle.objective import SETTINGS
from speculators.models.new_config import speculators_config
from speculators.models.objective import StepwiseObjective


def new_eagle_config(
    config_class: type[SpeculatorModelConfig],
    verifier: PreTrainedConfig,
    name_or_path: str | None = None,
    *,
    speculative_tokens: int = 5,
    layernorms: bool | None = None,
    fusion_bias: bool | None = None,
    layer_type: str = "llama",
    intermediate_size: int | None = None,
) -> SpeculatorModelConfig:
    """The configuration of a draft of EAGLE-1's architecture for a verifier.

    Args:
        config_class: the type.
        verifier: the verifier's configuration.
        name_or_path: where the verifier is.
        speculative_tokens: drafted before each verification.
        layernorms: norms on the embedding, on the fusion's output and before the head.
        fusion_bias: whether the fusion has a bias. None is the type's default, here and above.
        layer_type: of the decoder layer: ``"llama"`` or ``"qwen3"``.
        intermediate_size: of its MLP; by default the verifier's.
    """
    options = {"layernorms": layernorms, "fusion_bias": fusion_bias}
    changes = {} if intermediate_size is None else {"intermediate_size": intermediate_size}
    return config_class(
        transformer_layer_config=draft_layer_config(verifier, model_type=layer_type, **changes),
        speculators_config=speculators_config(
            config_class.speculators_model_type_name(), verifier, name_or_path, speculative_tokens
        ),
        **{key: value for key, value in options.items() if value is not None},
    )


EAGLE = register_algorithm(
    AlgorithmSpec(
        name="eagle",
        config_class=EagleSpeculatorConfig,
        model_class=EagleSpeculator,
        hidden_states=HiddenStates.LAST_NORMED,
        new_config=functools.partial(new_eagle_config, EagleSpeculatorConfig),
        objective=StepwiseObjective,
        objective_settings=SETTINGS,
        vllm_method="eagle",
    )
)
