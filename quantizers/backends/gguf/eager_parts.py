"""What every GGUF block is: integer codes, a scale a group, and for some types a shift a group.

    value = code * scale + shift

in float32. Scales, and products of a scale with a code, take at most 23 bits, so they are exact; only the sum
rounds. A multiplication fused with an addition therefore gives the same bits as gguf's two steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Parts:
    """The blocks of one type, taken apart.

    Attributes:
        codes: (n, groups, values a group) uint8, int8 or int16, in the order of the values.
        scale: (n, groups) float32.
        shift: (n, groups) float32, or none.
    """

    codes: Tensor
    scale: Tensor
    shift: Tensor | None = None


def values(parts: Parts) -> Tensor:
    """(n, values a block) float32."""
    product = parts.codes * parts.scale.unsqueeze(-1)
    total = product if parts.shift is None else product + parts.shift.unsqueeze(-1)
    return total.flatten(1)


def write(parts: Parts, out: Tensor, device_type: str) -> None:
    """Into `out`, (n, values a block): on a CPU float32, elsewhere of any float dtype."""
    WRITERS.get(device_type, _write_values)(parts, out)


def _write_in_passes(parts: Parts, out: Tensor) -> None:
    """For CPUs: float32, without another tensor of this size, while a part of the weight stays in the cache."""
    grouped = out.view(parts.codes.shape)
    grouped.copy_(parts.codes).mul_(parts.scale.unsqueeze(-1))
    if parts.shift is not None:
        grouped.add_(parts.shift.unsqueeze(-1))


def _write_at_once(parts: Parts, out: Tensor) -> None:
    """For CUDA, whose kernels convert as they read and write: one kernel, in float32, rounded once."""
    grouped = out.view(parts.codes.shape)
    scale = parts.scale.unsqueeze(-1)
    if parts.shift is None:
        torch.mul(parts.codes, scale, out=grouped)
    else:
        torch.addcmul(parts.shift.unsqueeze(-1), parts.codes, scale, out=grouped)


def _write_values(parts: Parts, out: Tensor) -> None:
    """For other devices, where a kernel may round its factors to the dtype of `out` first."""
    out.copy_(values(parts))


WRITERS: dict[str, Callable[[Parts, Tensor], None]] = {"cpu": _write_in_passes, "cuda": _write_at_once}
