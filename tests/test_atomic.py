"""Files and folders appear whole or not at all, and what was there before stays until then."""

import errno
import os
import pathlib
import stat

import pytest

from speculators.atomic import FullDiskError, atomic_directory, atomic_file


def _names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _half_written(folder: pathlib.Path) -> None:
    (folder / "half").write_text("")
    (folder / "no such folder" / "other half").write_text("")


def test_a_file_appears_when_it_is_complete(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "new" / "report.json"
    with atomic_file(path, "w") as file:
        file.write("gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n")
        assert not path.exists()
    assert path.read_text(encoding="utf-8") == "gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n"
    with atomic_file(path) as file:
        file.write(b"second")
    assert path.read_bytes() == b"second"
    assert _names(path.parent) == ["report.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_file(path, "w") as file:
        file.write("half" * (1 // 0))
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["report.json"]


def test_what_is_written_can_be_read_by_others_as_usual(tmp_path: pathlib.Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "file") as file:
            file.write(b"")
        with atomic_directory(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def test_a_folder_appears_when_it_is_complete(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "draft"
    with atomic_directory(target) as new:
        (new / "sub").mkdir()
        (new / "sub" / "a").write_text("a")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "a"
    assert _names(tmp_path) == ["draft"]


def test_a_failed_folder_leaves_nothing(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_directory(tmp_path / "draft") as new:
        _half_written(new)
    assert _names(tmp_path) == []


def test_a_full_folder_is_refused_or_exchanged_whole(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "draft"
    target.mkdir()
    with atomic_directory(target) as new:  # an empty folder is as good as none
        (new / "old").write_text("old")
    with pytest.raises(FileExistsError, match="draft is not empty; choose another"):
        with atomic_directory(target):
            pytest.fail("it must be refused before it is made")
    with pytest.raises(FileNotFoundError), atomic_directory(target, overwrite=True) as new:
        _half_written(new)
    assert _names(target) == ["old"]
    with atomic_directory(target, overwrite=True) as new:
        (new / "new").write_text("new")
    assert _names(target) == ["new"]
    assert _names(tmp_path) == ["draft"]


def test_a_file_in_the_way_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "draft").write_text("a file")
    with pytest.raises(FileExistsError, match="is a file; expected a folder"):
        with atomic_directory(tmp_path / "draft", overwrite=True):
            pass
    assert (tmp_path / "draft").read_text() == "a file"


class _RustError(Exception):
    """As safetensors raises: the system's number is in the words alone."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        _RustError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_told_with_what_to_do(tmp_path: pathlib.Path, error: Exception) -> None:
    path = tmp_path / "draft"
    path.mkdir()
    (path / "old").write_text("old")
    message = f"the disk of {path} is full; what was there before is as it was: free some space"
    with pytest.raises(FullDiskError, match=message) as caught:
        with atomic_directory(path, overwrite=True) as new, atomic_file(new / "file"):
            raise error
    assert caught.value.errno == errno.ENOSPC
    assert _names(tmp_path) == ["draft"]
    assert _names(path) == ["old"]
