"""``register``: what vLLM calls in each of its processes, maybe more than once.

It imports what vLLM has imported anyway, changes a few of its tables, and leaves everything that
takes time to the moment when a draft of ours is loaded. Each part of it checks all that it needs
before it changes anything. What does not fit is said once, in a warning, and never stops vLLM: most
who start it have no draft of ours.
"""

import dataclasses
import importlib.metadata
import warnings
from collections.abc import Callable

from speculators.integrations.vllm.plugin import cpu_sampling, speculator_types
from speculators.integrations.vllm.plugin.internals import TESTED, UnknownInternalsError


@dataclasses.dataclass(frozen=True)
class Part:
    """One thing that the plugin does.

    Attributes:
        install: does it, and does nothing where it has been done.
        without: what does not work if it cannot be done.
    """

    install: Callable[[], None]
    without: str


PARTS = (
    Part(
        speculator_types.install,
        "drafts of the types 'eagle' and 'hass' will not be served",
    ),
    Part(
        cpu_sampling.install,
        "sampling at a temperature above 0 with a draft may not be lossless on a CPU",
    ),
)

# Parts that have been warned of in this process.
_warned: set[Part] = set()


def register() -> None:
    """Teaches vLLM the types ``eagle`` and ``hass``, and mends its sampling on a CPU.

    The entry point ``speculators`` of the group ``vllm.general_plugins``.
    """
    for part in PARTS:
        try:
            part.install()
        except UnknownInternalsError as difference:
            _warn(part, str(difference))
        except Exception as error:  # whatever vLLM has become, it shall start
            _warn(part, f"{type(error).__name__}: {error}")


def _warn(part: Part, difference: str) -> None:
    if part in _warned:
        return
    _warned.add(part)
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        version = "of an unknown version"
    warnings.warn(
        f"vLLM {version} is not as the speculators plugin knows it: {difference}. So "
        f"{part.without}; all else is as without the plugin. Take vLLM {TESTED}, with which it was "
        "tested, or a newer speculators",
        RuntimeWarning,
        stacklevel=3,
    )
