"""Choices that nodes offer, apart from the code that acts on them, which takes time to import."""

from __future__ import annotations

from enum import Enum

AUTO = "auto"  # a format that `quantizers.auto` chooses


class OnFailure(str, Enum):
    """What to do with a layer that cannot be quantized."""

    ERROR = "error"
    FULL_PRECISION = "full precision"


class OnQuantized(str, Enum):
    """What to do with a model that holds quantized layers already."""

    REFUSE = "refuse"
    DEQUANTIZE = "dequantize first"


class LoraMode(str, Enum):
    """How a LoRA on quantized layers is applied."""

    EXACT = "exact"  # in floating point, when the layer computes
    REQUANTIZE = "requantize"  # merged into the weight, which is then quantized (again)
