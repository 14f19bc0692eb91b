"""SaveQuantized in the embedded host: what is saved and loaded again is the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.hosts.standalone.executor import Executor
from quantwire.nodes.save import LAYOUTS
from quantwire.quantizers.errors import FileError, SpecError
from quantwire.quantizers.files.model_file import open_model
from quantwire.quantizers.files.schemes.scan import scan
from quantwire.quantizers.files.writers import WRITERS
from quantwire.quantizers.registry import availability

FILE = "digits_flux.safetensors"
# format -> how the file is laid out, and whether its names are ComfyUI's
SAVED = {
    "bnb-nf4": ("bnb", True),
    "quanto-qint8": ("quanto", True),
    "gguf-q8-0": ("gguf", True),
    "comfy-int8": ("comfy", True),
    "comfy-nvfp4": ("comfy", False),  # one scale for a whole weight, and q, k and v have three
    "layerwise-fp8-e4m3fn": ("plain-fp8", True),
}


def test_the_layouts_are_those_of_the_writers() -> None:
    assert set(LAYOUTS) == {*WRITERS, "gguf"}


def graph_of(make_node: Any, format_id: str, **save: Any) -> dict[str, Any]:
    return {
        "model": make_node("UNETLoader", unet_name=FILE, weight_dtype="default"),
        "q": make_node("QuantizeModel", model=["model", 0], format=format_id),
        "save": make_node("SaveQuantized", model=["q", 0], **{"filename": "a/m", **save}),
        "path": make_node("Keep", value=["save", 0]),
        "report": make_node("Keep", value=["save", 1]),
    }


@pytest.mark.parametrize(
    "format_id", [pytest.param(f, marks=[pytest.mark.slow] if f.startswith(("quanto", "comfy")) else []) for f in SAVED]
)
def test_the_loaded_file_gives_the_same_picture(
    executor: Executor, sampled: Any, make_node: Any, host: Any, tmp_path: Path, format_id: str
) -> None:
    if not availability(format_id).works:
        pytest.skip(availability(format_id).reason)
    layout, comfyui = SAVED[format_id]
    first = executor.run(sampled("q", **graph_of(make_node, format_id))).results
    path, report = Path(first["path"][0]), first["report"][0]
    assert path == tmp_path / "out" / "a" / ("m.gguf" if layout == "gguf" else "m.safetensors")
    assert any("diffusers" in w for w in report.warnings) != comfyui
    assert any(n.startswith(f"layout {layout}:") for n in report.notes) or layout == "gguf"
    names = scan(open_model(path)).shapes
    assert ("double_blocks.0.img_attn.qkv.weight" in names) == comfyui
    folder = tmp_path / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    path.rename(folder / path.name)
    name = {"gguf_name": path.name} if layout == "gguf" else {"model_name": path.name}
    load = make_node("LoadGGUF" if layout == "gguf" else "LoadQuantized", **name)
    again = executor.run(sampled("load", load=load)).results
    assert torch.equal(again["latent"][0]["samples"], first["latent"][0]["samples"])
    assert torch.equal(again["image"][0], first["image"][0])


def test_a_file_is_replaced_only_when_told(executor: Executor, make_node: Any, host: Any, tmp_path: Path) -> None:
    path = tmp_path / "out" / "a" / "m.safetensors"
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(FileError, match=r"is there already\.\nSet overwrite"):
        executor.run(graph_of(make_node, "layerwise-fp8-e4m3fn"))
    assert path.read_text() == "mine"
    executor.run(graph_of(make_node, "layerwise-fp8-e4m3fn", overwrite=True))
    assert scan(open_model(path)).layers


def test_another_layout_can_be_asked_for(executor: Executor, make_node: Any, host: Any, tmp_path: Path) -> None:
    executor.run(graph_of(make_node, "layerwise-fp8-e4m3fn", layout="quantwire"))
    layers = scan(open_model(tmp_path / "out" / "a" / "m.safetensors")).layers
    assert {layer.scheme for layer in layers.values()} == {"quantwire"}
    with pytest.raises(SpecError, match=r"^The layout bnb cannot hold layerwise-fp8-e4m3fn"):
        executor.run(graph_of(make_node, "layerwise-fp8-e4m3fn", layout="bnb", filename="n"))


def test_what_is_not_quantized_is_refused(executor: Executor, make_node: Any, host: Any, tmp_path: Path) -> None:
    graph = graph_of(make_node, "bnb-nf4")
    graph["save"]["inputs"]["model"] = ["model", 0]
    with pytest.raises(SpecError, match=r"no layer is quantized.*\n.*ModelSave"):
        executor.run(graph)
    assert not (tmp_path / "out").exists()


def test_layers_of_a_library_are_refused(executor: Executor, make_node: Any, host: Any) -> None:
    graph = graph_of(make_node, "bnb-nf4")
    graph["q"]["inputs"]["carrier"] = "library"
    with pytest.raises(SpecError, match=r"Quantize with carrier quantwire, and save that\."):
        executor.run(graph)


def test_a_lora_beside_a_quantized_layer_is_refused(host: Any, demo_models: Path) -> None:
    from quantwire.hosts.standalone.lora import LoraLinear
    from quantwire.hosts.standalone.models import load_diffusion_model
    from quantwire.hosts.standalone.saving import saved_tensors
    from quantwire.quantizers.registry import require
    from quantwire.quantizers.spec import QuantSpec
    from quantwire.quantizers.weight import QuantizedLinear
    from torch import nn

    model = load_diffusion_model(demo_models / "diffusion_models" / FILE)
    name = "transformer_blocks.0.attn.to_q"
    layer: Any = model.transformer.get_submodule(name)
    weight = require("layerwise-fp8-e4m3fn").quantize(layer.weight.data, QuantSpec("layerwise-fp8-e4m3fn"))
    n, k = weight.orig_shape

    def with_lora(inner: nn.Module) -> Any:
        lora = LoraLinear(inner, torch.ones(2, k), torch.ones(n, 2), 0.5)
        return host.with_layers(model, {"transformer": {name: lora}})

    with pytest.raises(SpecError, match=rf"'{name}': a LoRA stands beside this layer.*\n.*set lora to requantize"):
        saved_tensors(with_lora(QuantizedLinear(weight, layer.bias)))
    merged = saved_tensors(with_lora(layer)).tensors["double_blocks.0.img_attn.qkv.weight"]
    assert torch.equal(merged[:n], (layer.weight.float() + 1.0).to(layer.weight.dtype))  # type: ignore[index]
