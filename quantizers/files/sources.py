"""Where a conversion reads from: safetensors files, GGUF files or tensors in memory, one tensor mapped at a time.

Every tensor is seen as a matrix of stored rows: floating-point values, the blocks of a GGUF type as bytes, or rows of a
quantized layer. Layouts
differ by rows only (see `layouts/target.py`), so rows are what a target is put together from.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import mmap
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..errors import FileError, WeightError
from ..ggml_types import TYPES, format_id, type_name
from ..registry import get_quantizer
from ..weight import QuantizedWeight, TensorMeta
from .checkpoint import PLAIN_GGUF
from .file_state import check_unchanged, file_state
from .gguf_header import GgufHeader, GgufTensor
from .gguf_kind import kind_of, refuse_for_conversion
from .gguf_layout import ORIG_SHAPE
from .gguf_parts import read_gguf_parts
from .layer_rows import PRE_QUANT_SCALE, LayerRows
from .layouts.target import Piece, Target, apply
from .locate import Container, locate
from .model_file import open_model
from .rows import cat_rows, take_rows
from .stream import TensorFile

# 8-bit values without scales, and what safetensors calls them; bfloat16 holds each of them exactly.
FLOAT8 = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}


@dataclass(frozen=True)
class Stored:
    """One tensor of a source.

    Attributes:
        rows: (R, C) float values, or (R, bytes a row) uint8 blocks of `kind`, which may be a map of the file; of a
            quantized layer (R, 1) int64, the numbers of its rows.
        kind: ggml type of blocks; else empty.
        columns: values a row.
        layer: the quantized layer, in any other format.
    """

    rows: Tensor
    kind: str
    columns: int
    layer: LayerRows | None = None


class Source(Protocol):
    """What a conversion reads."""

    @property
    def label(self) -> str:
        """For messages."""
        ...

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        """Name -> shape and dtype, from the header alone."""
        ...

    @property
    def kinds(self) -> Mapping[str, str]:
        """Name -> type of the tensors that are quantized: ggml's, in blocks, one of `FLOAT8`, or a format id."""
        ...

    @property
    def sizes(self) -> Mapping[str, int]:
        """Name -> bytes of what is stored, where shape and type do not tell."""
        ...

    @property
    def strings(self) -> Mapping[str, str]:
        """The file's own metadata."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """What is read; empty for tensors in memory."""
        ...

    def open(self, name: str) -> Stored:
        """Map one tensor; its pages leave the process when the result does."""
        ...

    def identity(self) -> list[dict[str, Any]]:
        """JSON values that are others when the source is another one."""
        ...

    def check_unchanged(self) -> None:
        """Raises:
        FileError: a file is another one than when its header was read.
        """
        ...


def open_source(path: Path) -> Source:
    """A source by the content of a file: safetensors, a `*.safetensors.index.json`, a diffusers folder, or GGUF.

    Raises:
        FileError: missing, of another kind, damaged, quantized in a way that cannot be read, or one of several parts.
        BackendUnavailable: quantized, and a library that reading needs is missing.
    """
    if locate(path).container is Container.GGUF:
        gguf = GgufSource(path)
        refuse_for_conversion(path, kind_of(gguf.strings, gguf.metas))
        return gguf
    from .quantized_source import open_quantized
    from .schemes.scan import scan

    file = open_model(path)
    return open_quantized(file, scan(file))


class SafetensorsSource:
    """Tensors of one or several safetensors files; 8-bit floats are seen as bfloat16."""

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        self.label = path.name
        self.files = list(files)
        self.kinds: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self._parts = [TensorFile(file) for file in files]
        self._where: dict[str, TensorFile] = {}
        self.strings: dict[str, str] = {}
        self.metas: dict[str, TensorMeta] = {}
        for part in self._parts:
            self.strings |= {k: v for k, v in part.metadata.items() if k not in self.strings}
            for name, t in part.shapes.items():
                if name in self._where:
                    raise FileError(f"{path.name}: '{name}' stands in two of its files.")
                self._where[name] = part
                dtype = torch.bfloat16 if t.dtype in FLOAT8 else t.dtype
                self.metas[name] = TensorMeta(name, tuple(t.shape), dtype)
                if t.dtype in FLOAT8:
                    self.kinds[name] = FLOAT8[t.dtype]

    def open(self, name: str) -> Stored:
        return plain(self._where[name].read(name))

    def identity(self) -> list[dict[str, Any]]:
        return [{"file": p.path.name, **p.state, "header": _header_hash(p.path)} for p in self._parts]

    def check_unchanged(self) -> None:
        for part in self._parts:
            part.check_unchanged()


class MemorySource:
    """Tensors that are in memory already.

    Args:
        blocks: GGUF weights may be among them, which are taken as they are.
    """

    def __init__(self, label: str, tensors: Mapping[str, Tensor | QuantizedWeight], blocks: bool = False) -> None:
        self.label = label
        self.files: list[Path] = []
        self.strings: dict[str, str] = {}
        self.kinds: dict[str, str] = {}
        self.sizes: Mapping[str, int] = {}
        self.metas: dict[str, TensorMeta] = {}
        self._tensors: dict[str, Tensor] = {}
        for name, value in tensors.items():
            if isinstance(value, Tensor):
                self._tensors[name] = value
                self.metas[name] = TensorMeta(name, tuple(value.shape), value.dtype)
                continue
            if not blocks or not value.format_id.startswith("gguf-"):
                raise WeightError(f"'{name}': already quantized ({value.format_id}).\nConvert the full-precision file.")
            if value.tensors["qdata"].shape[:1] != value.orig_shape[:1]:
                raise WeightError(f"'{name}': the blocks of {value.format_id} run across rows, {value.orig_shape}.")
            self._tensors[name] = value.tensors["qdata"].reshape(value.orig_shape[0], -1)
            self.kinds[name] = type_name(value.format_id)
            self.metas[name] = TensorMeta(name, value.orig_shape, value.orig_dtype)

    def open(self, name: str) -> Stored:
        tensor = self._tensors[name].detach().cpu()
        kind = self.kinds.get(name, "")
        return Stored(tensor, kind, math.prod(self.metas[name].shape[1:])) if kind else plain(tensor)

    def identity(self) -> list[dict[str, Any]]:
        return []

    def check_unchanged(self) -> None:
        return


class GgufSource:
    """A GGUF file, or all parts of one: plain tensors, and blocks as they are.

    Attributes:
        path: of the first part, which has the model's keys.
        header: its own, with the tensors of all parts.
    """

    def __init__(self, path: Path) -> None:
        self.label = path.name
        before = file_state(path)
        parts = read_gguf_parts(path)
        self.path = parts[0].path
        self.files = [part.path for part in parts]
        self.state = {p: before if p == path else file_state(p) for p in self.files}
        tensors = tuple(t for part in parts for t in part.header.tensors)
        self.header: GgufHeader = dataclasses.replace(parts[0].header, tensors=tensors)
        self._parts = {part.path: part.header.tensors for part in parts}
        self._paths = {t.name: path for path, tensors in self._parts.items() for t in tensors}
        self._shapes = {k: v for part in parts for k, v in part.header.arrays.items() if k.startswith(ORIG_SHAPE)}
        self._tensors = {t.name: t for t in tensors}
        self.kinds = {t.name: t.kind for t in tensors if t.kind in TYPES}
        self.sizes: dict[str, int] = {}
        self.strings = {k: v for k, v in self.header.metadata.items() if isinstance(v, str)}
        self.metas: dict[str, TensorMeta] = {}
        for t in tensors:
            if t.kind not in TYPES and t.kind not in PLAIN_GGUF:
                raise FileError(f"{path.name}: {t.name!r} has GGUF type {t.kind}, which cannot be read here.")
            # What blocks were made from is not written in the file; bfloat16 is what most models come in.
            self.metas[t.name] = TensorMeta(t.name, self._shape(t), PLAIN_GGUF.get(t.kind, torch.bfloat16))

    def _shape(self, t: GgufTensor) -> tuple[int, ...]:
        given = self._shapes.get(ORIG_SHAPE + t.name)
        shape = t.shape if given is None else tuple(int(n) for n in given)
        if math.prod(shape) != math.prod(t.shape):
            raise FileError(f"{self.path.name}: {t.name!r} has shape {t.shape}, but {ORIG_SHAPE}* says {shape}.")
        return shape

    def open(self, name: str) -> Stored:
        t, path = self._tensors[name], self._paths[name]
        shape = self.metas[name].shape
        page = t.start - t.start % mmap.ALLOCATIONGRANULARITY
        try:
            with open(path, "rb") as file:
                data = mmap.mmap(file.fileno(), max(1, t.start + t.nbytes - page), access=mmap.ACCESS_COPY, offset=page)
        except (OSError, ValueError) as err:
            raise FileError(f"{path}: cannot be read: {err}.") from err
        raw = cast(Any, torch).frombuffer(data, dtype=torch.uint8, count=t.nbytes, offset=t.start - page)
        if t.kind not in TYPES:
            dtype = PLAIN_GGUF[t.kind]
            raw = raw.clone() if t.start % dtype.itemsize else raw
            return plain(raw.view(dtype).reshape(shape))
        rows, columns = _matrix(shape)
        if columns % TYPES[t.kind].block:  # stored in rows of another length
            values = decode(Stored(raw.reshape(1, -1), t.kind, math.prod(shape)), raw.reshape(1, -1))
            return Stored(values.reshape(rows, columns), "", columns)
        return Stored(raw.reshape(rows, -1), t.kind, columns)

    def identity(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for path, tensors in self._parts.items():
            names = json.dumps([(t.name, t.kind, t.shape, t.start) for t in tensors]).encode()
            found.append({"file": path.name, **self.state[path], "header": hashlib.sha256(names).hexdigest()})
        return found

    def check_unchanged(self) -> None:
        for path, state in self.state.items():
            check_unchanged(path, state)


def plain(tensor: Tensor) -> Stored:
    """Values as rows of the first axis."""
    shape = tuple(tensor.shape)
    rows = shape[0] if shape else 1
    columns = math.prod(shape[1:])
    return Stored(tensor.reshape(rows, columns), "", columns)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor in blocks; a vector is one row, since blocks run along it."""
    return (1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:]))


def decode(stored: Stored, rows: Tensor) -> Tensor:
    """Rows of a stored tensor as values: plain ones as they are, 8-bit floats as bfloat16, others as float32."""
    if stored.layer is not None:
        return stored.layer.values(rows[:, 0])
    if not stored.kind:
        return rows.to(torch.bfloat16) if rows.dtype in FLOAT8 else rows
    kind = format_id(stored.kind)
    if not rows.numel():
        return torch.empty(rows.shape[0], stored.columns)
    # One long row may hold several: the blocks are the same.
    weight = QuantizedWeight(kind, {"qdata": rows}, (rows.shape[0], stored.columns), torch.float32)
    return get_quantizer(kind).dequantize(weight, torch.float32).reshape(rows.shape[0], stored.columns)


Segment = tuple[Stored, int, "Tensor | None", int, float]  # source, first row, or rows in their order; count; to add


class Assembled:
    """The rows of a target, put together from its pieces when they are asked for.

    Attributes:
        rows: how many.
        columns: values a row.
        kind: ggml type where all pieces are blocks of one type and nothing is added; else empty.
    """

    def __init__(self, target: Target, open_: Callable[[str], Stored]) -> None:
        opened: dict[str, Stored] = {}
        self._target = target
        self._segments: list[Segment] = []
        for piece in target.pieces:
            stored = opened.get(piece.source) or opened.setdefault(piece.source, open_(piece.source))
            self._segments.append(_segment(piece, stored))
        self.rows = sum(s[3] for s in self._segments)
        self.columns = opened[target.pieces[0].source].columns
        kinds = {s[0].kind for s in self._segments}
        self.kind = kinds.pop() if len(kinds) == 1 and not any(s[4] for s in self._segments) else ""
        if self.rows * self.columns != math.prod(target.shape):
            raise FileError(f"'{target.name}': {self.rows} x {self.columns} values, expected shape {target.shape}.")

    @functools.cached_property
    def quantized(self) -> QuantizedWeight | None:
        """The same numbers as one quantized weight, where the source has them so; its format may be any.

        That is one layer, whole, or rows of layers that are in one format and can be put below one another in it.
        """
        if len(self._target.shape) != 2 or any(s[4] for s in self._segments):
            return None
        if self.kind:
            qdata = self.raw(0, self.rows)
            return QuantizedWeight(format_id(self.kind), {"qdata": qdata}, self._target.shape, self._target.dtype)
        layers = [s[0].layer for s in self._segments]
        if not self.whole and any(layer is not None and PRE_QUANT_SCALE in layer.beside for layer in layers):
            return None  # their inputs have factors of their own
        held = [layer.weight for layer in layers if layer is not None]
        if len(held) < len(layers) or len({w.format_id for w in held}) > 1:
            return None
        try:
            return cat_rows([_rows_of(w, s) for w, s in zip(held, self._segments, strict=True)])
        except WeightError:  # the format does not keep rows apart: they are quantized again
            return None

    @property
    def whole(self) -> bool:
        """Whether it is one source tensor as it is."""
        return len(self._target.pieces) == 1 and self._target.pieces[0].whole

    @property
    def beside(self) -> Mapping[str, Tensor]:
        """What one quantized layer, whole, has beside its weight; see `LayerRows`."""
        layer = self._segments[0][0].layer if self.whole else None
        return {} if layer is None else layer.beside

    def raw(self, start: int, stop: int) -> Tensor:
        """The blocks of rows [start, stop), uint8; only where `kind` is one."""
        return _cat([self._take(*part) for part in self._parts(start, stop)])

    def values(self, start: int, stop: int) -> list[Tensor]:
        """Rows [start, stop) as float values in the dtypes of their sources, to be put below one another."""
        found: list[Tensor] = []
        for segment, first, last in self._parts(start, stop):
            t = decode(segment[0], self._take(segment, first, last))
            found.append(t.to(torch.float32) + segment[4] if segment[4] else t)
        return found

    def _parts(self, start: int, stop: int) -> list[tuple[Segment, int, int]]:
        found: list[tuple[Segment, int, int]] = []
        at = 0
        for segment in self._segments:
            first, last = max(start - at, 0), min(stop - at, segment[3])
            if first < last:
                found.append((segment, first, last))
            at += segment[3]
        return found

    def _take(self, segment: Segment, first: int, last: int) -> Tensor:
        stored, begin, order, _, _ = segment
        if order is None:
            return stored.rows[begin + first : begin + last]
        return stored.rows[order[first:last]]


def _segment(piece: Piece, stored: Stored) -> Segment:
    added, total = piece.add, stored.rows.shape[0]
    piece = dataclasses.replace(piece, add=0.0)
    if piece.whole:
        return stored, 0, None, total, added
    order = apply(piece, torch.arange(total)[:, None])[:, 0]
    count = len(order)
    if count and int(order[-1]) - int(order[0]) == count - 1 and bool((order.diff() == 1).all()):
        return stored, int(order[0]), None, count, added
    return stored, 0, order, count, added


def _rows_of(weight: QuantizedWeight, segment: Segment) -> QuantizedWeight:
    _, begin, order, count, _ = segment
    if order is not None:
        return take_rows(weight, order)
    return weight if count == weight.orig_shape[0] else take_rows(weight, slice(begin, begin + count))


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _header_hash(path: Path) -> str:
    """SHA-256 of a safetensors header."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return hashlib.sha256(file.read(length)).hexdigest()
