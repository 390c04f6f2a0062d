"""Builds the operator libraries from a checkout where there is no Bazel.

    python -m speculators.ops.build [--cuda=auto|yes|no] [--output-dir=DIR]

The same sources as the Bazel build, found by their names (``*_op.cc`` and ``*_cpu.cc`` make ``_C``,
``*_op_cuda.cc`` and ``*_cuda.cu`` make ``_C_cuda``), compiled by torch.utils.cpp_extension with
ninja against the torch that is installed. Meant for GPU machines, where torch, nvcc and ninja are
at hand. The libraries land beside this file, where ``import speculators.ops`` finds them.

The command line is argparse, not the ``speculators`` application: it must work in an environment
that has torch and little else.
"""

import argparse
import contextlib
import os
import pathlib
import shutil
import sys
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import setuptools

_PACKAGE = pathlib.Path(__file__).absolute().parent
_TORCH_TARGET = "0x020a000000000000"  # torch 2.10, the oldest that the libraries load under
# -fopenmp-simd: loops marked `omp simd` become vector code; it brings no OpenMP along.
_CXX_FLAGS = ("-O3", "-std=c++20", "-fvisibility=hidden", "-fopenmp-simd")
_CUDA_ARCHITECTURES = "8.0;9.0+PTX"


class BuildError(RuntimeError):
    """The libraries cannot be built here; the message says what is missing."""


def find_sources(start: pathlib.Path = _PACKAGE) -> pathlib.Path:
    """The repository root above ``start``: the folder that holds ``csrc/``.

    Raises:
        BuildError: ``start`` is not in a checkout.
    """
    for folder in start.parents:
        if (folder / "csrc" / "extension" / "module.cc").is_file():
            return folder
    raise BuildError(
        f"no csrc/ in a folder above {start}: expected a checkout of the repository. Clone it and "
        f"run this with PYTHONPATH=<checkout>/python; an installed wheel has its libraries already"
    )


def library_sources(root: pathlib.Path, library: str) -> list[str]:
    """The sources of ``_C`` or ``_C_cuda``, relative to the repository root, sorted."""
    patterns = {
        "_C": ("*_op.cc", "*_cpu.cc"),
        "_C_cuda": ("*_op_cuda.cc", "*_cuda.cu"),
    }[library]
    found = [path for pattern in patterns for path in (root / "csrc").glob(f"*/{pattern}")]
    return ["csrc/extension/module.cc", *sorted(str(path.relative_to(root)) for path in found)]


def host_sources(root: pathlib.Path) -> list[str]:
    """The sources of ``_host``, relative to the repository root, sorted."""
    found = (path for path in (root / "csrc" / "host").glob("*.cc") if "_test" not in path.stem)
    return sorted(str(path.relative_to(root)) for path in found)


def find_cuda(guess: str | None) -> str | None:
    """The CUDA toolkit's folder, one that has nvcc and the static runtime, or None.

    Args:
        guess: where to look after ``$CUDA_HOME`` and before the usual place.
    """
    for folder in (os.environ.get("CUDA_HOME"), guess, "/usr/local/cuda"):
        if folder and (pathlib.Path(folder) / "bin" / "nvcc").is_file() and _cudart_folders(folder):
            return folder
    return None


def _cudart_folders(home: str) -> list[str]:
    """The folders of a CUDA toolkit that hold libcudart_static.a."""
    folders = [pathlib.Path(home) / name for name in ("lib64", "lib")]
    return [str(folder) for folder in folders if (folder / "libcudart_static.a").is_file()]


def build(output_dir: pathlib.Path, cuda: str = "auto") -> list[pathlib.Path]:
    """Compiles the libraries and moves them into a folder once all of them are whole.

    Args:
        output_dir: receives ``_C.abi3.so``, ``_C_cuda.abi3.so`` and ``_host.*.so``.
        cuda: ``"yes"``, ``"no"``, or ``"auto"``: if this torch has CUDA and nvcc is found.

    Returns:
        The files written.

    Raises:
        BuildError: no checkout, something that the build needs is missing, or it failed.
    """
    root = find_sources()
    try:
        import setuptools
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        raise BuildError(f"{error}; the build needs torch, setuptools and ninja") from error
    _put_ninja_on_path()
    wanted = cuda == "yes" or (cuda == "auto" and torch.version.cuda is not None)
    home = find_cuda(cpp_extension.CUDA_HOME) if wanted else None
    if cuda == "yes" and home is None:
        raise BuildError("no CUDA toolkit with nvcc and libcudart_static.a found: set CUDA_HOME")
    cpp_extension.CUDA_HOME = home  # torch's own guess can be the folder of a wrapper of nvcc
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", _CUDA_ARCHITECTURES)

    output_dir.mkdir(parents=True, exist_ok=True)
    extensions = [_operator_library(root, "_C", None)]
    if home is not None:
        extensions.append(_operator_library(root, "_C_cuda", home))
    extensions.append(
        setuptools.Extension(
            "_host",
            host_sources(root),
            include_dirs=[str(root), *cpp_extension.include_paths()],  # torch ships pybind11
            extra_compile_args=[*_CXX_FLAGS],
            language="c++",
        )
    )
    # In the target's file system, so that the last step is a rename.
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".build-") as temporary:
        folder = pathlib.Path(temporary)
        _compile(root, extensions, folder)
        return [path.replace(output_dir / path.name) for path in sorted(folder.glob("*.so"))]


def _put_ninja_on_path() -> None:
    """Lets torch find ninja, which it calls by name.

    pip puts the program beside Python, or (with ``--target``) beside the package; neither folder
    needs to be on PATH.
    """
    if shutil.which("ninja"):
        return
    try:
        import ninja
    except ImportError as error:
        raise BuildError("there is no ninja: pip install ninja") from error
    beside_package = pathlib.Path(ninja.__file__).absolute().parents[1] / "bin"
    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, str(beside_package), os.environ["PATH"]])


def _operator_library(
    root: pathlib.Path, name: str, cuda_home: str | None
) -> "setuptools.Extension":
    from torch.utils import cpp_extension

    macros = [
        f"-DTORCH_TARGET_VERSION={_TORCH_TARGET}",
        "-DTORCH_STABLE_ONLY",
        f"-DSPECULATORS_MODULE={name}",
    ]
    # Last on the line, so that the linker keeps libtorch.so, through which the loader finds the
    # rest.
    link = ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
    flags = {"cxx": [*_CXX_FLAGS, *macros]}
    if cuda_home is not None:
        flags["cxx"].append("-DUSE_CUDA")
        flags["nvcc"] = ["-O3", "-std=c++20", "-lineinfo"]
        link += [f"-L{folder}" for folder in _cudart_folders(cuda_home)]
        link += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    # CppExtension also for CUDA: .cu files still go to nvcc, but nothing links libtorch_cuda.
    extension: setuptools.Extension = cpp_extension.CppExtension(
        name,
        library_sources(root, name),
        include_dirs=[str(root)],
        extra_compile_args=flags,
        extra_link_args=link,
        py_limited_api=True,
    )
    return extension


def _compile(
    root: pathlib.Path, extensions: "list[setuptools.Extension]", output_dir: pathlib.Path
) -> None:
    import setuptools
    from setuptools import errors
    from torch.utils import cpp_extension

    with tempfile.TemporaryDirectory(prefix="speculators-build-") as objects:
        distribution = setuptools.Distribution({"name": "speculators", "ext_modules": extensions})
        command = cpp_extension.BuildExtension(distribution, use_ninja=True)
        command.build_lib, command.build_temp = str(output_dir), objects
        command.ensure_finalized()
        with contextlib.chdir(root):  # the sources' names are relative to it
            try:
                command.run()
            except (RuntimeError, errors.BaseError, errors.CCompilerError) as error:
                raise BuildError(f"the compilation failed: {error}") from error


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m speculators.ops.build", description=__doc__)
    parser.add_argument("--cuda", choices=("auto", "yes", "no"), default="auto")
    parser.add_argument("--output-dir", type=pathlib.Path, default=_PACKAGE)
    options = parser.parse_args(arguments)
    try:
        for path in build(options.output_dir, options.cuda):
            print(path)
    except BuildError as error:
        print(f"speculators.ops.build: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
