"""The bytes of a GGUF file before its data: made whole from names, shapes and types, so every offset is known first.

Layout: see `gguf_header.py`. Version 3, alignment 32. gguf's `GGUFWriter` was not chosen: it appends, while a file that
is written by several threads, and continued after a kill, needs the place of each tensor before any work. The bytes are
those that it writes; a test holds the two together.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..ggml_types import PLAIN_TYPES, TYPES
from .gguf_header import ARRAY, DEFAULT_ALIGNMENT, MAGIC, STRING
from .recipes import nbytes

VERSION = 3
QUANTIZATION_VERSION = 2  # ggml's GGML_QNT_VERSION
ORIG_SHAPE = "comfy.gguf.orig_shape."
# Long values are not metadata but thumbnails and the like (`modelspec.thumbnail`).
MAX_TEXT_NBYTES = 1 << 14
_U32 = 4
_NBYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of a value, by its type


@dataclass(frozen=True)
class Place:
    """A tensor in the file.

    Attributes:
        start: of its bytes, from the beginning of the file.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def layout(keys: Sequence[bytes], tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, list[Place]]:
    """The header, up to the first byte of data, and the places of the tensors.

    Args:
        keys: of `text`, `number` and `raw_keys`.
        tensors: (name, ggml type, shape), in the order of the file.
    Returns:
        the file ends with the padding after the last tensor, see `total_nbytes`.
    """
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(keys)), *keys]
    at, offsets = 0, list[int]()
    for name, kind, shape in tensors:
        number = (TYPES.get(kind) or PLAIN_TYPES[kind]).number
        parts.append(_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), number, at))
        offsets.append(at)
        at = up(at + nbytes(kind, shape))
    header = b"".join(parts)
    header += bytes(up(len(header)) - len(header))
    places = [
        Place(name, kind, shape, len(header) + offset, nbytes(kind, shape))
        for (name, kind, shape), offset in zip(tensors, offsets, strict=True)
    ]
    return header, places


def total_nbytes(header: bytes, places: Sequence[Place]) -> int:
    """Size of the file."""
    return up(max((p.start + p.nbytes for p in places), default=len(header)))


def text(key: str, value: str) -> bytes:
    return _string(key) + struct.pack("<I", STRING) + _string(value)


def number(key: str, value: int) -> bytes:
    return _string(key) + struct.pack("<II", _U32, value)


def up(nbytes: int) -> int:
    return -(-nbytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


# What is known of a model in the metadata of safetensors files (github.com/Stability-AI/ModelSpec, and what Hugging
# Face's own files have), and the GGUF key of each (ggml-org/ggml docs/gguf.md).
_GENERAL = {
    "general.name": ("modelspec.title", "ss_output_name", "title", "name"),
    "general.author": ("modelspec.author", "author"),
    "general.description": ("modelspec.description", "description"),
    "general.license": ("modelspec.license", "license"),
    "general.url": ("modelspec.implementation",),
    "general.version": ("modelspec.version",),
}


def general_keys(metadata: Mapping[str, str]) -> list[bytes]:
    """Name, author, licence and the like of a safetensors file's metadata."""
    found: list[bytes] = []
    for key, sources in _GENERAL.items():
        value = next((metadata[s] for s in (key, *sources) if metadata.get(s)), None)
        if value is not None and len(value.encode()) <= MAX_TEXT_NBYTES:
            found.append(text(key, value))
    return found


# Keys that are said anew in a file made from another GGUF file.
_REPLACED = re.compile(
    rf"^(general\.(architecture|quantization_version|file_type|alignment)|quantwire\..*|{re.escape(ORIG_SHAPE)}.*"
    r"|split\.(no|count|tensors\.count))$"
)


def raw_keys(path: Path) -> list[bytes]:
    """The keys of a GGUF file as their bytes, arrays too (a tokenizer's vocabulary), without those of its encoding.

    Args:
        path: of a file that `read_gguf_header` accepts; nothing is checked here again.
    """
    found: list[bytes] = []
    with open(path, "rb") as file:
        file.seek(16)
        (count,) = struct.unpack("<Q", file.read(8))
        for _ in range(count):
            start = file.tell()
            (length,) = struct.unpack("<Q", file.read(8))
            key = file.read(length).decode()
            (kind,) = struct.unpack("<I", file.read(4))
            if kind == ARRAY:
                item, size = struct.unpack("<IQ", file.read(12))
            else:
                item, size = kind, 1
            if item == STRING:
                for _ in range(size):
                    file.seek(struct.unpack("<Q", file.read(8))[0], 1)
            else:
                file.seek(size * _NBYTES[item], 1)
            end = file.tell()
            if not _REPLACED.match(key):
                file.seek(start)
                found.append(file.read(end - start))
    return found


def _string(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw
