"""Know a model file from its header: container, components, quantization of each layer, origin, and what opens it.

Nothing but headers, small tensors of JSON and the JSON files of a folder is read, so the size of a file does not
matter. torch is not imported.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ..errors import FileError
from ..meta import Shaped
from .components import NUNCHAKU_MODELS, TITLES, Component, Part, find_parts, is_in, is_in_section
from .gguf_kind import Kind, kind_of
from .loading import Loading, Stored, is_native, loadings, main_part
from .locate import Container
from .model_file import ModelFile, open_damaged, open_model
from .name_hints import Content, contradictions
from .origin import metadata_facts, writers
from .schemes.base import Fault, Layer
from .schemes.scan import Scan, scan
from .whole_model import model_of

PIPELINE = "model_index.json"
# Bytes of a value; a weight that is multiplied by dequantizing takes those of its own dtype.
_ITEM_NBYTES = {"F64": 8, "F32": 4}
_DEFAULT_ITEM_NBYTES = 2
_EIGHT_BITS = ("F8_", "F6_", "F4", "I8", "U8")


class TypeFacts(NamedTuple):
    """All tensors of a file in one type.

    Attributes:
        type: `nf4`, `Q4_K`, `BF16`.
        scheme: id of the scheme that lays it out so; empty for plain tensors.
        title: of the scheme, for people.
        format_id: the format that holds exactly these numbers; empty where none does, and for plain tensors.
        layers: weights, or plain tensors.
        numel: values that they stand for.
        nbytes: in the file, scales and the like included.
        bits: a value, scales and the like included.
    """

    type: str
    scheme: str
    title: str
    format_id: str
    layers: int
    numel: int
    nbytes: int
    bits: float


class Memory(NamedTuple):
    """What the file would take when it is loaded, without activations.

    Attributes:
        weights: bytes of all tensors as they are stored.
        largest: bytes of the largest layer that has to be dequantized for its product, 0 where none has.
        largest_layer: its name.
        full_precision: bytes of all values in 16 bits (32 for what is kept in them).
    """

    weights: int
    largest: int = 0
    largest_layer: str = ""
    full_precision: int = 0


class FileFacts(NamedTuple):
    """What a model file is. `to_dict` gives it as JSON values.

    Attributes:
        path: what was asked for.
        container: how it is stored; `pipeline folder` for the folder of a whole pipeline.
        files: names of the files read.
        parts: its components, those of a checkpoint in the order of their names.
        types: quantized ones first, then plain dtypes; each by bytes.
        libraries: that lay out weights as this file has them.
        written_by: programs that the file names.
        metadata: title, licence, training and provenance, as far as they are there.
        loads: how each host opens it.
        warnings: what a user should know first: faults, a name that disagrees, layers that cannot be loaded.
        faults: what contradicts the schemes, as dictionaries.
        folders: components of a pipeline by the names of their folders.
        others: folders of a pipeline that hold no weights.
        damage: why the file cannot be opened; all else is then what can still be read of it.
    """

    path: Path
    container: str
    files: tuple[str, ...] = ()
    nbytes: int = 0
    tensors: int = 0
    parts: tuple[Part, ...] = ()
    types: tuple[TypeFacts, ...] = ()
    libraries: tuple[str, ...] = ()
    written_by: tuple[str, ...] = ()
    metadata: Mapping[str, str] = MappingProxyType({})
    loads: tuple[Loading, ...] = ()
    memory: Memory = Memory(0)
    warnings: tuple[str, ...] = ()
    faults: tuple[Mapping[str, Any], ...] = ()
    folders: Mapping[str, FileFacts] = MappingProxyType({})
    others: tuple[str, ...] = ()
    damage: str = ""

    @property
    def main(self) -> Part:
        return main_part(self.parts)

    @property
    def title(self) -> str:
        """One line: `FLUX.1 diffusion model, bnb nf4`."""
        if self.folders:
            return f"pipeline of {', '.join(self.folders)}"
        kinds = [_type_title(t) for t in self.types if t.scheme]
        shown = ", ".join(kinds[:3]) + (f" and {len(kinds) - 3} more" if len(kinds) > 3 else "")
        return f"{self._what()}, {shown or self._plain()}"

    def _what(self) -> str:
        components = [p.component for p in self.parts if p.component is not Component.EMA]
        if len(components) > 1 and Component.DIFFUSION in components:
            return f"all-in-one checkpoint of {part_title(self.main)}"
        return " and ".join(dict.fromkeys(part_title(p) for p in self.parts)) or "nothing that is known"

    def _plain(self) -> str:
        return f"plain {self.types[0].type}" if self.types else "no tensors"

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = self._asdict()
        data["path"] = str(self.path)
        data["title"] = self.title
        for name in ("parts", "types", "loads"):
            data[name] = [x._asdict() for x in data[name]]
        for loading in data["loads"]:
            loading["libraries"] = [x._asdict() for x in loading["libraries"]]
        for part in data["parts"]:
            part["component"] = part["component"].value
        data["metadata"] = dict(self.metadata)
        data["memory"] = self.memory._asdict()
        data["folders"] = {name: facts.to_dict() for name, facts in self.folders.items()}
        for name in ("files", "libraries", "written_by", "warnings", "faults", "others"):
            data[name] = list(data[name])
        return data


def detect_file(path: Path) -> FileFacts:
    """What a file or folder holds, from headers alone.

    Raises:
        FileError: it cannot be read, is no model file, or is one that reading could run code of.
    """
    return inspect_file(path)[0]


def inspect_file(path: Path) -> tuple[FileFacts, Scan | None]:
    """`detect_file`, and the scan that it was made from; None for the folder of a pipeline."""
    if path.is_dir() and (path / PIPELINE).is_file():
        return _pipeline(path), None
    whole = path if path.is_dir() else model_of(path)
    try:
        file, damage, faults = open_model(whole), "", ()
    except FileError as err:
        file, faults = _readable(whole, err)
        damage = str(err)
    scanned = scan(file)
    return facts_of(Scan(file, scanned.layers, (*faults, *scanned.faults)), damage), scanned


def _readable(path: Path, err: FileError) -> tuple[ModelFile, tuple[Fault, ...]]:
    """What can be read of a damaged file, and what is wrong with its header.

    Raises:
        FileError: nothing can: what is wrong with it.
    """
    try:
        file, headers = open_damaged(path)
    except FileError:
        raise err from None
    if not file.entries:
        raise err
    return file, tuple(fault for header in headers for fault in header.faults)


def facts_of(scanned: Scan, damage: str = "") -> FileFacts:
    """What is known of a file whose layers were found.

    Args:
        damage: why it cannot be opened.
    """
    file = scanned.file
    types = _types(scanned)
    parts = _parts(scanned)
    return FileFacts(
        path=file.path,
        container=file.container.value,
        files=tuple(dict.fromkeys(entry.file.name for entry in file.entries.values())) or (file.path.name,),
        nbytes=file.nbytes,
        tensors=len(file.entries),
        parts=parts,
        types=types,
        libraries=tuple(dict.fromkeys(scanned.scheme(x).library for x in _first_of_each(scanned))),
        written_by=tuple(writers(file.metadata, file.configs)),
        metadata=metadata_facts(file.metadata),
        loads=loadings(_stored(scanned, parts, damage)),
        memory=_memory(scanned),
        warnings=(*([damage] if damage else []), *_warnings(scanned, types, damage)),
        faults=tuple(dataclasses.asdict(fault) for fault in scanned.faults),
        damage=damage,
    )


def part_title(part: Part) -> str:
    """`FLUX.1 diffusion model`, `CLIP-L text encoder`."""
    name = TITLES.get(part.family, part.family)
    return f"{name} {part.component.value}".strip()


def _type_title(found: TypeFacts) -> str:
    """`bitsandbytes nf4`, without saying one word twice."""
    words = found.type.lower().replace(",", " ").split()
    return " ".join([*(w for w in found.title.split() if w.lower() not in words), found.type])


def _first_of_each(scanned: Scan) -> list[Layer]:
    """One layer of each scheme."""
    return list({layer.scheme: layer for layer in reversed(list(scanned.layers.values()))}.values())[::-1]


def _types(scanned: Scan) -> tuple[TypeFacts, ...]:
    entries = scanned.file.entries
    count: Counter[tuple[str, str, str]] = Counter()
    numel: Counter[tuple[str, str, str]] = Counter()
    nbytes: Counter[tuple[str, str, str]] = Counter()
    for layer in scanned.layers.values():
        key = (layer.scheme, layer.type, layer.format_id)
        count[key] += 1
        numel[key] += math.prod(layer.shape)
        nbytes[key] += sum(entries[name].nbytes for name in layer.tensors.values())
    for name in scanned.plain:
        key = ("", entries[name].dtype, "")
        count[key] += 1
        numel[key] += entries[name].numel
        nbytes[key] += entries[name].nbytes
    titles = {layer.scheme: scanned.scheme(layer).title for layer in _first_of_each(scanned)}
    found = [
        TypeFacts(
            kind,
            scheme,
            titles.get(scheme, ""),
            format_id,
            count[key],
            numel[key],
            nbytes[key],
            _bits(key, numel, nbytes),
        )
        for key in count
        for scheme, kind, format_id in (key,)
    ]
    return tuple(sorted(found, key=lambda t: (not t.scheme, -t.nbytes)))


def _bits(key: tuple[str, str, str], numel: Counter[Any], nbytes: Counter[Any]) -> float:
    return round(8 * nbytes[key] / numel[key], 3) if numel[key] else 0.0


def _parts(scanned: Scan) -> tuple[Part, ...]:
    file = scanned.file
    sizes = {name: entry.nbytes for name, entry in file.entries.items()}
    if file.container is Container.GGUF:
        kind = kind_of(file.metadata, list(file.entries))
        if kind in (Kind.IMATRIX, Kind.MMPROJ):
            component = Component.IMATRIX if kind is Kind.IMATRIX else Component.MMPROJ
            return (Part(component, tensors=len(sizes), nbytes=sum(sizes.values())),)
    shapes: dict[str, Shaped] = {name: file.entries[name] for name in scanned.plain}
    parts = find_parts(shapes | dict(scanned.layers), sizes)
    named = NUNCHAKU_MODELS.get(file.metadata.get("model_class", "").lower())
    if named is not None and len(parts) == 1 and parts[0].component is Component.UNKNOWN:
        return (parts[0]._replace(component=named[0], family=named[1], layout="nunchaku", detail=""),)
    return parts


def _stored(scanned: Scan, parts: tuple[Part, ...], damage: str) -> Stored:
    main = main_part(parts)
    layers, others = list[Layer](), list[Layer]()
    for layer in scanned.layers.values():
        (layers if is_in(layer.name, main, parts) else others).append(layer)
    # A name that no other component has, such as one of the metadata, is about the main one.
    faults = {x: None for x in scanned.faults if is_in(x.tensor, main, parts) or not is_in_section(x.tensor)}
    return Stored(
        scanned.file.container,
        parts,
        frozenset(map(_reading, layers)),
        frozenset(x.format_id for x in layers if x.format_id),
        damage or _refused(scanned, layers, faults),
        # CheckpointLoaderSimple reads the other components too.
        {
            node: f"{x.text} {x.effect}"
            for x in reversed(scanned.faults)
            for node in x.misread_by
            if x in faults or node == "CheckpointLoaderSimple"
        },
        is_native(map(_reading, others)),
    )


def _reading(layer: Layer) -> str:
    """The scheme as ComfyUI's own loaders see it: they leave out a `weight_scale` that no `comfy_quant` names."""
    return f"unnamed {layer.scheme}" if layer.options.get("style") == "new" else layer.scheme


def _refused(scanned: Scan, layers: Iterable[Layer], faults: Iterable[Fault]) -> str:
    """Why a component cannot be loaded."""
    told = {fault.text for fault in scanned.faults}
    layer = next((x for x in layers if not x.format_id and x.why not in told), None)
    if layer is not None:
        return f"'{layer.name}' is {layer.type}: {layer.why}"
    fault = next((x for x in faults if x.fatal), None)
    if fault is None:
        return ""
    return f"{fault.text} `quantwire doctor {scanned.file.path}` tells what is wrong, and what can be mended."


def _memory(scanned: Scan) -> Memory:
    full = sum(
        scanned.file.entries[name].numel * _item_nbytes(scanned.file.entries[name].dtype) for name in scanned.plain
    )
    largest, name = 0, ""
    for layer in scanned.layers.values():
        nbytes = math.prod(layer.shape) * _item_nbytes(layer.dtype)
        full += nbytes
        if nbytes > largest:
            largest, name = nbytes, layer.name
    return Memory(scanned.file.nbytes, largest, name, full)


def _item_nbytes(dtype: str) -> int:
    return _ITEM_NBYTES.get(dtype, _DEFAULT_ITEM_NBYTES)


def _warnings(scanned: Scan, types: tuple[TypeFacts, ...], damage: str) -> list[str]:
    """One for all layers of a type in which the same is wrong."""
    found: list[str] = []
    kinds: dict[tuple[str, str], list[Fault]] = {}
    for fault in scanned.faults:
        kinds.setdefault((fault.code, _type_of(scanned, fault.tensor)), []).append(fault)
    for faults in kinds.values():
        if faults[0].text in damage:  # said already
            continue
        more = f" ({len(faults) - 1} more of this kind)" if len(faults) > 1 else ""
        found.append(f"{faults[0].text} {faults[0].effect}".strip() + more)
    told = {fault.text for fault in scanned.faults}
    broken = [x for x in scanned.layers.values() if not x.format_id and x.why not in told]
    for layers in _by_reason(broken).values():
        what = f"{len(layers)} layers such as" if len(layers) > 1 else "The layer"
        found.append(f"{what} '{layers[0].name}' ({layers[0].type}) cannot be loaded here: {layers[0].why}")
    return found + _name_warnings(scanned, types)


def _type_of(scanned: Scan, tensor: str) -> str:
    """Of the layer that a fault is about; empty where it is about none."""
    names = (tensor, scanned.owner.get(tensor, ""), f"{tensor}.weight", f"{tensor.rpartition('.')[0]}.weight")
    return next((scanned.layers[name].type for name in names if name in scanned.layers), "")


def _by_reason(layers: list[Layer]) -> dict[tuple[str, ...], list[Layer]]:
    """By type and why, whatever names and numbers are in it."""
    found: dict[tuple[str, ...], list[Layer]] = {}
    for layer in layers:
        found.setdefault((layer.scheme, layer.type, re.sub(r"'[^']*'|\d+", "", layer.why)), []).append(layer)
    return found


def _name_warnings(scanned: Scan, types: tuple[TypeFacts, ...]) -> list[str]:
    total = scanned.file.nbytes or 1
    contents = [
        Content(
            f"{t.scheme} {t.title} {t.type} {t.format_id}".lower().strip(),
            bool(t.scheme) or t.type.startswith(_EIGHT_BITS),
            t.nbytes / total,
            _type_title(t) if t.scheme else t.type,
        )
        for t in types
    ]
    path = scanned.file.path
    suffixes = (".gguf",) if scanned.file.container is Container.GGUF else (".safetensors", ".sft", ".json", "")
    single = not path.is_dir() and scanned.file.located.index is None
    return contradictions(path.name, not single or path.suffix.lower() in suffixes, contents)


def _pipeline(folder: Path) -> FileFacts:
    """The components of a pipeline of diffusers, each as a folder of its own."""
    folders: dict[str, FileFacts] = {}
    others: list[str] = []
    warnings: list[str] = []
    for inner in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if not any(p.suffix in (".safetensors", ".bin", ".gguf") for p in inner.iterdir()):
            others.append(inner.name)
            continue
        try:
            folders[inner.name] = detect_file(inner)
        except FileError as err:
            warnings.append(f"{inner.name}: {err}")
    for name, facts in folders.items():
        warnings += [f"{name}: {text}" for text in facts.warnings]
    if not folders and not warnings:
        raise FileError(f"{folder}: '{PIPELINE}' is there, but no folder beside it holds weights.\nDownload them too.")
    return FileFacts(
        folder,
        "pipeline folder",
        files=tuple(f"{name}/{file}" for name, facts in folders.items() for file in facts.files),
        nbytes=sum(f.nbytes for f in folders.values()),
        tensors=sum(f.tensors for f in folders.values()),
        memory=Memory(
            sum(f.memory.weights for f in folders.values()),
            max((f.memory.largest for f in folders.values()), default=0),
            full_precision=sum(f.memory.full_precision for f in folders.values()),
        ),
        warnings=tuple(warnings),
        folders=folders,
        others=tuple(others),
    )
