"""A server that is started: waited for, stopped with its children, told of where it fails."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from tests.vllm import fake_server

from speculators.integrations.vllm.serving import server
from speculators.integrations.vllm.serving.server import ServerCommand

FAKE = str(pathlib.Path(fake_server.__file__))


def command(child: pathlib.Path, start: str = "") -> ServerCommand:
    """The fake server, which starts a process of its own and leaves it to itself."""
    path = os.pathsep.join(filter(None, sys.path))
    changes = {"FAKE_START": start, "FAKE_CHILD": str(child), "PYTHONPATH": path}
    return ServerCommand((sys.executable, FAKE), changes)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody waits for does not."""
    try:
        status = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def ends(pid: int) -> bool:
    for _ in range(100):
        if not alive(pid):
            return True
        time.sleep(0.05)
    return False


def test_a_server_runs_and_is_stopped_with_its_children(tmp_path: pathlib.Path) -> None:
    log, note = tmp_path / "logs" / "server.log", tmp_path / "child"
    with server.running_server(command(note), log, timeout=30) as address:
        assert address.startswith("http://127.0.0.1:")
        assert log.is_file()
        child = int(note.read_text())
        assert alive(child)
    assert ends(child)
    assert not log.exists()


def test_a_server_that_fails_leaves_its_log(tmp_path: pathlib.Path) -> None:
    log = tmp_path / "server.log"
    with pytest.raises(server.ServerError, match=r"status 1(?s:.*)no memory left") as caught:
        with server.running_server(command(tmp_path / "x", "fails"), log, timeout=30):
            pass
    assert str(log) in str(caught.value)
    assert "no memory left" in log.read_text()


def test_a_server_that_does_not_answer_in_time_is_stopped(tmp_path: pathlib.Path) -> None:
    log, note = tmp_path / "server.log", tmp_path / "child"
    with pytest.raises(server.ServerError, match="did not answer within 2 s"):
        with server.running_server(command(note, "hangs"), log, timeout=2):
            pass
    assert log.is_file()
    assert ends(int(note.read_text()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_the_servers(number: int, tmp_path: pathlib.Path) -> None:
    note = tmp_path / "child"
    program = textwrap.dedent(f"""
        import pathlib, sys, time
        from speculators.integrations.vllm.serving.server import ServerCommand, running_server
        command = ServerCommand((sys.executable, {FAKE!r}), {{"FAKE_CHILD": {str(note)!r}}})
        with running_server(command, pathlib.Path({str(tmp_path / "log")!r}), timeout=30):
            print("running", flush=True)
            time.sleep(60)
    """)
    path = os.pathsep.join(sys.path)
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode in {128 + number, -number, 1}, errors
    assert ends(int(note.read_text()))
