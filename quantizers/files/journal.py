"""A file that is written in any order, survives a kill, and takes its name in one step when it is complete.

    NAME.partial         the file, at its final size from the beginning, so that a full disk is found before the work
    NAME.partial.jsonl   a line that says what is made from what, then a line for each tensor that is on the disk
    NAME.partial.lock    held while somebody writes

A line is added only after the data that it speaks of is on the disk, which a thread of its own asks for every few
seconds: after a power cut the journal promises nothing that is not there. A last line that was cut off is cut away.

A partial file belongs to us only with a journal of ours beside it, which is why even a conversion that cannot continue
begins with one. Anything else at these names is somebody's file, and refused.

Where the file system has no locks, nobody can know whether somebody else still writes NAME.partial. There the file
gets a name of its own, without a journal, and an interrupted conversion begins anew.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..errors import FileError, QuantwireError
from .locks import locked

log = logging.getLogger(__name__)
SYNC_NBYTES = 256 << 20
SYNC_S = 2.0
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
MARK = b'{"journal": 1'  # how every journal of ours begins
# What it means that a value of the first line is another one; that of `contents` follows from most of the others.
OTHERS = {
    "source": "the source is another one, or was written to",
    "options": "another importance matrix, or --measure",
    "versions": "other versions of this pack or its libraries",
    "contents": "other rules, layers to keep or architecture",
}
BINARY = getattr(os, "O_BINARY", 0)


class Partial:
    """An open partial file.

    Attributes:
        done: name of each tensor that an earlier run finished -> what it noted of it.
        note: how the file came about, for the report; empty for a new one.
    """

    def __init__(
        self,
        target: Path,
        total: int,
        head: Mapping[str, Any],
        resumable: bool,
        overwrite: bool,
        restart: bool,
        alone: bool,
    ) -> None:
        self.target = target
        self.path = target.with_name(f"{target.name}.partial")
        self.done: dict[str, Any] = {}
        self.note = ""
        if not alone:
            self.path = target.with_name(f"{target.name[:100]}.{secrets.token_hex(6)}.partial")
            self.note = (
                f"no file locks in this folder: written as {self.path.name}, where an interrupted conversion could "
                "not have continued"
            )
            log.warning("%s: no file locks in its folder; a kill would leave %s", target.name, self.path.name)
        self.journal = self.path.with_name(f"{self.path.name}.jsonl")
        self._resumable = resumable and alone
        self._overwrite = overwrite
        self._restart = restart
        self._pending: list[tuple[str, Any]] = []
        self._unsynced = 0
        self._synced_at = time.monotonic()
        self._lock = threading.Lock()
        self._sync: threading.Thread | None = None
        self._sync_error: OSError | None = None
        self._fd = -1
        self._lines: BinaryIO | None = None
        self._open(total, {"journal": 1, **head}, alone)

    def _open(self, total: int, head: dict[str, Any], alone: bool) -> None:
        length = self._find(total, head) if alone else 0
        try:
            if length:
                self._fd = os.open(self.path, os.O_RDWR | BINARY)
                self._lines = open(self.journal, "r+b")  # noqa: SIM115 `_shut` closes it
                self._lines.truncate(length)
                self._lines.seek(length)
            else:
                if alone:  # before the file that it says is ours
                    self._lines = open(self.journal, "xb")  # noqa: SIM115 `_shut` closes it
                    self._lines.write(json.dumps(head).encode() + b"\n")
                    self._lines.flush()
                    os.fsync(self._lines.fileno())
                self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | BINARY, 0o666)
            if not self.done:
                self._reserve(total)
        except BaseException:
            self.close(keep=False)
            raise

    def _find(self, total: int, head: dict[str, Any]) -> int:
        """Look at what an earlier run left, and remove it unless it can be continued.

        Returns:
            bytes of the journal to continue; 0 to begin anew.
        Raises:
            FileError: a file at one of our names that is not ours, or tensors of another conversion, which are only
                thrown away if the user says so.
        """
        try:
            raw = self.journal.read_bytes()
        except FileNotFoundError:
            raw = b""
        except OSError as err:
            raise _not_ours(self.journal, self.target) from err
        if not raw.startswith(MARK):
            if not MARK.startswith(raw):  # else none, or killed while its first line was written
                raise _not_ours(self.journal, self.target)
            if os.path.lexists(self.path):
                raise _not_ours(self.path, self.target)
            self.journal.unlink(missing_ok=True)
            return 0
        length = raw.rfind(b"\n") + 1
        was, done = _parse(raw[:length])
        why = _obstacle(was, head, self._resumable, _is_whole(self.path, total), self._restart)
        if not why:
            self.done = done
            self.note = f"continued an interrupted conversion: {len(done)} tensors were there"
            return length
        other = _difference(was, head)
        if done and other and not self._restart:
            raise FileError(
                f"{self.target}: another conversion of this name was interrupted, with {len(done)} tensors done: "
                f"{other}.\nGive what it was started with to continue it, or --restart to start over."
            )
        self.note = f"an interrupted conversion was started over: {why}"
        self.discard()
        return 0

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

    def truncate(self, nbytes: int) -> None:
        """The size of the file, where it could only be estimated."""
        os.ftruncate(self._fd, nbytes)

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
            if self._lines is not None and self._resumable:
                self._lines.write("".join(json.dumps(line) + "\n" for line in pending).encode())
                self._lines.flush()
                os.fsync(self._lines.fileno())
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
        """Everything is written: the file takes its name.

        Raises:
            FileError: a file of this name came to be in the meantime, or somebody replaced the partial file. What was
                done is kept in the first case.
        """
        self._join()
        os.fsync(self._fd)
        self._note(self._pending)  # complete, in case that the name cannot be taken now
        self._pending = []
        self._join()
        if not self._is_ours():
            raise FileError(
                f"{self.path}: another program removed or replaced this file while it was written.\n"
                "Run the conversion again when no other one writes there."
            )
        self._shut()
        try:
            self._take_name()
        except OSError as err:
            if not self._resumable:
                self.discard()
            if not isinstance(err, FileExistsError):
                raise
            kept = " What was done is kept for it." if self._resumable else ""
            raise FileError(
                f"{self.target}: came to be while it was converted, and is as it was.\n"
                f"Use --overwrite to replace it.{kept}"
            ) from err
        self.discard()

    def _take_name(self) -> None:
        if self._overwrite:
            self.path.replace(self.target)
            return
        try:
            os.link(self.path, self.target)  # a rename would replace what is there
        except FileExistsError:
            raise
        except OSError:  # no hard links here
            if os.path.lexists(self.target):
                raise FileExistsError(errno.EEXIST, "is there already", str(self.target)) from None
            self.path.rename(self.target)

    def _is_ours(self) -> bool:
        """Whether the open file is still the one at its name."""
        try:
            return os.path.samestat(os.fstat(self._fd), self.path.lstat())
        except OSError:
            return False

    def _shut(self) -> None:
        if self._lines is not None:
            with contextlib.suppress(OSError):  # flushed before; a full disk would say so again
                self._lines.close()
        os.close(self._fd)
        self._fd = -1

    def close(self, keep: bool) -> None:
        """Stop before the end.

        Args:
            keep: leave what is there for a later run.
        """
        if self._fd < 0:
            if self._lines is not None and not self._lines.closed:
                self._lines.close()
                self.journal.unlink(missing_ok=True)
            return
        keep = keep and self._resumable
        with contextlib.suppress(OSError):
            self._join()
            if keep:
                self._note(self._pending)
                log.warning("%s: interrupted; the same conversion continues from %s", self.target, self.path.name)
        ours = self._is_ours()
        self._shut()
        if ours and not keep:
            self.discard()

    def discard(self) -> None:
        """Remove both files; the journal last, since it says whose the other one is."""
        for path in (self.path, self.journal):
            path.unlink(missing_ok=True)


def _parse(raw: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an earlier run was made from, and what it finished; empty where the journal is damaged."""
    try:
        head, *rest = [json.loads(line) for line in raw.decode().split("\n")[:-1]]
        done: dict[str, Any] = {str(name): dict(entry) for name, entry in rest}
    except (ValueError, TypeError):
        return {}, {}
    return (cast("dict[str, Any]", head), done) if isinstance(head, dict) else ({}, {})


def _is_whole(path: Path, total: int) -> bool:
    try:
        return path.lstat().st_size == total  # not that of a link, which we never make
    except OSError:
        return False


def _difference(was: Mapping[str, Any], head: Mapping[str, Any]) -> str:
    """In what another conversion differs from this one; empty where it does not, or where nothing tells."""
    other = [k for k in head if k in was and was[k] != head[k]]
    other = [k for k in other if k != "contents"] or other
    return ", ".join(f"type {was[k]} there, {head[k]} here" if k == "type" else OTHERS.get(k, k) for k in other)


def _obstacle(was: Mapping[str, Any], head: Mapping[str, Any], resumable: bool, whole: bool, restart: bool) -> str:
    """Why an interrupted conversion does not continue; empty where it does."""
    if restart:
        return "as asked for"
    if not resumable:
        return "such a conversion cannot continue"
    return _difference(was, head) or ("" if whole and was == head else "what it left is damaged")


def remains(target: Path, total: int, head: Mapping[str, Any], resumable: bool, restart: bool) -> str:
    """What a conversion would do with what an interrupted one left, for a dry run; empty where nothing is there."""
    path = target.with_name(f"{target.name}.partial")
    try:
        raw = path.with_name(f"{path.name}.jsonl").read_bytes()
    except OSError:
        return ""
    if not raw.startswith(MARK):
        return ""
    was, done = _parse(raw[: raw.rfind(b"\n") + 1])
    head = {"journal": 1, **head}
    there = f"{path.name} is there, of an interrupted conversion with {len(done)} tensors done"
    why = _obstacle(was, head, resumable, _is_whole(path, total), restart)
    if not why:
        return f"{there}: it would continue"
    if done and not restart and (other := _difference(was, head)):
        return f"{there}, and of another one: {other}; this one would be refused (--restart to start over)"
    return f"{there}: it would start over: {why}"


def _not_ours(path: Path, target: Path) -> FileError:
    return FileError(
        f"{path}: is no file of an interrupted conversion of ours, and {target.name} is written through this name.\n"
        "Move or delete it, or give the new file another name."
    )


def lock_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial.lock")


def refuse_names(target: Path, inputs: Iterable[Path]) -> None:
    """Refuse names that are taken.

    Raises:
        FileError: the target, or a name that it is written through, is a file that is read; or the lock is not ours.
    """
    given = list(inputs)
    lock = lock_of(target)
    for ending in ("", ".partial", ".partial.jsonl", ".partial.lock"):
        path = target.with_name(f"{target.name}{ending}")
        for file in given:
            with contextlib.suppress(OSError):
                if path.samefile(file):
                    through = f", and {target.name} is written through this name" if ending else ""
                    raise FileError(f"'{path}' is read by this conversion{through}.\nGive the new file another name.")
    with contextlib.suppress(OSError):
        if lock.lstat().st_size or not lock.is_file():  # a lock of ours is empty
            raise _not_ours(lock, target)


@contextlib.contextmanager
def partial(
    target: Path,
    total: int,
    head: Mapping[str, Any],
    resumable: bool = True,
    overwrite: bool = False,
    inputs: Iterable[Path] = (),
    restart: bool = False,
) -> Generator[Partial]:
    """Write `target` inside the block; it takes its name at the end of it.

    What was written is kept for a later run when the block is interrupted, and removed where the error says that it
    would fail again (one of the pack's own, or of the file system).

    Args:
        total: bytes of the file.
        head: JSON values that are others when the file would be another one.
        resumable: a later run may continue.
        overwrite: replace a target that is there.
        inputs: files that are read meanwhile, and must not be at a name that is written.
        restart: throw away what an interrupted conversion left.
    Raises:
        FileError: it cannot be written, is there already, or somebody else is writing it; `target` is as it was.
    """

    def waiting() -> None:
        raise FileError(f"{target}: another conversion is writing this file.\nWait until it is done.")

    refuse_names(target, inputs)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock_of(target), waiting) as alone:
            if not overwrite and os.path.lexists(target):
                raise FileError(f"{target}: is there already.\nUse --overwrite to replace it, or give another name.")
            opened = Partial(target, total, head, resumable, overwrite, restart, alone)
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
        mib, todo = f"{total / 2**20:.0f} MiB", ""
        if err.errno in NO_SPACE:
            todo = f"\nFree {mib} there, or write to another disk."
        elif err.errno == errno.EFBIG:
            todo = f"\nA limit (`ulimit -f`) or the file system forbids files of {mib}; raise it, or write elsewhere."
        raise FileError(f"{target}: cannot be written: {err.strerror or err}.{todo}") from err
