"""A file that is written in any order, survives a kill, and takes its name in one step when it is complete.

    NAME.partial         the file, at its final size from the beginning, so that a full disk is found before the work
    NAME.partial.jsonl   a line that says what is made from what, then a line for each tensor that is on the disk
    NAME.partial.lock    held while somebody writes

A line is added only after the data that it speaks of is on the disk, which a thread of its own asks for every few
seconds: after a power cut the journal promises nothing that is not there. A last line that was cut off is ignored.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, cast

from ..errors import FileError
from .locks import locked

log = logging.getLogger(__name__)
SYNC_NBYTES = 256 << 20
SYNC_S = 2.0
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Partial:
    """An open partial file.

    Attributes:
        done: name of each tensor that an earlier run finished -> what it noted of it.
        note: how the file came about, for the report; empty for a new one.
    """

    def __init__(self, target: Path, total: int, head: Mapping[str, Any], resumable: bool) -> None:
        self.target = target
        self.path = target.with_name(f"{target.name}.partial")
        self.journal = target.with_name(f"{target.name}.partial.jsonl")
        self.done: dict[str, Any] = {}
        self.note = ""
        self._resumable = resumable
        self._pending: list[tuple[str, Any]] = []
        self._unsynced = 0
        self._synced_at = time.monotonic()
        self._lock = threading.Lock()
        self._sync: threading.Thread | None = None
        self._sync_error: OSError | None = None
        self._open(total, dict(head))

    def _open(self, total: int, head: dict[str, Any]) -> None:
        found = self._read_journal() if self._resumable else None
        if found is not None and found[0] == head and self._is_whole(total):
            self.done = found[1]
            self.note = f"continued an interrupted conversion: {len(self.done)} tensors were there"
        else:
            if found is not None:
                other = " and ".join(k for k in head if k in found[0] and found[0][k] != head[k])
                why = f"other {other}" if other else "what it left is damaged"
                self.note = f"an interrupted conversion was started over: {why}"
                log.warning("%s: %s", self.target.name, self.note)
            self.discard()
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        try:
            if not self.done:
                self._reserve(total)
                if self._resumable:
                    self.journal.write_text(json.dumps(head) + "\n", encoding="utf-8")
        except BaseException:
            self.close(keep=False)
            raise

    def _is_whole(self, total: int) -> bool:
        try:
            return self.path.stat().st_size == total
        except OSError:
            return False

    def _read_journal(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """What an earlier run was made from, and what it finished; empty where it is damaged, None where none was."""
        try:
            lines = self.journal.read_text(encoding="utf-8").split("\n")[:-1]
            head, *rest = [json.loads(line) for line in lines]
            done: dict[str, Any] = {str(name): dict(entry) for name, entry in rest}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):
            return {}, {}
        return (cast("dict[str, Any]", head), done) if isinstance(head, dict) else ({}, {})

    def _reserve(self, total: int) -> None:
        free = shutil.disk_usage(self.path.parent).free
        if total > free:
            raise OSError(errno.ENOSPC, f"{total / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free on this disk")
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._fd, 0, max(total, 1))
            except OSError as err:
                if err.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
        os.ftruncate(self._fd, total)

    def write(self, data: Any, at: int) -> None:
        """Write bytes at a place; from any thread."""
        view = memoryview(data).cast("B")
        if hasattr(os, "pwrite"):
            while view.nbytes:
                written = os.pwrite(self._fd, view, at)
                view, at = view[written:], at + written
            return
        with self._lock:
            os.lseek(self._fd, at, os.SEEK_SET)
            while view.nbytes:
                view = view[os.write(self._fd, view) :]

    def finished(self, name: str, nbytes: int, entry: Any) -> None:
        """All of a tensor is written; `entry` is what a later run is to know of it."""
        self._pending.append((name, entry))
        self._unsynced += nbytes
        due = self._unsynced >= SYNC_NBYTES or time.monotonic() - self._synced_at >= SYNC_S
        if self._resumable and due and (self._sync is None or not self._sync.is_alive()):
            self._join()
            pending, self._pending, self._unsynced = self._pending, [], 0
            self._synced_at = time.monotonic()
            self._sync = threading.Thread(target=self._note, args=(pending,), name="quantwire-journal")
            self._sync.start()

    def _note(self, pending: list[tuple[str, Any]]) -> None:
        try:
            getattr(os, "fdatasync", os.fsync)(self._fd)
            with open(self.journal, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in pending))
                file.flush()
                os.fsync(file.fileno())
        except OSError as err:
            self._sync_error = err

    def _join(self) -> None:
        if self._sync is not None:
            self._sync.join()
            self._sync = None
        if self._sync_error is not None:
            err, self._sync_error = self._sync_error, None
            raise err

    def commit(self) -> None:
        """Everything is written: the file takes its name."""
        self._join()
        os.fsync(self._fd)
        os.close(self._fd)
        self._fd = -1
        self.path.replace(self.target)
        self.journal.unlink(missing_ok=True)

    def close(self, keep: bool) -> None:
        """Stop before the end.

        Args:
            keep: leave what is there for a later run.
        """
        if self._fd < 0:
            return
        with contextlib.suppress(OSError):
            self._join()
            if keep and self._resumable:
                self._note(self._pending)
                log.warning("%s: interrupted; the same conversion continues from %s", self.target, self.path.name)
        os.close(self._fd)
        self._fd = -1
        if not (keep and self._resumable):
            self.discard()

    def discard(self) -> None:
        for path in (self.journal, self.path):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def partial(target: Path, total: int, head: Mapping[str, Any], resumable: bool = True) -> Generator[Partial]:
    """Write `target` inside the block; it takes its name at the end of it.

    What was written is kept for a later run when the block is interrupted, and removed where the error says that it
    would fail again (one of the pack's own, or of the file system).

    Args:
        total: bytes of the file.
        head: JSON values that are others when the file would be another one.
    Raises:
        FileError: it cannot be written, or somebody else is writing it; `target` is as it was.
    """
    from ..errors import QuantwireError

    def waiting() -> None:
        raise FileError(f"{target}: another conversion is writing this file.\nWait until it is done.")

    lock = target.with_name(f"{target.name}.partial.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock, waiting):
            opened = Partial(target, total, head, resumable)
            try:
                yield opened
                opened.commit()
            except (QuantwireError, OSError):
                opened.close(keep=False)
                raise
            except BaseException:
                opened.close(keep=True)
                raise
    except OSError as err:
        full = f"\nFree {total / 2**20:.0f} MiB there, or write to another disk." if err.errno in NO_SPACE else ""
        raise FileError(f"{target}: cannot be written: {err.strerror or err}.{full}") from err
