"""The pack's own layout, which holds every format: see `quantized_file`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from ..model_file import ModelFile
from .base import Fault, Layer
from .broken import Broken, attempt

if TYPE_CHECKING:
    from ...weight import QuantizedWeight
    from .base import Read

KEY = "quantwire"
VERSION = 1  # of `quantized_file`, which imports torch
DTYPES = ("BF16", "F16", "F32", "F64")  # of weights that were quantized
_REFUSED = "Quantwire refuses the file."


class OwnScheme:
    id = "quantwire"
    title = "quantwire"
    library = "quantwire"

    def find(self, file: ModelFile) -> Iterable[Layer | Fault]:
        own = _object(file.metadata.get(KEY, ""))
        if own is None:
            return
        if own.get("version") != VERSION:
            text = f"layout version {own.get('version')!r}, expected {VERSION}."
            yield Fault("version", KEY, text, "Its quantized weights cannot be read; update quantwire.")
            return
        for name, value in file.metadata.items():
            layer = _object(value) if name != KEY else None
            if layer is not None and "format_id" in layer:
                yield from self._layer(file, name, layer)

    def _layer(self, file: ModelFile, name: str, layer: Mapping[str, Any]) -> Iterator[Layer | Fault]:
        roles = {part: _key(name, part) for part in _parts(layer) if _key(name, part) in file.entries}
        yield from attempt(
            lambda: self._checked(file, name, layer), name, self.id, str(layer["format_id"]), roles, _shape(layer)
        )

    def _checked(self, file: ModelFile, name: str, layer: Mapping[str, Any]) -> Layer:
        from ...registry import is_format  # few files need the table of formats

        roles = {part: _key(name, part) for part in _parts(layer)}
        missing = [tensor for tensor in roles.values() if tensor not in file.entries]
        if missing or "qdata" not in roles:
            first = missing[0] if missing else name
            raise Broken("tensor-missing", first, f"'{first}', a part of '{name}', is missing.", _REFUSED)
        shape, dtype, meta = _shape(layer), layer.get("orig_dtype"), layer.get("meta")
        if not shape or dtype not in DTYPES or not isinstance(meta, dict):
            text = f"the metadata of '{name}' lacks orig_shape, orig_dtype or meta."
            raise Broken("metadata-json", name, text, _REFUSED)
        format_id, options = str(layer["format_id"]), cast("dict[str, Any]", meta)
        if not is_format(format_id):
            why = f"this version does not know the format {format_id!r}.\nUpdate quantwire."
            return Layer(name, self.id, format_id, "", roles, shape, str(dtype), options, why)
        return Layer(name, self.id, format_id, format_id, roles, shape, str(dtype), options)

    def weight(self, layer: Layer, read: Read) -> QuantizedWeight:
        from ...weight import QuantizedWeight
        from ..quantized_file import DTYPES as TORCH

        tensors = {part: read(name) for part, name in layer.tensors.items()}
        return QuantizedWeight(layer.format_id, tensors, layer.shape, TORCH[layer.dtype], layer.options)


def _object(text: str) -> dict[str, Any] | None:
    if not text.startswith("{"):  # most metadata of other programs is not even tried
        return None
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def _parts(layer: Mapping[str, Any]) -> list[str]:
    parts: object = layer.get("tensors")
    return [str(part) for part in cast("list[Any]", parts)] if isinstance(parts, list) else []


def _shape(layer: Mapping[str, Any]) -> tuple[int, ...]:
    """Empty where it is none."""
    shape: object = layer.get("orig_shape")
    sizes = tuple(cast("list[Any]", shape)) if isinstance(shape, list) else ()
    return sizes if sizes and all(type(n) is int and n > 0 for n in sizes) and math.prod(sizes) else ()


def _key(name: str, part: str) -> str:
    return name if part == "qdata" else f"{name}.{part}"
