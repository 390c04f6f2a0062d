"""The algorithms beside each other on the tiny verifier, at equal budget, over several seeds.

    ./bazelw run //benchmarks:algorithms -- --output-dir=DIR [--updates=N] [--seeds=N]

All drafts learn from the same prompts, in the same number of updates of the same number of tokens,
with the same optimizer and schedule; only the algorithm's own parts differ. Then all of them decode
the same held-out prompts in turns. Prints the table of RESULTS.md. A run that was stopped goes on.
"""

import json
import os
import pathlib
import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Annotated

import typer
from benchmarks.commands import EXAMPLES, run

from speculators.atomic import atomic_file
from speculators.evaluation.report import EvaluationReport
from speculators.evaluation.results import DrafterResult

ONE_STEP, NO_TOP_K = "--objective.steps=1", "--objective.losses.topk=0"
VARIANTS = {
    "eagle": ("eagle", []),
    "hass-neither": ("hass", [ONE_STEP, NO_TOP_K]),
    "hass-objective": ("hass", [ONE_STEP]),
    "hass-context": ("hass", [NO_TOP_K]),
    "hass": ("hass", []),
    "eagle3": ("eagle3", []),
}
SECONDS = "training_seconds.json"


def main(
    output_dir: Annotated[pathlib.Path, typer.Option(help="Where drafts and the report go.")],
    updates: Annotated[int, typer.Option(help="Of each draft.")] = 1500,
    seeds: Annotated[int, typer.Option(help="Drafts of each variant.")] = 3,
    limit: Annotated[int, typer.Option(help="Held-out prompts.")] = 64,
    variants: Annotated[str, typer.Option(help="Some of them, by name.")] = ",".join(VARIANTS),
) -> None:
    """Trains, measures and prints."""
    names = variants.split(",")
    drafts = [_train(name, seed, updates, output_dir) for seed in range(seeds) for name in names]
    report = output_dir / "report"
    if not (report / "report.json").exists():
        run(
            "evaluate", *drafts, "ngram", "--prompts", EXAMPLES / "prompts_eval.jsonl", "--k=5",
            "--dtype=float32", f"--evaluate.limit={limit}", "--output-dir", report,
        )  # fmt: skip
    seconds = {draft.name: json.loads((draft / SECONDS).read_text()) for draft in drafts}
    for line in table(EvaluationReport.read(report / "report.json"), names, seconds):
        print(line)


def _train(name: str, seed: int, updates: int, output_dir: pathlib.Path) -> pathlib.Path:
    algorithm, options = VARIANTS[name]
    draft = output_dir / f"{name}-{seed}"
    if (draft / SECONDS).exists():
        return draft
    data = output_dir / ("data-eagle3" if algorithm == "eagle3" else "data")
    shared = ["--recipe", EXAMPLES / f"{algorithm}.yaml", "--data-dir", data, "--output-dir", draft]
    run("prepare", *shared)
    run("generate", *shared)
    begin = time.monotonic()
    run(
        "train", *shared, f"--training.seed={seed}", f"--training.max-steps={updates}",
        f"--training.validation.every-steps={updates}", "--training.tracker.name=none",
        "--skip-evaluation", *options,
    )  # fmt: skip
    with atomic_file(draft / SECONDS, "w") as file:
        json.dump(time.monotonic() - begin, file)
    return draft


def table(
    report: EvaluationReport, names: Sequence[str], seconds: dict[str, float]
) -> Iterable[str]:
    """Lines of Markdown: a row for each variant, means and spreads over its seeds."""
    positions = report.settings.k or 0
    heads = ["draft", "tau", "speedup", *(str(place + 1) for place in range(positions)), "training"]
    yield "| " + " | ".join(heads) + " |"
    yield "|---" * len(heads) + "|"
    for name in names:
        found = {key: value for key, value in report.drafters.items() if key[:-2] == name}
        took = statistics.mean(seconds[key] for key in found)
        yield _row(name, list(found.values()), f"{took:.0f} s")
    yield _row("n-gram", [report.drafters["n-gram"]], "none")


def _row(name: str, results: Sequence[DrafterResult], training: str) -> str:
    shares_of_each = [result.acceptance.acceptance_by_position for result in results]
    cells = [
        name,
        _mean_and_spread([result.acceptance.tau or 0.0 for result in results]),
        _mean_and_spread([result.speedup for result in results]),
        *(f"{statistics.mean(shares):.1%}" for shares in zip(*shares_of_each, strict=True)),
        training,
    ]
    return "| " + " | ".join(cells) + " |"


def _mean_and_spread(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.2f}"
    return f"{mean:.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    os.chdir(os.environ.get("BUILD_WORKING_DIRECTORY", "."))
    typer.run(main)
