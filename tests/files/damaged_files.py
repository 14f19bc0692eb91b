"""Small files in every layout of quantized weights, with headers as real ones have them, for tests that damage them."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I32": 4}
# name -> (dtype, shape), or (dtype, shape, content)
Tensors = Mapping[str, tuple[Any, ...]]
N, K = 32, 64


def layout(tensors: Tensors, metadata: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], bytes]:
    """The header as an object, and the data."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    data = b""
    for name, (dtype, shape, *content) in tensors.items():
        nbytes = SIZES[dtype]
        for n in shape:
            nbytes *= n
        raw = content[0] if content else bytes(1 + i % 50 for i in range(nbytes))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + nbytes]}
        data += raw[:nbytes].ljust(nbytes, b"\0")
    return header, data


def joined(header: Any, data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def write(path: Path, tensors: Tensors, metadata: Mapping[str, Any] | None = None) -> Path:
    path.write_bytes(joined(*layout(tensors, metadata)))
    return path


def text(value: Any) -> tuple[str, list[int], bytes]:
    """A tensor of bytes that holds JSON."""
    raw = json.dumps(value).encode()
    return "U8", [len(raw)], raw


ONE = struct.pack("<f", 0.5)


def seeds() -> dict[str, tuple[Tensors, dict[str, str] | None]]:
    """Name of the layout -> tensors and metadata."""
    w, pre = "double_blocks.0.img_mlp.0", "model.diffusion_model."
    scale = {f"{w}.weight_scale": ("F32", [], ONE)}
    nf4 = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [N, K], "nested_blocksize": 256}
    nf4 |= {"nested_dtype": "float32", "nested_offset": 0.04}
    quantized_bnb = {
        f"{w}.weight": ("U8", [N * K // 2, 1]),
        f"{w}.weight.absmax": ("U8", [N * K // 64]),
        f"{w}.weight.quant_map": ("F32", [16]),
        f"{w}.weight.nested_absmax": ("F32", [1]),
        f"{w}.weight.nested_quant_map": ("F32", [256]),
        f"{w}.weight.quant_state.bitsandbytes__nf4": text(nf4),
    }
    nv = {
        f"{w}.weight": ("U8", [N, K // 2]),
        f"{w}.weight_scale": ("F8_E4M3", [128, K // 16]),
        f"{w}.weight_scale_2": ("F32", [], ONE),
    }
    own = {"format_id": "quanto-qint8", "orig_shape": [N, K], "orig_dtype": "BF16", "tensors": ["qdata", "scale"]}
    return {
        "plain": ({f"{w}.weight": ("BF16", [N, K]), f"{w}.bias": ("BF16", [N]), "step": ("F32", [])}, {"format": "pt"}),
        "comfy": (
            {f"{w}.weight": ("F8_E4M3", [N, K]), **scale, f"{w}.comfy_quant": text({"format": "float8_e4m3fn"})},
            {"format": "pt"},
        ),
        "comfy-metadata": (
            {pre + name: value for name, value in nv.items()},
            {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {pre + w: {"format": "nvfp4"}}})},
        ),
        "int8": (
            {
                f"{w}.weight": ("I8", [N, K]),
                f"{w}.weight_scale": ("F32", [N, 1]),
                f"{w}.comfy_quant": text({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}),
            },
            None,
        ),
        "scaled-fp8": (
            {
                "scaled_fp8": ("F8_E4M3", [2]),
                f"{w}.weight": ("F8_E4M3", [N, K]),
                f"{w}.scale_weight": ("F32", [1], ONE),
                f"{w}.scale_input": ("F32", [1], ONE),
            },
            None,
        ),
        "bnb": (quantized_bnb, {"format": "pt"}),
        "bnb-int8": (
            {f"{w}.weight": ("I8", [N, K]), f"{w}.SCB": ("F32", [N]), f"{w}.weight_format": ("U8", [])},
            None,
        ),
        "quanto": (
            {
                f"{w}.weight._data": ("I8", [N, K]),
                f"{w}.weight._scale": ("BF16", [N, 1]),
                f"{w}.input_scale": ("BF16", []),
                f"{w}.output_scale": ("BF16", []),
            },
            None,
        ),
        "own": (
            {f"{w}.weight": ("I8", [N, K]), f"{w}.weight.scale": ("BF16", [N, 1])},
            {"quantwire": json.dumps({"version": 1}), f"{w}.weight": json.dumps({**own, "meta": {}})},
        ),
    }
