"""Runs the stages with their output on a disk of 1 MB; a program, since it needs a namespace.

Started as ``unshare --user --map-root-user --mount python full_disk.py FOLDER VERIFIER``, in which
anybody may mount a tmpfs. Prints a line of JSON for each attempt.
"""

import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

from typer.testing import CliRunner

from speculators.cli.app import app
from speculators.models import SpeculatorModel


def main() -> None:
    """Every stage on the small disk; what it needs of earlier ones lies where there is room."""
    folder, verifier = (pathlib.Path(argument) for argument in sys.argv[1:])
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True)
    rows = folder / "rows.jsonl"
    words = " ".join(str(number) for number in range(400))
    rows.write_text((json.dumps({"text": words}) + "\n") * 300)
    prompts = folder / "prompts.jsonl"
    prompts.write_text('{"prompt": "Count."}\n')
    shared: list[Any] = ["--verifier", verifier, "--data", rows]
    small: list[Any] = ["--output-dir", disk / "out"]
    roomy: list[Any] = ["--output-dir", folder / "out"]
    _attempt(disk, "prepare", *shared, *small)
    shared.append("--prepare.num-samples=4")
    _attempt(disk, "prepare", *shared, *roomy)
    shared.append("--algo=eagle")
    shutil.copytree(folder / "out/data/prepared", disk / "data/prepared")
    _attempt(disk, "generate", *shared, *small, "--data-dir", disk / "data")
    shutil.rmtree(disk / "data")
    budget = ["--training.max-steps=1", "--training.row-tokens=64", "--skip-evaluation"]
    _attempt(disk, "train", *shared, *roomy, *budget)
    _attempt(disk, "train", *shared, *small, "--data-dir", folder / "out/data", *budget)
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - 8192))
    _attempt(
        disk, "evaluate", folder / "out", "--verifier", verifier, "--prompts", prompts,
        "--evaluate.max-new-tokens=2", "--output-dir", disk / "report",
    )  # fmt: skip
    (disk / "ballast").unlink()
    try:
        SpeculatorModel.from_pretrained(folder / "out").save_pretrained(disk / "draft")
    except OSError as error:
        _print(disk, "save", 1, f"error: {error}")


def _attempt(disk: pathlib.Path, *command: Any) -> None:
    result = CliRunner().invoke(app, [str(word) for word in command])
    _print(disk, command[0], result.exit_code, result.output)


def _print(disk: pathlib.Path, command: str, status: int, output: str) -> None:
    left = sorted(str(path.relative_to(disk)) for path in disk.rglob("*") if path.is_file())
    print(json.dumps({"command": command, "status": status, "left": left, "output": output}))


if __name__ == "__main__":
    main()
