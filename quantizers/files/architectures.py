"""What a model file holds, by its tensor names and shapes: architecture, layout, prefix; and what a GGUF of it holds.

A model is recognised by tensors that all must be there (`signatures.py`). Every prefix that checkpoints have is tried,
so an all-in-one file is recognised by the model in it, and its text encoders and VAE are left out.

`families.py` was not used for it: it must name every variant of a model, ControlNets included, to know which layers to
keep, and does not tell layouts apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ..errors import FileError
from ..meta import Shaped, TensorMeta
from .signatures import ADAPTERS, IMAGE, OTHERS, SIGNATURES, TEXT, Signature

if TYPE_CHECKING:
    from .layouts.llama_cpp import Heads
    from .layouts.target import Target

S = TypeVar("S", bound=Shaped)
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.", "net.", "transformer.", "unet.", "model.", "")
# Parts of a checkpoint beside the diffusion model, where that has no prefix.
OTHER_PARTS = re.compile(r"^(first_stage_model|cond_stage_model|conditioner|text_encoders?|vae|model_ema)\.")
# Left over from training, or in Cosmos' files from TransformerEngine: no loader reads them.
DROPPABLE = re.compile(r"(^|\.)(_extra_state|accum_\w+)$")
_TEXT_START = re.compile(
    r"^(?P<before>.*?)((model\.)?(language_model\.)?(model\.)?layers\.0\.self_attn\.q_proj\.weight"
    r"|encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight)$"
)
_QK_NORM = re.compile(r"\.norm\.(query_norm|key_norm)\.weight$")


@dataclass(frozen=True)
class Found:
    """What was recognised.

    Attributes:
        architecture: the `general.architecture` string under which GGUF loaders know it.
        component: "diffusion model" or "text encoder".
        layout: "comfyui", "diffusers", "transformers" or "llama.cpp".
        prefix: stands before all names of the component; tensors without it are others' (a VAE, ...).
        evidence: the names by which it was recognised.
        family: the model itself; differs from `architecture` where several models go by one string.
    """

    architecture: str
    component: str
    layout: str
    prefix: str
    evidence: tuple[str, ...]
    family: str = ""


def detect(metas: Mapping[str, Shaped]) -> Found:
    """Recognise a model.

    Args:
        metas: all tensors of a file, by name. Whether they are quantized is not looked at.
    Raises:
        FileError: nothing is there, or nothing that is known; the message says what was seen.
    """
    found = recognise(metas)
    if found is None:
        raise FileError(f"No known diffusion model or text encoder: {_seen(metas)}\n{_nearest(metas)}")
    return found


def recognise(metas: Mapping[str, Shaped]) -> Found | None:
    """`detect`, but None for what is nothing that is known.

    Raises:
        FileError: nothing is there, or something known that is no model: a LoRA, a VAE, ...
    """
    if not metas:
        raise FileError("The file holds no tensors.\nGive the file of a diffusion model or of a text encoder.")
    _refuse(ADAPTERS, metas, "")
    found = known_model(metas)
    if found is None:
        _refuse(OTHERS, metas, _seen(metas))
    return found


def known_model(metas: Mapping[str, Shaped]) -> Found | None:
    """`recognise` of what is no adapter, which has names of the model that it is for."""
    for prefix in PREFIXES:
        names = _below(metas, prefix)
        for signature in SIGNATURES if names else ():
            if signature.component == IMAGE and _fits(signature, names):
                return _found(signature, prefix)
    names = _text_names(metas)
    for signature in SIGNATURES:
        if signature.component == TEXT and _fits(signature, names):
            return _found(signature, _text_prefix(metas))
    return None


def comfyui_targets(found: Found, metas: Mapping[str, TensorMeta], heads: Heads | None = None) -> list[Target]:
    """The tensors under the names that ComfyUI reads, without prefix.

    Text encoders get those of transformers, which ComfyUI reads.

    Args:
        heads: of a text encoder, see `text_keys.find_heads`; None takes heads 128 wide where rows depend on it.
    Raises:
        FileError: a tensor that has no place there, or a file that is not complete.
    """
    # The layouts are imported where they are needed: to recognise a model takes less time than they do.
    from .layouts.target import Piece, target

    if found.component == TEXT and found.layout == "llama.cpp":
        from .layouts.llama_cpp import llama_cpp_to_transformers

        return llama_cpp_to_transformers(found.architecture, metas, heads)
    names = _below(metas, found.prefix)
    if found.layout == "diffusers":
        from .layouts.diffusers import diffusers_to_comfyui

        return diffusers_to_comfyui(found.family, names, found.prefix)
    scale = found.architecture == "flux"
    return [
        target(_canonical(name) if scale else name, (Piece(found.prefix + name),), {found.prefix + name: meta})
        for name, meta in names.items()
        if not DROPPABLE.search(name)
    ]


def gguf_targets(found: Found, metas: Mapping[str, TensorMeta], heads: Heads | None = None) -> list[Target]:
    """The tensors of a GGUF file of it: ComfyUI's names for diffusion models, llama.cpp's for text encoders.

    Args:
        heads: as `comfyui_targets`.
    Raises:
        FileError: as `comfyui_targets`, and a text encoder that llama.cpp's names do not fit.
    """
    if found.component == IMAGE:
        return comfyui_targets(found, metas)
    if found.layout == "llama.cpp":
        from .layouts.target import Piece, target

        return [target(name, (Piece(name),), metas) for name in metas]
    from .layouts.llama_cpp import transformers_to_llama_cpp

    return transformers_to_llama_cpp(found.architecture, metas, heads)


def _canonical(name: str) -> str:
    """The original files of FLUX call these norms `.scale`, which diffusers reads too; ComfyUI reads both."""
    return _QK_NORM.sub(r".norm.\1.scale", name)


def _below(metas: Mapping[str, S], prefix: str) -> dict[str, S]:
    """The tensors with a prefix, by the rest of their names; with none, all but other parts of a checkpoint."""
    if prefix:
        return {name[len(prefix) :]: meta for name, meta in metas.items() if name.startswith(prefix)}
    return {name: meta for name, meta in metas.items() if not OTHER_PARTS.match(name)}


def _text_prefix(metas: Iterable[str]) -> str:
    return next((m["before"] for m in map(_TEXT_START.match, metas) if m), "")


def _text_names(metas: Mapping[str, Shaped]) -> dict[str, Shaped]:
    """The tensors of a text encoder by the names that signatures have: from `layers.` or `encoder.` on."""
    before = _text_prefix(metas)
    inner = re.compile(
        rf"^{re.escape(before)}(model\.)?(language_model\.)?(model\.)?(?=(layers|visual|embed_tokens)\.)"
    )
    return {inner.sub("", name).removeprefix(before): meta for name, meta in metas.items()}


def _fits(signature: Signature, names: Mapping[str, Shaped]) -> bool:
    # The names first: patterns are tried on every tensor, which takes seconds where a file has many.
    return all(name in names for name, _ in signature.names) and not _missing(signature, names)


def _missing(signature: Signature, names: Mapping[str, Shaped]) -> list[str]:
    """What speaks against a model, in words."""
    missing: list[str] = []
    for name, dimensions in signature.names:
        meta = names.get(name)
        if meta is None:
            missing.append(f"'{name}' is missing")
        elif dimensions and len(meta.shape) != dimensions:
            missing.append(f"'{name}' has shape {meta.shape}, expected {dimensions} dimensions")
    for pattern in signature.absent:
        there = next((n for n in names if re.search(pattern, n)), None)
        if there:
            missing.append(f"'{there}' is there")
    if signature.sizes:
        pattern, axis, sizes = signature.sizes
        found = {m.shape[axis]: n for n, m in names.items() if re.search(pattern, n) and m.shape}
        if not found.keys() & set(sizes):
            size, name = next(iter(found.items()), ("", ""))
            expected = " or ".join(map(str, sizes))
            missing.append(f"'{name}' is {size} wide, expected {expected}" if name else f"nothing is {expected} wide")
    return missing


def _found(signature: Signature, prefix: str) -> Found:
    evidence = tuple(name for name, _ in signature.names)
    return Found(
        signature.architecture, signature.component, signature.layout, prefix, evidence, family=signature.family
    )


def _refuse(kinds: Iterable[tuple[str, str, tuple[str, ...]]], metas: Iterable[str], seen: str) -> None:
    for what, todo, patterns in kinds:
        search = re.compile("|".join(f"(?:{p})" for p in patterns)).search
        name = next((n for n in metas if search(n)), None)
        if name:
            first = f"{what}: it has '{name}'. {seen}"
            raise FileError(f"{first.rstrip()}\n{todo}")


def _seen(metas: Mapping[str, Shaped]) -> str:
    names = list(metas)
    first, last = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    common = first[: first.rfind(".", 0, same) + 1]
    shown = ", ".join(f"'{n}' {metas[n].shape}" for n in names[:3])
    return f"{len(names)} tensors" + (f", all below '{common}'" if common else "") + f", such as {shown}."


def _nearest(metas: Mapping[str, Shaped]) -> str:
    """The model of which most names are there, and what speaks against it."""
    best, shown = float("-inf"), "None of the names is one by which a model is recognised."
    text = _text_names(metas)
    for prefix in PREFIXES:
        names = _below(metas, prefix)
        for signature in SIGNATURES:
            held = text if signature.component == TEXT else names
            present = sum(name in held for name, _ in signature.names)
            against = _missing(signature, held) if present else []
            # Many models share their last layers' names, so what is there counts for more than what is not.
            if present and present - len(against) / 2 > best:
                best = present - len(against) / 2
                shown = f"Nearest is {signature.family} in the layout of {signature.layout}: {'; '.join(against[:3])}."
    return f"{shown}\nGive the whole model: of a file in several parts, all of them joined."
