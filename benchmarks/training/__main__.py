"""The training step beside the peer's: speed, peak memory, and losses that must agree.

    ./bazelw run //benchmarks:training -- --peer-python=ENVIRONMENT/bin/python [--quick]

Without bazel: ``python -m benchmarks.training``. The peer is the library of the same name,
``speculators`` 0.9.0 of vllm-project. It cannot be installed beside this one, so it gets an
environment of its own, with the torch and transformers of this one (a torch for CPUs where there
is no GPU):

    python3.11 -m venv ENVIRONMENT
    ENVIRONMENT/bin/pip install torch==2.13.0+cpu transformers==5.19.0 'datasets>=4,<=5.1.0' \
        numpy safetensors aiohttp click httpx loguru openai protobuf psutil pydantic \
        pydantic-settings rich tqdm typer huggingface-hub
    ENVIRONMENT/bin/pip install --no-deps speculators==0.9.0 hs-connectors==0.9.0

Both train the same EAGLE-3 draft from the same weights on the same batches in the same order with
the same objective, in turns, each time in a new process. The first turn is long and compares
losses. A run without ``--peer-python`` measures this library alone.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

import torch
import typer
from benchmarks.measurement import Floors, Measured
from benchmarks.report import Report, Row
from benchmarks.training.cases import CASES, Case, write

OURS, PEER, FLOAT32 = "ours", "peer", "ours, float32"

WARM_UP: Final = 3
"""Steps at the beginning of each process that are not counted."""


def main(
    peer_python: Annotated[str, typer.Option(help="The Python of the peer's environment.")] = "",
    quick: Annotated[bool, typer.Option(help="A tiny case, to see that it runs.")] = False,
    cases: Annotated[str, typer.Option(help="Some of T1, T2 and tiny.")] = "T1,T2",
    steps: Annotated[int, typer.Option(help="Of the first turn, whose losses are compared.")] = 50,
    turns: Annotated[int, typer.Option(help="In all; the median of their steps counts.")] = 3,
    turn_steps: Annotated[int, typer.Option(help="Of each further turn.")] = 12,
    dtype: Annotated[str, typer.Option(help="Of autocast: bfloat16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Torch's number of threads.")] = None,
    output: Annotated[pathlib.Path, typer.Option(help="The JSON file.")] = pathlib.Path(
        "benchmark_training.json"
    ),
) -> None:
    """Trains in turns, prints Markdown, writes JSON."""
    if threads is not None:
        torch.set_num_threads(threads)
    floors = Floors(device, quick=quick)
    report = Report({**floors.described(), "autocast": dtype}, quick=quick)
    programs = {OURS: dtype}
    if dtype != "float32" and device == "cpu":
        programs[FLOAT32] = "float32"  # what a CPU does unless told otherwise
    if peer_python:
        programs = {PEER: dtype, **programs}
    plan = [steps] + [turn_steps] * (turns - 1)
    for name in ["tiny"] if quick else cases.split(","):
        if name not in CASES:
            raise typer.BadParameter(f"{name!r}: expected some of {', '.join(CASES)}")
        with tempfile.TemporaryDirectory() as folder:
            write(CASES[name], pathlib.Path(folder))
            results: dict[str, list[dict[str, Any]]] = {program: [] for program in programs}
            for count in plan:
                for program, its_dtype in programs.items():
                    options = {"steps": count, "dtype": its_dtype, "device": device}
                    results[program].append(_run(program, folder, peer_python, options))
        _tell(report, floors, name, CASES[name], programs, results)
    report.finish(output)


def _run(
    program: str, folder: str, peer_python: str, options: Mapping[str, object]
) -> dict[str, Any]:
    """One process: trains, and returns what it measured."""
    flags = [f"--{name}={value}" for name, value in options.items()]
    flags.append(f"--threads={torch.get_num_threads()}")
    result = pathlib.Path(folder) / "result.json"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if program == PEER:
        # Isolated from this library, whose package has the same name.
        environment.pop("PYTHONPATH", None)
        command = [peer_python, str(pathlib.Path(__file__).with_name("peer.py"))]
    else:
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        command = [sys.executable, "-m", "benchmarks.training.ours"]
    done = subprocess.run(
        [*command, folder, str(result), *flags],
        env=environment,
        check=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise typer.Exit(_failed(program, done.stderr))
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def _failed(program: str, message: str) -> int:
    print(f"{program} failed:\n{message[-4000:]}", file=sys.stderr)
    return 1


def _tell(
    report: Report,
    floors: Floors,
    name: str,
    case: Case,
    programs: Mapping[str, str],
    results: Mapping[str, Sequence[Mapping[str, Any]]],
) -> None:
    """Rows and goals of a case."""
    speeds, peaks, befores, shares = {}, {}, {}, {}
    for program, runs in results.items():
        times = [second for run in runs for second in run["seconds"][WARM_UP:]]
        time = Measured(statistics.median(times), min(times))
        speeds[program] = case.tokens / time.median
        peaks[program] = max(run["peak"] for run in runs)
        befores[program] = min(run["before"] for run in runs)
        flops = runs[0]["flops"]
        floor = flops / floors.matmul_rate(programs[program])
        shares[program] = floor / time.median
        note = (
            f"{speeds[program]:.0f} tokens/s, {flops / 1e9:.1f} GFLOP a step, {shares[program]:.0%}"
            f" of the matrix products' rate; {befores[program] / 2**20:.0f} MiB before the model"
        )
        peak = Measured(peaks[program], peaks[program])
        row = Row("training step", name, program, time, floor, flops=flops, peak=peak, note=note)
        report.add(row)
    goal = f"training step, {name}"
    report.goal(f"{goal}: part of the matrix products' rate", shares[OURS], least=0.8)
    if PEER not in results:
        return
    report.goal(f"{goal}: times the peer's tokens/s", speeds[OURS] / speeds[PEER], least=3)
    report.goal(f"{goal}: part of its peak memory", peaks[OURS] / peaks[PEER], most=0.5)
    ours, peer = (results[program][0]["losses"] for program in (OURS, PEER))
    own, peers = (peaks[program] - befores[program] for program in (OURS, PEER))
    report.goal(f"{goal}: part of its peak memory, without imports", own / peers, most=0.5)
    print(f"\n{name}: losses of steps 1, 10, 20, ...: ours {_some(ours)}; the peer's {_some(peer)}")
    differences = [abs(a - b) / abs(b) for a, b in zip(ours, peer, strict=True)]
    wanted = f"{goal}: relative difference of {len(ours)} losses"
    report.goal(f"{wanted}, the mean", statistics.mean(differences), most=0.01)
    report.goal(f"{wanted}, the largest", max(differences), most=0.01)


def _some(losses: Sequence[float]) -> str:
    chosen = [losses[0], *losses[9::10]]
    return ", ".join(f"{loss:.4f}" for loss in chosen)


if __name__ == "__main__":
    os.chdir(os.environ.get("BUILD_WORKING_DIRECTORY", "."))
    typer.run(main)
