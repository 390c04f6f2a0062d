"""EAGLE-1 and EAGLE-2: one decoder layer over a token's embedding and the verifier's state."""

from speculators.configs.model_config import EagleSpeculatorConfig
from speculators.configs.schemas import EagleSchema
from speculators.models.eagle.algorithm import EAGLE
from speculators.models.eagle.model import EagleSpeculator

__all__ = ["EAGLE", "EagleSchema", "EagleSpeculator", "EagleSpeculatorConfig"]
