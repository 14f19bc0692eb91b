"""What layers hold in memory: weights, the parts of their tensors, and tensors in objects beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..modes import OffloadMode
from .net import named
from .optional import load

DEPTH = 4  # of objects in objects: a parameter, its quantization state, the state of that state
# Of modules: what is theirs in other ways, and the hooks of offloading, which hold what is kept away.
_NOT_STATE = frozenset(("_parameters", "_buffers", "_modules", "_hf_hook", "_diffusers_hook"))


class KeptNear(Exception):
    """A weight was offloaded, and the layer still holds all of it on the device, or does not use what was offloaded."""


def inner_tensors(value: Any, path: str = "", depth: int = DEPTH) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors with values that a tensor holds, at any depth: parts of a subclass, and states beside it."""
    for name, part in sorted(getattr(value, "__dict__", {}).items()) if depth else ():
        yield from _tensors_in(part, f"{path}{name}", depth)


def _tensors_in(part: Any, path: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(part, Tensor):
        below = list(inner_tensors(part, f"{path}.", depth - 1))
        yield from below or ([(path, part)] if part.numel() else [])
    elif not callable(part) and not isinstance(part, (type, torch.device, torch.dtype)):
        yield from inner_tensors(part, f"{path}.", depth - 1)


def own(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters and buffers of a layer itself, without those of layers inside."""
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def beside(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a layer holds beside the data of its own parameters and buffers: `weight.CB`, `state.SCB`."""
    for name, t in own(module):
        yield from inner_tensors(t, f"{name}.")
    for name, value in sorted(vars(module).items()):
        if name not in _NOT_STATE:
            yield from _tensors_in(value, name, DEPTH)


def memory(net: nn.Module) -> dict[str, Tensor]:
    """Full path -> tensor, for all that the layers of a module hold."""
    found: dict[str, Tensor] = {}
    for name, module in named(net).items():
        prefix = f"{name}." if name else ""
        for key, t in own(module):
            if has_memory(t):
                found[prefix + key] = t.data  # which keeps the memory when the parameter is given another
        found |= {prefix + path: t for path, t in beside(module)}
    return found


def has_memory(t: Tensor) -> bool:
    """Whether a tensor has values of its own: those that wrap others, and those on `meta`, have none."""
    try:
        return t.numel() > 0 and t.data_ptr() != 0
    except RuntimeError:  # torch refuses the address of what has no storage
        return False


def require_away(net: nn.Module, mode: OffloadMode, variant: str, device: torch.device) -> None:
    """Between two passes a layer whose weight was offloaded holds no second copy of it on the device.

    Raises:
        KeptNear: names the first that does.
    """
    for name, module in named(net).items():
        weights = [p for p in module.parameters(recurse=False) if p.ndim > 1]
        if not weights or not _is_away(weights, mode, variant, device):
            continue
        nbytes = max(p.numel() * p.element_size() for p in weights)
        for path, t in beside(module):
            if t.device.type == device.type and t.numel() * t.element_size() >= nbytes:
                kind = type(module).__name__
                raise KeptNear(f"after its weight was offloaded, {name} ({kind}) still holds all of it in {path}")


def _is_away(weights: list[nn.Parameter], mode: OffloadMode, variant: str, device: torch.device) -> bool:
    if all(w.is_meta for w in weights):
        return True
    if mode in (OffloadMode.NONE, OffloadMode.BALANCED):
        return False
    # On one device a layer does not tell what of it is away, but for files.
    return variant.endswith("disk") or device.type != "cpu"


def spoil(net: nn.Module, variant: str, folder: Path) -> bool:
    """Set what is kept away to zeros; False where the mode keeps nothing but the parameters themselves."""
    files = [f for f in folder.iterdir() if f.suffix == ".dat"]
    for file in files:
        file.write_bytes(bytes(file.stat().st_size))
    groups = list(folder.glob("*.safetensors"))
    for file in groups:
        safetensors = load("safetensors.torch", "safetensors")
        safetensors.save_file({k: torch.zeros_like(t) for k, t in safetensors.load_file(file).items()}, file)
    kept = {} if variant.endswith("disk") else {id(t): t for m in net.modules() for t in _kept_of(m)}
    for t in kept.values():
        for part in [inner for _, inner in inner_tensors(t)] or [t]:
            part.zero_()
    return bool(files or groups or kept)


def _kept_of(module: nn.Module) -> list[Tensor]:
    """What accelerate's hook of a layer keeps in memory for it."""
    hook: Any = getattr(module, "_hf_hook", None)
    weights: Any = next((w for h in getattr(hook, "hooks", (hook,)) if (w := getattr(h, "weights_map", None))), None)
    weights = getattr(weights, "dataset", weights)  # PrefixedDataset
    weights = getattr(weights, "state_dict", weights)  # OffloadedWeightsLoader
    return list(cast("dict[str, Tensor]", weights).values()) if isinstance(weights, dict) else []
