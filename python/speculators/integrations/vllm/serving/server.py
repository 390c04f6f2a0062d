"""A vLLM server for as long as it is needed: started, waited for, and stopped in any case.

It gets a session of its own, so that Ctrl-C reaches us alone and the server is stopped in order.
vLLM starts processes itself; whatever of them is left behind goes with the group.
"""

import contextlib
import dataclasses
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType

from speculators.integrations.vllm.serving.client import Client

LOCAL = "127.0.0.1"
_SHOWN_LINES = 15
_POLL_SECONDS = 0.5
_HEALTH_SECONDS = 2.0
_STOP_SECONDS = 30.0


@dataclasses.dataclass(frozen=True)
class ServerCommand:
    """A program to start.

    Attributes:
        words: the program and its arguments.
        changes: variables of the environment that it needs beside the present ones.
    """

    words: tuple[str, ...]
    changes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """The whole environment."""
        return {**os.environ, **self.changes}

    def line(self) -> str:
        """The same for a shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.changes.items()]
        return " ".join([*variables, shlex.join(self.words)])


class ServerError(RuntimeError):
    """The server did not start; the message has the end of its log."""


@contextlib.contextmanager
def running_server(command: ServerCommand, log: pathlib.Path, *, timeout: float) -> Iterator[str]:
    """Starts a server on this machine and waits until it answers.

    Args:
        command: host and port are added to it.
        log: what the server says goes here; it is deleted if all goes well.
        timeout: seconds until the server must answer.

    Yields:
        Its address, such as ``http://127.0.0.1:8000``.

    Raises:
        ServerError: it ended, or did not answer in time.
    """
    port = free_port()
    words = [*command.words, "--host", LOCAL, "--port", str(port)]
    endpoint = f"http://{LOCAL}:{port}"
    log.parent.mkdir(parents=True, exist_ok=True)
    with _terminated_as_interrupted():
        with log.open("wb") as file:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=command.environment(),
                start_new_session=True,
            )
        try:
            _wait_until_healthy(process, endpoint, log, timeout)
            yield endpoint
        finally:
            _stop(process)
    log.unlink(missing_ok=True)  # not reached where something failed


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((LOCAL, 0))
        return int(probe.getsockname()[1])


def tail(log: pathlib.Path, lines: int = _SHOWN_LINES) -> str:
    """The last lines of a log, indented."""
    text = log.read_text(encoding="utf-8", errors="replace")
    return "\n".join(f"  {line}" for line in text.splitlines()[-lines:])


def _wait_until_healthy(
    process: "subprocess.Popen[bytes]", endpoint: str, log: pathlib.Path, timeout: float
) -> None:
    end = time.monotonic() + timeout
    with contextlib.closing(Client(endpoint, timeout=_HEALTH_SECONDS)) as client:
        while time.monotonic() < end:
            if process.poll() is not None:
                raise ServerError(
                    f"the server ended with status {process.returncode}; its log is {log}:\n"
                    f"{tail(log)}"
                )
            if client.healthy():
                return
            time.sleep(_POLL_SECONDS)
    raise ServerError(
        f"the server did not answer within {timeout:.0f} s; give it longer with --start-timeout, "
        f"or see its log {log}:\n{tail(log)}"
    )


def _stop(process: "subprocess.Popen[bytes]") -> None:
    try:
        if process.poll() is None:
            process.terminate()
            process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends this process through its ``finally`` blocks, as Ctrl-C does."""

    def leave(number: int, frame: FrameType | None) -> None:
        del frame
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_server_flags(flags: Sequence[str]) -> None:
    """Whether vLLM's flags leave the place of the server to us.

    Raises:
        ValueError: they say where it is to listen.
    """
    for flag in flags:
        if flag.partition("=")[0] in {"--host", "--port", "--uds"}:
            raise ValueError(f"{flag}: the servers listen on {LOCAL}, on ports that are free")
