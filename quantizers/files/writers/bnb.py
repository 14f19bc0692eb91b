"""bitsandbytes, as its layers and diffusers save it.

4 bit: `X.weight` uint8 (N*K/2, 1), `.absmax`, `.quant_map` float32 (16,), and the bytes of a JSON object in
`.quant_state.bitsandbytes__nf4` (or fp4); with double quantization `.nested_absmax` and `.nested_quant_map`.
int8: `X.weight` int8 (N, K), `X.SCB` float32 (N,), `X.weight_format` uint8 scalar, 0 for rows.

Packed bytes that are held in another dtype are written as uint8: diffusers refuses every other shape than (N*K/2, 1).

Sources: bitsandbytes/functional.py `QuantState.as_dict` and nn/modules.py `Linear8bitLt._save_to_state_dict` at 0.50.2;
diffusers/quantizers/bitsandbytes/bnb_quantizer.py at 0.42.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ...backends.bnb.four_bit import DEFAULT_BLOCK_SIZE, NESTED_BLOCK_SIZE
from ...backends.bnb.int8 import DEFAULT_THRESHOLD
from ...registry import require_reader
from ...weight import QuantizedWeight
from .layout import Layout, modules

FOUR_BIT = ("bnb-nf4", "bnb-fp4")
ROWS = 0  # of `weight_format`: rows of N, not in tiles of a GPU
# Said in 4-bit configurations where a weight tells none, as `BitsAndBytesConfig` has it.
COMPUTE_DTYPE = "float32"


class Bnb(Layout):
    id = "bnb"
    title = "bitsandbytes, as diffusers saves it"
    formats = ("bnb-int8", *FOUR_BIT)
    in_folders = True

    def refuse_together(self, formats: Collection[str]) -> str | None:
        if len(set(formats)) > 1:
            return f"diffusers reads one format of bitsandbytes a folder, got {', '.join(sorted(set(formats)))}"
        return None

    def clashes(self, quantized: Collection[str], plain: Collection[str]) -> list[str]:
        """diffusers skips what has a name of the list as its own, whatever stands before: `proj_out` is that of every
        block too."""
        own = {module.rpartition(".")[2] for module in modules(quantized)}
        return [module for module in modules(plain) if module in own]

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        if weight.format_id == "bnb-int8":
            layer = name.removesuffix("weight")
            return {
                name: weight.tensors["qdata"],
                f"{layer}SCB": weight.tensors["absmax"],
                f"{layer}weight_format": torch.tensor(ROWS, dtype=torch.uint8),
            }
        return _four_bit(name, weight)

    def note(self, name: str, weight: QuantizedWeight) -> Any:
        kept = {key: weight.meta[key] for key in ("threshold", "compute_dtype") if weight.meta.get(key) is not None}
        return {"format": weight.format_id, "nested": "nested_absmax" in weight.tensors, **kept}

    def config(self, notes: Mapping[str, Any], plain: tuple[str, ...]) -> dict[str, Any] | None:
        if not notes:
            return None
        first = next(iter(notes.values()))
        four = first["format"] in FOUR_BIT
        return {
            "quant_method": "bitsandbytes",
            "_load_in_4bit": four,
            "_load_in_8bit": not four,
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "bnb_4bit_quant_type": first["format"].removeprefix("bnb-") if four else "fp4",
            "bnb_4bit_use_double_quant": bool(first["nested"]),
            "bnb_4bit_compute_dtype": first.get("compute_dtype", COMPUTE_DTYPE),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_threshold": float(first.get("threshold", DEFAULT_THRESHOLD)),
            "llm_int8_skip_modules": modules(plain),
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
        }


def _four_bit(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    quantizer: Any = require_reader(weight.format_id)
    held = weight.tensors
    state: dict[str, Any] = {
        "quant_type": quantizer.quant_type,
        "blocksize": int(weight.meta.get("block_size", DEFAULT_BLOCK_SIZE)),
        "dtype": str(weight.orig_dtype).removeprefix("torch."),
        "shape": list(weight.orig_shape),
    }
    tensors = {
        name: held["qdata"].reshape(-1).view(torch.uint8).reshape(-1, 1),
        f"{name}.absmax": held["absmax"],
        f"{name}.quant_map": quantizer.codebook(),
    }
    if "nested_absmax" in held:
        tensors[f"{name}.nested_absmax"] = held["nested_absmax"]
        tensors[f"{name}.nested_quant_map"] = held["nested_code"]
        state |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": float(held["offset"]),
        }
    raw = json.dumps(state).encode()
    key = f"{name}.quant_state.bitsandbytes__{quantizer.quant_type}"
    return {**tensors, key: torch.tensor(list(raw), dtype=torch.uint8)}
