"""EAGLE-3: a draft that reads several layers of the verifier, trained through its own steps."""

from speculators.configs.model_config import Eagle3SpeculatorConfig
from speculators.configs.schemas import Eagle3Schema
from speculators.models.eagle3.algorithm import EAGLE3
from speculators.models.eagle3.model import Eagle3DraftModel

__all__ = ["EAGLE3", "Eagle3DraftModel", "Eagle3Schema", "Eagle3SpeculatorConfig"]
