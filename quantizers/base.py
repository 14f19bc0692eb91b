"""The protocol that a backend implements, and what its probe answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import SpecError
from .kernels.choose import expanding
from .kernels.expand import Expansion
from .kernels.kernel import Kernel
from .weight import QuantizedWeight, TensorMeta

if TYPE_CHECKING:
    from .spec import QuantSpec


@dataclass(frozen=True)
class Availability:
    """Whether a format can run here; `reason` and `remedy` are empty when it does."""

    works: bool
    reason: str = ""
    remedy: str = ""
    version: str = ""


class Quantizer:
    """Base of every format. A subclass sets `format_id`, implements the abstract methods and may override the rest.

    Methods take and return plain tensors; they never modify their inputs.
    """

    format_id: str

    def probe(self) -> Availability:
        """Whether the library behind the format is here and runs. Never raises."""
        raise NotImplementedError

    def probe_reading(self) -> Availability:
        """Whether weights that are in the format already can be restored and multiplied here. Never raises."""
        return self.probe()

    def refuse(self, spec: QuantSpec, t: TensorMeta) -> str | None:
        """Why this tensor cannot be quantized so, or None. Looks at name, shape and dtype only."""
        return None

    def advice(self) -> str:
        """What who quantizes to this format without knowing the inputs of the layers should know; mostly empty."""
        return ""

    def predict_nbytes(self, spec: QuantSpec, t: TensorMeta) -> int:
        """Bytes of the quantized tensors; equals `quantize(...).nbytes`."""
        raise NotImplementedError

    def quantize(self, w: Tensor, spec: QuantSpec) -> QuantizedWeight:
        """Quantize a finite (N, K) float32/float16/bfloat16 weight that `refuse` did not refuse."""
        raise NotImplementedError

    def quantize_weighted(self, w: Tensor, spec: QuantSpec, importance: Tensor) -> QuantizedWeight:
        """As `quantize`, with the errors of column k counted `importance[k]` times, (K,) float32.

        Raises:
            SpecError: the format takes no importance matrix.
        """
        raise SpecError(f"{self.format_id} takes no importance matrix; the gguf formats do.")

    def dequantize(self, q: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        """The (N, K) weight in `dtype`, on the device of `q`."""
        raise NotImplementedError

    def form(self, q: QuantizedWeight) -> Expansion | None:
        """How the rows of a weight come back block by block; None where only `dequantize` can restore it.

        The same numbers as `dequantize`, up to the rounding of the dtype in which the library computes them.
        """
        return None

    def non_finite(self, q: QuantizedWeight) -> int:
        """How many of the weight's values are nan or inf."""
        return int((~torch.isfinite(self.dequantize(q, torch.float32))).sum())

    def kernel(self, q: QuantizedWeight, device: torch.device, dtype: torch.dtype, tokens: int) -> Kernel:
        """The kernel for this weight and activations of `tokens` rows in `dtype` on `device`, and why.

        Can be asked without a product, and of a weight on the meta device.
        """
        form = self.form(q)
        if form is not None:
            return expanding(lambda weight: form if weight is q else self._form(weight))
        return Kernel("dequantize, F.linear", "the format has no other product here", self._dequantized)

    def linear(self, x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Tensor:
        """`x @ W.T + bias` for x (..., K), in the dtype of x, by `kernel`.

        Where a gradient will flow to x, by the dequantized weight instead: integer products have no derivative, and
        buffers that are used again would be overwritten before the backward pass.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            return self._dequantized(x, q, bias)
        tokens = x.numel() // x.shape[-1] if x.shape[-1] else 0
        return self.kernel(q, x.device, x.dtype, tokens).run(x, q, bias)

    def _form(self, q: QuantizedWeight) -> Expansion:
        form = self.form(q)
        if form is None:
            raise SpecError(f"{self.format_id}: this weight cannot be expanded by rows.")
        return form

    def _dequantized(self, x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(x, self.dequantize(q, x.dtype), bias)

    def to_native(self, q: QuantizedWeight, bias: Tensor | None) -> nn.Module:
        """The library's own layer on the same quantized values.

        Raises:
            SpecError: the library has no such layer, or not for this shape.
        """
        raise SpecError(f"{self.format_id}: its library has no linear layer of its own.\nUse carrier `quantwire`.")
