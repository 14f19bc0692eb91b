"""The terms in which offload compatibility is stated: carrier, mode, verdict."""

from __future__ import annotations

from enum import Enum


class Carrier(str, Enum):
    """What holds the quantized weights inside a model."""

    QUANTWIRE = "quantwire"  # QuantizedLinear: plain tensors, dequantized by us
    LIBRARY = "library"  # the library's own layer: Params4bit, QBytesTensor, GGUFParameter, ...
    HOST = "host"  # ComfyUI's own QuantizedTensor in a native layout


class OffloadMode(str, Enum):
    """Where weights live between uses; the words of diffusers, accelerate, SD.Next and ComfyUI."""

    NONE = "none"  # everything on the compute device
    MODEL = "model"  # whole components move in and out (accelerate cpu_offload_with_hook)
    SEQUENTIAL = "sequential"  # every leaf module is streamed (accelerate cpu_offload)
    BALANCED = "balanced"  # components split between devices when too large (accelerate dispatch_model)
    GROUP = "group"  # diffusers group offloading, by leaf or by block
    PARTIAL = "partial"  # ComfyUI: layers that do not fit a budget are streamed
    NOVRAM = "novram"  # ComfyUI --novram: every layer is streamed
    DYNAMIC = "dynamic"  # ComfyUI dynamic VRAM: layers are faulted in as they are used


class VerdictLevel(str, Enum):
    OK = "ok"
    WARN = "warn"
    BLOCK = "block"
    UNKNOWN = "unknown"
