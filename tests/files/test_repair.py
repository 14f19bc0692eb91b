"""Every certain fix, proved: a sound file is damaged, diagnosed and repaired, and what it holds is then equal again."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged_files import joined, write
from quantwire.cli import main
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.files.doctor import Severity, diagnose
from quantwire.quantizers.files.model_file import open_model
from quantwire.quantizers.files.repair import NOTE, repair
from quantwire.quantizers.files.safetensors_header import parse
from quantwire.quantizers.files.schemes.scan import scan
from quantwire.quantizers.files.writers.comfy import ComfyMetadataWriter, ComfyWriter
from quantwire.quantizers.registry import get_quantizer, require
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedWeight
from safetensors.torch import load_file, save_file
from torch import Tensor

N, K = 80, 256
LAYERS = ("blocks.0.a", "blocks.0.b", "blocks.1.a")
PREFIX = "model.diffusion_model."
Tensors = dict[str, Tensor]
Metadata = dict[str, str]
Damage = Callable[[Tensors, Metadata], None]


def sound(format_id: str, prefix: str = "", in_metadata: bool = False) -> tuple[Tensors, Metadata]:
    """A file as ComfyUI has it, of three layers."""
    writer = ComfyMetadataWriter() if in_metadata else ComfyWriter()
    rng = torch.Generator().manual_seed(1)
    tensors: Tensors = {f"{prefix}norm.weight": torch.randn(K, generator=rng).bfloat16()}
    notes: dict[str, Any] = {}
    for layer in LAYERS:
        name = f"{prefix}{layer}.weight"
        weight = require(format_id).quantize(torch.randn(N, K, generator=rng), QuantSpec(format_id))
        tensors |= writer.tensors(name, weight)
        tensors[f"{prefix}{layer}.bias"] = torch.randn(N, generator=rng).bfloat16()
        notes[name] = writer.note(name, weight)
    metadata = {"format": "pt", "license": "CC0", "modelspec.title": "ünïcode"}
    return tensors, metadata | writer.metadata(notes)


def scaled_fp8(prefix: str = "", marker: bool = True, full: bool = True) -> tuple[Tensors, Metadata]:
    tensors, metadata = sound("comfy-fp8-e4m3fn", prefix)
    old: Tensors = {f"{prefix}scaled_fp8": torch.zeros(2 if full else 1).to(torch.float8_e4m3fn)} if marker else {}
    for name, tensor in tensors.items():
        if not name.endswith(".comfy_quant"):
            old[name.replace(".weight_scale", ".scale_weight")] = tensor
    if not full:
        old |= {
            name.replace("scale_weight", "scale_input"): torch.tensor(2.0) for name in list(old) if "scale_w" in name
        }
    return old, metadata


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Metadata) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def values(path: Path) -> dict[str, Tensor]:
    """All that a model would be made of: plain tensors, and weights dequantized."""
    found = scan(open_model(path))
    assert not [fault for fault in found.faults if fault.fatal]
    out: dict[str, Tensor] = {name: found.file.read(name) for name in found.plain}
    for name in found.layers:
        weight = found.read(name)
        assert isinstance(weight, QuantizedWeight)
        out[name] = get_quantizer(weight.format_id).dequantize(weight, torch.float32)[:N, :K]
    return out


def assert_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].shape == b[name].shape, name
        assert torch.equal(a[name].float(), b[name].float()), name


@dataclass(frozen=True)
class Case:
    """A damage to a sound file, and by which code it is found."""

    code: str
    format_id: str
    damage: Damage
    prefix: str = ""
    in_metadata: bool = False
    severity: Severity = Severity.ERROR
    before: Damage | None = None  # what the sound file is made like


def drop(suffix: str, layer: str = "blocks.0.a") -> Damage:
    def damage(tensors: Tensors, metadata: Metadata) -> None:
        for name in [n for n in tensors if n.endswith(f"{layer}.{suffix}")]:
            del tensors[name]

    return damage


def drop_all(suffix: str) -> Damage:
    def damage(tensors: Tensors, metadata: Metadata) -> None:
        for name in [n for n in tensors if n.endswith(f".{suffix}")]:
            del tensors[name]

    return damage


def change(suffix: str, make: Callable[[Tensor], Tensor]) -> Damage:
    def damage(tensors: Tensors, metadata: Metadata) -> None:
        names = [n for n in tensors if n.endswith(f".{suffix}")]
        assert names
        for name in names:
            tensors[name] = make(tensors[name])

    return damage


def call_it(conf: bytes) -> Damage:
    def damage(tensors: Tensors, metadata: Metadata) -> None:
        tensors["blocks.0.a.comfy_quant"] = torch.frombuffer(bytearray(conf), dtype=torch.uint8)

    return damage


def layers_of(metadata: Metadata) -> dict[str, Any]:
    return json.loads(metadata["_quantization_metadata"])["layers"]


def rename_layers(make: Callable[[str], str]) -> Damage:
    def damage(tensors: Tensors, metadata: Metadata) -> None:
        layers = {make(name): conf for name, conf in layers_of(metadata).items()}
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})

    return damage


def surplus_layer(tensors: Tensors, metadata: Metadata) -> None:
    layers = layers_of(metadata) | {"blocks.9.gone": {"format": "nvfp4"}}
    metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})


def move_scales(tensors: Tensors, metadata: Metadata) -> None:
    for name in [n for n in tensors if n.rpartition(".")[2] in ("weight_scale", "comfy_quant")]:
        tensors[name.removeprefix(PREFIX)] = tensors.pop(name)


def untile(scale: Tensor, rows: int, columns: int) -> Tensor:
    """Back from tiles of 128 x 4, written apart from the code that is tested."""
    out = torch.zeros(rows, columns, dtype=torch.uint8)
    flat, wide = scale.view(torch.uint8).reshape(-1), -(-columns // 4)
    for r in range(rows):
        for c in range(columns):
            tile = (r // 128) * wide + c // 4
            out[r, c] = flat[tile * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4]
    return out.view(scale.dtype)


def behind(prefix: str) -> Damage:
    """All tensors, but not their names in the metadata; the norm stays, by which the test looks."""

    def damage(tensors: Tensors, metadata: Metadata) -> None:
        for name in [n for n in tensors if n.startswith("blocks.")]:
            tensors[prefix + name] = tensors.pop(name)

    return damage


def no_format(tensors: Tensors, metadata: Metadata) -> None:
    del metadata["format"]


FP8, NVFP4, MXFP8, INT8, W4A8 = "comfy-fp8-e4m3fn", "comfy-nvfp4", "comfy-mxfp8", "comfy-int8", "comfy-w4a8"
CASES = {
    "nvfp4-unnamed": Case("comfy-quant-missing", NVFP4, drop("comfy_quant")),
    "nvfp4-all-unnamed": Case("comfy-quant-missing", NVFP4, drop_all("comfy_quant")),
    "mxfp8-unnamed": Case("comfy-quant-missing", MXFP8, drop_all("comfy_quant"), PREFIX),
    "fp8-all-unnamed": Case("comfy-quant-missing", FP8, drop_all("comfy_quant")),
    "fp8-unnamed": Case("comfy-quant-missing", FP8, drop("comfy_quant")),
    "e5m2-unnamed": Case("comfy-quant-missing", "comfy-fp8-e5m2", drop_all("comfy_quant"), PREFIX),
    "nvfp4-called-fp8": Case("tensor-dtype", NVFP4, call_it(b'{"format": "float8_e4m3fn"}')),
    "mxfp8-called-nvfp4": Case("tensor-dtype", MXFP8, call_it(b'{"format": "nvfp4"}')),
    "fp8-called-int8": Case("tensor-dtype", FP8, call_it(b'{"format": "int8_tensorwise"}')),
    "fp8-called-e5m2-with-an-option": Case(
        "tensor-dtype", FP8, call_it(b'{"format": "float8_e5m2", "full_precision_matrix_mult": true}')
    ),
    "nvfp4-no-json": Case("comfy-quant-json", NVFP4, call_it(b"nvfp4")),
    "scale-bf16": Case(
        "scale-dtype", NVFP4, change("weight_scale_2", lambda t: t.bfloat16()), severity=Severity.NOTE,
        before=change("weight_scale_2", lambda t: t.bfloat16().float()),
    ),
    "scale-of-one": Case(
        "scale-dimensions", FP8, change("weight_scale", lambda t: t.reshape(1)), severity=Severity.NOTE
    ),
    "scale-f64": Case("tensor-dtype", INT8, change("weight_scale", lambda t: t.double())),
    "scale-f64-that-is-cast": Case(
        "scale-dtype", FP8, change("weight_scale", lambda t: t.double()), severity=Severity.NOTE
    ),
    "channel-scale-f64": Case("tensor-dtype", W4A8, change("weight_s_channel", lambda t: t.double())),
    "channel-scale-bf16": Case(
        "scale-dtype", W4A8, change("weight_s_channel", lambda t: t.bfloat16()),
        before=change("weight_s_channel", lambda t: t.bfloat16().float()),
    ),
    "layers-behind-a-prefix-that-the-metadata-lack": Case(
        "layer-missing", "comfy-int8-convrot", behind("transformer."), "", True, Severity.WARNING
    ),
    "scale-flat": Case("scale-shape", INT8, change("weight_scale", lambda t: t.reshape(-1)), severity=Severity.WARNING),
    "nvfp4-untiled": Case("scale-shape", NVFP4, change("weight_scale", lambda t: untile(t, N, K // 16))),
    "mxfp8-untiled": Case("scale-shape", MXFP8, change("weight_scale", lambda t: untile(t, -(-N // 32) * 32, K // 32))),
    "prefix-of-metadata-missing": Case(
        "metadata-prefix", NVFP4, rename_layers(lambda n: n.removeprefix(PREFIX)), PREFIX, True, Severity.WARNING
    ),
    "prefix-of-metadata-surplus": Case(
        "metadata-prefix", NVFP4, rename_layers(lambda n: PREFIX + n), "", True
    ),
    "layer-of-metadata-gone": Case("layer-missing", NVFP4, surplus_layer, "", True, Severity.WARNING),
    "prefix-of-scales": Case("prefix-mismatch", FP8, move_scales, PREFIX),
    "no-format": Case("metadata-format", INT8, no_format, severity=Severity.NOTE),
}  # fmt: skip


@pytest.fixture(scope="module")
def made() -> Callable[[Case], tuple[Tensors, Metadata]]:
    held: dict[Any, tuple[Tensors, Metadata]] = {}

    def make(case: Case) -> tuple[Tensors, Metadata]:
        key = (case.format_id, case.prefix, case.in_metadata)
        if key not in held:
            held[key] = sound(*key)
        return dict(held[key][0]), dict(held[key][1])

    return make


@pytest.mark.parametrize("name", CASES)
def test_a_repaired_file_is_equal(tmp_path: Path, name: str, made: Any) -> None:
    case = CASES[name]
    tensors, metadata = made(case)
    if case.before is not None:
        case.before(tensors, metadata)
    good = save(tmp_path / "good.safetensors", tensors, metadata)
    assert diagnose(good).worst is None
    case.damage(tensors, metadata)
    bad = save(tmp_path / "bad.safetensors", tensors, metadata)
    content = bad.read_bytes()

    found = next(f for f in diagnose(bad).findings if f.code == case.code)
    assert found.severity is case.severity
    assert found.fix
    assert found.effect
    done = repair(bad, tmp_path / "new.safetensors")

    assert done.after.findings == ()
    got = {name.removeprefix("transformer."): tensor for name, tensor in values(tmp_path / "new.safetensors").items()}
    assert_equal(got, values(good))
    assert bad.read_bytes() == content
    kept = open_model(tmp_path / "new.safetensors").metadata
    assert {"license": "CC0", "modelspec.title": "ünïcode", "format": "pt"}.items() <= kept.items()
    assert case.code in [fix["code"] for fix in json.loads(kept[NOTE])["fixes"]]
    assert load_file(tmp_path / "new.safetensors").keys() >= {f"{case.prefix}norm.weight"}  # as the library reads it


@pytest.mark.parametrize("full", [True, False], ids=["full-precision", "fp8-product"])
@pytest.mark.parametrize("prefix", ["", PREFIX], ids=["bare", "prefix"])
def test_a_marker_of_scaled_fp8_is_put_back(tmp_path: Path, prefix: str, full: bool) -> None:
    tensors, metadata = scaled_fp8(prefix, full=full)
    good = save(tmp_path / "good.safetensors", tensors, metadata)
    assert diagnose(good).worst is None
    marker = tensors.pop(f"{prefix}scaled_fp8")
    bad = save(tmp_path / "bad.safetensors", tensors, metadata)
    assert "scaled-fp8-missing" in [f.code for f in diagnose(bad).findings if f.fix]
    done = repair(bad, tmp_path / "new.safetensors")
    assert done.after.findings == ()
    assert load_file(done.target)[f"{prefix}scaled_fp8"].shape == marker.shape
    assert_equal(values(done.target), values(good))


# Headers: the data is sound, so that the copy holds the same tensors


def raw(tmp_path: Path, edit: Callable[[dict[str, Any]], None], behind: bytes = b"", hole: int = 0) -> Path:
    """A sound file whose header is changed by hand."""
    tensors, metadata = sound(INT8)
    path = save(tmp_path / "good.safetensors", tensors, metadata)
    head = parse(path)
    header: dict[str, Any] = {"__metadata__": dict(head.metadata or {}), **head.entries}
    data = path.read_bytes()[head.data_start :]
    if hole:
        at = sorted(e["data_offsets"][1] for e in head.entries.values())[3]
        data = data[:at] + bytes(hole) + data[at:]
        for e in head.entries.values():
            e["data_offsets"] = [n + hole * (e["data_offsets"][0] >= at) for n in e["data_offsets"]]
    edit(header)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(joined(header, data + behind))
    return bad


def test_trailing_bytes_are_left_out(tmp_path: Path) -> None:
    bad = raw(tmp_path, lambda h: None, behind=b"more")
    assert [(f.code, f.tensors) for f in diagnose(bad).findings] == [("header-trailing", ())]
    repair(bad, tmp_path / "new.safetensors")
    assert_equal(values(tmp_path / "new.safetensors"), values(tmp_path / "good.safetensors"))


def test_a_hole_is_closed(tmp_path: Path) -> None:
    bad = raw(tmp_path, lambda h: None, hole=24)
    assert [f.code for f in diagnose(bad).findings] == ["header-hole"]
    done = repair(bad, tmp_path / "new.safetensors")
    assert done.after.findings == ()
    assert_equal(values(done.target), values(tmp_path / "good.safetensors"))


def test_metadata_become_strings(tmp_path: Path) -> None:
    bad = raw(tmp_path, lambda h: h["__metadata__"].update({"steps": 20, "tags": {"a": 1}}))
    assert [f.code for f in diagnose(bad).findings] == ["header-metadata"]
    done = repair(bad, tmp_path / "new.safetensors")
    kept = open_model(done.target).metadata
    assert (kept["steps"], kept["tags"], kept["license"]) == ("20", '{"a": 1}', "CC0")
    assert_equal(values(done.target), values(tmp_path / "good.safetensors"))


def test_nothing_is_certain_of_a_header_that_lost_a_tensor(tmp_path: Path) -> None:
    def spoil(header: dict[str, Any]) -> None:
        header["norm.weight"]["dtype"] = "BF17"

    found = diagnose(raw(tmp_path, spoil)).findings
    assert {f.code for f in found} == {"header-dtype"}
    assert not any(f.fix for f in found)


# What is not certain, is not done


@pytest.mark.parametrize("drop_of", [drop, drop_all], ids=["one", "all"])
@pytest.mark.parametrize("format_id", [INT8, "comfy-int8-convrot", "comfy-w4a4-convrot", W4A8])
def test_what_may_be_rotated_or_not_is_not_named(tmp_path: Path, format_id: str, drop_of: Any) -> None:
    """Other layers of the file do not tell: one that a rotation does not fit stays without."""
    tensors, metadata = sound(format_id)
    drop_of("comfy_quant")(tensors, metadata)
    bad = save(tmp_path / "bad.safetensors", tensors, metadata)
    (found,) = diagnose(bad).findings
    assert (found.code, found.fix) == ("comfy-quant-missing", "")
    with pytest.raises(FileError, match="nothing to repair: its faults have no certain fix"):
        repair(bad, tmp_path / "new.safetensors")
    assert not (tmp_path / "new.safetensors").exists()


def test_truncated_data_is_not_repaired(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", *sound(INT8))
    path.write_bytes(path.read_bytes()[:-100])
    found = diagnose(path)
    assert [f.code for f in found.findings] == ["header-truncated"]
    with pytest.raises(FileError):
        repair(path, tmp_path / "new.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors"]


# Where it writes


@pytest.fixture
def unnamed(tmp_path: Path) -> Path:
    tensors, metadata = sound(NVFP4)
    drop_all("comfy_quant")(tensors, metadata)
    return save(tmp_path / "bad.safetensors", tensors, metadata)


@pytest.mark.parametrize("way", ["same", "symbolic", "hard", "relative"])
def test_never_in_place(tmp_path: Path, unnamed: Path, way: str) -> None:
    target = tmp_path / "link.safetensors"
    if way == "same":
        target = unnamed
    elif way == "relative":
        target = tmp_path / "x" / ".." / unnamed.name
        (tmp_path / "x").mkdir()
    else:
        (target.symlink_to if way == "symbolic" else target.hardlink_to)(unnamed)
    content = unnamed.read_bytes()
    with pytest.raises(FileError, match="is read by this"):
        repair(unnamed, target, overwrite=True)
    assert unnamed.read_bytes() == content


def test_a_file_that_is_there_stays(tmp_path: Path, unnamed: Path) -> None:
    target = tmp_path / "new.safetensors"
    target.write_bytes(b"mine")
    with pytest.raises(FileError, match="is there already"):
        repair(unnamed, target)
    assert target.read_bytes() == b"mine"
    repair(unnamed, target, overwrite=True)
    assert diagnose(target).findings == ()
    assert sorted(p.suffix for p in tmp_path.iterdir() if p != target) in (
        ["", ".safetensors"],
        [".lock", ".safetensors"],
        [".safetensors"],
    )


def test_parts_and_own_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "part", {"a": ("F32", [4])}, {"x": "y"})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "part"}}))
    with pytest.raises(FileError, match="sharded safetensors is not repaired"):
        repair(index, tmp_path / "new.safetensors")


# The command


def run(*args: object) -> int:
    return main(["doctor", *map(str, args)])


def test_exit_codes_and_report(tmp_path: Path, unnamed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "r.json"
    assert run(unnamed, "--json", report) == 2
    text = capsys.readouterr().out
    assert "error: comfy-quant-missing: 'blocks.0.a'" in text
    assert "in the loader: " in text
    data = json.loads(report.read_text())
    assert data["diagnosis"]["findings"][0]["tensors"] == [f"{layer}.weight" for layer in LAYERS]

    assert run(unnamed, "--repair", tmp_path / "new.safetensors", "--json", report) == 0
    assert "Nothing wrong is left." in capsys.readouterr().out
    assert json.loads(report.read_text())["repair"]["after"]["findings"] == []
    assert run(tmp_path / "new.safetensors") == 0
    assert run(unnamed, "--repair", tmp_path / "new.safetensors") == 2
    assert "is there already" in capsys.readouterr().err
    assert run(tmp_path / "new.safetensors", "--repair", tmp_path / "again.safetensors") == 0
    assert "not written: nothing is wrong" in capsys.readouterr().out
    assert not (tmp_path / "again.safetensors").exists()
    assert run(tmp_path / "none.safetensors") == 2
    assert run(tmp_path / "new.safetensors", "--repair", unnamed / "x") == 2


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A file of 2 GiB of holes, repaired by a process whose peak is measured."""
    size = 1 << 30
    header = {
        n: {"dtype": "U8", "shape": [size], "data_offsets": [i * size, (i + 1) * size]} for i, n in enumerate("ab")
    }
    path = tmp_path / "a.safetensors"
    head = joined({"__metadata__": {"x": "y"}, **header}, b"")
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(len(head) + 2 * size)
    code = (
        "import resource, sys; from pathlib import Path; import torch\n"
        "from quantwire.quantizers.files.repair import repair\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "repair(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)\n"
    )
    target = tmp_path / "b.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(target)], check=True, capture_output=True, text=True, env=os.environ
    )
    assert int(done.stdout) < 100
    assert target.stat().st_size > 2 * size
    assert hashlib.sha256(target.open("rb").read(1 << 20)[-4096:]).digest() == hashlib.sha256(bytes(4096)).digest()
