"""Whatever is wrong with a layer: looking never raises, and what is said to load does, or is refused with a reason."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.files.model_file import Entry, ModelFile, open_model
from quantwire.quantizers.files.quantized_file import write_quantized
from quantwire.quantizers.files.safetensors_header import DTYPE_BITS
from quantwire.quantizers.files.schemes.scan import Scan, scan
from quantwire.quantizers.registry import availability, get_quantizer
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedWeight
from safetensors.torch import save_file
from small_scans import json_bytes
from torch import Tensor

JUNK: tuple[Any, ...] = (None, -1, 0, 0.5, 1e30, 2**40, "x", [], [1], {}, True, [[["nvfp4"]]])
KITCHEN = {
    "nvfp4": ("TensorCoreNVFP4Layout", {}),
    "mxfp8": ("TensorCoreMXFP8Layout", {}),
    "float8_e4m3fn": ("TensorCoreFP8Layout", {}),
    "int8_tensorwise": ("TensorWiseINT8Layout", {"per_channel": True, "convrot": True}),
    "convrot_w4a4": ("TensorCoreConvRotW4A4Layout", {}),
    "asym_w4a8_int8": ("AsymW4A8Int8Layout", {}),
}


def _bnb() -> dict[str, Tensor]:
    import bitsandbytes.functional as F

    tensors: dict[str, Tensor] = {}
    for nested in (False, True):
        packed, state = F.quantize_4bit(torch.randn(32, 64), quant_type="nf4", compress_statistics=nested)
        name = f"nf4_{nested}.weight"
        tensors |= {name: packed, **{f"{name}.{part}": t for part, t in state.as_dict(packed=True).items()}}
    qdata, scale, _ = F.int8_vectorwise_quant(torch.randn(32, 64).half())
    return {**tensors, "i.weight": qdata, "i.SCB": scale, "i.weight_format": torch.tensor(0, dtype=torch.uint8)}


def _kitchen() -> dict[str, Tensor]:
    import comfy_kitchen.tensor as kitchen

    tensors: dict[str, Tensor] = {}
    for kind, (layout, arguments) in KITCHEN.items():
        quantized: Any = kitchen.QuantizedTensor.from_float(torch.randn(32, 256).bfloat16(), layout, **arguments)
        conf = {"format": kind, "convrot_groupsize": 256, "group_size": 16}
        conf |= {"convrot": True} if kind == "int8_tensorwise" else {}
        tensors |= {**quantized.state_dict(f"{kind}.weight"), f"{kind}.comfy_quant": json_bytes(conf)}
        tensors[f"{kind}.bias"] = torch.zeros(32)
    fp8 = torch.randn(32, 64).to(torch.float8_e4m3fn)
    tensors |= {"scaled_fp8": torch.zeros(0), "old.weight": fp8, "old.scale_weight": torch.tensor(0.5)}
    return tensors | {"new.weight": fp8, "new.weight_scale": torch.rand(32, 1), "vae.plain.weight": fp8}


def _own(path: Path) -> None:
    weights = [
        (f"{f}.weight", get_quantizer(f).quantize(torch.randn(32, 256), QuantSpec(f))) for f in ("bnb-nf4", "gguf-q4-k")
    ]
    write_quantized(path, weights, {})


@pytest.fixture(scope="module", params=["bnb", "comfy", "quantwire"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    for format_id in ("bnb-nf4", "comfy-nvfp4"):
        if not availability(format_id).works:
            pytest.skip(f"{format_id}: {availability(format_id).reason}")
    path = tmp_path_factory.mktemp("whole") / "model.safetensors"
    if request.param == "quantwire":
        _own(path)
    else:
        save_file(
            {n: t.contiguous().clone() for n, t in (_bnb if request.param == "bnb" else _kitchen)().items()}, path
        )
    file = open_model(path)
    assert {fault.code for fault in scan(file).faults} <= {"comfy-quant-missing"}  # of the scales without one
    assert all(layer.format_id for layer in scan(file).layers.values())
    return file


def _with(file: ModelFile, **entries: Entry | None) -> ModelFile:
    changed = {name: entries.get(name, e) for name, e in file.entries.items()}
    return dataclasses.replace(file, entries={name: e for name, e in changed.items() if e is not None})


def _variants(e: Entry) -> Iterator[Entry | None]:
    """The tensor missing, in another dtype, in another shape, and shorter."""
    yield None
    for dtype, bits in DTYPE_BITS.items():
        if bits * e.numel == 8 * e.nbytes and dtype != e.dtype:
            yield dataclasses.replace(e, dtype=dtype)
    for shape in ((e.numel,), (1, e.numel), (e.numel, 1), (1, *e.shape), e.shape[::-1], (2, e.numel // 2)):
        if shape != e.shape and math.prod(shape) == e.numel:
            yield dataclasses.replace(e, shape=shape)
    if e.shape and e.shape[0]:
        shorter = (e.shape[0] - 1, *e.shape[1:])
        yield dataclasses.replace(e, shape=shorter, nbytes=e.nbytes // e.shape[0] * shorter[0])


def _check(found: Scan) -> None:
    """What is said to load does, in the shape that was said, and the rest is refused."""
    for name, layer in found.layers.items():
        assert set(layer.tensors.values()) <= set(found.file.entries), name
        if not layer.format_id:
            assert layer.why, name
            with pytest.raises(FileError):
                found.read(name)
            continue
        with contextlib.suppress(FileError):
            weight = found.read(name)
            assert isinstance(weight, QuantizedWeight)
            assert weight.orig_shape == layer.shape, name
            if layer.scheme == "quantwire":  # which leaves the sizes of a format's tensors to the format
                continue
            quantizer = get_quantizer(weight.format_id)
            assert quantizer.dequantize(weight, torch.float32).shape == layer.shape, name


def test_every_tensor_damaged(whole: ModelFile) -> None:
    tried = 0
    for name, e in whole.entries.items():
        for variant in _variants(e):
            _check(scan(_with(whole, **{name: variant})))
            tried += 1
    assert tried > 20


def _values(value: Any) -> Iterator[Any]:
    """The JSON object with one of its values, at any depth, missing or replaced."""
    if isinstance(value, dict):
        for key in value:
            yield {k: v for k, v in value.items() if k != key}
            yield from ({**value, key: junk} for junk in (*JUNK, *_values(value[key])))


def test_every_json_damaged(whole: ModelFile, tmp_path: Path) -> None:
    """In tensors of bytes and in the metadata; and texts that are no JSON at all."""
    tried = 0
    texts = ["", "{", "null", "[" * 3000, '{"a":' * 3000]
    for name, e in whole.entries.items():
        if not name.endswith("comfy_quant") and ".quant_state." not in name:
            continue
        for text in [*texts, *map(json.dumps, [*JUNK, *_values(whole.json(name))])]:
            path = tmp_path / f"{tried}.json"
            path.write_text(text)
            changed = dataclasses.replace(e, file=path, start=0, shape=(len(text),), nbytes=len(text))
            _check(scan(_with(whole, **{name: changed})))
            tried += 1
    for key, value in whole.metadata.items():
        for text in [*texts, *map(json.dumps, [*JUNK, *_values(json.loads(value))])]:
            _check(scan(dataclasses.replace(whole, metadata={**whole.metadata, key: text})))
            tried += 1
    assert tried > 20


@pytest.mark.parametrize("whole", ["comfy"], indirect=True)
def test_metadata_of_comfyui_damaged(whole: ModelFile) -> None:
    layers = {kind: {"format": kind} for kind in ("float8_e4m3fn", "nvfp4")}
    for value in [*JUNK, *_values({"format_version": "1.0", "layers": layers})]:
        _check(scan(dataclasses.replace(whole, metadata={"_quantization_metadata": json.dumps(value)})))


def test_several_at_once(whole: ModelFile) -> None:
    rng = random.Random(0)
    names = list(whole.entries)
    for _ in range(60):
        changes = {n: rng.choice(list(_variants(whole.entries[n]))) for n in rng.sample(names, 3)}
        _check(scan(_with(whole, **changes)))
