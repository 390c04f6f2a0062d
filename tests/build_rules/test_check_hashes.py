"""check_hashes: what pip installed is what the lock names, or the build stops."""

import json
import pathlib

import pytest
from bazel import check_hashes

LOCK = """\
# Written by a tool.
numpy==2.4.6 ; python_full_version < '3.12' \\
    --hash=sha256:aa \\
    --hash=sha256:bb
numpy==2.5.5 ; python_full_version >= '3.12' \\
    --hash=sha256:cc
typing-extensions==4.16.0 \\
    --hash=sha256:dd
"""


def report(name: str, version: str, digest: str, url: str = "https://index/x.whl") -> str:
    download = {"url": url, "archive_info": {"hashes": {"sha256": digest}}}
    return json.dumps(
        {"install": [{"metadata": {"name": name, "version": version}, "download_info": download}]}
    )


def test_constraints_keep_versions_and_markers_and_drop_hashes() -> None:
    assert check_hashes.constraints(LOCK).splitlines() == [
        "numpy==2.4.6 ; python_full_version < '3.12'",
        "numpy==2.5.5 ; python_full_version >= '3.12'",
        "typing-extensions==4.16.0",
    ]


def test_the_first_lock_that_names_a_package_decides() -> None:
    first = "NumPy==2.3.5 ; python_full_version < '3.13'\nsix==1.17.0\n"
    assert check_hashes.constraints(first, LOCK).splitlines() == [
        "NumPy==2.3.5 ; python_full_version < '3.13'",
        "six==1.17.0",
        "typing-extensions==4.16.0",
    ]


@pytest.mark.parametrize(("version", "digest"), [("2.4.6", "aa"), ("2.4.6", "bb"), ("2.5.5", "cc")])
def test_a_file_of_the_lock_passes(version: str, digest: str) -> None:
    assert check_hashes.mismatches(LOCK, report("NumPy", version, digest)) == []


def test_names_are_compared_as_indexes_do() -> None:
    assert check_hashes.mismatches(LOCK, report("typing_extensions", "4.16.0", "dd")) == []


@pytest.mark.parametrize(
    ("name", "version", "digest"),
    [("numpy", "2.4.6", "cc"), ("numpy", "2.4.7", "aa"), ("evil", "1.0", "aa")],
)
def test_another_file_is_named(name: str, version: str, digest: str) -> None:
    (line,) = check_hashes.mismatches(LOCK, report(name, version, digest))
    assert line == f"{name}=={version}: sha256:{digest} is not among the lock's hashes"


def test_a_file_of_this_machine_is_its_owners_business() -> None:
    url = "file:///wheels/torch.whl"
    assert check_hashes.mismatches(LOCK, report("torch", "2.13.0+cpu", "ee", url)) == []


def test_the_program_fails_on_a_mismatch(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock, installed = tmp_path / "requirements.lock", tmp_path / "report.json"
    lock.write_text(LOCK)
    installed.write_text(report("numpy", "2.4.6", "cc"))
    assert check_hashes.main([str(lock), str(installed)]) == 1
    assert "./bazelw run //:lock" in capsys.readouterr().err
    installed.write_text(report("numpy", "2.4.6", "aa"))
    assert check_hashes.main([str(lock), str(installed)]) == 0


def test_the_program_takes_several_locks(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock, other, installed = tmp_path / "a.lock", tmp_path / "b.lock", tmp_path / "report.json"
    lock.write_text(LOCK)
    other.write_text("six==1.17.0 \\\n    --hash=sha256:ee\n")
    assert check_hashes.main(["--constraints", str(other), str(lock)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "six==1.17.0"
    for name, version, digest in (("six", "1.17.0", "ee"), ("numpy", "2.4.6", "bb")):
        installed.write_text(report(name, version, digest))
        assert check_hashes.main([str(other), str(lock), str(installed)]) == 0
