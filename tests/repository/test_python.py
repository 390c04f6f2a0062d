"""ruff over every Python file, and the layers of the architecture."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from tests.repository import sources


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, check=False
    )


def test_every_python_file_is_checked() -> None:
    assert sources.files(".py") == sources.tracked(".py")


def test_ruff_check() -> None:
    process = run("ruff", "check", "--no-cache", *sources.files(".py"))
    assert process.returncode == 0, process.stdout + process.stderr


def test_ruff_format() -> None:
    process = run("ruff", "format", "--no-cache", "--diff", *sources.files(".py"))
    assert process.returncode == 0, process.stdout + process.stderr


def lint_imports(package_folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(package_folder), *sys.path])
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", program, "--config=pyproject.toml", "--no-cache"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def copy(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the package's Python files, to plant mistakes in."""
    for file in sources.files(".py"):
        if file.startswith("python/speculators/"):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / file)
    return tmp_path / "python"


def test_no_import_runs_upwards(copy: pathlib.Path) -> None:
    process = lint_imports(copy)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "Layers KEPT" in process.stdout


@pytest.mark.parametrize("line", ["import speculators.cli.app", "from speculators.cli import app"])
@pytest.mark.parametrize("indent", ["", "def late():\n    "])
def test_an_import_that_runs_upwards_is_found(copy: pathlib.Path, line: str, indent: str) -> None:
    with (copy / "speculators" / "ops" / "host.py").open("a") as file:
        file.write(f"\n{indent}{line}\n")
    process = lint_imports(copy)
    assert process.returncode != 0
    assert "speculators.ops.host -> speculators.cli" in process.stdout


def test_a_package_outside_of_the_layers_is_found(copy: pathlib.Path) -> None:
    (copy / "speculators" / "helpers").mkdir()
    (copy / "speculators" / "helpers" / "__init__.py").touch()
    process = lint_imports(copy)
    assert process.returncode != 0
    assert "helpers" in process.stdout
