"""AdviseFormat."""

from __future__ import annotations

from typing import Any

from ..hosts import current
from ..quantizers.errors import QuantwireError
from .common import CATEGORY, with_report

# Values of `quantizers.measure.tiers` and kinds of `native`, whose modules take time to import. The capabilities are
# those of Turing, Ampere, Ada, Hopper and Blackwell.
THIS_DEVICE = "this device"
VRAM = (THIS_DEVICE, "6 GB", "8 GB", "12 GB", "16 GB", "24 GB")
CUDA = ("cuda:7.5", "cuda:8.0", "cuda:8.6", "cuda:8.9", "cuda:9.0", "cuda:10.0", "cuda:12.0")
DEVICES = (THIS_DEVICE, *CUDA, "rocm", "xpu", "mps", "cpu")


class AdviseFormat:
    DESCRIPTION = (
        "Ranks the formats for a model: what fits this device or another, in which offload mode, how large each is, "
        "what it costs in quality by stored measurements, and whether the device multiplies in it natively. Nothing is "
        "quantized. The best format goes on as a config for QuantizeModel."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("QUANT_CONFIG", "STRING", "REPORT", "IMAGE")
    RETURN_NAMES = ("config", "text", "report", "plot")
    OUTPUT_TOOLTIPS = (
        "The best format, for the input config of QuantizeModel with format 'from config'.",
        "The ranking as text.",
        "The ranking as data.",
        "Size against quality, coloured by what fits.",
    )
    FUNCTION = "advise"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        vram = "Memory of the device: what this one has free for a graph now, or a card of so many GB, all of it free."
        device = "This device, or another: NVIDIA GPUs by their compute capability, such as cuda:8.6 for an RTX 3060."
        budget = "Most that the model's weights may take, such as 6.5GB. Empty: as much as fits."
        clip = "Text encoders that run with it; where none are linked, those usual for the model are assumed."
        side = {"min": 16, "max": 16384, "step": 8}
        size = "of the images that will be made, in pixels."
        frames = "Frames of a video; 1 for images."
        batch = "Images or videos that are made at once."
        cfg = "Guidance by a negative prompt, as in KSampler; above 1 ComfyUI runs both prompts in one batch."
        number = {"default": 1, "min": 1, "max": 4096}
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "A diffusion model; a quantized one is taken as it was before."}),
                "vram": (list(VRAM), {"default": THIS_DEVICE, "tooltip": vram}),
                "device": (list(DEVICES), {"default": THIS_DEVICE, "tooltip": device}),
            },
            "optional": {
                "clip": ("CLIP", {"tooltip": clip}),
                "width": ("INT", {"default": 1024, **side, "tooltip": f"Width {size}"}),
                "height": ("INT", {"default": 1024, **side, "tooltip": f"Height {size}"}),
                "frames": ("INT", {**number, "max": 100_000, "tooltip": frames}),
                "batch": ("INT", {**number, "tooltip": batch}),
                "cfg": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 100.0, "step": 0.1, "tooltip": cfg}),
                "budget": ("STRING", {"default": "", "tooltip": budget}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, budget: str | None = None, device: str | None = None, vram: str | None = None
    ) -> bool | str:
        from ..quantizers.measure.units import parse_size

        try:
            if budget and budget.strip():  # None is a link: the text is not known yet
                parse_size(budget, "GB")
        except QuantwireError as err:
            return f"budget: {' '.join(str(err).splitlines())}"
        if device is not None and device not in DEVICES:
            return f"device {device!r} is not among its choices: {', '.join(DEVICES)}."
        if vram is not None and vram not in VRAM:
            return f"vram {vram!r} is not among its choices: {', '.join(VRAM)}."
        if device not in (None, THIS_DEVICE) and vram == THIS_DEVICE:
            return "device is not this one, so its memory must be told: set vram."
        return True

    def advise(
        self,
        model: Any,
        vram: str,
        device: str,
        clip: Any = None,
        width: int = 1024,
        height: int = 1024,
        frames: int = 1,
        batch: int = 1,
        cfg: float = 1.0,
        budget: str = "",
    ) -> dict[str, Any]:
        from ..quantizers.measure.activations import RunShape
        from .advising import advise_model

        shape = RunShape(width, height, frames, batch, cfg=cfg)
        found = advise_model(current(), model, clip, shape, device, vram, budget)
        return with_report(found.advice, found.spec, str(found.advice), found.advice, found.image)
