"""Quantized weights in the layouts of libraries: the same numbers by our schemes and by their own loaders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.quantizers.errors import FileError, SpecError
from quantwire.quantizers.files.model_file import open_model
from quantwire.quantizers.files.model_saving import ModelTensors, save_model
from quantwire.quantizers.files.schemes.scan import scan
from quantwire.quantizers.files.writers import WRITERS, writer_for
from quantwire.quantizers.registry import availability, get_quantizer, require
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedWeight
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

N, K = 48, 256
URIS = (
    *("bnb;bits=4;bits4-quant-type=nf4", "bnb;bits=4;bits4-quant-type=fp4;bits4-use-double-quant=true"),
    *("bnb;bits=4;bits4-quant-type=nf4;bits4-block-size=128", "bnb;bits=8"),
    *("quanto-qint8", "quanto-qint4", "quanto-qint2", "quanto-qfloat8-e4m3fn", "quanto-qfloat8-e5m2"),
    *("sdnq-int8", "sdnq-uint4", "sdnq;type=uint4;use-svd=true;svd-rank=4", "sdnq-float8-e4m3fn"),
    *("torchao-int8wo", "torchao-int8dyn", "torchao-float8wo", "torchao-int4wo"),
    *("layerwise-fp8-e4m3fn", "nncf-int8-asym", "gguf-q4-k"),
)
# Their libraries take seconds to import.
SLOW = ("quanto", "sdnq", "nncf")


def quantized(uri: str, n: int = N, k: int = K, seed: int = 0) -> QuantizedWeight:
    spec = QuantSpec.from_uri(uri)
    if not availability(spec.format_id).works:
        pytest.skip(availability(spec.format_id).reason)
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    return require(spec.format_id).quantize(w, spec)


def model_of(weights: dict[str, QuantizedWeight]) -> ModelTensors:
    plain = {"blocks.0.norm.weight": torch.ones(K), "blocks.0.q.bias": torch.arange(N, dtype=torch.bfloat16)}
    kept = {"head.weight": torch.randn(8, K, generator=torch.Generator().manual_seed(9))}
    return ModelTensors({**weights, **plain, **kept}, "test")


def dequantized(weight: QuantizedWeight) -> Tensor:
    return get_quantizer(weight.format_id).dequantize(weight, torch.float32)


@pytest.fixture(autouse=True)
def in_one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("uri", [pytest.param(u, marks=[pytest.mark.slow] if u.startswith(SLOW) else []) for u in URIS])
def test_what_is_written_is_read_as_the_same_weight(tmp_path: Path, uri: str) -> None:
    weights = {"blocks.0.q.weight": quantized(uri), "blocks.1.q.weight": quantized(uri, seed=1)}
    model, layout = model_of(weights), writer_for(next(iter(weights.values())).format_id).id
    report = save_model(tmp_path / "m.safetensors", model, layout)
    found = scan(open_model(tmp_path / "m.safetensors"))
    assert not found.faults
    assert set(found.layers) == set(weights)
    for name, weight in weights.items():
        read: Any = found.read(name)
        assert (read.format_id, read.orig_shape) == (weight.format_id, weight.orig_shape)
        assert torch.equal(dequantized(read), dequantized(weight))
    for name, tensor in model.tensors.items():
        if isinstance(tensor, Tensor):
            assert torch.equal(found.read(name), tensor)  # type: ignore[arg-type]
    assert {e.action for e in report.entries} == {"quantize", "keep"}


def test_every_format_has_a_layout() -> None:
    from quantwire.quantizers.registry import format_ids

    chosen = {f: writer_for(f).id for f in format_ids(writable=False)}
    assert {chosen[f] for f in chosen if f.startswith("bnb-")} == {"bnb"}
    assert chosen["torchao-int4wo"] == "quantwire"
    assert chosen["layerwise-fp8-e5m2"] == "plain-fp8"
    assert all(WRITERS["quantwire"].refuse(f, {}) is None for f in chosen)


@pytest.mark.parametrize("uri", ["bnb;bits=4;bits4-quant-type=nf4;bits4-use-double-quant=true", "bnb;bits=8"])
def test_bitsandbytes_reads_what_is_written(tmp_path: Path, uri: str) -> None:
    """Its own save and load of layers; diffusers loads such files on a GPU only, through the same calls."""
    bnb = pytest.importorskip("bitsandbytes")
    weight, bias = quantized(uri), torch.zeros(N, dtype=torch.bfloat16)
    theirs = require(weight.format_id).to_native(weight, bias).state_dict(prefix="blocks.0.q.")
    save_model(tmp_path / "m.safetensors", ModelTensors({"blocks.0.q.weight": weight, "blocks.0.q.bias": bias}, "test"))
    ours = load_file(tmp_path / "m.safetensors")
    state = [n for n in theirs if "quant_state.bitsandbytes" in n]
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in set(ours) - set(state))
    for name in state:
        unpack = bnb.utils.unpack_tensor_to_dict
        assert unpack(ours[name]) == unpack(theirs[name])
    if state:
        stats = {n: t for n, t in ours.items() if n.startswith("blocks.0.q.weight.")}
        loaded = bnb.nn.Params4bit.from_prequantized(ours["blocks.0.q.weight"], stats, device="cpu")
        loaded.quant_state.shape = torch.Size((1, N * K))
        restored = bnb.functional.dequantize_4bit(loaded.data, loaded.quant_state).reshape(N, K)
    else:
        layer = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False).to("cpu")  # quantizes its first values
        layer.load_state_dict({n.removeprefix("blocks.0.q."): t for n, t in ours.items()})
        restored = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    assert torch.equal(restored.float(), get_quantizer(weight.format_id).dequantize(weight, restored.dtype).float())


@pytest.mark.slow
@pytest.mark.parametrize("uri", ["quanto-qint8", "quanto-qint4", "quanto-qint2", "quanto-qfloat8-e4m3fn"])
def test_quanto_requantizes_a_model_from_what_is_written(tmp_path: Path, uri: str) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    weight = quantized(uri)
    save_model(tmp_path / "m.safetensors", ModelTensors({"0.weight": weight, "0.bias": torch.zeros(N)}, "test"))
    writer: Any = WRITERS["quanto"]
    qmap = writer.beside({"0.weight": writer.note("0.weight", weight)})["quanto_qmap.json"]
    model = nn.Sequential(nn.Linear(K, N, dtype=torch.bfloat16))
    quanto.requantize(model, load_file(tmp_path / "m.safetensors"), qmap)
    read: Any = model[0].weight
    if "TinyGemm" in type(read).__name__:  # 4 bits in bfloat16 are packed for torch's int4 product, and back again
        read = read.weight_qbits_tensor()
    assert torch.equal(read._scale, weight.tensors["scale"])
    if "shift" in weight.tensors:  # dequantizing them would compile C++
        assert torch.equal(read._data._data, weight.tensors["qdata"])
        assert torch.equal(read._shift, weight.tensors["shift"])
    else:
        assert torch.equal(read.dequantize().float(), dequantized(weight))


@pytest.mark.parametrize("uri", ["torchao-int8wo", "torchao-int8dyn", "torchao-float8wo"])
def test_torchao_unflattens_what_is_written(tmp_path: Path, uri: str) -> None:
    weight = quantized(uri)
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    from torchao.prototype.safetensors.safetensors_utils import is_metadata_torchao

    save_model(tmp_path / "m.safetensors", model_of({"blocks.0.q.weight": weight}))
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert is_metadata_torchao(metadata)
    tensors, left = support.unflatten_tensor_state_dict(load_file(tmp_path / "m.safetensors"), metadata)
    assert not left
    assert set(tensors) == {"blocks.0.q.weight", "blocks.0.norm.weight", "blocks.0.q.bias", "head.weight"}
    read = tensors["blocks.0.q.weight"]
    assert torch.equal(read.qdata.float(), weight.tensors["qdata"].float())
    assert torch.equal(
        read.dequantize().float(), get_quantizer(weight.format_id).dequantize(weight, read.dtype).float()
    )


@pytest.mark.slow
def test_groups_that_quanto_cannot_be_told_are_refused(tmp_path: Path) -> None:
    weight = quantized("quanto;weights=qint4;group-size=32")
    assert "group-size 32" in str(WRITERS["quanto"].refuse("quanto-qint4", {"group-size": 32}))
    assert WRITERS["quanto"].refuse("quanto-qint4", {}) is None
    with pytest.raises(SpecError, match=r"^'blocks\.0\.q\.weight': groups of 32, and quanto's loaders take 128"):
        save_model(tmp_path / "m.safetensors", model_of({"blocks.0.q.weight": weight}))
    assert list(tmp_path.iterdir()) == []
    save_model(tmp_path / "m.safetensors", model_of({"blocks.0.q.weight": weight}), "quantwire")


def test_a_model_of_several_libraries_goes_into_the_own_layout(tmp_path: Path) -> None:
    weights = {"a.weight": quantized("bnb;bits=8"), "b.weight": quantized("quanto-qint8")}
    report = save_model(tmp_path / "m.safetensors", model_of(weights))
    found = scan(open_model(tmp_path / "m.safetensors"))
    assert {name: layer.format_id for name, layer in found.layers.items()} == {
        "a.weight": "bnb-int8", "b.weight": "quanto-qint8",
    }  # fmt: skip
    assert "quantwire" in report.notes[0]
    with pytest.raises(SpecError, match=r"The layout bnb cannot hold quanto-qint8\.\nLayouts that can: quanto, quantw"):
        save_model(tmp_path / "n.safetensors", model_of(weights), "bnb")


def test_nothing_is_overwritten_unless_told(tmp_path: Path) -> None:
    model = model_of({"a.weight": quantized("layerwise-fp8-e4m3fn")})
    path = tmp_path / "m.safetensors"
    path.write_text("mine")
    with pytest.raises(FileError, match=r"is there already\.\nSet overwrite"):
        save_model(path, model)
    assert path.read_text() == "mine"
    with pytest.raises(FileError, match=r"a file in the layout plain-fp8 ends in \.safetensors"):
        save_model(tmp_path / "m.gguf", model)
    save_model(path, model, overwrite=True)
    assert set(scan(open_model(path)).layers) == {"a.weight"}
