"""Decoding end to end: our loop with everything that drafts, beside transformers' decoders.

    ./bazelw run //benchmarks:decoding -- DRAFT [--prompts=FILE] [--limit=N] [--quick]

Without bazel: ``python -m benchmarks.decoding DRAFT``. DRAFT is the folder of a draft model, such
as one for the tiny verifier (examples/tiny_verifier). Greedy, in float32, one prompt at a time; all
decoders take turns prompt by prompt, and should write the same tokens. A second table says where
the time of a step goes.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Annotated

import torch
import transformers
import typer
from benchmarks.decoding.decoders import NOTES, Settings, named_decoders
from benchmarks.decoding.results import Result, result_of, show, write
from benchmarks.decoding.step_profile import profile
from benchmarks.measurement import Floors

from speculators.configs.model_config import SpeculatorModelConfig
from speculators.decoding.trees import DynamicTree, Tree, parse_tree
from speculators.evaluation.decoders import Batches
from speculators.evaluation.prompts import Prompt, read_prompts
from speculators.evaluation.results import EvaluationSettings
from speculators.evaluation.speed import take_turns
from speculators.models.hub import local_directory
from speculators.models.speculator_model import SpeculatorModel
from speculators.models.verifier.verifier import Verifier

DYNAMIC = DynamicTree()


def main(
    draft: Annotated[str, typer.Argument(help="The folder of a draft model.")],
    verifier: Annotated[str, typer.Option(help="By default the one that the draft names.")] = "",
    prompts: Annotated[
        pathlib.Path, typer.Option(help="What to continue, as for `evaluate`.")
    ] = pathlib.Path("examples/tiny_verifier/prompts_eval.jsonl"),
    limit: Annotated[int, typer.Option(help="Prompts, the first ones of the file.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(help="Of each prompt.")] = 128,
    k: Annotated[
        int | None, typer.Option(help="Tokens of our chains; by default as the draft says.")
    ] = None,
    tree: Annotated[
        list[str] | None, typer.Option(help="A shape; by default dynamic, and 2,2,1.")
    ] = None,
    nodes: Annotated[int, typer.Option(help="Of dynamic trees.")] = DYNAMIC.nodes,
    depth: Annotated[int, typer.Option(help="Of dynamic trees.")] = DYNAMIC.depth,
    children: Annotated[int, typer.Option(help="In dynamic trees.")] = DYNAMIC.children,
    repeats: Annotated[int, typer.Option(help="Of each prompt; their median counts.")] = 3,
    quick: Annotated[bool, typer.Option(help="Two short texts, to see that it runs.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Torch's number of threads.")] = None,
    output: Annotated[pathlib.Path, typer.Option(help="The JSON file.")] = pathlib.Path(
        "benchmark_decoding.json"
    ),
) -> None:
    """Decodes in turns, prints Markdown, writes JSON."""
    if threads is not None:
        torch.set_num_threads(threads)
    if quick:
        limit, max_new_tokens, repeats = min(limit, 2), min(max_new_tokens, 12), 1
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    machine = {
        **Floors(device, quick=quick).described(),
        "transformers": transformers.__version__,
    }
    judge, model = _load(draft, verifier, device)
    asked = read_prompts(prompts, judge.tokenizer, limit=limit)
    settings = Settings(draft, len(asked), max_new_tokens, k, repeats, warmup=0 if quick else 2)
    trees = [parse_tree(shape, nodes, depth, children) for shape in tree or ("dynamic", "2,2,1")]
    results = _decode(judge, model, trees, asked, settings)
    profiles = {
        "plain": profile(judge, None, None, asked, settings),
        "chain": profile(judge, model, None, asked, settings),
        **{f"tree, {shape}": profile(judge, model, shape, asked, settings) for shape in trees},
    }
    show(machine, results, profiles, NOTES)
    write(output, machine, settings, results, profiles)


def _load(draft: str, verifier: str, device: str) -> tuple[Verifier, SpeculatorModel]:
    folder = local_directory(draft)
    named = SpeculatorModelConfig.from_pretrained(folder).speculators_config.verifier.name_or_path
    path = verifier or named
    if path is None:
        raise typer.BadParameter(f"{draft} names no verifier; give it with --verifier")
    judge = Verifier.from_pretrained(path, device=device, dtype=torch.float32)
    model = SpeculatorModel.from_pretrained(
        folder, verifier=judge, dtype=torch.float32, device=judge.device
    )
    return judge, model


def _decode(
    verifier: Verifier,
    model: SpeculatorModel,
    trees: Sequence[Tree],
    prompts: Sequence[Prompt],
    settings: Settings,
) -> list[Result]:
    """All decoders on all prompts, in turns; the first of them is the baseline."""
    batches = Batches(
        verifier,
        prompts,
        EvaluationSettings(
            k=settings.k,
            max_new_tokens=settings.max_new_tokens,
            batch_size=1,
            temperature=0.0,
            seed=0,
            warmup=settings.warmup,
            repeats=settings.repeats,
        ),
    )
    decoders = named_decoders(batches, verifier, model, trees)
    done = take_turns(
        list(decoders.values()),
        len(batches),
        repeats=settings.repeats,
        warmup=settings.warmup,
        device=verifier.device,
        after_batch=lambda _: None,
    )
    return [
        result_of(name, verifier, prompts, done[0], found)
        for name, found in zip(decoders, done, strict=True)
    ]


if __name__ == "__main__":
    os.chdir(os.environ.get("BUILD_WORKING_DIRECTORY", "."))
    typer.run(main)
