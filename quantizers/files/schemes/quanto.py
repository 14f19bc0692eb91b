"""optimum-quanto: the state dict of frozen `QLinear` layers.

    X.weight._data           int8 or float8, (N, K)       X.weight._scale   (N, 1), of a single row a scalar
    X.weight._data._data     uint8, (ceil(G / P), group)  X.weight._scale, X.weight._shift   (G, 1)
    X.input_scale, X.output_scale   scalars, 1 without calibrated activations

P codes stand in a byte, 2 of qint4 and 4 of qint2; G = N * K / group. quanto's own folders name the type of each module
in `quanto_qmap.json`, diffusers' in `config.json`; a single file names none, and then dtypes and shapes tell. Scales
have the dtype that the weight had. Repacked weights (TinyGemm, Marlin, AWQ) are saved in the plain packing.

4- and 2-bit weights do not tell their rows from their groups: N is that of the bias, or of the shapes that this pack
writes into a file's metadata; without either, only rows of one group each are certain.

Source: optimum/quanto/nn/qmodule.py, tensor/weights/qbits.py and tensor/packed.py at 0.2.7.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from ..model_file import ModelFile
from .base import Fault, Layer
from .broken import FLOATS, Broken, attempt, need
from .configs import as_object, quantization_config

if TYPE_CHECKING:
    from ...weight import QuantizedWeight
    from .base import Read

QMAP = "quanto_qmap.json"
BYTES = {"I8": "qint8", "F8_E4M3": "qfloat8_e4m3fn", "F8_E5M2": "qfloat8_e5m2"}
BITS = {"qint4": 4, "qint2": 2}
# The library's other names, and those of diffusers' QuantoConfig.
WORDS = {"qfloat8": "qfloat8_e4m3fn", "float8": "qfloat8_e4m3fn", "int8": "qint8", "int4": "qint4", "int2": "qint2"}
SMALLEST_GROUP = 32  # quanto's groups of long rows are multiples of it; a row that it does not divide is one group
CALIBRATION = ("input_scale", "output_scale")
_FAILS = "quanto's loaders stop with an error about missing keys."
_NOISE = "quanto reads other numbers, or stops with an error about shapes."
_INSTEAD = "Use the full-precision model, or a file of 8-bit weights."


class QuantoScheme:
    id = "quanto"
    title = "optimum-quanto"
    library = "optimum-quanto"

    def find(self, file: ModelFile) -> Iterable[Layer | Fault]:
        qmap = _qmap(file)
        named = _types(file, qmap)
        seen: set[str] = set()
        for group, lasts in file.groups.items():
            if group.endswith("._data") and "_data" in lasts:
                name = group.removesuffix("._data")
            elif group.endswith("weight") and not {"_data", "_shift", "_scale"}.isdisjoint(lasts):
                name = group
            else:
                continue
            if name not in seen:
                seen.add(name)
                module = name.rpartition(".")[0]
                told = _shape(qmap.get(module, {}).get("shape"))
                yield from _layer(file, name, named.get(module, named.get("", "")), told)
        if named:
            yield from _unquantized(file, named)

    def weight(self, layer: Layer, read: Read) -> QuantizedWeight:
        from ...weight import QuantizedWeight
        from ..quantized_file import DTYPES

        n, k = layer.shape
        tensors = {"qdata": read(layer.tensors["qdata"]), "scale": read(layer.tensors["scale"])}
        meta: dict[str, Any] = {}
        if "shift" in layer.tensors:
            tensors["shift"] = read(layer.tensors["shift"])
            group = int(layer.options["group_size"])
            meta["group_size"] = None if group == k else group
        else:
            tensors["scale"] = tensors["scale"].reshape(-1, 1).expand(n, 1).contiguous()
        return QuantizedWeight(layer.format_id, tensors, layer.shape, DTYPES[layer.dtype], meta)


def _qmap(file: ModelFile) -> dict[str, dict[str, Any]]:
    """Module -> what the folder's map or the file's own says of it."""
    found: dict[str, dict[str, Any]] = {}
    for place in (as_object(file.metadata.get(QMAP)), file.configs.get(QMAP, {})):
        for module, entry in cast("Mapping[str, object]", place).items():
            if isinstance(entry, dict):
                found[module] = found.get(module, {}) | cast("dict[str, Any]", entry)
    return found


def _types(file: ModelFile, qmap: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Module -> type, as the folder says; of all modules under the empty name."""
    words = {module: entry.get("weights") for module, entry in qmap.items()}
    found = {
        module: WORDS.get(word, word) for module, word in words.items() if isinstance(word, str) and word != "none"
    }
    config = quantization_config(file, "quanto")
    word = config.get("weights_dtype", config.get("weights"))
    if isinstance(word, str):
        found[""] = WORDS.get(word, word)
    return found


def _shape(told: object) -> tuple[int, int] | None:
    sizes = cast("list[object]", told) if isinstance(told, list) else []
    whole = [size for size in sizes if type(size) is int and size > 0]
    return (whole[0], whole[1]) if len(whole) == len(sizes) == 2 else None


def _unquantized(file: ModelFile, named: Mapping[str, str]) -> Iterator[Fault]:
    """Modules that the folder calls quantized and whose weights are not."""
    for module, kind in named.items():
        name = f"{module}.weight"
        if module and file.has(name, *FLOATS):
            text = f"{QMAP} says that '{module}' is {kind}, but '{name}' is {file.entries[name].dtype}."
            yield Fault("config-contradicts", name, text, _FAILS, fatal=False)


def _layer(file: ModelFile, name: str, named: str, told: tuple[int, int] | None) -> Iterator[Layer | Fault]:
    """
    Args:
        named: the type that the folder names; empty where it names none.
        told: (N, K) where the map has it.
    """
    packed = f"{name}._data._data" in file.entries or f"{name}._shift" in file.entries
    parts = {"qdata": f"{name}._data._data" if packed else f"{name}._data", "scale": f"{name}._scale"}
    if packed:
        parts["shift"] = f"{name}._shift"
    module = name.removesuffix("weight")
    parts |= {role: module + role for role in CALIBRATION if module + role in file.entries}
    there = {role: part for role, part in parts.items() if part in file.entries}
    kind = named or ("qint4 or qint2" if packed else "8-bit")
    shape = file.entries[next(iter(there.values()))].shape
    layer = Layer(name, QuantoScheme.id, kind, "", there, shape)

    def make() -> Layer:
        for part in parts.values():
            need(file, part, _FAILS)
        need(file, parts["scale"], _NOISE, *FLOATS)
        return _packed(file, layer, named, told) if packed else _bytes(file, layer, named)

    yield from attempt(make, name, QuantoScheme.id, kind, there, shape)


def _bytes(file: ModelFile, layer: Layer, named: str) -> Layer:
    """An 8-bit weight, whose dtype is its type."""
    qdata, scale = file.entries[layer.tensors["qdata"]], file.entries[layer.tensors["scale"]]
    kind = BYTES[need(file, qdata.name, _NOISE, *BYTES).dtype]
    rows = qdata.shape[0] if qdata.shape else 1
    if scale.numel not in (1, rows):
        text = f"'{scale.name}' has shape {list(scale.shape)}, expected ({rows}, 1), one scale a row."
        raise Broken("scale-shape", scale.name, text, _NOISE)
    if named and named != kind:
        raise _contradiction(layer.name, named, f"{qdata.dtype} values, which are {kind}")
    found = dataclasses.replace(layer, type=kind, shape=qdata.shape, dtype=scale.dtype)
    if len(qdata.shape) != 2:
        return _refused(found, f"a weight of shape {list(qdata.shape)}, and only those of linear layers are loaded")
    return dataclasses.replace(found, format_id="quanto-" + kind.replace("_", "-"))


def _packed(file: ModelFile, layer: Layer, named: str, told: tuple[int, int] | None) -> Layer:
    """A 4- or 2-bit weight."""
    qdata = need(file, layer.tensors["qdata"], _NOISE, "U8")
    scale, shift = file.entries[layer.tensors["scale"]], file.entries[layer.tensors["shift"]]
    if shift.shape != scale.shape or shift.dtype != scale.dtype:
        text = (
            f"'{shift.name}' is {shift.dtype} {list(shift.shape)}, and the scales are {scale.dtype} "
            f"{list(scale.shape)}; expected the same."
        )
        raise Broken("shift-shape", shift.name, text, _NOISE)
    options = {"group_size": qdata.shape[-1] if qdata.shape else 0}
    found = dataclasses.replace(layer, shape=qdata.shape, dtype=scale.dtype, options=options)
    if len(qdata.shape) < 2:
        text = f"'{qdata.name}' has shape {list(qdata.shape)}, expected rows of bytes, one column a value of a group."
        raise Broken("weight-size", qdata.name, text, _NOISE)
    if len(qdata.shape) != 2:
        return _refused(found, f"bytes of shape {list(qdata.shape)}, and only weights of linear layers are loaded")
    (rows, group), groups = qdata.shape, scale.shape[0] if scale.shape else 1
    if groups == 1 and scale.numel == group > 1:
        return _refused(found, "a single group, for which quanto stores one scale a value, and no format here does")
    kinds = [kind for kind, bits in BITS.items() if rows == math.ceil(groups * bits / 8)]
    if scale.numel != groups or not kinds or not group:
        text = (
            f"'{scale.name}' has shape {list(scale.shape)}, and the bytes {list(qdata.shape)} need (G, 1) with G = "
            f"{2 * rows - 1} or {2 * rows} for qint4, {4 * rows - 3} to {4 * rows} for qint2."
        )
        raise Broken("scale-shape", scale.name, text, _NOISE)
    if named and named not in kinds:
        raise _contradiction(layer.name, named, f"{rows} rows of bytes for {groups} groups, which is {kinds[0]}")
    if told is not None and (told[0] * told[1] != groups * group or told[1] % group):
        raise _contradiction(layer.name, f"of shape {list(told)}", f"{groups} groups of {group}")
    kind = named or (kinds[0] if len(kinds) == 1 else "")
    return _with_rows(found, kind, groups, group, told[0] if told else _rows(file, layer, groups, group))


def _rows(file: ModelFile, layer: Layer, groups: int, group: int) -> int | str:
    """N, or why it is not known."""
    bias = file.entries.get(layer.name.removesuffix("weight") + "bias")
    if bias is None:
        return "has no bias" if group % SMALLEST_GROUP == 0 else groups
    if len(bias.shape) == 1 and bias.shape[0] and groups % bias.shape[0] == 0:
        return bias.shape[0]
    return f"has a bias of shape {list(bias.shape)}, which does not fit"


def _with_rows(layer: Layer, kind: str, groups: int, group: int, n: int | str) -> Layer:
    """
    Args:
        kind: empty where it may be either.
    """
    if isinstance(n, str):
        return _refused(layer, f"{groups} groups of {group} that are not told apart into rows: the layer {n}")
    k = groups // n * group
    if not kind:
        what = f"{groups} groups, which fill as many bytes in qint4 as in qint2; no {QMAP} tells which"
        return _refused(dataclasses.replace(layer, shape=(n, k)), what)
    shown = kind if k == group else f"{kind}, groups of {group}"
    return dataclasses.replace(layer, type=shown, format_id=f"quanto-{kind}", shape=(n, k))


def _refused(layer: Layer, what: str) -> Layer:
    return dataclasses.replace(layer, why=f"{what}.\n{_INSTEAD}")


def _contradiction(name: str, named: str, got: str) -> Broken:
    effect = "Loaders that go by the folder stop with an error, or read other numbers."
    return Broken("config-contradicts", name, f"the folder says that '{name}' is {named}, but it holds {got}.", effect)
