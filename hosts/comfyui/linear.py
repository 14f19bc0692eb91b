"""A linear layer of the host's own kind on our quantized weights.

It is a subclass of the host's mixed-precision Linear, so partial load, `--novram`, dynamic VRAM, pinning, torch.compile
and ModelSave treat it as they treat a native quantized layer. It adds two things: LoRAs stay exact, and saving names
the format.

A LoRA on a fully loaded layer: the host dequantizes, adds, and quantizes again, which at 4 bits loses up to half of the
LoRA's effect. Here the quantized weight stays as it is, and the patch is applied in floating point when the layer
computes, as the host itself does for offloaded layers. `lora="requantize"` gives the host's way. Adding the LoRA beside
the quantized product was tried for the formats that quantize activations too and was no closer to the LoRA's effect at
full precision (cosine 0.993 against 0.997 for int8): the changed activations round differently in the next layers.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...quantizers.choices import LoraMode
from ...quantizers.kernels.kept import KeptWeights
from ...quantizers.registry import require_reader
from ...quantizers.weight import QuantizedWeight
from .layouts import algorithm_of, from_quantized_tensor, to_quantized_tensor

# What the host multiplies activations with: a fixed scale before they are quantized, and one for each column.
INPUT_SCALES = ("input_scale", "pre_quant_scale")
FUSED_LAYOUT = "TensorWiseINT8Layout"  # see `_show_patch`


@functools.cache
def operations(compute_dtype: torch.dtype) -> Any:
    """The host's mixed-precision operations with our Linear in them, for one compute dtype."""
    import comfy.ops

    base: Any = comfy.ops.mixed_precision_ops({"mixed_ops": True}, compute_dtype)

    class QuantwireLinear(base.Linear):
        """See the module docstring. `exact_patch` is the LoRA of a fully loaded layer, or None."""

        lora = LoraMode.EXACT
        exact_patch: Any = None
        kept: KeptWeights | None = None

        def adopt(self, weight: QuantizedWeight) -> None:
            """Hold a quantized weight."""
            tensor = to_quantized_tensor(weight)
            self.quant_format, self.layout_type = algorithm_of(weight), tensor._layout_cls
            self._full_precision_mm = self.quant_format in emulated_formats()
            self.weight = nn.Parameter(tensor, requires_grad=False)
            self._drop_kept()

        def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
            tensor = state_dict.get(f"{prefix}weight")
            weight = getattr(tensor, "quantwire_weight", None) or from_quantized_tensor(tensor)
            if weight is None:
                super()._load_from_state_dict(state_dict, prefix, *args)
                self._drop_kept()
                return
            state_dict.pop(f"{prefix}weight")
            self.adopt(weight)
            beside = {name: state_dict.pop(f"{prefix}{name}", None) for name in ("comfy_quant", *INPUT_SCALES)}
            nn.Module._load_from_state_dict(self, state_dict, prefix, *args)
            self._take_beside(beside)
            missing = args[2]
            if f"{prefix}weight" in missing:
                missing.remove(f"{prefix}weight")

        def _take_beside(self, beside: dict[str, Tensor | None]) -> None:
            """What the host's own files hold beside a weight, in force as with the host's own loader."""
            conf = beside.pop("comfy_quant")
            if conf is not None and json.loads(bytes(conf.tolist())).get("full_precision_matrix_mult"):
                self._full_precision_mm = self._full_precision_mm_config = True
            for name, tensor in beside.items():
                if tensor is not None:
                    self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

        def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if getattr(self, "weight_lowvram_function", None) is not None:
                # Dynamic VRAM would requantize after the patch; asking for a plain weight keeps it in float.
                return self._with(super().forward, "_full_precision_mm", True, input)
            if self.exact_patch is None or any(getattr(f, "is_lowvram_patch", False) for f in self.weight_function):
                weight = self._kept_weight(input)
                if weight is not None:
                    bias = None if self.bias is None else self.bias.to(input.dtype)
                    return nn.functional.linear(input, weight, bias)
                return super().forward(input)
            return self._with(super().forward, "weight_function", [*self.weight_function, self.exact_patch], input)

        def _kept_weight(self, input: Tensor) -> Tensor | None:
            """The weight as it was kept, where the layer lies on the device that computes and nothing changes it."""
            if self.kept is None or torch.compiler.is_compiling():
                return None
            if self.weight.device != input.device:
                self._drop_kept()
                return None
            patched = self.exact_patch is not None or self.weight_function or self.bias_function
            if patched or type(input) is not Tensor:
                return None
            q = from_quantized_tensor(self.weight)
            if q is None:
                return None
            return self.kept.get(self, q, input.dtype, lambda: require_reader(q.format_id).dequantize(q, input.dtype))

        def _drop_kept(self) -> None:
            if self.kept is not None:
                self.kept.drop(self)

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            # The host moves single layers when it unloads a part of a model, and tells nobody.
            before = getattr(self.weight, "device", None)
            super()._apply(fn, recurse)
            if self.kept is not None:
                self.kept.moved(self, getattr(self.weight, "device", None) != before)
            return self

        def _with(self, call: Any, name: str, value: Any, input: Tensor) -> Tensor:
            before = getattr(self, name)
            setattr(self, name, value)
            try:
                return call(input)
            finally:
                setattr(self, name, before)

        def set_weight(self, weight: Tensor, inplace_update: bool = False, seed: Any = None, **kwargs: Any) -> Any:
            if self.lora is LoraMode.EXACT and not kwargs.get("return_weight"):
                return None  # `exact_patch` applies it when the layer computes
            result = super().set_weight(weight, inplace_update=inplace_update, seed=seed, **kwargs)
            if not kwargs.get("return_weight"):
                self._drop_kept()
                if inplace_update:
                    self.kept = None  # the host will write the old values back without telling the layer
            return result

        def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", **kwargs: Any) -> Any:
            sd = super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
            weight = from_quantized_tensor(self.weight)
            if weight is not None:
                conf = json.loads(bytes(sd[f"{prefix}comfy_quant"].tolist()))
                conf |= {
                    "format_id": weight.format_id,
                    "orig_shape": list(weight.orig_shape),
                    "meta": dict(weight.meta),
                }
                sd[f"{prefix}comfy_quant"] = torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)
            return sd

    class Operations(base):
        Linear = QuantwireLinear

    return Operations


def emulated_formats() -> set[str]:
    """Native formats that the compute device cannot multiply: their weights are dequantized for the product."""
    import comfy.model_management as mm

    device = mm.get_torch_device()
    able = {
        "nvfp4": mm.supports_nvfp4_compute,
        "mxfp8": mm.supports_mxfp8_compute,
        "float8_e4m3fn": mm.supports_fp8_compute,
        "float8_e5m2": mm.supports_fp8_compute,
    }
    return {name for name, check in able.items() if not check(device)}


def make_linear(weight: QuantizedWeight, bias: Tensor | None, lora: LoraMode = LoraMode.EXACT) -> nn.Module:
    """A host layer on a quantized weight, on the device of the weight."""
    layer: Any = operations(weight.orig_dtype).Linear(
        weight.orig_shape[1], weight.orig_shape[0], bias=False, device="meta", dtype=weight.orig_dtype
    )
    layer.adopt(weight)
    layer.lora = lora
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer


def twin(layer: Any) -> nn.Module:
    """A new layer on the same quantized tensors."""
    copy = type(layer)(layer.in_features, layer.out_features, bias=False, device="meta")
    copy.quant_format, copy.layout_type, copy.lora = layer.quant_format, layer.layout_type, layer.lora
    copy._full_precision_mm = layer._full_precision_mm
    copy._full_precision_mm_config = layer._full_precision_mm_config
    for name in INPUT_SCALES:
        if getattr(layer, name, None) is not None:
            copy.register_parameter(name, nn.Parameter(getattr(layer, name).detach(), requires_grad=False))
    copy.weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
    if layer.bias is not None:
        copy.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return copy


def attach_exact_patches(patcher: Any, *_: Any) -> None:
    """ON_LOAD callback of the host's patcher: give every fully loaded quantized layer the LoRA patches on its weight.

    Runs after each load, of any clone that shares the model, so a layer never keeps the patches of another clone.
    """
    from comfy.model_patcher import LowVramPatch

    for name, module in patcher.model.named_modules():
        if getattr(module, "lora", None) is LoraMode.EXACT and hasattr(module, "exact_patch"):
            key = f"{name}.weight"
            module.exact_patch = LowVramPatch(key, patcher.patches) if key in patcher.patches else None
            _show_patch(module)


def _show_patch(layer: Any) -> None:
    """Let host code that multiplies with the weight itself, past the layer's `forward`, see its exact patch.

    Wan's and LTX-Video's feed-forward does so for int8 (`comfy.ops.linear_input_act`), where it casts the weight by the
    functions on the layer.
    """
    functions = [f for f in layer.weight_function if f is not getattr(layer.weight_function, "exact", None)]
    if getattr(layer, "layout_type", None) != FUSED_LAYOUT or layer.exact_patch is None:
        if isinstance(layer.weight_function, _WithExact):
            layer.weight_function = functions
        return
    layer.weight_function = _WithExact(functions, layer.exact_patch)


class _WithExact(list[Any]):
    """Functions of a layer's weight, followed by its exact patch until the host adds the same one for offloading."""

    def __init__(self, functions: list[Any], exact: Any) -> None:
        super().__init__(functions)
        self.exact = exact

    def _all(self) -> list[Any]:
        own = list(super().__iter__())
        return own if any(getattr(f, "is_lowvram_patch", False) for f in own) else [*own, self.exact]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())
