"""What shows on a machine with one device that a mode would fail where weights move between two.

Where nothing moves, a mode that moves weights cannot fail. So on a machine without an accelerator two further things
are done with the same real calls:

- dispatching with hooks, once more to `meta`: what accelerate does there to a weight before it reaches the device is
  what it does for a GPU, except for bitsandbytes, whose weights it sends to a GPU by a way of their own;
- a pass under diffusers' group offloading, which moves a weight by `weight.data = moved`, with a copy on the same
  device as `moved`. Whatever of the layer is the old memory afterwards would have stayed on the other device;
- passes under accelerate's hook for whole modules, with every `to(device)` giving a copy. What is the old memory
  after a move, beside a weight or in an object of its layer, would have stayed.

Layers are made on the CPU, so what is shown is a module that comes from there. One that was quantized on the device
may keep there what stays here: the table says so where it matters.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..modes import OffloadMode
from .held import has_memory, inner_tensors, memory
from .net import named
from .optional import load
from .place import ProbeError, apply_group, groups, place, tensors_of_group

# Another name of the CPU: accelerate's hook moves nothing to the device where a module already is.
OTHER_CPU = torch.device("cpu", 0)


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
    if mode is OffloadMode.BALANCED and variant == "whole" and not format_id.startswith("bnb-"):
        load("accelerate").dispatch_model(net, device_map={"": "meta"}, main_device="meta", force_hooks=True)
    elif mode is OffloadMode.MODEL:
        _move_whole(net, x, folder)
    elif mode is OffloadMode.GROUP:
        folder.mkdir()
        _move_groups(net, x, variant.partition("-")[0], device, folder)


def _move_whole(net: nn.Module, x: Tensor, folder: Path) -> None:
    placed = place(net, OffloadMode.MODEL, "", OTHER_CPU, folder)
    for what, step in (("forward", lambda: placed.module(x)), ("offload", placed.rest)) * 2:
        before = memory(net)  # the tensors and not their addresses: those of freed ones are used again
        own = {name for name, _ in (*net.named_parameters(), *net.named_buffers())}
        with _Copies() as copies:
            step()
        unmoved = [n for n, t in before.items() if n in own and t.data_ptr() not in copies.sources]
        if unmoved:
            raise ProbeError(f"the hook's {what} did not move {', '.join(unmoved)}")
        old = {t.data_ptr() for t in before.values()}
        stayed = [path for path, t in memory(net).items() if t.data_ptr() in old]
        if stayed:
            layer = next(name for name in reversed(list(named(net))) if stayed[0].startswith(f"{name}."))
            kind = type(net.get_submodule(layer)).__name__
            parts = ", ".join(p.removeprefix(f"{layer}.") for p in stayed if p.startswith(f"{layer}."))
            raise LeftBehind(f"accelerate moved {layer} ({kind}), and these stayed: {parts}")


class _Copies(TorchFunctionMode):
    """Lets every `to` that names a device give new memory, as it does between two of them.

    Attributes:
        sources: addresses of what was copied.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sources: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = args[1] if args[1:] else kwargs.get("device")
        if func is not torch.Tensor.to or not isinstance(given, (torch.device, str, int, Tensor)):
            return func(*args, **kwargs)
        if not has_memory(args[0]):
            return _copied(args[0])
        self.sources.add(args[0].data_ptr())
        return func(*args, **{**kwargs, "copy": True})


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
    for copy in (lambda: t.to(t.device, copy=True), lambda: t.detach().clone(), lambda: _rebuilt(t)):
        with contextlib.suppress(AttributeError):
            copied = copy()
            inside = dict(inner_tensors(copied))
            if not before or (inside and all(i.data_ptr() != _address(before.get(p)) for p, i in inside.items())):
                return copied
    raise ProbeError(f"no copy of a {type(t).__name__} could be made")


def _rebuilt(t: Any) -> Tensor:
    """A wrapper of copies of what it wraps."""
    names, state = t.__tensor_flatten__()
    return t.__tensor_unflatten__({n: _copied(getattr(t, n)) for n in names}, state, t.size(), t.stride())


def _address(t: Tensor | None) -> int:
    return -1 if t is None else t.data_ptr()
