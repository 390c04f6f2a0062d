""".ci/run: it runs the documented command, counts as Bazel does and keeps Bazel's exit status."""

import os
import pathlib
import shutil
import subprocess

import pytest


@pytest.mark.parametrize(
    ("summary", "status", "last_line"),
    [
        ("Executed 0 out of 12 tests: 12 tests pass.", 0, "12 passed, 0 failed"),
        ("Executed 1 out of 1 test: 1 test passes.", 0, "1 passed, 0 failed"),
        ("Executed 3 out of 4 tests: 3 tests pass and 1 fails locally.", 3, "3 passed, 1 failed"),
        (
            "Executed 4 out of 5 tests: 2 tests pass, 2 fail locally and 1 was skipped.",
            1,
            "2 passed, 2 failed, 1 skipped",
        ),
        ("Executed 1 out of 2 tests: 1 test passes and 1 fails to build.", 1, "1 passed, 1 failed"),
        ("ERROR: no such target", 1, "0 passed, 0 failed"),
    ],
)
def test_the_last_line_and_the_status(
    summary: str, status: int, last_line: str, tmp_path: pathlib.Path
) -> None:
    for file in (".ci/run", "bazelw", ".bazelversion"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / file)
    bazel = tmp_path / "bazel"
    bazel.write_text(f"#!/bin/sh\necho \"called with $*\"\necho '{summary}' >&2\nexit {status}\n")
    bazel.chmod(0o755)
    process = subprocess.run(
        [tmp_path / ".ci" / "run"],
        env={**os.environ, "BAZEL": str(bazel)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = process.stdout.splitlines()
    calls = [line.removeprefix("called with ") for line in lines if line.startswith("called ")]
    assert calls[0] == "test //..."
    job = [call for call in calls[1:] if call.startswith("run //tools:train -- --algo=hass ")]
    assert len(job) == (status == 0), "the main job runs if all tests passed"
    assert lines[-1] == last_line
    assert process.returncode == status
