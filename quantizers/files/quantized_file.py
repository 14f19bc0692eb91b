"""Quantized weights of any format in a safetensors file, written one tensor at a time and read as a memory map.

Layout: a weight `X.weight` stands as its plain tensors, `qdata` under `X.weight` itself and the others under
`X.weight.<name>` (`X.weight.scale`). `__metadata__` has one JSON entry a quantized weight under the weight's own name,
with what the tensors do not tell (`format_id, orig_shape, orig_dtype, meta`, names of the tensors), and under
`quantwire` a JSON object with `version` and what the writer adds. Plain tensors stand as in any other file.

The header of a safetensors file comes first and tells all offsets, which are known only when the last weight is
quantized. So room is left for it and filled with blanks, which the format allows; where it is too small, the data moves
up once. Holding the data until then was not chosen: a whole model must not be in memory.

`checksum` in the JSON object is the CRC-32 of the data and then of the header (as JSON with sorted keys, without the
checksum itself), made while the data is written. Reading does not look at it, since it would read the whole file;
`verify_checksum` does. It tells damage, not forgery. BLAKE2b was not chosen: 0.7 GB/s against 3.2 GB/s of CRC-32.
"""

from __future__ import annotations

import json
import mmap
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from ..errors import FileError, WeightError
from ..registry import is_format
from ..weight import QuantizedWeight
from .checkpoint import Checkpoint, replace_file
from .safetensors_header import read_safetensors_header

Value = Tensor | QuantizedWeight

VERSION = 1
KEY = "quantwire"
CHECKSUM = "checksum"
DTYPES: dict[str, torch.dtype] = {
    **{"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16},
    **{"I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16},
    **{"BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu},
    **{"F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz},
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 64
SMALL_NBYTES = 1 << 16
HEADER_NBYTES_A_VALUE = 1024
BLOCK_NBYTES = 1 << 23


def write_quantized(
    path: Path, values: Iterable[tuple[str, Value]], metadata: Mapping[str, Any], expected: int = 64
) -> None:
    """Write a file from values that are made while it is written; no more than one of them is held.

    Args:
        values: (name, tensor or weight), taken one after another.
        metadata: JSON values for the entry `quantwire`, read when `values` is exhausted.
        expected: about how many values there will be, to leave room for the header.
    Raises:
        FileError: it cannot be written; a file that was there before is unchanged. What `values` raises comes through.
        WeightError: a dtype or meta that a file cannot hold.
    """

    def write(temporary: Path) -> None:
        with open(temporary, "r+b") as file:
            writer = _Writer(file, expected)
            for name, value in values:
                writer.add(name, value)
                del value  # before the next one is made
            writer.finish(metadata)

    replace_file(path, write)


class _Writer:
    """Data first, behind room for the header; the header at the end."""

    def __init__(self, file: BinaryIO, expected: int) -> None:
        self._file = file
        self._room = _up(4096 + HEADER_NBYTES_A_VALUE * expected, 4096)
        self._at = 0  # within the data
        self._entries: dict[str, Any] = {}
        self._layers: dict[str, str] = {}
        self._later: dict[str, Tensor] = {}
        self._crc = 0
        file.seek(self._room)

    def add(self, name: str, value: Value) -> None:
        if isinstance(value, Tensor):
            self._add(name, value)
            return
        meta = dict(value.meta)
        if not _is_json(meta):
            raise WeightError(
                f"'{name}': the meta of {value.format_id} is not plain JSON and cannot be written: {meta}."
            )
        layer = {
            "format_id": value.format_id,
            "orig_shape": list(value.orig_shape),
            "orig_dtype": NAMES[value.orig_dtype],
            "tensors": list(value.tensors),
            "meta": meta,
        }
        self._layers[name] = json.dumps(layer)
        for part, tensor in value.tensors.items():
            self._add(_key(name, part), tensor)

    def _add(self, name: str, tensor: Tensor) -> None:
        if name in self._entries or name in self._later or name == "__metadata__":
            raise WeightError(f"'{name}': a second tensor of this name cannot be written.")
        if tensor.dtype not in NAMES:
            raise WeightError(f"'{name}': a safetensors file cannot hold {tensor.dtype}.")
        # There may be no holes in the data, so a small tensor of odd size would misalign all that follow.
        if tensor.nbytes % ALIGNMENT and tensor.nbytes < SMALL_NBYTES:
            self._later[name] = tensor.detach().cpu().clone()
        else:
            self._write(name, tensor)

    def _write(self, name: str, tensor: Tensor) -> None:
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        if raw.numel():
            content = cast(Any, raw.numpy())
            self._file.write(content)
            self._crc = zlib.crc32(content, self._crc)
        end = self._at + raw.numel()
        entry = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [self._at, end]}
        self._entries[name], self._at = entry, end

    def finish(self, metadata: Mapping[str, Any]) -> None:
        for name, tensor in sorted(self._later.items(), key=lambda item: -item[1].element_size()):
            self._write(name, tensor)
        own = json.dumps({"version": VERSION, **metadata})
        checksum = _checksum(self._crc, {"__metadata__": {**self._layers, KEY: own}, **self._entries})
        strings = {**self._layers, KEY: json.dumps({**json.loads(own), CHECKSUM: checksum})}
        header = json.dumps({"__metadata__": strings, **self._entries}, separators=(",", ":")).encode()
        needed = _up(8 + len(header), ALIGNMENT)
        if needed > self._room:
            self._move(needed)
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room - 8) + header.ljust(self._room - 8))

    def _move(self, room: int) -> None:
        """Move the data up, from its end so that nothing is overwritten before it is read."""
        at = self._at
        while at:
            size = min(BLOCK_NBYTES, at)
            at -= size
            self._file.seek(self._room + at)
            block = self._file.read(size)
            self._file.seek(room + at)
            self._file.write(block)
        self._room = room


def read_quantized(path: Path) -> Checkpoint:
    """Read a file of `write_quantized` as a memory map; nothing of the data is touched.

    The map is copy-on-write, as in `read_gguf`.

    Raises:
        FileError: missing, truncated, corrupt, without our metadata, of a newer version, or with unknown formats.
    """
    header = read_safetensors_header(path)
    metadata = cast("dict[str, str]", header.pop("__metadata__", {}))
    own = _json(path, metadata, KEY)
    if own.get("version") != VERSION:
        raise FileError(f"{path.name}: not a quantized file of this pack (version {own.get('version')!r}).")
    tensors = dict(map_tensors(path, header))
    values: dict[str, Value] = {}
    for name in metadata:
        if name != KEY:
            values[name] = _weight(path, name, _json(path, metadata, name), tensors)
    return Checkpoint(path, {**tensors, **values}, metadata)


def verify_checksum(path: Path, reading: Callable[[], object] | None = None) -> None:
    """Read all of a file of `write_quantized` and compare it with what was written.

    Args:
        reading: called after every block; may raise to give up.
    Raises:
        FileError: changed since it was written, without a checksum, or it cannot be read.
    """
    header = read_safetensors_header(path)
    wanted = _json(path, header.get("__metadata__", {}), KEY).get(CHECKSUM)
    if not isinstance(wanted, str):
        raise FileError(f"{path.name}: has no checksum.")
    found = _checksum(_data_crc(path, reading), header)
    if found != wanted:
        raise FileError(f"{path.name}: damaged: its checksum is {found}, written was {wanted}.")


def _data_crc(path: Path, reading: Callable[[], object] | None) -> int:
    crc, skip = 0, None
    for block in blocks(path):
        if skip is None:
            skip = 8 + int.from_bytes(block[:8], "little")
        crc = zlib.crc32(block[min(skip, len(block)) :], crc)
        skip -= min(skip, len(block))
        if reading is not None:
            reading()
    return crc


def _checksum(data_crc: int, header: Mapping[str, Any]) -> str:
    """Of a header with or without a checksum in it."""
    metadata: dict[str, str] = header["__metadata__"]
    own = json.loads(metadata[KEY])
    own.pop(CHECKSUM, None)
    canonical = json.dumps({**header, "__metadata__": {**metadata, KEY: own}}, sort_keys=True)
    return f"crc32:{zlib.crc32(canonical.encode(), data_crc):08x}"


def blocks(path: Path) -> Iterator[memoryview]:
    """The content of a file; each block is good until the next one is asked for.

    Raises:
        FileError: it cannot be read.
    """
    block = memoryview(bytearray(BLOCK_NBYTES))
    try:
        with open(path, "rb", buffering=0) as file:
            while size := file.readinto(block):
                yield block[:size]
    except OSError as err:
        raise FileError(f"{path}: cannot be read: {err.strerror}.") from err


def file_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the writer was given to put beside the tensors, and the version of the layout."""
    own = json.loads(checkpoint.metadata[KEY])
    own.pop(CHECKSUM, None)
    return own


def map_tensors(path: Path, header: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) on one map of the whole file, for a checked header without `__metadata__`."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError, struct.error) as err:
        raise FileError(f"{path}: cannot be read: {err}.") from err
    for name, entry in header.items():
        yield name, tensor_in(path, name, entry, data, 8 + length)


def tensor_in(path: Path, name: str, entry: Mapping[str, Any], data: mmap.mmap, base: int) -> Tensor:
    """One tensor of a safetensors file.

    Args:
        entry: its checked header entry.
        data: a map; byte `base` of it is byte 0 of the file's data.
    Raises:
        FileError: a dtype that torch does not have.
    """
    if entry["dtype"] not in DTYPES:
        raise FileError(f"{path.name}: {name!r} has dtype {entry['dtype']}, which torch cannot hold.")
    dtype = DTYPES[entry["dtype"]]
    start, end = (base + at for at in entry["data_offsets"])
    if start == end:
        return torch.empty(entry["shape"], dtype=dtype)
    raw = cast(Tensor, cast(Any, torch).frombuffer(data, dtype=torch.uint8, count=end - start, offset=start))
    if start % dtype.itemsize:
        raw = raw.clone()  # vector loads of some processors need aligned addresses
    return raw.view(dtype).reshape(entry["shape"])


def _weight(path: Path, name: str, layer: Mapping[str, Any], tensors: dict[str, Tensor]) -> QuantizedWeight:
    try:
        format_id, parts = str(layer["format_id"]), [str(part) for part in layer["tensors"]]
        shape, dtype = tuple(int(n) for n in layer["orig_shape"]), DTYPES[layer["orig_dtype"]]
        held = {part: tensors.pop(_key(name, part)) for part in parts}
        meta = cast("dict[str, Any]", dict(layer["meta"]))
    except (KeyError, TypeError, ValueError) as err:
        raise FileError(f"{path.name}: corrupt metadata of '{name}': {type(err).__name__}: {err}.") from err
    if not is_format(format_id):
        raise FileError(f"{path.name}: '{name}' is in format {format_id!r}, which this version does not know.")
    return QuantizedWeight(format_id, held, shape, dtype, meta)


def _json(path: Path, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    if key not in metadata:
        raise FileError(f"{path.name}: not a quantized file of this pack (no '{key}' in its metadata).")
    try:
        value: object = json.loads(metadata[key])
    except ValueError as err:
        raise FileError(f"{path.name}: corrupt metadata: '{key}' is not JSON.") from err
    if not isinstance(value, dict):
        raise FileError(f"{path.name}: corrupt metadata: '{key}' is not a JSON object.")
    return cast("dict[str, Any]", value)


def _key(name: str, part: str) -> str:
    return name if part == "qdata" else f"{name}.{part}"


def _is_json(meta: dict[str, Any]) -> bool:
    try:
        return json.loads(json.dumps(meta)) == meta
    except (TypeError, ValueError):
        return False


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
