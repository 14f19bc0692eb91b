"""The table of docs/files.md: every type of file is made, detected, loaded, written and repaired, and what came out is
what the page says.

`QUANTWIRE_WRITE_PAGES=1 pytest tests/files/test_file_types.py -m slow` (`make files`) writes it anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from file_makers import Model
from file_types import FOLDER, TYPES, Damage, FileType
from quantwire.hosts.standalone import flux
from quantwire.hosts.standalone.models import DiffusionModel, load_diffusion_model
from quantwire.hosts.standalone.quantized import load_quantized
from quantwire.quantizers.errors import FileError, QuantwireError
from quantwire.quantizers.files.components import Component
from quantwire.quantizers.files.convert_plan import Request
from quantwire.quantizers.files.converting import convert
from quantwire.quantizers.files.detect import FileFacts, detect_file
from quantwire.quantizers.files.doctor import Severity, diagnose
from quantwire.quantizers.files.loading import STANDALONE
from quantwire.quantizers.files.locate import Container
from quantwire.quantizers.files.model_file import open_model
from quantwire.quantizers.files.repair import repair
from quantwire.quantizers.files.schemes import SCHEMES
from quantwire.quantizers.files.schemes.scan import scan
from quantwire.quantizers.files.writers import WRITERS, writer_for
from quantwire.quantizers.registry import availability
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedWeight
from small_scans import same_bytes, same_weight
from torch import Tensor

PAGE = Path(__file__).parents[2] / "docs" / "files.md"
IN_COMFYUI = Path(__file__).parent / "comfyui_loaded.json"
START, END = "<!-- file_types: start -->", "<!-- file_types: stop -->"
HEAD = (
    "type",
    "written by",
    "detected as",
    "`quantwire run`",
    "ComfyUI",
    "`convert` writes it",
    "`doctor` mends",
    "names",
)
NONE = "-"
COLUMNS = ("detect", "load", "write", "repair")
each_type = pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.id)
Found = dict[str, dict[str, tuple[str, ...]]]


@pytest.fixture(scope="module", autouse=True)
def in_one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(demo_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(demo_models / "diffusion_models" / "digits_flux.safetensors", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model: Model) -> Tensor:
    return velocity(model.loaded)


@pytest.fixture(scope="module")
def sound(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Callable[[FileType], Path]:
    """The file of a type, made when it is first asked for."""
    paths: dict[str, Path] = {}

    def path_of(kind: FileType) -> Path:
        if kind.format_id and not availability(kind.format_id).works:
            pytest.skip(availability(kind.format_id).reason)
        if kind.id not in paths:
            paths[kind.id] = kind.make(model, tmp_path_factory.mktemp(kind.id))
        return paths[kind.id]

    return path_of


@pytest.fixture(scope="module")
def cells() -> Found:
    """Type -> column -> what was found."""
    return {kind.id: {} for kind in TYPES}


def velocity(model: DiffusionModel) -> Tensor:
    seed, c = torch.Generator().manual_seed(3), model.config
    x = torch.randn(1, c.in_channels // 4, 8, 8, generator=seed)
    context, pooled = torch.randn(1, 5, c.context_dim, generator=seed), torch.randn(1, c.pooled_dim, generator=seed)
    with torch.inference_mode():
        return flux.velocity(model.transformer, x, 0.7, context, pooled, 3.5, model.dtype).float()


def check_facts(kind: FileType, facts: FileFacts, written: bool = False) -> None:
    assert facts.container == (Container.SAFETENSORS if written and facts.container != "GGUF" else kind.container).value
    assert (facts.main.component, facts.main.family) == (Component.DIFFUSION, "flux")
    main = facts.types[0]
    assert (main.scheme, main.type, main.format_id) == (kind.scheme, kind.type, kind.format_id)
    assert len({t.type for t in facts.types if t.scheme}) <= 1
    assert not facts.damage


def check_close(kind: FileType, loaded: DiffusionModel, expected: Tensor) -> None:
    found = velocity(loaded)
    assert torch.isfinite(found).all()
    off = float((found - expected).norm() / expected.norm())
    assert off <= kind.off, f"{kind.id}: {off}"
    assert bool(off) == bool(kind.off)


@pytest.mark.slow
@each_type
def test_detected(kind: FileType, sound: Any, cells: Found) -> None:
    facts = detect_file(sound(kind))
    check_facts(kind, facts)
    assert tuple(part.component for part in facts.parts) == kind.components
    layers = scan(open_model(sound(kind))).layers.values()
    assert all(kind.options.items() <= layer.options.items() for layer in layers)
    main = facts.types[0]
    cells[kind.id]["detect"] = (f"{main.scheme or 'plain'}: {main.type}" + _container(facts),)


def _container(facts: FileFacts) -> str:
    shards = f", {len(facts.files)} files" if len(facts.files) > 1 else ""
    others = ", ".join(part.component.value for part in facts.parts if part != facts.main)
    parts = f"; with {others}" if others else ""
    return shards + parts


@pytest.mark.slow
@each_type
def test_loaded(kind: FileType, sound: Any, expected: Tensor, cells: Found) -> None:
    path = sound(kind)
    node = next(x.node for x in detect_file(path).loads if x.host == STANDALONE)
    assert node == kind.node
    if kind.refusal:
        with pytest.raises(FileError, match=kind.refusal):
            load_quantized(path)
        if node:
            check_close(kind, load_diffusion_model(path), expected)
        cells[kind.id]["load"] = (node or f"no: {kind.refusal.replace('Open it with', 'open it with')}",)
        return
    loaded, report = load_quantized(path)
    check_close(kind, loaded, expected)
    quantized = {e.format_id for e in report.entries if e.action == "quantize"}
    assert quantized == {kind.format_id}
    cells[kind.id]["load"] = (f"{node}, as {kind.format_id}",)


@pytest.mark.slow
@each_type
def test_written(kind: FileType, model: Model, expected: Tensor, tmp_path: Path, cells: Found) -> None:
    how = kind.written
    for name in how.targets if how else ():
        assert how is not None
        target = tmp_path / name
        convert(
            Request(model.path, target, how.uri, layout=how.layout, shard_nbytes=how.shard_nbytes),
            lambda _: contextlib.nullcontext(_NoBar()),
        )
        if how.shard_nbytes:
            target = next((target if target.is_dir() else tmp_path).glob("*.index.json"))
        facts = detect_file(target)
        check_facts(kind, facts, written=not how.shard_nbytes)
        assert all(kind.options.items() <= x.options.items() for x in scan(open_model(target)).layers.values())
        assert _wrong(target) == ()
        assert (facts.main.layout == "diffusers") == (name == FOLDER)
        if kind.scheme:
            check_close(kind, load_quantized(target)[0], expected)
        else:
            check_close(kind, load_diffusion_model(target), expected)
    cells[kind.id]["write"] = (str(how) if how else NONE,)


def _wrong(path: Path) -> tuple[str, ...]:
    return tuple(f.code for f in diagnose(path).findings if f.severity is not Severity.NOTE)


class _NoBar:
    def update(self, n: int, /) -> None:
        pass


def values(path: Path) -> dict[str, Tensor | QuantizedWeight]:
    found = scan(open_model(path))
    return {name: found.read(name) for name in (*found.plain, *found.layers)}


def readable(kind: FileType, path: Path) -> dict[str, Any]:
    """All of a file; of layers that are only named their tensors."""
    if kind.format_id or not kind.scheme:
        return values(path)
    file = open_model(path)
    return {name: file.read(name) for name in file.entries}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, QuantizedWeight):
        return isinstance(b, QuantizedWeight) and same_weight(a, b)
    return isinstance(b, Tensor) and same_bytes(a, b)


@pytest.mark.slow
@each_type
def test_repaired(kind: FileType, sound: Any, tmp_path: Path, cells: Found) -> None:
    path: Path = sound(kind)
    assert _wrong(path) == kind.known
    wanted = readable(kind, path)
    mended, named = [], []
    for i, damage in enumerate(kind.damages):
        bad = damaged(damage, path, tmp_path / f"bad-{i}")
        if not damage.code:
            with pytest.raises(FileError):
                diagnose(bad)
            named.append("the whole file")
        else:
            findings = diagnose(bad).findings
            assert damage.code in [f.code for f in findings], (kind.id, damage.code, [str(f) for f in findings])
            (mended if damage.mends else named).append(f"`{damage.code}`")
        if not damage.mends:
            with pytest.raises(FileError):
                repair(bad, tmp_path / f"none-{i}.safetensors")
            if not damage.loads:
                with pytest.raises(QuantwireError):
                    load_quantized(bad) if kind.scheme else load_diffusion_model(bad)
            continue
        target = copied(path, tmp_path / f"good-{i}")
        done = repair(bad, weights_of(target), overwrite=True)
        assert damage.code not in [f.code for f in done.after.findings]
        found = readable(kind, target)
        changed = {name for name in found.keys() - wanted.keys() if "scaled_fp8" not in name}
        assert not changed
        assert all(same(t, found[name]) for name, t in wanted.items())
    cells[kind.id]["repair"] = (", ".join(mended) or NONE, ", ".join(named) or NONE)


def copied(path: Path, place: Path) -> Path:
    """A copy of a file with the parts beside it, or of a folder."""
    source = path if path.is_dir() else path.parent
    shutil.copytree(source, place)
    return place if path.is_dir() else place / path.name


def weights_of(path: Path) -> Path:
    """The first file with weights."""
    return min(path.glob("*.safetensors")) if path.is_dir() else path


def damaged(damage: Damage, path: Path, place: Path) -> Path:
    bad = copied(path, place)
    file = weights_of(bad)
    source = weights_of(path)
    file.unlink()
    damage.apply(source, file)
    return bad


def table(cells: Found) -> str:
    inside: dict[str, str] = json.loads(IN_COMFYUI.read_text(encoding="utf-8"))
    lines = ["| " + " | ".join(HEAD) + " |", "| " + " | ".join("---" for _ in HEAD) + " |"]
    for kind in TYPES:
        found = cells[kind.id]
        cell = [
            kind.title,
            kind.by,
            *found["detect"],
            *found["load"],
            inside[kind.id],
            *found["write"],
            *found["repair"],
        ]
        lines.append("| " + " | ".join(cell) + " |")
    tried = f"ComfyUI {inside['comfyui']}, one model call on a CPU."
    return f"Made by `make files`. {tried}\n\n" + "\n".join(lines)


@pytest.mark.slow
def test_the_page_says_so(cells: Found) -> None:
    missing = [f"{kind.id}: {column}" for kind in TYPES for column in COLUMNS if column not in cells[kind.id]]
    if missing:
        pytest.skip(f"{len(missing)} cells were not tried in this run, such as {missing[0]}")
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(START)
    old, after = rest.split(END)
    new = table(cells)
    if os.environ.get("QUANTWIRE_WRITE_PAGES"):
        PAGE.write_text(f"{before}{START}\n\n{new}\n\n{END}{after}", encoding="utf-8")
    else:
        assert old.strip() == new, "docs/files.md is old: run `make files`"


def test_every_scheme_and_layout_has_a_row() -> None:
    page = PAGE.read_text(encoding="utf-8").split(START)[1].split(END)[0]
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][2:]
    assert [row[0].removeprefix("| ") for row in rows] == [kind.title for kind in TYPES]
    assert {row[2].partition(":")[0] for row in rows} == {scheme.id for scheme in SCHEMES} | {"plain"}
    written = {kind.written for kind in TYPES if kind.written is not None and kind.scheme not in ("", "gguf")}
    layouts = {writer_for(QuantSpec.from_uri(how.uri).format_id, how.layout).id for how in written}
    assert layouts == set(WRITERS)
    for row, kind in zip(rows, TYPES, strict=True):
        assert row[5] == (str(kind.written) if kind.written else NONE)
