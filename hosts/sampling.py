"""What a sampler is told, the same in every host: the inputs of KSampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Generation:
    """One generation.

    Attributes:
        positive, negative: CONDITIONING of the host.
        latent: LATENT of the host; not changed.
        cfg: guidance by the negative prompt; 1 skips it.
        denoise: share of the schedule to run, above 0.
    """

    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    positive: Any
    negative: Any
    latent: Any
    denoise: float = 1.0
