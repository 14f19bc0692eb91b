"""Conversions of whole files: their bytes, what interruptions and full disks leave, what is refused, the way back."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from quantwire.cli import main
from quantwire.commands import convert as command_module
from quantwire.quantizers.backends.gguf import ggml
from quantwire.quantizers.errors import FileError, QuantwireError, SpecError, WeightError
from quantwire.quantizers.files import convert, journal, quantizing
from quantwire.quantizers.files.checkpoint import read_gguf, read_safetensors
from quantwire.quantizers.files.convert_plan import Request, dry_run, plan_conversion
from quantwire.quantizers.files.converting import convert as convert_file
from quantwire.quantizers.files.imatrix import Imatrix, Sums, write_imatrix
from quantwire.quantizers.ggml_types import TYPES
from quantwire.quantizers.registry import get_quantizer
from quantwire.quantizers.rules import Rule
from quantwire.quantizers.weight import QuantizedWeight
from safetensors.torch import load_file, save_file
from torch import Tensor

resource = pytest.importorskip("resource")
WIDTH = 256
MLP = "double_blocks.0.img_mlp.0.weight"


class Bar:
    def __init__(self) -> None:
        self.nbytes = 0

    def update(self, n: int, /) -> None:
        self.nbytes += n


def no_bar(total: int) -> Any:
    return nullcontext(Bar())


def whole_numbers(*shape: int, step: int) -> Tensor:
    """Values that every machine forms alike: multiples of 1/32 from -50/32 to 50/32."""
    numel = torch.Size(shape).numel()
    return ((torch.arange(numel) * step) % 101 - 50).reshape(shape) / 32


def flux(blocks: int = 2, width: int = WIDTH, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"img_in.weight": (width, 64), "img_in.bias": (width,)}
    shapes |= {"txt_in.weight": (width, 128), "final_layer.linear.weight": (64, width)}
    for i in range(blocks):
        b = f"double_blocks.{i}"
        shapes |= {f"{b}.img_attn.qkv.weight": (3 * width, width), f"{b}.img_attn.qkv.bias": (3 * width,)}
        shapes |= {f"{b}.img_attn.norm.query_norm.scale": (128,), f"{b}.img_mlp.0.weight": (2 * width, width)}
        shapes |= {f"{b}.img_mlp.2.weight": (width, 2 * width)}
        shapes |= {f"single_blocks.{i}.linear1.weight": (3 * width, width)}
    return {n: whole_numbers(*s, step=7 + 2 * i).to(dtype) for i, (n, s) in enumerate(shapes.items())}


def save(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata or None)
    return path


def run(source: Path, target: Path, kind: str, **options: Any) -> Any:
    return convert_file(Request(source, target, kind, **options), no_bar)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def restored(value: Tensor | QuantizedWeight) -> Tensor:
    if isinstance(value, Tensor):
        return value.float()
    return get_quantizer(value.format_id).dequantize(value, torch.float32)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "flux.safetensors", flux())


# Bytes


# sha256 of the whole file. It may change only with the layout of the files or the recipe, never with a library.
GOLDEN = {
    "Q8_0": "97fb3c0956aa5dcd04829af60d2692695ff7e31682e0fb36f8b7a72babc557bb",
    "Q4_K_M": "8030f0442cfd3a6ead6b6c2495d0cf1d13de8937567c97465c07a747a3dff888",
    "BF16": "17a2c09800aa6e9fdbd2dd1df5084d4a7abb41b6ae98a03dc55e502cb7de0fb9",
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_golden_bytes(tmp_path: Path, source: Path, kind: str) -> None:
    run(source, tmp_path / "a.gguf", kind)
    assert sha256(tmp_path / "a.gguf") == GOLDEN[kind]


@pytest.mark.parametrize(("slab", "threads"), [(1 << 20, 1), (1 << 12, 1), (1000, 3), (1, 2)])
def test_slabs_and_threads_change_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, slab: int, threads: int
) -> None:
    monkeypatch.setattr(convert, "SLAB_NUMEL", slab)
    run(source, tmp_path / "a.gguf", "Q4_K_M", threads=threads)
    assert sha256(tmp_path / "a.gguf") == GOLDEN["Q4_K_M"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_the_file_is_what_gguf_and_ggml_make(tmp_path: Path, dtype: torch.dtype) -> None:
    """Header and blocks against gguf's own writer and one call of ggml for each whole tensor."""
    tensors = flux(dtype=dtype)
    path = save(tmp_path / "flux.safetensors", tensors, **{"modelspec.title": "Tiny", "modelspec.license": "MIT"})
    run(path, tmp_path / "ours.gguf", "Q5_K_M")
    plan = plan_conversion(Request(path, tmp_path / "other.gguf", "Q5_K_M"))
    writer = gguf.GGUFWriter(str(tmp_path / "theirs.gguf"), "flux")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q5_K_M)
    writer.add_string("general.name", "Tiny")
    writer.add_string("general.license", "MIT")
    writer.add_string("quantwire.recipe", "Q5_K_M")
    for c in plan.choices:
        values = tensors[c.target.name].float()
        kind = gguf.GGMLQuantizationType[c.kind]
        if c.kind in TYPES:
            raw = ggml.library().quantize(TYPES[c.kind], values).numpy()
        else:
            raw = gguf.quantize(values.numpy(), kind)
        writer.add_tensor(c.target.name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_dry_run_tells_the_size_to_the_byte(tmp_path: Path, source: Path) -> None:
    plan = plan_conversion(Request(source, tmp_path / "a.gguf", "Q3_K_L"))
    text = dry_run(plan)
    assert names_in(tmp_path) == ["flux.safetensors"]
    run(source, tmp_path / "a.gguf", "Q3_K_L")
    assert (tmp_path / "a.gguf").stat().st_size == plan.total
    assert f"({plan.total} bytes)" in text
    assert "upgrade: fused attention q, k, v (double_blocks.0.img_attn.qkv.weight)" in text


def test_an_importance_matrix_reaches_ggml(tmp_path: Path, source: Path) -> None:
    weights = torch.arange(1.0, WIDTH + 1)
    entries = {MLP: Sums(weights[None].double(), torch.tensor([1]))}
    write_imatrix(tmp_path / "im.gguf", Imatrix(entries))
    report = run(source, tmp_path / "a.gguf", "gguf-q4-k", imatrix=tmp_path / "im.gguf")
    value: Any = read_gguf(tmp_path / "a.gguf").tensors[MLP]
    expected = ggml.library().quantize(TYPES["Q4_K"], flux()[MLP].float(), weights)
    assert torch.equal(value.tensors["qdata"], expected)
    assert not torch.equal(expected, ggml.library().quantize(TYPES["Q4_K"], flux()[MLP].float()))
    assert any("7 tensors have no importance: double_blocks.0.img_attn.qkv.weight, " in w for w in report.warnings)
    write_imatrix(tmp_path / "other.gguf", Imatrix({"blk.0.attn_q.weight": entries[MLP]}))
    with pytest.raises(FileError, match=r"^other\.gguf: belongs to another model: none of its 1 names"):
        run(source, tmp_path / "b.gguf", "Q4_K_M", imatrix=tmp_path / "other.gguf")
    write_imatrix(tmp_path / "wide.gguf", Imatrix({MLP: Sums(torch.ones(1, 999).double(), torch.tensor([1]))}))
    with pytest.raises(FileError, match=r"'double_blocks.0.img_mlp.0.weight' has \(999,\) values there and 256"):
        run(source, tmp_path / "b.gguf", "Q4_K_M", imatrix=tmp_path / "wide.gguf")


def test_rules_and_what_was_kept_stand_in_the_file(tmp_path: Path, source: Path) -> None:
    run(source, tmp_path / "a.gguf", "Q4_0", rules=(Rule("*.qkv", "Q6_K"),), exclude=("img_mlp.0",))
    reader = gguf.GGUFReader(str(tmp_path / "a.gguf"))
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    assert types["double_blocks.1.img_attn.qkv.weight"] == "Q6_K"
    assert (types[MLP], types["double_blocks.0.img_mlp.2.weight"]) == ("BF16", "Q4_0")
    assert reader.fields["quantwire.rules"].contents() == "img_mlp.0 = keep\n*.qkv = Q6_K"
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_0


def test_tensors_of_five_dimensions_and_long_names(tmp_path: Path) -> None:
    """As ComfyUI-GGUF's own tools leave a Wan file: five dimensions, float32."""
    width, long = 128, "blocks.0." + "a" * 80 + ".weight"
    tensors = {
        "patch_embedding.weight": whole_numbers(width, 16, 1, 2, 2, step=3).bfloat16(),
        "patch_embedding.bias": whole_numbers(width, step=3),
        "text_embedding.0.weight": whole_numbers(width, 64, step=5),
        "time_projection.1.weight": whole_numbers(6 * width, width, step=5),
        "head.head.weight": whole_numbers(64, width, step=5),
        "head.modulation": whole_numbers(1, 2, width, step=5).bfloat16(),
        "blocks.0.self_attn.q.weight": whole_numbers(width, width, step=5),
        "blocks.0.cross_attn.k.weight": whole_numbers(width, width, step=5),
        "blocks.0.ffn.0.weight": whole_numbers(width, width, step=5),
        "blocks.0.ffn.2.weight": whole_numbers(width, width, step=5),
        "blocks.0.modulation": whole_numbers(1, 6, width, step=5),
        long: whole_numbers(width, width, step=7),
    }
    report = run(save(tmp_path / "wan.safetensors", tensors), tmp_path / "wan.gguf", "Q8_0")
    reader = gguf.GGUFReader(str(tmp_path / "wan.gguf"))
    assert reader.fields["general.architecture"].contents() == "wan"
    found = {t.name: t for t in reader.tensors}
    patch = found["patch_embedding.weight"]
    assert (patch.tensor_type.name, patch.data.shape) == ("F32", (width, 16, 1, 2, 2))
    assert torch.equal(torch.from_numpy(patch.data.copy()), tensors["patch_embedding.weight"].float())
    assert found["head.modulation"].tensor_type.name == found["blocks.0.modulation"].tensor_type.name == "F32"
    assert found[long].tensor_type.name == "Q8_0"
    assert any("1 names are longer than the 63 bytes" in note for note in report.notes)
    ours = read_gguf(tmp_path / "wan.gguf").tensors
    assert torch.equal(restored(ours["patch_embedding.weight"]), tensors["patch_embedding.weight"].float())


def test_a_sharded_file_and_an_index_give_the_same_bytes(tmp_path: Path, source: Path) -> None:
    tensors = flux()
    names = list(tensors)
    folder = tmp_path / "transformer"
    for i in (0, 1):
        save(folder / f"diffusion_pytorch_model-{i}.safetensors", {n: tensors[n] for n in names[i::2]})
    where = {n: f"diffusion_pytorch_model-{i % 2}.safetensors" for i, n in enumerate(names)}
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    results = []
    for i, given in enumerate((folder, index)):
        run(given, tmp_path / f"{i}.gguf", "Q4_K_M")
        tensors_read = read_gguf(tmp_path / f"{i}.gguf").tensors
        results.append({n: restored(t) for n, t in tensors_read.items()})
    run(source, tmp_path / "whole.gguf", "Q4_K_M")
    whole = {n: restored(t) for n, t in read_gguf(tmp_path / "whole.gguf").tensors.items()}
    for found in results:
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[n], whole[n]) for n in whole)
    (folder / "diffusion_pytorch_model-1.safetensors").unlink()
    with pytest.raises(FileError, match=r"the file 'diffusion_pytorch_model-1.safetensors' is missing"):
        run(folder, tmp_path / "c.gguf", "Q4_K_M")


def test_a_checkpoint_gives_its_diffusion_model(tmp_path: Path) -> None:
    tensors = {f"model.diffusion_model.{n}": t for n, t in flux().items()} | {"vae.decoder.conv.weight": torch.zeros(4)}
    report = run(save(tmp_path / "all.safetensors", tensors), tmp_path / "a.gguf", "Q8_0")
    assert list(read_gguf(tmp_path / "a.gguf").tensors) == sorted(flux())
    assert any("left out: 1 tensors that are no part of this model, such as vae.decoder" in n for n in report.notes)


# The way back, and from one type to another


def test_gguf_to_safetensors(tmp_path: Path, source: Path) -> None:
    run(source, tmp_path / "q.gguf", "Q4_K_M")
    run(tmp_path / "q.gguf", tmp_path / "back.safetensors", "F32")
    back, blocks = load_file(tmp_path / "back.safetensors"), read_gguf(tmp_path / "q.gguf").tensors
    assert back.keys() == flux().keys()
    assert all(torch.equal(back[n], restored(blocks[n])) for n in back)
    run(tmp_path / "q.gguf", tmp_path / "bf16.safetensors", "BF16")
    assert all(torch.equal(t, back[n].bfloat16()) for n, t in load_file(tmp_path / "bf16.safetensors").items())


def test_from_one_type_to_another(tmp_path: Path, source: Path) -> None:
    run(source, tmp_path / "a.gguf", "gguf-q8-0")
    again = run(tmp_path / "a.gguf", tmp_path / "b.gguf", "gguf-q8-0")
    first, second = (read_gguf(tmp_path / f"{n}.gguf").tensors for n in "ab")
    for name, value in first.items():
        other: Any = second[name]
        if isinstance(value, QuantizedWeight):
            assert torch.equal(value.tensors["qdata"], other.tensors["qdata"])
        else:
            assert torch.equal(value, other)
    assert again.warnings == []
    report = run(tmp_path / "a.gguf", tmp_path / "c.gguf", "gguf-q4-0")
    assert "8 tensors are quantized a second time (from Q8_0), which adds both errors" in report.warnings[0]
    value = read_gguf(tmp_path / "c.gguf").tensors[MLP]
    assert isinstance(value, QuantizedWeight)
    expected = ggml.library().quantize(TYPES["Q4_0"], restored(first[MLP]))
    assert torch.equal(value.tensors["qdata"], expected)


def test_keys_of_a_gguf_source_are_kept(tmp_path: Path, source: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "flux")
    writer.add_string("general.name", "Müller's")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", ""])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0])
    writer.add_string("quantwire.spec", "old")
    writer.add_file_type(1)
    for name, tensor in flux().items():
        writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    run(tmp_path / "a.gguf", tmp_path / "b.gguf", "Q6_K")
    fields = {k: f.contents() for k, f in gguf.GGUFReader(str(tmp_path / "b.gguf")).fields.items()}
    assert (fields["general.name"], fields["tokenizer.ggml.tokens"]) == ("Müller's", ["a", "bc", ""])
    assert fields["tokenizer.ggml.scores"] == [0.5, -1.0]
    assert (fields["quantwire.recipe"], fields["general.file_type"]) == ("Q6_K", 18)
    assert "quantwire.spec" not in fields
    run(tmp_path / "b.gguf", tmp_path / "c.safetensors", "BF16")
    assert read_safetensors(tmp_path / "c.safetensors").metadata["modelspec.title"] == "Müller's"


NATIVE = ["comfy-fp8-e4m3fn", "comfy-fp8-e5m2", "comfy-int8", "comfy-int8-convrot", "comfy-mxfp8", "comfy-nvfp4"]


@pytest.mark.parametrize("format_id", [*NATIVE, "comfy-w4a4-convrot", "comfy-w4a8"])
def test_native_files_of_comfyui(tmp_path: Path, source: Path, format_id: str) -> None:
    """What ComfyUI's loader reads per layer, against comfy-kitchen's own quantization of the same tensor."""
    kitchen: Any = pytest.importorskip("comfy_kitchen.tensor")
    report = run(source, tmp_path / "a.safetensors", format_id)
    found = load_file(tmp_path / "a.safetensors")
    quantizer: Any = get_quantizer(format_id)
    conf = json.loads(bytes(found["double_blocks.0.img_mlp.0.comfy_quant"].tolist()))
    assert conf["format"] == quantizer.native.algo
    options = quantizer.native.options | ({"convrot_groupsize": 256} if quantizer.native.rotated else {})
    expected = kitchen.QuantizedTensor.from_float(flux()[MLP], quantizer.native.layout, **options).state_dict(MLP)
    assert expected.keys() <= found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype
        assert torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name
    assert torch.equal(found["img_in.weight"], flux()["img_in.weight"])
    assert len([n for n in found if n.endswith("comfy_quant")]) == sum(e.action == "quantize" for e in report.entries)
    with pytest.raises(SpecError, match=rf"^A \.gguf file cannot hold {format_id} here"):
        run(source, tmp_path / "a.gguf", format_id)


@pytest.mark.parametrize("format_id", ["comfy-fp8-e4m3fn", "comfy-int8", "comfy-nvfp4"])
def test_native_files_of_odd_sizes(tmp_path: Path, format_id: str) -> None:
    """Large tensors of no whole number of 64 bytes, kept or quantized: no holes, every element at a place of its own
    alignment, and the values that each has alone.
    """
    odd = {"double_blocks.0.img_attn.qkv.weight": whole_numbers(771, WIDTH + 16, step=7).bfloat16()}
    odd |= {"txt_in.weight": whole_numbers(331, 131, step=9).bfloat16()}
    odd |= {"img_in.weight": whole_numbers(333, 65, step=11).float(), "img_in.bias": whole_numbers(333, step=3).float()}
    odd |= {"double_blocks.1.img_mlp.0.weight": whole_numbers(4107, 16, step=9).bfloat16()}
    tensors = flux() | odd
    report = run(save(tmp_path / "in.safetensors", tensors), tmp_path / "a.safetensors", format_id)
    quantized = {e.name for e in report.entries if e.action == "quantize"}
    raw = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = {n: e for n, e in json.loads(raw[8 : 8 + length]).items() if n != "__metadata__"}
    places = sorted(e["data_offsets"] for e in entries.values())
    assert [start for start, _ in places] == [0, *(end for _, end in places[:-1])]
    assert 8 + length + places[-1][1] == len(raw)
    sizes = {"F32": 4, "BF16": 2}
    assert not [n for n, e in entries.items() if e["data_offsets"][0] % sizes.get(e["dtype"], 1)]
    assert [e for e in entries.values() if (e["data_offsets"][1] - e["data_offsets"][0]) % 64 and e["dtype"] == "BF16"]
    found = load_file(tmp_path / "a.safetensors")
    for name in tensors.keys() - quantized:
        assert torch.equal(found[name], tensors[name]), name
    kitchen: Any = pytest.importorskip("comfy_kitchen.tensor")
    native: Any = get_quantizer(format_id).native
    for name in quantized:
        json.loads(bytes(found[f"{name.removesuffix('weight')}comfy_quant"].tolist()))
        expected = kitchen.QuantizedTensor.from_float(tensors[name], native.layout, **native.options).state_dict(name)
        for key, t in expected.items():
            assert torch.equal(found[key].flatten().view(torch.uint8), t.flatten().view(torch.uint8)), key


def test_threads_of_a_native_conversion(tmp_path: Path, source: Path) -> None:
    seen: list[int] = []
    before = torch.get_num_threads()
    request = Request(source, tmp_path / "a.safetensors", "comfy-int8", threads=3)
    spec = quantizing.quantized_spec(request)
    assert spec is not None
    quantizing.run(quantizing.plan_quantized(request, spec), lambda nbytes: seen.append(torch.get_num_threads()))
    assert set(seen) == {3}
    assert torch.get_num_threads() == before


# Interruptions and full disks


CHILD = """
import sys
from quantwire.quantizers.files import journal
journal.SYNC_S = 0.0
from quantwire.cli import main
sys.exit(main(sys.argv[1:]))
"""


def wait_for_lines(path: Path, lines: int, child: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 100
    while time.monotonic() < end and child.poll() is None:
        if path.exists() and path.read_text(encoding="utf-8").count("\n") >= lines:
            return
        time.sleep(0.01)
    raise AssertionError(f"no journal: {child.poll()}")


@pytest.fixture(scope="module")
def slow_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("slow") / "flux.safetensors", flux(blocks=8, width=512))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill-9", "ctrl-c"])
def test_a_second_run_continues(tmp_path: Path, slow_source: Path, how: signal.Signals) -> None:
    target = tmp_path / "a.gguf"
    target.write_bytes(b"old")
    command = [sys.executable, "-c", CHILD, "convert", str(slow_source), str(target), "--type", "IQ3_S", "--overwrite"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_lines(tmp_path / "a.gguf.partial.jsonl", 8, child)
    os.kill(child.pid, how)
    _, said = child.communicate(timeout=60)
    assert child.returncode == (-9 if how == signal.SIGKILL else 130)
    assert how == signal.SIGKILL or "interrupted; the same conversion continues from a.gguf.partial" in said
    assert target.read_bytes() == b"old"
    done = len((tmp_path / "a.gguf.partial.jsonl").read_text().splitlines()) - 1
    report = run(slow_source, target, "IQ3_S", overwrite=True)
    assert f"continued an interrupted conversion: {done} tensors were there" in report.notes
    assert done >= 7
    assert len(report.entries) == len(flux(8))
    run(slow_source, tmp_path / "whole.gguf", "IQ3_S")
    assert sha256(target) == sha256(tmp_path / "whole.gguf")
    assert names_in(tmp_path) in (["a.gguf", "whole.gguf"], ["a.gguf", "a.gguf.partial.lock", "whole.gguf"])


class _Stop(Exception):
    """What a host raises to interrupt."""


def interrupt(source: Path, target: Path, kind: str, **options: Any) -> None:
    def stop(nbytes: int) -> None:
        raise _Stop

    with pytest.raises(_Stop):
        convert.run_conversion(plan_conversion(Request(source, target, kind, threads=1, **options)), stop)


def test_what_changed_starts_over(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "a.gguf"
    interrupt(source, target, "Q8_0")
    assert names_in(tmp_path) == ["a.gguf.partial", "a.gguf.partial.jsonl", "flux.safetensors"]
    report = run(source, target, "Q8_0")
    assert "continued an interrupted conversion: 0 tensors were there" in report.notes
    interrupt(source, target, "Q4_0", overwrite=True)
    report = run(source, target, "Q8_0", overwrite=True)
    assert "an interrupted conversion was started over: type Q4_0 there, Q8_0 here" in report.notes
    assert sha256(target) == GOLDEN["Q8_0"]
    interrupt(source, target, "Q8_0", overwrite=True)
    changed = flux() | {MLP: torch.zeros(2 * WIDTH, WIDTH, dtype=torch.bfloat16)}
    report = run(save(source, changed), target, "Q8_0", overwrite=True)
    assert any(
        n.startswith("an interrupted conversion was started over: the source is another one") for n in report.notes
    )
    assert not restored(read_gguf(target).tensors[MLP]).any()


def test_a_mistyped_second_command_is_refused(tmp_path: Path, slow_source: Path, capsys: Any) -> None:
    target, done = tmp_path / "a.gguf", Bar()

    def stop(nbytes: int) -> None:
        done.update(1)
        if done.nbytes > 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.run_conversion(plan_conversion(Request(slow_source, target, "Q8_0", threads=1)), stop)
    kept = (tmp_path / "a.gguf.partial.jsonl").read_bytes()
    command = ["convert", str(slow_source), str(target), "--type"]
    assert main([*command, "Q4_0"]) == 2
    assert "tensors done: type Q8_0 there, Q4_0 here.\n" in capsys.readouterr().err
    assert main([*command, "Q8_0", "--keep", "img_in"]) == 2
    assert "other rules, layers to keep or architecture" in capsys.readouterr().err
    assert main([*command, "Q4_0", "--dry-run"]) == 0
    assert "type Q8_0 there, Q4_0 here; this one would be refused (--restart to start over)" in capsys.readouterr().out
    assert main([*command, "Q8_0", "--dry-run"]) == 0
    assert "it would continue" in capsys.readouterr().out
    assert (tmp_path / "a.gguf.partial.jsonl").read_bytes() == kept
    assert main([*command, "Q4_0", "--restart"]) == 0
    said = capsys.readouterr()
    assert (said.out + said.err).count("an interrupted conversion was started over: as asked for") == 1
    run(slow_source, tmp_path / "b.gguf", "Q4_0")
    assert sha256(target) == sha256(tmp_path / "b.gguf")


@pytest.mark.parametrize("damage", ['{"journal": 1', '{"journal": 1}\nnot json\n', '{"journal": 1}\n[1]\n'])
def test_a_damaged_journal_starts_over(tmp_path: Path, source: Path, damage: str) -> None:
    interrupt(source, tmp_path / "a.gguf", "Q8_0")
    (tmp_path / "a.gguf.partial.jsonl").write_text(damage)
    run(source, tmp_path / "a.gguf", "Q8_0")
    assert sha256(tmp_path / "a.gguf") == GOLDEN["Q8_0"]


def test_a_journal_whose_last_line_was_cut_off(tmp_path: Path, slow_source: Path) -> None:
    target, done = tmp_path / "a.gguf", Bar()

    def stop(nbytes: int) -> None:
        done.update(1)
        if done.nbytes > 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.run_conversion(plan_conversion(Request(slow_source, target, "Q8_0", threads=1)), stop)
    lines = tmp_path / "a.gguf.partial.jsonl"
    kept = lines.read_bytes()
    assert kept.count(b"\n") > 5
    lines.write_bytes(kept[:-20])
    done = Bar()
    with pytest.raises(KeyboardInterrupt):
        convert.run_conversion(plan_conversion(Request(slow_source, target, "Q8_0", threads=1)), stop)
    there = lines.read_bytes().count(b"\n") - 1  # all of them are read again: none is glued to what was cut off
    assert there > 7
    report = run(slow_source, target, "Q8_0")
    assert f"continued an interrupted conversion: {there} tensors were there" in report.notes
    run(slow_source, tmp_path / "b.gguf", "Q8_0")
    assert sha256(target) == sha256(tmp_path / "b.gguf")


def test_two_conversions_of_one_file(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "a.gguf"
    with (
        journal.partial(target, 100, {}),
        pytest.raises(FileError, match=r"another conversion is writing this file"),
    ):
        run(source, target, "Q8_0")


UNLOCKED = """
import errno, fcntl, sys
def refuse(*_):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = refuse
from quantwire.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_processes_without_file_locks(tmp_path: Path, slow_source: Path, overwrite: bool) -> None:
    """As on NFS or SMB: neither takes the other's file for its own."""
    target = tmp_path / "out" / "a.gguf"
    more = ["--overwrite"] if overwrite else []
    children = [
        subprocess.Popen(
            [sys.executable, "-c", UNLOCKED, "convert", str(slow_source), str(target), "--type", kind, *more],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for kind in ("Q8_0", "Q4_0")
    ]  # fmt: skip
    said = [child.communicate(timeout=100)[0] for child in children]
    codes = [child.returncode for child in children]
    assert sorted(codes) == ([0, 0] if overwrite else [0, 2]), said
    for code, text in zip(codes, said, strict=True):
        assert "no file locks in this folder" in text if code == 0 else "there already" in text or "came to be" in text
    wholes: list[str] = []
    for kind, code in zip(("Q8_0", "Q4_0"), codes, strict=True):
        run(slow_source, tmp_path / f"{kind}.gguf", kind)
        wholes += [sha256(tmp_path / f"{kind}.gguf")] if code == 0 else []
    assert sha256(target) in wholes
    assert [n for n in names_in(target.parent) if not n.endswith(".lock")] == ["a.gguf"]


@pytest.mark.parametrize("name", ["a.gguf.partial", "a.gguf.partial.jsonl", "a.gguf.partial.lock"])
@pytest.mark.parametrize("kind", ["Q8_0", "BF16", "comfy-int8"])
def test_a_source_at_the_name_of_the_partial_file(tmp_path: Path, source: Path, name: str, kind: str) -> None:
    target = tmp_path / ("a.safetensors" if kind == "comfy-int8" else "a.gguf")
    path = source.rename(tmp_path / name.replace("a.gguf", target.name))
    before = sha256(path)
    with pytest.raises(FileError, match=r"is read by this conversion, and a\.\w+ is written through this name"):
        run(path, target, kind)
    assert sha256(path) == before
    assert names_in(tmp_path) == [path.name]


def test_a_shard_or_the_imatrix_at_the_name_of_the_partial_file(tmp_path: Path, source: Path) -> None:
    tensors = flux()
    shard = save(tmp_path / "model" / "a.gguf.partial", tensors)
    index = tmp_path / "model" / "a.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard.name)}))
    with pytest.raises(FileError, match=r"a\.gguf\.partial' is read by this conversion"):
        run(index, tmp_path / "model" / "a.gguf", "Q8_0")
    assert shard.exists()
    matrix = tmp_path / "b.gguf.partial"
    write_imatrix(matrix, Imatrix({MLP: Sums(torch.ones(1, WIDTH).double(), torch.tensor([1]))}))
    for target in ("b.gguf", "b.gguf.partial.gguf"):
        if target.endswith("partial.gguf"):
            matrix = matrix.rename(tmp_path / target)
        with pytest.raises(FileError, match=r"is read by this conversion"):
            run(source, tmp_path / target, "Q4_0", imatrix=matrix, overwrite=True)
        assert matrix.exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from quantwire.quantizers.files import quantizing as q
from quantwire.quantizers.files.convert_plan import Request
request = Request(Path(sys.argv[1]), Path(sys.argv[2]), "comfy-int8")
q.run(q.plan_quantized(request, q.quantized_spec(request)), lambda n: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_killed_conversions_to_a_native_format_continue(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "out" / "a.safetensors"
    for _ in range(2):
        command = [sys.executable, "-c", KILLED, str(source), str(target)]
        assert subprocess.run(command, check=False, timeout=100).returncode == -9
        left = ["a.safetensors.partial", "a.safetensors.partial.jsonl", "a.safetensors.partial.lock"]
        assert names_in(target.parent) == left
    report = run(source, target, "comfy-int8")
    assert any(n.startswith("continued an interrupted conversion: ") for n in report.notes)
    run(source, tmp_path / "b.safetensors", "comfy-int8")
    assert sha256(target) == sha256(tmp_path / "b.safetensors")
    assert [n for n in names_in(target.parent) if not n.endswith(".lock")] == ["a.safetensors"]


def test_a_native_conversion_takes_the_lock(tmp_path: Path, source: Path) -> None:
    with (
        journal.partial(tmp_path / "a.safetensors", 100, {}),
        pytest.raises(FileError, match=r"another conversion is writing this file"),
    ):
        run(source, tmp_path / "a.safetensors", "comfy-int8")


def limited(nbytes: int) -> Any:
    def before() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))

    return before


@pytest.mark.parametrize("target", ["a.gguf", "a.safetensors"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, source: Path, target: str) -> None:
    path = tmp_path / "out" / target
    path.parent.mkdir()
    path.write_bytes(b"old")
    kind = "Q8_0" if target.endswith("gguf") else "comfy-int8"
    command = [sys.executable, "-c", CHILD, "convert", str(source), str(path), "--type", kind, "--overwrite"]
    done = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=limited(100_000), check=False, timeout=100
    )
    assert done.returncode == 2, done.stderr
    assert f"FileError: {path}: cannot be written: File too large." in done.stderr
    assert "Free " not in done.stderr
    assert "`ulimit -f`" in done.stderr
    assert path.read_bytes() == b"old"
    assert names_in(path.parent) == [target]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(
    "target", ["Q8_0.gguf", "Q4_K_M.gguf", "BF16.gguf", "BF16.safetensors", "comfy-int8.safetensors"]
)
def test_fp8_without_scales_is_taken_for_its_values(tmp_path: Path, dtype: torch.dtype, target: str) -> None:
    eight = {n: t.to(dtype) for n, t in flux().items()}
    save(tmp_path / "a" / "m.safetensors", eight)
    save(tmp_path / "b" / "m.safetensors", {n: t.to(torch.bfloat16) for n, t in eight.items()})
    kind = target.partition(".")[0]
    report, _ = (run(tmp_path / f / "m.safetensors", tmp_path / f / target, kind) for f in "ab")
    if target.endswith(".safetensors"):  # their metadata tells them apart
        a, b = (load_file(tmp_path / f / target) for f in "ab")
        assert a.keys() == b.keys()
        assert all(a[n].dtype is t.dtype and torch.equal(a[n], t) for n, t in b.items())
    else:
        assert sha256(tmp_path / "a" / target) == sha256(tmp_path / "b" / target)
    name = "F8_E4M3" if dtype is torch.float8_e4m3fn else "F8_E5M2"
    if kind == "BF16":
        assert f"{len(eight)} tensors are dequantized (from {name}); what quantizing lost stays lost" in report.notes
    else:
        assert any("quantized a second time" in w and "SQNR is that of the second" in w for w in report.warnings)
    assert report.nbytes_in == sum(t.numel() for t in eight.values())


def test_the_report_of_the_way_back(tmp_path: Path, source: Path) -> None:
    run(source, tmp_path / "a.gguf", "Q4_0")
    said = str(run(tmp_path / "a.gguf", tmp_path / "b.safetensors", "BF16"))
    assert said.startswith(f"b.safetensors: {len(flux())} tensors, BF16\n")
    assert "are dequantized (from Q4_0); what quantizing lost stays lost" in said
    assert "kept at full precision" not in said


def test_progress_without_a_terminal(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["convert", str(source), str(tmp_path / "a.gguf"), "--type", "Q8_0", "--overwrite"]
    assert main(command) == 0
    assert not capsys.readouterr().err, "it takes less than the time between two lines"
    monkeypatch.setattr(command_module, "PERIOD_S", 0.0)
    assert main(command) == 0
    *_, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"100%: (\d+) of \1 MiB after 0 s", last)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--threads", "0"], "FileError: --threads: 0 is not a number of threads."),
        (["--keep", "re:("], "SpecError: Layer pattern 're:(' is no regular expression: missing )"),
        (["--rules", "rules.txt"], "SpecError: Line 2: Layer pattern 're:(' is no regular expression: missing )"),
    ],
)
def test_bad_options(
    tmp_path: Path, source: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rules.txt").write_text("img_in = keep\nre:( = Q8_0\n")
    assert main(["convert", str(source), "a.gguf", "--type", "Q4_0", *arguments]) == 2
    assert capsys.readouterr().err.startswith(said)


# Refusals


def adapter() -> dict[str, Tensor]:
    return {f"double_blocks.0.img_attn.qkv.lora_{part}.weight": torch.zeros(4, 64) for part in ("A", "B")}


def vae() -> dict[str, Tensor]:
    names = ("decoder.conv_in.weight", "encoder.conv_in.weight", "decoder.mid.block_1.conv1.weight")
    return {n: torch.zeros(8, 4, 3, 3) for n in names}


def with_value(value: float, name: str = MLP) -> dict[str, Tensor]:
    tensors = flux(dtype=torch.float32)
    tensors[name].view(-1)[5] = value
    return tensors


@pytest.mark.parametrize(
    ("tensors", "kind", "error", "said"),
    [
        pytest.param(vae(), "Q8_0", FileError, "VAE", id="vae"),
        pytest.param(adapter(), "Q8_0", FileError, "LoRA", id="lora"),
        pytest.param(with_value(torch.nan), "Q4_K_M", WeightError, f"'{MLP}': 1 of 131072 values are nan", id="nan"),
        pytest.param(with_value(torch.inf), "Q8_0", WeightError, f"'{MLP}': 1 of 131072 values are", id="inf"),
        pytest.param(
            with_value(torch.nan, "img_in.bias"), "Q8_0", WeightError, "'img_in.bias': 1 of 256 values", id="nan-kept"
        ),
        pytest.param(with_value(1e38), "Q4_0", WeightError, f"'{MLP}': ", id="beyond-every-type"),
        pytest.param(with_value(1e6), "Q4_0", WeightError, f"'{MLP}': gguf-q4-0 gives non-finite", id="beyond-float16"),
        pytest.param(with_value(1e5), "F16", WeightError, f"'{MLP}': has values beyond float16", id="f16"),
        pytest.param(flux(), "Q4_KM", SpecError, "Did you mean Q4_K_M", id="type"),
        pytest.param(flux(), "bnb-nf4", SpecError, "A .gguf file cannot hold bnb-nf4", id="backend"),
        pytest.param(flux(), "IQ1_S", SpecError, "needs an importance matrix", id="needs-importance"),
        pytest.param(
            flux() | {"x.weight": torch.zeros(8, 8, dtype=torch.float64)}, "Q8_0", WeightError,
            "'x.weight': dtype is torch.float64", id="float64",
        ),
        pytest.param(
            flux() | {"img_in.comfy_quant": torch.zeros(8, dtype=torch.uint8)}, "Q8_0", FileError,
            "'img_in.comfy_quant' does not hold a JSON object (and 1 more).\n`quantwire doctor", id="quantized",
        ),
    ],
)  # fmt: skip
def test_refusals_leave_the_old_file(
    tmp_path: Path, tensors: dict[str, Tensor], kind: str, error: type[QuantwireError], said: str
) -> None:
    path = save(tmp_path / "in.safetensors", tensors)
    (tmp_path / "a.gguf").write_bytes(b"old")
    with pytest.raises(error) as caught:
        run(path, tmp_path / "a.gguf", kind, overwrite=True)
    assert said in str(caught.value)
    assert (tmp_path / "a.gguf").read_bytes() == b"old"
    assert names_in(tmp_path) == ["a.gguf", "in.safetensors"]


def test_what_is_no_model_file(tmp_path: Path, source: Path) -> None:
    (tmp_path / "text.safetensors").write_text("this is no model, and it is longer than eight bytes")
    (tmp_path / "config.json").write_text('{"model": 1}')
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "damaged.gguf").write_bytes(b"XXUF" + bytes(200))
    write_imatrix(tmp_path / "matrix.gguf", Imatrix({MLP: Sums(torch.ones(1, 4).double(), torch.tensor([1]))}))
    (tmp_path / "pickle.pt").write_bytes(b"PK\3\4" + bytes(20))
    (tmp_path / "old.gguf").write_bytes(b"old")
    (tmp_path / "pipeline" / "transformer").mkdir(parents=True)
    save(tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors", flux())
    cases = {
        ("text.safetensors", "a.gguf"): "text.safetensors: a text file, no model",
        ("config.json", "a.gguf"): "config.json: a text file, no model",
        ("empty.gguf", "a.gguf"): "empty.gguf: is empty",
        ("damaged.gguf", "a.gguf"): "damaged.gguf: not a GGUF file (it begins with b'XXUF')",
        ("matrix.gguf", "a.gguf"): "holds an importance matrix, and a conversion reads a model.\nIt goes to",
        ("https://host/a.safetensors", "a.gguf"): "is an address, and only files are read here.\nDownload",
        ("pickle.pt", "a.gguf"): "a file of torch.save is not read",
        ("flux.safetensor", "a.gguf"): "Did you mean flux.safetensors",
        ("flux.safetensors", "a.bin"): "the target is a .gguf or .safetensors file, got '.bin'",
        ("flux.safetensors", "old.gguf"): "is there already.\nUse --overwrite",
        ("flux.safetensors", "flux.safetensors"): "is the source itself",
        ("pipeline", "a.gguf"): "Give one of its components: ",
    }
    for (name, target), said in cases.items():
        with pytest.raises(FileError) as caught:
            run(Path(name) if "://" in name else tmp_path / name, tmp_path / target, "BF16")
        assert said in str(caught.value), name
    with pytest.raises(SpecError, match=r"^A safetensors file cannot hold the GGUF type Q4_K_M"):
        run(source, tmp_path / "a.safetensors", "Q4_K_M")


def test_a_source_that_changes_meanwhile(tmp_path: Path, source: Path) -> None:
    plan = plan_conversion(Request(source, tmp_path / "a.gguf", "Q8_0"))
    save(source, flux() | {"img_in.bias": torch.ones(WIDTH, dtype=torch.bfloat16)})
    with pytest.raises(FileError, match=r"changed while it was read"):
        convert.run_conversion(plan)
    assert names_in(tmp_path) == ["flux.safetensors"]


# What was measured


def test_sampled_and_full_measurement(tmp_path: Path, source: Path) -> None:
    sampled = run(source, tmp_path / "a.gguf", "Q4_K_M")
    full = run(source, tmp_path / "b.gguf", "Q4_K_M", measure=True)
    assert sha256(tmp_path / "a.gguf") == sha256(tmp_path / "b.gguf")
    assert any("one row in 16" in note for note in sampled.notes)
    assert not any("one row in 16" in note for note in full.notes)
    entry = next(e for e in full.entries if e.name == MLP)
    value = restored(read_gguf(tmp_path / "a.gguf").tensors[MLP])
    w = flux()[MLP].float()
    exact = 10 * torch.log10(w.square().sum() / (w - value).square().sum())
    assert entry.sqnr_db == pytest.approx(float(exact), abs=0.01)
    near = next(e for e in sampled.entries if e.name == MLP)
    assert near.sqnr_db == pytest.approx(entry.sqnr_db, abs=1.0)
    assert full.nbytes_in == sum(t.nbytes for t in flux().values())


# Command line


def test_command_line(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, rules = tmp_path / "out" / "a.gguf", tmp_path / "rules.txt"
    rules.write_text("# attention\n*.img_attn.qkv = Q6_K\n")
    arguments = ["convert", str(source), str(target), "--type", "q4_k_m", "--rules", str(rules), "--keep", "img_mlp.2"]
    assert main([*arguments, "--dry-run", "--json", str(tmp_path / "plan.json")]) == 0
    assert "nothing was written" in capsys.readouterr().out
    plan = json.loads((tmp_path / "plan.json").read_text())["plan"]
    types = {t["name"]: t["type"] for t in plan["tensors"]}
    assert types["double_blocks.0.img_attn.qkv.weight"] == "Q6_K"
    assert not target.exists()
    assert main([*arguments, "--threads", "1", "--measure", "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())["report"]
    assert target.stat().st_size == plan["nbytes"]
    assert {e["name"]: e["format_id"] for e in report["entries"]}[MLP] == "gguf-q4-k"
    assert "in gguf-q6-k" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "is there already" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--arch", "sd3"]) == 0
    fields = gguf.GGUFReader(str(target)).fields
    assert fields["general.architecture"].contents() == "sd3"
    assert main([*arguments, "--overwrite", "--rules", str(tmp_path / "none.txt")]) == 2
    assert main([*arguments, "--overwrite", "--threads", "-1"]) == 2


@pytest.mark.slow
def test_diffusers_reads_what_we_write(tmp_path: Path) -> None:
    """From a sharded diffusers folder to a file in ComfyUI's layout, and back by diffusers' own single-file loader.

    Its converter assumes FLUX.1's width, hence the size. Measured: Q8_0 0.0021, Q4_K_M 0.0045.
    """
    diffusers: Any = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    config = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 128, "num_attention_heads": 24}
    config |= {"joint_attention_dim": 256, "pooled_projection_dim": 64, "guidance_embeds": True}
    with torch.no_grad():
        model = diffusers.FluxTransformer2DModel(**config).to(torch.bfloat16)
        inputs: dict[str, Any] = {
            "hidden_states": torch.randn(1, 16, 64), "encoder_hidden_states": torch.randn(1, 8, 256),
            "pooled_projections": torch.randn(1, 64), "timestep": torch.tensor([0.5]), "guidance": torch.tensor([3.5]),
            "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3),
        }  # fmt: skip
        inputs = {n: t.bfloat16() for n, t in inputs.items()}
        expected = model(**inputs).sample.float()
        model.save_pretrained(tmp_path / "transformer", max_shard_size="400MB")
        del model
        for kind, bound in (("Q8_0", 0.005), ("Q4_K_M", 0.01)):
            path = tmp_path / f"{kind}.gguf"
            run(tmp_path / "transformer", path, kind)
            loaded = diffusers.FluxTransformer2DModel.from_single_file(
                str(path),
                quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.bfloat16),
                config=str(tmp_path / "transformer"),
                torch_dtype=torch.bfloat16,
            )
            found = loaded(**inputs).sample.float()
            error = float((found - expected).norm() / expected.norm())
            assert error < bound, (kind, error)
            del loaded
