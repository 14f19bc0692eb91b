"""SDNQ: `X.weight` with its neighbours `X.scale`, `X.zero_point`, `X.svd_up` and `X.svd_down`, as sdnq saves models.

The tensors do not tell the type: 4-bit and 5-bit values are bytes alike, and a Hadamard rotation leaves no trace. So a
layer is loaded only with the settings, `quantization_config` (quant_method `sdnq`) of the folder or of the metadata.
They name the type of the model and, by patterns of names, of single modules. Shapes:

    8 and 16 bits    (N, K), in groups (N, G, K/G), prepared for the quantized product (K, N)
    other widths     packed over all values: bytes up to 7 bits, 16-bit words above 8; one dimension
    scale            float32 (or the model's dtype), (N, 1), (N, G, 1), (1, N) for the product, (1, 1) for the tensor

What the library's dequantizer has to know of a weight is asked of the library itself, from the shape and the settings
alone, when the weight is read.

Source: sdnq/quantizer.py, utils.py and loader.py at 0.2.8.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from ...errors import FileError
from ..model_file import ModelFile
from .base import Fault, Layer
from .broken import FLOATS, Broken, attempt, need
from .configs import quantization_config

if TYPE_CHECKING:
    from torch import Tensor

    from ...weight import QuantizedWeight
    from .base import Read

# Types that are stored as they are; every other one is packed.
NATIVE = {
    **{"int8": "I8", "uint8": "U8", "int16": "I16", "uint16": "U16", "float16": "F16", "bfloat16": "BF16"},
    **{"float8-e4m3fn": "F8_E4M3", "float8-e5m2": "F8_E5M2"},
    **{"float8-e4m3fnuz": "F8_E4M3FNUZ", "float8-e5m2fnuz": "F8_E5M2FNUZ"},
}
STORAGE = ("I8", "U8", "I16", "U16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
FP8 = ("F8_E4M3", "F8_E5M2")
SVD = {"svd_up", "svd_down"}
PARTS = ("scale", "scale_2", "scale_zero_point", "zero_point", "zero_point_scale", "zero_point_2", "svd_up", "svd_down")
# Settings that the library's quantizer takes of a weight, and their defaults.
SETTINGS: Mapping[str, object] = {
    **{"weights_dtype": "int8", "quantized_matmul_dtype": None, "group_size": 0, "hadamard_group_size": 256},
    **{"svd_rank": 32, "svd_steps": 8, "use_svd": False, "use_hadamard": False, "use_quantized_matmul": False},
    **{"dequantize_fp32": True},
}
# The settings whose default is no value of their own kind are names.
_KINDS = {k: str if default is None else type(default) for k, default in SETTINGS.items()}
_FAILS = "sdnq stops with an error about missing keys or shapes."
_NOISE = "sdnq stops with an error, or computes with other numbers."
_INSTEAD = "Load it with sdnq itself, or quantize the full-precision model anew."


class SdnqScheme:
    id = "sdnq"
    title = "SDNQ"
    library = "sdnq"

    def find(self, file: ModelFile) -> Iterable[Layer | Fault]:
        config = quantization_config(file, "sdnq")
        rules = _Rules(config)
        for module, lasts in file.groups.items():
            dot = f"{module}." if module else ""
            weight, scale = file.entries.get(f"{dot}weight"), "scale" in lasts
            if not config and weight is not None and weight.dtype in FP8 and SVD.isdisjoint(lasts):
                continue  # others put a `scale` beside fp8 weights too
            if weight is not None and (scale or config) and (weight.dtype in STORAGE or (scale and config)):
                yield from _layer(file, dot, config, rules)
            elif module in file.metadata:  # a layer of the pack's own layout
                continue
            elif weight is None and scale and "qdata" not in lasts and _is_scale(file, f"{dot}scale", lasts, config):
                text = f"'{dot}weight' is missing, but its scales '{dot}scale' are there."
                yield Fault("weight-missing", f"{dot}weight", text, _FAILS)

    def weight(self, layer: Layer, read: Read) -> QuantizedWeight:
        from ...backends.sdnq.library import library, to_meta
        from ...weight import QuantizedWeight
        from ..quantized_file import DTYPES

        n, k = layer.shape
        tensors = {role: read(name) for role, name in layer.tensors.items()}
        for role in ("scale", "zero_point"):
            if role in tensors and tensors[role].numel() == 1 and n > 1:  # one for all rows
                tensors[role] = tensors[role].reshape(1, 1).expand(n, 1).contiguous()
        settings = dict(layer.options)
        dequantizer = _dequantizer(n, k, json.dumps(settings, sort_keys=True), layer.dtype)
        meta = to_meta(dequantizer) | {"quantized_matmul": bool(settings["use_quantized_matmul"])}
        _check(layer, tensors, meta)
        if dequantizer.use_quantized_matmul and not dequantizer.re_quantize_for_matmul:
            prepare = library().quant_utils.prepare_weight_for_matmul
            tensors["qdata"] = prepare(tensors["qdata"], matmul_dtype=dequantizer.quantized_matmul_dtype)
        return QuantizedWeight(layer.format_id, tensors, layer.shape, DTYPES[layer.dtype], meta)


def _is_scale(file: ModelFile, name: str, lasts: tuple[str, ...], config: Mapping[str, Any]) -> bool:
    """Whether a `scale` without a weight is of codes, and not a norm's, which is a vector."""
    return "svd_up" in lasts or "zero_point" in lasts or (bool(config) and len(file.entries[name].shape) > 1)


@functools.lru_cache(maxsize=256)  # a model has few shapes and many layers
def _dequantizer(n: int, k: int, settings: str, dtype: str) -> Any:
    """The library's description of a weight of that shape, by its own rules, made without values."""
    import torch

    from ...backends.sdnq.library import library
    from ..quantized_file import DTYPES

    arguments: dict[str, Any] = json.loads(settings)
    use_svd = arguments.pop("use_svd")
    if arguments["group_size"] == -2:
        arguments["group_size"] = -1  # the one scale is repeated for every row
    found, _ = library().quantizer.sdnq_quantize_layer_weight(
        torch.empty(n, k, device="meta", dtype=DTYPES[dtype]),
        layer_class_name="Linear",
        using_pre_calculated_svd=use_svd,
        **arguments,
    )
    return found


def _check(layer: Layer, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Raises:
    FileError: the tensors are not as the library makes them with these settings.
    """
    shapes = {"scale": meta["quantized_scale_shape"], "zero_point": meta["quantized_zero_point_shape"]}
    if layer.format_id.removeprefix("sdnq-") in NATIVE:
        shapes["qdata"] = meta["quantized_weight_shape"]
    for role, expected in shapes.items():
        got = list(tensors[role].shape) if role in tensors else None
        if got != expected:
            raise FileError(
                f"'{layer.tensors.get(role, layer.name)}' has shape {got}, and sdnq's settings for {layer.type} make "
                f"it {expected}.\nThe file and its quantization_config do not belong together; get both again."
            )


def _layer(file: ModelFile, dot: str, config: Mapping[str, Any], rules: _Rules) -> Iterator[Layer | Fault]:
    """
    Args:
        dot: name of the module with its dot.
        config: empty where there is none.
    """
    name = f"{dot}weight"
    tensors = {"qdata": name} | {part: f"{dot}{part}" for part in PARTS if f"{dot}{part}" in file.entries}
    settings = rules.of(name)
    kind = str(settings["weights_dtype"]) if config else "type unknown"
    shape = file.entries[name].shape
    layer = Layer(name, SdnqScheme.id, kind, "", tensors, shape, _dtype(file, dot, tensors))

    def make() -> Layer:
        need(file, f"{dot}scale", _FAILS)
        if not config:
            return _refused(layer, "sdnq's type is only in its quantization_config, and this file has none")
        return _typed(file, layer, config, settings)

    yield from attempt(make, name, SdnqScheme.id, kind, tensors, shape)


def _typed(file: ModelFile, layer: Layer, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Layer:
    """The layer with its format, where there is one."""
    from ...formats.sdnq import SHORT_NAMES  # few files need the table of formats
    from ...registry import is_format

    for key, default in SETTINGS.items():
        value: object = settings[key]
        if type(value) not in (_KINDS[key], type(default)):
            text = f"the settings of '{layer.name}' have {key} = {value!r}, expected {_KINDS[key].__name__}."
            raise Broken("config-value", layer.name, text, _FAILS)
    word = layer.type.lower()
    word = SHORT_NAMES.get(word, word.replace("_", "-"))
    unread = [part for part in PARTS if part in layer.tensors and ("scale_" in part or "point_" in part)]
    if config.get("use_codebook"):
        return _refused(layer, f"{layer.type} with a codebook of its own for each row or group")
    if unread or any(config.get(key) not in (None, "none") for key in ("scale_dtype", "zero_point_dtype")):
        return _refused(layer, "its scales are quantized too (scale_dtype)")
    if not is_format(f"sdnq-{word}"):
        return _refused(layer, f"sdnq's type {layer.type}, which has no format here")
    shape = _shape(file, layer, word)
    for role in ("scale", "zero_point"):
        if role in layer.tensors:
            need(file, layer.tensors[role], _NOISE, *FLOATS)
    _check_parts(layer, word)
    found = dataclasses.replace(layer, shape=shape, options=dict(settings))
    if len(shape) != 2:
        return _refused(found, f"a weight of shape {list(shape)}, and only those of linear layers are loaded")
    return dataclasses.replace(found, format_id=f"sdnq-{word}", type=_shown(layer.type, settings))


def _shown(kind: str, settings: Mapping[str, Any]) -> str:
    words = {"use_svd": "SVD", "use_hadamard": "Hadamard", "use_quantized_matmul": "quantized matmul"}
    used = [word for key, word in words.items() if settings[key]]
    return f"{kind} with {' and '.join(used)}" if used else kind


def _check_parts(layer: Layer, word: str) -> None:
    """Raises:
    Broken: the type has a zero point and the layer has none, or the reverse.
    """
    unsigned = word.startswith("uint") or word.endswith("fnu")
    name = layer.name.removesuffix("weight") + "zero_point"
    if unsigned and "zero_point" not in layer.tensors:
        raise Broken("tensor-missing", name, f"'{name}' is missing, which {layer.type} needs.", _FAILS)
    if not unsigned and "zero_point" in layer.tensors:
        text = f"the settings say that '{layer.name}' is {layer.type}, which has no zero point, but '{name}' is there."
        raise Broken("config-contradicts", name, text, _NOISE)
    if ("svd_up" in layer.tensors) != ("svd_down" in layer.tensors):
        there, other = ("svd_up", "svd_down") if "svd_up" in layer.tensors else ("svd_down", "svd_up")
        name = layer.name.removesuffix("weight") + other
        raise Broken("tensor-missing", name, f"'{name}' is missing, but '{layer.tensors[there]}' is there.", _FAILS)


def _shape(file: ModelFile, layer: Layer, word: str) -> tuple[int, ...]:
    """Of the weight that was quantized; four or more dimensions are a convolution.

    Raises:
        Broken: dtype or shapes contradict the type.
    """
    from ...formats.sdnq import bits_of

    weight, scale = file.entries[layer.name], file.entries[layer.tensors["scale"]]
    bits = bits_of(word)
    wanted = NATIVE.get(word, "U8" if bits <= 8 else "I16")
    if weight.dtype != wanted:
        text = f"the settings say that '{layer.name}' is {layer.type}, stored as {wanted}, but it is {weight.dtype}."
        raise Broken("config-contradicts", layer.name, text, _NOISE)
    if len(scale.shape) > 3:
        return weight.shape if len(weight.shape) > 1 else scale.shape
    if word in NATIVE:
        return _native_shape(layer, weight.shape, scale.shape)
    if len(scale.shape) == 1 and scale.numel > 1:
        text = f"'{scale.name}' has shape {list(scale.shape)}, expected (N, 1) or (N, groups, 1)."
        raise Broken("scale-shape", scale.name, text, _NOISE)
    rows = scale.shape[0] if len(scale.shape) > 1 and scale.numel > 1 else _rows(file, layer)
    values, rest = divmod(weight.nbytes * 8, bits)
    groups = scale.numel // rows if rows else 1
    if not rows or rest or values % rows or not values or (groups and values // rows % groups):
        text = (
            f"'{layer.name}' holds {weight.nbytes} bytes, which are no whole rows of {layer.type} for scales "
            f"'{scale.name}' of shape {list(scale.shape)}."
        )
        raise Broken("scale-shape", scale.name, text, _NOISE)
    zero_point = file.entries.get(layer.tensors.get("zero_point", ""))
    if zero_point is not None and zero_point.numel != scale.numel:
        text = f"'{zero_point.name}' has {zero_point.numel} values, and the scales have {scale.numel}."
        raise Broken("zero-point-shape", zero_point.name, text, _NOISE)
    return rows, values // rows


def _native_shape(layer: Layer, weight: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...]:
    if len(weight) == 3 and scale == (*weight[:2], 1):
        return weight[0], weight[1] * weight[2]
    if len(weight) == 2 and scale in ((weight[0], 1), (1, 1), ()):
        return weight
    if len(weight) == 2 and scale == (1, weight[1]):  # made for the quantized product
        return weight[1], weight[0]
    text = f"'{layer.tensors['scale']}' has shape {list(scale)}, expected one scale a row or group of {list(weight)}."
    raise Broken("scale-shape", layer.tensors["scale"], text, _NOISE)


def _rows(file: ModelFile, layer: Layer) -> int:
    """N of a packed weight with one scale for all of it."""
    bias = file.entries.get(layer.name.removesuffix("weight") + "bias")
    if bias is not None and len(bias.shape) == 1:
        return bias.shape[0]
    scale = layer.tensors["scale"]
    text = f"'{layer.name}' has one scale for all values and no bias, so its rows are not known."
    raise Broken("shape-unknown", scale, text, "sdnq itself knows the shape from the model's class.")


def _refused(layer: Layer, what: str) -> Layer:
    return dataclasses.replace(layer, why=f"{what}.\n{_INSTEAD}")


def _dtype(file: ModelFile, dot: str, tensors: Mapping[str, str]) -> str:
    """Of the weight before: SVD factors and shortened scales have it, and usually the bias."""
    for name in (tensors.get("svd_up"), tensors.get("scale"), f"{dot}bias"):
        entry = file.entries.get(name or "")
        if entry is not None and (entry.dtype in ("F16", "BF16") or (name == tensors.get("svd_up"))):
            return entry.dtype if entry.dtype in FLOATS else "BF16"
    bias = file.entries.get(f"{dot}bias")
    return bias.dtype if bias is not None and bias.dtype in FLOATS else "BF16"


class _Patterns:
    """Names of modules as sdnq's settings give them.

    A pattern means a weight if it is its whole name or a part of that between dots, if it is `.` and a beginning, or
    if it has `*`, and then it need not reach the end. The first one counts. Models have as many patterns as layers
    where every layer has settings of its own, so those without signs are looked up.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._plain: dict[str, int] = {}
        self._signs: list[tuple[int, str]] = []
        for i, pattern in enumerate(patterns):
            if pattern.startswith(".") or "*" in pattern:
                self._signs.append((i, pattern))
            self._plain.setdefault(pattern, i)

    def first(self, name: str) -> int | None:
        """The place of the first pattern that means this weight."""
        words = (name, *name.split("."))
        found = [self._plain[word] for word in words if word in self._plain]
        found += [i for i, pattern in self._signs if _means(pattern, name)]
        return min(found, default=None)


def _means(pattern: str, name: str) -> bool:
    if pattern.startswith("."):
        return name.startswith(pattern[1:])
    return fnmatch.fnmatchcase(name, f"{pattern}*")


class _Rules:
    """What the settings say of each weight, by the library's order of precedence."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._common = {key: config.get(key, default) for key, default in SETTINGS.items()}
        modules = _object(config.get("modules_quant_config"))
        self._modules, self._own = _Patterns(modules), [_object(own) for own in modules.values()]
        types = _object(config.get("modules_dtype_dict"))
        self._types = [(word.lower(), _Patterns(_strings(names))) for word, names in types.items()]
        self._without = _Patterns(_strings(config.get("modules_to_not_use_matmul")))

    def of(self, name: str) -> dict[str, Any]:
        found = dict(self._common)
        place = self._modules.first(name)
        if place is not None:
            found |= {key: value for key, value in self._own[place].items() if key in SETTINGS}
        word = next((word for word, patterns in self._types if patterns.first(name) is not None), None)
        if word is not None:
            found["weights_dtype"] = _at_least(str(found["weights_dtype"]), word)
        if self._without.first(name) is not None:
            found["use_quantized_matmul"] = False
        return found


def _at_least(kind: str, word: str) -> str:
    """A type of `modules_dtype_dict`: one by name, or `minimum_6bit` for those that are narrower."""
    if not (word.startswith("minimum") or word.endswith(("bit", "bits"))):
        return word
    digits = "".join(c for c in word if c.isdigit())
    known = "".join(c for c in kind.partition("_")[0] if c.isdigit())
    if not digits or not known or int(known) >= int(digits):
        return kind
    return f"uint{digits}" if "uint" in word or int(digits) <= 4 else f"int{digits}"


def _object(value: object) -> Mapping[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _strings(value: object) -> list[str]:
    return [v for v in cast("list[object]", value) if isinstance(v, str)] if isinstance(value, list) else []
