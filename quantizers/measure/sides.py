"""What two comparisons' sides are made of: the tensors of files and of modules, under names that both have.

Files of one layout are compared under their own names. Where layouts or prefixes differ, both are put into ComfyUI's
(text encoders into transformers') by `files/layouts`, which takes and moves rows and changes no value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..dequantize import quantized_layers
from ..errors import FileError, WeightError
from ..files.architectures import DROPPABLE, Found, comfyui_targets, known_model
from ..files.layer_rows import LayerRows
from ..files.layouts.target import Piece, Target, target
from ..files.quantized_source import PADS
from ..files.sources import Assembled, Source, open_source
from ..files.text_keys import find_heads
from ..files.whole_model import model_of
from ..weight import QuantizedLinear, TensorMeta

Rows = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Weight:
    """One tensor of a side.

    Attributes:
        shape: logical shape.
        stored: format id, ggml type or dtype.
        open: maps or prepares it; the result gives rows [start, stop) as (rows, values a row) float32 on the CPU.
        padded: it may have rows and columns of zeros behind the weight.
    """

    shape: tuple[int, ...]
    stored: str
    open: Callable[[], Rows]
    padded: bool = False


@dataclass(frozen=True)
class Side:
    """One of the two models.

    Attributes:
        label: file name, or what a model object is called.
        skipped: tensors that hold no floating-point values.
    """

    label: str
    weights: Mapping[str, Weight]
    skipped: int = 0


@dataclass(frozen=True)
class Sides:
    """Two sides, and what has to be said of how they were matched."""

    a: Side
    b: Side
    notes: tuple[str, ...] = ()


def file_sides(a: Path, b: Path) -> Sides:
    """The tensors of two files under common names; only headers are read.

    Raises:
        FileError: a file cannot be read, or they hold different models.
        BackendUnavailable: a library that reading needs is missing.
    """
    sources = [open_source(path if path.is_dir() else model_of(path)) for path in (a, b)]
    first, second = (known_model(source.metas) for source in sources)
    if first is not None and second is not None and _model(first) != _model(second):
        raise FileError(
            f"{a.name} is {first.family or first.architecture} ({first.component}), {b.name} is "
            f"{second.family or second.architecture} ({second.component}).\nGive two versions of one model."
        )
    labels = _labels(a, b)
    if first is None or second is None or _layout(first) == _layout(second):
        sides = [_side(s, label, _own_targets(s)) for s, label in zip(sources, labels, strict=True)]
        return Sides(sides[0], sides[1])
    found = (first, second)
    sides = [
        _side(s, label, comfyui_targets(f, s.metas, find_heads(f, s)[0]))
        for s, label, f in zip(sources, labels, found, strict=True)
    ]
    told = " and ".join(f"{f.layout} below '{f.prefix}'" if f.prefix else f.layout for f in found)
    return Sides(sides[0], sides[1], (f"layouts {told}: compared under ComfyUI's names",))


def module_side(components: Mapping[str, nn.Module], label: str) -> Side:
    """The parameters of modules, quantized layers as weights.

    Args:
        components: of `Host.components`; with several, the component's name stands before those of its parameters.
    Raises:
        WeightError: layers of a library that cannot be dequantized here.
    """
    weights: dict[str, Weight] = {}
    skipped = 0
    for component, module in components.items():
        prefix = f"{component}." if len(components) > 1 else ""
        try:
            layers = quantized_layers(module)
        except WeightError as err:
            raise WeightError(f"{label}: {str(err).splitlines()[0]}\nCompare a model of carrier quantwire.") from err
        walked: Iterator[tuple[str, nn.Module]] = cast(Any, module).named_modules()
        held = dict(walked)
        for name, layer in layers.items():
            weights[f"{prefix}{name}.weight"] = Weight(
                layer.shape, layer.format_id, _layer_rows(held[name], layer.read)
            )
        inside = tuple(f"{name}." for name in layers)
        named = cast("Iterator[tuple[str, Tensor]]", module.named_parameters(remove_duplicate=False))
        for name, parameter in named:
            if name.startswith(inside) and not name.endswith(".bias"):
                continue
            if not parameter.is_floating_point():
                skipped += 1
                continue
            _refuse_meta(label, name, parameter)
            weights[f"{prefix}{name}"] = Weight(tuple(parameter.shape), _dtype(parameter), _tensor_rows(parameter))
    return Side(label, weights, skipped)


def _model(found: Found) -> tuple[str, str]:
    return found.family or found.architecture, found.component


def _layout(found: Found) -> tuple[str, str]:
    return found.layout, found.prefix


def _labels(a: Path, b: Path) -> tuple[str, str]:
    return (a.name, b.name) if a.name != b.name else (f"{a.parent.name}/{a.name}", f"{b.parent.name}/{b.name}")


def _own_targets(source: Source) -> list[Target]:
    return [target(_usual(n), (Piece(n),), source.metas) for n in source.metas if not DROPPABLE.search(n)]


def _usual(name: str) -> str:
    """FLUX's query and key norms go by two names, which every loader reads."""
    for norm in ("query_norm", "key_norm"):
        if name.endswith(f".norm.{norm}.weight"):
            return f"{name.removesuffix('weight')}scale"
    return name


def _side(source: Source, label: str, targets: list[Target]) -> Side:
    weights: dict[str, Weight] = {}
    skipped = 0
    for made in targets:
        metas = [source.metas[piece.source] for piece in made.pieces]
        if not all(meta.dtype.is_floating_point for meta in metas):
            skipped += 1
            continue
        kinds = dict.fromkeys(_kind(source, meta) for meta in metas)
        padded = any(source.kinds.get(meta.name, "") in PADS for meta in metas)
        weights[made.name] = Weight(made.shape, ", ".join(kinds), _opener(source, made), padded)
    return Side(label, weights, skipped)


def _kind(source: Source, meta: TensorMeta) -> str:
    return source.kinds.get(meta.name) or str(meta.dtype).removeprefix("torch.")


def _opener(source: Source, made: Target) -> Callable[[], Rows]:
    def open_() -> Rows:
        assembled = Assembled(made, source.open)

        def rows(start: int, stop: int) -> Tensor:
            parts = [part.to(torch.float32) for part in assembled.values(start, stop)]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        return rows

    return open_


def _layer_rows(layer: nn.Module, read: Callable[[], Tensor]) -> Callable[[], Rows]:
    """Rows of a quantized layer: of ours in float32, of a library's in the dtype that it dequantizes to."""

    def open_() -> Rows:
        if not isinstance(layer, QuantizedLinear):
            return _plain_rows(read())
        weight = layer.quantized_weight
        if any(t.device.type != "cpu" for t in weight.tensors.values()):
            weight = weight.with_tensors({name: t.cpu() for name, t in weight.tensors.items()})
        held = LayerRows(weight)
        return lambda start, stop: held.values(torch.arange(start, stop))

    return open_


def _tensor_rows(tensor: Tensor) -> Callable[[], Rows]:
    return lambda: _plain_rows(tensor.detach())


def _plain_rows(tensor: Tensor) -> Rows:
    flat = tensor.reshape(tensor.shape[0] if tensor.dim() else 1, -1)
    return lambda start, stop: flat[start:stop].to("cpu", torch.float32)


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _refuse_meta(label: str, name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise WeightError(
            f"{label}: '{name}' is on the device meta, where a tensor has a shape but no values.\n"
            "Compare models whose weights are in memory."
        )
