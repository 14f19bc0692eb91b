"""MemoryForecast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..quantizers.errors import SpecError, near
from ..quantizers.registry import format_ids
from .common import CATEGORY, one_line, spec_from_inputs, with_report

if TYPE_CHECKING:
    from ..quantizers.rules import RuleSet
    from ..quantizers.spec import QuantSpec

AS_IS = "as it is"


class MemoryForecast:
    DESCRIPTION = (
        "Tells whether a generation fits the memory of a device, before it runs: weights, unpacked layers, LoRAs and "
        "activations while text is encoded, sampled and decoded, under each offload mode, as text and as a picture. "
        "Offload modes in which the quantized weights would break are not offered."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("REPORT", "IMAGE", "STRING")
    RETURN_NAMES = ("report", "image", "text")
    OUTPUT_TOOLTIPS = (
        "The forecast as data.",
        "A bar for each mode and stage, for PreviewImage.",
        "The same as text, verdict first.",
    )
    FUNCTION = "forecast"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        form = "What the linear layers of the model would become. 'as it is': as they are now, quantized or not."
        size = {"default": 1024, "min": 16, "max": 16384, "step": 8}
        cfg = "Guidance by a negative prompt. Above 1, ComfyUI runs both prompts in one batch where there is room."
        gib = "Memory of the device in GiB, such as 8 for an 8 GB card. 0: this machine's, as much as is free now."
        assumed = "Count the text encoders and VAE that are usual for the model where none is linked."
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The diffusion model, quantized or not. It is not changed."}),
                "format": ([AS_IS, *format_ids()], {"default": AS_IS, "tooltip": form}),
                "width": ("INT", {**size, "tooltip": "Width of the image in pixels."}),
                "height": ("INT", {**size, "tooltip": "Height of the image in pixels."}),
            },
            "optional": {
                "clip": ("CLIP", {"tooltip": "The text encoders that run before it."}),
                "vae": ("VAE", {"tooltip": "The VAE that decodes behind it."}),
                "text_format": (
                    [AS_IS, *format_ids()],
                    {"default": AS_IS, "tooltip": "What the linear layers of the text encoders would become."},
                ),
                "frames": ("INT", {"default": 1, "min": 1, "max": 4096, "tooltip": "Frames of a video; 1: an image."}),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 4096, "tooltip": "Images or videos at once."}),
                "cfg": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 100.0, "step": 0.1, "tooltip": cfg}),
                "vram_gib": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 4096.0, "step": 0.5, "tooltip": gib}),
                "assume_missing": ("BOOLEAN", {"default": True, "tooltip": assumed}),
                "config": ("QUANT_CONFIG", {"tooltip": "Options from QuantConfig, rules for layers from QuantRules."}),
                "keep_layers": (
                    "STRING",
                    {"default": "", "multiline": True, "tooltip": "Layers that would stay at full precision."},
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, format: str | None = None, text_format: str | None = None) -> bool | str:
        try:
            _check(format, "format")
            _check(text_format, "text_format")
        except SpecError as err:
            return one_line(err)
        return True

    def forecast(
        self,
        model: Any,
        format: str,
        width: int,
        height: int,
        clip: Any = None,
        vae: Any = None,
        text_format: str = AS_IS,
        frames: int = 1,
        batch_size: int = 1,
        cfg: float = 1.0,
        vram_gib: float = 0.0,
        assume_missing: bool = True,
        config: QuantSpec | RuleSet | None = None,
        keep_layers: str = "",
    ) -> dict[str, Any]:
        from ..hosts import current
        from ..hosts.forecast_objects import Objects, forecast_objects
        from ..quantizers.measure.activations import RunShape
        from ..quantizers.measure.forecast_bars import bars
        from ..quantizers.measure.plots import to_image
        from ..quantizers.spec import QuantSpec

        _check(format, "format")  # ComfyUI lets null through, and what a link brings
        _check(text_format, "text_format")
        if format == AS_IS and (config is not None or keep_layers.strip()):
            raise SpecError(
                f"format is '{AS_IS}', so config and keep_layers have nothing to act on.\n"
                "Choose a format, or clear them."
            )
        spec = None if format == AS_IS else spec_from_inputs(format, config, keep_layers)
        text_spec = None if text_format == AS_IS else QuantSpec(text_format)
        shape = RunShape(width, height, frames, batch_size, 0, cfg)
        objects = Objects(model, clip, vae)
        found = forecast_objects(current(), objects, spec, text_spec, shape, vram_gib, assume_missing)
        return with_report(found, found, to_image(bars(found)), str(found))


def _check(format: Any, name: str) -> None:
    """None is a link.

    Raises:
        SpecError: no such format.
    """
    words = [AS_IS, *format_ids()]
    if format is not None and format not in words:
        raise SpecError(f"{name} {format!r} is not among its {len(words)} choices.{near(str(format), words)}")
