"""Files that a template opens quantized, as their makers wrote them: what each tensor takes, and what the file takes.

`quantwire` has rules of its own for what it quantizes (T5's `wo` stays at 16 bits, say), and those files follow others.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..quantizers.measure.parts import ModelPart
    from ..quantizers.plan import Slot

# Bytes of published files, as public download lists have them that check what arrives: several that agree, one for
# ACE-Step. For FLUX.1 dev's Q4_K_S they say 6.81 GB.
NBYTES = {
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors": 6_735_906_897,
    "qwen_2.5_vl_7b_fp8_scaled.safetensors": 9_384_670_680,
    "t5-v1_1-xxl-encoder-Q5_K_M.gguf": 3_386_856_640,
    "t5xxl_fp16.safetensors": 9_787_841_024,
    "clip_l.safetensors": 246_144_152,
    "clip_g.safetensors": 1_389_382_176,
    "flux1-dev.safetensors": 23_802_932_552,
    "flux1-dev-Q4_K_S.gguf": 6_810_000_000,
    "acestep_v1.5_turbo.safetensors": 4_787_825_604,
}
FP8 = "fp8 scaled"
# FLUX.1 dev in GGUF files of city96: the linear layers of the blocks in one type, the others at 16 bits.
CITY96_Q4_K_S = "Q4_K_S by ComfyUI-GGUF's tools"
BLOCKS, BITS = ("transformer_blocks.", "single_transformer_blocks."), 4.5
# ComfyUI's files in scaled fp8: what is no linear layer stays at 16 bits, and the layers that turn hidden states into
# tokens with it.
WHOLE = ("lm_head.weight",)
SCALE_NBYTES = 4


def as_published(part: ModelPart, layout: str) -> ModelPart:
    """The part as the file holds it.

    Args:
        layout: `FP8`, `CITY96_Q4_K_S`, or a GGUF recipe, which is planned as `quantwire convert --dry-run` does.
    """
    if layout == CITY96_Q4_K_S:
        packed = [slot for slot in part.slots if slot.linear and slot.meta.name.startswith(BLOCKS)]
        saved = sum(slot.meta.nbytes - int(slot.meta.numel * BITS) // 8 for slot in packed)
        return dataclasses.replace(part, held_nbytes=part.full_nbytes - saved, formats={"gguf-q4-k": len(packed)})
    if layout == FP8:
        nbytes = sum(_scaled(slot) for slot in part.slots)
        count = sum(slot.linear for slot in part.slots)
        return dataclasses.replace(part, held_nbytes=nbytes, formats={"comfy-fp8-e4m3fn": count})
    nbytes, types = _gguf(part, layout)
    return dataclasses.replace(part, held_nbytes=nbytes, formats=types)


def _scaled(slot: Slot) -> int:
    if slot.linear and slot.meta.name not in WHOLE:
        return slot.meta.numel + SCALE_NBYTES
    return slot.meta.nbytes


def _gguf(part: ModelPart, recipe: str) -> tuple[int, dict[str, int]]:
    """Bytes of the file, and format -> tensors of it."""
    from ..quantizers.files.convert_plan import Request
    from ..quantizers.files.converting import describe
    from ..quantizers.ggml_types import PLAIN_TYPES, format_id

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.safetensors"
        write_header(source, part.slots)
        plan: dict[str, Any] = describe(Request(source, source.with_suffix(".gguf"), recipe)).to_dict()
    types = Counter(row["type"] for row in plan["tensors"])
    return plan["nbytes"], {format_id(t): n for t, n in types.items() if t not in PLAIN_TYPES}


def write_header(path: Path, slots: Iterable[Slot]) -> None:
    """A safetensors file of 16-bit tensors, all holes."""
    header: dict[str, Any] = {}
    at = 0
    for slot in slots:
        end = at + slot.meta.nbytes
        header[slot.meta.name] = {"dtype": "BF16", "shape": list(slot.meta.shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)
