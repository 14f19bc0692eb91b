"""GGUF files through the host's own model detection, layers and patcher.

Linear layers of the host's model hold blocks. Everything else that a file has in blocks (convolutions of SD 1 and SDXL,
embeddings, norms, biases, bare parameters) is dequantized when it is loaded, and the report says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...quantizers.compat.modes import Carrier
from ...quantizers.errors import FileError, SpecError
from ...quantizers.files.gguf_model import GgufModel, Value, dequantized, in_rows, open_gguf_model
from ...quantizers.kernels.kept import KeptWeights, keep_dequantized
from ...quantizers.plan import sensitive_reason
from ...quantizers.report import MIB, Entry, QuantReport
from ...quantizers.weight import QuantizedWeight
from .detection import Plan, check_loaded, first_of, in_shape, plan_model
from .layouts import to_quantized_tensor
from .linear import attach_exact_patches, operations

log = logging.getLogger(__name__)


def load_gguf(path: Path, carrier: Carrier, cache_mib: int = 0) -> tuple[Any, QuantReport]:
    """Open a diffusion model; block-quantized linear weights stay in their blocks.

    Args:
        cache_mib: MiB of dequantized weights that may be kept between products; 0 keeps none.
    Raises:
        FileError: damaged, something else than a diffusion model, or one that the host does not detect.
        SpecError: the library carrier, which the host could not offload.
    """
    if carrier is Carrier.LIBRARY:
        raise SpecError("Library layers for GGUF exist in diffusers only, not in ComfyUI.\nUse carrier quantwire.")
    start = time.perf_counter()
    patcher, report = _load(path, cache_mib)
    report.seconds = time.perf_counter() - start
    return patcher, report


def _drop_kept(patcher: Any, *_: Any) -> None:
    kept = KeptWeights.of(patcher.model)
    if kept is not None:
        kept.clear()


def load_patcher(path: str, cache_mib: int, disable_dynamic: bool = False) -> Any:
    """For `cached_patcher_init`."""
    return _load(Path(path), cache_mib, disable_dynamic)[0]


def _load(path: Path, cache_mib: int, disable_dynamic: bool = False) -> tuple[Any, QuantReport]:
    import comfy.sd
    from comfy.patcher_extension import CallbacksMP

    source = open_gguf_model(path)
    values = source.values if source.found else _without_prefix(source.values)
    plan = _plan(source, values)
    state: dict[str, Tensor] = {}
    entries: list[Entry] = []
    for name, value in values.items():
        state[name], entry = _taken(path, name, value, plan, source.plain.get(name, ""))
        entries.append(entry)
    options = {"dtype": plan.dtype, "custom_operations": operations(plan.compute)}
    patcher = comfy.sd.load_diffusion_model_state_dict(
        state, model_options=options, metadata=dict(source.metadata), disable_dynamic=disable_dynamic
    )
    patcher.cached_patcher_init = (load_patcher, (str(path), cache_mib))
    patcher.add_callback_with_key(CallbacksMP.ON_LOAD, "quantwire", attach_exact_patches)
    check_loaded(patcher.model, path)
    report = _report(source, plan, entries)
    if cache_mib:
        report.notes.append(keep_dequantized(patcher.model, cache_mib, Carrier.QUANTWIRE))
        # The host does not count them, so they go when it takes the model off the device.
        patcher.add_callback_with_key(CallbacksMP.ON_DETACH, "quantwire_kept", _drop_kept)
    return patcher, report


def _without_prefix(values: Mapping[str, Value]) -> dict[str, Value]:
    import comfy.model_detection

    prefix = comfy.model_detection.unet_prefix_from_state_dict(values)
    return {n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)} or dict(values)


def _plan(source: GgufModel, values: Mapping[str, Value]) -> Plan:
    """Ask the host what the model is.

    Raises:
        FileError: the host does not know the model.
    """
    probe = {name: _probe(value) for name, value in values.items()}
    plan = plan_model(probe, source.metadata, _plain_dtype(values))
    if plan is None:
        raise source.problem or _undetected(source, values)
    return plan


def _probe(value: Value) -> Tensor:
    """What the host's detection looks at: shapes, and the values of plain and of small tensors."""
    if isinstance(value, Tensor):
        return value
    if len(value.orig_shape) < 2:
        return dequantized(value, torch.float32)
    return torch.empty(value.orig_shape, dtype=value.orig_dtype, device="meta")


def _plain_dtype(values: Mapping[str, Value]) -> torch.dtype | None:
    """The dtype of a file without blocks. With blocks the host chooses: norms and biases alone tell nothing."""
    import comfy.utils

    if any(isinstance(v, QuantizedWeight) for v in values.values()):
        return None
    return comfy.utils.weight_dtype(values)


def _undetected(source: GgufModel, values: Mapping[str, Value]) -> FileError:
    what = f"{source.found.architecture}, {source.found.layout} layout" if source.found else "unknown architecture"
    return FileError(
        f"{source.path.name}: this ComfyUI does not detect a diffusion model in it ({what}; tensors such as "
        f"{', '.join(list(values)[:3])}).\nUpdate ComfyUI, if the model is newer than it."
    )


def _taken(path: Path, name: str, value: Value, plan: Plan, reason: str) -> tuple[Tensor, Entry]:
    """A tensor as the host gets it, and its line in the report.

    Args:
        reason: why it came out of its blocks already; empty where it did not.
    """
    place = plan.places.get(name, "")
    shape = plan.shapes.get(place)
    if isinstance(value, QuantizedWeight):
        why = _why_plain(value, place in plan.linear, shape)
        if not why:
            held = QuantizedWeight(value.format_id, value.tensors, value.orig_shape, plan.compute, value.meta)
            entry = Entry(name, "quantize", "from the file", value.numel * 2, value.nbytes, format_id=value.format_id)
            return to_quantized_tensor(held), entry
        reason = f"{value.format_id.removeprefix('gguf-').upper().replace('-', '_')} in the file: {why}"
        tensor = dequantized(value, plan.dtype)
    else:
        tensor = value.float() if value.dtype == torch.float64 else value
    tensor = in_shape(path, name, tensor, shape)
    if reason:
        return tensor, Entry(name, "dequantize", reason, tensor.numel() * 2, tensor.nbytes)
    kept = sensitive_reason(name.removesuffix(".weight")) or "plain in the file"
    return tensor, Entry(name, "keep", kept, tensor.nbytes, tensor.nbytes)


def _why_plain(value: QuantizedWeight, linear: bool, shape: tuple[int, ...] | None) -> str:
    if not linear:
        return "not a linear weight"
    if not in_rows(value):
        return "its blocks run across its rows"
    return "" if value.orig_shape == shape else "stored in another shape"


def _report(source: GgufModel, plan: Plan, entries: list[Entry]) -> QuantReport:
    formats = sorted({e.format_id for e in entries if e.format_id})
    report = QuantReport(source.path.name, ", ".join(formats) or "plain tensors only", entries=entries)
    declared = source.metadata.get("general.architecture") or "none"
    if source.found:
        report.notes.append(f"architecture {source.found.architecture} (the file says: {declared})")
    else:
        report.warnings.append(f"architecture not known here, detected by ComfyUI (the file says: {declared})")
    report.notes += source.notes
    plain = [e for e in entries if e.action == "dequantize"]
    if plain:
        more = sum(e.nbytes_out for e in plain) / MIB
        names = first_of([e.name for e in plain])
        report.notes.append(f"{len(plain)} tensors were dequantized at load, {more:.1f} MiB: {names}")
    report.warnings += plan.warnings()
    for warning in report.warnings:
        log.warning("%s: %s", source.path.name, warning)
    return report
