"""The terms in which offload compatibility is stated: carrier, host, mode and its variants, verdict."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class Carrier(str, Enum):
    """What holds the quantized weights inside a model."""

    QUANTWIRE = "quantwire"  # QuantizedLinear: plain tensors, dequantized by us
    LIBRARY = "library"  # the library's own layer: Params4bit, QBytesTensor, GGUFParameter, ...
    HOST = "host"  # ComfyUI's own QuantizedTensor in a native layout


class HostName(str, Enum):
    """Whose offloading is meant."""

    STANDALONE = "standalone"  # accelerate and diffusers: `quantwire run`, and other programs on them
    COMFYUI = "comfyui"


class OffloadMode(str, Enum):
    """Where weights live between uses; the words of diffusers, accelerate, SD.Next and ComfyUI."""

    NONE = "none"  # everything on the compute device
    MODEL = "model"  # whole components move in and out (accelerate cpu_offload_with_hook)
    SEQUENTIAL = "sequential"  # every leaf module is streamed (accelerate cpu_offload, disk_offload)
    BALANCED = "balanced"  # components split between devices when too large (accelerate dispatch_model)
    GROUP = "group"  # diffusers group offloading, by leaf or by block
    PARTIAL = "partial"  # ComfyUI: layers that do not fit a budget are streamed
    NOVRAM = "novram"  # ComfyUI --novram: every layer is streamed
    DYNAMIC = "dynamic"  # ComfyUI dynamic VRAM: layers are faulted in as they are used


HOST_MODES: Mapping[HostName, tuple[OffloadMode, ...]] = {
    HostName.STANDALONE: (
        OffloadMode.NONE,
        OffloadMode.MODEL,
        OffloadMode.SEQUENTIAL,
        OffloadMode.BALANCED,
        OffloadMode.GROUP,
    ),
    HostName.COMFYUI: (OffloadMode.NONE, OffloadMode.PARTIAL, OffloadMode.NOVRAM, OffloadMode.DYNAMIC),
}

# How a mode can be carried out. whole: it all fits on the device, so nothing is kept away. split: some layers are kept
# away from it. memory, disk: where what is kept away lies. block, leaf: what moves at a time. stream: copied while the
# device computes.
VARIANTS: Mapping[OffloadMode, tuple[str, ...]] = {
    OffloadMode.NONE: ("",),
    OffloadMode.MODEL: ("",),
    OffloadMode.SEQUENTIAL: ("memory", "disk"),
    OffloadMode.BALANCED: ("whole", "split", "split-disk"),
    OffloadMode.GROUP: ("block", "leaf", "block-disk", "leaf-disk", "block-stream", "leaf-stream"),
    OffloadMode.PARTIAL: ("whole", "split"),
    OffloadMode.NOVRAM: ("",),
    OffloadMode.DYNAMIC: ("",),
}


class VerdictLevel(str, Enum):
    OK = "ok"
    WARN = "warn"
    BLOCK = "block"
    UNKNOWN = "unknown"
