"""SaveQuantized."""

from __future__ import annotations

from typing import Any

from ..hosts import current
from .common import CATEGORY

AUTO, GGUF = "auto", "gguf"
# Of `quantizers.files.writers`; here too, because importing that takes longer than a host may wait for its nodes.
LAYOUTS = (
    *("comfy", "comfy-metadata", "scaled-fp8", "bnb", "quanto", "sdnq", "torchao"),
    *("plain-fp8", "quantwire", GGUF),
)
SUFFIXES = (".safetensors", ".gguf")


class SaveQuantized:
    DESCRIPTION = (
        "Saves a quantized model as it is: the same numbers, nothing quantized again. ComfyUI's own formats become "
        "files that its Load Diffusion Model node opens, those of libraries files that their tools read, GGUF types "
        "a GGUF file; LoadQuantized opens all of them."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("STRING", "REPORT")
    RETURN_NAMES = ("path", "report")
    OUTPUT_TOOLTIPS = ("Where the file is.", "What was written.")
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        model = "A model with quantized layers (carrier quantwire). LoRAs on it are merged, or refused with the reason."
        name = "File in the output folder; .safetensors or .gguf is added, and folders are made."
        layout = (
            "How the file is laid out. auto: as ComfyUI or the library of the format reads it; the pack's own layout "
            "(quantwire) for formats of several libraries in one model."
        )
        overwrite = "Replace the file if it is there; otherwise that is an error."
        return {
            "required": {
                "model": ("MODEL", {"tooltip": model}),
                "filename": ("STRING", {"default": "diffusion_models/quantized", "tooltip": name}),
            },
            "optional": {
                "layout": ([AUTO, *LAYOUTS], {"default": AUTO, "tooltip": layout}),
                "overwrite": ("BOOLEAN", {"default": False, "tooltip": overwrite}),
            },
        }

    def save(self, model: Any, filename: str, layout: str = AUTO, overwrite: bool = False) -> dict[str, Any]:
        from ..quantizers.files.model_saving import layout_of, save_model

        host = current()
        held = host.saved_tensors(model)
        suffix = SUFFIXES[layout_of(held, layout) == GGUF]
        stem = next((filename.removesuffix(s) for s in SUFFIXES if filename.endswith(s)), filename)
        path = host.output_path(stem + suffix)
        report = save_model(path, held, layout, overwrite, host.progress)
        text = f"{report}\n{path}"
        host.show_text(text)
        return {"ui": {"text": [text], "report": [report.to_dict()]}, "result": (str(path), report)}
