"""POST /quantwire/check: findings with their links, and remedies that are a click."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from quantwire.hosts import use
from quantwire.hosts.editor.check import MOST_FINDINGS, check
from quantwire.hosts.lint.graph import Level
from quantwire.hosts.lint.lint import Linter, Options
from quantwire.hosts.standalone.core_nodes import CORE_NODES
from quantwire.hosts.standalone.host import StandaloneHost
from quantwire.hosts.standalone.workflow import NodeSpec
from quantwire.nodes import NODE_CLASS_MAPPINGS
from quantwire.quantizers.compat.modes import HostName, OffloadMode

SHIPPED = Path(__file__).resolve().parents[2] / "workflows"
WIDGETS = ("STRING", "INT", "FLOAT", "BOOLEAN", "COMBO")
Workflow = dict[str, Any]


@pytest.fixture(autouse=True)
def host(demo_models: Path) -> Iterator[StandaloneHost]:
    with use(StandaloneHost([demo_models])) as found:
        assert isinstance(found, StandaloneHost)
        yield found


@pytest.fixture
def conflict() -> Workflow:
    """bitsandbytes' own layers (node 2) before an OffloadCompat for sequential offload (node 3)."""
    return json.loads((SHIPPED / "conflict.json").read_text(encoding="utf-8"))


def box(graph: Workflow, node_id: int) -> dict[str, Any]:
    return next(n for n in graph["nodes"] if n["id"] == node_id)


def change(graph: Workflow, node_id: int, widget: str, value: Any) -> None:
    """Set a widget as the editor does: at its place among the node's widgets."""
    node = box(graph, node_id)
    spec = NodeSpec.of({**CORE_NODES, **NODE_CLASS_MAPPINGS}[node["type"]])
    names = [n for n in spec.names if (info := spec.get(n)) and info.type_name in WIDGETS]
    node["widgets_values"][names.index(widget)] = value


def blocks(answer: dict[str, Any]) -> list[dict[str, Any]]:
    return [f for f in answer["findings"] if f["level"] == "block"]


def test_a_conflict_with_its_node_and_links(conflict: Workflow) -> None:
    before = copy.deepcopy(conflict)
    answer = check(conflict)
    assert (answer["host"], answer["mode"]) == ("standalone", "none")
    (found,) = blocks(answer)
    assert (found["code"], found["node"], found["path"]) == ("offload-conflict", "3", [])
    assert (found["input"], found["links"]) == ("model", [2])
    assert found["links_at"] == [{"path": [], "links": [2]}]
    assert (found["title"], found["class_type"]) == ("Offload check", "OffloadCompat")
    assert "bnb-nf4" in found["message"]
    assert conflict == before
    json.dumps(answer)


def test_every_click_cures(conflict: Workflow) -> None:
    """Each set of changes, made as the editor makes them, leaves a graph without the conflict."""
    (found,) = blocks(check(conflict))
    clicks = [r["changes"] for r in found["remedies"] if r["changes"]]
    assert {(c[0]["widget"], c[0]["value"]) for c in clicks} >= {("carrier", "quantwire"), ("mode", "auto")}
    assert any(c[0]["widget"] == "format" for c in clicks)
    assert {"node": "3", "widget": "set_mode", "value": True} in [c for changes in clicks for c in changes]
    for changes in clicks:
        changed = copy.deepcopy(conflict)
        for c in changes:
            change(changed, int(c["node"]), c["widget"], c["value"])
        assert [f for f in check(changed)["findings"] if f["level"] in ("block", "error")] == [], changes


def test_no_click_for_what_does_not_cure(conflict: Workflow) -> None:
    """A rule makes nf4 whatever `format` says, so to change that is no way out; the carrier still is."""
    rules = {"id": 50, "type": "QuantRules", "inputs": [], "widgets_values": ["*.img_attn.* = bnb-nf4"]}
    rules |= {"outputs": [{"name": "config", "type": "QUANT_CONFIG", "links": [50]}]}
    conflict["nodes"].append(rules)
    conflict["links"].append([50, 50, 0, 2, 1, "QUANT_CONFIG"])
    box(conflict, 2)["inputs"][1]["link"] = 50
    (found,) = blocks(check(conflict))
    clicked = {c["widget"] for r in found["remedies"] for c in r["changes"]}
    assert "carrier" in clicked
    assert "format" not in clicked
    assert any("`format`" in r["text"] and not r["changes"] for r in found["remedies"])


def inside(conflict: Workflow, **outer: Any) -> Workflow:
    """The same graph with the Quantize node inside a subgraph, node 30."""
    quantize = box(conflict, 2)
    conflict["nodes"].remove(quantize)
    quantize["inputs"][0]["link"] = 1
    quantize["outputs"][0]["links"] = [2]
    links = [(1, -10, 0, 2, 0), (2, 2, 0, -20, 0)]
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot")
    conflict["definitions"] = {
        "subgraphs": [
            {
                "id": "quantized",
                "name": "Quantized",
                "nodes": [quantize],
                "inputNode": {"id": -10},
                "outputNode": {"id": -20},
                "inputs": [{"name": "model", "type": "MODEL"}],
                "outputs": [{"name": "model", "type": "MODEL"}],
                "links": [{**dict(zip(keys, link, strict=True)), "type": "MODEL"} for link in links],
            }
        ]
    }
    slots = {"inputs": [{"name": "model", "type": "MODEL", "link": 1}], "outputs": [{"name": "model", "type": "MODEL"}]}
    conflict["nodes"].append({"id": 30, "type": "quantized", "widgets_values": [], **slots, **outer})
    conflict["links"] = [link for link in conflict["links"] if link[0] not in (1, 2, 13)]
    conflict["links"] += [[1, 1, 0, 30, 0, "MODEL"], [2, 30, 0, 3, 0, "MODEL"]]
    conflict["nodes"].remove(box(conflict, 20))
    return conflict


def test_inside_a_subgraph(conflict: Workflow) -> None:
    (found,) = blocks(check(inside(conflict)))
    assert found["links"] == [2]
    assert found["links_at"] == [{"path": [], "links": [2]}, {"path": ["30"], "links": [2]}]
    changes = [c for r in found["remedies"] for c in r["changes"]]
    assert {"node": "30:2", "widget": "carrier", "value": "quantwire"} in changes


def test_a_widget_that_the_subgraph_shows_is_changed_there(conflict: Workflow) -> None:
    """Its value on the node of the subgraph is what runs, whatever the node inside has."""
    shown = {"properties": {"proxyWidgets": [["2", "carrier"]]}, "widgets_values": ["library"]}
    graph = inside(conflict, **shown)
    graph["definitions"]["subgraphs"][0]["nodes"][0]["widgets_values"][1] = "quantwire"
    (found,) = blocks(check(graph))
    changes = [c for r in found["remedies"] for c in r["changes"]]
    assert {"node": "30", "widget": "carrier", "value": "quantwire"} in changes
    box(graph, 30)["widgets_values"] = ["quantwire"]
    assert blocks(check(graph)) == []


def test_a_widget_that_a_primitive_node_sets_is_changed_there(conflict: Workflow) -> None:
    primitive = {"id": 40, "type": "PrimitiveNode", "inputs": [], "widgets_values": ["library", "fixed"]}
    conflict["nodes"].append({**primitive, "outputs": [{"name": "COMBO", "type": "COMBO", "links": [40]}]})
    carrier = {"name": "carrier", "type": "COMBO", "link": 40, "widget": {"name": "carrier"}}
    box(conflict, 2)["inputs"].append(carrier)
    conflict["links"].append([40, 40, 0, 2, 2, "COMBO"])
    (found,) = blocks(check(conflict))
    changes = [c for r in found["remedies"] for c in r["changes"]]
    assert {"node": "40", "widget": "value", "value": "quantwire"} in changes


def test_nodes_of_the_editor_alone_are_no_finding(conflict: Workflow) -> None:
    """A pack's own kind of note is known to the editor, and not among what it sends."""
    conflict["nodes"].append({"id": 60, "type": "SomePacksNote", "inputs": [], "outputs": [], "widgets_values": []})
    sent = {str(n["id"]): {"class_type": n["type"]} for n in conflict["nodes"] if n["id"] != 60}

    def unknown(prompt: Any) -> list[Any]:
        return [f["node"] for f in check(conflict, prompt)["findings"] if f["code"] == "unknown-node"]

    assert unknown(sent) == []
    assert unknown(None) == ["60"]
    assert unknown({**sent, "60": {}}) == ["60"]


def test_a_prompt_alone(conflict: Workflow) -> None:
    prompt = json.loads((SHIPPED / "api" / "conflict.json").read_text(encoding="utf-8"))
    (found,) = blocks(check(None, prompt))
    assert (found["node"], found["links"]) == ("3", [])
    assert any(r["changes"] for r in found["remedies"])


def test_a_bad_link_has_its_link(conflict: Workflow) -> None:
    """A VAE into `model` of the sampler."""
    conflict["links"] = [link if link[0] != 6 else [6, 10, 0, 11, 0, "VAE"] for link in conflict["links"]]
    found = next(f for f in check(conflict)["findings"] if f["code"] == "bad-link")
    assert (found["node"], found["input"], found["links"]) == ("11", "model", [6])


def test_sixty_nodes_in_time(conflict: Workflow) -> None:
    """Five conflicts at once, each with its remedies tried: under 300 ms of this process, whatever else runs."""
    graph: Workflow = {"nodes": [], "links": []}
    for copy_of in range(5):
        shift = 1000 * copy_of
        for node in copy.deepcopy(conflict["nodes"]):
            node["id"] += shift
            for slot in node.get("inputs", ()):
                slot["link"] = slot["link"] + shift if slot.get("link") is not None else None
            graph["nodes"].append(node)
        graph["links"] += [[i + shift, a + shift, b, c + shift, d, t] for i, a, b, c, d, t in conflict["links"]]
    assert len(graph["nodes"]) >= 60
    check(graph)
    times: list[float] = []
    for _ in range(3):
        start = time.process_time()
        assert len(blocks(check(graph))) == 5
        times.append(time.process_time() - start)
    assert min(times) < 0.3


def test_a_mode_in_force_splits_only_what_does_not_fit(conflict: Workflow) -> None:
    """On a GPU, ComfyUI loads a model whole if it fits: a conflict that is certain for a mode that was asked for is a
    warning under one that is in force."""
    change(conflict, 3, "mode", "auto")

    def levels(in_force: bool) -> set[Level]:
        options = Options(OffloadMode.PARTIAL, HostName.COMFYUI, find_models=False, in_force=in_force)
        report, _ = Linter(options, NODE_CLASS_MAPPINGS).check_data(conflict)
        return {f.level for f in report.findings if f.code.startswith("offload")}

    assert Level.BLOCK in levels(False)
    assert levels(True) == {Level.WARNING}


def multiplied(levels: int, each: int, leaf: str) -> Workflow:
    """Subgraphs inside subgraphs: a file of 2 kB with each ** levels nodes."""
    listed = [
        {
            "id": f"level{k}",
            "name": f"level{k}",
            "nodes": [{"id": i, "type": f"level{k + 1}" if k + 1 < levels else leaf} for i in range(each)],
            "links": [],
            "inputs": [],
            "outputs": [],
        }
        for k in range(levels)
    ]
    return {"nodes": [{"id": 1, "type": "level0"}], "links": [], "definitions": {"subgraphs": listed}}


@pytest.mark.parametrize(("levels", "each"), [(16, 2), (5, 10)])
def test_a_small_file_of_many_nodes_has_a_small_answer(levels: int, each: int) -> None:
    start = time.process_time()
    answer = check(multiplied(levels, each, "SaveImage"))
    assert [f["code"] for f in answer["findings"]] == ["too-large"]
    assert len(json.dumps(answer)) < 2000
    assert time.process_time() - start < 2
    prompt = {str(k): {"class_type": "SaveImage", "inputs": {}} for k in range(6000)}
    assert [f["code"] for f in check(None, prompt)["findings"]] == ["too-large"]


def test_as_many_findings_as_anybody_reads() -> None:
    """The worst first, and a number for the rest; names are as long as the file makes them."""
    graph = multiplied(3, 10, "SaveImage")
    graph["definitions"]["subgraphs"][-1]["nodes"][0]["title"] = "t" * 100_000
    graph["nodes"].append({"id": 2, "type": "SaveImage"})
    answer = check(graph)
    assert len(answer["findings"]) == MOST_FINDINGS
    assert answer["more"] > 400
    assert len(json.dumps(answer)) < 1000 * MOST_FINDINGS
    order = ["block", "error", "warning", "note"]
    levels = [order.index(f["level"]) for f in answer["findings"]]
    assert levels == sorted(levels)


def test_an_output_without_its_input_is_left_out_by_the_server(conflict: Workflow) -> None:
    """Bypassed, QuantizeModel has no report for PreviewAny; the server runs the picture all the same."""
    box(conflict, 2)["mode"] = 4
    answer = check(conflict)
    assert {f["level"] for f in answer["findings"]} == {"warning"}
    found = next(f for f in answer["findings"] if f["node"] == "20")
    assert (found["code"], found["input"]) == ("missing-input", "source")
    assert "the server leaves out what needs it" in found["message"]
    # Where no output is left, nothing runs.
    for node in conflict["nodes"]:
        if node["type"] == "SaveImage":
            node["mode"] = 2
    assert "error" in {f["level"] for f in check(conflict)["findings"]}


def test_no_remedy_is_an_option_of_the_command_line(conflict: Workflow) -> None:
    box(conflict, 1)["widgets_values"][0] = "gone.safetensors"
    box(conflict, 11)["type"] = "NoSuchSampler"
    change(conflict, 3, "action", "no such action")
    conflict["nodes"].append(
        {"id": 70, "type": "LoadGGUF", "widgets_values": ["gone.gguf"], "outputs": [], "inputs": []}
    )
    answer = check(conflict)
    assert {"missing-model", "unknown-node", "bad-value"} <= {f["code"] for f in answer["findings"]}
    told = [f["message"] for f in answer["findings"]] + [r["text"] for f in answer["findings"] for r in f["remedies"]]
    assert [text for text in told if "--" in text or "`quantwire " in text] == []
    assert any("Put the file there (searched" in text for text in told)
