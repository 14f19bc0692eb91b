"""FitModel in the embedded host: what it gives is what the loaders and quantizers give."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.hosts.standalone.executor import Executor
from quantwire.hosts.standalone.host import StandaloneHost
from quantwire.nodes import NODE_CLASS_MAPPINGS
from quantwire.nodes.fitting import FitReport
from quantwire.quantizers.auto import DeviceFacts
from quantwire.quantizers.errors import SpecError

FILE = "digits_flux.safetensors"
GIB, MIB, RESERVE = 1 << 30, 1 << 20, 1 << 28
Graph = dict[str, dict[str, Any]]
Run = Callable[..., tuple[torch.Tensor, FitReport]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTWIRE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(executor: Executor, sampled: Callable[..., Graph], make_node: Any) -> Run:
    """run(bytes, **inputs): the latent sampled with FitModel's model and text encoders in so much memory, and its
    report; more nodes as `nodes`."""

    def go(nbytes: int, nodes: Graph | None = None, **inputs: Any) -> tuple[torch.Tensor, FitReport]:
        given = {"model_name": FILE, "vram_gib": (RESERVE + nbytes) / GIB, "clip": ["clip", 0], **inputs}
        graph = sampled("fit", fit=make_node("FitModel", width=64, height=64, **given), **(nodes or {}))
        graph["prompt"]["inputs"]["clip"] = ["fit", 1]
        graph["report"] = make_node("Keep", value=["fit", 2])
        results = executor.run(graph).results
        return results["latent"][0]["samples"], results["report"][0]

    return go


@pytest.fixture
def plain(executor: Executor, sampled: Callable[..., Graph]) -> Callable[..., torch.Tensor]:
    def go(source: str = "model", clip: str = "clip", **nodes: dict[str, Any]) -> torch.Tensor:
        return executor.run(sampled(source, clip, **nodes)).results["latent"][0]["samples"]

    return go


def test_full_precision_where_it_fits(run: Run, plain: Callable[..., torch.Tensor]) -> None:
    latent, report = run(GIB)
    assert torch.equal(latent, plain())
    told = report.to_dict()
    assert [pick["format"] for pick in told["picks"]] == [None, None]
    assert told["measured_nbytes"] == {pick["part"]: pick["nbytes"] for pick in told["picks"]}
    assert told["measured_peak_nbytes"] > told["measured_nbytes"]["transformer"]  # after the run


def test_quantizes_what_does_not_fit(run: Run, plain: Callable[..., torch.Tensor], make_node: Any) -> None:
    _, report = run(GIB)
    latent, report = run(report.fit.choice.outcome.peak_nbytes - 2 * MIB)
    picks = {pick["part"]: pick["format"] for pick in report.to_dict()["picks"]}
    nodes = {"load": make_node("LoadAndQuantize", model_name=FILE, format=picks["transformer"])}
    clip = "clip"
    if picks["clip_l"] is not None:
        nodes["text"] = make_node("QuantizeTextEncoder", clip=["clip", 0], format=picks["clip_l"])
        clip = "text"
    assert torch.equal(latent, plain("load", clip, **nodes))
    for pick in report.to_dict()["picks"]:
        assert report.measured[pick["part"]] == pytest.approx(pick["nbytes"], rel=0.01)
    assert "does not fit" in str(report)


@pytest.mark.slow
def test_a_quantized_file_stays_as_it_is(
    run: Run, plain: Callable[..., torch.Tensor], make_node: Any, tmp_path: Path, demo_models: Path
) -> None:
    from quantwire.cli import main

    folder = tmp_path / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    source = demo_models / "diffusion_models" / FILE
    for name in ("small.gguf", "small.safetensors"):
        kind = ["--type", "Q8_0"] if name.endswith("gguf") else ["--type", "quanto-qint8"]
        assert main(["convert", str(source), str(folder / name), *kind]) == 0
        latent, report = run(GIB, model_name=name)
        assert torch.equal(latent, plain("load", load=make_node("LoadQuantized", model_name=name)))
        assert "quantized already" in str(report)
        assert "from a full-precision file: it would fit as it is" in str(report)


def test_a_linked_recipe(run: Run, plain: Callable[..., torch.Tensor], make_node: Any) -> None:
    rules = {
        "rules": make_node("QuantRules", rules="transformer_blocks = quanto-qint8\nsingle_transformer_blocks = bnb-nf4")
    }
    latent, report = run(GIB, rules, config=["rules", 0])
    assert report.to_dict()["picks"][0]["name"] == "linked recipe"
    load = make_node("LoadAndQuantize", model_name=FILE, format="quanto-qint8", config=["rules", 0])
    assert torch.equal(latent, plain("load", load=load, **rules))


@pytest.mark.slow
def test_a_mixed_recipe_spends_what_is_left(run: Run) -> None:
    _, report = run(GIB)
    nbytes = report.fit.choice.outcome.peak_nbytes - 2 * MIB
    _, single = run(nbytes)
    _, mixed = run(nbytes, mixed=True)
    one, many = single.fit.choice.model, mixed.fit.choice.model
    assert many.candidate.name == "mixed recipe"
    assert many.candidate.loss < one.candidate.loss
    assert one.nbytes < many.nbytes
    assert mixed.fit.choice.outcome.peak_nbytes <= nbytes
    assert mixed.measured["transformer"] == pytest.approx(many.nbytes, rel=0.01)


def test_sets_the_mode_for_a_device_that_is_only_described(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded host computes on the CPU here, where components move as they would to and from a GPU."""
    small = DeviceFacts("mps", "described", RESERVE + 14 * MIB, RESERVE + 14 * MIB)
    monkeypatch.setattr("quantwire.nodes.fitting.device_of", lambda host: small)
    _, report = run(0, vram_gib=0.0, config=None)
    told = report.to_dict()
    assert told["mode"] != "none"
    assert f"Set: {told['mode']}" in str(report)
    mode = next(m for m in told["forecast"]["modes"] if m["mode"] == told["mode"])
    assert mode["level"] == "ok"


def test_more_memory_than_the_device_has_is_not_promised(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    small = DeviceFacts("cpu", "described", RESERVE + GIB, RESERVE + GIB)
    monkeypatch.setattr("quantwire.nodes.fitting.device_of", lambda host: small)
    _, report = run(47 * GIB)
    assert report.fit.device.total_nbytes == RESERVE + GIB
    assert "WARNING: vram_gib asks for 47.25 GiB; described has 1.25 GiB" in str(report)


def test_without_text_encoders(executor: Executor, sampled: Callable[..., Graph], make_node: Any) -> None:
    graph = sampled("fit", fit=make_node("FitModel", model_name=FILE, vram_gib=8.0))
    graph |= {"report": make_node("Keep", value=["fit", 2]), "none": make_node("Keep", value=["fit", 1])}
    results = executor.run(graph).results
    assert results["none"][0] is None
    assert "none linked to clip" in str(results["report"][0])


def test_nothing_fits(run: Run) -> None:
    with pytest.raises(SpecError, match="Nothing fits"):
        run(MIB)


def test_a_file_that_is_not_there(host: StandaloneHost) -> None:
    node: Any = NODE_CLASS_MAPPINGS["FitModel"]
    assert node.VALIDATE_INPUTS(None) is True
    assert node.VALIDATE_INPUTS(FILE) is True
    assert "no.safetensors" in node.VALIDATE_INPUTS("no.safetensors")
    assert node.IS_CHANGED(FILE).startswith(FILE)


def test_another_size_of_the_file_is_seen(host: StandaloneHost, tmp_path: Path, demo_models: Path) -> None:
    node: Any = NODE_CLASS_MAPPINGS["FitModel"]
    (tmp_path / "models" / "diffusion_models").mkdir(parents=True)
    copy = shutil.copy(
        demo_models / "diffusion_models" / FILE, tmp_path / "models" / "diffusion_models" / "a.safetensors"
    )
    before = node.IS_CHANGED("a.safetensors")
    with open(copy, "ab") as file:
        file.write(b"0")
    assert node.IS_CHANGED("a.safetensors") != before
