"""Writes docs/settings.md from the settings themselves, so that names and defaults have one source.

``./bazelw run //tests/docs:settings_page > docs/settings.md`` after a setting has changed; the test
beside this file says when that is due. What a setting means is read from its class's docstring.
"""

import functools
import inspect
import json
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pydantic

from speculators.cli.recipe import Recipe
from speculators.models.algorithm import AlgorithmSpec, find_algorithm
from speculators.models.objective import ObjectiveSettings

ALGORITHMS = ("eagle", "hass", "eagle3")
_TOP = """\
# All settings

The settings of a recipe, with their defaults. In a recipe they are sections within sections; on the
command line `training.optimizer.learning_rate` is `--training.optimizer.learning-rate=VALUE`.
`null` stands for nothing given. [Your own verifier](your-own-verifier.md#settings) says more.

This page is made from the settings' own descriptions, by `tests/docs/settings_page.py`.
"""
_DRAFT = """\
## draft

The algorithm's own options. Those of an algorithm from elsewhere are the keyword arguments of its
`new_config`.
"""
_OBJECTIVE = """\
## objective

What is minimised. The defaults are the algorithm's. An algorithm from elsewhere may have other
settings. The losses are `kl`, `rkl`, `jsd`, `ce_soft`, `ce_argmax`, `ce_data`, `tv`, `nla`,
`lk_hybrid` and `topk`: `python/speculators/ops/distillation_loss.py` has their formulas.
"""
_ITEM = re.compile(r"^    (\*{0,2}\w+): ", re.MULTILINE)


def descriptions(documented: object, section: str) -> dict[str, str]:
    """What a Google docstring says of each name in a section such as ``Attributes``."""
    text = inspect.getdoc(documented) or ""
    found = re.search(rf"^{section}:\n((?:    .*\n?|\n)*)", text, flags=re.MULTILINE)
    items = _ITEM.split(found[1]) if found else []
    return {
        name: " ".join(words.split()).replace("``", "`")
        for name, words in zip(items[1::2], items[2::2], strict=True)
    }


def rows(model: type[pydantic.BaseModel], prefix: str = "") -> Iterator[list[str]]:
    """Name, default and meaning of all settings of a type, those of its sections among them."""
    meanings = descriptions(model, "Attributes")
    for name, field in model.model_fields.items():
        kind = field.annotation
        if inspect.isclass(kind) and issubclass(kind, pydantic.BaseModel):
            yield from rows(kind, f"{prefix}{name}.")
        else:
            yield [_code(name, prefix), _value(field.default), meanings[name] + _choices(kind)]


def page() -> str:
    """The whole page."""
    parts = [_TOP]
    top = [row for row in rows(Recipe) if "." not in row[0]]
    parts.append("## At the top\n\n" + _table(("setting", "default", "what it is"), top))
    for section in Recipe.model_fields:
        inside = [row for row in rows(Recipe) if row[0].startswith(f"`{section}.")]
        if inside:
            header = ("setting", "default", "what it is")
            parts.append(f"## {section}\n\n" + _table(header, inside))
    parts += [_DRAFT, *(_draft(find_algorithm(name)) for name in ALGORITHMS)]
    parts += [_OBJECTIVE, _objective()]
    return "\n".join(parts)


def _draft(spec: AlgorithmSpec) -> str:
    maker: Callable[..., Any] = spec.new_config
    if isinstance(maker, functools.partial):
        maker = maker.func
    fields = spec.config_class.schema_class.model_fields
    meanings = descriptions(spec.config_class.schema_class, "Attributes")
    # HASS says of its fields that they are those of the class that it is made like.
    meanings |= descriptions(maker, "Args")
    found = []
    for name, parameter in inspect.signature(spec.new_config).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            default = parameter.default
            if default is None and name in fields and fields[name].annotation is bool:
                default = fields[name].default
            found.append([_code(name, "draft."), _value(default), meanings[name]])
    # What the maker takes as **options and hands on to the schema is named in its docstring.
    found += [
        [_code(name, "draft."), _value(fields[name].default), meanings[name]]
        for name in re.findall(r"`(\w+)`", meanings.get("**options", ""))
    ]
    header = ("setting", "default", "what it is")
    return f"### Of `{spec.name}`\n\n" + _table(header, found)


def _objective() -> str:
    meanings = descriptions(ObjectiveSettings, "Attributes")
    defaults = [find_algorithm(name).objective_settings.model_dump() for name in ALGORITHMS]
    found = [
        [_code(name, "objective."), *(_value(d[name]) for d in defaults), meanings[name]]
        for name in ObjectiveSettings.model_fields
    ]
    header = ("setting", *(f"`{name}`" for name in ALGORITHMS), "what it is")
    return _table(header, found)


def _choices(kind: Any) -> str:
    if typing.get_origin(kind) is not typing.Literal:
        return ""
    return " One of " + ", ".join(f"`{choice}`" for choice in typing.get_args(kind)) + "."


def _code(name: str, prefix: str = "") -> str:
    return f"`{prefix}{name}`"


def _value(value: object) -> str:
    """A default as YAML and JSON write it."""
    if isinstance(value, Mapping):
        return "`{" + ", ".join(f"{name}: {json.dumps(v)}" for name, v in value.items()) + "}`"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _table(header: tuple[str, ...], body: list[list[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *body]
    return "".join(
        "| " + " | ".join(c.replace("|", r"\|") for c in line) + " |\n" for line in lines
    )


if __name__ == "__main__":
    print(page(), end="")
