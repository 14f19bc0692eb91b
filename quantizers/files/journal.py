"""A file that is written in any order, survives a kill, and takes its name in one step when it is complete.

    NAME.partial         the file, at its final size from the beginning, so that a full disk is found before the work
    NAME.partial.jsonl   a line that says what is made from what, then a line for each tensor that is on the disk
    NAME.partial.lock    held while somebody writes

A line is added only after the data that it speaks of is on the disk, which a thread of its own asks for every few
seconds: after a power cut the journal promises nothing that is not there. A last line that was cut off is cut away.

A conversion into several files has one journal, of the name that the set goes by, and NAME.partial for each file. A
last line "" is the seal: all data and headers are written, and the sizes, inodes and the small files beside (an index)
stand in it. Only then files take their names, one after the other, the small ones last; a kill in between is finished
by the next run.

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
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..errors import FileError, QuantwireError
from .former import former_files
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
    "layout": "another layout",
    "shards": "another size of shards",
}
# A fault of the program, which the next run would meet again; what a host raises to interrupt is none of them.
WRONG = (LookupError, TypeError, AttributeError, AssertionError, ValueError, ArithmeticError)
SEAL = ""  # in place of a tensor's name
BINARY = getattr(os, "O_BINARY", 0)


@dataclass
class _File:
    """One file of a conversion.

    Attributes:
        total: its size from the beginning, as it was predicted.
        taken: it has its name already, by an earlier run that was killed while files took their names.
    """

    target: Path
    path: Path
    total: int
    fd: int = -1
    taken: bool = False

    def is_ours(self) -> bool:
        """Whether the open file is still the one at its name."""
        try:
            return os.path.samestat(os.fstat(self.fd), self.path.lstat())
        except OSError:
            return False


class Partial:
    """An open partial file, or several of one conversion.

    Attributes:
        path: the file; of several the first.
        done: name of each tensor that an earlier run finished -> what it noted of it.
        sealed: whether an earlier run had written everything, headers too.
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
        resume: bool = False,
        parts: Sequence[tuple[Path, int]] = (),
        stale: Iterable[str] = (),
    ) -> None:
        self.target = target
        self._stale = list(stale)
        self.done: dict[str, Any] = {}
        self.note = ""
        self._seal: dict[str, Any] = {}
        mark = "" if alone else f".{secrets.token_hex(6)}"
        self._files: list[_File] = []
        for path, size in parts or [(target, total)]:
            name = path.name if alone else f"{path.name[:100]}{mark}"
            self._files.append(_File(path, path.with_name(f"{name}.partial"), size))
        self.path = self._files[0].path
        if not alone:
            self.note = (
                f"no file locks in this folder: written as {self.path.name}, where an interrupted conversion could "
                "not have continued"
            )
            log.warning("%s: no file locks in its folder; a kill would leave %s", target.name, self.path.name)
        own = self.path if not parts else target.with_name(f"{target.name[:100]}{mark}.partial")
        self.journal = own.with_name(f"{own.name}.jsonl") if not alone else journal_of(target)
        self._resumable = resumable and alone
        self._overwrite = overwrite
        self._restart = restart
        self._resume = resume
        self._pending: list[tuple[str, Any]] = []
        self._unsynced = 0
        self._synced_at = time.monotonic()
        self._lock = threading.Lock()
        self._sync: threading.Thread | None = None
        self._sync_error: OSError | None = None
        self._lines: BinaryIO | None = None
        self._open({"journal": 1, **head}, alone)

    @property
    def sealed(self) -> bool:
        return bool(self._seal)

    @property
    def taken(self) -> bool:
        """Whether a file has its name already, so that no more than that is left to do."""
        return any(f.taken for f in self._files)

    @property
    def paths(self) -> tuple[Path, ...]:
        """Where the files are while they are written."""
        return tuple(f.path for f in self._files)

    def _open(self, head: dict[str, Any], alone: bool) -> None:
        length = self._find(head) if alone else 0
        if not length and self._resume:
            raise FileError(
                f"{self.target}: there is nothing to continue: no interrupted conversion of this name is here.\n"
                "Leave --resume out to begin."
            )
        try:
            if length:
                for f in self._files:
                    f.fd = -1 if f.taken else os.open(f.path, os.O_RDWR | BINARY)
                self._lines = open(self.journal, "r+b")  # noqa: SIM115 `_shut` closes it
                self._lines.truncate(length)
                self._lines.seek(length)
            else:
                if alone:  # before the files that it says are ours
                    self._lines = open(self.journal, "xb")  # noqa: SIM115 `_shut` closes it
                    self._lines.write(json.dumps(head).encode() + b"\n")
                    self._lines.flush()
                    os.fsync(self._lines.fileno())
                for f in self._files:
                    f.fd = os.open(f.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | BINARY, 0o666)
            if not self.done and not self.sealed:
                self._reserve()
        except BaseException:
            self.close(keep=False)
            raise

    def _find(self, head: dict[str, Any]) -> int:
        """Look at what an earlier run left, and remove it unless it can be continued.

        Returns:
            bytes of the journal to continue; 0 to begin anew, which is what continuing means where nothing was done.
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
            for f in self._files:
                if os.path.lexists(f.path):
                    raise _not_ours(f.path, self.target)
            self.journal.unlink(missing_ok=True)
            return 0
        length = raw.rfind(b"\n") + 1
        was, done = _parse(raw[:length])
        seal = done.pop(SEAL, {})
        whole = _are_whole(self._files, seal)
        why = _obstacle(was, head, self._resumable, whole, self._restart)
        if not why:
            self.done, self._seal = done, seal
            self.note = f"continued an interrupted conversion: {len(done)} tensors were there"
            return length
        other = _difference(was, head)
        if done and other and not self._restart:
            raise FileError(
                f"{self.target}: another conversion of this name was interrupted, with {len(done)} tensors done: "
                f"{other}.\nGive what it was started with to continue it, or --restart to start over."
            )
        if not done and not seal and was == head and self._resumable:
            self._resume = False  # killed before the first tensor: continuing it is beginning anew
            why = "no tensor was done yet"
        if self._resume:
            raise FileError(
                f"{self.target}: the interrupted conversion of this name cannot be continued: {why}.\n"
                "Leave --resume out to start over."
            )
        for f in self._files:
            f.taken = False
        self.note = f"an interrupted conversion was started over: {why}"
        _discard_other(self.target, was, seal)
        self.discard()
        return 0

    def _reserve(self) -> None:
        total, free = sum(f.total for f in self._files), shutil.disk_usage(self.path.parent).free
        if total > free:
            raise OSError(errno.ENOSPC, f"{total / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free on this disk")
        for f in self._files:
            if hasattr(os, "posix_fallocate"):
                try:
                    os.posix_fallocate(f.fd, 0, max(f.total, 1))
                except OSError as err:
                    if err.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                        raise
            os.ftruncate(f.fd, f.total)

    def write(self, data: Any, at: int, part: int = 0) -> None:
        """Write bytes at a place; from any thread.

        Args:
            part: in which of several files.
        """
        view, fd = memoryview(data).cast("B"), self._files[part].fd
        if hasattr(os, "pwrite"):
            while view.nbytes:
                written = os.pwrite(fd, view, at)
                view, at = view[written:], at + written
            return
        with self._lock:
            os.lseek(fd, at, os.SEEK_SET)
            while view.nbytes:
                view = view[os.write(fd, view) :]

    def seal(self, sizes: Sequence[int], beside: Mapping[str, str] | None = None) -> None:
        """All data and headers are written.

        Args:
            sizes: of the files, which could only be estimated before.
            beside: small files that are to stand in the target's folder, by name; they come to be last, in this order.
        """
        self._join()
        for f in self._files:
            os.fsync(f.fd)
        inodes = [os.fstat(f.fd).st_ino for f in self._files]
        stale = [*dict.fromkeys([*self._seal.get("stale", []), *self._stale])]  # an earlier run may have removed some
        self._seal = {"sizes": list(sizes), "inodes": inodes, "beside": dict(beside or {}), "stale": stale}
        pending, self._pending = self._pending, []
        self._note([*pending, (SEAL, self._seal)])  # before sizes change: a later run would take that for damage
        self._join()
        for f, size in zip(self._files, sizes, strict=True):
            os.ftruncate(f.fd, size)

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
            for f in self._files:
                if f.fd >= 0:
                    getattr(os, "fdatasync", os.fsync)(f.fd)
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
        """Everything is written: the files take their names.

        Raises:
            FileError: a file of such a name came to be in the meantime, or somebody replaced a partial file. What was
                done is kept in the first case.
        """
        self._join()
        for f in self._files:
            if f.fd >= 0:
                os.fsync(f.fd)
        self._note(self._pending)  # complete, in case that the name cannot be taken now
        self._pending = []
        self._join()
        strange = next((f for f in self._files if not f.taken and not f.is_ours()), None)
        if strange is not None:
            raise FileError(
                f"{strange.path}: another program removed or replaced this file while it was written.\n"
                "Run the conversion again when no other one writes there."
            )
        self._shut()
        try:
            self._take_names()
        except OSError as err:
            if not self._resumable:
                self.discard()
            if not isinstance(err, FileExistsError):
                raise
            kept = " What was done is kept for it." if self._resumable else ""
            raise FileError(
                f"{err.filename2 or err.filename or self.target}: came to be while it was converted, and is as it "
                f"was.\nUse --overwrite to replace it.{kept}"
            ) from err
        self.discard()

    def _take_names(self) -> None:
        beside: dict[str, str] = self._seal.get("beside", {})
        stale = [*dict.fromkeys([*self._seal.get("stale", []), *self._stale])] if self._overwrite else []
        if self._overwrite and not self.taken:  # an old index of new files would be a lie
            for name in [*beside, *(n for n in stale if n.endswith(".json"))]:
                self.target.with_name(name).unlink(missing_ok=True)
        for f in self._files:
            if not f.taken:
                self._take_name(f.path, f.target)
                f.taken = len(self._files) > 1
        for name, text in beside.items():
            path = self.target.with_name(name)
            new = path.with_name(f"{name}.partial")
            with open(new, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            self._take_name(new, path)
            new.unlink(missing_ok=True)
        for name in stale:
            self.target.with_name(name).unlink(missing_ok=True)

    def _take_name(self, path: Path, target: Path) -> None:
        if self._overwrite:
            path.replace(target)
            return
        try:
            os.link(path, target)  # a rename would replace what is there
        except FileExistsError:
            raise
        except OSError:  # no hard links here
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, "is there already", str(target)) from None
            path.rename(target)

    def _shut(self) -> None:
        if self._lines is not None:
            with contextlib.suppress(OSError):  # flushed before; a full disk would say so again
                self._lines.close()
        for f in self._files:
            if f.fd >= 0:
                os.close(f.fd)
            f.fd = -1

    def close(self, keep: bool) -> None:
        """Stop before the end.

        Args:
            keep: leave what is there for a later run.
        """
        opened = [f for f in self._files if f.fd >= 0]
        if not opened:
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
        ours = all(f.is_ours() for f in opened)
        self._shut()
        if ours and not keep:
            self.discard()

    def discard(self) -> None:
        """Remove what was written; the journal last, since it says whose the others are."""
        for f in self._files:
            f.path.unlink(missing_ok=True)
        for name in self._seal.get("beside", {}):
            self.target.with_name(f"{name}.partial").unlink(missing_ok=True)
        self.journal.unlink(missing_ok=True)


def _parse(raw: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an earlier run was made from, and what it finished; empty where the journal is damaged."""
    try:
        head, *rest = [json.loads(line) for line in raw.decode().split("\n")[:-1]]
        done: dict[str, Any] = {str(name): dict(entry) for name, entry in rest}
    except (ValueError, TypeError):
        return {}, {}
    return (cast("dict[str, Any]", head), done) if isinstance(head, dict) else ({}, {})


def _are_whole(files: Iterable[_File], seal: Mapping[str, Any]) -> bool:
    """Whether all files are there as a journal says; marks those that have their names already."""
    sizes, inodes = seal.get("sizes", []), seal.get("inodes", [])
    for i, f in enumerate(files):
        ends = {f.total, sizes[i]} if i < len(sizes) else {f.total}
        with contextlib.suppress(OSError):
            found = f.target.lstat()
            f.taken = i < len(inodes) and (found.st_ino, found.st_size) == (inodes[i], sizes[i])
        if f.taken:
            continue
        try:
            if f.path.lstat().st_size not in ends:  # not that of a link, which we never make
                return False
        except OSError:
            return False
    return True


def _discard_other(target: Path, was: Mapping[str, Any], seal: Mapping[str, Any]) -> None:
    """Remove the files of another conversion of this name, which may have had others than this one.

    Of those that had taken their names when it was killed, too: a seal knows them by inode and size.
    """
    names: list[Any] = was.get("files", [])
    sealed = list(zip(seal.get("inodes", []), seal.get("sizes", []), strict=False))
    for i, name in enumerate(names):
        if not isinstance(name, str) or Path(name).name != name:
            continue
        target.with_name(f"{name}.partial").unlink(missing_ok=True)
        path = target.with_name(name)
        with contextlib.suppress(OSError):
            found = path.lstat()
            if i < len(sealed) and (found.st_ino, found.st_size) == sealed[i]:
                path.unlink()


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


def remains(
    target: Path,
    total: int,
    head: Mapping[str, Any],
    resumable: bool,
    restart: bool,
    parts: Sequence[tuple[Path, int]] = (),
) -> str:
    """What a conversion would do with what an interrupted one left, for a dry run; empty where nothing is there."""
    path = target.with_name(f"{target.name}.partial")
    try:
        raw = journal_of(target).read_bytes()
    except OSError:
        return ""
    if not raw.startswith(MARK):
        return ""
    was, done = _parse(raw[: raw.rfind(b"\n") + 1])
    seal = done.pop(SEAL, {})
    head = {"journal": 1, **head}
    files = [_File(p, p.with_name(f"{p.name}.partial"), n) for p, n in parts or [(target, total)]]
    there = f"{path.name} is there, of an interrupted conversion with {len(done)} tensors done"
    why = _obstacle(was, head, resumable, _are_whole(files, seal), restart)
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


def journal_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial.jsonl")


def lock_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial.lock")


def refuse_names(target: Path, inputs: Iterable[Path], parts: Iterable[Path] = (), others: Iterable[Path] = ()) -> None:
    """Refuse names that are taken.

    Args:
        parts: the files of a conversion into several.
        others: files that are replaced or removed when these take their names.
    Raises:
        FileError: the target, or a name that it is written through, is a file that is read; or the lock is not ours.
    """
    given = list(inputs)
    lock = lock_of(target)
    names = [(target, ending) for ending in ("", ".partial", ".partial.jsonl", ".partial.lock")]
    names += [(part, ending) for part in parts for ending in ("", ".partial")]
    names += [(other, "") for other in others]
    for named, ending in names:
        path = named.with_name(f"{named.name}{ending}")
        for file in given:
            with contextlib.suppress(OSError):
                if path.samefile(file):
                    through = f", and {named.name} is written through this name" if ending else ""
                    raise FileError(f"'{path}' is read by this conversion{through}.\nGive the new file another name.")
    with contextlib.suppress(OSError):
        if lock.lstat().st_size or not lock.is_file():  # a lock of ours is empty
            raise _not_ours(lock, target)


def refuse_existing(target: Path, written: Iterable[Path]) -> None:
    """Refuse files that are there already, unless an earlier run of ours was killed while they took their names.

    Raises:
        FileError: names the first one.
    """
    ours: list[int] = []
    with contextlib.suppress(OSError):
        raw = journal_of(target).read_bytes()
        ours = _parse(raw[: raw.rfind(b"\n") + 1])[1].get(SEAL, {}).get("inodes", [])
    for path in written:
        if os.path.lexists(path) and path.lstat().st_ino not in ours:
            raise FileError(f"{path}: is there already.\nUse --overwrite to replace it, or give another name.")


@contextlib.contextmanager
def partial(
    target: Path,
    total: int,
    head: Mapping[str, Any],
    resumable: bool = True,
    overwrite: bool = False,
    inputs: Iterable[Path] = (),
    restart: bool = False,
    resume: bool = False,
    parts: Sequence[tuple[Path, int]] = (),
    beside: Iterable[str] = (),
    stale: Iterable[str] = (),
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
        resume: refuse to begin anew.
        parts: files and their sizes that are written in place of `target`, which then is only what they go by; all in
            its folder.
        beside: names of the small files that `Partial.seal` will be given.
        stale: names of files that would say something wrong of the new ones; removed with `overwrite`, as an index and
            shards of the same name are.
    Raises:
        FileError: it cannot be written, is there already, or somebody else is writing it; `target` is as it was.
    """

    def waiting() -> None:
        raise FileError(f"{target}: another conversion is writing this file.\nWait until it is done.")

    written = [*([path for path, _ in parts] or [target]), *(target.with_name(name) for name in beside)]
    old = [*former_files(target, written), *(path for name in stale if (path := target.with_name(name)).exists())]
    refuse_names(target, inputs, [path for path, _ in parts], [*written, *old])
    if parts:
        head = {**head, "files": [path.name for path, _ in parts]}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock_of(target), waiting) as alone:
            if not overwrite:
                refuse_existing(target, [*written, *old])
            names = [path.name for path in old]
            opened = Partial(target, total, head, resumable, overwrite, restart, alone, resume, parts, names)
            try:
                yield opened
                opened.commit()
            except (QuantwireError, OSError, *WRONG):
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
