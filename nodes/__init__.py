"""The pack's nodes, collected under their permanent ids."""

from __future__ import annotations

from .load import LoadAndQuantize, LoadGGUF
from .offload import OffloadCompat
from .quantize import QuantConfig, QuantizeControlNet, QuantizeModel, QuantizeTextEncoder, QuantRules

NODE_CLASS_MAPPINGS: dict[str, type] = {
    "QuantizeModel": QuantizeModel,
    "QuantizeTextEncoder": QuantizeTextEncoder,
    "QuantizeControlNet": QuantizeControlNet,
    "QuantConfig": QuantConfig,
    "QuantRules": QuantRules,
    "LoadGGUF": LoadGGUF,
    "LoadAndQuantize": LoadAndQuantize,
    "OffloadCompat": OffloadCompat,
}

NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "QuantizeModel": "Quantize Model",
    "QuantizeTextEncoder": "Quantize Text Encoder",
    "QuantizeControlNet": "Quantize ControlNet",
    "QuantConfig": "Quantization Config",
    "QuantRules": "Quantization Rules",
    "LoadGGUF": "Load GGUF",
    "LoadAndQuantize": "Load and Quantize",
    "OffloadCompat": "Offload Compatibility",
}
