"""Written GGUF files: their bytes, what other readers make of them, and what a failure leaves behind."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from quantwire.quantizers.errors import FileError, SpecError, WeightError
from quantwire.quantizers.files.checkpoint import read_gguf
from quantwire.quantizers.files.gguf_writer import write_gguf
from quantwire.quantizers.registry import get_quantizer
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedWeight
from torch import Tensor

T = TypeVar("T")
QKV, MLP = "double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_mlp.0.weight"
FORMATS = pytest.mark.parametrize("format_id", ["gguf-q8-0", "gguf-q4-0"])


def whole_numbers(*shape: int, step: int) -> Tensor:
    """Values that every machine forms alike: multiples of 1/32 from -50/32 to 50/32."""
    numel = torch.Size(shape).numel()
    return ((torch.arange(numel) * step) % 101 - 50).reshape(shape) / 32


def flux(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    tensors = {
        QKV: whole_numbers(96, 64, step=37),
        MLP: whole_numbers(33, 32, step=29),
        "img_in.weight": whole_numbers(64, 16, step=17),
        "double_blocks.0.img_attn.qkv.bias": whole_numbers(96, step=7),
        "double_blocks.0.img_attn.norm.query_norm.scale": whole_numbers(8, step=3),
        "txt_in.weight": whole_numbers(64, 16, step=13),
        "final_layer.linear.weight": whole_numbers(16, 64, step=11),
    }
    return {name: t.to(dtype) for name, t in tensors.items()}


def only_file(folder: Path) -> str:
    (name,) = [p.name for p in folder.iterdir()]
    return name


# sha256 of the whole file. It may change only with the layout of the files, never with a version of a library.
GOLDEN = {
    "gguf-q8-0": "9a84637dba90c30ad3c5ef3df0612934155cd59ee28f64b0726fd1dd12fe1bdb",
    "gguf-q4-0": "998423b7217e2795830e3103608ea38436c704f31ec9ef17f0b6f70b6e657eeb",
}


@FORMATS
def test_golden_bytes(tmp_path: Path, format_id: str) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, flux(), QuantSpec(format_id))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == GOLDEN[format_id]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@FORMATS
def test_read_back(tmp_path: Path, format_id: str, dtype: torch.dtype) -> None:
    path, source, spec = tmp_path / "sub" / "a.gguf", flux(dtype), QuantSpec(format_id)
    report = write_gguf(path, source, spec)
    assert only_file(path.parent) == "a.gguf"
    read = read_gguf(path)
    assert read.metadata["general.architecture"] == "flux"
    assert read.metadata["quantwire.spec"] == spec.to_uri()
    assert list(read.tensors) == list(source)
    for name, tensor in source.items():
        got = read.tensors[name]
        if name in (QKV, MLP):
            assert isinstance(got, QuantizedWeight)
            expected = get_quantizer(format_id).quantize(tensor, spec)
            assert (got.format_id, got.orig_shape) == (format_id, tensor.shape)
            assert torch.equal(got.tensors["qdata"], expected.tensors["qdata"])
        else:
            assert isinstance(got, Tensor)
            assert got.dtype == (dtype if tensor.ndim == 2 else torch.float32)
            assert torch.equal(got, tensor.to(got.dtype))
    assert [e.name for e in report.entries] == list(source)
    assert report.nbytes_in == sum(t.nbytes for t in source.values())
    assert report.nbytes_out == sum(t.nbytes for t in read.tensors.values())
    assert report.seconds > 0
    assert str(report).startswith(f"a.gguf: 2 linear layers in {format_id}\n")


@FORMATS
def test_the_readers_of_gguf_and_diffusers(tmp_path: Path, format_id: str) -> None:
    gguf: Any = pytest.importorskip("gguf")
    loading: Any = pytest.importorskip("diffusers.models.model_loading_utils")
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    path = tmp_path / "a.gguf"
    write_gguf(path, flux(), QuantSpec(format_id))
    reader = gguf.GGUFReader(str(path))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "flux"
    assert fields["general.file_type"] == {"gguf-q8-0": 7, "gguf-q4-0": 2}[format_id]
    assert fields["general.quantization_version"] == gguf.GGML_QUANT_VERSION

    ours, theirs = read_gguf(path).tensors, loading.load_gguf_checkpoint(str(path))
    assert theirs.keys() == ours.keys() == {t.name for t in reader.tensors}
    for t in reader.tensors:
        value = ours[t.name]
        exact = torch.from_numpy(gguf.quants.dequantize(t.data.copy(), t.tensor_type))
        if isinstance(value, QuantizedWeight):
            restored = get_quantizer(format_id).dequantize(value, torch.float32)
            assert torch.equal(restored, exact)
            assert torch.equal(dequantize_gguf_tensor(theirs[t.name]), exact.half())  # it computes in float16
        else:
            assert torch.equal(value.float(), exact.reshape(value.shape))
            assert torch.equal(dequantize_gguf_tensor(theirs[t.name]).float(), exact.reshape(value.shape))


def test_include_and_exclude(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    tensors = flux() | {"img_in.weight": whole_numbers(64, 32, step=17)}
    write_gguf(path, tensors, QuantSpec("gguf-q8-0", include=("img_in",), exclude=("img_mlp",)))
    kinds = {name: isinstance(t, QuantizedWeight) for name, t in read_gguf(path).tensors.items()}
    assert [name for name, quantized in kinds.items() if quantized] == [QKV, "img_in.weight"]


def test_of_a_whole_checkpoint_only_the_diffusion_model_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    checkpoint = {f"model.diffusion_model.{name}": t for name, t in flux().items()}
    write_gguf(path, checkpoint | {"vae.encoder.conv_in.weight": torch.zeros(4, 3, 3, 3)}, QuantSpec("gguf-q8-0"))
    assert list(read_gguf(path).tensors) == list(flux())


# Failures


def nan_in(name: str) -> dict[str, Tensor]:
    tensors = flux()
    tensors[name].view(-1)[3] = float("nan")
    return tensors


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        pytest.param(nan_in(MLP), WeightError, f"'{MLP}': 1 of 1056 values are nan or inf.", id="nan-in-a-weight"),
        pytest.param(
            nan_in("img_in.weight"), WeightError, "'img_in.weight': 1 of 1024 values are nan", id="nan-in-a-kept-matrix"
        ),
        pytest.param(
            nan_in("double_blocks.0.img_attn.norm.query_norm.scale"),
            WeightError,
            "'double_blocks.0.img_attn.norm.query_norm.scale': 1 of 8 values are nan or inf.",
            id="nan-in-the-last-vector",
        ),
        pytest.param(
            flux() | {MLP: torch.zeros(8, 32, dtype=torch.float8_e4m3fn)},
            WeightError,
            f"'{MLP}': dtype is torch.float8_e4m3fn, expected float32, float16 or bfloat16.",
            id="float8",
        ),
        pytest.param(
            {"other.weight": torch.zeros(32, 32)},
            FileError,
            "No known diffusion model or text encoder: 1 tensors,",
            id="unknown-architecture",
        ),
        pytest.param({}, FileError, "The file holds no tensors.", id="empty"),
    ],
)
def test_a_failed_conversion_leaves_the_old_file(
    tmp_path: Path, tensors: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"old")
    with pytest.raises(error) as failure:
        write_gguf(path, tensors, QuantSpec("gguf-q8-0"))
    assert str(failure.value).splitlines()[0].startswith(message)
    assert path.read_bytes() == b"old"
    assert only_file(tmp_path) == "a.gguf"


@pytest.mark.parametrize("done", [0, 300, 900])
def test_an_interruption_leaves_the_old_file(tmp_path: Path, done: int) -> None:
    def interrupted(items: Sequence[T], total: int) -> Iterable[T]:
        assert total == len(items) == 1000
        yield from items[:done]
        raise KeyboardInterrupt

    path = tmp_path / "a.gguf"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        write_gguf(path, flux(), QuantSpec("gguf-q8-0"), interrupted)
    assert path.read_bytes() == b"old"
    assert only_file(tmp_path) == "a.gguf"


def test_a_quantized_source_is_refused(tmp_path: Path) -> None:
    weight = get_quantizer("gguf-q8-0").quantize(flux()[MLP], QuantSpec("gguf-q8-0"))
    with pytest.raises(WeightError, match=rf"^'{MLP}': already quantized \(gguf-q8-0\)\."):
        write_gguf(tmp_path / "a.gguf", {**flux(), MLP: weight}, QuantSpec("gguf-q4-0"))
    assert list(tmp_path.iterdir()) == []


def test_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"^A GGUF file cannot hold bnb-nf4, only .*gguf-q8-0, "):
        write_gguf(tmp_path / "a.gguf", flux(), QuantSpec("bnb-nf4"))


def test_an_unwritable_target(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be written: "):
        write_gguf(tmp_path / "file" / "a.gguf", flux(), QuantSpec("gguf-q8-0"))


def test_the_source_is_not_changed(tmp_path: Path) -> None:
    tensors, expected = flux(), flux()
    write_gguf(tmp_path / "a.gguf", tensors, QuantSpec("gguf-q4-0"))
    assert all(torch.equal(tensors[n], expected[n]) for n in expected)
