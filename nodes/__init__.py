"""The pack's nodes, collected under their permanent ids."""

from __future__ import annotations

from .advise import AdviseFormat
from .bench import BenchmarkModel
from .compare import CompareQuality
from .convert import ConvertModel
from .explain import explain_errors
from .fit import FitModel
from .forecast import MemoryForecast
from .imatrix import RecordImatrix, SaveCalibration, SaveImatrix
from .inspect import InspectModel
from .load import LoadAndQuantize, LoadGGUF
from .load_quantized import LoadQuantized
from .load_text import LoadGGUFTextEncoder
from .offload import OffloadCompat
from .quantize import QuantConfig, QuantizeControlNet, QuantizeModel, QuantizeTextEncoder, QuantRules
from .recipe import FindRecipe
from .repair import RepairModel
from .save import SaveQuantized

NODE_CLASS_MAPPINGS: dict[str, type] = {
    "QuantizeModel": QuantizeModel,
    "QuantizeTextEncoder": QuantizeTextEncoder,
    "QuantizeControlNet": QuantizeControlNet,
    "QuantConfig": QuantConfig,
    "QuantRules": QuantRules,
    "LoadGGUF": LoadGGUF,
    "LoadGGUFTextEncoder": LoadGGUFTextEncoder,
    "LoadAndQuantize": LoadAndQuantize,
    "LoadQuantized": LoadQuantized,
    "OffloadCompat": OffloadCompat,
    "InspectModel": InspectModel,
    "RepairModel": RepairModel,
    "ConvertModel": ConvertModel,
    "SaveQuantized": SaveQuantized,
    "RecordImatrix": RecordImatrix,
    "SaveImatrix": SaveImatrix,
    "SaveCalibration": SaveCalibration,
    "AdviseFormat": AdviseFormat,
    "BenchmarkModel": BenchmarkModel,
    "CompareQuality": CompareQuality,
    "FindRecipe": FindRecipe,
    "FitModel": FitModel,
    "MemoryForecast": MemoryForecast,
}

NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "QuantizeModel": "Quantize Model",
    "QuantizeTextEncoder": "Quantize Text Encoder",
    "QuantizeControlNet": "Quantize ControlNet",
    "QuantConfig": "Quantization Config",
    "QuantRules": "Quantization Rules",
    "LoadGGUF": "Load GGUF",
    "LoadGGUFTextEncoder": "Load GGUF Text Encoder",
    "LoadAndQuantize": "Load and Quantize",
    "LoadQuantized": "Load Quantized",
    "OffloadCompat": "Offload Compatibility",
    "InspectModel": "Inspect Model",
    "RepairModel": "Repair Model",
    "ConvertModel": "Convert Model",
    "SaveQuantized": "Save Quantized",
    "RecordImatrix": "Record Importance Matrix",
    "SaveImatrix": "Save Importance Matrix",
    "SaveCalibration": "Save Calibration",
    "AdviseFormat": "Advise Format",
    "BenchmarkModel": "Benchmark Model",
    "CompareQuality": "Compare Quality",
    "FindRecipe": "Find Recipe",
    "FitModel": "Fit Model",
    "MemoryForecast": "Memory Forecast",
}

for _node in NODE_CLASS_MAPPINGS.values():
    explain_errors(_node)
