"""What the host does with memory now, read from its own state at the moment of asking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...quantizers.compat.modes import OffloadMode


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
    device = mm.get_torch_device()
    if mm.is_device_cpu(device) or state in ("DISABLED", "SHARED", "HIGH_VRAM"):
        mode = OffloadMode.NONE
    elif dynamic:
        mode = OffloadMode.DYNAMIC
    elif state == "NO_VRAM":
        mode = OffloadMode.NOVRAM
    else:
        mode = OffloadMode.PARTIAL
    return MemoryState(mode, state, str(device), not mm.DISABLE_SMART_MEMORY, int(mm.NUM_STREAMS))
