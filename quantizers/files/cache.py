"""Quantized files kept on disk by content, so that quantizing a model file is done once.

    <folder>/<key>.safetensors   a file of `write_quantized`; its modification time is that of its last use
    <folder>/<key>.lock          held while the file is made
    <folder>/sources/<id>.json   SHA-256 of a model file, with the size, times and inode that it had

The key is a hash over the source's content, the spec, the host's layout, the versions that took part and the pack's own
code, so an entry is never stale: whatever changes the result changes the key. `QUANTWIRE_CACHE` names another folder,
`QUANTWIRE_CACHE_GIB` the size beyond which the entries that were not used for longest go.

An entry's header is checked at each load, its data is not: a byte of it that changed on the disk while the size stayed
is served as it is. Reading the whole file would cost what the memory map saves. Each entry has a checksum; with
`QUANTWIRE_CACHE_VERIFY=1` it is verified at each load, and a damaged entry is removed, with a warning, and made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FileError, SpecError
from .checkpoint import Checkpoint, replace_file
from .file_state import check_unchanged, file_state
from .locks import locked
from .quantized_file import blocks, read_quantized, verify_checksum

log = logging.getLogger(__name__)
GIB = 1 << 30
DEFAULT_GIB = 32.0
ABANDONED_S = 3600  # a temporary file that nobody wrote to for so long belongs to a process that died
Check = Callable[[Checkpoint], object]
RACY_S = 2.0  # a file written less than this ago may change again without a new modification time


class CacheUnwritable(FileError):
    """The cache folder cannot take the file; the model can be quantized without it."""


@dataclass(frozen=True)
class Cache:
    """A folder of quantized files.

    Attributes:
        folder: made when the first file is.
        limit_nbytes: of all entries together.
        verify: compare an entry's checksum at each load, which reads all of it.
    """

    folder: Path
    limit_nbytes: int
    verify: bool = False

    def get(
        self, key: str, check: Check | None = None, waiting: Callable[[], object] | None = None
    ) -> Checkpoint | None:
        """The entry, memory-mapped, or None. A damaged one is removed with a warning.

        Args:
            check: raises FileError for an entry that cannot be used; it counts as damaged.
            waiting: called again and again while an entry is verified; may raise to give up.
        """
        path = self._path(key)
        try:
            if not path.is_file():
                return None
            checkpoint = read_quantized(path)
            if self.verify:
                verify_checksum(path, waiting)
            if check is not None:
                check(checkpoint)
        except FileError as err:
            if path.exists():  # else another process evicted it just now
                log.warning("%s: removed from the cache: %s", path.name, str(err).splitlines()[0])
                with contextlib.suppress(OSError):
                    path.unlink()
            return None
        with contextlib.suppress(OSError):  # a folder that is only readable serves too
            os.utime(path)
        return checkpoint

    def get_or_make(
        self,
        key: str,
        make: Callable[[Path], None],
        nbytes: int,
        waiting: Callable[[], object] | None = None,
        check: Check | None = None,
    ) -> tuple[Checkpoint, bool]:
        """The entry, made first if need be; of several processes that ask for it one makes it and the others wait.

        Args:
            make: writes the file at the path that it is given, whole or not at all.
            nbytes: how large it will be, about.
            waiting: called again and again while another process makes it; may raise to give up.
            check: see `get`; not called for what is made now.
        Returns:
            the entry and whether it was made now.
        Raises:
            CacheUnwritable: no room or no permission. What `make` raises otherwise comes through.
        """
        found = self.get(key, check, waiting)
        if found is not None:
            return found, False
        path = self._path(key)
        self._prepare()
        with locked(path.with_suffix(".lock"), waiting):
            found = self.get(key, check, waiting)
            if found is not None:
                return found, False
            self._make_room(nbytes)  # under the lock: what waits here for another process needs none
            try:
                make(path)
            except FileError as err:
                if isinstance(err.__cause__, OSError) and str(path) in str(err):
                    raise CacheUnwritable(str(err)) from err
                raise
            made = read_quantized(path)
        self.evict(keep=path)
        return made, True

    def _prepare(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise CacheUnwritable(f"{self.folder}: cannot be written: {err.strerror or err}.") from err
        if not os.access(self.folder, os.W_OK):
            raise CacheUnwritable(f"{self.folder}: cannot be written: no permission.")

    def _free(self) -> int:
        try:
            return shutil.disk_usage(self.folder).free
        except OSError as err:
            raise CacheUnwritable(f"{self.folder}: cannot be written: {err.strerror or err}.") from err

    def _make_room(self, nbytes: int) -> None:
        """Evict as many entries as a new one needs; none where all of them would not be enough."""
        needed = f"{self.folder}: no room: {nbytes / GIB:.2f} GiB needed"
        if nbytes > self.limit_nbytes:
            raise CacheUnwritable(f"{needed}, a limit of {self.limit_nbytes / GIB:.2f} GiB.")
        held = sum(size for _, size, _ in self._entries())
        if nbytes <= self._free() + held:
            self.evict(room=nbytes)
            held = sum(size for _, size, _ in self._entries())
        free = self._free()
        if nbytes > free:
            raise CacheUnwritable(f"{needed}, {free / GIB:.2f} GiB free and {held / GIB:.2f} GiB in other entries.")

    def evict(self, keep: Path | None = None, room: int = 0) -> None:
        """Remove the entries that were not used for longest until the rest and `room` are within the limit.

        Entries that another process has open are safe to remove: its map keeps the data, and the disk its space until
        the map goes (on Windows removing fails and the entry stays).

        Args:
            keep: is never removed.
            room: bytes that must be free on the disk, too.
        """
        with locked(self.folder / "evict.lock"):
            self._remove_abandoned()
            entries = sorted(self._entries(), key=lambda entry: entry[0])
            total = sum(size for _, size, _ in entries)
            for _, size, path in entries:
                if total + room <= self.limit_nbytes and (not room or room <= self._free()):
                    break
                if path != keep:
                    with contextlib.suppress(OSError):
                        path.unlink()
                        total -= size
                        log.info("%s: removed from the cache, which is full", path.name)

    def _entries(self) -> list[tuple[int, int, Path]]:
        """(time of last use, bytes, path) of every entry."""
        found: list[tuple[int, int, Path]] = []
        for path in self.folder.glob("*.safetensors"):
            with contextlib.suppress(OSError):  # gone in the meantime
                stat = path.stat()
                found.append((stat.st_mtime_ns, stat.st_size, path))
        return found

    def _remove_abandoned(self) -> None:
        for path in self.folder.glob("*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > ABANDONED_S:
                    path.unlink()
        for note in (self.folder / "sources").glob("*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                if not Path(json.loads(note.read_text(encoding="utf-8"))["path"]).exists():
                    note.unlink()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def source_hash(
        self, path: Path, hashing: Callable[[], object] | None = None, state: dict[str, int] | None = None
    ) -> str:
        """SHA-256 of a file's content; hashed again only if its size, times or inode changed.

        Args:
            hashing: called after every block; may raise to give up.
            state: of `file_state`, when something of the file was read before; None is now.
        Raises:
            FileError: it cannot be read, or is not in that state before and after.
        """
        real = Path(os.path.realpath(path))
        note = self.folder / "sources" / f"{hashlib.sha256(str(real).encode()).hexdigest()[:32]}.json"
        state = file_state(real) if state is None else state
        check_unchanged(path, state)
        try:
            known: Any = json.loads(note.read_text(encoding="utf-8"))
            if known["state"] == state and known["path"] == str(real):
                return str(known["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not noted yet, or damaged: hash it
        digest = _sha256(real, hashing)
        check_unchanged(path, state)
        if time.time_ns() - max(state["mtime_ns"], state["ctime_ns"]) > RACY_S * 1e9:
            _write_json(note, {"path": str(real), "state": state, "sha256": digest})
        return digest


def default_cache() -> Cache:
    """The cache that the environment names, else the platform's own place.

    Raises:
        SpecError: `QUANTWIRE_CACHE_GIB` is not a number of GiB, or `QUANTWIRE_CACHE_VERIFY` is neither 0 nor 1.
    """
    given = os.environ.get("QUANTWIRE_CACHE_GIB", "")
    try:
        gib = float(given) if given else DEFAULT_GIB
    except ValueError:
        gib = math.nan
    if not 0 <= gib < math.inf:
        raise SpecError(f"QUANTWIRE_CACHE_GIB is '{given}', expected a number of GiB such as 32.")
    verify = os.environ.get("QUANTWIRE_CACHE_VERIFY", "")
    if verify not in ("", "0", "1"):
        raise SpecError(f"QUANTWIRE_CACHE_VERIFY is '{verify}', expected 1 (verify each load) or 0.")
    given = os.environ.get("QUANTWIRE_CACHE")
    folder = Path(given).expanduser().absolute() if given else _platform_folder()
    return Cache(folder, int(gib * GIB), verify == "1")


def _platform_folder() -> Path:
    home = Path.home()
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        root = home / "Library" / "Caches"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return root / "quantwire"


def cache_key(content: Mapping[str, Any]) -> str:
    """Hash of JSON values, in a form that does not depend on their order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:40]


def _write_json(path: Path, value: Any) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text(json.dumps(value), encoding="utf-8")

    with contextlib.suppress(FileError):  # then the source is hashed again next time
        replace_file(path, write)


def _sha256(path: Path, hashing: Callable[[], object] | None) -> str:
    digest = hashlib.sha256()
    for block in blocks(path):
        digest.update(block)
        if hashing is not None:
            hashing()
    return digest.hexdigest()
