"""``AlgorithmSpec``: the one record per algorithm, and the list of all of them.

Whoever trains, decodes, converts or serves a draft reads what it needs from this record; nobody
asks for an algorithm by name. To add one is to write a folder (configuration, model, objective) and
register its record, from inside this package or from outside.
"""

import dataclasses
import enum
import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from speculators.configs.errors import ConfigError
from speculators.configs.model_config import (
    ENTRY_POINTS,
    SpeculatorModelConfig,
    register_config,
)
from speculators.models.verifier.head import VerifierHead

if TYPE_CHECKING:
    from speculators.models.objective import ObjectiveSettings, StepwiseObjective
    from speculators.models.speculator_model import SpeculatorModel

# The algorithms of this package, imported when asked for.
_BUILT_IN = {
    "eagle": "speculators.models.eagle.algorithm",
    "eagle3": "speculators.models.eagle3.algorithm",
    "hass": "speculators.models.hass.algorithm",
}
_REGISTERED: dict[str, "AlgorithmSpec"] = {}


class HiddenStates(enum.Enum):
    """Which states of the verifier a draft reads."""

    LAST_NORMED = "last_normed"  # after the final norm
    LAST = "last"  # the last residual stream, before the final norm
    AUXILIARY = "auxiliary"  # residual streams that the draft's configuration names, side by side


@dataclasses.dataclass(frozen=True)
class AlgorithmSpec:
    """What the rest of the library must know about an algorithm.

    Attributes:
        name: the ``speculators_model_type`` of its configuration, and its name in commands.
        config_class: its configuration.
        model_class: its draft model.
        hidden_states: which states of the verifier it reads.
        new_config: makes a configuration for a verifier: called with the verifier's configuration,
            its name, and the algorithm's own options as keyword arguments.
        objective: what it is trained with: called with the draft, the verifier's head and settings.
        objective_settings: of the objective, unless told otherwise.
        drafting: how it drafts: ``"chain"``, one token after another, each from the state before.
        vllm_method: what vLLM calls its way of drafting; None where vLLM has none.
    """

    name: str
    config_class: type[SpeculatorModelConfig]
    model_class: "type[SpeculatorModel]"
    hidden_states: HiddenStates
    new_config: Callable[..., SpeculatorModelConfig]
    objective: "Callable[[SpeculatorModel, VerifierHead, ObjectiveSettings], StepwiseObjective]"
    objective_settings: "ObjectiveSettings"
    drafting: str = "chain"
    vllm_method: str | None = None

    def capture_layers(self, config: SpeculatorModelConfig, num_layers: int) -> tuple[int, ...]:
        """The residual streams of the verifier that the draft reads.

        Args:
            config: the draft's.
            num_layers: of the verifier.

        Raises:
            ConfigError: the configuration names none, or one that the verifier does not have.
        """
        if self.hidden_states is not HiddenStates.AUXILIARY:
            return (num_layers,)
        ids = config.aux_layer_ids
        if not ids or max(ids) > num_layers:
            raise ConfigError(
                f"the auxiliary layers of the draft are {ids}; expected numbers from 0 to "
                f"{num_layers}, the verifier's layers"
            )
        return tuple(ids)

    def draft_input(
        self, streams: Mapping[int, Tensor], head: VerifierHead, config: SpeculatorModelConfig
    ) -> Tensor:
        """What the draft reads, made from the verifier's residual streams.

        Args:
            streams: residual stream id to ``[..., H]``; those of :meth:`capture_layers`.
            head: the verifier's.
            config: the draft's.

        Returns:
            ``[..., n H]``: n streams side by side, or one of them.
        """
        if self.hidden_states is HiddenStates.AUXILIARY:
            return torch.cat([streams[layer] for layer in config.aux_layer_ids or ()], -1)
        last = streams[max(streams)]
        return head.norm(last) if self.hidden_states is HiddenStates.LAST_NORMED else last


def register_algorithm(spec: AlgorithmSpec) -> AlgorithmSpec:
    """Makes an algorithm known, and its configuration with it.

    Raises:
        ValueError: another algorithm has the name, or the configuration's type is not the name.
    """
    found = spec.config_class.speculators_model_type_name()
    if found != spec.name:
        raise ValueError(
            f"the algorithm {spec.name!r} has a configuration of type {found!r}; expected the same"
        )
    known = _REGISTERED.setdefault(spec.name, spec)
    if known is not spec:
        raise ValueError(
            f"the algorithm {spec.name!r} is registered already, by {known.model_class.__module__}"
        )
    register_config(spec.config_class)
    return spec


def find_algorithm(name: str) -> AlgorithmSpec:
    """The record of an algorithm.

    Raises:
        ValueError: there is none of this name; the message lists all.
    """
    if name not in _REGISTERED and name in _BUILT_IN:
        importlib.import_module(_BUILT_IN[name])
    if name not in _REGISTERED:
        for entry in importlib.metadata.entry_points(group=ENTRY_POINTS, name=name):
            register_algorithm(entry.load())
    if name not in _REGISTERED:
        raise ValueError(
            f"there is no algorithm {name!r}; expected one of {', '.join(algorithm_names())}. One "
            "from outside must be registered first: speculators.models.register_algorithm, or the "
            f"entry point group {ENTRY_POINTS!r}"
        )
    return _REGISTERED[name]


def algorithm_names() -> list[str]:
    """All names that :func:`find_algorithm` knows, sorted."""
    entries: Any = importlib.metadata.entry_points(group=ENTRY_POINTS)
    return sorted({*_BUILT_IN, *_REGISTERED, *(entry.name for entry in entries)})
