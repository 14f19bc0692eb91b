"""Tensors of a model in pieces, read into memory of our own.

A map would end the process where a file becomes shorter meanwhile; a read ends in an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import FileError
from .model_file import Entry
from .regular import open_regular

if TYPE_CHECKING:
    from types import TracebackType

    from torch import Tensor

PIECE_NBYTES = 1 << 24  # whole values of every dtype


class Pieces:
    """Reads tensors; each file is opened once."""

    def __init__(self) -> None:
        self._files: dict[Path, FileIO] = {}

    def __enter__(self) -> Pieces:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def bytes_of(self, entry: Entry, nbytes: int = PIECE_NBYTES) -> Iterator[bytearray]:
        """Its bytes in order, at most `nbytes` at once.

        Raises:
            FileError: the file became shorter, or cannot be read.
        """
        try:
            if entry.file not in self._files:
                with open_regular(entry.file) as file:
                    # Without a buffer: most tensors that are read are small and far apart.
                    self._files[entry.file] = FileIO(os.dup(file.fileno()), "rb")
            for at in range(0, entry.nbytes, nbytes):
                yield _exactly(self._files[entry.file], entry, at, min(nbytes, entry.nbytes - at))
        except OSError as err:
            raise FileError(f"{entry.file}: cannot be read: {err.strerror}.") from err

    def flat(self, entry: Entry) -> Iterator[Tensor]:
        """Its values in order, each piece with one dimension.

        Raises:
            FileError: as `bytes_of`, or torch cannot hold the dtype.
        """
        import torch

        dtype = entry.torch_dtype
        if dtype is None:
            raise FileError(f"{entry.file.name}: '{entry.name}' has dtype {entry.dtype}, which torch cannot hold.")
        for data in self.bytes_of(entry):
            yield cast("Tensor", cast(Any, torch).frombuffer(data, dtype=dtype))


def _exactly(file: FileIO, entry: Entry, at: int, nbytes: int) -> bytearray:
    data = bytearray(nbytes)
    view, got = memoryview(data), 0
    file.seek(entry.start + at)
    while got < nbytes:
        read = file.readinto(view[got:])
        if not read:
            raise FileError(f"{entry.file.name}: became shorter while it was read.\nWait until it is written.")
        got += read
    return data
