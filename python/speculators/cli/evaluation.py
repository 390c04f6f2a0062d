"""``speculators evaluate``: drafts that lie anywhere, side by side, or here and in vLLM."""

import pathlib
import sys
from collections.abc import Mapping, Sequence

import torch
import typer
from rich.console import Console

from speculators.cli.failures import UsageError
from speculators.cli.progress import ConsoleProgress
from speculators.cli.recipe import Recipe, VerifierSettings
from speculators.cli.reports import report_folder
from speculators.configs.model_config import SpeculatorModelConfig
from speculators.decoding.draft_models import Shaped, WithSuffix
from speculators.decoding.suffix_drafter import SuffixDrafter
from speculators.evaluation.evaluate import NGRAM, SUFFIX, AnyDrafter, evaluate
from speculators.evaluation.prompts import Prompt, read_prompts
from speculators.evaluation.report import EvaluationReport, table
from speculators.evaluation.search import candidates, search
from speculators.evaluation.suffix_corpus import read_suffix_corpus
from speculators.integrations.vllm.contract import check as contract
from speculators.integrations.vllm.contract.endpoint import Endpoint
from speculators.models.hub import local_directory
from speculators.models.speculator_model import SpeculatorModel
from speculators.models.verifier.verifier import Verifier

WITH_SUFFIX = "+suffix"
"""Behind a folder's name: the model and the suffix drafter together."""


def evaluate_drafts(recipe: Recipe, drafts: Sequence[str], output: pathlib.Path | None) -> None:
    """Measures drafts and prints the table.

    Args:
        recipe: verifier and evaluation settings; without a verifier, the first draft's.
        drafts: folders or Hub names, each with ``"+suffix"`` behind it or without, ``"ngram"`` and
            ``"suffix"``.
        output: where the report goes; by default the first draft's folder, see ``cli.reports``.
    """
    verifier, models, folders = _load(recipe, drafts)
    suffix = suffix_drafter(recipe, verifier)
    free: dict[str, AnyDrafter] = {NGRAM: NGRAM, SUFFIX: suffix}

    def drafter(draft: str) -> AnyDrafter:
        if draft in free:
            return free[draft]
        model = models[draft.removesuffix(WITH_SUFFIX)]
        return WithSuffix(model, suffix) if draft.endswith(WITH_SUFFIX) else model

    drafters = {name: drafter(draft) for name, draft in _names(drafts).items()}
    drafters |= trees(recipe, verifier, drafters)
    progress = ConsoleProgress()
    report = measure(verifier, drafters, _prompts(recipe, verifier), recipe, progress)
    Console().print(table(report))
    place = output or next((report_folder(*item) for item in folders.items()), None)
    if place is not None:
        report.write(place)
        typer.echo(f"{place}/report.md")


def search_shapes(recipe: Recipe, drafts: Sequence[str], output: pathlib.Path | None) -> None:
    """Finds the fastest way of drafting, and measures it beside the draft's own.

    Args:
        recipe: verifier and evaluation settings; without a verifier, the draft's.
        drafts: one folder or Hub name.
        output: where the report goes; by default the draft's folder, see ``cli.reports``.
    """
    if len(drafts) != 1 or _folder(drafts[0]) != drafts[0]:
        raise UsageError(f"got the drafts {list(drafts)}; a search takes one draft model")
    verifier, models, folders = _load(recipe, drafts)
    (model,) = models.values()
    prompts = _prompts(recipe, verifier)
    # The winner is measured on prompts that did not choose it.
    tried, kept = prompts[: len(prompts) // 2], prompts[len(prompts) // 2 :]
    if not tried:
        raise UsageError(f"there is {len(prompts)} prompt; a search needs at least two")
    progress = ConsoleProgress()

    def timed(drafters: Mapping[str, AnyDrafter], some: Sequence[Prompt]) -> EvaluationReport:
        return measure(verifier, drafters, some, recipe, progress, compare_transformers=False)

    shapes = candidates(model, verifier)
    if all(shape.tree is None for shape in shapes.values()):
        progress.message(f"no trees are tried: {verifier.config.model_type} cannot read them")
    found = search(shapes, tried, timed)
    name = next(iter(_names(drafts)))
    report = measure(
        verifier, {f"{name}, {found.name}": found.draft, name: model}, kept, recipe, progress
    )
    for turn in found.rounds:
        Console().print(table(turn))
    Console().print(table(report))
    folder = output or report_folder(drafts[0], folders[drafts[0]])
    report.write(folder)
    # What won on the first prompts need not win on these.
    best, result = max(report.drafters.items(), key=lambda found: found[1].speed.tokens_per_second)
    what = found.name if best == report.main else "the draft's own setting"
    typer.echo(
        f"fastest here: {what}, {result.speedup:.2f}x plain decoding"
        if result.speedup > 1
        else f"nothing is faster than plain decoding here; the best is {what}, "
        f"{result.speedup:.2f}x"
    )
    typer.echo(folder / "report.md")


def compare_with_vllm(
    recipe: Recipe,
    drafts: Sequence[str],
    output: pathlib.Path | None,
    python: pathlib.Path | None,
    endpoint: str | None,
) -> None:
    """Decodes with drafts here and in vLLM, and prints whether the same is accepted.

    Args:
        recipe: verifier and evaluation settings; without a verifier, the first draft's.
        drafts: folders or Hub names.
        output: where the report goes; by default the first draft's folder, see ``cli.reports``.
        python: of the environment with vLLM; None: this one.
        endpoint: a running server instead.

    Raises:
        ContractError: vLLM could not be asked, or accepts something else.
    """
    for draft in drafts:
        if _folder(draft) != draft:
            raise UsageError(f"vLLM could read no directory of {draft}; leave it out")
    verifier, models, folders = _load(recipe, drafts)
    settings = recipe.evaluate
    report = contract.check_contract(
        verifier,
        {name: (models[draft], folders[draft]) for name, draft in _names(drafts).items()},
        [prompt.ids.tolist() for prompt in _prompts(recipe, verifier)],
        contract.run_engine(python or sys.executable) if endpoint is None else Endpoint(endpoint),
        k=settings.k,
        max_new_tokens=settings.max_new_tokens,
    )
    Console().print(contract.table(report))
    typer.echo(report.write(output or report_folder(drafts[0], folders[drafts[0]])))
    if not report.agrees:
        raise contract.ContractError(
            "vLLM does not accept what our decoder accepts; the report lists where they part"
        )


def measure(
    verifier: Verifier,
    drafters: Mapping[str, AnyDrafter],
    prompts: Sequence[Prompt],
    recipe: Recipe,
    progress: ConsoleProgress,
    *,
    compare_transformers: bool = True,
) -> EvaluationReport:
    """Runs the evaluation that a recipe asks for; however it ends, its progress is taken away."""
    settings = recipe.evaluate
    try:
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
            compare_transformers=compare_transformers,
            verifier_name=_from_here(str(verifier.model.name_or_path)),
            command=sys.argv,
            progress=progress,
        )
    finally:
        progress.stop()


def trees(
    recipe: Recipe, verifier: Verifier, drafters: Mapping[str, AnyDrafter]
) -> dict[str, AnyDrafter]:
    """Each that can once more, with the tree that a recipe asks for, if it does."""
    tree = recipe.evaluate.shape()
    if tree is None:
        return {}
    found: dict[str, AnyDrafter] = {}
    for name, draft in drafters.items():
        if isinstance(draft, SpeculatorModel):
            found[f"{name}, tree"] = Shaped(draft, tree=tree)
        elif isinstance(draft, SuffixDrafter):
            found[f"{name}, tree"] = suffix_drafter(recipe, verifier, tree_nodes=tree.nodes)
    return found


def suffix_drafter(recipe: Recipe, verifier: Verifier, *, tree_nodes: int = 0) -> SuffixDrafter:
    """The suffix drafter with the corpus that a recipe names, if it does."""
    path = recipe.evaluate.suffix_corpus
    corpus = None if path is None else read_suffix_corpus(path, verifier.tokenizer)
    return SuffixDrafter(corpus, tree_nodes=tree_nodes)


def load_verifier(settings: VerifierSettings, path: str) -> Verifier:
    """Loads a verifier as a recipe says, from a path or a name on the Hub."""
    return Verifier.from_pretrained(
        path,
        device=settings.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=None if settings.dtype == "auto" else getattr(torch, settings.dtype),
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
    )


def _load(
    recipe: Recipe, drafts: Sequence[str]
) -> tuple[Verifier, dict[str, SpeculatorModel], dict[str, pathlib.Path]]:
    """The verifier, and for each draft that has a model this and its folder."""
    if not drafts:
        raise UsageError("there is no draft; name folders, Hub names, ngram or suffix")
    named = [folder for draft in drafts if (folder := _folder(draft)) is not None]
    folders = {folder: local_directory(folder) for folder in named}
    verifier = _verifier_of(recipe, folders)
    models = {
        draft: SpeculatorModel.from_pretrained(folder, verifier=verifier, device=verifier.device)
        for draft, folder in folders.items()
    }
    return verifier, models, folders


def _prompts(recipe: Recipe, verifier: Verifier) -> list[Prompt]:
    settings = recipe.evaluate
    if settings.prompts is None:
        raise UsageError("there are no prompts; give a file with --prompts")
    return read_prompts(settings.prompts, verifier.tokenizer, limit=settings.limit)


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


def _folder(draft: str) -> str | None:
    """The folder or Hub name that a draft names, None for one without a model."""
    return None if draft in {NGRAM, SUFFIX} else draft.removesuffix(WITH_SUFFIX)


def _names(drafts: Sequence[str]) -> dict[str, str]:
    """A short name for each draft: its folder's, or the whole where two would be alike."""
    short = ["n-gram" if draft == NGRAM else pathlib.Path(draft).name for draft in drafts]
    return {
        name if short.count(name) == 1 else draft: draft
        for name, draft in zip(short, drafts, strict=True)
    }
