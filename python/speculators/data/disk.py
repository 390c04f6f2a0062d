"""A disk that is too small: said before the work begins, and in one line when it happens anyway."""

import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Iterator

_MARGIN = 64 << 20  # bytes left for others, so that a disk is not filled to its last block


class DiskSpaceError(OSError):
    """The disk is full, or would be; the message says what is needed and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = errno.ENOSPC


def free_bytes(directory: str | os.PathLike[str]) -> int:
    """Free space where ``directory`` lies or, if it does not exist yet, would lie."""
    place = pathlib.Path(directory).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def check_free(directory: str | os.PathLike[str], needed: int, what: str, advice: str) -> int:
    """Refuses work that would not fit.

    Args:
        directory: where it will be written.
        needed: bytes.
        what: what they are, for the message.
        advice: what the user can do about it.

    Returns:
        The free bytes.

    Raises:
        DiskSpaceError: ``needed`` and a small margin are more than is free.
    """
    free = free_bytes(directory)
    if needed + needed // 100 + _MARGIN > free:
        raise DiskSpaceError(
            f"{what} need {readable_bytes(needed)}, and {directory} has {readable_bytes(free)} "
            f"free; {advice}"
        )
    return free


@contextlib.contextmanager
def full_disk(advice: str) -> Iterator[None]:
    """Turns the system's errors for a full disk or quota in the block into ``DiskSpaceError``.

    Args:
        advice: what is kept and what to do; the message ends with it.
    """
    try:
        yield
    except DiskSpaceError:
        raise
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise DiskSpaceError(f"{os.strerror(error.errno)}: {advice}") from error


def readable_bytes(count: int) -> str:
    """Such as ``1.5 GB``, in powers of ten, as disks are sold and as df -H prints them."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if size >= 100 or unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
