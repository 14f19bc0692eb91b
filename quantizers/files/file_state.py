"""Whether a file is still the one that was read before, without reading it again."""

from __future__ import annotations

from pathlib import Path

from ..errors import FileError


def file_state(path: Path) -> dict[str, int]:
    """Size, times, inode and device of the file that `path` leads to, as JSON values.

    The time of the last change of the inode is among them: it tells a file that was moved away and put back, and one
    whose modification time was set by hand.

    Raises:
        FileError: missing, or its folder cannot be read.
    """
    try:
        stat = path.stat()
    except OSError as err:
        raise FileError(f"{path}: cannot be read: {err.strerror}.") from err
    return {
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
        "inode": stat.st_ino,
        "device": stat.st_dev,
    }


def check_unchanged(path: Path, state: dict[str, int]) -> None:
    """Raises:
    FileError: the file is not in that state of `file_state` any more.
    """
    if file_state(path) != state:
        raise FileError(f"{path.name}: changed while it was read.\nWait until it is written, then run again.")
