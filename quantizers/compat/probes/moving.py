"""What shows on a machine with one device that a mode would fail where weights move between two.

Where nothing moves, a mode that moves weights cannot fail. So on a machine without an accelerator two further things
are done with the same real calls:

- dispatching with hooks, once more to `meta`: what accelerate does there to a weight before it reaches the device is
  what it does for a GPU, except for bitsandbytes, whose weights it sends to a GPU by a way of their own;
- a pass under diffusers' group offloading, which moves a weight by `weight.data = moved`, with a copy on the same
  device as `moved`. Whatever of the layer is the old memory afterwards would have stayed on the other device.

`model` has none: `module.to(device)` goes another way for `meta` than between devices with memory.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..modes import OffloadMode
from .optional import load
from .place import ProbeError, apply_group, groups, tensors_of_group

DEPTH = 4  # of objects in objects: a parameter, its quantization state, the state of that state


class LeftBehind(Exception):
    """A weight was moved, and a part of it was not."""


def move(
    net: nn.Module, x: Tensor, format_id: str, mode: OffloadMode, variant: str, device: torch.device, folder: Path
) -> None:
    """Move a module's weights in the way of the mode, if the mode moves any that `device` alone does not show.

    Args:
        x: what the module takes.
        folder: is made, if anything is kept on disk.

    Raises:
        LeftBehind: names the first weight of which a part stayed.
        Exception: whatever the libraries say.
    """
    if device.type != "cpu":
        return
    bnb = format_id.startswith("bnb-")
    if mode is OffloadMode.BALANCED and variant == "whole" and not bnb:
        load("accelerate").dispatch_model(net, device_map={"": "meta"}, main_device="meta", force_hooks=True)
    # From disk, bitsandbytes' states are not needed: they never leave the device there.
    elif mode is OffloadMode.GROUP and not (bnb and variant.endswith("disk")):
        folder.mkdir()
        _move_groups(net, x, variant.partition("-")[0], device, folder)


def _move_groups(net: nn.Module, x: Tensor, level: str, device: torch.device, folder: Path) -> None:
    """Always from memory: what comes from disk is put in place in the same way."""
    apply_group(net, level, device, folder)
    names = {id(t): name for name, t in (*net.named_parameters(), *net.named_buffers())}
    plain: list[tuple[Tensor, Tensor]] = []
    for group in groups(net):
        plain += [(t, t.data) for t in tensors_of_group(group) if not dict(inner_tensors(t))]
        group._transfer_tensor_to_device = functools.partial(_transfer, group._transfer_tensor_to_device, names)
    net(x)
    # After the pass, since a library that watches every operation of it would show another tensor in the meantime.
    same = [names[id(t)] for t, before in plain if t.data_ptr() == before.data_ptr()]
    if same:
        raise LeftBehind(f"diffusers moved these, and they stayed: {', '.join(same)}")


def _transfer(real: Callable[..., None], names: dict[int, str], t: Tensor, source: Tensor, stream: Any) -> None:
    before = dict(inner_tensors(t))  # the tensors and not their addresses: those of freed ones are used again
    real(t, _copied(source), stream)
    same = [path for path, inner in inner_tensors(t) if inner.data_ptr() == _address(before.get(path))]
    if same:
        name, kind = names[id(t)], type(t).__name__
        raise LeftBehind(f"diffusers moved {name} ({kind}), and these stayed: {', '.join(sorted(same))}")


def _copied(t: Tensor) -> Tensor:
    """What moving `t` to another device would give, on the same device.

    Raises:
        ProbeError: the library gives back the same memory.
    """
    before = dict(inner_tensors(t))
    # quanto's `clone` dequantizes, and torchao's `to` ignores `copy`; the `to` of quanto's class for 256 columns fails.
    for copy in (lambda: t.to(t.device, copy=True), lambda: t.detach().clone()):
        with contextlib.suppress(AttributeError):
            copied = copy()
            inside = dict(inner_tensors(copied))
            if not before or (inside and all(i.data_ptr() != _address(before.get(p)) for p, i in inside.items())):
                return copied
    raise ProbeError(f"no copy of a {type(t).__name__} could be made")


def inner_tensors(value: Any, path: str = "", depth: int = DEPTH) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors with values that a tensor holds, at any depth: parts of a subclass, and states beside it."""
    for name, part in sorted(getattr(value, "__dict__", {}).items()) if depth else ():
        if isinstance(part, Tensor):
            below = list(inner_tensors(part, f"{path}{name}.", depth - 1))
            yield from below or ([(f"{path}{name}", part)] if part.numel() else [])
        elif not callable(part) and not isinstance(part, (type, torch.device, torch.dtype)):
            yield from inner_tensors(part, f"{path}{name}.", depth - 1)


def _address(t: Tensor | None) -> int:
    return -1 if t is None else t.data_ptr()
