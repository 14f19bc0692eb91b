"""The module that probes quantize: blocks in a `ModuleList` between two projections, as diffusion transformers have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

TOKENS = 4
BLOCKS = 2
DTYPE = torch.bfloat16
SEED = 0


class Block(nn.Module):
    """Two linear layers with a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.relu(self.fc1(x)))


class Net(nn.Module):
    """(TOKENS, width) -> (TOKENS, width); the norm stays in full precision, as it does in real models."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.proj_in = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj_in(x)
        for block in self.blocks:
            x = block(x)
        return self.proj_out(self.norm(x))


def full_precision(width: int) -> Net:
    """The same values at every call, in bfloat16 on the CPU."""
    net = Net(width).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(SEED)
    for layer in linears(net).values():
        layer.weight.normal_(std=width**-0.5, generator=generator)
        cast(Tensor, layer.bias).normal_(std=0.1, generator=generator)
    return net.to(DTYPE)


def named(net: nn.Module) -> dict[str, nn.Module]:
    return dict(cast("Iterator[tuple[str, nn.Module]]", net.named_modules()))


def linears(net: nn.Module) -> dict[str, nn.Linear]:
    """Full name -> layer."""
    return {name: module for name, module in named(net).items() if isinstance(module, nn.Linear)}


def inputs(width: int) -> Tensor:
    return torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(SEED + 1)).to(DTYPE)


def compute_device() -> torch.device:
    """The accelerator where there is one, else the CPU.

    A `torch.device` even then: accelerate compares device maps with the string "cpu", so that it takes this one for a
    compute device and keeps the layers mapped to "cpu" or "disk" away from it.
    """
    accelerator: Any = getattr(torch, "accelerator", None)
    found = accelerator.current_accelerator() if accelerator is not None and accelerator.is_available() else None
    return torch.device("cpu") if found is None else torch.device(found.type, 0)


def has_streams(device: torch.device) -> bool:
    """Whether copies can run beside computing on it."""
    return device.type != "cpu" and hasattr(getattr(torch, device.type, None), "Stream")
