"""Makes ``AutoConfig.from_pretrained`` know our configurations, without importing transformers.

transformers' ``AutoConfig.register`` wants the class, and the class needs transformers, which takes
long to import. So the registration waits: a finder, first in line on ``sys.meta_path``, sees when
somebody imports transformers' table of configurations, steps aside for good, and registers our
class as soon as that module is there.
"""

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_TABLE = "transformers.models.auto.configuration_auto"
_CONFIGS = "speculators.configs.model_config"


class _Finder:
    """Finds transformers' table as usual, and runs the registration after it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        del path, target
        if name != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    # The module registers its class at its end. If it is the one that imports transformers' table
    # just now, it is not complete yet, and will.
    if _CONFIGS not in sys.modules:
        importlib.import_module(_CONFIGS)


def install() -> None:
    """Registers now if transformers is there already, else when it is imported."""
    if _TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
