"""HASS's record: EAGLE-1's draft, trained in harmony with how it is used (Zhang et al., 2024)."""

import functools

from speculators.configs.model_config import HassSpeculatorConfig
from speculators.models.algorithm import AlgorithmSpec, HiddenStates, register_algorithm
from speculators.models.eagle.algorithm import new_eagle_config
from speculators.models.eagle.model import EagleSpeculator
from speculators.models.hass.objective import SETTINGS
from speculators.models.objective import StepwiseObjective

HASS = register_algorithm(
    AlgorithmSpec(
        name="hass",
        config_class=HassSpeculatorConfig,
        model_class=EagleSpeculator,
        hidden_states=HiddenStates.LAST_NORMED,
        new_config=functools.partial(new_eagle_config, HassSpeculatorConfig),
        objective=StepwiseObjective,
        objective_settings=SETTINGS,
        vllm_method="eagle",
    )
)
