"""State dicts of NNCF's compressed torch models: found, read as its own decompressors do, and damage is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.quantizers.backends.nncf.library import load
from quantwire.quantizers.registry import availability, get_quantizer
from safetensors.torch import save_file
from scheme_files import ROUNDING, codes, computes, edited, equals, fault, looked, weight_of
from torch import Tensor, nn
from torch.nn import functional

if not availability("nncf-int8-asym").works:
    pytest.skip(availability("nncf-int8-asym").reason, allow_module_level=True)

MODES = ("int8_sym", "int8_asym", "int4_sym", "int4_asym")
K = 64


class Nested(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(K, K, dtype=dtype)])
        self.out = nn.Linear(K, 48, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks[0](x))


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, torch.dtype], Any]:
    nncf = load("nncf")
    made: dict[tuple[str, torch.dtype], Any] = {}
    for mode in MODES:
        for dtype in (torch.bfloat16, torch.float32) if mode == "int4_asym" else (torch.bfloat16,):
            options: dict[str, Any] = {} if "int8" in mode else {"ratio": 1.0, "group_size": 32, "all_layers": True}
            made[mode, dtype] = nncf.compress_weights(
                Nested(dtype).eval(),
                mode=nncf.CompressWeightsMode(mode),
                dataset=nncf.Dataset([torch.ones(1, K, dtype=dtype)]),
                **options,
            )
    return made


def theirs(model: Any, name: str) -> Tensor:
    """A weight as the model's own hook restores it."""
    hooks = dict(model.named_modules())
    hook = next(m for n, m in hooks.items() if n.endswith(f".{name.replace('.', ':')}__0.0"))
    return hook(model.get_parameter(name).detach())


@pytest.mark.parametrize("mode", MODES)
def test_a_file_of_each_mode(tmp_path: Path, models: dict[tuple[str, torch.dtype], Any], mode: str) -> None:
    for (made, dtype), model in models.items():
        if made != mode:
            continue
        save_file(model.state_dict(), tmp_path / "n.safetensors")
        found = looked(tmp_path / "n.safetensors")
        assert not found.faults
        format_id = f"nncf-{mode.replace('_', '-')}"
        assert {n: (x.format_id, x.shape) for n, x in found.layers.items()} == {
            "blocks.0.weight": (format_id, (K, K)),
            "out.weight": (format_id, (48, K)),
        }
        assert found.plain == ("blocks.0.bias",)
        assert ("groups of 32" in found.layers["out.weight"].type) == ("int4" in mode)
        expected = theirs(model, "blocks.0.weight")
        assert expected.dtype == dtype
        equals(found, "blocks.0.weight", expected)
        # What the hooked model does with it; its hooks run in whole models only.
        bias = model.blocks[0].bias.detach()
        rounding = torch.float16 if dtype is torch.float32 else dtype  # of NNCF's scales and their products
        computes(found, "blocks.0.weight", lambda x, w=expected, b=bias: functional.linear(x, w, b), bias, rounding)
        if dtype == torch.bfloat16:  # what a layer without a bias is taken for
            equals(found, "out.weight", theirs(model, "out.weight"))
            x = torch.randn(8, K, dtype=dtype, generator=torch.Generator().manual_seed(1))
            hidden = get_quantizer(format_id).linear(x, weight_of(found, "blocks.0.weight"), bias)
            ours = get_quantizer(format_id).linear(hidden, weight_of(found, "out.weight"), None)
            with torch.no_grad():
                assert float((ours - model(x)).norm() / ours.norm()) < 2 * ROUNDING[dtype]


@pytest.mark.parametrize(
    ("mode", "code", "part", "change"),
    [
        ("int8_sym", "tensor-missing", "._scale", None),
        ("int8_asym", "tensor-missing", "._zero_point", None),
        ("int8_sym", "scale-shape", "._scale", torch.ones(7, 1, dtype=torch.float16)),
        ("int4_sym", "scale-shape", "._scale", torch.ones(7, 1, 1, dtype=torch.float16)),
        ("int4_asym", "tensor-shape", "._zero_point", torch.zeros(7, 1, dtype=torch.uint8)),
        ("int8_sym", "tensor-dtype", "._scale", torch.ones(K, 1)),
        ("int8_sym", "weight-missing", "blocks.0.weight", None),
    ],
)
def test_damage_is_named(
    tmp_path: Path, models: dict[tuple[str, torch.dtype], Any], mode: str, code: str, part: str, change: Tensor | None
) -> None:
    save_file(models[mode, torch.bfloat16].state_dict(), tmp_path / "sound.safetensors")
    hook = "__nncf_hooks.post_hooks.blocks:0:weight__0.0"
    name = hook + part if part.startswith(".") else part

    def damage(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        if part == "._scale" and change is None:
            # Nothing else of a symmetric layer tells that it is compressed: with its zero point only.
            tensors[f"{hook}._zero_point"] = torch.zeros(K, 1, dtype=torch.uint8)
        tensors.pop(name)
        if change is not None:
            tensors[name] = change

    found = looked(edited(tmp_path / "sound.safetensors", tmp_path / "n.safetensors", damage))
    assert codes(found) == {code}
    assert fault(found, code).tensor == name
    assert code == "weight-missing" or not found.layers["blocks.0.weight"].format_id
    assert found.layers["out.weight"].format_id
