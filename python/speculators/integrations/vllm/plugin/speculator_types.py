"""The types ``eagle`` and ``hass`` in terms of vLLM's configuration.

vLLM has a table from ``speculators_model_type`` to a function that turns a draft's ``config.json``
into the configuration of a model, and drafts HASS as it drafts EAGLE-1. The draft's own
configuration goes along as it is, because our model class reads it.
"""

import copy
from typing import Any

from speculators.integrations.vllm.plugin.internals import check_parameters, find, find_function

TYPES = ("eagle", "hass")
# What vLLM calls our model class, and where it finds it.
ARCHITECTURE = "SpeculatorsEagleForCausalLM"
MODEL_CLASS = "speculators.integrations.vllm.plugin.eagle_model:SpeculatorsEagleForCausalLM"
# The attribute of vLLM's configuration that has the draft's own, as read from its file.
OWN_CONFIG = "speculators_own_config"
# vLLM's name for EAGLE-1's way of drafting.
METHOD = "eagle"

_ALGOS = "vllm.transformers_utils.configs.speculators.algos"
_CONFIG_CLASS = "vllm.transformers_utils.configs.speculators.base:SpeculatorsConfig"
_OUR_MARK = "speculators_plugin"
_REGISTER = ["model_arch", "model_cls"]


def install() -> None:
    """Makes vLLM know the types, and the model class behind them.

    A type that vLLM knows by itself is left to it.

    Raises:
        UnknownInternalsError: vLLM is not as it was tested; nothing has been changed.
    """
    types = find(f"{_ALGOS}:SUPPORTED_SPECULATORS_TYPES")
    check_parameters("vLLM's eagle3", types.get("eagle3"), ["config_dict", "pre_trained_config"])
    config_class = find(_CONFIG_CLASS)
    build = find_function(f"{_CONFIG_CLASS}.build_vllm_speculative_config", ["config_dict"])
    models = find("vllm:ModelRegistry")
    check_parameters("ModelRegistry.register_model", models.register_model, _REGISTER)

    # First what may yet fail, so that nothing is left half done.
    if ARCHITECTURE not in models.get_supported_archs():
        models.register_model(ARCHITECTURE, MODEL_CLASS)
    ours = [name for name in TYPES if types.get(name, update_config) is update_config]
    types.update(dict.fromkeys(ours, update_config))
    if not hasattr(build, _OUR_MARK):
        config_class.build_vllm_speculative_config = classmethod(_with_method(build))


def update_config(config_dict: dict[str, Any], pre_trained_config: dict[str, Any]) -> None:
    """Makes the configuration of our model class.

    Args:
        config_dict: a draft's ``config.json``.
        pre_trained_config: its ``transformer_layer_config``, to be changed in place.

    Raises:
        ConfigError: the file is not valid; all that is wrong is named.
    """
    from transformers import PretrainedConfig

    from speculators.configs.model_config import SpeculatorModelConfig

    own = copy.deepcopy(config_dict)
    layer = SpeculatorModelConfig.from_dict(own).transformer_layer_config
    common = PretrainedConfig().to_dict()
    for key, value in layer.to_dict().items():
        # vLLM has no defaults for what an older file leaves out.
        if key not in common or value != common[key]:
            pre_trained_config.setdefault(key, value)
    pre_trained_config["architectures"] = [ARCHITECTURE]
    pre_trained_config[OWN_CONFIG] = own


def _with_method(build: Any) -> Any:
    """VLLM's function, but that our types draft by the method ``eagle``."""

    def build_vllm_speculative_config(cls: type, config_dict: dict[str, Any]) -> dict[str, Any]:
        del cls  # what is wrapped is bound already
        result: dict[str, Any] = build(config_dict=config_dict)
        if config_dict.get("speculators_model_type") in TYPES:
            result["method"] = METHOD
        return result

    setattr(build_vllm_speculative_config, _OUR_MARK, True)
    return build_vllm_speculative_config
