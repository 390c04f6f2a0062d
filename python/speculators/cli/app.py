"""The Typer application behind ``speculators`` and ``python -m speculators``.

Subcommands import what they run when they run, so that ``--help`` and ``--version`` answer at once.
"""

from collections.abc import Sequence
from typing import Annotated

import typer

from speculators.cli import commands, serving
from speculators.version import __version__

app = typer.Typer(
    name="speculators",
    help="Train, evaluate and serve draft models for speculative decoding.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"speculators {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """The options that stand before a subcommand."""


@app.command()
def env() -> None:
    """Print versions and operator back ends: what a bug report needs."""
    from speculators.cli.environment import report

    typer.echo(report())


app.command(context_settings=commands.SETTINGS)(commands.prepare)
app.command(context_settings=commands.SETTINGS)(commands.generate)
app.command(context_settings=commands.SETTINGS)(commands.train)
app.command(context_settings=commands.SETTINGS)(commands.evaluate)
app.command(context_settings=serving.VLLM_FLAGS)(serving.serve)
app.command(context_settings=serving.VLLM_FLAGS)(serving.bench)


def main(arguments: Sequence[str] | None = None) -> None:
    """The console entry point.

    Args:
        arguments: the command's words; None for the process's own.
    """
    app(args=arguments, prog_name="speculators")
