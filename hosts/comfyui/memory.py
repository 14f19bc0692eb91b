"""What the host does with memory now, read from its own state at the moment of asking.

Before a model is loaded this is a forecast, made the way the host decides (comfy.model_management.load_models_gpu and
ModelPatcher.partially_load, 0.33); afterwards it is what the host did.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...quantizers.compat.comfyui_rules import LAUNCH_FLAGS
from ...quantizers.compat.modes import HOST_MODES, HostName, OffloadMode
from ...quantizers.compat.remedies import Space

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MemoryState:
    """The host's memory settings.

    Attributes:
        mode: in the terms of OffloadCompat.
        vram_state: the host's own word.
        device: where models compute.
        smart_memory: False when every model is unloaded after each prompt.
        async_streams: number of streams that copy offloaded weights; 0 is synchronous.
    """

    mode: OffloadMode
    vram_state: str
    device: str
    smart_memory: bool
    async_streams: int


def memory_state(patcher: Any = None) -> MemoryState:
    """Ask the host; `patcher` tells whether this model is under dynamic VRAM."""
    import comfy.memory_management
    import comfy.model_management as mm

    dynamic = patcher.is_dynamic() if patcher is not None else comfy.memory_management.aimdo_enabled
    state = mm.vram_state.name
    # Text encoders may compute on the CPU beside a GPU: under --lowvram, and on one that is bad at float16.
    device = patcher.load_device if patcher is not None else mm.get_torch_device()
    if mm.is_device_cpu(device) or state in ("DISABLED", "SHARED", "HIGH_VRAM"):
        mode = OffloadMode.NONE
    elif dynamic:
        mode = OffloadMode.DYNAMIC
    elif state == "NO_VRAM":
        mode = OffloadMode.NOVRAM
    else:
        mode = OffloadMode.PARTIAL
    return MemoryState(mode, state, str(device), not mm.DISABLE_SMART_MEMORY, int(mm.NUM_STREAMS))


def forecast(patcher: Any, needed: int | None = None) -> tuple[OffloadMode, str | None]:
    """Mode and variant in which the host would load this model now.

    Args:
        needed: bytes that running it takes beside its weights; None is the least that the host reserves.
    """
    mode = memory_state(patcher).mode
    if mode is not OffloadMode.PARTIAL:
        return mode, ""
    space = space_for(patcher, needed)
    return mode, "whole" if space.free > space.nbytes else "split"


def space_for(patcher: Any, needed: int | None = None) -> Space:
    """Size of a model, and how much of it the host would load onto the device now."""
    import comfy.model_management as mm

    device = patcher.load_device
    held = sum(loaded.model_loaded_memory() for loaded in mm.current_loaded_models if loaded.device == device)
    available = min(mm.get_free_memory(device) + held, mm.get_total_memory(device))  # it unloads others for this one
    least = mm.minimum_inference_memory()
    reserved = least if needed is None else max(least, needed + mm.extra_reserved_memory())
    share = min(available * mm.MIN_WEIGHT_MEMORY_RATIO, available - least)
    return Space(patcher.model_size(), int(max(0, available - reserved, share)))


def done(patcher: Any) -> tuple[OffloadMode, str | None]:
    """Mode and variant in which the host has loaded this model."""
    mode = memory_state(patcher).mode
    if mode is OffloadMode.NOVRAM or patcher.is_dynamic():
        return mode, ""
    device = patcher.load_device
    # Layers that the host cannot stream stay behind when they do not fit, and it does not count those.
    if patcher.model.model_lowvram or any(not _is_same(p.device, device) for p in patcher.model.parameters()):
        return OffloadMode.PARTIAL, "split"
    return mode, "whole" if mode is OffloadMode.PARTIAL else ""


def _is_same(one: torch.device, other: torch.device) -> bool:
    """`mps` is where tensors of `mps:0` lie: a device without an index stands for any of its type."""
    return one.type == other.type and (one.index == other.index or None in (one.index, other.index))


def how_to_set(mode: OffloadMode) -> str:
    """Why OffloadCompat sets no mode here, and how to start ComfyUI for it."""
    first = "set_mode has no effect in ComfyUI, which chooses its memory mode when it starts, for all models."
    if mode in HOST_MODES[HostName.COMFYUI]:
        return f"{first}\nTurn set_mode off; for mode {mode.value} start ComfyUI {_started(mode)}."
    ways = "; ".join(f"{m.value}: {_started(m)}" for m in HOST_MODES[HostName.COMFYUI])
    return (
        f"{first}\nTurn set_mode off, or run the graph with `quantwire run`, which has mode {mode.value}. "
        f"ComfyUI's own modes come from how it is started: {ways}."
    )


def _started(mode: OffloadMode) -> str:
    flag = next(f for f in LAUNCH_FLAGS if f.mode is mode)
    return f"with {flag.flag}" if flag.flag else "without options that change its memory mode"
