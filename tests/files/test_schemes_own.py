"""The pack's own files and GGUF: the weights that the other readers give, found by the header alone."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.files.checkpoint import read_gguf
from quantwire.quantizers.files.model_file import open_model
from quantwire.quantizers.files.quantized_file import read_quantized, write_quantized
from quantwire.quantizers.files.schemes.scan import Scan, scan
from quantwire.quantizers.registry import availability, get_quantizer
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedWeight
from safetensors import safe_open
from safetensors.torch import save_file
from small_scans import codes, same_bytes, same_weight, weight_of


def weight_in(format_id: str) -> QuantizedWeight:
    if not availability(format_id).works:
        pytest.skip(f"{format_id}: {availability(format_id).reason}")
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    return get_quantizer(format_id).quantize(w, QuantSpec(format_id))


def written(path: Path, format_id: str) -> Scan:
    write_quantized(path, [("m.a.weight", weight_in(format_id)), ("m.a.bias", torch.ones(64))], {"spec": "here"})
    return scan(open_model(path))


@pytest.mark.parametrize("format_id", ["bnb-nf4", "comfy-nvfp4", "quanto-qint4", "gguf-q4-k", "layerwise-fp8-e5m2"])
def test_own_layout(tmp_path: Path, format_id: str) -> None:
    path = tmp_path / "own.safetensors"
    found = written(path, format_id)
    assert found.faults == ()
    assert list(found.layers) == ["m.a.weight"]
    assert found.plain == ("m.a.bias",)
    layer = found.layers["m.a.weight"]
    assert (layer.scheme, layer.format_id, layer.shape, layer.dtype) == ("quantwire", format_id, (64, 256), "BF16")
    other = read_quantized(path).tensors["m.a.weight"]
    assert isinstance(other, QuantizedWeight)
    assert same_weight(weight_of(found, "m.a.weight"), other)


def changed(path: Path, **metadata: str | None) -> Scan:
    """The file with other entries in its metadata; None takes one away."""
    with safe_open(path, "pt") as file:  # pyright: ignore
        strings, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    strings = {k: v for k, v in {**strings, **metadata}.items() if v is not None}
    save_file(tensors, path, strings)
    return scan(open_model(path))


def test_own_faults(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    written(path, "bnb-nf4")
    with safe_open(path, "pt") as file:  # pyright: ignore
        layer = json.loads(file.metadata()["m.a.weight"])
    other = {"training": json.dumps({"steps": 3}), "licence": "{not JSON", "note": "text"}
    assert changed(path, **other).faults == ()
    unknown = changed(path, **{"m.a.weight": json.dumps({**layer, "format_id": "bnb-nf3"})})
    with pytest.raises(FileError, match="does not know the format 'bnb-nf3'"):
        unknown.read("m.a.weight")
    damage: dict[str, tuple[object, str]] = {
        "part": ({**layer, "tensors": ["qdata", "absmax", "gone"]}, "tensor-missing"),
        "no qdata": ({**layer, "tensors": ["absmax"]}, "tensor-missing"),
        "shape": ({**layer, "orig_shape": [64, "x"]}, "metadata-json"),
        "dtype": ({**layer, "orig_dtype": "F13"}, "metadata-json"),
        "meta": ({**layer, "meta": 3}, "metadata-json"),
    }
    for what, (value, code) in damage.items():
        found = changed(path, **{"m.a.weight": json.dumps(value)})
        assert codes(found) == [code], what
        assert found.layers["m.a.weight"].format_id == ""
    assert codes(changed(path, quantwire=json.dumps({"version": 99}))) == ["version"]
    assert changed(path, quantwire=None).layers == {}


def gguf_file(path: Path, kinds: tuple[str, ...]) -> None:
    writer = gguf.GGUFWriter(path, "flux")
    rng = np.random.default_rng(0)
    for kind in kinds:
        quant_type = gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(rng.standard_normal((8, 256), dtype=np.float32), quant_type)
        writer.add_tensor(f"{kind.lower()}.weight", data, raw_dtype=quant_type)
    # Rows of 48 values are no whole blocks: stored in rows of 32, with the shape beside it.
    data = gguf.quants.quantize(rng.standard_normal((12, 32), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("odd.weight", data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_array("comfy.gguf.orig_shape.odd.weight", (8, 48))
    writer.add_tensor("conv.weight", rng.standard_normal((2, 12), dtype=np.float32).astype(np.float16))
    writer.add_array("comfy.gguf.orig_shape.conv.weight", (2, 3, 2, 2, 1))
    writer.add_tensor("a.bias", np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf(tmp_path: Path) -> None:
    kinds = ("Q8_0", "Q4_0", "Q5_1", "TQ2_0", "MXFP4")
    gguf_file(tmp_path / "m.gguf", kinds)
    found, other = scan(open_model(tmp_path / "m.gguf")), read_gguf(tmp_path / "m.gguf")
    assert found.faults == ()
    assert {layer.type for layer in found.layers.values()} == {*kinds}
    assert set(found.plain) == {"conv.weight", "a.bias"}
    assert set(found.file.entries) == set(other.tensors)
    for name, value in other.tensors.items():
        mine = found.read(name)
        if isinstance(value, QuantizedWeight):
            assert isinstance(mine, QuantizedWeight)
            assert same_weight(mine, value), name
            assert found.shapes[name] == value.orig_shape
        else:
            assert isinstance(mine, torch.Tensor)
            assert same_bytes(mine, value), name
            assert found.shapes[name] == tuple(value.shape)
    assert found.shapes["odd.weight"] == (8, 48)
    assert found.layers["q4_0.weight"].options == {"block_size": 32, "rows": 8}


def test_gguf_shape_that_does_not_fit(tmp_path: Path) -> None:
    gguf_file(tmp_path / "m.gguf", ("Q8_0",))
    raw = (tmp_path / "m.gguf").read_bytes()
    at = raw.index(b"comfy.gguf.orig_shape.odd.weight") + 32 + 4 + 4 + 8
    (tmp_path / "m.gguf").write_bytes(raw[:at] + b"\x09" + raw[at + 1 :])
    with pytest.raises(FileError, match="does not go with it"):
        open_model(tmp_path / "m.gguf")
