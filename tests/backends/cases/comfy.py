"""Conformance cases of comfy."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from .case import ROUNDING, Case, Library

ANY = {(64, 33): "", (1, 256): "", (5, 34): "", (1, 33): ""}
ROTATED = {(64, 64): "K=64 is not a multiple of 256, the size of a rotation", (33, 256): "", (1, 512): ""}


def tensor(layout: str, **options: Any) -> Library:
    """`QuantizedTensor.from_float`, whose parameters have our names."""

    def make(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        library: Any = pytest.importorskip("comfy_kitchen.tensor")
        made = library.QuantizedTensor.from_float(w, layout, **options)
        fields = {f.name: getattr(made._params, f.name) for f in dataclasses.fields(made._params)}
        tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
        return {"qdata": made._qdata, **tensors}, made.to(torch.float32).dequantize()

    return make


INT8, FP8 = "TensorWiseINT8Layout", "TensorCoreFP8Layout"
W4A4, W4A8 = "TensorCoreConvRotW4A4Layout", "AsymW4A8Int8Layout"
EIGHT: dict[str, Any] = {"native": 0.015, "native_why": "comfy-kitchen quantizes activations to int8 too"}
FOUR: dict[str, Any] = {"native": 0.17, "native_why": "comfy-kitchen quantizes activations to int4 too"}


def rotated(layout: str, size: int = 256, **options: Any) -> Library:
    return tensor(layout, convrot_groupsize=size, **options)


ROW: dict[str, Any] = {"per_channel": True, "convrot": True}
BY_64 = {(64, 96): "K=96 is not a multiple of 64, the size of a rotation", (33, 64): "", (64, 192): ""}
BY_16_GROUP_64 = {
    (64, 24): "K=24 is not a multiple of 16, the size of a rotation",
    (64, 80): "K=80 is not a multiple of 64, the group of ComfyUI's int4 kernel",
    (33, 64): "",
}
CASES: list[Case] = [
    Case("comfy-fp8-e4m3fn", 30, tensor(FP8, dtype=torch.float8_e4m3fn), native=0.0, refused=ANY),
    Case("comfy-fp8-e5m2", 24.5, tensor(FP8, dtype=torch.float8_e5m2), native=0.0, refused=ANY),
    Case("comfy-nvfp4", 19.5, tensor("TensorCoreNVFP4Layout"), native=ROUNDING, refused=ANY),
    Case("comfy-mxfp8", 30, tensor("TensorCoreMXFP8Layout"), native=0.0, refused=ANY),
    Case("comfy-int8", 40.5, tensor(INT8, per_channel=True), refused=ANY, **EIGHT),
    Case("comfy;type=int8;scale=tensor", 37, tensor(INT8), refused=ANY, **EIGHT),
    Case("comfy-int8-convrot", 40.5, rotated(INT8, **ROW), refused=ROTATED, **EIGHT),
    Case("comfy-int8-convrot;convrot-group-size=64", 40.5, rotated(INT8, 64, **ROW), refused=BY_64, **EIGHT),
    Case("comfy-w4a4-convrot", 16.5, rotated(W4A4), refused=ROTATED, **FOUR),
    Case("comfy-w4a4-convrot;convrot-group-size=16", 16.5, rotated(W4A4, 16), refused=BY_16_GROUP_64, **FOUR),
    Case("comfy-w4a8", 21.5, rotated(W4A8), refused=ROTATED, **EIGHT),
    Case("comfy-w4a8;convrot-group-size=64", 21.5, rotated(W4A8, 64), refused=BY_64, **EIGHT),
]
