"""Files with the header of a model and data of holes: what is read from headers alone does not need more."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

from quantwire.quantizers.files.safetensors_header import DTYPE_BITS, read_safetensors_header
from torch import Tensor, nn

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> (dtype, shape)


def write_header(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file whose tensors are all zeros, on a file system with holes in no room."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        end = at + math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(path, 8 + len(raw) + at)
    return path


def header_of(path: Path, prefix: str = "") -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of a real file, under another prefix."""
    header = read_safetensors_header(path)
    return {prefix + n: (e["dtype"], tuple(e["shape"])) for n, e in header.items() if n != "__metadata__"}


def plain(state: Iterable[tuple[str, Tensor]], dtype: str = "BF16") -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (dtype, tuple(value.shape)) for name, value in state}


def on_meta(make: object, **config: object) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names and shapes of a model that one of the libraries builds."""
    import torch

    with torch.device("meta"):
        model = make(**config)  # type: ignore[operator]
    assert isinstance(model, nn.Module)
    return plain(model.state_dict().items())
