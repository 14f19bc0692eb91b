"""Convert to ComfyUI's native quantized files, which its own UNETLoader opens.

Per layer `X.weight`, its scales, and `X.comfy_quant`: the bytes of a JSON object with the format. Other tensors keep
their dtype. What a layer's tensors are called is comfy-kitchen's to say. Sizes are known when a layer is quantized, so
the file is written front to back, with room for the header, and an interrupted conversion begins anew.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from ..apply import check_finite, quantize_tensor
from ..errors import FileError, SpecError
from ..plan import Action, Decision, QuantPlan, Slot, make_plan
from ..registry import format_ids, get_entry, get_quantizer, is_format, require
from ..report import MIB, Entry, QuantReport
from ..spec import QuantSpec
from ..weight import QuantizedWeight
from .architectures import Found, comfyui_targets
from .checkpoint import replace_file
from .convert_plan import (
    GGUF,
    SAFETENSORS,
    Request,
    find_model,
    floats,
    metadata_strings,
    refuse_dtypes,
    refuse_target,
    source_nbytes,
)
from .layouts.target import Target
from .quantized_file import NAMES
from .recipes import is_linear
from .sources import Assembled, Source, open_source

BACKEND = "comfy"
ROOM_A_TENSOR = 512  # bytes of header


@dataclass(frozen=True)
class NativeConversion:
    """A request for a native format, decided.

    Attributes:
        total: bytes of the tensors, as predicted.
    """

    request: Request
    source: Source
    found: Found
    targets: tuple[Target, ...]
    plan: QuantPlan
    total: int


def native_spec(request: Request) -> QuantSpec | None:
    """The spec of a request for a native format; None for every other type.

    Raises:
        SpecError: a format of another backend, or a native format for a GGUF file.
    """
    head = request.type.partition(";")[0].strip()
    if not is_format(head) and head not in (BACKEND, "comfy-kitchen"):
        return None
    if is_format(head) and get_entry(head).backend == "gguf":
        return None
    spec = QuantSpec.from_uri(request.type)
    backend = get_entry(spec.format_id).backend
    if backend != BACKEND or request.target.suffix.lower() == GGUF:
        native = ", ".join(f for f in format_ids() if get_entry(f).backend == BACKEND)
        raise SpecError(
            f"A {request.target.suffix.lower() or 'target'} file cannot hold {spec.format_id} here.\n"
            f"A {GGUF} file takes GGUF types such as Q4_K_M, a {SAFETENSORS} file F32, F16, BF16 and {native}."
        )
    return dataclasses.replace(spec, rules=request.rules, exclude=request.exclude, include=request.include)


def plan_native(request: Request, spec: QuantSpec) -> NativeConversion:
    """Decide for every tensor; layers whose shape the format cannot hold stay as they are, with a warning.

    Raises:
        FileError, SpecError, BackendUnavailable: as `plan_conversion`.
    """
    if request.imatrix is not None:
        raise SpecError(f"{spec.format_id} takes no importance matrix.\nLeave it out, or convert to a GGUF type.")
    refuse_target(request)
    source = open_source(request.source)
    metas, _ = floats(source)
    found = find_model(request, metas)
    targets = comfyui_targets(found, metas)
    refuse_dtypes(source, targets)
    plan = make_plan([Slot(t.meta, is_linear(t)) for t in targets], spec, require(spec.format_id))
    for format_id in plan.format_ids:
        require(format_id)
        if get_entry(format_id).backend != BACKEND:
            raise SpecError(f"A file for ComfyUI's own loader cannot hold {format_id}.\nRules may name comfy formats.")
    return NativeConversion(request, source, found, tuple(targets), plan, plan.nbytes_out)


def dry_run(conversion: NativeConversion) -> str:
    """What becomes of each group of tensors, and about how large the file will be."""
    groups: dict[tuple[str, str], list[Decision]] = {}
    for d in conversion.plan.decisions:
        what = d.spec.format_id if d.action is Action.QUANTIZE and d.spec else NAMES[d.meta.dtype]
        groups.setdefault((what, d.reason), []).append(d)
    lines = [f"{conversion.request.target.name}: {conversion.plan.spec.format_id} of {conversion.source.label}"]
    lines.append(f"{'format':20} {'tensors':>7} {'MiB':>9}  why (first of them)")
    for (what, reason), group in sorted(groups.items(), key=lambda item: -sum(d.nbytes_out for d in item[1])):
        size = sum(d.nbytes_out for d in group) / MIB
        lines.append(f"{what:20} {len(group):7} {size:9.2f}  {reason} ({group[0].meta.name})")
    before = sum(source_nbytes(conversion.source, t) for t in conversion.targets)
    lines.append(f"total {before / MIB:.2f} -> {conversion.total / MIB:.2f} MiB and a header; nothing was written")
    return "\n".join([*lines, *conversion.plan.notes, *(f"WARNING: {w}" for w in _warnings(conversion))])


def dry_run_json(conversion: NativeConversion) -> dict[str, Any]:
    tensors = [
        {
            "name": d.meta.name,
            "type": d.spec.format_id if d.action is Action.QUANTIZE and d.spec else NAMES[d.meta.dtype],
            "reason": d.reason,
            "nbytes": d.nbytes_out,
        }
        for d in conversion.plan.decisions
    ]
    return {"architecture": conversion.found.architecture, "nbytes": conversion.total, "tensors": tensors}


def _warnings(conversion: NativeConversion) -> list[str]:
    warnings = [f"'{d.meta.name}' stays {NAMES[d.meta.dtype]}: {d.reason}" for d in conversion.plan.refused]
    blocks = sum(1 for t in conversion.targets for p in t.pieces if p.source in conversion.source.kinds)
    if blocks:
        warnings.append(
            f"{blocks} tensors are quantized a second time, which adds both errors; convert the full-precision file "
            "where there is one"
        )
    return warnings


def run(conversion: NativeConversion, advance: Any) -> QuantReport:
    """Write the file.

    Args:
        advance: called with the bytes that came to be since the last call; may raise to give up.
    """
    request, plan = conversion.request, conversion.plan
    report = QuantReport(
        request.target.name, plan.spec.format_id, carrier="", uri=plan.spec.to_uri(), notes=list(plan.notes),
        warnings=_warnings(conversion), family=plan.family,
    )  # fmt: skip
    start = time.perf_counter()

    def write(temporary: Path) -> None:
        with open(temporary, "r+b") as file:
            writer = _Writer(file, 4 * len(conversion.targets))
            for name, tensors in _values(conversion, report):
                for key, tensor in tensors.items():
                    writer.add(key, tensor)
                advance(sum(t.nbytes for t in tensors.values()))
                del tensors, name
            writer.finish(metadata_strings(conversion.source))
        conversion.source.check_unchanged()

    replace_file(request.target, write)
    report.seconds = time.perf_counter() - start
    return report


def _values(conversion: NativeConversion, report: QuantReport) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for t, decision in zip(conversion.targets, conversion.plan.decisions, strict=True):
        rows = Assembled(t, conversion.source.open)
        parts = rows.values(0, rows.rows)
        value = (parts[0] if len(parts) == 1 else torch.cat([p.to(t.dtype) for p in parts])).to(t.dtype)
        value = value.reshape(t.shape)
        nbytes_in = source_nbytes(conversion.source, t)
        if decision.action is not Action.QUANTIZE or decision.spec is None:
            check_finite(t.name, value)
            report.entries.append(Entry(t.name, "keep", decision.reason, nbytes_in, value.nbytes))
            yield t.name, {t.name: value}
        else:
            weight, entry = quantize_tensor(t.name, value, decision.spec)
            report.entries.append(dataclasses.replace(entry, reason=decision.reason, nbytes_in=nbytes_in))
            yield t.name, native_tensors(t.name, weight)
            del weight
        del parts, value, rows


def native_tensors(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of a comfy weight `X.weight` as ComfyUI's files have them, `X.comfy_quant` included.

    Source: Comfy-Org/ComfyUI comfy/ops.py `_quantized_weight_state_dict` at 0.33.0.
    """
    quantizer: Any = get_quantizer(weight.format_id)
    layer: Any = quantizer.to_native(weight, None)
    conf: dict[str, Any] = {"format": quantizer.native.algo}
    wanted = {"int8_tensorwise": ("convrot", "convrot_groupsize"), "convrot_w4a4": ("convrot_groupsize",)}
    wanted["asym_w4a8_int8"] = ("group_size", "convrot_groupsize")
    if quantizer.native.rotated:
        conf |= {key: weight.meta[key] for key in wanted[quantizer.native.algo] if key in weight.meta}
    tensors: dict[str, Tensor] = dict(layer.weight.data.state_dict(name))
    raw = json.dumps(conf).encode()
    tensors[name.removesuffix("weight") + "comfy_quant"] = torch.tensor(list(raw), dtype=torch.uint8)
    return tensors


class _Writer:
    """Data behind room for the header, which is written at the end."""

    def __init__(self, file: BinaryIO, tensors: int) -> None:
        self._file = file
        self._room = 64 * (1024 + tensors * ROOM_A_TENSOR // 64)
        self._at = 0
        self._entries: dict[str, Any] = {}
        self._small: dict[str, Tensor] = {}
        file.seek(self._room)

    def add(self, name: str, t: Tensor) -> None:
        # There may be no holes in the data, so a small tensor of odd size would misalign all that follow.
        if t.nbytes % 64:
            if t.nbytes > 1 << 16:
                raise FileError(f"'{name}': {t.nbytes} bytes of {t.dtype} would misalign what follows.")
            self._small[name] = t.detach().cpu().clone()
            return
        self._write(name, t)

    def _write(self, name: str, t: Tensor) -> None:
        raw = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._file.write(cast(Any, raw.numpy()))
        end = self._at + raw.numel()
        self._entries[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [self._at, end]}
        self._at = end

    def finish(self, metadata: dict[str, str]) -> None:
        for name, t in sorted(self._small.items(), key=lambda item: -item[1].element_size()):
            self._write(name, t)
        header = json.dumps({"__metadata__": metadata, **self._entries}, separators=(",", ":")).encode()
        if 8 + len(header) > self._room:
            raise FileError(f"The header has {len(header)} bytes, room was left for {self._room - 8}.")
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room - 8) + header.ljust(self._room - 8))
