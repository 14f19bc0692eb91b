"""Where bitsandbytes is wrong about 4-bit weights, and its layers on our values."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from cases import DTYPES
from cases.subject import values
from quantwire.quantizers.errors import SpecError
from quantwire.quantizers.kernels import int8
from quantwire.quantizers.registry import get_quantizer
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import FullPrecisionGuard, QuantizedLinear, QuantizedWeight
from torch import Tensor, nn

bnb: Any = pytest.importorskip("bitsandbytes")
URIS = ["bnb-int8", "bnb-nf4", "bnb-fp4", "bnb-nf4;bits4-use-double-quant=true"]


def quantize(uri: str, w: Tensor) -> QuantizedWeight:
    spec = QuantSpec.from_uri(uri)
    return get_quantizer(spec.format_id).quantize(w, spec)


def native(q: QuantizedWeight, bias: Tensor | None) -> nn.Module:
    return get_quantizer(q.format_id).to_native(q, bias)


@pytest.mark.parametrize("shape", [(16, 32), (7, 96), (65, 160), (64, 34), (1, 2)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_four_bit_equals_its_formula_where_blocks_cross_rows(
    quant_type: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    """bitsandbytes 0.50.2 itself is wrong on AVX-512 CPUs for K = 32, 96 and 160."""
    q = quantize(f"bnb-{quant_type}", values(*shape, dtype=dtype))
    packed = q.tensors["qdata"].flatten().long()
    nibbles = torch.stack([packed >> 4, packed & 15], dim=1).flatten()
    absmax = q.tensors["absmax"].repeat_interleave(64)[: nibbles.numel()]
    expected = (bnb.functional.get_4bit_type(quant_type, device="cpu")[nibbles] * absmax).reshape(shape)
    assert torch.equal(get_quantizer(q.format_id).dequantize(q, torch.float32), expected)
    layer, x = QuantizedLinear(q, None), values(3, shape[1], dtype=dtype)
    assert torch.equal(layer(x), nn.functional.linear(x, expected.to(dtype)))


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_outlier_columns_are_multiplied_as_the_library_does(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "PART_NUMEL", 20_000)  # several blocks of activations
    x = values(rows, 512, seed=2, dtype=dtype)
    x[:, [3, 77, 500]] *= 9
    assert int((x.abs() >= 6).any(dim=0).sum()) in (1, 2, 3)
    q, bias = quantize("bnb-int8", values(96, 512, dtype=dtype)), values(96, seed=1, dtype=dtype)
    ours = QuantizedLinear(q, bias)(x)
    with torch.inference_mode():
        theirs = native(q, bias)(x)
    error = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
    assert error <= {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}[dtype]
    # Without the outliers apart it would be the product of rows whose scale they set.
    plain = QuantizedLinear(quantize("bnb-int8;int8-threshold=0", values(96, 512, dtype=dtype)), bias)(x)
    exact = nn.functional.linear(x.float(), get_quantizer("bnb-int8").dequantize(q, torch.float32), bias.float())
    assert (ours.float() - exact).norm() < 0.7 * (plain.float() - exact).norm()


def test_native_four_bit_is_refused_where_the_library_is_wrong() -> None:
    q = quantize("bnb-nf4", values(64, 96))
    with pytest.raises(SpecError, match=r"^bnb-nf4: K=96 is not a multiple of block size 64, and bitsandbytes' own"):
        native(q, None)


@pytest.mark.parametrize("uri", URIS)
def test_native_layers_can_be_copied(uri: str) -> None:
    """The tensor classes of the other libraries can be neither copied nor pickled."""
    layer: Any = native(quantize(uri, values(64, 256, dtype=torch.bfloat16)), values(64, dtype=torch.bfloat16))
    x = values(3, 256, seed=2, dtype=torch.bfloat16)
    with torch.inference_mode():
        layer(x)
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_the_guard_of_a_native_layer_can_be_pickled() -> None:
    guard = FullPrecisionGuard("bnb-int8")
    assert pickle.loads(pickle.dumps(guard)) == guard
