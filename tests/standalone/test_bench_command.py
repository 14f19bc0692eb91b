"""`quantwire bench`: the graphs that it makes, what it refuses, and a run in processes of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from quantwire.cli import main
from quantwire.hosts.bench_graph import named, with_format
from quantwire.hosts.lint.catalog import Catalog
from quantwire.hosts.standalone.core_nodes import CORE_NODES
from quantwire.hosts.standalone.workflow import Prompt, load_workflow
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
