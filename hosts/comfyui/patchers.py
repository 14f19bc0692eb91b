"""New ModelPatchers around a copy of a model tree, so that a node never changes its input.

The copy has modules and parameters of its own; the unchanged parameters share their storage with the original until one
of the two models moves. Sharing the parameter objects too would not do: `module.to(device)` replaces their data in
place, and each patcher would move the other's weights.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..modules import with_layers
from .errors import explain_sampling
from .linear import attach_exact_patches, twin

# What a patcher keeps on the model object about its own state; the copy starts without.
_RUNTIME_STATE = (
    "model_loaded_weight_memory",
    "lowvram_patch_counter",
    "model_lowvram",
    "current_weight_patches_uuid",
    "model_offload_buffer_memory",
    "dynamic_vbars",
    "dynamic_pins",
    "dynamic_patchers",
)
_CALLBACK_KEY = "quantwire"


def replace_layers(patcher: Any, layers: Mapping[str, nn.Module]) -> Any:
    """A clone of a ModelPatcher, patches and options included, whose model has the named layers replaced.

    Args:
        patcher: any ModelPatcher of the host; not changed.
        layers: dotted name from the patched model -> new layer.
    """
    from comfy.patcher_extension import CallbacksMP

    model: Any = with_layers(patcher.model, layers)
    fresh = {id(layer) for layer in layers.values()}
    for module in model.modules():
        if id(module) in fresh:
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach(), requires_grad=False)
        _forget_patches(module)
    for name in _RUNTIME_STATE:
        model.__dict__.pop(name, None)
    if hasattr(model, "current_patcher"):
        model.current_patcher = None
    model.to(patcher.offload_device)
    model.device = patcher.offload_device
    clone = patcher.clone(model_override=(model, ({}, {}, {}, set())))
    clone.size = 0  # clone() copied the size of the full-precision model
    clone.parent = None
    clone.clone_base_uuid = uuid.uuid4()
    clone.cached_patcher_init = None
    if patcher.cached_patcher_init is not None and all(hasattr(layer, "adopt") for layer in layers.values()):
        clone.cached_patcher_init = (remake, (patcher.cached_patcher_init, dict(layers)))
    clone.remove_callbacks_with_key(CallbacksMP.ON_LOAD, _CALLBACK_KEY)
    clone.add_callback_with_key(CallbacksMP.ON_LOAD, _CALLBACK_KEY, attach_exact_patches)
    if not all(hasattr(layer, "adopt") for layer in layers.values()):  # layers of libraries are among them
        explain_sampling(clone)
    return clone


def _forget_patches(module: Any) -> None:
    """Undo what loading left on a layer of the host: offload patches belong to the original's patcher."""
    if hasattr(module, "weight_function"):
        module.weight_function, module.bias_function = [], []
    if hasattr(module, "prev_comfy_cast_weights"):
        module.comfy_cast_weights = module.prev_comfy_cast_weights
        del module.prev_comfy_cast_weights
    for name in ("comfy_patched_weights", "_v", "_prefetch", "weight_lowvram_function", "bias_lowvram_function"):
        module.__dict__.pop(name, None)


def unpatched(patcher: Any) -> Any:
    """The patcher, its weights as they were before any LoRA: a model that is loaded with patches is unloaded first."""
    import comfy.model_management

    if patcher.backup:
        comfy.model_management.unload_model_and_clones(patcher)
    return patcher


def remake(source: tuple[Any, ...], layers: Mapping[str, nn.Module], disable_dynamic: bool = False) -> Any:
    """For `cached_patcher_init`: the model anew from its source, with new layers on the same quantized weights."""
    function, args, *index = source
    made = function(*args, disable_dynamic=disable_dynamic)
    fresh = made[index[0]] if index else made
    return replace_layers(getattr(fresh, "patcher", fresh), {name: twin(layer) for name, layer in layers.items()})
