"""Layouts that are named and not loaded. GPTQ's and AWQ's files are written here by the published layout, since their
packages need CUDA, and nunchaku's by that of its layers in diffusers, which need kernels from the net."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.quantizers.errors import FileError
from safetensors.torch import save_file
from scheme_files import codes, looked
from torch import Tensor

N, K, GROUP = 64, 128, 32


def gptq(bits: int = 4) -> dict[str, Tensor]:
    return {
        "a.qweight": torch.zeros(K * bits // 32, N, dtype=torch.int32),
        "a.qzeros": torch.zeros(K // GROUP, N * bits // 32, dtype=torch.int32),
        "a.scales": torch.ones(K // GROUP, N, dtype=torch.float16),
        "a.g_idx": torch.zeros(K, dtype=torch.int32),
    }


def awq() -> dict[str, Tensor]:
    return {
        "a.qweight": torch.zeros(K, N // 8, dtype=torch.int32),
        "a.qzeros": torch.zeros(K // GROUP, N // 8, dtype=torch.int32),
        "a.scales": torch.ones(K // GROUP, N, dtype=torch.float16),
    }


def folder(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    save_file(tensors | {"a.bias": torch.ones(N)}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"quantization_config": config}))
    return path


@pytest.mark.parametrize(
    ("tensors", "config", "scheme", "shown"),
    [
        (gptq(), {"quant_method": "gptq", "bits": 4}, "gptq", "GPTQ, 4 bits"),
        (gptq(8), {"quant_method": "gptq", "bits": 8}, "gptq", "GPTQ, 8 bits"),
        (gptq(), {}, "gptq", "GPTQ, 4 bits"),
        ({n: t for n, t in gptq().items() if n != "a.g_idx"}, {}, "gptq", "GPTQ, 4 bits"),
        (awq(), {"quant_method": "awq", "bits": 4}, "awq", "AWQ, 4 bits"),
        (awq(), {}, "awq", "AWQ, 4 bits"),
    ],
)
def test_published_integer_layouts(
    tmp_path: Path, tensors: dict[str, Tensor], config: dict[str, Any], scheme: str, shown: str
) -> None:
    found = looked(folder(tmp_path, tensors, config))
    layer = found.layers["a.weight"]
    assert (layer.scheme, layer.type, layer.shape, layer.format_id) == (scheme, shown, (N, K), "")
    assert set(layer.tensors.values()) == set(tensors)
    assert found.plain == ("a.bias",)
    assert not found.faults
    with pytest.raises(FileError, match="Open it with"):
        found.read("a.weight")


def test_a_missing_part_of_the_published_layout(tmp_path: Path) -> None:
    found = looked(folder(tmp_path, {n: t for n, t in gptq().items() if n != "a.scales"}, {}))
    assert codes(found) == {"tensor-missing"}
    assert not found.layers["a.weight"].format_id


@pytest.mark.parametrize(("precision", "group"), [("int4", 64), ("nvfp4", 16)])
def test_layers_of_nunchaku_as_published(tmp_path: Path, precision: str, group: int) -> None:
    scales = torch.bfloat16 if precision == "int4" else torch.float8_e4m3fn
    tensors = {
        "a.qweight": torch.zeros(N, K // 2, dtype=torch.int8),
        "a.wscales": torch.ones(K // group, N).to(scales),
        "a.proj_down": torch.ones(K, 32, dtype=torch.bfloat16),
        "a.proj_up": torch.ones(N, 32, dtype=torch.bfloat16),
        "a.smooth_factor": torch.ones(K, dtype=torch.bfloat16),
        "b.qweight": torch.zeros(N // 4, K // 2, dtype=torch.int32),
        "b.wscales": torch.ones(K // 64, N, dtype=torch.bfloat16),
        "b.wzeros": torch.ones(K // 64, N, dtype=torch.bfloat16),
    }
    if precision == "nvfp4":
        tensors |= {"a.wcscales": torch.ones(N, dtype=torch.bfloat16), "a.wtscale": torch.ones(1, dtype=torch.bfloat16)}
    save_file(tensors | {"a.bias": torch.ones(N), "b.bias": torch.ones(N)}, tmp_path / "n.safetensors")
    found = looked(tmp_path / "n.safetensors")
    assert {n: (x.scheme, x.type, x.shape, x.format_id) for n, x in found.layers.items()} == {
        "a.weight": ("svdquant", f"SVDQuant, {precision}", (N, K), ""),
        "b.weight": ("svdquant", "AWQ, 4 bits", (N, K), ""),
    }
    assert set(found.plain) == {"a.bias", "b.bias"}
    with pytest.raises(FileError, match="nunchaku"):
        found.read("a.weight")


def test_older_names_and_metadata_of_nunchaku_as_published(tmp_path: Path) -> None:
    tensors = {
        "a.qweight": torch.zeros(N, K // 2, dtype=torch.int8),
        "a.wscales": torch.ones(K // 64, N, dtype=torch.bfloat16),
        "a.lora_down": torch.ones(K, 32, dtype=torch.bfloat16),
        "a.lora_up": torch.ones(N, 32, dtype=torch.bfloat16),
        "a.smooth": torch.ones(K, dtype=torch.bfloat16),
    }
    told = {"quantization_config": json.dumps({"method": "svdquant", "weight": {"dtype": "int4", "group_size": 64}})}
    save_file(tensors, tmp_path / "n.safetensors", told)
    layer = looked(tmp_path / "n.safetensors").layers["a.weight"]
    assert (layer.type, layer.shape, set(layer.tensors.values())) == ("SVDQuant, int4", (N, K), set(tensors))
    save_file({n: t for n, t in tensors.items() if n != "a.wscales"}, tmp_path / "n.safetensors", told)
    assert codes(looked(tmp_path / "n.safetensors")) == {"tensor-missing"}
