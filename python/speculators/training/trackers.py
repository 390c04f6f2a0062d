"""Where numbers go: TensorBoard files, or a service, by name.

TensorBoard comes with the library. The others are asked for by name and imported then; whoever
wants another one adds a function to ``TRACKERS``.
"""

import importlib
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from speculators.training.settings import TrackerSettings


class Tracker(Protocol):
    """Takes the numbers of a run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers by name, as they are after ``step`` updates."""

    def close(self) -> None:
        """Nothing more comes."""


# Called with the settings, the run's folder, what the run was told (plain values, nested), and the
# update from which it goes on.
TrackerMaker = Callable[[TrackerSettings, pathlib.Path, Mapping[str, Any], int], Tracker]


class TrackerError(ValueError):
    """A tracker is not known, or its package is not installed."""


class _None:
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


class _TensorBoard:
    def __init__(self, directory: pathlib.Path, begin: int) -> None:
        writer = _import("torch.utils.tensorboard", "tensorboard").SummaryWriter
        # What a killed run wrote after its last checkpoint comes again; it is not shown twice.
        self._writer = writer(str(directory), purge_step=begin + 1 if begin else None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Run:
    """A run of wandb or trackio, whose functions have the same names."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._module.log(dict(metrics), step=step)

    def close(self) -> None:
        self._module.finish()


class _Mlflow:
    def __init__(self, module: Any) -> None:
        self._module = module

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._module.log_metrics(dict(metrics), step=step)

    def close(self) -> None:
        self._module.end_run()


def _no_tracker(*_: object) -> Tracker:
    return _None()


def _tensorboard(
    settings: TrackerSettings, directory: pathlib.Path, config: Mapping[str, Any], begin: int
) -> Tracker:
    del settings, config
    return _TensorBoard(directory / "tensorboard", begin)


def _wandb(
    settings: TrackerSettings, directory: pathlib.Path, config: Mapping[str, Any], begin: int
) -> Tracker:
    del begin
    module = _import("wandb", "wandb")
    module.init(
        project=settings.project, name=settings.run, dir=str(directory), config=dict(config)
    )
    return _Run(module)


def _trackio(
    settings: TrackerSettings, directory: pathlib.Path, config: Mapping[str, Any], begin: int
) -> Tracker:
    del directory, begin
    module = _import("trackio", "trackio")
    module.init(project=settings.project, name=settings.run, config=dict(config))
    return _Run(module)


def _mlflow(
    settings: TrackerSettings, directory: pathlib.Path, config: Mapping[str, Any], begin: int
) -> Tracker:
    del directory, begin
    module = _import("mlflow", "mlflow")
    module.set_experiment(settings.project)
    module.start_run(run_name=settings.run)
    module.log_params(dict(_flat(config)))
    return _Mlflow(module)


TRACKERS: dict[str, TrackerMaker] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _mlflow,
    "none": _no_tracker,
}


def open_tracker(
    settings: TrackerSettings,
    directory: str | os.PathLike[str],
    config: Mapping[str, Any],
    begin: int = 0,
) -> Tracker:
    """Opens the tracker of that name.

    Args:
        settings: its name, and that of the run.
        directory: of the run.
        config: what the run was told, to be shown with it.
        begin: the update from which the run goes on.

    Raises:
        TrackerError: there is none of that name, or its package is not installed.
    """
    if settings.name not in TRACKERS:
        raise TrackerError(
            f"there is no tracker {settings.name!r}; expected one of {', '.join(TRACKERS)}"
        )
    return TRACKERS[settings.name](settings, pathlib.Path(directory), config, begin)


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TrackerError(
            f"the tracker needs the package {package!r}, which cannot be imported ({error}); run "
            f"`pip install {package}`, or choose another tracker: {', '.join(TRACKERS)}"
        ) from error


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in config.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{name}.")
        else:
            pairs.append((prefix + name, value))
    return pairs
