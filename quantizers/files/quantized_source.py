"""A conversion's source whose layers are quantized already, in any way that `schemes` knows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import FileError
from ..ggml_types import type_name
from ..registry import get_entry, require_reader
from ..weight import QuantizedWeight, TensorMeta
from .layer_rows import FULL_PRECISION, INPUT_SCALE, PRE_QUANT_SCALE, LayerRows
from .model_file import ModelFile
from .schemes.comfy_parts import SHAPE
from .schemes.scan import Scan
from .sources import FLOAT8, SafetensorsSource, Stored, plain

# Keys of metadata that describe how tensors are stored, which no longer holds for the new file.
STORAGE_KEYS = ("_quantization_metadata", "quantization_config", "tensor_names", "quantwire", "quanto_qmap.json")


PADS = {"comfy-nvfp4": 16, "comfy-mxfp8": 32}  # to multiples of


class QuantizedSource:
    """Layers of a safetensors file or a component's folder, under the names of a full-precision file.

    Attributes:
        kinds: of the quantized tensors: the format's id, or ggml's type or a float8 dtype where that says the same.
        sizes: bytes of their tensors.
        layers: what the file says of them.
        doubts: what it does not say, and a new file might need.
    """

    def __init__(self, file: ModelFile, found: Scan) -> None:
        self.label = file.path.name
        self.files: list[Path] = list(file.located.files)
        self._file = file
        self._scan = found
        self.metas: dict[str, TensorMeta] = {}
        self.kinds: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        for name, meta in found.metas().items():
            layer = found.layers.get(name)
            if layer is not None:
                self.kinds[name] = _kind(layer.format_id)
                self.sizes[name] = sum(file.entries[t].nbytes for t in set(layer.tensors.values()) & set(file.entries))
            elif meta.dtype in FLOAT8:
                self.kinds[name] = FLOAT8[meta.dtype]
                meta = TensorMeta(name, meta.shape, torch.bfloat16)  # holds each of its values exactly
            self.metas[name] = meta
        self.layers = found.layers
        self.doubts = _doubts(found, self.metas)
        dropped = {*STORAGE_KEYS, *file.entries, *found.layers}
        self.strings: Mapping[str, str] = {k: v for k, v in file.metadata.items() if k not in dropped}

    def open(self, name: str) -> Stored:
        value = self._scan.read(name)
        if not isinstance(value, QuantizedWeight):
            return plain(value)
        if value.format_id.startswith("gguf-") and _in_rows(value):
            return Stored(
                value.tensors["qdata"].reshape(value.orig_shape[0], -1), self.kinds[name], value.orig_shape[1]
            )
        rows = torch.arange(value.orig_shape[0])[:, None]
        return Stored(rows, "", value.orig_shape[1], LayerRows(value, self._beside(name)))

    def _beside(self, name: str) -> dict[str, torch.Tensor]:
        layer = self._scan.layers[name]
        roles = [role for role in (INPUT_SCALE, PRE_QUANT_SCALE) if role in layer.tensors]
        found = {role: self._file.read(layer.tensors[role]) for role in roles}
        if layer.scheme == "scaled-fp8" and INPUT_SCALE in found and bool((found[INPUT_SCALE] == 1).all()):
            del found[INPUT_SCALE]  # such files say so that there is none
        if layer.options.get(FULL_PRECISION):
            found[FULL_PRECISION] = torch.ones(())
        return found

    def identity(self) -> list[dict[str, Any]]:
        headers: dict[Path, Any] = {path: [] for path in self.files}
        for e in self._file.entries.values():
            headers.setdefault(e.file, []).append((e.name, e.dtype, e.shape, e.start))
        hashes = {path: hashlib.sha256(json.dumps(tensors).encode()).hexdigest() for path, tensors in headers.items()}
        return [{"file": path.name, **self._file.state[path], "header": hashes[path]} for path in self.files]

    def check_unchanged(self) -> None:
        self._file.check_unchanged()


def open_quantized(file: ModelFile, found: Scan) -> QuantizedSource | SafetensorsSource:
    """The source of what was found.

    Raises:
        FileError: a layer that is damaged or that nothing here can read, or tensors that torch cannot hold.
        BackendUnavailable: a library that reading needs is missing.
    """
    path = file.path
    fatal = [fault for fault in found.faults if fault.fatal]
    if fatal:
        more = f" (and {len(fatal) - 1} more)" if len(fatal) > 1 else ""
        said = fatal[0].text.removesuffix(".")
        what = said if fatal[0].tensor in said else f"'{fatal[0].tensor}': {said}"
        raise FileError(
            f"{path.name}: {what}{more}.\n"
            f"`quantwire doctor {path.name}` tells all of it and whether it can be repaired."
        )
    unusable = [layer for layer in found.layers.values() if not layer.format_id]
    if unusable:
        more = f" (and {len(unusable) - 1} more layers)" if len(unusable) > 1 else ""
        raise FileError(f"{path.name}: '{unusable[0].name}' is {unusable[0].type}{more}: {unusable[0].why}")
    for format_id in sorted({layer.format_id for layer in found.layers.values()}):
        require_reader(format_id)
    return QuantizedSource(file, found) if found.layers else SafetensorsSource(path, file.located.files)


def _doubts(found: Scan, metas: Mapping[str, TensorMeta]) -> list[str]:
    """Padded layers whose (N, K) nobody tells: by a bias that is shorter, or a size near theirs that others have."""
    if any(SHAPE in layer.options for layer in found.layers.values()):
        return []  # a file of ours, which tells it of every padded layer
    sizes = {n for name, meta in metas.items() if name not in found.layers for n in meta.shape}
    doubtful: list[str] = []
    for name, layer in found.layers.items():
        multiple = PADS.get(layer.format_id, 0) if layer.scheme == "comfy" else 0
        if not multiple or len(layer.shape) != 2:
            continue
        n, k = layer.shape
        near = k not in sizes and any(size in sizes for size in range(k - multiple + 1, k))
        if n % multiple or near:
            doubtful.append(name)
    if not doubtful:
        return []
    more = f" and {len(doubtful) - 1} more" if len(doubtful) > 1 else ""
    n, k = found.layers[doubtful[0]].shape
    return [
        f"'{doubtful[0]}'{more}: may be stored with columns of zeros behind it, and the file does not tell; taken for "
        f"{n} x {k}, so compare with the model"
    ]


def _kind(format_id: str) -> str:
    if get_entry(format_id).backend == "gguf":
        return type_name(format_id)
    float8 = {"layerwise-fp8-e4m3fn": torch.float8_e4m3fn, "layerwise-fp8-e5m2": torch.float8_e5m2}
    return FLOAT8[float8[format_id]] if format_id in float8 else format_id


def _in_rows(weight: QuantizedWeight) -> bool:
    """Whether blocks do not run across rows."""
    qdata, rows = weight.tensors["qdata"], weight.orig_shape[0]
    return bool(rows) and qdata.shape[0] == rows and qdata.dim() == 2
