"""HASS: EAGLE-1's architecture, trained in harmony with how it drafts."""

from speculators.configs.model_config import HassSpeculatorConfig
from speculators.configs.schemas import HassSchema
from speculators.models.hass.algorithm import HASS

__all__ = ["HASS", "HassSchema", "HassSpeculatorConfig"]
