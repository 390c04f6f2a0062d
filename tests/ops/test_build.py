"""Building without Bazel: the same sources, and libraries that work."""

import os
import pathlib
import subprocess
import sys

import pytest

from speculators.ops import build

ROOT = build.find_sources()


def test_the_built_libraries_work(tmp_path: pathlib.Path) -> None:
    command = [
        sys.executable,
        "-m",
        "speculators.ops.build",
        "--cuda=no",
        f"--output-dir={tmp_path}",
    ]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    built = sorted(path.name.split(".")[0] for path in tmp_path.iterdir())
    assert built == ["_C", "_host"], "only whole libraries, and nothing half-made, may be left"

    program = (
        "import sys, torch\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "layers = [torch.arange(6.0).view(3, 2), -torch.arange(6.0).view(3, 2)]\n"
        "out = torch.ops.speculators.hidden_state_gather(layers, torch.tensor([2, 0]))\n"
        "assert out.tolist() == [[4, 5, -4, -5], [0, 1, 0, -1]], out\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "import _host\n"
        "assert _host.pack_documents([3, 1, 2], 4) == [[0, 1], [2]]\n"
    )
    arguments = [str(tmp_path / "_C.abi3.so"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program, *arguments], env=environment, check=True)


@pytest.mark.parametrize("library", ["_C", "_C_cuda"])
def test_every_operator_is_in_its_library(library: str) -> None:
    """The sources that the build finds by name are all the bindings and kernels that exist."""
    sources = build.library_sources(ROOT, library)
    text = "".join((ROOT / source).read_text() for source in sources)
    device = {"_C": "CPU", "_C_cuda": "CUDA"}[library]
    every = [path.read_text() for path in (ROOT / "csrc").glob("*/*.cc")]
    bindings = sum(
        source.count(f"STABLE_TORCH_LIBRARY_IMPL(speculators, {device},") for source in every
    )
    assert text.count(f"STABLE_TORCH_LIBRARY_IMPL(speculators, {device},") == bindings > 0


def test_outside_of_a_checkout_it_says_what_to_do(tmp_path: pathlib.Path) -> None:
    with pytest.raises(build.BuildError, match="expected a checkout"):
        build.find_sources(tmp_path / "speculators" / "ops")


def test_a_missing_toolkit_is_an_error(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "find_cuda", lambda _: None)
    with pytest.raises(build.BuildError, match="set CUDA_HOME"):
        build.build(tmp_path, cuda="yes")


def test_a_missing_ninja_is_an_error(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(build.BuildError, match="pip install ninja"):
        build.build(tmp_path, cuda="no")


def test_a_toolkit_counts_only_with_compiler_and_runtime(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    for name in ("bin/nvcc", "lib64/libcudart_static.a"):
        assert build.find_cuda(str(tmp_path)) != str(tmp_path)
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    assert build.find_cuda(str(tmp_path)) == str(tmp_path)


def test_a_failed_compilation_leaves_the_old_library(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "_C.abi3.so"
    old.write_text("old")
    monkeypatch.setattr(build, "_CXX_FLAGS", ("-std=c++1",))
    with pytest.raises(build.BuildError, match="the compilation failed"):
        build.build(tmp_path, cuda="no")
    assert [path.name for path in tmp_path.iterdir()] == [old.name]
    assert old.read_text() == "old"
