"""What of a part is on a device at once: its layers as they are stored, and what a product of them unpacks.

A quantized layer is multiplied in one of four ways, see `quantizers.kernels` and the backends: by a product that reads
the packed weight (no buffer), in int8 by int8 (a few rows of sums), by expanding a tile of at most `CAP_NBYTES` into a
buffer that is used again, or by dequantizing it whole. Formats that are in neither `WHOLE` nor `INTEGER` expand
tiles; a test holds that against `Quantizer.kernel`. On CUDA and ROCm `native` tells which of the four it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..auto import DeviceFacts
from ..compat.modes import HostName
from ..kernels.expand import BLOCK_NUMEL
from ..kernels.int8 import PART_NUMEL
from ..kernels.scratch import CAP_NBYTES
from ..plan import Action
from ..registry import is_format
from ..spec import QuantSpec
from .native import IMAGE_TOKENS, running
from .parts import ModelPart

# Rows of these cannot be told apart in their packed form.
WHOLE = ("sdnq-int[567]", "sdnq-uint[23567]")
INTEGER = ("bnb-int8", "torchao-int8dyn")
# On CUDA and ROCm: scaled in a second tensor of the same size (optimum/quanto/library/qbytes_mm.py:21, :24).
TWICE = ("quanto-qfloat8-*",)
GPUS = ("cuda", "rocm")
# Of a CUDA device that is given by its memory alone: what is in use most.
CAPABILITY = (8, 6)
_BLOCK = re.compile(r"^((.*?)\.\d+)\.")
# ComfyUI's layout holds in one weight what diffusers has as q, k, v and, in FLUX's single blocks, the MLP.
_LISTS = ("blocks", "layers")
# What a model computes behind its blocks, in ComfyUI's layout, diffusers' and transformers'.
_BEHIND = re.compile(
    r"(^|\.)(final_layer\w*|norm_out|proj_out|norm_final|conv_(norm_)?out|head|out|final_norm|norm)(\.|$)"
)
_JOINED = re.compile(r"(_attn\.qkv|single_blocks\.\d+\.linear1)\.weight$")


@dataclass(frozen=True)
class Layer:
    """The tensors of one module of a part.

    Attributes:
        block: name of the repeated block that it is in, such as `double_blocks.3`; empty outside of blocks.
        nbytes: as they are stored.
        largest_nbytes: of what moves at a time, less than all where the host splits the layer.
        format_id: of a quantized weight; else empty.
        numel: of a quantized weight, the part that is multiplied at a time.
    """

    name: str
    block: str
    nbytes: int
    largest_nbytes: int
    format_id: str = ""
    numel: int = 0


def layers_of(part: ModelPart, spec: QuantSpec | None, split: bool) -> tuple[Layer, ...]:
    """The layers of a part in a format, or as it is for None.

    Of a part that is quantized already a header tells how large its layers are together; here they all count as
    equally compressed.

    Args:
        split: the host has fused projections apart (diffusers' FLUX).
    """
    nbytes: dict[str, int] = {}
    formats: dict[str, tuple[str, int]] = {}
    shares: dict[str, float] = {}
    share_held = part.held_nbytes / max(part.full_nbytes, 1)
    commonest = max(part.formats, key=lambda f: part.formats[f], default="")
    if spec is None:
        sized = ((s.meta, round(s.meta.nbytes * share_held), commonest if s.linear else "") for s in part.slots)
    else:
        sized = (
            (d.meta, d.nbytes_out, d.spec.format_id if d.action is Action.QUANTIZE and d.spec else "")
            for d in part.plan(spec).decisions
        )
    for meta, size, format_id in sized:
        name = meta.name.rpartition(".")[0]
        nbytes[name] = nbytes.get(name, 0) + size
        if split and len(meta.shape) == 2 and _JOINED.search(meta.name):
            rows, k = meta.shape
            shares[name] = max(k, rows - 3 * k) / rows
        if format_id:
            formats[name] = format_id, round(meta.numel * shares.get(name, 1.0))
    blocks = block_names(nbytes)
    return tuple(
        Layer(
            name,
            blocks.get(name, ""),
            size,
            round(size * shares.get(name, 1.0)),
            *formats.get(name, ("", 0)),
        )
        for name, size in nbytes.items()
    )


def block_names(names: Iterable[str]) -> dict[str, str]:
    """The block of each layer that is in one: what stands in a numbered list of at least two, or in one that is called
    a list of blocks."""
    found = {name: match for name in names if (match := _BLOCK.match(f"{name}."))}
    members: dict[str, set[str]] = {}
    for match in found.values():
        members.setdefault(match[2], set()).add(match[1])
    return {name: match[1] for name, match in found.items() if len(members[match[2]]) > 1 or match[2].endswith(_LISTS)}


def unpacked_nbytes(
    layer: Layer,
    kind: str,
    dtype_nbytes: int,
    rows: int = IMAGE_TOKENS,
    capability: tuple[int, int] | None = None,
    host: HostName = HostName.STANDALONE,
) -> int:
    """Bytes beside weights and activations while a layer is multiplied.

    Args:
        kind: of device, as in `DeviceFacts`.
        dtype_nbytes: of a value of the activations.
        rows: of the activations.
        capability: of CUDA; None: `CAPABILITY`.
        host: whose products they are.
    """
    if not layer.numel:
        return 0
    if kind in GPUS and is_format(layer.format_id):
        device = DeviceFacts(kind, kind, 0, 0, capability or CAPABILITY)
        found = running(layer.format_id, device, host, max(rows, 1))
        if not found.buffer:
            return 0
        if not found.in_tiles:
            return layer.numel * _whole_nbytes(layer, dtype_nbytes)
    elif _is(layer, INTEGER) and kind == "cpu":
        return PART_NUMEL * 8
    elif _is(layer, WHOLE):
        return layer.numel * _whole_nbytes(layer, dtype_nbytes)
    tile = min(layer.numel, CAP_NBYTES // dtype_nbytes)
    if kind == "cpu":
        block = 0 if dtype_nbytes == 4 or layer.format_id.startswith("gguf-") else min(tile, BLOCK_NUMEL) * 6
        return tile * dtype_nbytes + block
    return tile * (dtype_nbytes + 6)  # a tile in float32, and what indexes a codebook


def _whole_nbytes(layer: Layer, dtype_nbytes: int) -> int:
    """Of a value of a weight that is dequantized whole."""
    if _is(layer, WHOLE):
        return dtype_nbytes + 4  # the library computes in float32 first
    return 2 * dtype_nbytes if _is(layer, TWICE) else max(dtype_nbytes, 4 if _is(layer, INTEGER) else 0)


def with_lora_nbytes(layer: Layer, dtype_nbytes: int) -> int:
    """The same in ComfyUI with a LoRA on the layer: its weight whole, and the sum and what is added in float32
    (`comfy.lora.calculate_weight`)."""
    return layer.numel * (dtype_nbytes + 8)


def _is(layer: Layer, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(layer.format_id, p) for p in patterns)


def in_order(layers: Iterable[Layer]) -> list[list[Layer]]:
    """What moves as a whole, in the order in which it computes: layers before the blocks, blocks, layers behind them.
    Files list names in another order, such as that of the alphabet."""
    before, behind, blocks = list[list[Layer]](), list[list[Layer]](), dict[str, list[Layer]]()
    for layer in layers:
        if layer.block:
            blocks.setdefault(layer.block, []).append(layer)
        else:
            (behind if _BEHIND.search(layer.name) else before).append([layer])
    return [*before, *(blocks[name] for name in sorted(blocks, key=lambda name: "single" in name)), *behind]


def blocks_of(layers: Iterable[Layer]) -> tuple[int, Mapping[str, int]]:
    """Bytes outside of blocks, and of each block in the order of the part."""
    outside, blocks = 0, dict[str, int]()
    for layer in layers:
        if layer.block:
            blocks[layer.block] = blocks.get(layer.block, 0) + layer.nbytes
        else:
            outside += layer.nbytes
    return outside, blocks
