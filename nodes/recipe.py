"""FindRecipe: the format of each layer with which a model's output changes least, under a budget of bytes."""

from __future__ import annotations

from typing import Any

from ..quantizers.errors import QuantwireError
from .common import CATEGORY, with_report

USUAL = ""


class FindRecipe:
    DESCRIPTION = (
        "Measures what quantizing each layer does to the output of a model, on your own prompt, and finds the format "
        "of each layer with which the output changes least in the bytes that you allow. The model runs once for each "
        "layer and noise level, and the result is checked on another seed beside the single formats that fit: where "
        "one of them measures better, the recipe is that format."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("QUANT_CONFIG", "STRING", "REPORT", "IMAGE")
    RETURN_NAMES = ("config", "rules", "report", "plot")
    OUTPUT_TOOLTIPS = (
        "For the input config of QuantizeModel. It names every layer, so any format can be set there.",
        "The same as text, for QuantRules and for quantwire convert --rules.",
        "The recipe, what it was chosen from, and its errors.",
        "Error against size, and which layers matter.",
    )
    FUNCTION = "find"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        budget = (
            "Bytes of the model's weights: 6.5GB, 6.5GiB, 700MB; a number alone is GB. It must be below the "
            "model's own size. The report of QuantizeModel tells the bytes of a format."
        )
        formats = "Formats to choose from, one a line; empty for gguf formats of 2 to 8 bits, which one file can hold."
        check = "Measure the recipe, and the single formats that fit, in another run with another seed."
        steps = "Steps of the run that is measured; the noise levels are taken from it."
        levels = "At how many noise levels each layer is measured. More take longer and tell more."
        seed = {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFE, "tooltip": "Seed of the run that is measured."}
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "A full-precision model; it is not changed."}),
                "positive": ("CONDITIONING", {"tooltip": "A prompt such as you will use."}),
                "latent": ("LATENT", {"tooltip": "An empty latent; a small size will do."}),
                "budget": ("STRING", {"default": "6.5GB", "tooltip": budget}),
            },
            "optional": {
                "formats": ("STRING", {"default": USUAL, "multiline": True, "tooltip": formats}),
                "steps": ("INT", {"default": 8, "min": 1, "max": 100, "tooltip": steps}),
                "levels": ("INT", {"default": 4, "min": 1, "max": 100, "tooltip": levels}),
                "seed": ("INT", seed),
                "check": ("BOOLEAN", {"default": True, "tooltip": check}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, budget: str | None = None, formats: str | None = None) -> bool | str:
        from ..quantizers.measure.units import parse_size
        from ..quantizers.spec import QuantSpec

        try:
            if budget is not None:  # None is a link: the text is not known yet
                parse_size(budget, "GB")
            for line in _lines(formats or ""):
                QuantSpec.from_uri(line)
        except QuantwireError as err:
            return " ".join(str(err).splitlines())
        return True

    def find(
        self,
        model: Any,
        positive: Any,
        latent: Any,
        budget: str,
        formats: str = USUAL,
        steps: int = 8,
        levels: int = 4,
        seed: int = 0,
        check: bool = True,
    ) -> dict[str, Any]:
        from ..hosts import current
        from ..hosts.recipe import Wanted, node_run, recipe_by_runs
        from ..quantizers.measure.plots import new_figure, to_image
        from ..quantizers.measure.recipe_plot import plot_recipe
        from ..quantizers.measure.units import parse_size

        new_figure()  # minutes of measuring are not to end in a library that is missing
        host = current()
        wanted = Wanted(parse_size(budget, "GB"), tuple(_lines(formats)) or None, levels, check)
        run = node_run(host, model, seed, steps, positive, latent)
        name = next(iter(host.components(model)))
        recipe, found = recipe_by_runs(host, run, wanted, steps, name)
        return with_report(recipe, recipe.rule_set, recipe.rules, recipe, to_image(plot_recipe(recipe, found)))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
