"""BenchmarkModel: how long a generation takes, and what it needs, in the graph's own model and in other formats."""

from __future__ import annotations

from typing import Any

from ..hosts import current
from ..quantizers.errors import QuantwireError
from .common import CATEGORY

INTERLEAVED, ONE_BY_ONE = "interleaved", "one by one"


class BenchmarkModel:
    DESCRIPTION = (
        "Generates several times with the sampler of the host and measures seconds, seconds a step and memory: for the "
        "model as it is, and for each format named in `against`. Writes benchmark_results.json, "
        "quantization_config.json, a sample of each and a report as one HTML file into the output folder."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("REPORT", "IMAGE", "STRING")
    RETURN_NAMES = ("report", "plots", "path")
    OUTPUT_TOOLTIPS = ("What was measured, as data.", "The plots, for PreviewImage.", "Where the HTML report is.")
    FUNCTION = "benchmark"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        samplers, schedulers = current().sampling_choices()
        seed = {
            "default": 0,
            "min": 0,
            "max": 0xFFFFFFFFFFFFFFFF,
            "tooltip": "Seed of the noise, the same in all runs.",
        }
        cfg = {"default": 1.0, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01}
        cfg_tooltip = "Guidance by the negative prompt, as in KSampler; 1 skips the negative prompt."
        denoise = {"default": 1.0, "min": 0.01, "max": 1.0, "step": 0.01, "tooltip": "Share of the schedule to run."}
        repeats = "Measured generations of each format; medians are reported."
        warmup = "Generations of each format before those: the first one moves weights and compiles."
        folder = "Folder in the output folder for the results; those of an earlier benchmark there are replaced."
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model to measure; it is not changed."}),
                "positive": ("CONDITIONING", {"tooltip": "What to generate."}),
                "negative": ("CONDITIONING", {"tooltip": "What not to generate; not used at cfg 1."}),
                "latent_image": ("LATENT", {"tooltip": "Its size, length and batch decide how much work a run is."}),
                "seed": ("INT", seed),
                "steps": ("INT", {"default": 8, "min": 1, "max": 10000, "tooltip": "Steps of each generation."}),
                "cfg": ("FLOAT", {**cfg, "tooltip": cfg_tooltip}),
                "sampler_name": (list(samplers), {"tooltip": "The solver, as in KSampler."}),
                "scheduler": (list(schedulers), {"tooltip": "How the noise levels are spaced, as in KSampler."}),
                "denoise": ("FLOAT", denoise),
                "repeats": ("INT", {"default": 3, "min": 1, "max": 1000, "tooltip": repeats}),
                "warmup": ("INT", {"default": 1, "min": 1, "max": 100, "tooltip": warmup}),
                "folder": ("STRING", {"default": "benchmarks/model", "tooltip": folder}),
            },
            "optional": _optional(),
        }

    @classmethod
    def VALIDATE_INPUTS(cls, against: str | None = None, folder: str | None = None) -> bool | str:
        from .bench_run import formats_of

        try:
            formats_of(against or "")  # None is a link: the text is not known yet
            if folder is not None:
                current().output_path(folder)
        except QuantwireError as err:
            return " ".join(str(err).splitlines())
        return True

    def benchmark(
        self,
        model: Any,
        positive: Any,
        negative: Any,
        latent_image: Any,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float = 1.0,
        repeats: int = 3,
        warmup: int = 1,
        folder: str = "benchmarks/model",
        vae: Any = None,
        against: str = "",
        order: str = INTERLEAVED,
        audio_seconds: float = 0.0,
        report: Any = None,
    ) -> dict[str, Any]:
        from ..hosts.sampling import Generation
        from .bench_run import Asked, run

        how = Generation(seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise)
        asked = Asked(folder, against, repeats, warmup, order, audio_seconds)
        results, plots, page = run(model, how, vae, asked, report)
        text = f"{results}\n{page}"
        current().show_text(text)
        return {"ui": {"text": [text], "report": [results.to_dict()]}, "result": (results, plots, str(page))}


def _optional() -> dict[str, Any]:
    against = (
        "Formats to measure beside the model as it is, one a line: bnb-nf4, or a URI such as "
        "bnb;bits=4;bits4-quant-type=nf4. The model must be at full precision then. Empty: none."
    )
    order = (
        "interleaved: the formats take turns, so that a busy moment slows all of them; all are in memory at once. "
        "one by one: one format after the other, with one in memory beside the model."
    )
    audio = "Length of the audio that the latent makes, where no vae is linked; 0: none, or read off what vae decodes."
    vae = "Decodes each generation, counted in its time; gives the samples of the report and the length of audio."
    return {
        "vae": ("VAE", {"tooltip": vae}),
        "against": ("STRING", {"default": "", "multiline": True, "tooltip": against}),
        "order": ([INTERLEAVED, ONE_BY_ONE], {"default": INTERLEAVED, "tooltip": order}),
        "audio_seconds": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 1e6, "step": 0.1, "tooltip": audio}),
        "report": ("REPORT", {"tooltip": "Of QuantizeModel or a loader, for the layer errors of the model as it is."}),
    }
