"""Templates for published image models: how their makers and ComfyUI wire them, with quantization in its place."""

from __future__ import annotations

from . import parts as p
from .describe import BROWN, GREEN, PURPLE, Group, Node, Workflow
from .parts import note, offload, picture, prompts, sampler, shown


def template(
    name: str, text: str, nodes: dict[str, Node], *bands: tuple[Group, ...], aside: tuple[Group, ...] = ()
) -> Workflow:
    return Workflow(name, text, nodes, bands, aside)


def flux_tail(name: str, model: tuple[str, int], clip: tuple[str, int], vae: tuple[str, int]) -> dict[str, Node]:
    """Prompt to picture of FLUX.1 dev: guidance 3.5 in the prompt and cfg 1, 20 steps of euler, simple schedule."""
    return {
        **prompts(clip, p.SCENE, title="Negative prompt (not used at cfg 1)"),
        "32": Node("FluxGuidance", "Guidance", {"conditioning": ("30", 0), "guidance": 3.5}),
        "33": Node("EmptySD3LatentImage", "Size", {"width": 1024, "height": 1024}),
        "40": sampler("Sampler", model, ("32", 0), ("33", 0), 20, 1.0),
        **picture(41, ("40", 0), vae, name),
    }


PROMPT = Group("Prompt", (("30", "31"), ("32", "33")), GREEN)
DRAW = Group("Picture", (("40",), ("41", "42")), PURPLE)


def flux_nf4() -> Workflow:
    nodes = {
        "1": p.loader("LoadAndQuantize", "FLUX.1 dev as NF4", p.FLUX_DEV, "model_name", format="bnb-nf4"),
        "2": p.clips("DualCLIPLoader", "Text encoders", p.CLIP_L, p.T5, type="flux"),
        "3": Node("QuantizeTextEncoder", "T5 as NF4", {"clip": ("2", 0), "format": "bnb-nf4", "encoders": "t5xxl"}),
        "4": p.loader("VAELoader", "VAE", p.FLUX_VAE, "vae_name"),
        "5": offload(("1", 0), ("3", 0)),
        "6": shown("What became of the layers", ("1", 1)),
        **flux_tail("flux_nf4", ("5", 0), ("5", 2), ("4", 0)),
    }
    text = note(
        "FLUX.1 dev in 4 bits (NF4)",
        "The 16-bit file is quantized while it is read, one tensor at a time, so that neither the card nor the memory "
        "ever holds it whole. The result is kept on disk: the second run opens it at once. The T5 text encoder is "
        "quantized too; CLIP-L is small and stays.",
        *([p.FLUX_DEV, p.CLIP_L, p.T5, p.FLUX_VAE], f"{p.MEMORY['flux_nf4']} {p.COMPUTED}"),
        [
            "`format`: `bnb-int8` or `gguf-q5-k` keep more of the picture; the report has the error of each layer.",
            "LoRAs: a **LoraLoaderModelOnly** behind *FLUX.1 dev as NF4*. They are applied in floating point.",
            "`carrier` `library` makes bitsandbytes' own layers. *Offload check* says when those would break.",
        ],
        p.ANYWHERE.format("flux_nf4"),
    )
    return template(
        *("flux_nf4", text, nodes),
        (
            Group("1. Load and quantize", (("1", "4"), ("2", "3"))),
            Group("2. Check before sampling", (("5",), ("6",)), BROWN),
        ),
        (PROMPT, DRAW),
    )


def flux_gguf_t5_gguf() -> Workflow:
    nodes = {
        "1": p.loader("LoadGGUF", "FLUX.1 dev, Q4_K_S", p.FLUX_GGUF, "gguf_name"),
        "2": p.clips("LoadGGUFTextEncoder", "T5 Q5_K_M and CLIP-L", p.T5_GGUF, p.CLIP_L, type="flux"),
        "4": p.loader("VAELoader", "VAE", p.FLUX_VAE, "vae_name"),
        "5": offload(("1", 0), ("2", 0)),
        "6": shown("What the GGUF file holds", ("1", 1)),
        **flux_tail("flux_gguf_t5_gguf", ("5", 0), ("5", 2), ("4", 0)),
    }
    text = note(
        "FLUX.1 dev and T5 from GGUF files",
        "Both large parts come from GGUF files that others have made. Weights stay packed as the file has them and are "
        "unpacked layer by layer while a layer computes. A text encoder may be GGUF or safetensors, in any order.",
        [p.FLUX_GGUF, p.T5_GGUF, p.CLIP_L, p.FLUX_VAE],
        f"{p.MEMORY['flux_gguf_t5_gguf']} {p.AS_FILES} {p.COMPUTED}",
        [
            "Another file: Q5_K_S or Q8_0 for quality, Q3_K_S for a small card.",
            "`cache_mib` above 0 keeps that much unpacked: faster, where memory is left.",
            "No file of the type you want? The template `convert_a_file` makes it.",
        ],
        p.ANYWHERE.format("flux_gguf_t5_gguf"),
    )
    return template(
        *("flux_gguf_t5_gguf", text, nodes),
        (
            Group("1. Open the GGUF files", (("1", "4"), ("2",))),
            Group("2. Check before sampling", (("5",), ("6",)), BROWN),
        ),
        (PROMPT, DRAW),
    )


def sd35_int8() -> Workflow:
    nodes = {
        "1": p.loader("CheckpointLoaderSimple", "SD3.5 Large", p.SD35, "ckpt_name"),
        "2": p.clips("TripleCLIPLoader", "Text encoders", p.CLIP_L, p.CLIP_G, p.T5),
        "3": Node("QuantizeModel", "Model as int8", {"model": ("1", 0), "format": "comfy-int8"}),
        "4": Node("QuantizeTextEncoder", "T5 as int8", {"clip": ("2", 0), "format": "comfy-int8", "encoders": "t5xxl"}),
        "5": offload(("3", 0), ("4", 0)),
        "6": shown("What became of the layers", ("3", 1)),
        **prompts(("5", 2), p.SCENE),
        "33": Node("EmptySD3LatentImage", "Size", {"width": 1024, "height": 1024}),
        "40": sampler("Sampler", ("5", 0), ("30", 0), ("33", 0), 20, 4.0, "sgm_uniform"),
        **picture(41, ("40", 0), ("1", 2), "sd35_int8"),
    }
    text = note(
        "Stable Diffusion 3.5 Large in int8",
        "The checkpoint is loaded at full precision and its linear layers become 8-bit integers with one scale a row. "
        f"On the layers of the demo model that leaves 43 dB of signal to noise, NF4 leaves 21 ({p.FORMATS_PAGE}). The "
        "VAE comes from the checkpoint and stays as it is. The page of the checkpoint gives it only to accounts that "
        "have accepted its licence there: log in before you download.",
        *([p.SD35, p.CLIP_L, p.CLIP_G, p.T5], f"{p.MEMORY['sd35_int8']} {p.COMPUTED}"),
        [
            "`sd3.5_large_fp8_scaled.safetensors` is quantized already: link its model to *Offload check* directly.",
            "`format` `bnb-nf4` or `gguf-q4-0`: 4 bits. The K types of GGUF need rows of whole blocks of 256, and this "
            "model's have 2,432.",
            "`keep_layers`: names or patterns such as `joint_blocks.0.*` stay at full precision.",
        ],
        p.COMFYUI,
    )
    return template(
        *("sd35_int8", text, nodes),
        (
            Group("1. Load", (("1", "2"),)),
            Group("2. Quantize", (("3",), ("4",))),
            Group("3. Check before sampling", (("5",), ("6",)), BROWN),
        ),
        (Group("Prompt", (("30", "31"), ("33",)), GREEN), DRAW),
    )


def sdxl_int8_convrot() -> Workflow:
    rotated = {"model": ("1", 0), "format": "comfy-int8-convrot", "on_failure": "full precision"}
    nodes = {
        "1": p.loader("CheckpointLoaderSimple", "SDXL base", p.SDXL, "ckpt_name"),
        "3": Node("QuantizeModel", "UNet as rotated int8", rotated),
        "5": offload(("3", 0)),
        "6": shown("What became of the layers", ("3", 1)),
        **prompts(("1", 1), p.SCENE, "text, watermark, blurry"),
        "33": Node("EmptyLatentImage", "Size", {"width": 1024, "height": 1024}),
        "40": sampler("Sampler", ("5", 0), ("30", 0), ("33", 0), 25, 8.0, "normal"),
        **picture(41, ("40", 0), ("1", 2), "sdxl_int8_convrot"),
    }
    text = note(
        "SDXL in int8 with rotation",
        "`comfy-int8-convrot` turns each weight by a fixed rotation of 256 columns before it is rounded, which spreads "
        "outliers over the row. Layers whose width is no multiple of 256, in SDXL those of 640, cannot be turned: "
        "`on_failure` is *full precision*, so they stay as they are and the report names them.",
        *([p.SDXL], f"{p.MEMORY['sdxl_int8_convrot']} {p.COMPUTED}"),
        [
            "`format` `comfy-int8` takes every layer, without the rotation.",
            "`on_failure` `error` stops at the first layer that a format cannot take, to see which.",
            "Any SDXL checkpoint works the same way: choose it in *SDXL base*.",
        ],
        p.COMFYUI,
    )
    return template(
        *("sdxl_int8_convrot", text, nodes),
        (
            Group("1. Load and quantize", (("1", "3"),)),
            Group("2. Check before sampling", (("5",), ("6",)), BROWN),
        ),
        (Group("Prompt", (("30", "31"), ("33",)), GREEN), DRAW),
    )


def qwen_image_nvfp4() -> Workflow:
    nodes = {
        "1": p.loader("LoadAndQuantize", "Qwen-Image as NVFP4", p.QWEN, "model_name", format="comfy-nvfp4"),
        "2": p.loader("CLIPLoader", "Qwen2.5-VL", p.QWEN_TEXT, "clip_name", type="qwen_image"),
        "4": p.loader("VAELoader", "VAE", p.QWEN_VAE, "vae_name"),
        "5": offload(("1", 0), ("2", 0)),
        "6": shown("What became of the layers", ("1", 1)),
        "7": Node("ModelSamplingAuraFlow", "Shift", {"model": ("5", 0), "shift": 3.1}),
        **prompts(("5", 2), f'{p.SCENE}. A sign above the door reads "Open"'),
        "33": Node("EmptySD3LatentImage", "Size", {"width": 1328, "height": 1328}),
        "40": sampler("Sampler", ("7", 0), ("30", 0), ("33", 0), 20, 4.0),
        **picture(41, ("40", 0), ("4", 0), "qwen_image_nvfp4"),
    }
    text = note(
        "Qwen-Image in NVFP4",
        "A model of 20 billion parameters in 4-bit floating point, with a scale for every 16 weights. It is quantized "
        "while the file is read and kept on disk for the next run. Cards with NVFP4 units (compute capability 10.0 and "
        "newer) multiply it directly, on others each layer is unpacked first (read in ComfyUI's source, not run).",
        *([p.QWEN, p.QWEN_TEXT, p.QWEN_VAE], f"{p.MEMORY['qwen_image_nvfp4']} {p.AS_FILES} {p.COMPUTED}"),
        [
            "On an older card take `gguf-q4-k`: the same 4.5 bits a weight, 4 dB better on the demo "
            f"({p.FORMATS_PAGE}).",
            "`shift` 3.1 is what ComfyUI's own example has; higher gives more structure, lower more detail.",
            "To share the file: **SaveQuantized** behind *Qwen-Image as NVFP4*. ComfyUI's own loader opens it.",
        ],
        p.COMFYUI,
    )
    return template(
        *("qwen_image_nvfp4", text, nodes),
        (
            Group("1. Load and quantize", (("1",), ("2", "4"))),
            Group("2. Check before sampling", (("5",), ("6",)), BROWN),
        ),
        (Group("Prompt", (("30", "31"), ("33", "7")), GREEN), DRAW),
    )


IMAGES = (flux_nf4(), flux_gguf_t5_gguf(), sd35_int8(), sdxl_int8_convrot(), qwen_image_nvfp4())
