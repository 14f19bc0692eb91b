"""Decide a conversion from the headers alone: the type of every tensor, its place in the new file, what to tell.

Nothing is written here and no value is read, so that `--dry-run` can show all of it, with the size to the byte.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..apply import FLOAT_DTYPES
from ..errors import FileError, SpecError, WeightError, near
from ..ggml_types import TYPES, format_id
from ..registry import format_ids, get_entry, require
from ..report import MIB
from ..rules import Rule
from ..weight import TensorMeta
from .architectures import OTHER_PARTS, PREFIXES, Found, comfyui_targets, detect, gguf_targets, recognise
from .conversion_note import PROVENANCE, conversion_note
from .diffusers_folder import folder_targets
from .gguf_layout import QUANTIZATION_VERSION, Place, general_keys, layout, number, raw_keys, text, total_nbytes
from .imatrix import Imatrix, read_imatrix
from .layouts.llama_cpp import Heads
from .layouts.target import Target
from .quantized_file import NAMES
from .quantized_source import QuantizedSource
from .recipes import FLOATS, PLAIN, Choice, Recipe, choose, choose_plain, find_recipe, nbytes
from .signatures import IMAGE, SIGNATURES
from .sources import GgufSource, Source, open_source
from .stacks import missing_from_one, refuse_gaps
from .text_keys import (
    find_heads,
    key_name,
    known_architecture,
    renamed_key,
    text_keys,
    text_warnings,
    tokenizer_tensors,
    tokenizers,
    vision_tensors,
)

DTYPES = {name: dtype for dtype, name in PLAIN.items()}
GGUF, SAFETENSORS, SFT = ".gguf", ".safetensors", ".sft"  # the last is another name of the second
SHOWN = 5
STALE = ("_quantization_metadata", "quantization_config", "quantwire", "tensor_names", PROVENANCE)


@dataclass(frozen=True)
class Request:
    """What to convert.

    Attributes:
        source: a file, a `*.safetensors.index.json`, or a diffusers folder.
        target: its suffix, .gguf or .safetensors, says what it becomes.
        type: a recipe (`Q4_K_M`), a format id (`gguf-q4-k`), or for safetensors F32, F16 or BF16.
        rules, exclude, include: for single layers, as in `QuantSpec`; rules may name ggml types.
        imatrix: file of an importance matrix.
        architecture: in place of what the tensors say.
        overwrite: replace a target that is there.
        threads: 0 is one for each core.
        measure: compare every value with its quantized form, not one row in 16.
        restart: throw away what another conversion of the target's name left when it was interrupted.
        resume: refuse where no interrupted conversion can be continued.
        layout: id of the writer for quantized safetensors files; empty is the usual one of the format.
        shard_nbytes: largest size of a file, beyond which several are made with an index; 0 is no limit.
        verify: read a quantized safetensors file again before it takes its name.
        scales: file of a calibration, from which layers get an `input_scale`.
        folder: the target is the weights file of a component's folder, in the names of diffusers or transformers.
    """

    source: Path
    target: Path
    type: str
    rules: tuple[Rule, ...] = ()
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    imatrix: Path | None = None
    architecture: str = ""
    overwrite: bool = False
    threads: int = 0
    measure: bool = False
    restart: bool = False
    resume: bool = False
    layout: str = ""
    shard_nbytes: int = 0
    verify: bool = True
    folder: bool = False
    scales: Path | None = None


@dataclass(frozen=True)
class Conversion:
    """A request, decided.

    Attributes:
        choices: one a tensor of the new file, in its order.
        head: bytes before the data.
        places: of the tensors, in the same order.
        total: bytes of the file.
        notes, warnings: for the report.
        tail: bytes behind the tensors, the last of the file: a text encoder's tokenizer.
    """

    request: Request
    source: Source
    found: Found
    recipe: Recipe
    choices: tuple[Choice, ...]
    head: bytes
    places: tuple[Place, ...]
    total: int
    imatrix: Imatrix | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    resumable: bool = True
    tail: bytes = b""


def plan_conversion(request: Request) -> Conversion:
    """Decide everything from the headers; nothing is written and no value is read.

    Raises:
        FileError: a source or target that cannot be, an unknown architecture, or a target that is there already.
        SpecError: an unknown type or pattern, or a tensor that cannot be as asked.
        BackendUnavailable: a library that the type needs is missing.
    """
    if request.scales is not None:
        raise SpecError(
            f"{request.type} has no input_scale.\nLeave --scales out, or convert to a comfy-fp8 format or comfy-nvfp4."
        )
    refuse_target(request)
    plain = request.target.suffix.lower() in (SAFETENSORS, SFT)
    others = [f for f in format_ids() if get_entry(f).backend != "gguf"]
    recipe = find_recipe(request.type, others if plain or request.type.lower().startswith("comfy") else ())
    if plain and recipe.name not in FLOATS:
        alike = [f for f in others if recipe.name.lower().replace("_", "-") in f]
        use = f"Use {' or '.join(alike)}" if alike else f"Use {', '.join(FLOATS)} or a format such as bnb-nf4"
        raise SpecError(
            f"A safetensors file cannot hold the GGUF type {recipe.name}.\n{use} for {SAFETENSORS}, or name the "
            f"target *{GGUF}."
        )
    source = open_source(request.source)
    if any(_same(request.target, file) for file in source.files):
        raise FileError(f"'{request.target}' is the source itself.\nGive the new file another name.")
    return plan_tensors(request, source, recipe)


def refuse_target(request: Request) -> None:
    """Refuse a target that cannot be, or that is there and may not be replaced."""
    kind = request.target.suffix.lower()
    if kind not in (GGUF, SAFETENSORS, SFT):
        raise FileError(
            f"'{request.target.name}': the target is a {GGUF} or {SAFETENSORS} file, got '{kind or 'no suffix'}'.\n"
            "A name without an ending of files is that of a folder, for formats that diffusers reads."
        )
    if kind == SFT and request.shard_nbytes:
        raise FileError(f"'{request.target.name}': several files end in {SAFETENSORS}, as their index does.")
    if request.target.is_dir():
        raise FileError(f"{request.target}: is a folder.\nGive the name of a file.")
    if _same(request.source, request.target):
        raise FileError(f"'{request.target}' is the source itself.\nGive the new file another name.")
    if os.path.lexists(request.target) and not request.overwrite:
        raise FileError(f"{request.target}: is there already.\nUse --overwrite to replace it, or give another name.")


def _same(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)
    except OSError:
        return False


def plan_tensors(
    request: Request, source: Source, recipe: Recipe, extra: Sequence[bytes] = (), as_stored: bool = False
) -> Conversion:
    """`plan_conversion` for an open source.

    Args:
        extra: GGUF keys of the caller's in place of `quantwire.recipe`.
        as_stored: every tensor stays in the type that it has, whatever the recipe; for a GGUF file.
    """
    gguf = request.target.suffix.lower() == GGUF
    model = read_model(request, source)
    found, targets = model.found, model.targets
    imatrix = read_imatrix(request.imatrix) if request.imatrix is not None else None
    importance = None if imatrix is None else {t.name for t in targets if imatrix.find(t.name) is not None}
    patterns = request.rules, request.exclude, request.include
    if as_stored:
        choices, notes = [_as_stored(source, t) for t in targets], list[str]()
    elif gguf:
        choices, notes = choose(found, targets, recipe, *patterns, importance)
    else:
        choices, notes = choose_plain(targets, recipe, *patterns), []
    for kind in dict.fromkeys(c.kind for c in choices if c.kind in TYPES):
        require(format_id(kind))
    _check_importance(request, imatrix, choices)
    tensors = [(c.target.name, c.kind, c.target.shape) for c in choices]
    if gguf:
        head, places = layout([*_keys(request, source, model, recipe, extra)], tensors)
        total = total_nbytes(head, places)
    else:
        asked = [*(f"{p} = keep" for p in request.exclude), *map(str, request.rules)]
        note = conversion_note(source, request.source, recipe.name, "plain", asked)
        strings = {**metadata_strings(source), PROVENANCE: json.dumps(note)}
        head, places = safetensors_layout(tensors, strings, model.words)
        total = max((p.start + p.nbytes for p in places), default=len(head)) + model.words_nbytes
    more_notes, warnings = _remarks(request, source, found, choices, importance, imatrix)
    return Conversion(
        request, source, found, recipe, tuple(choices), head, tuple(places), total, imatrix,
        (*notes, *more_notes, *model.notes), (*model.warnings, *warnings), resumable=bool(source.files),
        tail=b"".join(model.words.values()),
    )  # fmt: skip


def _as_stored(source: Source, t: Target) -> Choice:
    kinds = {source.kinds.get(p.source, "") for p in t.pieces}
    kind = kinds.pop() if len(kinds) == 1 else ""
    return Choice(t, kind if kind in TYPES else PLAIN[t.dtype], "as it is stored", quantized=kind in TYPES)


@dataclass(frozen=True)
class Model:
    """What a source holds.

    Attributes:
        targets: the tensors to make.
        heads: of a text encoder, where the rows of some depend on them.
        words: its tokenizer as tensors of bytes, for a safetensors file.
        notes: what is left out.
        warnings: what makes it doubtful.
    """

    found: Found
    targets: tuple[Target, ...]
    heads: Heads | None
    words: Mapping[str, bytes]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def words_nbytes(self) -> int:
        return sum(map(len, self.words.values()))


def read_model(request: Request, source: Source) -> Model:
    """Recognise the model and lay out the tensors of the new file, from the source's header alone.

    Raises:
        FileError: an unknown or incomplete model.
        SpecError: an architecture that is none, or not one of this kind of model.
        WeightError: values that are neither blocks nor float32, float16 or bfloat16.
    """
    metas, dropped = floats(source)
    found, warnings = find_model(request, metas)
    found = found if request.architecture else known_architecture(found, source)
    heads, doubt = find_heads(found, source)
    gguf = request.target.suffix.lower() == GGUF
    if gguf and request.architecture and found.layout == "llama.cpp":
        comfyui_targets(found, metas, heads)  # refuses tensors of another architecture than the one asked for
    if request.folder:
        targets = folder_targets(found, metas)
    else:
        targets = gguf_targets(found, metas, heads) if gguf else comfyui_targets(found, metas, heads)
    _refuse_dtypes(source, targets)
    words, doubts = ({}, []) if gguf else tokenizers(found, source, [t.name for t in targets])
    warnings += [*doubts, *text_warnings(found, source, targets, gguf, doubt)]
    if isinstance(source, QuantizedSource):
        warnings += source.doubts
    if found.component == IMAGE:
        names = [t.name for t in targets]
        refuse_gaps(source.label, names)
        missing = missing_from_one(names)
        if missing:
            warnings.append(
                f"{len(missing)} tensors are missing in one block and there in all others like it: {_shown(missing)}; "
                "loaders fill them with anything"
            )
    warnings += _other_components(source, found, targets)
    notes = [*_left_out(source, found, targets, dropped), *(f"tokenizer: {name}" for name in words)]
    return Model(found, tuple(targets), heads, words, tuple(notes), tuple(warnings))


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _refuse_dtypes(source: Source, targets: Sequence[Target]) -> None:
    for meta in (source.metas[p.source] for t in targets for p in t.pieces):
        if meta.dtype not in FLOAT_DTYPES:
            raise WeightError(
                f"'{meta.name}': dtype is {meta.dtype}, expected float32, float16 or bfloat16.\n"
                "Convert the full-precision file."
            )


def find_model(request: Request, metas: Mapping[str, TensorMeta]) -> tuple[Found, list[str]]:
    """What the tensors say, or the user, and warnings where they differ.

    Raises:
        FileError: what `detect` raises; where the user names an architecture, only what is known to be no model.
        SpecError: an architecture that is none, or of the other kind of model.
    """
    asked = request.architecture
    if not asked:
        return detect(metas), []
    components = {s.architecture: s.component for s in SIGNATURES}
    if asked not in components:
        raise SpecError(
            f"Unknown architecture '{asked}'.{near(asked, components)}\nArchitectures: {', '.join(sorted(components))}."
        )
    # What stands beside a model in a checkpoint does not tell what an unknown one is.
    found = recognise({n: m for n, m in metas.items() if not OTHER_PARTS.match(n)} or metas)
    if found is None:
        if components[asked] != IMAGE:
            return detect(metas), []  # raises: llama.cpp's names cannot be given to what is not known
        prefix = next((p for p in PREFIXES if p and any(n.startswith(p) for n in metas)), "")
        warning = f"no model that is known by its tensors; taken for {asked} as asked for, in ComfyUI's names"
        return Found(asked, IMAGE, "comfyui", prefix, ("asked for",)), [warning]
    if components[asked] != found.component:
        raise SpecError(
            f"'{asked}' is the architecture of a {components[asked]}, and the file holds a {found.component} "
            f"({found.architecture}).\nLeave the architecture out."
        )
    if asked == found.architecture:
        return found, []
    warning = f"architecture {asked} as asked for, though the tensors are those of {found.architecture}"
    return dataclasses.replace(found, architecture=asked), [warning]


def floats(source: Source) -> tuple[dict[str, TensorMeta], list[str]]:
    """The tensors to convert, and the names of integer buffers (positions, counters), which no loader reads."""
    dropped = [n for n, m in source.metas.items() if not m.dtype.is_floating_point and _is_buffer(n, m.shape)]
    return {n: m for n, m in source.metas.items() if n not in set(dropped)}, dropped


def _is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    return not name.endswith((".weight", ".bias")) and (len(shape) < 2 or name.endswith("_ids"))


def _keys(request: Request, source: Source, model: Model, recipe: Recipe, extra: Sequence[bytes]) -> Iterator[bytes]:
    found = model.found
    yield text("general.architecture", found.architecture)
    yield number("general.quantization_version", QUANTIZATION_VERSION)
    yield number("general.file_type", recipe.file_type)
    if isinstance(source, GgufSource):
        declared = source.strings.get("general.architecture", "")
        held = [renamed_key(key, declared, found.architecture) for key in raw_keys(source.path)]
    else:
        held = general_keys(source.strings)
    yield from held
    names = set(map(key_name, held))
    yield from (key for key in text_keys(found, source, model.heads) if key_name(key) not in names)
    if extra:
        yield from extra
        return
    yield text("quantwire.recipe", recipe.name)
    asked = [*(f"{p} = keep" for p in request.exclude), *map(str, request.rules)]
    if asked:
        yield text("quantwire.rules", "\n".join(asked))


def metadata_strings(source: Source) -> dict[str, str]:
    """`__metadata__` of a safetensors file; of a GGUF source its general keys by the names they have there.

    What tells of the source's own quantized layers is left out: it would be wrong of others.
    """
    known = {"general.name": "modelspec.title", "general.author": "modelspec.author"}
    known |= {"general.license": "modelspec.license", "general.description": "modelspec.description"}
    if isinstance(source, GgufSource):
        kept = {known[k]: v for k, v in source.strings.items() if k in known}
    else:
        kept = {k: v for k, v in source.strings.items() if k not in STALE and k not in source.metas}
    return {"format": "pt", **kept}


def safetensors_layout(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str], words: Mapping[str, bytes]
) -> tuple[bytes, list[Place]]:
    """The header of a safetensors file and the places of its tensors, the largest dtypes first.

    Args:
        words: tensors of bytes, which come last, since their size would misalign what follows.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    starts: dict[str, int] = {}
    at = 0
    for name, kind, shape in sorted(tensors, key=lambda t: -DTYPES[t[1]].itemsize):
        size = nbytes(kind, shape)
        entries[name] = {"dtype": NAMES[DTYPES[kind]], "shape": list(shape), "data_offsets": [at, at + size]}
        starts[name] = at
        at += size
    for name, data in words.items():
        entries[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
        at += len(data)
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-(len(raw) + 8) % 64)
    head = struct.pack("<Q", len(raw)) + raw
    return head, [Place(n, k, s, len(head) + starts[n], nbytes(k, s)) for n, k, s in tensors]


def _check_importance(request: Request, imatrix: Imatrix | None, choices: Sequence[Choice]) -> None:
    """Refuse a matrix of another model."""
    if imatrix is None or request.imatrix is None:
        return
    quantized = [c.target for c in choices if c.kind in TYPES]
    name = request.imatrix.name
    if quantized and not any(imatrix.find(t.name) is not None for t in quantized):
        here, there = quantized[0].name, next(iter(imatrix.entries))
        raise FileError(
            f"{name}: belongs to another model: none of its {len(imatrix.entries)} names (such as '{there}') is one of "
            f"the {len(quantized)} tensors to quantize (such as '{here}').\nRecord one with this model."
        )
    for t in quantized:
        found = imatrix.find(t.name)
        if found is not None and tuple(found.shape) != (t.shape[-1],):
            raise FileError(
                f"{name}: belongs to another model: '{t.name}' has {tuple(found.shape)} values there and "
                f"{t.shape[-1]} columns here."
            )


def _remarks(
    request: Request,
    source: Source,
    found: Found,
    choices: Sequence[Choice],
    importance: set[str] | None,
    imatrix: Imatrix | None,
) -> tuple[list[str], list[str]]:
    """(notes, warnings) of a plan."""
    notes = [f"{found.component} {found.architecture}, {found.layout} layout"]
    warnings: list[str] = []
    upgraded = [c for c in choices if c.change == "upgrade"]
    if upgraded:
        kinds = Counter((c.reason, c.kind) for c in upgraded)
        notes.append("upgrades: " + ", ".join(f"{n} x {why} in {kind}" for (why, kind), n in kinds.items()))
    fallbacks = [c for c in choices if c.change == "fallback"]
    if fallbacks:
        shown = ", ".join(f"{c.target.name} in {c.kind}" for c in fallbacks[:SHOWN])
        more = f" and {len(fallbacks) - SHOWN} more" if len(fallbacks) > SHOWN else ""
        warnings.append(f"{len(fallbacks)} tensors fall back to another type: {shown}{more}: {fallbacks[0].reason}")
    again = [c for c in choices if c.kind in TYPES and _requantized(source, c)]
    if again:
        was = Counter(source.kinds[p.source] for c in again for p in c.target.pieces if p.source in source.kinds)
        warnings.append(
            f"{len(again)} tensors are quantized a second time (from {', '.join(was)}), which adds both errors (the "
            "SQNR is that of the second alone); convert the full-precision file where there is one"
        )
    restored = [c for c in choices if c.kind not in TYPES and any(p.source in source.kinds for p in c.target.pieces)]
    if restored:
        was = Counter(source.kinds[p.source] for c in restored for p in c.target.pieces if p.source in source.kinds)
        notes.append(
            f"{len(restored)} tensors are dequantized (from {', '.join(was)}); what quantizing lost stays lost"
        )
    if importance is not None and imatrix is not None:
        bare = [c.target.name for c in choices if c.kind in TYPES and c.target.name not in importance]
        if bare:
            more = f" and {len(bare) - SHOWN} more" if len(bare) > SHOWN else ""
            warnings.append(f"{len(bare)} tensors have no importance: {', '.join(bare[:SHOWN])}{more}")
        strange = [n for n in imatrix.entries if n not in importance]
        if strange:
            warnings.append(f"{len(strange)} names of the importance matrix are not in the model, such as {strange[0]}")
    rounded = [c for c in choices if " rounded to " in c.reason]
    if rounded:
        first = rounded[0]
        notes.append(f"{len(rounded)} kept tensors are rounded, such as {first.target.name} ({first.reason})")
    long = [c.target.name for c in choices if len(c.target.name.encode()) > 63]
    if long and request.target.suffix.lower() == GGUF:
        notes.append(
            f"{len(long)} names are longer than the 63 bytes that llama.cpp's own tools read, such as {long[0]}; "
            "ComfyUI-GGUF, diffusers and this pack read them"
        )
    return notes, warnings


def _left_out(source: Source, found: Found, targets: Sequence[Target], dropped: Sequence[str]) -> list[str]:
    """Notes on tensors of the source that are not in the new file, without those that `text_warnings` tells of."""
    used = {p.source for t in targets for p in t.pieces}
    told = {*dropped, *vision_tensors(found, source, used)}
    others = [n for n in source.metas if n not in used and n not in told]
    held = tokenizer_tensors(found, source)
    buffers = [n for n in dropped if n not in held]
    notes: list[str] = []
    if others:
        notes.append(f"left out: {len(others)} tensors that are no part of this model, such as {others[0]}")
    if buffers:
        notes.append(f"left out: {len(buffers)} integer buffers, such as {buffers[0]}")
    return notes


COMPONENTS = (
    ("the VAE", re.compile(r"^(first_stage_model|vae)\.")),
    ("text encoders", re.compile(r"^(cond_stage_model|conditioner|text_encoders?)\.")),
)


def _other_components(source: Source, found: Found, targets: Sequence[Target]) -> list[str]:
    """A warning where a checkpoint's other models are not in the new file, which then is no checkpoint."""
    used = {p.source for t in targets for p in t.pieces}
    left = [what for what, names in COMPONENTS if any(names.match(n) for n in source.metas if n not in used)]
    if found.component != IMAGE or not left:
        return []
    return [
        f"only the diffusion model is converted, without {' and '.join(left)}: put the new file into diffusion_models, "
        f"and load {' and '.join(left)} from {source.label} or files of their own"
    ]


def _requantized(source: Source, c: Choice) -> bool:
    return any(source.kinds.get(p.source, c.kind) != c.kind for p in c.target.pieces)


def dry_run(conversion: Conversion) -> str:
    """What becomes of each group of tensors, and the size of the file."""
    rows: dict[tuple[str, str], list[Choice]] = {}
    for c in conversion.choices:
        rows.setdefault((c.kind, c.reason), []).append(c)
    lines = [f"{conversion.request.target.name}: {conversion.recipe.name} of {conversion.source.label}"]
    lines += [f"{'type':8} {'tensors':>7} {'MiB':>9}  why (first of them)"]
    ordered = sorted(rows.items(), key=lambda item: -sum(c.nbytes for c in item[1]))
    for (kind, reason), group in ordered:
        size = sum(c.nbytes for c in group) / MIB
        change = f"{group[0].change}: " if group[0].change in ("upgrade", "fallback") else ""
        lines.append(f"{kind:8} {len(group):7} {size:9.2f}  {change}{reason} ({group[0].target.name})")
    numel = sum(math.prod(c.target.shape) for c in conversion.choices)
    before = sum(source_nbytes(conversion.source, c.target) for c in conversion.choices)
    bits = 8 * sum(c.nbytes for c in conversion.choices) / max(numel, 1)
    lines.append(
        f"total {before / MIB:.2f} -> {conversion.total / MIB:.2f} MiB ({conversion.total} bytes), "
        f"{bits:.2f} bits a weight; nothing was written"
    )
    return "\n".join([*lines, *conversion.notes, *(f"WARNING: {w}" for w in conversion.warnings)])


def dry_run_json(conversion: Conversion) -> dict[str, Any]:
    """The plan as JSON values."""
    tensors = [
        {"name": c.target.name, "type": c.kind, "reason": c.reason, "change": c.change, "nbytes": c.nbytes}
        for c in conversion.choices
    ]
    return {
        "architecture": conversion.found.architecture,
        "type": conversion.recipe.name,
        "nbytes": conversion.total,
        "notes": list(conversion.notes),
        "warnings": list(conversion.warnings),
        "tensors": tensors,
    }


def source_nbytes(source: Source, t: Target) -> int:
    """Bytes of a target's pieces as the source stores them."""
    total = 0.0
    for piece in t.pieces:
        meta = source.metas[piece.source]
        kind = source.kinds.get(piece.source)
        size = meta.nbytes if kind is None else source.sizes.get(piece.source, meta.numel)
        if kind in TYPES:
            size = meta.numel // TYPES[kind].block * TYPES[kind].nbytes
        rows = meta.shape[0] if meta.shape else 1
        total += size * piece.rows(rows) / max(rows, 1)
    return int(total)
