"""Pieces that several templates share: published files, prompts to pictures, reports, the text of a note."""

from __future__ import annotations

from typing import Any

from .describe import File, Node
from .memory import read

Link = tuple[str, int]
MEMORY = read()
COMPUTED = "Computed by `quantwire forecast` from the shapes of the published models; not measured on a card."
AS_FILES = "What comes quantized counts as its file holds it."
FORMATS_PAGE = "the project's documentation, page `formats.md`"

FLUX_DEV = File("diffusion_models", "flux1-dev.safetensors", "Comfy-Org/flux1-dev")
FLUX_SCHNELL = File("diffusion_models", "flux1-schnell.safetensors", "Comfy-Org/flux1-schnell")
FLUX_GGUF = File("diffusion_models", "flux1-dev-Q4_K_S.gguf", "city96/FLUX.1-dev-gguf")
T5_GGUF = File("text_encoders", "t5-v1_1-xxl-encoder-Q5_K_M.gguf", "city96/t5-v1_1-xxl-encoder-gguf")
CLIP_L = File("text_encoders", "clip_l.safetensors", "comfyanonymous/flux_text_encoders")
T5 = File("text_encoders", "t5xxl_fp16.safetensors", "comfyanonymous/flux_text_encoders")
FLUX_VAE = File("vae", "ae.safetensors", "Comfy-Org/Lumina_Image_2.0_Repackaged", "split_files/vae/")
CLIP_G = File("text_encoders", "clip_g.safetensors", "Comfy-Org/stable-diffusion-3.5-fp8", "text_encoders/")
SD35 = File("checkpoints", "sd3.5_large.safetensors", "stabilityai/stable-diffusion-3.5-large")
SDXL = File("checkpoints", "sd_xl_base_1.0.safetensors", "stabilityai/stable-diffusion-xl-base-1.0")
_WAN = "Comfy-Org/Wan_2.2_ComfyUI_Repackaged"
WAN_HIGH = File("diffusion_models", "wan2.2_t2v_high_noise_14B_fp16.safetensors", _WAN, "split_files/diffusion_models/")
WAN_LOW = File("diffusion_models", "wan2.2_t2v_low_noise_14B_fp16.safetensors", _WAN, "split_files/diffusion_models/")
WAN_VAE = File("vae", "wan_2.1_vae.safetensors", _WAN, "split_files/vae/")
UMT5 = File(
    *("text_encoders", "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "Comfy-Org/Wan_2.1_ComfyUI_repackaged"),
    "split_files/text_encoders/",
)
_QWEN = "Comfy-Org/Qwen-Image_ComfyUI"
QWEN = File("diffusion_models", "qwen_image_bf16.safetensors", _QWEN, "split_files/diffusion_models/")
QWEN_TEXT = File("text_encoders", "qwen_2.5_vl_7b_fp8_scaled.safetensors", _QWEN, "split_files/text_encoders/")
QWEN_VAE = File("vae", "qwen_image_vae.safetensors", _QWEN, "split_files/vae/")
_ACE = "Comfy-Org/ace_step_1.5_ComfyUI_files"
ACE = File("diffusion_models", "acestep_v1.5_turbo.safetensors", _ACE, "split_files/diffusion_models/")
ACE_TEXT = File("text_encoders", "qwen_0.6b_ace15.safetensors", _ACE, "split_files/text_encoders/")
ACE_LM = File("text_encoders", "qwen_1.7b_ace15.safetensors", _ACE, "split_files/text_encoders/")
ACE_VAE = File("vae", "ace_1.5_vae.safetensors", _ACE, "split_files/vae/")

SCENE = "A lighthouse keeper's kitchen at dawn: a kettle steaming on an iron stove, nautical charts, low golden light"


def loader(kind: str, title: str, file: File, name: str, **inputs: Any) -> Node:
    """A node that opens one file; `name` is its input for it."""
    return Node(kind, title, {name: file.name, **inputs}, (file,))


def clips(kind: str, title: str, *files: File, **inputs: Any) -> Node:
    """A node that opens several text encoders."""
    names = {f"clip_name{i}": file.name for i, file in enumerate(files, 1)}
    return Node(kind, title, {**names, **inputs}, files)


def prompts(clip: Link, text: str, negative: str = "", title: str = "Negative prompt") -> dict[str, Node]:
    """Prompt 30 and negative prompt 31."""
    return {
        "30": Node("CLIPTextEncode", "Prompt", {"text": text, "clip": clip}),
        "31": Node("CLIPTextEncode", title, {"text": negative, "clip": clip}),
    }


def sampler(
    title: str, model: Link, positive: Link, latent: Link, steps: int, cfg: float, scheduler: str = "simple"
) -> Node:
    inputs = {
        **{"model": model, "seed": 20, "steps": steps, "cfg": cfg, "sampler_name": "euler", "scheduler": scheduler},
        **{"positive": positive, "negative": ("31", 0), "latent_image": latent, "denoise": 1.0},
    }
    return Node("KSampler", title, inputs)


def picture(first: int, samples: Link, vae: Link, prefix: str, title: str = "") -> dict[str, Node]:
    """Decoder and SaveImage with the ids first and first + 1."""
    decode, save = str(first), str(first + 1)
    return {
        decode: Node("VAEDecode", f"Decode{title}", {"samples": samples, "vae": vae}),
        save: Node("SaveImage", f"Save{title}", {"images": (decode, 0), "filename_prefix": prefix}),
    }


def shown(title: str, source: Link) -> Node:
    return Node("PreviewAny", title, {"source": source})


def offload(model: Link, clip: Link | None = None, vae: Link | None = None) -> Node:
    links = {"model": model, "clip": clip, "vae": vae}
    return Node(
        *("OffloadCompat", "Offload check"),
        {"mode": "auto", "action": "block", **{k: v for k, v in links.items() if v is not None}},
    )


def note(title: str, shows: str, files: list[File], memory: str, change: list[str], where: str = "") -> str:
    """The Markdown of a template's note."""
    parts = [f"# {title}", shows]
    if where:
        parts.append(where)
    if files:
        parts += ["## Files", "\n".join(file.line for file in files)]
    if memory:
        parts += ["## Memory", memory]
    return "\n\n".join([*parts, "## What to change", "\n".join(f"- {line}" for line in change)])


ANYWHERE = "Runs in ComfyUI, and without it: `quantwire run workflows/api/{}.json --models MODELS`."
COMFYUI = "Runs in ComfyUI; `quantwire run` has FLUX models only."
