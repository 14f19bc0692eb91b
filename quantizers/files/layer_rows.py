"""Rows of a quantized weight as values, a few at a time."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from ..kernels.expand import Expansion, expand
from ..registry import get_quantizer
from ..weight import QuantizedWeight

# Rows that are not beside one another are cut out of all rows between the first and the last of them, unless those are
# more than so many times as many.
SPREAD = 4
INPUT_SCALE, PRE_QUANT_SCALE = "input_scale", "pre_quant_scale"
FULL_PRECISION = "full_precision_matrix_mult"  # a flag: the host is not to quantize the layer's inputs


class LayerRows:
    """One quantized layer of a source.

    Rows come back through the format's expansion. Where it has none, the whole layer is dequantized when the first row
    is asked for, and kept for as long as this object is.

    Attributes:
        weight: (N, K), on a map of the file as far as the format's tensors stand there as they are.
        beside: what the layer has beside its weight: `input_scale`, a number for its inputs, and `pre_quant_scale`,
            (K,) factors of its inputs, which are in `values`: they belong to the columns of the weight that was;
            `full_precision_matrix_mult`, one element, where it is asked for.
    """

    def __init__(self, weight: QuantizedWeight, beside: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        self.weight = weight
        self.beside = beside
        self._lock = threading.Lock()
        self._form: Expansion | None = None
        self._whole: Tensor | None = None

    def values(self, rows: Tensor) -> Tensor:
        """Args:
            rows: (R,) int64, in any order.
        Returns:
            (R, K) float32.
        """
        columns = self.weight.orig_shape[1]
        if not rows.numel():
            return torch.empty(0, columns)
        with torch.inference_mode(False), torch.no_grad():
            found = self._stored(rows, columns)
            factors = self.beside.get(PRE_QUANT_SCALE)
            return found if factors is None else found * factors.to(torch.float32).reshape(1, -1)

    def _stored(self, rows: Tensor, columns: int) -> Tensor:
        """`values` as they are in the weight."""
        self._prepare()
        if self._form is None:
            assert self._whole is not None
            return self._whole[rows]
        first, last = int(rows.min()), int(rows.max())
        if last - first < SPREAD * len(rows):
            found = expand(self._form, torch.empty(last - first + 1, columns), first)
            return found if last - first == len(rows) - 1 and _ascending(rows) else found[rows - first]
        return torch.cat([expand(self._form, torch.empty(len(run), columns), int(run[0])) for run in _runs(rows)])

    def _prepare(self) -> None:
        with self._lock:
            if self._form is None and self._whole is None:
                quantizer = get_quantizer(self.weight.format_id)
                self._form = quantizer.form(self.weight)
                if self._form is None:
                    self._whole = quantizer.dequantize(self.weight, torch.float32)


def _ascending(rows: Tensor) -> bool:
    return bool((rows.diff() == 1).all())


def _runs(rows: Tensor) -> list[Tensor]:
    """Pieces of rows that are one after the other."""
    return list(rows.tensor_split(torch.nonzero(rows.diff() != 1).view(-1) + 1))
