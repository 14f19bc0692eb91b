"""Codes whose scales are gone: what is left of weights when a program drops the tensors that it does not know.

Two kinds. A matrix of integers named `X.weight` that no scheme knows: full-precision models have none, so it holds
codes. And an fp8 matrix without a scale in a component where others have scales that are not 1: read as a plain cast it
is off by its scale. Loaders say nothing of either, so both are named here and not loaded. Embeddings in fp8 may stand
beside scaled layers, as older programs had scales for linear layers alone: they are read as a plain cast, with a
warning.

This looks at what all schemes found, so it comes after them, and is none of those that claim layers one by one.

Source: Comfy-Org/ComfyUI comfy/utils.py `convert_old_quants`, comfy/ops.py at 0.33.0: a weight that neither
`scale_weight` nor `comfy_quant` names is cast to the dtype of the model, number by number, integers too.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from ...errors import FileError
from ..model_file import Entry, ModelFile
from .base import Fault, Layer
from .plain_fp8 import TYPES, PlainFp8Scheme
from .values import one_value

if TYPE_CHECKING:
    from ...weight import QuantizedWeight
    from .base import Read

ID = "unclaimed"
CODE = "scale-missing"
INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
_NOISE = "Loaders take the codes for the weight: noise."
_ERROR_OR_NOISE = "Loaders take the codes for the weight: an error about its shape, or noise."
_TODO = "Get the file again from who made it, or quantize the original."
_SCALED = ("scaled float8", "float8_")  # beginnings of the types of fp8 layers that have scales
_EMBEDDING = re.compile(r"(^|[._])(shared|wte|[a-z_]*embed(ding|dings|_tokens|der)?|tok_embeddings)\.weight$")
_SECTION = re.compile(
    r"model_ema\.|model\.diffusion_model\.|first_stage_model\.|vae\.|cond_stage_model\.|conditioner\.embedders\.\d+\.|"
    r"text_encoders?(_\d)?\.(?:[^.]+\.transformer\.)?"
)


class UnclaimedScheme:
    id = ID
    title = "codes without scales"
    library = "unknown"

    def find(self, file: ModelFile) -> Iterable[Layer | Fault]:
        return self.rest(file, {})

    def rest(self, file: ModelFile, layers: Mapping[str, Layer]) -> Iterator[Layer | Fault]:
        """What the layers of the other schemes leave.

        Yields:
            Layers by name only, which replace those of the same name, and faults.
        """
        owned = {tensor for layer in layers.values() for tensor in layer.tensors.values()} | set(layers)
        owned |= set(file.metadata)  # of this pack's own layout, which tells for itself what is wrong
        for name, entry in file.entries.items():
            if entry.dtype in INTEGERS and name.endswith(".weight") and len(entry.shape) > 1 and name not in owned:
                yield from _integers(file, entry)
        yield from _unscaled(file, layers)

    def weight(self, layer: Layer, read: Read) -> QuantizedWeight:
        raise FileError(f"'{layer.name}' is {layer.type}: {layer.why}")


def _integers(file: ModelFile, entry: Entry) -> Iterator[Layer | Fault]:
    if not entry.numel:
        return
    module = entry.name.removesuffix(".weight")
    named = [last for last in file.groups[module] if last not in ("weight", "bias")]
    more = [f"weight.{last}" for last in file.groups.get(entry.name, ())]
    beside = f" beside {', '.join([*named, *more])}" if named or more else ""
    text = f"'{entry.name}' is {entry.dtype} {list(entry.shape)}{beside}: codes whose scales are missing."
    yield Fault(CODE, entry.name, text, _ERROR_OR_NOISE)
    why = f"its codes have no scales that are known here, so its values are lost.\n{_TODO}"
    yield Layer(entry.name, ID, f"{entry.dtype} codes", "", {"qdata": entry.name}, entry.shape, why=why)


def _unscaled(file: ModelFile, layers: Mapping[str, Layer]) -> Iterator[Layer | Fault]:
    """fp8 layers without a scale, in components where others have one."""
    plain = [layer for layer in layers.values() if layer.scheme == PlainFp8Scheme.id]
    scaled: dict[str, list[Layer]] = {}
    for layer in layers.values() if plain else ():
        is_fp8 = layer.type.startswith(_SCALED) and file.has(layer.tensors.get("qdata", ""), *TYPES)
        if is_fp8 and "scale" in layer.tensors:
            scaled.setdefault(_section(layer.name), []).append(layer)
    for layer in plain:
        others = scaled.get(_section(layer.name), [])
        if not any(one_value(file, other.tensors["scale"]) != 1 for other in others):
            continue
        text = f"'{layer.name}' is {file.entries[layer.name].dtype} without a scale, and {len(others)} layers have one."
        if _EMBEDDING.search(layer.name):
            effect = "Loaders use its values as they are: noise, if it had a scale before"
            yield Fault(CODE, layer.name, text, f"{effect}, and right, if it was cast.", fatal=False)
            continue
        yield Fault(CODE, layer.name, text, _NOISE)
        why = f"it has no scale, and {len(others)} other layers have one, so its values are lost.\n{_TODO}"
        yield dataclasses.replace(layer, scheme=ID, type=f"{layer.type} without its scale", format_id="", why=why)


def _section(name: str) -> str:
    """The component that a tensor of a checkpoint belongs to, by the beginning of its name."""
    found = _SECTION.match(name)
    return found.group() if found else ""
