"""Small quantized files made of tensors, and what the schemes find in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from quantwire.quantizers.files.faults import Fault
from quantwire.quantizers.files.model_file import open_model
from quantwire.quantizers.files.schemes.scan import Scan, scan
from quantwire.quantizers.registry import get_quantizer
from quantwire.quantizers.weight import QuantizedWeight
from safetensors.torch import save_file
from torch import Tensor


def scan_of(
    folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, config: Any = None
) -> Scan:
    """Write tensors as a safetensors file, or with a config as a component's folder, and look for quantized layers."""
    path = folder / ("diffusion_pytorch_model.safetensors" if config is not None else "model.safetensors")
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, path, dict(metadata or {}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return scan(open_model(folder if config is not None else path))


def weight_of(found: Scan, name: str) -> QuantizedWeight:
    value = found.read(name)
    assert isinstance(value, QuantizedWeight)
    assert value.orig_shape == found.layers[name].shape
    return value


def dequantized(found: Scan, name: str, dtype: torch.dtype) -> Tensor:
    weight = weight_of(found, name)
    return get_quantizer(weight.format_id).dequantize(weight, dtype)


def raw(t: Tensor) -> Tensor:
    return t.detach().contiguous().reshape(-1).view(torch.uint8)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


def same_weight(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    """Equal in everything that computes."""
    fields = [(w.format_id, w.orig_shape, dict(w.meta), sorted(w.tensors)) for w in (a, b)]
    return fields[0] == fields[1] and all(same_bytes(t, b.tensors[name]) for name, t in a.tensors.items())


def json_bytes(value: Any) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def json_of(t: Tensor) -> Any:
    return json.loads(bytes(t.tolist()))


def codes(found: Scan, *, fatal: bool | None = None) -> list[str]:
    return [fault.code for fault in found.faults if fatal is None or fault.fatal is fatal]


def fault(found: Scan, code: str) -> Fault:
    """The one fault of that code."""
    (one,) = [f for f in found.faults if f.code == code]
    return one
