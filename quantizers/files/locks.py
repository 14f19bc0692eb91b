"""An advisory lock between processes, on a file of its own."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path

log = logging.getLogger(__name__)
POLL_S = 0.05


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], object] | None = None) -> Generator[bool]:
    """Hold the lock of a file inside the block; the operating system lets go of it when the process dies.

    Where the file system has no locks the block runs without, with a warning, and is told so: it must stay right
    without, even if what it does is then done twice.

    Args:
        path: made if missing, removed afterwards.
        waiting: called again and again while somebody else holds the lock; may raise to give up.
    Yields:
        whether the lock is held.
    """
    fd = None
    while fd is None:
        try:
            fd = _try(path)
        except OSError as err:
            log.warning("%s: cannot be locked: %s", path, err.strerror or err)
            break
        if fd is None:
            if waiting is not None:
                waiting()  # outside the try: it may give up with an OSError
            time.sleep(POLL_S)
    try:
        yield fd is not None
    finally:
        if fd is not None:
            # Windows removes no open file; there the empty file stays.
            with contextlib.suppress(OSError):
                os.unlink(path)
            os.close(fd)


def _try(path: Path) -> int | None:
    """A file descriptor that holds the lock, or None if another one does."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if _lock(fd) and _is(fd, path):
            return fd
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _lock(fd: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        if err.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        raise
    return True


def _is(fd: int, path: Path) -> bool:
    """Whether the file is still the one at `path`: its last holder removes it while others wait for it."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
