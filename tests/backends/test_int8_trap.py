"""The 8-bit trap: full-precision values loaded into storage that is already quantized.

bitsandbytes quantizes when a layer moves to its device. A `load_state_dict` after that copies full-precision values
into int8 storage, each rounded to a whole number, while the scales stay those of the old weight; every key matches and
nothing is said. The first tests show that on the library itself, the others that layers made here refuse it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantwire.hosts.standalone.host import StandaloneHost
from quantwire.quantizers.apply import quantize_linears
from quantwire.quantizers.compat.modes import Carrier
from quantwire.quantizers.errors import WeightError
from quantwire.quantizers.registry import available_formats
from quantwire.quantizers.spec import QuantSpec
from torch import Tensor, nn

N, K = 64, 256


def trained(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(K, N).to(torch.bfloat16).requires_grad_(False).eval()


def inputs() -> Tensor:
    return torch.randn(8, K, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16)


def relative(layer: nn.Module, reference: nn.Module) -> float:
    with torch.inference_mode():
        got, expected = layer(inputs()).float(), reference(inputs()).float()
    return float((got - expected).norm() / expected.norm())


def raw_int8() -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    return bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False)


def test_raw_library_in_the_wrong_order_gives_noise_without_a_word() -> None:
    layer = raw_int8().to("cpu")
    result = layer.load_state_dict(trained().state_dict(), strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert relative(layer.eval(), trained()) > 0.9


def test_raw_library_in_the_right_order_works() -> None:
    layer = raw_int8()
    layer.load_state_dict(trained().state_dict())
    assert relative(layer.to("cpu").eval(), trained()) < 0.05


def quantized(format_id: str, carrier: Carrier) -> nn.Module:
    """A model with one quantized layer, of other values than `trained()` has."""
    if carrier is Carrier.LIBRARY and format_id.startswith("gguf"):
        pytest.importorskip("diffusers")
    model = nn.Sequential(trained(seed=1))
    layers, _ = quantize_linears(model, QuantSpec(format_id), carrier=carrier, make_layer=StandaloneHost().make_layer)
    return nn.Sequential(layers["0"])


def snapshot(module: nn.Module) -> list[Tensor]:
    """The values of a module: a probe output, and its bias."""
    with torch.inference_mode():
        layer: Any = module[0]
        return [module(inputs()), layer.bias.clone()]


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not-strict"])
@pytest.mark.parametrize("carrier", [Carrier.QUANTWIRE, Carrier.LIBRARY], ids=lambda c: c.value)
@pytest.mark.parametrize("format_id", available_formats())
def test_layers_made_here_refuse_the_wrong_order(format_id: str, carrier: Carrier, strict: bool) -> None:
    model = quantized(format_id, carrier)
    before = snapshot(model)
    source = nn.Sequential(trained()).state_dict()
    with pytest.raises(WeightError) as failure:
        model.load_state_dict(source, strict=strict)
    assert str(failure.value).splitlines() == [
        f"'0.weight': full-precision values (torch.bfloat16) cannot be loaded into {format_id} storage, which is "
        "already quantized; the result would be noise.",
        "Load the full-precision weights into the unquantized model first, then quantize it.",
    ]
    assert all(torch.equal(a, b) for a, b in zip(snapshot(model), before, strict=True))


@pytest.mark.parametrize("carrier", [Carrier.QUANTWIRE, Carrier.LIBRARY], ids=lambda c: c.value)
@pytest.mark.parametrize("format_id", available_formats())
def test_the_right_order_works(format_id: str, carrier: Carrier) -> None:
    if carrier is Carrier.LIBRARY and format_id.startswith("gguf"):
        pytest.importorskip("diffusers")
    model = nn.Sequential(nn.Linear(K, N).to(torch.bfloat16))
    model.load_state_dict(nn.Sequential(trained()).state_dict())
    layers, _ = quantize_linears(model, QuantSpec(format_id), carrier=carrier, make_layer=StandaloneHost().make_layer)
    assert relative(layers["0"], trained()) < (0.05 if "8" in format_id else 0.2)
