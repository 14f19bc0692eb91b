"""Quantizing a file tensor by tensor: what is read, what is refused, and how much memory it takes."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.quantizers.apply import OnFailure, quantize_tensor
from quantwire.quantizers.errors import FileError, SpecError, WeightError
from quantwire.quantizers.files import cache as cache_module
from quantwire.quantizers.files.cache import Cache
from quantwire.quantizers.files.on_load import Request, quantize_file
from quantwire.quantizers.files.stream import Part, TensorFile
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedWeight
from safetensors.torch import load_file, save_file
from torch import Tensor

GIB = 1 << 30


@pytest.fixture
def source(tmp_path: Path) -> TensorFile:
    g = torch.Generator().manual_seed(0)
    tensors = {
        "fused.weight": torch.randn(96, 64, generator=g).to(torch.bfloat16),
        "fused.bias": torch.randn(96, generator=g).to(torch.bfloat16),
        "out.weight": torch.randn(33, 64, generator=g).to(torch.bfloat16),
        "norm.weight": torch.ones(64),
    }
    save_file(tensors, tmp_path / "source.safetensors")
    return TensorFile(tmp_path / "source.safetensors")


def parts_of(file: TensorFile) -> list[Part]:
    bf16 = torch.bfloat16
    return [
        Part("q.weight", "fused.weight", (32, 64), bf16, True, (0, 32)),
        Part("kv.weight", "fused.weight", (64, 64), bf16, True, (32, None)),
        Part("kv.bias", "fused.bias", (64,), bf16, False, (32, None)),
        Part("swapped.bias", "fused.bias", (96,), torch.float32, False, swap=True),
        Part("out.weight", "out.weight", (33, 64), bf16, True),
        Part("norm.weight", "norm.weight", (64,), torch.float32, False),
    ]


def raw(value: Any) -> list[Tensor]:
    tensors = value.tensors.values() if isinstance(value, QuantizedWeight) else [value]
    return [t.contiguous().reshape(-1).view(torch.uint8) for t in tensors]


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "memory"])
@pytest.mark.parametrize("format_id", ["bnb-nf4", "gguf-q8-0", "comfy-nvfp4", "quanto-qint4"])
def test_rows_are_cut_before_they_are_quantized(
    source: TensorFile, tmp_path: Path, format_id: str, cached: bool
) -> None:
    """Blocks of these formats cross rows, or their bytes are packed along the first axis."""
    spec = QuantSpec(format_id)
    cache = Cache(tmp_path / "cache", GIB) if cached else None
    found, report = quantize_file(Request(source, "test", lambda: parts_of(source), spec), cache)
    fused, bias = source.read("fused.weight"), source.read("fused.bias")
    weights = {"q.weight": fused[:32], "kv.weight": fused[32:], "out.weight": source.read("out.weight")}
    for name, w in weights.items():
        wanted = quantize_tensor(name, w, spec)[0]
        got: Any = found.tensors[name]
        assert (got.format_id, got.orig_shape, dict(got.meta)) == (format_id, tuple(w.shape), dict(wanted.meta))
        assert all(torch.equal(a, b) for a, b in zip(raw(got), raw(wanted), strict=True)), name
    plain: Any = found.tensors
    assert torch.equal(plain["kv.bias"], bias[32:])
    assert torch.equal(plain["swapped.bias"], torch.cat([bias[48:], bias[:48]]).float())
    assert [e.action for e in report.entries].count("quantize") == 3
    assert report.nbytes_out == sum(t.nbytes for t in found.tensors.values())


def test_the_next_time_nothing_is_read(source: TensorFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "cache", GIB)
    request = Request(source, "test", lambda: parts_of(source), QuantSpec("gguf-q8-0"))
    first, made = quantize_file(request, cache)

    def unexpected(self: TensorFile, name: str) -> Tensor:
        raise AssertionError(f"{name} is read again")

    monkeypatch.setattr(TensorFile, "read", unexpected)
    again, found = quantize_file(request, cache)
    assert set(again.tensors) == set(first.tensors)
    assert found.entries == made.entries
    assert any(note.startswith("Made now") for note in made.notes)
    assert any(note.startswith("From the cache") for note in found.notes)


def test_what_changes_the_result_changes_the_entry(source: TensorFile, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", GIB)
    parts = parts_of(source)
    requests = [
        Request(source, "test", lambda: parts, QuantSpec("bnb-nf4")),
        Request(source, "test", lambda: parts, QuantSpec("bnb-fp4")),
        Request(source, "test", lambda: parts, QuantSpec.from_uri("bnb;bits=4;bits4-use-double-quant=true")),
        Request(source, "test", lambda: parts, QuantSpec("bnb-nf4", exclude=("out",))),
        Request(source, "other", lambda: parts[:-1], QuantSpec("bnb-nf4")),
    ]
    for count, request in enumerate(requests, 1):
        _, report = quantize_file(request, cache)
        assert any(note.startswith("Made now") for note in report.notes)
        assert len(list(cache.folder.glob("*.safetensors"))) == count
    tensors = {n: source.read(n).clone() for n in source.shapes}
    tensors["out.weight"][0, 0] += 1
    save_file(tensors, source.path)
    again = TensorFile(source.path)
    _, report = quantize_file(Request(again, "test", lambda: parts_of(again), QuantSpec("bnb-nf4")), cache)
    assert any(note.startswith("Made now") for note in report.notes)


def test_without_room_the_result_is_the_same_and_the_report_says_so(
    source: TensorFile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    request = Request(source, "test", lambda: parts_of(source), QuantSpec("gguf-q8-0"))
    wanted, _ = quantize_file(request, Cache(tmp_path / "cache", GIB))
    found, report = quantize_file(request, Cache(tmp_path / "small", 100))
    for name, value in wanted.tensors.items():
        assert all(torch.equal(a, b) for a, b in zip(raw(found.tensors[name]), raw(value), strict=True)), name
    assert len(report.warnings) == 1
    assert "no room" in report.warnings[0]
    assert "WARNING: Not cached" in str(report)
    assert "not cached" in caplog.text


def test_failures(source: TensorFile, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", GIB)
    parts = parts_of(source)
    w4a8 = QuantSpec("comfy-int8-convrot")  # K=64 is no multiple of its rotation
    with pytest.raises(SpecError, match=r"'q.weight': comfy-int8-convrot: K=64"):
        quantize_file(Request(source, "test", lambda: parts, w4a8), cache)
    _, report = quantize_file(Request(source, "test", lambda: parts, w4a8, on_failure=OnFailure.FULL_PRECISION), cache)
    assert len(report.warnings) == 3
    with pytest.raises(SpecError, match="matches none"):
        quantize_file(Request(source, "test", lambda: parts, QuantSpec("bnb-nf4", exclude=("nowhere",))), cache)


@pytest.mark.parametrize("name", ["out.weight", "norm.weight"])
@pytest.mark.parametrize("on_failure", list(OnFailure))
def test_values_that_are_not_finite(source: TensorFile, tmp_path: Path, name: str, on_failure: OnFailure) -> None:
    tensors = {n: source.read(n).clone() for n in source.shapes}
    tensors[name].view(-1)[5] = torch.nan
    save_file(tensors, source.path)
    file = TensorFile(source.path)
    cache = Cache(tmp_path / "cache", GIB)
    with pytest.raises(WeightError, match=f"'{name}': 1 of"):
        quantize_file(Request(file, "test", lambda: parts_of(file), QuantSpec("bnb-nf4"), on_failure=on_failure), cache)
    assert not list(cache.folder.glob("*.safetensors"))
    assert not list(cache.folder.glob("*.tmp"))


def test_a_source_that_changes_meanwhile(source: TensorFile, tmp_path: Path) -> None:
    def progress(items: Any, total: int) -> Any:
        for i, item in enumerate(items):
            yield item
            if i == 1:
                content = source.path.read_bytes()
                source.path.unlink()  # a map of the old file must stay readable
                source.path.write_bytes(content)

    cache = Cache(tmp_path / "cache", GIB)
    with pytest.raises(FileError, match="changed while it was read"):
        quantize_file(Request(source, "test", lambda: parts_of(source), QuantSpec("bnb-nf4")), cache, progress=progress)
    assert not list(cache.folder.glob("*.safetensors"))


def other_model(path: Path) -> None:
    """Replace the file by one of the same size and header, by name, as a download does."""
    tensors = {n: t.clone() for n, t in load_file(path).items()}
    tensors["out.weight"] += 1
    save_file(tensors, path.with_suffix(".new"))
    stat = path.stat()
    os.utime(path.with_suffix(".new"), ns=(stat.st_atime_ns, stat.st_mtime_ns))
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("when", ["header read", "hashed", "planned", "quantized"])
@pytest.mark.parametrize("restored", ["by content", "by name", "no"])
def test_no_entry_of_one_model_under_the_key_of_another(
    source: TensorFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, restored: str
) -> None:
    """The file is replaced between two steps, and perhaps put back; what comes later is of the file that is there."""
    cache = Cache(tmp_path / "cache", GIB)
    original = source.path.read_bytes()
    monkeypatch.setattr(cache_module, "RACY_S", 0.0)  # so that a hash is noted and taken over by the next load
    kept = tmp_path / "kept"
    kept.hardlink_to(source.path)
    source = TensorFile(source.path)

    def at(step: str) -> None:
        if step == when:
            other_model(source.path)

    def parts() -> list[Part]:
        at("planned")
        return parts_of(source)

    def progress(items: Any, total: int) -> Any:
        yield from items
        at("quantized")

    def poll() -> None:
        at("hashed")

    at("header read")
    request = Request(source, "test", parts, QuantSpec("gguf-q8-0"))
    with pytest.raises(FileError, match="changed while it was read"):
        quantize_file(request, cache, progress=progress, poll=poll)
    assert not list(cache.folder.glob("*.safetensors"))
    if restored == "by content":
        source.path.write_bytes(original)
    elif restored == "by name":
        kept.replace(source.path)
    file = TensorFile(source.path)
    found, _ = quantize_file(Request(file, "test", lambda: parts_of(file), QuantSpec("gguf-q8-0")), cache)
    wanted = quantize_tensor("out.weight", file.read("out.weight"), QuantSpec("gguf-q8-0"))[0]
    assert all(torch.equal(a, b) for a, b in zip(raw(found.tensors["out.weight"]), raw(wanted), strict=True))


def test_a_file_put_back_after_it_was_hashed_as_another(source: TensorFile, tmp_path: Path) -> None:
    """Header and data of one model, the hash of another that lay there for a moment."""
    cache = Cache(tmp_path / "cache", GIB)
    kept = tmp_path / "kept"
    kept.hardlink_to(source.path)
    file = TensorFile(source.path)
    other_model(source.path)

    def parts() -> list[Part]:
        kept.replace(source.path)
        return parts_of(file)

    with pytest.raises(FileError, match="changed while it was read"):
        quantize_file(Request(file, "test", parts, QuantSpec("gguf-q8-0")), cache)
    assert not list(cache.folder.glob("*.safetensors"))


def test_a_source_that_changes_is_refused_without_a_cache_too(source: TensorFile) -> None:
    def parts() -> list[Part]:
        other_model(source.path)
        return parts_of(source)

    with pytest.raises(FileError, match="changed while it was read"):
        quantize_file(Request(source, "test", parts, QuantSpec("gguf-q8-0")), None)


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the JSON that stands beside the weights; the file stays one that can be read."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    own = json.loads(header["__metadata__"]["quantwire"])
    change(own)
    header["__metadata__"]["quantwire"] = json.dumps(own)
    new = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    assert len(new) == length
    path.write_bytes(content[:8] + new + content[8 + length :])


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    **{f"no {name}": lambda own, name=name: own.pop(name) for name in ("entries", "family", "fields", "seconds")},
    **{f"no {name}": lambda own, name=name: own.pop(name) for name in ("warnings", "notes", "made")},
    "entries are no list": lambda own: own.update(entries=3),
    "rows are no lists": lambda own: own.update(entries=[1, 2]),
    "a row is too short": lambda own: own["entries"][0].pop(),
    "an unknown field": lambda own: own.update(fields=["x", *own["fields"][1:]]),
    "sizes are words": lambda own: own["entries"][0].__setitem__(3, "many"),
    "notes are no list": lambda own: own.update(notes="abc"),
    "seconds are a word": lambda own: own.update(seconds="long"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_entry_without_its_report_is_made_again(
    source: TensorFile, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    cache = Cache(tmp_path / "cache", GIB)
    request = Request(source, "test", lambda: parts_of(source), QuantSpec("gguf-q8-0"))
    first, made = quantize_file(request, cache)
    (path,) = cache.folder.glob("*.safetensors")
    rewritten(path, DAMAGES[damage])
    again, report = quantize_file(request, cache)
    assert "removed from the cache" in caplog.text
    assert any(note.startswith("Made now") for note in report.notes)
    assert report.entries == made.entries
    for name, value in first.tensors.items():
        assert all(torch.equal(a, b) for a, b in zip(raw(again.tensors[name]), raw(value), strict=True)), name
    _, found = quantize_file(request, cache)
    assert any(note.startswith("From the cache") for note in found.notes)
    assert found.entries == made.entries


@pytest.mark.parametrize("sign", ["out.weight.absmax", "out.weight_scale", "out.comfy_quant", "scaled_fp8"])
def test_quantized_sources_are_refused(tmp_path: Path, sign: str) -> None:
    save_file({"out.weight": torch.zeros(4, 4), sign: torch.zeros(2)}, tmp_path / "q.safetensors")
    with pytest.raises(FileError, match=r"q\.safetensors: already quantized"):
        TensorFile(tmp_path / "q.safetensors")


def test_fp8_sources_are_refused(tmp_path: Path) -> None:
    save_file({"out.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "q.safetensors")
    file = TensorFile(tmp_path / "q.safetensors")
    part = Part("out.weight", "out.weight", (4, 4), torch.float8_e4m3fn, True)
    with pytest.raises(WeightError, match="float8_e4m3fn"):
        quantize_file(Request(file, "test", lambda: [part], QuantSpec("bnb-nf4")), None)


PEAK = """
import json, sys
from pathlib import Path
from quantwire.quantizers.files.cache import Cache
from quantwire.quantizers.files.on_load import Request, quantize_file
from quantwire.quantizers.files.stream import Part, TensorFile
from quantwire.quantizers.spec import QuantSpec

def status(name):
    (line,) = [l for l in open("/proc/self/status") if l.startswith(name + ":")]
    return int(line.split()[1]) * 1024

def load(path, cache):
    file = TensorFile(path)
    parts = [Part(n, n, tuple(t.shape), t.dtype, True) for n, t in file.shapes.items()]
    return quantize_file(Request(file, "test", lambda: parts, QuantSpec(sys.argv[2])), cache)

folder = Path(sys.argv[1])
load(folder / "small.safetensors", None)  # the libraries' first use
try:
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of imports
except OSError:
    pass
before = status("VmRSS")
checkpoint, report = load(folder / "large.safetensors", Cache(folder / "cache", 1 << 30))
print(json.dumps({"peak": status("VmHWM") - before, "quantized": report.nbytes_out}))
"""
MIB = 1 << 20
LAYERS = 24
SLACK_MIB = 40


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("format_id", ["gguf-q8-0", "bnb-nf4", "comfy-fp8-e4m3fn"])
def test_peak_memory(tmp_path: Path, format_id: str) -> None:
    """Over what the libraries take, of a file with 24 layers of 4 MiB; measured 42 to 65 MiB on a loaded machine."""
    generator = torch.Generator().manual_seed(0)
    w = {f"l{i}.weight": torch.randn(2048, 1024, generator=generator).to(torch.bfloat16) for i in range(LAYERS)}
    save_file(w, tmp_path / "large.safetensors")
    save_file({"l.weight": w["l0.weight"]}, tmp_path / "small.safetensors")
    largest = 4 * MIB
    command = [sys.executable, "-W", "ignore", "-c", PEAK, str(tmp_path), format_id]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] <= found["quantized"] + 3 * largest + SLACK_MIB * MIB
    assert found["peak"] < LAYERS * largest  # the model was never whole in memory
