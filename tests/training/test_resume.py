"""A run that is killed, whenever, and resumed ends with the bits of a run that was not."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.training import kill_target


class Server:
    """Runs of ``kill_target``."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", kill_target.__name__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def run(self, name: str, kill_after: int | None = None, delay: float = 0.0) -> tuple[int, int]:
        """Begins or resumes a run; how it ended, and how many updates it had when it was killed.

        Args:
            name: its folder.
            kill_after: updates after which it is killed with SIGKILL; None lets it end.
            delay: seconds to wait then, so that it is killed anywhere in its work.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        child = done = 0
        for word, number in self._lines():
            if word == "ended":
                return number, done
            if word == "process":
                child = number
            else:
                done += number
            if kill_after is not None and child and done >= kill_after:
                time.sleep(delay)
                os.kill(child, signal.SIGKILL)
                kill_after = None
        raise AssertionError("the server has ended")

    def _lines(self) -> Iterator[tuple[str, int]]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            word, number = line.split()
            yield word, int(number)

    def close(self) -> None:
        """Ends it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


@pytest.fixture
def server(tmp_path: pathlib.Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.close()


def _files(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pt"
    }


def _tensors(state: dict[str, Any]) -> dict[tuple[int, int, str], torch.Tensor]:
    """Of an optimizer's state: (part, parameter, name) to tensor."""
    return {
        (number, parameter, name): tensor
        for number, part in enumerate(state["parts"])
        for parameter, tensors in part["state"].items()
        for name, tensor in tensors.items()
    }


def test_killed_at_three_random_points(server: Server, tmp_path: pathlib.Path) -> None:
    assert server.run("whole")[0] == 0
    random_points = random.Random(0)
    last = int(max((tmp_path / "whole").glob("checkpoint-*")).name[-6:])
    assert last > 25
    done = 0
    for _ in range(3):
        kill_after = random_points.randint(done + 1, done + last // 4)
        code, done = server.run("killed", kill_after, random_points.uniform(0, 0.05))
        assert code == -signal.SIGKILL
        assert done < last
    assert server.run("killed")[0] == 0
    whole, killed = _files(tmp_path / "whole"), _files(tmp_path / "killed")
    assert killed.keys() == whole.keys()
    assert [name for name in whole if killed[name] != whole[name]] == []
    assert {"best/model.safetensors", f"checkpoint-{last:06d}/draft/model.safetensors"} <= set(
        whole
    )
    whole_state, killed_state = (
        torch.load(tmp_path / name / f"checkpoint-{last:06d}" / "optimizer.pt", weights_only=True)
        for name in ("whole", "killed")
    )
    assert _tensors(killed_state).keys() == _tensors(whole_state).keys()
    torch.testing.assert_close(_tensors(killed_state), _tensors(whole_state), rtol=0, atol=0)
