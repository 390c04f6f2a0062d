"""What a bug report needs to know of the machine: versions, devices, operator back ends."""

import importlib.metadata
import platform

import torch

from speculators.ops import backend, host
from speculators.version import __version__

# The packages whose versions change what speculators does.
_PACKAGES = ("transformers", "vllm", "safetensors", "huggingface_hub", "numpy")


def report() -> str:
    """A few lines of text: this library, Python, the platform, packages, devices, back ends."""
    lines = [
        f"speculators {__version__}",
        f"Python {platform.python_version()} on {platform.platform()}",
    ]
    for name in _PACKAGES:
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name}: not installed")
    devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    lines.append(f"CUDA devices: {', '.join(devices) or 'none'}")
    return "\n".join([*lines, backend.report(), host.report()])
