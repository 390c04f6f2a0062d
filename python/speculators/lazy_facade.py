"""Packages that hand out names and import nothing until one is asked for (PEP 562).

torch and transformers take seconds to import. A package's ``__init__`` says where its names are
defined, and who asks for one pays for that one alone.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def lazy_facade(
    package: str, defined_in: Mapping[str, str], modules: Iterable[str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Makes the ``__getattr__`` and the ``__dir__`` of a package.

    Args:
        package: its ``__name__``.
        defined_in: public name to the module that defines it, by its full name.
        modules: names of its modules and packages that are imported when named.
    """
    modules = tuple(modules)

    def getattr_(name: str) -> Any:
        if name in defined_in:
            return getattr(importlib.import_module(defined_in[name]), name)
        if name in modules:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def dir_() -> list[str]:
        return sorted({*vars(importlib.import_module(package)), *defined_in, *modules})

    return getattr_, dir_
