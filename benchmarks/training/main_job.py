"""Where the time of the main job's updates goes, with the operators and with their definitions.

    ./bazelw run //benchmarks:main_job -- --data-dir=DIR [--algorithm=hass] [--updates=N]

Without bazel: ``python -m benchmarks.training.main_job``. The data is that of ``train`` with the
recipe of the tiny verifier, and made if it is not there. Times are first taken without a profiler;
the shares are the profiler's. What is outside torch's functions, Python and the wait for data, is
the rest of the time. The optimizer's own arithmetic is counted apart.
"""

import contextlib
import os
import pathlib
import tempfile
import time
from collections import Counter
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from benchmarks.commands import EXAMPLES
from torch.profiler import ProfilerActivity, profile

from speculators.cli.job import Folders, Job
from speculators.cli.progress import ConsoleProgress
from speculators.cli.recipe import read_recipe
from speculators.ops import backend
from speculators.training.update import Updater

WARM_UP = 10
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}


def main(
    data_dir: Annotated[pathlib.Path, typer.Option(help="Where the hidden states are, or go.")],
    algorithm: Annotated[str, typer.Option(help="Of the draft.")] = "hass",
    updates: Annotated[int, typer.Option(help="That are measured.")] = 60,
) -> None:
    """Trains a few updates in four runs, and prints Markdown."""
    rows: dict[str, dict[str, float]] = {}
    for name, forced in (("operators", None), ("definitions", "reference")):
        with contextlib.nullcontext() if forced is None else backend.forced(forced):
            seconds, _ = _run(data_dir, algorithm, updates, profiled=False)
            profiled, events = _run(data_dir, algorithm, updates, profiled=True)
        shares = _shares(events, profiled)
        rows[name] = {"an update": seconds / updates} | {
            kind: share * seconds / updates for kind, share in shares.items()
        }
    kinds = sorted(set().union(*rows.values()), key=lambda kind: -rows["operators"].get(kind, 0.0))
    print(f"{algorithm}, {updates} updates, {torch.get_num_threads()} threads, ms\n")
    print("| | " + " | ".join(rows) + " |\n|---|---|---|")
    for kind in kinds:
        cells = [f"{row.get(kind, 0.0) * 1e3:.1f}" for row in rows.values()]
        print(f"| {kind} | {' | '.join(cells)} |")


def _run(
    data_dir: pathlib.Path, algorithm: str, updates: int, *, profiled: bool
) -> tuple[float, list[Any]]:
    """Seconds of the updates after the first few, data included, and the profiler's events."""
    changes = {
        "training.max_steps": WARM_UP + updates,
        "training.validation.documents": 0,
        "training.tracker.name": "none",
    }
    recipe = read_recipe(EXAMPLES / f"{algorithm}.yaml", changes)
    profiler = profile(activities=[ProfilerActivity.CPU])
    update = Updater.__call__
    count, begin, seconds = 0, 0.0, 0.0

    def watched(*arguments: Any) -> Any:
        nonlocal count, begin, seconds
        count += 1
        if count == WARM_UP + 1:
            if profiled:
                profiler.start()
            begin = time.perf_counter()
        result = update(*arguments)
        seconds = time.perf_counter() - begin
        return result

    with (
        tempfile.TemporaryDirectory() as output,
        mock.patch.object(Updater, "__call__", watched),
    ):
        job = Job(recipe, Folders(pathlib.Path(output), data_dir), ConsoleProgress())
        job.prepare()
        job.generate()
        job.train()
    if not profiled:
        return seconds, []
    profiler.stop()
    return seconds, list(profiler.events() or [])


def _shares(events: list[Any], seconds: float) -> dict[str, float]:
    """What each kind of work takes of the time; torch's functions without what they call."""
    found: Counter[str] = Counter()
    for event in events:
        found[_kind(event)] += event.self_cpu_time_total / 1e6 / seconds
    return {**found, "Python, and waiting for data": 1 - found.total()}


def _kind(event: Any) -> str:
    above = event
    while above is not None:
        if above.name.startswith("Optimizer."):
            return "optimizer"
        above = above.cpu_parent
    if event.name in PRODUCTS:
        return "matrix products"
    if "flash_attention" in event.name or "DraftAttention" in event.name:
        return "attention"
    if event.name.startswith("speculators::"):
        return "other operators of ours"
    return "other functions of torch"


if __name__ == "__main__":
    os.chdir(os.environ.get("BUILD_WORKING_DIRECTORY", "."))
    typer.run(main)
