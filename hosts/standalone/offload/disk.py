"""Weights on disk: a private folder, written once, removed with the copy of the model that reads it, or when this
process is gone.

safetensors holds them, not accelerate's memory maps: writing to a map of a full disk ends the process with SIGBUS,
while safetensors reports it, and tied weights are written once.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ....quantizers.errors import FileError
from ....quantizers.files.checkpoint import write_safetensors
from ....quantizers.files.journal import NO_SPACE
from ....quantizers.files.locks import locked

MIB = 1 << 20
WEIGHTS = "weights.safetensors"
ALIGNMENT = 64
PREFIX = "quantwire-offload-"
MAKE_ROOM = "Free some, set TMPDIR to a folder on a larger disk, or choose keep_on memory."
OTHER = "Set TMPDIR to a folder that can be written, or choose keep_on memory."


@contextmanager
def private_folder(nbytes: int) -> Iterator[Path]:
    """A new folder that only this user can read, among the temporary files, removed after the block.

    Folders that processes left when they were killed are removed first.

    Raises:
        FileError: the disk has not so many bytes free, or takes no folder.
    """
    parent = _temporary()
    with ExitStack() as held:
        try:
            _remove_abandoned(parent)
            free = shutil.disk_usage(parent).free
            if nbytes > free:
                raise FileError(
                    f"{parent}: {nbytes / MIB:.0f} MiB of weights are to be kept on disk, and {free / MIB:.0f} MiB are "
                    f"free there.\n{MAKE_ROOM}"
                )
            folder = parent / f"{PREFIX}{secrets.token_hex(8)}"
            held.enter_context(locked(_lock_of(folder)))  # before the folder is there for others to find
            folder.mkdir(0o700)
        except OSError as err:
            raise FileError(
                f"{parent}: no folder can be made for offloaded weights: {err.strerror or err}.\n{OTHER}"
            ) from err
        held.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def _temporary() -> Path:
    named = os.environ.get("TMPDIR")
    if named and not (os.path.isdir(named) and os.access(named, os.W_OK | os.X_OK)):
        # Python would take another folder without a word, on the disk that was to be avoided.
        raise FileError(f"TMPDIR is {named}, which is no folder that can be written.\n{OTHER}")
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as err:
        raise FileError(f"There is no folder for temporary files: {err.strerror or err}.\n{OTHER}") from err


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _remove_abandoned(parent: Path) -> None:
    """Folders of this user whose lock nobody holds: the system lets go of it when a process dies."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # another process removes it too, or it is in use
            found = folder.lstat()
            if stat.S_ISDIR(found.st_mode) and (not hasattr(os, "getuid") or found.st_uid == os.getuid()):
                with locked(_lock_of(folder), _in_use) as alone:
                    if alone:
                        shutil.rmtree(folder, ignore_errors=True)


def _in_use() -> None:
    raise BlockingIOError


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Inside the block a library writes to the folder: say so if the disk is full."""
    import safetensors

    try:
        yield
    except (OSError, safetensors.SafetensorError) as err:
        if getattr(err, "errno", None) not in NO_SPACE and not any(
            word in str(err) for word in ("No space left", "os error 28", "os error 122", "File too large")
        ):
            raise
        raise FileError(f"{folder}: the disk is full, so weights cannot be kept on it.\n{MAKE_ROOM}") from err


class DiskWeights(Mapping[str, Tensor]):
    """Weights by name, read from a file each time.

    Args:
        folder: where the file is written.
        tensors: name -> value on the CPU; the same tensor under several names is written once.
    Raises:
        FileError: the file cannot be written.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        from safetensors import safe_open

        first: dict[Any, str] = {}
        self._names = {name: first.setdefault(_place(t), name) for name, t in tensors.items()}
        path = folder / WEIGHTS
        write_safetensors(path, {name: tensors[name].detach() for name in first.values()})
        # Open as long as the weights are in use: opening it for each tensor would read the header each time.
        self._file: Any = safe_open(str(path), framework="pt", device="cpu")
        if os.name == "posix":
            path.unlink()  # what is mapped stays until nothing maps it, however this process ends

    def __getitem__(self, name: str) -> Tensor:
        found: Tensor = self._file.get_tensor(self._names[name])
        # The file is mapped, and its tensors begin at multiples of 8 bytes; kernels are written for PyTorch's 64.
        return found.clone() if found.data_ptr() % ALIGNMENT else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def close(self) -> None:
        self._file = None


def _place(t: Tensor) -> Any:
    return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype
