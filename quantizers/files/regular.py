"""Open files, and nothing else that has a name: a pipe would wait for its writer, and a device has no end."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from ..errors import FileError

# Opening a pipe does not wait then, should one take the file's place in the meantime.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, following links.

    Raises:
        FileError: no path, or something else than a file; the message says what.
        OSError: as `open`.
    """
    if "\0" in str(path):
        raise FileError(f"{str(path)!r}: cannot be read: a path has no NUL character.")
    _refuse(path, os.stat(path).st_mode)
    fd = os.open(path, _FLAGS)
    try:
        _refuse(path, os.fstat(fd).st_mode)
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def _refuse(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise FileError(f"{path}: cannot be read: {kind}, expected a file.")
