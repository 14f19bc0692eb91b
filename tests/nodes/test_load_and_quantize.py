"""LoadAndQuantize against UNETLoader and QuantizeModel: the same tensors, the first and every other time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.hosts.standalone.executor import Executor
from quantwire.hosts.standalone.load import flux_parts
from quantwire.hosts.standalone.validate import InvalidWorkflow
from quantwire.quantizers.errors import FileError, SpecError
from quantwire.quantizers.files.checkpoint import read_safetensors
from quantwire.quantizers.files.quantized_file import read_quantized, write_quantized
from quantwire.quantizers.registry import availability, get_quantizer
from quantwire.quantizers.spec import QuantSpec
from safetensors.torch import save_file
from torch import nn

FORMATS = ["bnb-nf4", "bnb-int8", "quanto-qint4", "gguf-q8-0", "comfy-fp8-e4m3fn", "comfy-nvfp4"]
FILE = "digits_flux.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUANTWIRE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def models(host: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    return folder


def raw_state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.contiguous().reshape(-1).view(torch.uint8) for n, t in module.state_dict().items()}


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    a, b = raw_state(ours), raw_state(theirs)
    assert set(a) == set(b)
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("format_id", FORMATS)
def test_equals_quantize_model(executor: Executor, sampled: Any, make_node: Any, cache: Path, format_id: str) -> None:
    if not availability(format_id).works:
        pytest.skip(availability(format_id).reason)
    graph = sampled("load", load=make_node("LoadAndQuantize", model_name=FILE, format=format_id))
    graph |= {
        "again": make_node("LoadAndQuantize", model_name=FILE, format=format_id, keep_layers=" "),
        "q": make_node("QuantizeModel", model=["model", 0], format=format_id),
    }
    graph |= {f"keep {n}": make_node("Keep", value=[n, 0]) for n in ("load", "again", "q")}
    graph |= {f"report {n}": make_node("Keep", value=[n, 1]) for n in ("load", "again", "q")}
    results = executor.run(graph).results
    wanted = results["keep q"][0].transformer
    for name in ("load", "again"):
        assert_same(results[f"keep {name}"][0].transformer, wanted)
    assert torch.isfinite(results["image"][0]).all()
    notes = {results[f"report {n}"][0].notes[-1].split(" ")[0] for n in ("load", "again")}
    assert notes == {"Made", "From"}
    assert len(list(cache.glob("*.safetensors"))) == 1
    by_name = {e.name: (e.action, e.nbytes_in, e.nbytes_out) for e in results["report q"][0].entries}
    assert {e.name: (e.action, e.nbytes_in, e.nbytes_out) for e in results["report load"][0].entries} == by_name


def test_a_damaged_cache_entry_is_made_again_when_verified(
    executor: Executor, make_node: Any, host: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(keep: str) -> Any:
        node = make_node("LoadAndQuantize", model_name=FILE, format="gguf-q8-0", keep_layers=keep)
        graph = {"load": node, "m": make_node("Keep", value=["load", 0]), "r": make_node("Keep", value=["load", 1])}
        results = executor.run(graph).results
        return results["m"][0].transformer, results["r"][0].notes[-1].split(" ")[0]

    first, _ = load("")
    wanted = {name: tensor.clone() for name, tensor in raw_state(first).items()}
    del first
    (path,) = cache.glob("*.safetensors")
    content = path.read_bytes()
    path.unlink()  # a map of it may still be there
    path.write_bytes(content[:-4096] + bytes(byte ^ 1 for byte in content[-4096:]))
    assert load(" ")[1] == "From"
    monkeypatch.setenv("QUANTWIRE_CACHE_VERIFY", "1")
    again, came = load("  ")
    assert came == "Made"
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in raw_state(again).items())
    assert load("   ")[1] == "From"


def test_library_carrier(executor: Executor, make_node: Any, host: Any) -> None:
    graph = {
        "model": make_node("UNETLoader", unet_name=FILE, weight_dtype="default"),
        "load": make_node("LoadAndQuantize", model_name=FILE, format="gguf-q8-0", carrier="library"),
        "q": make_node("QuantizeModel", model=["model", 0], format="gguf-q8-0", carrier="library"),
    }
    graph |= {f"keep {n}": make_node("Keep", value=[n, 0]) for n in ("load", "q")}
    results = executor.run(graph).results
    ours, theirs = (results[f"keep {n}"][0].transformer for n in ("load", "q"))
    name = "transformer_blocks.0.attn.to_k"
    assert type(ours.get_submodule(name)) is type(theirs.get_submodule(name))
    assert type(ours.get_submodule(name)).__name__ == "GGUFLinear"


def test_cache_off_writes_nothing(executor: Executor, make_node: Any, host: Any, cache: Path) -> None:
    load = make_node("LoadAndQuantize", model_name=FILE, format="bnb-nf4", cache=False)
    report = executor.run({"load": load, "out": make_node("Keep", value=["load", 1])}).results["out"][0]
    assert "the cache is off" in report.notes[-1]
    assert not cache.exists()


def test_config_and_layers_to_keep(executor: Executor, make_node: Any, host: Any) -> None:
    graph = {
        "config": make_node("QuantConfig", uri="bnb;bits=4;bits4-use-double-quant=true"),
        "load": make_node(
            "LoadAndQuantize", model_name=FILE, format="from config", config=["config", 0], keep_layers="*.attn.to_q"
        ),
        "out": make_node("Keep", value=["load", 0]),
    }
    attention = executor.run(graph).results["out"][0].transformer.transformer_blocks[0].attn
    assert type(attention.to_q) is nn.Linear
    assert "nested_absmax" in dict(attention.to_k.named_parameters())


def test_a_layer_that_the_format_cannot_hold(executor: Executor, make_node: Any, host: Any, cache: Path) -> None:
    """The rotation of this format mixes columns in groups of 256; this embedder has 128."""
    graph = {
        "config": make_node("QuantConfig", uri="comfy-int8-convrot;include=context_embedder"),
        "load": make_node("LoadAndQuantize", model_name=FILE, format="from config", config=["config", 0]),
        "out": make_node("Keep", value=["load", 1]),
    }
    with pytest.raises(SpecError, match=r"'context_embedder.weight': comfy-int8-convrot: K=128"):
        executor.run(graph)
    assert not list(cache.glob("*.safetensors"))
    graph["load"]["inputs"]["on_failure"] = "full precision"
    for _ in range(2):
        report = executor.run(graph).results["out"][0]
        assert [w.split(" ")[0] for w in report.warnings] == ["context_embedder.weight"]
        graph["load"]["inputs"]["keep_layers"] = " "  # the next time from the cache, warning and all
    assert report.notes[-1].startswith("From the cache")


def test_files_that_do_not_fit(executor: Executor, make_node: Any, models: Path, demo_models: Path) -> None:
    tensors: Any = read_safetensors(demo_models / "diffusion_models" / FILE).tensors
    whole: dict[str, torch.Tensor] = {n: t.clone() for n, t in tensors.items()}
    cases = {
        "missing.safetensors": ({n: t for n, t in whole.items() if n != "img_in.bias"}, "'img_in.bias' is missing"),
        "more.safetensors": ({**whole, "more": torch.zeros(3)}, "1 unknown tensors, such as 'more'"),
        "shape.safetensors": ({**whole, "img_in.bias": torch.zeros(3)}, "has shape"),
        "other.safetensors": ({"x": torch.zeros(3)}, "not a FLUX transformer"),
        "fp8.safetensors": ({n: t.to(torch.float8_e4m3fn) for n, t in whole.items()}, "float8_e4m3fn"),
    }
    for name, (content, said) in cases.items():
        save_file(content, models / name)
        load = make_node("LoadAndQuantize", model_name=name, format="bnb-nf4")
        with pytest.raises(FileError, match=name) as caught:
            executor.run({"load": load, "out": make_node("Keep", value=["load", 0])})
        assert said in str(caught.value)


def test_a_quantized_file_is_refused(executor: Executor, make_node: Any, models: Path) -> None:
    q = get_quantizer("gguf-q8-0").quantize(torch.randn(4, 32), QuantSpec("gguf-q8-0"))
    write_quantized(models / "q.safetensors", [("x.weight", q)], {})
    assert read_quantized(models / "q.safetensors").tensors
    load = make_node("LoadAndQuantize", model_name="q.safetensors", format="bnb-nf4")
    with pytest.raises(FileError, match="already quantized"):
        executor.run({"load": load, "out": make_node("Keep", value=["load", 0])})


def test_a_missing_file_is_named_before_the_run(executor: Executor, make_node: Any, host: Any) -> None:
    load = make_node("LoadAndQuantize", model_name="digits_flux.safetensor", format="bnb-nf4")
    with pytest.raises(InvalidWorkflow, match=FILE):
        executor.run({"load": load, "out": make_node("Keep", value=["load", 0])})


def test_parts_cover_the_file(host: Any) -> None:
    from quantwire.hosts.standalone import flux
    from quantwire.quantizers.files.stream import TensorFile

    file = TensorFile(host.resolve("diffusion_models", FILE))
    config = flux.config_of(file.shapes, FILE)
    parts, unused = flux_parts(file, config, torch.bfloat16)
    assert unused == set()
    assert sum(torch.Size(p.shape).numel() for p in parts) == sum(t.numel() for t in file.shapes.values())
    model = flux.build(config)
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {p.name for p in parts if p.linear} == linear
