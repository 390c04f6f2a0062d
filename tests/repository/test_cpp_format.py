"""clang-format over every C++ and CUDA file."""

import subprocess

import clang_format
from tests.repository import sources

SUFFIXES = (".cc", ".cu", ".cuh", ".h")


def test_every_file_is_checked() -> None:
    assert sources.files(*SUFFIXES) == sources.tracked(*SUFFIXES)


def test_clang_format() -> None:
    program = clang_format.get_executable("clang-format")
    command = [program, "--dry-run", "--Werror", "--style=file", *sources.files(*SUFFIXES)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
