"""What opens a component here: for each host the node, the libraries that it needs, or why there is none.

Libraries are looked for and not imported: whether one works is asked when it is used, and takes seconds.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .components import Component, Part
from .locate import Container

COMFYUI, STANDALONE = "ComfyUI", "quantwire run"
# What ComfyUI's own loaders read: beginnings of the schemes' ids.
NATIVE = ("comfy", "scaled-fp8", "plain-fp8")
# Backend, which a format's id begins with -> (package, module) that its weights need to be multiplied with. GGUF blocks
# and casts to fp8 need torch alone.
LIBRARIES = {
    "bnb": ("bitsandbytes", "bitsandbytes"),
    "quanto": ("optimum-quanto", "optimum.quanto"),
    "comfy": ("comfy-kitchen", "comfy_kitchen"),
    "sdnq": ("sdnq", "sdnq"),
    "torchao": ("torchao", "torchao"),
    "nncf": ("nncf", "nncf"),
}
NVFP4 = "comfy-nvfp4"
# Layouts of diffusers that ComfyUI's UNETLoader knows too (comfy/model_detection.py, convert_diffusers_mmdit and
# model_config_from_diffusers_unet at 0.33).
_DIFFUSERS_IN_COMFYUI = ("aura", "pixart", "z-image", "flux", "sd3", "sd1", "sdxl")
_STOCK = {
    Component.VAE: ("VAELoader", "vae"),
    Component.LORA: ("LoraLoader or LoraLoaderModelOnly", "loras"),
    Component.CONTROLNET: ("ControlNetLoader", "controlnet"),
    Component.CLIP_VISION: ("CLIPVisionLoader", "clip_vision"),
    Component.UPSCALER: ("UpscaleModelLoader", "upscale_models"),
    Component.STYLE: ("StyleModelLoader", "style_models"),
    Component.GLIGEN: ("GLIGENLoader", "gligen"),
    Component.T2I_ADAPTER: ("ControlNetLoader", "controlnet"),
}
_OTHER = {
    Component.EMBEDDING: "Put it into the folder embeddings and write embedding:NAME in a prompt.",
    Component.IP_ADAPTER: "ComfyUI has no loader of its own for it; packs for IP-Adapter do.",
    Component.IMATRIX: "It holds no weights: give it to `quantwire convert --imatrix`.",
    Component.MMPROJ: "LoadGGUFTextEncoder finds it by itself beside the file of its text encoder.",
}
_CONVERT = "Make a file that is: `quantwire convert FILE OUT.safetensors --type BF16`, or another type."


class Library(NamedTuple):
    """A package that loading needs."""

    package: str
    installed: bool


class Loading(NamedTuple):
    """How a host opens the file.

    Attributes:
        node: that opens it; empty where none does.
        folder: model folder where the node looks.
        libraries: that this takes beside torch, with whether they are installed here.
        note: why nothing opens it and what to do; or what is left out.
    """

    host: str
    node: str
    folder: str = ""
    libraries: tuple[Library, ...] = ()
    note: str = ""


class Stored(NamedTuple):
    """What decides how a file is loaded.

    Attributes:
        schemes: ids of the schemes of its quantized layers.
        formats: of ours that its layers are in.
        refused: why layers of the component that the file is for cannot be loaded, empty where all can.
    """

    container: Container
    parts: tuple[Part, ...]
    schemes: frozenset[str]
    formats: frozenset[str]
    refused: str


def loadings(stored: Stored) -> tuple[Loading, ...]:
    """How each host opens a file."""
    main = main_part(stored.parts)
    if stored.refused and main.component not in (Component.DIFFUSION, Component.TEXT):
        return (Loading(COMFYUI, "", note=stored.refused), Loading(STANDALONE, "", note=stored.refused))
    if main.component is Component.DIFFUSION:
        return (_diffusion_comfyui(stored, main), _diffusion_standalone(stored, main))
    if main.component is Component.TEXT:
        return (_text_comfyui(stored, main), _text_standalone(stored, main))
    return (_stock(stored, main), _other_standalone(stored, main))


def main_part(parts: Sequence[Part]) -> Part:
    """The component that a file is for: a diffusion model, if it holds one."""
    model = next((p for p in parts if p.component is Component.DIFFUSION), None)
    return model or (parts[0] if parts else Part(Component.UNKNOWN))


def libraries(formats: Iterable[str]) -> tuple[Library, ...]:
    """What loading weights of these formats takes, with whether it is there."""
    needed = dict.fromkeys(LIBRARIES[b] for b in (f.partition("-")[0] for f in sorted(formats)) if b in LIBRARIES)
    return tuple(Library(package, is_installed(module)) for package, module in needed)


def is_installed(module: str) -> bool:
    """Whether a module can be found, without importing it or the package that it is in."""
    top, *inner = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
        for name in inner:
            places = spec.submodule_search_locations if spec is not None else None
            spec = importlib.machinery.PathFinder.find_spec(name, list(places)) if places else None
    except (ImportError, ValueError):
        return False
    return spec is not None


def _is_native(stored: Stored) -> bool:
    return all(scheme.startswith(NATIVE) for scheme in stored.schemes)


def _whole_checkpoint(stored: Stored) -> bool:
    return len({p.component for p in stored.parts} & {Component.DIFFUSION, Component.TEXT, Component.VAE}) > 1


def _diffusion_comfyui(stored: Stored, part: Part) -> Loading:
    if stored.refused:
        return Loading(COMFYUI, "", note=stored.refused)
    if stored.container is Container.GGUF:
        if _whole_checkpoint(stored):
            return Loading(COMFYUI, "", note=_ALL_IN_ONE_GGUF)
        return Loading(COMFYUI, "LoadGGUF", "diffusion_models", libraries(stored.formats))
    if stored.schemes and (not _is_native(stored) or stored.container is Container.SHARDED):
        return _load_quantized(COMFYUI, stored, part)
    if stored.container is Container.SHARDED:
        return Loading(COMFYUI, "", note=f"ComfyUI's loaders open single files. {_CONVERT}")
    if _whole_checkpoint(stored):
        # ComfyUI brings comfy-kitchen itself, so that nothing is to be installed for its own formats.
        return Loading(COMFYUI, "CheckpointLoaderSimple", "checkpoints")
    if part.layout == "diffusers" and (stored.schemes or part.family not in _DIFFUSERS_IN_COMFYUI):
        if stored.schemes:
            return _load_quantized(COMFYUI, stored, part)
        return Loading(
            COMFYUI, "", note=f"UNETLoader does not know {part.family} under diffusers' names. {_CONVERT}"
        )  # fmt: skip
    return Loading(COMFYUI, "UNETLoader", "diffusion_models")


_ALL_IN_ONE_GGUF = (
    "Its diffusion model, text encoders and VAE stand in one GGUF file, and LoadGGUF opens a diffusion model alone. "
    "Take a file of the diffusion model."
)


def _load_quantized(host: str, stored: Stored, part: Part) -> Loading:
    others = "Its text encoders and VAE are left out: take them from files of their own."
    if host == COMFYUI and part.layout == "diffusers" and NVFP4 in stored.formats:
        return Loading(
            host, "", note=f"q, k and v have scales of their own in nvfp4, and ComfyUI's matrix one. {_CONVERT}"
        )
    note = others if _whole_checkpoint(stored) else ""
    folder = "checkpoints" if note else "diffusion_models"
    return Loading(host, "LoadQuantized", folder, libraries(stored.formats), note)


def _diffusion_standalone(stored: Stored, part: Part) -> Loading:
    if part.family != "flux":
        known = f"Only FLUX.1 runs without ComfyUI, and this is {part.family or 'another model'}."
        return Loading(STANDALONE, "", note=f"{known} Use `quantwire run --server URL`.")
    if stored.refused:
        return Loading(STANDALONE, "", note=stored.refused)
    if stored.container is Container.GGUF:
        return Loading(STANDALONE, "LoadGGUF", "diffusion_models", libraries(stored.formats))
    if stored.schemes:
        return _load_quantized(STANDALONE, stored, part)
    if stored.container is Container.SHARDED:
        return Loading(STANDALONE, "", note=f"UNETLoader opens single files. {_CONVERT}")
    return Loading(STANDALONE, "UNETLoader", "diffusion_models")


def _text_comfyui(stored: Stored, part: Part) -> Loading:
    if stored.refused:
        return Loading(COMFYUI, "", note=stored.refused)
    if stored.container is Container.GGUF:
        return Loading(COMFYUI, "LoadGGUFTextEncoder", "text_encoders", libraries(stored.formats))
    if not _is_native(stored):
        return Loading(COMFYUI, "", note=f"No node opens a text encoder in this form. {_CONVERT}")
    if stored.container is Container.SHARDED:
        return Loading(COMFYUI, "", note=f"ComfyUI's loaders open single files. {_CONVERT}")
    return Loading(COMFYUI, "CLIPLoader", "text_encoders")


def _text_standalone(stored: Stored, part: Part) -> Loading:
    if part.family not in ("CLIP-L", "t5encoder", "t5"):
        return Loading(STANDALONE, "", note="Only CLIP-L and T5 run without ComfyUI. Use `quantwire run --server URL`.")
    if stored.refused:
        return Loading(STANDALONE, "", note=stored.refused)
    if stored.container is Container.GGUF:
        return Loading(STANDALONE, "LoadGGUFTextEncoder", "text_encoders", libraries(stored.formats))
    if stored.schemes:
        return Loading(STANDALONE, "", note=f"No node opens a quantized text encoder in this form. {_CONVERT}")
    if stored.container is Container.SHARDED:
        return Loading(STANDALONE, "", note=f"CLIPLoader opens single files. {_CONVERT}")
    return Loading(STANDALONE, "CLIPLoader", "text_encoders")


def _stock(stored: Stored, part: Part) -> Loading:
    if part.component in _OTHER:
        return Loading(COMFYUI, "", note=_OTHER[part.component])
    if part.component not in _STOCK:
        return Loading(COMFYUI, "", note="Nothing is known that opens it: no component of a model was recognised.")
    node, folder = _STOCK[part.component]
    if stored.container is Container.GGUF:
        return Loading(COMFYUI, "", note=f"{node} does not open GGUF files; take a safetensors file.")
    if stored.container is Container.SHARDED:
        return Loading(COMFYUI, "", note=f"{node} opens single files.")
    if not _is_native(stored):
        return Loading(COMFYUI, "", note=f"{node} does not know this quantization; take a full-precision file.")
    return Loading(COMFYUI, node, folder)


def _other_standalone(stored: Stored, part: Part) -> Loading:
    single = stored.container is Container.SAFETENSORS and not stored.schemes
    if part.component is Component.VAE and part.family.startswith("tiny") and single:
        return Loading(STANDALONE, "VAELoader", "vae")
    if part.component is Component.LORA and single:
        return Loading(STANDALONE, "LoraLoaderModelOnly", "loras")
    if part.component is Component.VAE:
        return Loading(
            STANDALONE, "", note="Only tiny VAEs (TAESD) run without ComfyUI. Use `quantwire run --server URL`."
        )
    return Loading(STANDALONE, "", note="Not used without ComfyUI. Use `quantwire run --server URL`.")
