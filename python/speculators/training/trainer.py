"""The training loop.

It knows an order of events and nothing else: an update, now and then a line of numbers, a
validation, a checkpoint. Everything it does is done by a part that can be exchanged. Where it
stands is a ``TrainerState``, a few numbers; with the weights and the optimizer's state they are all
that a run needs to go on.
"""

import contextlib
import math
import time
from collections.abc import Callable

from speculators.data.generate import Progress
from speculators.models.speculator_model import SpeculatorModel
from speculators.training.checkpoints import Checkpoints, TrainerState
from speculators.training.interruption import Interruption
from speculators.training.meter import Meter
from speculators.training.settings import TrainingSettings
from speculators.training.trackers import Tracker
from speculators.training.update import Updater
from speculators.training.update_batches import UpdateBatches, UpdateData
from speculators.training.validation import Validation, Validator


class Trainer:
    """The loop.

    Args:
        draft: what is trained.
        updater: makes updates of it.
        batches: what they learn from.
        schedule: from an update's number to a factor of the learning rate.
        total: updates of the run.
        checkpoints: where the run is kept.
        state: where it stands.
        settings: how often what happens.
        validator: None never validates.
        tracker: takes the numbers.
        progress: shows how far the work is; None for silence.
    """

    def __init__(
        self,
        *,
        draft: SpeculatorModel,
        updater: Updater,
        batches: UpdateBatches,
        schedule: Callable[[int], float],
        total: int,
        checkpoints: Checkpoints,
        state: TrainerState,
        settings: TrainingSettings,
        validator: Validator | None,
        tracker: Tracker,
        progress: Progress | None = None,
    ) -> None:
        self.draft = draft
        self.state = state
        self.metrics: dict[str, float] = {}
        self._updater = updater
        self._batches = batches
        self._schedule = schedule
        self._total = total
        self._checkpoints = checkpoints
        self._settings = settings
        self._validator = validator
        self._tracker = tracker
        self._progress = progress
        self._meter = Meter(state.update, total)

    def run(self) -> None:
        """Makes updates until the run is over; ``state.stopped`` says why it is.

        Raises:
            KeyboardInterrupt: Ctrl-C; a checkpoint was written after the update in which it came.
            SystemExit: the same for SIGTERM.
            NotFiniteError: a loss or a gradient was not finite.
            DiskSpaceError: a checkpoint found the disk full.
        """
        if self.state.stopped is not None:
            return
        if self._progress is not None:
            self._progress.start(self._total, "training")
            self._progress.advance(self.state.update)
        self.draft.train()
        updates = self._batches.go_on(self.state.epoch, self.state.batch)
        with contextlib.closing(updates), Interruption() as interruption:
            for data in updates:
                self._update(data)
                if self._due(self._settings.validation.every_steps, otherwise=data.ends_epoch):
                    self._validate()
                if self.state.update == self._total:
                    self.state.stopped = self.state.stopped or "finished"
                interrupted = interruption.signal is not None
                if interrupted or self._due(self._settings.checkpoints.every_steps):
                    self._checkpoints.save(self.state, self.draft, self._updater.optimizer)
                if self.state.stopped is not None:
                    return
                interruption.raise_if_noted()

    def _update(self, data: UpdateData) -> None:
        state = self.state
        factor = self._schedule(state.update)
        output = self._updater(data.batches, state.update, factor)
        state.update += 1
        state.epoch, state.batch = data.epoch, data.batch
        state.tokens += output.tokens
        self._meter.add(output)
        if self._progress is not None:
            self._progress.advance(1)
        if self._due(self._settings.log_every):
            rate = self._settings.optimizer.learning_rate * factor
            self._log({"train/learning_rate": rate, "train/epoch": float(data.epoch)})

    def _log(self, numbers: dict[str, float]) -> None:
        metrics = self._meter.read() | numbers
        self._track(metrics)
        if self._progress is not None:
            self._progress.message(self._meter.line(metrics["train/loss"]))

    def _validate(self) -> None:
        if self._validator is None:
            return
        begin = time.monotonic()
        found = self._validator()
        state = self.state
        self._track(found.metrics)
        self._say_validation(found)
        best = -math.inf if state.best_score is None else state.best_score
        # NaN is not more than anything.
        if (found.score, -found.loss) > (best, -state.best_loss):
            state.best_score, state.best_loss = found.score, found.loss
            state.best_update = state.update
            state.stale_validations = 0
            if self._settings.checkpoints.keep_best:
                self._checkpoints.save_best(self.draft)
        else:
            state.stale_validations += 1
        patience = self._settings.early_stop_patience
        if patience is not None and state.stale_validations >= patience:
            state.stopped = "early stop"
        self._meter.pause(time.monotonic() - begin)

    def _say_validation(self, found: Validation) -> None:
        if self._progress is not None:
            shown = {"loss", "alpha", "tau"}
            numbers = {name.removeprefix("validation/"): v for name, v in found.metrics.items()}
            text = ", ".join(f"{name} {v:.4g}" for name, v in numbers.items() if name in shown)
            self._progress.message(f"validation after update {self.state.update}: {text}")

    def _track(self, metrics: dict[str, float]) -> None:
        self.metrics |= metrics
        self._tracker.log(self.state.update, metrics)

    def _due(self, every: int | None, *, otherwise: bool = False) -> bool:
        """Whether something is due after this update; after the last one everything is."""
        if self.state.stopped is not None or self.state.update == self._total:
            return True
        return otherwise if every is None else self.state.update % every == 0
