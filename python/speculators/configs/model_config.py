"""Speculator configurations as transformers sees them: a thin layer over the schemas.

transformers wants a ``PretrainedConfig``; validation and JSON belong to pydantic. A class that is
both would need a metaclass that is both, so these have a schema instead of being one: reading,
writing and checking go to it, and its fields show up as attributes.
"""

import copy
import importlib.metadata
import json
import os
import pathlib
from typing import Any, ClassVar, TypeVar

import pydantic
from transformers import AutoConfig, PretrainedConfig

from speculators.atomic import atomic_file
from speculators.configs.errors import ConfigError, config_error, validate
from speculators.configs.schemas import (
    MODEL_TYPE,
    Eagle3Schema,
    EagleSchema,
    HassSchema,
    SpeculatorSchema,
)

CONFIG_NAME = "config.json"

# Where installed packages announce algorithms: TYPE = "module:SPEC", an ``AlgorithmSpec``.
ENTRY_POINTS = "speculators.algorithms"

# ``speculators_model_type`` -> its configuration class.
_TYPES: dict[str, type["SpeculatorModelConfig"]] = {}

_Config = TypeVar("_Config", bound="SpeculatorModelConfig")


def register_config(config_class: type[_Config]) -> type[_Config]:
    """Class decorator: makes a type known to :meth:`SpeculatorModelConfig.from_dict`.

    Raises:
        ValueError: another class has the type's name already.
    """
    name = config_class.speculators_model_type_name()
    known = _TYPES.setdefault(name, config_class)
    if known is not config_class:
        raise ValueError(f"the type {name!r} is registered already, by {known.__qualname__}")
    return config_class


def _type(name: str) -> type["SpeculatorModelConfig"] | None:
    if name not in _TYPES:
        for entry in importlib.metadata.entry_points(group=ENTRY_POINTS, name=name):
            register_config(entry.load().config_class)
    return _TYPES.get(name)


class SpeculatorModelConfig(PretrainedConfig):
    """The configuration of a draft model; read one with :meth:`from_pretrained`.

    The fields are those of ``schema_class`` (:mod:`speculators.configs.schemas`), as keyword
    arguments and as attributes. ``transformer_layer_config`` is a ``PretrainedConfig`` or its dict;
    as an attribute it is a ``PretrainedConfig``.

    Raises:
        ConfigError: fields that do not fit; all of them are named at once.
    """

    model_type = MODEL_TYPE
    has_no_defaults_at_init = True
    schema_class: ClassVar[type[SpeculatorSchema]] = SpeculatorSchema

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keeps transformers from making a dataclass, with its own ``__init__``, of a type."""

    def __init__(self, **fields: Any) -> None:
        """Builds a configuration from the schema's fields."""
        self._adopt(_validated(self.schema_class, fields, type(self).__name__))

    def _adopt(self, schema: SpeculatorSchema) -> None:
        super().__init__(
            architectures=schema.architectures,
            dtype=schema.dtype or (schema.model_extra or {}).get("torch_dtype"),
            transformers_version=schema.transformers_version,
        )
        # From here on, assignments to the schema's fields go to the schema: see __setattr__.
        object.__setattr__(self, "_layer_config", None)
        object.__setattr__(self, "schema", schema)

    @classmethod
    def speculators_model_type_name(cls) -> str:
        """The ``speculators_model_type`` that this class stands for."""
        return str(cls.schema_class.model_fields["speculators_model_type"].default)

    @property
    def aux_layer_ids(self) -> list[int] | None:
        """The verifier's residual streams that the draft reads; None if it does not name them."""
        return None

    # ---- attributes

    def __getattr__(self, name: str) -> Any:
        """Fields of the schema; called for what is not an attribute of transformers' own."""
        schema = self.__dict__.get("schema")  # absent while a copy is being made
        if schema is None or name.startswith("__"):
            raise AttributeError(name)
        return getattr(schema, name)

    def __setattr__(self, name: str, value: Any) -> None:
        schema = self.__dict__.get("schema")
        if schema is not None and name in type(schema).model_fields:
            plain = str(value).removeprefix("torch.") if name == "dtype" and value else value
            self._set_field(name, _layer_dict(plain))
            if name not in self.__dict__:  # transformers keeps some of the fields itself, too
                return
        super().__setattr__(name, value)  # type: ignore[no-untyped-call]

    def _set_field(self, name: str, value: Any) -> None:
        before = getattr(self.schema, name)
        try:
            setattr(self.schema, name, value)
        except pydantic.ValidationError as error:
            # Pydantic keeps the value if only a check of several fields together refused it.
            self.schema.__dict__[name] = before
            raise config_error(error, type(self).__name__) from None
        object.__setattr__(self, "_layer_config", None)

    @property
    def transformer_layer_config(self) -> PretrainedConfig:
        """The draft decoder's own configuration."""
        if self._layer_config is None:
            layer = self.schema.transformer_layer_config
            object.__setattr__(self, "_layer_config", AutoConfig.for_model(**copy.deepcopy(layer)))
        layer_config: PretrainedConfig = self._layer_config
        return layer_config

    @transformer_layer_config.setter
    def transformer_layer_config(self, value: PretrainedConfig | dict[str, Any]) -> None:
        """Takes effect in ``__setattr__``, as for every field."""

    # ---- reading and writing

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> Any:
        """Reads the configuration of a folder or a Hub repository.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id.
            **kwargs: as for transformers (revision, token, cache_dir, local_files_only,
                return_unused_kwargs, ...), and fields to override.

        Raises:
            OSError: there is no such configuration.
            ConfigError: the type is not known, is not this class's, or a field does not fit.
        """
        kwargs.setdefault("name_or_path", str(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Builds the configuration of the type that the dict's ``speculators_model_type`` names.

        Args:
            config_dict: the content of a ``config.json``.
            **kwargs: as for transformers: ``return_unused_kwargs``, and fields to override.

        Raises:
            ConfigError: the type is not known, is not this class's, or a field does not fit.
        """
        source = str(kwargs.get("name_or_path") or "the configuration")
        found = config_dict.get("speculators_model_type")
        chosen = _type(found) if isinstance(found, str) else None
        if chosen is None or not issubclass(chosen, cls):
            expected = [name for name, known in _TYPES.items() if issubclass(known, cls)]
            raise ConfigError(
                f"{source} is not valid:\n  speculators_model_type: found {json.dumps(found)}; "
                f"expected one of {', '.join(expected)}"
            )
        fields = chosen.schema_class.read(config_dict)
        config = chosen.__new__(chosen)
        config._adopt(_validated(chosen.schema_class, fields, source))  # noqa: SLF001 - our own class
        unused = {}
        for name, value in kwargs.items():
            if name in chosen.schema_class.model_fields or name == "name_or_path":
                setattr(config, name, value)
            elif name not in ("return_unused_kwargs", "_from_auto", "_from_pipeline"):
                unused[name] = value
        return (config, unused) if kwargs.get("return_unused_kwargs") else config

    def to_dict(self) -> dict[str, Any]:
        """The content of ``config.json``: every field of the schema, and the unknown keys."""
        content: dict[str, Any] = self.schema.to_json_dict()
        return content

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as :meth:`to_dict`: readers disagree on defaults, so none is left out."""
        return self.to_dict()

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Writes ``config.json``, whole or not at all.

        Args:
            save_directory: a folder; made if it does not exist.
            push_to_hub: also upload it; ``repo_id`` and the like as for transformers.
            **kwargs: for the upload.

        Raises:
            OSError: the folder cannot be written.
        """
        folder = pathlib.Path(save_directory)
        with atomic_file(folder / CONFIG_NAME, "w") as file:
            file.write(json.dumps(self.to_dict(), indent=2) + "\n")
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    def __eq__(self, other: object) -> bool:
        """Equal if they write the same file."""
        return type(other) is type(self) and other.to_dict() == self.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.to_dict(), indent=2)}"


def _layer_dict(value: Any) -> Any:
    """A decoder's configuration as JSON.

    With all the fields of its type, because vLLM reads them without transformers' defaults, and
    without what every ``PretrainedConfig`` has and nobody set.
    """
    if not isinstance(value, PretrainedConfig):
        return value
    common = PretrainedConfig().to_dict()
    return {
        key: item
        for key, item in value.to_dict().items()
        if key == "model_type" or key not in common or item != common[key]
    }


def _validated(
    schema_class: type[SpeculatorSchema], fields: dict[str, Any], source: str
) -> SpeculatorSchema:
    layer = fields.get("transformer_layer_config")
    return validate(
        schema_class, {**fields, "transformer_layer_config": _layer_dict(layer)}, source
    )


@register_config
class EagleSpeculatorConfig(SpeculatorModelConfig):
    """EAGLE-1 and EAGLE-2; the fields are :class:`~speculators.configs.schemas.EagleSchema`'s."""

    schema_class = EagleSchema

    def __init__(self, **fields: Any) -> None:
        """Builds a configuration from the schema's fields."""
        super().__init__(**fields)


@register_config
class HassSpeculatorConfig(SpeculatorModelConfig):
    """HASS; the fields are :class:`~speculators.configs.schemas.HassSchema`'s."""

    schema_class = HassSchema

    def __init__(self, **fields: Any) -> None:
        """Builds a configuration from the schema's fields."""
        super().__init__(**fields)


@register_config
class Eagle3SpeculatorConfig(SpeculatorModelConfig):
    """EAGLE-3; the fields are :class:`~speculators.configs.schemas.Eagle3Schema`'s."""

    schema_class = Eagle3Schema

    def __init__(self, **fields: Any) -> None:
        """Builds a configuration from the schema's fields."""
        super().__init__(**fields)

    @property
    def aux_layer_ids(self) -> list[int] | None:
        """The verifier's residual streams that the draft reads, increasing."""
        ids: list[int] | None = self.schema.eagle_aux_hidden_state_layer_ids
        return ids


# For AutoConfig.from_pretrained; speculators.auto_registration sees to it that this line runs.
AutoConfig.register(MODEL_TYPE, SpeculatorModelConfig, exist_ok=True)
