"""ComfyUI's native formats, through comfy-kitchen >= 0.2.31 (Apache-2.0).

Each format is one of comfy-kitchen's layouts with fixed options; a `QuantizedWeight` holds the layout's tensors under
the layout's own names (`scale`, `block_scale`, `s_channel`, `codebook`) and its other parameters as meta, so a ComfyUI
tensor is made from it without touching a value. Storage by format (up to n: rounded up to a multiple):

    comfy-fp8-e4m3fn, -e5m2   fp8 (N, K); scale float32 scalar
    comfy-nvfp4               uint8 (N up to 16, K up to 16, /2); block_scale e4m3; scale float32 scalar
    comfy-mxfp8               e4m3 (N up to 32, K up to 32); scale e8m0 per 32
    comfy-int8                int8 (N, K); scale float32 (N, 1), or a scalar with scale=tensor
    comfy-int8-convrot        the same, columns rotated first in groups of 256 (or 16, 64)
    comfy-w4a4-convrot        int8 (N, K/2); scale float32 (N)
    comfy-w4a8                int8 (N, K/2); scale e4m3 (N, K/16), s_channel float32 (N), codebook float32 (16)

Products here are weight only; inside ComfyUI the host's own layers choose its fused kernels.

ComfyUI's `input_scale` is not set: it is a number for the activations, found by calibration with sample inputs, and an
attribute of ComfyUI's layer rather than a part of the weight. Without it ComfyUI scales activations as they come.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ...base import Availability, Kernel, Quantizer
from ...errors import SpecError
from ...kernels.choose import EXPAND, int8_rows
from ...kernels.expand import Expansion, dequantized
from ...kernels.tiles import to_tiles
from ...provenance import SPEC_KEY
from ...weight import FullPrecisionGuard, QuantizedWeight, TensorMeta
from ..probing import is_installed, probe_package, probe_stored, sample_bytes
from .expansion import rotated_back, rotated_linear, stored

if TYPE_CHECKING:
    from ...spec import QuantSpec

INSTALL = "Run `pip install comfy-kitchen`, or update ComfyUI, which brings it; or choose a bnb, quanto or gguf format."
DEFAULT_ROTATION = 256  # columns that ConvRot mixes; K must be a multiple
SLAB_NUMEL = 1 << 20
TILE_ROWS = 128  # of the scales of nvfp4 and mxfp8
INT4_GROUP = 64  # the kernel's; K must be a multiple


@dataclass(frozen=True)
class NativeFormat:
    """A layout and its options.

    Attributes:
        algo: ComfyUI's name in `comfy_quant`.
        layout: class name in comfy_kitchen.tensor.
        options: arguments of the layout's `quantize`.
        rotated: whether columns are rotated before.
        divisor: what the scale of the whole tensor is its largest value divided by; 0 where rows or blocks have scales.
    """

    algo: str
    layout: str
    options: Mapping[str, Any] = field(default_factory=lambda: dict[str, Any]())
    rotated: bool = False
    divisor: float = 0.0


_FP8, _INT8 = "TensorCoreFP8Layout", "TensorWiseINT8Layout"
FORMATS: dict[str, NativeFormat] = {
    **{
        f"comfy-{name}": NativeFormat(str(dtype)[6:], _FP8, {"dtype": dtype}, divisor=torch.finfo(dtype).max)
        for name, dtype in (("fp8-e4m3fn", torch.float8_e4m3fn), ("fp8-e5m2", torch.float8_e5m2))
    },
    "comfy-nvfp4": NativeFormat("nvfp4", "TensorCoreNVFP4Layout", divisor=448.0 * 6.0),  # largest e4m3 x e2m1
    "comfy-mxfp8": NativeFormat("mxfp8", "TensorCoreMXFP8Layout"),
    "comfy-int8": NativeFormat("int8_tensorwise", _INT8, {"per_channel": True}),
    "comfy-int8-convrot": NativeFormat("int8_tensorwise", _INT8, {"per_channel": True, "convrot": True}, rotated=True),
    "comfy-w4a4-convrot": NativeFormat("convrot_w4a4", "TensorCoreConvRotW4A4Layout", rotated=True),
    "comfy-w4a8": NativeFormat("asym_w4a8_int8", "AsymW4A8Int8Layout", {"group_size": 16}, rotated=True),
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

    def probe_reading(self) -> Availability:
        sample = QuantizedWeight(self.format_id, *_sample(self.native))
        return probe_stored(self, sample, "Choose a gguf format.")

    def refuse(self, spec: QuantSpec, t: TensorMeta) -> str | None:
        if len(t.shape) != 2:
            return f"shape {t.shape} is not (N, K)"
        if not self.native.rotated:
            return None
        k, rotation = t.shape[1], _rotation(spec)
        if k % rotation:
            return f"K={k} is not a multiple of {rotation}, the size of a rotation"
        if self.native.algo == "convrot_w4a4" and k % INT4_GROUP:
            return f"K={k} is not a multiple of {INT4_GROUP}, the group of ComfyUI's int4 kernel"
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
            return n * k + (4 if _one_scale(spec) else 4 * n)
        if self.native.algo == "convrot_w4a4":
            return n * k // 2 + 4 * n
        return n * k // 2 + n * k // 16 + 4 * n + 4 * 16

    def quantize(self, w: Tensor, spec: QuantSpec) -> QuantizedWeight:
        """See the package docstring for the tensors."""
        w = w.detach().contiguous()
        options = self._options(spec)
        qdata, params = self._in_slabs(w, options) if self._by_rows(w, spec) else self._layout.quantize(w, **options)
        if self.native.divisor and _unusable(params.scale, w.dtype):
            # The scale of a weight of zeros, or in float16 of a tiny one, is 0 there, and dividing by it makes nan; and
            # where its inverse exceeds float16 (fp8-e5m2 with values below 0.8) every value lands on the largest.
            w = w.float()
            scale = torch.amax(w.abs()) / self.native.divisor
            qdata, params = self._layout.quantize(w, scale=scale.masked_fill(scale == 0, 1.0), **options)
        tensors: dict[str, Tensor] = {"qdata": qdata}
        meta: dict[str, Any] = {}
        for entry in dataclasses.fields(params):
            value = getattr(params, entry.name)
            if isinstance(value, Tensor):
                tensors[entry.name] = value
            elif entry.name not in ("orig_dtype", "orig_shape") and value is not None:
                meta[entry.name] = value
        return QuantizedWeight(self.format_id, tensors, tuple(w.shape), w.dtype, meta)

    def _by_rows(self, w: Tensor, spec: QuantSpec) -> bool:
        """Whether rows come out the same, bit for bit, when they are quantized a few at a time.

        Not of rotated ones, whose products may be summed in another order, nor with a codebook of the whole weight.
        """
        return w.device.type == "cpu" and w.numel() > SLAB_NUMEL and not self.native.rotated and not _one_scale(spec)

    def _in_slabs(self, w: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """What the layout makes of a weight, in little memory: it takes up to 30 bytes a value on the way."""
        step = -(-SLAB_NUMEL // w.shape[1] // TILE_ROWS) * TILE_ROWS
        slabs: tuple[Tensor, ...] = cast(Any, w).split(step)
        if self.native.divisor:
            largest = torch.stack([torch.amax(slab.abs()) for slab in slabs]).amax()
            options = {**options, "scale": largest / self.native.divisor}
            if _unusable(options["scale"].float(), w.dtype):
                return self._layout.quantize(w, **options)
        part, params = self._layout.quantize(slabs[0], **options)
        qdata: Tensor = part.new_empty((w.shape[0] + TILE_ROWS, *part.shape[1:]))  # the last slab may be padded
        made: list[Any] = [params]
        qdata[: len(part)], rows = part, len(part)
        for slab in slabs[1:]:
            part, params = self._layout.quantize(slab, **options)
            qdata[rows : rows + len(part)] = part
            rows += len(part)
            made.append(params)
        changed: dict[str, Any] = {"orig_shape": tuple(w.shape)}
        for entry in dataclasses.fields(made[0]):
            values = [getattr(params, entry.name) for params in made]
            if isinstance(values[0], Tensor) and values[0].dim():  # one of the whole tensor has none
                changed[entry.name] = torch.cat(values)
        return qdata[:rows], dataclasses.replace(made[0], **changed)

    def _options(self, spec: QuantSpec) -> dict[str, Any]:
        options = dict(self.native.options)
        if self.native.rotated:
            options["convrot_groupsize"] = _rotation(spec)
        if _one_scale(spec):
            options["per_channel"] = False
        return options

    def params(self, q: QuantizedWeight, dtype: torch.dtype, params_class: Any = None) -> Any:
        """The layout's parameter object on the tensors of `q`."""
        extra = {name: t for name, t in q.tensors.items() if name != "qdata"}
        cls = params_class or self._layout.Params
        known = {entry.name for entry in dataclasses.fields(cls)}
        meta = {name: value for name, value in q.meta.items() if name != SPEC_KEY}
        # Older comfy-kitchens lack options that newer ones have; without the option is what False says.
        unknown = [name for name, value in meta.items() if name not in known and value]
        if unknown:
            raise SpecError(
                f"{q.format_id}: {', '.join(unknown)} is not known to the comfy-kitchen that is installed.\nUpdate it."
            )
        meta = {name: value for name, value in meta.items() if name in known}
        return cls(orig_dtype=dtype, orig_shape=tuple(q.orig_shape), **extra, **meta)

    def dequantize(self, q: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        form = None if is_installed("comfy-kitchen") else self.form(q)
        if form is not None:
            return dequantized(form, dtype)
        full = self._layout.dequantize(q.tensors["qdata"], self.params(q, dtype))
        n, k = q.orig_shape
        return full[:n, :k].to(dtype)

    def form(self, q: QuantizedWeight) -> Expansion | None:
        rotation = self._rotated_by(q)
        source = stored(q, self.native.algo)
        return rotated_back(source, rotation) if rotation else source

    def kernel(self, q: QuantizedWeight, device: torch.device, dtype: torch.dtype, tokens: int) -> Kernel:
        if self._rotated_by(q):
            return Kernel(
                f"rotate x, {EXPAND}", "turning the activations costs less than turning the weight", self._turned
            )
        if self.native.algo == "int8_tensorwise" and q.tensors["scale"].numel() > 1:
            return int8_rows(_parts, self._form, q.orig_shape, device, dtype, tokens)
        return super().kernel(q, device, dtype, tokens)

    def _rotated_by(self, q: QuantizedWeight) -> int:
        """Columns of a rotation; 0 where the weight is not rotated."""
        return int(q.meta["convrot_groupsize"]) if self.native.rotated else 0

    def _turned(self, x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Tensor:
        return rotated_linear(x, stored(q, self.native.algo), self._rotated_by(q), bias)

    def to_native(self, q: QuantizedWeight, bias: Tensor | None) -> nn.Module:
        """An `nn.Linear` on comfy-kitchen's `QuantizedTensor`, which chooses the product by its layout.

        int8, w4a8 and w4a4 quantize activations too, to 8 or 4 bits a row; the others dequantize the weight.
        """
        tensors = {name: t.clone() for name, t in q.tensors.items()}
        copy = q.with_tensors(tensors)
        library = importlib.import_module("comfy_kitchen.tensor")
        n, k = q.orig_shape
        layer: Any = nn.Linear(k, n, bias=bias is not None, device="meta", dtype=q.orig_dtype)
        params = self.params(copy, q.orig_dtype)
        weight: Any = library.QuantizedTensor(tensors["qdata"], self.native.layout, params)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        layer.register_load_state_dict_pre_hook(FullPrecisionGuard(self.format_id))
        return layer.eval()


def _sample(native: NativeFormat) -> tuple[dict[str, Tensor], tuple[int, int], torch.dtype, dict[str, Any]]:
    """Tensors, shape, dtype and meta of a weight that the library need not make."""
    codes, one = sample_bytes(64, 256), torch.tensor(0.01)
    meta: dict[str, Any] = {"convrot_groupsize": DEFAULT_ROTATION} if native.rotated else {}
    if native.divisor and native.algo != "nvfp4":
        tensors = {"qdata": (codes.float() - 126).to(native.options["dtype"]), "scale": one}
    elif native.algo == "nvfp4":
        tiles = to_tiles(torch.ones(64, 16).to(torch.float8_e4m3fn))
        tensors = {"qdata": codes[:, :128].contiguous(), "block_scale": tiles, "scale": one}
    elif native.algo == "mxfp8":
        tiles = to_tiles(torch.full((64, 8), 127, dtype=torch.uint8)).view(torch.float8_e8m0fnu)  # 2**0
        tensors = {"qdata": (codes.float() - 126).to(torch.float8_e4m3fn), "scale": tiles}
    elif native.algo == "int8_tensorwise":
        tensors = {"qdata": codes.view(torch.int8), "scale": torch.full((64, 1), 0.01)}
        meta["convrot"] = native.rotated
    else:
        packed = codes[:, :128].contiguous().view(torch.int8)
        tensors = {"qdata": packed, "scale": torch.full((64,), 0.1)}
        if native.algo == "asym_w4a8_int8":
            tensors["scale"] = torch.ones(64, 16).to(torch.float8_e4m3fn)
            tensors |= {"s_channel": torch.full((64,), 0.01), "codebook": torch.arange(-64.0, 64.0, 8.0)}
    return tensors, (64, 256), torch.float32, meta


def _parts(q: QuantizedWeight) -> tuple[Tensor, Tensor]:
    return q.tensors["qdata"], q.tensors["scale"]


def _rotation(spec: QuantSpec) -> int:
    return int(spec.option("convrot-group-size", DEFAULT_ROTATION))


def _unusable(scale: Tensor, dtype: torch.dtype) -> bool:
    return float(scale) < (1 / torch.finfo(dtype).max if dtype is torch.float16 else 1e-45)


def _one_scale(spec: QuantSpec) -> bool:
    return spec.option("scale", "row") == "tensor"


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
