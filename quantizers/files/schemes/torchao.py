"""torchao: tensor subclasses taken apart by `flatten_tensor_state_dict`, as transformers and diffusers save them.

A weight `X.weight` becomes tensors `X._weight_qdata`, `X._weight_scale` and so on; the metadata of the file has JSON
under `X.weight`: the class (`_type`), its other attributes (`_data`), and the list of the tensors.

    Int8Tensor                 int8 (N, K); scale float32 and zero point int8, (N, G) or (1, 1)
    Float8Tensor               float8 (N, K); scale float32, a row, a tensor or a block of rows and columns
    IntxUnpackedToInt8Tensor   int8 (N, K) of 1 to 8 bits; scale in the weight's dtype, zero point int8, (N, G)
    Int4Tensor                 uint8 (N, K/2), signed, even index in the low half; scale and zero point (G, N)
    NVFP4Tensor, MXTensor      blocks of 16 and 32, scales in cuBLAS's tiles or in rows

Activations that a class quantizes too (static scales, float8) are computed in full precision here; int8 by rows is
`torchao-int8dyn`. Source: torchao/prototype/safetensors and quantization/quantize_/workflows at 0.18.0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from ...errors import FileError
from ..model_file import Entry, ModelFile
from . import blocks
from .base import Fault, Layer
from .broken import FLOATS, Broken, attempt, need
from .configs import as_object

if TYPE_CHECKING:
    from torch import Tensor

    from ...weight import QuantizedWeight
    from .base import Read

PREFIX = "_weight_"
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_FAILS = "torchao, transformers and diffusers stop with an error, or leave the layer unset."
_NOISE = "torchao stops with an error about shapes, or computes with other numbers."
_INSTEAD = "Load it with the library that wrote it, or use the full-precision model."


class TorchaoScheme:
    id = "torchao"
    title = "torchao"
    library = "torchao"

    def find(self, file: ModelFile) -> Iterable[Layer | Fault]:
        for module, lasts in file.groups.items():
            parts = {last.removeprefix(PREFIX) for last in lasts if last.startswith(PREFIX)}
            if not parts.isdisjoint(("qdata", "scale", "scale_and_zero")):
                yield from _layer(file, f"{module}.weight" if module else "weight", parts)

    def weight(self, layer: Layer, read: Read) -> QuantizedWeight:
        from ..quantized_file import DTYPES as TORCH

        tensors = {role: read(name) for role, name in layer.tensors.items()}
        return _WEIGHTS[str(layer.options["class"])](layer, tensors, TORCH[layer.dtype])


@dataclasses.dataclass(frozen=True)
class _Seen:
    """A layer while it is looked at.

    Attributes:
        kind: class of the library.
        data: its attributes, as the metadata has them.
    """

    file: ModelFile
    layer: Layer
    kind: str
    data: Mapping[str, Any]

    def part(self, role: str, *dtypes: str) -> Entry:
        module = self.layer.name.removesuffix("weight")
        return need(self.file, f"{module}{PREFIX}{role}", _FAILS, *dtypes)


def _layer(file: ModelFile, name: str, parts: set[str]) -> Iterator[Layer | Fault]:
    module = name.removesuffix("weight")
    tensors = {role: f"{module}{PREFIX}{role}" for role in sorted(parts)}
    told = as_object(file.metadata.get(name))
    kind = str(told.get("_type", "")) or _guess(file, tensors)
    if "_type" not in told:
        text = f"the file's metadata has nothing about '{name}', whose class its tensors need."
        yield Fault("metadata-missing", name, text, _FAILS, fatal=not kind)
    attributes: object = told.get("_data")
    data = cast("dict[str, Any]", attributes) if isinstance(attributes, dict) else dict[str, Any]()
    shape = file.entries[tensors["qdata"] if "qdata" in tensors else next(iter(tensors.values()))].shape
    layer = Layer(name, TorchaoScheme.id, kind or "unknown class", "", tensors, shape, options={"class": kind})

    def make() -> Layer:
        absent = [p for p in _listed(told) if p not in parts]
        if absent:
            text = f"'{module}{PREFIX}{absent[0]}' is missing; the metadata of '{name}' lists it."
            raise Broken("tensor-missing", f"{module}{PREFIX}{absent[0]}", text, _FAILS)
        if kind not in _CLASSES:
            return _refused(layer, "torchao's metadata of it is missing" if not kind else f"torchao's {kind}")
        if "act_pre_scale" in parts:
            return _refused(layer, "activations are to be scaled before it (act_pre_scale), which no format here does")
        found = _CLASSES[kind](_Seen(file, layer, kind, data))
        return found if found.why or len(found.shape) == 2 else _refused(found, f"a weight of shape {found.shape}")

    yield from attempt(make, name, TorchaoScheme.id, layer.type, tensors, shape)


def _listed(told: Mapping[str, Any]) -> list[str]:
    names: object = told.get("_tensor_data_names")
    return [n for n in cast("list[object]", names) if isinstance(n, str)] if isinstance(names, list) else []


def _guess(file: ModelFile, tensors: Mapping[str, str]) -> str:
    """The class by dtypes where these leave no choice of numbers; empty where they do."""
    dtypes = {role: file.entries[name].dtype for role, name in tensors.items()}
    if set(dtypes) == {"qdata", "scale"} and dtypes == {"qdata": "F8_E4M3", "scale": "F32"}:
        return "Float8Tensor"
    if set(dtypes) == {"qdata", "scale", "zero_point"} and dtypes["qdata"] == "I8" and dtypes["scale"] in FLOATS:
        return "Int8Tensor"
    return ""


def _refused(layer: Layer, what: str) -> Layer:
    return dataclasses.replace(layer, format_id="", why=f"{what}.\n{_INSTEAD}")


def _dtype(seen: _Seen, key: str = "dtype") -> str:
    told: object = seen.data.get(key)
    word: object = cast("dict[str, Any]", told).get("_data") if isinstance(told, dict) else None
    return DTYPES.get(word, "BF16") if isinstance(word, str) else "BF16"


def _block(seen: _Seen, qdata: Entry, scale: Entry) -> tuple[int, int]:
    """Rows and columns that share a scale.

    Raises:
        Broken: the scales do not fit the weight or the metadata.
    """
    n, k = qdata.shape
    rows, columns = scale.shape if len(scale.shape) == 2 else (0, 0)
    if not rows or not columns or n % rows or k % columns:
        text = f"'{scale.name}' has shape {list(scale.shape)}, expected one that divides {list(qdata.shape)}."
        raise Broken("scale-shape", scale.name, text, _NOISE)
    block = (n // rows, k // columns)
    told: object = seen.data.get("block_size")
    if isinstance(told, list) and tuple(cast("list[object]", told)) != block:
        text = f"'{scale.name}' has shape {list(scale.shape)}, and the metadata has block_size {told}: not {block}."
        raise Broken("config-contradicts", scale.name, text, _NOISE)
    return block


def _shown(kind: str, block: tuple[int, int], shape: tuple[int, ...]) -> str:
    if block[1] == shape[1]:
        return kind if block[0] == 1 else f"{kind}, one scale a tensor" if block[0] == shape[0] else str(block)
    return f"{kind}, groups of {block[1]}" if block[0] == 1 else f"{kind}, blocks of {block[0]} x {block[1]}"


def _scaled(seen: _Seen, kind: str, format_id: str, *dtypes: str) -> Layer:
    """A weight of one byte a value."""
    qdata, scale = seen.part("qdata", *dtypes), seen.part("scale", *FLOATS)
    if len(qdata.shape) < 2:  # torchao quantizes no vectors
        text = f"'{qdata.name}' has shape {list(qdata.shape)}, expected (N, K)."
        raise Broken("weight-size", qdata.name, text, _NOISE)
    if len(qdata.shape) != 2:
        return dataclasses.replace(seen.layer, shape=qdata.shape)
    block = _block(seen, qdata, scale)
    if "zero_point" in seen.layer.tensors:
        seen.part("zero_point", "I8")
    options = {"class": seen.kind, "block": list(block)}
    if format_id != "torchao-int8dyn" and (
        seen.data.get("act_quant_kwargs") or seen.data.get("activation_quantization")
    ):
        options["activations"] = "quantized by torchao, in full precision here"
    return dataclasses.replace(
        seen.layer,
        type=_shown(kind, block, qdata.shape),
        format_id=format_id,
        shape=qdata.shape,
        dtype=_dtype(seen),
        options=options,
    )


def _int8(seen: _Seen) -> Layer:
    dynamic = _by_rows(seen.data.get("act_quant_kwargs")) and "act_quant_scale" not in seen.layer.tensors
    rows = seen.part("scale").shape[-1:] == (1,)
    kind = "int8dyn" if dynamic and rows else "int8wo"
    found = _scaled(seen, kind, f"torchao-{kind}", "I8")
    if "zero_point" in seen.layer.tensors and seen.part("zero_point").shape != seen.part("scale").shape:
        name, got = seen.part("zero_point").name, list(seen.part("zero_point").shape)
        text = f"'{name}' has shape {got}, and the scales have {list(seen.part('scale').shape)}; expected the same."
        raise Broken("zero-point-shape", name, text, _NOISE)
    return found


def _by_rows(told: object) -> bool:
    """Whether activations become int8 symmetrically, row by row."""
    data: object = cast("dict[str, Any]", told).get("_data") if isinstance(told, dict) else None
    if not isinstance(data, dict):
        return False
    settings = cast("dict[str, Any]", data)
    words = {key: str(settings.get(key)) for key in ("granularity", "mapping_type", "reduce_range")}
    symmetric = "'ASYMMETRIC'" not in words["mapping_type"]
    return "'PerRow'" in words["granularity"] and symmetric and words["reduce_range"] in ("False", "None")


def _float8(seen: _Seen) -> Layer:
    return _scaled(seen, "float8wo", "torchao-float8wo", "F8_E4M3")


def _intx(seen: _Seen) -> Layer:
    told: object = seen.data.get("target_dtype")
    word: object = cast("dict[str, Any]", told).get("_data") if isinstance(told, dict) else None
    return _scaled(seen, f"{word} in int8", "torchao-int8wo", "I8")


def _int4(seen: _Seen) -> Layer:
    qdata, scale, zero_point = seen.part("qdata"), seen.part("scale", *FLOATS), seen.part("zero_point", *FLOATS)
    if qdata.dtype not in ("U8", "I8") or len(qdata.shape) != 2:
        return _refused(seen.layer, f"{qdata.dtype} values of shape {qdata.shape}")
    n, k = qdata.shape[0], 2 * qdata.shape[1]
    groups = scale.shape[0] if len(scale.shape) == 2 else 0
    if scale.shape != zero_point.shape or scale.shape[1:] != (n,) or not groups or k % groups:
        text = f"'{scale.name}' has shape {list(scale.shape)}, expected (groups, {n}), and so the zero point."
        raise Broken("scale-shape", scale.name, text, _NOISE)
    options = {"class": seen.kind, "block": [1, k // groups]}
    return dataclasses.replace(
        seen.layer,
        type=f"int4wo, groups of {k // groups}",
        format_id="torchao-int4wo",
        shape=(n, k),
        dtype=scale.dtype,
        options=options,
    )


def _blocks(seen: _Seen, kind: str, per_byte: int, block: int, scale_dtype: str, *dtypes: str) -> Layer:
    """A weight in blocks of 16 or 32 along K."""
    qdata, scale = seen.part("qdata", *dtypes), seen.part("scale", scale_dtype)
    if len(qdata.shape) != 2:
        return _refused(seen.layer, f"a weight of shape {qdata.shape}")
    n, k = qdata.shape[0], qdata.shape[1] * per_byte
    in_tiles = bool(seen.data.get("is_swizzled_scales"))
    wanted = blocks.tiled_numel(n, k // block) if in_tiles else n * (k // block)
    if seen.data.get("block_size") != block or k % block or scale.numel != wanted:
        text = f"'{scale.name}' has shape {list(scale.shape)}, expected {wanted} scales of blocks of {block}."
        raise Broken("scale-shape", scale.name, text, _NOISE)
    options: dict[str, Any] = {"class": seen.kind, "tiles": in_tiles}
    if seen.data.get("act_quant_kwargs"):
        options["activations"] = "quantized by torchao, in full precision here"
    return dataclasses.replace(
        seen.layer,
        type=kind,
        format_id=f"comfy-{kind}",
        shape=(n, k),
        dtype=_dtype(seen, "orig_dtype"),
        options=options,
    )


def _nvfp4(seen: _Seen) -> Layer:
    if "per_tensor_scale" in seen.layer.tensors and seen.part("per_tensor_scale", "F32").numel != 1:
        return _refused(seen.layer, "one scale an expert")
    return _blocks(seen, "nvfp4", 2, blocks.NV_BLOCK, "F8_E4M3", "U8")


def _mx(seen: _Seen) -> Layer:
    qdata = seen.part("qdata")
    if qdata.dtype != "F8_E4M3":
        return _refused(seen.layer, f"MX values in {qdata.dtype}, and only e4m3 has a format here")
    return _blocks(seen, "mxfp8", 1, blocks.MX_BLOCK, "F8_E8M0", "F8_E4M3")


_CLASSES: Mapping[str, Callable[[_Seen], Layer]] = {
    "Int8Tensor": _int8,
    "Float8Tensor": _float8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Int4Tensor": _int4,
    "NVFP4Tensor": _nvfp4,
    "MXTensor": _mx,
}


def _rows_weight(layer: Layer, t: Mapping[str, Tensor], dtype: Any) -> QuantizedWeight:
    """Int8 and float8: a scale for each row and group, float32."""
    import torch

    from ...weight import QuantizedWeight

    zero_point = t.get("zero_point")
    if zero_point is not None and bool(zero_point.any()):
        raise FileError(
            f"'{layer.tensors['zero_point']}': zero points other than 0 (asymmetric {layer.type}), which no format "
            f"here holds exactly.\n{_INSTEAD}"
        )
    scale = t["scale"].to(torch.float32).repeat_interleave(layer.options["block"][0], dim=0)
    return QuantizedWeight(layer.format_id, {"qdata": t["qdata"], "scale": scale}, layer.shape, dtype)


def _int4_weight(layer: Layer, t: Mapping[str, Tensor], dtype: Any) -> QuantizedWeight:
    import torch

    from ...weight import QuantizedWeight

    packed = t["qdata"].view(torch.uint8) ^ 0x88  # two's complement to the value plus 8, in both halves
    tensors = {
        "qdata": packed << 4 | packed >> 4,
        "scale": t["scale"].t().contiguous(),
        "zero_point": t["zero_point"].t().contiguous(),
    }
    return QuantizedWeight(layer.format_id, tensors, layer.shape, dtype)


def _nvfp4_weight(layer: Layer, t: Mapping[str, Tensor], dtype: Any) -> QuantizedWeight:
    import torch

    one = t.get("per_tensor_scale", torch.ones((), dtype=torch.float32))
    return blocks.nvfp4(t["qdata"], _in_tiles(layer, t["scale"]), one, layer.shape, dtype)


def _mx_weight(layer: Layer, t: Mapping[str, Tensor], dtype: Any) -> QuantizedWeight:
    return blocks.mxfp8(t["qdata"], _in_tiles(layer, t["scale"]), layer.shape, dtype)


def _in_tiles(layer: Layer, scale: Tensor) -> Tensor:
    return scale if layer.options["tiles"] else blocks.tiled(scale.reshape(layer.shape[0], -1))


_WEIGHTS: Mapping[str, Callable[[Layer, Mapping[str, Tensor], Any], QuantizedWeight]] = {
    "Int8Tensor": _rows_weight,
    "Float8Tensor": _rows_weight,
    "IntxUnpackedToInt8Tensor": _rows_weight,
    "Int4Tensor": _int4_weight,
    "NVFP4Tensor": _nvfp4_weight,
    "MXTensor": _mx_weight,
}
