"""One error for everything that is wrong with a configuration, in terms of its fields."""

import json
from typing import Any, TypeVar

import pydantic

_Model = TypeVar("_Model", bound=pydantic.BaseModel)


class ConfigError(ValueError):
    """A configuration is not valid: every wrong field with what was found and what was expected."""


def validate(model: type[_Model], data: Any, source: str) -> _Model:
    """Validates data against a pydantic model.

    Args:
        model: the schema.
        data: what JSON gave, or keyword arguments.
        source: where the data comes from, such as a file's path; it begins the error's message.

    Raises:
        ConfigError: the data does not fit; all fields that are wrong are named at once.
    """
    try:
        return model.model_validate(data)
    except pydantic.ValidationError as error:
        raise config_error(error, source) from None


def config_error(error: pydantic.ValidationError, source: str) -> ConfigError:
    """What pydantic found wrong, one line for each field."""
    lines = [_line(detail) for detail in error.errors(include_url=False)]
    return ConfigError("\n  ".join([f"{source} is not valid:", *lines]))


def _line(detail: Any) -> str:
    field = ".".join(str(part) for part in detail["loc"]) or "(the whole)"
    expected = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "missing":
        return f"{field}: missing, expected a value"
    if not detail["loc"] or detail["type"] == "value_error":
        return f"{field}: {expected}"
    return f"{field}: found {_short(detail['input'])}; {expected[:1].lower()}{expected[1:]}"


def _short(value: Any, limit: int = 60) -> str:
    try:
        text = json.dumps(value)
    except TypeError:
        text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
