"""bitsandbytes: NF4 and FP4 (QLoRA), and LLM.int8, as its layers save themselves and diffusers writes them.

4-bit: `X.weight` holds the packed bytes, (n, 1) uint8 or the same bytes in another dtype (`quant_storage`), and beside
it stand `X.weight.absmax`, `X.weight.quant_map` (the codebook) and `X.weight.quant_state.bitsandbytes__nf4` (or fp4),
JSON in bytes with shape, dtype and block size. With double quantization `absmax` is uint8, with its own
`nested_absmax` and `nested_quant_map`, and the JSON has the offset. Int8: `X.weight` (N, K) int8, `X.SCB` the largest
value of each row, `X.weight_format` 0 for row by row, the only order that the library still reads.

Source: bitsandbytes/functional.py `QuantState.as_dict`, nn/modules.py `Linear8bitLt._save_to_state_dict` at 0.50.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from ...errors import FileError
from ..model_file import ModelFile
from .base import Fault, Layer
from .broken import FLOATS, Broken, attempt, need, need_numel

if TYPE_CHECKING:
    from torch import Tensor

    from ...weight import QuantizedWeight
    from .base import Read

ID = "bnb"
STATE = ".quant_state"
KEY = "bitsandbytes__"
TYPES = ("nf4", "fp4")
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
DEFAULT_BLOCK_SIZE, NESTED_BLOCK_SIZE = 64, 256
DEFAULT_THRESHOLD = 6.0
CODE_TOLERANCE = 1e-6  # of the library's own comparison, `QuantState.__eq__`
_FAILS = "bitsandbytes, diffusers and transformers stop with an error."
_BYTES = "Loaders take the packed bytes for the weight: an error about its shape, or noise."


class BnbScheme:
    id = ID
    title = "bitsandbytes"
    library = "bitsandbytes"

    def find(self, file: ModelFile) -> Iterable[Layer | Fault]:
        threshold = _threshold(file)
        for group, lasts in file.groups.items():
            kinds = [last for last in lasts if last.startswith(KEY)]
            if group.endswith(STATE) and kinds:
                yield from _four_bit(file, group.removesuffix(STATE), kinds)
            elif f"{group}{STATE}" not in file.groups and _has_scales(file, group, lasts):
                text = f"'{group}{STATE}.{KEY}nf4' (or fp4), which has shape and block size, is missing."
                yield from _unusable(file, group, Fault("quant-state-missing", group, text, _FAILS))
            elif "SCB" in lasts or ("weight_format" in lasts and file.has(f"{group}.weight", "I8")):
                yield from _int8(file, group, threshold)

    def weight(self, layer: Layer, read: Read) -> QuantizedWeight:
        return _int8_weight(layer, read) if layer.format_id == "bnb-int8" else _four_bit_weight(layer, read)


def _has_scales(file: ModelFile, group: str, lasts: tuple[str, ...]) -> bool:
    """Whether a weight has a codebook, or block maxima alone, and is not of this pack's own layout, as `own` has it."""
    return "quant_map" in lasts or ("absmax" in lasts and group.endswith(".weight") and group not in file.metadata)


def _four_bit_weight(layer: Layer, read: Read) -> QuantizedWeight:
    import torch

    from ...weight import QuantizedWeight
    from ..quantized_file import DTYPES as TORCH

    t = {role: read(name) for role, name in layer.tensors.items() if role != "state"}
    _check_code(layer, t.pop("code"))
    tensors = {"qdata": t["qdata"].reshape(-1, 1), "absmax": t["absmax"].reshape(-1)}
    if "nested_absmax" in t:
        tensors |= {"nested_absmax": t["nested_absmax"], "nested_code": t["nested_code"]}
        tensors["offset"] = torch.tensor(float(layer.options["nested_offset"]))
    meta: dict[str, Any] = {"compute_dtype": None}
    if layer.options["block_size"] != DEFAULT_BLOCK_SIZE:
        meta["block_size"] = layer.options["block_size"]
    return QuantizedWeight(layer.format_id, tensors, layer.shape, TORCH[layer.dtype], meta)


def _check_code(layer: Layer, code: Tensor) -> None:
    """Raises:
    FileError: a codebook that is not the library's, whose kernels use their own whatever the file says.
    """
    import torch

    from ...registry import require_reader

    own = cast("Tensor", cast(Any, require_reader(layer.format_id)).codebook())
    if code.shape != own.shape or not bool(torch.allclose(code.float(), own, rtol=0, atol=CODE_TOLERANCE)):
        raise FileError(
            f"'{layer.tensors['code']}' is not the codebook of {layer.type}: {cast(Any, code).tolist()}.\n"
            "bitsandbytes computes with its own, so this file gives other values there than were meant; get it again."
        )


def _four_bit(file: ModelFile, name: str, kinds: list[str]) -> Iterator[Layer | Fault]:
    kind = kinds[0].removeprefix(KEY)
    tensors = {role: f"{name}{suffix}" for role, suffix in _PARTS.items() if f"{name}{suffix}" in file.entries}
    tensors |= {"state" if i == 0 else f"state_{i}": f"{name}{STATE}.{k}" for i, k in enumerate(kinds)}
    if name not in file.entries:
        text = f"'{name}' is missing, but its scales are there."
        yield Fault("weight-missing", name, text, _FAILS)
        return

    def make() -> Layer:
        if len(kinds) > 1 or kind not in TYPES:
            text = f"'{name}{STATE}' has {', '.join(kinds)}, expected one of {KEY}nf4 and {KEY}fp4."
            raise Broken("quant-state", name, text, _FAILS)
        state = _state(file, tensors["state"])
        shape, options = _shape(name, state), _options(name, state)
        _check_parts(file, name, shape, options)
        if options.get("nested_block_size", NESTED_BLOCK_SIZE) != NESTED_BLOCK_SIZE:
            why = (
                f"its block maxima are quantized in blocks of {options['nested_block_size']}, and here blocks of "
                f"{NESTED_BLOCK_SIZE}, the library's own choice, are loaded.\nConvert it with bitsandbytes first."
            )
            return Layer(name, ID, kind, "", tensors, shape, options["dtype"], options, why)
        return Layer(name, ID, kind, f"bnb-{kind}", tensors, shape, options.pop("dtype"), options)

    yield from attempt(make, name, ID, kind, tensors, file.entries[name].shape)


_PARTS = {
    **{"qdata": "", "absmax": ".absmax", "code": ".quant_map"},
    **{"nested_absmax": ".nested_absmax", "nested_code": ".nested_quant_map"},
}


def _state(file: ModelFile, name: str) -> dict[str, Any]:
    try:
        return file.json(name)
    except FileError as err:
        raise Broken("quant-state", name, f"'{name}' does not hold a JSON object.", _FAILS) from err


def _shape(name: str, state: Mapping[str, Any]) -> tuple[int, ...]:
    shape: object = state.get("shape")
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in cast("list[Any]", shape)):
        raise Broken("quant-state", name, f"'{name}{STATE}' has the shape {shape!r}, expected sizes.", _FAILS)
    return tuple(cast("list[int]", shape))


def _options(name: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """Block size, dtype, and of double quantization its numbers."""
    dtype, size = state.get("dtype"), state.get("blocksize")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        text = f"'{name}{STATE}' has dtype {dtype!r}, expected {', '.join(DTYPES)}."
        raise Broken("quant-state", name, text, _FAILS)
    if not _power(size):
        raise Broken("quant-state", name, f"'{name}{STATE}' has blocksize {size!r}, expected 32 to 4096.", _FAILS)
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "block_size": size, "double_quant": "nested_offset" in state}
    if options["double_quant"]:
        offset, nested = state["nested_offset"], state.get("nested_blocksize")
        if not isinstance(offset, int | float) or not math.isfinite(offset) or not _power(nested):
            text = f"'{name}{STATE}' has nested_offset {offset!r} and nested_blocksize {nested!r}, expected numbers."
            raise Broken("quant-state", name, text, _FAILS)
        options |= {"nested_block_size": nested, "nested_offset": float(offset)}
    return options


def _power(size: object) -> bool:
    return type(size) is int and 32 <= size <= 4096 and size & (size - 1) == 0


def _check_parts(file: ModelFile, name: str, shape: tuple[int, ...], options: Mapping[str, Any]) -> None:
    """Raises:
    Broken: a part is missing or has another size than shape and block size give.
    """
    numel = math.prod(shape)
    blocks = -(-numel // options["block_size"])
    packed = file.entries[name]
    if packed.nbytes != (numel + 1) // 2:
        text = f"'{name}' has {packed.nbytes} bytes, and shape {list(shape)} needs {(numel + 1) // 2}."
        raise Broken("weight-size", name, text, "bitsandbytes reads past the end, or leaves values out: noise.")
    nested = options["double_quant"]
    absmax = need(file, f"{name}.absmax", _FAILS, "U8" if nested else "F32")
    need_numel(absmax, blocks, "bitsandbytes reads past the end of the scales: noise.")
    need_numel(need(file, f"{name}.quant_map", _FAILS, "F32"), 16, _FAILS)
    if nested:
        need_numel(need(file, f"{name}.nested_quant_map", _FAILS, "F32"), 256, _FAILS)
        own = need(file, f"{name}.nested_absmax", _FAILS, "F32")
        need_numel(own, -(-blocks // options["nested_block_size"]), "bitsandbytes reads past the end: noise.")
    elif file.has(f"{name}.nested_absmax"):
        text = f"'{name}.nested_absmax' is there, but '{name}{STATE}' has no nested_offset."
        raise Broken("quant-state", name, text, _FAILS)


def _unusable(file: ModelFile, name: str, fault: Fault) -> Iterator[Layer | Fault]:
    yield fault
    if name in file.entries:
        tensors = {role: f"{name}{suffix}" for role, suffix in _PARTS.items() if f"{name}{suffix}" in file.entries}
        yield Layer(name, ID, "4-bit", "", tensors, file.entries[name].shape, why=fault.text)


def _int8(file: ModelFile, group: str, threshold: float) -> Iterator[Layer | Fault]:
    name, scale = f"{group}.weight", f"{group}.SCB"
    if name not in file.entries:
        yield Fault("weight-missing", name, f"'{name}' is missing, but its scales '{scale}' are there.", _FAILS)
        return
    roles = {"qdata": name, "absmax": scale, "weight_format": f"{group}.weight_format"}
    tensors = {role: tensor for role, tensor in roles.items() if tensor in file.entries}
    shape = file.entries[name].shape

    def make() -> Layer:
        need(file, name, _BYTES, "I8")
        if len(shape) != 2:
            raise Broken("tensor-shape", name, f"'{name}' has shape {list(shape)}, expected (N, K).", _FAILS)
        need_numel(need(file, scale, _FAILS, *FLOATS), shape[0], _FAILS)
        order = _order(file, tensors.get("weight_format"))
        if order:
            why = (
                f"its values are in the order {order} ('{group}.weight_format'), which bitsandbytes itself no longer "
                "reads.\nQuantize the original again, or save it anew with the version that wrote it."
            )
            return Layer(name, ID, "int8", "", tensors, shape, options={"order": order}, why=why)
        return Layer(name, ID, "int8", "bnb-int8", tensors, shape, options={"threshold": threshold})

    yield from attempt(make, name, ID, "int8", tensors, shape)


def _int8_weight(layer: Layer, read: Read) -> QuantizedWeight:
    import torch

    from ...weight import QuantizedWeight
    from ..quantized_file import DTYPES as TORCH

    absmax = read(layer.tensors["absmax"]).reshape(-1).to(torch.float32)
    tensors = {"qdata": read(layer.tensors["qdata"]), "absmax": absmax}
    meta = {"threshold": layer.options["threshold"]}
    return QuantizedWeight(layer.format_id, tensors, layer.shape, TORCH[layer.dtype], meta)


_ORDERS = {1: "col32", 2: "col_turing", 3: "col_ampere"}


def _order(file: ModelFile, name: str | None) -> str:
    """Empty for row by row."""
    if name is None:
        return ""
    need_numel(need(file, name, _FAILS, "U8", "I8", "I32", "I64"), 1, _FAILS)
    try:
        number = int.from_bytes(file.small(name), "little")
    except FileError as err:  # cut off
        raise Broken("tensor-missing", name, str(err).splitlines()[0], _FAILS) from err
    return _ORDERS.get(number, str(number)) if number else ""


def _threshold(file: ModelFile) -> float:
    """Of outlier columns, as the folder's config has it."""
    config: object = file.configs.get("config.json", {}).get("quantization_config")
    value: object = cast("dict[str, Any]", config).get("llm_int8_threshold") if isinstance(config, dict) else None
    return float(value) if isinstance(value, int | float) else DEFAULT_THRESHOLD
