"""Trackers: TensorBoard's files read back, and the services' modules as fakes."""

import pathlib
import sys
import types
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import (
    EventAccumulator,
)

from speculators.training.settings import TrackerSettings
from speculators.training.trackers import TRACKERS, TrackerError, open_tracker

CONFIG = {"training": {"epochs": 3, "optimizer": {"name": "muon"}}}


def _read(directory: pathlib.Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(directory))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard(tmp_path: pathlib.Path) -> None:
    tracker = open_tracker(TrackerSettings(), tmp_path, CONFIG)
    for step in (10, 20):
        tracker.log(step, {"train/loss": step / 2, "train/alpha_1": 0.25})
    tracker.close()
    assert _read(tmp_path / "tensorboard", "train/loss") == [(10, 5.0), (20, 10.0)]
    assert _read(tmp_path / "tensorboard", "train/alpha_1") == [(10, 0.25), (20, 0.25)]


def test_tensorboard_shows_updates_that_are_made_again_once(tmp_path: pathlib.Path) -> None:
    for begin, steps, offset in ((0, (10, 20, 30), 0.0), (10, (20, 30, 40), 0.5)):
        tracker = open_tracker(TrackerSettings(), tmp_path, CONFIG, begin)
        for step in steps:
            tracker.log(step, {"train/loss": step + offset})
        tracker.close()
    expected = [(10, 10.0), (20, 20.5), (30, 30.5), (40, 40.5)]
    assert _read(tmp_path / "tensorboard", "train/loss") == expected


class _Fake(types.ModuleType):
    """A module that writes down how its functions are called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_services(name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = _Fake(name)
    monkeypatch.setitem(sys.modules, name, fake)
    settings = TrackerSettings(name=name, project="drafts", run="first")
    tracker = open_tracker(settings, tmp_path, CONFIG)
    tracker.log(10, {"train/loss": 0.5})
    tracker.close()
    *begin, log, end = fake.calls
    log_name = "log_metrics" if name == "mlflow" else "log"
    assert log == (log_name, ({"train/loss": 0.5},), {"step": 10})
    assert end == ("end_run" if name == "mlflow" else "finish", (), {})
    if name == "mlflow":
        assert begin == [
            ("set_experiment", ("drafts",), {}),
            ("start_run", (), {"run_name": "first"}),
            ("log_params", ({"training.epochs": 3, "training.optimizer.name": "muon"},), {}),
        ]
    else:
        folder = {"dir": str(tmp_path)} if name == "wandb" else {}
        told = {"project": "drafts", "name": "first", "config": CONFIG, **folder}
        assert begin == [("init", (), told)]


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_package_that_is_not_installed_is_named(
    name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TrackerError, match=f"pip install {name}"):
        open_tracker(TrackerSettings(name=name), tmp_path, CONFIG)


def test_an_unknown_name(tmp_path: pathlib.Path) -> None:
    with pytest.raises(TrackerError, match="'tensorbord'; expected one of tensorboard, wandb"):
        open_tracker(TrackerSettings(name="tensorbord"), tmp_path, CONFIG)


def test_none_writes_nothing_and_others_can_be_added(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = open_tracker(TrackerSettings(name="none"), tmp_path, CONFIG)
    tracker.log(1, {"train/loss": 1.0})
    tracker.close()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(TRACKERS, "mine", lambda *_: tracker)
    assert open_tracker(TrackerSettings(name="mine"), tmp_path, CONFIG) is tracker
