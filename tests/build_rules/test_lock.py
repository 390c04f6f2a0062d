"""lock: what a lock leaves out is gone from it, and it keeps the versions that it should."""

import itertools
import pathlib
import subprocess

import pytest
from bazel import lock

ANSWER = """\
jinja2==3.1.6 ; python_full_version < '3.12' or sys_platform == 'never' \\
    --hash=sha256:aa
networkx==3.6.1 ; python_full_version < '3.12' and sys_platform == 'never' \\
    --hash=sha256:bb
numpy==2.3.5 \\
    --hash=sha256:cc \\
    --hash=sha256:dd
torch==2.13.0 ; sys_platform == 'never' \\
    --hash=sha256:ee
"""
KEPT = """\
jinja2==3.1.6 ; python_full_version < '3.12' or sys_platform == 'never' \\
    --hash=sha256:aa
numpy==2.3.5 \\
    --hash=sha256:cc \\
    --hash=sha256:dd
"""
LOCK = lock.Lock("b.in", "b.lock", constraints=("six<2",), left_out=("torch",), follows="a.lock")


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "a.lock").write_text("numpy==2.3.5\n")
    (tmp_path / "b.lock").write_text("numpy==2.3.4\n")
    return tmp_path


def stand_in(monkeypatch: pytest.MonkeyPatch, status: int) -> dict[str, str]:
    """Puts a program in uv's place; what uv would have read comes into the dictionary."""
    read = {}

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        options = dict(itertools.pairwise(command))
        read["source"] = options["compile"]
        for name in ("--constraint", "--override", "--output-file"):
            read[name] = pathlib.Path(options[name]).read_text()
        pathlib.Path(options["--output-file"]).write_text(ANSWER)
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(subprocess, "run", run)
    return read


def test_what_is_left_out_is_gone_with_what_only_that_needed(
    root: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = stand_in(monkeypatch, status=0)
    assert lock.write_lock(LOCK, root, []) == 0
    header, _, entries = (root / "b.lock").read_text().partition("\n")
    assert "b.in" in header
    assert entries == KEPT
    assert read["source"] == "b.in"
    assert read["--override"] == "torch ; sys_platform == 'never'"


def test_the_versions_of_the_lock_that_it_follows_come_first(
    root: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = stand_in(monkeypatch, status=0)
    lock.write_lock(LOCK, root, [])
    assert read["--output-file"] == "numpy==2.3.5\nnumpy==2.3.4\n"
    assert read["--constraint"] == "six<2"


def test_a_failure_leaves_the_lock_alone(
    root: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, status=2)
    assert lock.write_lock(LOCK, root, []) == 2
    assert sorted(path.name for path in root.iterdir()) == ["a.lock", "b.lock"]
    assert (root / "b.lock").read_text() == "numpy==2.3.4\n"
