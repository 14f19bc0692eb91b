"""ComfyUI's loader nodes for the embedded host: diffusion models, text encoders, VAEs and LoRAs."""

from __future__ import annotations

from typing import Any

from ...quantizers.errors import QuantwireError, SpecError
from .. import current

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

        from .models import load_diffusion_model, store_as

        if weight_dtype == "fp8_e4m3fn_fast":
            raise SpecError(
                "weight_dtype fp8_e4m3fn_fast multiplies in fp8, which the embedded host does not.\n"
                "Choose fp8_e4m3fn, or run the graph in ComfyUI on a GPU with fp8 units."
            )
        model = load_diffusion_model(current().resolve("diffusion_models", unet_name))
        if weight_dtype != "default":
            model = store_as(model, torch.float8_e4m3fn if weight_dtype == "fp8_e4m3fn" else torch.float8_e5m2)
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
        strength = {
            "default": 1.0,
            "min": -100.0,
            "max": 100.0,
            "step": 0.01,
            "tooltip": "0 leaves the model as it is.",
        }
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

        if strength_model == 0:
            return (model,)
        return (apply_lora(model, current().resolve("loras", lora_name), strength_model),)
