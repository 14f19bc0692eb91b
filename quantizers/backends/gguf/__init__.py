"""GGUF block types, all of those that llama.cpp and the gguf package know: made, restored and multiplied.

A row of K values is K / `block` blocks of `nbytes` bytes (`types`); `qdata` is the file's own bytes, (N, bytes a row)
uint8, so rows can be cut and reordered without touching a value.

On the CPU ggml's C library does the work where it is installed (`ggml`, `products`; PyPI libggml-python, MIT), else and
on other devices torch operations do (`eager`), and on CUDA Triton kernels where they can run. All give the same float32
values, bit for bit. So files are read with torch alone. Without the library, weights are made by gguf's numpy code, of
the types that it has; the grids of the IQ types, which torch operations need, stand in that package too.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ...base import Availability, Kernel, Quantizer
from ...errors import SpecError
from ...ggml_types import TYPES, type_name
from ...kernels.choose import expanding
from ...kernels.expand import Expansion, dequantized, expand
from ...kernels.scratch import watched
from ...weight import QuantizedWeight, TensorMeta
from ..probing import probe_package, probe_version
from .choose import few_tokens, library_or_reason
from .ggml import check_range, is_plain

if TYPE_CHECKING:
    from ...spec import QuantSpec

LIBRARY = "libggml-python"
OTHERS = "Choose a bnb or quanto format."
INSTALL = "Run `pip install libggml-python`, or choose a bnb or quanto format."
# Types that gguf's own numpy code quantizes; the bytes are those of ggml.
NUMPY_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
SLAB_NUMEL = 1 << 24  # values in float32 at a time while quantizing: 64 MiB

# Type -> where the float16 scales of a block lie (ggml-common.h). Types not listed have scales of another kind.
FLOAT16_SCALES = {
    **dict.fromkeys(("Q8_0", "Q4_0", "Q5_0", "IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)},
}


def make(format_id: str) -> Gguf:
    return Gguf(format_id)


class Gguf(Quantizer):
    def __init__(self, format_id: str) -> None:
        self.format_id = format_id
        self.type_name = type_name(format_id)
        self.kind = TYPES[self.type_name]

    def probe(self) -> Availability:
        library, reason = library_or_reason(torch.device("cpu"))
        if library is not None:
            # ggml takes seconds to make the tables of the IQ types: their sample is a block of zeros, valid in each.
            sample = self._zeros if self.type_name.startswith("IQ") else None
            return probe_version(self, library.version, OTHERS, sample, LIBRARY)
        if self.type_name in NUMPY_TYPES and importlib.util.find_spec("gguf") is not None:
            return probe_package(self, "gguf", (0, 17), INSTALL)
        remedy = INSTALL.replace("install", "install --upgrade") if "too old" in reason else INSTALL
        return Availability(False, f"{reason}.", remedy)

    def probe_reading(self) -> Availability:
        return probe_version(self, str(torch.__version__), OTHERS, self._zeros, "torch")

    def refuse(self, spec: QuantSpec, t: TensorMeta) -> str | None:
        if len(t.shape) != 2:
            return f"shape {t.shape} is not (N, K)"
        if t.shape[1] % self.kind.block:
            return f"K={t.shape[1]} is not a multiple of block size {self.kind.block}"
        return None

    def advice(self) -> str:
        if not self.kind.needs_importance:
            return ""
        return (
            f"{self.format_id} is meant for an importance matrix, and was made as if every column counted the same; "
            "`quantwire imatrix` and `quantwire convert --imatrix` make a better file"
        )

    def predict_nbytes(self, spec: QuantSpec, t: TensorMeta) -> int:
        return t.numel // self.kind.block * self.kind.nbytes

    def quantize(self, w: Tensor, spec: QuantSpec) -> QuantizedWeight:
        """qdata (N, bytes a row) uint8."""
        return self._quantize(w, None)

    def quantize_weighted(self, w: Tensor, spec: QuantSpec, importance: Tensor) -> QuantizedWeight:
        """With an importance matrix.

        Raises:
            WeightError: it is not (K,), not finite or negative.
            SpecError: ggml's library, which alone knows of it, is not here.
        """
        return self._quantize(w, importance)

    def dequantize(self, q: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        qdata, form = q.tensors["qdata"], self.form(q)
        if torch.compiler.is_compiling() or is_plain(qdata):
            return dequantized(form, dtype).reshape(q.orig_shape)
        # A fake tensor outside of its mode: buffers of plain memory cannot take its values.
        return expand(form, qdata.new_empty(form.shape, dtype=torch.float32)).to(dtype).reshape(q.orig_shape)

    def form(self, q: QuantizedWeight) -> Expansion:
        qdata = self._rows(q)
        shape = (qdata.shape[0], q.orig_shape[-1])
        library, _ = library_or_reason(qdata.device)
        if library is None or not is_plain(qdata):
            from . import eager

            return eager.expansion(self.type_name, qdata, shape)
        qdata = qdata.resolve_neg().contiguous()

        def fill(out: Tensor, start: int, stop: int) -> None:
            library.dequantize(self.kind, qdata, out, start)

        return Expansion(shape, qdata.device, fill, threaded=True)

    def linear(self, x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Tensor:
        """As for every format; under autocast in its dtype, as nn.Linear.

        Fake, batched and dual tensors, and subclasses, take torch operations throughout: C sees only memory.
        """
        x = _autocast(x)
        if not torch.compiler.is_compiling() and (
            watched() or not is_plain(x, bias, *q.tensors.values()) or _is_dual(x)
        ):
            return self._dequantized(x, q, bias)
        return super().linear(x, q, bias)

    def kernel(self, q: QuantizedWeight, device: torch.device, dtype: torch.dtype, tokens: int) -> Kernel:
        if not q.numel:
            return expanding(self.form, "the weight is empty")
        if device.type != "cpu":
            from ...kernels import triton_gguf

            kernel = triton_gguf.kernel_for(self.type_name, device, dtype, tokens)
            if kernel is not None:
                return kernel
            refusal = triton_gguf.refusal(device, dtype, self.type_name, (1, self.kind.block))
            return expanding(self.form, f"torch operations: {refusal}")
        library, reason = library_or_reason(device)
        if library is None:
            return expanding(self.form, f"torch operations: {reason}")
        kernel, few = few_tokens(self.kind, device, tokens)
        return kernel or expanding(self.form, f"ggml's dequantization in threads, a tile at a time; {few}")

    def non_finite(self, q: QuantizedWeight) -> int:
        """From the scales where they tell it: a twentieth of the work of dequantizing."""
        offsets = FLOAT16_SCALES.get(self.type_name)
        qdata = q.tensors["qdata"]
        if offsets is None or not qdata.numel():
            return super().non_finite(q)
        blocks = qdata.reshape(-1, self.kind.nbytes)
        bad = torch.zeros(len(blocks), dtype=torch.bool, device=qdata.device)
        for at in offsets:
            bad |= ~torch.isfinite(blocks[:, at : at + 2].contiguous().view(torch.float16)[:, 0])
        return self.kind.block * int(bad.sum())

    def _quantize(self, w: Tensor, importance: Tensor | None) -> QuantizedWeight:
        n, k = w.shape
        step = max(1, SLAB_NUMEL // max(k, 1))
        qdata = torch.empty(n, k // self.kind.block * self.kind.nbytes, dtype=torch.uint8, device="cpu")
        library, reason = library_or_reason(torch.device("cpu"))
        if library is None and importance is not None:
            raise SpecError(f"{self.format_id}: an importance matrix needs {LIBRARY}; {reason}.\n{INSTALL}")
        for start in range(0, n, step):
            slab = w.detach()[start : start + step].to("cpu", torch.float32).resolve_neg().contiguous()
            if library is not None:
                packed = library.quantize(self.kind, slab, importance)
            else:
                check_range(self.kind, slab)
                packed = _numpy_quantize(slab, self.type_name)
            qdata[start : start + step] = packed
        return QuantizedWeight(self.format_id, {"qdata": qdata.to(w.device)}, tuple(w.shape), w.dtype)

    def _rows(self, q: QuantizedWeight) -> Tensor:
        """Blocks by rows of K; files hold norms and biases in blocks too, and 5-D weights."""
        qdata, rows = q.tensors["qdata"], math.prod(q.orig_shape[:-1])
        width = qdata.numel() // rows if rows else q.orig_shape[-1] // self.kind.block * self.kind.nbytes
        return qdata.reshape(rows, width)

    def _zeros(self) -> QuantizedWeight:
        qdata = torch.zeros(2, self.kind.nbytes, dtype=torch.uint8, device="cpu")
        return QuantizedWeight(self.format_id, {"qdata": qdata}, (2, self.kind.block), torch.bfloat16)


@functools.cache
def _numpy_type(name: str) -> Any:
    import gguf

    return gguf.GGMLQuantizationType[name]


def _numpy_quantize(values: Tensor, name: str) -> Tensor:
    import gguf
    import numpy as np

    # Values whose scale is beyond float16 become inf, which the caller finds; numpy need not warn as well.
    with np.errstate(over="ignore", invalid="ignore"):
        return cast(Any, torch).from_numpy(gguf.quants.quantize(values.numpy(), _numpy_type(name)))


def _is_dual(x: Tensor) -> bool:
    return cast(Any, forward_ad).unpack_dual(x).tangent is not None


def _autocast(x: Tensor) -> Tensor:
    kind = x.device.type
    if x.dtype is torch.float64 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))
