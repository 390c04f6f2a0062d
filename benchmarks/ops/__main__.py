"""The operators against floors and peers.

    ./bazelw run //benchmarks:ops -- [--quick] [--device=cuda] [--only=NAME] [--output=FILE]

Without bazel: ``python -m benchmarks.ops``, where the operators are built. Run it on a machine that
does nothing else; ``--threads`` is torch's number of threads.
"""

import os
from typing import Annotated

import torch
import typer
from benchmarks.measurement import LIMIT_SECONDS, LONGEST, QUICK, Floors, Series
from benchmarks.ops import (
    distillation_loss,
    draft_attention,
    hidden_state_packing,
    tree_verification,
)
from benchmarks.ops.bench import Bench
from benchmarks.report import Report

from speculators.ops import backend

OPERATORS = {
    "draft_attention": draft_attention.run,
    "distillation_loss": distillation_loss.run,
    "hidden_state_packing": hidden_state_packing.run,
    "tree_verification": tree_verification.run,
}


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[bool, typer.Option(help="The smallest cases, to see that it runs.")] = False,
    full: Annotated[bool, typer.Option(help="All combinations; hours.")] = False,
    compiled: Annotated[
        bool | None, typer.Option(help="Peers made by torch.compile; not in a quick run.")
    ] = None,
    only: Annotated[str, typer.Option(help="Some operators, by name.")] = ",".join(OPERATORS),
    threads: Annotated[int | None, typer.Option(help="Torch's number of threads.")] = None,
    limit: Annotated[
        float, typer.Option(help="Longer calls are extrapolated; seconds.")
    ] = LIMIT_SECONDS,
    output: Annotated[str, typer.Option(help="The JSON file.")] = "benchmark_ops.json",
) -> None:
    """Measures, prints Markdown, writes JSON."""
    if threads is not None:
        torch.set_num_threads(threads)
    floors = Floors(device, quick=quick)
    machine = {**floors.described(), "operators": backend.choose(device).backend.value}
    bench = Bench(
        device=device,
        quick=quick,
        full=full,
        compiled=not quick if compiled is None else compiled,
        floors=floors,
        series=Series(limit, QUICK if quick else LONGEST),
        report=Report(machine, quick=quick),
    )
    for name in only.split(","):
        if name not in OPERATORS:
            raise typer.BadParameter(f"{name!r}: expected some of {', '.join(OPERATORS)}")
        OPERATORS[name](bench)
    bench.report.finish(output)


if __name__ == "__main__":
    os.chdir(os.environ.get("BUILD_WORKING_DIRECTORY", "."))
    typer.run(main)
