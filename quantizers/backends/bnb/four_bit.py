"""bnb-nf4 and bnb-fp4: see the package docstring."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...base import Availability, Kernel, Quantizer
from ...errors import SpecError
from ...kernels import forms
from ...kernels.choose import EXPAND
from ...kernels.expand import Expansion, dequantized, linear
from ...weight import FullPrecisionGuard, QuantizedWeight, TensorMeta
from ..probing import is_installed, probe_package, probe_stored, sample_bytes

if TYPE_CHECKING:
    from ...spec import QuantSpec

INSTALL = "Run `pip install bitsandbytes`, or choose quanto-qint4 or gguf-q4-0."
DEFAULT_BLOCK_SIZE = 64
SLAB_NUMEL = 1 << 18  # on the CPU the library takes several times the weight's memory
NESTED_BLOCK_SIZE = 256
# Above it the library's CPU path goes through torch.compile, once for each shape: tens of seconds, and a C++ compiler.
LARGEST_CPU_BLOCK = 1024
# Code -> value, as the library's tables have them (functional.py, `get_4bit_type`): so weights that are made already
# are read without it.
CODEBOOKS = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (
        *(0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25),
        *(0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204),
        -0.25,
    ),
}


class BnbFourBit(Quantizer):
    def __init__(self, quant_type: str) -> None:
        self.quant_type = quant_type
        self.format_id = f"bnb-{quant_type}"

    def probe(self) -> Availability:
        return probe_package(self, "bitsandbytes", (0, 46), INSTALL)

    def probe_reading(self) -> Availability:
        tensors = {"qdata": sample_bytes(64 * 128, 1), "absmax": torch.ones(256)}
        sample = QuantizedWeight(self.format_id, tensors, (64, 256), torch.float32, {"compute_dtype": None})
        return probe_stored(self, sample, "Choose gguf-q4-0.")

    def refuse(self, spec: QuantSpec, t: TensorMeta) -> str | None:
        if len(t.shape) != 2:
            return f"shape {t.shape} is not (N, K)"
        if t.shape[1] % 2:
            return f"K={t.shape[1]} is odd, and two values share a byte"
        storage, packed = _storage(spec), t.numel // 2
        if packed % storage.itemsize:
            return (
                f"N={t.shape[0]} with K={t.shape[1]} packs into {packed} bytes, not a multiple of the "
                f"{storage.itemsize} of bits4-quant-storage={str(storage).removeprefix('torch.')}"
            )
        return None

    def predict_nbytes(self, spec: QuantSpec, t: TensorMeta) -> int:
        blocks = math.ceil(t.numel / int(spec.option("bits4-block-size", DEFAULT_BLOCK_SIZE)))
        packed = math.ceil(t.numel / 2)
        if not spec.option("bits4-use-double-quant", False):
            return packed + 4 * blocks
        return packed + blocks + 4 * math.ceil(blocks / NESTED_BLOCK_SIZE) + 4 * 256 + 4

    def quantize(self, w: Tensor, spec: QuantSpec) -> QuantizedWeight:
        """qdata (N*K/2, 1) uint8, or fewer items of the storage dtype; absmax (blocks,) float32, or uint8 with
        nested_absmax, nested_code and offset."""
        nested = bool(spec.option("bits4-use-double-quant", False))
        block_size = int(spec.option("bits4-block-size", DEFAULT_BLOCK_SIZE))
        flat = w.contiguous().view(-1)
        step = SLAB_NUMEL if w.device.type == "cpu" else flat.numel()  # whole blocks: 64 to 4096 divide it
        cut = flat.numel() > step
        slabs: tuple[Tensor, ...] = cast(Any, flat).split(step) if cut else (w.contiguous(),)
        packed = flat.new_empty(-(-flat.numel() // 2), dtype=torch.uint8) if cut else None
        made: list[Any] = []
        for i, slab in enumerate(slabs):
            part, state = _library().functional.quantize_4bit(
                slab, blocksize=block_size, compress_statistics=nested and not cut, quant_type=self.quant_type
            )
            made.append(state)
            if packed is None:
                packed = part.view(-1)
            else:
                packed[i * step // 2 : i * step // 2 + part.numel()] = part.view(-1)
        assert packed is not None
        qdata = packed.view(_storage(spec)).unsqueeze(1)
        absmax = torch.cat([s.absmax for s in made]) if cut else made[0].absmax
        tensors: dict[str, Tensor] = {"qdata": qdata, "absmax": absmax}
        if nested:
            tensors |= _nested(absmax) if cut else _nested_of(made[0])
        meta = {"compute_dtype": spec.option("bits4-compute-dtype", None)}
        if block_size != DEFAULT_BLOCK_SIZE:
            meta["block_size"] = block_size
        return QuantizedWeight(self.format_id, tensors, tuple(w.shape), w.dtype, meta)

    def codebook(self, device: torch.device | None = None) -> Tensor:
        """The 16 values of the codes, float32: what files call `quant_map`."""
        return torch.tensor(CODEBOOKS[self.quant_type], device=device or torch.device("cpu"))

    def _state(self, q: QuantizedWeight, dtype: torch.dtype, shape: tuple[int, ...]) -> Any:
        functional = _library().functional
        t = q.tensors
        state2 = offset = None
        if "nested_absmax" in t:
            state2 = functional.QuantState(
                absmax=t["nested_absmax"], blocksize=NESTED_BLOCK_SIZE, code=t["nested_code"], dtype=torch.float32
            )
            offset = t["offset"]
        return functional.QuantState(
            absmax=t["absmax"],
            shape=torch.Size(shape),
            code=functional.get_4bit_type(self.quant_type, device=t["absmax"].device),
            blocksize=_block_size(q),
            quant_type=self.quant_type,
            dtype=dtype,
            offset=offset,
            state2=state2,
        )

    def dequantize(self, q: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        if not is_installed("bitsandbytes"):
            return self._by_formula(q, dtype)
        # As one row of all values: with (N, K) the library's CPU kernel (0.50.2, AVX-512) takes wrong maxima where K is
        # a multiple of 16 but not of the block size; as one row it equals the formula bit for bit at every shape.
        functional, state = _library().functional, self._state(q, dtype, (1, q.numel))
        if state.blocksize > LARGEST_CPU_BLOCK and q.tensors["qdata"].device.type == "cpu":
            self._split_blocks(state)
        return functional.dequantize_4bit(_packed(q), state).reshape(q.orig_shape)

    def _by_formula(self, q: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        form = self.form(q)
        if form is not None:
            return dequantized(form, dtype)
        packed, absmax = _packed(q), plain_absmax(q)
        codes = torch.cat([packed >> 4, packed & 15], dim=1).view(-1)[: q.numel].int()
        scale = absmax.repeat_interleave(_block_size(q))[: q.numel]
        return (self.codebook(absmax.device)[codes] * scale).reshape(q.orig_shape).to(dtype)

    def _split_blocks(self, state: Any) -> None:
        """Each block as several of `LARGEST_CPU_BLOCK` with the same maximum: the same values by the C++ kernel."""
        if state.nested:
            state.absmax = _library().functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
            state.nested, state.state2, state.offset = False, None, None
        state.absmax = state.absmax.repeat_interleave(state.blocksize // LARGEST_CPU_BLOCK)
        state.blocksize = LARGEST_CPU_BLOCK

    def form(self, q: QuantizedWeight) -> Expansion | None:
        n, k = q.orig_shape
        if k % _block_size(q):  # blocks cross rows
            return None
        absmax = plain_absmax(q)
        table = forms.pairs(self.codebook(absmax.device), "high first")
        return forms.nibbles(_packed(q).view(n, k // 2), table, absmax.view(n, -1))

    def kernel(self, q: QuantizedWeight, device: torch.device, dtype: torch.dtype, tokens: int) -> Kernel:
        block_size = _block_size(q)
        if q.orig_shape[1] % block_size:
            reason = f"K={q.orig_shape[1]} is not a multiple of {block_size}, so blocks cross rows"
            return Kernel("dequantize, F.linear", reason, self._dequantized)
        if device.type == "cuda" and is_installed("bitsandbytes"):
            return Kernel("bitsandbytes gemm_4bit", "the library's fused product", self._gemm)
        return Kernel(EXPAND, "no slower here than bitsandbytes' own product, and right at every K", self._expanded)

    def _dequantized(self, x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Tensor:
        compute = self._compute_dtype(q, x)
        bias = None if bias is None else bias.to(compute)
        return F.linear(x.to(compute), self.dequantize(q, compute), bias).to(x.dtype)

    def _expanded(self, x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Tensor:
        return linear(x.to(self._compute_dtype(q, x)), self._form(q), bias).to(x.dtype)

    def _gemm(self, x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Tensor:
        compute = self._compute_dtype(q, x)
        bias = None if bias is None else bias.to(compute)
        state = self._state(q, compute, q.orig_shape)
        # Transposed, as versions before 0.50 require and later ones accept.
        packed = _packed(q).t()
        return _library().matmul_4bit(x.to(compute), packed, bias=bias, quant_state=state).to(x.dtype)

    def _compute_dtype(self, q: QuantizedWeight, x: Tensor) -> torch.dtype:
        return getattr(torch, q.meta["compute_dtype"]) if q.meta["compute_dtype"] else x.dtype

    def to_native(self, q: QuantizedWeight, bias: Tensor | None) -> nn.Module:
        """`Linear4bit` on the same packed bytes.

        On AVX512-BF16 machines the library repacks its weights at the first forward, which it can do only for N
        divisible by 32 and K divisible by the block size; other shapes keep the plain path here.

        Raises:
            SpecError: on a CPU with K no multiple of the block size, where the library's product is wrong (see
                `dequantize`), and with blocks above `LARGEST_CPU_BLOCK`, for which it compiles C++.
        """
        bnb = _library()
        n, k = q.orig_shape
        block_size, on_cpu = _block_size(q), q.tensors["qdata"].device.type == "cpu"
        if on_cpu and block_size > LARGEST_CPU_BLOCK:
            raise SpecError(
                f"{self.format_id}: bitsandbytes' own layer compiles C++ for blocks of {block_size} on a CPU, once for "
                f"each shape.\nUse carrier `quantwire`, or bits4-block-size={LARGEST_CPU_BLOCK} or less."
            )
        if on_cpu and k % block_size:
            raise SpecError(
                f"{self.format_id}: K={k} is not a multiple of block size {block_size}, and bitsandbytes' own layer "
                "computes wrong values for it on a CPU.\nUse carrier `quantwire`."
            )
        compute = getattr(torch, q.meta["compute_dtype"]) if q.meta["compute_dtype"] else None
        storage = q.tensors["qdata"].dtype
        layer: Any = bnb.nn.Linear4bit(
            k,
            n,
            bias=bias is not None,
            compute_dtype=compute,
            quant_type=self.quant_type,
            quant_storage=storage,
            device="meta",
        )
        copy = q.with_tensors({name: t.clone() for name, t in q.tensors.items()})
        state = self._state(copy, q.orig_dtype, q.orig_shape)
        layer.weight = bnb.nn.Params4bit(
            copy.tensors["qdata"],
            requires_grad=False,
            quant_state=state,
            blocksize=block_size,
            compress_statistics=state.nested,
            quant_type=self.quant_type,
            quant_storage=storage,
            module=layer,
            bnb_quantized=True,
        )
        layer.quant_state = state
        if n % 32 or k % block_size:
            layer.support_avx512bf16_for_cpu = False
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        layer.register_load_state_dict_pre_hook(FullPrecisionGuard(self.format_id))
        return layer.eval()


def plain_absmax(q: QuantizedWeight) -> Tensor:
    """The float32 maxima (blocks,), as the library computes them where they are quantized themselves."""
    t = q.tensors
    if "nested_absmax" not in t:
        return t["absmax"]
    codes = t["absmax"].reshape(-1)
    scale = t["nested_absmax"].reshape(-1).repeat_interleave(NESTED_BLOCK_SIZE)[: codes.numel()]
    return t["nested_code"][codes.int()] * scale + t["offset"]


def _nested_of(state: Any) -> dict[str, Tensor]:
    return {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code, "offset": state.offset}


def _nested(absmax: Tensor) -> dict[str, Tensor]:
    """Maxima (blocks,) float32, quantized as `quantize_4bit` does with `compress_statistics`."""
    offset = absmax.mean()
    codes, state = _library().functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_SIZE)
    return {"absmax": codes, "nested_absmax": state.absmax, "nested_code": state.code, "offset": offset}


def _block_size(q: QuantizedWeight) -> int:
    return int(q.meta.get("block_size", DEFAULT_BLOCK_SIZE))


def _packed(q: QuantizedWeight) -> Tensor:
    """(N*K/2, 1) uint8, whatever dtype the bytes are held as; the library's operators know only some of them."""
    return q.tensors["qdata"].view(-1).view(torch.uint8).unsqueeze(1)


def _storage(spec: QuantSpec) -> torch.dtype:
    return getattr(torch, spec.option("bits4-quant-storage", "uint8"))


def _library() -> Any:
    """bitsandbytes, untyped: its annotations leave most constructor arguments and optional fields out."""
    import bitsandbytes

    return cast(Any, bitsandbytes)
