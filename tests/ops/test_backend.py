"""The choice of a back end: what is loaded serves, a force is obeyed or refused, never ignored."""

import os
import runpy
import subprocess
import sys

import pytest
import torch

from speculators.ops import backend
from speculators.ops.backend import Backend, Library


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


def test_an_old_gpu_gets_the_reference_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend.LIBRARIES, Backend.CUDA, Library(True, "a file"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    reason = "the GPU has compute capability 7.5, _C_cuda needs 8.0"
    assert backend.choose("cuda") == backend.Choice(Backend.REFERENCE, reason)
    with backend.forced("_C_cuda"), pytest.raises(backend.BackendError, match=reason):
        backend.choose("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert backend.choose("cuda").backend is Backend.CUDA


def test_the_choice_of_a_gpu_can_be_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend.LIBRARIES, Backend.CUDA, Library(True, "a file"))

    @torch.compile(fullgraph=True, backend="eager")
    def double_if_compiled(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if backend.choose("cuda").backend is Backend.CUDA else x

    assert double_if_compiled(torch.ones(())).item() == 2


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


def test_the_module_says_what_serves_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_module("speculators.ops", run_name="__main__")
    report = capsys.readouterr().out
    assert f"torch {torch.__version__}" in report
    assert "_C: loaded: " in report
    assert "tensors on cpu: _C (_C is loaded)" in report
    assert "_host: loaded: " in report


def test_the_environment_forces_a_back_end() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "speculators.ops"],
        env={**os.environ, "SPECULATORS_OPS_BACKEND": "reference"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "tensors on cpu: reference (forced)" in process.stdout, process.stderr
