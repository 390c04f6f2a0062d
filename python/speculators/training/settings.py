"""What a training run can be told: one typed tree, and how its layers are laid over each other.

A value comes from a flag, else from a file, else from here; all three speak of it by the same
dotted name (``optimizer.learning_rate``). A name that does not exist is an error that says which
one was probably meant: a setting that is silently ignored is found out after the run.
"""

import difflib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, get_origin

import pydantic
from pydantic import Field

from speculators.configs.errors import ConfigError, config_error

_Model = TypeVar("_Model", bound=pydantic.BaseModel)

OptimizerName = Literal["adamw", "muon"]
ScheduleName = Literal["cosine", "linear", "constant"]


class _Settings(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class OptimizerSettings(_Settings):
    """How gradients become updates.

    Attributes:
        name: ``"adamw"``, or ``"muon"`` for the matrices of hidden layers and AdamW for the rest.
        learning_rate: at its highest. Muon's updates are scaled to the size of AdamW's, so one
            number serves both.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: of matrices; vectors (norms, biases) have none.
        momentum: Muon's.
        nesterov: whether Muon looks ahead.
        newton_schulz_steps: iterations of Muon's orthogonalisation.
    """

    name: OptimizerName = "adamw"
    learning_rate: float = Field(default=1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    momentum: float = Field(default=0.95, ge=0, lt=1)
    nesterov: bool = True
    newton_schulz_steps: int = Field(default=5, ge=1)

    @pydantic.field_validator("betas")
    @classmethod
    def _check_betas(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"found {betas}; expected two numbers from 0 to below 1")
        return betas


class ScheduleSettings(_Settings):
    """How the learning rate goes over the run.

    Attributes:
        name: what follows the warm-up: ``"cosine"`` or ``"linear"`` decay, or ``"constant"``.
        warmup_steps: updates in which the rate rises to its highest; None: ``warmup_ratio``.
        warmup_ratio: the same as a part of all updates.
        final_ratio: what the decay ends at, as a part of the highest rate.
    """

    name: ScheduleName = "cosine"
    warmup_steps: int | None = Field(default=None, ge=0)
    warmup_ratio: float = Field(default=0.02, ge=0, le=1)
    final_ratio: float = Field(default=0.0, ge=0, le=1)


class ValidationSettings(_Settings):
    """What is held back, and what is measured on it.

    Attributes:
        fraction: part of the documents that is not trained on.
        documents: their number, in place of ``fraction``; 0 trains on all and never validates.
        every_steps: updates from one validation to the next; None: after each epoch. The last
            update is always validated.
        prompts: validation documents whose beginnings are continued by real drafting, where the
            verifier is at hand; 0 for none.
        max_new_tokens: how far each is continued.
        metric: what the best draft has the best of: ``"tau"`` (tokens per verification),
            ``"alpha"`` (acceptance of a sampled draft, summed over steps), ``"loss"``; ``"auto"``
            is tau where there is real drafting, else alpha. Of equals the lower loss is better.
    """

    fraction: float = Field(default=0.05, gt=0, lt=1)
    documents: int | None = Field(default=None, ge=0)
    every_steps: int | None = Field(default=None, ge=1)
    prompts: int = Field(default=8, ge=0)
    max_new_tokens: int = Field(default=64, ge=1)
    metric: Literal["auto", "tau", "alpha", "loss"] = "auto"


class CheckpointSettings(_Settings):
    """What is written, and when.

    Attributes:
        every_steps: updates from one checkpoint to the next; the last update always has one.
        keep_last: how many of them stay.
        keep_best: whether the best draft by validation is kept, in the folder ``best``.
    """

    every_steps: int = Field(default=500, ge=1)
    keep_last: int = Field(default=2, ge=1)
    keep_best: bool = True


class TrackerSettings(_Settings):
    """Where numbers go.

    Attributes:
        name: ``"tensorboard"``, ``"wandb"``, ``"trackio"``, ``"mlflow"`` or ``"none"``.
        project: the name under which the service keeps runs; MLflow's experiment.
        run: the run's name; None: the service makes one up.
    """

    name: str = "tensorboard"
    project: str = "speculators"
    run: str | None = None


class TrainingSettings(_Settings):
    """A training run; what is minimised is the objective's own settings.

    Attributes:
        seed: of the data's order, the validation split and the noise.
        epochs: how often every document is seen.
        max_steps: updates after which the run ends, if ``epochs`` have not ended it before.
        row_tokens: T, the length of packed rows; longer documents are cut.
        rows_per_batch: B, rows in one pass.
        accumulation: batches that make up one update. At the end of an epoch they may be fewer.
        optimizer: how gradients become updates.
        schedule: how the learning rate goes.
        clip: whether gradients are clipped by their global ``"norm"``, entry by entry by
            ``"value"``, or not (``"none"``).
        clip_limit: the largest norm, or value.
        autocast: ``"bf16"`` computes in bfloat16 where that is safe; the weights are float32
            always. ``"auto"`` is bf16 on an accelerator and ``"none"`` on a CPU.
        validation: what is held back, and what is measured on it.
        early_stop_patience: validations without a better result after which the run ends.
        checkpoints: what is written, and when.
        tracker: where numbers go.
        log_every: updates that one line of numbers is the mean of.
        prefetch: batches that are read ahead.
    """

    seed: int = 0
    epochs: int = Field(default=10, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    row_tokens: int = Field(default=2048, ge=3)
    rows_per_batch: int = Field(default=4, ge=1)
    accumulation: int = Field(default=1, ge=1)
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    clip: Literal["norm", "value", "none"] = "norm"
    clip_limit: float = Field(default=0.5, gt=0)
    autocast: Literal["auto", "none", "bf16"] = "auto"
    validation: ValidationSettings = ValidationSettings()
    early_stop_patience: int | None = Field(default=None, ge=1)
    checkpoints: CheckpointSettings = CheckpointSettings()
    tracker: TrackerSettings = TrackerSettings()
    log_every: int = Field(default=10, ge=1)
    prefetch: int = Field(default=2, ge=0)

    def deciding(self) -> dict[str, Any]:
        """The settings that the weights, or where the run ends, depend on; plain values."""
        indifferent = {"checkpoints", "tracker", "log_every", "prefetch"}
        return self.model_dump(mode="json", exclude=indifferent)


def merge_settings(
    model: type[_Model], *layers: Mapping[str, Any], source: str = "the settings"
) -> _Model:
    """Lays settings over each other and validates the result.

    Args:
        model: the settings' type, a tree of pydantic models.
        *layers: from the lowest (a file) to the highest (flags). Keys are names or dotted names,
            values of a section are mappings or settings; a section without a value says nothing. A
            setting that is a dict itself is replaced as a whole, or entry by entry by dotted names.
        source: where they come from; it begins the error's message.

    Returns:
        The settings; what no layer names has its default.

    Raises:
        ConfigError: a name does not exist, or a value does not fit. All of them are in the message,
            unknown names with the nearest one that exists.
    """
    merged: dict[str, Any] = {}
    unknown: list[str] = []
    for layer in layers:
        unknown += _lay_over(merged, model, layer)
    problems = [_unknown(name, list(setting_names(model))) for name in dict.fromkeys(unknown)]
    try:
        settings = model.model_validate(merged)
    except pydantic.ValidationError as error:
        problems += str(config_error(error, source)).split("\n  ")[1:]
    if problems:
        raise ConfigError("\n  ".join([f"{source}: not valid", *problems]))
    return settings


def setting_names(model: type[pydantic.BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings of a type, in order; sections themselves are not named."""
    for name in model.model_fields:
        section = _section(model, name)
        if section is None:
            yield prefix + name
        else:
            yield from setting_names(section, f"{prefix}{name}.")


def _lay_over(
    below: dict[str, Any], model: type[pydantic.BaseModel], layer: Mapping[str, Any]
) -> list[str]:
    """Changes ``below`` in place, and returns the names that do not exist."""
    unknown = []
    for key, value in layer.items():
        name, _, rest = str(key).partition(".")
        section = _section(model, name)
        if name not in model.model_fields:
            unknown.append(str(key))
            continue
        if rest and section is None:
            if _is_dict(model, name):
                below[name] = _with_entry(below.get(name), rest, value)
            else:
                unknown.append(str(key))
            continue
        if rest:
            value = {rest: value}  # noqa: PLW2901
        if isinstance(value, pydantic.BaseModel) and section is not None:
            value = value.model_dump()  # noqa: PLW2901
        if section is None or not isinstance(value, Mapping | None):
            below[name] = value
        elif value is not None:
            inside = below.get(name)
            below[name] = inside = inside if isinstance(inside, dict) else {}
            unknown += [f"{name}.{missed}" for missed in _lay_over(inside, section, value)]
    return unknown


def _section(model: type[pydantic.BaseModel], name: str) -> type[pydantic.BaseModel] | None:
    field = model.model_fields.get(name)
    found = None if field is None else field.annotation
    return found if inspect.isclass(found) and issubclass(found, pydantic.BaseModel) else None


def _is_dict(model: type[pydantic.BaseModel], name: str) -> bool:
    found = model.model_fields[name].annotation
    return found is dict or get_origin(found) is dict


def _with_entry(entries: object, name: str, value: object) -> dict[str, Any]:
    """A copy with an entry of that dotted name."""
    copied = dict(entries) if isinstance(entries, Mapping) else {}
    first, _, rest = name.partition(".")
    copied[first] = _with_entry(copied.get(first), rest, value) if rest else value
    return copied


def _unknown(name: str, known: list[str]) -> str:
    """What to say about a name that does not exist."""
    last = name.rpartition(".")[2]
    by_last = {setting.rpartition(".")[2]: setting for setting in reversed(known)}
    nearest = by_last.get(last)
    if nearest is None:
        for word, choices in ((name, {k: k for k in known}), (last, by_last)):
            close = difflib.get_close_matches(word, choices, 1)
            if close and nearest is None:
                nearest = choices[close[0]]
    advice = f"did you mean {nearest}?" if nearest else f"expected one of {', '.join(known)}"
    return f"{name}: there is no such setting; {advice}"
