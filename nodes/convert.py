"""ConvertModel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..hosts import current
from ..quantizers.errors import QuantwireError
from ..quantizers.registry import format_ids, get_entry
from .common import CATEGORY, with_report

if TYPE_CHECKING:
    from ..quantizers.rules import RuleSet
    from ..quantizers.spec import QuantSpec

FOLDERS = ("diffusion_models", "text_encoders", "checkpoints")
USUAL = "usual"
# Ids of the writers, which cannot be asked without importing torch.
LAYOUTS = ("comfy", "comfy-metadata", "scaled-fp8", "bnb", "quanto", "sdnq", "torchao", "plain-fp8", "quantwire")
SUFFIXES = (".safetensors", ".sft", ".gguf")


class ConvertModel:
    DESCRIPTION = (
        "Converts a model file into a GGUF file of any type, into a quantized safetensors file of any format, or back, "
        "without loading the model: tensor by tensor, in little memory. The new file stands in the folder of the old "
        "one. An interrupted conversion continues when it runs again."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("STRING", "REPORT")
    RETURN_NAMES = ("file_name", "report")
    OUTPUT_TOOLTIPS = (
        "Name of the new file in its model folder, as the loaders list it.",
        "What became of each tensor, with its size and error.",
    )
    FUNCTION = "convert"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from ..quantizers.files.recipes import RECIPES

        host = current()
        files = [f"{folder}/{name}" for folder in FOLDERS for name in host.list_files(folder, SUFFIXES)]
        formats = [f for f in format_ids() if get_entry(f).backend != "gguf"]
        name = "A file of the folders diffusion_models, text_encoders or checkpoints: safetensors or GGUF."
        kind = (
            "What the weights become. Q2_K to Q8_0, IQ and others: a GGUF file, mixed as llama.cpp mixes them. F32, "
            "F16 and BF16: plain, GGUF or safetensors. comfy-*: a safetensors file that ComfyUI's own loaders open. "
            "Other formats: a safetensors file for LoadQuantized."
        )
        output = "Name of the new file, with .gguf or .safetensors; empty: the old name with the type behind it."
        rules = "Types of single layers from QuantRules, such as *.img_attn.* = gguf-q6-k."
        imatrix = "Name of an importance matrix (llama.cpp's .gguf or .dat) in the same model folder; empty is none."
        keep = (
            "Layers that stay at full precision: names or patterns such as *.attn.to_out.*, separated by commas or "
            "lines."
        )
        layout = (
            "How quantized layers are laid out in a safetensors file. usual: as the format's library does. scaled-fp8: "
            "comfy-fp8-e4m3fn for older hosts."
        )
        scales = (
            "File of SaveCalibration in the output folder, for the input_scale of comfy-fp8 formats and comfy-nvfp4; "
            "empty is none."
        )
        dry = "Only show what each group of tensors would become, and the size of the file."
        return {
            "required": {
                "model_name": (files, {"tooltip": name}),
                "type": ([*RECIPES, *formats], {"default": "Q4_K_M", "tooltip": kind}),
            },
            "optional": {
                "output_name": ("STRING", {"default": "", "tooltip": output}),
                "overwrite": ("BOOLEAN", {"default": False, "tooltip": "Replace a file that is there already."}),
                "dry_run": ("BOOLEAN", {"default": False, "tooltip": dry}),
                "rules": ("QUANT_CONFIG", {"tooltip": rules}),
                "keep_layers": ("STRING", {"default": "", "multiline": True, "tooltip": keep}),
                "imatrix_name": ("STRING", {"default": "", "tooltip": imatrix}),
                "layout": ([USUAL, *LAYOUTS], {"default": USUAL, "tooltip": layout}),
                "calibration_name": ("STRING", {"default": "", "tooltip": scales}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model_name: str | None) -> bool | str:
        if model_name is None:  # a link: the name is not known yet
            return True
        from .conversion import resolve

        try:
            resolve(model_name)
        except QuantwireError as err:
            return " ".join(str(err).splitlines())
        return True

    @classmethod
    def IS_CHANGED(
        cls,
        model_name: str,
        type: str,
        output_name: str = "",
        keep_layers: str = "",
        imatrix_name: str = "",
        calibration_name: str = "",
        **_: Any,
    ) -> str:
        from . import conversion

        inputs = conversion.inputs_of(model_name, type, output_name, keep_layers, imatrix_name, calibration_name)
        return conversion.changed(inputs)

    def convert(
        self,
        model_name: str,
        type: str,
        output_name: str = "",
        overwrite: bool = False,
        dry_run: bool = False,
        rules: QuantSpec | RuleSet | None = None,
        keep_layers: str = "",
        imatrix_name: str = "",
        layout: str = USUAL,
        calibration_name: str = "",
    ) -> dict[str, Any]:
        from . import conversion

        inputs = conversion.inputs_of(model_name, type, output_name, keep_layers, imatrix_name, calibration_name)
        report = conversion.run(inputs, rules, overwrite, dry_run, "" if layout == USUAL else layout)
        shown = inputs.target.relative_to(conversion.root_of(model_name, inputs.source)).as_posix()
        return with_report(report, shown, report)
