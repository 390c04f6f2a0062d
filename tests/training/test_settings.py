"""Settings: flags over files over defaults, and an unknown name is an error that names another."""

from typing import Any

import pydantic
import pytest

from speculators.configs.errors import ConfigError
from speculators.training import TrainingSettings, merge_settings, setting_names
from speculators.training.settings import OptimizerSettings


def test_flags_go_over_files_go_over_defaults() -> None:
    file = {"epochs": 3, "optimizer": {"name": "muon", "learning_rate": "2e-4"}, "schedule": None}
    flags = {"optimizer.learning_rate": 5e-5, "validation.documents": "7"}
    settings = merge_settings(TrainingSettings, file, flags)
    assert settings.epochs == 3
    assert settings.optimizer == OptimizerSettings(name="muon", learning_rate=5e-5)
    assert settings.validation.documents == 7
    assert settings.schedule == TrainingSettings().schedule


def test_sections_may_be_settings() -> None:
    settings = merge_settings(
        TrainingSettings, {"optimizer": OptimizerSettings(eps=1e-3)}, {"optimizer.momentum": 0.5}
    )
    assert (settings.optimizer.eps, settings.optimizer.momentum) == (1e-3, 0.5)


class _Inner(pydantic.BaseModel):
    weights: dict[str, float] = {"kl": 1.0}


class _Outer(pydantic.BaseModel):
    inner: _Inner = _Inner()
    options: dict[str, Any] = {}


def test_a_setting_that_is_a_dict_is_replaced_as_a_whole() -> None:
    found = merge_settings(
        _Outer, {"inner": {"weights": {"kl": 2.0, "tv": 1.0}}}, {"inner.weights": {"tv": 3.0}}
    )
    assert found.inner.weights == {"tv": 3.0}


def test_dotted_names_set_entries_of_a_dict() -> None:
    file = {"inner": {"weights": {"kl": 2.0, "tv": 1.0}}, "options": {"steps": 3}}
    flags = {"inner.weights.tv": 3.0, "options.losses.kl": 1, "options.losses.tv": 2}
    found = merge_settings(_Outer, file, flags)
    assert found.inner.weights == {"kl": 2.0, "tv": 3.0}
    assert found.options == {"steps": 3, "losses": {"kl": 1, "tv": 2}}
    assert file["options"] == {"steps": 3}  # what is given is not changed


@pytest.mark.parametrize(
    ("layer", "line"),
    [
        ({"epoch": 3}, "epoch: there is no such setting; did you mean epochs?"),
        (
            {"optimizer": {"learning_rat": 1}},
            "optimizer.learning_rat: there is no such setting; did you mean optimizer.learning_",
        ),
        (
            {"learning_rate": 1},  # right, but for its section
            "learning_rate: there is no such setting; did you mean optimizer.learning_rate?",
        ),
        (
            {"warmup_step": 1},
            "warmup_step: there is no such setting; did you mean schedule.warmup_steps?",
        ),
        ({"optimizer.name.first": 1}, "optimizer.name.first: there is no such setting; did you"),
        ({"xyzzy": 1}, "xyzzy: there is no such setting; expected one of seed, epochs, max_steps"),
        ({"epochs": 0}, "epochs: found 0; input should be greater than or equal to 1"),
        ({"optimizer": 3}, "optimizer: found 3; input should be a valid dictionary"),
        ({"optimizer.betas": [0.9, 1.0]}, "optimizer.betas: found (0.9, 1.0); expected two"),
    ],
)
def test_what_does_not_fit_is_named(layer: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        merge_settings(TrainingSettings, layer, source="train.yaml")
    first, *lines = str(caught.value).split("\n  ")
    assert first.startswith("train.yaml")
    assert len(lines) == 1
    assert lines[0].startswith(line)


def test_everything_that_is_wrong_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        merge_settings(
            TrainingSettings, {"epoch": 3, "clip": "hard"}, {"schedule.name": "x", "epoch": 4}
        )
    names = [line.split(":")[0] for line in str(caught.value).split("\n  ")[1:]]
    assert names == ["epoch", "schedule.name", "clip"]


def test_unknown_names_are_refused_without_merging_too() -> None:
    with pytest.raises(pydantic.ValidationError):
        TrainingSettings(epoch=3)  # type: ignore[call-arg]


def test_setting_names_are_those_that_merge_takes() -> None:
    names = list(setting_names(TrainingSettings))
    assert {"seed", "optimizer.betas", "checkpoints.keep_last"} <= set(names)
    assert "optimizer" not in names
    defaults = TrainingSettings().model_dump()
    flat = {}
    for name in names:
        value: object = defaults
        for part in name.split("."):
            assert isinstance(value, dict)
            value = value[part]
        flat[name] = value
    assert merge_settings(TrainingSettings, flat) == TrainingSettings()


def test_what_decides_the_result() -> None:
    settings = TrainingSettings()
    changes: list[dict[str, object]]
    changes = [{"tracker.name": "none"}, {"log_every": 3}, {"checkpoints.keep_last": 9}]
    for change in changes:
        assert merge_settings(TrainingSettings, change).deciding() == settings.deciding()
    changes = [{"seed": 1}, {"optimizer.eps": 1e-4}, {"validation.documents": 3}]
    for change in changes:
        assert merge_settings(TrainingSettings, change).deciding() != settings.deciding()
