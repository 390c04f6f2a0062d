"""What hidden states of fewer bits cost a draft: the main job once for each of them and each seed.

    ./bazelw run //benchmarks:store_dtypes -- --output-dir=DIR [--seeds=N] [--updates=N]

Each kind of store is made from the same prompts, the same drafts learn from it, and all decode the
same held-out prompts. Intervals are of 95 %, over prompts, with the verifications of all seeds. The
table is that of RESULTS.md. A run that was stopped goes on.
"""

import itertools
import os
import pathlib
from typing import Annotated

import torch
import typer
from benchmarks.commands import EXAMPLES, run

from speculators.data.store import HiddenStateStore
from speculators.decoding import GenerationSettings, generate
from speculators.evaluation.acceptance import RESAMPLES, tau_interval
from speculators.evaluation.prompts import read_prompts
from speculators.models import SpeculatorModel
from speculators.models.verifier import Verifier

BATCH = 16


def main(
    output_dir: Annotated[pathlib.Path, typer.Option(help="Where stores and drafts go.")],
    algorithm: Annotated[str, typer.Option(help="Of the drafts.")] = "hass",
    seeds: Annotated[int, typer.Option(help="Drafts for each kind of store.")] = 3,
    updates: Annotated[int, typer.Option(help="Of each draft.")] = 2100,
    limit: Annotated[int, typer.Option(help="Held-out prompts.")] = 96,
    max_new_tokens: Annotated[int, typer.Option(help="Of each prompt.")] = 128,
    dtypes: Annotated[str, typer.Option(help="Of the stores.")] = "bfloat16,int8,fp8",
) -> None:
    """Makes, trains, measures and prints."""
    verifier = Verifier.from_pretrained(EXAMPLES / "model", dtype=torch.float32)
    file = EXAMPLES / "prompts_eval.jsonl"
    prompts = [one.ids.tolist() for one in read_prompts(file, verifier.tokenizer, limit=limit)]
    settings = GenerationSettings(max_new_tokens, eos_token_ids=verifier.eos_token_ids)
    found: dict[str, list[list[list[int]]]] = {}
    sizes = {}
    for dtype in dtypes.split(","):
        data = output_dir / f"data-{dtype}"
        found[dtype] = []
        for seed in range(seeds):
            draft = output_dir / f"{dtype}-{seed}"
            if not (draft / "model.safetensors").exists():
                run(
                    "train", f"--recipe={EXAMPLES / algorithm}.yaml", "--output-dir", draft,
                    "--data-dir", data, f"--generate.store-dtype={dtype}", "--skip-evaluation",
                    f"--training.seed={seed}", f"--training.max-steps={updates}",
                    f"--training.validation.every-steps={updates}", "--training.tracker.name=none",
                )  # fmt: skip
            model = SpeculatorModel.from_pretrained(draft, verifier=verifier, dtype=torch.float32)
            traces = []
            for begin in range(0, len(prompts), BATCH):
                traces += generate(verifier, model, prompts[begin : begin + BATCH], settings).traces
            found[dtype].append(traces)
        sizes[dtype] = _bytes_per_token(data / "hidden_states")
    heads = ["store", "bytes of a token", "tau", "of each seed", "beside the first"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    first = next(iter(found.values()))
    for dtype, traces_of_seeds in found.items():
        each = ", ".join(f"{_tau(traces):.2f}" for traces in traces_of_seeds)
        pooled = _pooled(traces_of_seeds)
        low, high = tau_interval(pooled) or (0.0, 0.0)
        tau = f"{_tau(pooled):.2f} ({low:.2f}-{high:.2f})"
        beside = "{:+.3f} ({:+.3f} to {:+.3f})".format(*_difference(pooled, _pooled(first)))
        print(f"| {dtype} | {sizes[dtype]:.1f} | {tau} | {each} | {beside} |")


def _bytes_per_token(directory: pathlib.Path) -> float:
    shards = HiddenStateStore.open(directory).index.shards
    tokens = sum(sum(shard.lengths) for shard in shards)
    return sum(file.stat().st_size for file in directory.iterdir()) / tokens


def _pooled(traces_of_seeds: list[list[list[int]]]) -> list[list[int]]:
    """The verifications of each prompt, of all seeds together."""
    return [list(itertools.chain(*traces)) for traces in zip(*traces_of_seeds, strict=True)]


def _tau(traces: list[list[int]]) -> float:
    return 1 + sum(map(sum, traces)) / sum(map(len, traces))


def _difference(one: list[list[int]], other: list[list[int]]) -> tuple[float, float, float]:
    """How much larger tau is, and the 95 % interval over prompts, drawn for both alike."""
    sums = [torch.tensor([*map(sum, traces)], dtype=torch.float64) for traces in (one, other)]
    counts = [torch.tensor([*map(len, traces)], dtype=torch.float64) for traces in (one, other)]
    drawn = torch.randint(
        len(one), (RESAMPLES, len(one)), generator=torch.Generator().manual_seed(0)
    )
    taus = [s[drawn].sum(1) / n[drawn].sum(1) for s, n in zip(sums, counts, strict=True)]
    ends = (taus[0] - taus[1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return _tau(one) - _tau(other), float(ends[0]), float(ends[1])


if __name__ == "__main__":
    os.chdir(os.environ.get("BUILD_WORKING_DIRECTORY", "."))
    typer.run(main)
