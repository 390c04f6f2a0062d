"""The learning rate over a run: a factor of its highest value, a function of the update's number.

A function has no state, so a run that goes on needs nothing but its number to go on where it was.
Updates count from 0. The warm-up's first update is not at 0 already, and the decay's last one is
one update short of its end: no update is made for nothing.
"""

import math
from collections.abc import Callable

from speculators.training.settings import ScheduleSettings

# Of the part of the decay that is over, from 0 to 1: the part of the learning rate that is left.
DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "cosine": lambda over: (1 + math.cos(math.pi * over)) / 2,
    "linear": lambda over: 1 - over,
}


class Schedule:
    """``schedule(update)`` is what the highest learning rate is multiplied with.

    Args:
        settings: of the schedule.
        total: updates of the run.
    """

    def __init__(self, settings: ScheduleSettings, total: int) -> None:
        steps = settings.warmup_steps
        self.warmup = round(settings.warmup_ratio * total) if steps is None else steps
        self._total = total
        self._final = settings.final_ratio
        self._decay = DECAYS[settings.name]

    def __call__(self, update: int) -> float:
        """The factor of an update, counted from 0."""
        if update < self.warmup:
            return (update + 1) / self.warmup
        over = (update - self.warmup) / max(1, self._total - self.warmup)
        return self._final + (1 - self._final) * self._decay(min(over, 1.0))
