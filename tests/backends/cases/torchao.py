"""Conformance cases of torchao."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, Library


def quantized(config: str, group_size: int | None = None) -> Library:
    """`torchao.quantize_` on one linear layer."""

    def make(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        pytest.importorskip("torchao")
        from torchao import quantization

        granularity = quantization.PerGroup(group_size) if group_size else quantization.PerRow()
        linear = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
        linear.load_state_dict({"weight": w})
        options = {"granularity": granularity, "set_inductor_config": False}  # the second is for the whole process
        quantization.quantize_(linear, getattr(quantization, config)(**options))
        weight: Any = linear.weight
        return {"qdata": weight.qdata, "scale": weight.scale}, weight.dequantize(torch.float32)

    return make


def int4(group_size: int) -> Library:
    """`Int4OpaqueTensor`. Its bytes are in the order of this machine's kernel; multiplying the identity by them, with
    scales of 1 and zero points of 0, gives the values in row order. The class has no dequantize, the library does."""

    def make(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        pytest.importorskip("torchao")
        from torchao.prototype.quantization.int4 import Int4OpaqueTensor
        from torchao.quantization.quant_primitives import _dequantize_affine_tinygemm

        weight = Int4OpaqueTensor.from_hp(w.contiguous(), [1, group_size])
        scale, zero_point = (part.t().contiguous() for part in weight.scale_and_zero.unbind(-1))
        unit = torch.stack([torch.ones_like(scale.t()), torch.zeros_like(scale.t())], -1)
        plain = Int4OpaqueTensor(weight.qdata, unit, [1, group_size], weight.shape)
        values = F.linear(torch.eye(w.shape[1], dtype=w.dtype), plain).t().to(torch.int32) + 8
        restored = _dequantize_affine_tinygemm(values, (1, group_size), scale, zero_point, torch.int32, 0, 15)
        packed = (values[:, ::2] * 16 + values[:, 1::2]).to(torch.uint8)
        return {"qdata": packed, "scale": scale, "zero_point": zero_point}, restored

    return make


INT8, FLOAT8 = "Int8WeightOnlyConfig", "Float8WeightOnlyConfig"
SCALED_LATE = "the library multiplies by the integers and rounds before it applies the scale"
ROUNDED = "the library rounds the dequantized weight to its original dtype first"
UNROUNDED = "torch's int4 kernel does not round the dequantized weight to the dtype of the activations"

CASES: list[Case] = [
    Case(
        "torchao-int8wo", 42, quantized(INT8), native=0.006, native_why=SCALED_LATE, refused={(3, 33): "", (1, 34): ""}
    ),
    Case(
        "torchao-int8wo;group-size=32",
        43.5,
        quantized(INT8, 32),
        native=0.006,
        native_why=ROUNDED,
        refused={(4, 33): "K=33 is not a multiple of group-size 32", (33, 64): ""},
    ),
    Case(
        "torchao-int8dyn",
        42,
        quantized("Int8DynamicActivationInt8WeightConfig"),
        product=0.02,
        native=0.006,
        native_why="the library rounds to the dtype of the activations between the two scales",
        refused={(3, 33): "", (1, 34): ""},
    ),
    Case(
        "torchao-int4wo",
        18.6,
        int4(128),
        native=0.006,
        native_why=UNROUNDED,
        refused={
            (32, 96): "K=96 is not a multiple of group-size 128",
            (33, 128): "N=33 is not a multiple of 16, which torch's int4 product needs",
            (4096, 128): "",
        },
    ),
    Case(
        "torchao-int4wo;group-size=32",
        20.9,
        int4(32),
        native=0.006,
        native_why=UNROUNDED,
        refused={(16, 32): ""},
    ),
    Case(
        "torchao-float8wo",
        30.5,
        quantized(FLOAT8),
        native=0.006,
        native_why=ROUNDED,
        refused={(3, 33): "", (1, 34): ""},
    ),
    Case(
        "torchao-float8wo;group-size=64",
        31,
        quantized(FLOAT8, 64),
        native=0.006,
        native_why=ROUNDED,
        refused={(4, 33): "K=33 is not a multiple of group-size 64"},
    ),
]
