"""Read model files: names to plain tensors or quantized weights, with every fault of the file named.

safetensors: 8 bytes little-endian header length, JSON header, data. GGUF: see ggml-org/ggml docs/gguf.md. Files of
`torch.save` are refused: reading one may run code.
"""

from __future__ import annotations

import json
import os
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FileError
from ..registry import format_ids
from ..weight import QuantizedWeight

MAX_HEADER_NBYTES = 100_000_000  # the limit of the safetensors library itself


@dataclass(frozen=True)
class Checkpoint:
    """The content of a model file.

    Attributes:
        path: where it came from.
        tensors: name -> Tensor, or QuantizedWeight for GGUF block types.
        metadata: the file's own strings.
    """

    path: Path
    tensors: Mapping[str, Tensor | QuantizedWeight]
    metadata: Mapping[str, str]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a `.safetensors` or `.gguf` file by its content, whatever its name.

    Raises:
        FileError: missing, truncated, corrupt or of another kind.
    """
    head = _head(path)
    if head[:4] == b"GGUF":
        return read_gguf(path)
    if head[:2] == b"PK" or path.suffix in (".pt", ".pth", ".ckpt", ".bin"):
        raise FileError(f"{path.name}: a file of torch.save is not loaded, because reading one may run code.\n"
                        "Convert it to safetensors first.")  # fmt: skip
    return read_safetensors(path)


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON header, checked against the size of the file; no tensor is read.

    Raises:
        FileError: not a safetensors file, or truncated.
    """
    size = path.stat().st_size if path.is_file() else -1
    head = _head(path)
    if len(head) < 8:
        raise FileError(f"{path.name}: {max(size, 0)} bytes are too few for a safetensors file.")
    (length,) = struct.unpack("<Q", head)
    if length > MAX_HEADER_NBYTES or head[:1] == b"\0":
        raise FileError(f"{path.name}: not a safetensors file (its header would have {length} bytes).")
    if 8 + length > size:
        raise FileError(f"{path.name}: truncated: the header needs {8 + length} bytes, the file has {size}.")
    with open(path, "rb") as file:
        file.seek(8)
        raw = file.read(length)
    try:
        header = json.loads(raw)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as err:
        raise FileError(f"{path.name}: corrupt safetensors header: {_first_line(err)}.") from err
    expected = 8 + length + max(ends, default=0)
    if expected > size:
        raise FileError(
            f"{path.name}: truncated: the tensors need {expected} bytes, the file has {size}.\nDownload it again."
        )
    return header


def read_safetensors(path: Path) -> Checkpoint:
    """Read a safetensors file.

    Raises:
        FileError: missing, truncated or corrupt.
    """
    from safetensors import SafetensorError, safe_open

    read_safetensors_header(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping, no __iter__)
            metadata = dict(file.metadata() or {})
    except SafetensorError as err:
        raise FileError(f"{path.name}: corrupt safetensors file: {_first_line(err)}.") from err
    return Checkpoint(path, tensors, metadata)


def read_gguf(path: Path) -> Checkpoint:
    """Read a GGUF file, memory-mapped; block types become `QuantizedWeight`s on the file's own bytes.

    Raises:
        FileError: missing, truncated, corrupt, or with a tensor type that cannot be read.
        BackendUnavailable: the gguf package is missing.
    """
    from ..registry import require

    require("gguf-q8-0")
    import gguf

    if _head(path)[:4] != b"GGUF":
        raise FileError(f"{path.name}: not a GGUF file (it does not begin with 'GGUF').")
    try:
        reader: Any = gguf.GGUFReader(str(path))
        arch = reader.get_field("general.architecture")
        metadata = {"general.architecture": str(arch.contents()) if arch is not None else ""}
    except Exception as err:  # the reader raises ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError, ...
        raise FileError(f"{path.name}: truncated or corrupt GGUF file: {_first_line(err)}.") from err
    tensors = {str(t.name): _gguf_tensor(path, t) for t in reader.tensors}
    return Checkpoint(path, tensors, metadata)


def _gguf_tensor(path: Path, t: Any) -> Tensor | QuantizedWeight:
    shape = tuple(int(n) for n in reversed(t.shape))
    kind = str(t.tensor_type.name)
    data = t.data  # a view of the memory map, which is opened read-only; torch warns, and nothing here writes
    if int(t.n_bytes) != data.nbytes:
        raise FileError(f"{path.name}: truncated: '{t.name}' needs {t.n_bytes} bytes, {data.nbytes} are there.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        raw = torch.from_numpy(data)
    if kind in ("F32", "F16"):
        return raw.reshape(shape)
    if kind == "BF16":
        return raw.view(torch.bfloat16).reshape(shape)
    format_id = "gguf-" + kind.lower().replace("_", "-")
    if format_id not in format_ids(writable=False):
        raise FileError(f"{path.name}: '{t.name}' has GGUF type {kind}, which cannot be read here.")
    return QuantizedWeight(format_id, {"qdata": raw.reshape(-1, raw.shape[-1])}, shape, torch.bfloat16)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file: temporary name in the same folder, fsync, rename."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, str(temporary), dict(metadata or {}))
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Flush a finished temporary file to disk and give it its name."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _head(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(8)
    except OSError as err:
        raise FileError(f"{path}: cannot be read: {err.strerror}.") from err


def _first_line(err: Exception) -> str:
    text = str(err).strip()
    return text.splitlines()[0].rstrip(".") if text else type(err).__name__

