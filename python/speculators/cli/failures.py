"""What went wrong, in one line: exit status 2 if the command was wrong, 1 if the work failed."""

import contextlib
import os
from collections.abc import Iterator

import typer

USAGE, FAILURE = 2, 1


@contextlib.contextmanager
def one_line_errors(*, goes_on: bool = False) -> Iterator[None]:
    """Ends the command with a line, not a traceback, for errors that tell the user what to do.

    Others keep their traceback: they are ours, and a report needs it. ``SPECULATORS_TRACEBACK=1``
    shows it always.

    Args:
        goes_on: whether the same command takes up what an interrupted one left.
    """
    try:
        yield
    except KeyboardInterrupt:
        again = "; the same command goes on from here" if goes_on else ""
        _end(f"interrupted{again}", FAILURE)
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        from speculators.configs.errors import ConfigError

        usage = isinstance(error, ConfigError | UsageError)
        known = usage or isinstance(error, ValueError | OSError | RuntimeError | TypeError)
        if not known or not str(error) or os.environ.get("SPECULATORS_TRACEBACK") == "1":
            raise
        _end(str(error), USAGE if usage else FAILURE)


class UsageError(ValueError):
    """The command cannot mean anything: a wrong name, a missing path."""


def _end(message: str, status: int) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(status)
