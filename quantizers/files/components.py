"""Which components a file holds, by the names and shapes of its tensors: models, and all else that stands beside them.

`architectures.recognise` knows diffusion models and text encoders. Here the file is cut into the parts of a checkpoint
first, and what is no model is named: LoRAs by their kind, ControlNets, VAEs, image encoders, upscalers, embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import NamedTuple

from ..meta import Shaped
from .architectures import known_model
from .signatures import ADAPTERS, IMAGE, UNET_CONTEXT


class Component(str, Enum):
    """What a part of a file is for."""

    DIFFUSION = "diffusion model"
    TEXT = "text encoder"
    VAE = "VAE"
    VOCODER = "vocoder"
    LORA = "LoRA"
    CONTROLNET = "ControlNet"
    CLIP_VISION = "image encoder"
    MMPROJ = "vision part of a text encoder"
    UPSCALER = "upscaler"
    EMBEDDING = "embedding"
    STYLE = "style model"
    IP_ADAPTER = "IP-Adapter"
    T2I_ADAPTER = "T2I-Adapter"
    GLIGEN = "GLIGEN model"
    IMATRIX = "importance matrix"
    EMA = "averaged weights of the training"
    UNKNOWN = "unknown"


class Part(NamedTuple):
    """One component.

    Attributes:
        family: the model, or what kind of it; empty where nothing tells.
        layout: of the names: "comfyui", "diffusers", "transformers", "openclip", "nunchaku", "llama.cpp", or empty.
        prefix: before all of its names.
        tensors, nbytes: of the file, scales and the like included.
        detail: what else its header tells, for people.
    """

    component: Component
    family: str = ""
    layout: str = ""
    prefix: str = ""
    tensors: int = 0
    nbytes: int = 0
    detail: str = ""


TITLES = {
    **{"flux": "FLUX.1", "flux2": "FLUX.2", "chroma": "Chroma", "hyvid": "HunyuanVideo", "sd3": "Stable Diffusion 3"},
    **{"aura": "AuraFlow", "hidream": "HiDream", "cosmos1": "Cosmos 1", "cosmos2": "Cosmos 2", "ltxv": "LTX-Video"},
    **{"wan": "Wan", "qwen_image": "Qwen-Image", "lumina2": "Lumina 2", "z-image": "Z-Image", "pixart": "PixArt"},
    **{"sd1": "Stable Diffusion 1 or 2", "sdxl": "Stable Diffusion XL", "t5": "T5", "t5encoder": "T5 encoder"},
    **{"qwen3vl": "Qwen3-VL", "qwen3": "Qwen3", "qwen2vl": "Qwen2-VL", "gemma": "Gemma", "gemma2": "Gemma 2"},
    **{"gemma3": "Gemma 3", "llama": "Llama", "sana": "Sana"},
}

# The parts of checkpoints, as ComfyUI, the original trainers and converters call them.
_SECTION = re.compile(
    r"(?P<ema>model_ema\.)"
    r"|(?P<model>model\.diffusion_model\.)"
    r"|(?P<vae>first_stage_model\.|vae\.)"
    r"|(?P<audio>audio_vae\.)"
    r"|(?P<vocoder>vocoder\.)"
    r"|(?P<projection>text_embedding_projection\.)"
    r"|(?P<text>cond_stage_model\.|conditioner\.embedders\.\d+\.|text_encoders\.[^.]+\.|text_encoder(_\d)?\.)"
    r"|(?P<vision>(clip_vision|image_encoder)\.)"
)
_VAE = (
    r"(^|\.)(decoder|encoder)\.(conv_in|conv1|conv_out|middle|up_blocks|down_blocks|up|down)\.",
    r"^(taesd_decoder|taesd_encoder)\.",
    r"^(decoder|encoder)\.layers\.\d+\.",
    r"^(post_quant_conv|quant_conv)\.",
)
_CLIP_TEXT = (
    r"(^|\.)text_model\.(encoder\.layers|embeddings)\.",
    r"(^|\.)transformer\.resblocks\.0\.",
    r"(^|\.)token_embedding\.weight$",
)
_CLIP_VISION = (
    r"(^|\.)vision_model\.encoder\.layers\.0\.",
    r"(^|\.)visual\.transformer\.resblocks\.",
    r"(^|\.)embeddings\.patch_embedding",
)
# In the order in which they are told apart; what is a known model has been told before.
_NAMED: tuple[tuple[Component, str, tuple[str, ...]], ...] = (
    (Component.IMATRIX, "", (r"\.in_sum2$",)),
    (Component.IP_ADAPTER, "", (r"^ip_adapter\.", r"^ip_adapter_double_blocks\.", r"^ip-adapter\.")),
    (Component.STYLE, "redux", (r"^redux_(up|down)\.weight$",)),
    (Component.STYLE, "style", (r"^style_embedding$",)),
    (Component.GLIGEN, "", (r"^position_net\.",)),
    (Component.T2I_ADAPTER, "", (r"^(adapter\.)?body\.\d+\.(block\d|resnets\.\d+\.block\d)\.weight$",)),
    (Component.MMPROJ, "", (r"^v\.blk\.0\.", r"^mm\.\d")),
    (Component.CLIP_VISION, "", _CLIP_VISION),
    (Component.TEXT, "clip", _CLIP_TEXT),
    (Component.VAE, "", _VAE),
    (
        Component.UPSCALER,
        "",
        (
            r"^model\.1\.sub\.\d+\.",
            r"^body\.\d+\.rdb1\.conv1\.weight$",
            r"(^|\.)residual_group\.blocks\.0\.",
            r"^upsampler\.",
        ),
    ),
)
# FLUX as nunchaku fuses its layers, and what its files call their models.
_NUNCHAKU_FLUX = (r"^transformer_blocks\.0\.qkv_proj_context\.", r"^single_transformer_blocks\.0\.qkv_proj\.")
NUNCHAKU_MODELS = {
    "nunchakufluxtransformer2dmodel": (Component.DIFFUSION, "flux"),
    "nunchakufluxtransformer2dmodelv2": (Component.DIFFUSION, "flux"),
    "nunchakuqwenimagetransformer2dmodel": (Component.DIFFUSION, "qwen_image"),
    "nunchakuzimagetransformer2dmodel": (Component.DIFFUSION, "z-image"),
    "nunchakusanatransformer2dmodel": (Component.DIFFUSION, "sana"),
    "nunchakut5encodermodel": (Component.TEXT, "t5encoder"),
}
_WIDTHS = {768: "CLIP-L", 1024: "OpenCLIP-H", 1280: "CLIP-G"}
# LoRA kinds: (kind, patterns); the first that is there counts, since LoKr and LoHa files hold nothing of the others.
_LORA_KINDS = (
    ("LoKr", r"\.lokr_\w+$"),
    ("LoHa", r"\.hada_\w+$"),
    ("OFT or BOFT", r"\.(oft|boft)_\w+$"),
    ("DoRA", r"\.(dora_scale|lora_magnitude_vector)"),
    ("LoRA", r"\.lora_(A|B|up|down|mid)(\.|$)|\.lora\.(up|down)\.|\.lora_[ab]$"),
)
_LORA_NAMES = (
    ("kohya's names", r"^(lora|lycoris)_(unet|te\d?|transformer)_"),
    ("PEFT's names", r"\.lora_[AB](\.|$)"),
    ("diffusers' names", r"\.lora\.(up|down)\.|(^|\.)processor\."),
)
# Which model an adapter is for, by the blocks that it names; blocks of several models are not told apart.
_LORA_FOR = (
    (
        "flux",
        r"double_blocks[._]0[._]img_attn[._]qkv|single_transformer_blocks[._]0[._].*proj_mlp|single_blocks[._]0[._]linear1",
    ),
    ("sd3", r"joint_blocks[._]0[._]"),
    ("wan", r"blocks[._]0[._]cross_attn[._][kqv]([._]|$)"),
    ("qwen_image", r"transformer_blocks[._]0[._]img_mlp[._]"),
    ("z-image", r"noise_refiner[._]0[._]attention[._]"),
    ("sdxl", r"(lora_te2_|add_embedding|label_emb)"),
)
# Parts of names without which none of the patterns can be there: to compile them all takes longer than to look.
_LORA_SIGNS = ("lora", ".lokr_", ".hada_", "oft_", ".dora_scale")
_CONTROLNET_SIGNS = ("control", "input_hint_block", "zero_convs")

# What a prefix alone says, whatever is behind it.
_BY_PREFIX = {
    "ema": Part(Component.EMA),
    "audio": Part(Component.VAE, "audio"),
    "vocoder": Part(Component.VOCODER),
    "projection": Part(Component.TEXT, detail="the projection of its output alone"),
}


def find_parts(shapes: Mapping[str, Shaped], nbytes: Mapping[str, int]) -> tuple[Part, ...]:
    """The components of a file, in the order of its names.

    Args:
        shapes: as `Scan.metas` has them: name -> what has the shape at full precision.
        nbytes: of every tensor of the file, scales and the like included.
    """
    text = "\n".join(shapes)
    if any(sign in text for sign in _LORA_SIGNS) and _any([*ADAPTERS[0][2], *(p for _, p in _LORA_KINDS)], text):
        return (_counted(_lora(shapes, text), nbytes),)
    if any(sign in text for sign in _CONTROLNET_SIGNS) and _any(ADAPTERS[1][2], text):
        return (_counted(_controlnet(shapes, text), nbytes),)
    sections = _sections(shapes)
    sizes = _sizes(nbytes, sections)
    found: list[Part] = []
    for prefix, (word, held) in sections.items():
        tensors, total = sizes[prefix]
        found.append(_section(prefix, word, held)._replace(tensors=tensors, nbytes=total))
    # A few tensors beside the parts of a checkpoint are its noise schedule and the like.
    known = [p for p in found if p.component is not Component.UNKNOWN]
    return tuple(known) if known else tuple(found)


def is_in(name: str, part: Part, parts: Sequence[Part]) -> bool:
    """Whether a tensor or layer belongs to a component rather than to another one of the file."""
    return len(parts) == 1 or _start(name)[0] == _start(part.prefix)[0]


def is_in_section(name: str) -> bool:
    """Whether the name begins as those of one part of a checkpoint do."""
    return bool(_start(name)[0])


def _counted(part: Part, nbytes: Mapping[str, int]) -> Part:
    return part._replace(tensors=len(nbytes), nbytes=sum(nbytes.values()))


def _any(patterns: Iterable[str], text: str) -> bool:
    return any(re.search(pattern, text, re.MULTILINE) for pattern in patterns)


def _start(name: str) -> tuple[str, str]:
    """(prefix of the part that a tensor belongs to, which kind of part)."""
    match = _SECTION.match(name)
    return (match[0], match.lastgroup or "") if match else ("", "")


def _sections(shapes: Mapping[str, Shaped]) -> dict[str, tuple[str, dict[str, Shaped]]]:
    """Prefix -> (kind, tensors with their full names)."""
    found: dict[str, tuple[str, dict[str, Shaped]]] = {}
    for name, shape in shapes.items():
        prefix, word = _start(name)
        found.setdefault(prefix, (word, {}))[1][name] = shape
    return found


def _sizes(nbytes: Mapping[str, int], sections: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Prefix -> (tensors, bytes)."""
    found: dict[str, tuple[int, int]] = dict.fromkeys(sections, (0, 0))
    for name, size in nbytes.items():
        prefix, _ = _start(name)
        tensors, total = found.get(prefix, (0, 0))
        found[prefix] = (tensors + 1, total + size)
    return found


def _section(prefix: str, word: str, held: Mapping[str, Shaped]) -> Part:
    """One part of a checkpoint, or the whole of a file that has no such parts."""
    if word in _BY_PREFIX:
        return _BY_PREFIX[word]._replace(prefix=prefix)
    below = {name[len(prefix) :]: shape for name, shape in held.items()} if prefix else held
    part = identify(below)
    if part.component is not Component.UNKNOWN or not word:
        return part._replace(prefix=prefix + part.prefix)
    guess = {
        "model": Component.DIFFUSION,
        "vae": Component.VAE,
        "text": Component.TEXT,
        "vision": Component.CLIP_VISION,
    }
    return Part(guess[word], prefix=prefix, detail="a model that is not known here" if word == "model" else "")


def identify(shapes: Mapping[str, Shaped]) -> Part:
    """What a set of tensors is that is no checkpoint of several parts; sizes are left at 0."""
    text = "\n".join(shapes)
    if not shapes:
        return Part(Component.UNKNOWN, detail="it holds no tensors")
    found = known_model(shapes)
    if found is not None:
        component = Component.DIFFUSION if found.component == IMAGE else Component.TEXT
        return Part(component, found.family or found.architecture, found.layout, found.prefix)
    if _any(_NUNCHAKU_FLUX, text):
        return Part(Component.DIFFUSION, "flux", "nunchaku")
    named = _first(_NAMED, text)
    if named is None:
        embedding = _embedding(shapes)
        return embedding or Part(Component.UNKNOWN, detail=_seen(shapes))
    if named.component is Component.VAE:
        return _vae(shapes)
    if named.component is Component.TEXT:
        return _clip(shapes)
    return named


def _first(table: Iterable[tuple[Component, str, tuple[str, ...]]], text: str) -> Part | None:
    for component, family, patterns in table:
        if _any(patterns, text):
            return Part(component, family)
    return None


def _named(shapes: Mapping[str, Shaped], pattern: str) -> Shaped | None:
    return next((shape for name, shape in shapes.items() if re.search(pattern, name)), None)


def _vae(shapes: Mapping[str, Shaped]) -> Part:
    """Its latent channels, and whether it is one for video: its convolutions are 3-D then."""
    first = _named(shapes, r"(^|\.)decoder\.(conv_in|conv1)\.(conv\.)?weight$")
    tiny = _named(shapes, r"^(taesd_decoder\.|decoder\.)?(layers\.)?[01]\.weight$") if first is None else None
    weight = first or tiny
    if weight is None or len(weight.shape) < 4:
        return Part(Component.VAE)
    kind = "tiny (TAESD)" if tiny is not None else "video" if len(weight.shape) == 5 else "image"
    return Part(Component.VAE, kind, detail=f"{weight.shape[1]} latent channels")


def _clip(shapes: Mapping[str, Shaped]) -> Part:
    embedding = _named(shapes, r"(^|\.)token_embedding\.weight$")
    width = embedding.shape[-1] if embedding is not None and len(embedding.shape) == 2 else 0
    layout = "transformers" if _any(_CLIP_TEXT[:1], "\n".join(shapes)) else "openclip"
    return Part(Component.TEXT, _WIDTHS.get(width, "CLIP"), layout, detail=f"{width} wide" if width else "")


def _embedding(shapes: Mapping[str, Shaped]) -> Part | None:
    """Textual inversion: a few vectors, by the names that trainers give them."""
    names = {"emb_params", "clip_l", "clip_g", "t5xxl", "clip_h", "<UNKNOWN>"}
    if len(shapes) > 8 or not all(len(s.shape) in (1, 2) for s in shapes.values()):
        return None
    if names & set(shapes) or any(n.startswith("string_to_param.") for n in shapes):
        count = max(s.shape[0] if len(s.shape) == 2 else 1 for s in shapes.values())
        return Part(Component.EMBEDDING, detail=f"{count} vectors")
    return None


def _lora(shapes: Mapping[str, Shaped], text: str) -> Part:
    kind = next((k for k, p in _LORA_KINDS if re.search(p, text, re.MULTILINE)), "LoRA")
    style = next((k for k, p in _LORA_NAMES if re.search(p, text, re.MULTILINE)), "")
    family = next((k for k, p in _LORA_FOR if re.search(p, text, re.MULTILINE)), "")
    ranks = sorted({min(s.shape[:2]) for n, s in shapes.items() if _RANKED.search(n) and len(s.shape) >= 2})
    shown = [
        kind,
        style,
        f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "",
    ]
    text_side = re.search(r"(^|[._])(lora_te\d?_|text_encoder|te\d?[._])", text, re.MULTILINE)
    shown.append("for the text encoder too" if text_side else "")
    return Part(Component.LORA, family or _unet_family(shapes), detail=", ".join(x for x in shown if x))


_RANKED = re.compile(r"\.(lora_(A|down)|hada_w1_b|lokr_w[12]_b)(\.|$)|\.lora\.down\.")


def _unet_family(shapes: Mapping[str, Shaped]) -> str:
    """SD 1 and 2, or SDXL, by the width of the text that cross-attention takes in."""
    name = re.compile(r"(input_blocks|down_blocks)[._].*attn2[._]to_k([._].*(A|down)([._]|$)|\.weight$)")
    widths = {s.shape[1] for n, s in shapes.items() if name.search(n) and len(s.shape) >= 2}
    return "sdxl" if 2048 in widths else "sd1" if widths & {768, 1024} else ""


def _controlnet(shapes: Mapping[str, Shaped], text: str) -> Part:
    if re.search(r"(^|\.)lora_controlnet$", text, re.MULTILINE):
        return Part(Component.CONTROLNET, _unet_family(shapes), detail="Control-LoRA")
    unet = any(re.search(UNET_CONTEXT, n) for n in shapes)
    diffusers = bool(re.search(r"(^|\.)controlnet_(blocks|down_blocks|cond_embedding)\.", text, re.MULTILINE))
    if unet:
        return Part(Component.CONTROLNET, _unet_family(shapes), "diffusers" if diffusers else "comfyui")
    if re.search(r"(^|\.)(double_blocks|single_transformer_blocks|controlnet_single_blocks)\.", text, re.MULTILINE):
        return Part(Component.CONTROLNET, "flux", "diffusers" if diffusers else "comfyui")
    if re.search(r"(^|\.)(pos_embed\.proj|joint_blocks)\.", text, re.MULTILINE):
        return Part(Component.CONTROLNET, "sd3", "diffusers" if diffusers else "comfyui")
    return Part(Component.CONTROLNET)


def _seen(shapes: Mapping[str, Shaped]) -> str:
    shown = ", ".join(f"'{name}' {tuple(shape.shape)}" for name, shape in list(shapes.items())[:3])
    return f"{len(shapes)} tensors, such as {shown}"
