"""The few ComfyUI core nodes that the shipped workflows use, with ComfyUI's ids, inputs and defaults.

Choices that the embedded host cannot honour (other samplers, other CLIP types) are absent from the lists, so that
validation names them before anything runs.
"""

from __future__ import annotations

import json
from typing import Any

from ...quantizers.errors import WorkflowError
from .images import PreviewImage, SaveImage
from .loaders import CLIPLoader, DualCLIPLoader, LoraLoaderModelOnly, UNETLoader, VAELoader

MAX_RESOLUTION = 16384
SAMPLERS = ("euler",)
SCHEDULERS = ("simple", "sgm_uniform", "normal")


class CLIPTextEncode:
    DESCRIPTION = "Encodes a prompt."
    CATEGORY = "model/conditioning"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "text": ("STRING", {"multiline": True, "dynamicPrompts": True, "tooltip": "The prompt."}),
                "clip": ("CLIP", {"tooltip": "The text encoder."}),
            }
        }

    def encode(self, clip: Any, text: str) -> tuple[Any]:
        if clip is None:
            raise WorkflowError(
                "The input clip holds nothing: the node that it is linked to was given no text encoder."
            )
        context, pooled = clip.encode(text)
        return ([(context, {"pooled_output": pooled})],)


class FluxGuidance:
    DESCRIPTION = "Sets the distilled guidance of FLUX dev models."
    CATEGORY = "model/conditioning/flux"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "append"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        guidance = {
            "default": 3.5,
            "min": 0.0,
            "max": 100.0,
            "step": 0.1,
            "tooltip": "How closely to follow the prompt.",
        }
        return {
            "required": {
                "conditioning": ("CONDITIONING", {"tooltip": "An encoded prompt."}),
                "guidance": ("FLOAT", guidance),
            }
        }

    def append(self, conditioning: Any, guidance: float) -> tuple[Any]:
        return ([(context, {**extra, "guidance": guidance}) for context, extra in conditioning],)


class EmptySD3LatentImage:
    DESCRIPTION = "An empty 16-channel latent."
    CATEGORY = "model/latent"
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "generate"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        size = {
            "default": 1024,
            "min": 16,
            "max": MAX_RESOLUTION,
            "step": 16,
            "tooltip": "Size of the image in pixels.",
        }
        batch = {"default": 1, "min": 1, "max": 4096, "tooltip": "How many images at once."}
        return {"required": {"width": ("INT", size), "height": ("INT", size), "batch_size": ("INT", batch)}}

    def generate(self, width: int, height: int, batch_size: int = 1) -> tuple[Any]:
        import torch

        return ({"samples": torch.zeros(batch_size, 16, height // 8, width // 8), "downscale_ratio_spacial": 8},)


class KSampler:
    DESCRIPTION = "Denoises a latent."
    CATEGORY = "model/sampling"
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "sample"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        seed = {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF, "control_after_generate": True}
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model that denoises."}),
                "seed": ("INT", {**seed, "tooltip": "Seed of the noise; the same as in ComfyUI."}),
                "steps": ("INT", {"default": 20, "min": 1, "max": 10000, "tooltip": "Number of steps."}),
                "cfg": (
                    "FLOAT",
                    {
                        "default": 8.0,
                        "min": 0.0,
                        "max": 100.0,
                        "step": 0.1,
                        "round": 0.01,
                        "tooltip": "Guidance by the negative prompt; 1 skips the negative prompt.",
                    },
                ),
                "sampler_name": (list(SAMPLERS), {"tooltip": "The solver; run graphs with others in ComfyUI."}),
                "scheduler": (list(SCHEDULERS), {"tooltip": "How the noise levels are spaced."}),
                "positive": ("CONDITIONING", {"tooltip": "What to draw."}),
                "negative": ("CONDITIONING", {"tooltip": "What not to draw; not used at cfg 1."}),
                "latent_image": ("LATENT", {"tooltip": "The latent to start from."}),
                "denoise": (
                    "FLOAT",
                    {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": "Share of the schedule to run."},
                ),
            }
        }

    def sample(
        self,
        model: Any,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive: Any,
        negative: Any,
        latent_image: Any,
        denoise: float = 1.0,
    ) -> tuple[Any]:
        from .sampling import sample

        if denoise <= 0:
            return (latent_image,)
        samples = sample(model, seed, steps, cfg, scheduler, positive, negative, latent_image["samples"], denoise)
        return ({"samples": samples},)


class VAEDecode:
    DESCRIPTION = "Decodes a latent to an image."
    CATEGORY = "model/latent"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "decode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "samples": ("LATENT", {"tooltip": "The latent to decode."}),
                "vae": ("VAE", {"tooltip": "The decoder."}),
            }
        }

    def decode(self, vae: Any, samples: Any) -> tuple[Any]:
        from .progress import show_decoded

        images = vae.decode(samples["samples"])
        show_decoded(samples["samples"], images)
        return (images,)


class PreviewAny:
    DESCRIPTION = "Shows any value as text."
    CATEGORY = "utilities"
    RETURN_TYPES = ("STRING",)
    FUNCTION = "main"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"source": ("*", {"tooltip": "Any value."})}}

    def main(self, source: Any = None) -> dict[str, Any]:
        if isinstance(source, (dict, list)):
            try:
                text = json.dumps(source, indent=4, ensure_ascii=False)
            except (TypeError, ValueError):
                text = str(source)
        else:
            text = str(source)
        return {"ui": {"text": (text,)}, "result": (text,)}


CORE_NODES: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        UNETLoader,
        CLIPLoader,
        DualCLIPLoader,
        VAELoader,
        LoraLoaderModelOnly,
        CLIPTextEncode,
        FluxGuidance,
        EmptySD3LatentImage,
        KSampler,
        VAEDecode,
        SaveImage,
        PreviewImage,
        PreviewAny,
    )
}
