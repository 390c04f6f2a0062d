"""What a user sees of a run: means over the last updates, speed, time left."""

import datetime as dt
import time

from speculators.training.sums import RowSums
from speculators.training.update import UpdateOutput


class Meter:
    """Gathers updates until somebody reads.

    Args:
        update: updates made before.
        total: updates of the run.
    """

    def __init__(self, update: int, total: int) -> None:
        self._first = self._update = update
        self._total = total
        self._begin = self._since = time.monotonic()
        self._paused = self._loss = self._norm = 0.0
        self._outputs = self._tokens = 0
        self._sums = RowSums()

    def add(self, output: UpdateOutput) -> None:
        """One more update was made."""
        self._update += 1
        self._outputs += 1
        self._loss += output.loss
        self._norm = max(self._norm, output.gradient_norm)
        self._tokens += output.tokens
        self._sums.add(output.sums)

    def pause(self, seconds: float) -> None:
        """So much time went into something else than training, such as a validation."""
        self._paused += seconds

    def read(self) -> dict[str, float]:
        """Numbers by name, since they were last read; the gradient's norm is the largest."""
        seconds = time.monotonic() - self._since - self._paused
        metrics = {
            "train/loss": self._loss / max(1, self._outputs),
            "train/gradient_norm": self._norm,
            "train/tokens_per_second": self._tokens / max(seconds, 1e-9),
            **self._sums.metrics("train"),
        }
        self._since = time.monotonic()
        self._paused = self._loss = self._norm = 0.0
        self._outputs = self._tokens = 0
        self._sums = RowSums()
        return metrics

    def line(self, loss: float) -> str:
        """A line for the user."""
        done = self._update - self._first
        left = (time.monotonic() - self._begin) / max(1, done) * (self._total - self._update)
        time_left = dt.timedelta(seconds=round(left))
        return f"update {self._update} of {self._total}: loss {loss:.4g}, {time_left} left"
