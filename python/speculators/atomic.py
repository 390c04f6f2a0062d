"""Files and folders that are written whole or not at all.

Everything that the library leaves on a disk goes through here: a name of its own beside the target,
fsync, rename. A run that is killed, or a disk that is full, leaves what was there before.
"""

import contextlib
import errno
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO, Any


class FullDiskError(OSError):
    """The disk became full; the message says which, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = errno.ENOSPC


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens a new file that takes the name ``path`` once it is complete.

    Args:
        path: the file to write; an older one is replaced.
        mode: ``"wb"``, or ``"w"`` for text in UTF-8.

    Yields:
        The open file. If the block raises, the file is removed and an older one stays.

    Raises:
        FullDiskError: the disk is full.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    encoding = None if "b" in mode else "utf-8"
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    new = pathlib.Path(name)
    try:
        with os.fdopen(descriptor, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        new.chmod(_plain_mode(0o666))
        new.replace(path)
    except BaseException as error:
        new.unlink(missing_ok=True)
        _explain_full_disk(error, path)
        raise
    _sync(path.parent)


@contextlib.contextmanager
def atomic_directory(
    path: str | os.PathLike[str], *, overwrite: bool = False
) -> Iterator[pathlib.Path]:
    """Makes a new folder that takes the name ``path`` once it is complete.

    Args:
        path: the folder to write.
        overwrite: whether a folder that is there and not empty may be exchanged, as a whole.

    Yields:
        An empty folder to fill. If the block raises, it is removed and an older one stays.

    Raises:
        FileExistsError: ``path`` is a file, or a folder that is not empty without ``overwrite``.
        FullDiskError: the disk is full.
    """
    path = pathlib.Path(path).absolute()
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; expected a folder, or a name that is free")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{path} is not empty; choose another folder, or ask for it to be overwritten"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    new = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield new
        for child in new.rglob("*"):
            _sync(child)
        new.chmod(_plain_mode(0o777))
        _sync(new)
        _take_place(new, path)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        _explain_full_disk(error, path)
        raise
    _sync(path.parent)


def _explain_full_disk(error: BaseException, path: pathlib.Path) -> None:
    """Raises what the user can act on, if a full disk or quota is what ``error`` means."""
    # Libraries in Rust, such as safetensors, pass the number on in words alone.
    full = getattr(error, "errno", None) in {errno.ENOSPC, errno.EDQUOT} or (
        f"os error {errno.ENOSPC}" in str(error)
    )
    if full:  # of a file in a folder, the folder's name is the one that the user knows
        raise FullDiskError(
            f"the disk of {path} is full; what was there before is as it was: free some space and "
            "run the same command again, or choose another folder"
        ) from error


def _take_place(new: pathlib.Path, path: pathlib.Path) -> None:
    if not path.exists():
        new.rename(path)
        return
    # A rename cannot replace a folder that is not empty, so the old one steps aside first.
    old = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    path.replace(old)
    try:
        new.rename(path)
    except BaseException:
        old.replace(path)
        raise
    shutil.rmtree(old)


def _plain_mode(mode: int) -> int:
    """What a file made without tempfile's caution would have."""
    umask = os.umask(0)
    os.umask(umask)
    return mode & ~umask


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
