"""Free and total memory of a device, without packages beside torch."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import torch

from .auto import DeviceFacts
from .errors import SpecError


def device_facts(device: torch.device) -> DeviceFacts:
    """What is free on a device now.

    Raises:
        SpecError: the device or the operating system does not tell.
    """
    if device.type == "cpu":
        return describe(device, *ram())
    if device.type == "cuda":
        return describe(device, *torch.cuda.mem_get_info(device))
    if device.type == "xpu":
        return describe(device, *torch.xpu.mem_get_info(device))
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return describe(device, total - torch.mps.driver_allocated_memory(), total)
    raise SpecError(f"auto: how much memory is free on {device.type} is not known.\nChoose a format by name.")


def describe(device: torch.device, free_nbytes: int, total_nbytes: int) -> DeviceFacts:
    """A device with memory numbers that the caller has."""
    if device.type == "cuda" and torch.version.hip:
        return DeviceFacts("rocm", torch.cuda.get_device_name(device), free_nbytes, total_nbytes)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return DeviceFacts("cuda", torch.cuda.get_device_name(device), free_nbytes, total_nbytes, capability)
    names = {"cpu": "CPU", "mps": "Apple GPU"}
    return DeviceFacts(device.type, names.get(device.type, device.type), free_nbytes, total_nbytes)


def ram() -> tuple[int, int]:
    """Bytes of main memory that a process may still take, and in all; a container's limit counts.

    Raises:
        SpecError: an operating system that is neither Linux, macOS nor Windows.
    """
    if sys.platform.startswith("linux"):
        return _within_limit(*meminfo(Path("/proc/meminfo").read_text()))
    if sys.platform == "darwin":
        said = subprocess.run(["/usr/bin/vm_stat"], capture_output=True, text=True, check=True).stdout
        return vm_stat(said), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if sys.platform == "win32":
        return _windows()
    raise SpecError(f"auto: how much memory is free is not known on {sys.platform}.\nChoose a format by name.")


def meminfo(text: str) -> tuple[int, int]:
    """(available, total) bytes of Linux's /proc/meminfo."""
    kib = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    return kib["MemAvailable"] * 1024, kib["MemTotal"] * 1024


def vm_stat(text: str) -> int:
    """Free bytes of macOS's vm_stat: free, inactive and speculative pages, which the system gives out first."""
    page = re.search(r"page size of (\d+) bytes", text)
    pages = {name: int(value) for name, value in re.findall(r"^Pages (\w+):\s+(\d+)\.$", text, re.MULTILINE)}
    if page is None or "free" not in pages:
        raise SpecError("auto: what vm_stat says was not understood.\nChoose a format by name.")
    return int(page.group(1)) * sum(pages.get(name, 0) for name in ("free", "inactive", "speculative"))


def _within_limit(free: int, total: int, group: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """The same, at most what the process's control group (version 2) allows."""
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no group, or version 1: the machine's own numbers hold
        return free, total
    if limit == "max":
        return free, total
    used -= int(stat.get("inactive_file", 0))  # pages of files count as used, and go first
    return max(0, min(free, int(limit) - used)), min(total, int(limit))


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("total", "free", "page_total", "page_free", "v_total", "v_free", "ext")),
    )


def _windows() -> tuple[int, int]:
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if not cast(Any, ctypes).windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        raise SpecError("auto: Windows does not tell how much memory is free.\nChoose a format by name.")
    return cast(Any, status).free, cast(Any, status).total
