"""The commands of ``speculators``, called by benchmarks in their own process."""

import pathlib

import typer

from speculators.cli.app import app

EXAMPLES = pathlib.Path("examples/tiny_verifier")


def run(*words: object) -> None:
    """Runs a command, such as ``run("train", "--algo=hass", ...)``; an error ends the benchmark."""
    status = app([str(word) for word in words], standalone_mode=False)
    if status:
        raise typer.Exit(status)
