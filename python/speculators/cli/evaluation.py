"""``speculators evaluate``: drafts that lie anywhere, side by side on one file of prompts."""

import pathlib
import sys
from collections.abc import Mapping, Sequence

import torch
import typer
from rich.console import Console

from speculators.cli.failures import UsageError
from speculators.cli.progress import ConsoleProgress
from speculators.cli.recipe import Recipe, VerifierSettings
from speculators.configs.model_config import SpeculatorModelConfig
from speculators.evaluation.evaluate import NGRAM, AnyDrafter, evaluate
from speculators.evaluation.prompts import Prompt, read_prompts
from speculators.evaluation.report import EvaluationReport, table
from speculators.models.hub import local_directory
from speculators.models.speculator_model import SpeculatorModel
from speculators.models.verifier.verifier import Verifier


def evaluate_drafts(recipe: Recipe, drafts: Sequence[str], output: pathlib.Path | None) -> None:
    """Measures drafts and prints the table.

    Args:
        recipe: verifier and evaluation settings; without a verifier, the first draft's.
        drafts: folders or Hub names, or ``"ngram"``.
        output: where the report goes; by default the first draft's folder.
    """
    settings = recipe.evaluate
    if settings.prompts is None:
        raise UsageError("there are no prompts; give a file with --prompts")
    folders = {draft: local_directory(draft) for draft in drafts if draft != NGRAM}
    verifier = _verifier_of(recipe, folders)
    named = _names(drafts, folders)
    drafters: dict[str, AnyDrafter] = {}
    for name, draft in named.items():
        drafters[name] = (
            NGRAM
            if draft == NGRAM
            else SpeculatorModel.from_pretrained(
                folders[draft], verifier=verifier, device=verifier.device
            )
        )
    progress = ConsoleProgress()
    prompts = read_prompts(settings.prompts, verifier.tokenizer, limit=settings.limit)
    report = measure(verifier, drafters, prompts, recipe, progress)
    progress.stop()
    Console().print(table(report))
    place = output or next(iter(folders.values()), None)
    if place is not None:
        report.write(place)
        typer.echo(f"{place}/report.md")


def measure(
    verifier: Verifier,
    drafters: Mapping[str, AnyDrafter],
    prompts: Sequence[Prompt],
    recipe: Recipe,
    progress: ConsoleProgress,
) -> EvaluationReport:
    """Runs the evaluation that a recipe asks for."""
    settings = recipe.evaluate
    return evaluate(
        verifier,
        drafters,
        prompts,
        k=settings.k,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        temperature=settings.temperature,
        seed=recipe.seed,
        repeats=settings.repeats,
        verifier_name=_from_here(str(verifier.model.name_or_path)),
        command=sys.argv,
        progress=progress,
    )


def load_verifier(settings: VerifierSettings, path: str) -> Verifier:
    """Loads a verifier as a recipe says, from a path or a name on the Hub."""
    return Verifier.from_pretrained(
        path,
        device=settings.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=None if settings.dtype == "auto" else getattr(torch, settings.dtype),
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
    )


def _verifier_of(recipe: Recipe, folders: Mapping[str, pathlib.Path]) -> Verifier:
    """The recipe's verifier, else the one that a draft names."""
    path = recipe.verifier.path
    for folder in folders.values():
        config = SpeculatorModelConfig.from_pretrained(folder)
        path = path or config.speculators_config.verifier.name_or_path
    if path is None:
        raise UsageError("no draft names its verifier; give it with --verifier")
    return load_verifier(recipe.verifier, path)


def _from_here(path: str) -> str:
    """A path below the working folder, relative to it; anything else as it is."""
    here = pathlib.Path.cwd()
    below = pathlib.Path(path).is_relative_to(here)
    return str(pathlib.Path(path).relative_to(here)) if below else path


def _names(drafts: Sequence[str], folders: dict[str, pathlib.Path]) -> dict[str, str]:
    """A short name for each draft: its folder's, or the whole where two would be alike."""
    short = [pathlib.Path(draft).name if draft in folders else "n-gram" for draft in drafts]
    return {
        name if short.count(name) == 1 else draft: draft
        for name, draft in zip(short, drafts, strict=True)
    }
