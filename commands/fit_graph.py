"""A ready workflow around FitModel, in the API form that `quantwire run`, ComfyUI's editor and its server take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..quantizers.errors import SpecError
from ..quantizers.measure.activations import RunShape

# Folders under which ComfyUI looks for each kind of file; a name in a graph is the path below one of them.
MODEL_FOLDERS = ("diffusion_models", "unet", "unet_gguf")
TEXT_FOLDERS = ("text_encoders", "clip", "clip_gguf")
VAE_FOLDERS = ("vae",)
LOADERS = {
    1: "CLIPLoader",
    2: "DualCLIPLoader",
    3: "TripleCLIPLoader",
    4: "QuadrupleCLIPLoader",
}
GUIDANCE = 3.5  # of FLUX.1 dev


@dataclass(frozen=True)
class Kind:
    """How ComfyUI's own example graphs sample with a family.

    Attributes:
        clip: number of text encoder files -> `type` of the loader; None where it has no such widget.
    """

    latent: str
    clip: dict[int, str | None]
    steps: int
    scheduler: str = "simple"
    guidance: bool = False


# FLUX with CLIP-L alone is what the demo model of this pack is.
KINDS: dict[str, Kind] = {
    "flux": Kind("EmptySD3LatentImage", {1: "stable_diffusion", 2: "flux"}, 20, guidance=True),
    "sd3": Kind("EmptySD3LatentImage", {1: "sd3", 2: "sd3", 3: None}, 28, "sgm_uniform"),
    "lumina2": Kind("EmptySD3LatentImage", {1: "lumina2"}, 25),
    "z-image": Kind("EmptySD3LatentImage", {1: "lumina2"}, 8),
    "qwen-image": Kind("EmptySD3LatentImage", {1: "qwen_image"}, 20),
    "hidream": Kind("EmptySD3LatentImage", {4: None}, 28),
    "sdxl": Kind("EmptyLatentImage", {2: "sdxl"}, 25, "normal"),
    "sd1.5": Kind("EmptyLatentImage", {1: "stable_diffusion"}, 25, "normal"),
}


def workflow(
    family: str,
    model: Path,
    encoders: Sequence[Path],
    vae: Path,
    vram_nbytes: int,
    shape: RunShape,
    prefer: str,
    mixed: bool = False,
) -> dict[str, Any]:
    """The graph: FitModel, prompt, sampler, VAE and a saved image.

    Args:
        shape: its cfg is that of the sampler too.

    Raises:
        SpecError: a family that no graph is written for, or a number of text encoders that it does not take.
    """
    kind = KINDS.get(family)
    if kind is None or shape.frames > 1:
        what = f"'{family}'" if kind is None else f"videos, got {shape.frames} frames"
        raise SpecError(
            f"--out: no graph is written for {what}, only images of {', '.join(KINDS)}.\n"
            "Take a graph of yours, and put the node Fit Model in the place of Load Diffusion Model."
        )
    if len(encoders) not in kind.clip:
        takes = " or ".join(str(n) for n in kind.clip)
        raise SpecError(
            f"--out: {family} takes {takes} text encoder files, got {len(encoders)}.\n"
            "Name each with a --text-encoder of its own."
        )
    fit: dict[str, Any] = {
        "model_name": name_in(model, MODEL_FOLDERS),
        "vram_gib": round(vram_nbytes / 2**30, 6),
        "clip": ["2", 0],
        "prefer": prefer,
        "width": shape.width,
        "height": shape.height,
        "frames": shape.frames,
        "batch": shape.batch,
        "cfg": shape.cfg,
        "cache": True,
        "mixed": mixed,
    }
    latent = {"width": shape.width, "height": shape.height, "batch_size": shape.batch}
    positive = "5" if kind.guidance else "3"
    sampler = {
        "model": ["1", 0],
        "seed": 0,
        "steps": kind.steps,
        "cfg": shape.cfg,
        "sampler_name": "euler",
        "scheduler": kind.scheduler,
        "positive": [positive, 0],
        "negative": ["4", 0],
        "latent_image": ["6", 0],
        "denoise": 1.0,
    }
    nodes: dict[str, Any] = {
        "1": _node("FitModel", "Fit Model", fit),
        "2": _loader(encoders, kind),
        "3": _node("CLIPTextEncode", "Prompt", {"text": "", "clip": ["1", 1]}),
        "4": _node("CLIPTextEncode", "Negative prompt", {"text": "", "clip": ["1", 1]}),
        "6": _node(kind.latent, "Latent", latent),
        "7": _node("KSampler", "Sampler", sampler),
        "8": _node("VAELoader", "VAE", {"vae_name": name_in(vae, VAE_FOLDERS)}),
        "9": _node("VAEDecode", "Decode", {"samples": ["7", 0], "vae": ["8", 0]}),
        "10": _node("SaveImage", "Save", {"images": ["9", 0], "filename_prefix": "fit"}),
        "11": _node("PreviewAny", "What was chosen", {"source": ["1", 2]}),
    }
    if kind.guidance:
        nodes["5"] = _node("FluxGuidance", "Guidance", {"conditioning": ["3", 0], "guidance": GUIDANCE})
    return nodes


def name_in(path: Path, folders: Sequence[str]) -> str:
    """The name of a file in its model folder: what follows the last of `folders` in its path, else its own name."""
    parts = path.absolute().parts
    places = [i for i, part in enumerate(parts[:-1]) if part in folders]
    return str(PurePosixPath(*parts[places[-1] + 1 :])) if places else path.name


def _loader(encoders: Sequence[Path], kind: Kind) -> dict[str, Any]:
    names = [name_in(path, TEXT_FOLDERS) for path in encoders]
    if len(names) == 1:
        inputs: dict[str, Any] = {"clip_name": names[0]}
    else:
        inputs = {f"clip_name{i}": name for i, name in enumerate(names, 1)}
    told = kind.clip[len(names)]
    inputs |= {"type": told} if told is not None else {}
    return _node(LOADERS[len(names)], "Text encoders", inputs)


def _node(kind: str, title: str, inputs: dict[str, Any]) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
