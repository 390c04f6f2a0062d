"""Runs mypy so that a cache made by one Bazel action serves another.

A cache is valid for the paths that it was made with. Actions and tests see the installed packages
through links of their own, so the real folder is handed to mypy instead.
"""

import os
import pathlib
import subprocess
import sys

import mypy


def main() -> int:
    """Runs mypy with this program's arguments; returns its exit status."""
    site_packages = pathlib.Path(mypy.__file__).resolve().parents[1]
    command = [sys.executable, "-m", "mypy", "--sqlite-cache", "--skip-cache-mtime-checks"]
    environment = {**os.environ, "PYTHONPATH": str(site_packages)}
    return subprocess.run([*command, *sys.argv[1:]], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
