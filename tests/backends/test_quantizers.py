"""What every format must do, and that its numbers are those of the library that defines it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quantwire.hosts.standalone.native_gguf import make_gguf_linear
from quantwire.quantizers.apply import quantize_tensor
from quantwire.quantizers.errors import SpecError, WeightError
from quantwire.quantizers.registry import available_formats, get_quantizer
from quantwire.quantizers.report import measure
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import FullPrecisionGuard, QuantizedLinear, QuantizedWeight, TensorMeta
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
URIS = [*available_formats(), "bnb-nf4;bits4-use-double-quant=true"]
every_uri = pytest.mark.parametrize("uri", URIS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
# At least so good on normally distributed values; measured about 1 dB above each.
SQNR_DB = {
    "bnb-int8": 41,
    "bnb-nf4": 19.5,
    "bnb-fp4": 16.5,
    "quanto-qint8": 41,
    "quanto-qint4": 18.5,
    "quanto-qfloat8-e4m3fn": 30,
    "gguf-q8-0": 44,
    "gguf-q4-0": 19.5,
}


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantize(uri: str, w: Tensor) -> QuantizedWeight:
    spec = QuantSpec.from_uri(uri)
    return get_quantizer(spec.format_id).quantize(w, spec)


def dequantize(q: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    return get_quantizer(q.format_id).dequantize(q, dtype)


def refusal(uri: str, shape: tuple[int, ...]) -> str | None:
    spec = QuantSpec.from_uri(uri)
    return get_quantizer(spec.format_id).refuse(spec, TensorMeta("w.weight", shape, torch.bfloat16))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


# Size, shape, quality

SHAPES = [(48, 96), (64, 256), (1, 256), (7, 160), (33, 64), (5, 34), (3, 33), (40, 24), (1, 34)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@every_dtype
@every_uri
def test_predicted_bytes_quality_and_an_untouched_input(uri: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    if reason := refusal(uri, shape):
        assert f"={shape[0]}" in reason or f"={shape[1]}" in reason  # says which dimension
        with pytest.raises(SpecError, match=f"^'w.weight': {QuantSpec.from_uri(uri).format_id}: "):
            quantize_tensor("w.weight", values(*shape, dtype=dtype), QuantSpec.from_uri(uri))
        return
    w = values(*shape, dtype=dtype)
    before = w.clone()
    q = quantize(uri, w)
    assert torch.equal(w, before)
    spec = QuantSpec.from_uri(uri)
    meta = TensorMeta("w.weight", shape, dtype)
    assert q.nbytes == get_quantizer(spec.format_id).predict_nbytes(spec, meta)
    assert (q.orig_shape, q.orig_dtype) == (shape, dtype)
    restored = dequantize(q)
    assert restored.shape == shape
    entry = measure("w", "", w, restored, q.nbytes)
    assert entry.sqnr_db is not None
    assert entry.sqnr_db >= SQNR_DB[spec.format_id] - (0 if w.numel() > 2000 else 3)  # few values scatter more


@pytest.mark.parametrize(
    ("format_id", "shape", "reason"),
    [
        ("bnb-nf4", (64, 33), "K=33 is odd, and two values share a byte"),
        ("bnb-fp4", (64, 33), "K=33 is odd, and two values share a byte"),
        ("gguf-q8-0", (64, 33), "K=33 is not a multiple of block size 32"),
        ("gguf-q4-0", (64, 48), "K=48 is not a multiple of block size 32"),
        ("quanto-qint4", (64, 161), "K=161 is not a multiple of 32, the smallest group"),
        ("quanto-qint4", (1, 64), "N=1 with K=64 is a single group, for which quanto stores one scale a value"),
        ("quanto-qint4", (64, 33), None),
        ("quanto-qint4", (1, 256), None),
        ("quanto-qint8", (64, 33), None),
        ("quanto-qfloat8-e4m3fn", (64, 33), None),
        ("bnb-int8", (64, 33), None),
        *[(f, (8, 4, 3, 3), "shape (8, 4, 3, 3) is not (N, K)") for f in available_formats()],
        *[(f, (64,), "shape (64,) is not (N, K)") for f in available_formats()],
    ],
)
def test_refused_shapes(format_id: str, shape: tuple[int, ...], reason: str | None) -> None:
    assert refusal(format_id, shape) == reason


@every_dtype
@every_uri
def test_non_contiguous_input(uri: str, dtype: torch.dtype) -> None:
    w = values(256, 64, dtype=dtype).T
    assert not w.is_contiguous()
    q, expected = quantize(uri, w), quantize(uri, w.contiguous())
    assert all(torch.equal(q.tensors[name], expected.tensors[name]) for name in expected.tensors)
    assert q.tensors.keys() == expected.tensors.keys()


@every_dtype
@every_uri
def test_zeros_are_exact(uri: str, dtype: torch.dtype) -> None:
    w = values(16, 128, dtype=dtype)
    w[3] = 0
    restored = dequantize(quantize(uri, w))
    # Double quantization rounds the maximum of a zero block too, but times the codebook's 0 it stays 0.
    assert torch.equal(restored[3], torch.zeros(128))
    assert torch.isfinite(restored).all()
    assert torch.equal(dequantize(quantize(uri, torch.zeros(16, 128, dtype=dtype))), torch.zeros(16, 128))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
@every_uri
def test_nan_and_inf_are_refused_by_name(uri: str, bad: float) -> None:
    w = values(16, 128)
    w[1, 5] = w[2, 6] = bad
    with pytest.raises(WeightError, match=r"^'a\.b\.weight': 2 of 2048 values are nan or inf\."):
        quantize_tensor("a.b.weight", w, QuantSpec.from_uri(uri))


@pytest.mark.parametrize("format_id", ["bnb-int8", "gguf-q8-0", "gguf-q4-0"])
def test_values_beyond_the_range_of_the_format_are_refused(format_id: str) -> None:
    w = values(16, 128)
    w[1, 5] = 1e8  # scales, or the values themselves, are float16 here
    with pytest.raises(WeightError, match=rf"^'w': {format_id} gives non-finite values; the weight exceeds its range"):
        quantize_tensor("w", w, QuantSpec(format_id))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64], ids=["int8", "fp8", "fp64"])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(WeightError, match=rf"^'w': dtype is {dtype}, expected float32, float16 or bfloat16\."):
        quantize_tensor("w", torch.ones(16, 128).to(dtype), QuantSpec("gguf-q8-0"))


# The library's own numbers


def bnb_int8(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    bnb: Any = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(w.shape[1], w.shape[0], bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": w})
    weight = layer.to("cpu").weight  # the move is what quantizes
    tensors = {"qdata": weight.CB, "absmax": weight.SCB}
    return tensors, bnb.functional.int8_vectorwise_dequant(weight.CB, weight.SCB)


def bnb_four_bit(quant_type: str, nested: bool) -> Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]:
    def make(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        bnb: Any = pytest.importorskip("bitsandbytes")
        layer = bnb.nn.Linear4bit(w.shape[1], w.shape[0], bias=False, quant_type=quant_type, compress_statistics=nested)
        layer.weight = bnb.nn.Params4bit(
            w, requires_grad=False, quant_type=quant_type, compress_statistics=nested, module=layer
        )
        weight = layer.to("cpu").weight
        s = weight.quant_state
        tensors = {"qdata": weight.data, "absmax": s.absmax}
        if nested:
            tensors |= {"nested_absmax": s.state2.absmax, "nested_code": s.state2.code, "offset": s.offset}
        s.dtype = torch.float32
        return tensors, bnb.functional.dequantize_4bit(weight.data, s)

    return make


def quanto(qtype: str) -> Callable[[Tensor], tuple[dict[str, Tensor], Tensor | None]]:
    def make(w: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        library: Any = pytest.importorskip("optimum.quanto")
        linear = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
        linear.load_state_dict({"weight": w})
        layer = library.QLinear.from_module(linear, weights=library.qtypes[qtype])
        layer.freeze()
        weight = layer.weight
        if qtype != "qint4":
            return {"qdata": weight._data, "scale": weight._scale}, weight.dequantize().float()
        # Its own dequantize compiles C++ for a minute, so the values are formed from its parts here.
        data = weight._data._data.int()
        unpacked = torch.cat([data % 16, data // 16])[: weight._scale.shape[0]]
        restored = (weight._scale * unpacked - weight._shift).reshape(w.shape).float()
        return {"qdata": weight._data._data, "scale": weight._scale, "shift": weight._shift}, restored

    return make


def gguf(name: str) -> Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]:
    def make(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        library: Any = pytest.importorskip("gguf")
        kind = library.GGMLQuantizationType[name]
        packed = library.quants.quantize(w.float().numpy(), kind)
        return {"qdata": torch.from_numpy(packed)}, torch.from_numpy(library.quants.dequantize(packed, kind))

    return make


LIBRARY: dict[str, Callable[[Tensor], tuple[dict[str, Tensor], Tensor | None]]] = {
    "bnb-int8": bnb_int8,
    "bnb-nf4": bnb_four_bit("nf4", False),
    "bnb-fp4": bnb_four_bit("fp4", False),
    "bnb-nf4;bits4-use-double-quant=true": bnb_four_bit("nf4", True),
    "quanto-qint8": quanto("qint8"),
    "quanto-qint4": quanto("qint4"),
    "quanto-qfloat8-e4m3fn": quanto("qfloat8_e4m3fn"),
    "gguf-q8-0": gguf("Q8_0"),
    "gguf-q4-0": gguf("Q4_0"),
}


@pytest.mark.parametrize("shape", [(48, 64), (32, 256), (33, 192)], ids=lambda s: f"{s[0]}x{s[1]}")
@every_dtype
@every_uri
def test_bit_equal_to_the_library(uri: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    if uri == "quanto-qint4" and dtype is torch.bfloat16 and shape == (32, 256):
        shape = (32, 192)  # 128-groups in bfloat16 come back rounded from the layout of PyTorch's int4 kernel
    w = values(*shape, seed=3, dtype=dtype)
    tensors, restored = LIBRARY[uri](w.clone())
    q = quantize(uri, w)
    assert q.tensors.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert q.tensors[name].dtype == expected.dtype, name
        assert torch.equal(q.tensors[name], expected), name
    assert restored is not None
    assert torch.equal(dequantize(q), restored)


@pytest.mark.parametrize("shape", [(16, 32), (7, 96), (65, 160), (64, 34), (1, 2)], ids=lambda s: f"{s[0]}x{s[1]}")
@every_dtype
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_four_bit_equals_its_formula_where_blocks_cross_rows(
    quant_type: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    """bitsandbytes 0.50.2 itself is wrong on AVX-512 CPUs for K = 32, 96 and 160."""
    functional: Any = pytest.importorskip("bitsandbytes").functional
    q = quantize(f"bnb-{quant_type}", values(*shape, dtype=dtype))
    packed = q.tensors["qdata"].flatten().long()
    nibbles = torch.stack([packed >> 4, packed & 15], dim=1).flatten()
    absmax = q.tensors["absmax"].repeat_interleave(64)[: nibbles.numel()]
    expected = (functional.get_4bit_type(quant_type, device="cpu")[nibbles] * absmax).reshape(shape)
    assert torch.equal(dequantize(q), expected)
    layer, x = QuantizedLinear(q, None), values(3, shape[1], dtype=dtype)
    assert torch.equal(layer(x), nn.functional.linear(x, expected.to(dtype)))


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("x_dtype", DTYPES.values(), ids=[f"x-{n}" for n in DTYPES])
@every_dtype
@every_uri
def test_product_in_the_dtype_of_the_activations(
    uri: str, dtype: torch.dtype, x_dtype: torch.dtype, with_bias: bool
) -> None:
    q = quantize(uri, values(48, 128, dtype=dtype))
    bias = values(48, seed=1, dtype=dtype) if with_bias else None
    x = values(2, 5, 128, seed=2, dtype=x_dtype)
    got = QuantizedLinear(q, bias)(x)
    expected = nn.functional.linear(x.float(), dequantize(q), None if bias is None else bias.float())
    assert (got.shape, got.dtype) == (expected.shape, x_dtype)
    assert relative(got, expected) < (0.02 if q.format_id == "bnb-int8" else 0.006)  # int8 activations; bfloat16


# The library's own layer on our values

# Largest relative difference of the outputs. nf4 and fp4: bfloat16 repacking on AVX512-BF16 machines. qint4: the same
# for PyTorch's int4 kernel. gguf: diffusers multiplies scales and values in float16.
NATIVE_TOLERANCE = {
    "bnb-nf4": 0.005,
    "bnb-fp4": 0.005,
    "quanto-qint4": 0.01,
    "gguf-q8-0": 0.003,
    "gguf-q4-0": 0.003,
}


def native(q: QuantizedWeight, bias: Tensor | None) -> nn.Module:
    if q.format_id.startswith("gguf-"):
        pytest.importorskip("diffusers")
        return make_gguf_linear(q, bias)
    return get_quantizer(q.format_id).to_native(q, bias)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@every_dtype
@every_uri
def test_native_layer_gives_the_same_output(uri: str, dtype: torch.dtype, with_bias: bool) -> None:
    if uri == "quanto-qint4" and dtype is not torch.bfloat16:
        pytest.skip("quanto compiles C++ for a minute at the first such forward pass")
    q = quantize(uri, values(64, 256, dtype=dtype))
    bias = values(64, seed=1, dtype=dtype) if with_bias else None
    x = values(2, 5, 256, seed=2, dtype=dtype)
    with torch.inference_mode():
        expected, got = QuantizedLinear(q, bias).eval()(x), native(q, bias)(x)
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert relative(got, expected) <= NATIVE_TOLERANCE.get(q.format_id, 0.0)


@every_uri
def test_native_layer_shares_nothing_and_can_be_pickled(uri: str) -> None:
    q = quantize(uri, values(64, 256, dtype=torch.bfloat16))
    before = {name: t.clone() for name, t in q.tensors.items()}
    layer: Any = native(q, values(64, dtype=torch.bfloat16))
    x = values(3, 256, seed=2, dtype=torch.bfloat16)
    with torch.inference_mode():
        layer(x)
    assert all(torch.equal(q.tensors[name], t) for name, t in before.items())
    assert not layer.training
    if q.format_id.startswith("bnb-"):  # the others' tensor classes can be neither copied nor pickled
        with torch.inference_mode():
            assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    hooks = [wrapped.hook for wrapped in layer._load_state_dict_pre_hooks.values()]
    assert FullPrecisionGuard(q.format_id) in hooks
    assert pickle.loads(pickle.dumps(FullPrecisionGuard(q.format_id))) == FullPrecisionGuard(q.format_id)


def test_native_four_bit_is_refused_where_the_library_is_wrong() -> None:
    q = quantize("bnb-nf4", values(64, 96))
    with pytest.raises(SpecError, match=r"^bnb-nf4: K=96 is not a multiple of block size 64, and bitsandbytes' own"):
        native(q, None)


def test_native_qint4_with_rows_that_the_int4_kernel_cannot_take() -> None:
    pytest.importorskip("optimum.quanto")
    layer: Any = native(quantize("quanto-qint4", values(33, 256, dtype=torch.bfloat16)), None)
    assert type(layer.weight).__name__ == "WeightQBitsTensor"
    repacked: Any = native(quantize("quanto-qint4", values(32, 256, dtype=torch.bfloat16)), None)
    assert type(repacked.weight).__name__ == "TinyGemmWeightQBitsTensor"
