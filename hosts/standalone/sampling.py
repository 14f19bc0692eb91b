"""KSampler of the embedded host: noise, schedules, guidance and Euler steps as ComfyUI has them.

The schedules are ComfyUI's for FLUX: a grid of times from 1 down, shifted by t' = e^mu / (e^mu + 1/t - 1). Noise comes
from a CPU generator with the seed, so a seed gives the same start here and there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...quantizers.errors import WorkflowError
from . import flux
from .guard import check_before
from .models import DiffusionModel
from .offload import running
from .progress import progress, show_preview
from .record import recorded

Conditioning = list[tuple[Tensor, dict[str, Any]]]


def sigmas(scheduler: str, steps: int, denoise: float, mu: float) -> Tensor:
    """(steps + 1,) float32 noise levels, descending, the last one 0; with denoise < 1 the end of a longer schedule."""
    times = time_grid(scheduler, int(steps / denoise), mu)[-steps:]
    return torch.tensor([*(_shift(t, mu) for t in times), 0.0])


def time_grid(scheduler: str, steps: int, mu: float) -> list[float]:
    """Unshifted times, descending from 1, one a step.

    ComfyUI tabulates 10,000 times for FLUX (1,000 for schnell) and `simple` picks whole indices from the table.
    """
    table = 10_000 if mu else 1_000
    if scheduler == "simple":
        stride = table / steps  # ComfyUI's order of operations: i * table / steps is an index off at times
        return [1 - int(i * stride) / table for i in range(steps)]
    last = _shift(1 / table, mu)
    points = steps + 1 if scheduler == "sgm_uniform" else steps
    return [1 + (last - 1) * i / max(points - 1, 1) for i in range(steps)]


def _shift(t: float, mu: float) -> float:
    return math.exp(mu) / (math.exp(mu) + 1 / t - 1)


def sample(
    model: DiffusionModel,
    seed: int,
    steps: int,
    cfg: float,
    scheduler: str,
    positive: Conditioning,
    negative: Conditioning,
    latent: Tensor,
    denoise: float = 1.0,
    after_step: Callable[[], None] | None = None,
) -> Tensor:
    """Denoise a latent with Euler steps.

    Args:
        latent: (B, C, H, W) raw VAE latent; zeros for a new image.
        cfg: guidance by the negative prompt; 1 skips the negative prompt.
        denoise: share of the schedule to run, in (0, 1].
        after_step: called when a step is done.
    Returns:
        (B, C, H, W) float32 raw VAE latent.
    Raises:
        WorkflowError: a latent or text encodings of a size that the model cannot take, or several conditionings.
        OffloadConflict: the guard on the model found that it cannot run as it is now.
    """
    check_before(model)
    _check_latent(model, latent)
    for conditioning in (positive,) if cfg == 1.0 else (positive, negative):
        _check_conditioning(model, conditioning)
    levels: list[float] = sigmas(scheduler, steps, denoise, model.shift_mu).tolist()
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    start = (latent.float() - flux.LATENT_SHIFT) * flux.LATENT_SCALE if latent.any() else latent.float()
    x = levels[0] * noise + (1 - levels[0]) * start
    conditions = [positive[0]] if cfg == 1.0 else [positive[0], negative[0]]
    with running(model) as placed, recorded(placed), progress(steps, "sampling") as bar:
        for now, then in itertools.pairwise(levels):
            by = [_velocity(placed, x, now, c) for c in conditions]
            v = by[0] if len(by) == 1 else by[1] + cfg * (by[0] - by[1])
            show_preview((x - now * v) / flux.LATENT_SCALE + flux.LATENT_SHIFT)  # where the path from here ends
            x = x + (then - now) * v
            if after_step is not None:
                after_step()
            bar.update(1)
    return x / flux.LATENT_SCALE + flux.LATENT_SHIFT


def _velocity(model: DiffusionModel, x: Tensor, sigma: float, condition: tuple[Tensor, dict[str, Any]]) -> Tensor:
    context, extra = condition
    batch = x.shape[0]
    guidance = float(extra.get("guidance", 3.5)) if model.config.guidance else None
    return flux.velocity(
        model.transformer,
        x,
        sigma,
        _expand(context, batch),
        _expand(extra["pooled_output"], batch),
        guidance,
        model.dtype,
    )


def _expand(t: Tensor, batch: int) -> Tensor:
    return t.expand(batch, *t.shape[1:]) if t.shape[0] == 1 else t


def _check_conditioning(model: DiffusionModel, conditioning: Conditioning) -> None:
    if len(conditioning) != 1:
        raise WorkflowError(
            f"The embedded host samples with one conditioning, got {len(conditioning)}.\n"
            "Run graphs that combine conditionings in ComfyUI."
        )
    context, extra = conditioning[0]
    got = context.shape[-1], extra["pooled_output"].shape[-1]
    wanted = model.config.context_dim, model.config.pooled_dim
    if got != wanted:
        raise WorkflowError(
            f"{model.source} takes text encodings of width {wanted[0]} and pooled vectors of width {wanted[1]}, got "
            f"{got[0]} and {got[1]}.\nLoad the text encoders that the model was trained with; FLUX.1 takes CLIP-L and "
            "T5-XXL through DualCLIPLoader."
        )


def _check_latent(model: DiffusionModel, latent: Tensor) -> None:
    channels = model.config.in_channels // flux.PATCH**2
    if latent.ndim != 4 or latent.shape[1] != channels:
        raise WorkflowError(f"The model takes latents of {channels} channels, got shape {tuple(latent.shape)}.")
    if latent.shape[2] % flux.PATCH or latent.shape[3] % flux.PATCH:
        raise WorkflowError(
            f"The latent is {latent.shape[3]}x{latent.shape[2]}; FLUX needs even sizes.\n"
            "Make the width and height of the image multiples of 16."
        )
