"""Converting files that are quantized already: their values, row by row, and layers that are copied as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.files.checkpoint import read_gguf
from quantwire.quantizers.files.convert_plan import Request
from quantwire.quantizers.files.converting import convert, describe
from quantwire.quantizers.files.layer_rows import LayerRows
from quantwire.quantizers.files.layouts.target import Piece, Target
from quantwire.quantizers.files.model_file import open_model
from quantwire.quantizers.files.model_saving import ModelTensors, save_model
from quantwire.quantizers.files.schemes.scan import scan
from quantwire.quantizers.files.sources import Assembled, open_source
from quantwire.quantizers.files.stream import TensorFile
from quantwire.quantizers.registry import availability, get_quantizer, require
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedWeight
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

WIDTH = 256
MLP = "double_blocks.0.img_mlp.0.weight"
SCHEMES = (
    *("bnb-nf4", "bnb;bits=4;bits4-quant-type=fp4;bits4-use-double-quant=true", "bnb-int8", "quanto-qint8"),
    *("quanto-qint4", "sdnq-uint4", "torchao-int8wo", "torchao-float8wo", "comfy-fp8-e4m3fn", "comfy-int8-convrot"),
    *("comfy-nvfp4", "comfy-mxfp8", "layerwise-fp8-e4m3fn", "nncf-int4-asym", "gguf-q4-k"),
)
SLOW = ("quanto", "sdnq", "nncf")  # their libraries take seconds to import


@pytest.fixture(autouse=True)
def in_one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def no_bar(total: int) -> Any:
    class Bar:
        def update(self, n: int, /) -> None:
            pass

    return nullcontext(Bar())


def run(source: Path, target: Path, kind: str, **options: Any) -> Any:
    return convert(Request(source, target, kind, threads=1, **options), no_bar)


def flux(width: int = WIDTH) -> dict[str, Tensor]:
    """FLUX in ComfyUI's layout, as far as it is recognised by."""
    shapes = {"img_in.weight": (width, 64), "img_in.bias": (width,), "txt_in.weight": (width, 128)}
    shapes |= {"double_blocks.0.img_attn.qkv.weight": (3 * width, width), MLP: (2 * width, width)}
    shapes |= {"double_blocks.0.img_attn.norm.query_norm.scale": (128,)}
    shapes |= {"single_blocks.0.linear1.weight": (3 * width, width), "final_layer.linear.weight": (64, width)}
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(*s, generator=generator).to(torch.bfloat16) for n, s in shapes.items()}


def quantized(uri: str, w: Tensor) -> QuantizedWeight:
    spec = QuantSpec.from_uri(uri)
    if not availability(spec.format_id).works:
        pytest.skip(availability(spec.format_id).reason)
    return require(spec.format_id).quantize(w, spec)


def saved(path: Path, uri: str, layout: str = "auto") -> dict[str, QuantizedWeight]:
    """A FLUX file with three layers in a format, as SaveQuantized writes it."""
    layers = ("double_blocks.0.img_attn.qkv.weight", MLP, "single_blocks.0.linear1.weight")
    values = {n: quantized(uri, t) if n in layers else t for n, t in flux().items()}
    save_model(path, ModelTensors(values, "test", "flux"), layout)
    return {n: v for n, v in values.items() if isinstance(v, QuantizedWeight)}


def restored(weight: QuantizedWeight) -> Tensor:
    return get_quantizer(weight.format_id).dequantize(weight, torch.float32)


@pytest.mark.parametrize(
    "uri",
    [pytest.param(u, marks=[pytest.mark.slow] if u.startswith(("quanto", "sdnq", "nncf")) else []) for u in SCHEMES],
)
def test_rows_are_those_of_the_dequantized_weight(tmp_path: Path, uri: str) -> None:
    weights = saved(tmp_path / "m.safetensors", uri, "quantwire" if uri.startswith("gguf") else "auto")
    source = open_source(tmp_path / "m.safetensors")
    assert {n: (m.shape, m.dtype) for n, m in source.metas.items()} == {
        n: (tuple(t.shape), t.dtype) for n, t in flux().items()
    }
    assert set(source.kinds) == set(weights)
    for name, weight in weights.items():
        whole = restored(weight)
        n, k = weight.orig_shape
        # All rows, the second half before the first, and rows in pairs: what layouts do.
        for piece in (Piece(name), Piece(name, swap=True), Piece(name, 0, n, heads=2), Piece(name, 10, 42)):
            rows = piece.rows(n)
            assembled = Assembled(Target("t", (rows, k), torch.float32, (piece,)), source.open)
            got = torch.cat([p.float() for s in range(0, rows, 100) for p in assembled.values(s, min(s + 100, rows))])
            expected = Assembled(Target("t", (rows, k), torch.float32, (piece,)), lambda _, w=whole: _stored(w))
            # Libraries compute some formats in bfloat16; rows come back in float32.
            assert torch.allclose(got, expected.values(0, rows)[0], rtol=0, atol=float(whole.abs().max()) / 2**7)


def _stored(w: Tensor) -> Any:
    from quantwire.quantizers.files.sources import plain

    return plain(w)


def test_a_format_without_rows_is_dequantized_once() -> None:
    weight = quantized("bnb-nf4", torch.randn(6, 96))  # blocks of 64 cross its rows
    assert get_quantizer("bnb-nf4").form(weight) is None
    rows = LayerRows(weight)
    assert torch.equal(rows.values(torch.tensor([5, 0, 3])), restored(weight)[[5, 0, 3]])
    assert rows.values(torch.tensor([], dtype=torch.int64)).shape == (0, 96)


@pytest.mark.parametrize("kind", ["BF16", "comfy-int8-convrot", "comfy-nvfp4", "bnb-nf4", "Q4_K_M"])
@pytest.mark.parametrize("uri", ["bnb-nf4", "comfy-fp8-e4m3fn"])
def test_a_quantized_file_becomes_any_other(tmp_path: Path, uri: str, kind: str) -> None:
    weights = saved(tmp_path / "m.safetensors", uri)
    target = tmp_path / ("o.gguf" if kind.startswith("Q") else "o.safetensors")
    report = run(tmp_path / "m.safetensors", target, kind)
    whole = restored(weights[MLP])
    if kind == "BF16":
        made = load_file(target)
        assert torch.equal(made[MLP], whole.to(torch.bfloat16))
        assert any("3 tensors are dequantized" in note for note in report.notes)
        return
    if kind.startswith("Q"):
        made = read_gguf(target).tensors[MLP]
        assert any("quantized a second time (from" in w and uri in w for w in report.warnings)
    else:
        made = scan(open_model(target)).read(MLP)
    assert isinstance(made, QuantizedWeight)
    if kind == uri:
        assert not any("second time" in w for w in report.warnings)
        assert [e.action for e in report.entries if e.name in weights] == ["copy"] * 3
        assert all(torch.equal(made.tensors[n], t) for n, t in weights[MLP].tensors.items())
        return
    assert any("second time" in w for w in report.warnings)
    error = (restored(made) - whole).square().sum() / whole.square().sum()
    assert 0 < float(error) < 0.03


def test_blocks_come_back_as_rotated_int8(tmp_path: Path) -> None:
    save_file(flux(), tmp_path / "m.safetensors")
    run(tmp_path / "m.safetensors", tmp_path / "m.gguf", "Q8_0")
    run(tmp_path / "m.gguf", tmp_path / "o.safetensors", "comfy-int8-convrot")
    made: Any = scan(open_model(tmp_path / "o.safetensors")).read(MLP)
    blocks: Any = read_gguf(tmp_path / "m.gguf").tensors[MLP]
    whole = restored(blocks).to(torch.bfloat16)
    again = require("comfy-int8-convrot").quantize(whole, QuantSpec("comfy-int8-convrot"))
    assert all(torch.equal(made.tensors[n], t) for n, t in again.tensors.items())


def test_a_gguf_file_in_several_parts_is_one_source(tmp_path: Path) -> None:
    """Parts as the gguf package cuts them; any of them names the model."""
    save_file(flux(), tmp_path / "m.safetensors")
    run(tmp_path / "m.safetensors", tmp_path / "whole.gguf", "Q8_0")
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "flux", split_max_tensors=3)
    for t in gguf.GGUFReader(tmp_path / "whole.gguf").tensors:
        writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) > 2
    assert [f["file"] for f in open_source(parts[-1]).identity()] == [p.name for p in parts]
    run(tmp_path / "whole.gguf", tmp_path / "a.safetensors", "BF16")
    run(parts[1], tmp_path / "b.safetensors", "BF16")
    a, b = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert set(a) == set(b)
    assert all(torch.equal(t, b[n]) for n, t in a.items())
    run(parts[0], tmp_path / "joined.gguf", "Q8_0")
    joined, whole = read_gguf(tmp_path / "joined.gguf"), read_gguf(tmp_path / "whole.gguf")
    assert "split.count" not in joined.metadata
    one, other = joined.tensors[MLP], whole.tensors[MLP]
    assert isinstance(one, QuantizedWeight)
    assert isinstance(other, QuantizedWeight)
    assert torch.equal(one.tensors["qdata"], other.tensors["qdata"])


def test_scaled_fp8_is_copied_into_comfy_quant(tmp_path: Path) -> None:
    weights = saved(tmp_path / "m.safetensors", "comfy-fp8-e4m3fn", "scaled-fp8")
    run(tmp_path / "m.safetensors", tmp_path / "o.safetensors", "comfy-fp8-e4m3fn")
    made = load_file(tmp_path / "o.safetensors")
    for name, weight in weights.items():
        assert torch.equal(made[name].view(torch.uint8), weight.tensors["qdata"].view(torch.uint8))
        assert torch.equal(made[name.replace("weight", "weight_scale")], weight.tensors["scale"].reshape(()))
        assert name.replace("weight", "comfy_quant") in made


@pytest.mark.slow
def test_nothing_of_the_old_layout_is_left_in_the_metadata(tmp_path: Path) -> None:
    for i, uri in enumerate(("torchao-int8wo", "sdnq-uint4", "nncf-int8-asym", "quanto-qint4")):
        saved(tmp_path / f"{i}.safetensors", uri)
        run(tmp_path / f"{i}.safetensors", tmp_path / f"{i}-bf16.safetensors", "BF16")
        with safe_open(tmp_path / f"{i}-bf16.safetensors", framework="pt") as file:
            assert set(file.metadata()) == {"format", "quantwire_conversion"}
        assert not scan(open_model(tmp_path / f"{i}-bf16.safetensors")).layers


def test_what_cannot_be_read_is_refused_with_why(tmp_path: Path) -> None:
    tensors = flux()
    del tensors[MLP]
    base = MLP.removesuffix("weight")
    gptq = {f"{base}qweight": torch.zeros(32, 2 * WIDTH, dtype=torch.int32), f"{base}scales": torch.ones(2, 2 * WIDTH)}
    gptq |= {f"{base}qzeros": torch.zeros(2, WIDTH // 4, dtype=torch.int32)}
    gptq |= {f"{base}g_idx": torch.zeros(WIDTH, dtype=torch.int32)}
    save_file(tensors | gptq, tmp_path / "gptq.safetensors")
    with pytest.raises(FileError, match=r"gptq\.safetensors: .*GPTQ"):
        open_source(tmp_path / "gptq.safetensors")


def test_a_damaged_layer_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "m.safetensors", "bnb-nf4")
    tensors = load_file(tmp_path / "m.safetensors")
    del tensors[f"{MLP}.absmax"]
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(FileError, match=r"absmax.*\n.*quantwire doctor m\.safetensors"):
        describe(Request(tmp_path / "m.safetensors", tmp_path / "o.safetensors", "BF16"))


@pytest.mark.parametrize("uri", ["bnb-nf4", "comfy-fp8-e4m3fn", "gguf-q8-0"])
def test_load_and_quantize_goes_on_refusing(tmp_path: Path, uri: str) -> None:
    saved(tmp_path / "m.safetensors", uri, "quantwire" if uri.startswith("gguf") else "auto")
    with pytest.raises(FileError, match="already quantized"):
        TensorFile(tmp_path / "m.safetensors")


def test_a_source_is_another_one_when_its_file_is(tmp_path: Path) -> None:
    saved(tmp_path / "m.safetensors", "bnb-nf4")
    source = open_source(tmp_path / "m.safetensors")
    before = source.identity()
    assert before == open_source(tmp_path / "m.safetensors").identity()
    save_file({n: t.clone() for n, t in load_file(tmp_path / "m.safetensors").items()}, tmp_path / "m.safetensors")
    assert before != open_source(tmp_path / "m.safetensors").identity()
    with pytest.raises(FileError, match="changed"):
        source.check_unchanged()
