"""The 8-bit trap: full-precision values loaded into storage that is already quantized.

bitsandbytes quantizes when a layer moves to its device. A `load_state_dict` after that copies full-precision values
into int8 storage, each rounded to a whole number, while the scales stay those of the old weight; every key matches and
nothing is said. The first tests show that on the library itself, the others that layers made here refuse it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from cases import CASES
from cases.subject import Subject
from quantwire.hosts.standalone.host import StandaloneHost
from quantwire.quantizers.apply import quantize_linears
from quantwire.quantizers.compat.modes import Carrier
from quantwire.quantizers.errors import WeightError
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


def pairs() -> list[Any]:
    """Every format with its default options, in our carrier and, where the library has one, in its own."""
    found: dict[str, Subject] = {}
    for subject in map(Subject, CASES):
        if subject.case.shape == (N, K):
            found.setdefault(subject.format_id, subject)
    made: list[Any] = []
    for format_id, subject in found.items():
        made.append(pytest.param(subject, Carrier.QUANTWIRE, id=f"{format_id}-quantwire"))
        if subject.case.native is not None and torch.bfloat16 in subject.case.native_dtypes:
            made.append(pytest.param(subject, Carrier.LIBRARY, id=f"{format_id}-library"))
    return made


every_pair = pytest.mark.parametrize(("subject", "carrier"), pairs())


def layers_of(model: nn.Module, subject: Subject, carrier: Carrier) -> dict[str, nn.Module]:
    if carrier is Carrier.LIBRARY and subject.backend == "gguf":
        pytest.importorskip("diffusers")
    make_layer = StandaloneHost().make_layer
    return quantize_linears(model, subject.spec, carrier=carrier, make_layer=make_layer)[0]


def snapshot(module: nn.Module) -> list[Tensor]:
    """The values of a module: a probe output, and its bias."""
    with torch.inference_mode():
        layer: Any = module[0]
        return [module(inputs()), layer.bias.clone()]


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not-strict"])
@every_pair
def test_layers_made_here_refuse_the_wrong_order(subject: Subject, carrier: Carrier, strict: bool) -> None:
    # Of other values than `trained()` has.
    model = nn.Sequential(layers_of(nn.Sequential(trained(seed=1)), subject, carrier)["0"])
    before = snapshot(model)
    source = nn.Sequential(trained()).state_dict()
    with pytest.raises(WeightError) as failure:
        model.load_state_dict(source, strict=strict)
    assert str(failure.value).splitlines() == [
        f"'0.weight': full-precision values (torch.bfloat16) cannot be loaded into {subject.format_id} storage, which "
        "is already quantized; the result would be noise.",
        "Load the full-precision weights into the unquantized model first, then quantize it.",
    ]
    assert all(torch.equal(a, b) for a, b in zip(snapshot(model), before, strict=True))


@every_pair
def test_the_right_order_works(subject: Subject, carrier: Carrier) -> None:
    model = nn.Sequential(nn.Linear(K, N).to(torch.bfloat16))
    model.load_state_dict(nn.Sequential(trained()).state_dict())
    layer = layers_of(model, subject, carrier)["0"]
    case = subject.case
    native = case.native[torch.bfloat16] if isinstance(case.native, Mapping) else case.native or 0.0
    # What the format costs, what its product does, and bfloat16. Noise would be 0.9 and more.
    allowed = 10 ** (-case.sqnr_db / 20) + case.product + native + 0.01
    if allowed >= 0.7:  # TQ1_0, TQ2_0: three values a weight, made for models that were trained with them
        pytest.skip(f"{subject.format_id} is as far off as noise would be: {allowed:.2f}")
    assert relative(layer, trained()) < allowed
