"""``speculators serve`` and ``speculators bench``: a draft in vLLM.

Flags that are not ours go on to vLLM as they stand, so both commands take all of its flags.
"""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from speculators.cli.failures import FAILURE, UsageError, one_line_errors

if TYPE_CHECKING:
    from speculators.integrations.vllm.serving.checks import ServedDraft
    from speculators.integrations.vllm.serving.server import ServerCommand

# Flags that we do not know, and their values, are vLLM's.
VLLM_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True}

Draft = Annotated[str, typer.Argument(help="The draft: a folder, or a name on the Hub.")]
VerifierPath = Annotated[
    str | None,
    typer.Option("--verifier", help="The verifier, if not the one that the draft names."),
]
DraftTokens = Annotated[
    int | None,
    typer.Option("--k", help="Tokens drafted before each verification, if not the draft's own."),
]


def serve(
    context: typer.Context,
    draft: Draft,
    verifier: VerifierPath = None,
    k: DraftTokens = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the draft and print vLLM's command.")
    ] = False,
) -> None:
    """Serve a draft with its verifier: vLLM, with all of its flags after the draft.

    The draft's files are checked first. What vLLM would pass over in silence is an error here.
    """
    with one_line_errors():
        from speculators.integrations.vllm.serving.command import NoVllmError, become, check_vllm

        served, command = _checked(draft, verifier, k, context.args)
        try:
            warnings = check_vllm(served)
        except NoVllmError as error:
            if not dry_run:
                raise
            warnings = [str(error)]
        _warn([*served.warnings, *warnings])
        if dry_run:
            typer.echo(command.line())
            return
        become(command)


def bench(
    context: typer.Context,
    draft: Draft,
    prompts: Annotated[
        str | None, typer.Option("--prompts", help="A file of prompts, as for training.")
    ] = None,
    verifier: VerifierPath = None,
    k: Annotated[
        str | None,
        typer.Option("--k", help="Tokens to draft, one server for each number, such as 1,3,5."),
    ] = None,
    concurrency: Annotated[
        str, typer.Option("--concurrency", help="Requests at a time, one measurement each.")
    ] = "1,4,16",
    limit: Annotated[int, typer.Option("--limit", help="So many prompts of the file.")] = 64,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="Tokens after each prompt, at most.")
    ] = 128,
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", help="A running server with the draft.")
    ] = None,
    baseline_endpoint: Annotated[
        str | None, typer.Option("--baseline-endpoint", help="A running one without it.")
    ] = None,
    output_dir: Annotated[
        pathlib.Path | None,
        typer.Option("--output-dir", help="Where the report goes, if not to the draft."),
    ] = None,
    start_timeout: Annotated[
        float, typer.Option("--start-timeout", help="Seconds for a server to start.")
    ] = 900.0,
) -> None:
    """Measure vLLM with a draft and without: tokens per second, latency, acceptance, equality.

    It starts the servers itself, one after the other, with vLLM's flags after the draft, or takes
    running ones.
    """
    with one_line_errors(), _interruptible():
        at_a_time = _concurrencies(concurrency, limit)
        ks = [] if k is None else _numbers("--k", k, "1,3,5")
        _check_endpoints(endpoint, baseline_endpoint, context.args, k)
        if prompts is None:
            raise UsageError("there are no prompts; give a file with --prompts")
        if max_new_tokens < 2:
            raise UsageError(f"--max-new-tokens is {max_new_tokens}; expected at least 2")
        served, _ = _checked(draft, verifier, max(ks, default=None), context.args)
        _warn(served.warnings)

        from speculators.cli.progress import ConsoleProgress
        from speculators.cli.reports import report_folder
        from speculators.integrations.vllm.bench import report, run
        from speculators.integrations.vllm.serving.command import check_vllm

        if endpoint is None:
            _warn(check_vllm(served))
            ks = ks or [served.num_draft_tokens]
        plan = run.BenchPlan(
            draft=served,
            ks=ks,
            prompts=prompts,
            limit=limit,
            max_new_tokens=max_new_tokens,
            concurrencies=at_a_time,
            output=output_dir or report_folder(draft, served.directory),
            server_flags=context.args,
            endpoint=endpoint,
            baseline_endpoint=baseline_endpoint,
            start_timeout=start_timeout,
        )
        progress = ConsoleProgress()
        try:
            measured = run.run(plan, progress)
        finally:
            progress.stop()
        from rich.console import Console

        Console().print(report.table(measured))
        typer.echo(f"{plan.output}/{report.JSON}")


def _check_endpoints(
    endpoint: str | None, baseline: str | None, flags: Sequence[str], k: str | None
) -> None:
    from speculators.integrations.vllm.serving.server import check_server_flags

    if endpoint is None and baseline is not None:
        raise UsageError("--baseline-endpoint is there alone; give --endpoint, too, or neither")
    surplus = [*flags, *([] if k is None else ["--k"])]
    if endpoint is not None and surplus:
        raise UsageError(
            f"{' '.join(surplus)}: a server that runs has its flags already; leave them out, or "
            "leave --endpoint out"
        )
    try:
        check_server_flags(flags)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _checked(
    draft: str, verifier: str | None, k: int | None, flags: Sequence[str]
) -> "tuple[ServedDraft, ServerCommand]":
    """The draft, once it is known to fit, and vLLM's command for it."""
    from speculators.integrations.vllm.serving.checks import check_draft
    from speculators.integrations.vllm.serving.command import server_command

    if draft.startswith("-"):
        raise UsageError(f"found {draft} where the draft is expected; vLLM's flags go after it")
    try:
        server_command("", None, flags)
    except ValueError as error:
        raise UsageError(str(error)) from None
    served = check_draft(
        draft,
        verifier=verifier,
        num_draft_tokens=k,
        trust_remote_code="--trust-remote-code" in flags,
        revision=_value(flags, "--revision"),
    )
    return served, server_command(served.verifier, served, flags)


def _value(flags: Sequence[str], name: str) -> str | None:
    """The value of one of vLLM's flags, ``--name value`` or ``--name=value``."""
    for place, flag in enumerate(flags):
        key, equals, value = flag.partition("=")
        if key == name:
            return value if equals else next(iter(flags[place + 1 :]), None)
    return None


def _concurrencies(text: str, limit: int) -> list[int]:
    numbers = _numbers("--concurrency", text, "1,4,16")
    if max(numbers) > limit:
        raise UsageError(
            f"--concurrency asks for {max(numbers)} requests at a time, and --limit for {limit} "
            "prompts; expected at least as many prompts"
        )
    return numbers


def _numbers(flag: str, text: str, example: str) -> list[int]:
    """Numbers with commas between them."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1 or len(set(numbers)) < len(numbers):
        raise UsageError(
            f"{flag} is {text!r}; expected different numbers from 1 up, such as {example}"
        )
    return numbers


def _warn(lines: Sequence[str]) -> None:
    for line in lines:
        typer.echo(f"warning: {line}", err=True)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C has stopped the servers when it arrives here."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("error: interrupted; the servers that it started are stopped", err=True)
        raise typer.Exit(FAILURE) from None
