"""What is wrong between the tensors of a file, beyond what each scheme says of its own layers."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from .architectures import OTHER_PARTS, PREFIXES, known_model
from .edits import Edit, Form
from .faults import Fault
from .fixes import MARKER, is_exact_in_f32, relocated
from .model_file import ModelFile
from .safetensors_header import Header
from .schemes.own import KEY
from .schemes.scan import Scan
from .schemes.scan import scan as scan_file
from .schemes.unclaimed import ID as UNCLAIMED

Found = tuple[Fault, str, tuple[str, Edit] | None]

CHECKPOINT = "model.diffusion_model."
# Tensors that mean nothing without the weight of their layer.
COMPANIONS = (
    *("weight_scale", "weight_scale_2", "weight_scale_inv", "input_scale", "pre_quant_scale", "comfy_quant"),
    *("scale_weight", "scale_input", "weight_s_rel", "weight_s_channel", "weight_codebook", "SCB", "weight_format"),
)
_ORPHAN = "Loaders pass over it; if the layer has lost its weight, they fail or leave it as it was initialized."
_CODES = ("U8", "I8", "F8_E4M3", "F8_E5M2")
_CAST = "ComfyUI casts it to F32 when it loads it."
_TAKES = "ComfyUI's kernels take it as it is."
_PARTS = "Loaders stop with an error about missing keys, or leave what is missing as it was initialized."


def misplaced(file: ModelFile, scan: Scan) -> Iterator[Found]:
    """Scales and the like whose weight stands under another prefix, or nowhere."""
    found: list[tuple[str, list[str], str | None, dict[str, str]]] = []
    for module, lasts in file.groups.items():
        if "weight" in lasts or f"{module}.weight" in scan.layers:
            continue
        lost = [last for last in lasts if last in COMPANIONS and f"{module}.{last}" not in scan.owner]
        if lost:
            place = relocated(file, module, "weight")
            found.append((module, lost, place, {f"{module}.{last}": f"{place}.{last}" for last in lost}))
    after = _moved(file, found)
    for module, lost, place, rename in found:
        if place is not None and after is not None and _sound(after, place, rename):
            text = f"'{module}.{lost[0]}' belongs to '{place}.weight', which has another prefix."
            effect = "Loaders do not bring them together: the packed values pass for the weight, an error or noise."
            fault = Fault("prefix-mismatch", module, text, effect)
            yield fault, "error", ("its tensors get the prefix of the weight", Edit(rename=rename))
        else:
            text = f"'{module}.{lost[0]}' is there without '{module}.weight'."
            yield Fault("scale-without-weight", module, text, _ORPHAN), "warning", None


def _moved(file: ModelFile, found: list[tuple[str, list[str], str | None, dict[str, str]]]) -> Scan | None:
    """The file as it would be with all those names that could be meant; None where there are none."""
    names: dict[str, str] = {}
    for *_, place, rename in found:
        coded = place is not None and file.entries[f"{place}.weight"].dtype in _CODES
        if coded and not any(name in file.entries for name in rename.values()):
            names |= rename
    if not names:
        return None
    entries = {names.get(n, n): dataclasses.replace(e, name=names.get(n, n)) for n, e in file.entries.items()}
    return scan_file(dataclasses.replace(file, entries=entries)) if len(entries) == len(file.entries) else None


def _sound(after: Scan, place: str, rename: Mapping[str, str]) -> bool:
    """Whether the tensors make a layer together."""
    layer = after.layers.get(f"{place}.weight")
    return (
        layer is not None and bool(layer.format_id) and all(after.owner.get(n) == layer.name for n in rename.values())
    )


def scale_forms(file: ModelFile, scan: Scan) -> Iterator[Found]:
    """Scales of ComfyUI's formats in another dtype, or with another number of dimensions, than it writes them."""
    for layer in scan.layers.values():
        if layer.scheme != "comfy" or not layer.format_id:
            continue
        for role, name in layer.tensors.items():
            entry = file.entries[name]
            if entry.dtype not in ("F16", "BF16", "F32", "F64") or role == "pre_quant_scale":
                continue
            shape = () if entry.numel == 1 and len(entry.shape) == 1 else entry.shape
            if role == "s_channel" and entry.dtype != "F32":
                continue  # of which the scheme says that ComfyUI does not take it
            if entry.dtype != "F32":
                text = f"'{name}' is {entry.dtype}, expected F32."
                fix = "the scale becomes F32", Edit(form={name: Form("F32", shape)})
                if entry.dtype == "F64" and not (entry.numel == 1 and is_exact_in_f32(file.small(name))):
                    fix = None
                effect = _TAKES if layer.type in ("int8_tensorwise", "convrot_w4a4", "asym_w4a8_int8") else _CAST
                yield Fault("scale-dtype", name, text, effect, fatal=False), "note", fix
            elif shape != entry.shape:
                text = f"'{name}' has shape {list(entry.shape)}, expected a scalar."
                fix = "the scale becomes a scalar", Edit(form={name: Form("F32", shape)})
                yield Fault("scale-dimensions", name, text, "ComfyUI takes it.", fatal=False), "note", fix


def mixture(scan: Scan) -> Iterator[Found]:
    """More than one way of quantizing in one file."""
    counts = Counter(layer.scheme for layer in scan.layers.values() if layer.scheme != UNCLAIMED)
    if len(counts) > 1:
        titles = {layer.scheme: scan.scheme(layer).title for layer in scan.layers.values()}
        text = "the file mixes " + ", ".join(f"{titles[s]} ({n} layers)" for s, n in counts.most_common()) + "."
        yield (
            Fault("mixed-schemes", "", text, "Each loader takes its own and misreads the others.", False),
            "note",
            None,
        )


def half_prefixed(scan: Scan) -> Iterator[Found]:
    """A model of which some tensors have a prefix and others have none, so that neither part is a model."""
    shapes = {name: _Shape(shape) for name, shape in scan.shapes.items()}
    if not shapes or known_model(shapes) is not None:
        return
    for prefix in filter(None, PREFIXES):
        with_it = [name for name in shapes if name.startswith(prefix)]
        without = [name for name in shapes if not name.startswith(prefix) and not OTHER_PARTS.match(name)]
        together = {name.removeprefix(prefix): shapes[name] for name in (*with_it, *without)}
        if not with_it or not without or len(together) < len(with_it) + len(without):
            continue
        if known_model(together) is not None:
            text = (
                f"{len(with_it)} tensors stand behind '{prefix}', such as '{with_it[0]}', and {len(without)} of the "
                f"same model do not, such as '{without[0]}'."
            )
            effect = "Loaders take the tensors behind the prefix alone, in which they find no model or half of one."
            yield Fault("prefix-mixed", "", text, effect), "error", None
            return


class _Shape(NamedTuple):
    shape: tuple[int, ...]


def metadata_format(file: ModelFile, headers: tuple[Header, ...]) -> Iterator[Found]:
    """`format` in the metadata, which tells for what framework a file is; files of this pack are for no other."""
    if KEY not in file.metadata and any(h.metadata is not None and "format" not in h.metadata for h in headers):
        text = "the metadata have no 'format'."
        effect = "transformers before 5 and accelerate refuse the file; diffusers and ComfyUI do not look at it."
        fix = 'the metadata get {"format": "pt"}', Edit(metadata={"format": "pt"})
        yield Fault("metadata-format", "", text, effect, fatal=False), "note", fix


def marker_place(file: ModelFile) -> Iterator[Found]:
    """A marker of scaled fp8 at the root, and layers as a checkpoint has them."""
    layers = [name for name, lasts in file.groups.items() if "scale_weight" in lasts]
    behind = [name for name in layers if name.startswith(CHECKPOINT)]
    if MARKER in file.entries and behind and f"{CHECKPOINT}{MARKER}" not in file.entries:
        text = f"'{MARKER}' stands at the root, and {len(behind)} layers behind '{CHECKPOINT}', such as '{behind[0]}'."
        effect = "UNETLoader finds it; CheckpointLoaderSimple uses the fp8 values without their scales: noise."
        fix = None
        if len(behind) == len(layers):
            fix = f"it becomes '{CHECKPOINT}{MARKER}'", Edit(rename={MARKER: CHECKPOINT + MARKER})
        yield Fault("marker-prefix", MARKER, text, effect, False, ("CheckpointLoaderSimple",)), "warning", fix


def parts(file: ModelFile, headers: tuple[Header, ...]) -> Iterator[Found]:
    """Files of a model that do not go together with their index."""
    located = file.located
    if located.index is None:
        return
    if not located.where:
        text = f"'{located.index.name}' names no tensors."
        yield Fault("index-empty", "", text, _PARTS), "error", None
    for name, part in located.where.items():
        if name not in file.entries:
            text = f"'{name}' is to be in '{part}', which does not hold it."
            yield Fault("index-missing-tensor", name, text, _PARTS), "error", None
    first: dict[str, str] = {}
    for path, header in zip(located.files, headers, strict=True):
        for name in header.entries:
            other = first.setdefault(name, path.name)
            if other != path.name:
                text = f"'{name}' stands in '{other}' and in '{path.name}'."
                effect = "Loaders take one of the two, and not all of them the same one."
                yield Fault("index-duplicate", name, text, effect), "error", None
