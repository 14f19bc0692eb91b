"""compressed-tensors, the layout of LLM Compressor and vLLM: `X.weight_scale` beside `X.weight` or `X.weight_packed`.

    int-, naive-quantized   X.weight int8 (N, K); scale (N, 1), (1), (N, G) or of blocks of rows and columns
    float-quantized         X.weight float8 e4m3, the same scales
    pack-quantized          X.weight_packed int32 (N, K * bits / 32), the first value in the lowest bits, each plus
                            2**(bits-1); X.weight_shape; zero points packed along N
    nvfp4-pack-quantized    X.weight_packed uint8 (N, K/2), even index low; scale e4m3 (N, K/16) and a divisor
                            X.weight_global_scale
    mxfp4-pack-quantized    the same bytes; scale e8m0 in uint8 (N, K/32)
    mxfp8-quantized         X.weight float8 e4m3 (N, K); scale e8m0 in uint8 (N, K/32)

The folder's `quantization_config` (quant_method `compressed-tensors`) has the types of all groups of layers. Packed
weights are known by their tensors too; the others look like those of other writers, so they need it. Every layer goes
to the format of another library that holds the same numbers. One value is not the same to the last bit: the divisor of
nvfp4 becomes a factor, rounded to float32. Activations are computed in full precision here, whatever the config says.

Source: compressed_tensors/compressors at 0.20.0.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from ...errors import FileError
from ..model_file import Entry, ModelFile
from . import blocks
from .base import Fault, Layer
from .broken import FLOATS, Broken, attempt, need
from .configs import quantization_config

if TYPE_CHECKING:
    from torch import Tensor

    from ...weight import QuantizedWeight
    from .base import Read

METHOD = "compressed-tensors"
BYTES = ("I8", "F8_E4M3")
PARTS = (
    "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale", "weight_g_idx", "input_scale",
    "input_zero_point", "input_global_scale", "output_scale", "output_zero_point",
)  # fmt: skip
SPARSE = {"compressed", "bitmask"}
_FAILS = "transformers, vLLM and diffusers stop with an error, or leave the layer unset."
_NOISE = "The library stops with an error about shapes, or computes with other numbers."
_INSTEAD = "Load it with vLLM or transformers, or use the full-precision model."


class CompressedTensorsScheme:
    id = "compressed-tensors"
    title = "compressed-tensors"
    library = "compressed-tensors"

    def find(self, file: ModelFile) -> Iterable[Layer | Fault]:
        config = quantization_config(file, METHOD)
        for module, lasts in file.groups.items():
            dot = f"{module}." if module else ""
            if "weight_packed" in lasts:
                yield from _layer(file, dot, "weight_packed", config)
            elif config and set(lasts) >= SPARSE:
                yield _sparse(file, dot, lasts)
            elif config and "weight" in lasts and file.has(f"{dot}weight", *BYTES):
                yield from _layer(file, dot, "weight", config)
            elif config and "weight_scale" in lasts and file.has(f"{dot}weight", *FLOATS):
                text = f"'{dot}weight' is {file.entries[f'{dot}weight'].dtype} beside scales, expected codes."
                yield Fault("tensor-dtype", f"{dot}weight", text, _NOISE, fatal=False)

    def weight(self, layer: Layer, read: Read) -> QuantizedWeight:
        from ..quantized_file import DTYPES

        tensors = {role: read(name) for role, name in layer.tensors.items()}
        return _WEIGHTS[str(layer.options["layout"])](layer, tensors, DTYPES[layer.dtype])


def _sparse(file: ModelFile, dot: str, lasts: tuple[str, ...]) -> Layer:
    tensors = {last: f"{dot}{last}" for last in lasts if last != "bias"}
    why = f"only the weights that are not 0, with a mask of their places.\n{_INSTEAD}"
    shape = file.entries[f"{dot}compressed"].shape
    return Layer(f"{dot}weight", METHOD, "sparse", "", tensors, shape, why=why)


def _layer(file: ModelFile, dot: str, stored: str, config: Mapping[str, Any]) -> Iterator[Layer | Fault]:
    tensors = {"qdata": f"{dot}{stored}"}
    tensors |= {part.removeprefix("weight_"): f"{dot}{part}" for part in PARTS if f"{dot}{part}" in file.entries}
    shape = file.entries[tensors["qdata"]].shape
    layer = Layer(f"{dot}weight", METHOD, str(config.get("format", stored)), "", tensors, shape)

    def make() -> Layer:
        qdata, scale = file.entries[tensors["qdata"]], need(file, f"{dot}weight_scale", _FAILS)
        if len(qdata.shape) < 2:
            text = f"'{qdata.name}' has shape {list(qdata.shape)}, expected (N, K)."
            raise Broken("weight-size", qdata.name, text, _NOISE)
        if len(qdata.shape) != 2:
            return _refused(layer, f"a weight of shape {list(qdata.shape)}, and only those of linear layers are loaded")
        if "g_idx" in layer.tensors:
            return _refused(layer, "its columns are in the order of their importance (weight_g_idx)")
        if stored == "weight":
            found = _mxfp8(layer, qdata, scale) if scale.dtype == "U8" else _scaled(file, layer, qdata, scale)
        elif qdata.dtype == "I32":
            found = _packed(file, layer, qdata, scale)
        else:
            found = _fp4(file, layer, need(file, qdata.name, _NOISE, "U8"), scale)
        _check_config(found, config)
        return found

    yield from attempt(make, layer.name, METHOD, layer.type, tensors, shape)


def _refused(layer: Layer, what: str) -> Layer:
    return dataclasses.replace(layer, format_id="", why=f"{what}.\n{_INSTEAD}")


def _check_config(layer: Layer, config: Mapping[str, Any]) -> None:
    """Raises:
    Broken: no group of the config has weights of this kind.
    """
    kind = (str(layer.options.get("bits", "")), str(layer.options.get("numbers", "")))
    groups: object = config.get("config_groups")
    told: set[tuple[str, str]] = set()
    for group in cast("dict[str, object]", groups).values() if isinstance(groups, dict) else ():
        weights: object = cast("dict[str, Any]", group).get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            return  # a group by the name of a preset
        settings = cast("dict[str, Any]", weights)
        told.add((str(settings.get("num_bits", 8)), str(settings.get("type", "int")).lower()))
    if told and kind[0] and kind not in told:
        said = " or ".join(f"{bits}-bit {numbers}" for bits, numbers in sorted(told))
        text = f"the config says that weights are {said}, but '{layer.name}' is {kind[0]}-bit {kind[1]}."
        raise Broken("config-contradicts", layer.name, text, _NOISE)


def _block(qdata: tuple[int, ...], scale: Entry) -> tuple[int, int]:
    """Rows and columns that share a scale.

    Raises:
        Broken: none fits.
    """
    n, k = qdata
    if scale.numel == 1:
        return n, k
    if len(scale.shape) == 1 and scale.numel != n:
        text = f"'{scale.name}' has shape {list(scale.shape)}, expected one value or one a row of {list(qdata)}."
        raise Broken("scale-shape", scale.name, text, _NOISE)
    rows, columns = (scale.shape if len(scale.shape) == 2 else (scale.numel, 1)) if scale.shape else (0, 0)
    if not rows or not columns or n % rows or k % columns:
        text = f"'{scale.name}' has shape {list(scale.shape)}, expected one that divides {list(qdata)}."
        raise Broken("scale-shape", scale.name, text, _NOISE)
    return n // rows, k // columns


def _shown(kind: str, block: tuple[int, int], shape: tuple[int, int]) -> str:
    if block == (1, shape[1]):
        return kind
    if block == shape:
        return f"{kind}, one scale a tensor"
    return f"{kind}, groups of {block[1]}" if block[0] == 1 else f"{kind}, blocks of {block[0]} x {block[1]}"


def _scaled(file: ModelFile, layer: Layer, qdata: Entry, scale: Entry) -> Layer:
    """A weight of one byte a value: by rows as quanto holds it, by groups as torchao does."""
    need(file, scale.name, _NOISE, *FLOATS)
    shape = (qdata.shape[0], qdata.shape[1])
    block = _block(shape, scale)
    whole = qdata.dtype == "I8"
    kind = "int8" if whole else "float8"
    options = {"layout": "rows", "block": list(block), "bits": 8, "numbers": "int" if whole else "float"}
    found = dataclasses.replace(layer, type=_shown(kind, block, shape), shape=shape, dtype=scale.dtype, options=options)
    if "zero_point" in layer.tensors:
        return _refused(found, "int8 with zero points, which no format here holds exactly")
    by_rows = "quanto-qint8" if whole else "quanto-qfloat8-e4m3fn"
    by_groups = "torchao-int8wo" if whole else "torchao-float8wo"
    return dataclasses.replace(found, format_id=by_rows if block[1] == shape[1] else by_groups)


def _packed(file: ModelFile, layer: Layer, qdata: Entry, scale: Entry) -> Layer:
    """A weight packed in int32: 4 bits as torchao's int4, 8 bits as int8."""
    need(file, scale.name, _NOISE, *FLOATS)
    n, k = _told_shape(file, layer, qdata)
    bits = [b for b in range(1, 9) if -(-k * b // 32) == qdata.shape[1]]
    if qdata.shape[0] != n or not bits:
        text = f"'{qdata.name}' has shape {list(qdata.shape)}, which packs no weight of shape {[n, k]}."
        raise Broken("weight-size", qdata.name, text, _NOISE)
    block = _block((n, k), scale)
    options = {"layout": f"packed {bits[0]}", "block": list(block), "bits": bits[0], "numbers": "int"}
    shown = _shown(f"int{bits[0]}", block, (n, k))
    found = dataclasses.replace(layer, type=shown, shape=(n, k), dtype=scale.dtype, options=options)
    if len(bits) > 1 or bits[0] not in (4, 8) or k * bits[0] % 32:
        return _refused(found, f"values of {' or '.join(map(str, bits))} bits in rows of {k}; read are 4 and 8 bits")
    zero_point = file.entries.get(layer.tensors.get("zero_point", ""))
    if zero_point is not None:
        if bits[0] == 8 or scale.dtype == "F32":
            what = f"zero points of {bits[0]} bits with {scale.dtype} scales"
            return _refused(found, f"{what}, which no format here holds exactly")
        wanted = (-(-n * bits[0] // 32), k // block[1])
        if zero_point.dtype != "I32" or zero_point.shape != wanted or block[0] != 1:
            text = f"'{zero_point.name}' is {zero_point.dtype} {list(zero_point.shape)}, expected I32 {list(wanted)}."
            raise Broken("zero-point-shape", zero_point.name, text, _NOISE)
    if bits[0] == 4:
        return dataclasses.replace(found, format_id="torchao-int4wo")
    return dataclasses.replace(found, format_id="quanto-qint8" if block[1] == k else "torchao-int8wo")


def _told_shape(file: ModelFile, layer: Layer, qdata: Entry) -> tuple[int, int]:
    """`X.weight_shape`, two numbers.

    Raises:
        Broken: it is missing or holds something else.
    """
    entry = need(file, layer.name + "_shape", _FAILS, "I64", "I32")
    if entry.numel != 2:
        text = f"'{entry.name}' has shape {list(entry.shape)}, expected 2 numbers."
        raise Broken("tensor-shape", entry.name, text, _NOISE)
    try:
        n, k = struct.unpack("<qq" if entry.dtype == "I64" else "<ii", file.small(entry.name))
    except (FileError, struct.error) as err:
        raise Broken("tensor-shape", entry.name, f"'{entry.name}' cannot be read: {err}", _NOISE) from err
    if n < 1 or k < 1:
        raise Broken("tensor-shape", entry.name, f"'{entry.name}' holds {n} and {k}, expected sizes.", _NOISE)
    return n, k


def _fp4(file: ModelFile, layer: Layer, qdata: Entry, scale: Entry) -> Layer:
    n, k = qdata.shape[0], 2 * qdata.shape[1]
    nv = "global_scale" in layer.tensors
    block, kind = (blocks.NV_BLOCK, "nvfp4") if nv else (blocks.MX_BLOCK, "mxfp4")
    need(file, scale.name, _NOISE, *(("F8_E4M3",) if nv else ("U8", "F8_E8M0")))
    if k % block or scale.shape != (n, k // block):
        text = f"'{scale.name}' has shape {list(scale.shape)}, expected ({n}, {k} / {block}), one scale a block."
        raise Broken("scale-shape", scale.name, text, _NOISE)
    if nv and need(file, layer.tensors["global_scale"], _NOISE, "F32").numel != 1:
        return _refused(layer, "several global scales")
    options = {"layout": kind, "bits": 4, "numbers": "float"}
    format_id = "comfy-nvfp4" if nv else "gguf-mxfp4"
    return dataclasses.replace(layer, type=kind, format_id=format_id, shape=(n, k), options=options)


def _mxfp8(layer: Layer, qdata: Entry, scale: Entry) -> Layer:
    n, k = qdata.shape
    if qdata.dtype != "F8_E4M3" or k % blocks.MX_BLOCK or scale.shape != (n, k // blocks.MX_BLOCK):
        text = f"'{scale.name}' has shape {list(scale.shape)}, expected ({n}, {k} / 32) beside {qdata.dtype} values."
        raise Broken("scale-shape", scale.name, text, _NOISE)
    options = {"layout": "mxfp8", "bits": 8, "numbers": "float"}
    return dataclasses.replace(layer, type="mxfp8", format_id="comfy-mxfp8", shape=(n, k), options=options)


def _rows_weight(layer: Layer, t: Mapping[str, Tensor], dtype: Any) -> QuantizedWeight:
    """One scale a row in its own dtype, or a scale for each row and group in float32."""
    import torch

    from ...weight import QuantizedWeight

    n, k = layer.shape
    rows, columns = layer.options["block"]
    scale = t["scale"].reshape(n // rows, k // columns).repeat_interleave(rows, dim=0)
    if columns != k:
        scale = scale.to(torch.float32)
    return QuantizedWeight(layer.format_id, {"qdata": t["qdata"], "scale": scale}, layer.shape, dtype)


def _int8_weight(layer: Layer, t: Mapping[str, Tensor], dtype: Any) -> QuantizedWeight:
    import torch

    values = (t["qdata"].contiguous().view(torch.uint8) ^ 0x80).view(torch.int8)
    return _rows_weight(layer, {**t, "qdata": values.reshape(layer.shape)}, dtype)


def _int4_weight(layer: Layer, t: Mapping[str, Tensor], dtype: Any) -> QuantizedWeight:
    """`(code - zero) * scale` as `(code - 8) * scale + (8 - zero) * scale`, which float32 holds exactly."""
    import torch

    from ...weight import QuantizedWeight

    n, k = layer.shape
    rows, columns = layer.options["block"]
    packed = t["qdata"].contiguous().view(torch.uint8).reshape(n, k // 2)
    scale = t["scale"].reshape(n // rows, k // columns).repeat_interleave(rows, dim=0).to(torch.float32)
    shift = torch.zeros_like(scale)
    if "zero_point" in t:
        words = t["zero_point"].t().contiguous().view(torch.uint8)  # packed along N
        zero = torch.stack([words & 15, words >> 4], dim=-1).reshape(words.shape[0], -1)[:, :n].t()
        shift = (8 - zero.to(torch.float32)) * scale
    tensors = {"qdata": packed << 4 | packed >> 4, "scale": scale, "zero_point": shift}
    return QuantizedWeight(layer.format_id, tensors, layer.shape, dtype)


def _nvfp4_weight(layer: Layer, t: Mapping[str, Tensor], dtype: Any) -> QuantizedWeight:
    return blocks.nvfp4(t["qdata"], blocks.tiled(t["scale"]), 1.0 / t["global_scale"], layer.shape, dtype)


def _mxfp4_weight(layer: Layer, t: Mapping[str, Tensor], dtype: Any) -> QuantizedWeight:
    """ggml's blocks: the scale, then 16 bytes with value i low and value i + 16 high."""
    import torch

    from ...weight import QuantizedWeight

    n, k = layer.shape
    pairs = t["qdata"].reshape(n, k // blocks.MX_BLOCK, blocks.MX_BLOCK // 2)
    codes = torch.stack([pairs & 15, pairs >> 4], dim=-1).reshape(n, k // blocks.MX_BLOCK, 2, blocks.MX_BLOCK // 2)
    halves = codes[:, :, 0] | codes[:, :, 1] << 4
    joined = torch.cat([t["scale"].view(torch.uint8).unsqueeze(-1), halves], dim=-1).reshape(n, -1)
    return QuantizedWeight(layer.format_id, {"qdata": joined}, layer.shape, dtype)


def _mxfp8_weight(layer: Layer, t: Mapping[str, Tensor], dtype: Any) -> QuantizedWeight:
    import torch

    return blocks.mxfp8(t["qdata"], blocks.tiled(t["scale"]).view(torch.float8_e8m0fnu), layer.shape, dtype)


_WEIGHTS: Mapping[str, Callable[[Layer, Mapping[str, Tensor], Any], QuantizedWeight]] = {
    "rows": _rows_weight,
    "packed 8": _int8_weight,
    "packed 4": _int4_weight,
    "nvfp4": _nvfp4_weight,
    "mxfp4": _mxfp4_weight,
    "mxfp8": _mxfp8_weight,
}
