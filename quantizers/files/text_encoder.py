"""A text encoder out of a GGUF file under ComfyUI's tensor names, with its vision part and its vocabulary.

Files of llama.cpp have llama.cpp's names; others keep those of the original (a made-up architecture such as `pig`, or
none). The vision part of Qwen2.5-VL is a file of its own, "mmproj", which is looked for beside the text encoder: by
what is in the files, so nothing has to be renamed; names only choose among several that fit.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FileError
from ..weight import QuantizedWeight, TensorMeta
from .architectures import detect
from .checkpoint import Checkpoint, read_gguf
from .gguf_header import MAGIC, GgufHeader, read_gguf_header
from .gguf_kind import Kind, kind_of
from .gguf_model import dequantized
from .gguf_parts import read_gguf_parts
from .layouts.llama_cpp import (
    ARCHITECTURES,
    ASSUMED_HEADS,
    PATCH_EMBEDDING,
    gguf_heads,
    llama_cpp_to_transformers,
    mmproj_to_transformers,
)
from .layouts.target import Target, apply, assemble
from .quantized_file import Value
from .vocabulary import read_vocabulary

WITH_VISION = ("qwen2vl",)  # architectures whose vision part is read
# One tensor of each kind of text encoder in the layout of ComfyUI and transformers.
HOST_NAMES = (
    "text_model.encoder.layers.0.mlp.fc1.weight",
    "transformer.resblocks.0.ln_1.weight",
    "encoder.block.0.layer.0.SelfAttention.k.weight",
    "model.layers.0.input_layernorm.weight",
    "model.language_model.layers.0.input_layernorm.weight",
)
PROJECTOR = "mm.2.weight"  # (width of the text encoder, ...)
_REMEDIES = {
    Kind.ALL_IN_ONE: (
        "Its diffusion model, text encoders and VAE stand in one file, and each part needs a loader of its own. Open a "
        "safetensors checkpoint with CheckpointLoaderSimple; of a GGUF one, take the text encoders' own files."
    ),
    Kind.MMPROJ: "Choose the text encoder that it belongs to; the vision part beside it is found and loaded with it.",
    Kind.VAE: "Open VAEs with VAELoader, from the safetensors file of the same model.",
    Kind.LORA: "Put LoRAs on a CLIP with LoraLoader, from a safetensors file.",
    Kind.IMATRIX: "It goes to `quantwire convert --imatrix`, to make better files of a model; it holds no weights.",
}


@dataclass(frozen=True)
class TextFile:
    """A text encoder as a file has it.

    Attributes:
        path: the file.
        architecture: the file's own word, empty where it has none.
        values: ComfyUI's name -> tensor, or weight in the blocks of the file.
        header: of the file, for its metadata and vocabulary.
        mmproj: the file of its vision part, where one was found.
        notes: what was decided for the user.
    """

    path: Path
    architecture: str
    values: Mapping[str, Value]
    header: GgufHeader
    mmproj: Path | None = None
    notes: tuple[str, ...] = field(default_factory=lambda: ())

    def vocabulary(self, name: str) -> bytes:
        """Its tokenizer as ComfyUI wants it.

        Args:
            name: `spiece_model` or `tekken_model`.
        Raises:
            FileError: the file has no such vocabulary.
        """
        try:
            return read_vocabulary(read_gguf_parts(self.path)[0].path, self.header, name)
        except FileError as err:
            raise FileError(
                f"{self.path.name}: no tokenizer: {str(err).splitlines()[0].rstrip('.')}.\n"
                "ComfyUI has none for this text encoder, so the file must bring one: take a GGUF file that llama.cpp's "
                "convert_hf_to_gguf.py made, or the safetensors file."
            ) from err


def open_text_encoder(path: Path) -> TextFile:
    """Open a GGUF file, memory-mapped, with the vision part beside it.

    Raises:
        FileError: damaged, or no text encoder that is known; says which loader fits.
    """
    checkpoint = read_gguf(path)
    header = read_gguf_parts(path)[0].header
    metas = {name: _meta(name, value) for name, value in checkpoint.tensors.items()}
    refuse_for_text_encoder(path, checkpoint.metadata, metas)
    declared = checkpoint.metadata["general.architecture"]
    if any(name in metas for name in HOST_NAMES):
        values = {n: _plain_or_same(n, v) for n, v in checkpoint.tensors.items()}
        return TextFile(path, declared, values, header, None, ("its tensors have ComfyUI's names",))
    architecture = "t5encoder" if "enc.blk.0.attn_q.weight" in metas else declared
    if architecture not in ARCHITECTURES:
        raise FileError(
            f"{path.name}: a text encoder of architecture {declared or '(none)'!r}, which is not known here.\n"
            f"Known are {', '.join(ARCHITECTURES)}."
        )
    heads = gguf_heads(header.metadata, metas)
    try:
        targets = llama_cpp_to_transformers(architecture, metas, heads)
        values = {t.name: _made(t, checkpoint) for t in targets}
    except FileError as err:
        raise FileError(f"{path.name}: {err}") from err
    if architecture not in WITH_VISION:
        assumed = heads is None and any(piece.heads for t in targets for piece in t.pieces)
        return TextFile(path, architecture, values, header, None, (ASSUMED_HEADS,) if assumed else ())
    mmproj, note = find_mmproj(path, metas["token_embd.weight"].shape[1])
    vision = vision_values(mmproj) if mmproj else {}
    return TextFile(path, architecture, {**values, **vision}, header, mmproj, (note,))


def is_gguf(path: Path) -> bool:
    """By its first bytes.

    Raises:
        FileError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as err:
        raise FileError(f"{path}: cannot be read: {err.strerror}.") from err


def refuse_for_text_encoder(path: Path, metadata: Mapping[str, str], metas: Mapping[str, TensorMeta]) -> None:
    """Refuse what is no text encoder, GGUF or safetensors.

    Raises:
        FileError: says what the file is, and what opens it.
    """
    kind = kind_of(metadata, metas)
    if kind in _REMEDIES:
        raise FileError(
            f"{path.name}: holds {kind.value}, and LoadGGUFTextEncoder opens a text encoder.\n{_REMEDIES[kind]}"
        )
    if kind is Kind.TEXT_ENCODER or any(name in metas for name in HOST_NAMES):
        return
    try:
        found = detect(metas)
    except FileError:
        return  # not known here, which the caller or the host will say
    if found.component == "diffusion model":
        loader = "LoadGGUF" if "general.architecture" in metadata else "UNETLoader"
        raise FileError(
            f"{path.name}: holds a diffusion model ({found.architecture}), and LoadGGUFTextEncoder opens a text "
            f"encoder.\nOpen it with {loader}."
        )


def find_mmproj(path: Path, width: int) -> tuple[Path | None, str]:
    """The vision part of a text encoder among the GGUF files of its folder.

    Args:
        width: of the text encoder's embeddings, which the projector of its vision part ends in.
    Returns:
        the file, if one fits, and a line for the report.
    """
    others = [p for p in path.parent.iterdir() if p.suffix.lower() == ".gguf" and p.name != path.name]
    # Files that do not call themselves so are opened only if none that does fits: a header may be megabytes.
    named = sorted(p for p in others if "mmproj" in p.name.lower())
    fitting: list[Path] = []
    problems: list[str] = []
    for group in (named, sorted(set(others) - set(named))):
        for candidate in group:
            problem = _misfit(candidate, width)
            if not problem:
                fitting.append(candidate)
            elif group is named:
                problems.append(f"{candidate.name} does not fit: {problem}")
        if fitting:
            break
    if not fitting:
        why = f" ({'; '.join(problems)})" if problems else ""
        return None, f"no vision part (mmproj) beside it{why}: prompts may hold text only"
    best = min(fitting, key=lambda p: (-_likeness(path, p), _coarseness(p), p.name))
    note = f"vision part: {best.name}, found beside it"
    if len(fitting) > 1:
        rest = ", ".join(p.name for p in fitting if p != best)
        note += f"; {rest} would fit too, its name is closest to {path.name}, or its values are the finest"
    return best, note


def vision_values(path: Path) -> dict[str, Value]:
    """The vision part of Qwen2.5-VL under ComfyUI's names.

    Raises:
        FileError: damaged, or another vision part.
    """
    checkpoint = read_gguf(path)
    metas = {name: _meta(name, value) for name, value in checkpoint.tensors.items()}
    try:
        values = {t.name: _made(t, checkpoint) for t in mmproj_to_transformers(metas)}
    except FileError as err:
        raise FileError(f"{path.name}: {err}") from err
    slices = [_as_tensor(checkpoint.tensors[name]) for name in PATCH_EMBEDDING]
    values["visual.patch_embed.proj.weight"] = torch.stack(slices, dim=2)
    return values


def _misfit(path: Path, width: int) -> str:
    """Why a file is not the vision part of a text encoder of this width; empty where it is."""
    try:
        header = read_gguf_header(path)
    except FileError as err:
        return str(err).splitlines()[0]
    shapes = {t.name: t.shape for t in header.tensors}
    strings = {k: v for k, v in header.metadata.items() if isinstance(v, str)}
    if kind_of(strings, shapes) is not Kind.MMPROJ:
        return "not a vision part"
    if any(name not in shapes for name in (*PATCH_EMBEDDING, PROJECTOR, "v.blk.0.ffn_gate.weight")):
        return f"not of Qwen2.5-VL ({strings.get('clip.projector_type', 'no projector type')})"
    got = shapes[PROJECTOR][0]
    return "" if got == width else f"made for a text encoder of width {got}, not {width}"


def _likeness(path: Path, other: Path) -> float:
    """Of the names, without what they say of types."""
    names = [re.sub(r"mmproj|(iq|q|f|bf|fp)\d\w*|\W+|_", " ", p.stem.lower()).split() for p in (path, other)]
    return round(difflib.SequenceMatcher(None, names[0], names[1]).ratio(), 3)


def _coarseness(path: Path) -> int:
    """Bits lost by name: 16-bit floats first, since the vision part is small and images suffer first."""
    match = re.search(r"(?<![a-z])(bf16|fp?16|fp?32|i?q\d)", path.stem.lower())
    order = {"bf16": 0, "f16": 0, "fp16": 0, "f32": 1, "fp32": 1}
    return order.get(match[1], 10 - int(match[1][-1])) if match else 5


def _made(target: Target, checkpoint: Checkpoint) -> Value:
    """The target; plain where its parts are in blocks that cannot be one weight."""
    read: Callable[[str], Value] = checkpoint.tensors.__getitem__
    parts = [read(piece.source) for piece in target.pieces]
    kinds = {p.format_id if isinstance(p, QuantizedWeight) else "" for p in parts}
    vector = len(target.shape) < 2
    if kinds == {""} or (len(kinds) == 1 and not vector):
        return _plain_or_same(target.name, assemble(target, read))
    cut = [apply(piece, _as_tensor(part)).to(torch.bfloat16) for piece, part in zip(target.pieces, parts, strict=True)]
    return torch.cat(cut).reshape(target.shape)


def _plain_or_same(name: str, value: Value) -> Value:
    """The host's linear layers hold blocks; vectors and convolutions are dequantized here."""
    return _as_tensor(value) if isinstance(value, QuantizedWeight) and len(value.orig_shape) != 2 else value


def _as_tensor(value: Value) -> Tensor:
    return dequantized(value, torch.float32) if isinstance(value, QuantizedWeight) else value


def _meta(name: str, value: Any) -> TensorMeta:
    if isinstance(value, QuantizedWeight):
        return TensorMeta(name, value.orig_shape, value.orig_dtype)
    return TensorMeta(name, tuple(value.shape), value.dtype)
