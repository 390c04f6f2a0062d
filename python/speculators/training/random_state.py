"""Random numbers of a run, as a function of its seed and of the number of the update.

Each update begins with a seed of its own. So nothing has to be stored to go on bit for bit, and
whatever else draws random numbers in the process (a validation, the caller) neither disturbs the
run nor is disturbed by it.
"""

import contextlib
from collections.abc import Iterator

import torch

from speculators.data.ordering import derived_seed


@contextlib.contextmanager
def random_numbers(device: torch.device, *parts: int | str) -> Iterator[None]:
    """Torch's random numbers in the block follow from ``parts`` alone; afterwards they go on.

    Args:
        device: where the block computes; its generator and the CPU's are set and put back.
        *parts: what the seed is derived from.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derived_seed(*parts))
        yield
