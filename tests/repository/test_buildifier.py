"""buildifier, format and lint, over every BUILD and .bzl file."""

import pathlib
import subprocess

from tests.repository import sources

SUFFIXES = ("BUILD.bazel", ".bzl", "MODULE.bazel")


def test_every_file_is_checked() -> None:
    assert sources.files(*SUFFIXES) == sources.tracked(*SUFFIXES)


def test_buildifier() -> None:
    (program,) = pathlib.Path("..").glob("*buildifier/buildifier")
    command = [str(program), "-mode=diff", "-lint=warn", *sources.files(*SUFFIXES)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
