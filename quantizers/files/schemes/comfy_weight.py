"""Weights of the `comfy-*` formats from the tensors of ComfyUI's files: see `comfy_parts`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ...weight import QuantizedWeight
    from .base import Layer, Read

_ONE = ("input_scale", "pre_quant_scale", "comfy_quant")  # of the layer, not of the weight


def make_weight(layer: Layer, read: Read) -> QuantizedWeight:
    """On the tensors of the file; scales get the dtype and shape in which comfy-kitchen has them, the same values."""
    from ...weight import QuantizedWeight
    from ..quantized_file import DTYPES

    t = {role: read(name) for role, name in layer.tensors.items() if role not in _ONE}
    kind, o = layer.format_id, layer.options
    meta: dict[str, Any] = {}
    if kind.startswith("quanto-"):
        t["scale"] = _float(t["scale"]).reshape(-1, 1)
    elif kind.startswith("comfy-fp8"):
        t["scale"] = _float(t["scale"]).reshape(())
    elif kind == "comfy-nvfp4":
        t = {
            "qdata": _bytes(t["qdata"], "uint8"),
            "scale": _float(t["scale"]).reshape(()),
            "block_scale": t["block_scale"],
        }
        t["block_scale"] = _tiles(t["block_scale"], t["qdata"].shape[0], t["qdata"].shape[1] // 8, "float8_e4m3fn")
        meta = {"transposed": False}
    elif kind == "comfy-mxfp8":
        t["scale"] = _tiles(t["scale"], t["qdata"].shape[0], t["qdata"].shape[1] // 32, "float8_e8m0fnu")
        meta = {"transposed": False}
    elif kind.startswith("comfy-int8"):
        t["scale"] = _float(t["scale"]).reshape(()) if o["scale"] == "tensor" else _float(t["scale"]).reshape(-1, 1)
        rotation = o.get("convrot_groupsize", 256)
        meta = {"is_weight": True, "convrot": o["convrot"], "convrot_groupsize": rotation, "transposed": False}
    elif kind == "comfy-w4a4-convrot":
        t = {"qdata": _bytes(t["qdata"], "int8"), "scale": _float(t["scale"]).reshape(-1)}
        meta = {"convrot_groupsize": o["convrot_groupsize"], "quant_group_size": 64}
        meta |= {"linear_dtype": o["linear_dtype"], "transposed": False}
    else:
        t = _w4a8(t)
        meta = {"group_size": o["group_size"], "convrot_groupsize": o["convrot_groupsize"]}
        meta |= {"mma_packed": False, "transposed": False}
    return QuantizedWeight(kind, t, layer.shape, DTYPES[layer.dtype], meta)


def _float(scale: Tensor) -> Tensor:
    import torch

    return scale.to(torch.float32)  # of float16 and bfloat16 without rounding


def _bytes(packed: Tensor, dtype: str) -> Tensor:
    import torch

    return packed.view(getattr(torch, dtype))


def _tiles(scale: Tensor, rows: int, columns: int, dtype: str) -> Tensor:
    """Block scales of (rows, columns) in the shape of their tiles; some files have the bytes, some flat ones."""
    import torch

    return scale.view(getattr(torch, dtype)).reshape(-(-rows // 128) * 128, -(-columns // 4) * 4)


def _w4a8(t: dict[str, Tensor]) -> dict[str, Tensor]:
    import torch

    # Without a codebook the codes are numbers from -8 to 7.
    codebook = _float(t["codebook"]).reshape(-1) if "codebook" in t else torch.arange(-8.0, 8.0)
    return {
        "qdata": _bytes(t["qdata"], "int8"),
        "scale": t["scale"].view(torch.float8_e4m3fn),
        "s_channel": _float(t["s_channel"]).reshape(-1),
        "codebook": codebook,
    }
