"""Quantized files kept on disk by content, so that quantizing a model file is done once.

    <folder>/<key>.safetensors   a file of `write_quantized`; its modification time is that of its last use
    <folder>/<key>.lock          held while the file is made
    <folder>/sources/<id>.json   SHA-256 of a model file, with the size, times and inode that it had

The key is a hash over the source's content, the spec, the host's layout, the versions that took part and the pack's own
code, so an entry is never stale: whatever changes the result changes the key. `QUANTWIRE_CACHE` names another folder,
`QUANTWIRE_CACHE_GIB` the size beyond which the entries that were not used for longest go.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FileError, SpecError
from .checkpoint import Checkpoint, replace_file
from .locks import locked
from .quantized_file import read_quantized

log = logging.getLogger(__name__)
GIB = 1 << 30
DEFAULT_GIB = 32.0
ABANDONED_S = 3600  # a temporary file that nobody wrote to for so long belongs to a process that died
RACY_S = 2.0  # a file written less than this ago may change again without a new modification time
HASH_BLOCK_NBYTES = 1 << 23


class CacheUnwritable(FileError):
    """The cache folder cannot take the file; the model can be quantized without it."""


@dataclass(frozen=True)
class Cache:
    """Attributes: folder: made when the first file is; limit_nbytes: of all entries together."""

    folder: Path
    limit_nbytes: int

    def get(self, key: str) -> Checkpoint | None:
        """The entry, memory-mapped, or None. A damaged one is removed with a warning."""
        path = self._path(key)
        try:
            if not path.is_file():
                return None
            checkpoint = read_quantized(path)
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
        self, key: str, make: Callable[[Path], None], nbytes: int, waiting: Callable[[], object] | None = None
    ) -> tuple[Checkpoint, bool]:
        """The entry, made first if need be; of several processes that ask for it one makes it and the others wait.

        Args:
            make: writes the file at the path that it is given, whole or not at all.
            nbytes: how large it will be, about.
            waiting: called again and again while another process makes it; may raise to give up.
        Returns:
            the entry and whether it was made now.
        Raises:
            CacheUnwritable: no room or no permission. What `make` raises otherwise comes through.
        """
        found = self.get(key)
        if found is not None:
            return found, False
        path = self._path(key)
        self._prepare(nbytes)
        with locked(path.with_suffix(".lock"), waiting):
            found = self.get(key)
            if found is not None:
                return found, False
            try:
                make(path)
            except FileError as err:
                if isinstance(err.__cause__, OSError) and str(path) in str(err):
                    raise CacheUnwritable(str(err)) from err
                raise
            made = read_quantized(path)
        self.evict(keep=path)
        return made, True

    def _prepare(self, nbytes: int) -> None:
        import shutil

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as err:
            raise CacheUnwritable(f"{self.folder}: cannot be written: {err.strerror or err}.") from err
        if not os.access(self.folder, os.W_OK):
            raise CacheUnwritable(f"{self.folder}: cannot be written: no permission.")
        if nbytes > free or nbytes > self.limit_nbytes:
            room = f"{free / GIB:.2f} GiB free" if nbytes > free else f"a limit of {self.limit_nbytes / GIB:.2f} GiB"
            raise CacheUnwritable(f"{self.folder}: no room: {nbytes / GIB:.2f} GiB needed, {room}.")

    def evict(self, keep: Path | None = None) -> None:
        """Remove the entries that were not used for longest until the rest is within the limit.

        Entries that another process has open are safe to remove: its map keeps the data (on Windows removing fails and
        the entry stays).

        Args:
            keep: is never removed.
        """
        with locked(self.folder / "evict.lock"):
            self._remove_abandoned()
            entries = sorted(self._entries(), key=lambda entry: entry[0])
            total = sum(size for _, size, _ in entries)
            for _, size, path in entries:
                if total <= self.limit_nbytes:
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

    def source_hash(self, path: Path, hashing: Callable[[], object] | None = None) -> str:
        """SHA-256 of a file's content; hashed again only if its size, times or inode changed.

        Args:
            hashing: called after every block; may raise to give up.
        Raises:
            FileError: it cannot be read.
        """
        real = Path(os.path.realpath(path))
        note = self.folder / "sources" / f"{hashlib.sha256(str(real).encode()).hexdigest()[:32]}.json"
        state = _state(real)
        try:
            known: Any = json.loads(note.read_text(encoding="utf-8"))
            if known["state"] == state and known["path"] == str(real):
                return str(known["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not noted yet, or damaged: hash it
        digest = _sha256(real, hashing)
        after = _state(real)
        if after != state:
            raise FileError(f"{path.name}: changed while it was read.\nWait until it is written, then run again.")
        if time.time_ns() - max(state["mtime_ns"], state["ctime_ns"]) > RACY_S * 1e9:
            _write_json(note, {"path": str(real), "state": state, "sha256": digest})
        return digest


def default_cache() -> Cache:
    """The cache that the environment names, else the platform's own place.

    Raises:
        SpecError: `QUANTWIRE_CACHE_GIB` is not a number of GiB.
    """
    given = os.environ.get("QUANTWIRE_CACHE_GIB", "")
    try:
        gib = float(given) if given else DEFAULT_GIB
    except ValueError:
        gib = math.nan
    if not 0 <= gib < math.inf:
        raise SpecError(f"QUANTWIRE_CACHE_GIB is '{given}', expected a number of GiB such as 32.")
    folder = os.environ.get("QUANTWIRE_CACHE")
    return Cache(Path(folder).expanduser().absolute() if folder else _platform_folder(), int(gib * GIB))


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


def _state(path: Path) -> dict[str, int]:
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


def _sha256(path: Path, hashing: Callable[[], object] | None) -> str:
    digest = hashlib.sha256()
    block = bytearray(HASH_BLOCK_NBYTES)
    try:
        with open(path, "rb", buffering=0) as file:
            while size := file.readinto(block):
                digest.update(memoryview(block)[:size])
                if hashing is not None:
                    hashing()
    except OSError as err:
        raise FileError(f"{path}: cannot be read: {err.strerror}.") from err
    return digest.hexdigest()
