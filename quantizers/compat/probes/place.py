"""The real calls of every mode and variant, and the proof that the mode is in force.

Without that proof a mode that did nothing would count as one that works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..modes import OffloadMode
from .net import named
from .optional import load

AWAY = "blocks.1"  # the part that a split keeps off the compute device
HOST = torch.device("cpu")


class ProbeError(Exception):
    """The probe did not do what it says, so that its outcome would mean nothing."""


@dataclass(frozen=True)
class Placed:
    """A module under a mode.

    Attributes:
        module: what is called.
        check: raises `ProbeError` where the mode is not in force between two passes.
        rest: what a pipeline calls between two passes.
    """

    module: nn.Module
    check: Callable[[], None]
    rest: Callable[[], None] = lambda: None


def place(net: nn.Module, mode: OffloadMode, variant: str, device: torch.device, folder: Path) -> Placed:
    """Put a module on the CPU under a mode.

    Args:
        device: where it computes.
        folder: empty; what the mode keeps on disk goes there.
    """
    if mode is OffloadMode.NONE:
        moved = net.to(device)
        return Placed(moved, lambda: _require(_devices(moved) == {device.type}, f"weights are on {_devices(moved)}"))
    if mode is OffloadMode.MODEL:
        return _model(net, device)
    if mode is OffloadMode.SEQUENTIAL:
        return _sequential(net, variant, device, folder)
    if mode is OffloadMode.BALANCED:
        return _balanced(net, variant, device, folder)
    return _group(net, variant, device, folder)


def _model(net: nn.Module, device: torch.device) -> Placed:
    accelerate = load("accelerate")
    net, hook = accelerate.cpu_offload_with_hook(net, execution_device=device)

    def check() -> None:
        attached: Any = getattr(net, "_hf_hook", None)
        _require(type(attached).__name__ == "CpuOffload", f"the hook of the module is {attached!r}")
        _require(attached.execution_device == device, f"it computes on {attached.execution_device}")
        _require(_devices(net) == {HOST.type}, f"between passes weights are on {_devices(net)}")

    return Placed(net, check, hook.offload)


def _sequential(net: nn.Module, variant: str, device: torch.device, folder: Path) -> Placed:
    accelerate = load("accelerate")
    if variant == "disk":
        accelerate.disk_offload(net, str(folder), execution_device=device)
    else:
        accelerate.cpu_offload(net, execution_device=device)

    def check() -> None:
        _require(_devices(net) == {"meta"}, f"between passes weights are on {_devices(net)}, not on meta")
        _require((variant == "disk") == bool(list(folder.glob("*.dat"))), f"files on disk: {_names(folder)}")

    return Placed(net, check)


def _balanced(net: nn.Module, variant: str, device: torch.device, folder: Path) -> Placed:
    accelerate = load("accelerate")
    if variant == "whole":
        net = accelerate.dispatch_model(net, device_map={"": device}, main_device=device, force_hooks=True)
    else:
        away = "disk" if variant == "split-disk" else "cpu"
        parts = [name for name, _ in net.named_children() if name != "blocks"]
        parts += [f"blocks.{name}" for name, _ in net.get_submodule("blocks").named_children()]
        places = {name: away if name == AWAY else device for name in parts}
        net = accelerate.dispatch_model(net, device_map=places, main_device=device, offload_dir=str(folder))

    def check() -> None:
        hooked = [name for name, module in named(net).items() if hasattr(module, "_hf_hook")]
        _require(bool(hooked), "no layer has a hook")
        kept = {name for name, p in net.named_parameters() if p.device.type == "meta"}
        expected = set[str]() if variant == "whole" else {n for n, _ in net.named_parameters() if n.startswith(AWAY)}
        _require(kept == expected, f"between passes these are kept away: {sorted(kept)}")
        _require((variant == "split-disk") == bool(list(folder.glob("*.dat"))), f"files on disk: {_names(folder)}")

    return Placed(net, check)


def _group(net: nn.Module, variant: str, device: torch.device, folder: Path) -> Placed:
    apply_group(net, variant, device, folder)

    def check() -> None:
        found = list(groups(net))
        expected = 4 if variant.startswith("leaf") else 3  # the least: each block and the rest; each kind of leaf
        _require(len(found) >= expected, f"{len(found)} groups")
        covered = {id(t) for group in found for t in tensors_of_group(group)}
        missing = [name for name, t in _tensors(net) if id(t) not in covered]
        _require(not missing, f"in no group: {missing}")
        left = {t.device.type for _, t in _tensors(net)}
        _require(left == {HOST.type}, f"between passes weights are on {left}")
        files = [Path(group.safetensors_file_path) for group in found] if variant.endswith("disk") else []
        absent = [f.name for f in files if not f.is_file()]
        _require(not absent, f"not on disk: {absent}, but {_names(folder)}")
        if variant.endswith("stream"):
            _require(any(group.stream is not None for group in found), "no group has a stream")

    return Placed(net, check)


def apply_group(net: nn.Module, variant: str, device: torch.device, folder: Path) -> None:
    """diffusers' group offloading of whatever weights the module has."""
    hooks = load("diffusers.hooks")
    level, _, how = variant.partition("-")
    hooks.apply_group_offloading(
        net,
        onload_device=device,
        offload_device=HOST,
        offload_type=f"{level}_level",
        num_blocks_per_group=1 if level == "block" else None,
        use_stream=how == "stream",
        offload_to_disk_path=str(folder) if how == "disk" else None,
    )


def groups(net: nn.Module) -> Iterator[Any]:
    """Each of diffusers' groups once."""
    seen: set[int] = set()
    for module in net.modules():
        registry: Any = getattr(module, "_diffusers_hook", None)
        hook = registry.get_hook("group_offloading") if registry is not None else None
        if hook is not None and id(hook.group) not in seen:
            seen.add(id(hook.group))
            yield hook.group


def tensors_of_group(group: Any) -> list[Tensor]:
    own = [t for module in group.modules for t in (*module.parameters(), *module.buffers())]
    return [*own, *group.parameters, *group.buffers]


def _tensors(net: nn.Module) -> list[tuple[str, Tensor]]:
    return [*net.named_parameters(), *net.named_buffers()]


def _devices(net: nn.Module) -> set[str]:
    return {p.device.type for p in net.parameters()}


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise ProbeError(text)
