"""Where the embedded host computes when it places weights, and how much fits there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ....quantizers.compat.modes import OffloadMode
from ....quantizers.errors import SpecError
from ....quantizers.memory import device_facts
from ...offload import OffloadSettings

GIB = 1 << 30
STREAMS = ("cuda", "xpu")  # devices whose copies can run beside their computing
# Home of the weights, and where a machine without an accelerator computes. A `torch.device`, because accelerate takes
# the string "cpu" for a place to keep weights away in, and this for a device to compute on.
CPU = torch.device("cpu")


def execution_device() -> torch.device:
    """The machine's accelerator with its index, else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None:
        return CPU
    return torch.device(found.type, torch.accelerator.current_device_index())


def check_device(settings: OffloadSettings, device: torch.device) -> None:
    """Refuse what the device cannot do.

    Raises:
        SpecError: streams on a device that has none.
    """
    if settings.mode is OffloadMode.GROUP and settings.use_stream and device.type not in STREAMS:
        raise SpecError(
            f"use_stream copies weights while the device computes, and {device.type} has no streams for it.\n"
            "Turn use_stream off, or run the graph on a machine with a CUDA or XPU device."
        )


def device_nbytes(settings: OffloadSettings, device: torch.device, held: int = 0) -> int:
    """Bytes that the watermarks of balanced are shares of.

    Args:
        held: bytes that offloading has on the device now and could free.
    """
    if settings.device_gib:
        return int(settings.device_gib * GIB)
    free = device_facts(device).free_nbytes
    return free if device == CPU else free + held + cached_nbytes(device)


def cached_nbytes(device: torch.device) -> int:
    """Bytes that PyTorch's allocator keeps for new tensors; the device counts them as taken."""
    if device.type == "mps":
        return max(0, torch.mps.driver_allocated_memory() - torch.mps.current_allocated_memory())
    if device.type not in ("cuda", "xpu"):
        return 0
    backend = getattr(torch, device.type)
    return backend.memory_reserved(device) - backend.memory_allocated(device)


def empty_cache(device: torch.device) -> None:
    """Give what the allocator keeps back to the device, where it has an allocator that does."""
    empty: Any = getattr(getattr(torch, device.type, None), "empty_cache", None)
    if empty is not None:
        empty()


def nbytes_of(module: nn.Module) -> int:
    """Bytes of the tensors of a module, tied ones counted once."""
    found: dict[Any, int] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        for t in _plain_parts(tensor):
            # Meta tensors have no storage that could be shared.
            key = id(t) if t.is_meta else (t.untyped_storage()._cdata, t.storage_offset(), t.shape)
            found[key] = t.numel() * t.element_size()
    return sum(found.values())


def _plain_parts(tensor: Tensor) -> list[Tensor]:
    """The tensors inside a library's tensor, whose own shape and dtype are those of the weight before quantizing."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    # torch's types do not declare the protocol of tensor subclasses (torch.utils._python_dispatch).
    names, _ = tensor.__tensor_flatten__()  # type: ignore[operator]
    return [part for name in names for part in _plain_parts(getattr(tensor, name))]
