"""The pack's nodes, collected under their permanent ids."""

from __future__ import annotations

from .load import LoadGGUF
from .offload import OffloadCompat
from .quantize import QuantConfig, QuantizeControlNet, QuantizeModel, QuantizeTextEncoder

NODE_CLASS_MAPPINGS: dict[str, type] = {
    "QuantizeModel": QuantizeModel,
    "QuantizeTextEncoder": QuantizeTextEncoder,
    "QuantizeControlNet": QuantizeControlNet,
    "QuantConfig": QuantConfig,
    "LoadGGUF": LoadGGUF,
    "OffloadCompat": OffloadCompat,
}

NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "QuantizeModel": "Quantize Model",
    "QuantizeTextEncoder": "Quantize Text Encoder",
    "QuantizeControlNet": "Quantize ControlNet",
    "QuantConfig": "Quantization Config",
    "LoadGGUF": "Load GGUF",
    "OffloadCompat": "Offload Compatibility",
}
