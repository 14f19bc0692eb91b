"""How sdnq's stored weights come back block by block, where their storage has one of the shared forms.

Those are 8-bit and 4-bit types, with or without groups and SVD. Other widths are packed across bytes, and a Hadamard
rotation needs whole groups of columns after scaling: the library's own dequantizer restores these.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...formats.sdnq import bits_of
from ...kernels import forms
from ...kernels.expand import Expansion
from ...weight import QuantizedWeight
from .library import dequantizer_of

CODES = torch.arange(16, dtype=torch.uint8, device="cpu")
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def form_of(q: QuantizedWeight) -> Expansion | None:
    """None where the library must dequantize."""
    n, k = q.orig_shape
    # Not that of the format id: `dynamic` may have chosen another type for this weight.
    weights_dtype = str(q.meta["weights_dtype"])
    bits = bits_of(weights_dtype.replace("_", "-"))
    qdata = q.tensors["qdata"]
    if q.meta["use_hadamard"] or q.meta["use_quantized_matmul"]:
        return None
    scale = q.tensors["scale"].reshape(n, -1)
    zero_point: Tensor | None = q.tensors.get("zero_point")
    shift = None if zero_point is None else zero_point.reshape(n, -1)
    if bits == 4 and qdata.dtype is torch.uint8 and not k % 2 and qdata.numel() == n * k // 2:
        table = forms.pairs(_values(weights_dtype, shift is not None).to(qdata.device), "low first")
        base = forms.nibbles(qdata.view(n, k // 2), table, scale, shift)
    elif weights_dtype in ("int8", "uint8") and qdata.dtype in (torch.int8, torch.uint8):
        base = forms.integers(qdata.reshape(n, k), scale, shift)
    elif bits == 8 and qdata.dtype in FLOAT8 and shift is None:
        base = forms.float8(qdata.reshape(n, k), scale)
    else:
        return None
    return _with_svd(base, q) if "svd_up" in q.tensors else base


def _with_svd(base: Expansion, q: QuantizedWeight) -> Expansion:
    up, down = q.tensors["svd_up"].to(torch.float32), q.tensors["svd_down"].to(torch.float32)

    def fill(out: Tensor, start: int, stop: int) -> None:
        base.fill(out, start, stop)
        out.addmm_(up[start:stop], down)

    return Expansion(base.shape, base.device, fill)


@torch.compiler.assume_constant_result  # pyright: ignore[reportUnknownMemberType]
@functools.cache
def _values(weights_dtype: str, unsigned: bool) -> Tensor:
    """(16,) float32: what each 4-bit code of a type stands for, by the library's own dequantizer with scale 1."""
    meta: dict[str, Any] = {
        "weights_dtype": weights_dtype,
        "quantized_matmul_dtype": "int8",
        "group_size": -1,
        "hadamard_group_size": 256,
        "svd_rank": 32,
        "svd_steps": 8,
        "use_quantized_matmul": False,
        "re_quantize_for_matmul": False,
        "use_hadamard": False,
        "quantized_weight_shape": [1, 16],
        "quantized_scale_shape": [1, 1],
        "quantized_zero_point_shape": [1, 1] if unsigned else None,
        "result_shape": None,
    }
    packed = CODES[::2] | CODES[1::2] << 4
    weight = QuantizedWeight("sdnq-uint4", {}, (1, 16), torch.float32, meta)
    theirs: dict[str, Tensor] = {"weight": packed, "scale": torch.ones(1, 1, device="cpu")}
    if unsigned:
        theirs["zero_point"] = torch.zeros(1, 1, device="cpu")
    values: Tensor = dequantizer_of(weight)(**theirs, dtype=torch.float32, skip_compile=True)
    return values.reshape(16)
