"""Nodes about OffloadCompat's guard: change the host's memory mode in mid-graph, and count guards.

On a CPU the host loads whole models whatever its memory mode says. It asks `is_device_cpu` for that; told that its
device is none, it follows its mode with the same code as on a GPU.
"""

from __future__ import annotations

import json

_BEFORE = []


def set_state(state, reserve_gib=0):
    import comfy.model_management as mm

    if not _BEFORE:
        _BEFORE.extend((mm.vram_state, mm.is_device_cpu, mm.EXTRA_RESERVED_VRAM))
    mm.unload_all_models()
    if state == "restore":
        mm.vram_state, mm.is_device_cpu, mm.EXTRA_RESERVED_VRAM = _BEFORE
        return
    mm.vram_state, mm.is_device_cpu = mm.VRAMState[state], lambda device: False
    mm.EXTRA_RESERVED_VRAM = _BEFORE[2] + (reserve_gib << 30)  # as --reserve-vram


class ProbeVram:
    """Sets the host's memory mode when the model passes."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "set"
    OUTPUT_NODE = True
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        states = (["NO_VRAM", "NORMAL_VRAM", "HIGH_VRAM", "restore"],)
        reserve = ("INT", {"default": 0, "max": 1 << 20})
        return {"required": {"state": states}, "optional": {"model": ("MODEL",), "reserve_gib": reserve}}

    @classmethod
    def IS_CHANGED(cls, state, model=None, reserve_gib=0):
        return float("nan")

    def set(self, state, model=None, reserve_gib=0):
        set_state(state, reserve_gib)
        return (model,)


class ProbeGuard:
    """How many guards are on a model object, as JSON."""

    RETURN_TYPES = ()
    FUNCTION = "tell"
    OUTPUT_NODE = True
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        optional = {"model": ("MODEL",), "clip": ("CLIP",), "vae": ("VAE",), "given": ("MODEL",)}
        return {"required": {}, "optional": optional}

    def tell(self, model=None, clip=None, vae=None, given=None):
        from comfy.patcher_extension import CallbacksMP, WrappersMP

        def wrappers(patcher):
            kinds = {WrappersMP.PREPARE_SAMPLING: "quantwire_guard", WrappersMP.OUTER_SAMPLE: "quantwire_errors"}
            return [len(patcher.get_wrappers(kind, key)) for kind, key in kinds.items()]

        def callbacks(obj):
            return len(obj.patcher.get_callbacks(CallbacksMP.ON_LOAD, "quantwire_guard"))

        found = {
            "model": wrappers(model) if model is not None else None,
            "given": wrappers(given) if given is not None else None,
            "same_modules": model is not None and given is not None and model.model is given.model,
            "clip": callbacks(clip) if clip is not None else None,
            "vae": callbacks(vae) if vae is not None else None,
        }
        return {"ui": {"text": [json.dumps(found)]}}


class ProbeHooks:
    """Sequential offload of accelerate, put on bitsandbytes' layers when the model is called."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "put"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def put(self, model):
        import comfy.model_management as mm
        from comfy.patcher_extension import WrappersMP

        def offload(executor, *args, **kwargs):
            import torch
            from accelerate import cpu_offload

            for layer in executor.class_obj.diffusion_model.modules():
                if type(layer).__name__ == "Linear4bit" and not hasattr(layer, "_hf_hook"):
                    cpu_offload(layer, torch.device("cpu"))
            try:
                return executor(*args, **kwargs)
            finally:
                # Its weights are lost: the host must not try to move it any more.
                loaded = mm.current_loaded_models
                loaded[:] = [entry for entry in loaded if entry.model.model is not executor.class_obj]

        clone = model.clone()
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "probe", offload)
        return (clone,)


class ProbeBreak:
    """A model whose call raises an error."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "put"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "message": ("STRING", {})}}

    def put(self, model, message):
        from comfy.patcher_extension import WrappersMP

        def fail(executor, *args, **kwargs):
            raise NotImplementedError(message)

        clone = model.clone()
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "probe", fail)
        return (clone,)


NODES = (ProbeVram, ProbeGuard, ProbeHooks, ProbeBreak)
