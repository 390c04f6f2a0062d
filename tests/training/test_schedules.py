"""Schedules: against their closed forms."""

import math

import pytest

from speculators.training.schedules import Schedule
from speculators.training.settings import ScheduleSettings

TOTAL = 50


def _factors(**settings: object) -> list[float]:
    schedule = Schedule(ScheduleSettings.model_validate(settings), TOTAL)
    return [schedule(update) for update in range(TOTAL)]


@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_closed_forms(warmup: int, final: float) -> None:
    rising = [(update + 1) / warmup for update in range(warmup)]
    part = [(update - warmup) / (TOTAL - warmup) for update in range(warmup, TOTAL)]
    expected = {
        "constant": [1.0 for _ in part],
        "linear": [1 - (1 - final) * x for x in part],
        "cosine": [final + (1 - final) * math.cos(math.pi * x / 2) ** 2 for x in part],
    }
    for name, falling in expected.items():
        found = _factors(name=name, warmup_steps=warmup, final_ratio=final)
        assert found == pytest.approx(rising + falling)


def test_no_update_is_made_for_nothing() -> None:
    for name in ("cosine", "linear", "constant"):
        assert min(_factors(name=name)) > 0


def test_the_warmup_may_be_a_part_of_the_run() -> None:
    assert _factors(warmup_ratio=0.2) == _factors(warmup_steps=10)
    assert _factors(warmup_ratio=0.9, warmup_steps=0)[0] == 1.0


def test_a_warmup_as_long_as_the_run() -> None:
    assert _factors(warmup_steps=TOTAL)[-1] == 1.0
    assert _factors(warmup_steps=2 * TOTAL)[-1] == 0.5
