"""OffloadCompat's guard on MODEL, CLIP and VAE of the embedded host: the check once more, right before they run."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ...quantizers.compat.installed import installed
from ...quantizers.compat.modes import OffloadMode
from ...quantizers.compat.remedies import Space
from ...quantizers.errors import SpecError
from ..objects import components_of
from . import offload
from .offload.carry import share
from .offload.device import execution_device, nbytes_of

if TYPE_CHECKING:
    from ...quantizers.compat.guard import Guard


def guarded(model: Any, guard: Guard) -> Any:
    """The same model object under a guard; one that it had is replaced, so that guards do not pile up.

    Raises:
        SpecError: no MODEL, CLIP or VAE of this host.
    """
    if not hasattr(model, "guard"):
        raise SpecError(f"the embedded host does not run a {type(model).__name__} itself.")
    return dataclasses.replace(model, guard=guard)


def check_before(model: Any) -> None:
    """For whatever runs a MODEL, CLIP or VAE, before it does.

    Raises:
        OffloadConflict: the guard on it found that it cannot run as it is now.
    """
    if model.guard is None:
        return
    now = components_now(model)
    for name, module in components_of(model).items():
        model.guard({name: module}, *now[name])


def offload_now(model: Any) -> tuple[OffloadMode, str | None]:
    """What OffloadCompat set, or else what accelerate or diffusers was told to do with its modules, or none."""
    if getattr(model, "offload", None) is not None:
        return offload.offload_now(model)
    modules = offload.modules_of(model) if hasattr(model, "guard") else components_of(model)
    return installed(modules.values()) or (OffloadMode.NONE, "")


def components_now(model: Any) -> dict[str, tuple[OffloadMode, str | None]]:
    """`offload_now` of each component by itself: one that is offloaded says nothing about those beside it."""
    is_set = getattr(model, "offload", None) is not None
    told = {id(module): state for module, state in offload.modules_now(model)} if is_set else {}
    return {
        name: told.get(id(module)) or installed([module]) or (OffloadMode.NONE, "")
        for name, module in components_of(model).items()
    }


def offload_space(model: Any) -> Space | None:
    """What balanced decides by: the share of one component. Of several each has that share, so nothing is told."""
    settings = getattr(model, "offload", None)
    modules = [] if settings is None else list(offload.modules_of(model).values())
    if len(modules) != 1 or settings.mode is not OffloadMode.BALANCED:
        return None
    return Space(nbytes_of(modules[0]), share(settings, execution_device()))
