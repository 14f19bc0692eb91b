"""ComfyUI native formats: see `backends/comfy`."""

from __future__ import annotations

from .declare import Argument, Backend, FormatEntry

_TYPES = ("fp8-e4m3fn", "fp8-e5m2", "nvfp4", "mxfp8", "int8", "int8-convrot", "w4a4-convrot", "w4a8")

BACKEND = Backend(
    name="comfy",
    package="comfy-kitchen",
    licence="Apache-2.0",
    about="The formats that ComfyUI itself loads; files of them need no pack.",
    entries=(
        FormatEntry("comfy-fp8-e4m3fn", "comfy", "make", 8, "ComfyUI native fp8, one scale a tensor"),
        FormatEntry("comfy-fp8-e5m2", "comfy", "make", 8, "ComfyUI native fp8 with more range, one scale a tensor"),
        FormatEntry("comfy-nvfp4", "comfy", "make", 4.5, "ComfyUI native NVFP4, blocks of 16"),
        FormatEntry("comfy-mxfp8", "comfy", "make", 8.25, "ComfyUI native MXFP8, blocks of 32"),
        FormatEntry("comfy-int8", "comfy", "make", 8, "ComfyUI native int8, one scale a row"),
        FormatEntry("comfy-int8-convrot", "comfy", "make", 8, "ComfyUI native int8, columns rotated first"),
        FormatEntry("comfy-w4a4-convrot", "comfy", "make", 4, "ComfyUI native int4 weights and activations, rotated"),
        FormatEntry("comfy-w4a8", "comfy", "make", 4.5, "ComfyUI native 4-bit codebook weights, int8 activations"),
    ),
    arguments={
        "type": Argument("int8", _TYPES, effect="ComfyUI's native format."),
        "scale": Argument(
            "row", ("row", "tensor"), applies=("comfy-int8",), effect="What shares a scale: a row, or the whole tensor."
        ),
        "convrot-group-size": Argument(
            256,
            ("16", "64", "256"),
            "int",
            applies=("comfy-int8-convrot", "comfy-w4a4-convrot", "comfy-w4a8"),
            effect="Columns that a rotation mixes; K must be a multiple. Outliers spread over more of them with more.",
        ),
    },
    selectors=("type",),
    chosen={f"comfy-{t}": {"type": t} for t in _TYPES},
    tensors=("scale", "block_scale", "s_channel", "codebook"),
)
