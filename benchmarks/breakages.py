"""Ways in which quantized weights are broken in practice, done to real quantized layers.

Each is a mistake that loaders and converters have been seen to make, and that raises no error: every name, shape and
dtype is as the next program expects it. All quantized layers of the model get it, as a wrong loader would do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from quantwire.hosts.modules import with_layers
from quantwire.quantizers.weight import QuantizedLinear, QuantizedWeight
from torch import Tensor

Tensors = dict[str, Tensor]
SCALES = ("scale", "absmax", "block_scale")
PACKED = ("bnb-nf4", "bnb-fp4", "quanto-qint4", "sdnq-uint4", "sdnq-int4", "comfy-nvfp4", "nncf-int4-sym")
GGUF_SCALE = {"gguf-q8-0": (34, 0), "gguf-q4-0": (18, 0), "gguf-q4-k": (144, 0)}  # bytes a block, where its f16 stands


def swapped_nibbles(t: Tensors) -> Tensors:
    """High and low half of each byte exchanged: the two ways to pack 4 bits."""
    q = _bytes(t["qdata"])
    return {"qdata": ((q << 4) | (q >> 4)).view(t["qdata"].dtype)}


def dropped_scales(t: Tensors) -> Tensors:
    """Scales not found under the expected name, and ones taken."""
    return {name: torch.ones_like(v.float()).to(v.dtype) for name, v in t.items() if name in SCALES}


def inverted_scales(t: Tensors) -> Tensors:
    """Scales that divide, taken for scales that multiply (`scale_inv`)."""
    return {name: (1 / v.float()).to(v.dtype) for name, v in t.items() if name in SCALES[:2]}


def wrong_scale_dtype(t: Tensors) -> Tensors:
    """The bits of scales read as another dtype of the same width."""
    made: Tensors = {}
    for name, v in t.items():
        if name not in SCALES:
            continue
        if v.dtype == torch.bfloat16:
            made[name] = v.contiguous().view(torch.float16).to(torch.bfloat16)
        elif v.dtype == torch.float16:
            made[name] = v.contiguous().view(torch.bfloat16).to(torch.float16)
        elif v.dtype == torch.float32:  # its upper half as float16, as a reader of 2-byte scales sees it
            made[name] = v.reshape(-1).contiguous().view(torch.float16)[1::2].float().reshape(v.shape)
        else:  # float8 as the numbers of its bytes
            made[name] = (v.contiguous().view(torch.uint8).float()).to(v.dtype)
    return made


def shuffled_rows(t: Tensors) -> Tensors:
    """Rows in another order than the scales: the halves exchanged, as between two layouts of one model."""
    q = t["qdata"]
    return {"qdata": torch.cat([q[len(q) // 2 :], q[: len(q) // 2]]).contiguous()}


def nan_scale(t: Tensors) -> Tensors:
    """One scale of each layer is nan: an overflow when the file was made."""
    made: Tensors = {}
    for name in SCALES:
        if name in t and t[name].dtype.itemsize > 1:
            flat = t[name].clone().reshape(-1)
            flat[len(flat) // 2] = float("nan")
            made[name] = flat.reshape(t[name].shape)
    return made


def wrong_sign(t: Tensors) -> Tensors:
    """Signed codes read as unsigned with an offset, or the other way."""
    q = _bytes(t["qdata"])
    return {"qdata": (q ^ 0x80).view(t["qdata"].dtype)}


def dropped_zero_points(t: Tensors) -> Tensors:
    """Zero points not found, and zeros taken."""
    return {name: torch.zeros_like(v) for name, v in t.items() if name in ("zero_point", "shift")}


def transposed(t: Tensors) -> Tensors:
    """(N, K) taken for (K, N), which shows nowhere in square layers."""
    q = t["qdata"]
    return {"qdata": q.T.contiguous()} if q.dim() == 2 and q.shape[0] == q.shape[1] else {}


def late_bytes(t: Tensors) -> Tensors:
    """Data that begins a few bytes late: a wrong offset in a file."""
    q = _bytes(t["qdata"])
    return {"qdata": q.reshape(-1).roll(-7).reshape(q.shape).view(t["qdata"].dtype)}


BREAKAGES: Mapping[str, Callable[[Tensors], Tensors]] = {
    "swapped nibbles": swapped_nibbles,
    "dropped scales": dropped_scales,
    "inverted scales": inverted_scales,
    "wrong scale dtype": wrong_scale_dtype,
    "shuffled rows": shuffled_rows,
    "nan scale": nan_scale,
    "wrong sign": wrong_sign,
    "dropped zero points": dropped_zero_points,
    "transposed": transposed,
    "late bytes": late_bytes,
}


def fits(breakage: str, format_id: str) -> bool:
    """Whether a mistake can happen to a format at all."""
    if breakage == "swapped nibbles":
        return format_id in PACKED
    if format_id.startswith("gguf-"):  # scales stand between the codes
        return breakage in ("late bytes", "shuffled rows")
    return True


def broken_model(model: Any, breakage: str) -> tuple[Any, int]:
    """A MODEL of the embedded host with every quantized layer broken, and how many those are."""
    layers: dict[str, torch.nn.Module] = {}
    for name, layer in model.transformer.named_modules():
        if not isinstance(layer, QuantizedLinear):
            continue
        weight: QuantizedWeight = layer.quantized_weight
        changed = BREAKAGES[breakage]({n: t.clone() for n, t in weight.tensors.items()})
        if changed:
            layers[name] = QuantizedLinear(weight.with_tensors({**weight.tensors, **changed}), layer.bias).eval()
    return model.with_transformer(with_layers(model.transformer, layers)), len(layers)


def _bytes(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)
