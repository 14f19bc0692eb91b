"""Scaled fp8, which ComfyUI read before there was `comfy_quant`, and still reads.

A tensor `scaled_fp8` marks the file, in the dtype of the weights; each layer has `X.weight` and `X.scale_weight`, which
multiplies. A marker of two elements asks for products at full precision. Without it such hosts quantize activations
with a scale of 1, for want of a measured one, and values beyond 448 are lost. Source: Comfy-Org/ComfyUI comfy/ops.py
`scaled_fp8_ops` and comfy/model_detection.py, as they were then; comfy/utils.py `convert_old_quants` at 0.33.0, which
takes every such weight for e4m3fn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ...weight import QuantizedWeight
from ..layer_rows import INPUT_SCALE
from .layout import Layout, module_of

FORMAT = "comfy-fp8-e4m3fn"
MARKER = "scaled_fp8"


class ScaledFp8Writer(Layout):
    id = "scaled-fp8"
    title = "scaled fp8, for older hosts"
    formats = (FORMAT,)
    beside_layers = MappingProxyType({INPUT_SCALE: "scale_input"})

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        scale = weight.tensors["scale"].to(torch.float32).reshape(())
        return {name: weight.tensors["qdata"], f"{module_of(name)}.scale_weight": scale}

    def once(self, notes: Mapping[str, Any]) -> dict[str, Tensor]:
        return {MARKER: torch.zeros(2).to(torch.float8_e4m3fn)}

    def doubts(self, plain: Sequence[str]) -> list[str]:
        """What a reader should know of the linear weights that are kept at full precision."""
        if not plain:
            return []
        more = f" and {len(plain) - 1} more" if len(plain) > 1 else ""
        return [
            f"'{plain[0]}'{more} stay at full precision; hosts that do not know `comfy_quant` cast every linear weight "
            "of such a file to fp8 when they load it, without a scale"
        ]
