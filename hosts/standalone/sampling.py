"""KSampler of the embedded host: noise, schedule and guidance as ComfyUI has them, the solver from diffusers.

The schedules are ComfyUI's for FLUX: a grid of times from 1 down, shifted by t' = e^mu / (e^mu + 1/t - 1). Noise comes
from `torch.manual_seed(seed)` on the CPU, so a seed gives the same start here and there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...quantizers.errors import WorkflowError
from . import flux
from .models import DiffusionModel
from .progress import progress

SAMPLERS = ("euler",)
SCHEDULERS = ("simple", "sgm_uniform", "normal")

Conditioning = list[tuple[Tensor, dict[str, Any]]]


def time_grid(scheduler: str, steps: int, mu: float) -> list[float]:
    """Unshifted times, descending from 1, one a step.

    ComfyUI tabulates 10,000 times for FLUX (1,000 for schnell) and `simple` picks whole indices from the table.
    """
    table = 10_000 if mu else 1_000
    if scheduler == "simple":
        return [1 - int(i * table / steps) / table for i in range(steps)]
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
) -> Tensor:
    """Denoise a latent with Euler steps.

    Args:
        latent: (B, C, H, W) raw VAE latent; zeros for a new image.
        cfg: guidance by the negative prompt; 1 skips the negative prompt.
        denoise: share of the schedule to run, in (0, 1].
    Returns:
        (B, C, H, W) float32 raw VAE latent.
    Raises:
        WorkflowError: a latent whose channels or size the model cannot take, or several conditionings.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    _check_latent(model, latent)
    total = int(steps / denoise)
    times = time_grid(scheduler, total, model.shift_mu)[-steps:]
    solver: Any = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential")
    solver.set_timesteps(sigmas=times, mu=model.shift_mu)
    noise = torch.randn(latent.shape, generator=torch.manual_seed(seed), dtype=torch.float32)
    sigma = float(solver.sigmas[0])
    start = (latent.float() - flux.LATENT_SHIFT) * flux.LATENT_SCALE if latent.any() else latent.float()
    x = sigma * noise + (1 - sigma) * start
    conditions = [_single(positive)] if cfg == 1.0 else [_single(positive), _single(negative)]
    with progress(len(times), "sampling") as bar:
        for i, timestep in enumerate(solver.timesteps):
            sigma = float(solver.sigmas[i])
            v = [_velocity(model, x, sigma, c) for c in conditions]
            guided = v[0] if len(v) == 1 else v[1] + cfg * (v[0] - v[1])
            x = solver.step(guided, timestep, x, return_dict=False)[0]
            bar.update(1)
    return x / flux.LATENT_SCALE + flux.LATENT_SHIFT


def _velocity(model: DiffusionModel, x: Tensor, sigma: float, condition: tuple[Tensor, dict[str, Any]]) -> Tensor:
    context, extra = condition
    batch = x.shape[0]
    guidance = float(extra.get("guidance", 3.5)) if model.config.guidance else None
    return flux.velocity(
        model.transformer, x, sigma, _expand(context, batch), _expand(extra["pooled_output"], batch), guidance
    )


def _expand(t: Tensor, batch: int) -> Tensor:
    return t.expand(batch, *t.shape[1:]) if t.shape[0] == 1 else t


def _single(conditioning: Conditioning) -> tuple[Tensor, dict[str, Any]]:
    if len(conditioning) != 1:
        raise WorkflowError(
            f"The embedded host samples with one conditioning, got {len(conditioning)}.\n"
            "Run graphs that combine conditionings in ComfyUI."
        )
    return conditioning[0]


def _check_latent(model: DiffusionModel, latent: Tensor) -> None:
    channels = model.config.in_channels // flux.PATCH**2
    if latent.ndim != 4 or latent.shape[1] != channels:
        raise WorkflowError(f"The model takes latents of {channels} channels, got shape {tuple(latent.shape)}.")
    if latent.shape[2] % flux.PATCH or latent.shape[3] % flux.PATCH:
        raise WorkflowError(
            f"The latent is {latent.shape[3]}x{latent.shape[2]}; FLUX needs even sizes.\n"
            "Make the width and height of the image multiples of 16."
        )
