"""A diffusion model out of a GGUF file under ComfyUI's tensor names, whoever made the file.

Handled here: names with the prefix of a whole checkpoint (stable-diffusion.cpp), files that name no architecture or a
made-up one (stable-diffusion.cpp, `pig`), diffusers' layout, and what converters do with dimensions. Original shapes
that a file tells are restored by `read_gguf`. Weights stay in the blocks of the file; where they cannot, `plain` says
why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FileError
from ..ggml_types import TYPES, type_name
from ..registry import require_reader
from ..weight import QuantizedWeight, TensorMeta
from .architectures import Found, comfyui_targets, detect
from .checkpoint import Checkpoint, read_gguf
from .gguf_header import MAGIC
from .gguf_kind import kind_of, refuse_for_model
from .layouts.target import Target, apply, assemble
from .safetensors_header import MAX_HEADER_NBYTES

Value = Tensor | QuantizedWeight
SD1_CONTEXT = 768  # SD 1 has convolutions around its transformers, SD 2 (1,024) and SDXL (2,048) linear layers


@dataclass(frozen=True)
class GgufModel:
    """A diffusion model as a file has it.

    Attributes:
        path: the file.
        values: ComfyUI's name without a prefix -> tensor, or weight in the blocks of the file.
        metadata: the file's keys with a string.
        found: what it was recognised as; None where only the host may know it.
        problem: why `found` is None.
        plain: name -> why its blocks were dequantized.
        notes: what was done with the names.
    """

    path: Path
    values: Mapping[str, Value]
    metadata: Mapping[str, str]
    found: Found | None
    problem: FileError | None = None
    plain: Mapping[str, str] = field(default_factory=lambda: dict[str, str]())
    notes: tuple[str, ...] = ()


def open_gguf_model(path: Path) -> GgufModel:
    """Open a GGUF file, memory-mapped.

    Raises:
        FileError: not GGUF, damaged, or something else than a diffusion model, with what opens it.
    """
    _refuse_other_files(path)
    checkpoint = read_gguf(path)
    refuse_for_model(path, kind_of(checkpoint.metadata, checkpoint.tensors))
    checkpoint = dataclasses.replace(checkpoint, tensors=_with_dimensions(checkpoint.tensors))
    metas = {name: _meta(name, value) for name, value in checkpoint.tensors.items()}
    try:
        found = detect(metas)
    except FileError as err:
        problem = FileError(f"{path.name}: {err}")
        return GgufModel(path, checkpoint.tensors, checkpoint.metadata, None, problem)
    if found.component != "diffusion model":
        raise FileError(
            f"{path.name}: holds a {found.component} ({found.architecture}), and LoadGGUF opens a diffusion model.\n"
            "Open it with LoadGGUFTextEncoder."
        )
    if found.layout == "comfyui":
        values = {n.removeprefix(found.prefix): v for n, v in checkpoint.tensors.items() if n.startswith(found.prefix)}
        left = len(checkpoint.tensors) - len(values)
        notes = (f"{left} tensors outside '{found.prefix}' were left out",) if left else ()
        return GgufModel(path, _matrices(values, found), checkpoint.metadata, found, notes=notes)
    try:
        values, plain = _converted(checkpoint, comfyui_targets(found, metas))
    except FileError as err:
        raise FileError(f"{path.name}: {err}") from err
    note = f"tensor names of {found.layout} were turned into ComfyUI's"
    return GgufModel(path, values, checkpoint.metadata, found, None, plain, (note,))


def dequantized(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The values of a weight of any shape, also where its blocks run across its rows."""
    kind, qdata = TYPES[type_name(weight.format_id)], weight.tensors["qdata"]
    if not qdata.numel():
        return torch.empty(weight.orig_shape, dtype=dtype)
    matrix = weight.with_tensors(weight.tensors, (qdata.shape[0], qdata.shape[1] // kind.nbytes * kind.block))
    return require_reader(weight.format_id).dequantize(matrix, dtype).reshape(weight.orig_shape)


def in_rows(weight: QuantizedWeight) -> bool:
    """Whether each row of a matrix is whole blocks, which a layer multiplies with."""
    return len(weight.orig_shape) == 2 and weight.orig_shape[1] % TYPES[type_name(weight.format_id)].block == 0


def _refuse_other_files(path: Path) -> None:
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as err:
        raise FileError(f"{path}: cannot be read: {err.strerror}.") from err
    if head and not MAGIC.startswith(head[: len(MAGIC)]):
        safetensors = head[8:] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER_NBYTES
        todo = "Open it with the UNETLoader node." if safetensors else "It is damaged, or something else; get it again."
        raise FileError(f"{path.name}: not a GGUF file (it begins with {head[: len(MAGIC)]!r}).\n{todo}")


def _meta(name: str, value: Value) -> TensorMeta:
    if isinstance(value, QuantizedWeight):
        return TensorMeta(name, value.orig_shape, value.orig_dtype)
    return TensorMeta(name, tuple(value.shape), value.dtype)


def _with_dimensions(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """Give plain tensors the dimensions back that ggml, with its four of them, has no room for.

    stable-diffusion.cpp writes a 3-D convolution (N, C, D, H, W) as (N * C, D, H, W), which its bias of N values tells
    from a 2-D one; ggml's own tools drop outer dimensions of 1.
    """
    values = dict(tensors)
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            continue
        if value.ndim == 2 and name.endswith("head.modulation"):
            values[name] = value[None]
        bias = tensors.get(f"{name.removesuffix('.weight')}.bias")
        if value.ndim != 4 or not name.endswith(".weight") or bias is None:
            continue
        n = _meta(name, bias).numel
        if n and value.shape[0] != n and value.shape[0] % n == 0:
            values[name] = value.reshape(n, value.shape[0] // n, *value.shape[1:])
    return values


def _matrices(values: dict[str, Value], found: Found) -> dict[str, Value]:
    """stable-diffusion.cpp writes the linear layers around SDXL's transformers as 1 x 1 convolutions."""
    if found.architecture not in ("sd1", "sdxl"):
        return values
    context = next((v for n, v in values.items() if n.endswith("attn2.to_k.weight")), None)
    if context is None or _meta("", context).shape[-1] == SD1_CONTEXT:
        return values
    for name, value in values.items():
        if name.endswith((".proj_in.weight", ".proj_out.weight")) and isinstance(value, Tensor):
            values[name] = value.reshape(value.shape[:2]) if tuple(value.shape[2:]) == (1, 1) else value
    return values


def _converted(checkpoint: Checkpoint, targets: list[Target]) -> tuple[dict[str, Value], dict[str, str]]:
    """The targets, and why some of them are plain although their sources are in blocks."""
    values: dict[str, Value] = {}
    plain: dict[str, str] = {}
    for target in targets:
        parts = [checkpoint.tensors[piece.source] for piece in target.pieces]
        reason = "" if all(isinstance(p, Tensor) for p in parts) else _unjoinable(target, parts)
        if not reason:
            values[target.name] = assemble(target, checkpoint.tensors.__getitem__)
            continue
        plain[target.name] = reason
        tensors = [dequantized(p, torch.bfloat16) if isinstance(p, QuantizedWeight) else p for p in parts]
        cut = [apply(piece, t).to(torch.bfloat16) for piece, t in zip(target.pieces, tensors, strict=True)]
        values[target.name] = torch.cat(cut).reshape(target.shape)
    return values, plain


def _unjoinable(target: Target, parts: list[Value]) -> str:
    if len(parts) == 1 and target.pieces[0].whole:
        return ""
    formats = {p.format_id if isinstance(p, QuantizedWeight) else str(p.dtype).removeprefix("torch.") for p in parts}
    if len(formats) > 1:
        return f"made of parts in several types ({', '.join(sorted(formats))})"
    if any(isinstance(p, QuantizedWeight) and not in_rows(p) for p in parts):
        return "its blocks do not follow its rows, which had to be moved"
    return ""
