"""The weights of a MODEL of the embedded host under the names that ComfyUI has for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...quantizers.compat.find import find_carriers
from ...quantizers.errors import SpecError, WeightError
from ...quantizers.files.layouts.diffusers import diffusers_to_comfyui
from ...quantizers.files.layouts.target import Target, assemble
from ...quantizers.files.model_saving import ModelTensors
from ...quantizers.files.quantized_file import Value
from ...quantizers.meta import TensorMeta
from ...quantizers.weight import QuantizedLinear, QuantizedWeight
from .lora import LoraLinear, merge_loras
from .models import FAMILY, DiffusionModel


def saved_tensors(model: Any) -> ModelTensors:
    """What a file of the model would hold.

    diffusers keeps as several layers what ComfyUI has as one. Their rows are put below one another. Where the format
    cannot hold that, such as one scale for all of a weight and another one for each layer, names stay diffusers'.

    Raises:
        SpecError: no model, a LoRA beside a quantized layer, or layers of a library, which are not read here.
    """
    if not isinstance(model, DiffusionModel):
        raise SpecError(f"SaveQuantized takes a MODEL, got {type(model).__name__}.")
    values = _values(merge_loras(model))
    metas = {name: TensorMeta(name, _shape(v), _dtype(v)) for name, v in values.items()}
    title = f"{model.source}, {FAMILY}"
    tensors: dict[str, Value] = {}
    for target in diffusers_to_comfyui(FAMILY, metas):
        made = _joined(target, values)
        if isinstance(made, str):
            warning = (
                f"names are those of diffusers: {made} LoadQuantized opens the file; ComfyUI's own loaders and other "
                "packs that expect ComfyUI's names do not"
            )
            return ModelTensors(values, title, FAMILY, warnings=(warning,))
        tensors[target.name] = made
    return ModelTensors(tensors, title, FAMILY)


def _joined(target: Target, values: Mapping[str, Value]) -> Value | str:
    """The target, or why it cannot be made."""
    formats = {v.format_id if isinstance(v := values[p.source], QuantizedWeight) else "" for p in target.pieces}
    try:
        made = assemble(target, values.__getitem__)
    except WeightError as err:
        return f"'{target.name}' cannot be made of {len(target.pieces)} layers ({' '.join(str(err).split())})."
    if isinstance(made, QuantizedWeight) and {made.format_id} != formats:
        return f"'{target.name}' of {len(target.pieces)} layers in {formats.pop()} would be {made.format_id}."
    return made


def _values(model: DiffusionModel) -> dict[str, Value]:
    """Parameters by diffusers' names, those of quantized layers as their weights."""
    values: dict[str, Value] = {}
    quantized: list[str] = []
    for name, module in model.transformer.named_modules():
        if isinstance(module, LoraLinear):
            raise SpecError(
                f"'{name}': a LoRA stands beside this layer, which is quantized, and a file of weights has no place "
                "for it.\nSave the model before LoraLoaderModelOnly, or set lora to requantize in QuantizeModel."
            )
        if isinstance(module, QuantizedLinear):
            values[f"{name}.weight"] = module.quantized_weight
            quantized.append(f"{name}.")
            if module.bias is not None:
                values[f"{name}.bias"] = module.bias.detach()
    _refuse_libraries(model.transformer)
    for name, parameter in model.transformer.named_parameters():
        if not name.startswith(tuple(quantized)):
            values[name] = parameter.detach()
    return values


def _refuse_libraries(module: nn.Module) -> None:
    other = next((f for f in find_carriers(module) if f.carrier.value != "quantwire"), None)
    if other is not None:
        raise SpecError(
            f"'{other.name}': a layer of a library ({other.kind}, {other.format_id}), which is not read here.\n"
            "Quantize with carrier quantwire, and save that."
        )


def _shape(value: Value) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else value.orig_shape


def _dtype(value: Value) -> Any:
    return value.dtype if isinstance(value, Tensor) else value.orig_dtype
