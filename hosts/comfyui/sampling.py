"""Sampling and decoding as ComfyUI's own KSampler and decoders do it, with a word after each step."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from ..sampling import Generation


def choices() -> tuple[Sequence[str], Sequence[str]]:
    """Names of the samplers and of the schedulers."""
    import comfy.samplers

    return comfy.samplers.KSampler.SAMPLERS, comfy.samplers.KSampler.SCHEDULERS


def sample(model: Any, how: Generation, after_step: Callable[[], None]) -> Any:
    """The LATENT that KSampler would give, without its previews: they would be timed too.

    Source: common_ksampler of ComfyUI 0.33, nodes.py.
    """
    import comfy.sample

    ratios = {k: v for k, v in how.latent.items() if k.startswith("downscale_ratio_")}
    start = comfy.sample.fix_empty_latent_channels(model, how.latent["samples"], **ratios)
    noise = comfy.sample.prepare_noise(start, how.seed, how.latent.get("batch_index"))
    samples = comfy.sample.sample(
        model,
        noise,
        how.steps,
        how.cfg,
        how.sampler_name,
        how.scheduler,
        how.positive,
        how.negative,
        start,
        denoise=how.denoise,
        noise_mask=how.latent.get("noise_mask"),
        callback=lambda *_: after_step(),
        disable_pbar=True,
        seed=how.seed,
    )
    return {**{k: v for k, v in how.latent.items() if k not in ratios}, "samples": samples}


def decode(vae: Any, latent: Any) -> Any:
    """An IMAGE (B, H, W, 3), or an AUDIO: `{"waveform": (B, C, L), "sample_rate": int}`."""
    host: Any = importlib.import_module("nodes")  # the host's, not the pack's
    if not is_audio(vae, latent):
        return host.VAEDecode().decode(vae, latent)[0]
    return host.NODE_CLASS_MAPPINGS["VAEDecodeAudio"].execute(vae, latent)[0]


def is_audio(vae: Any, latent: Any) -> bool:
    """Whether the decoder makes sound: the latent says so, or the VAE gives one row of samples and not an image."""
    return latent.get("type") == "audio" or getattr(vae, "latent_dim", 2) == 1
