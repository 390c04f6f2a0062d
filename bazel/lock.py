"""Rewrites requirements.lock from requirements.in: ``./bazelw run //:lock``.

uv resolves for every supported Python and platform at once, so one lock serves them all, and writes
the hashes of all files. Registries and certificates are uv's own configuration (UV_INDEX_URL,
uv.toml). Versions that still fit stay as they are; ``-- --upgrade`` moves them all.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import uv

# The torch that CI builds against and tests with. The library itself accepts the range of
# requirements.in; what it promises to older releases is checked by the stable ABI.
_PINS = "torch==2.13.0\n"


def main() -> int:
    """Writes the lock beside requirements.in; returns uv's exit status."""
    root = pathlib.Path(os.environ["BUILD_WORKSPACE_DIRECTORY"])
    lock = root / "requirements.lock"
    with tempfile.TemporaryDirectory(dir=root, prefix=".lock-") as temporary:
        pins, new = pathlib.Path(temporary, "pins.txt"), pathlib.Path(temporary, lock.name)
        pins.write_text(_PINS)
        if lock.exists():
            shutil.copy(lock, new)  # uv keeps the versions that it finds in its output file
        command = [uv.find_uv_bin(), "pip", "compile", "requirements.in", "--universal"]
        command += ["--python-version=3.11", "--generate-hashes", "--quiet", "--no-header"]
        command += ["--constraint", str(pins), "--no-annotate", "--output-file", str(new)]
        status = subprocess.run([*command, *sys.argv[1:]], cwd=root, check=False).returncode
        if status == 0:
            header = "# Written by ./bazelw run //:lock from requirements.in; do not edit.\n"
            new.write_text(header + new.read_text())
            new.replace(lock)
    return status


if __name__ == "__main__":
    sys.exit(main())
