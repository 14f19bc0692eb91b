"""Parse and check the header of a safetensors file; no tensor is read.

Layout: 8 bytes little-endian header length, JSON header, data (format specification in the README of
huggingface/safetensors). The checks are the library's own, with messages that name the file and the tensor, and some
more: sizes and names that no tensor can have, and objects with a key twice, of which the library takes one in silence.

`parse` collects what is wrong and keeps the tensors that are not concerned, for the doctor; everything else reads
through `read_safetensors_header`, which refuses at the first fault.
"""

from __future__ import annotations

import math
import os
import re
import reprlib
import struct
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard, cast

from ..errors import FileError
from .bounded_json import loads
from .faults import Fault
from .regular import open_regular

MAX_HEADER_NBYTES = 100_000_000  # the limit of the safetensors library itself
MAX_NUMEL = (1 << 63) - 1
MAX_DIMENSIONS = 64  # torch's iterators have no more
MAX_NAME = 1024  # characters; the longest names of models have 150
MAX_FAULTS = 1000
MAX_SHOWN = 400  # characters of a value in a message
# Bits a value, as of safetensors 0.8.
DTYPE_BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64},
    **{"C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
METADATA = "__metadata__"
CORRUPT = "corrupt safetensors header"
# Control characters end lines and strings of whoever prints a name; half a surrogate pair cannot be printed at all.
_BAD_CHARACTER = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxlevel, _SHORT.maxlong = 120, 8, 4, 3, 60


@dataclass(frozen=True)
class Header:
    """What is readable of a header.

    Attributes:
        size: of the file.
        data_start: where the data begins, to which the offsets of entries are relative.
        entries: name -> `dtype`, `shape` and `data_offsets`, each checked in itself; they may overlap, or lie beyond
            the end of the file.
        metadata: strings; None where the file has none at all.
        raw_metadata: as it stands, where it is not strings alone.
        faults: what is wrong; without one, the file is as the format wants it.
    """

    size: int
    data_start: int
    entries: dict[str, dict[str, Any]]
    metadata: dict[str, str] | None
    raw_metadata: Any
    faults: tuple[Fault, ...]


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON header, checked in itself and against the size of the file.

    Raises:
        FileError: missing, no regular file, not a safetensors file, truncated or corrupt.
    """
    header = read_header(path)
    return header.entries if header.metadata is None else {METADATA: header.metadata, **header.entries}


def read_header(path: Path) -> Header:
    """A header without faults that matter.

    Raises:
        FileError: as `read_safetensors_header`.
    """
    header = parse(path)
    fatal = next((fault for fault in header.faults if fault.fatal), None)
    if fatal is not None:
        raise FileError(f"{path.name}: {fatal.text}")
    return header


def parse(path: Path) -> Header:
    """All of a header that is readable, and everything that is wrong with it.

    Takes at most 256 MiB of memory, whatever the file holds.

    Raises:
        FileError: nothing of it is readable.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = _length(path, file, size)
            found, faults = _loaded(path, file, length)
    except OSError as err:
        raise FileError(f"{path}: cannot be read: {err.strerror}.") from err
    if not isinstance(found, dict):
        raise FileError(f"{path.name}: {CORRUPT}: a {type(found).__name__}, expected an object.")
    entries = cast("dict[str, Any]", found)
    given: Any = entries.pop(METADATA, None)  # null stands for none, as in the library
    spans = [_span(name, entry) for name, entry in entries.items()]
    for name in list(entries):
        fault = _entry_fault(name, entries[name])
        if fault is not None:
            if len(faults) < MAX_FAULTS:
                faults.append(fault)
            if fault.fatal:
                del entries[name]
    metadata, fault = _metadata(given) if given is not None else (None, None)
    if fault is not None:
        faults.append(fault)
    known = [span for span in spans if span is not None]
    faults.extend(_span_faults(known, entries, size - 8 - length, len(known) == len(spans)))
    return Header(size, 8 + length, entries, metadata, given if fault is not None else None, tuple(faults))


def _length(path: Path, file: BinaryIO, size: int) -> int:
    head = file.read(8)
    if len(head) < 8:
        raise FileError(f"{path.name}: {size} bytes are too few for a safetensors file.")
    (length,) = struct.unpack("<Q", head)
    if not 2 <= length <= MAX_HEADER_NBYTES:
        raise FileError(f"{path.name}: not a safetensors file (its header would have {length} bytes).")
    if 8 + length > size:
        raise FileError(f"{path.name}: truncated: the header needs {8 + length} bytes, the file has {size}.")
    return length


def _loaded(path: Path, file: BinaryIO, length: int) -> tuple[object, list[Fault]]:
    """The JSON, and which keys stand twice in it."""
    faults: list[Fault] = []

    def twice(key: str) -> None:
        if len(faults) < MAX_FAULTS:
            faults.append(Fault("header-duplicate", key, f"{CORRUPT}: {shown(key)} stands twice in an object."))

    try:
        return loads(file.read(length), duplicate=twice), faults  # a file that became shorter ends in the middle
    except ValueError as err:
        raise FileError(f"{path.name}: {CORRUPT}: {_why(err)}.") from err


def _why(err: ValueError) -> str:
    text = str(err)
    return text if text.startswith("JSON of") else f"not JSON ({text.removeprefix('not JSON (').removesuffix(')')})"


def shown(value: object) -> str:
    """A value from a file in a message, cut where it is long."""
    text = _SHORT.repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _entry_fault(name: str, entry: Any) -> Fault | None:
    """What is wrong with a tensor's entry in itself."""

    def fault(code: str, text: str, fatal: bool = True) -> Fault:
        return Fault(f"header-{code}", name, f"{CORRUPT}: {shown(name)} {text}.", fatal=fatal)

    if len(name) > MAX_NAME:
        return fault("name", f"is a name of {len(name)} characters, expected at most {MAX_NAME}")
    if _BAD_CHARACTER.search(name):
        return fault("name", "has a control character in its name")
    if not isinstance(entry, dict):
        return fault("entry", "is not an object")
    fields = cast("dict[str, Any]", entry)
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        return fault("dtype", f"has the unknown dtype {shown(dtype)}")
    if not _are_sizes(shape):
        return fault("shape", f"has the shape {shown(shape)}")
    if len(shape) > MAX_DIMENSIONS:
        return fault("dimensions", f"has {len(shape)} dimensions, expected at most {MAX_DIMENSIONS}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return fault("offsets", f"has the offsets {shown(offsets)}")
    numel = math.prod(shape)
    bits = numel * DTYPE_BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        held = offsets[1] - offsets[0]
        text = f"with shape {shown(shape)} and dtype {dtype} needs {bits // 8} bytes, its offsets hold {held}"
        return fault("size", text)
    if (numel or math.prod(n or 1 for n in shape)) > MAX_NUMEL:
        return fault("shape", f"has the shape {shown(shape)}, which is beyond 2**63 values")
    if name.startswith("/") or (".." in name and ".." in re.split(r"[/\\]", name)):
        return fault("path", "looks like a path; names are never used as paths here", fatal=False)
    return None


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    """A list of whole numbers from 0 up; JSON's true and false are no numbers here."""
    if not isinstance(value, list):
        return False
    for n in cast("list[Any]", value):  # noqa: SIM110 - a generator takes twice the time, for each tensor of a model
        if type(n) is not int or n < 0:
            return False
    return True


def _metadata(given: Any) -> tuple[dict[str, str], Fault | None]:
    items = cast("dict[str, Any]", given) if isinstance(given, dict) else {}
    strings = {key: value for key, value in items.items() if isinstance(value, str)}
    if isinstance(given, dict) and len(strings) == len(items):
        return strings, None
    return strings, Fault("header-metadata", "", f"{CORRUPT}: {METADATA} does not map strings to strings.")


def _span(name: str, entry: Any) -> tuple[int, int, str] | None:
    """(first byte, end, name) of a tensor, whatever else is wrong with it."""
    offsets = cast("dict[str, Any]", entry).get("data_offsets") if isinstance(entry, dict) else None
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return None
    return offsets[0], offsets[1], name


def _span_faults(
    spans: list[tuple[int, int, str]], kept: Container[str], data_nbytes: int, complete: bool
) -> Iterator[Fault]:
    """The data is covered without holes or overlaps, to the last byte.

    Args:
        kept: the tensors that are readable; the others have faults of their own, and may be in each other's place.
        complete: these are all tensors; else what is between them may belong to another one.
    """
    at, kept_at, said = 0, 0, 0
    spans = sorted(spans)
    for start, end, name in spans:
        overlap = start < kept_at and name in kept
        if (overlap or (start > at and complete)) and said < MAX_FAULTS:
            code, said = "header-overlap" if overlap else "header-hole", said + 1
            before = kept_at if overlap else at
            yield Fault(
                code, name, f"{CORRUPT}: {shown(name)} begins at {start}, the tensor before it ends at {before}."
            )
        at = max(at, end)
        kept_at = max(kept_at, end) if name in kept else kept_at
    if at > data_nbytes:
        text = f"truncated: the tensors need {at} bytes, {data_nbytes} are there.\nDownload it again."
        first = next(name for _, end, name in spans if end > data_nbytes)
        yield Fault("header-truncated", first, text)
    if at < data_nbytes and complete:
        yield Fault("header-trailing", "", f"corrupt: {data_nbytes - at} bytes follow the last tensor.")
