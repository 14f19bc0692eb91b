"""Parse and check the header of a GGUF file; no tensor is read.

Layout (little-endian, ggml-org/ggml docs/gguf.md): `GGUF`, u32 version, u64 tensor count, u64 key count; the keys, each
a string, a u32 type and a value; the tensor infos, each a name, u32 dimension count, u64 dimensions with the innermost
first, u32 type, u64 offset into the data; padding to the alignment; the data. A string is a u64 length and its bytes.

gguf's own `GGUFReader` was not chosen: it slices beyond the end of the file without an error, so that a wrong array
length keeps it busy for hours, and it computes sizes in wrapping 64-bit numbers.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import FileError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 8  # ggml has 4; files of other tools hold 5-D convolutions
MAX_STRING_NBYTES = 1 << 26
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

Scalar = str | int | float | bool


class _Malformed(Exception):
    """What is wrong, without the file's name.

    Names out of the file stand in it as `repr` shows them: a damaged one may hold line breaks.
    """


@dataclass(frozen=True)
class GgufTensor:
    """One tensor info.

    Attributes:
        kind: ggml type name, such as `Q4_K`.
        shape: outermost dimension first, as torch has it.
        start, nbytes: where its bytes lie in the file.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Attributes: metadata: keys with a single value; arrays (vocabularies, ...) are checked and left out."""

    metadata: Mapping[str, Scalar]
    tensors: tuple[GgufTensor, ...]


def read_gguf_header(path: Path, types: Mapping[int, tuple[str, int, int]]) -> GgufHeader:
    """Read the header; every tensor lies inside the file and overlaps no other.

    Args:
        types: ggml type number -> (name, values a block, bytes a block).
    Raises:
        FileError: missing, not GGUF, truncated or corrupt.
    """
    try:
        with open(path, "rb") as file:
            return _Parser(file, path.stat().st_size, types).parse()
    except OSError as err:
        raise FileError(f"{path}: cannot be read: {err.strerror}.") from err
    except _Malformed as err:
        raise FileError(f"{path.name}: {err}.") from err


class _Parser:
    def __init__(self, file: BinaryIO, size: int, types: Mapping[int, tuple[str, int, int]]) -> None:
        self.file = file
        self.size = size
        self.types = types

    def parse(self) -> GgufHeader:
        if self.take(4, "the magic") != MAGIC:
            raise _Malformed("not a GGUF file (it does not begin with 'GGUF')")
        version = self.number("I", "the version")
        if version not in VERSIONS:
            known = " and ".join(map(str, VERSIONS))
            raise _Malformed(f"GGUF version {version} cannot be read, only little-endian {known}")
        tensor_count, key_count = self.number("Q", "the tensor count"), self.number("Q", "the key count")
        metadata: dict[str, Scalar] = {}
        for _ in range(key_count):
            key = self.string("a key")
            value = self.value(self.number("I", f"the type of {key!r}"), f"{key!r}")
            if value is not None:
                metadata[key] = value
        infos = [self.info() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise _Malformed(f"corrupt GGUF file: alignment {alignment} is not a power of two from 8 up")
        base = -(-self.file.tell() // alignment) * alignment
        tensors = tuple(self.place(info, base, alignment) for info in infos)
        _refuse_overlap(tensors)
        return GgufHeader(metadata, tensors)

    def take(self, nbytes: int, what: str) -> bytes:
        at = self.file.tell()
        if nbytes > self.size - at:
            raise _Malformed(
                f"truncated GGUF file: {what} at byte {at} needs {nbytes} bytes, {self.size - at} are left"
            )
        return self.file.read(nbytes)

    def number(self, code: str, what: str) -> int:
        (value,) = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))
        return value

    def string(self, what: str) -> str:
        length = self.number("Q", what)
        if length > MAX_STRING_NBYTES:
            raise _Malformed(f"corrupt GGUF file: {what} would have {length} bytes")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            raise _Malformed(f"corrupt GGUF file: {what} is not UTF-8") from None

    def value(self, kind: int, what: str) -> Scalar | None:
        """A single value, or None after skipping an array."""
        if kind in SCALARS:
            return self.number(SCALARS[kind], what)
        if kind == STRING:
            return self.string(what)
        if kind != ARRAY:
            raise _Malformed(f"corrupt GGUF file: {what} has the unknown value type {kind}")
        item, count = self.number("I", what), self.number("Q", what)
        if item in SCALARS:
            self.skip(count * struct.calcsize(f"<{SCALARS[item]}"), what)
        elif item == STRING:
            for _ in range(count):  # ends with the file at the latest: each takes at least its 8 bytes of length
                self.skip(self.number("Q", what), what)
        else:
            raise _Malformed(f"corrupt GGUF file: {what} is an array of the unknown type {item}")
        return None

    def skip(self, nbytes: int, what: str) -> None:
        at = self.file.tell()
        if nbytes > self.size - at:
            raise _Malformed(
                f"truncated GGUF file: {what} at byte {at} needs {nbytes} bytes, {self.size - at} are left"
            )
        self.file.seek(nbytes, 1)

    def info(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape, type number, offset into the data)."""
        name = self.string("a tensor name")
        what = f"the info of {name!r}"
        count = self.number("I", what)
        if count > MAX_DIMENSIONS:
            raise _Malformed(f"corrupt GGUF file: {name!r} would have {count} dimensions")
        shape = tuple(reversed([self.number("Q", what) for _ in range(count)]))
        return name, shape, self.number("I", what), self.number("Q", what)

    def place(self, info: tuple[str, tuple[int, ...], int, int], base: int, alignment: int) -> GgufTensor:
        name, shape, number, offset = info
        if number not in self.types:
            raise _Malformed(f"{name!r} has the unknown ggml type {number}")
        kind, block, block_nbytes = self.types[number]
        innermost = shape[-1] if shape else 1
        if innermost % block:
            raise _Malformed(
                f"corrupt GGUF file: {name!r} has rows of {innermost}, no multiple of {kind}'s block {block}"
            )
        if offset % alignment:
            raise _Malformed(f"corrupt GGUF file: {name!r} is not aligned (offset {offset})")
        nbytes = math.prod(shape) // block * block_nbytes
        if base + offset + nbytes > self.size:
            end = base + offset + nbytes
            raise _Malformed(f"truncated GGUF file: {name!r} ends at byte {end}, the file has {self.size}")
        return GgufTensor(name, kind, shape, base + offset, nbytes)


def _refuse_overlap(tensors: tuple[GgufTensor, ...]) -> None:
    names: set[str] = set()
    for tensor in tensors:
        if tensor.name in names:
            raise _Malformed(f"corrupt GGUF file: {tensor.name!r} appears twice")
        names.add(tensor.name)
    held = sorted((t for t in tensors if t.nbytes), key=lambda t: t.start)
    for before, after in itertools.pairwise(held):
        if before.start + before.nbytes > after.start:
            raise _Malformed(f"corrupt GGUF file: {before.name!r} and {after.name!r} overlap")
