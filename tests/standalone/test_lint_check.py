"""Nodes, files, links, values and formats that are not there or do not fit."""

from __future__ import annotations

import copy
import http.server
import json
import re
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from quantwire.hosts.lint.catalog import Catalog, ask_server, core_nodes, from_line, one_slip, pack_nodes, to_line
from quantwire.hosts.lint.graph import Finding, Level
from quantwire.hosts.lint.lint import FileReport, Linter, Options
from quantwire.hosts.standalone.core_nodes import CORE_NODES
from quantwire.nodes import NODE_CLASS_MAPPINGS
from quantwire.quantizers.compat.modes import Carrier, HostName, OffloadMode
from quantwire.quantizers.errors import FileError
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


@BOTH
def test_a_name_that_no_file_system_takes(host: HostName, demo_models: Path, tmp_path: Path) -> None:
    for graph in (changed("1", unet_name="x" * 5000 + ".sft"), changed("1", unet_name="a\0b.sft")):
        assert only(check(tmp_path, graph, host=host, models=(demo_models,))).code == "missing-model"
        assert check(tmp_path, graph, host=host, find_models=False).findings == ()
        graph = {**graph, "1": {"class_type": "LoadGGUF", "inputs": {"gguf_name": graph["1"]["inputs"]["unet_name"]}}}
        assert only(check(tmp_path, graph, host=host, models=(demo_models,))).code == "missing-model"


def test_a_file_that_cannot_be_read_is_one_finding(tmp_path: Path) -> None:
    linter = Linter(Options(find_models=False), NODE_CLASS_MAPPINGS)
    assert [f.code for f in linter.check(tmp_path / ("x" * 5000)).findings] == ["unreadable"]


@BOTH
def test_a_link_whose_file_is_gone(host: HostName, demo_models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    (folder / "gone.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    graph = changed("1", unet_name="gone.safetensors")
    found = only(check(tmp_path, graph, host=host, models=(tmp_path / "models", demo_models)))
    assert f"is a link to {tmp_path}/elsewhere.safetensors, which is not there" in found.message


@pytest.mark.parametrize("form", ["{folder}/digits_flux.safetensors", "x/../digits_flux.safetensors"])
def test_only_names_of_the_list_are_models(form: str, demo_models: Path, tmp_path: Path) -> None:
    """ComfyUI's own loaders take no other path to the same file."""
    name = form.format(folder=demo_models / "diffusion_models")
    found = only(check(tmp_path, changed("1", unet_name=name), host=HostName.COMFYUI, models=(demo_models,)))
    assert (found.code, found.remedies) == ("missing-model", ("Write 'digits_flux.safetensors'.",))


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
    assert only(check(tmp_path, graph, **options), Level.WARNING).code == "unknown-node"
    assert only(check(tmp_path, graph, strict=True, **options)).code == "unknown-node"
    assert check(tmp_path, graph, known=("MyPack*",), **options).findings == ()


def test_unknown_packs_are_one_warning(tmp_path: Path) -> None:
    """Whether they are installed cannot be told without a server."""
    kinds = [("FancySampler", "fancy-pack"), ("FancySampler", "fancy-pack"), ("NNLatentUpscale", ""), ("KSampler+", "")]
    nodes = [
        {"id": i, "type": kind, "properties": {"cnr_id": pack}, "widgets_values": []}
        for i, (kind, pack) in enumerate(kinds)
    ]
    found = only(check(tmp_path, {"nodes": nodes, "links": []}), Level.WARNING)
    assert "FancySampler of fancy-pack, NNLatentUpscale, KSampler+ (4 nodes)" in found.message
    assert found.data["nodes"] == {"FancySampler": ["0", "1"], "NNLatentUpscale": ["2"], "KSampler+": ["3"]}


@pytest.mark.parametrize(
    ("written", "meant", "slip"),
    [
        *[("VAEDecodee", "VAEDecode", True), ("VAEDecod", "VAEDecode", True), ("VAEDceode", "VAEDecode", True)],
        *[("vaedecode", "VAEDecode", True), ("VAEDecoda", "VAEDecode", True), ("VAEDecode", "VAEDecode", False)],
        *[("VAEDecode+", "VAEDecode", False), ("VAEDecode2", "VAEDecode", False), ("VAEEncode", "VAEDecode", False)],
        *[("", "A", True), ("", "", False), ("NNLatentUpscale", "LatentUpscale", False)],
    ],
)
def test_slips_of_the_pen(written: str, meant: str, slip: bool) -> None:
    assert one_slip(written, meant) is slip


def test_thousands_of_unknown_ids_take_a_moment(tmp_path: Path) -> None:
    """0.3 s were measured for 3,000 nodes of 500 classes."""
    graph = {str(i): {"class_type": f"Unk{i % 500}X", "inputs": {}} for i in range(3000)}
    began = time.monotonic()
    only(check(tmp_path, graph, host=HostName.COMFYUI, find_models=False), Level.WARNING)
    assert time.monotonic() - began < 3


def image_graph(**nodes: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """A branch that runs, and further nodes."""
    good = {"1": ("EmptyImage", {"width": 16, "height": 16, "batch_size": 1, "color": 0})}
    good["2"] = ("PreviewImage", {"images": ["1", 0]})
    return {i: {"class_type": kind, "inputs": inputs} for i, (kind, inputs) in {**good, **nodes}.items()}


def test_a_branch_without_an_input_is_left_out(tmp_path: Path) -> None:
    """ComfyUI runs the other outputs; the embedded host, and ComfyUI where no other is, refuse the file."""
    graph = image_graph(loose=("PreviewImage", {}))
    found = only(check(tmp_path, graph, host=HostName.COMFYUI), Level.WARNING)
    assert (found.code, found.where) == ("missing-input", "node loose (PreviewImage)")
    assert "runs the other outputs" in found.message
    assert {f.level for f in check(tmp_path, graph, host=HostName.STANDALONE).findings} == {Level.ERROR}
    graph["2"]["inputs"] = {}
    assert {f.level for f in check(tmp_path, graph, host=HostName.COMFYUI).findings} == {Level.ERROR}
    graph = image_graph(sink=("SaveImage", {"images": ["1", 0]}))
    del graph["1"]["inputs"]["width"], graph["2"]
    assert {f.level for f in check(tmp_path, graph, host=HostName.COMFYUI).findings} == {Level.ERROR}


def test_a_fault_beside_a_branch_without_an_input_stays_one(tmp_path: Path) -> None:
    graph = image_graph(loose=("PreviewImage", {}), wrong=("PreviewImage", {"images": ["99", 0]}))
    levels = {f.code: f.level for f in check(tmp_path, graph, host=HostName.COMFYUI).findings}
    assert levels == {"missing-input": Level.WARNING, "bad-link": Level.ERROR}


def test_older_names_that_comfyui_replaces(tmp_path: Path) -> None:
    """With a mapping of inputs it replaces them on the server too; without one the server drops them."""
    graph = image_graph(load=("T2IAdapterLoader", {"t2i_adapter_name": "a.safetensors"}))
    graph["show"] = {"class_type": "PreviewAny", "inputs": {"source": ["load", 0]}}
    options: dict[str, Any] = {"host": HostName.COMFYUI, "find_models": False}
    found = only(check(tmp_path, graph, **options), Level.NOTE)
    assert (found.code, "by ControlNetLoader" in found.message) == ("replaced-node", True)
    inputs = {"conditioning_to": ["zero", 0], "conditioning_from": ["zero", 0], "conditioning_to_strength": 1.0}
    graph = image_graph(average=("ConditioningAverage ", inputs))
    graph["show"] = {"class_type": "PreviewAny", "inputs": {"source": ["average", 0]}}
    graph["zero"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], "text": ""}}
    graph["clip"] = {"class_type": "CLIPLoader", "inputs": {"clip_name": "a.safetensors", "type": "sd3"}}
    found = only(check(tmp_path, graph, **options))
    assert (found.code, "drops its inputs" in found.message) == ("replaced-node", True)
    editor = {"nodes": [{"id": 1, "type": "Preview3DAnimation", "widgets_values": [""]}], "links": []}
    assert only(check(tmp_path, editor, **options), Level.NOTE).code == "replaced-node"


# --- a server -----------------------------------------------------------------------------------------------------

# As ComfyUI 0.33.0 gives them out.
OBJECT_INFO: dict[str, Any] = {
    "PreviewAny": {"input": {"required": {"source": ["*", {}]}}, "output": ["STRING"], "output_node": True},
    "ImageCompare": {
        "input": {
            "required": {"compare_view": ["IMAGECOMPARE", {"socketless": True}]},
            "optional": {"image_a": ["IMAGE", {}], "image_b": ["IMAGE", {}]},
        },
        "output": [],
        "output_node": True,
    },
    "CurveEditor": {
        "input": {
            "required": {"curve": ["CURVE", {"default": {"interpolation": "monotone_cubic"}, "socketless": True}]},
            "optional": {"histogram": ["HISTOGRAM", {}]},
        },
        "output": ["CURVE"],
    },
    "Load3D": {
        "input": {
            "required": {
                "model_file": ["COMBO", {"multiselect": False, "options": ["none"], "file_upload": True}],
                "image": ["LOAD_3D", {}],
                "width": ["INT", {"default": 1024, "min": 1, "max": 4096, "step": 1}],
            }
        },
        "output": ["IMAGE"],
    },
    "CustomCombo": {
        "input": {"required": {"choice": ["COMBO", {"multiselect": False, "options": []}]}},
        "output": ["STRING", "INT"],
    },
    "CropByBBoxes": {
        "input": {"required": {"bboxes": ["BOUNDING_BOX", {"socketless": True, "forceInput": True}]}},
        "output": ["IMAGE"],
    },
    "ControlNetLoader": {
        "input": {"required": {"control_net_name": ["COMBO", {"options": ["a.pth"]}]}},
        "output": ["CONTROL_NET"],
    },
}
REPLACEMENTS = {
    "T2IAdapterLoader": [
        {
            "new_node_id": "ControlNetLoader",
            "input_mapping": [{"new_id": "control_net_name", "old_id": "t2i_adapter_name"}],
        }
    ],
    "Gone": [{"new_node_id": "NotThere", "input_mapping": None}],
}


class Answers(http.server.BaseHTTPRequestHandler):
    """A web server with ComfyUI's answers, and one that breaks off."""

    def do_GET(self) -> None:
        data = {"/object_info": OBJECT_INFO, "/node_replacements": REPLACEMENTS, "/cut/object_info": {}}[self.path]
        body = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + (100 if "cut" in self.path else 0)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def editor_of(*boxes: tuple[str, list[Any], list[dict[str, Any]]]) -> dict[str, Any]:
    """Each box linked to a PreviewAny, so that it runs."""
    nodes: list[dict[str, Any]] = []
    links: list[list[Any]] = []
    for i, (kind, values, slots) in enumerate(boxes):
        nodes.append({"id": i, "type": kind, "widgets_values": values, "inputs": slots, "outputs": [{"type": "*"}]})
        nodes.append({"id": 100 + i, "type": "PreviewAny", "inputs": [{"name": "source", "type": "*", "link": i}]})
        links.append([i, i, 0, 100 + i, 0, "*"])
    return {"nodes": nodes, "links": links}


def test_widgets_that_only_the_editor_knows(url: str, tmp_path: Path) -> None:
    """Their values come from the editor; a list that is empty on the server is filled there."""
    boxes = [
        ("CurveEditor", [{"points": [[0, 0], [1, 1]]}], [{"name": "histogram", "type": "HISTOGRAM", "link": None}]),
        ("Load3D", ["toy.glb", "upload3dmodel", "uploadExtraResources", "clear", "", 1024, 1024], []),
        ("CustomCombo", ["9:16", 1, "16:9", "9:16", ""], [{"name": "choice", "type": "COMBO", "link": None}]),
        ("T2IAdapterLoader", ["a.pth"], []),
    ]
    data = editor_of(*boxes)
    data["nodes"].append({"id": 50, "type": "ImageCompare", "widgets_values": [], "inputs": []})
    report = check(tmp_path, data, server=ask_server(url))
    assert [(f.level, f.code) for f in report.findings] == [(Level.NOTE, "replaced-node")]


def test_a_socket_without_a_link_is_missing(url: str, tmp_path: Path) -> None:
    slot = {"name": "bboxes", "type": "BOUNDING_BOX", "link": None}
    data = editor_of(("CropByBBoxes", [], [slot]), ("Gone", [], []))
    codes = {f.code: f.level for f in check(tmp_path, data, server=ask_server(url)).findings}
    assert codes == {"missing-input": Level.ERROR, "unknown-node": Level.ERROR}


@pytest.mark.parametrize("address", ["{url}/cut", "http://x:notaport", "http://a b:1", "127.0.0.1:1"])
def test_no_server_is_told(address: str, url: str) -> None:
    with pytest.raises(FileError, match="does not answer as a ComfyUI server"):
        ask_server(address.format(url=url))


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


WRONG_VALUES = {
    "steps": ("abc", Level.ERROR, "'abc' is no INT"),
    "cfg": (None, Level.ERROR, "None is no FLOAT"),
    "seed": (-1, Level.ERROR, "-1 is below its minimum 0"),
    "denoise": (9, Level.ERROR, "9.0 is above its maximum 1.0"),
    "sampler_name": ("eulr", Level.ERROR, "'eulr' is not among its choices. Did you mean euler"),
    "scheduler": ("beta57", Level.WARNING, "'beta57' is not among its choices"),
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_values_of_comfyuis_own_nodes(name: str, demo_models: Path, tmp_path: Path) -> None:
    """Packs add schedulers, so a strange one may be there; numbers are checked by ComfyUI itself."""
    value, level, said = WRONG_VALUES[name]
    graph = changed("11", FULL, **{name: value})
    found = only(check(tmp_path, graph, host=HostName.COMFYUI, models=(demo_models,)), level)
    assert (found.code, found.data["input"]) == ("bad-value", name)
    assert said in found.message


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


@pytest.fixture
def no_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where it is not installed: importing it fails."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    availability.cache_clear()
    yield
    availability.cache_clear()


@pytest.mark.usefixtures("no_bitsandbytes")
def test_formats_are_another_machines(demo_models: Path, tmp_path: Path) -> None:
    """What cannot run in the Python that checks is a warning for ComfyUI, and nothing for a machine without models."""
    graph = changed("2", format="bnb-nf4")
    for host, level in ((HostName.STANDALONE, Level.ERROR), (HostName.COMFYUI, Level.WARNING)):
        found = only(check(tmp_path, graph, host=host, models=(demo_models,)), level)
        assert found.code == "unavailable-format"
        assert check(tmp_path, graph, host=host, find_models=False).findings == ()


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
    sampler = nodes["KSampler"].inputs
    assert (sampler["steps"].low, sampler["steps"].high) == (1, 10000)
    assert "euler" in (sampler["sampler_name"].choices or ())
    assert nodes["CurveEditor"].inputs["curve"].widget
    assert nodes["T2IAdapterLoader"].inputs["t2i_adapter_name"].folder == "controlnet"


@pytest.mark.parametrize("name", ["UNETLoader", "KSampler", "LoraLoaderModelOnly", "CLIPLoader"])
def test_embedded_nodes_have_the_recorded_inputs(name: str) -> None:
    """The widgets of the editor are mapped by the recorded order, whoever runs the graph."""
    declared = CORE_NODES[name].INPUT_TYPES()  # type: ignore[attr-defined]
    names = [*declared.get("required", {}), *declared.get("optional", {})]
    assert list(core_nodes()[name].inputs) == names


def test_lines_say_all_that_is_used() -> None:
    for node_type in (*core_nodes().values(), *pack_nodes().values()):
        again = from_line(to_line(node_type), node_type.pack)
        if node_type.replaced_by:
            continue  # has no line of its own
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
    used |= {"offload", "offload-conflict", "bad-value", "damaged-model", "unavailable-format"}
    page = (sources.parents[1] / "docs" / "lint.md").read_text(encoding="utf-8")
    assert used == set(re.findall(r"^\| `([a-z-]+)` \|", page, re.M))
