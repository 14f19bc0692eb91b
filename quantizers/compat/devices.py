"""On which devices the tensors of one layer are, those inside tensor subclasses and in states beside them included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

_DEPTH = 5  # mapping of parameters, weight, its state, the state of that (bitsandbytes' nested QuantState), its parts


def devices_of(layer: nn.Module) -> set[torch.device]:
    """Devices of what a layer itself keeps; layers inside it are left out."""
    return {tensor.device for tensor in _tensors(vars(layer), _DEPTH)}


def _tensors(value: object, depth: int) -> Iterator[Tensor]:
    """Those that say where they are: the device of a wrapper subclass is what its parts were made on.

    Tensors without dimensions take part in calls on every device, and empty ones hold nothing.
    """
    if isinstance(value, Tensor) and not hasattr(value, "__tensor_flatten__") and value.dim() and value.numel():
        yield value
    if depth == 0 or isinstance(value, (type, nn.Module)):
        return
    if isinstance(value, dict):
        inside = list(cast("dict[object, object]", value).values())
    elif isinstance(value, (list, tuple)):
        inside = list(cast("list[object]", value))
    else:
        inside = list(cast("dict[str, object]", getattr(value, "__dict__", {})).values())
    for part in inside:
        yield from _tensors(part, depth - 1)
