"""Draft models, one folder per algorithm, and the verifier that they draft for.

====================  =============================================================================
``eagle``             EAGLE-1 and EAGLE-2: one decoder layer over embedding and verifier state
``hass``              HASS: EAGLE-1's architecture, trained in harmony with drafting
``eagle3``            EAGLE-3: a draft that reads several layers of the verifier
``verifier``          the large model: prefill, step, residual streams, and the head behind targets
``algorithm``         ``AlgorithmSpec``: the one record per algorithm
``speculator_model``  ``SpeculatorModel``: what all drafts share; reading and writing a directory
``decoder``           decoder layers, transformers' own
``draft_attention``   what a draft's rows see in training; ``draft_cache``: while drafting
``vocabulary``        which of the verifier's tokens a draft knows
``objective``         what a draft learns, and from which row
``weights``           tensors read safely and written whole; ``hub``, ``model_card`` go with it
====================  =============================================================================

To add an algorithm, write a folder like ``eagle`` and register its record; one from another package
does the same, or announces its record as an entry point of the group ``speculators.algorithms``.
"""

from typing import TYPE_CHECKING

from speculators.lazy_facade import lazy_facade

if TYPE_CHECKING:  # for editors and type checkers, which do not run __getattr__
    from speculators.models.algorithm import AlgorithmSpec as AlgorithmSpec
    from speculators.models.algorithm import HiddenStates as HiddenStates
    from speculators.models.algorithm import algorithm_names as algorithm_names
    from speculators.models.algorithm import find_algorithm as find_algorithm
    from speculators.models.algorithm import register_algorithm as register_algorithm
    from speculators.models.draft_attention import DraftAttention as DraftAttention
    from speculators.models.draft_attention import TrainTimeTestAttention as TrainTimeTestAttention
    from speculators.models.draft_cache import DraftCache as DraftCache
    from speculators.models.speculator_model import DraftOutput as DraftOutput
    from speculators.models.speculator_model import SpeculatorModel as SpeculatorModel
    from speculators.models.vocabulary import VocabularyMapping as VocabularyMapping
    from speculators.models.weights import CheckpointError as CheckpointError

_DEFINED_IN = {
    "AlgorithmSpec": "speculators.models.algorithm",
    "CheckpointError": "speculators.models.weights",
    "DraftAttention": "speculators.models.draft_attention",
    "DraftCache": "speculators.models.draft_cache",
    "DraftOutput": "speculators.models.speculator_model",
    "HiddenStates": "speculators.models.algorithm",
    "SpeculatorModel": "speculators.models.speculator_model",
    "TrainTimeTestAttention": "speculators.models.draft_attention",
    "VocabularyMapping": "speculators.models.vocabulary",
    "algorithm_names": "speculators.models.algorithm",
    "find_algorithm": "speculators.models.algorithm",
    "register_algorithm": "speculators.models.algorithm",
}
_MODULES = ("algorithm", "decoder", "eagle", "eagle3", "hass", "verifier")

__all__ = [*_DEFINED_IN]  # noqa: PLE0604 - all of them are strings

__getattr__, __dir__ = lazy_facade(__name__, _DEFINED_IN, _MODULES)
