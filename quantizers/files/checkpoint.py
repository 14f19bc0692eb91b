"""Read and write model files: names to plain tensors or quantized weights, with every fault of a file named.

Files of `torch.save` are refused: reading one may run code.
"""

from __future__ import annotations

import math
import mmap
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import FileError
from ..ggml_types import TYPES, format_id
from ..registry import require_reader
from ..weight import QuantizedWeight
from .gguf_header import MAGIC, GgufTensor
from .gguf_parts import orig_shape, read_gguf_parts
from .locate import is_pickle, pickled
from .regular import open_regular
from .safetensors_header import read_safetensors_header

PLAIN_GGUF = {
    **{"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64},
    **{"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64},
}


@dataclass(frozen=True)
class Checkpoint:
    """The content of a model file.

    Attributes:
        path: where it came from.
        tensors: name -> Tensor, or QuantizedWeight for GGUF block types.
        metadata: the file's own strings; of a GGUF file always with `general.architecture`, which may be empty.
    """

    path: Path
    tensors: Mapping[str, Tensor | QuantizedWeight]
    metadata: Mapping[str, str]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a safetensors or GGUF file by its content, whatever its name.

    Raises:
        FileError: missing, truncated, corrupt or of another kind.
        BackendUnavailable: a GGUF file, and the gguf package is missing.
    """
    head = _head(path)
    if head[:4] == MAGIC:
        return read_gguf(path)
    if is_pickle(head):
        raise pickled(path.name)
    return read_safetensors(path)


def read_safetensors(path: Path) -> Checkpoint:
    """Read a safetensors file.

    Raises:
        FileError: missing, truncated or corrupt.
    """
    import safetensors

    header = read_safetensors_header(path)
    try:
        with cast(Any, safetensors).safe_open(str(path), framework="pt") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in header if name != "__metadata__"}
    except (safetensors.SafetensorError, OSError) as err:
        raise FileError(f"{path.name}: corrupt safetensors file: {_first_line(err)}.") from err
    return Checkpoint(path, tensors, header.get("__metadata__", {}))


def read_gguf(path: Path) -> Checkpoint:
    """Read a GGUF file, memory-mapped; block types become `QuantizedWeight`s on the file's own bytes.

    Any part of a model in several files gives the whole model. Shapes are those of `comfy.gguf.orig_shape.NAME` where
    the file has such a key: converters store tensors whose rows are no whole blocks, or that have more dimensions than
    ggml, as a matrix of other rows. The maps are copy-on-write: writing to a tensor changes neither the file nor
    crashes, as it would read-only.

    Raises:
        FileError: missing, truncated, corrupt, or with a tensor type that cannot be read.
        BackendUnavailable: what computes with one of its block types is missing.
    """
    tensors: dict[str, Tensor | QuantizedWeight] = {}
    parts = read_gguf_parts(path)
    for kind in sorted({t.kind for part in parts for t in part.header.tensors} - PLAIN_GGUF.keys()):
        require_reader(format_id(kind))
    first = parts[0].header  # the keys of the model stand in the first part
    for part in parts:
        with open(part.path, "rb") as file:
            needed = max((t.start + t.nbytes for t in part.header.tensors if t.nbytes), default=0)
            if os.fstat(file.fileno()).st_size < needed:
                raise FileError(f"{part.path.name}: became shorter while it was read.\nWait until it is written.")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        for t in part.header.tensors:
            tensors[t.name] = _gguf_tensor(data, t, orig_shape(path, first, t))
    strings = {key: value for key, value in first.metadata.items() if isinstance(value, str)}
    return Checkpoint(path, tensors, {"general.architecture": "", **strings})


def _gguf_tensor(data: mmap.mmap, t: GgufTensor, shape: tuple[int, ...]) -> Tensor | QuantizedWeight:
    dtype = PLAIN_GGUF.get(t.kind)
    if not t.nbytes:
        return torch.empty(shape, dtype=dtype or torch.uint8)
    raw = cast(Tensor, cast(Any, torch).frombuffer(data, dtype=torch.uint8, count=t.nbytes, offset=t.start))
    if dtype is not None:
        return raw.view(dtype).reshape(shape)
    # Rows of the weight where they are whole blocks, else the rows in which the file has them.
    rows = shape if shape[-1] % TYPES[t.kind].block == 0 else t.shape
    return QuantizedWeight(format_id(t.kind), {"qdata": raw.reshape(math.prod(rows[:-1]), -1)}, shape, torch.bfloat16)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        FileError: it cannot be written; a file that was there before is unchanged.
    """
    import safetensors.torch

    def write(temporary: Path) -> None:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:
            cast(Any, safetensors.torch).save_file(contiguous, str(temporary), dict(metadata or {}))
        except safetensors.SafetensorError as err:
            raise FileError(f"{path}: cannot be written: {_first_line(err)}.") from err

    replace_file(path, write)


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Give `path` new content in one step: `write` makes a temporary file beside it, which then takes its name.

    On any failure, an interruption too, `path` stays as it was and the temporary file is removed.

    Raises:
        FileError: the file system refuses.
    """
    temporary = path.with_name(f"{path.name[:100]}.{secrets.token_hex(6)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Nobody else's file, as with tempfile.mkstemp, whose mode 0600 would become that of `path`.
        open(temporary, "xb").close()
        mode = temporary.stat().st_mode
        try:
            write(temporary)
            temporary.chmod(mode)  # safetensors puts a file of its own in its place, which only the owner may read
            with open(temporary, "r+b") as file:  # writable, since Windows flushes no other file
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as err:
        raise FileError(f"{path}: cannot be written: {err.strerror or err}.") from err


def _head(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read(8)
    except OSError as err:
        raise FileError(f"{path}: cannot be read: {err.strerror}.") from err


def _first_line(err: Exception) -> str:
    text = str(err).strip()
    return text.splitlines()[0].rstrip(".") if text else type(err).__name__
