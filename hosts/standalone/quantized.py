"""FLUX files whose weights are quantized, of every scheme, as a model of the embedded host.

Every parameter of diffusers' model is rows of the file, whichever layout the file has: the steps from the file to
ComfyUI's layout and from there to diffusers' are put together before anything is read, so what was apart in the file is
not joined only to be cut again. Rows move without a value changing (`quantizers.files.rows`), and weights stay on a map
of the file where their format lets them.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...quantizers.apply import FLOAT_DTYPES, LayerMaker, make_layer
from ...quantizers.compat.modes import Carrier
from ...quantizers.errors import FileError, SpecError, WeightError
from ...quantizers.files.architectures import Found, comfyui_targets, recognise
from ...quantizers.files.layouts.target import Piece, Target, assemble
from ...quantizers.files.locate import Container
from ...quantizers.files.model_file import open_model
from ...quantizers.files.numbers import check_plain, check_scales
from ...quantizers.files.quantized_file import DTYPES
from ...quantizers.files.schemes.base import Layer
from ...quantizers.files.schemes.scan import Scan, scan
from ...quantizers.meta import TensorMeta
from ...quantizers.plan import sensitive_reason
from ...quantizers.registry import get_quantizer, require, require_reader
from ...quantizers.report import MIB, Entry, QuantReport
from ...quantizers.weight import QuantizedWeight
from . import flux
from .models import FAMILY, DiffusionModel, check_complete, fill, load_gguf

FULL_PRECISION = "Open a full-precision file with UNETLoader and link QuantizeModel behind it, or use LoadAndQuantize."
MARKERS = ("scaled_fp8",)  # they say how a file is to be read, and belong to no model
COLUMN_SCALE, INPUT_SCALE = "pre_quant_scale", "input_scale"


def load_quantized(
    path: Path, carrier: Carrier = Carrier.QUANTWIRE, maker: LayerMaker = make_layer, progress: Any = None
) -> tuple[DiffusionModel, QuantReport]:
    """Open a FLUX model whose weights are quantized in its file: safetensors of any scheme, or GGUF.

    Args:
        path: a file, the index of several, or the folder of a component.
    Raises:
        FileError: damaged, not quantized, another model, or layers that are not loaded here.
        SpecError, BackendUnavailable: the carrier or a library that cannot hold the weights here.
        WeightError: rows that the model needs apart and the format does not keep so; scales that are nan or inf.
    """
    start = time.perf_counter()
    file = open_model(path)
    if file.container is Container.GGUF:
        return load_gguf(path, carrier, maker, progress)
    source = _source(scan(file))
    _refuse(source, carrier)
    model = flux.build(source.config)
    try:
        made = _take(source, model, progress)
    except WeightError as err:
        raise WeightError(f"{source.name}: {err}") from err
    check_complete(model, made.state, made.quantized, source.name, source.unused)
    fill(model, made.state, made.quantized, carrier, maker)
    file.check_unchanged()
    report = _report(source, made, carrier)
    report.seconds = time.perf_counter() - start
    return DiffusionModel(model, source.config, source.name, source.dtype), report


@dataclass(frozen=True)
class _Source:
    """A FLUX model in a file.

    Attributes:
        targets: parameter of diffusers' model -> the rows of the file that it is made of.
        layers: the quantized layers among these.
        dtype: in which the model computes.
        unused: tensors of the model in the file that it has no place for.
        left: tensors of the file that are other parts'.
    """

    scan: Scan
    found: Found
    config: flux.FluxConfig
    targets: Sequence[Target]
    layers: Mapping[str, Layer]
    dtype: torch.dtype
    unused: set[str]
    left: Sequence[str]

    @property
    def name(self) -> str:
        return self.scan.file.path.name


def _source(found: Scan) -> _Source:
    """Find the model in the file.

    Raises:
        FileError: something else than FLUX, not quantized, or not complete.
    """
    file = found.file
    try:
        metas = {name: meta for name, meta in found.metas().items() if name.rpartition(".")[2] not in MARKERS}
        seen = _flux(recognise(metas))
        comfyui = {flux.comfy_name(t.name): t for t in comfyui_targets(seen, metas)}
        config = flux.config_of({name: t.meta for name, t in comfyui.items()}, file.path.name)  # type: ignore[arg-type]
        rows = list(flux.key_map(config))
        missing = next((row.source for row in rows if row.source not in comfyui), None)
        if missing is not None:
            raise FileError(f"'{missing}' is missing, of which '{seen.layout}' files of FLUX are made.")
        targets = [cut(comfyui[row.source], row, metas) for row in rows]
    except FileError as err:
        why = _other_component(file.path) or str(err)
        raise FileError(f"{file.path.name}: {why.removeprefix(f'{file.path.name}: ')}") from err
    used = {piece.source for t in targets for piece in t.pieces}
    of_model = {piece.source for t in comfyui.values() for piece in t.pieces}
    layers = {name: layer for name, layer in found.layers.items() if name in used}
    left = [name for name in file.entries if found.owner.get(name, name) not in of_model and name in metas]
    dtype = _compute_dtype(metas, used, layers)
    return _Source(found, seen, config, targets, layers, dtype, of_model - used, left)


def _other_component(path: Path) -> str:
    """What a file without a diffusion model is, and what opens it; empty for everything else."""
    from ...quantizers.files.components import Component
    from ...quantizers.files.detect import detect_file
    from ...quantizers.files.loading import STANDALONE

    facts = detect_file(path)
    if facts.main.component in (Component.DIFFUSION, Component.UNKNOWN):
        return ""
    here = next((x for x in facts.loads if x.host == STANDALONE), None)
    todo = "" if here is None else f"\nOpen it with {here.node}." if here.node else f"\n{here.note}"
    return f"holds a {facts.main.component.value}, and LoadQuantized opens a diffusion model.{todo}"


def _flux(found: Found | None) -> Found:
    if found is None:
        raise FileError(
            "no model that is known here.\n`quantwire inspect` tells what it holds; ComfyUI may know the model."
        )
    if found.architecture != FAMILY:
        raise FileError(
            f"a model of architecture {found.architecture}, and the embedded host runs {FAMILY}.\n"
            f"LoadQuantized opens {found.architecture} in ComfyUI: run this graph there, or on its server with "
            "`quantwire run WORKFLOW.json --server URL`."
        )
    return found


def cut(target: Target, row: flux.Row, metas: Mapping[str, TensorMeta]) -> Target:
    """Some rows of a target that is itself made of rows, as a target made of rows of the file.

    Args:
        metas: of the sources.
    Raises:
        FileError: the target has too few rows.
    """
    if row.start is None and row.stop is None and not row.swap:
        return dataclasses.replace(target, name=row.target)
    ranges = list(_ranges(target, metas))
    total = sum(stop - start for _, start, stop in ranges)
    start, stop = row.start or 0, total if row.stop is None else row.stop
    if stop > total or (row.swap and total % 2):
        raise FileError(
            f"'{target.name}': {total} rows, expected {'an even number' if row.swap else f'{stop} or more'}."
        )
    wanted = [(total // 2, total), (0, total // 2)] if row.swap else [(start, stop)]
    taken = _merged([part for a, b in wanted for part in _within(ranges, a, b)])
    pieces = tuple(Piece(name) if (a, b) == (0, metas[name].shape[0]) else Piece(name, a, b) for name, a, b in taken)
    count = sum(b - a for a, b in wanted)
    return Target(row.target, (count, *target.shape[1:]), target.dtype, pieces)


_Range = tuple[str, int, int]  # source, first row, one behind the last


def _ranges(target: Target, metas: Mapping[str, TensorMeta]) -> Iterable[_Range]:
    """The rows of a target in their order; halves that are exchanged are two ranges."""
    for piece in target.pieces:
        if piece.heads or piece.add:
            raise FileError(f"'{target.name}': values of '{piece.source}' change on the way, so it cannot be cut.")
        start, stop, _ = slice(piece.start, piece.stop).indices(metas[piece.source].shape[0])
        middle = (start + stop) // 2 if piece.swap else start
        yield piece.source, middle, stop
        if piece.swap:
            yield piece.source, start, middle


def _within(ranges: Sequence[_Range], start: int, stop: int) -> Iterable[_Range]:
    at = 0
    for name, a, b in ranges:
        first, last = max(start - at, 0), min(stop - at, b - a)
        if first < last:
            yield name, a + first, a + last
        at += b - a


def _merged(ranges: Sequence[_Range]) -> list[_Range]:
    found: list[_Range] = []
    for name, a, b in ranges:
        if found and found[-1][0] == name and found[-1][2] == a:
            found[-1] = (name, found[-1][1], b)
        else:
            found.append((name, a, b))
    return found


def _compute_dtype(metas: Mapping[str, TensorMeta], used: set[str], layers: Mapping[str, Layer]) -> torch.dtype:
    """What most values that are not quantized are in; without any, what the layers were in before."""
    count: Counter[torch.dtype] = Counter()
    for name in used - set(layers):
        if metas[name].dtype in FLOAT_DTYPES:
            count[metas[name].dtype] += metas[name].numel
    if not count:
        count.update(DTYPES.get(layer.dtype, torch.bfloat16) for layer in layers.values())
    return count.most_common(1)[0][0] if count else torch.bfloat16


def _refuse(source: _Source, carrier: Carrier) -> None:
    """Before any work: everything that will not go well.

    Raises:
        FileError, SpecError, BackendUnavailable: see `load_quantized`.
    """
    _refuse_faults(source)
    if not source.layers:
        raise FileError(f"{source.name}: no weight of the diffusion model in it is quantized.\n{FULL_PRECISION}")
    for layer in source.layers.values():
        if not layer.format_id:
            raise FileError(f"{source.name}: '{layer.name}' is {layer.type}: {layer.why}")
        if COLUMN_SCALE in layer.tensors:
            raise SpecError(
                f"{source.name}: '{layer.tensors[COLUMN_SCALE]}' scales each column of the layer's input, which the "
                "embedded host does not do.\nRun the graph in ComfyUI, which applies it."
            )
    for format_id in {layer.format_id: None for layer in source.layers.values()}:
        if carrier is Carrier.LIBRARY and not format_id.startswith("gguf-"):
            require(format_id)
        else:
            require_reader(format_id)


def _refuse_faults(source: _Source) -> None:
    """Refuse a file that contradicts its scheme, but for parts that are not loaded.

    Raises:
        FileError: names the first fault.
    """
    others = set(source.left) | (set(source.scan.layers) - set(source.layers))
    fatal = [f for f in source.scan.faults if f.fatal and f.tensor not in others]
    if not fatal:
        return
    more = f" (and {len(fatal) - 1} more faults)" if len(fatal) > 1 else ""
    where = f"'{fatal[0].tensor}': " if fatal[0].tensor and f"'{fatal[0].tensor}'" not in fatal[0].text else ""
    raise FileError(
        f"{source.name}: {where}{fatal[0].text.rstrip('.')}{more}.\n"
        f"`quantwire doctor {source.scan.file.path}` tells what is wrong, and mends it where the mend is certain."
    )


@dataclass
class _Made:
    """What was made of the file.

    Attributes:
        state: parameter -> tensor.
        quantized: linear layer -> weight.
    """

    state: dict[str, Tensor]
    quantized: dict[str, QuantizedWeight]
    entries: list[Entry]


def _take(source: _Source, model: nn.Module, progress: Any) -> _Made:
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    made = _Made({}, {}, [])
    reader = _Reader(source.scan)
    for target in progress(source.targets, len(source.targets)) if progress else source.targets:
        value = assemble(target, reader)
        title = reader.title(target)
        if isinstance(value, QuantizedWeight):
            kind = f"{title} in the file"
            if target.name in linear:
                held = dataclasses.replace(value, orig_dtype=source.dtype)
                made.quantized[target.name.removesuffix(".weight")] = held
                entry = Entry(target.name, "quantize", kind, held.numel * 2, held.nbytes, format_id=held.format_id)
                made.entries.append(entry)
                continue
            # A bias or norm: nothing to multiply by, so plain is cheapest.
            tensor = get_quantizer(value.format_id).dequantize(value, source.dtype)
            made.entries.append(
                Entry(target.name, "dequantize", f"{kind}: not a linear weight", tensor.nbytes, tensor.nbytes)
            )
        else:
            check_plain(target.name, value)
            tensor = value.to(source.dtype)
            reason = sensitive_reason(target.name.removesuffix(".weight")) or "plain in the file"
            made.entries.append(Entry(target.name, "keep", reason, tensor.nbytes, tensor.nbytes))
        made.state[target.name] = tensor
    return made


class _Reader:
    """Reads sources, checked; several parameters made of one after the other share what was read."""

    def __init__(self, found: Scan) -> None:
        self.scan = found
        self._last: tuple[str, Tensor | QuantizedWeight] | None = None

    def __call__(self, name: str) -> Tensor | QuantizedWeight:
        if self._last is None or self._last[0] != name:
            value = self.scan.read(name)
            if isinstance(value, QuantizedWeight):
                check_scales(name, value)
            self._last = name, value
        return self._last[1]

    def title(self, target: Target) -> str:
        layer = self.scan.layers.get(target.pieces[0].source)
        return "" if layer is None else f"{self.scan.scheme(layer).title}, {layer.type},"


def _scales_input(found: Scan, layer: Layer) -> bool:
    """Whether a layer was made for activations with a fixed scale; quanto writes 1 where they have none."""
    name = layer.tensors.get(INPUT_SCALE)
    return name is not None and (layer.scheme != "quanto" or bool((found.file.read(name) != 1).any()))


def _report(source: _Source, made: _Made, carrier: Carrier) -> QuantReport:
    formats = sorted({w.format_id for w in made.quantized.values()})
    report = QuantReport(source.name, ", ".join(formats), carrier.value, entries=made.entries)
    report.family = source.found.family
    layers = source.layers.values()
    kinds = Counter(f"{source.scan.scheme(x).title}, {x.type}" for x in layers)
    report.notes.append("in the file: " + "; ".join(f"{n} layers of {kind}" for kind, n in kinds.most_common()))
    libraries = sorted({source.scan.scheme(x).library for x in layers})
    report.notes.append(f"written by {', '.join(libraries)}, layout of {source.found.layout}")
    scaled = sum(_scales_input(source.scan, x) for x in layers)
    if scaled:
        report.notes.append(
            f"{scaled} layers have an input_scale, for products with activations in 8 bits, which are not made here"
        )
    if source.left:
        nbytes = sum(source.scan.file.entries[name].nbytes for name in source.left)
        first = ", ".join(sorted({name.partition(".")[0] for name in source.left})[:5])
        report.notes.append(
            f"{len(source.left)} tensors of other parts ({first}; {nbytes / MIB:.1f} MiB) are left in the file"
        )
    report.warnings += [f"'{f.tensor}': {f.text}" for f in source.scan.faults if not f.fatal]
    return report
