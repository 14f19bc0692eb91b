"""Parse and check the header of a safetensors file; no tensor is read.

Layout: 8 bytes little-endian header length, JSON header, data (format specification in the README of
huggingface/safetensors). The checks are the library's own, with messages that name the file and the tensor.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any, TypeGuard, cast

from ..errors import FileError

MAX_HEADER_NBYTES = 100_000_000  # the limit of the safetensors library itself
# Bits a value, as of safetensors 0.8.
DTYPE_BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64},
    **{"C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON header, checked in itself and against the size of the file.

    Raises:
        FileError: missing, not a safetensors file, truncated or corrupt.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(8)
            if len(head) < 8:
                raise FileError(f"{path.name}: {size} bytes are too few for a safetensors file.")
            (length,) = struct.unpack("<Q", head)
            if not 2 <= length <= MAX_HEADER_NBYTES:
                raise FileError(f"{path.name}: not a safetensors file (its header would have {length} bytes).")
            if 8 + length > size:
                raise FileError(f"{path.name}: truncated: the header needs {8 + length} bytes, the file has {size}.")
            raw = file.read(length)
    except OSError as err:
        raise FileError(f"{path}: cannot be read: {err.strerror}.") from err
    corrupt = f"{path.name}: corrupt safetensors header"
    try:
        header: object = json.loads(raw)
    except (ValueError, RecursionError) as err:
        raise FileError(f"{corrupt}: not JSON.") from err
    if not isinstance(header, dict):
        raise FileError(f"{corrupt}: a {type(header).__name__}, expected an object.")
    entries = cast("dict[str, Any]", header)
    spans = [_span(corrupt, name, entry) for name, entry in entries.items() if name != "__metadata__"]
    _check_metadata(corrupt, entries.get("__metadata__", {}))
    _check_spans(path.name, corrupt, sorted(spans), size - 8 - length)
    return entries


def _span(corrupt: str, name: str, entry: Any) -> tuple[int, int, str]:
    """(first byte, byte after the last, name) of a tensor."""
    if not isinstance(entry, dict):
        raise FileError(f"{corrupt}: {name!r} is not an object.")
    fields = cast("dict[str, Any]", entry)
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise FileError(f"{corrupt}: {name!r} has the unknown dtype {dtype!r}.")
    if not _are_sizes(shape):
        raise FileError(f"{corrupt}: {name!r} has the shape {shape!r}.")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FileError(f"{corrupt}: {name!r} has the offsets {offsets!r}.")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise FileError(
            f"{corrupt}: {name!r} with shape {shape} and dtype {dtype} needs {bits // 8} bytes, "
            f"its offsets hold {offsets[1] - offsets[0]}."
        )
    return offsets[0], offsets[1], name


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    """A list of whole numbers from 0 up; JSON's true and false are no numbers here."""
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in cast("list[Any]", value))


def _check_metadata(corrupt: str, metadata: Any) -> None:
    items = cast("dict[str, Any]", metadata).values() if isinstance(metadata, dict) else [None]
    if not all(isinstance(value, str) for value in items):
        raise FileError(f"{corrupt}: __metadata__ does not map strings to strings.")


def _check_spans(file: str, corrupt: str, spans: list[tuple[int, int, str]], data_nbytes: int) -> None:
    """The data is covered without holes or overlaps, to the last byte."""
    at = 0
    for start, end, name in spans:
        if start != at:
            raise FileError(f"{corrupt}: {name!r} begins at {start}, the tensor before it ends at {at}.")
        at = end
    if at > data_nbytes:
        raise FileError(f"{file}: truncated: the tensors need {at} bytes, {data_nbytes} are there.\nDownload it again.")
    if at < data_nbytes:
        raise FileError(f"{file}: corrupt: {data_nbytes - at} bytes follow the last tensor.")
