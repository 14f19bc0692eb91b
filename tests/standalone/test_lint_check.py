"""Nodes, files, links, values and formats that are not there or do not fit."""

from __future__ import annotations

import copy
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from quantwire.hosts.lint.catalog import Catalog, core_nodes, from_line, pack_nodes, to_line
from quantwire.hosts.lint.graph import Finding, Level
from quantwire.hosts.lint.lint import FileReport, Linter, Options
from quantwire.hosts.standalone.core_nodes import CORE_NODES
from quantwire.nodes import NODE_CLASS_MAPPINGS
from quantwire.quantizers.compat.modes import Carrier, HostName, OffloadMode
from quantwire.quantizers.registry import availability, format_ids

SHIPPED = Path(__file__).parents[2] / "workflows" / "api"
QUANTIZED = json.loads((SHIPPED / "quantized.json").read_text(encoding="utf-8"))
FULL = json.loads((SHIPPED / "full_precision.json").read_text(encoding="utf-8"))
BOTH = pytest.mark.parametrize("host", list(HostName), ids=lambda h: h.value)


def check(tmp_path: Path, graph: Any, **options: Any) -> FileReport:
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(graph), encoding="utf-8")
    return Linter(Options(**options), NODE_CLASS_MAPPINGS).check(path)


def changed(node_id: str, graph: Any = QUANTIZED, class_type: str = "", **inputs: Any) -> Any:
    graph = copy.deepcopy(graph)
    graph[node_id]["inputs"].update(inputs)
    graph[node_id]["class_type"] = class_type or graph[node_id]["class_type"]
    return graph


def only(report: FileReport, level: Level = Level.ERROR) -> Finding:
    (finding,) = report.findings
    assert finding.level is level, finding
    return finding


# --- files --------------------------------------------------------------------------------------------------------


@BOTH
def test_missing_model_is_named_with_near_ones(host: HostName, demo_models: Path, tmp_path: Path) -> None:
    graph = changed("1", unet_name="digit_flux.safetensors")
    found = only(check(tmp_path, graph, host=host, models=(demo_models,)))
    assert found.code == "missing-model"
    assert found.where == "node 1 'Model' (UNETLoader)"
    assert "unet_name: 'digit_flux.safetensors' is not in diffusion_models. Did you mean digits_flux" in found.message
    assert str(demo_models) in found.remedies[-1]


@BOTH
def test_models_can_be_left_out(host: HostName, tmp_path: Path) -> None:
    graph = changed("1", unet_name="not_here.safetensors")
    assert check(tmp_path, graph, host=host, find_models=False).findings == ()


def test_models_of_nodes_that_only_comfyui_has(demo_models: Path, tmp_path: Path) -> None:
    graph = copy.deepcopy(FULL)
    graph["30"] = {
        "class_type": "LoraLoader",
        "inputs": {"model": ["1", 0], "clip": ["4", 0], "lora_name": "x.safetensors"},
    }
    graph["30"]["inputs"] |= {"strength_model": 1.0, "strength_clip": 1.0}
    graph["11"]["inputs"]["model"] = ["30", 0]
    graph["10"]["inputs"]["vae_name"] = "pixel_space"
    report = check(tmp_path, graph, models=(demo_models,))
    assert report.host is HostName.COMFYUI
    found = only(report)
    assert (found.code, found.data["folder"]) == ("missing-model", "loras")


def test_windows_separators_are_told(demo_models: Path, tmp_path: Path) -> None:
    (tmp_path / "models" / "diffusion_models" / "flux").mkdir(parents=True)
    target = tmp_path / "models" / "diffusion_models" / "flux" / "a.safetensors"
    target.write_bytes((demo_models / "diffusion_models" / "digits_flux.safetensors").read_bytes())
    graph = changed("1", unet_name="flux\\a.safetensors")
    found = only(check(tmp_path, graph, models=(tmp_path / "models", demo_models)))
    assert "Windows' separators" in found.message


def test_download_that_the_workflow_names(demo_models: Path, tmp_path: Path) -> None:
    editor = json.loads((SHIPPED.parent / "full_precision.json").read_text(encoding="utf-8"))
    loader = editor["nodes"][0]
    loader["widgets_values"][0] = "other.safetensors"
    url = "https://example.org/other.safetensors"
    loader["properties"]["models"] = [{"name": "other.safetensors", "url": url, "directory": "diffusion_models"}]
    found = only(check(tmp_path, editor, models=(demo_models,)))
    assert found.remedies[0] == f"The workflow names {url}."


def test_a_folder_elsewhere_is_not_a_model_folder(demo_models: Path, tmp_path: Path) -> None:
    (tmp_path / "diffusion_models").mkdir()
    graph = changed("1", unet_name="../vae/digits_tae.safetensors")
    assert only(check(tmp_path, graph, models=(tmp_path, demo_models))).code == "missing-model"


@BOTH
def test_damaged_file(host: HostName, demo_models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    whole = (demo_models / "diffusion_models" / "digits_flux.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:5000])
    graph = changed("1", unet_name="cut.safetensors")
    found = only(check(tmp_path, graph, host=host, models=(tmp_path / "models", demo_models)))
    assert (found.code, found.where) == ("damaged-model", "node 1 'Model' (UNETLoader)")
    assert "cut.safetensors" in found.message


def test_types_of_text_encoders_are_the_hosts(demo_models: Path, tmp_path: Path) -> None:
    """ComfyUI has types that the embedded host lacks."""
    graph = changed("4", FULL, class_type="LoadGGUFTextEncoder", clip_name1="digits_clip.safetensors", type="wan")
    options = {"models": (demo_models,)}
    assert check(tmp_path, graph, host=HostName.COMFYUI, **options).findings == ()
    assert {f.code for f in check(tmp_path, graph, host=HostName.STANDALONE, **options).findings} == {"bad-value"}


def native_file(path: Path, *confs: dict[str, Any]) -> None:
    """A safetensors file whose layers are in ComfyUI's native formats, as its header and marks tell."""
    header: dict[str, Any] = {}
    data = b""
    for i, conf in enumerate(confs):
        raw = json.dumps(conf).encode()
        header[f"layer{i}.comfy_quant"] = {
            "dtype": "U8",
            "shape": [len(raw)],
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_native_formats_are_read_from_the_file(demo_models: Path, tmp_path: Path) -> None:
    name = "native.safetensors"
    confs = ({"format": "nvfp4"}, {"format": "int8_tensorwise", "convrot": True}, {"format": "of the future"})
    native_file(tmp_path / "models" / "diffusion_models" / name, *confs)
    graph = changed("1", FULL, unet_name=name)
    models = (tmp_path / "models", demo_models)
    report = check(tmp_path, graph, models=models, offload=OffloadMode.SEQUENTIAL)
    blocked = {(f.data["carrier"], f.data["format"]) for f in report.findings if f.level is Level.BLOCK}
    assert blocked == {(Carrier.HOST.value, "comfy-nvfp4"), (Carrier.HOST.value, "comfy-int8-convrot")}
    assert check(tmp_path, graph, models=models, offload=OffloadMode.MODEL).findings == ()


# --- nodes --------------------------------------------------------------------------------------------------------


@BOTH
def test_unknown_node_is_named_with_a_near_one(host: HostName, demo_models: Path, tmp_path: Path) -> None:
    graph = changed("12", FULL, class_type="VAEDecodee")
    found = only(check(tmp_path, graph, host=host, models=(demo_models,)))
    assert found.code == "unknown-node"
    assert found.where == "node 12 'Decode' (VAEDecodee)"
    assert "Did you mean VAEDecode" in found.message


def test_known_nodes_are_not_reported(demo_models: Path, tmp_path: Path) -> None:
    graph = changed("12", FULL, class_type="MyPack VAE Decode")
    options = {"host": HostName.COMFYUI, "models": (demo_models,)}
    assert only(check(tmp_path, graph, **options)).code == "unknown-node"
    assert check(tmp_path, graph, known=("MyPack*",), **options).findings == ()


def test_pack_of_a_node_is_named(tmp_path: Path) -> None:
    node = {"id": 1, "type": "FancySampler", "properties": {"cnr_id": "fancy-pack"}, "widgets_values": []}
    found = only(check(tmp_path, {"nodes": [node], "links": []}))
    assert "it is from fancy-pack" in found.message


def test_nothing_would_run(tmp_path: Path) -> None:
    graph = {"1": {"class_type": "UNETLoader", "inputs": {"unet_name": "a", "weight_dtype": "default"}}}
    for host in HostName:
        assert only(check(tmp_path, graph, host=host, find_models=False)).code == "no-output"


def test_a_check_that_never_runs_is_told(demo_models: Path, tmp_path: Path) -> None:
    graph = changed("11", model=["2", 0])
    found = only(check(tmp_path, graph, models=(demo_models,)), Level.WARNING)
    assert (found.code, found.where) == ("unused-check", "node 3 'Offload check' (OffloadCompat)")


# --- links and values ---------------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "to nowhere": ({"model": ["99", 0]}, "bad-link", "node 99, which is not in the workflow"),
    "an output that is not there": ({"model": ["1", 3]}, "bad-link", "output 3 of node 1"),
    "another type": ({"model": ["4", 0]}, "bad-link", "CLIP"),
    "an unknown format": ({"format": "bnb-nf5"}, "bad-value", "bnb-nf4"),
    "an unknown carrier": ({"carrier": "quantwires"}, "bad-value", "quantwire"),
}


@BOTH
@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_one_node(name: str, host: HostName, demo_models: Path, tmp_path: Path) -> None:
    inputs, code, said = FAULTS[name]
    report = check(tmp_path, changed("2", **inputs), host=host, models=(demo_models,))
    found = next(f for f in report.findings if f.code == code)
    assert found.level is Level.ERROR
    assert found.where == "node 2 'Quantize' (QuantizeModel)"
    assert said in " ".join([found.message, *found.remedies])


@BOTH
def test_missing_input(host: HostName, demo_models: Path, tmp_path: Path) -> None:
    graph = copy.deepcopy(QUANTIZED)
    del graph["2"]["inputs"]["format"]
    found = only(check(tmp_path, graph, host=host, models=(demo_models,)))
    assert found.code == "missing-input"
    assert "format" in found.message


@BOTH
@pytest.mark.parametrize(
    ("class_type", "inputs"),
    [("QuantConfig", {"uri": "bnb;bits=5"}), ("QuantRules", {"rules": "*.attn.* = bnb-nf5"})],
)
def test_wrong_uris_and_rules(class_type: str, inputs: Any, host: HostName, demo_models: Path, tmp_path: Path) -> None:
    graph = changed("2", format="bnb-nf4", config=["40", 0])
    graph["40"] = {"class_type": class_type, "inputs": inputs}
    found = only(check(tmp_path, graph, host=host, models=(demo_models,)))
    assert found.code == "bad-value"
    assert found.place is not None
    assert found.place.node_id == "40"


def test_sampler_of_comfyui_alone(demo_models: Path, tmp_path: Path) -> None:
    """The embedded host has one sampler; for ComfyUI the file is good, and the message says how to check that."""
    graph = changed("11", FULL, sampler_name="dpmpp_2m")
    found = only(check(tmp_path, graph, models=(demo_models,)))
    assert "--host comfyui" in found.remedies[0]
    assert check(tmp_path, graph, host=HostName.COMFYUI, models=(demo_models,)).findings == ()


def test_formats_that_cannot_run_here(demo_models: Path, tmp_path: Path) -> None:
    """Every format that this machine lacks is told with the probe's own reason; the others are silent."""
    for format_id in ("bnb-nf4", *[f for f in format_ids() if not availability(f).works][:3]):
        report = check(tmp_path, changed("2", format=format_id), models=(demo_models,))
        state = availability(format_id)
        if state.works:
            assert report.findings == ()
        else:
            found = only(report)
            assert found.code == "unavailable-format"
            assert state.reason in found.message
            assert found.remedies == (state.remedy,)


# --- the recorded lists ---------------------------------------------------------------------------------------------


def test_recorded_nodes() -> None:
    nodes = core_nodes()
    assert len(nodes) > 800
    for name in ("UNETLoader", "KSampler", "SaveImage", "ModelSamplingFlux", "LTXVImgToVideo", "PreviewAny"):
        assert name in nodes
    loader = nodes["DualCLIPLoader"]
    assert [i.folder for i in loader.inputs.values()] == ["text_encoders", "text_encoders", "", ""]
    assert loader.outputs == ("CLIP",)
    assert nodes["SaveImage"].output_node
    assert not nodes["VAEDecode"].output_node


@pytest.mark.parametrize("name", ["UNETLoader", "KSampler", "LoraLoaderModelOnly", "CLIPLoader"])
def test_embedded_nodes_have_the_recorded_inputs(name: str) -> None:
    """The widgets of the editor are mapped by the recorded order, whoever runs the graph."""
    declared = CORE_NODES[name].INPUT_TYPES()  # type: ignore[attr-defined]
    names = [*declared.get("required", {}), *declared.get("optional", {})]
    assert list(core_nodes()[name].inputs) == names


def test_lines_say_all_that_is_used() -> None:
    for node_type in (*core_nodes().values(), *pack_nodes().values()):
        again = from_line(to_line(node_type), node_type.pack)
        if node_type.detailed:
            assert again == node_type
        else:
            assert (again.name, again.output_node) == (node_type.name, node_type.output_node)


def test_wrapped_loaders_are_those_they_wrap() -> None:
    catalog = Catalog(NODE_CLASS_MAPPINGS, CORE_NODES)
    for suffix in ("MultiGPU", "DisTorchMultiGPU", "DisTorch2MultiGPU"):
        found = catalog.find(f"UnetLoaderGGUF{suffix}")
        assert found is not None
        assert (found.pack, found.inputs["unet_name"].folder) == ("ComfyUI-MultiGPU", "unet_gguf")


def test_what_a_file_quotes_is_harmless_and_short(tmp_path: Path) -> None:
    """Titles and values may hold control characters of terminals, line breaks, and megabytes."""
    graph = changed("12", FULL, class_type="No\x1b[31mSuch\nNode" + "x" * 100_000)
    graph["12"]["_meta"]["title"] = "two\nlines \x07" + "y" * 100_000
    found = only(check(tmp_path, graph, host=HostName.STANDALONE, find_models=False))
    for text in (found.where, found.message, *found.remedies):
        assert len(text) < 2000
        assert text.isprintable()


def test_words_are_those_of_the_nodes() -> None:
    """Hosts import no nodes, so lint holds its own copies."""
    from quantwire.hosts.lint import check as checks
    from quantwire.hosts.lint import flow, sources
    from quantwire.nodes import common, load, load_text, offload, request

    assert (sources.FROM_CONFIG, sources.NONE, sources.ALL) == (common.FROM_CONFIG, load_text.NONE, request.ALL)
    assert (checks.MAKE_ONE, flow.AUTO) == (load.MAKE_ONE, offload.AUTO)
    outputs = NODE_CLASS_MAPPINGS["OffloadCompat"].RETURN_NAMES  # type: ignore[attr-defined]
    assert {name: outputs.index(name) for name in flow.COMPAT_OUTPUTS} == flow.COMPAT_OUTPUTS


def test_every_code_is_explained() -> None:
    """docs/lint.md has a row for each kind of finding."""
    sources = Path(__file__).parents[2] / "hosts" / "lint"
    text = "\n".join(p.read_text(encoding="utf-8") for p in sorted(sources.glob("*.py")))
    used = set(re.findall(r'Level\.[A-Z]+, "([a-z-]+)"', text)) | set(re.findall(r'": "([a-z]+-[a-z]+)"', text))
    used |= {"offload", "offload-conflict", "bad-value", "damaged-model"}
    page = (sources.parents[1] / "docs" / "lint.md").read_text(encoding="utf-8")
    assert used == set(re.findall(r"^\| `([a-z-]+)` \|", page, re.M))
