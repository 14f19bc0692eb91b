"""A FLUX of 9 MiB for the tests of offloading, and every way to place it on a CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from quantwire.hosts.offload import OffloadSettings
from quantwire.hosts.standalone import flux
from quantwire.hosts.standalone.models import DiffusionModel
from quantwire.hosts.standalone.offload import running
from quantwire.hosts.standalone.offload.device import nbytes_of
from quantwire.quantizers.compat.modes import OffloadMode
from torch import Tensor, nn

GIB = 1 << 30
SPLIT = OffloadSettings(OffloadMode.BALANCED, device_gib=1, high_watermark=0.7)  # of a device as large as the model
# Every variant of the embedded host that runs without an accelerator.
VARIANTS: dict[str, OffloadSettings] = {
    "none": OffloadSettings(OffloadMode.NONE),
    "model": OffloadSettings(OffloadMode.MODEL),
    "sequential": OffloadSettings(OffloadMode.SEQUENTIAL),
    "sequential-disk": OffloadSettings(OffloadMode.SEQUENTIAL, keep_on="disk"),
    "balanced-whole": OffloadSettings(OffloadMode.BALANCED),
    "balanced-split": SPLIT,
    "balanced-split-disk": dataclasses.replace(SPLIT, keep_on="disk"),
    "group-block": OffloadSettings(OffloadMode.GROUP),
    "group-blocks": OffloadSettings(OffloadMode.GROUP, blocks_per_group=2),
    "group-leaf": OffloadSettings(OffloadMode.GROUP, group_level="leaf"),
    "group-block-disk": OffloadSettings(OffloadMode.GROUP, keep_on="disk"),
    "group-leaf-disk": OffloadSettings(OffloadMode.GROUP, group_level="leaf", keep_on="disk"),
}


def settings(variant: str, module: nn.Module) -> OffloadSettings:
    """The settings of a variant; `device_gib` 1 becomes the size of the module."""
    found = VARIANTS[variant]
    return dataclasses.replace(found, device_gib=nbytes_of(module) / GIB) if found.device_gib else found


def tiny_flux(dtype: torch.dtype = torch.bfloat16) -> DiffusionModel:
    """One double and two single blocks of random weights; the same each time."""
    config = flux.FluxConfig(256, 1, 2, 64, 96, 80, True)
    model = flux.build(config).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.05, generator=generator)
    return DiffusionModel(model.to(dtype).requires_grad_(False).eval(), config, "tiny", dtype)


def velocities(model: DiffusionModel) -> list[Tensor]:
    """Two calls of the transformer, as sampling makes them: some states last one call."""
    generator = torch.Generator().manual_seed(1)
    x, context, pooled = (torch.randn(*s, generator=generator) for s in ((1, 16, 4, 4), (1, 5, 96), (1, 80)))
    with torch.inference_mode(), running(model) as placed:
        return [flux.velocity(placed.transformer, x, t, context, pooled, 3.5, model.dtype) for t in (0.76, 0.3)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def files(folder: Path | None) -> list[str]:
    return [] if folder is None else sorted(p.name for p in folder.iterdir())
