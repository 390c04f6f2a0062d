"""The loop in which either library's training step is timed; it knows neither of them.

Each of the two programs that use it runs in a process, and an environment, of its own. A batch is
read from its file before its step and forgotten after it, so that memory is the step's.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

STEPS = 3
"""Steps of train-time test."""


@dataclasses.dataclass(frozen=True)
class Training:
    """One library's training.

    Attributes:
        pack: makes the library's batch of documents' ``input_ids``, ``states`` and loss mask; not
            timed.
        step: makes an update, and returns the loss.
    """

    pack: Callable[[Tensor, Tensor, Tensor], Any]
    step: Callable[[Any], float]


@dataclasses.dataclass(frozen=True)
class Options:
    """What the program was told.

    Attributes:
        folder: what ``cases.write`` has written.
        case: its content of case.json.
        steps: updates.
        dtype: of autocast; ``"float32"`` is none.
        device: ``"cpu"`` or ``"cuda"``.
        learning_rate: of AdamW.
        clip: the gradient's largest norm.
    """

    folder: pathlib.Path
    case: dict[str, Any]
    steps: int
    dtype: str
    device: str
    learning_rate: float = 1e-3
    clip: float = 1.0


def drive(make: Callable[[Options], Training]) -> None:
    """Trains and measures as the command line says, and writes a JSON file.

    Args:
        make: makes the training.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    case = json.loads((given.folder / "case.json").read_text())
    options = Options(given.folder, case, given.steps, given.dtype, given.device)
    before = _process_bytes("VmRSS")
    training = make(options)
    on_gpu = options.device == "cuda"
    losses, seconds = [], []
    for number in range(options.steps):
        batch = _batch(training, options, number)
        begin = time.perf_counter()
        losses.append(training.step(batch))
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    found = {
        "losses": losses,
        "seconds": seconds,
        "peak": torch.cuda.max_memory_allocated() if on_gpu else _process_bytes("VmHWM"),
        "before": 0 if on_gpu else before,
        "flops": _flops(training, _batch(training, options, options.steps)),
        "torch": torch.__version__,
    }
    given.output.write_text(json.dumps(found))


def _batch(training: Training, options: Options, number: int) -> Any:
    files = sorted((options.folder / "batches").iterdir())
    tensors = load(files[number % len(files)].read_bytes())
    mask = torch.ones_like(tensors["input_ids"], dtype=torch.bool)
    mask[:, :STEPS] = False  # see peer.py
    return training.pack(tensors["input_ids"], tensors["states"], mask)


class _NoModules(contextlib.nullcontext[None]):
    """In place of what counts by module, whose hooks do not bear gradients inside of a forward."""

    parents = frozenset({"Global"})


def _flops(training: Training, batch: Any) -> int:
    """The multiplications and additions of a step's matrix products, attention included."""
    counter = FlopCounterMode(display=False)
    tracker: Any = _NoModules()
    counter.mod_tracker = tracker
    with counter:
        training.step(batch)
    return int(counter.get_total_flops())


# torch counts its flash kernels for GPUs, but not the one for CPUs, which it calls private.
_FLASH = "_scaled_dot_product_flash_attention_for_cpu"


@register_flop_formula(getattr(torch.ops.aten, _FLASH))
def _flash_flops(
    q: Any, k: Any, v: Any, dropout: float = 0.0, is_causal: bool = False, **unused: Any
) -> int:
    """Two products; half of each where a query sees no later key."""
    del v, dropout, unused
    return _attention_flops(q, k, is_causal, products=2)


@register_flop_formula(getattr(torch.ops.aten, f"{_FLASH}_backward"))
def _flash_backward_flops(
    grad: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, dropout: float, is_causal: bool,
    **unused: Any,
) -> int:  # fmt: skip
    """Five products: the scores again, and the gradients of weights, values, queries and keys."""
    del grad, v, o, lse, dropout, unused
    return _attention_flops(q, k, is_causal, products=5)


def _attention_flops(q: Any, k: Any, is_causal: bool, products: int) -> int:
    batch, heads, queries, size = q
    flops = int(products * 2 * batch * heads * queries * k[2] * size)
    return flops // 2 if is_causal else flops


def _process_bytes(name: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(name))
    return int(line.split()[1]) * 1024
