"""Quantized weights as plain tensors, and the layer that computes with them.

A `QuantizedWeight` is a name -> tensor map plus a little JSON. A `QuantizedLinear` holds the same tensors as ordinary
`nn.Parameter`s with `requires_grad=False`. Tensor subclasses with attributes were not chosen: accelerate's meta
round trip, ComfyUI's dynamic VRAM and `copy.deepcopy` each lose the attributes of at least one of them, while plain
parameters survive them all. Buffers were not chosen either: accelerate leaves buffers on the compute device by default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import WeightError
from .meta import TensorMeta as TensorMeta

if TYPE_CHECKING:
    from .kernels.kept import KeptWeights


@dataclass(frozen=True, eq=False)  # identity: tensors have no single truth value to compare with
class QuantizedWeight:
    """One weight in one format, held as plain tensors.

    Attributes:
        format_id: registry id, such as `bnb-nf4`.
        tensors: `qdata` and whatever the format needs beside it (`scale`, `absmax`, ...); the shapes are the backend's.
        orig_shape: (N, K) of the weight that was quantized.
        orig_dtype: its dtype.
        meta: JSON values that dequantizing needs (block size, quant type, ...).
    """

    format_id: str
    tensors: Mapping[str, Tensor]
    orig_shape: tuple[int, ...]
    orig_dtype: torch.dtype
    meta: Mapping[str, Any] = field(default_factory=lambda: dict[str, Any]())

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))
        object.__setattr__(self, "meta", MappingProxyType(dict(self.meta)))

    def __reduce__(self) -> tuple[Any, ...]:
        # A mappingproxy can be neither copied nor pickled.
        fields = (self.format_id, dict(self.tensors), self.orig_shape, self.orig_dtype, dict(self.meta))
        return QuantizedWeight, fields

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def numel(self) -> int:
        return math.prod(self.orig_shape)

    def with_tensors(self, tensors: Mapping[str, Tensor], orig_shape: tuple[int, ...] | None = None) -> QuantizedWeight:
        """The same weight on other tensors (moved, sliced by rows, ...)."""
        return QuantizedWeight(self.format_id, tensors, orig_shape or self.orig_shape, self.orig_dtype, self.meta)


class QuantizedLinear(nn.Module):
    """A linear layer on a `QuantizedWeight`.

    The quantized tensors are parameters named as in `QuantizedWeight.tensors`. Their dtypes never change: `.to(dtype)`
    and `.half()` move the bias only, since casting scales would change the weights silently.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__()
        from .registry import get_quantizer

        self.format_id = weight.format_id
        self.meta: Mapping[str, Any] = dict(weight.meta)
        self.orig_shape = weight.orig_shape
        self.orig_dtype = weight.orig_dtype
        self.out_features, self.in_features = weight.orig_shape
        self.tensor_names = tuple(weight.tensors)
        for name, tensor in weight.tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._quantizer = get_quantizer(weight.format_id)
        self.kept: KeptWeights | None = None  # set by loaders with `cache_mib`

    @property
    def quantized_weight(self) -> QuantizedWeight:
        tensors = {name: getattr(self, name).data for name in self.tensor_names}
        return QuantizedWeight(self.format_id, tensors, self.orig_shape, self.orig_dtype, self.meta)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight (N, K) in its original dtype, made anew at each access: code outside reads
        `linear.weight.dtype`, `.device` or `.shape`."""
        return self._quantizer.dequantize(self.quantized_weight, self.orig_dtype)

    def forward(self, x: Tensor) -> Tensor:
        q = self.quantized_weight
        if self.kept is not None and not torch.compiler.is_compiling():
            held = [getattr(self, name) for name in self.tensor_names]
            weight = self.kept.get(self, q, x.dtype, lambda: self._quantizer.dequantize(q, x.dtype), held)
            if weight is not None:
                return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))
        return self._quantizer.linear(x, q, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, format={self.format_id}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            if moved.dtype == t.dtype or t is self.bias:
                return moved
            return t.to(moved.device)

        before = self._device
        cast(Any, super())._apply(keep_dtype, recurse)
        if self.kept is not None:
            self.kept.moved(self, self._device != before)
        return self

    @property
    def _device(self) -> torch.device:
        return getattr(self, self.tensor_names[0]).device

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        refuse_full_precision_load(state_dict, prefix, self.format_id)
        for name in self.tensor_names:
            value, expected = state_dict.get(prefix + name), getattr(self, name).dtype
            if isinstance(value, Tensor) and value.dtype != expected:
                raise WeightError(
                    f"'{prefix}{name}': dtype is {value.dtype}, expected {expected}.\n"
                    f"{self.format_id} tensors are never cast: the values would change."
                )
        cast(Any, super())._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.kept is not None:
            self.kept.drop(self)


def refuse_full_precision_load(state_dict: Mapping[str, Any], prefix: str, format_id: str) -> None:
    """Refuse floating-point weights on their way into storage that is already quantized.

    PyTorch would copy them in, value by value rounded to the storage dtype, with every key "matched"; the scales still
    belong to the old weight, so the result is noise (relative error 0.9999 measured with bitsandbytes int8).

    Raises:
        WeightError: `state_dict` has a floating-point `prefix + "weight"`.
    """
    value = state_dict.get(prefix + "weight")
    if isinstance(value, Tensor) and value.is_floating_point():
        raise WeightError(
            f"'{prefix}weight': full-precision values ({value.dtype}) cannot be loaded into {format_id} storage, which "
            "is already quantized; the result would be noise.\n"
            "Load the full-precision weights into the unquantized model first, then quantize it."
        )


@dataclass(frozen=True)
class FullPrecisionGuard:
    """`refuse_full_precision_load` as a pre-hook of `load_state_dict`, for layers of a library.

    A class and not a closure, so that a guarded layer can still be pickled.
    """

    format_id: str

    def __call__(self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *rest: object) -> None:
        refuse_full_precision_load(state_dict, prefix, self.format_id)
