"""The repository's own files, as the quality tests see them.

The tests run on what Bazel gives them. A file that no target lists would escape them; `checkout()`
is the way back to the folder that the files really lie in, so that a test can look for such files.
"""

import pathlib
import subprocess

# Where the tests run: the workspace as Bazel lays it out.
WORKSPACE = pathlib.Path()


def checkout() -> pathlib.Path:
    """The checkout behind Bazel's links."""
    return (WORKSPACE / "MODULE.bazel").resolve().parent


def files(*suffixes: str) -> list[str]:
    """The files with one of the suffixes that targets handed to this test, sorted."""
    found = (path for suffix in suffixes for path in WORKSPACE.rglob(f"*{suffix}"))
    return sorted(str(path) for path in found if path.is_file())


def tracked(*suffixes: str) -> list[str]:
    """The files with one of the suffixes that git tracks in the checkout, sorted."""
    command = ["git", "-c", "safe.directory=*", "ls-files", *(f"*{suffix}" for suffix in suffixes)]
    process = subprocess.run(command, cwd=checkout(), capture_output=True, text=True, check=True)
    return sorted(process.stdout.splitlines())
