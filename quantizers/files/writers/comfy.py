"""ComfyUI's own quantized files, which its UNETLoader, CLIPLoader and CheckpointLoader open without a pack.

Per layer `X.weight` and its scales, named as comfy-kitchen's `QuantizedTensor.state_dict` names them, and the format in
one of two forms: `X.comfy_quant`, the bytes of a JSON object, or all of these objects together in the file's metadata
under `_quantization_metadata`. Source: Comfy-Org/ComfyUI comfy/ops.py `_quantized_weight_state_dict` and comfy/utils.py
`convert_old_quants` at 0.33.0.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor

from ...registry import format_ids, get_entry, get_quantizer
from ...weight import QuantizedWeight
from ..layer_rows import FULL_PRECISION, INPUT_SCALE, PRE_QUANT_SCALE
from ..schemes.comfy_parts import SHAPE
from .layout import Layout, module_of

BACKEND = "comfy"
METADATA_KEY = "_quantization_metadata"
# What ComfyUI's file says beside the format, by its name of it.
_SAID = {
    "int8_tensorwise": ("convrot", "convrot_groupsize"),
    "convrot_w4a4": ("convrot_groupsize",),
    "asym_w4a8_int8": ("group_size", "convrot_groupsize"),
}


_PER_ELEMENT = {"comfy-nvfp4": 2, "comfy-mxfp8": 1}  # values in an element, of the formats that pad


def _stored_shape(weight: QuantizedWeight) -> tuple[int, int]:
    rows, columns = weight.tensors["qdata"].shape
    return rows, columns * _PER_ELEMENT[weight.format_id]


class ComfyWriter(Layout):
    """`X.comfy_quant` beside each layer."""

    id = "comfy"
    title = "ComfyUI's own files, comfy_quant tensors"
    formats = tuple(f for f in format_ids() if get_entry(f).backend == BACKEND)
    beside_layers = MappingProxyType({INPUT_SCALE: "input_scale", PRE_QUANT_SCALE: "pre_quant_scale"})

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        raw = json.dumps(self.note(name, weight)).encode()
        quant = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        return native_tensors(name, weight) | {f"{module_of(name)}.comfy_quant": quant}

    def note(self, name: str, weight: QuantizedWeight) -> dict[str, Any]:
        """ComfyUI's `comfy_quant` object."""
        native: Any = cast(Any, get_quantizer(weight.format_id)).native
        said = _SAID.get(native.algo, ()) if native.rotated else ()
        found: dict[str, Any] = {"format": native.algo, **{key: weight.meta[key] for key in said if key in weight.meta}}
        if weight.format_id in _PER_ELEMENT and _stored_shape(weight) != weight.orig_shape:
            found[SHAPE] = list(weight.orig_shape)  # ComfyUI knows it from its model, a converter from nothing else
        return found | ({FULL_PRECISION: True} if weight.meta.get(FULL_PRECISION) else {})


class ComfyMetadataWriter(ComfyWriter):
    """All `comfy_quant` objects in the file's metadata, as ModelOpt's and some older files have them."""

    id = "comfy-metadata"
    title = "ComfyUI's own files, _quantization_metadata"

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        return native_tensors(name, weight)

    def metadata(self, notes: Mapping[str, Any]) -> dict[str, str]:
        layers = {module_of(name): note for name, note in notes.items()}
        return {METADATA_KEY: json.dumps({"format_version": "1.0", "layers": layers})}


def native_tensors(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of a comfy weight `X.weight` by comfy-kitchen's own names; views of the weight's."""
    quantizer: Any = get_quantizer(weight.format_id)
    library = importlib.import_module("comfy_kitchen.tensor")
    if FULL_PRECISION in weight.meta:  # of the layer, no parameter of the library's
        meta = {key: value for key, value in weight.meta.items() if key != FULL_PRECISION}
        weight = dataclasses.replace(weight, meta=meta)
    params = quantizer.params(weight, weight.orig_dtype)
    made = library.QuantizedTensor(weight.tensors["qdata"], quantizer.native.layout, params)
    return dict(made.state_dict(name))
