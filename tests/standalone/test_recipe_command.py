"""`quantwire recipe` and FindRecipe: what is measured is what quantizing a layer does, and the rules carry it out."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.cli import main
from quantwire.hosts import use
from quantwire.hosts.sensitivity import Calls, Check, Probe, Replay, changed, relative2, spread
from quantwire.hosts.standalone.core_nodes import CORE_NODES
from quantwire.hosts.standalone.executor import Executor
from quantwire.hosts.standalone.host import StandaloneHost
from quantwire.nodes import NODE_CLASS_MAPPINGS
from quantwire.quantizers.apply import quantize_linears
from quantwire.quantizers.errors import SpecError, WeightError, WorkflowError
from quantwire.quantizers.measure.recipe import find_recipe
from quantwire.quantizers.measure.sensitivity import Sensitivities
from quantwire.quantizers.spec import QuantSpec
from torch import Tensor, nn

WORKFLOW = Path(__file__).resolve().parents[2] / "workflows" / "api" / "full_precision.json"
FEW = ["gguf-q8-0", "gguf-q4-0", "gguf-q3-k"]
SMALL = ["--set", "Sampler.steps=2", "--set", "Latent.width=32", "--set", "Latent.height=32"]


class Tiny(nn.Module):
    """Two branches of which one counts a hundred times as much, in float32; the last weight is exact in any format."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loud, self.quiet = nn.Linear(256, 256), nn.Linear(256, 256)
        self.out = nn.Linear(256, 256, bias=False)
        nn.init.eye_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.loud(x) + 0.01 * self.quiet(x))


@pytest.fixture
def host(demo_models: Path, tmp_path: Path) -> Iterator[StandaloneHost]:
    with use(StandaloneHost([demo_models], tmp_path)) as active:
        yield active


def probed(host: StandaloneHost, model: nn.Module, x: Tensor, **options: Any) -> Sensitivities:
    probe = Probe(host, frozenset({0}), FEW, **options)
    with torch.no_grad(), probe.watch(model, {}):
        model(x)
    return probe.result("tiny")


def test_what_counts_more_gets_more_bits(host: StandaloneHost) -> None:
    model, x = Tiny(), torch.randn(64, 256)
    found = probed(host, model, x)
    ratio = found.gains["loud"] / found.gains["quiet"]
    assert 5_000 < ratio < 20_000  # squares of a factor of a hundred
    recipe = find_recipe(found, found.full_nbytes * 18 // 100)
    assert recipe.targets == {"loud": "gguf-q8-0", "quiet": "gguf-q4-0", "out": "gguf-q3-k"}


def test_the_prediction_is_what_quantizing_does(host: StandaloneHost) -> None:
    """On other inputs than those measured, with the layers that QuantizeModel makes."""
    model, x = Tiny(), torch.randn(256, 256)
    found = probed(host, model, x)
    other = torch.randn(256, 256)
    for target in FEW:
        recipe = find_recipe(found, found.single(target).nbytes, [target])  # type: ignore[union-attr]
        assert set(recipe.targets.values()) == {target}
        layers, report = quantize_linears(model, recipe.spec())
        with torch.no_grad():
            exact = model(other)
            with changed(model, {name: _as(layer) for name, layer in layers.items()}):
                error = relative2(model(other), exact) ** 0.5
        assert report.nbytes_out == recipe.nbytes
        assert error == pytest.approx(recipe.predicted_error, rel=0.1)


def _as(layer: nn.Module) -> Any:
    return lambda x, out: layer(x)


def test_the_model_and_its_run_are_left_alone(host: StandaloneHost) -> None:
    model, x = Tiny(), torch.randn(8, 256)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        exact = model(x)
        probe = Probe(host, frozenset({0}), FEW)
        with probe.watch(model, {}):
            assert torch.equal(model(x), exact)
        assert torch.equal(model(x), exact)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_model_that_does_not_repeat_itself_is_refused(host: StandaloneHost) -> None:
    class Noisy(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0.1 * torch.randn(256)

    with pytest.raises(WorkflowError, match=r"differs by .* when it is called again"):
        probed(host, Noisy(), torch.randn(8, 256))


@pytest.mark.parametrize(("budget", "said"), [(1000, "smallest mixture"), (10**6, "at full precision, which fits")])
def test_a_budget_is_refused_before_the_model_runs(host: StandaloneHost, budget: int, said: str) -> None:
    model = Tiny()
    for watcher in (Probe(host, frozenset({0}), FEW, budget=budget), Calls(host, FEW, budget)):
        with pytest.raises(SpecError, match=said), watcher.watch(model, {}):
            pytest.fail("the model would run")


def test_a_quantized_model_and_a_second_model_are_refused(host: StandaloneHost) -> None:
    model = Tiny()
    watcher = Replay(host, frozenset())
    with watcher.watch(model, {}):
        pass
    with pytest.raises(WorkflowError, match="two different models"), watcher.watch(nn.Linear(8, 8), {}):
        pass
    layers, _ = quantize_linears(model, QuantSpec("gguf-q8-0"))
    model.loud = layers["loud"]
    with pytest.raises(WeightError, match="already quantized"), Probe(host, frozenset({0})).watch(model, {}):
        pass


def test_two_models_of_one_architecture_are_told_apart(host: StandaloneHost) -> None:
    """The errors of one, added to the other, would be measured as effects of quantization."""
    model, x = Tiny(), torch.randn(8, 256)
    finetune = copy.deepcopy(model)
    with torch.no_grad():
        finetune.quiet.weight.mul_(1.001)
        watchers = (Probe(host, frozenset({0, 1, 2}), FEW), Check(host, frozenset({0, 1, 2}), {}), Calls(host, FEW))
        for watcher in watchers:
            for same in (model, model, copy.deepcopy(model)):  # sampled with twice, loaded twice
                with watcher.watch(same, {}):
                    same(x)
            with pytest.raises(WorkflowError, match="two different models"), watcher.watch(finetune, {}):
                pytest.fail("the model would run")
    assert watchers[2].count == 3
    assert all(q.tensors[n].device.type == "cpu" for q in watchers[0]._quantized.values() for n in q.tensors)


def test_a_whole_mixture_is_never_held(host: StandaloneHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check quantizes a layer when it runs, and lets it go before the next."""
    from quantwire.hosts import sensitivity

    alive: list[weakref.ref[Any]] = []
    most = 0
    quantizer = sensitivity.require("gguf-q8-0")
    quantize = quantizer.quantize

    def counted(*args: Any) -> Any:
        nonlocal most
        made = quantize(*args)
        alive.append(weakref.ref(made))
        most = max(most, sum(ref() is not None for ref in alive))
        return made

    monkeypatch.setattr(quantizer, "quantize", counted)
    model = Tiny()
    check = Check(host, frozenset({0}), {"all": dict.fromkeys(("loud", "quiet", "out"), "gguf-q8-0")})
    with torch.no_grad(), check.watch(model, {}):
        model(torch.randn(64, 256))
    assert len(alive) == 3
    assert most == 1
    assert 0 < check.errors()["all"] < 0.02


def test_a_check_measures_whole_mixtures(host: StandaloneHost) -> None:
    model, x = Tiny(), torch.randn(64, 256)
    found = probed(host, model, x)
    check = Check(host, frozenset({0}), {t: found.mixture(t) for t in FEW} | {"nothing": {}})
    with torch.no_grad(), check.watch(model, {}):
        model(torch.randn(64, 256))
    errors = check.errors()
    assert errors["nothing"] == 0.0
    for target in FEW:
        assert errors[target] == pytest.approx(found.single(target).error2 ** 0.5, rel=0.15)  # type: ignore[union-attr]


def test_nothing_that_ran(host: StandaloneHost) -> None:
    with pytest.raises(WorkflowError, match="No sampler ran"):
        Probe(host, frozenset({0}), FEW).result("x")
    assert Calls(host).count == 0
    assert spread(8, 4) == {1, 3, 5, 7}
    assert spread(2, 4) == {0, 1}


@pytest.mark.slow
def test_recipe_of_a_workflow(demo_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Measured, checked on another seed, better than the single formats of its size, and convert takes its rules."""
    rules, data, plot = tmp_path / "rules.txt", tmp_path / "recipe.json", tmp_path / "plot.png"
    code = main(
        ["recipe", str(WORKFLOW), "--budget", "6.6MiB", "--formats", *FEW, "--levels", "2",
         "--models", str(demo_models), "--out", str(rules), "--json", str(data), "--plot", str(plot), *SMALL]
    )  # fmt: skip
    said = capsys.readouterr()
    assert code == 0, said.err
    report = json.loads(data.read_text())
    recipe = report["recipe"]
    assert recipe["nbytes"] <= 6.6 * 2**20
    measured = {s["format"]: s["measured_error"] for s in recipe["singles"]}
    assert recipe["measured_error"] < 0.5 * measured["gguf-q4-0"] < 0.5 * measured["gguf-q3-k"]
    assert measured["gguf-q8-0"] is None  # it does not fit
    assert len(report["sensitivities"]["units"]) == 33
    assert said.out.startswith("transformer: 6.")
    assert plot.read_bytes()[:4] == b"\x89PNG"
    source = demo_models / "diffusion_models" / "digits_flux.safetensors"
    assert main(["convert", str(source), str(tmp_path / "m.gguf"), "--type", "q8_0", "--rules", str(rules)]) == 0
    # Biases and norms are float32 there.
    assert abs((tmp_path / "m.gguf").stat().st_size - recipe["nbytes"]) < 100_000


@pytest.mark.slow
def test_recipe_of_a_file(demo_models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = demo_models / "diffusion_models" / "digits_flux.safetensors"
    assert main(["recipe", str(source), "--budget", "7MB", "--formats", *FEW, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["recipe"]["measured"] is False
    assert "no run of the model was measured" in data["recipe"]["how"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget", "lots"], "'lots' is no size"),
        (["--budget", "1KB"], "smallest mixture of"),
        (["--budget", "5.3MB"], "smallest mixture of"),
        (["--budget", "6.5"], "the budget of 6.05 GiB"),
        (["--budget", "1GB"], "at full precision, which fits into the budget of"),
        (["--budget", "7MB", "--formats", "gguf-q9"], "Unknown backend or format"),
        (["--budget", "7MB", "--levels", "0"], "--levels: 0"),
        (["--budget", "7MB", "--set", "Sampler.steps=2"], "--set"),
        (["--budget", "7MB", "--models", "/nowhere"], "--models"),
        (["--budget", "7MB", "--plot", "."], "--plot"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_is_refused(
    demo_models: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    source = demo_models / "diffusion_models" / "digits_flux.safetensors"
    assert main(["recipe", str(source), *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_node_feeds_quantize_model(host: StandaloneHost, tmp_path: Path) -> None:
    graph = json.loads(WORKFLOW.read_text())
    graph["8"]["inputs"] |= {"width": 32, "height": 32}
    graph["11"]["inputs"] |= {"model": ["q", 0], "steps": 1}
    find = {
        "model": ["1", 0], "positive": ["6", 0], "latent": ["8", 0], "budget": "6.6MiB", "formats": "\n".join(FEW),
        "steps": 2, "levels": 2, "seed": 3, "check": False,
    }  # fmt: skip
    graph["f"] = {"class_type": "FindRecipe", "inputs": find}
    graph["q"] = {
        "class_type": "QuantizeModel",
        "inputs": {"model": ["1", 0], "format": "gguf-q8-0", "config": ["f", 0]},
    }
    graph["p"] = {"class_type": "SaveImage", "inputs": {"images": ["f", 3], "filename_prefix": "plot"}}
    graph["t"] = {"class_type": "PreviewAny", "inputs": {"source": ["q", 1]}}
    result = Executor({**CORE_NODES, **NODE_CLASS_MAPPINGS}).run(_prompt(graph))
    recipe = next(ui for ui in result.outputs.values() if "report" in ui and "targets" in ui["report"][0])["report"][0]
    text = json.dumps(result.outputs["t"])
    for target, layers in (("gguf-q8-0", "in gguf-q8-0"), ("gguf-q4-0", "in gguf-q4-0")):
        assert (target in recipe["targets"].values()) == (layers in text)
    assert f"{recipe['nbytes'] / 2**20:.2f} MiB" in text


def _prompt(graph: dict[str, Any]) -> Any:
    from quantwire.hosts.standalone.workflow import parse_workflow

    return parse_workflow(graph)
