"""CompareQuality."""

from __future__ import annotations

from typing import Any

from ..hosts import current
from ..quantizers.errors import SpecError
from .common import CATEGORY, with_report


class CompareQuality:
    DESCRIPTION = (
        "Tells what a version of a model differs in from another: SQNR and largest error of each layer, and of images "
        "from the same seeds PSNR, SSIM, FLIP and luminosity, with both side by side and their difference. Says when "
        "images are noise, flat or nan, which is what a broken quantization makes."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("REPORT", "IMAGE", "IMAGE")
    RETURN_NAMES = ("report", "plot", "pictures")
    OUTPUT_TOOLTIPS = (
        "What differs, as data.",
        "Layers by SQNR and the numbers of the images, as a picture.",
        "Reference, other and difference from left to right, a row a pair; the plot where no images are linked.",
    )
    FUNCTION = "compare"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        a = "The reference, as a rule at full precision, of which the weights are compared."
        b = "Another version of the model, such as one from QuantizeModel. LoRAs that are not merged do not count."
        images = "Images of the {}, from VAEDecode: the same seeds, prompts and sizes for both."
        gain = "How many times as bright as it is the difference of the images is shown."
        return {
            "required": {"gain": ("FLOAT", {"default": 4.0, "min": 0.1, "max": 255.0, "step": 0.1, "tooltip": gain})},
            "optional": {
                "model_a": ("MODEL", {"tooltip": a}),
                "model_b": ("MODEL", {"tooltip": b}),
                "images_a": ("IMAGE", {"tooltip": images.format("reference")}),
                "images_b": ("IMAGE", {"tooltip": images.format("other model")}),
            },
        }

    def compare(
        self, gain: float, model_a: Any = None, model_b: Any = None, images_a: Any = None, images_b: Any = None
    ) -> dict[str, Any]:
        from ..quantizers.measure.compare import Comparison, compare_pictures
        from ..quantizers.measure.compare_plots import pictures, plot
        from ..quantizers.measure.plots import new_figure, to_image

        models = _both(model_a, model_b, "model")
        images = _both(images_a, images_b, "images")
        if not models and not images:
            raise SpecError(
                "Nothing is linked to compare.\nLink model_a and model_b, images_a and images_b, or all four."
            )
        new_figure()  # a missing matplotlib is told before the work
        labels = ("reference", "other")
        layers = _layers(model_a, model_b, labels) if models else None
        compared, noise = compare_pictures(images_a, images_b, labels) if images else (None, None)
        found = Comparison(*labels, layers, compared, noise)
        drawn = to_image(plot(found))
        return with_report(found, found, drawn, pictures(images_a, images_b, gain) if images else drawn)


def _both(a: Any, b: Any, name: str) -> bool:
    """Whether a pair is linked.

    Raises:
        SpecError: half of it is.
    """
    if (a is None) != (b is None):
        there, missing = ("a", "b") if b is None else ("b", "a")
        raise SpecError(f"{name}_{there} is linked and {name}_{missing} is not.\nLink both, or neither.")
    return a is not None


def _layers(a: Any, b: Any, labels: tuple[str, str]) -> Any:
    from ..hosts.eta import with_eta
    from ..quantizers.measure.layers import compare_models

    host = current()
    return compare_models(
        host.components(a), host.components(b), labels, lambda items, _: with_eta(host, items, "layers")
    )
