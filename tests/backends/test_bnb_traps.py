"""What bitsandbytes does on a CPU that a user would not expect, and that layers made here do not do.

Each test first shows the trap on the library itself, so it says so when a version no longer has it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantwire.quantizers.registry import get_quantizer
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedLinear, QuantizedWeight
from torch import Tensor, nn

bnb: Any = pytest.importorskip("bitsandbytes")

REPACKS = bool(bnb.functional.has_avx512bf16())
needs_repacking = pytest.mark.skipif(not REPACKS, reason="this CPU has no AVX512-BF16, where bitsandbytes repacks")


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def quantize(uri: str, w: Tensor) -> QuantizedWeight:
    spec = QuantSpec.from_uri(uri)
    return get_quantizer(spec.format_id).quantize(w, spec)


def library_four_bit(w: Tensor) -> Any:
    layer = bnb.nn.Linear4bit(w.shape[1], w.shape[0], bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
    layer.load_state_dict({"weight": w}, strict=False)
    return layer.to("cpu").eval()


def library_int8(w: Tensor) -> Any:
    # Threshold 0: outlier columns would blur the difference between the two products.
    layer = bnb.nn.Linear8bitLt(w.shape[1], w.shape[0], bias=False, has_fp16_weights=False, threshold=0.0)
    layer.load_state_dict({"weight": w})
    return layer.to("cpu")


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())


@needs_repacking
def test_library_asserts_on_rows_that_are_no_multiple_of_32() -> None:
    layer = library_four_bit(values(48, 64))
    with pytest.raises(AssertionError, match="N must be divisible by block_n"), torch.inference_mode():
        layer(values(3, 64))


@pytest.mark.parametrize("rows", [1, 31, 33, 48])
def test_any_number_of_rows_works_in_both_carriers(rows: int) -> None:
    q, x = quantize("bnb-nf4", values(rows, 64)), values(3, 64, seed=1)
    quantizer = get_quantizer("bnb-nf4")
    expected = x.float() @ quantizer.dequantize(q, torch.float32).T
    with torch.inference_mode():
        assert relative(QuantizedLinear(q, None).eval()(x), expected) < 0.006
        assert relative(quantizer.to_native(q, None)(x), expected) < 0.006


@needs_repacking
def test_library_repacks_its_bytes_at_the_first_forward() -> None:
    layer = library_four_bit(values(64, 128))
    before, state = layer.weight.data.clone(), layer.weight.quant_state
    plain = bnb.functional.dequantize_4bit(before, state).clone()
    with torch.inference_mode():
        layer(values(3, 128, seed=1))
    after = layer.weight.data
    assert after.shape != before.shape
    assert not torch.equal(after.flatten(), before.flatten())
    state = bnb.functional.quantize_4bit(values(64, 128), quant_type="nf4")[1]
    wrong = bnb.functional.dequantize_4bit(after.reshape(before.shape), state)
    assert relative(wrong, plain) > 0.5  # read the plain way, the repacked bytes are another weight


@pytest.mark.parametrize("carrier", ["quantwire", "library"])
def test_our_bytes_stay_as_they_are(carrier: str) -> None:
    q = quantize("bnb-nf4", values(64, 128))
    before = {name: t.clone() for name, t in q.tensors.items()}
    layer = QuantizedLinear(q, None).eval() if carrier == "quantwire" else get_quantizer("bnb-nf4").to_native(q, None)
    with torch.inference_mode():
        layer(values(3, 128, seed=1))
    assert all(torch.equal(q.tensors[name], t) and q.tensors[name].shape == t.shape for name, t in before.items())
    if isinstance(layer, QuantizedLinear):
        assert layer.state_dict().keys() == before.keys()


def test_library_int8_with_float16_weights_has_no_kernel_on_a_cpu() -> None:
    layer = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=True).to("cpu").eval()
    with pytest.raises(NotImplementedError, match="int8_double_quant"):
        layer(values(3, 64))


def test_library_int8_depends_on_training_mode() -> None:
    w, x = values(64, 256), values(8, 256, seed=1)
    with torch.inference_mode():
        evaluated = library_int8(w).eval()(x)
    trained = library_int8(w).train()(x.clone().requires_grad_(True)).detach()
    exact = x.float() @ w.float().T
    assert not torch.equal(evaluated, trained)
    assert relative(evaluated, exact) > 1.2 * relative(trained, exact)  # 8-bit activations in one mode only


@pytest.mark.parametrize("uri", ["bnb-int8", "bnb-int8;int8-threshold=0", "bnb-nf4", "bnb-fp4"])
def test_our_layers_do_not_depend_on_training_mode(uri: str) -> None:
    layer, x = QuantizedLinear(quantize(uri, values(64, 256)), None), values(8, 256, seed=1)
    with torch.inference_mode():
        expected = layer.eval()(x)
        assert torch.equal(layer.train()(x), expected)
    assert torch.equal(layer.train()(x), expected)


def test_our_int8_needs_no_double_quantization() -> None:
    """Full precision goes in, and no layer holds float16 weights on the way."""
    layer: Any = get_quantizer("bnb-int8").to_native(quantize("bnb-int8", values(64, 256)), None)
    assert layer.state.has_fp16_weights is False
    assert layer.weight.dtype is torch.int8
    with torch.inference_mode():
        assert torch.isfinite(layer(values(8, 256, seed=1))).all()


@pytest.mark.parametrize("storage", ["int8", "float16", "bfloat16", "float32", "float64"])
def test_packed_bytes_survive_casts_in_every_storage_dtype(storage: str) -> None:
    """`.to(dtype)` converts floating-point parameters by value, which would destroy bytes that look like floats."""
    uri = f"bnb-nf4;bits4-quant-storage={storage}"
    plain, stored = quantize("bnb-nf4", values(64, 256)), quantize(uri, values(64, 256))
    net = nn.Sequential(QuantizedLinear(stored, values(64)))
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        net = net.to(dtype)
        layer: Any = net[0]
        assert layer.qdata.dtype is getattr(torch, storage)
        assert torch.equal(layer.qdata.data.view(torch.uint8).flatten(), plain.tensors["qdata"].flatten())
    restored = get_quantizer("bnb-nf4").dequantize(layer.quantized_weight, torch.float32)
    assert torch.equal(restored, get_quantizer("bnb-nf4").dequantize(plain, torch.float32))


def test_blocks_for_which_the_library_compiles_are_refused_natively() -> None:
    from quantwire.quantizers.errors import SpecError

    q = quantize("bnb-nf4;bits4-block-size=2048", values(64, 2048))
    with pytest.raises(SpecError, match=r"^bnb-nf4: bitsandbytes' own layer compiles C\+\+ for blocks of 2048"):
        get_quantizer("bnb-nf4").to_native(q, None)


@pytest.mark.parametrize("nested", ["false", "true"])
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_every_block_size_equals_its_formula(block_size: int, nested: str) -> None:
    """Also where a block crosses rows, and for blocks above 1024, which are taken apart here."""
    spec = QuantSpec.from_uri(f"bnb-nf4;bits4-block-size={block_size};bits4-use-double-quant={nested}")
    w = values(33, 320)
    q = get_quantizer("bnb-nf4").quantize(w, spec)
    packed = q.tensors["qdata"].flatten().long()
    indices = torch.stack([packed >> 4, packed & 15], dim=1).flatten()
    absmax = q.tensors["absmax"]
    if nested == "true":
        state = bnb.functional.QuantState(
            absmax=q.tensors["nested_absmax"], blocksize=256, code=q.tensors["nested_code"], dtype=torch.float32
        )
        absmax = bnb.functional.dequantize_blockwise(absmax, state) + q.tensors["offset"]
    expected = bnb.functional.get_4bit_type("nf4", device="cpu")[indices]
    expected = expected * absmax.repeat_interleave(block_size)[: indices.numel()]
    assert torch.equal(get_quantizer("bnb-nf4").dequantize(q, torch.float32), expected.reshape(w.shape))
