"""The choice of a back end: what is loaded serves, a force is obeyed or refused, never ignored."""

import os
import subprocess
import sys

import pytest
import torch

from speculators.ops import backend
from speculators.ops.backend import Backend, Library


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_cpu_tensors_are_served_by_the_compiled_library() -> None:
    assert backend.choose("cpu") == backend.Choice(Backend.CPU, "_C is loaded")


def test_a_device_without_kernels_gets_the_reference() -> None:
    choice = backend.choose("meta")
    assert choice.backend is Backend.REFERENCE
    assert "'meta'" in choice.reason


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_the_reason_names_a_torch_without_cuda() -> None:
    choice = backend.choose("cuda")
    assert choice.backend is Backend.REFERENCE
    assert "built without CUDA" in choice.reason


def test_a_missing_library_falls_back_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend.LIBRARIES, Backend.CPU, Library(False, "no such file"))
    choice = backend.choose("cpu")
    assert choice.backend is Backend.REFERENCE
    assert choice.reason == "_C is not loaded: no such file"
    with backend.forced("_C"), pytest.raises(backend.BackendError, match="no such file"):
        backend.choose("cpu")


def test_a_force_is_obeyed_and_lifted() -> None:
    with backend.forced("reference"):
        assert backend.choose("cpu") == backend.Choice(Backend.REFERENCE, "forced")
        with backend.forced("_C"):
            assert backend.choose("cpu").backend is Backend.CPU
        assert backend.choose("cpu").backend is Backend.REFERENCE
    assert backend.choose("cpu").backend is Backend.CPU


def test_a_force_that_cannot_serve_is_an_error() -> None:
    with backend.forced("_C_cuda"), pytest.raises(backend.BackendError, match="cannot serve"):
        backend.choose("cpu")
    with (
        pytest.raises(ValueError, match="expected one of _C_cuda, _C, reference"),
        backend.forced("c"),
    ):
        pass


def test_the_report_of_the_module_says_what_serves_and_why() -> None:
    process = run("-m", "speculators.ops")
    assert process.returncode == 0, process.stderr
    assert f"torch {torch.__version__}" in process.stdout
    assert "_C: loaded: " in process.stdout
    assert "tensors on cpu: _C (_C is loaded)" in process.stdout
    assert "_host: loaded: " in process.stdout


def test_the_environment_forces_a_back_end() -> None:
    process = run("-m", "speculators.ops", SPECULATORS_OPS_BACKEND="reference")
    assert "tensors on cpu: reference (forced)" in process.stdout, process.stderr
    process = run("-m", "speculators.ops", SPECULATORS_OPS_BACKEND="fast")
    assert process.returncode != 0
    assert "unknown operator back end 'fast'" in process.stderr
