"""Convert to quantized safetensors files: formats of any backend, in the layout of a writer.

Everything is decided from the headers: which layer gets which format, how many files there will be and which layer goes
into which. A layer that is in the wanted format already is copied bit for bit. How the files are written, and how an
interrupted conversion goes on, is told in `writing.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
import zlib
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..apply import check_finite, quantize_tensor
from ..errors import SpecError
from ..formats import BACKENDS
from ..ggml_types import TYPES, format_id
from ..plan import Action, Decision, QuantPlan, Slot, make_plan
from ..provenance import SPEC_KEY
from ..registry import get_entry, is_format, require
from ..report import MIB, Entry, QuantReport, versions
from ..spec import QuantSpec
from ..weight import QuantizedWeight
from .architectures import Found
from .conversion_note import PROVENANCE, conversion_note
from .convert import SAMPLED, input_files
from .convert_plan import GGUF, SAFETENSORS, Request, metadata_strings, read_model, refuse_target, source_nbytes
from .diffusers_folder import Folder, folder_of, without_clashes
from .input_scales import input_scales
from .journal import partial, refuse_existing, remains
from .layer_rows import FULL_PRECISION, INPUT_SCALE, PRE_QUANT_SCALE
from .layouts.target import Target
from .quantized_file import NAMES
from .quantized_source import QuantizedSource
from .recipes import is_linear
from .row_slabs import quantize_slabs
from .schemes.base import Layer
from .shards import index_of, index_text, shard_files, shards
from .sources import Assembled, Source, open_source
from .stream import TRIM_NBYTES, trim
from .verifying import sample, verify_bytes, verify_layers
from .writers import WRITERS, writer_for
from .writers.base import Writer
from .writers.comfy import ComfyWriter
from .writers.layout import Layout, metadata_of
from .writers.scaled_fp8 import ScaledFp8Writer
from .writing import Advance, Item, Made, Stream, crc_of, header_room

SLAB_NUMEL = 1 << 22
VERIFY_SHARE = 4  # reading is so many times as fast as the rest, for the progress bar


@dataclass(frozen=True)
class QuantizedConversion:
    """A request for quantized safetensors files, decided.

    Attributes:
        writer: the layout.
        items: what becomes of `targets`, in their order, and in which file it goes.
        files: their names and predicted sizes.
        room: bytes before the data of each file.
        total: bytes of the tensors, as predicted.
        words: a text encoder's tokenizer, as tensors of bytes.
        copies: names of layers that are in the wanted format.
        notes, doubts: notes and warnings about the source.
        folder: what stands beside the weights, where they are a component's folder.
        scales: name of a layer -> its `input_scale`, from a calibration.
    """

    request: Request
    source: Source
    found: Found
    targets: tuple[Target, ...]
    plan: QuantPlan
    writer: Writer
    items: tuple[Item, ...]
    files: tuple[tuple[Path, int], ...]
    room: int
    total: int
    words: Mapping[str, bytes]
    copies: frozenset[str]
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    folder: Folder | None = None
    scales: Mapping[str, float] = field(default_factory=lambda: dict[str, float]())

    @property
    def beside(self) -> list[str]:
        """Names of the small files that come to be with the weights, in the same folder."""
        names = [self.index.name] if self.index is not None else []
        return [*names, *(self.folder.names if self.folder is not None else ())]

    @property
    def parts(self) -> tuple[tuple[Path, int], ...]:
        """The files where there are several; the target is then only what they go by."""
        return self.files if len(self.files) > 1 else ()

    @property
    def index(self) -> Path | None:
        return index_of(self.request.target) if self.parts else None

    @property
    def work(self) -> int:
        """What a progress bar counts to."""
        return self.total + (self.total // VERIFY_SHARE if self.request.verify else 0)


def quantized_spec(request: Request) -> QuantSpec | None:
    """The spec of a request for a quantized safetensors file; None for GGUF and plain types.

    Raises:
        SpecError: a format that is no GGUF type for a GGUF file.
    """
    head = request.type.partition(";")[0].strip()
    backends = {b.name for b in BACKENDS} | {b.package for b in BACKENDS if b.package}
    gguf = request.target.suffix.lower() == GGUF
    if not is_format(head) and head not in backends - {"gguf"}:
        return None
    if gguf and is_format(head) and get_entry(head).backend == "gguf":
        return None
    spec = QuantSpec.from_uri(request.type)
    if gguf:
        raise SpecError(
            f"A {GGUF} file cannot hold {spec.format_id} here.\n"
            f"A {GGUF} file takes GGUF types such as Q4_K_M, a {SAFETENSORS} file F32, F16, BF16 and formats."
        )
    rules = (*spec.rules, *request.rules)
    exclude, include = (*spec.exclude, *request.exclude), (*spec.include, *request.include)
    return dataclasses.replace(spec, rules=rules, exclude=exclude, include=include)


def plan_quantized(request: Request, spec: QuantSpec) -> QuantizedConversion:
    """Decide for every tensor; layers whose shape the format cannot hold stay as they are, with a warning.

    Raises:
        FileError, SpecError, BackendUnavailable: as `plan_conversion`.
    """
    if request.imatrix is not None:
        raise SpecError(f"{spec.format_id} takes no importance matrix.\nLeave it out, or convert to a GGUF type.")
    refuse_target(dataclasses.replace(request, overwrite=True))
    source = open_source(request.source)
    model = read_model(request, source)
    slots = [Slot(t.meta, is_linear(t)) for t in model.targets]
    plan = make_plan(slots, spec, require(spec.format_id))
    for chosen in plan.format_ids:
        require(chosen)
    writer = choose_writer(plan, request.layout)
    folder = folder_of(request, model.found, source.metas, writer) if request.folder else None
    if folder is not None:
        plan = without_clashes(folder, plan, lambda other: make_plan(slots, other, require(other.format_id)))
    kept = metadata_strings(source)
    names = [*(t.name for t in model.targets), *model.words]
    note = conversion_note(source, request.source, spec.to_uri(), writer.id, list(map(str, spec.rules)), request.scales)
    room = header_room(names, len(json.dumps([kept, json.dumps(note), versions()])))
    sizes = [
        (t.name, d.nbytes_out, None if d.action is Action.QUANTIZE else t.dtype)
        for t, d in zip(model.targets, plan.decisions, strict=True)
    ]
    items = shards(sizes, request.shard_nbytes, room)
    files = shard_files(request.target, items, room, model.words_nbytes)
    if folder is not None and (why := folder.writer.refuse_together(plan.format_ids)):
        raise SpecError(f"{why}.\nGive all layers one of them, or name the target *{SAFETENSORS}.")
    if not request.overwrite:
        beside = [request.target.with_name(name) for name in (folder.names if folder is not None else ())]
        index = [index_of(request.target)] if len(files) > 1 else []
        refuse_existing(request.target, [*(path for path, _ in files), *index, *beside])
    doubts = list(model.warnings)
    if isinstance(writer, ScaledFp8Writer):
        stay = [d.meta.name for d in plan.decisions if d.action is not Action.QUANTIZE and len(d.meta.shape) == 2]
        doubts += writer.doubts([n for n in stay if n.endswith(".weight")])
    scales, without = input_scales(request, plan, writer)
    doubts += without
    return QuantizedConversion(
        request, source, model.found, model.targets, plan, writer, tuple(items), tuple(files), room,
        plan.nbytes_out + model.words_nbytes, model.words, _copies(source, model.targets, plan.decisions, writer),
        (*model.notes, *_files_note(files, request.shard_nbytes)), tuple(doubts), folder, scales,
    )  # fmt: skip


def choose_writer(plan: QuantPlan, layout: str) -> Writer:
    """The one layout that holds all formats of a plan.

    Raises:
        SpecError: there is none, or the one that was asked for cannot.
    """
    formats = plan.format_ids or [plan.spec.format_id]
    writers = {writer_for(f, layout).id: f for f in formats}
    if len(writers) > 1:
        shown = ", ".join(f"{f} in {writer}" for writer, f in writers.items())
        fit = [w.id for w in WRITERS.values() if all(f in w.formats for f in formats)]
        todo = f"Ask for a layout that holds all of them: {', '.join(fit)}." if fit else "Give all layers one of them."
        raise SpecError(f"One file cannot hold these formats in their layouts: {shown}.\n{todo}")
    writer = WRITERS[next(iter(writers))]
    for d in plan.to_quantize:
        why = writer.refuse(d.spec.format_id, dict(d.spec.options)) if d.spec is not None else None
        if why:
            raise SpecError(f"'{d.meta.name}': {why}.\nChoose another format, other options, or another layout.")
    return writer


def _files_note(files: Sequence[tuple[Path, int]], limit: int) -> list[str]:
    notes = [f"{len(files)} files, {files[0][0].name} and so on, with an index"] if len(files) > 1 else []
    large = [(path.name, nbytes) for path, nbytes in files if limit and nbytes > limit]
    if large:
        more = f" and {len(large) - 1} more" if len(large) > 1 else ""
        notes.append(f"{large[0][0]}{more} is larger than asked for, about {large[0][1]} bytes: one tensor is not cut")
    return notes


def _copies(source: Source, targets: Sequence[Target], decisions: Sequence[Decision], writer: Writer) -> frozenset[str]:
    """Layers whose source is in the wanted format, with the options that are asked for."""
    found: set[str] = set()
    for t, d in zip(targets, decisions, strict=True):
        kinds = {source.kinds.get(p.source, "") for p in t.pieces}
        held = {format_id(kind) if kind in TYPES else kind for kind in kinds}
        if d.action is not Action.QUANTIZE or d.spec is None or held != {d.spec.format_id}:
            continue
        if isinstance(source, QuantizedSource):
            layers = [source.layers[p.source] for p in t.pieces if p.source in source.layers]
            same = len(layers) == len(t.pieces) and all(_has_options(layer, d.spec) for layer in layers)
            factors = any(PRE_QUANT_SCALE in layer.tensors for layer in layers)
            whole = len(t.pieces) == 1 and t.pieces[0].whole
            if not same or (factors and not (whole and PRE_QUANT_SCALE in writer.beside_layers)):
                continue
        if not any(p.add for p in t.pieces):
            found.add(t.name)
    return frozenset(found)


# What schemes call the options of a spec; one that no file tells of is never taken for the same.
OPTIONS = {
    **{"bits4-block-size": "block_size", "bits4-use-double-quant": "double_quant", "int8-threshold": "threshold"},
    **{"convrot-group-size": "convrot_groupsize", "quantized-matmul": "use_quantized_matmul"},
}


def _has_options(layer: Layer, spec: QuantSpec) -> bool:
    """Whether a layer was made with the options that are asked for; what is not asked for is as it is."""
    if not spec.options or layer.options.get(SPEC_KEY) == QuantSpec(spec.format_id, options=spec.options).to_uri():
        return True
    held = [(layer.options.get(OPTIONS.get(key, key.replace("-", "_"))), value) for key, value in spec.options]
    return all(have is not None and have == asked for have, asked in held)


def dry_run(conversion: QuantizedConversion) -> str:
    """What becomes of each group of tensors, and about how large the file will be."""
    groups: dict[tuple[str, str], list[Decision]] = {}
    for d in conversion.plan.decisions:
        groups.setdefault((_type_of(d), _reason(conversion, d)), []).append(d)
    lines = [f"{conversion.request.target.name}: {conversion.plan.spec.format_id} of {conversion.source.label}"]
    lines.append(f"{'format':20} {'tensors':>7} {'MiB':>9}  why (first of them)")
    for (what, reason), group in sorted(groups.items(), key=lambda item: -sum(d.nbytes_out for d in item[1])):
        size = sum(d.nbytes_out for d in group) / MIB
        lines.append(f"{what:20} {len(group):7} {size:9.2f}  {reason} ({group[0].meta.name})")
    before = sum(source_nbytes(conversion.source, t) for t in conversion.targets)
    lines.append(f"total {before / MIB:.2f} -> {conversion.total / MIB:.2f} MiB and a header; nothing was written")
    return "\n".join([*lines, *_notes(conversion), *(f"WARNING: {w}" for w in _warnings(conversion))])


def dry_run_json(conversion: QuantizedConversion) -> dict[str, Any]:
    tensors = [
        {"name": d.meta.name, "type": _type_of(d), "reason": _reason(conversion, d), "nbytes": d.nbytes_out}
        for d in conversion.plan.decisions
    ]
    return {
        "architecture": conversion.found.architecture,
        "layout": conversion.writer.id,
        "files": [path.name for path, _ in conversion.files],
        "nbytes": conversion.total,
        "notes": _notes(conversion),
        "warnings": _warnings(conversion),
        "tensors": tensors,
    }


def left(conversion: QuantizedConversion) -> str:
    """What would become of an interrupted conversion of this name."""
    request = conversion.request
    head = _head(conversion)
    resumable = bool(conversion.source.files)
    return remains(request.target, conversion.files[0][1], head, resumable, request.restart, conversion.parts)


def _type_of(d: Decision) -> str:
    return d.spec.format_id if d.action is Action.QUANTIZE and d.spec else NAMES[d.meta.dtype]


def _reason(conversion: QuantizedConversion, d: Decision) -> str:
    return f"copy: {d.reason}" if d.meta.name in conversion.copies else d.reason


def _notes(conversion: QuantizedConversion) -> list[str]:
    lines = [f"layout {conversion.writer.id}: {conversion.writer.title}"]
    if conversion.scales and conversion.request.scales is not None:
        lines.append(f"input_scale of {len(conversion.scales)} layers, from {conversion.request.scales.name}")
    return [*conversion.plan.notes, *conversion.notes, *lines]


def _warnings(conversion: QuantizedConversion, copied: Collection[str] | None = None) -> list[str]:
    """Args:
    copied: the layers that were, where that is known already.
    """
    warnings = list(conversion.doubts)
    if not conversion.plan.to_quantize:
        warnings.append(f"nothing is quantized: no layer is left to be {conversion.plan.spec.format_id}")
    warnings += [f"'{d.meta.name}' stays {NAMES[d.meta.dtype]}: {d.reason}" for d in conversion.plan.refused]
    asked = {d.meta.name for d in conversion.plan.to_quantize} - set(conversion.copies if copied is None else copied)
    kinds = conversion.source.kinds
    blocks = sum(any(p.source in kinds for p in t.pieces) for t in conversion.targets if t.name in asked)
    if blocks:
        warnings.append(
            f"{blocks} tensors are quantized a second time, which adds both errors (the SQNR is that of the second "
            "alone); convert the full-precision file where there is one"
        )
    return warnings


def identity(conversion: QuantizedConversion) -> dict[str, Any]:
    """What a run that continues must have in common with the one that was interrupted."""
    request = conversion.request
    decided = [(i.name, i.part, i.nbytes, _type_of(d)) for i, d in _pairs(conversion)]
    options = [(d.spec.to_uri() if d.spec else "") for _, d in _pairs(conversion)]
    contents = json.dumps([decided, options, metadata_strings(conversion.source), list(conversion.words)])
    return {
        "source": conversion.source.identity(),
        "type": conversion.plan.spec.to_uri(),
        "layout": conversion.writer.id,
        "shards": request.shard_nbytes,
        "options": [request.measure, *([sorted(conversion.scales.items())] if conversion.scales else [])],
        "contents": hashlib.sha256(contents.encode()).hexdigest(),
        "versions": versions(),
    }


def _head(conversion: QuantizedConversion) -> dict[str, Any]:
    head = identity(conversion)
    return {**head, "files": [path.name for path, _ in conversion.parts]} if conversion.parts else head


def _pairs(conversion: QuantizedConversion) -> list[tuple[Item, Decision]]:
    return list(zip(conversion.items, conversion.plan.decisions, strict=True))


def run(conversion: QuantizedConversion, advance: Advance) -> QuantReport:
    """Write the files.

    Args:
        advance: called with the bytes that came to be since the last call; may raise to give up.
    Raises:
        FileError: they cannot be written, the source changed, or the disk gives back something else; what was there is
            as it was.
        WeightError: nan or inf in a tensor, or a layer that the format makes worse than zeros.
    """
    request, plan = conversion.request, conversion.plan
    report = QuantReport(
        request.target.name, plan.spec.format_id, carrier="", uri=plan.spec.to_uri(), notes=_notes(conversion),
        warnings=_warnings(conversion), family=plan.family,
    )  # fmt: skip
    start = time.perf_counter()
    head, inputs = identity(conversion), input_files(request, conversion.source)
    resumable = bool(conversion.source.files)
    total = conversion.files[0][1]
    with (
        _made_folder(conversion),
        _threads(request.threads),
        partial(
            request.target, total, head, resumable, request.overwrite, inputs, request.restart, request.resume,
            conversion.parts, conversion.beside, _other_layouts(conversion),
        ) as file,
    ):  # fmt: skip
        if file.note:
            report.notes.append(file.note)
        if file.taken:  # written and verified before; only names are left to give
            entries = {name: Entry(**r["entry"]) for name, r in file.done.items() if "entry" in r}
        else:
            stream = Stream(file, len(conversion.files), conversion.room)
            _write(conversion, stream, advance)
            entries = stream.entries
            if request.verify:
                report.notes.append(_verified(conversion, stream, file.paths, advance))
    report.entries = [entries[t.name] for t in conversion.targets]
    copied = [e.name for e in report.entries if e.action == "copy"]
    report.warnings = _warnings(conversion, copied)
    if copied:
        report.notes.append(f"{len(copied)} layers are in this format already, and copied bit for bit")
    if not request.measure and any(e.sqnr_db is not None for e in report.entries):
        report.notes.append(f"SQNR and errors are of one row in {SAMPLED}; nan and inf were looked for in all values")
    report.seconds = time.perf_counter() - start
    return report


def _other_layouts(conversion: QuantizedConversion) -> list[str]:
    """Names of small files by which loaders would take a folder for one in another layout."""
    if conversion.folder is None:
        return []
    known = [name for w in WRITERS.values() if isinstance(w, Layout) for name in w.beside({})]
    return [name for name in dict.fromkeys(known) if name not in conversion.beside]


@contextlib.contextmanager
def _made_folder(conversion: QuantizedConversion) -> Generator[None]:
    """Make the folder that a component is written as, and take it away again where it stays empty."""
    path = conversion.request.target.parent
    made = conversion.folder is not None and not path.exists()
    if made:
        path.mkdir()
    try:
        yield
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextlib.contextmanager
def _threads(count: int) -> Generator[None]:
    """Let torch compute with so many threads; 0 leaves its setting."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write(conversion: QuantizedConversion, stream: Stream, advance: Advance) -> None:
    make = _maker(conversion)
    stream.write(conversion.items, make, advance)
    words = {n: torch.frombuffer(bytearray(d), dtype=torch.uint8) for n, d in conversion.words.items() if d}
    stream.finish(make, advance, {**conversion.writer.once(stream.notes), **words})
    advance(sum(map(len, conversion.words.values())))
    conversion.source.check_unchanged()
    plain = [*(i.name for i in conversion.items if i.kept is not None), *words]
    metadata = metadata_strings(conversion.source) | metadata_of(conversion.writer, stream.notes, plain)
    metadata[PROVENANCE] = json.dumps(_provenance(conversion, stream))
    index = conversion.index
    texts = {} if index is None else {index.name: index_text(stream.where(), conversion.files, stream.nbytes)}
    if conversion.folder is not None:
        matrices = [d.meta.name for _, d in _pairs(conversion) if len(d.meta.shape) == 2]
        texts |= conversion.folder.texts(stream.notes, [name for name in matrices if name in set(plain)])
    stream.seal(metadata, texts)


def _provenance(conversion: QuantizedConversion, stream: Stream) -> dict[str, Any]:
    """Where a file comes from.

    `values_crc32` is the CRC-32 of the lines `NAME CRC-32` of all tensors in the order of their names, each CRC-32 that
    of the tensor's bytes as they were read for this conversion, in the layout of the new file.
    """
    lines = "".join(f"{name} {crc:08x}\n" for name, crc in sorted(stream.sources.items()))
    request = conversion.request
    spec, rules = conversion.plan.spec.to_uri(), [str(rule) for rule in conversion.plan.spec.rules]
    return conversion_note(
        conversion.source, request.source, spec, conversion.writer.id, rules, request.scales,
        f"{zlib.crc32(lines.encode()):08x}", versions(),
    )  # fmt: skip


def _maker(conversion: QuantizedConversion) -> Callable[[Item], Made]:
    targets = {t.name: t for t in conversion.targets}
    decisions = {d.meta.name: d for d in conversion.plan.decisions}

    def make(item: Item) -> Made:
        made = _made(conversion, targets[item.name], decisions[item.name])
        if item.nbytes > TRIM_NBYTES:
            trim()
        return made

    return make


def _made(conversion: QuantizedConversion, t: Target, decision: Decision) -> Made:
    nbytes_in = source_nbytes(conversion.source, t)
    spec = decision.spec if decision.action is Action.QUANTIZE else None
    source = source_value(conversion, t, spec)
    if isinstance(source, QuantizedWeight):
        entry = Entry(t.name, "copy", decision.reason, nbytes_in, source.nbytes, format_id=source.format_id)
        beside = Assembled(t, conversion.source.open).beside
        return _laid_out(conversion, source, entry, crc_of(source.tensors.values()), beside)
    with ThreadPoolExecutor(1, "quantwire-crc") as pool:  # it reads what is quantized meanwhile
        crc = pool.submit(crc_of, [source])
        if spec is None:
            check_finite(t.name, source)
            entry = Entry(t.name, _kept_how(conversion, t), decision.reason, nbytes_in, source.nbytes)
            return Made({t.name: source}, entry, crc=crc.result())
        weight, entry = quantize_tensor(t.name, source, spec, every=every_of(conversion), quantize=quantize_slabs)
        entry = dataclasses.replace(entry, reason=decision.reason, nbytes_in=nbytes_in)
        return _laid_out(conversion, weight, entry, crc.result(), {})


def _laid_out(
    conversion: QuantizedConversion, weight: QuantizedWeight, entry: Entry, crc: int, beside: Mapping[str, Tensor]
) -> Made:
    """Args:
    beside: what the layer had beside its weight in the source.
    """
    writer, tensors = conversion.writer, {**beside}
    if FULL_PRECISION in beside and isinstance(writer, ComfyWriter):
        weight = dataclasses.replace(weight, meta={**weight.meta, FULL_PRECISION: True})
    if entry.name in conversion.scales:
        tensors[INPUT_SCALE] = torch.tensor(conversion.scales[entry.name])
    layer = entry.name.removesuffix("weight")
    named = {f"{layer}{writer.beside_layers[role]}": t for role, t in tensors.items() if role in writer.beside_layers}
    return Made(writer.tensors(entry.name, weight) | named, entry, writer.note(entry.name, weight), crc)


def _kept_how(conversion: QuantizedConversion, t: Target) -> str:
    return "dequantize" if any(p.source in conversion.source.kinds for p in t.pieces) else "keep"


def every_of(conversion: QuantizedConversion) -> int:
    """Of how many rows one is measured."""
    return 1 if conversion.request.measure else SAMPLED


def source_value(conversion: QuantizedConversion, t: Target, spec: QuantSpec | None) -> Tensor | QuantizedWeight:
    """A target's values; the quantized layer itself where it is copied."""
    rows = Assembled(t, conversion.source.open)
    if spec is not None and t.name in conversion.copies:
        held = rows.quantized
        if held is not None and held.format_id == spec.format_id:
            return held
    if not rows.rows:
        return torch.empty(t.shape, dtype=t.dtype)
    if len(t.pieces) == 1 and t.pieces[0].source not in conversion.source.kinds:
        return rows.values(0, rows.rows)[0].to(t.dtype).reshape(t.shape)
    values = torch.empty(rows.rows, rows.columns, dtype=t.dtype)
    step = max(1, SLAB_NUMEL // max(rows.columns, 1))
    for start in range(0, rows.rows, step):  # what is restored from blocks is float32, and never all of it
        at = start
        for part in rows.values(start, min(start + step, rows.rows)):
            values[at : at + len(part)].copy_(part)
            at += len(part)
    return values.reshape(t.shape)


def _verified(conversion: QuantizedConversion, stream: Stream, paths: Sequence[Path], advance: Advance) -> str:
    """Look at the files as they stand on the disk.

    Returns:
        what was looked at, for the report.
    """
    target, rest = conversion.request.target, 0

    def read(nbytes: int) -> None:
        nonlocal rest
        rest += nbytes
        advance(rest // VERIFY_SHARE)
        rest %= VERIFY_SHARE

    for path, contents in zip(paths, stream.contents(), strict=True):
        verify_bytes(target, path, contents, read)
    decisions = {d.meta.name: d for d in conversion.plan.to_quantize}
    targets = {t.name: t for t in conversion.targets}
    chosen = {name: stream.entries[name] for name in sample(list(decisions))}

    def source(name: str) -> Tensor | QuantizedWeight:
        return source_value(conversion, targets[name], decisions[name].spec)

    verify_layers(target, paths, chosen, source, every_of(conversion))
    return f"verified: every byte by CRC-32, and {len(chosen)} layers by their values"
