"""Most memory that was in use at once, as the device tells it.

CUDA, ROCm and XPU count what PyTorch allocated and what its allocator reserved. A CPU has no such counter: there the
high-water mark of the process stands in, with everything that the process holds beside the model. Linux can set it
back to what is held now (`echo 5 > /proc/self/clear_refs`), other systems tell the mark since the start.
"""

from __future__ import annotations

import gc
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Peak:
    """Bytes; None where the device does not tell.

    Attributes:
        method: how they were taken, for people.
    """

    allocated: int | None
    reserved: int | None
    method: str


class PeakMeter:
    """`start` before the work, `read` after it; both wait for the device.

    Args:
        device: where the models compute.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._reset = False

    def start(self) -> None:
        module = _counted(self.device)
        if module is not None:
            module.synchronize(self.device)
            module.reset_peak_memory_stats(self.device)
        elif self.device.type == "cpu":
            self._reset = _reset_mark()

    def release(self) -> None:
        """Give the device what PyTorch keeps of freed tensors, or it counts as reserved of what runs next."""
        gc.collect()
        module = _module(self.device)
        if module is not None:
            module.synchronize()
            module.empty_cache()

    def wait(self) -> None:
        """Until the device has done what it was told."""
        module = _module(self.device)
        if module is not None:
            module.synchronize()

    def read(self) -> Peak:
        module = _counted(self.device)
        if module is not None:
            module.synchronize(self.device)
            name = (torch.version.hip and "ROCm") or self.device.type.upper()
            method = f"{name}: PyTorch's counters of the device, allocated and reserved"
            allocated = int(module.max_memory_allocated(self.device))
            return Peak(allocated, int(module.max_memory_reserved(self.device)), method)
        if self.device.type != "cpu":
            return Peak(None, None, f"{self.device.type} has no counter of the most memory in use")
        since = "of the run" if self._reset else "since the process started"
        return Peak(high_water_mark(), None, f"CPU: high-water mark of the whole process {since}")


def resident_nbytes() -> int | None:
    """Main memory that the process holds now; None where the system does not tell."""
    return _status("VmRSS") if _STATUS.exists() else None


def high_water_mark() -> int | None:
    """Most main memory that the process held since the mark was set back, or since its start."""
    if _STATUS.exists():
        return _status("VmHWM")
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def _status(name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def _reset_mark() -> bool:
    """Whether the mark could be set back; sandboxes may forbid it, or take the write and do nothing."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    mark, held = _status("VmHWM"), resident_nbytes()
    return mark is not None and held is not None and mark - held < 2**24


def _module(device: torch.device) -> Any:
    return getattr(torch, device.type, None) if device.type in ("cuda", "xpu", "mps") else None


def _counted(device: torch.device) -> Any:
    """torch's module of a device that counts its peak."""
    return _module(device) if device.type in ("cuda", "xpu") else None
