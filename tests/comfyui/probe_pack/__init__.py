"""Nodes that only the tests use, inside the real ComfyUI.

`ProbeLoad` forces how a model is loaded. On a CPU the host always loads whole models; the offloaded path is the same
code on any device, so forcing it measures what it computes.
"""

from __future__ import annotations

import json


class ProbeLoad:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "force"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "mode": (["default", "partial", "novram"],)}}

    def force(self, model, mode):
        if mode == "default":
            return (model,)
        import comfy.model_management

        comfy.model_management.unload_all_models()
        forced = model.clone()

        def partially_load(device, extra_memory=0, force_patch_weights=False):
            forced.unpatch_model(forced.offload_device, unpatch_weights=True)
            forced.patch_model(load_weights=False)
            budget = forced.model_size() // 2 if mode == "partial" else 0.1
            forced.load(device, lowvram_model_memory=budget, full_load=False)
            return forced.loaded_size()

        forced.partially_load = partially_load
        return (forced,)


class ProbeModel:
    """Facts about a model object as JSON."""

    RETURN_TYPES = ()
    FUNCTION = "tell"
    OUTPUT_NODE = True
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    @classmethod
    def IS_CHANGED(cls, model):
        return float("nan")

    def tell(self, model):
        layers = [m for m in model.model.diffusion_model.modules() if hasattr(m, "quant_format")]
        facts = {
            "size": model.model_size(),
            "patcher": type(model).__name__,
            "quantized_layers": len(layers),
            "lowvram_patches": model.lowvram_patch_counter(),
            "cached": model.cached_patcher_init is not None,
        }
        return {"ui": {"text": [json.dumps(facts)]}}


class ProbeRemake:
    """The model that the host would make anew from `cached_patcher_init`, as SelectModelDevice does."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "remake"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def remake(self, model):
        function, args, *index = model.cached_patcher_init
        made = function(*args, disable_dynamic=True)
        return (made[index[0]] if index else made,)


NODE_CLASS_MAPPINGS = {"ProbeLoad": ProbeLoad, "ProbeModel": ProbeModel, "ProbeRemake": ProbeRemake}
