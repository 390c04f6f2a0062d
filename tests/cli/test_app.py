"""The command: it answers at once, knows its version, and tells a bug report what it needs."""

import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import speculators
from speculators.cli.app import app


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output == f"speculators {speculators.__version__}\n"


def test_help_lists_the_commands() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "env" in result.output


def test_an_unknown_command_is_an_error() -> None:
    result = CliRunner().invoke(app, ["tarin"])
    assert result.exit_code == 2
    assert "tarin" in result.output


def test_env_names_versions_and_back_ends() -> None:
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 0, result.output
    assert f"torch {torch.__version__}" in result.output
    assert "tensors on cpu: _C" in result.output
    assert "vllm" in result.output


def test_python_m_speculators_is_the_command() -> None:
    command = [sys.executable, "-m", "speculators", "--version"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert process.stdout == f"speculators {speculators.__version__}\n"


@pytest.mark.parametrize("arguments", [["--version"], ["--help"]])
def test_quick_answers_do_not_import_torch(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from speculators.cli.app import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True)
