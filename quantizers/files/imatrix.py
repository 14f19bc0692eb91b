"""Importance matrices in llama.cpp's files: how much each column of a weight matters, measured in real use.

    importance[k] = sum of x[k]^2 over all inputs x of the layer / number of inputs

It stands in a GGUF file with `general.type` = `imatrix` as two float32 tensors for each weight: `NAME.in_sum2`, (E, K),
and `NAME.counts`, (E, 1). E is 1, except for a stack of experts, which is one 3-D weight. Files keep sums and counts
and not their quotient, so that files of several runs add up. Files before GGUF hold, little-endian: i32 entries; for
each i32 length, name, i32 calls, i32 values, float32 sums; then optionally i32 chunks and the name of the data.

Source: ggml-org/llama.cpp tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp, tools/quantize/quantize.cpp.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from ..errors import FileError
from ..ggml_types import BY_NUMBER
from .checkpoint import replace_file
from .gguf_header import DEFAULT_ALIGNMENT, MAGIC, GgufHeader, GgufTensor, read_array, read_gguf_header

log = logging.getLogger(__name__)

SUMS, COUNTS, PLAIN_SUMS = ".in_sum2", ".counts", ".in_sum"
MAX_NAME_NBYTES = 63  # of a tensor in ggml's own reader; ours and ComfyUI-GGUF's take longer ones
MAX_CHUNKS = (1 << 32) - 1
_U32, _STRING, _ARRAY, _F32 = 4, 8, 9, 0


@dataclass(frozen=True, eq=False)
class Sums:
    """What was recorded for one weight.

    Attributes:
        squares: (E, K) float64 sums of squared inputs.
        counts: (E,) int64 numbers of inputs.
    """

    squares: Tensor
    counts: Tensor

    def importance(self) -> Tensor:
        """(E, K) float32 means, 1 where nothing was counted; rounded as llama-quantize rounds them."""
        counts = self.counts.to(torch.float32)[:, None]
        return torch.where(counts > 0, self.squares.to(torch.float32) / counts.clamp(min=1), 1.0)


@dataclass(frozen=True, eq=False)
class Imatrix:
    """The importance of the columns of many weights.

    Attributes:
        entries: name of a weight, as in the GGUF file to be made -> sums.
        datasets: what it was recorded from.
        chunk_count: number of model calls.
        chunk_size: inputs (tokens) of a call.
        calls_only: the counts are of calls and not of inputs, as in files before GGUF.
    """

    entries: Mapping[str, Sums]
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    chunk_size: int = 0
    calls_only: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", MappingProxyType(dict(self.entries)))

    def find(self, name: str) -> Tensor | None:
        """(K,) float32 importance of a weight, (E, K) of a stack of experts; None where there is none."""
        sums = self.entries.get(name)
        if sums is None:
            return None
        importance = sums.importance()
        return importance[0] if len(importance) == 1 else importance


def merge(matrices: Sequence[Imatrix]) -> Imatrix:
    """One matrix of several: sums and counts add.

    Raises:
        FileError: sizes differ, only some of them count inputs, or there are more calls than a file can say.
    """
    if len({m.calls_only for m in matrices}) > 1:
        raise FileError(
            "Importance matrices from before GGUF (.dat) count calls, the others inputs, so their sums do not add up.\n"
            "Convert the .dat file with llama-imatrix first."
        )
    chunks = sum(m.chunk_count for m in matrices)
    if chunks > MAX_CHUNKS:
        raise FileError(f"Importance matrices of {chunks} model calls together: a file holds {MAX_CHUNKS} at most.")
    entries: dict[str, Sums] = {}
    for name, sums in (item for m in matrices for item in m.entries.items()):
        entries[name] = _added(name, entries[name], sums) if name in entries else sums
    return Imatrix(
        entries,
        tuple(d for m in matrices for d in m.datasets),
        chunks,
        max((m.chunk_size for m in matrices), default=0),
        any(m.calls_only for m in matrices),
    )


def _added(name: str, a: Sums, b: Sums) -> Sums:
    if a.squares.shape != b.squares.shape:
        shapes = f"{_size(a.squares)} and {_size(b.squares)}"
        raise FileError(f"{name!r}: importance matrices of different sizes ({shapes}) cannot be merged.")
    return Sums(a.squares + b.squares, a.counts + b.counts)


def _size(squares: Tensor) -> str:
    return " x ".join(str(n) for n in squares.shape if n != 1 or squares.numel() == 1)


def read_imatrix(path: Path) -> Imatrix:
    """Read an importance matrix of llama.cpp or of this pack: GGUF, or the binary form before it.

    Raises:
        FileError: missing, truncated or corrupt, another kind of file, or values that are no sums of squares (nan, inf,
            negative).
    """
    try:
        with open(path, "rb") as file:
            if file.read(4) == MAGIC:
                return _read_gguf(path, file)
            file.seek(0)
            return _Legacy(path, file).read()
    except OSError as err:
        raise FileError(f"{path}: cannot be read: {err.strerror}.") from err


def _read_gguf(path: Path, file: BinaryIO) -> Imatrix:
    header = read_gguf_header(path, {n: (t.name, t.block, t.nbytes) for n, t in BY_NUMBER.items()})
    kind = header.metadata.get("general.type")
    if kind != "imatrix":
        raise FileError(
            f"{path.name}: not an importance matrix (its general.type is {kind!r}, not 'imatrix').\n"
            "`quantwire imatrix WORKFLOW.json` or llama-imatrix makes one."
        )
    entries: dict[str, Sums] = {}
    for name, (squares, counts) in _pairs(path, header).items():
        entries[name] = _checked(path, name, _floats(file, squares), _floats(file, counts))
    if not entries:
        raise FileError(f"{path.name}: an importance matrix without entries.")
    numbers = [header.metadata.get(f"imatrix.chunk_{what}", 0) for what in ("count", "size")]
    if not all(isinstance(n, int) and 0 <= n <= MAX_CHUNKS for n in numbers):
        raise FileError(
            f"{path.name}: imatrix.chunk_count and imatrix.chunk_size are {numbers}, expected numbers of 32 bits.\n"
            "Record the matrix again."
        )
    datasets = read_array(path, header, "imatrix.datasets") if "imatrix.datasets" in header.located else ()
    return Imatrix(entries, tuple(map(str, datasets)), int(numbers[0]), int(numbers[1]))


def _pairs(path: Path, header: GgufHeader) -> dict[str, tuple[GgufTensor, GgufTensor]]:
    """Name of a weight -> its sums and counts."""
    groups: dict[str, dict[str, GgufTensor]] = {}
    for tensor in header.tensors:
        suffix = next((s for s in (SUMS, COUNTS, PLAIN_SUMS) if tensor.name.endswith(s)), None)
        if suffix is not None:  # llama.cpp ignores tensors of other names, too
            groups.setdefault(tensor.name.removesuffix(suffix), {})[suffix] = tensor
    for name, group in groups.items():
        missing = [s for s in (SUMS, COUNTS) if s not in group]
        if missing:
            raise FileError(f"{path.name}: '{name}{missing[0]}' is missing, so the entry is not whole.")
        for tensor in group.values():
            if tensor.kind != "F32":
                raise FileError(f"{path.name}: {tensor.name!r} has type {tensor.kind}, expected F32.")
    return {name: (group[SUMS], group[COUNTS]) for name, group in groups.items()}


def _floats(file: BinaryIO, tensor: GgufTensor) -> Tensor:
    file.seek(tensor.start)
    return _float32(file.read(tensor.nbytes))


def _float32(raw: bytes) -> Tensor:
    if not raw:
        return torch.empty(0)
    return cast(Tensor, cast(Any, torch).frombuffer(bytearray(raw), dtype=torch.float32))


def _checked(path: Path, name: str, squares: Tensor, counts: Tensor) -> Sums:
    """Sums and counts of one entry, both flat float32."""
    where = f"{path.name}: {name!r}"
    if not squares.numel() or not counts.numel() or squares.numel() % counts.numel():
        raise FileError(f"{where}: {squares.numel()} sums do not go with {counts.numel()} counts.")
    for what, values in (("sums", squares), ("counts", counts)):
        bad = int((~torch.isfinite(values) | (values < 0)).sum())
        if bad:
            raise FileError(
                f"{where}: {bad} of {values.numel()} {what} are nan, inf or negative.\nRecord the matrix again."
            )
    whole = (counts.to(torch.float64) + 0.5).floor().to(torch.int64)  # C's lround
    return Sums(squares.to(torch.float64).reshape(counts.numel(), -1), whole)


class _Legacy:
    """Reader of the binary form before GGUF."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.left = path.stat().st_size

    def read(self) -> Imatrix:
        count = self.number("the number of entries")
        if count < 1:
            raise self.strange(f"{count} entries")
        entries: dict[str, Sums] = {}
        for i in range(count):
            name = self.text(f"the name of entry {i}")
            if name in entries:
                raise self.strange(f"{name!r} twice")
            calls, size = self.number(f"{name!r}"), self.number(f"{name!r}")
            if calls < 0 or size < 1:
                raise self.strange(f"{name!r} with {calls} calls and {size} values")
            squares = _float32(self.take(4 * size, f"{name!r}"))
            # Without a count llama-quantize takes the sums as they are.
            entries[name] = _checked(self.path, name, squares, torch.tensor([float(max(calls, 1))]))
        chunks = self.number("the number of chunks") if self.left else 0
        dataset = self.text("the name of the data") if self.left else ""
        return Imatrix(entries, (dataset,) if dataset else (), max(chunks, 0), 0, calls_only=True)

    def number(self, what: str) -> int:
        return struct.unpack("<i", self.take(4, what))[0]

    def text(self, what: str) -> str:
        try:
            return self.take(self.number(what), what).decode()
        except UnicodeDecodeError:
            raise self.strange(f"{what} that is not UTF-8") from None

    def take(self, nbytes: int, what: str) -> bytes:
        if not 0 <= nbytes <= self.left:
            raise self.strange(f"{what} of {nbytes} bytes where {self.left} are left")
        self.left -= nbytes
        return self.file.read(nbytes)

    def strange(self, found: str) -> FileError:
        return FileError(
            f"{self.path.name}: not an importance matrix: neither GGUF, nor llama.cpp's form before it ({found}).\n"
            "`quantwire imatrix WORKFLOW.json` or llama-imatrix makes one."
        )


def write_imatrix(path: Path, matrix: Imatrix) -> None:
    """Write a GGUF file, byte for byte as llama-imatrix writes one.

    Args:
        path: replaced only when the new file is complete.
        matrix: sums become float32.
    Raises:
        FileError: it cannot be written, has no entries, counts calls, or holds sums or counts beyond float32.
    """
    if not matrix.entries or matrix.calls_only:
        why = "counts calls (.dat), which a GGUF file cannot say" if matrix.calls_only else "has no entries"
        raise FileError(f"{path}: cannot be written: the importance matrix {why}.")
    tensors = dict(_tensors(matrix))
    for name, values in tensors.items():
        if not bool(torch.isfinite(values).all()):
            raise FileError(f"{path}: cannot be written: {name!r} has values beyond float32.")
    long = [name for name in tensors if len(name.encode()) > MAX_NAME_NBYTES]
    if long:
        log.warning("%s: llama.cpp itself cannot open this file: %r is longer than ggml allows.", path.name, long[0])

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(_header(matrix, tensors))
            for values in tensors.values():
                file.write(_padded(cast(Any, values.contiguous()).numpy().astype("<f4").tobytes()))

    replace_file(path, write)


def _tensors(matrix: Imatrix) -> Iterator[tuple[str, Tensor]]:
    for name, sums in sorted(matrix.entries.items()):
        yield f"{name}{SUMS}", sums.squares.to(torch.float32)
        yield f"{name}{COUNTS}", sums.counts.to(torch.float32)[:, None]


def _header(matrix: Imatrix, tensors: Mapping[str, Tensor]) -> bytes:
    keys = [
        _string("general.type") + struct.pack("<I", _STRING) + _string("imatrix"),
        _string("imatrix.datasets") + struct.pack("<IIQ", _ARRAY, _STRING, len(matrix.datasets)),
        *map(_string, matrix.datasets),
        _string("imatrix.chunk_count") + struct.pack("<II", _U32, matrix.chunk_count),
        _string("imatrix.chunk_size") + struct.pack("<II", _U32, matrix.chunk_size),
    ]
    parts = [MAGIC + struct.pack("<IQQ", 3, len(tensors), 4), *keys]
    offset = 0
    for name, values in tensors.items():
        rows, columns = values.shape
        # ggml leaves out trailing dimensions of 1.
        shape = (columns, rows) if rows > 1 else (columns,)
        parts.append(_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, _F32, offset))
        offset += -(-4 * values.numel() // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
    return _padded(b"".join(parts))


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _padded(raw: bytes) -> bytes:
    return raw + bytes(-len(raw) % DEFAULT_ALIGNMENT)
