"""What of a part is on a device at once: its layers as they are stored, and what a product of them unpacks.

A quantized layer is multiplied in one of four ways, see `quantizers.kernels` and the backends: by a product that reads
the packed weight (no buffer), in int8 by int8 (a few rows of sums), by expanding a tile of at most `CAP_NBYTES` into a
buffer that is used again, or by dequantizing it whole. Formats that are not in `WHOLE`, `INTEGER` or `FUSED` expand
tiles; a test holds that against `Quantizer.kernel`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..kernels.expand import BLOCK_NUMEL
from ..kernels.int8 import PART_NUMEL
from ..kernels.scratch import CAP_NBYTES
from ..plan import Action
from ..spec import QuantSpec
from .parts import ModelPart

# Rows of these cannot be told apart in their packed form.
WHOLE = ("sdnq-int[567]", "sdnq-uint[23567]")
INTEGER = ("bnb-int8", "torchao-int8dyn")
# On CUDA and ROCm; `gguf` where Triton works, which a forecast does not count on.
FUSED = ("bnb-*", "quanto-qint8", "quanto-qfloat8-*")
_BLOCK = re.compile(r"^((.*?)\.\d+)\.")
# ComfyUI's layout holds in one weight what diffusers has as q, k, v and, in FLUX's single blocks, the MLP.
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
    blocks = _blocks(nbytes)
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


def _blocks(names: Iterable[str]) -> dict[str, str]:
    """The block of each layer that is in one: what stands in a numbered list of at least two."""
    found = {name: match for name in names if (match := _BLOCK.match(f"{name}."))}
    members: dict[str, set[str]] = {}
    for match in found.values():
        members.setdefault(match[2], set()).add(match[1])
    return {name: match[1] for name, match in found.items() if len(members[match[2]]) > 1}


def unpacked_nbytes(layer: Layer, kind: str, dtype_nbytes: int) -> int:
    """Bytes beside weights and activations while a layer is multiplied.

    Args:
        kind: of device, as in `DeviceFacts`.
        dtype_nbytes: of a value of the activations.
    """
    if not layer.numel:
        return 0
    if kind in ("cuda", "rocm") and _is(layer, FUSED):
        return 0
    if _is(layer, INTEGER) and kind in ("cpu", "cuda", "rocm"):
        return PART_NUMEL * 8 if kind == "cpu" else 0
    if _is(layer, WHOLE):
        return layer.numel * (dtype_nbytes + 4)  # the library computes in float32 first
    tile = min(layer.numel, CAP_NBYTES // dtype_nbytes)
    if kind == "cpu":
        block = 0 if dtype_nbytes == 4 or layer.format_id.startswith("gguf-") else min(tile, BLOCK_NUMEL) * 6
        return tile * dtype_nbytes + block
    return tile * (dtype_nbytes + 6)  # a tile in float32, and what indexes a codebook


def with_lora_nbytes(layer: Layer, dtype_nbytes: int) -> int:
    """The same in ComfyUI with a LoRA on the layer: its weight whole, and the sum and what is added in float32
    (`comfy.lora.calculate_weight`)."""
    return layer.numel * (dtype_nbytes + 8)


def _is(layer: Layer, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(layer.format_id, p) for p in patterns)


def blocks_of(layers: Iterable[Layer]) -> tuple[int, Mapping[str, int]]:
    """Bytes outside of blocks, and of each block in the order of the part."""
    outside, blocks = 0, dict[str, int]()
    for layer in layers:
        if layer.block:
            blocks[layer.block] = blocks.get(layer.block, 0) + layer.nbytes
        else:
            outside += layer.nbytes
    return outside, blocks
