"""Put a component under an offload mode with the libraries that the modes are named after."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ....quantizers.compat.modes import OffloadMode
from ....quantizers.errors import SpecError
from ...offload import OffloadSettings
from .copies import is_plain, is_wrapper, own_copy, own_tensors
from .device import CPU, check_device, device_nbytes, nbytes_of
from .disk import DiskWeights, full_disk_named, private_folder
from .placed import Placed
from .residency import RESIDENCY

log = logging.getLogger(__name__)
# In accelerate's search for a map: it takes numbers only for devices that are there, and these two on every machine.
ON_DEVICE, AWAY = "cpu", "disk"


def place(name: str, module: nn.Module, settings: OffloadSettings, device: torch.device) -> Placed:
    """A copy of a module that runs under a mode; the module itself stays as it is.

    Args:
        name: of the component.
        module: on the CPU.
    Raises:
        SpecError: a setting that the device cannot carry out.
        FileError: the disk has no room.
        WeightError: a module with hooks of another kind.
    """
    check_device(settings, device)
    clones = settings.mode is OffloadMode.GROUP and settings.keep_on == "disk"
    with torch.inference_mode(False), torch.no_grad():
        # diffusers empties a tensor once it is in a group's file, so groups must not share any.
        placed = Placed(name, own_copy(module, tied=not clones), settings, device)
        try:
            _carry_out(placed)
            placed.finish()
        except BaseException:
            placed.close()
            raise
    return placed


def variant_of(module: nn.Module, settings: OffloadSettings, device: torch.device) -> str:
    """The variant that a module would run under."""
    if settings.variant is not None:
        return settings.variant
    if nbytes_of(module) <= share(settings, device):
        return "whole"
    return "split-disk" if settings.keep_on == "disk" else "split"


def share(settings: OffloadSettings, device: torch.device) -> int:
    """Bytes that balanced lets one component take on a device; a larger one is split."""
    return settings.high_nbytes(device_nbytes(settings, device, RESIDENCY.held(device)))


def _carry_out(placed: Placed) -> None:
    settings = placed.settings
    if settings.mode not in (OffloadMode.NONE, OffloadMode.MODEL):
        _keep_nothing_dequantized(placed)
    placed.variant = variant_of(placed.module, settings, placed.device)
    if settings.mode is OffloadMode.SEQUENTIAL:
        _sequential(placed)
    elif settings.mode is OffloadMode.GROUP:
        _group(placed)
    elif placed.variant.startswith("split"):
        _split(placed)
    else:
        placed.keep_near(_home(placed.module), whole=True)


def _keep_nothing_dequantized(placed: Placed) -> None:
    layers: list[Any] = [m for m in placed.module.modules() if getattr(m, "kept", None) is not None]
    for layer in layers:
        layer.kept = None
    if layers:
        log.warning(
            "%s: cache_mib is not used with offload mode %s: dequantized weights of %d layers would take the memory "
            "that offloading frees; the results are those without cache_mib",
            placed.name,
            placed.settings.mode.value,
            len(layers),
        )


def _sequential(placed: Placed) -> None:
    from accelerate import cpu_offload

    weights: Mapping[str, Tensor] = placed.module.state_dict(keep_vars=True)
    if placed.settings.keep_on == "disk":
        weights = _on_disk(placed, weights)
    else:
        weights = {name: t.detach() for name, t in weights.items()}
    # accelerate declares a dict and reads a mapping: files are mapped, not read.
    cpu_offload(placed.module, execution_device=placed.device, state_dict=weights)  # type: ignore[arg-type]


def _on_disk(placed: Placed, weights: Mapping[str, Tensor]) -> DiskWeights:
    _refuse_wrappers(placed)
    nbytes = sum({id(t): t.numel() * t.element_size() for t in weights.values()}.values())
    placed.folder = placed.files.enter_context(private_folder(nbytes))
    with full_disk_named(placed.folder):
        placed.disk = DiskWeights(placed.folder, weights)
    return placed.disk


def _split(placed: Placed) -> None:
    from accelerate import dispatch_model, infer_auto_device_map

    module, device = placed.module, placed.device
    home = _home(module)
    placed.nbytes = share(placed.settings, device)
    found = infer_auto_device_map(module, {ON_DEVICE: placed.nbytes}, _not_to_split(module))
    places = {name: device if where == ON_DEVICE else "cpu" for name, where in found.items()}
    away = tuple(f"{name}." if name else "" for name, where in found.items() if where == AWAY)
    weights: Mapping[str, Tensor] = {
        n: t for n, t in module.state_dict(keep_vars=True).items() if f"{n}.".startswith(away)
    }
    weights = _on_disk(placed, weights) if placed.settings.keep_on == "disk" else weights
    RESIDENCY.make_room(placed)  # accelerate brings in what stays
    with _quiet("accelerate.big_modeling"):
        # As above: declared a dict, read as a mapping.
        dispatch_model(module, places, main_device=device, state_dict=weights, force_hooks=True)  # type: ignore[arg-type]
    placed.keep_near(home, whole=False)
    placed.is_in = True
    RESIDENCY.note(placed)  # until it computes, it may have to leave for another one


def _home(module: nn.Module) -> dict[str, Tensor]:
    """Plain tensors by name, tied ones as one tensor."""
    made: dict[int, Tensor] = {}
    return {name: made.setdefault(id(t), t.data) for name, t in own_tensors(module) if is_plain(t)}


def _not_to_split(module: nn.Module) -> list[str]:
    """Classes that stay on one device: those that the model names, and whatever has weights beside its children, which
    a device map can name only together."""
    inner = [m for m in module.modules() if m is not module and m._modules]
    mixed = {type(m).__name__ for m in inner if next(own_tensors(m, recurse=False), None)}
    return sorted({*(getattr(module, "_no_split_modules", None) or ()), *mixed})


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Leave out a library's warning of what was asked for."""
    found = logging.getLogger(logger)
    found.addFilter(_nothing)
    try:
        yield
    finally:
        found.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


def _group(placed: Placed) -> None:
    from diffusers.hooks import apply_group_offloading

    settings, module = placed.settings, placed.module
    if settings.keep_on == "disk":
        _refuse_wrappers(placed)
        placed.folder = placed.files.enter_context(private_folder(nbytes_of(module)))
    options: dict[str, Any] = {
        "offload_type": f"{settings.group_level}_level",
        "num_blocks_per_group": settings.blocks_per_group if settings.group_level == "block" else None,
        "use_stream": settings.use_stream,
        "offload_to_disk_path": None if placed.folder is None else str(placed.folder),
        "block_modules": _around_blocks(module),
    }
    if placed.folder is None:
        apply_group_offloading(module, placed.device, CPU, **options)
        return
    with full_disk_named(placed.folder):
        apply_group_offloading(module, placed.device, CPU, **options)


def _refuse_wrappers(placed: Placed) -> None:
    """No file holds tensors that wrap others."""
    for name, t in own_tensors(placed.module):
        if is_wrapper(t):
            raise SpecError(
                f"{placed.name}: '{name}' is a {type(t).__name__}, which cannot be kept on disk.\n"
                "Choose keep_on memory, or carrier quantwire, whose tensors every mode can keep on disk."
            )


def _around_blocks(module: nn.Module) -> list[str] | None:
    """Names of submodules that have the blocks inside: diffusers looks for lists of blocks among the children only, and
    would move a text encoder, whose blocks lie deeper, as one group."""
    declared: list[str] | None = getattr(module, "_group_offload_block_modules", None)
    if declared is not None:
        return declared
    found: list[str] = []
    level = [module]
    while level and not any(isinstance(c, (nn.ModuleList, nn.Sequential)) for m in level for c in m.children()):
        inner = [
            (name, child)
            for m in level
            for name, child in m.named_children()
            if any(isinstance(c, (nn.ModuleList, nn.Sequential)) for c in child.modules())
        ]
        found += [name for name, _ in inner]
        level = [child for _, child in inner]
    return found or None
