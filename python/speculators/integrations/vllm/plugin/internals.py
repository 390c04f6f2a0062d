"""What we take from vLLM's insides, checked before it is used.

vLLM has no public way to add a type of speculator, so the plugin reaches for names that the next
release may move. Each is looked up here, and where one is missing or takes other arguments, the
part of the plugin that needs it stays away as a whole: vLLM then works as if we were not there.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

# The releases of vLLM that the plugin's tests run with.
TESTED = "0.32"


class UnknownInternalsError(Exception):
    """vLLM is not as it was tested; the message says what differs."""


def find(path: str) -> Any:
    """An object by ``"package.module:name.name"``.

    Raises:
        UnknownInternalsError: there is no such module or name.
    """
    module_name, _, names = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise UnknownInternalsError(f"{module_name} cannot be imported ({error})") from None
    for name in names.split(".") if names else ():
        if not hasattr(found, name):
            raise UnknownInternalsError(f"{module_name} has no {names}")
        found = getattr(found, name)
    return found


def find_function(path: str, parameters: Sequence[str]) -> Callable[..., Any]:
    """A function, by its path, that begins with these parameters and needs no more.

    Raises:
        UnknownInternalsError: there is none, or its parameters are others.
    """
    function = find(path)
    check_parameters(path, function, parameters)
    checked: Callable[..., Any] = function
    return checked


def check_parameters(name: str, function: Any, parameters: Sequence[str]) -> None:
    """Whether a function begins with these parameters and needs no more.

    Raises:
        UnknownInternalsError: it does not, or is no function.
    """
    if not callable(function):
        raise UnknownInternalsError(f"{name} is not a function")
    found = inspect.signature(function).parameters
    further = list(found.values())[len(parameters) :]
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in further if p.default is p.empty and p.kind not in optional]
    if list(found)[: len(parameters)] != list(parameters) or needed:
        raise UnknownInternalsError(
            f"{name} takes ({', '.join(found)}); expected ({', '.join(parameters)})"
        )
