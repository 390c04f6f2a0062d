"""Time, peak memory, and what a machine can do at best, for all benchmarks alike.

A number of seconds means little by itself, so it stands beside a floor: what the bytes take that
must be moved, at the speed at which this machine copies as many, or the multiplications, at the
speed of its matrix products. Both are measured in the same run. Times are torch's own
``benchmark.Timer``, which repeats until the spread is small and waits for the device.

Peak memory is that of a fresh process, since an allocator that has grown once hides what comes
after. The kernel's high-water mark is reset just before the call; ``ru_maxrss`` would not do, as it
goes back to the process that started this one.
"""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import pathlib
import platform
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

import torch
from torch.utils.benchmark import Timer

Call = Callable[[], object]
_Case = TypeVar("_Case")

LIMIT_SECONDS: Final = 60.0
"""A call that is expected to take longer is not made: its time is extrapolated, and marked."""

SPREAD: Final = 0.05
"""Repeated until the interquartile range is this part of the median, or ``LONGEST`` is over."""

LONGEST: Final = 4.0
"""Seconds for which a call is repeated; one that takes longer is made twice, and one counts."""

QUICK: Final = 0.3
"""The same for a run that is to show that everything runs, not how fast."""

LARGEST: Final = 0.8
"""The part of the free memory that a call may be expected to need; else it is extrapolated."""

MIB: Final = 2**20


@dataclasses.dataclass(frozen=True)
class Measured:
    """Seconds of a call, or bytes.

    Attributes:
        median: of the repetitions.
        least: of them.
        extrapolated: whether it comes from a smaller case, by proportion.
    """

    median: float
    least: float
    extrapolated: bool = False


def seconds(call: Call, longest: float = LONGEST) -> Measured:
    """How long a call takes, after a first one.

    Args:
        call: what is timed.
        longest: seconds for which it is repeated if times keep varying.
    """
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    found = timer.adaptive_autorange(threshold=SPREAD, min_run_time=0.2, max_run_time=longest)
    return Measured(found.median, min(found.times))


class Series:
    """Measures rising cases, and extrapolates those that would take too long or too much memory.

    Args:
        limit: seconds that a call may take.
        longest: seconds for which it is repeated.
    """

    def __init__(self, limit: float = LIMIT_SECONDS, longest: float = LONGEST) -> None:
        self.limit = limit
        self.longest = longest
        self._seconds: dict[str, tuple[float, Measured]] = {}
        self._bytes: dict[str, tuple[float, Measured]] = {}

    def seconds(
        self, name: str, work: float, make: Callable[[], Call], needed: int = 0
    ) -> Measured:
        """The seconds of a call.

        Args:
            name: of the series: cases that differ in size alone.
            work: what time and memory are proportional to.
            make: makes the call; not asked where the time is extrapolated.
            needed: bytes, where it is known how many the call needs, its arguments included.
        """
        expected = _expected(self._seconds, name, work)
        too_much = needed > LARGEST * _free_bytes() or self._is_too_much(name, work)
        if expected is not None and too_much:
            return expected
        found = seconds(make(), self.longest)
        self._seconds[name] = (work, found)
        return found

    def peak(
        self, name: str, work: float, make: Callable[[_Case], Call], case: _Case, small: _Case
    ) -> Measured:
        """The bytes that a call needs at its peak, beyond its arguments, in a fresh process.

        Args:
            name: as in :meth:`seconds`.
            work: as in :meth:`seconds`.
            make: makes the call of a case; a function of a module.
            case: can be pickled.
            small: a case that warms up: what torch sets up once is not the call's.
        """
        expected = _expected(self._bytes, name, work)
        if expected is not None and self._is_too_much(name, work):
            return expected
        peak = peak_bytes(make, case, small)
        found = Measured(peak, peak)
        self._bytes[name] = (work, found)
        return found

    def _is_too_much(self, name: str, work: float) -> bool:
        time = _expected(self._seconds, name, work)
        memory = _expected(self._bytes, name, work)
        too_long = time is not None and time.median > self.limit
        return too_long or (memory is not None and memory.median > LARGEST * _free_bytes())


def _expected(
    last: Mapping[str, tuple[float, Measured]], name: str, work: float
) -> Measured | None:
    """What is in proportion to the last case of a series."""
    if name not in last:
        return None
    last_work, found = last[name]
    factor = work / last_work
    return Measured(found.median * factor, found.least * factor, extrapolated=True)


def _free_bytes() -> int:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.mem_get_info()[0]
    return _kernel_bytes("/proc/meminfo", "MemAvailable")


def peak_bytes(make: Callable[[_Case], Call], case: _Case, small: _Case) -> int:
    """The bytes that a call needs at its peak, beyond what there is before it."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_here, torch.get_num_threads(), make, case, small).result()


def _peak_here(threads: int, make: Callable[[_Case], Call], case: _Case, small: _Case) -> int:
    torch.set_num_threads(threads)
    make(small)()
    call = make(case)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    reset_peak()
    before = process_bytes("VmRSS")
    call()
    return process_bytes("VmHWM") - before


def reset_peak() -> None:
    """Lowers this process's high-water mark to what it uses now (Linux)."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def process_bytes(name: str) -> int:
    """What the kernel says of this process: ``"VmRSS"``, its memory, or ``"VmHWM"``, its peak."""
    return _kernel_bytes("/proc/self/status", name)


def _kernel_bytes(file: str, name: str) -> int:
    for line in pathlib.Path(file).read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise ValueError(f"{file} has no {name}; expected Linux")


class Floors:
    """What the machine can do at best, measured when first asked for.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        quick: whether small sizes will do.
    """

    def __init__(self, device: str, *, quick: bool = False) -> None:
        self.device = device
        self._quick = quick
        self._longest = QUICK if quick else LONGEST

    @functools.cached_property
    def bandwidth(self) -> float:
        """Bytes per second, read and written, of copying what no cache holds."""
        size = (64 if self._quick else 1024) * MIB
        return size / self.copy_seconds(size)

    @functools.cache  # noqa: B019 - one object per run
    def copy_seconds(self, moved: int) -> float:
        """The seconds of a copy that reads and writes so many bytes in all."""
        source = torch.ones(max(1, moved // 2), dtype=torch.uint8, device=self.device)
        target = torch.zeros_like(source)
        return seconds(lambda: target.copy_(source), self._longest).median

    @functools.cache  # noqa: B019 - one object per run
    def read_seconds(self, size: int) -> float:
        """The seconds of reading so many bytes: of their sum as float32, or of their copy.

        Whichever is faster: a sum of little computes longer than it reads.
        """
        source = torch.ones(max(1, size // 4), dtype=torch.float32, device=self.device)
        return min(seconds(source.sum, self._longest).median, self.copy_seconds(size))

    @functools.cache  # noqa: B019 - one object per run
    def matmul_rate(self, dtype: str) -> float:
        """FLOPs per second of a large matrix product, of dtype ``"float32"`` or ``"bfloat16"``."""
        size = 512 if self._quick else 2048 if self.device == "cpu" else 8192
        a, b = (
            torch.randn(size, size, dtype=dtype_of(dtype), device=self.device) for _ in range(2)
        )
        return 2 * size**3 / seconds(lambda: a @ b, self._longest).median

    def described(self) -> dict[str, float | str | int]:
        """The machine, for the head of a report."""
        return {
            "device": torch.cuda.get_device_name() if self.device == "cuda" else _processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "copy, GB/s": round(self.bandwidth / 1e9, 1),
            "float32 matrix product, GFLOP/s": round(self.matmul_rate("float32") / 1e9, 1),
            "bfloat16 matrix product, GFLOP/s": round(self.matmul_rate("bfloat16") / 1e9, 1),
        }


def dtype_of(name: str) -> torch.dtype:
    """``torch.float32`` for ``"float32"``, and so on."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _processor() -> str:
    information = pathlib.Path("/proc/cpuinfo")
    names: Mapping[str, str] = {}
    if information.exists():
        pairs = (line.partition(":") for line in information.read_text().splitlines())
        names = {key.strip(): value.strip() for key, _, value in pairs}
    return names.get("model name", platform.processor() or platform.machine())
