"""A conformance case with what the registry makes of it, and how tensors are made and compared."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from quantwire.hosts.standalone.native_gguf import make_gguf_linear
from quantwire.quantizers.base import Quantizer
from quantwire.quantizers.plan import refusal_of
from quantwire.quantizers.registry import availability, get_entry, get_quantizer
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedLinear, QuantizedWeight, TensorMeta
from torch import Tensor, nn

from .case import Case

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Subject:
    """A case with what the registry makes of it."""

    case: Case

    @cached_property
    def spec(self) -> QuantSpec:
        return QuantSpec.from_uri(self.case.uri)

    @property
    def format_id(self) -> str:
        return self.spec.format_id

    @property
    def backend(self) -> str:
        return get_entry(self.format_id).backend

    @property
    def quantizer(self) -> Quantizer:
        return get_quantizer(self.format_id)

    @property
    def works(self) -> bool:
        return availability(self.format_id).works

    def weight(self, dtype: torch.dtype, seed: int = 0) -> Tensor:
        return values(*self.case.shape, seed=seed, dtype=dtype)

    def bias(self, dtype: torch.dtype, seed: int = 1) -> Tensor:
        return values(self.case.shape[0], seed=seed, dtype=dtype)

    def x(self, dtype: torch.dtype, *rows: int) -> Tensor:
        return values(*rows, self.case.shape[1], seed=2, dtype=dtype)

    def refuse(self, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        return refusal_of(self.quantizer, self.spec, TensorMeta("w.weight", shape, dtype))

    def quantize(self, w: Tensor) -> QuantizedWeight:
        return self.quantizer.quantize(w, self.spec)

    def quantized(self, dtype: torch.dtype, seed: int = 0) -> QuantizedWeight:
        return self.quantize(self.weight(dtype, seed))

    def dequantize(self, q: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.quantizer.dequantize(q, dtype)

    def native(self, q: QuantizedWeight, bias: Tensor | None) -> nn.Module:
        # The only layers for GGUF are those of diffusers, which a host makes.
        return (make_gguf_linear if self.backend == "gguf" else self.quantizer.to_native)(q, bias)

    def layer(self, dtype: torch.dtype, seed: int = 0) -> QuantizedLinear:
        return QuantizedLinear(self.quantized(dtype, seed), self.bias(dtype, seed + 1)).eval()


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normally distributed, whatever the default dtype is."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float32).to(dtype)


def relative(a: Tensor, b: Tensor) -> float:
    """Frobenius norm of the difference over that of `b`; inf where it is not a number."""
    ratio = float((a.float() - b.float()).norm() / b.float().norm())
    return math.inf if math.isnan(ratio) else ratio


def same(got: Tensor, expected: Tensor) -> bool:
    """Equal in dtype, shape and every bit (-0.0 is not 0.0, and equal nans are equal)."""
    if (got.dtype, got.shape) != (expected.dtype, expected.shape):
        return False
    return torch.equal(_bytes(got), _bytes(expected))


def _bytes(t: Tensor) -> Tensor:
    return t.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same_tensors(got: Any, expected: Any, where: str) -> None:
    assert sorted(got) == sorted(expected), where
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), f"{where}: {name}"
        assert same(got[name], tensor), f"{where}: {name} differs in value"


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}
