"""The tensors of each of ComfyUI's formats, and whether those of a layer go together.

| format | `X.weight` | scales |
| --- | --- | --- |
| float8_e4m3fn, float8_e5m2 | fp8 (N, K) | `weight_scale` one value, or (N, 1) |
| nvfp4 | uint8 (N up to 16, K up to 16, /2) | `weight_scale` e4m3 or its bytes, tiles of 128 x 4; `weight_scale_2` |
| mxfp8 | e4m3 (N up to 32, K up to 32) | `weight_scale` e8m0 or its bytes, tiles of 128 x 4 |
| int8_tensorwise | int8 (N, K) | `weight_scale` one value or (N, 1) |
| convrot_w4a4 | int8 (N, K/2) | `weight_scale` (N) |
| asym_w4a8_int8 | int8 (N, K/2) | `weight_s_rel` e4m3 (N, K/group), `weight_s_channel` (N), `weight_codebook` (16) |

"up to n" is rounded up to a multiple of n. fp8 with one scale a row is none of ComfyUI's, which stops when it
multiplies with it; `quanto-qfloat8-*` holds the same numbers. What ComfyUI makes of other damage was tried with 0.33.0
on a CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

from ..faults import STOCK_LOADERS
from ..model_file import Entry, ModelFile
from .base import Fault
from .broken import FLOATS, Broken, need, need_numel

Conf: TypeAlias = Mapping[str, Any]

FORMATS = (
    *("float8_e4m3fn", "float8_e5m2", "nvfp4", "mxfp8"),
    *("int8_tensorwise", "convrot_w4a4", "asym_w4a8_int8"),
)
FP8 = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
WIDER = (*FLOATS, "F64")  # comfy-kitchen casts the scales of fp8 and nvfp4 to float32 when they are loaded
ROTATIONS = (4, 16, 64, 256, 1024, 4096)
# Beside the format in a layer's JSON: (N, K) of a padded weight. Ours; ComfyUI takes the keys that it knows.
SHAPE = "orig_shape"
_STOPS = "ComfyUI stops with an error while it loads the layer."
_FAILS = "ComfyUI stops with an error when the layer is first used."
_CASTS = "ComfyUI casts it to the dtype that it expects, number by number: noise, unless that changes none."
_KERNELS = "ComfyUI's kernels take F32, F16 or BF16 there: it stops with an error when the layer is first used."
_S_CHANNEL = "ComfyUI's kernels take F32 there alone: it stops with an error when the layer is first used."
_ROWS = "ComfyUI's fp8 product takes one scale a tensor: it stops with an error when the layer is first used."
_FLAT = "ComfyUI's product takes it, but a LoRA on the layer stops with an error, or scales columns where N is K."


@dataclass(frozen=True)
class Seen:
    """What the tensors of a layer are.

    Attributes:
        roles: name in the `QuantizedWeight` -> name in the file; without `qdata`.
        doubts: what hinders others, but not here.
    """

    format_id: str
    shape: tuple[int, ...]
    roles: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=lambda: dict[str, Any]())
    why: str = ""
    doubts: tuple[Fault, ...] = ()


def look(file: ModelFile, name: str, conf: Conf) -> Seen:
    """Check the tensors of a layer in one of `FORMATS`.

    Raises:
        Broken: a tensor is missing, or has another dtype or shape than the format's.
    """
    weight = file.entries[f"{name}.weight"]
    format_name = str(conf["format"])
    extra: dict[str, Any] = {
        part: True for part in ("input_scale", "pre_quant_scale") if f"{name}.{part}" in file.entries
    }
    if conf.get("full_precision_matrix_mult"):
        extra["full_precision_matrix_mult"] = True
    if len(weight.shape) == 3 and "num_experts" in conf:
        why = "a bank of experts (three dimensions), and only weights (N, K) are loaded here.\nLoad it in ComfyUI."
        scale = f"{name}.weight_scale"
        return Seen("", weight.shape, {"scale": scale} if scale in file.entries else {}, extra, why)
    need_matrix(weight)
    seen = _LOOKS[format_name](file, name, weight, conf)
    return dataclasses.replace(seen, options={**seen.options, **extra})


def need_matrix(weight: Entry) -> None:
    """Raises:
    Broken: a convolution or a vector, for which ComfyUI reads no scales.
    """
    if len(weight.shape) != 2:
        text = f"'{weight.name}' has shape {list(weight.shape)}, expected (N, K)."
        raise Broken("tensor-shape", weight.name, text, "ComfyUI uses the values without their scales: noise.")


def _fp8(file: ModelFile, name: str, weight: Entry, conf: Conf) -> Seen:
    kind = str(conf["format"])
    need(file, weight.name, _CASTS, FP8[kind])
    return fp8(file, weight, f"{name}.weight_scale", _STOPS)


def fp8(file: ModelFile, weight: Entry, scale_name: str, missing: str, flat: bool = False) -> Seen:
    """An fp8 weight (N, K) with one scale, or one a row.

    Args:
        missing: what a loader makes of a missing scale.
        flat: whether (N) is one a row too, and none of it is meant for ComfyUI.
    """
    scale = need(file, scale_name, missing, *WIDER, cast=_CASTS)
    kind = "e4m3fn" if weight.dtype == "F8_E4M3" else "e5m2"
    n = weight.shape[0]
    if scale.numel == 1:
        return Seen(f"comfy-fp8-{kind}", weight.shape, {"scale": scale_name}, {"scale": "tensor"})
    if scale.shape == (n, 1) or (flat and scale.shape == (n,)):
        text = f"'{scale_name}' has shape {list(scale.shape)}: one scale a row."
        doubts = () if flat else (Fault("scale-rows", scale_name, text, _ROWS, False, STOCK_LOADERS),)
        format_id = f"quanto-qfloat8-{kind}"
        return Seen(format_id, weight.shape, {"scale": scale_name}, {"scale": "row"}, doubts=doubts)
    text = f"'{scale_name}' has shape {list(scale.shape)}, expected one value or [{n}, 1]."
    raise Broken("scale-shape", scale_name, text, _ROWS)


def _mxfp8(file: ModelFile, name: str, weight: Entry, conf: Conf) -> Seen:
    need(file, weight.name, _CASTS, "F8_E4M3")
    (n, k), told = _padded(file, name, weight, conf, weight.shape[1], 32)
    scale = need(file, f"{name}.weight_scale", _STOPS, "F8_E8M0", "U8", cast=_FAILS)
    _need_tiles(scale, weight.shape[0], weight.shape[1] // 32)
    return Seen("comfy-mxfp8", (n, k), {"scale": scale.name}, {"block_size": 32, **told})


def _nvfp4(file: ModelFile, name: str, weight: Entry, conf: Conf) -> Seen:
    need(file, weight.name, _CASTS, "U8", "I8")
    (n, k), told = _padded(file, name, weight, conf, 2 * weight.shape[1], 16)
    blocks = need(file, f"{name}.weight_scale", _STOPS, "F8_E4M3", "U8", cast=_FAILS)
    whole = need(file, f"{name}.weight_scale_2", _STOPS, *WIDER, cast=_CASTS)
    need_numel(whole, 1, _FAILS)
    _need_tiles(blocks, weight.shape[0], 2 * weight.shape[1] // 16)
    roles = {"scale": whole.name, "block_scale": blocks.name}
    return Seen("comfy-nvfp4", (n, k), roles, {"block_size": 16, **told})


def _padded(
    file: ModelFile, name: str, weight: Entry, conf: Conf, k: int, multiple: int
) -> tuple[tuple[int, int], dict[str, Any]]:
    """(N, K) as the JSON tells, else rows as the bias has them where it fits, columns as stored; what was told."""
    rows = weight.shape[0]
    if rows % multiple or k % multiple:
        text = f"'{weight.name}' holds ({rows}, {k}) values, expected multiples of {multiple}."
        raise Broken("tensor-shape", weight.name, text, _FAILS)
    if (told := conf.get(SHAPE)) is not None:
        n, width = _told(weight, told, (rows, k), multiple)
        return (n, width), {SHAPE: [n, width]}
    bias = file.entries.get(f"{name}.bias")
    if bias is not None and len(bias.shape) == 1 and rows - multiple < bias.shape[0] <= rows:
        return (bias.shape[0], k), {}
    return (rows, k), {}


def _told(weight: Entry, told: object, stored: tuple[int, int], multiple: int) -> tuple[int, int]:
    shape = cast("list[Any]", told) if isinstance(told, list) else []
    fit = [type(n) is int and have - multiple < n <= have for n, have in zip(shape, stored, strict=False)]
    if len(shape) != 2 or fit != [True, True]:
        text = f"'{weight.name}' holds {stored} values, and its {SHAPE} says {told!r}."
        raise Broken("comfy-quant", weight.name, text, "ComfyUI does not read it.")
    return shape[0], shape[1]


def _need_tiles(scale: Entry, rows: int, columns: int) -> None:
    wanted = _up(rows, 128) * _up(columns, 4)
    if scale.numel != wanted:
        text = (
            f"'{scale.name}' has {scale.numel} values (shape {list(scale.shape)}), expected {wanted}: "
            f"[{rows}, {columns}] in tiles of 128 x 4."
        )
        raise Broken("scale-shape", scale.name, text, _FAILS)


def _int8(file: ModelFile, name: str, weight: Entry, conf: Conf) -> Seen:
    need(file, weight.name, _CASTS, "I8")
    n, k = weight.shape
    scale = need(file, f"{name}.weight_scale", _STOPS, *FLOATS, cast=_KERNELS)
    doubts: tuple[Fault, ...] = ()
    if scale.shape == (n,) and n > 1:
        text = f"'{scale.name}' has shape [{n}], expected [{n}, 1]."
        doubts = (Fault("scale-shape", scale.name, text, _FLAT, fatal=False),)
    elif scale.numel != 1 and scale.shape != (n, 1):
        text = f"'{scale.name}' has shape {list(scale.shape)}, expected one value or [{n}, 1]."
        raise Broken("scale-shape", scale.name, text, _FAILS)
    options: dict[str, Any] = {"scale": "tensor" if scale.numel == 1 else "row", "convrot": False}
    if not _value(conf, "convrot", False):
        return Seen("comfy-int8", (n, k), {"scale": scale.name}, options, doubts=doubts)
    options |= {"convrot": True, "convrot_groupsize": _rotation(conf, weight, k)}
    return Seen("comfy-int8-convrot", (n, k), {"scale": scale.name}, options, doubts=doubts)


def _w4a4(file: ModelFile, name: str, weight: Entry, conf: Conf) -> Seen:
    need(file, weight.name, _CASTS, "I8", "U8")
    n, k = weight.shape[0], 2 * weight.shape[1]
    scale = need(file, f"{name}.weight_scale", _STOPS, *FLOATS, cast=_KERNELS)
    need_numel(scale, n, _FAILS)
    linear = _value(conf, "linear_dtype", "int4")
    if linear not in ("int4", "int8"):
        raise Broken(
            "comfy-quant", weight.name, f"'{name}' has linear_dtype {linear!r}, expected int4 or int8.", _STOPS
        )
    options = {"convrot_groupsize": _rotation(conf, weight, k), "linear_dtype": linear}
    return Seen("comfy-w4a4-convrot", (n, k), {"scale": scale.name}, options)


def _w4a8(file: ModelFile, name: str, weight: Entry, conf: Conf) -> Seen:
    need(file, weight.name, _CASTS, "I8", "U8")
    scale = need(file, f"{name}.weight_s_rel", _STOPS, "F8_E4M3", "U8", cast=_FAILS)
    channel = need(file, f"{name}.weight_s_channel", _STOPS, *FLOATS, cast=_S_CHANNEL)
    doubts: tuple[Fault, ...] = ()
    if channel.dtype != "F32":
        text = f"'{channel.name}' is {channel.dtype}, expected F32."
        doubts = (Fault("scale-dtype", channel.name, text, _S_CHANNEL, False, STOCK_LOADERS),)
    group = _whole(_value(conf, "group_size", 16))
    n = weight.shape[0]
    if len(scale.shape) != 2 or scale.shape[0] != n or type(group) is not int or group < 4:
        text = f"'{scale.name}' has shape {list(scale.shape)}, expected [{n}, K / {group}]."
        raise Broken("scale-shape", scale.name, text, _STOPS)
    k = scale.shape[1] * group
    need_numel(channel, n, _STOPS)
    roles = {"scale": scale.name, "s_channel": channel.name}
    options = {"group_size": group, "convrot_groupsize": _rotation(conf, weight, k)}
    if (codebook := file.entries.get(f"{name}.weight_codebook")) is not None:
        need(file, codebook.name, _STOPS, *FLOATS, cast=_FAILS)
        need_numel(codebook, 16, _STOPS)
        roles["codebook"] = codebook.name
    if (correction := file.entries.get(f"{name}.weight_correction")) is not None:
        why = (
            "it has corrections of its groups ('weight_correction'), which no loader applies.\n"
            "Quantize the original again."
        )
        return Seen("", (n, k), {**roles, "correction": correction.name}, options, why)
    if 4 * weight.shape[1] == 3 * k:
        why = "its codes have 6 bits, and 4-bit ones are loaded here.\nLoad it in ComfyUI, or use the 4-bit file."
        return Seen("", (n, k), roles, {**options, "bits": 6}, why)
    if 2 * weight.shape[1] != k:
        text = f"'{weight.name}' has {weight.shape[1]} bytes a row, and K={k} by its scales needs {k // 2}."
        raise Broken("tensor-shape", weight.name, text, _FAILS)
    return Seen("comfy-w4a8", (n, k), roles, options, doubts=doubts)


_LOOKS = {
    **{"float8_e4m3fn": _fp8, "float8_e5m2": _fp8, "nvfp4": _nvfp4, "mxfp8": _mxfp8},
    **{"int8_tensorwise": _int8, "convrot_w4a4": _w4a4, "asym_w4a8_int8": _w4a8},
}


def _value(conf: Conf, key: str, default: Any) -> Any:
    """From the JSON, or its `params`, where ComfyUI looks second."""
    params: object = conf.get("params")
    if isinstance(params, Mapping):
        default = cast("Conf", params).get(key, default)
    return conf.get(key, default)


def _whole(value: Any) -> Any:
    """A number as ComfyUI reads it, which takes "256" too; what is none stays what it is."""
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return value


def _rotation(conf: Conf, weight: Entry, k: int) -> int:
    size = _whole(_value(conf, "convrot_groupsize", 256))
    if type(size) is not int or size not in ROTATIONS or k % size:
        text = f"'{weight.name}' has K={k} and convrot_groupsize {size!r}, expected a power of 4 that divides K."
        raise Broken("comfy-quant", weight.name, text, _FAILS)
    return size


def guess(file: ModelFile, name: str) -> dict[str, Any] | None:
    """The JSON that a layer without any would have, by its tensors alone; None where they are of no packed format."""
    weight, scale = file.entries[f"{name}.weight"], file.entries.get(f"{name}.weight_scale")
    if len(weight.shape) != 2:
        return None
    if file.has(f"{name}.weight_s_rel") and file.has(f"{name}.weight_s_channel") and weight.dtype == "I8":
        return {"format": "asym_w4a8_int8"}
    if scale is None:
        return None
    if weight.dtype == "U8" and scale.dtype == "F8_E4M3" and file.has(f"{name}.weight_scale_2"):
        return {"format": "nvfp4"}
    if weight.dtype == "F8_E4M3" and scale.dtype == "F8_E8M0":
        return {"format": "mxfp8"}
    if weight.dtype == "I8" and scale.dtype in FLOATS:
        if scale.shape == (weight.shape[0],):
            return {"format": "convrot_w4a4"}
        if scale.numel == 1 or scale.shape == (weight.shape[0], 1):
            return {"format": "int8_tensorwise"}
    return None


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
