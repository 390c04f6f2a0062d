"""Speculators: draft models that make LLM inference faster without changing its output.

This module is a lazy facade: it imports nothing until a name is asked for, torch included, so that
``import speculators`` and ``speculators --help`` answer at once. All it does is to arrange that
transformers' ``AutoConfig`` knows our configurations once both are imported.
"""

from typing import TYPE_CHECKING

from speculators import auto_registration
from speculators.lazy_facade import lazy_facade
from speculators.version import __version__

if TYPE_CHECKING:  # for editors and type checkers, which do not run __getattr__
    from speculators.configs.errors import ConfigError as ConfigError
    from speculators.configs.model_config import Eagle3SpeculatorConfig as Eagle3SpeculatorConfig
    from speculators.configs.model_config import EagleSpeculatorConfig as EagleSpeculatorConfig
    from speculators.configs.model_config import HassSpeculatorConfig as HassSpeculatorConfig
    from speculators.configs.model_config import SpeculatorModelConfig as SpeculatorModelConfig
    from speculators.configs.proposals import (
        DynamicTreeTokenProposalConfig as DynamicTreeTokenProposalConfig,
    )
    from speculators.configs.proposals import GreedyTokenProposalConfig as GreedyTokenProposalConfig
    from speculators.configs.proposals import (
        SamplingTokenProposalConfig as SamplingTokenProposalConfig,
    )
    from speculators.configs.proposals import (
        StaticTreeTokenProposalConfig as StaticTreeTokenProposalConfig,
    )
    from speculators.configs.proposals import TokenProposalConfig as TokenProposalConfig
    from speculators.configs.speculators_config import SpeculatorsConfig as SpeculatorsConfig
    from speculators.configs.speculators_config import VerifierConfig as VerifierConfig
    from speculators.models.speculator_model import SpeculatorModel as SpeculatorModel

# Public name -> the module that defines it.
_DEFINED_IN = {
    "ConfigError": "speculators.configs.errors",
    "DynamicTreeTokenProposalConfig": "speculators.configs.proposals",
    "Eagle3SpeculatorConfig": "speculators.configs.model_config",
    "EagleSpeculatorConfig": "speculators.configs.model_config",
    "GreedyTokenProposalConfig": "speculators.configs.proposals",
    "HassSpeculatorConfig": "speculators.configs.model_config",
    "SamplingTokenProposalConfig": "speculators.configs.proposals",
    "SpeculatorModel": "speculators.models.speculator_model",
    "SpeculatorModelConfig": "speculators.configs.model_config",
    "SpeculatorsConfig": "speculators.configs.speculators_config",
    "StaticTreeTokenProposalConfig": "speculators.configs.proposals",
    "TokenProposalConfig": "speculators.configs.proposals",
    "VerifierConfig": "speculators.configs.speculators_config",
}
_SUBPACKAGES = ("configs", "models", "ops", "proposals")

__all__ = ["__version__", *_DEFINED_IN, *_SUBPACKAGES]  # noqa: PLE0604 - all of them are strings

auto_registration.install()

__getattr__, __dir__ = lazy_facade(__name__, _DEFINED_IN, _SUBPACKAGES)
