"""Quantized safetensors files: interruptions, shards, what is checked before a file takes its name, what is refused."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.cli import main
from quantwire.commands import convert as command
from quantwire.nodes.convert import LAYOUTS
from quantwire.quantizers.errors import FileError, SpecError
from quantwire.quantizers.files import journal, quantizing
from quantwire.quantizers.files.convert_plan import Request
from quantwire.quantizers.files.converting import convert, describe
from quantwire.quantizers.files.model_file import open_model
from quantwire.quantizers.files.saving import save_weights
from quantwire.quantizers.files.schemes.scan import scan
from quantwire.quantizers.files.writers import WRITERS, writer_for
from quantwire.quantizers.registry import get_quantizer
from quantwire.quantizers.rules import Rule
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedWeight
from safetensors import safe_open
from safetensors.torch import load_file
from small_flux import MLP, QKV, flux, names_in, odd, save, sha256, whole_numbers
from torch import Tensor

FP8 = "comfy-fp8-e4m3fn"
MIXED = (Rule("*.img_mlp.0", "comfy-nvfp4"), Rule("*.linear1", "comfy-int8"))


class Stop(Exception):
    """What a host raises to interrupt."""


class Stopping:
    """A bar that raises when it is called the n-th time."""

    def __init__(self, at: int = -1, does: Callable[[], object] | None = None) -> None:
        self.calls, self.total, self._at, self._does = 0, 0, at, does

    def update(self, n: int, /) -> None:
        self.calls += 1
        self.total += n
        if self.calls == self._at:
            if self._does is None:
                raise Stop
            self._does()


def run(source: Path, target: Path, kind: str = FP8, bar: Stopping | None = None, **options: Any) -> Any:
    return convert(Request(source, target, kind, **options), lambda total: nullcontext(bar or Stopping()))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(
        tmp_path_factory.mktemp("source") / "in.safetensors", odd(), **{"modelspec.title": "Odd", "ss_steps": "9"}
    )


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The conversion that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run(source, folder / "a.safetensors", rules=MIXED)
    return folder


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


# Interruptions


@pytest.mark.parametrize("at", [1, 2, 7, 12, 20, 22, -1])
def test_a_continued_conversion_ends_with_the_same_bytes(tmp_path: Path, source: Path, whole: Path, at: int) -> None:
    """Interrupted after some layers, among the tensors at the end, and while it is read again."""
    counted = Stopping()
    run(source, tmp_path / "count.safetensors", rules=MIXED, bar=counted)
    (tmp_path / "count.safetensors").unlink()
    with pytest.raises(Stop):
        run(source, tmp_path / "a.safetensors", rules=MIXED, bar=Stopping(at if at > 0 else counted.calls))
    assert names_in(tmp_path) == ["a.safetensors.partial", "a.safetensors.partial.jsonl"]
    bar = Stopping()
    report = run(source, tmp_path / "a.safetensors", rules=MIXED, resume=True, bar=bar)
    assert any(n.startswith("continued an interrupted conversion: ") for n in report.notes)
    assert sha256(tmp_path / "a.safetensors") == sha256(whole / "a.safetensors")
    assert bar.total == counted.total
    assert names_in(tmp_path) == ["a.safetensors"]
    assert {e.name for e in report.entries} == odd().keys()


def test_many_interruptions(tmp_path: Path, source: Path, whole: Path) -> None:
    for at in range(2, 20, 3):  # what is there already counts as progress
        with pytest.raises(Stop):
            run(source, tmp_path / "a.safetensors", rules=MIXED, bar=Stopping(at))
    run(source, tmp_path / "a.safetensors", rules=MIXED)
    assert sha256(tmp_path / "a.safetensors") == sha256(whole / "a.safetensors")


@pytest.mark.parametrize("size", [None, 0, 100])
def test_resume_after_a_kill_before_the_first_tensor(
    tmp_path: Path, source: Path, whole: Path, size: int | None
) -> None:
    """Before the partial file was made, and before it had its size."""
    target = tmp_path / "a.safetensors"
    with pytest.raises(Stop):
        run(source, target, rules=MIXED, bar=Stopping(9))
    journal, partial = (target.with_name(f"a.safetensors.partial{end}") for end in (".jsonl", ""))
    journal.write_bytes(journal.read_bytes().splitlines(keepends=True)[0])
    partial.unlink()
    if size is not None:
        partial.write_bytes(bytes(size))
    report = run(source, target, rules=MIXED, resume=True)
    assert "an interrupted conversion was started over: no tensor was done yet" in report.notes
    assert names_in(tmp_path) == ["a.safetensors"]
    assert sha256(target) == sha256(whole / "a.safetensors")


def test_resume_and_what_cannot_be_resumed(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "a.safetensors"
    with pytest.raises(FileError, match=r"there is nothing to continue: .*\nLeave --resume out to begin"):
        run(source, target, resume=True)
    assert names_in(tmp_path) == []
    with pytest.raises(Stop):
        run(source, target, bar=Stopping(9))
    with pytest.raises(FileError, match=r"was interrupted, with \d+ tensors done: type .* there, .*e5m2 here"):
        run(source, target, "comfy-fp8-e5m2", resume=True)
    with pytest.raises(FileError, match="another layout"):
        run(source, target, layout="comfy-metadata")
    with pytest.raises(FileError, match="another size of shards"):
        run(source, target, shard_nbytes=1_000_000)
    assert "it would continue" in str(describe(Request(source, target, FP8)))
    (tmp_path / "a.safetensors.partial").write_bytes(b"")
    with pytest.raises(FileError, match="cannot be continued: what it left is damaged"):
        run(source, target, resume=True)
    run(source, target, layout="comfy-metadata", restart=True)
    assert names_in(tmp_path) == ["a.safetensors"]
    assert main(["convert", str(source), str(target), "--type", FP8, "--resume", "--restart"]) == 2


def test_plain_and_gguf_conversions_can_be_asked_to_continue(tmp_path: Path, source: Path) -> None:
    for name, kind in (("a.gguf", "Q8_0"), ("a.safetensors", "F16")):
        with pytest.raises(FileError, match="there is nothing to continue"):
            run(source, tmp_path / name, kind, resume=True)
        assert names_in(tmp_path) == []


def test_a_source_that_changes(tmp_path: Path) -> None:
    path = save(tmp_path / "in.safetensors", flux())
    with pytest.raises(FileError, match="changed while it was read"):
        run(path, tmp_path / "a.safetensors", bar=Stopping(4, lambda: os.utime(path, (1, 1))))
    assert names_in(tmp_path) == ["in.safetensors"]


# Formats and layouts


def test_several_formats_in_one_file(source: Path, whole: Path) -> None:
    found = scan(open_model(whole / "a.safetensors"))
    formats = {name: layer.format_id for name, layer in found.layers.items()}
    assert formats[QKV] == FP8
    assert (formats[MLP], formats["single_blocks.0.linear1.weight"]) == ("comfy-nvfp4", "comfy-int8")
    tensors = odd()
    for name, layer in found.layers.items():
        value = found.scheme(layer).weight(layer, found.file.read)
        restored = get_quantizer(value.format_id).dequantize(value, torch.float32)
        expected = tensors[name].float()
        assert (restored[: expected.shape[0], : expected.shape[1]] - expected).norm() < 0.12 * expected.norm()
    plain = load_file(whole / "a.safetensors")
    assert all(torch.equal(plain[n], tensors[n]) for n in tensors.keys() - formats.keys())


def test_formats_of_several_layouts(tmp_path: Path, source: Path) -> None:
    rules = (Rule("*.img_mlp.0", "bnb-nf4"),)
    with pytest.raises(SpecError, match=r"in their layouts: .*\nAsk for a layout that holds all of them: quantwire"):
        run(source, tmp_path / "a.safetensors", rules=rules)
    run(source, tmp_path / "a.safetensors", rules=rules, layout="quantwire")
    formats = {layer.format_id for layer in scan(open_model(tmp_path / "a.safetensors")).layers.values()}
    assert formats == {FP8, "bnb-nf4"}


@pytest.mark.parametrize(
    ("kind", "target", "options", "said"),
    [
        (
            FP8,
            "a.safetensors",
            {"layout": "bnb"},
            r"The layout bnb cannot hold comfy-.*\nLayouts that can: comfy",
        ),
        (FP8, "a.safetensors", {"layout": "confy"}, r"Unknown layout 'confy'\. Did you mean comfy\?"),
        ("Q8_0", "a.gguf", {"layout": "comfy"}, r"--layout: comfy holds quantized layers, and Q8_0 is GGUF"),
        ("BF16", "a.safetensors", {"shard_nbytes": 1 << 20}, r"--shard-size: files of plain values are written whole"),
        (FP8, "a.safetensors", {"shard_nbytes": 1000}, r"--shard-size: 1000 bytes, and the header alone takes \d+"),
        ("bnb-nf4", "a.gguf", {}, r"A \.gguf file cannot hold bnb-nf4 here"),
        ("comfy-fp8-e5m2", "a.safetensors", {"layout": "scaled-fp8"}, r"scaled-fp8 cannot hold comfy-fp8-e5m2"),
    ],
)
def test_refusals(tmp_path: Path, source: Path, kind: str, target: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        run(source, tmp_path / target, kind, **options)
    assert names_in(tmp_path) == []


def test_scaled_fp8_warns_of_what_older_hosts_do(tmp_path: Path, source: Path) -> None:
    report = run(source, tmp_path / "a.safetensors", layout="scaled-fp8")
    assert any("cast every linear weight" in w and "'txt_in.weight' and 2 more stay" in w for w in report.warnings)
    assert {layer.scheme for layer in scan(open_model(tmp_path / "a.safetensors")).layers.values()} == {"scaled-fp8"}


def test_what_is_in_the_wanted_format_is_copied(tmp_path: Path, source: Path, whole: Path) -> None:
    plan = describe(Request(whole / "a.safetensors", tmp_path / "b.safetensors", FP8, layout="comfy-metadata"))
    assert "copy: " in str(plan)
    report = run(whole / "a.safetensors", tmp_path / "b.safetensors", layout="comfy-metadata")
    actions = {e.name: e.action for e in report.entries}
    assert (actions[QKV], actions[MLP]) == ("copy", "quantize")
    assert any("quantized a second time" in w for w in report.warnings)
    before, after = load_file(whole / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    for name in (QKV, f"{QKV}_scale"):
        assert torch.equal(before[name].float(), after[name].float())
    strings = metadata(tmp_path / "b.safetensors")
    first, told = (json.loads(s["quantwire_conversion"]) for s in (metadata(whole / "a.safetensors"), strings))
    assert told["before"] == [first]
    run(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "BF16")
    assert "_quantization_metadata" not in metadata(tmp_path / "c.safetensors")
    plain = json.loads(metadata(tmp_path / "c.safetensors")["quantwire_conversion"])
    assert (plain["source"]["name"], plain["spec"], plain["layout"]) == ("b.safetensors", "BF16", "plain")
    assert plain["before"] == [{k: v for k, v in told.items() if k != "before"}, first]
    assert metadata(tmp_path / "c.safetensors")["modelspec.title"] == "Odd"


def test_metadata_and_where_a_file_comes_from(source: Path, whole: Path) -> None:
    strings = metadata(whole / "a.safetensors")
    assert {"format": "pt", "modelspec.title": "Odd", "ss_steps": "9"}.items() <= strings.items()
    told = json.loads(strings["quantwire_conversion"])
    assert (told["source"]["name"], told["layout"], told["rules"]) == (
        "in.safetensors",
        "comfy",
        [str(r) for r in MIXED],
    )
    assert told["source"]["headers"][0]["size"] == source.stat().st_size
    assert QuantSpec.from_uri(told["spec"]).format_id == FP8
    assert {"quantwire", "torch"} <= told["versions"].keys()


def test_layouts_of_the_node_are_those_that_there_are() -> None:
    assert list(LAYOUTS) == list(WRITERS)
    assert {writer_for(f).id for f in WRITERS["quantwire"].formats} <= WRITERS.keys()


# Several files


def test_shards(tmp_path: Path, source: Path, whole: Path) -> None:
    target = tmp_path / "m.safetensors"
    plan = describe(Request(source, target, FP8, rules=MIXED, shard_nbytes=700_000))
    run(source, target, rules=MIXED, shard_nbytes=700_000)
    index = json.loads((tmp_path / "m.safetensors.index.json").read_text())
    parts = sorted(set(index["weight_map"].values()))
    count = len(parts)
    assert count > 2
    assert parts == [f"m-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] == plan.data["files"]
    assert names_in(tmp_path) == [*parts, "m.safetensors.index.json"]
    assert all((tmp_path / part).stat().st_size <= 700_000 for part in parts)
    one, several = load_file(whole / "a.safetensors"), {n: t for p in parts for n, t in load_file(tmp_path / p).items()}
    assert one.keys() == several.keys() == index["weight_map"].keys()
    assert all(
        torch.equal(one[n].flatten().view(torch.uint8), t.flatten().view(torch.uint8)) for n, t in several.items()
    )
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    found = scan(open_model(tmp_path / "m.safetensors.index.json"))
    assert found.layers.keys() == scan(open_model(whole / "a.safetensors")).layers.keys()
    with pytest.raises(FileError, match=r"-of-\d+\.safetensors: is there already"):
        run(source, target, rules=MIXED, shard_nbytes=700_000)
    run(source, target, rules=MIXED, shard_nbytes=700_000, overwrite=True)
    assert names_in(tmp_path) == [*parts, "m.safetensors.index.json"]


@pytest.mark.parametrize("layout", ["comfy-metadata", "scaled-fp8"])
def test_shards_of_layouts_that_tell_of_all_layers_at_once(tmp_path: Path, source: Path, layout: str) -> None:
    run(source, tmp_path / "m.safetensors", layout=layout, shard_nbytes=700_000)
    found = scan(open_model(tmp_path / "m.safetensors.index.json"))
    assert len(found.layers) == 8
    assert {layer.format_id for layer in found.layers.values()} == {FP8}


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_while_shards_take_their_names(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, at: int, overwrite: bool
) -> None:
    options: dict[str, Any] = {"shard_nbytes": 700_000, "overwrite": overwrite}
    run(source, tmp_path / "b" / "m.safetensors", shard_nbytes=700_000)
    if overwrite:
        run(source, tmp_path / "a" / "m.safetensors", "comfy-int8", shard_nbytes=700_000)
    calls, take_name = 0, journal.Partial._take_name

    def stop(self: Any, path: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise Stop
        take_name(self, path, target)

    with monkeypatch.context() as patch:
        patch.setattr(journal.Partial, "_take_name", stop)
        with pytest.raises(Stop):
            run(source, tmp_path / "a" / "m.safetensors", **options)
    assert not (tmp_path / "a" / "m.safetensors.index.json").exists()
    report = run(source, tmp_path / "a" / "m.safetensors", **options, resume=True)
    assert names_in(tmp_path / "a") == names_in(tmp_path / "b")
    assert {n: sha256(tmp_path / "a" / n) for n in names_in(tmp_path / "b")} == {
        n: sha256(tmp_path / "b" / n) for n in names_in(tmp_path / "b")
    }
    assert len(report.entries) == len(odd())


# What is checked before a file takes its name


def test_damage_on_the_disk_is_found(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"old")
    verify = quantizing.verify_bytes

    def damage(target: Path, path: Path, *rest: Any) -> None:
        with open(path, "r+b") as file:
            file.seek(path.stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
        verify(target, path, *rest)

    monkeypatch.setattr(quantizing, "verify_bytes", damage)
    with pytest.raises(FileError, match=r"not what stands on the disk: '.*' has CRC-32 .*\nNothing was kept"):
        run(source, target, overwrite=True)
    assert target.read_bytes() == b"old"
    assert names_in(tmp_path) == ["a.safetensors"]
    run(source, target, overwrite=True, verify=False)
    assert len(load_file(target)) > 10


@pytest.mark.parametrize("fault", ["values", "format", "missing"])
def test_layers_that_read_as_something_else_are_found(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    writer: Any = WRITERS["comfy"]
    tensors = writer.tensors

    def other(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        found = tensors(name, weight)
        if fault == "values":
            found[f"{name}_scale"] = found[f"{name}_scale"] * 1.1
        elif fault == "format":
            found[name.replace("weight", "comfy_quant")] = torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)
        else:
            del found[f"{name}_scale"]
        return found

    monkeypatch.setattr(writer, "tensors", other)
    with pytest.raises(FileError, match="what was written is not what stands on the disk"):
        run(source, tmp_path / "a.safetensors")
    assert names_in(tmp_path) == []


def test_the_sample_of_rows_is_a_measure(tmp_path: Path, source: Path) -> None:
    sampled = run(source, tmp_path / "a.safetensors", "comfy-nvfp4")
    measured = run(source, tmp_path / "b.safetensors", "comfy-nvfp4", measure=True)
    assert sha256(tmp_path / "a.safetensors") == sha256(tmp_path / "b.safetensors")
    assert sampled.sqnr_db == pytest.approx(measured.sqnr_db, abs=0.5)
    assert sampled.sqnr_db != measured.sqnr_db
    assert any("one row in 16" in n for n in sampled.notes)
    assert not any("one row in 16" in n for n in measured.notes)


# Weights in memory


def test_saving_weights_from_memory(tmp_path: Path) -> None:
    w = whole_numbers(64, 256, step=3).bfloat16()
    spec = QuantSpec("bnb-nf4")
    values: dict[str, Any] = {"a.weight": get_quantizer("bnb-nf4").quantize(w, spec), "a.bias": torch.ones(64)}
    values |= {"b.weight": w.clone(), "c.weight": w.clone()}
    target = tmp_path / "m.safetensors"
    texts = {"config.json": "{}"}
    made = save_weights(
        target, values, WRITERS["bnb"], metadata={"ss": "1"}, shard_nbytes=60_000, beside=("config.json",),
        config=lambda notes, plain: {k: json.dumps([sorted(notes), plain]) for k in texts},
    )  # fmt: skip
    assert names_in(tmp_path) == sorted(["config.json", *(p.name for p in made), "m.safetensors.index.json"])
    assert json.loads((tmp_path / "config.json").read_text()) == [["a.weight"], ["b.weight", "c.weight"]]
    found = scan(open_model(tmp_path / "m.safetensors.index.json"))
    back = found.read("a.weight")
    assert isinstance(back, QuantizedWeight)
    assert torch.equal(back.tensors["qdata"], values["a.weight"].tensors["qdata"])
    with pytest.raises(FileError, match="is there already"):
        save_weights(target, values, WRITERS["bnb"], shard_nbytes=60_000)
    save_weights(tmp_path / "one.safetensors", values, WRITERS["quantwire"])
    again = scan(open_model(tmp_path / "one.safetensors")).read("a.weight")
    assert isinstance(again, QuantizedWeight)
    assert again.meta == values["a.weight"].meta


# The command line


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5GB", 5_000_000_000), ("500 MiB", 524_288_000), ("1.5k", 1500), ("7", 7), ("2gib", 1 << 31)],
)
def test_sizes(text: str, expected: int) -> None:
    assert command._nbytes(text) == expected


@pytest.mark.parametrize("text", ["", "0", "5 apples", "-1GB", "GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no size such as 5GB"):
        command._nbytes(text)


def test_the_command(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "a.safetensors"
    options = ["--layout", "comfy-metadata", "--shard-size", "700kB", "--no-verify", "--json", str(tmp_path / "r.json")]
    assert main(["convert", str(source), str(target), "--type", FP8, *options]) == 0
    assert "layout comfy-metadata" in capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    assert not any("verified" in n for n in report["report"]["notes"])
    assert (tmp_path / "a.safetensors.index.json").exists()
