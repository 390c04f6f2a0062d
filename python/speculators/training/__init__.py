"""Training: a store of hidden states and a draft -> a trained draft.

==================  ===============================================================================
``run``             ``train``: puts the parts of a run together
``trainer``         ``Trainer``, the loop
``settings``        what a run can be told; ``merge_settings`` lays files and flags over defaults
``update``          one update: gradient of several batches, clipping, the optimizer's step
``update_batches``  which batches make up which update
``optimizers``      AdamW, Muon
``schedules``       the learning rate over the run
``validation``      losses on documents held back, and tau from real drafting
``checkpoints``     folders from which a run goes on bit for bit
``trackers``        where numbers go: TensorBoard, or a service
``meter``           means over the last updates, speed, time left; ``sums`` are what they are of
``random_state``    random numbers that follow from the seed and the number of the update
``interruption``    Ctrl-C ends a run after an update, with a checkpoint
==================  ===============================================================================

The modules are imported when first named.
"""

from typing import TYPE_CHECKING

from speculators.lazy_facade import lazy_facade

if TYPE_CHECKING:  # for editors and type checkers, which do not run __getattr__
    from speculators.training.run import TrainingReport as TrainingReport
    from speculators.training.run import train as train
    from speculators.training.settings import TrainingSettings as TrainingSettings
    from speculators.training.settings import merge_settings as merge_settings
    from speculators.training.settings import setting_names as setting_names
    from speculators.training.trainer import Trainer as Trainer
    from speculators.training.update import NotFiniteError as NotFiniteError

_DEFINED_IN = {
    "NotFiniteError": "speculators.training.update",
    "Trainer": "speculators.training.trainer",
    "TrainingReport": "speculators.training.run",
    "TrainingSettings": "speculators.training.settings",
    "merge_settings": "speculators.training.settings",
    "setting_names": "speculators.training.settings",
    "train": "speculators.training.run",
}
_MODULES = (
    "checkpoints",
    "optimizers",
    "run",
    "schedules",
    "settings",
    "trackers",
    "trainer",
    "validation",
)

__all__ = [*_DEFINED_IN]  # noqa: PLE0604 - all of them are strings

__getattr__, __dir__ = lazy_facade(__name__, _DEFINED_IN, _MODULES)
