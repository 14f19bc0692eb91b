"""OffloadCompat's guard on the objects of ComfyUI: the check once more, when the host loads and runs the model.

It is put on a clone, as wrappers and callbacks of the host's ModelPatcher under one key. Every node that clones the
model object (LoRAs, model sampling, torch.compile, the pack's own) hands them on, and a second OffloadCompat replaces
those of the first.

A MODEL is checked twice: before the host loads it, for what it is about to do, and after, for what it did; what the
libraries raise nevertheless is explained. Text encoders and VAEs have no wrappers in the host; they are checked when
they have been loaded, before they run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ...quantizers.errors import SpecError
from . import memory
from .errors import explain_sampling

if TYPE_CHECKING:
    from torch import nn

    from ...quantizers.compat.guard import Guard

KEY = "quantwire_guard"
Components = Mapping[str, "nn.Module"]


def guarded(obj: Any, guard: Guard) -> Any:
    """A clone of a MODEL, CLIP, VAE or CONTROL_NET under a guard; the input is not changed.

    Raises:
        SpecError: another object.
    """
    if hasattr(obj, "cond_stage_model"):
        clone = obj.clone()
        _watch_loading(clone.patcher, guard, lambda model: dict(model.named_children()))
    elif hasattr(obj, "first_stage_model"):
        clone = copy.copy(obj)
        clone.patcher = obj.patcher.clone()
        _watch_loading(clone.patcher, guard, lambda model: {"vae": model})
    elif hasattr(obj, "control_model_wrapped"):
        clone = obj.copy()
        clone.control_model_wrapped = obj.control_model_wrapped.clone()
        _watch_loading(clone.control_model_wrapped, guard, lambda model: {"control_model": model})
    elif hasattr(obj, "add_wrapper_with_key") and hasattr(getattr(obj, "model", None), "diffusion_model"):
        clone = obj.clone()
        _watch_sampling(clone, guard)
    else:
        raise SpecError(f"ComfyUI does not run a {type(obj).__name__} itself.")
    return clone


def _watch_loading(patcher: Any, guard: Guard, components: Callable[[Any], Components]) -> None:
    from comfy.patcher_extension import CallbacksMP

    def loaded(patcher: Any, *_: Any) -> None:
        # The host takes the model off the device again when this raises (ModelPatcher.partially_load).
        guard(components(patcher.model), *memory.done(patcher), memory.space_for(patcher))

    patcher.remove_callbacks_with_key(CallbacksMP.ON_LOAD, KEY)
    patcher.add_callback_with_key(CallbacksMP.ON_LOAD, KEY, loaded)


def _watch_sampling(patcher: Any, guard: Guard) -> None:
    from comfy.patcher_extension import WrappersMP

    def prepare(executor: Any, model: Any, noise_shape: Any, conds: Any, *args: Any, **kwargs: Any) -> Any:
        """Around the host's loading: `model` is the clone that is sampled with, whoever made it."""
        needed = _needed(model, noise_shape, conds)
        space = memory.space_for(model, needed)
        if not kwargs.get("force_full_load"):
            guard(_diffusion(model), *memory.forecast(model, needed), space)
        result = executor(model, noise_shape, conds, *args, **kwargs)
        guard(_diffusion(model), *memory.done(model), space)
        for other in result[2]:  # ControlNets and what else the conditioning brings
            if hasattr(other, "model") and hasattr(other.model, "model_lowvram"):
                guard({type(other.model).__name__: other.model}, *memory.done(other))
        return result

    patcher.remove_wrappers_with_key(WrappersMP.PREPARE_SAMPLING, KEY)
    patcher.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, prepare)
    explain_sampling(patcher)


def _diffusion(patcher: Any) -> Components:
    return {"diffusion_model": patcher.model.diffusion_model}


def _needed(patcher: Any, noise_shape: Any, conds: Any) -> int:
    """Bytes that a step takes at least, as the host estimates them (comfy.sampler_helpers)."""
    from comfy.sampler_helpers import estimate_memory

    return int(estimate_memory(patcher, noise_shape, conds)[1])
