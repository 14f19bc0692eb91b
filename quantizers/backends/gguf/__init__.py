"""GGUF tensor types (gguf >= 0.17, MIT): Q8_0 and Q4_0, and to read only, every other that gguf can dequantize.

A row of K values is K/32 blocks, each a scale and the packed values; `qdata` is the file's own bytes, (N, bytes a row)
uint8, so rows can be cut and reordered without touching a value.

Q8_0 block: float16 d, 32 int8; value = d * q. Q4_0 block: float16 d, 16 bytes; byte j holds value j in its low nibble
and value j + 16 in its high one; value = d * (nibble - 8). Layouts: ggml-org/ggml ggml-common.h.

Quantizing is gguf's own numpy code. Dequantizing is done here with torch operations, bit-equal to gguf's in float32.
gguf's numpy was not chosen for it: it is right but slow, and works in host memory only. The types that are only read
do use it, at every product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ...base import Availability, Kernel, Quantizer
from ...kernels import forms
from ...kernels.expand import Expansion, dequantized
from ...weight import QuantizedWeight, TensorMeta
from ..probing import probe_package

if TYPE_CHECKING:
    from ...spec import QuantSpec

INSTALL = "Run `pip install gguf`, or choose a bnb or quanto format."
BLOCK_SIZE = 32
BLOCK_NBYTES = {"Q8_0": 34, "Q4_0": 18}


# Type -> where the float16 scales of a block lie (ggml-common.h). Types not listed have scales of another kind.
FLOAT16_SCALES = {
    **dict.fromkeys(("Q8_0", "Q4_0", "Q5_0", "IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)},
}


def make(format_id: str) -> Gguf:
    return Gguf(format_id)


def make_reader(format_id: str) -> GgufReader:
    return GgufReader(format_id)


class Gguf(Quantizer):
    def __init__(self, format_id: str) -> None:
        self.format_id = format_id
        self.type_name = format_id.removeprefix("gguf-").upper().replace("-", "_")  # Q8_0

    def probe(self) -> Availability:
        return probe_package(self, "gguf", (0, 17), INSTALL)

    def refuse(self, spec: QuantSpec, t: TensorMeta) -> str | None:
        if len(t.shape) != 2:
            return f"shape {t.shape} is not (N, K)"
        if t.shape[1] % BLOCK_SIZE:
            return f"K={t.shape[1]} is not a multiple of block size {BLOCK_SIZE}"
        return None

    def predict_nbytes(self, spec: QuantSpec, t: TensorMeta) -> int:
        return t.numel // BLOCK_SIZE * BLOCK_NBYTES[self.type_name]

    def quantize(self, w: Tensor, spec: QuantSpec) -> QuantizedWeight:
        """qdata (N, K / 32 * bytes a block) uint8."""
        import gguf
        import numpy as np

        # Values whose scale is beyond float16 become inf, which the caller finds; numpy need not warn as well.
        with np.errstate(over="ignore", invalid="ignore"):
            values = w.detach().to("cpu", torch.float32).contiguous().numpy()
            packed: Any = gguf.quants.quantize(values, gguf.GGMLQuantizationType[self.type_name])
        qdata = cast(Any, torch).from_numpy(packed).to(w.device)
        return QuantizedWeight(self.format_id, {"qdata": qdata}, tuple(w.shape), w.dtype)

    def dequantize(self, q: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        return dequantized(_FORMS[self.type_name](q), dtype).reshape(q.orig_shape)

    def form(self, q: QuantizedWeight) -> Expansion | None:
        return _FORMS[self.type_name](q)

    def non_finite(self, q: QuantizedWeight) -> int:
        """From the scales where they tell it: a twentieth of the work of dequantizing."""
        offsets = FLOAT16_SCALES.get(self.type_name)
        qdata = q.tensors["qdata"]
        if offsets is None or not qdata.numel():
            return super().non_finite(q)
        size, nbytes = _block(self.type_name)
        blocks = qdata.reshape(-1, nbytes)
        bad = torch.zeros(len(blocks), dtype=torch.bool, device=qdata.device)
        for at in offsets:
            bad |= ~torch.isfinite(blocks[:, at : at + 2].contiguous().view(torch.float16)[:, 0])
        return size * int(bad.sum())


class GgufReader(Gguf):
    """A type that is loaded but not made here: quantizing to it well needs llama.cpp's own tools."""

    def probe(self) -> Availability:
        # Zero bytes are a valid block of every type; the sample is made only if the package is there.
        return probe_package(self, "gguf", (0, 17), INSTALL, self._zeros)

    def _zeros(self) -> QuantizedWeight:
        size, nbytes = _block(self.type_name)
        return QuantizedWeight(
            self.format_id, {"qdata": torch.zeros(2, nbytes, dtype=torch.uint8)}, (2, size), torch.bfloat16
        )

    def refuse(self, spec: QuantSpec, t: TensorMeta) -> str | None:
        return "this type can be loaded but not made"

    def form(self, q: QuantizedWeight) -> Expansion | None:
        return None

    def kernel(self, q: QuantizedWeight, device: torch.device, dtype: torch.dtype, tokens: int) -> Kernel:
        return Kernel("gguf numpy, F.linear", "this type is only read", self._dequantized)

    def dequantize(self, q: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        import gguf
        import numpy as np

        qdata = q.tensors["qdata"]
        with np.errstate(all="ignore"):  # non-finite scales, which the caller finds
            values: Any = gguf.quants.dequantize(
                qdata.cpu().contiguous().numpy(), gguf.GGMLQuantizationType[self.type_name]
            )
        return cast(Any, torch).from_numpy(values).reshape(q.orig_shape).to(qdata.device, dtype)


def _block(type_name: str) -> tuple[int, int]:
    """(values, bytes) of a block."""
    import gguf

    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]


def _rows(q: QuantizedWeight) -> Tensor:
    """Blocks by rows of K; files hold norms and biases in blocks too, and 5-D weights."""
    return q.tensors["qdata"].reshape(q.numel // q.orig_shape[-1], -1)


def _q8_0(q: QuantizedWeight) -> Expansion:
    return forms.q8_0(_rows(q), q.orig_shape[-1])


def _q4_0(q: QuantizedWeight) -> Expansion:
    return forms.q4_0(_rows(q), q.orig_shape[-1])


_FORMS = {"Q8_0": _q8_0, "Q4_0": _q4_0}
