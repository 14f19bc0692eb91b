"""Numbers in small tensors, read without torch."""

from __future__ import annotations

import struct

from ...errors import FileError
from ..model_file import ModelFile

_CODES = {"F64": "<d", "F32": "<f", "F16": "<e"}


def one_value(file: ModelFile, name: str) -> float | None:
    """The value of a float tensor that has one; None where it has another number of them, or cannot be read."""
    entry = file.entries.get(name)
    if entry is None or entry.numel != 1 or entry.dtype not in (*_CODES, "BF16"):
        return None
    try:
        data = file.small(name)
        if entry.dtype == "BF16":  # the upper half of a float32
            return struct.unpack("<f", b"\0\0" + data)[0]
        return struct.unpack(_CODES[entry.dtype], data)[0]
    except (FileError, struct.error):  # the file is cut off there, which others report
        return None
