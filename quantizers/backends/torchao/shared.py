"""What the formats of torchao share: the probe, groups, and the library's layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...base import Availability, Quantizer
from ...weight import FullPrecisionGuard, QuantizedWeight, TensorMeta
from ..probing import probe_package, probe_stored
from .library import load

if TYPE_CHECKING:
    from ...spec import QuantSpec

INSTALL = "Run `pip install torchao`, or choose bnb-int8, bnb-nf4 or a gguf format."


class Torchao(Quantizer):
    """Base of the formats; `default_group` is the group size without the option, None for the whole row."""

    default_group: int | None = None

    def probe(self) -> Availability:
        return probe_package(self, "torchao", (0, 18), INSTALL)

    def sample(self) -> dict[str, Tensor]:
        """Tensors of a weight (64, 256) that the library need not make."""
        raise NotImplementedError

    def probe_reading(self) -> Availability:
        sample = QuantizedWeight(self.format_id, self.sample(), (64, 256), torch.float32)
        return probe_stored(self, sample, "Choose a gguf format.")

    def refuse(self, spec: QuantSpec, t: TensorMeta) -> str | None:
        if len(t.shape) != 2:
            return f"shape {t.shape} is not (N, K)"
        group = self.group(spec)
        if group and t.shape[1] % group:
            return f"K={t.shape[1]} is not a multiple of group-size {group}"
        return None

    def group(self, spec: QuantSpec) -> int | None:
        return spec.option("group-size", None) or self.default_group

    def granularity(self, spec: QuantSpec) -> Any:
        """The library's word for the groups of `spec`."""
        quantization = load("torchao.quantization")
        group = self.group(spec)
        return quantization.PerGroup(group) if group else quantization.PerRow()

    def groups(self, spec: QuantSpec, t: TensorMeta) -> int:
        """Scales of a weight."""
        return t.shape[0] * (t.shape[1] // (self.group(spec) or t.shape[1]))

    def native_layer(self, q: QuantizedWeight, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """`nn.Linear` with a tensor subclass of the library as its weight, as `torchao.quantize_` leaves it."""
        n, k = q.orig_shape
        layer: Any = nn.Linear(k, n, bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        layer.register_load_state_dict_pre_hook(_Guard(self.format_id))
        return layer.eval()


@dataclass(frozen=True)
class _Guard(FullPrecisionGuard):
    """Lets the library's own tensors pass, which call themselves floating point."""

    def __call__(self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *rest: object) -> None:
        value = state_dict.get(prefix + "weight")
        if type(value) in (Tensor, nn.Parameter):
            super().__call__(module, state_dict, prefix, *rest)


def scaled(qdata: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`qdata * scale` in float32, then in `dtype`; qdata (N, K), scale (N, groups)."""
    n, k = qdata.shape
    values = qdata.to(torch.float32).reshape(n, scale.shape[1], -1) * scale.unsqueeze(-1)
    return values.reshape(n, k).to(dtype)
