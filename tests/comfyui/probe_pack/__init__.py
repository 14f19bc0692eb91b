"""Nodes that only the tests use, inside the real ComfyUI.

`ProbeLoad` forces how a model is loaded. On a CPU the host always loads whole models; the offloaded path is the same
code on any device, so forcing it measures what it computes.
"""

from __future__ import annotations

import json

from . import guard, offload
from .small import shrink


class ProbeLoad:
    """`after` is any output that must exist before: it puts several loads of one model in one graph in order."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "force"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        required = {"model": ("MODEL",), "mode": (["default", "partial", "novram"],)}
        return {"required": required, "optional": {"after": ("LATENT",)}}

    def force(self, model, mode, after=None):
        import comfy.model_management

        if mode != "default" or after is not None:
            comfy.model_management.unload_all_models()
        if mode == "default":
            return (model,)
        forced = model.clone()
        _force(forced, mode)
        return (forced,)


def _force(forced, mode):
    def partially_load(device, extra_memory=0, force_patch_weights=False):
        forced.unpatch_model(forced.offload_device, unpatch_weights=True)
        forced.patch_model(load_weights=False)
        budget = forced.model_size() // 2 if mode == "partial" else 0.1
        forced.load(device, lowvram_model_memory=budget, full_load=False)
        return forced.loaded_size()

    forced.partially_load = partially_load


class ProbeLoadClip:
    """ProbeLoad for a CLIP; `after` is a CONDITIONING that must exist before."""

    RETURN_TYPES = ("CLIP",)
    FUNCTION = "force"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        required = {"clip": ("CLIP",), "mode": (["default", "partial", "novram"],)}
        return {"required": required, "optional": {"after": ("CONDITIONING",)}}

    def force(self, clip, mode, after=None):
        import comfy.model_management

        comfy.model_management.unload_all_models()
        forced = clip.clone()
        if mode != "default":
            _force(forced.patcher, mode)
        return (forced,)


class ProbeConditioning:
    """Writes the tensors of a conditioning to a safetensors file of the output folder."""

    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"conditioning": ("CONDITIONING",), "name": ("STRING", {})}}

    def save(self, conditioning, name):
        import folder_paths
        import torch
        from safetensors.torch import save_file

        (cond, extra), *_ = conditioning
        tensors = {"cond": cond, **{n: t for n, t in extra.items() if isinstance(t, torch.Tensor)}}
        path = f"{folder_paths.get_output_directory()}/{name}.safetensors"
        save_file({n: t.detach().float().contiguous() for n, t in tensors.items()}, path)
        return {"ui": {"text": [path]}}


class ProbeFormats:
    """Why each format cannot run in this Python, empty where it can; as JSON."""

    RETURN_TYPES = ()
    FUNCTION = "tell"
    OUTPUT_NODE = True
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def tell(self):
        registry = _pack_module("quantizers.registry")
        states = {name: registry.availability(name) for name in registry.format_ids()}
        found = {name: "" if state.works else state.reason for name, state in states.items()}
        return {"ui": {"text": [json.dumps(found)]}}


def _pack_module(name):
    import importlib
    import sys

    pack = next(module for module in sys.modules if module.endswith("custom_nodes/quantwire"))
    return importlib.import_module(f"{pack}.{name}")


class ProbeModel:
    """Facts about a model object as JSON; with `after`, as it is once that output exists, and with `unload`, once the
    host has taken its layers off the device without unloading the model."""

    RETURN_TYPES = ()
    FUNCTION = "tell"
    OUTPUT_NODE = True
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        optional = {"after": ("LATENT",), "unload": ("BOOLEAN", {"default": False})}
        return {"required": {"model": ("MODEL",)}, "optional": optional}

    @classmethod
    def IS_CHANGED(cls, model, after=None, unload=False):
        return float("nan")

    def tell(self, model, after=None, unload=False):
        if unload:
            model.partially_unload(model.offload_device, 1e32)
        layers = [m for m in model.model.diffusion_model.modules() if hasattr(m, "quant_format")]
        kept = next((m.kept for m in layers if getattr(m, "kept", None) is not None), None)
        facts = {
            "kept_nbytes": kept.nbytes if kept is not None else 0,
            "size": model.model_size(),
            "patcher": type(model).__name__,
            "quantized_layers": len(layers),
            "lowvram_patches": model.lowvram_patch_counter(),
            "cached": model.cached_patcher_init is not None,
            "merged": len(model.backup),
            "tensors": sorted({n for m in layers for n in getattr(m.weight._params, "_tensor_fields", list)()}),
            "meta": [dict(getattr(m.weight._params, "meta", ())) for m in layers[:1]],
        }
        return {"ui": {"text": [json.dumps(facts)]}}


class ProbeLayout:
    """Names and shapes of the tensors of a model with this configuration, which the host makes; as JSON."""

    RETURN_TYPES = ()
    FUNCTION = "tell"
    OUTPUT_NODE = True
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"config": ("STRING", {"default": "{}"})}}

    def tell(self, config):
        import comfy.ops
        import torch
        from comfy.model_detection import model_config_from_unet_config

        found = model_config_from_unet_config(json.loads(config))
        found.set_inference_dtype(torch.bfloat16, None)
        found.custom_operations = comfy.ops.disable_weight_init
        model = found.get_model({}, "", device=torch.device("meta")).diffusion_model
        shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        return {"ui": {"text": [json.dumps(shapes)]}}


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


class ProbeControlNet:
    """A small FLUX ControlNet with random weights, made of the host's own classes; no file holds one this small."""

    RETURN_TYPES = ("CONTROL_NET",)
    FUNCTION = "make"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        import comfy.controlnet
        import comfy.model_management
        import comfy.ops
        import torch
        from comfy.ldm.flux.controlnet import ControlNetFlux

        net = ControlNetFlux(
            operations=comfy.ops.manual_cast,
            device="cpu",
            dtype=torch.float32,
            in_channels=16,
            out_channels=16,
            patch_size=2,
            vec_in_dim=768,
            context_in_dim=768,
            hidden_size=256,
            mlp_ratio=4.0,
            num_heads=2,
            depth=2,
            depth_single_blocks=0,
            axes_dim=[16, 56, 56],
            theta=10000,
            qkv_bias=True,
            guidance_embed=True,
            txt_ids_dims=[],
        )
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                scale = 0.3 if name.startswith("controlnet_blocks") else 0.05
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        device = comfy.model_management.get_torch_device()
        return (comfy.controlnet.ControlNet(net, load_device=device, extra_conds=["y", "guidance"]),)


class ProbeMemory:
    """What the pack reads as the host's memory state, as JSON."""

    RETURN_TYPES = ()
    FUNCTION = "tell"
    OUTPUT_NODE = True
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        states = ["as it is", "NO_VRAM", "NORMAL_VRAM", "HIGH_VRAM"]
        return {"required": {"model": ("MODEL",), "state": (states,), "device": (["cpu", "cuda"],)}}

    def tell(self, model, state, device):
        import dataclasses

        import comfy.model_management as mm
        import torch

        memory = _pack_module("hosts.comfyui.memory")
        before = mm.vram_state, mm.get_torch_device
        model = model.clone()
        model.load_device = torch.device(device)
        try:
            if state != "as it is":
                mm.vram_state = mm.VRAMState[state]
            mm.get_torch_device = lambda: torch.device(device)
            found = dataclasses.asdict(memory.memory_state(model))
        finally:
            mm.vram_state, mm.get_torch_device = before
        return {"ui": {"text": [json.dumps(found)]}}


class ProbeClip:
    """Facts about a CLIP as JSON."""

    RETURN_TYPES = ()
    FUNCTION = "tell"
    OUTPUT_NODE = True
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"clip": ("CLIP",)}, "optional": {"after": ("CONDITIONING",)}}

    def tell(self, clip, after=None):
        layers = [m for m in clip.cond_stage_model.modules() if hasattr(m, "quant_format")]
        made, args, *_ = clip.patcher.cached_patcher_init
        facts = {
            "size": clip.patcher.model_size(),
            "quantized_layers": len(layers),
            "formats": sorted({m.weight._params.format_id for m in layers}),
            "remade": type(made(*args, disable_dynamic=True)).__name__,
        }
        return {"ui": {"text": [json.dumps(facts)]}}


NODES = (ProbeLoad, ProbeFormats, ProbeModel, ProbeLayout, ProbeRemake, ProbeControlNet, ProbeMemory)
NODES = (*NODES, ProbeLoadClip, ProbeConditioning, ProbeClip, *offload.NODES, *guard.NODES)
NODE_CLASS_MAPPINGS = {cls.__name__: cls for cls in NODES}
shrink()
