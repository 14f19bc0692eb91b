"""The few ComfyUI core nodes that the shipped workflows use, with ComfyUI's ids, inputs and defaults.

Choices that the embedded host cannot honour (other samplers, other CLIP types) are absent from the lists, so that
validation names them before anything runs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ...quantizers.errors import QuantwireError, SpecError, WorkflowError
from .. import current

MAX_RESOLUTION = 16384
DEVICE = (["default", "cpu"], {"advanced": True, "tooltip": "Where the encoder runs; the embedded host has the CPU."})


def _files(folder: str) -> list[str]:
    return current().list_files(folder, (".safetensors", ".sft"))


def _check_file(folder: str, name: str | None) -> bool | str:
    """For VALIDATE_INPUTS: the host's own message has the folders searched and the files there. None is a link."""
    if name is None:
        return True
    try:
        current().resolve(folder, name)
    except QuantwireError as err:
        return " ".join(str(err).splitlines())
    return True


def _stamp(folder: str, name: str) -> str:
    """For IS_CHANGED: a file that was replaced is loaded again."""
    stat = current().resolve(folder, name).stat()
    return f"{stat.st_mtime_ns}:{stat.st_size}"


class UNETLoader:
    DESCRIPTION = "Opens a diffusion model file."
    CATEGORY = "model/loaders"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load_unet"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        dtypes = ["default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"]
        return {
            "required": {
                "unet_name": (_files("diffusion_models"), {"tooltip": "A file of the folder diffusion_models."}),
                "weight_dtype": (dtypes, {"advanced": True, "tooltip": "dtype in which weights are stored."}),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, unet_name: str | None) -> bool | str:
        return _check_file("diffusion_models", unet_name)

    @classmethod
    def IS_CHANGED(cls, unet_name: str, weight_dtype: str) -> str:
        return _stamp("diffusion_models", unet_name)

    def load_unet(self, unet_name: str, weight_dtype: str = "default") -> tuple[Any]:
        import torch

        from .models import load_diffusion_model

        if weight_dtype == "fp8_e4m3fn_fast":
            raise SpecError(
                "weight_dtype fp8_e4m3fn_fast multiplies in fp8, which the embedded host does not.\n"
                "Choose fp8_e4m3fn, or run the graph in ComfyUI on a GPU with fp8 units."
            )
        model = load_diffusion_model(current().resolve("diffusion_models", unet_name))
        if weight_dtype != "default":
            storage = torch.float8_e4m3fn if weight_dtype == "fp8_e4m3fn" else torch.float8_e5m2
            compute = model.transformer.dtype
            model.transformer.enable_layerwise_casting(storage_dtype=storage, compute_dtype=compute)  # type: ignore[operator]
        return (model,)


class CLIPLoader:
    DESCRIPTION = "Opens one text encoder file."
    CATEGORY = "model/loaders"
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load_clip"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = {"tooltip": "How prompts are encoded; the embedded host has CLIP-L as stable_diffusion uses it."}
        return {
            "required": {
                "clip_name": (_files("text_encoders"), {"tooltip": "A file of the folder text_encoders."}),
                "type": (["stable_diffusion"], tooltip),
            },
            "optional": {"device": DEVICE},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, clip_name: str | None) -> bool | str:
        return _check_file("text_encoders", clip_name)

    @classmethod
    def IS_CHANGED(cls, clip_name: str, type: str, device: str = "default") -> str:
        return _stamp("text_encoders", clip_name)

    def load_clip(self, clip_name: str, type: str = "stable_diffusion", device: str = "default") -> tuple[Any]:
        from .text_encoders import load_text_encoder

        return (load_text_encoder([current().resolve("text_encoders", clip_name)]),)


class DualCLIPLoader:
    DESCRIPTION = "Opens two text encoder files: for FLUX, CLIP-L and T5."
    CATEGORY = "model/loaders"
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load_clip"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        files = (_files("text_encoders"), {"tooltip": "A file of the folder text_encoders."})
        return {
            "required": {
                "clip_name1": files,
                "clip_name2": files,
                "type": (["flux"], {"tooltip": "How prompts are encoded; the embedded host has flux."}),
            },
            "optional": {"device": DEVICE},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, clip_name1: str | None, clip_name2: str | None) -> bool | str:
        first = _check_file("text_encoders", clip_name1)
        return first if first is not True else _check_file("text_encoders", clip_name2)

    @classmethod
    def IS_CHANGED(cls, clip_name1: str, clip_name2: str, type: str, device: str = "default") -> str:
        return _stamp("text_encoders", clip_name1) + _stamp("text_encoders", clip_name2)

    def load_clip(self, clip_name1: str, clip_name2: str, type: str = "flux", device: str = "default") -> tuple[Any]:
        from .text_encoders import load_text_encoder

        return (load_text_encoder([current().resolve("text_encoders", n) for n in (clip_name1, clip_name2)]),)


class VAELoader:
    DESCRIPTION = "Opens a VAE file."
    CATEGORY = "model/loaders"
    RETURN_TYPES = ("VAE",)
    FUNCTION = "load_vae"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"vae_name": (_files("vae"), {"tooltip": "A file of the folder vae."})}}

    @classmethod
    def VALIDATE_INPUTS(cls, vae_name: str | None) -> bool | str:
        return _check_file("vae", vae_name)

    @classmethod
    def IS_CHANGED(cls, vae_name: str) -> str:
        return _stamp("vae", vae_name)

    def load_vae(self, vae_name: str) -> tuple[Any]:
        from .vae import load_vae

        return (load_vae(current().resolve("vae", vae_name)),)


class LoraLoaderModelOnly:
    DESCRIPTION = "Adds a LoRA to a model."
    CATEGORY = "model/loaders"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load_lora_model_only"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        strength = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01, "tooltip": "0 leaves the model as it is."}
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model that the LoRA is added to; it is not changed."}),
                "lora_name": (_files("loras"), {"tooltip": "A file of the folder loras."}),
                "strength_model": ("FLOAT", strength),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, lora_name: str | None) -> bool | str:
        return _check_file("loras", lora_name)

    @classmethod
    def IS_CHANGED(cls, lora_name: str, **_: Any) -> str:
        return _stamp("loras", lora_name)

    def load_lora_model_only(self, model: Any, lora_name: str, strength_model: float) -> tuple[Any]:
        from .lora import apply_lora

        return (apply_lora(model, current().resolve("loras", lora_name), strength_model),)


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
        context, pooled = clip.encode(text)
        return ([(context, {"pooled_output": pooled})],)


class FluxGuidance:
    DESCRIPTION = "Sets the distilled guidance of FLUX dev models."
    CATEGORY = "model/conditioning/flux"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "append"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        guidance = {"default": 3.5, "min": 0.0, "max": 100.0, "step": 0.1, "tooltip": "How closely to follow the prompt."}
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
        size = {"default": 1024, "min": 16, "max": MAX_RESOLUTION, "step": 16, "tooltip": "Size of the image in pixels."}
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
        from .sampling import SAMPLERS, SCHEDULERS

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
        samples = sample(
            model, seed, steps, cfg, scheduler, positive, negative, latent_image["samples"], denoise
        )
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
        return (vae.decode(samples["samples"]),)


class SaveImage:
    DESCRIPTION = "Saves images as PNG, with the workflow inside."
    CATEGORY = "image"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    FUNCTION = "save_images"
    OUTPUT_NODE = True
    COMPRESS_LEVEL = 4

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = "Start of the file names, subfolders allowed; %width%, %height%, %year%, %month%, %day%, %hour%, "
        prefix = {"default": "ComfyUI", "tooltip": tooltip + "%minute% and %second% are filled in."}
        return {
            "required": {
                "images": ("IMAGE", {"tooltip": "The images to save."}),
                "filename_prefix": ("STRING", prefix),
            },
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    def save_images(
        self, images: Any, filename_prefix: str = "ComfyUI", prompt: Any = None, extra_pnginfo: Any = None
    ) -> dict[str, Any]:
        saved = save_pngs(images, current().output, filename_prefix, self.COMPRESS_LEVEL, prompt, extra_pnginfo)
        entries = [{"filename": p.name, "subfolder": sub, "type": "output"} for p, sub in saved]
        return {"ui": {"images": entries}, "result": (images,)}


class PreviewImage:
    DESCRIPTION = "Saves images in the folder temp of the output folder."
    CATEGORY = "image"
    RETURN_TYPES = ()
    FUNCTION = "save_images"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"images": ("IMAGE", {"tooltip": "The images to look at."})},
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    def save_images(self, images: Any, prompt: Any = None, extra_pnginfo: Any = None) -> dict[str, Any]:
        saved = save_pngs(images, current().output / "temp", "preview", 1, prompt, extra_pnginfo)
        return {"ui": {"images": [{"filename": p.name, "subfolder": sub, "type": "temp"} for p, sub in saved]}}


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


def save_pngs(
    images: Any, folder: Path, prefix: str, compress_level: int, prompt: Any, extra_pnginfo: Any
) -> list[tuple[Path, str]]:
    """Write (B, H, W, 3) images in [0, 1] as `PREFIX_00001_.png` and on, after the highest number in the folder.

    Returns:
        path and subfolder of each file.
    Raises:
        WorkflowError: the prefix leads out of the folder.
    """
    import numpy as np
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    height, width = images.shape[1:3]
    target = folder / _fill_in(prefix, width, height)
    if not target.resolve().is_relative_to(folder.resolve()) or target.resolve() == folder.resolve():
        raise WorkflowError(f"filename_prefix '{prefix}' leads out of the output folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    text = PngInfo()
    if prompt is not None:
        text.add_text("prompt", json.dumps(prompt))
    for key, value in (extra_pnginfo or {}).items():
        text.add_text(key, json.dumps(value))
    taken = [m for p in target.parent.iterdir() if (m := re.fullmatch(re.escape(target.name) + r"_(\d+)_?\.\w+", p.name))]
    number = 1 + max((int(m[1]) for m in taken), default=0)
    saved: list[tuple[Path, str]] = []
    for image in images:
        path = target.with_name(f"{target.name}_{number:05}_.png")
        temporary = path.with_suffix(".tmp")
        pixels = np.clip(image.cpu().float().numpy() * 255.0, 0, 255).astype(np.uint8)
        try:
            Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=text, compress_level=compress_level)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        subfolder = path.parent.resolve().relative_to(folder.resolve()).as_posix()
        saved.append((path, "" if subfolder == "." else subfolder))
        number += 1
    return saved


def _fill_in(prefix: str, width: int, height: int) -> str:
    import time

    now = time.localtime()
    values = {
        "width": str(width),
        "height": str(height),
        "year": f"{now.tm_year}",
        "month": f"{now.tm_mon:02}",
        "day": f"{now.tm_mday:02}",
        "hour": f"{now.tm_hour:02}",
        "minute": f"{now.tm_min:02}",
        "second": f"{now.tm_sec:02}",
    }
    return re.sub(r"%(\w+)%", lambda m: values.get(m[1], m[0]), prefix)


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
