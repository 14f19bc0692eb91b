"""QuantizedWeight, QuantizedLinear and quantize_linears.

What depends on the format runs on every format; what the class itself does, on one format of each library. The
conformance suite (`tests/backends`) holds every format to the same things in every dtype.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.gguf import FEW, TYPES
from quantwire.quantizers.apply import OnFailure, check_finite, quantize_linears
from quantwire.quantizers.compat.modes import Carrier
from quantwire.quantizers.errors import SpecError, WeightError
from quantwire.quantizers.registry import available_formats, get_entry, get_quantizer
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedLinear, QuantizedWeight
from torch import Tensor, nn

N, K = 32, 256  # a shape that every format takes: comfy's rotations are of 256 columns
AVAILABLE = available_formats()
FORMATS = pytest.mark.parametrize("format_id", AVAILABLE)
ONE_OF_EACH = (
    *("bnb-int8", "bnb-nf4", "quanto-qint4", "comfy-nvfp4", "comfy-w4a8", "sdnq-uint4", "torchao-int4wo"),
    *("nncf-int4-asym", "layerwise-fp8-e4m3fn", "gguf-q8-0"),
)
SOME = pytest.mark.parametrize("format_id", [f for f in ONE_OF_EACH if f in AVAILABLE])

# How far a product may be from F.linear on the dequantized weight. In bfloat16 kernels scale after the product or
# round another intermediate: up to 0.005 measured. In float32 they may add up in another order.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 0.006}
ACTIVATIONS_IN_INT8 = {"bnb-int8", "torchao-int8dyn"}  # 0.007 to 0.008 measured
NNCF_FLOAT32 = 5e-4  # NNCF dequantizes in float16, whose unit roundoff that is; our product does in float32
# About 1 dB below the worst format of that many bits, on weights as nn.Linear makes them; at 8 bits float8 e5m2.
SQNR_DB = {2: 9, 3: 16, 4: 17, 5: 28, 6: 34, 8: 25}


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantized(format_id: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> QuantizedWeight:
    return get_quantizer(format_id).quantize(values(N, K, seed=seed, dtype=dtype), QuantSpec(format_id))


def layer(format_id: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> QuantizedLinear:
    return QuantizedLinear(quantized(format_id, dtype, seed), values(N, seed=seed + 9, dtype=dtype)).eval()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def least_db(format_id: str) -> float:
    """Of GGUF types what the conformance suite asks of them, since their bits say less."""
    if format_id.startswith("gguf-"):
        return TYPES[format_id.removeprefix("gguf-").upper().replace("-", "_")][0] - 1
    return SQNR_DB[int(get_entry(format_id).bits)]


def product_limit(format_id: str, dtype: torch.dtype) -> float:
    if format_id.startswith("gguf-"):
        return FEW  # ten tokens go to ggml's product
    if format_id in ACTIVATIONS_IN_INT8:
        return 0.02
    return NNCF_FLOAT32 if format_id.startswith("nncf") and dtype is torch.float32 else ROUNDING[dtype]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def saved(obj: Any) -> Any:
    """Through torch.save; plain pickle knows no float8."""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@FORMATS
def test_forward_is_the_product_with_the_dequantized_weight(format_id: str, dtype: torch.dtype) -> None:
    module, x = layer(format_id, dtype), values(2, 5, K, seed=1, dtype=dtype)
    y = module(x)
    assert (y.shape, y.dtype) == ((2, 5, N), dtype)
    expected = F.linear(x, module.weight, module.bias)
    limit = product_limit(format_id, dtype)
    assert relative(y, expected) <= limit
    assert relative(QuantizedLinear(module.quantized_weight, None)(x), F.linear(x, module.weight)) <= limit


@FORMATS
def test_forward_leaves_its_input_alone(format_id: str) -> None:
    x = values(5, K, seed=1, dtype=torch.float16)
    x[2, 3] = 20.0  # an outlier for LLM.int8, which sets such columns to zero while it works
    before = x.clone()
    layer(format_id, torch.float16)(x)
    assert torch.equal(x, before)


@SOME
def test_weight_property(format_id: str) -> None:
    module = layer(format_id, torch.bfloat16)
    assert (module.weight.shape, module.weight.dtype) == ((N, K), torch.bfloat16)
    expected = get_quantizer(format_id).dequantize(module.quantized_weight, torch.bfloat16)
    assert torch.equal(module.weight, expected)
    assert "weight" not in dict(module.named_parameters())


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
@SOME
def test_casting_moves_the_bias_only(format_id: str, cast: str) -> None:
    module = layer(format_id)
    before = state(module)
    after = state(getattr(module, cast)())
    assert after.pop("bias").dtype == {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}[cast]
    before.pop("bias")
    assert same(after, before)


@SOME
def test_deepcopy_and_save(format_id: str) -> None:
    module, x = layer(format_id), values(3, K, seed=1)
    for made in (copy.deepcopy(module), saved(module)):
        assert same(state(made), state(module))
        assert torch.equal(made(x), module(x))
        assert made.qdata.data_ptr() != module.qdata.data_ptr()


@SOME
def test_a_quantized_weight_can_be_copied_and_saved(format_id: str) -> None:
    weight = quantized(format_id)
    for made in (copy.deepcopy(weight), saved(weight)):
        assert same(dict(made.tensors), dict(weight.tensors))
        assert (made.format_id, made.orig_shape, made.orig_dtype, dict(made.meta)) == (
            weight.format_id,
            weight.orig_shape,
            weight.orig_dtype,
            dict(weight.meta),
        )


def test_a_quantized_weight_cannot_be_changed() -> None:
    weight: Any = quantized("bnb-int8")
    with pytest.raises(TypeError):
        weight.tensors["qdata"] = torch.zeros(1)
    with pytest.raises(AttributeError):
        weight.format_id = "bnb-nf4"


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@SOME
def test_state_dict_round_trip(format_id: str, assign: bool) -> None:
    source, target, x = layer(format_id, seed=0), layer(format_id, seed=5), values(3, K, seed=1)
    assert not torch.equal(target(x), source(x))
    target.load_state_dict(state(source), assign=assign)
    assert same(state(target), state(source))
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not-strict"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=["fp32", "bf16", "fp8"])
@SOME
def test_full_precision_values_are_refused(format_id: str, dtype: torch.dtype, strict: bool) -> None:
    module = nn.Sequential(layer(format_id))
    before = state(module)
    with pytest.raises(WeightError) as failure:
        module.load_state_dict({"0.weight": values(N, K).to(dtype), "0.bias": torch.zeros(N)}, strict=strict)
    first = str(failure.value).splitlines()[0]
    assert first.startswith(f"'0.weight': full-precision values ({dtype}) cannot be loaded into {format_id} storage")
    assert same(state(module), before)


@SOME
def test_quantized_tensors_of_another_dtype_are_refused(format_id: str) -> None:
    module = layer(format_id)
    before = state(module)
    wrong = state(module) | {"qdata": torch.ones_like(module.qdata, dtype=torch.float64), "bias": torch.zeros(N)}
    with pytest.raises(WeightError, match=r"^'qdata': dtype is torch\.float64, expected torch\."):
        module.load_state_dict(wrong, strict=False)
    assert same(state(module), before)


# quantize_linears


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.img_in = nn.Linear(K, K)
        self.a = nn.Linear(K, N)
        self.b = nn.Linear(K, N, bias=False)


class Counting:
    """A progress that keeps what it was asked to show."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.total = 0

    def __call__(self, items: Any, total: int) -> Any:
        self.total = total
        for item in items:
            self.seen.append(item.meta.name)
            yield item


@FORMATS
def test_quantize_linears_replaces_and_reports(format_id: str) -> None:
    torch.manual_seed(0)
    model, bar = Net(), Counting()
    before = state(model)
    layers, report = quantize_linears(model, QuantSpec(format_id), progress=bar, title="net")
    assert list(layers) == ["a", "b"]
    assert (bar.seen, bar.total) == (["a.weight", "b.weight"], 2)
    assert all(isinstance(made, QuantizedLinear) and not made.training for made in layers.values())
    assert same(state(model), before)
    actions = {e.name: e.action for e in report.entries}
    assert actions == {
        "img_in.weight": "keep",
        "img_in.bias": "keep",
        "a.bias": "keep",
        "a.weight": "quantize",
        "b.weight": "quantize",
    }
    assert report.nbytes_in == sum(p.numel() * 4 for p in model.parameters())
    assert report.sqnr_db is not None
    assert report.sqnr_db > least_db(format_id)
    assert report.seconds > 0
    assert f"net: 2 linear layers in {format_id} (quantwire carrier)" in str(report)


# Formats without a layer of their library, by how their ids begin, and what is said of them.
NO_LAYER = {
    "nncf": "NNCF compresses a whole traced model and has no layer of its own.",
    "layerwise": "layerwise casting is a hook that diffusers puts on a whole model, and it rounds biases to 8 bits",
    "gguf": "its library has no linear layer of its own.",
}


def refuse_again(format_id: str, carrier: Carrier, found: str) -> None:
    model = Net().to(torch.bfloat16)
    layers, _ = quantize_linears(model, QuantSpec(format_id, exclude=("b",)), carrier=carrier)
    model.a = layers["a"]
    with pytest.raises(WeightError) as failure:
        quantize_linears(model, QuantSpec("gguf-q8-0"))
    assert str(failure.value).startswith(f"'a': already quantized ({found}).\n")


@SOME
def test_a_quantized_model_is_not_quantized_again(format_id: str) -> None:
    refuse_again(format_id, Carrier.QUANTWIRE, f"{format_id}, quantwire carrier")


@pytest.mark.parametrize("format_id", [f for f in AVAILABLE if not f.startswith(tuple(NO_LAYER))])
def test_nor_is_a_model_with_layers_of_the_library(format_id: str) -> None:
    # comfy-kitchen's layers are those of ComfyUI.
    carrier = "host" if format_id.startswith("comfy-") else "library"
    refuse_again(format_id, Carrier.LIBRARY, f"{format_id}, {carrier} carrier")


@pytest.mark.parametrize("format_id", [f for f in AVAILABLE if f.startswith(tuple(NO_LAYER))])
def test_a_layer_without_a_native_form_is_named(format_id: str) -> None:
    with pytest.raises(SpecError) as failure:
        quantize_linears(Net(), QuantSpec(format_id), carrier=Carrier.LIBRARY)
    first, advice = str(failure.value).split("\n", 1)
    assert first.startswith(f"'a.weight': {format_id}: {NO_LAYER[format_id.partition('-')[0]]}")
    assert "quantwire" in advice


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=["nan", "inf", "-inf"])
def test_a_damaged_weight_is_named(bad: float) -> None:
    model = Net()
    model.b.weight.data[1, 2] = bad
    with pytest.raises(WeightError, match=r"^'b\.weight': 1 of 8192 values are nan or inf\."):
        quantize_linears(model, QuantSpec("bnb-int8"))
    with pytest.raises(WeightError, match=r"^'b\.weight': 1 of 8192"):  # full precision would run on the nan
        quantize_linears(model, QuantSpec("bnb-int8"), on_failure=OnFailure.FULL_PRECISION)


@pytest.mark.parametrize("on_failure", OnFailure, ids=lambda o: o.value)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("name", ["img_in.weight", "a.bias"])
def test_a_damaged_parameter_that_is_kept_is_refused_before_any_work(
    name: str, bad: float, on_failure: OnFailure
) -> None:
    model, bar = Net(), Counting()
    model.get_parameter(name).data.view(-1)[3] = bad
    with pytest.raises(WeightError, match=rf"^'{name}': 1 of \d+ values are nan or inf\."):
        quantize_linears(model, QuantSpec("bnb-int8"), on_failure=on_failure, progress=bar)
    assert bar.seen == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_check_finite(dtype: torch.dtype) -> None:
    check_finite("w", torch.full((1, 1), torch.finfo(dtype).max, dtype=torch.float64).to(dtype))
    check_finite("w", torch.tensor([6e4, -6e4, 6e4, 6e4]).clamp(-400, 400).to(dtype))
    check_finite("w", torch.full((64, 64), torch.finfo(torch.bfloat16).max))  # whose float32 sum overflows
    check_finite("w", torch.empty(0, 4, dtype=dtype))
    check_finite("w", torch.ones(3, dtype=torch.int64))
    w = values(8, 8)
    w[0, 0], w[1, 1] = torch.nan, torch.nan
    with pytest.raises(WeightError, match=r"^'w': 2 of 64 values"):
        check_finite("w", w.to(dtype))
    with pytest.raises(WeightError, match=r"^'w': 2 of 3 values"):
        check_finite("w", torch.tensor([torch.inf, -torch.inf, 0]))


@pytest.mark.parametrize("format_id", ["gguf-q8-0", "gguf-q4-0"])
def test_check_finite_of_blocks(format_id: str) -> None:
    q = quantized(format_id)
    check_finite("w", q)
    q.tensors["qdata"][3, :2] = torch.tensor([0, 0x7C], dtype=torch.uint8)  # float16 inf as the scale of one block
    with pytest.raises(WeightError, match=r"^'w': 32 of 8192 values are nan or inf\."):
        check_finite("w", q)


class Tied(nn.Module):
    """b has the weight of a and its bias, c the weight and a bias of its own; e has that of an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(K, N), nn.Linear(K, N), nn.Linear(K, N)
        self.b.weight = self.c.weight = self.a.weight
        self.b.bias = self.a.bias
        self.e, self.embedding = nn.Linear(K, N, bias=False), nn.Embedding(N, K)
        self.embedding.weight = self.e.weight


@SOME
def test_layers_that_share_a_weight_are_all_replaced(format_id: str) -> None:
    model = Tied()
    layers, report = quantize_linears(model, QuantSpec(format_id))
    assert list(layers) == ["a", "b", "c"]
    assert layers["a"] is layers["b"]
    assert layers["a"] is not layers["c"]
    assert layers["a"].qdata.data_ptr() == layers["c"].qdata.data_ptr()
    assert isinstance(layers["c"].bias, nn.Parameter)
    assert torch.equal(layers["c"].bias, model.c.bias)
    entries = {e.name: e for e in report.entries}
    assert (entries["a.weight"].action, entries["a.weight"].reason) == ("quantize", "linear weight, shared with b, c")
    assert (entries["e.weight"].action, entries["e.weight"].reason) == ("keep", "not a linear weight")


def test_nothing_left_to_quantize_is_refused() -> None:
    with pytest.raises(SpecError, match=r"^net: no linear layer is left to quantize with these patterns\."):
        quantize_linears(Net(), QuantSpec("bnb-int8", exclude=("a", "b")), title="net")
