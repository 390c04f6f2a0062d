"""mypy, strict, over every Python file."""

import pathlib
import shutil
import subprocess

from tests.repository import sources


def test_mypy(tmp_path: pathlib.Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree("tests/repository/third_party_types", cache)
    command = ["bazel/mypy", "--config-file=pyproject.toml", f"--cache-dir={cache}"]
    process = subprocess.run(
        [*command, *sources.files(".py")], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
