"""What comfy-kitchen's tensors do that a user would not expect, and that layers made here do not do.

Each test first shows the trap on the library itself, so it says so when a version no longer has it.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from quantwire.quantizers.apply import quantize_tensor
from quantwire.quantizers.errors import SpecError
from quantwire.quantizers.registry import get_quantizer
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedLinear, QuantizedWeight
from torch import Tensor, nn

kitchen: Any = pytest.importorskip("comfy_kitchen.tensor")

N, K = 64, 256
FORMATS = ["fp8-e4m3fn", "fp8-e5m2", "nvfp4", "mxfp8", "int8", "int8-convrot", "w4a4-convrot", "w4a8"]
every_format = pytest.mark.parametrize("format_id", [f"comfy-{f}" for f in FORMATS])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def quantize(uri: str, w: Tensor) -> QuantizedWeight:
    spec = QuantSpec.from_uri(uri)
    return get_quantizer(spec.format_id).quantize(w, spec)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())


def library_layer(format_id: str) -> Any:
    return get_quantizer(format_id).to_native(quantize(format_id, values(N, K)), None)


@every_format
def test_library_ignores_adding_to_a_weight(format_id: str) -> None:
    layer = library_layer(format_id)
    before = layer.weight.dequantize()
    with torch.no_grad():
        layer.weight.add_(1.0)
    assert torch.equal(layer.weight.dequantize(), before)


@every_format
def test_adding_to_our_weight_is_refused_where_python_can_tell(format_id: str) -> None:
    layer: Any = QuantizedLinear(quantize(format_id, values(N, K)), None)
    before = layer.weight
    with pytest.raises(AttributeError):
        layer.weight += 1.0  # an assignment, which the property has no setter for
    assert torch.equal(layer.weight, before)


@every_format
def test_scaling_our_plain_tensors_counts(format_id: str) -> None:
    layer: Any = QuantizedLinear(quantize(format_id, values(N, K)), None)
    before = layer.weight
    with torch.no_grad():
        if format_id == "comfy-mxfp8":  # a power of two is all that an e8m0 scale can hold
            layer.scale.data = (layer.scale.data.view(torch.uint8) + 1).view(layer.scale.dtype)
        else:
            getattr(layer, "s_channel", layer.scale).mul_(2)
    assert torch.equal(layer.weight, before * 2)


@every_format
def test_library_layers_cannot_be_copied(format_id: str) -> None:
    layer = library_layer(format_id)
    with pytest.raises(RuntimeError, match="python storage"):
        copy.deepcopy(layer)


@every_format
def test_our_layers_can_be_copied(format_id: str) -> None:
    layer, x = QuantizedLinear(quantize(format_id, values(N, K)), values(N, seed=1)), values(3, K, seed=2)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@every_format
def test_library_tensors_break_the_way_accelerate_makes_meta_parameters(format_id: str) -> None:
    weight = library_layer(format_id).weight
    with pytest.raises(TypeError, match="requires_grad"):
        type(weight.data)(weight.data, requires_grad=False)  # as accelerate's set_module_tensor_to_device does


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("format_id", ["comfy-fp8-e4m3fn", "comfy-fp8-e5m2", "comfy-nvfp4"])
def test_library_makes_nan_of_zeros_and_ours_does_not(format_id: str, dtype: torch.dtype) -> None:
    quantizer: Any = get_quantizer(format_id)
    w = torch.zeros(N, K, dtype=dtype)
    raw = kitchen.QuantizedTensor.from_float(w, quantizer.native.layout, **quantizer.native.options)
    assert torch.isnan(raw.dequantize()).any()
    assert torch.equal(quantizer.dequantize(quantize(format_id, w), torch.float32), torch.zeros(N, K))


@pytest.mark.parametrize("format_id", ["comfy-fp8-e4m3fn", "comfy-nvfp4"])
def test_tiny_float16_weights_keep_their_values(format_id: str) -> None:
    """The library divides in float16, where the scale becomes 0."""
    quantizer: Any = get_quantizer(format_id)
    w = (values(N, K).float() * 2e-6).to(torch.float16)
    raw = kitchen.QuantizedTensor.from_float(w, quantizer.native.layout, **quantizer.native.options)
    assert not relative(raw.dequantize(), w) < 0.9  # nan, or all zeros
    restored = quantizer.dequantize(quantize(format_id, w), torch.float32)
    assert relative(restored, w) < 0.12


@every_format
def test_input_is_not_touched_though_it_is_not_copied(format_id: str) -> None:
    w = values(N, K)
    before = w.clone()
    quantize(format_id, w)
    assert torch.equal(w, before)


def test_one_scale_for_the_tensor() -> None:
    q = quantize("comfy;type=int8;scale=tensor", values(N, K))
    assert (q.format_id, q.tensors["scale"].shape) == ("comfy-int8", torch.Size([]))
    assert quantize("comfy;type=int8;scale=row", values(N, K)).tensors["scale"].shape == (N, 1)


@pytest.mark.parametrize("size", [16, 64, 256])
@pytest.mark.parametrize("kind", ["int8-convrot", "w4a4-convrot", "w4a8"])
def test_rotation_size_is_what_the_layout_records(kind: str, size: int) -> None:
    q = quantize(f"comfy;type={kind};convrot-group-size={size}", values(N, K))
    layer: Any = get_quantizer(q.format_id).to_native(q, None)
    assert layer.weight._params.convrot_groupsize == size
    assert isinstance(layer, nn.Linear)


def test_rotation_spreads_outlier_columns() -> None:
    """What rotating is for: a few large columns ruin a row's scale, unless they are mixed with the others first."""
    w = values(N, K)
    w[:, 7] *= 60
    errors = [
        float((get_quantizer(q.format_id).dequantize(q, torch.float32)[:, :7] - w[:, :7].float()).norm())
        for q in (quantize(f"comfy-{kind}", w) for kind in ("int8", "int8-convrot"))
    ]
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("std", [1e-4, 0.02, 0.1, 1.0])
@pytest.mark.parametrize("format_id", ["comfy-fp8-e4m3fn", "comfy-fp8-e5m2", "comfy-nvfp4"])
def test_float16_weights_of_usual_sizes_keep_their_quality(format_id: str, std: float) -> None:
    """comfy-kitchen multiplies by 1 / scale in float16, which is inf for e5m2 where all weights are below 0.8."""
    least = {"comfy-fp8-e4m3fn": 30, "comfy-fp8-e5m2": 24.5, "comfy-nvfp4": 19.5}[format_id]
    _, entry = quantize_tensor("w", (values(64, 256) * std).to(torch.float16), QuantSpec(format_id))
    assert entry.sqnr_db is not None
    assert entry.sqnr_db > least


def test_options_that_another_version_lacks() -> None:
    """A file may come from a newer comfy-kitchen than the host's: False is what one without the option does."""
    quantizer: Any = get_quantizer("comfy-w4a8")
    q = quantize("comfy-w4a8", values(N, K))
    newer = QuantizedWeight(q.format_id, q.tensors, q.orig_shape, q.orig_dtype, {**q.meta, "other_order": False})
    assert torch.equal(quantizer.dequantize(newer, torch.float32), quantizer.dequantize(q, torch.float32))
    other = QuantizedWeight(q.format_id, q.tensors, q.orig_shape, q.orig_dtype, {**q.meta, "other_order": True})
    with pytest.raises(SpecError, match="comfy-w4a8: other_order is not known to the comfy-kitchen that is installed"):
        quantizer.dequantize(other, torch.float32)
