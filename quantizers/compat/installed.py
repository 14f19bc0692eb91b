"""Which offloading accelerate or diffusers has been told to do with a module, read off their hooks.

Neither library is imported: their hooks are recognised by name, and are there only if the library is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from .modes import OffloadMode

Installed = tuple[OffloadMode, str | None]
_WORST = (OffloadMode.SEQUENTIAL, OffloadMode.BALANCED, OffloadMode.GROUP, OffloadMode.MODEL)


def installed(modules: Iterable[nn.Module]) -> Installed | None:
    """The mode and variant whose hooks are on the modules, or None without hooks of offloading.

    With several the one that moves the smallest parts, because that is where weights break first.
    """
    found = [mode for module in modules if (mode := _of(module)) is not None]
    return min(found, key=lambda f: _WORST.index(f[0]), default=None)


def _of(module: nn.Module) -> Installed | None:
    hooked = _hooked(module)
    from_diffusers = next((mode for part in hooked if (mode := _group(part)) is not None), None)
    if from_diffusers is not None:
        return from_diffusers
    holding = 0  # modules with weights of their own that accelerate places
    streamed: list[Any] = []
    whole = False
    for part in hooked:
        hooks = list(_hooks(part))
        whole = whole or any(type(hook).__name__ == "CpuOffload" for hook in hooks)
        # One or none a module: cpu_offload puts a second hook on the outermost one, which only moves inputs.
        aligning = [hook for hook in hooks if type(hook).__name__ == "AlignDevicesHook"]
        offloading = [hook for hook in aligning if hook.offload][:1]
        streamed += offloading
        holding += bool(offloading) or (bool(aligning) and any(True for _ in part.parameters(recurse=False)))
    if streamed:
        disk = any(_on_disk(hook.weights_map) for hook in streamed)
        if len(streamed) < holding:
            return OffloadMode.BALANCED, "split-disk" if disk else "split"
        return OffloadMode.SEQUENTIAL, "disk" if disk else "memory"
    if holding:
        return OffloadMode.BALANCED, "whole"
    return (OffloadMode.MODEL, "") if whole else None


def _hooked(module: nn.Module) -> list[nn.Module]:
    """The modules that carry hooks; a walk of its own, because `modules()` takes four times as long."""
    found: list[nn.Module] = []
    stack: list[nn.Module | None] = [module]
    while stack:
        part = stack.pop()
        if part is None:
            continue
        kept = part.__dict__
        if "_hf_hook" in kept or "_diffusers_hook" in kept:
            found.append(part)
        stack.extend(kept["_modules"].values())
    return found


def _hooks(module: nn.Module) -> Iterator[Any]:
    """accelerate's hooks on one module; a SequentialHook holds several."""
    hook = vars(module).get("_hf_hook")
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def _on_disk(weights_map: Any) -> bool:
    """Whether weights are read from files: a PrefixedDataset around an OffloadedWeightsLoader with a folder."""
    while hasattr(weights_map, "dataset") and not hasattr(weights_map, "save_folder"):
        weights_map = weights_map.dataset
    return getattr(weights_map, "save_folder", None) is not None


def _group(module: nn.Module) -> Installed | None:
    """diffusers' group offloading of one module; its hook keeps the configuration."""
    hooks: Any = getattr(vars(module).get("_diffusers_hook"), "hooks", {})
    hook = hooks.get("group_offloading")
    if hook is None:
        return None
    level = "leaf" if "leaf" in str(getattr(hook.config.offload_type, "value", "")) else "block"
    disk = hook.config.offload_to_disk_path is not None
    return OffloadMode.GROUP, level + ("-disk" if disk else "-stream" if hook.config.stream is not None else "")
