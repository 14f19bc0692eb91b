"""Quantizing a model that is quantized already: refused, or read back first."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from quantwire.quantizers.apply import OnQuantized, quantize_linears, quantize_tensor
from quantwire.quantizers.compat.modes import Carrier
from quantwire.quantizers.dequantize import quantized_layers, stored_nbytes
from quantwire.quantizers.errors import WeightError
from quantwire.quantizers.registry import get_quantizer
from quantwire.quantizers.rules import Rule
from quantwire.quantizers.spec import QuantSpec
from torch import nn

FIRST = OnQuantized.DEQUANTIZE
READABLE = [
    *(("quantwire", f) for f in ("bnb-int8", "bnb-nf4", "quanto-qint4", "gguf-q4-0", "comfy-int8")),
    *(
        ("library", f)
        for f in ("bnb-int8", "bnb-nf4", "quanto-qint8", "quanto-qint4", "comfy-fp8-e4m3fn", "comfy-int8")
    ),
]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.norm = nn.Linear(128, 64), nn.Linear(128, 64, bias=False), nn.LayerNorm(128)
        self.to(torch.bfloat16)


def quantized(format_id: str, carrier: str, names: tuple[str, ...] = ("a", "b")) -> Model:
    model = Model()
    layers, _ = quantize_linears(model, QuantSpec(format_id), carrier=Carrier(carrier))
    for name in names:
        setattr(model, name, layers[name])
    return model


@pytest.mark.parametrize(("carrier", "format_id"), READABLE)
def test_what_is_read_is_what_the_layer_multiplies_with(carrier: str, format_id: str) -> None:
    model = quantized(format_id, carrier)
    full, _ = quantize_linears(Model(), QuantSpec(format_id))
    for name, layer in quantized_layers(model).items():
        want = get_quantizer(format_id).dequantize(full[name].quantized_weight, torch.float32)
        got = layer.read()
        assert layer.shape == tuple(got.shape) == (64, 128)
        assert layer.dtype == got.dtype
        tolerance = 0.01 * float(want.abs().max())  # bfloat16 and float16 round what float32 holds
        assert torch.allclose(got.float(), want, atol=tolerance)
        assert 64 * 128 // 2 <= layer.nbytes < 64 * 128 * 1.5


@pytest.mark.parametrize(("carrier", "format_id"), READABLE)
def test_dequantize_first(carrier: str, format_id: str, caplog: pytest.LogCaptureFixture) -> None:
    model = quantized(format_id, carrier)
    before = dict(model.named_parameters())
    source = {n: layer.read() for n, layer in quantized_layers(model).items()}
    with caplog.at_level(logging.WARNING):
        layers, report = quantize_linears(model, QuantSpec("gguf-q8-0"), on_quantized=FIRST)
    assert dict(model.named_parameters()) == before, "the input keeps its parameters"
    for name, layer in layers.items():
        alone = get_quantizer("gguf-q8-0").quantize(source[name], QuantSpec("gguf-q8-0"))
        assert torch.equal(layer.qdata, alone.tensors["qdata"])
        bias = getattr(model, name).bias
        assert (layer.bias is None) == (bias is None)
        assert bias is None or torch.equal(layer.bias, bias)
    (warning,) = report.warnings
    assert warning.startswith("2 layers were quantized already (")
    assert "errors of both quantizations add up" in warning
    assert warning in caplog.text
    entries = {e.name: e for e in report.entries if e.action == "quantize"}
    assert all(", was " in e.reason and e.nbytes_in < 64 * 128 * 1.5 for e in entries.values())


def test_layers_that_stay_keep_their_format() -> None:
    model = quantized("bnb-nf4", "quantwire")
    spec = QuantSpec("gguf-q8-0", exclude=("b",))
    layers, report = quantize_linears(model, spec, on_quantized=FIRST)
    assert list(layers) == ["a"]
    (entry,) = [e for e in report.entries if e.name == "b.weight"]
    assert (entry.action, entry.reason) == ("keep", "excluded, stays in bnb-nf4")
    assert entry.nbytes_in == model.b.quantized_weight.nbytes


def test_a_model_that_is_half_quantized() -> None:
    model = quantized("bnb-nf4", "quantwire", ("a",))
    spec = QuantSpec("gguf-q8-0", rules=(Rule("b", "bnb-int8"),))
    layers, report = quantize_linears(model, spec, on_quantized=FIRST)
    assert {n: layer.format_id for n, layer in layers.items()} == {"a": "gguf-q8-0", "b": "bnb-int8"}
    assert report.warnings[0].startswith("1 layers were quantized already (bnb-nf4)")


def test_refused_by_default() -> None:
    with pytest.raises(WeightError) as failure:
        quantize_linears(quantized("bnb-nf4", "quantwire"), QuantSpec("gguf-q8-0"))
    said, advice = str(failure.value).splitlines()
    assert said == "'a': already quantized (bnb-nf4, quantwire carrier)."
    assert advice.endswith("set on_quantized to 'dequantize first'.")


def test_a_full_precision_model_needs_no_option() -> None:
    _, report = quantize_linears(Model(), QuantSpec("gguf-q8-0"), on_quantized=FIRST)
    assert report.warnings == []


def test_quanto_layers_that_are_not_frozen_are_refused() -> None:
    import optimum.quanto as quanto

    model = Model()
    quanto.quantize(model, weights=quanto.qint8)
    with pytest.raises(WeightError, match=r"^'a': a quanto layer that is not frozen"):
        quantize_linears(model, QuantSpec("gguf-q8-0"), on_quantized=FIRST)


def test_what_cannot_be_read_is_refused_by_name() -> None:
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    model = Model()
    import gguf

    layer = GGUFLinear(128, 64, bias=False, compute_dtype=torch.bfloat16)
    layer.weight = GGUFParameter(torch.zeros(64, 136, dtype=torch.uint8), quant_type=gguf.GGMLQuantizationType.Q8_0)
    model.a = layer
    with pytest.raises(
        WeightError, match=r"^'a': already quantized \(gguf-q8-0, library carrier, GGUFParameter\), and"
    ):
        quantize_linears(model, QuantSpec("bnb-int8"), on_quantized=FIRST)


def four_bit(k: int, dtype: torch.dtype = torch.float32, storage: torch.dtype = torch.uint8) -> tuple[Any, nn.Linear]:
    """A library layer made as the library's users make it, and what it was made from."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    source = nn.Linear(k, 64, bias=False, dtype=dtype)
    with torch.no_grad():
        source.weight *= 5 * torch.rand(64, 1, dtype=dtype)  # blocks cross rows, so wrong maxima show
    layer = bnb.nn.Linear4bit(k, 64, bias=False, quant_type="nf4", quant_storage=storage, compress_statistics=False)
    layer.load_state_dict({"weight": source.weight.data})
    return nn.Sequential(layer.to("cpu")).eval(), source


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [16, 48, 64, 80, 112])
def test_four_bit_layers_whose_blocks_cross_rows(k: int, storage: torch.dtype) -> None:
    model, source = four_bit(k, storage=storage)
    weight, _ = quantize_tensor("a.weight", source.weight.detach(), QuantSpec("bnb-nf4"))
    read = quantized_layers(model)["0"].read()
    assert torch.equal(read, get_quantizer("bnb-nf4").dequantize(weight, torch.float32))


def test_four_bit_layers_whose_bytes_were_repacked_are_refused() -> None:
    """As the library does at a layer's first product on a CPU with AVX512-BF16; done by hand for all other CPUs."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    model, _ = four_bit(128)
    weight = model[0].weight
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    with pytest.raises(WeightError) as failure:
        quantize_linears(model, QuantSpec("gguf-q8-0"), on_quantized=FIRST)
    said, advice = str(failure.value).splitlines()
    assert said.startswith("'0': bitsandbytes has repacked this bnb-nf4 layer for AVX512-BF16")
    assert advice.startswith("Load the model again")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("carrier", ["quantwire", "library"])
def test_int8_without_a_bias_is_read_in_the_models_dtype(dtype: torch.dtype, carrier: str) -> None:
    full = Model().to(dtype)
    layers, _ = quantize_linears(full, QuantSpec("bnb-int8"), carrier=Carrier(carrier))
    full.a, full.b = layers["a"], layers["b"]
    assert full.b.bias is None
    assert quantized_layers(full)["b"].dtype == quantized_layers(full)["b"].read().dtype == dtype


def test_bytes_as_they_are_held() -> None:
    whole = sum(p.numel() * p.element_size() for p in Model().parameters())
    assert stored_nbytes(Model()) == whole
    for carrier in ("quantwire", "library"):
        packed = stored_nbytes(quantized("bnb-nf4", carrier))
        assert 2 * 64 * 128 // 2 <= packed < whole / 2, carrier
