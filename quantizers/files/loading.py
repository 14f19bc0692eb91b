"""What opens a component here: for each host the node, the libraries that it needs, or why there is none.

Libraries are looked for and not imported: whether one works is asked when it is used, and takes seconds.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from .components import Component, Part
from .locate import Container

COMFYUI, STANDALONE = "ComfyUI", "quantwire run"
# What ComfyUI's own loaders read: beginnings of the schemes' ids.
NATIVE = ("comfy", "scaled-fp8", "plain-fp8")
# Backend, which a format's id begins with -> (package, module) that makes its weights. GGUF blocks and casts to fp8 are
# made by torch alone.
LIBRARIES = {
    "bnb": ("bitsandbytes", "bitsandbytes"),
    "quanto": ("optimum-quanto", "optimum.quanto"),
    "comfy": ("comfy-kitchen", "comfy_kitchen"),
    "sdnq": ("sdnq", "sdnq"),
    "torchao": ("torchao", "torchao"),
    "nncf": ("nncf", "nncf"),
}
# The others' weights are restored and multiplied by the pack itself where their package is missing (`probe_reading` of
# each backend).
NEEDED_TO_READ = ("sdnq",)
NVFP4 = "comfy-nvfp4"
# Before the names of a diffusion model, as ComfyUI's loaders know them (comfy/model_detection.py,
# unet_prefix_from_state_dict at 0.33).
_PREFIXES_IN_COMFYUI = ("model.diffusion_model.", "model.model.", "net.", "model.")
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

_MEND = f"`quantwire doctor FILE --repair OUT` mends that where it is certain. {_CONVERT}"


class Library(NamedTuple):
    """A package whose weights a file holds.

    Attributes:
        needed: whether they cannot be read without it.
    """

    package: str
    installed: bool
    needed: bool


class Loading(NamedTuple):
    """How a host opens the file.

    Attributes:
        node: that opens it; empty where none does.
        folder: model folder where the node looks.
        libraries: of the weights that are loaded, with whether they are installed here and whether that is needed.
        note: why nothing opens it and what to do; or what is left out.
    """

    host: str
    node: str
    folder: str = ""
    libraries: tuple[Library, ...] = ()
    note: str = ""


class Stored(NamedTuple):
    """What decides how a file is loaded; of the component that it is for, where nothing else is said.

    Attributes:
        schemes: ids of the schemes of its quantized layers.
        formats: of ours that its layers are in.
        refused: why layers cannot be loaded, empty where all can.
        misread: node of ComfyUI that misreads the file -> what is wrong and what the node makes of it.
        others_native: whether ComfyUI's own loaders read the file's other components.
    """

    container: Container
    parts: tuple[Part, ...]
    schemes: frozenset[str]
    formats: frozenset[str]
    refused: str
    misread: Mapping[str, str] = MappingProxyType({})
    others_native: bool = True


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
    """Whose weights of these formats are, with whether it is there."""
    backends = dict.fromkeys(b for b in (f.partition("-")[0] for f in sorted(formats)) if b in LIBRARIES)
    found = ((*LIBRARIES[b], b in NEEDED_TO_READ) for b in backends)
    return tuple(Library(package, is_installed(module), needed) for package, module, needed in found)


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


def is_native(schemes: Iterable[str]) -> bool:
    """Whether ComfyUI's own loaders read all of these schemes."""
    return all(scheme.startswith(NATIVE) for scheme in schemes)


def _whole_checkpoint(stored: Stored) -> bool:
    return len({p.component for p in stored.parts} & {Component.DIFFUSION, Component.TEXT, Component.VAE}) > 1


def _diffusion_comfyui(stored: Stored, part: Part) -> Loading:
    if stored.refused:
        return Loading(COMFYUI, "", note=stored.refused)
    if stored.container is Container.GGUF:
        if _whole_checkpoint(stored):
            return Loading(COMFYUI, "", note=_ALL_IN_ONE_GGUF)
        return Loading(COMFYUI, "LoadGGUF", "diffusion_models", libraries(stored.formats))
    stock, why = _stock_diffusion(stored, part)
    if not why:
        return stock
    if not stored.schemes:
        return Loading(COMFYUI, "", note=_to(why))
    # What everybody knows of a quantization that is not ComfyUI's needs no word.
    told = is_native(stored.schemes) or stock.node in stored.misread
    return _load_quantized(COMFYUI, stored, part, why if told else "")


def _stock_diffusion(stored: Stored, part: Part) -> tuple[Loading, str]:
    """ComfyUI's own node for a diffusion model, and why that does not open it; empty where it does."""
    whole = _whole_checkpoint(stored)
    # Without a prefix before the model's names, CheckpointLoaderSimple opens the model alone.
    checkpoint = whole and bool(part.prefix) and stored.others_native
    node = "CheckpointLoaderSimple" if checkpoint else "UNETLoader"
    if checkpoint and node in stored.misread and "UNETLoader" not in stored.misread and not stored.schemes:
        node = "UNETLoader"
    note = _OTHERS if whole and node == "UNETLoader" else ""
    # ComfyUI brings comfy-kitchen itself, so that nothing is to be installed for its own formats.
    found = Loading(COMFYUI, node, "checkpoints" if checkpoint else "diffusion_models", note=note)
    if node in stored.misread:
        return found, f"Not {node}: {stored.misread[node]}"
    if not is_native(stored.schemes):
        return found, f"{node} does not know this quantization."
    if stored.container is Container.SHARDED:
        return found, "ComfyUI's loaders open single files."
    if part.prefix and part.prefix not in _PREFIXES_IN_COMFYUI:
        return found, f"{node} does not know names that begin with '{part.prefix}'."
    if part.layout == "diffusers" and (stored.schemes or part.family not in _DIFFUSERS_IN_COMFYUI):
        what = "quantized layers" if stored.schemes else part.family
        return found, f"{node} does not know {what} under diffusers' names."
    return found, ""


def _to(why: str) -> str:
    return f"{why} {_CONVERT}"


_OTHERS = "Its text encoders and VAE are left out: take them from files of their own."
_ALL_IN_ONE_GGUF = (
    "Its diffusion model, text encoders and VAE stand in one GGUF file, and LoadGGUF opens a diffusion model alone. "
    "Take a file of the diffusion model."
)


def _load_quantized(host: str, stored: Stored, part: Part, why: str = "") -> Loading:
    """LoadQuantized, with why not a node of the host's own."""
    if host == COMFYUI and part.layout == "diffusers" and NVFP4 in stored.formats:
        return Loading(
            host, "", note=f"q, k and v have scales of their own in nvfp4, and ComfyUI's matrix one. {_CONVERT}"
        )
    whole = _whole_checkpoint(stored)
    folder = "checkpoints" if whole else "diffusion_models"
    note = f"{why} {_OTHERS if whole else ''}".strip()
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
    why = _not_standalone(stored, part)
    return Loading(STANDALONE, "", note=_to(why)) if why else Loading(STANDALONE, "UNETLoader", "diffusion_models")


def _not_standalone(stored: Stored, part: Part) -> str:
    """Why the embedded host's UNETLoader does not open a plain file; empty where it does."""
    if stored.container is Container.SHARDED:
        return "UNETLoader opens single files."
    if _whole_checkpoint(stored):
        return "UNETLoader opens files that hold a diffusion model alone."
    if part.layout != "comfyui" or part.prefix not in ("", "model.diffusion_model."):
        start = f", here with '{part.prefix}' before it" if part.prefix else ""
        return f"UNETLoader knows FLUX.1 in ComfyUI's layout, and this has names of {part.layout}{start}."
    return ""


def _text_comfyui(stored: Stored, part: Part) -> Loading:
    if stored.refused:
        return Loading(COMFYUI, "", note=stored.refused)
    if stored.container is Container.GGUF:
        return Loading(COMFYUI, "LoadGGUFTextEncoder", "text_encoders", libraries(stored.formats))
    if "CLIPLoader" in stored.misread:
        return Loading(COMFYUI, "", note=f"Not CLIPLoader: {stored.misread['CLIPLoader']} {_MEND}")
    if not is_native(stored.schemes):
        return Loading(COMFYUI, "", note=f"No node opens a text encoder in this form. {_CONVERT}")
    if stored.container is Container.SHARDED:
        return Loading(COMFYUI, "", note=f"ComfyUI's loaders open single files. {_CONVERT}")
    return Loading(COMFYUI, "CLIPLoader", "text_encoders")


def _text_standalone(stored: Stored, part: Part) -> Loading:
    clip = part.family in ("CLIP-L", "CLIP") and part.layout == "transformers"
    if not clip and part.family not in ("t5encoder", "t5"):
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
    if not is_native(stored.schemes):
        return Loading(COMFYUI, "", note=f"{node} does not know this quantization; take a full-precision file.")
    return Loading(COMFYUI, node, folder)


def _casts_only(stored: Stored) -> bool:
    """Whether all layers are plain, or fp8 without scales, which is cast as the file's other tensors are."""
    return stored.schemes <= {"plain-fp8"}


def _other_standalone(stored: Stored, part: Part) -> Loading:
    single = stored.container is Container.SAFETENSORS and not stored.schemes
    if part.component is Component.VAE and part.family.startswith("tiny") and single:
        return Loading(STANDALONE, "VAELoader", "vae")
    if part.component is Component.LORA and stored.container is Container.SAFETENSORS and _casts_only(stored):
        return Loading(STANDALONE, "LoraLoaderModelOnly", "loras")
    if part.component is Component.VAE:
        return Loading(
            STANDALONE, "", note="Only tiny VAEs (TAESD) run without ComfyUI. Use `quantwire run --server URL`."
        )
    return Loading(STANDALONE, "", note="Not used without ComfyUI. Use `quantwire run --server URL`.")
