"""Which implementation serves an operator call, and why.

There are three back ends. ``_C`` holds the schemas and the CPU kernels, ``_C_cuda`` the CUDA
kernels; both are shared objects in torch's stable ABI, and importing one registers its operators
with torch. ``reference`` is pure torch: always there, on every device, and the definition that the
compiled ones are tested against. A missing library is no error, only slower, so the reason is kept
and can be shown.

To force one, for a comparison or to rule a kernel out: ``with backend.forced("reference"): ...``,
or ``SPECULATORS_OPS_BACKEND=reference`` in the environment. A forced back end never falls back: if
it cannot serve the call, the call fails and says why.
"""

import contextlib
import dataclasses
import enum
import importlib
import os
from collections.abc import Iterator

import torch

ENVIRONMENT_VARIABLE = "SPECULATORS_OPS_BACKEND"

LEAST_CAPABILITY = (8, 0)
"""The oldest GPUs that _C_cuda has code for, as in bazel/cuda_library.bzl."""


class Backend(enum.StrEnum):
    """An implementation of the operators; the value is its name in messages and in the
    environment.
    """

    CUDA = "_C_cuda"
    CPU = "_C"
    REFERENCE = "reference"


@dataclasses.dataclass(frozen=True)
class Library:
    """A compiled operator library: its file if it was loaded, else why it was not."""

    loaded: bool
    detail: str


@dataclasses.dataclass(frozen=True)
class Choice:
    """The back end for a device, and the reason in one phrase."""

    backend: Backend
    reason: str


class BackendError(RuntimeError):
    """A forced back end cannot serve the call."""


def _load_libraries() -> dict[Backend, Library]:
    cpu = _load(Backend.CPU)
    if not cpu.loaded:
        cuda = Library(False, "it needs _C, which holds the operators' schemas")
    elif torch.version.cuda is None:
        cuda = Library(False, f"this torch ({torch.__version__}) is built without CUDA")
    else:
        cuda = _load(Backend.CUDA)
    return {Backend.CPU: cpu, Backend.CUDA: cuda}


def _load(backend: Backend) -> Library:
    try:
        module = importlib.import_module(f"speculators.ops.{backend}")
    except ImportError as error:
        return Library(False, str(error))
    return Library(True, str(module.__file__))


# How loading each compiled library went, in this process. A constant and no cached function, so
# that torch.compile can trace a call through choose().
LIBRARIES = _load_libraries()


_COMPILED = {"cpu": Backend.CPU, "cuda": Backend.CUDA}  # what serves a device's tensors


def _parse(name: str) -> Backend:
    try:
        return Backend(name)
    except ValueError:
        names = ", ".join(Backend)
        raise ValueError(f"unknown operator back end {name!r}, expected one of {names}") from None


_forced: Backend | None = None
if os.environ.get(ENVIRONMENT_VARIABLE):
    _forced = _parse(os.environ[ENVIRONMENT_VARIABLE])


@contextlib.contextmanager
def forced(backend: str) -> Iterator[None]:
    """Serves every operator call in the block by one back end, in all threads.

    Args:
        backend: ``"_C_cuda"``, ``"_C"`` or ``"reference"``.

    Raises:
        ValueError: there is no back end of that name.
        BackendError: (from a call inside) the back end cannot serve the call's device.
    """
    global _forced  # noqa: PLW0603 - one switch for the process is what is promised
    before, _forced = _forced, _parse(backend)
    try:
        yield
    finally:
        _forced = before


def choose(device_type: str) -> Choice:
    """The back end for tensors on a device.

    Args:
        device_type: ``torch.device.type``, such as ``"cpu"`` or ``"cuda"``.

    Raises:
        BackendError: a back end is forced that cannot serve this device.
    """
    natural = _natural_choice(device_type)
    if _forced is None or _forced is natural.backend:
        return natural
    if _forced is Backend.REFERENCE:
        return Choice(Backend.REFERENCE, "forced")
    raise BackendError(
        f"the operator back end {_forced} is forced but cannot serve a tensor on {device_type!r}: "
        f"{_why_not(_forced, device_type, natural)}. Lift the force ({ENVIRONMENT_VARIABLE} or "
        f"backend.forced), move the tensor, or build the library: python -m speculators.ops.build"
    )


def _natural_choice(device_type: str) -> Choice:
    compiled = _COMPILED.get(device_type)
    if compiled is None:
        return Choice(Backend.REFERENCE, f"there are no kernels for {device_type!r}")
    library = LIBRARIES[compiled]
    if not library.loaded:
        return Choice(Backend.REFERENCE, f"{compiled} is not loaded: {library.detail}")
    if compiled is Backend.CUDA and _capability() < LEAST_CAPABILITY:
        found, least = (".".join(map(str, pair)) for pair in (_capability(), LEAST_CAPABILITY))
        return Choice(
            Backend.REFERENCE, f"the GPU has compute capability {found}, {compiled} needs {least}"
        )
    return Choice(compiled, f"{compiled} is loaded")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _capability() -> tuple[int, int]:
    """Of the current GPU; the least that serves where there is none, and so no tensor on it."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else LEAST_CAPABILITY


def _why_not(backend: Backend, device_type: str, natural: Choice) -> str:
    if _COMPILED.get(device_type) is backend:
        return natural.reason
    library = LIBRARIES[backend]
    serves = "cuda" if backend is Backend.CUDA else "cpu"
    return f"it serves {serves!r}" if library.loaded else f"it is not loaded, {library.detail}"


def report() -> str:
    """What is loaded, and which back end serves which device: a few lines for people."""
    lines = [f"torch {torch.__version__}"]
    for backend, library in LIBRARIES.items():
        lines.append(f"{backend}: {'loaded' if library.loaded else 'not loaded'}: {library.detail}")
    for device_type in ("cpu", "cuda"):
        try:
            choice = choose(device_type)
            lines.append(f"tensors on {device_type}: {choice.backend} ({choice.reason})")
        except BackendError as error:
            lines.append(f"tensors on {device_type}: {error}")
    return "\n".join(lines)
