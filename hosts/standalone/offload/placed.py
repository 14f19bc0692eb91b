"""A component placed for an offload mode: the copy that computes, what of it lies on the device, and the way back.

Weights that come in are copied from the model's own memory, and when they leave the copy is dropped. accelerate's
`cpu_offload_with_hook` copies them back instead, which would hold them in main memory twice: a graph keeps the model
that was placed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....quantizers.kernels.kept import KeptWeights
from ...offload import OffloadSettings
from .copies import is_plain, is_wrapper, own_tensors
from .device import CPU, empty_cache, nbytes_of
from .disk import DiskWeights
from .residency import RESIDENCY


class Placed:
    """One component under one mode.

    Attributes:
        name: of the component: `transformer`, `t5xxl`, ...
        module: takes inputs from anywhere and gives outputs on the CPU.
        variant: of the compatibility matrix, in force.
        nbytes: of the weights that lie on the device while the component is in.
        is_in: those weights are on the device.
        closed: all its weights are gone.
        users: the settings on model objects that ask for it; without any left it is released.
    """

    def __init__(self, name: str, module: nn.Module, settings: OffloadSettings, device: torch.device) -> None:
        self.name = name
        self.module = module
        self.settings = settings
        self.device = device
        self.variant = settings.variant or ""
        self.nbytes = 0
        self.closed = False
        self.users: list[weakref.ref[OffloadSettings]] = []
        self.release: Callable[[], Any] = self.close  # for who holds it: forgets it too
        self.files = ExitStack()  # removes them
        self.folder: Path | None = None
        self.disk: DiskWeights | None = None
        # The dict that has a tensor, its name there, and its value in main memory.
        self._near: list[tuple[dict[str, Any], str, Tensor]] = []
        self._whole: nn.Module | None = None  # for a library's tensors, which only their own `.to` moves in full
        self.is_in = False

    def keep_near(self, home: Mapping[str, Tensor], whole: bool) -> None:
        """Say which weights lie on the device while the component is in: those that are somewhere now.

        Args:
            home: name of a tensor of the module -> its value in main memory; plain tensors.
            whole: the module has no weights but these and a library's own.
        """
        for owner_name, owner in self.module.named_modules():
            for tensors in (owner._parameters, owner._buffers):
                for name, t in tensors.items():
                    value = home.get(f"{owner_name}.{name}".lstrip("."))
                    if t is not None and not t.is_meta and value is not None:
                        self._near.append((tensors, name, value))
        others = [t for _, t in own_tensors(self.module) if not is_plain(t)]
        self._whole = self.module if whole and others and self.device != CPU else None
        self.nbytes = nbytes_of(self.module) if whole else sum(_distinct([value for *_, value in self._near]))

    @property
    def borrowed(self) -> bool:
        """Whether the model's own tensors are moved, so that they must be back after each use."""
        return self._whole is not None and any(is_wrapper(t) for _, t in own_tensors(self.module))

    def move_in(self) -> None:
        if self.is_in:
            return
        self._put(self.device)
        if self._whole is not None:
            self._whole.to(self.device)
        self.is_in = True

    def move_out(self) -> None:
        if not self.is_in:
            return
        self._put(CPU)
        if self._whole is not None:
            self._whole.to(CPU)
        self.is_in = False
        kept = KeptWeights.of(self.module)
        if kept is not None and self.device != CPU:
            kept.clear()  # it was made on the device, where there is to be room now
        empty_cache(self.device)

    def _put(self, device: torch.device) -> None:
        """Tied weights are moved once. Parameters are made anew, since `.data` takes no tensor of another device type
        on every device."""
        made: dict[int, Tensor] = {}
        with torch.inference_mode(False), torch.no_grad():
            for tensors, name, home in self._near:
                if id(home) not in made:
                    moved = home.to(device)
                    is_parameter = isinstance(tensors[name], nn.Parameter)
                    made[id(home)] = nn.Parameter(moved, requires_grad=False) if is_parameter else moved
                tensors[name] = made[id(home)]

    def finish(self) -> None:
        """Moves inputs and outputs, and asks for room before the component computes; the last step of placing."""
        from accelerate.utils.operations import send_to_device

        device = self.device

        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            RESIDENCY.enter(self)
            return send_to_device(args, device), send_to_device(kwargs, device)

        self.module.register_forward_pre_hook(before, with_kwargs=True)
        self.module.register_forward_hook(lambda module, args, output: send_to_device(output, CPU))

    def close(self) -> None:
        """Give memory and files back. Hooks tie modules into cycles, which would hold them until a collection."""
        self.closed = True
        self._near, self._whole = [], None
        for module in self.module.modules():
            vars(module).pop("_hf_hook", None)
            vars(module).pop("_diffusers_hook", None)
            vars(module).pop("forward", None)
            vars(module).pop("_old_forward", None)
            module._parameters.clear()
            module._buffers.clear()
        if self.is_in:
            self.is_in = False
            empty_cache(self.device)
        if self.disk is not None:
            self.disk.close()
        self.files.close()


def _distinct(tensors: list[Tensor]) -> list[int]:
    found = {(t.untyped_storage()._cdata, t.storage_offset(), t.shape): t.numel() * t.element_size() for t in tensors}
    return list(found.values())
