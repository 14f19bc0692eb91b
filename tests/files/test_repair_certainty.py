"""What looks like a fault with one way out, and is none: the doctor names it and leaves the file alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.files.doctor import Diagnosis, Finding, diagnose
from quantwire.quantizers.files.edits import Edit, New, merged
from quantwire.quantizers.files.model_file import open_model
from quantwire.quantizers.files.repair import repair
from quantwire.quantizers.files.writers.comfy import ComfyMetadataWriter, ComfyWriter
from quantwire.quantizers.registry import require
from quantwire.quantizers.spec import QuantSpec
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

METADATA = "_quantization_metadata"
PT = {"format": "pt"}
FP8 = torch.ones(64, 64).to(torch.float8_e4m3fn)
BF16 = torch.ones(4, 4, dtype=torch.bfloat16)


def said(conf: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(conf).encode()), dtype=torch.uint8)


def comfy(format_id: str, *names: str, n: int = 128, k: int = 256) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for i, name in enumerate(names):
        rng = torch.Generator().manual_seed(i)
        weight = require(format_id).quantize(torch.randn(n, k, generator=rng), QuantSpec(format_id))
        tensors |= ComfyWriter().tensors(f"{name}.weight", weight)
    return tensors


def in_metadata(format_id: str, *names: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    writer, tensors, notes = ComfyMetadataWriter(), dict[str, Tensor](), dict[str, Any]()
    for name in names:
        weight = require(format_id).quantize(torch.randn(128, 256), QuantSpec(format_id))
        tensors |= writer.tensors(f"{name}.weight", weight)
        notes[f"{name}.weight"] = writer.note(f"{name}.weight", weight)
    return tensors, PT | dict(writer.metadata(notes))


def saved(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = PT) -> Path:
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def look(folder: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = PT) -> Diagnosis:
    return diagnose(saved(folder / "a.safetensors", tensors, metadata))


def of(found: Diagnosis, code: str) -> Finding:
    (finding,) = [f for f in found.findings if f.code == code]
    return finding


def codes(found: Diagnosis) -> list[tuple[str, str]]:
    return [(f.severity.value, f.code) for f in found.findings]


# Naming


def nvfp4_as_others_write_it() -> dict[str, Tensor]:
    """Block scales as a plain matrix of a size that whole tiles have too."""
    return {
        "a.weight": torch.randint(0, 256, (128, 128), dtype=torch.uint8),
        "a.weight_scale": torch.rand(128, 16).to(torch.float8_e4m3fn),
        "a.weight_scale_2": torch.tensor(1e-3),
        "a.input_scale": torch.tensor(1e-2),
    }


def test_block_scales_that_may_be_a_matrix_are_not_named(tmp_path: Path) -> None:
    assert not of(look(tmp_path, nvfp4_as_others_write_it()), "comfy-quant-missing").fix


def test_a_named_layer_tells_that_block_scales_are_in_tiles(tmp_path: Path) -> None:
    tensors = comfy("comfy-nvfp4", "a", "b")
    del tensors["a.comfy_quant"]
    found = look(tmp_path, tensors)
    assert of(found, "comfy-quant-missing").fix
    assert repair(found.path, tmp_path / "b.safetensors").after.findings == ()


def test_a_matrix_elsewhere_tells_that_they_are_not(tmp_path: Path) -> None:
    tensors = {**nvfp4_as_others_write_it(), **comfy("comfy-nvfp4", "b", n=80)}
    del tensors["b.comfy_quant"]
    tensors["b.weight_scale"] = torch.rand(80, 16).to(torch.float8_e4m3fn)
    assert not of(look(tmp_path, tensors), "comfy-quant-missing").fix


def test_a_format_that_is_not_known_stays(tmp_path: Path) -> None:
    tensors = comfy("comfy-nvfp4", "a", "b")
    tensors["a.comfy_quant"] = said({"format": "nvfp4_linear_v2", "rotation": "hadamard"})
    assert not of(look(tmp_path, tensors), "format-unknown").fix


def test_options_of_another_format_stay(tmp_path: Path) -> None:
    tensors = comfy("comfy-fp8-e4m3fn", "a", "b")
    tensors["a.comfy_quant"] = said({"format": "int8_tensorwise", "convrot": True})
    assert not of(look(tmp_path, tensors), "tensor-dtype").fix


def test_other_keys_are_kept(tmp_path: Path) -> None:
    tensors = comfy("comfy-fp8-e4m3fn", "a")
    tensors["a.comfy_quant"] = said({"format": "float8_e5m2", "full_precision_matrix_mult": True})
    done = repair(look(tmp_path, tensors).path, tmp_path / "b.safetensors")
    told = load_file(done.target)["a.comfy_quant"].numpy().tobytes()
    assert json.loads(told) == {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}


def test_an_unrotated_layer_among_rotated_ones_is_not_named(tmp_path: Path) -> None:
    tensors = {**comfy("comfy-int8-convrot", "a", "b"), **comfy("comfy-int8", "c")}
    del tensors["c.comfy_quant"]
    assert not of(look(tmp_path, tensors), "comfy-quant-missing").fix


def test_fp8_with_a_scale_a_row_is_not_named(tmp_path: Path) -> None:
    tensors = {"a.weight": FP8, "a.weight_scale": torch.rand(64, 1)}
    assert not of(look(tmp_path, tensors), "comfy-quant-missing").fix


def test_a_layer_that_moved_keeps_its_name_in_the_metadata(tmp_path: Path) -> None:
    tensors, metadata = in_metadata("comfy-int8-convrot", "x.a", "x.b")
    found = look(tmp_path, {n.replace("x.a", "y.a"): t for n, t in tensors.items()}, metadata)
    assert not of(found, "layer-missing").fix
    assert not of(found, "comfy-quant-missing").fix


@pytest.mark.parametrize("layers", [[["a", {"format": "nvfp4"}]], "a", 3, None])
def test_layers_in_the_metadata_that_are_no_object(tmp_path: Path, layers: Any) -> None:
    tensors = comfy("comfy-nvfp4", "a", "b", n=80)
    del tensors["a.comfy_quant"]
    found = look(tmp_path, tensors, PT | {METADATA: json.dumps({"layers": layers})})
    assert of(found, "comfy-quant-missing").fix
    after = repair(found.path, tmp_path / "b.safetensors").after
    assert codes(after) == [("error", "metadata-json")]


# Scales


@pytest.mark.parametrize(
    ("rows", "columns", "shape", "mended"),
    [(64, 64, (1, 64), False), (64, 64, (64,), True), (64, 32, (1, 64), True)],
    ids=["may-be-columns", "flat", "rows"],
)
def test_scales_of_rows_or_columns(
    tmp_path: Path, rows: int, columns: int, shape: tuple[int, ...], mended: bool
) -> None:
    weight = torch.ones(rows, columns, dtype=torch.int8)
    tensors = {
        "a.weight": weight, "a.weight_scale": torch.rand(shape), "a.comfy_quant": said({"format": "int8_tensorwise"}),
    }  # fmt: skip
    assert bool(of(look(tmp_path, tensors), "scale-shape").fix) is mended


@pytest.mark.parametrize("shape", [(64,), (1, 64)])
def test_scales_of_fp8_do_not_become_one_a_row(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {
        "a.weight": FP8[:, :32], "a.weight_scale": torch.rand(shape), "a.comfy_quant": said({"format": "float8_e4m3fn"})
    }  # fmt: skip
    assert not of(look(tmp_path, tensors), "scale-shape").fix


def test_one_scale_a_row_is_an_error_for_comfyui(tmp_path: Path) -> None:
    tensors = {
        "a.weight": FP8, "a.weight_scale": torch.rand(64, 1), "a.comfy_quant": said({"format": "float8_e4m3fn"})
    }  # fmt: skip
    assert codes(look(tmp_path, tensors)) == [("error", "scale-rows")]


@pytest.mark.parametrize("format_id", ["comfy-fp8-e4m3fn", "comfy-nvfp4", "comfy-int8", "comfy-w4a4-convrot"])
def test_half_scales_are_a_note(tmp_path: Path, format_id: str) -> None:
    half = {n: t.half() if t.dtype == torch.float32 else t for n, t in comfy(format_id, "a").items()}
    assert codes(look(tmp_path, half)) == [("note", "scale-dtype")]


def test_float64_scales_that_float32_does_not_hold_stay(tmp_path: Path) -> None:
    tensors = comfy("comfy-int8", "a")
    tensors["a.weight_scale"] = tensors["a.weight_scale"].double() * (1 + 1e-12)
    found = of(look(tmp_path, tensors), "tensor-dtype")
    assert not found.fix
    assert "stops with an error" in found.effect


# Places


@pytest.mark.parametrize("part", ["input_scale", "weight_scale"])
@pytest.mark.parametrize("prefix", ["model.", "model.diffusion_model."])
def test_scales_do_not_go_to_a_weight_without_codes(tmp_path: Path, prefix: str, part: str) -> None:
    tensors = {f"{prefix}layers.0.q.{part}": torch.tensor(2.0), "layers.0.q.weight": BF16}
    found = look(tmp_path, tensors)
    assert codes(found) == [("warning", "scale-without-weight")]
    assert found.edit is None


def scaled(prefix: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {"norm.weight": BF16}
    for i in range(2):
        tensors |= {f"{prefix}{i}.weight": FP8 if i else FP8[:32], f"{prefix}{i}.scale_weight": torch.tensor(0.5)}
    return tensors


@pytest.mark.parametrize(
    ("prefix", "marker"),
    [
        ("model.layers.", "scaled_fp8"),
        ("blocks.", "scaled_fp8"),
        ("model.diffusion_model.blocks.", "model.diffusion_model.scaled_fp8"),
        ("text_encoders.t5xxl.transformer.", ""),
        ("model.model.", ""),
    ],
)
def test_where_a_marker_is_put(tmp_path: Path, prefix: str, marker: str) -> None:
    fix = of(look(tmp_path, scaled(prefix)), "scaled-fp8-missing").edit
    assert list(fix.add if fix else ()) == ([marker] if marker else [])


def test_a_marker_at_the_root_of_a_checkpoint(tmp_path: Path) -> None:
    tensors = scaled("model.diffusion_model.") | {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    found = look(tmp_path, tensors)
    assert codes(found) == [("warning", "marker-prefix")]
    done = repair(found.path, tmp_path / "b.safetensors")
    assert done.after.findings == ()
    assert load_file(done.target)["model.diffusion_model.scaled_fp8"].shape == (2,)


# What is no fault


def test_a_mask_may_hide_places(tmp_path: Path) -> None:
    mask = torch.triu(torch.full((8, 8), float("-inf")), 1)
    assert codes(look(tmp_path, {"text_model.attn_mask": mask})) == []
    assert codes(look(tmp_path, {"text_model.weight": mask})) == [("error", "not-finite")]
    mask[0, 0] = float("nan")
    assert codes(look(tmp_path, {"text_model.attn_mask": mask})) == [("error", "not-finite")]


def test_defaults_do_not_disagree(tmp_path: Path) -> None:
    tensors = comfy("comfy-int8", "a")

    def told(conf: dict[str, Any]) -> dict[str, str]:
        return PT | {METADATA: json.dumps({"layers": {"a": {"format": "int8_tensorwise", **conf}}})}

    assert codes(look(tmp_path, tensors, told({"convrot": False}))) == []
    assert codes(look(tmp_path, tensors, told({"convrot": True}))) == [("warning", "metadata-disagrees")]


def test_numbers_as_words_are_read_as_comfyui_reads_them(tmp_path: Path) -> None:
    tensors = comfy("comfy-int8-convrot", "a")
    for word, expected in (("256", []), ("many", [("error", "comfy-quant")])):
        conf = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": word}
        assert codes(look(tmp_path, tensors | {"a.comfy_quant": said(conf)})) == expected


# Headers


def header_of(path: Path, header: Any, nbytes: int) -> Path:
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(nbytes))
    return path


@pytest.mark.parametrize("name", ["a\nb", "x" * 1100])
def test_names_that_safetensors_takes(tmp_path: Path, name: str) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    path = header_of(tmp_path / "a.safetensors", {name: entry}, 8)
    assert list(load_file(path)) == [name]
    (found,) = diagnose(path).findings
    assert (found.code, found.effect) == ("header-name", "Not read by this pack; safetensors takes it.")


def test_dimensions_that_safetensors_takes(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [1] * 65, "data_offsets": [0, 4]}
    path = header_of(tmp_path / "a.safetensors", {"a": entry}, 4)
    with safe_open(path, "np") as file:
        assert len(file.get_slice("a").get_shape()) == 65
    (found,) = diagnose(path).findings
    assert (found.code, found.effect) == ("header-dimensions", "Not read by this pack; safetensors takes it.")


def test_metadata_of_null_are_none(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    path = header_of(tmp_path / "a.safetensors", {"__metadata__": None, "a": entry}, 8)
    assert list(load_file(path)) == ["a"]
    assert diagnose(path).findings == ()
    assert open_model(path).metadata == {}


@pytest.mark.parametrize("change", [{"dtype": "F99"}, {"shape": [-1]}, {"data_offsets": [4, 0]}])
def test_an_entry_that_is_left_out_makes_no_second_fault(tmp_path: Path, change: dict[str, Any]) -> None:
    entries = {n: {"dtype": "F32", "shape": [2], "data_offsets": [8 * i, 8 * i + 8]} for i, n in enumerate("abc")}
    entries["b"].update(change)
    assert len(diagnose(header_of(tmp_path / "a.safetensors", entries, 24)).findings) == 1


def test_metadata_with_nothing_in_them_have_no_format(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    path = header_of(tmp_path / "a.safetensors", {"__metadata__": {}, "a": entry}, 8)
    assert codes(diagnose(path)) == [("note", "metadata-format")]


def test_a_copy_has_a_format_whatever_the_file_had(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", {"a": torch.ones(3)}, None)
    path.write_bytes(path.read_bytes() + b"more")
    done = repair(path, tmp_path / "b.safetensors")
    assert done.after.findings == ()
    assert open_model(done.target).metadata["format"] == "pt"


def test_files_of_this_pack_have_no_fixes(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", {"a": torch.ones(3)}, {"quantwire": "{}"})
    path.write_bytes(path.read_bytes() + b"more")
    found = diagnose(path)
    assert "header-trailing" in [f.code for f in found.findings]
    assert not any(f.fix for f in found.findings)


# Parts


def parts(folder: Path, where: dict[str, str]) -> list[tuple[str, str]]:
    saved(folder / "p1", {"a": torch.ones(2)})
    saved(folder / "p2", {"a": torch.zeros(2), "b": torch.ones(3)})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    return codes(diagnose(index))


def test_an_index_that_the_parts_contradict(tmp_path: Path) -> None:
    assert parts(tmp_path, {"a": "p1"}) == []
    assert parts(tmp_path, {"a": "p1", "c": "p1"}) == [("error", "index-missing-tensor")]
    assert parts(tmp_path, {"a": "p1", "b": "p2"}) == [("error", "index-duplicate")]


# Files that change


def unnamed(path: Path) -> Path:
    return saved(path, {"a.weight": FP8, "a.weight_scale": torch.tensor(0.5)})


def test_a_diagnosis_of_another_file_is_not_used(tmp_path: Path) -> None:
    before = diagnose(unnamed(tmp_path / "a.safetensors"))
    saved(tmp_path / "a.safetensors", comfy("comfy-int8-convrot", "a"))
    with pytest.raises(FileError, match="is another file than the one that was looked at"):
        repair(tmp_path / "a.safetensors", tmp_path / "b.safetensors", before=before)
    assert not (tmp_path / "b.safetensors").exists()


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a map, the signal of the lost pages would end this process."""
    from quantwire.quantizers.files import tensor_values

    path = saved(tmp_path / "a.safetensors", {"a": torch.ones(4_000_000)})
    count = tensor_values._count

    def shortened(*args: Any) -> Any:
        os.truncate(path, 4096)
        return count(*args)

    monkeypatch.setattr(tensor_values, "_count", shortened)
    with pytest.raises(FileError, match="became shorter while it was read"):
        diagnose(path, deep=True)


@pytest.mark.parametrize("kind", ["fifo", "link"])
def test_only_files_are_replaced(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "b.safetensors"
    os.mkfifo(target) if kind == "fifo" else target.symlink_to("nowhere")
    before = target.lstat().st_ino
    with pytest.raises(FileError, match="is there already, and no file"):
        repair(unnamed(tmp_path / "a.safetensors"), target, overwrite=True)
    assert target.lstat().st_ino == before


def test_many_edits_are_put_together_once() -> None:
    reads = 0

    class Counted(dict[str, New]):
        def keys(self) -> Any:  # what `update` and unpacking ask for
            nonlocal reads
            reads += 1
            return super().keys()

    total = merged(Edit(add=Counted({str(i): New("U8", (1,), b"a")})) for i in range(1000))
    assert len(total.add) == 1000
    assert reads <= 1000
