"""BenchmarkModel in the embedded host, on the demo model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from quantwire.hosts.standalone.executor import Executor
from quantwire.hosts.standalone.progress import Interrupted
from quantwire.nodes.bench import BenchmarkModel
from quantwire.quantizers.errors import SpecError

ROOT = Path(__file__).resolve().parents[2]
Sampled = Callable[..., dict[str, Any]]


def graph(sampled: Sampled, make_node: Any, source: str = "model", **inputs: Any) -> dict[str, Any]:
    given = {
        "model": [source, 0], "positive": ["prompt", 0], "negative": ["prompt", 0], "latent_image": ["empty", 0],
        "seed": 7, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
        "repeats": 2, "warmup": 1, "folder": "bench/a", "vae": ["vae", 0], **inputs,
    }  # fmt: skip
    nodes = sampled(bench=make_node("BenchmarkModel", **given), got=make_node("Keep", value=["bench", 1]))
    return {k: v for k, v in nodes.items() if k not in ("latent", "image", "sampler", "decoded")}


@pytest.mark.slow
def test_two_formats(sampled: Sampled, make_node: Any, host: Any, executor: Executor, tmp_path: Path) -> None:
    result = executor.run(graph(sampled, make_node, against="quanto-qint8"))
    plots = result.results["got"][0]
    assert plots.shape[0] == 4
    assert plots.dtype == torch.float32
    assert 0 <= float(plots.min()) <= float(plots.max()) <= 1
    folder = tmp_path / "out" / "bench" / "a"
    data = json.loads((folder / "benchmark_results.json").read_text(encoding="utf-8"))
    jsonschema.validate(data, json.loads((ROOT / "docs/schemas/benchmark_results.schema.json").read_text()))
    config = json.loads((folder / "quantization_config.json").read_text(encoding="utf-8"))
    jsonschema.validate(config, json.loads((ROOT / "docs/schemas/quantization_config.schema.json").read_text()))
    full, small = data["variants"]
    assert [full["name"], small["name"]] == ["full precision", "quanto-qint8"]
    assert len(full["generation_s"]["samples"]) == len(small["generation_s"]["samples"]) == 2
    assert len(small["step_s"]["samples"]) == 2  # of two steps the first is left out
    assert small["memory"]["weights_nbytes"] < full["memory"]["weights_nbytes"]
    assert 0 < small["difference"]["relative_error"] < 0.1
    assert small["difference"]["psnr_db"] > 30
    assert (folder / small["sample"]).read_bytes()[:4] == b"\x89PNG"
    assert "data:image/png" in (folder / "report.html").read_text(encoding="utf-8")


def test_a_quantized_model_is_not_quantized_again(
    sampled: Sampled, make_node: Any, host: Any, executor: Executor
) -> None:
    nodes = graph(sampled, make_node, "q", against="bnb-nf4")
    nodes["q"] = make_node("QuantizeModel", model=["model", 0], format="gguf-q8-0")
    with pytest.raises(SpecError, match="quantized already"):
        executor.run(nodes)


def test_a_format_that_runs_out_of_memory_costs_the_others_nothing(
    sampled: Sampled, make_node: Any, host: Any, executor: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that runs out in the third generation, the first of the format, is raised by hand: it cannot be had."""
    sample, runs = type(host).sample, []

    def short_of_memory(self: Any, model: Any, *args: Any) -> Any:
        runs.append(model)
        if len(runs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample(self, model, *args)

    monkeypatch.setattr(type(host), "sample", short_of_memory)
    executor.run(graph(sampled, make_node, against="gguf-q8-0", order="one by one", repeats=1, steps=1))
    text = (tmp_path / "out" / "bench" / "a" / "benchmark_results.json").read_text(encoding="utf-8")
    full, failed = json.loads(text)["variants"]
    assert len(full["generation_s"]["samples"]) == 1
    assert failed["error"] == "OutOfMemoryError: CUDA out of memory"
    assert failed["generation_s"] is None
    assert len(runs) == 3


def test_a_user_who_stops_is_heard(
    sampled: Sampled, make_node: Any, host: Any, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, runs = type(host).sample, []

    def stopped(self: Any, model: Any, *args: Any) -> Any:
        runs.append(model)
        if len(runs) > 2:
            raise Interrupted("Interrupted.")
        return sample(self, model, *args)

    monkeypatch.setattr(type(host), "sample", stopped)
    with pytest.raises(Interrupted):
        executor.run(graph(sampled, make_node, against="gguf-q8-0", order="one by one", repeats=1, steps=1, folder="b"))


@pytest.mark.parametrize(("against", "said"), [("no-such", "no-such"), ("bnb-nf4\nbnb-nf4", "twice")])
def test_bad_lines(host: Any, against: str, said: str) -> None:
    assert said in str(BenchmarkModel.VALIDATE_INPUTS(against=against))
    assert BenchmarkModel.VALIDATE_INPUTS(against="bnb-nf4  # four bits\n\n") is True
    assert "leads out" in str(BenchmarkModel.VALIDATE_INPUTS(folder="../x"))
