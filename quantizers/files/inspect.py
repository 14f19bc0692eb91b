"""What `quantwire inspect` and InspectModel show: warnings, what a file is, its tensors by type and layer group."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import FileError, near
from .detect import FileFacts, TypeFacts, inspect_file, part_title
from .loading import Loading
from .origin import SAFETENSORS_LIBRARY
from .schemes.scan import Scan

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class Group(NamedTuple):
    """Layers that differ in numbers only, in one type.

    Attributes:
        name: with `*` for numbers: `double_blocks.*.img_attn.qkv`.
        type: as in `TypeFacts`.
        tensors: weights, or plain tensors.
        nbytes: in the file.
    """

    name: str
    type: str
    tensors: int
    numel: int
    nbytes: int


class LayerFacts(NamedTuple):
    """One tensor as a full-precision file would have it.

    Attributes:
        name: with the file's prefix.
        type, format_id: as in `TypeFacts`.
        dtype: of the values that were quantized, or of a plain tensor.
        options: how it was quantized.
        why: why it cannot be loaded.
    """

    name: str
    type: str
    format_id: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    options: Mapping[str, Any]
    why: str = ""


class Inspection(NamedTuple):
    """A file, ready to be shown; `str` is the text, `to_dict` the report.

    Attributes:
        layers: empty unless they were asked for.
    """

    facts: FileFacts
    groups: tuple[Group, ...]
    layers: tuple[LayerFacts, ...] = ()

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def to_dict(self) -> dict[str, Any]:
        data = self.facts.to_dict()
        data["groups"] = [g._asdict() for g in self.groups]
        if self.layers:
            data["layers"] = [x._asdict() | {"options": dict(x.options)} for x in self.layers]
        return data


def inspect(path: Path, layers: str | None = None) -> Inspection:
    """Look into a model file by its header.

    Args:
        layers: pattern over names of layers to list, such as `*.img_attn.*`, or a part of a name; `*` lists all, None
            none.
    Raises:
        FileError: as `detect_file`; no layer fits the pattern.
    """
    facts, scanned = inspect_file(path)
    if scanned is None:
        if layers is not None:
            inner = ", ".join(str(path / name) for name in facts.folders)
            raise FileError(f"{path}: the folder of a pipeline.\nList the layers of one component: {inner}.")
        return Inspection(facts, ())
    every = _layers(scanned)
    return Inspection(facts, tuple(_groups(every)), tuple(_asked(every, layers, path)) if layers is not None else ())


def _layers(scanned: Scan) -> list[LayerFacts]:
    """All tensors in the file's order, those that belong to a quantized layer as that layer."""
    entries, owner, found = scanned.file.entries, scanned.owner, dict[str, LayerFacts]()
    for name, entry in entries.items():
        layer = scanned.layers.get(owner.get(name, ""))
        if layer is None:
            found[name] = LayerFacts(name, entry.dtype, "", entry.shape, entry.dtype, entry.nbytes, {})
        elif layer.name not in found:
            nbytes = sum(entries[t].nbytes for t in layer.tensors.values())
            found[layer.name] = LayerFacts(
                layer.name, layer.type, layer.format_id, layer.shape, layer.dtype, nbytes, layer.options, layer.why
            )
    return list(found.values())


def _asked(layers: Sequence[LayerFacts], pattern: str, path: Path) -> list[LayerFacts]:
    whole = any(c in pattern for c in "*?[")
    found = [x for x in layers if (fnmatchcase(x.name, pattern) if whole else pattern in x.name)]
    if not found and layers:
        raise FileError(f"{path.name}: no layer fits '{pattern}'.{near(pattern, (x.name for x in layers))}")
    return found


def _groups(layers: Iterable[LayerFacts]) -> list[Group]:
    """In the file's order; a layer's weight and bias in one type are one group."""
    found: dict[tuple[str, str], list[int]] = {}
    for x in layers:
        stem, _, last = x.name.rpartition(".")
        name = stem if stem and last in ("weight", "bias", "scale") else x.name
        counted = found.setdefault((_numbers_out(name), x.type), [0, 0, 0])
        for i, n in enumerate((1, math.prod(x.shape), x.nbytes)):
            counted[i] += n
    return [Group(name, kind, *numbers) for (name, kind), numbers in found.items()]


def _numbers_out(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _lines(shown: Inspection) -> Iterable[str]:
    facts = shown.facts
    for warning in facts.warnings:
        yield f"warning: {_indented(warning)}"
    if facts.warnings:
        yield ""
    yield f"{facts.path.name or facts.path}: {facts.title}"
    yield from (f"  {label:12} {_indented(text, 15)}" for label, text in _head(facts))
    for name, inner in facts.folders.items():
        yield f"  {name + '/':20} {inner.title}, {size(inner.nbytes)}"
    if facts.others:
        yield f"  {'no weights':12} {', '.join(facts.others)}"
    if facts.types:
        yield ""
        yield from _table(("type", "format", "tensors", "values", "bytes", "bits", "share"), _type_rows(facts))
    if shown.groups:
        yield ""
        rows = [
            (g.name, g.type, str(g.tensors), count(g.numel), size(g.nbytes), _share(g.nbytes, facts.nbytes))
            for g in shown.groups
        ]
        yield from _table(("layer group", "type", "tensors", "values", "bytes", "share"), rows)
    if shown.layers:
        yield ""
        yield from map(_layer_line, shown.layers)


def _head(facts: FileFacts) -> Iterable[tuple[str, str]]:
    files = facts.files if len(facts.files) <= 3 else (*facts.files[:2], f"... ({len(facts.files)} files)")
    yield "container", facts.container + (f": {', '.join(files)}" if len(facts.files) > 1 else "")
    yield "size", f"{size(facts.nbytes)} in {facts.tensors} tensors"
    for part in facts.parts:
        where = f"prefix '{part.prefix}'" if part.prefix else "no prefix"
        layout = f"names of {part.layout}, " if part.layout else ""
        detail = f", {part.detail}" if part.detail else ""
        yield "holds", f"{part_title(part)}: {layout}{where}, {part.tensors} tensors, {size(part.nbytes)}{detail}"
    named = [w for w in facts.written_by if w not in facts.libraries]
    # That the safetensors library wrote the bytes tells nothing where more is known.
    by = [*facts.libraries, *(w for w in named if not (facts.libraries and w.startswith(SAFETENSORS_LIBRARY)))]
    if by:
        yield "written by", ", ".join(by)
    for label, value in facts.metadata.items():
        yield label, " ".join(value.split())
    for loading in facts.loads:
        yield "loads with", _loading(loading)
    yield "memory", _memory(facts)


def _loading(loading: Loading) -> str:
    if not loading.node:
        return f"{loading.host}: not loadable. {loading.note}"
    missing = [x.package for x in loading.libraries if x.needed and not x.installed]
    spared = [x.package for x in loading.libraries if not x.needed and not x.installed]
    there = [x.package for x in loading.libraries if x.installed]
    text = f"{loading.host}: {loading.node}, from the folder {loading.folder}"
    if there:
        text += f", with {', '.join(there)} (installed)"
    if missing:
        text += f", with {', '.join(missing)} (not installed: `pip install {' '.join(missing)}`)"
    if spared:
        text += f" ({', '.join(spared)} is not installed, and not needed to read it)"
    return f"{text}. {loading.note}".rstrip(". ") + "." if loading.note else text


def _memory(facts: FileFacts) -> str:
    m = facts.memory
    text = f"{size(m.weights)} of weights"
    if m.largest:
        layer = f" ('{m.largest_layer}')" if m.largest_layer else ""
        text += f", and {size(m.largest)} while the largest layer is dequantized{layer}"
    return text + (f"; {size(m.full_precision)} at full precision" if m.largest else "")


def _type_rows(facts: FileFacts) -> list[tuple[str, ...]]:
    rows = [_type_row(t, facts.nbytes) for t in facts.types]
    total = sum(t.numel for t in facts.types)
    bits = f"{8 * facts.nbytes / total:.2f}" if total else ""
    layers = str(sum(t.layers for t in facts.types))
    return [*rows, ("total", "", layers, count(total), size(facts.nbytes), bits, "100 %")]


def _type_row(t: TypeFacts, total: int) -> tuple[str, ...]:
    kind = t.format_id or ("not loadable" if t.scheme else "plain")
    return (t.type, kind, str(t.layers), count(t.numel), size(t.nbytes), f"{t.bits:.2f}", _share(t.nbytes, total))


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Iterable[str]:
    """Columns as wide as their longest cell; words left, numbers right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    words = sum(1 for h in head if h in ("type", "format", "layer group"))
    for row in (head, *rows):
        cells = [c.ljust(w) if i < words else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        yield "  ".join(cells).rstrip()


def _layer_line(x: LayerFacts) -> str:
    options = ", ".join(f"{key}={value}" for key, value in x.options.items())
    kind = f"{x.type} ({x.format_id})" if x.format_id else x.type
    shape = "x".join(map(str, x.shape)) or "scalar"
    parts = [f"{x.name}: {kind}", shape, size(x.nbytes)]
    if x.type != x.dtype:
        parts.append(f"of {x.dtype}")
    return ", ".join([*parts, *([options] if options else [])]) + (f". Not loadable: {x.why}" if x.why else "")


def _share(nbytes: int, total: int) -> str:
    return f"{100 * nbytes / total:.1f} %" if total else ""


def _indented(text: str, by: int = 9) -> str:
    """A text of several lines under its label."""
    return text.replace("\n", "\n" + " " * by)


def size(nbytes: int) -> str:
    """`11.08 GiB`."""
    value, unit = float(nbytes), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.2f} {_UNITS[unit]}" if unit else f"{nbytes} B"


def count(number: int) -> str:
    """`11.9 G` of values."""
    for power, unit in ((9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.1f} {unit}"
    return str(number)
