"""GGUF files through the host's own model detection, layers and patcher."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...quantizers.compat.modes import Carrier
from ...quantizers.errors import FileError, SpecError
from ...quantizers.files.checkpoint import read_gguf
from ...quantizers.plan import sensitive_reason
from ...quantizers.report import Entry, QuantReport
from ...quantizers.weight import QuantizedWeight
from .layouts import to_quantized_tensor
from .linear import attach_exact_patches, operations

log = logging.getLogger(__name__)


def load_gguf(path: Path, carrier: Carrier) -> tuple[Any, QuantReport]:
    """Open a diffusion model; block-quantized tensors stay in their blocks.

    Raises:
        FileError: damaged, or a model that the host does not detect.
        SpecError: the library carrier, which the host could not offload.
    """
    if carrier is Carrier.LIBRARY:
        raise SpecError("Library layers for GGUF exist in diffusers only, not in ComfyUI.\nUse carrier quantwire.")
    start = time.perf_counter()
    patcher, entries = _load(path)
    types = sorted({e.reason for e in entries if e.action == "quantize"})
    report = QuantReport(path.name, ", ".join(types) or "plain tensors only", entries=entries)
    report.seconds = time.perf_counter() - start
    return patcher, report


def load_patcher(path: str, disable_dynamic: bool = False) -> Any:
    """For `cached_patcher_init`."""
    return _load(Path(path), disable_dynamic)[0]


def _load(path: Path, disable_dynamic: bool = False) -> tuple[Any, list[Entry]]:
    import comfy.model_management as mm
    import comfy.sd
    from comfy.patcher_extension import CallbacksMP

    checkpoint = read_gguf(path)
    compute = mm.unet_manual_cast(None, mm.get_torch_device(), [torch.bfloat16, torch.float16, torch.float32])
    compute = compute or torch.bfloat16
    state: dict[str, Tensor] = {}
    entries: list[Entry] = []
    for name, value in checkpoint.tensors.items():
        entries.append(_entry(name, value))
        state[name] = to_quantized_tensor(_in_dtype(value, compute)) if isinstance(value, QuantizedWeight) else value
    options = {"custom_operations": operations(compute)}
    patcher = comfy.sd.load_diffusion_model_state_dict(
        state, model_options=options, metadata=dict(checkpoint.metadata), disable_dynamic=disable_dynamic
    )
    if patcher is None:
        arch = checkpoint.metadata.get("general.architecture") or "none named"
        raise FileError(
            f"{path.name}: ComfyUI does not detect a diffusion model in it (architecture {arch}, "
            f"tensors such as {', '.join(list(checkpoint.tensors)[:3])}).\n"
            "Text encoders in GGUF files are not diffusion models; this node cannot open them."
        )
    patcher.cached_patcher_init = (load_patcher, (str(path),))
    patcher.add_callback_with_key(CallbacksMP.ON_LOAD, "quantwire", attach_exact_patches)
    check_loaded(patcher.model, path)
    return patcher, entries


def _in_dtype(weight: QuantizedWeight, dtype: torch.dtype) -> QuantizedWeight:
    return QuantizedWeight(weight.format_id, weight.tensors, weight.orig_shape, dtype, weight.meta)


def _entry(name: str, value: Any) -> Entry:
    if isinstance(value, QuantizedWeight):
        return Entry(name, "quantize", value.format_id, value.numel * 2, value.nbytes)
    reason = sensitive_reason(name.removesuffix(".weight")) or "plain in the file"
    return Entry(name, "keep", reason, value.nbytes, value.nbytes)


def check_loaded(model: nn.Module, path: Path) -> None:
    """Every layer has got a weight.

    Raises:
        FileError: names the first that has not.
    """
    missing = next((n for n, m in model.named_modules() if "weight" in vars(m) and m.weight is None), None)
    if missing is not None:
        raise FileError(f"{path.name}: nothing for layer '{missing}'.")
