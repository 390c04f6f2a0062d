"""The commands that make and measure a draft; each a thin layer over a stage of the job.

All of them take the same recipe, so a stage that is run alone finds what the others left. Settings
that have no flag of their own are given by their dotted name: ``--training.epochs=3``.
"""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from speculators.cli.failures import UsageError, one_line_errors

Algo = Annotated[
    str | None, typer.Option("--algo", help="The algorithm: eagle, hass, eagle3, or one of yours.")
]
VerifierPath = Annotated[
    str | None, typer.Option("--verifier", help="The verifier: a folder, or a name on the Hub.")
]
Data = Annotated[
    str | None,
    typer.Option("--data", help="What to train on: JSON, JSONL, Parquet, or a dataset's name."),
]
RecipeFile = Annotated[
    pathlib.Path | None, typer.Option("--recipe", help="A YAML file of settings.")
]
OutputDir = Annotated[
    pathlib.Path | None, typer.Option("--output-dir", help="Where the draft and its report go.")
]
DataDir = Annotated[
    pathlib.Path | None,
    typer.Option("--data-dir", help="Where prepared data goes, if not OUTPUT/data: to share it."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace data that other settings made.")
]

# Further words are settings by their dotted names.
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}


def train(
    context: typer.Context,
    algo: Algo = None,
    verifier: VerifierPath = None,
    data: Data = None,
    recipe: RecipeFile = None,
    output_dir: OutputDir = None,
    data_dir: DataDir = None,
    init_from: Annotated[
        str | None, typer.Option("--init-from", help="A draft to go on from, not a new one.")
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on from the last checkpoint in the output folder.")
    ] = True,
    skip_evaluation: Annotated[
        bool, typer.Option("--skip-evaluation", help="Only make the draft.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Make a draft for a verifier, and measure what it brings.

    Prepares the data, lets the verifier answer and keeps its hidden states, trains, and decodes
    held-out prompts with and without the draft. What is there already is used again if it fits.
    Without a verifier it takes the small one that comes with the sources.
    """
    with (
        one_line_errors(goes_on=True),
        _job(
            context, algo, verifier, data, recipe, output_dir, data_dir, overwrite, init_from
        ) as job,
    ):
        job.prepare()
        job.generate()
        job.train(resume=resume)
        if not skip_evaluation:
            _print(job.evaluate(), job)


def prepare(
    context: typer.Context,
    verifier: VerifierPath = None,
    data: Data = None,
    recipe: RecipeFile = None,
    output_dir: OutputDir = None,
    data_dir: DataDir = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn conversations, texts or token ids into token ids and loss masks."""
    with (
        one_line_errors(goes_on=True),
        _job(context, None, verifier, data, recipe, output_dir, data_dir, overwrite) as job,
    ):
        job.prepare()


def generate(
    context: typer.Context,
    algo: Algo = None,
    verifier: VerifierPath = None,
    recipe: RecipeFile = None,
    output_dir: OutputDir = None,
    data_dir: DataDir = None,
    regenerate: Annotated[
        bool | None, typer.Option(help="Let the verifier write the answers.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Let the verifier read, or answer, what was prepared, and keep its hidden states."""
    with one_line_errors(goes_on=True):
        if regenerate is not None:
            context.args.append(f"--generate.regenerate={str(regenerate).lower()}")
        with _job(context, algo, verifier, None, recipe, output_dir, data_dir, overwrite) as job:
            job.generate()


def evaluate(
    context: typer.Context,
    drafts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Side by side: draft folders or Hub names, ngram, suffix, or FOLDER+suffix."
        ),
    ] = None,
    draft: Annotated[
        list[str] | None,
        typer.Option("--draft", help="Another of them; may be given several times."),
    ] = None,
    verifier: VerifierPath = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", help="A file of prompts, as for training.")
    ] = None,
    recipe: RecipeFile = None,
    output_dir: OutputDir = None,
    k: Annotated[
        int | None, typer.Option("--k", help="Tokens drafted before each verification.")
    ] = None,
    tree: Annotated[
        str | None,
        typer.Option(
            "--tree", help="Each model with trees, too: dynamic, widths such as 4,2,1, or a .json."
        ),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option("--nodes", help="Of a dynamic tree, those verified.")
    ] = None,
    depth: Annotated[int | None, typer.Option("--depth", help="Of a dynamic tree.")] = None,
    search: Annotated[
        bool,
        typer.Option(
            "--search", help="Find the number of tokens or the tree that is fastest here."
        ),
    ] = False,
    suffix_corpus: Annotated[
        str | None,
        typer.Option("--suffix-corpus", help="Earlier outputs for suffix: a folder or a file."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="The verifier's: float32, bfloat16, auto.")
    ] = None,
    against_vllm: Annotated[
        bool,
        typer.Option("--against-vllm", help="Compare with what vLLM accepts, step by step."),
    ] = False,
    vllm_python: Annotated[
        pathlib.Path | None,
        typer.Option("--vllm-python", help="Python of the environment with vLLM, if not this one."),
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", help="A running vLLM server with the draft.")
    ] = None,
) -> None:
    """Decode prompts with and without drafts: tokens per verification, speed, and equality.

    ngram and suffix draft from the text itself and need no model. With FOLDER+suffix the model and
    the suffix drafter work together: each time, the one that expects to have more accepted drafts.

    With --tree each model drafts chains and trees, side by side. With --search many numbers of
    tokens and many trees are tried on some of the prompts, and the fastest is measured on the rest.

    With --against-vllm the same prompts go through vLLM, and what it accepts must be the same.

    The report goes to the first draft's folder, or to outputs/NAME for a draft of the Hub.
    """
    with one_line_errors():
        from speculators.cli.evaluation import compare_with_vllm, evaluate_drafts, search_shapes

        # Settings by their dotted names arrive among the drafts, which take all that is left.
        named = drafts or []
        context.args.extend(word for word in named if word.startswith("--"))
        named = [*(word for word in named if not word.startswith("--")), *(draft or [])]
        words = {
            "evaluate.prompts": prompts,
            "evaluate.k": k,
            "evaluate.tree": tree,
            "evaluate.nodes": nodes,
            "evaluate.depth": depth,
            "evaluate.suffix_corpus": suffix_corpus,
            "verifier.dtype": dtype,
        }
        vllm = against_vllm or endpoint is not None
        if search:
            _check_search(context, words, vllm=vllm)
        settings = _recipe(context, None, verifier, None, recipe, words, example=False)
        if vllm:
            compare_with_vllm(settings, named, output_dir, vllm_python, endpoint)
        elif search:
            search_shapes(settings, named, output_dir)
        else:
            evaluate_drafts(settings, named, output_dir)


def _check_search(context: typer.Context, words: Mapping[str, Any], *, vllm: bool) -> None:
    """A recipe may say how its draft drafts; who asks for it and for a search means one of them."""
    from speculators.cli.recipe import parse_flags

    if vllm:
        raise UsageError("--search times our own decoder; vLLM is searched by `bench --k=1,3,5`")
    given = {name for name, value in words.items() if value is not None}
    given |= parse_flags(context.args).keys()
    shape = [f"evaluate.{name}" for name in ("k", "tree", "nodes", "depth", "children")]
    if surplus := sorted(given.intersection(shape)):
        raise UsageError(
            f"--search finds the number of tokens or the tree itself, and {', '.join(surplus)} "
            "would be passed over; leave out one or the other"
        )


def _recipe(
    context: typer.Context,
    algo: str | None,
    verifier: str | None,
    data: str | None,
    file: pathlib.Path | None,
    words: dict[str, Any] | None = None,
    *,
    example: bool = True,
) -> Any:
    from speculators.cli.examples import example_recipe
    from speculators.cli.recipe import parse_flags, read_recipe

    flags = {"algorithm": algo, "verifier.path": verifier, "data": data, **(words or {})}
    flags = {name: value for name, value in flags.items() if value is not None}
    if file is None and verifier is None and example:
        file = example_recipe(algo)
    if file is not None and not file.is_file():
        raise UsageError(f"there is no recipe {file}; expected a YAML file")
    return read_recipe(file, {**flags, **parse_flags(context.args)})


@contextlib.contextmanager
def _job(
    context: typer.Context,
    algo: str | None,
    verifier: str | None,
    data: str | None,
    file: pathlib.Path | None,
    output_dir: pathlib.Path | None,
    data_dir: pathlib.Path | None,
    overwrite: bool,
    init_from: str | None = None,
) -> Iterator[Any]:
    """The job; at the end its progress is taken away, lest the terminal stay without a cursor."""
    recipe = _recipe(context, algo, verifier, data, file, {"init_from": init_from})
    from speculators.cli.job import Folders, Job
    from speculators.cli.progress import ConsoleProgress

    output = (output_dir or pathlib.Path("outputs") / recipe.algorithm).absolute()
    folders = Folders(output, (data_dir or output / "data").absolute())
    progress = ConsoleProgress()
    try:
        yield Job(recipe, folders, progress, overwrite=overwrite)
    finally:
        progress.stop()


def _print(report: Any, job: Any) -> None:
    from rich.console import Console

    from speculators.evaluation.report import table

    Console().print(table(report))
    typer.echo(f"{job.folders.output}/report.md")
