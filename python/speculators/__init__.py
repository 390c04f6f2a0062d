"""Speculators: draft models that make LLM inference faster without changing its output.

This module is a lazy facade (PEP 562): it imports nothing until a name is asked for, torch
included, so that ``import speculators`` and ``speculators --help`` answer at once.
"""

import importlib
from types import ModuleType

from speculators.version import __version__

# The packages that can be reached as attributes: ``speculators.ops`` after ``import speculators``.
_SUBPACKAGES = ("ops",)

__all__ = ["__version__", "ops"]


def __getattr__(name: str) -> ModuleType:
    if name not in _SUBPACKAGES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBPACKAGES})
