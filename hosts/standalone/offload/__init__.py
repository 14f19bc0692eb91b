"""Offload modes carried out in the embedded host.

`set_offload` only notes the mode on a copy of the model object, so that LoRA and quantizing nodes after it see the
weights as ever. They are placed right before the model runs (`running`), on a copy of its module tree that is kept as
long as a model object asks for it, so that the next run finds it in place.

One model runs with offloading at a time; other threads wait. Components share devices, and an offloader's hooks keep
the state of one call.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ....quantizers.compat.find import find_carriers
from ....quantizers.compat.modes import HostName, OffloadMode
from ....quantizers.compat.translate import translated
from ....quantizers.errors import SpecError
from ...offload import OffloadSettings
from ..progress import Interrupted, check_interrupted
from .carry import place, variant_of
from .device import check_device, execution_device
from .placed import Placed
from .residency import RESIDENCY

_copies: weakref.WeakKeyDictionary[nn.Module, dict[tuple[OffloadSettings, torch.device], Placed]] = (
    weakref.WeakKeyDictionary()
)
_placing = threading.Lock()  # around the copies
_one_run = threading.RLock()
_left = threading.Event()  # a model object that asked for a copy is gone


def set_offload(model: Any, settings: OffloadSettings) -> Any:
    """A copy of a model object (MODEL, CLIP, VAE) that runs under a mode.

    Raises:
        SpecError: no model object of the embedded host, or a setting that this machine cannot carry out.
    """
    if not hasattr(model, "offload"):
        raise SpecError(
            f"An offload mode can be set on a MODEL, CLIP or VAE of the embedded host, got {type(model).__name__}."
        )
    check_device(settings, execution_device())
    # Copies live as long as this object does: as some model object carries it.
    return dataclasses.replace(model, offload=dataclasses.replace(settings))


def offload_now(model: Any) -> tuple[OffloadMode, str | None]:
    """The mode that a model object runs under, and its variant in the compatibility matrix.

    Of several components, balanced may split some: the answer is then that of the split ones.
    """
    settings: OffloadSettings | None = getattr(model, "offload", None)
    if settings is None:
        return OffloadMode.NONE, ""
    variants = [variant for _, (_, variant) in modules_now(model)]
    return settings.mode, max(variants, key=lambda v: v.startswith("split"), default=settings.variant)


def modules_now(model: Any) -> list[tuple[nn.Module, tuple[OffloadMode, str]]]:
    """Each component of a model object that has a mode set, with the mode and variant that it runs under."""
    settings, device, placed = model.offload, execution_device(), placed_now(model)
    return [
        (module, (settings.mode, placed[name].variant if name in placed else variant_of(module, settings, device)))
        for name, module in modules_of(model).items()
    ]


def placed_now(model: Any) -> dict[str, Placed]:
    """The copies of a model object's components that are in place, by component."""
    settings, device = getattr(model, "offload", None), execution_device()
    found = {name: _copies.get(module, {}).get((settings, device)) for name, module in modules_of(model).items()}
    return {name: placed for name, placed in found.items() if placed is not None}


@contextmanager
def running(model: Any) -> Iterator[Any]:
    """The model object to run with: placed if a mode was set, else itself.

    Weights move inside the block, which tensors of inference mode would forbid: it is left there, without gradients.
    """
    settings: OffloadSettings | None = model.offload
    if settings is None:
        yield model
        return
    with _alone(), _running(model, settings) as placed:
        yield placed


@contextmanager
def _alone() -> Iterator[None]:
    while not _one_run.acquire(timeout=0.2):
        check_interrupted()
    try:
        yield
    finally:
        _one_run.release()


@contextmanager
def _running(model: Any, settings: OffloadSettings) -> Iterator[Any]:
    modules = modules_of(model)
    with _explaining(modules, settings):
        placed = {name: _placed(name, module, settings) for name, module in modules.items()}
    try:
        with _explaining(modules, settings), torch.inference_mode(False), torch.no_grad():
            yield _with_modules(model, {name: p.module for name, p in placed.items()})
    except Interrupted:  # between two calls of the model, so nothing is half moved
        raise
    except BaseException:
        for module in modules.values():
            _discard(module, settings)
        raise
    finally:
        for p in placed.values():
            if p.borrowed and not p.closed:
                RESIDENCY.leave(p)


def _explaining(modules: Mapping[str, nn.Module], settings: OffloadSettings) -> translated:
    """Raw errors of libraries are explained while the copies that raised them are still in place."""
    return translated(
        host=HostName.STANDALONE,
        mode=settings.mode,
        variant=settings.variant,
        found=lambda: [found for module in modules.values() for found in find_carriers(module)],
    )


def modules_of(model: Any) -> dict[str, nn.Module]:
    """The components of a model object that are placed one by one."""
    if hasattr(model, "transformer"):
        return {"transformer": model.transformer}
    if hasattr(model, "decoder"):
        return {"vae": model.decoder}
    return {name: encoder.module for name, encoder in model.encoders.items()}


def _with_modules(model: Any, modules: Mapping[str, nn.Module]) -> Any:
    if hasattr(model, "transformer"):
        return dataclasses.replace(model, transformer=modules["transformer"], offload=None, guard=None)
    if hasattr(model, "decoder"):
        return dataclasses.replace(model, decoder=modules["vae"], offload=None, guard=None)
    encoders = {n: dataclasses.replace(encoder, module=modules[n]) for n, encoder in model.encoders.items()}
    return dataclasses.replace(model, encoders=encoders, offload=None, guard=None)


def _placed(name: str, module: nn.Module, settings: OffloadSettings) -> Placed:
    device = execution_device()
    try:
        with _placing:
            copies = _copies.setdefault(module, {})
            placed = copies.get((settings, device))
            if placed is None:
                own = dataclasses.replace(settings)  # the copy must not hold the object that it goes with
                placed = copies[own, device] = place(name, module, own, device)
                placed.release = weakref.finalize(module, placed.close)  # also at exit: its files go
            if not any(user() is settings for user in placed.users):
                placed.users.append(weakref.ref(settings, _leave))
            return placed
    finally:
        _release_unused()


def _leave(user: weakref.ref[OffloadSettings]) -> None:
    _left.set()
    _release_unused()


def _release_unused() -> None:
    """Release copies that no model object asks for. Objects may die anywhere, so this waits for no lock: whoever has it
    does the same afterwards."""
    while _left.is_set() and _placing.acquire(blocking=False):
        try:
            _left.clear()
            for copies in list(_copies.values()):
                for key, placed in list(copies.items()):
                    placed.users = [user for user in placed.users if user() is not None]
                    if not placed.users:
                        del copies[key]
                        placed.release()
        finally:
            _placing.release()


def _discard(module: nn.Module, settings: OffloadSettings) -> None:
    with _placing:
        gone = _copies.get(module, {}).pop((settings, execution_device()), None)
    if gone is not None:
        gone.release()
    _release_unused()
