"""fp8 weights with scales that no `comfy_quant` announces.

Old: a tensor `scaled_fp8` (of two values where the product is to be in full precision, else of any other number), and
per layer `X.weight` fp8, `X.scale_weight`, and perhaps `X.scale_input` (1 stands for none). ComfyUI still reads it:
every `scale_weight` makes a layer of format float8_e4m3fn, whatever dtype the marker or the weight has.
New: `X.weight` fp8 with `X.weight_scale` (one value, or one a row) and perhaps `X.input_scale`, as other programs write
them. ComfyUI knows those layers by `comfy_quant` alone, and without it uses the fp8 values unscaled.

One scale gives `comfy-fp8-*`, one a row `quanto-qfloat8-*`, which holds the same numbers. Scales of blocks
(`weight_scale_inv` of 128 x 128 values, as DeepSeek has them) are named: no format here holds those.

Source: Comfy-Org/ComfyUI comfy/utils.py `convert_old_quants` at 0.33.0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ..faults import STOCK_LOADERS
from ..model_file import Entry, ModelFile
from .base import Fault, Layer
from .broken import FLOATS, attempt, need
from .comfy import marked
from .comfy_parts import fp8, need_matrix
from .values import one_value

if TYPE_CHECKING:
    from ...weight import QuantizedWeight
    from .base import Read

MARKER = "scaled_fp8"
SURPLUS = "scale-surplus"
FP8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_NOISE = "ComfyUI uses the fp8 values without their scales: noise."


class ScaledFp8Scheme:
    id = "scaled-fp8"
    title = "scaled fp8"
    library = "older ComfyUI, and others"

    def find(self, file: ModelFile) -> Iterable[Layer | Fault]:
        markers = find_markers(file)
        old = [name for name, lasts in file.groups.items() if "scale_weight" in lasts]
        yield from _marker_faults(markers, old)
        surplus = [name for name in old if _is_surplus(file, name)]
        yield from _surplus_faults(file, surplus)
        unclaimed = dict.fromkeys((*markers, *(n for name in surplus for n in _scales(file, name))))
        idle = set(surplus)
        for name in (name for name in old if name not in idle):
            for found in self._old(file, name, markers):
                if isinstance(found, Layer) and unclaimed:  # these belong to no weight, but not to the model either
                    roles = {f"marker_{i}" if i else "marker": m for i, m in enumerate(unclaimed)}
                    found, unclaimed = dataclasses.replace(found, tensors={**found.tensors, **roles}), {}
                yield found
        yield from self._new(file, set(old))

    def _old(self, file: ModelFile, name: str, markers: tuple[str, ...]) -> Iterator[Layer | Fault]:
        weight, scale = file.entries.get(f"{name}.weight"), f"{name}.scale_weight"
        if weight is None:
            text = f"'{scale}' is there without '{name}.weight'."
            yield Fault("scale-without-weight", scale, text, "ComfyUI leaves the layer empty and fails there.", False)
            return
        roles = {"qdata": weight.name, "scale": scale}
        if f"{name}.scale_input" in file.entries:
            roles["input_scale"] = f"{name}.scale_input"
        effect = "ComfyUI casts the weight to float8_e4m3fn and multiplies with the scale: noise."
        doubts: list[Fault] = []
        yield from attempt(
            lambda: self._layer(file, weight, roles, "old", effect, _full(file, markers, name), doubts),
            weight.name, self.id, "scaled fp8", roles, weight.shape,
        )  # fmt: skip
        yield from doubts
        if weight.dtype == "F8_E5M2":
            text = f"'{weight.name}' is F8_E5M2, and a layer with scale_weight is F8_E4M3 to ComfyUI."
            effect = "ComfyUI casts it: values above 448 are lost."
            yield Fault("tensor-dtype", weight.name, text, effect, False, STOCK_LOADERS)

    def _new(self, file: ModelFile, old: set[str]) -> Iterator[Layer | Fault]:
        named = marked(file)
        silent: list[str] = []
        for name, lasts in file.groups.items():
            if name in named or name in old:
                continue
            if "weight_scale_inv" in lasts and file.has(f"{name}.weight", *FP8):
                yield self._blocks(file, name, f"{name}.weight_scale_inv")
            elif "weight_scale" in lasts and file.has(f"{name}.weight", *FP8):
                if file.has(f"{name}.weight_scale", "F8_E8M0"):
                    continue  # mxfp8
                yield from self._with_scale(file, name)
                silent.append(name)
            elif "weight_scale" in lasts and not any(x.startswith("weight") and x != "weight_scale" for x in lasts):
                text = f"'{name}.weight_scale' is there without '{name}.weight'."
                yield Fault("scale-without-weight", f"{name}.weight_scale", text, "Loaders pass over it.", False)
        if silent and not file.configs:
            text = f"{len(silent)} layers have 'weight_scale' but no 'comfy_quant', such as '{silent[0]}'."
            yield Fault("comfy-quant-missing", silent[0], text, _NOISE, False, STOCK_LOADERS)

    def _with_scale(self, file: ModelFile, name: str) -> Iterator[Layer | Fault]:
        weight, scale = file.entries[f"{name}.weight"], file.entries[f"{name}.weight_scale"]
        if _is_blocks(weight, scale):
            yield self._blocks(file, name, scale.name)
            return
        roles = {"qdata": weight.name, "scale": scale.name}
        if f"{name}.input_scale" in file.entries:
            roles["input_scale"] = f"{name}.input_scale"
        yield from attempt(
            lambda: self._layer(file, weight, roles, "new", _NOISE, False, []),
            weight.name, self.id, "scaled fp8", roles, weight.shape,
        )  # fmt: skip

    def _layer(
        self,
        file: ModelFile,
        weight: Entry,
        roles: dict[str, str],
        style: str,
        effect: str,
        full: bool,
        doubts: list[Fault],
    ) -> Layer:
        need(file, weight.name, effect, *FP8)
        need_matrix(weight)
        seen = fp8(file, weight, roles["scale"], _NOISE, flat=style == "new")
        doubts.extend(seen.doubts)
        options = {**seen.options, "style": style}
        if "input_scale" in roles:
            options["input_scale"] = True
        if full:
            options["full_precision_matrix_mult"] = True
        return Layer(
            weight.name, self.id, f"scaled {FP8[weight.dtype]}", seen.format_id, roles, weight.shape, options=options
        )

    def _blocks(self, file: ModelFile, name: str, scale: str) -> Layer:
        weight = file.entries[f"{name}.weight"]
        shape = file.entries[scale].shape
        why = (
            f"its scales {list(shape)} are of blocks of rows and columns, which no format here holds.\n"
            "Use a file with one scale a tensor or a row, or quantize the original."
        )
        roles = {"qdata": weight.name, "scale": scale}
        if f"{name}.input_scale" in file.entries:
            roles["input_scale"] = f"{name}.input_scale"
        kind = f"{FP8[weight.dtype]} in blocks"
        if file.entries[scale].numel == 1 < weight.numel:
            kind = f"{FP8[weight.dtype]} with one inverse scale"
            why = (
                f"'{scale}' is one value, and the name does not tell whether it is multiplied or divided by.\n"
                "Use a file with 'weight_scale', or quantize the original."
            )
        return Layer(weight.name, self.id, kind, "", roles, weight.shape, options={"scale": list(shape)}, why=why)

    def weight(self, layer: Layer, read: Read) -> QuantizedWeight:
        import torch

        from ...weight import QuantizedWeight
        from ..quantized_file import DTYPES

        scale = read(layer.tensors["scale"]).to(torch.float32)  # of float16 and bfloat16 without rounding
        scale = scale.reshape(()) if layer.options["scale"] == "tensor" else scale.reshape(-1, 1)
        tensors = {"qdata": read(layer.tensors["qdata"]), "scale": scale}
        return QuantizedWeight(layer.format_id, tensors, layer.shape, DTYPES[layer.dtype])


def find_markers(file: ModelFile) -> tuple[str, ...]:
    """Tensors that say that the fp8 weights behind their prefix have scales."""
    return tuple(name for name in file.entries if name.rpartition(".")[2] == MARKER)


def _is_surplus(file: ModelFile, name: str) -> bool:
    """Whether a scale is 1 beside a weight that is no fp8 matrix: the weight is what it would be without."""
    weight = file.entries.get(f"{name}.weight")
    if weight is None or weight.dtype not in (*FP8, *FLOATS) or (weight.dtype in FP8 and len(weight.shape) == 2):
        return False
    return one_value(file, f"{name}.scale_weight") == 1


def _surplus_faults(file: ModelFile, surplus: list[str]) -> Iterator[Fault]:
    """Converters write a scale for all layers, those that they keep included."""
    matrices = [name for name in surplus if len(file.entries[f"{name}.weight"].shape) == 2]
    for names, effect in (
        (matrices, "ComfyUI casts the weight to float8_e4m3fn: it loses precision."),
        ([name for name in surplus if name not in set(matrices)], "Loaders pass over it."),
    ):
        if names:
            weight = file.entries[f"{names[0]}.weight"]
            text = (
                f"{len(names)} scales are 1 beside weights that are no fp8 matrices, such as "
                f"'{names[0]}.scale_weight' beside {weight.dtype} {list(weight.shape)}."
            )
            yield Fault(SURPLUS, f"{names[0]}.scale_weight", text, effect, fatal=False)


def surplus_scales(file: ModelFile) -> tuple[str, ...]:
    """The tensors that such a file is the same without."""
    names = [name for name, lasts in file.groups.items() if "scale_weight" in lasts and _is_surplus(file, name)]
    return tuple(n for name in names for n in _scales(file, name))


def _scales(file: ModelFile, name: str) -> Iterator[str]:
    return (n for n in (f"{name}.scale_weight", f"{name}.scale_input") if n in file.entries)


def _full(file: ModelFile, markers: tuple[str, ...], name: str) -> bool:
    """Whether a layer's product is to be in full precision: its marker has two values."""
    own = [m for m in markers if name.startswith(m.removesuffix(MARKER))]
    return bool(own) and file.entries[max(own, key=len)].numel == 2


def _is_blocks(weight: Entry, scale: Entry) -> bool:
    two = len(weight.shape) == len(scale.shape) == 2
    return two and scale.numel > 1 and scale.shape[1] > 1 and scale.shape[0] <= weight.shape[0]


def _marker_faults(markers: tuple[str, ...], old: list[str]) -> Iterator[Fault]:
    bare = [name for name in old if not any(name.startswith(m.removesuffix(MARKER)) for m in markers)]
    if bare:
        text = f"{len(bare)} layers have 'scale_weight' but no '{MARKER}' says so, such as '{bare[0]}'."
        yield Fault("scaled-fp8-missing", bare[0], text, _NOISE, False, STOCK_LOADERS)
    for marker in markers:
        if not any(name.startswith(marker.removesuffix(MARKER)) for name in old):
            text = f"'{marker}' says that fp8 weights have scales, but no 'scale_weight' is there."
            effect = "ComfyUI uses the fp8 values as they are: noise if they were scaled before."
            yield Fault("scaled-fp8-without-scales", marker, text, effect, fatal=False)
