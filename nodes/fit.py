"""FitModel."""

from __future__ import annotations

from typing import Any

from ..hosts import current
from ..quantizers.errors import QuantwireError
from ..quantizers.rules import RuleSet
from ..quantizers.spec import QuantSpec
from .common import CATEGORY, stamp, with_report

FOLDER = "diffusion_models"
SUFFIXES = (".safetensors", ".sft", ".gguf")
PREFER = ("balanced", "quality")  # values of `quantizers.measure.fit.Prefer`, whose module takes time to import


class FitModel:
    DESCRIPTION = (
        "Opens a diffusion model so that it fits the memory there is, with the least loss: chooses the format, the "
        "offload mode and, where text encoders are linked, their format. Full precision where that fits, and files "
        "that are quantized already as they are. The report says what was chosen, why, and what to expect."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("MODEL", "CLIP", "REPORT")
    RETURN_NAMES = ("model", "clip", "report")
    OUTPUT_TOOLTIPS = (
        "The model, loaded as chosen.",
        "The linked text encoders in their format; nothing where none are linked.",
        "What was chosen, why, what is expected and what came out.",
    )
    FUNCTION = "fit"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        files = current().list_files(FOLDER, SUFFIXES)
        name = "A file of the folder diffusion_models; a full-precision one leaves the most choice."
        vram = (
            "GiB of the device's memory that everything together may take, such as 8. 0: what the device has free for "
            "a graph now. More than the device has counts as what it has."
        )
        prefer = (
            "What to give up first. balanced: quality, down to formats of 4 bits, then speed. quality: speed, so that "
            "weights may be copied to the device at every step."
        )
        side = {"min": 16, "max": 16384, "step": 8}
        size = "of the images that will be made, in pixels: larger ones leave less memory for weights."
        frames = "Frames of a video; 1 for images."
        batch = "Images or videos that are made at once."
        cfg = "That of the sampler; above 1 ComfyUI may run both prompts in one batch, which takes more memory."
        clip = "Text encoders from a CLIP loader: they are counted, and quantized where that is needed."
        config = "A mixed recipe, from FindRecipe or QuantRules: it is taken where it fits."
        cache = "Keep the quantized model on disk and take it from there next time."
        mixed = (
            "Try a mixture of formats too, which spends what one format leaves free on layers of more bits, by the "
            "errors of their weights. Looks into every layer, which takes seconds to minutes."
        )
        return {
            "required": {
                "model_name": (files, {"tooltip": name}),
                "vram_gib": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 4096.0, "step": 0.5, "tooltip": vram}),
            },
            "optional": {
                "clip": ("CLIP", {"tooltip": clip}),
                "prefer": (list(PREFER), {"default": "balanced", "tooltip": prefer}),
                "width": ("INT", {"default": 1024, **side, "tooltip": f"Width {size}"}),
                "height": ("INT", {"default": 1024, **side, "tooltip": f"Height {size}"}),
                "frames": ("INT", {"default": 1, "min": 1, "max": 100_000, "tooltip": frames}),
                "batch": ("INT", {"default": 1, "min": 1, "max": 4096, "tooltip": batch}),
                "cfg": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 100.0, "step": 0.1, "tooltip": cfg}),
                "config": ("QUANT_CONFIG", {"tooltip": config}),
                "cache": ("BOOLEAN", {"default": True, "tooltip": cache}),
                "mixed": ("BOOLEAN", {"default": False, "tooltip": mixed}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model_name: str | None) -> bool | str:
        if model_name is None:  # a link: the name is not known yet
            return True
        try:
            current().resolve(FOLDER, model_name, SUFFIXES)
        except QuantwireError as err:
            return " ".join(str(err).splitlines())
        return True

    @classmethod
    def IS_CHANGED(cls, model_name: str, vram_gib: float = 0.0, **_: Any) -> str:
        from ..quantizers.files.gguf_parts import named_parts

        # What is free now decides when the model is loaded: it stays as it was then until an input changes.
        return stamp(named_parts(current().resolve(FOLDER, model_name)))

    def fit(
        self,
        model_name: str,
        vram_gib: float,
        clip: Any = None,
        prefer: str = "balanced",
        width: int = 1024,
        height: int = 1024,
        frames: int = 1,
        batch: int = 1,
        cfg: float = 1.0,
        config: QuantSpec | RuleSet | None = None,
        cache: bool = True,
        mixed: bool = False,
    ) -> dict[str, Any]:
        from ..quantizers.measure.activations import RunShape
        from .fitting import Wanted, fit_model

        path = current().resolve(FOLDER, model_name, SUFFIXES)
        shape = RunShape(width, height, frames, batch, cfg=cfg)
        wanted = Wanted(path, round(vram_gib * 2**30), shape, prefer, config, cache, mixed)
        model, clip, report = fit_model(wanted, clip)
        return with_report(report, model, clip, report)
