"""The weights of a MODEL of ComfyUI as a file would hold them: without prefix, with its LoRAs merged."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ...quantizers.backends.comfy import FORMATS
from ...quantizers.compat.find import find_carriers
from ...quantizers.compat.modes import Carrier
from ...quantizers.errors import FileError, SpecError
from ...quantizers.files.architectures import recognise
from ...quantizers.files.model_saving import ModelTensors
from ...quantizers.files.quantized_file import Value
from ...quantizers.meta import TensorMeta
from ...quantizers.weight import QuantizedLinear, QuantizedWeight
from . import patchers
from .layouts import from_quantized_tensor

PREFIX = "diffusion_model."


def saved_tensors(model: Any) -> ModelTensors:
    """What a file of the model would hold.

    LoRAs and other patches of weights are merged, as ComfyUI's ModelSave does it: a quantized layer is dequantized,
    patched, and quantized again.

    Raises:
        SpecError: no model, patches that are no part of the weights, or layers of a library, which are not read here.
    """
    if not hasattr(getattr(model, "model", None), "diffusion_model"):
        raise SpecError(f"SaveQuantized takes a MODEL, got {type(model).__name__}.")
    _refuse_schedules(model)
    patcher = patchers.unpatched(model)
    _refuse_libraries(patcher.model.diffusion_model)
    tensors: dict[str, Value] = {}
    merged = 0
    for name, value in _parameters(patcher.model.diffusion_model):
        if PREFIX + name in patcher.patches:
            value = patcher.patch_weight_to_device(PREFIX + name, patcher.load_device, return_weight=True)
            merged += 1
        tensors[name] = _value(name, value)
    if merged < len(patcher.patches):
        other = next(k for k in patcher.patches if k.removeprefix(PREFIX) not in tensors)
        raise SpecError(f"'{other}': a patch of what is no weight of the diffusion model, which no file holds.")
    notes = (f"{merged} weights with LoRAs or other patches, merged",) if merged else ()
    title = type(patcher.model.model_config).__name__
    return ModelTensors(tensors, title, _family(tensors), notes)


def _parameters(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Parameters and the buffers that are saved; of one of our layers its weight as a whole."""
    for name, layer in module.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(layer, QuantizedLinear):
            yield f"{prefix}weight", layer.quantized_weight
            if layer.bias is not None:
                yield f"{prefix}bias", layer.bias
            continue
        kept = {k: b for k, b in layer._buffers.items() if k not in layer._non_persistent_buffers_set}
        for leaf, value in (*layer._parameters.items(), *kept.items()):
            if value is not None:
                yield prefix + leaf, value


def _value(name: str, value: Any) -> Value:
    value = getattr(value, "data", value)
    if isinstance(value, QuantizedWeight):
        return value
    weight = from_quantized_tensor(value)
    if weight is not None:
        return weight
    if not hasattr(value, "_qdata"):
        return value.detach()
    return _native(name, value)


def _native(name: str, tensor: Any) -> QuantizedWeight:
    """A weight of the host's own.

    Raises:
        SpecError: in a layout that is none of ours.
    """
    from comfy.quant_ops import QUANT_ALGOS

    params = tensor._params
    dtype = str(tensor._qdata.dtype).removeprefix("torch.")
    algorithms = {a for a, known in QUANT_ALGOS.items() if known["comfy_tensor_layout"] == tensor._layout_cls}
    if len(algorithms) > 1:  # one layout for both kinds of float8
        algorithms &= {dtype}
    rotated = bool(getattr(params, "convrot", True))
    found = [f for f, native in FORMATS.items() if native.algo in algorithms]
    found = [f for f in found if FORMATS[f].rotated == rotated] if len(found) > 1 else found
    if len(found) != 1:
        raise SpecError(f"'{name}': ComfyUI's layout {tensor._layout_cls} ({dtype}) is none that is known here.")
    tensors: dict[str, Tensor] = {"qdata": tensor._qdata}
    meta: dict[str, Any] = {}
    for entry in dataclasses.fields(params):
        value = getattr(params, entry.name)
        if isinstance(value, Tensor):
            tensors[entry.name] = value
        elif entry.name not in ("orig_dtype", "orig_shape") and value is not None:
            meta[entry.name] = value
    return QuantizedWeight(found[0], tensors, tuple(params.orig_shape), params.orig_dtype, meta)


def _refuse_schedules(patcher: Any) -> None:
    for attribute, what in (("hook_patches", "LoRAs that hooks switch"), ("weight_wrapper_patches", "wrapped weights")):
        if getattr(patcher, attribute, None):
            raise SpecError(f"The model has {what}, which a file cannot hold.\nSave the model before they are added.")


def _refuse_libraries(module: nn.Module) -> None:
    other = next((f for f in find_carriers(module) if f.carrier is Carrier.LIBRARY), None)
    if other is not None:
        raise SpecError(
            f"'{other.name}': a layer of a library ({other.kind}, {other.format_id}), which is not read here.\n"
            "Quantize with carrier quantwire, and save that."
        )


def _family(tensors: dict[str, Value]) -> str:
    try:
        found = recognise({name: _meta(name, value) for name, value in tensors.items()})
    except FileError:
        return ""
    return found.architecture if found is not None else ""


def _meta(name: str, value: Value) -> TensorMeta:
    if isinstance(value, Tensor):
        return TensorMeta(name, tuple(value.shape), value.dtype)
    return TensorMeta(name, value.orig_shape, value.orig_dtype)
