"""Conversions to names that are taken: what an older model leaves there, and what must not be touched."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.cli import main
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.files import journal
from quantwire.quantizers.files.convert_plan import Request
from quantwire.quantizers.files.converting import convert, describe
from quantwire.quantizers.files.model_file import open_model
from quantwire.quantizers.files.schemes.scan import scan
from quantwire.quantizers.files.writers import WRITERS
from safetensors.torch import load_file
from small_flux import flux, names_in, save, sha256

FP8, INT8 = "comfy-fp8-e4m3fn", "comfy-int8"
SHARD = 400_000


class Stop(Exception):
    """What a host raises to interrupt."""


class Bar:
    def update(self, n: int, /) -> None:
        pass


def run(source: Path, target: Path, kind: str = FP8, **options: Any) -> Any:
    return convert(Request(source, target, kind, threads=1, **options), lambda total: nullcontext(Bar()))


def formats(path: Path) -> set[str]:
    return {layer.format_id for layer in scan(open_model(path)).layers.values()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("source") / "in.safetensors", flux(1))


@pytest.mark.parametrize("kind", [INT8, "BF16"])
def test_one_file_in_place_of_several(tmp_path: Path, source: Path, kind: str) -> None:
    target = tmp_path / "m.safetensors"
    run(source, target, shard_nbytes=SHARD)
    before = names_in(tmp_path)
    (tmp_path / "m-lora.safetensors").write_bytes(b"another one")
    with pytest.raises(FileError, match=r"index\.json: is there already"):
        run(source, target, kind)
    assert names_in(tmp_path) == sorted([*before, "m-lora.safetensors"])
    run(source, target, kind, overwrite=True)
    assert names_in(tmp_path) == ["m-lora.safetensors", "m.safetensors"]


def test_an_index_that_names_other_files(tmp_path: Path, source: Path) -> None:
    """It goes, they stay: nobody knows that they are parts of this model."""
    (tmp_path / "other.safetensors").write_bytes(b"other")
    index = {"weight_map": {"a": "other.safetensors", "b": "../x.safetensors", "c": "m-00001-of-00009.safetensors"}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    run(source, tmp_path / "m.safetensors", overwrite=True)
    assert names_in(tmp_path) == ["m.safetensors", "other.safetensors"]


def test_fewer_files_and_several_in_place_of_one(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "m.safetensors"
    run(source, target)
    for limit in (SHARD, 2 * SHARD):
        run(source, target, shard_nbytes=limit, overwrite=True)
        index = json.loads((tmp_path / "m.safetensors.index.json").read_text())
        parts = sorted(set(index["weight_map"].values()))
        assert len(parts) > 1
        assert names_in(tmp_path) == [*parts, "m.safetensors.index.json"]


def test_a_folder_is_what_was_written_last(tmp_path: Path) -> None:
    """Loaders of folders look for an index first, and take layers for quanto's by a file beside them."""
    tensors = flux(1) | {"single_blocks.0.linear1.weight": torch.ones(7 * 256, 256).bfloat16()}
    path = save(tmp_path / "in.safetensors", tensors | {"vector_in.in_layer.weight": torch.ones(256, 32).bfloat16()})
    out = tmp_path / "FLUX.1-dev-nf4"
    run(path, out, "quanto-qint8", shard_nbytes=SHARD)
    assert {"quanto_qmap.json", "diffusion_pytorch_model.safetensors.index.json"} <= set(names_in(out))
    run(path, out, "bnb-nf4", overwrite=True)
    assert names_in(out) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert formats(out) == {"bnb-nf4"}
    run(path, out, "bnb-nf4", overwrite=True, shard_nbytes=SHARD)
    held = {name: sha256(out / name) for name in names_in(out)}
    assert "diffusion_pytorch_model.safetensors.index.json" in held
    with pytest.raises(FileError, match="is the folder that is converted"):
        run(out, out, "quanto-qint8", overwrite=True)
    with pytest.raises(FileError, match="is the folder that is converted"):
        describe(Request(out, out / "." / "", "quanto-qint8"))
    assert {name: sha256(out / name) for name in names_in(out)} == held


def test_an_index_is_not_overwritten_while_it_is_read(tmp_path: Path, source: Path) -> None:
    run(source, tmp_path / "m.safetensors", shard_nbytes=SHARD)
    held = names_in(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(FileError, match=r"m\.safetensors\.index\.json' is read by this conversion"):
            run(tmp_path / "m.safetensors.index.json", tmp_path / "m.safetensors", "BF16", overwrite=overwrite)
    assert names_in(tmp_path) == held
    run(tmp_path / "m.safetensors.index.json", tmp_path / "n.safetensors", "BF16")


@pytest.mark.parametrize("at", [1, 2])
def test_a_kill_while_a_file_takes_the_place_of_several(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    target = tmp_path / "m.safetensors"
    run(source, target, shard_nbytes=SHARD)
    limit = 2 * SHARD
    _killed(monkeypatch, at, lambda: run(source, target, INT8, shard_nbytes=limit, overwrite=True))
    assert not (tmp_path / "m.safetensors.index.json").exists()
    run(source, target, INT8, shard_nbytes=limit, overwrite=True, resume=True)
    run(source, tmp_path / "b" / "m.safetensors", INT8, shard_nbytes=limit)
    (tmp_path / "b").rename(tmp_path.parent / f"{tmp_path.name}-b")
    assert names_in(tmp_path) == names_in(tmp_path.parent / f"{tmp_path.name}-b")


def _killed(monkeypatch: pytest.MonkeyPatch, at: int, does: Any) -> None:
    """Stop when the n-th file is to take its name."""
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
            does()


def test_starting_over_after_a_kill_removes_what_had_its_name(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "m.safetensors"
    _killed(monkeypatch, 3, lambda: run(source, target, shard_nbytes=SHARD))
    assert "m-00001-of" in names_in(tmp_path)[0]
    run(source, target, INT8, restart=True)
    assert names_in(tmp_path) == ["m.safetensors"]


def test_a_fault_of_the_program_leaves_nothing(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(name: str, weight: Any) -> Any:
        raise IndexError(name)

    monkeypatch.setattr(WRITERS["comfy"], "tensors", wrong)
    with pytest.raises(IndexError):
        run(source, tmp_path / "m.safetensors")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("kind", [FP8, "bnb-nf4", "BF16"])
def test_tensors_without_values(tmp_path: Path, kind: str) -> None:
    empty = {"double_blocks.0.img_attn.extra.weight": torch.empty(0, 256).bfloat16(), "x.y": torch.empty(0).bfloat16()}
    path = save(tmp_path / "in.safetensors", flux(1) | empty)
    run(path, tmp_path / "out.safetensors", kind)
    made = load_file(tmp_path / "out.safetensors")
    assert {n: (made[n].shape, made[n].dtype) for n in empty} == {n: (t.shape, t.dtype) for n, t in empty.items()}
    run(tmp_path / "out.safetensors", tmp_path / "back.safetensors", "F16")
    assert load_file(tmp_path / "back.safetensors")["x.y"].shape == (0,)


# Names


def test_names_of_targets(tmp_path: Path, source: Path) -> None:
    for name in ("m.pt", "m.safetensor", "m.ckpt"):
        with pytest.raises(FileError, match=r"the target is a \.gguf or \.safetensors file.*\n.*of a folder"):
            run(source, tmp_path / name)
    with pytest.raises(FileError, match=r"the name has 252 bytes, at most 241 can be"):
        run(source, tmp_path / ("m" * 240 + ".safetensors"))
    with pytest.raises(FileError, match=r"at most 232 can be"):
        run(source, tmp_path / ("m" * 225 + ".safetensors"), shard_nbytes=SHARD)
    assert main(["convert", str(source), str(tmp_path / ("m" * 300)), "--type", "bnb-nf4"]) == 2
    run(source, tmp_path / ("m" * 229 + ".safetensors"))
    for kind in (FP8, "BF16"):
        run(source, tmp_path / "m.sft", kind, overwrite=True)
        assert len(load_file(tmp_path / "m.sft")) >= len(flux(1))
    with pytest.raises(FileError, match="several files end in"):
        run(source, tmp_path / "n.sft", shard_nbytes=SHARD)
