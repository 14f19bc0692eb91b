"""Convert to ComfyUI's native quantized files, which its own UNETLoader opens.

Per layer `X.weight`, its scales, and `X.comfy_quant`: the bytes of a JSON object with the format. Other tensors keep
their dtype. What a layer's tensors are called is comfy-kitchen's to say. Sizes are known when a layer is quantized, so
the file is written front to back, with room for the header, and an interrupted conversion begins anew.

Every tensor begins at a multiple of its element size, though the data may have no holes: what has an odd size comes at
the end, the largest elements first. A layer that is too large to wait in memory ends with blanks behind its JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import struct
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..apply import check_finite, quantize_tensor
from ..errors import FileError, SpecError
from ..plan import Action, Decision, QuantPlan, Slot, make_plan
from ..registry import get_entry, get_quantizer, is_format, require
from ..report import MIB, Entry, QuantReport
from ..spec import QuantSpec
from ..weight import QuantizedWeight
from .architectures import Found
from .convert import input_files
from .convert_plan import (
    GGUF,
    SAFETENSORS,
    Request,
    metadata_strings,
    native_formats,
    read_model,
    refuse_target,
    source_nbytes,
)
from .journal import Partial, partial
from .layouts.target import Target
from .quantized_file import NAMES
from .recipes import is_linear
from .sources import Assembled, Source, open_source

BACKEND = "comfy"
ROOM_A_TENSOR = 512  # bytes of header
ALIGN = 64
SMALL_NBYTES = 1 << 16  # what may wait in memory


@dataclass(frozen=True)
class NativeConversion:
    """A request for a native format, decided.

    Attributes:
        total: bytes of the tensors, as predicted.
        words: a text encoder's tokenizer, as tensors of bytes.
        notes, doubts: notes and warnings about the source.
    """

    request: Request
    source: Source
    found: Found
    targets: tuple[Target, ...]
    plan: QuantPlan
    total: int
    words: Mapping[str, bytes]
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


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
        native = ", ".join(native_formats())
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
    model = read_model(request, source)
    plan = make_plan([Slot(t.meta, is_linear(t)) for t in model.targets], spec, require(spec.format_id))
    for format_id in plan.format_ids:
        require(format_id)
        if get_entry(format_id).backend != BACKEND:
            raise SpecError(f"A file for ComfyUI's own loader cannot hold {format_id}.\nRules may name comfy formats.")
    total = plan.nbytes_out + model.words_nbytes
    return NativeConversion(
        request, source, model.found, model.targets, plan, total, model.words, model.notes, model.warnings
    )


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
    return "\n".join([*lines, *_notes(conversion), *(f"WARNING: {w}" for w in _warnings(conversion))])


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
    return {
        "architecture": conversion.found.architecture,
        "nbytes": conversion.total,
        "notes": _notes(conversion),
        "warnings": _warnings(conversion),
        "tensors": tensors,
    }


def _notes(conversion: NativeConversion) -> list[str]:
    return [*conversion.plan.notes, *conversion.notes]


def _warnings(conversion: NativeConversion) -> list[str]:
    warnings = list(conversion.doubts)
    warnings += [f"'{d.meta.name}' stays {NAMES[d.meta.dtype]}: {d.reason}" for d in conversion.plan.refused]
    blocks = sum(1 for t in conversion.targets for p in t.pieces if p.source in conversion.source.kinds)
    if blocks:
        warnings.append(
            f"{blocks} tensors are quantized a second time, which adds both errors (the SQNR is that of the second "
            "alone); convert the full-precision file where there is one"
        )
    return warnings


def identity(conversion: NativeConversion) -> dict[str, Any]:
    """What tells one from a conversion that was interrupted; none continues."""
    return {"type": conversion.plan.spec.to_uri()}


def run(conversion: NativeConversion, advance: Any) -> QuantReport:
    """Write the file.

    Args:
        advance: called with the bytes that came to be since the last call; may raise to give up.
    """
    request, plan = conversion.request, conversion.plan
    report = QuantReport(
        request.target.name, plan.spec.format_id, carrier="", uri=plan.spec.to_uri(), notes=_notes(conversion),
        warnings=_warnings(conversion), family=plan.family,
    )  # fmt: skip
    start = time.perf_counter()
    room = _room(4 * len(conversion.targets))
    head, inputs = identity(conversion), input_files(request, conversion.source)
    with (
        _threads(request.threads),
        partial(
            request.target, room + conversion.total, head, False, request.overwrite, inputs, request.restart
        ) as file,
    ):
        if file.note:
            report.notes.append(file.note)
        writer = _Writer(file, room)
        for tensors in _values(conversion, report):
            writer.add(tensors)
            advance(sum(t.nbytes for t in tensors.values()))
            del tensors
        for name, data in conversion.words.items():
            writer.add_last(name, data)
            advance(len(data))
        writer.finish(metadata_strings(conversion.source))
        conversion.source.check_unchanged()
    report.seconds = time.perf_counter() - start
    return report


@contextlib.contextmanager
def _threads(count: int) -> Generator[None]:
    """Let torch compute with so many threads; 0 leaves its setting."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _order(item: tuple[Target, Decision]) -> tuple[bool, int]:
    """What is kept and has a large odd size comes last, the largest elements first."""
    t, decision = item
    last = decision.action is not Action.QUANTIZE and t.meta.nbytes % ALIGN > 0 and t.meta.nbytes > SMALL_NBYTES
    return last, -t.dtype.itemsize if last else 0


def _values(conversion: NativeConversion, report: QuantReport) -> Iterator[dict[str, Tensor]]:
    items = zip(conversion.targets, conversion.plan.decisions, strict=True)
    for t, decision in sorted(items, key=_order):
        rows = Assembled(t, conversion.source.open)
        parts = rows.values(0, rows.rows)
        value = (parts[0] if len(parts) == 1 else torch.cat([p.to(t.dtype) for p in parts])).to(t.dtype)
        value = value.reshape(t.shape)
        nbytes_in = source_nbytes(conversion.source, t)
        if decision.action is not Action.QUANTIZE or decision.spec is None:
            check_finite(t.name, value)
            report.entries.append(Entry(t.name, "keep", decision.reason, nbytes_in, value.nbytes))
            yield {t.name: value}
        else:
            weight, entry = quantize_tensor(t.name, value, decision.spec)
            report.entries.append(dataclasses.replace(entry, reason=decision.reason, nbytes_in=nbytes_in))
            yield native_tensors(t.name, weight)
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


def _room(tensors: int) -> int:
    """Bytes to leave for the header."""
    return ALIGN * (1024 + tensors * ROOM_A_TENSOR // ALIGN)


def _by_itemsize(tensors: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    return sorted(tensors.items(), key=lambda item: -item[1].element_size())


class _Writer:
    """Data behind room for the header, which is written at the end."""

    def __init__(self, file: Partial, room: int) -> None:
        self._file = file
        self._room = room
        self._at = 0
        self._entries: dict[str, Any] = {}
        self._small: dict[str, Tensor] = {}

    def add(self, tensors: dict[str, Tensor]) -> None:
        """The tensors of a layer, or one that is kept."""
        for name, t in _by_itemsize(tensors):
            if name.endswith("comfy_quant") and self._at % ALIGN:
                blanks = -(self._at + t.nbytes) % ALIGN
                self._write(name, torch.nn.functional.pad(t, (0, blanks), value=ord(" ")))
            elif t.nbytes % ALIGN and t.nbytes <= SMALL_NBYTES:
                self._small[name] = t.detach().cpu().clone()
            else:
                if t.nbytes % ALIGN and len(tensors) == 1:  # one of the last, see `_order`
                    self._flush(t.element_size())
                self._write(name, t)

    def add_last(self, name: str, data: bytes) -> None:
        """A tensor of bytes, of any size: nothing follows that it could misalign."""
        self._small[name] = torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def _flush(self, itemsize: int) -> None:
        """Write what waits and has elements of this size or larger ones."""
        for name, t in _by_itemsize(self._small):
            if t.element_size() >= itemsize:
                self._write(name, self._small.pop(name))

    def _write(self, name: str, t: Tensor) -> None:
        raw = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._file.write(cast(Any, raw.numpy()), self._room + self._at)
        end = self._at + raw.numel()
        self._entries[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [self._at, end]}
        self._at = end

    def finish(self, metadata: dict[str, str]) -> None:
        self._flush(1)
        header = json.dumps({"__metadata__": metadata, **self._entries}, separators=(",", ":")).encode()
        if 8 + len(header) > self._room:
            raise FileError(f"The header has {len(header)} bytes, room was left for {self._room - 8}.")
        self._file.write(struct.pack("<Q", self._room - 8) + header.ljust(self._room - 8), 0)
        self._file.truncate(self._room + self._at)
