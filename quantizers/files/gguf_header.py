"""Parse and check the header of a GGUF file; no tensor is read.

Layout (little-endian, ggml-org/ggml docs/gguf.md): `GGUF`, u32 version, u64 tensor count, u64 key count; the keys, each
a string, a u32 type and a value; the tensor infos, each a name, u32 dimension count, u64 dimensions with the innermost
first, u32 type, u64 offset into the data; padding to the alignment; the data. A string is a u64 length and its bytes;
an array is a u32 item type, a u64 count and the items.

gguf's own `GGUFReader` was not chosen: it slices beyond the end of the file without an error, so that a wrong array
length keeps it busy for hours, it computes sizes in wrapping 64-bit numbers, and it builds two numpy arrays for each
token of a vocabulary.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import FileError
from ..ggml_types import MAGIC as MAGIC
from .gguf_source import (
    MAX_ITEMS,
    MAX_TEXT_NBYTES,
    VALUE_TYPES,
    Malformed,
    Number,
    Source,
    open_source,
    read_numbers,
    read_strings,
    shown,
    skip_strings,
)

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 30  # files have 32; the data of one with more than this would lie beyond its end
MAX_DIMENSIONS = 8  # ggml has 4; files of other tools hold 5-D convolutions
MAX_NUMEL = (1 << 63) - 1  # of torch and ggml
# Files have about 60 keys and 200 to 3,000 tensors; one with a tensor for each expert of a large model has 50,000.
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_NAME_NBYTES = (1 << 16) - 1  # the format's limit for keys; ggml allows a tensor 63, files have longer ones
MAX_ALL_ITEMS = 1 << 22
SMALL_ITEMS = 4096  # arrays of numbers up to here come with the header,
SMALL_ALL_ITEMS = 1 << 16  # until they are so many together
MAX_PARTS = 99_999  # five digits in the name of a file
SCALARS = {number: code for number, (_, code) in VALUE_TYPES.items()}  # for `struct`
STRING, ARRAY = 8, 9
# ggml's types for activations, and those whose layout was withdrawn or that no file of a model has.
UNREADABLE = {
    **{4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"},
    **{36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 41: "Q1_0"},
}

Scalar = str | int | float | bool
Types = Mapping[int, tuple[str, int, int]]


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class ArrayRef:
    """An array that `read_array` reads.

    Attributes:
        kind: type of the items: `string`, `float32`, `int32`, ...
        count: number of items.
        start: byte of the file at which the first one begins.
        nbytes: from there to the end of the last.
    """

    kind: str
    count: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What the file says of itself.

    Attributes:
        metadata: keys with a single value.
        tensors: in the file's order.
        arrays: keys with an array of at most `SMALL_ITEMS` numbers.
        located: keys with a longer array or one of strings: vocabularies, merges, scores.
    """

    metadata: Mapping[str, Scalar]
    tensors: tuple[GgufTensor, ...]
    arrays: Mapping[str, tuple[Number, ...]]
    located: Mapping[str, ArrayRef]

    @property
    def parts(self) -> int:
        """Number of files of the model, mostly 1 (see `gguf_parts`)."""
        return max(1, int(self.metadata.get("split.count", 1)))


def read_gguf_header(path: Path, types: Types | None = None) -> GgufHeader:
    """Read the header of a model in one file; every tensor lies inside the file and overlaps no other.

    Args:
        types: ggml type number -> (name, values a block, bytes a block); default: those that the pack can read.
    Raises:
        FileError: missing, not GGUF, truncated, corrupt, or one of several files (see `read_gguf_parts`).
    """
    header = read_part_header(path, types)
    if header.parts > 1:
        raise FileError(
            f"{path.name}: one of the {header.parts} files of a model, which cannot be read alone here.\n"
            "Join them: `llama-gguf-split --merge FIRST_PART OUT.gguf`."
        )
    return header


def read_part_header(path: Path, types: Types | None = None) -> GgufHeader:
    """`read_gguf_header` of a file that may be a part of a model only."""
    known = known_types() if types is None else types
    return open_source(path, lambda source: _Parser(source, known).parse())


def known_types() -> dict[int, tuple[str, int, int]]:
    """The types of tensors that the pack can read, in the form of `read_gguf_header`."""
    from ..ggml_types import BY_NUMBER

    return {number: (t.name, t.block, t.nbytes) for number, t in BY_NUMBER.items()}


def read_array(path: Path, header: GgufHeader, key: str) -> tuple[Scalar, ...]:
    """The items of an array, such as `tokenizer.ggml.tokens`; located ones are read from the file.

    Args:
        header: of that file.
    Raises:
        FileError: no such array; a string is not UTF-8; the file changed since the header was read.
    """
    if key in header.arrays:
        return header.arrays[key]
    ref = header.located.get(key)
    if ref is None:
        found = "a single value" if key in header.metadata else "no such key"
        raise FileError(
            f"{path.name}: it has no array {key!r} ({found}).\nThe file may be incomplete, or made for another purpose."
        )

    def read(source: Source) -> tuple[Scalar, ...]:
        source.skip(ref.start, shown(key))
        if ref.kind == "string":
            return read_strings(source, ref.count, ref.nbytes, shown(key))
        return read_numbers(source, ref.kind, ref.count, shown(key))

    return open_source(path, read)


class _Info(NamedTuple):
    """A tensor info before its place is known; at: the byte where it begins."""

    name: str
    shape: tuple[int, ...]
    number: int
    offset: int
    at: int


class _Parser:
    def __init__(self, source: Source, types: Types) -> None:
        self.source = source
        self.types = types
        self.text_nbytes = 0
        self.items = 0
        self.small_items = 0
        self.metadata: dict[str, Scalar] = {}
        self.arrays: dict[str, tuple[Number, ...]] = {}
        self.located: dict[str, ArrayRef] = {}

    def parse(self) -> GgufHeader:
        self.check_version()
        tensor_count = self.source.u64("the tensor count")
        key_count = self.source.u64("the key count")
        self.check_count("keys", key_count, MAX_KEYS, 13)  # an empty key with one byte
        self.check_count("tensors", tensor_count, MAX_TENSORS, 24)  # an info without a name and dimensions
        for _ in range(key_count):
            self.key()
        infos: dict[str, _Info] = {}
        for _ in range(tensor_count):
            info = self.info()
            if info.name in infos:
                places = f"infos at bytes {infos[info.name].at} and {info.at}"
                raise Malformed(f"corrupt GGUF file: {shown(info.name)} appears twice ({places})")
            infos[info.name] = info
        alignment = self.alignment()
        self.check_split()
        base = -(-self.source.at // alignment) * alignment
        tensors = tuple(self.place(info, base, alignment) for info in infos.values())
        _refuse_overlap(tensors)
        return GgufHeader(self.metadata, tensors, self.arrays, self.located)

    def check_version(self) -> None:
        found = self.source.take(4, "the magic")
        if found != MAGIC:
            raise Malformed(f"not a GGUF file (it begins with {found!r}, not with 'GGUF')")
        raw = self.source.take(4, "the version")
        version, swapped = int.from_bytes(raw, "little"), int.from_bytes(raw, "big")
        if version in VERSIONS:
            return
        known = f"cannot be read, only little-endian {' and '.join(map(str, VERSIONS))}"
        if swapped < 1 << 16 <= version:
            raise Malformed(
                f"big-endian GGUF version {swapped} (byte 4) {known}.\n"
                "Convert it: `gguf-convert-endian FILE little`, of the gguf package, rewrites the file in place"
            )
        todo = ".\nGet the model in a newer file" if version == 1 else ""
        raise Malformed(f"GGUF version {version} {known} (byte 4){todo}")

    def check_count(self, what: str, count: int, most: int, least_nbytes: int) -> None:
        left = self.source.size - self.source.at
        if count * least_nbytes > left:
            least = f"need {count * least_nbytes} bytes or more, {left} are left"
            raise Malformed(f"truncated GGUF file: the {count} {what} of its first 24 bytes {least}")
        if count > most:
            raise Malformed(f"corrupt GGUF file: {count} {what} in its first 24 bytes, at most {most} are read")

    def string(self, what: str, most: int = MAX_TEXT_NBYTES) -> str:
        at = self.source.at
        length = self.source.u64(what)
        if length > most:
            raise Malformed(f"corrupt GGUF file: {what} would have {length} bytes (byte {at}), at most {most} are read")
        self.text_nbytes += length
        if self.text_nbytes > MAX_TEXT_NBYTES:
            raise Malformed(f"corrupt GGUF file: {what} at byte {at} makes more than {MAX_TEXT_NBYTES} bytes of text")
        raw = self.source.take(length, what)
        try:
            return raw.decode()
        except UnicodeDecodeError as err:
            raise Malformed(f"corrupt GGUF file: {what} is not UTF-8 (byte {at + 8 + err.start})") from None

    def key(self) -> None:
        at = self.source.at
        key = self.string("a key", MAX_NAME_NBYTES)
        what = shown(key)
        if key in self.metadata or key in self.arrays or key in self.located:
            raise Malformed(f"corrupt GGUF file: the key {what} at byte {at} appears twice")
        kind_at = self.source.at
        kind = self.source.u32(f"the type of {what}")
        if kind in VALUE_TYPES:
            (self.metadata[key],) = read_numbers(self.source, VALUE_TYPES[kind][0], 1, what)
        elif kind == STRING:
            self.metadata[key] = self.string(what)
        elif kind == ARRAY:
            self.array(key, what)
        else:
            raise Malformed(f"corrupt GGUF file: {what} has the unknown value type {kind} (byte {kind_at})")

    def array(self, key: str, what: str) -> None:
        at = self.source.at
        item, count = self.source.u32(what), self.source.u64(what)
        if item not in VALUE_TYPES and item != STRING:
            raise Malformed(f"corrupt GGUF file: {what} is an array of the unknown type {item} (byte {at})")
        kind, code = VALUE_TYPES.get(item, ("string", "Q"))
        nbytes = count * struct.calcsize(f"<{code}")  # of strings at least so many
        self.source.check(nbytes, what)
        self.items += count
        if count > MAX_ITEMS or self.items > MAX_ALL_ITEMS:
            limits = f"at most {MAX_ITEMS} and with all arrays {MAX_ALL_ITEMS} are read"
            raise Malformed(f"corrupt GGUF file: {what} has {count} items (byte {at}), {limits}")
        small = item != STRING and count <= SMALL_ITEMS
        if small and self.small_items + count <= SMALL_ALL_ITEMS:
            self.small_items += count
            self.arrays[key] = read_numbers(self.source, kind, count, what)
            return
        start = self.source.at
        if item == STRING:
            skip_strings(self.source, count, what)
        else:
            self.source.skip(nbytes, what)
        self.located[key] = ArrayRef(kind, count, start, self.source.at - start)

    def info(self) -> _Info:
        at = self.source.at
        name = self.string("a tensor name", MAX_NAME_NBYTES)
        what = f"the info of {shown(name)}"
        count_at = self.source.at
        count = self.source.u32(what)
        if count > MAX_DIMENSIONS:
            raise Malformed(f"corrupt GGUF file: {shown(name)} would have {count} dimensions (byte {count_at})")
        form = struct.Struct(f"<{count}QIQ")
        *shape, number, offset = form.unpack(self.source.take(form.size, what))
        return _Info(name, tuple(reversed(shape)), number, offset, at)

    def alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            value = shown(alignment) if isinstance(alignment, str) else alignment
            raise Malformed(f"corrupt GGUF file: alignment {value} is not a power of two from 8 to {MAX_ALIGNMENT}")
        return alignment

    def check_split(self) -> None:
        count = self.metadata.get("split.count", 0)
        if type(count) is not int or not 0 <= count <= MAX_PARTS:
            value = shown(count) if isinstance(count, str) else count
            raise Malformed(f"corrupt GGUF file: 'split.count' is {value}, expected 0 to {MAX_PARTS}")

    def place(self, info: _Info, base: int, alignment: int) -> GgufTensor:
        name, shape, number, offset, at = info
        where = f"info at byte {at}"
        if number not in self.types:
            if number in UNREADABLE:
                kind = f"GGUF type {UNREADABLE[number]}, which cannot be read here"
                todo = "Today's tools write no weights in it: convert the original model again"
                raise Malformed(f"{shown(name)} has {kind} ({where}).\n{todo}")
            raise Malformed(f"{shown(name)} has the unknown ggml type {number} ({where})")
        kind, block, block_nbytes = self.types[number]
        innermost = shape[-1] if shape else 1
        if innermost % block:
            rows = f"rows of {innermost}, no multiple of {kind}'s block {block}"
            raise Malformed(f"corrupt GGUF file: {shown(name)} has {rows} ({where})")
        if offset % alignment:
            raise Malformed(f"corrupt GGUF file: {shown(name)} is not aligned (offset {offset}) ({where})")
        nbytes = math.prod(shape) // block * block_nbytes
        end = base + offset + nbytes
        # Files end without padding, so that an empty tensor may begin behind the end.
        if end > self.source.size and (nbytes or end > -(-self.source.size // alignment) * alignment):
            size = f"ends at byte {end}, the file has {self.source.size}"
            raise Malformed(f"truncated GGUF file: {shown(name)} {size} ({where})")
        if math.prod(n or 1 for n in shape) > MAX_NUMEL:
            raise Malformed(f"corrupt GGUF file: {shown(name)} has the shape {shape} ({where})")
        return GgufTensor(name, kind, shape, base + offset, nbytes)


def _refuse_overlap(tensors: tuple[GgufTensor, ...]) -> None:
    held = sorted((t for t in tensors if t.nbytes), key=lambda t: t.start)
    for before, after in itertools.pairwise(held):
        end = before.start + before.nbytes
        if end > after.start:
            bytes_of = f"bytes {before.start} to {end}, and from {after.start}"
            raise Malformed(f"corrupt GGUF file: {shown(before.name)} and {shown(after.name)} overlap ({bytes_of})")
