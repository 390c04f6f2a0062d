"""install_bazel.sh: where it cannot work it says what to do, and leaves nothing behind."""

import os
import pathlib
import subprocess

import pytest


def install(prefix: pathlib.Path, path: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bazel/install_bazel.sh", prefix],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("answer", ["exit 127", "echo https://mirror/other/", "exit 0"])
def test_without_a_mirror_it_names_bazelisk(answer: str, tmp_path: pathlib.Path) -> None:
    apt = tmp_path / "bin" / "apt-get"
    apt.parent.mkdir()
    apt.write_text(f"#!/bin/sh\n{answer}\n")
    apt.chmod(0o755)
    process = install(tmp_path / "cache" / "bazel", f"{apt.parent}:{os.environ['PATH']}")
    assert process.returncode == 1
    assert "apt knows no Debian mirror; put bazelisk or bazel 7.7.1 on PATH" in process.stderr
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_installation_is_left_alone(tmp_path: pathlib.Path) -> None:
    program = tmp_path / "bin" / "bazel"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    process = install(tmp_path, os.environ["PATH"])
    assert (process.returncode, process.stderr) == (0, "")
