"""Quantized layers read back as full-precision weights, for quantizing a model that is quantized already.

What can be read: our own layers, ComfyUI's quantized tensors (ours and its native ones), and the layers of bitsandbytes
and quanto, whose tensors dequantize themselves. Layers of other libraries are refused by name. Nothing is imported: a
model can hold a library's layers only if the library is loaded.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .compat.find import Found, find_carriers
from .compat.modes import Carrier
from .errors import WeightError
from .weight import QuantizedLinear


@dataclass(frozen=True)
class QuantizedLayer:
    """A quantized linear layer of a model.

    Attributes:
        format_id: what it is in.
        shape: (N, K) of the weight.
        dtype: of the dequantized weight.
        nbytes: of the parameters that hold the weight.
        read: dequantizes; the result is a new tensor.
    """

    format_id: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    read: Callable[[], Tensor]


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers of a module by name.

    Raises:
        WeightError: a layer that cannot be dequantized here; names it and what it holds.
    """
    held: dict[str, tuple[nn.Module, Found]] = {}
    plain: list[Tensor] = []
    for name, layer in cast("Iterator[tuple[str, nn.Module]]", model.named_modules()):
        # One layer at a time: `find_carriers` tells what a module and those below it hold.
        carriers = [] if _has_children(layer) else find_carriers(layer)
        if carriers:
            held[name] = layer, carriers[0]
        plain += [p for n, p in layer.named_parameters(recurse=False) if n == "bias" or not carriers]
    dtype = _prevailing_dtype(plain)
    found = {n: _layer(n or type(layer).__name__, layer, kind, dtype) for n, (layer, kind) in held.items()}
    groups = find_carriers(model)
    if sum(group.layers for group in groups) != len(found):
        first = (
            next(g for g in groups if g.name not in found) if any(g.name not in found for g in groups) else groups[0]
        )
        raise WeightError(
            f"'{first.name}': already quantized ({first.format_id}, {first.kind}) in a layer that holds others, which "
            "cannot be dequantized here.\nQuantize the full-precision model instead."
        )
    return found


def _has_children(layer: nn.Module) -> bool:
    return next(iter(layer.children()), None) is not None


def _prevailing_dtype(plain: list[Tensor]) -> torch.dtype:
    """What most values of a model are in; float16 where there are none, which bitsandbytes takes for int8."""
    count: Counter[torch.dtype] = Counter()
    for p in plain:
        if p.is_floating_point() and p.dtype.itemsize in (2, 4):
            count[p.dtype] += p.numel()
    return count.most_common(1)[0][0] if count else torch.float16


def _layer(name: str, layer: nn.Module, found: Found, model_dtype: torch.dtype) -> QuantizedLayer:
    if isinstance(layer, QuantizedLinear):
        weight = layer.quantized_weight
        return QuantizedLayer(
            found.format_id, layer.orig_shape, layer.orig_dtype, weight.nbytes, lambda: layer.weight.detach()
        )
    if not isinstance(getattr(layer, "weight", None), Tensor):  # NNCF's decompressors hold scales only
        raise _cannot(name, found)
    p = cast(Any, layer).weight
    nbytes = sum(t.numel() * t.element_size() for t in _stored(p))
    if not found.frozen:
        raise WeightError(f"'{name}': a quanto layer that is not frozen.\nQuantize the full-precision model instead.")
    if found.kind == "QuantizedTensor" or found.format_id.startswith("quanto-"):
        return QuantizedLayer(found.format_id, tuple(p.shape), p.dtype, nbytes, lambda: _plain(p.detach()))
    if found.kind == "Params4bit" and getattr(p, "quant_state", None) is not None:
        state = p.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            raise WeightError(
                f"'{name}': bitsandbytes has repacked this {found.format_id} layer for AVX512-BF16 at its first "
                "product, and rounded its scales.\n"
                "Load the model again and quantize it before it computes, or quantize the full-precision model."
            )
        return QuantizedLayer(found.format_id, tuple(state.shape), state.dtype, nbytes, lambda: _bnb_4bit(p))
    if found.kind == "Int8Params":
        # bitsandbytes moves the scales from the parameter to the layer's state at the first product.
        held_by = p if getattr(p, "SCB", None) is not None else getattr(layer, "state", None)
        scales = getattr(held_by, "SCB", None)
        if scales is not None:
            bias = getattr(layer, "bias", None)
            # The parameter itself keeps no dtype but int8.
            dtype = bias.dtype if isinstance(bias, Tensor) else model_dtype
            return QuantizedLayer(
                found.format_id, tuple(p.shape), dtype, nbytes, lambda: (p.data * (scales / 127)[:, None]).to(dtype)
            )
    raise _cannot(name, found)


def stored_nbytes(model: nn.Module) -> int:
    """Bytes of a module's parameters as they are held, quantized or not; shared ones once."""
    return sum(t.numel() * t.element_size() for p in model.parameters() for t in _stored(p))


def _cannot(name: str, found: Found) -> WeightError:
    carrier = "library" if found.carrier is Carrier.LIBRARY else found.carrier.value
    return WeightError(
        f"'{name}': already quantized ({found.format_id}, {carrier} carrier, {found.kind}), and this kind cannot be "
        "dequantized here.\nQuantize the full-precision model instead."
    )


def _stored(parameter: Any) -> list[Tensor]:
    """The plain tensors inside a tensor subclass, or the tensor itself."""
    names = ("_qdata", "_data", "_scale", "_shift")
    held = [t for n in names if isinstance(t := getattr(parameter, n, None), Tensor)]
    return [t for outer in held for t in _inner(outer)] or [parameter.data]


def _inner(t: Any) -> list[Tensor]:
    inner = getattr(t, "_data", None)  # quanto packs its sub-byte data in a tensor subclass of its own
    return [inner] if isinstance(inner, Tensor) and type(t) is not Tensor else [t]


def _plain(p: Any) -> Tensor:
    return p.dequantize()


def _bnb_4bit(p: Any) -> Tensor:
    """As one row of all values: with (N, K) the library's CPU kernel is wrong for some K, see `backends/bnb`."""
    functional: Any = sys.modules["bitsandbytes.functional"]
    state = copy.copy(p.quant_state)
    shape = torch.Size(state.shape)
    state.shape = torch.Size((1, shape.numel()))
    # Bytes, whatever dtype they are held as; the library's operators know only some.
    packed = p.data.reshape(-1).view(torch.uint8).unsqueeze(1)
    return functional.dequantize_4bit(packed, state).reshape(shape)
