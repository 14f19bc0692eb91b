"""`quantwire lint` on planted conflicts, on the shipped workflows, and as a command of a build."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from quantwire.cli import main
from quantwire.hosts.lint.graph import Finding, Level
from quantwire.hosts.lint.lint import FileReport, Linter, Options
from quantwire.nodes import NODE_CLASS_MAPPINGS
from quantwire.quantizers.compat.modes import HostName, OffloadMode
from quantwire.workflows import build

HERE = Path(__file__).parent
PLANTED = HERE / "lint_workflows"
SHIPPED = HERE.parents[1] / "workflows"
FORMS = ("editor", "api")


class Plant(NamedTuple):
    """A conflict in a file: where it is reported, from which node it comes, and the mode on the command line."""

    name: str
    node: str
    source: str
    format: str
    kind: str
    mode: str
    offload: str = ""


PLANTS = (
    Plant("nf4_sequential", "3", "2", "bnb-nf4", "the model", "sequential"),
    Plant("quanto_group", "20", "3", "quanto-qint8", "the model", "group"),
    Plant("mixed_rules", "5", "4", "bnb-nf4", "the model", "sequential", "sequential"),
    Plant("mixed_rules", "5", "4", "quanto-qint8", "the model", "group", "group"),
    Plant("wan_quanto_subgraph", "70", "60:1", "quanto-qint8", "the model", "novram"),
    Plant("quantized_behind_check", "11", "4", "quanto-qint4", "the model", "partial"),
    Plant("sd35_text_encoders", "13", "12", "bnb-nf4", "the text encoders", "novram"),
    Plant("flux_gguf_city96", "50", "12", "comfyui-gguf-unknown", "the model", "sequential", "sequential"),
    Plant("flux_gguf_city96", "6", "11", "comfyui-gguf-unknown", "the text encoders", "sequential", "sequential"),
    Plant("flux_nf4_checkpoint", "30", "4", "bnb-nf4", "the model", "partial", "partial"),
    Plant("flux_nf4_checkpoint", "30", "4", "bnb-nf4", "the model", "dynamic", "dynamic"),
)
IDS = [f"{p.name}-{p.mode}-{p.source}" for p in PLANTS]


@functools.cache
def linter(options: Options) -> Linter:
    return Linter(options, NODE_CLASS_MAPPINGS)


def lint(path: Path, **options: Any) -> FileReport:
    return linter(Options(**{"find_models": False, **options})).check(path)


def conflicts(report: FileReport) -> list[Finding]:
    return [f for f in report.findings if f.level is Level.BLOCK]


def changed(path: Path, tmp_path: Path, old: str, new: str) -> Path:
    """A copy in which the first place of a text has another one."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    copy = tmp_path / path.name
    copy.write_text(text.replace(old, new, 1), encoding="utf-8")
    return copy


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("plant", PLANTS, ids=IDS)
def test_finds_the_planted_conflict(plant: Plant, form: str) -> None:
    offload = OffloadMode(plant.offload) if plant.offload else None
    report = lint(PLANTED / form / f"{plant.name}.json", offload=offload)
    assert report.form == form
    found = [f for f in conflicts(report) if (f.data["from"], f.data["format"]) == (plant.source, plant.format)]
    assert len(found) == 1, report.findings
    finding = found[0]
    assert finding.place is not None
    assert finding.place.node_id == plant.node
    assert finding.data["mode"] == plant.mode
    assert f"in {plant.kind}" in finding.message
    assert f"node {plant.source} " in finding.message
    assert finding.remedies
    assert not [f for f in report.findings if f.level is Level.ERROR]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("plant", [p for p in PLANTS if "gguf" not in p.name and "checkpoint" not in p.name])
def test_quantwire_carrier_in_the_same_file_is_silent(plant: Plant, form: str, tmp_path: Path) -> None:
    path = changed(PLANTED / form / f"{plant.name}.json", tmp_path, '"library"', '"quantwire"')
    report = lint(path, offload=OffloadMode(plant.offload) if plant.offload else None)
    assert report.findings == ()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["flux_gguf_city96", "flux_nf4_checkpoint"])
def test_loaders_of_other_packs_are_silent_without_a_mode(name: str, form: str) -> None:
    report = lint(PLANTED / form / f"{name}.json")
    assert {f.code for f in report.findings} == {"needs-pack"}


@pytest.mark.parametrize(("action", "level"), [("warn", Level.WARNING), ("report", Level.NOTE)])
@pytest.mark.parametrize("form", FORMS)
def test_action_decides_the_level(action: str, level: Level, form: str, tmp_path: Path) -> None:
    path = changed(PLANTED / form / "nf4_sequential.json", tmp_path, '"block"', f'"{action}"')
    report = lint(path)
    assert [(f.level, f.code) for f in report.findings] == [(level, "offload-conflict")]


@pytest.mark.parametrize("form", FORMS)
def test_what_runs_badly_is_a_warning(form: str) -> None:
    """ComfyUI-GGUF's models fall back to the older way of loading under dynamic VRAM: no failure."""
    report = lint(PLANTED / form / "flux_gguf_city96.json", offload=OffloadMode.DYNAMIC)
    assert not conflicts(report)
    assert {f.data["from"] for f in report.findings if f.level is Level.WARNING} == {"11", "12"}


def test_auto_tells_which_modes_would_stop_it() -> None:
    (note,) = lint(PLANTED / "api" / "mixed_rules.json").findings
    assert note.level is Level.NOTE
    assert "bnb-nf4 from node 4 'Mixed' (QuantizeModel) cannot run with sequential" in note.message


def test_a_mode_of_the_other_host_is_an_error(tmp_path: Path) -> None:
    path = changed(PLANTED / "api" / "wan_quanto_subgraph.json", tmp_path, '"novram"', '"sequential"')
    report = lint(path)
    assert [f.code for f in report.findings if f.level is Level.ERROR] == ["bad-mode"]
    assert len(conflicts(report)) == 1, "and the conflict is told all the same"


def test_set_mode_holds_for_what_follows(tmp_path: Path) -> None:
    """The mode of the command line is what the host does; a node that sets another one takes precedence."""
    path = PLANTED / "api" / "quanto_group.json"
    given = {f.data["mode"] for f in conflicts(lint(path, offload=OffloadMode.SEQUENTIAL))}
    assert given == {"group"}
    unset = changed(path, tmp_path, '"set_mode": true', '"set_mode": false')
    assert {f.data["mode"] for f in conflicts(lint(unset, offload=OffloadMode.SEQUENTIAL))} == {"group", "sequential"}


# --- the shipped workflows ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(demo_models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """The demo models, and the file that workflows/gguf.json names, made as its note says."""
    folder = tmp_path_factory.mktemp("models")
    target = folder / "diffusion_models" / "digits_flux-Q8_0.gguf"
    target.parent.mkdir()
    source = demo_models / "diffusion_models" / "digits_flux.safetensors"
    assert main(["convert", str(source), str(target), "--type", "Q8_0"]) == 0
    return folder, demo_models


FILES = [p for folder in (SHIPPED, SHIPPED / "api") for p in sorted(folder.glob("*.json"))]
DEMO = {workflow.name for workflow in build.DEMO}
GOOD = [p for p in FILES if p.stem in DEMO and p.stem != "conflict"]
TEMPLATES = [p for p in FILES if p.stem not in DEMO]  # their models are not here, so they are not looked for


@pytest.mark.parametrize("path", GOOD, ids=lambda p: p.relative_to(SHIPPED).as_posix())
@pytest.mark.parametrize("host", list(HostName), ids=lambda h: h.value)
def test_silent_on_shipped(path: Path, host: HostName, models: tuple[Path, ...]) -> None:
    assert lint(path, models=models, find_models=True, host=host).findings == ()


@pytest.mark.parametrize("mode", ["none", "model", "sequential", "balanced", "group"])
@pytest.mark.parametrize("path", GOOD, ids=lambda p: p.relative_to(SHIPPED).as_posix())
def test_shipped_run_in_every_mode(path: Path, mode: str, models: tuple[Path, ...]) -> None:
    assert lint(path, models=models, find_models=True, offload=OffloadMode(mode)).findings == ()


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.relative_to(SHIPPED).as_posix())
def test_silent_on_templates(path: Path) -> None:
    assert lint(path, find_models=False).findings == ()


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.relative_to(SHIPPED).as_posix())
def test_templates_lack_models_alone(path: Path) -> None:
    found = lint(path, find_models=True, host=HostName.COMFYUI).findings
    assert found
    assert {f.code for f in found} == {"missing-model"}


def test_a_value_that_names_its_folder(models: tuple[Path, ...], tmp_path: Path) -> None:
    """InspectModel, RepairModel and ConvertModel take FOLDER/NAME."""
    here, gone = "diffusion_models/digits_flux.safetensors", "diffusion_models/flux1-dev.safetensors"
    template = (SHIPPED / "api" / "convert_a_file.json").read_text(encoding="utf-8")
    path = tmp_path / "convert.json"
    path.write_text(template.replace(gone, here), encoding="utf-8")
    assert lint(path, models=models, find_models=True).findings == ()
    for wrong, said in (("flux1-dev.safetensors", "not of the form FOLDER/NAME"), (gone, "is not in diffusion_models")):
        path.write_text(template.replace(gone, wrong), encoding="utf-8")
        found = lint(path, models=models, find_models=True).findings
        assert [f.code for f in found] == ["missing-model"] * 4
        assert all(said in f.message for f in found)


def test_types_come_from_the_file(models: tuple[Path, ...], tmp_path: Path) -> None:
    """The library's layers of LoadGGUF are those of the types in the header."""
    path = changed(SHIPPED / "api" / "gguf.json", tmp_path, '"quantwire"', '"library"')
    report = lint(path, models=models, find_models=True, offload=OffloadMode.SEQUENTIAL)
    assert [f.data["format"] for f in conflicts(report)] == ["gguf-q8-0"]


# --- as a command ------------------------------------------------------------------------------------------------


def command(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "quantwire.cli", "lint", *map(str, arguments)],
        cwd=cwd, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_in_a_build(models: tuple[Path, ...], tmp_path: Path) -> None:
    """A folder with a good file, a conflict, a broken file and other JSON: each is judged, and the worst counts."""
    for name in ("quantized.json", "conflict.json"):
        (tmp_path / name).write_bytes((SHIPPED / name).read_bytes())
    (tmp_path / "broken.json").write_text('{"1": {"class_type": ', encoding="utf-8")
    (tmp_path / "package.json").write_text('{"name": "not a workflow"}', encoding="utf-8")
    folders = [word for folder in models for word in ("--models", folder)]
    done = command(tmp_path, *folders, "--json", tmp_path / "out" / "report", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{tmp_path}/broken.json: error: invalid JSON at line 1")
    assert any(
        line.startswith(f"{tmp_path}/conflict.json: node 3 'Offload check' (OffloadCompat): block: bnb-nf4")
        for line in lines
    )
    assert lines[-1] == "4 files checked for quantwire run: 1 conflict, 1 error, 1 note."
    report = json.loads((tmp_path / "out" / "report").read_text(encoding="utf-8"))
    assert (report["status"], report["exit_code"]) == ("blocked", 3)
    assert report["summary"] == {"block": 1, "error": 1, "warning": 0, "note": 1}
    found = {Path(f["file"]).name: f["findings"] for f in report["files"]}
    assert found["quantized.json"] == []
    assert found["conflict.json"][0]["node"] == {"id": "3", "title": "Offload check", "class_type": "OffloadCompat"}
    assert found["conflict.json"][0]["code"] == "offload-conflict"


@pytest.mark.parametrize("folder", [SHIPPED, SHIPPED / "api"], ids=FORMS)
def test_shipped_conflict_is_blocked_and_the_good_one_passes(
    folder: Path, demo_models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--models", str(demo_models), "--quiet"]
    assert main(["lint", str(folder / "conflict.json"), *options]) == 3
    assert len([line for line in capsys.readouterr().out.splitlines() if ": block: " in line]) == 1
    assert main(["lint", str(folder / "quantized.json"), *options]) == 0
    assert capsys.readouterr().out == ""


def test_printed_json_is_all_of_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", str(PLANTED / "api" / "nf4_sequential.json"), "--no-models", "--json"]) == 3
    data = json.loads(capsys.readouterr().out)
    assert data["exit_code"] == 3
    assert [f["level"] for f in data["files"][0]["findings"]] == ["block"]


def test_error_is_2_and_warnings_are_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = changed(PLANTED / "api" / "nf4_sequential.json", tmp_path, '"block"', '"warn"')
    assert main(["lint", str(path), "--no-models"]) == 0
    path = changed(PLANTED / "api" / "nf4_sequential.json", tmp_path, '"QuantizeModel"', '"QuantizeModell"')
    assert main(["lint", str(path), "--no-models"]) == 2
    assert "Did you mean QuantizeModel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--offload", "dynamic", "--host", "standalone"), "standalone has no mode dynamic"),
        (("--models", "nowhere"), "'nowhere' is not a folder"),
        (("--no-models", "--models", "."), "--no-models contradicts"),
        (("--server", "127.0.0.1:1"), "http://127.0.0.1:1 does not answer as a ComfyUI server"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", str(PLANTED / "api" / "nf4_sequential.json"), *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


def test_a_workflow_is_never_overwritten_by_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`lint --json a.json b.json` takes the first file for the report."""
    first, second = tmp_path / "a.json", PLANTED / "api" / "nf4_sequential.json"
    first.write_bytes(second.read_bytes())
    assert main(["lint", "--json", str(first), str(second)]) == 2
    assert "is no report of lint, so it is not overwritten" in capsys.readouterr().err
    assert first.read_bytes() == second.read_bytes()


def test_an_older_report_is_overwritten(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    for _ in range(2):
        assert main(["lint", str(PLANTED / "api" / "nf4_sequential.json"), "--no-models", "--json", str(report)]) == 3
    assert json.loads(report.read_text(encoding="utf-8"))["exit_code"] == 3


def test_a_missing_file_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(tmp_path / "absent.json"), str(PLANTED / "api" / "nf4_sequential.json")]
    assert main(["lint", *paths, "--no-models"]) == 3
    out = capsys.readouterr().out
    assert f"{tmp_path}/absent.json: error: does not exist." in out
    assert "2 files checked" in out


@pytest.mark.parametrize(
    "path", [PLANTED / "editor" / "flux_gguf_city96.json", SHIPPED / "quantized.json"], ids=["ComfyUI", "own"]
)
def test_nothing_heavy_is_imported(path: Path, tmp_path: Path) -> None:
    """Importing torch takes longer than all the rest; without models nothing needs it."""
    code = f"import sys; from quantwire.cli import main; print(main(['lint', {str(path)!r}, '--no-models', '--quiet']))"
    code += "; print(sorted({'torch', 'bitsandbytes', 'diffusers', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[:2] == ["0", "[]"], done.stderr
    assert done.stderr == ""
