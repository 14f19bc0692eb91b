"""Files in ComfyUI's native formats: names, dtypes and shapes as its loader wants them, values comfy-kitchen's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.quantizers.files.saving import save_weights
from quantwire.quantizers.files.writers import WRITERS
from quantwire.quantizers.registry import get_quantizer
from quantwire.quantizers.spec import QuantSpec
from safetensors import safe_open
from torch import Tensor

kitchen: Any = pytest.importorskip("comfy_kitchen.tensor")
X = "blocks.0.proj"
E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
F32, I8, U8 = torch.float32, torch.int8, torch.uint8


def up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def table(format_id: str, n: int, k: int) -> tuple[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """ComfyUI's name of the format, and the tensors beside the layer's name, as its loader reads them."""
    if format_id.startswith("comfy-fp8"):
        kind = E4M3 if format_id.endswith("e4m3fn") else E5M2
        return str(kind)[6:], {"weight": (kind, (n, k)), "weight_scale": (F32, ())}
    if format_id == "comfy-nvfp4":
        rows, columns = up(n, 16), up(k, 16)
        scales = E4M3, (up(rows, 128), up(columns // 16, 4))
        return "nvfp4", {"weight": (U8, (rows, columns // 2)), "weight_scale": scales, "weight_scale_2": (F32, ())}
    if format_id == "comfy-mxfp8":
        rows, columns = up(n, 32), up(k, 32)
        scales = E8M0, (up(rows, 128), up(columns // 32, 4))
        return "mxfp8", {"weight": (E4M3, (rows, columns)), "weight_scale": scales}
    if format_id.startswith("comfy-int8"):
        return "int8_tensorwise", {"weight": (I8, (n, k)), "weight_scale": (F32, (n, 1))}
    if format_id == "comfy-w4a4-convrot":
        return "convrot_w4a4", {"weight": (I8, (n, k // 2)), "weight_scale": (F32, (n,))}
    scales = {"weight_s_rel": (E4M3, (n, k // 16)), "weight_s_channel": (F32, (n,)), "weight_codebook": (F32, (16,))}
    return "asym_w4a8_int8", {"weight": (I8, (n, k // 2)), **scales}


SAID: dict[str, dict[str, Any]] = {
    "comfy-int8-convrot": {"convrot": True, "convrot_groupsize": 256},
    "comfy-w4a4-convrot": {"convrot_groupsize": 256},
    "comfy-w4a8": {"group_size": 16, "convrot_groupsize": 256},
}
FORMATS = list(WRITERS["comfy"].formats)
ROTATED = tuple(SAID)


def weight(format_id: str, dtype: torch.dtype) -> Tensor:
    """Odd where the format allows it."""
    shape = (40, 256) if format_id in ROTATED else (41, 84)
    return (torch.randn(shape, generator=torch.Generator().manual_seed(1)) / 30).to(dtype)


def raw(t: Tensor) -> Tensor:
    return t.flatten().view(torch.uint8)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("layout", ["comfy", "comfy-metadata"])
@pytest.mark.parametrize("format_id", FORMATS)
def test_names_dtypes_shapes_and_values(tmp_path: Path, format_id: str, layout: str, dtype: torch.dtype) -> None:
    w = weight(format_id, dtype)
    q = get_quantizer(format_id).quantize(w, QuantSpec(format_id))
    save_weights(tmp_path / "a.safetensors", {f"{X}.weight": q, f"{X}.bias": torch.ones(3)}, WRITERS[layout])
    found, metadata = read(tmp_path / "a.safetensors")
    algo, expected = table(format_id, *w.shape)
    conf = {"format": algo, **SAID.get(format_id, {})}
    if format_id in (
        "comfy-nvfp4",
        "comfy-mxfp8",
    ):  # stored padded: the file says what it was; ComfyUI passes over it
        conf["orig_shape"] = list(w.shape)
    if layout == "comfy":
        assert json.loads(bytes(found.pop(f"{X}.comfy_quant").tolist())) == conf
        assert "_quantization_metadata" not in metadata
    else:
        assert json.loads(metadata["_quantization_metadata"]) == {"format_version": "1.0", "layers": {X: conf}}
    assert torch.equal(found.pop(f"{X}.bias"), torch.ones(3))
    assert {n: (t.dtype, tuple(t.shape)) for n, t in found.items()} == {f"{X}.{n}": e for n, e in expected.items()}
    native: Any = get_quantizer(format_id)
    options = native.native.options | ({"convrot_groupsize": 256} if native.native.rotated else {})
    theirs = kitchen.QuantizedTensor.from_float(w, native.native.layout, **options).state_dict(f"{X}.weight")
    assert theirs.keys() == found.keys()
    for name, t in theirs.items():
        assert torch.equal(raw(found[name]), raw(t)), name


@pytest.mark.parametrize(
    "format_id", ["comfy-fp8-e4m3fn", "comfy-fp8-e5m2", "comfy-nvfp4", "comfy-mxfp8", "comfy-int8"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_large_weights_are_quantized_in_slabs_to_the_same_bits(format_id: str, dtype: torch.dtype) -> None:
    """Two slabs, of which the second is no whole number of tiles."""
    w = (torch.randn(2101, 528, generator=torch.Generator().manual_seed(2)) / 30).to(dtype)
    w[2000, 3] = 4.0  # the scale of all comes from the second slab
    quantizer: Any = get_quantizer(format_id)
    made = quantizer.quantize(w, QuantSpec(format_id))
    qdata, params = getattr(kitchen, quantizer.native.layout).quantize(w, **quantizer.native.options)
    assert torch.equal(raw(made.tensors["qdata"]), raw(qdata))
    assert params.orig_shape == made.orig_shape
    for name, t in made.tensors.items():
        theirs = qdata if name == "qdata" else getattr(params, name)
        assert t.shape == theirs.shape
        assert torch.equal(raw(t), raw(theirs)), name


def test_scaled_fp8_holds_what_older_hosts_read(tmp_path: Path) -> None:
    w = weight("comfy-fp8-e4m3fn", torch.bfloat16)
    q = get_quantizer("comfy-fp8-e4m3fn").quantize(w, QuantSpec("comfy-fp8-e4m3fn"))
    save_weights(tmp_path / "a.safetensors", {f"{X}.weight": q}, WRITERS["scaled-fp8"])
    found, metadata = read(tmp_path / "a.safetensors")
    described = {n: (t.dtype, tuple(t.shape)) for n, t in found.items()}
    assert described == {
        "scaled_fp8": (E4M3, (2,)),  # two elements: products at full precision
        f"{X}.weight": (E4M3, (41, 84)),
        f"{X}.scale_weight": (F32, ()),
    }
    assert metadata == {"format": "pt"}
    restored = found[f"{X}.weight"].float() * found[f"{X}.scale_weight"]
    assert (restored - w.float()).norm() < 0.04 * w.float().norm()
    theirs = kitchen.QuantizedTensor.from_float(w, "TensorCoreFP8Layout", dtype=E4M3).dequantize()
    assert torch.equal(restored.bfloat16(), theirs)
