"""ComfyUI's native formats, through comfy-kitchen >= 0.2.31 (Apache-2.0).

Each format is one of comfy-kitchen's layouts with fixed options; a `QuantizedWeight` holds the layout's tensors under
the layout's own names (`scale`, `block_scale`, `s_channel`, `codebook`) and its other parameters as meta, so a ComfyUI
tensor is made from it without touching a value. Storage by format (up to n: rounded up to a multiple):

    comfy-fp8-e4m3fn, -e5m2   fp8 (N, K); scale float32 scalar
    comfy-nvfp4               uint8 (N up to 16, K up to 16, /2); block_scale e4m3; scale float32 scalar
    comfy-mxfp8               e4m3 (N up to 32, K up to 32); scale e8m0 per 32
    comfy-int8                int8 (N, K); scale float32 (N, 1); -convrot: columns rotated in groups of 256 first
    comfy-w4a4-convrot        int8 (N, K/2); scale float32 (N)
    comfy-w4a8                int8 (N, K/2); scale e4m3 (N, K/16), s_channel float32 (N), codebook float32 (16)

The product here dequantizes; inside ComfyUI the host's own layers choose its fused kernels.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...base import Availability, Quantizer
from ...weight import QuantizedWeight, TensorMeta
from ..probing import probe_package

if TYPE_CHECKING:
    from ...spec import QuantSpec

INSTALL = "Run `pip install comfy-kitchen`, or update ComfyUI, which brings it; or choose a bnb, quanto or gguf format."
ROTATION = 256  # columns that ConvRot mixes; K must be a multiple


@dataclass(frozen=True)
class NativeFormat:
    """A layout and its options.

    Attributes:
        algo: ComfyUI's name in `comfy_quant`.
        layout: class name in comfy_kitchen.tensor.
        options: arguments of the layout's `quantize`.
        k_multiple: what K must be a multiple of.
    """

    algo: str
    layout: str
    options: Mapping[str, Any] = field(default_factory=lambda: dict[str, Any]())
    k_multiple: int = 1


_ROTATED = {"convrot_groupsize": ROTATION}
FORMATS: dict[str, NativeFormat] = {
    "comfy-fp8-e4m3fn": NativeFormat("float8_e4m3fn", "TensorCoreFP8Layout", {"dtype": torch.float8_e4m3fn}),
    "comfy-fp8-e5m2": NativeFormat("float8_e5m2", "TensorCoreFP8Layout", {"dtype": torch.float8_e5m2}),
    "comfy-nvfp4": NativeFormat("nvfp4", "TensorCoreNVFP4Layout"),
    "comfy-mxfp8": NativeFormat("mxfp8", "TensorCoreMXFP8Layout"),
    "comfy-int8": NativeFormat("int8_tensorwise", "TensorWiseINT8Layout", {"per_channel": True}),
    "comfy-int8-convrot": NativeFormat(
        "int8_tensorwise", "TensorWiseINT8Layout", {"per_channel": True, "convrot": True, **_ROTATED}, ROTATION
    ),
    "comfy-w4a4-convrot": NativeFormat("convrot_w4a4", "TensorCoreConvRotW4A4Layout", _ROTATED, ROTATION),
    "comfy-w4a8": NativeFormat("asym_w4a8_int8", "AsymW4A8Int8Layout", {"group_size": 16, **_ROTATED}, ROTATION),
}


def make(format_id: str) -> Comfy:
    return Comfy(format_id)


class Comfy(Quantizer):
    def __init__(self, format_id: str) -> None:
        self.format_id = format_id
        self.native = FORMATS[format_id]

    @property
    def _layout(self) -> Any:
        return getattr(importlib.import_module("comfy_kitchen.tensor"), self.native.layout)

    def probe(self) -> Availability:
        return probe_package(self, "comfy-kitchen", (0, 2, 31), INSTALL)

    def refuse(self, spec: QuantSpec, t: TensorMeta) -> str | None:
        if len(t.shape) != 2:
            return f"shape {t.shape} is not (N, K)"
        if t.shape[1] % self.native.k_multiple:
            return f"K={t.shape[1]} is not a multiple of {self.native.k_multiple}, the size of a rotation"
        return None

    def predict_nbytes(self, spec: QuantSpec, t: TensorMeta) -> int:
        n, k = t.shape
        if self.native.algo.startswith("float8"):
            return n * k + 4
        if self.native.algo == "nvfp4":
            rows, columns = _up(n, 16), _up(k, 16)
            return rows * columns // 2 + _up(rows, 128) * _up(columns // 16, 4) + 4
        if self.native.algo == "mxfp8":
            rows, columns = _up(n, 32), _up(k, 32)
            return rows * columns + _up(rows, 128) * _up(columns // 32, 4)
        if self.native.algo == "int8_tensorwise":
            return n * k + 4 * n
        if self.native.algo == "convrot_w4a4":
            return n * k // 2 + 4 * n
        return n * k // 2 + n * k // 16 + 4 * n + 4 * 16

    def quantize(self, w: Tensor, spec: QuantSpec) -> QuantizedWeight:
        """See the package docstring for the tensors."""
        # A clone, because some of these layouts scale or rotate in place.
        qdata, params = self._layout.quantize(w.detach().clone().contiguous(), **self.native.options)
        tensors: dict[str, Tensor] = {"qdata": qdata}
        meta: dict[str, Any] = {}
        for entry in dataclasses.fields(params):
            value = getattr(params, entry.name)
            if isinstance(value, Tensor):
                tensors[entry.name] = value
            elif entry.name not in ("orig_dtype", "orig_shape") and value is not None:
                meta[entry.name] = value
        return QuantizedWeight(self.format_id, tensors, tuple(w.shape), w.dtype, meta)

    def params(self, q: QuantizedWeight, dtype: torch.dtype, params_class: Any = None) -> Any:
        """The layout's parameter object on the tensors of `q`."""
        extra = {name: t for name, t in q.tensors.items() if name != "qdata"}
        cls = params_class or self._layout.Params
        return cls(orig_dtype=dtype, orig_shape=tuple(q.orig_shape), **extra, **dict(q.meta))

    def dequantize(self, q: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        full = self._layout.dequantize(q.tensors["qdata"], self.params(q, dtype))
        n, k = q.orig_shape
        return full[:n, :k].to(dtype)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
