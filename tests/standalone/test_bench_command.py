"""`quantwire bench`: the graphs that it makes, what it refuses, and a run in processes of its own."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from quantwire.cli import main
from quantwire.commands import bench
from quantwire.commands.bench_worker import BOTH, _reports
from quantwire.hosts.bench import Order, turns
from quantwire.hosts.bench_graph import named, title_of, with_format
from quantwire.hosts.lint.catalog import Catalog
from quantwire.hosts.standalone.core_nodes import CORE_NODES
from quantwire.hosts.standalone.workflow import Prompt, PromptNode, load_workflow
from quantwire.nodes import NODE_CLASS_MAPPINGS
from quantwire.quantizers.errors import SpecError, WorkflowError
from quantwire.quantizers.spec import QuantSpec

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows" / "api"
CATALOG = Catalog(NODE_CLASS_MAPPINGS, CORE_NODES)


def outputs(name: str) -> tuple[str, ...] | None:
    found = CATALOG.find(name)
    return found.outputs if found else None


def shipped(name: str) -> Prompt:
    return load_workflow(WORKFLOWS / f"{name}.json")


def test_a_quantizer_is_put_behind_the_loader() -> None:
    made = with_format(shipped("full_precision"), QuantSpec("bnb-nf4"), outputs).nodes
    assert made["1-quantize"].inputs["model"] == ["1", 0]
    assert made["1-quantize"].inputs["format"] == "bnb-nf4"
    assert made["11"].inputs["model"] == ["1-quantize", 0]


def test_a_quantizer_that_is_there_gets_the_format() -> None:
    before = shipped("quantized")
    made = with_format(before, QuantSpec("quanto-qint8"), outputs)
    assert made.nodes["2"].inputs["format"] == "quanto-qint8"
    assert before.nodes["2"].inputs["format"] == "bnb-nf4"
    assert set(made.nodes) == set(before.nodes)


def test_full_precision_leaves_the_quantizer_and_its_report_out() -> None:
    made = with_format(shipped("quantized"), None, outputs).nodes
    assert "2" not in made
    assert "20" not in made
    assert made["3"].inputs["model"] == ["1", 0]


def test_a_quantized_file_is_refused() -> None:
    with pytest.raises(WorkflowError, match="quantized already"):
        with_format(shipped("gguf"), QuantSpec("bnb-nf4"), outputs)


def chained() -> Prompt:
    """The shipped quantized workflow with a second quantizer behind the first."""
    prompt = shipped("quantized")
    inputs = {**prompt.nodes["2"].inputs, "model": ["2", 0], "format": "gguf-q4-0", "on_quantized": "dequantize first"}
    nodes = {**prompt.nodes, "2b": PromptNode("2b", "QuantizeModel", inputs, "again")}
    nodes["3"] = dataclasses.replace(nodes["3"], inputs={**nodes["3"].inputs, "model": ["2b", 0]})
    return Prompt(nodes, prompt.source)


def test_full_precision_of_two_quantizers_in_a_row() -> None:
    prompt = chained()
    made = with_format(prompt, None, outputs).nodes
    assert set(prompt.nodes) - set(made) == {"2", "2b", "20"}
    assert made["3"].inputs["model"] == ["1", 0]
    again = with_format(prompt, QuantSpec("quanto-qint8"), outputs).nodes
    assert [again[n].inputs["format"] for n in ("2", "2b")] == ["quanto-qint8"] * 2
    assert again["2b"].inputs["model"] == ["2", 0]


def test_what_a_workflow_is_called() -> None:
    assert title_of(shipped("quantized")) == "bnb-nf4"
    assert title_of(chained()) == "gguf-q4-0"
    prompt = shipped("quantized")
    node = prompt.nodes["2"]
    asked = dataclasses.replace(node, inputs={**node.inputs, "format": "from config", "config": ["2c", 0]})
    config = PromptNode("2c", "QuantConfig", {"uri": "bnb;bits=4"}, "config")
    assert title_of(Prompt({**prompt.nodes, "2": asked, "2c": config}, prompt.source)) == "bnb;bits=4"
    rules = PromptNode("2c", "QuantRules", {"rules": "keep .*"}, "rules")
    assert title_of(Prompt({**prompt.nodes, "2": asked, "2c": rules}, prompt.source)) == "QuantRules"


def test_a_model_that_a_node_fits_is_refused() -> None:
    prompt = shipped("full_precision")
    fitted = PromptNode("1", "FitModel", {"model_name": "digits_flux.safetensors", "vram_gib": 0.0}, "Fit")
    with pytest.raises(WorkflowError, match=r"as it chooses, maybe quantized already"):
        with_format(Prompt({**prompt.nodes, "1": fitted}, prompt.source), QuantSpec("bnb-nf4"), outputs)


def test_reports_of_nodes_that_load_and_quantize() -> None:
    prompt = Prompt({n: PromptNode(n, c, {}, c) for n, c in (("a", "LoadAndQuantize"), ("b", "FitModel"))}, "")
    made = {"entries": [], "seconds": 2.0}
    outputs = {"a": {"report": [made]}, "b": {"report": [{"loaded": {"transformer": {**made, "seconds": 3.0}}}]}}
    assert [r["seconds"] for r in _reports(outputs, prompt, BOTH)] == [2.0, 3.0]
    assert _reports(outputs, prompt, ("LoadAndQuantize",)) == [made]


@pytest.mark.parametrize("measured", [False, True])
def test_a_worker_that_is_killed_while_it_waits(measured: bool, tmp_path: Path) -> None:
    """A lane other than the first keeps it as its error; the first one ends the benchmark until it has a run."""
    args = argparse.Namespace(models=[])
    turn = turns(1, 1, 2, Order.INTERLEAVED)[0]
    for is_base in (False, True):
        lane = bench.Lane("gguf-q4-0", {}, bench._start(), runs=[{"seconds": 1.0}] if measured else [])
        os.kill(lane.process.pid, signal.SIGKILL)
        lane.process.wait()
        if is_base and not measured:
            with pytest.raises(bench.BenchmarkFailed, match=r"killed \(SIGKILL\)\n.*--one-by-one"):
                bench._take(args, lane, turn, tmp_path, is_base)
        else:
            bench._take(args, lane, turn, tmp_path, is_base)
            assert "--one-by-one" in lane.error
            assert lane.code == 4
        bench._close(lane)
        assert lane.process is None


def test_a_folder_that_takes_no_files_is_found_first(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", str(WORKFLOWS / "full_precision.json"), "--out"]
    for folder in ("/proc/x", "/dev/null/x"):
        assert main([*command, folder]) == 2
        assert "--out: cannot write in" in capsys.readouterr().err


def test_named() -> None:
    assert named(["full", "bnb-nf4"]) == {"full precision": None, "bnb-nf4": QuantSpec("bnb-nf4")}
    with pytest.raises(SpecError, match="twice"):
        named(["bnb-nf4", "bnb-nf4"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--repeats", "0"], "--repeats must be 1 or more"),
        (["--against", "no-such"], "no-such"),
        (["--against", "full"], "nothing in the workflow quantizes"),
    ],
)
def test_refused_before_anything_runs(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["bench", str(WORKFLOWS / "full_precision.json"), "--out", str(out), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
def test_a_worker_that_dies_leaves_the_rest(
    tmp_path: Path, demo_models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second format is killed after its first measured run; differences are from full precision, which ran last."""
    look = bench._look

    def kill_after(lane: bench.Lane, paths: list[str]) -> None:
        look(lane, paths)
        if lane.name == "gguf-q4-0":
            os.kill(lane.process.pid, signal.SIGKILL)

    monkeypatch.setattr(bench, "_look", kill_after)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    command: list[Any] = ["bench", WORKFLOWS / "quantized.json", "--against", "gguf-q4-0", "full", "--repeats", "2"]
    command += ["--models", demo_models, "--out", tmp_path / "out", "--set", "Sampler.steps=2"]
    assert main(list(map(str, command))) == 4
    assert "FAILED: gguf-q4-0: its process was killed (SIGKILL)" in capsys.readouterr().out
    data = json.loads((tmp_path / "out/benchmark_results.json").read_text(encoding="utf-8"))
    own, killed, full = data["variants"]
    assert data["reference"] == full["name"] == "full precision"
    assert full["difference"] is None
    assert own["difference"]["psnr_db"] > 10
    assert len(killed["generation_s"]["samples"]) == 1
    assert [len(v["generation_s"]["samples"]) for v in (own, full)] == [2, 2]
    assert list((tmp_path / "tmp").glob("quantwire-*")) == []


@pytest.mark.slow
def test_two_formats(tmp_path: Path, demo_models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command: list[Any] = ["bench", WORKFLOWS / "full_precision.json", "--against", "gguf-q8-0", "--repeats", "2"]
    command += ["--models", demo_models, "--out", tmp_path, "--set", "Sampler.steps=2"]
    assert main(list(map(str, command))) == 0
    assert "run 6 of 6: gguf-q8-0, measured" in capsys.readouterr().err
    data = json.loads((tmp_path / "benchmark_results.json").read_text(encoding="utf-8"))
    full, small = data["variants"]
    assert [full["name"], small["name"]] == ["full precision", "gguf-q8-0"]
    assert small["quantize_s"] > 0
    assert full["load_s"] > 0
    assert small["difference"]["psnr_db"] > 30
    assert full["memory"]["peak_allocated_nbytes"] > full["memory"]["before_nbytes"] > 0
    assert (tmp_path / "report.html").exists()
