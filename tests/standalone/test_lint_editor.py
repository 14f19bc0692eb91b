"""The editor's form as the graph that it queues."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from quantwire.hosts.lint.catalog import Catalog
from quantwire.hosts.lint.editor import read_editor
from quantwire.hosts.lint.graph import Finding, Graph, from_prompt
from quantwire.hosts.lint.lint import FileReport, Linter, Options
from quantwire.hosts.standalone.core_nodes import CORE_NODES
from quantwire.hosts.standalone.workflow import Link, load_workflow
from quantwire.nodes import NODE_CLASS_MAPPINGS
from quantwire.quantizers.errors import WorkflowError

HERE = Path(__file__).parent
PLANTED = HERE / "lint_workflows"
SHIPPED = HERE.parents[1] / "workflows"
CATALOG = Catalog(NODE_CLASS_MAPPINGS, CORE_NODES)


def slot(name: str, kind: str = "MODEL", link: int | None = None, widget: bool = False) -> dict[str, Any]:
    return {"name": name, "type": kind, "link": link, **({"widget": {"name": name}} if widget else {})}


def node(number: int, kind: str, *inputs: dict[str, Any], out: str = "MODEL", **rest: Any) -> dict[str, Any]:
    return {"id": number, "type": kind, "inputs": list(inputs), "outputs": [{"name": out, "type": out}], **rest}


def graph(nodes: list[dict[str, Any]], *links: tuple[Any, ...], **rest: Any) -> Graph:
    return read_editor({"nodes": nodes, "links": [list(link) for link in links], **rest}, CATALOG)


LOADER = node(1, "UNETLoader", widgets_values=["a.safetensors", "default"])
SAMPLER = node(9, "KSampler", slot("model", link=9), out="LATENT", widgets_values=[7, "randomize", 8, 1.0, "euler"])


def model_of(found: Graph) -> Link | None:
    return found.nodes["9"].links.get("model")


# --- both forms of one workflow -----------------------------------------------------------------------------------

PAIRS = [(SHIPPED / f"{p.stem}.json", p) for p in sorted((SHIPPED / "api").glob("*.json"))]
PAIRS += [(PLANTED / "editor" / p.name, p) for p in sorted((PLANTED / "api").glob("*.json"))]


@pytest.mark.parametrize(("editor", "api"), PAIRS, ids=lambda p: p.parent.name + "-" + p.stem)
def test_both_forms_become_one_graph(editor: Path, api: Path) -> None:
    """Nodes, links, titles and every value that the API form writes."""
    drawn = read_editor(json.loads(editor.read_text(encoding="utf-8")), CATALOG)
    plain = from_prompt(load_workflow(api))
    assert drawn.nodes.keys() == plain.nodes.keys()
    for node_id, wanted in plain.nodes.items():
        got = drawn.nodes[node_id]
        assert got.class_type == wanted.class_type
        assert got.links == wanted.links, got.place
        node_type = CATALOG.find(got.class_type)
        if node_type is None or not node_type.detailed:
            continue  # which values these are is not recorded
        # Which inputs a choice of ComfyUI's dynamic kind brings is not recorded, so values from there on have no names.
        dynamic = [name for name, i in node_type.inputs.items() if "DYNAMICCOMBO" in str(i.type)]
        unnamed = {n: v for n, v in wanted.values.items() if n.partition(".")[0] in dynamic}
        named = {n: v for n, v in wanted.values.items() if n not in unnamed}
        assert got.rest == tuple(unnamed.values())
        assert {name: got.values.get(name) for name in named} == named, got.place


# --- the front end's rules ----------------------------------------------------------------------------------------


def test_values_by_name_skip_what_the_editor_adds() -> None:
    values = graph([SAMPLER]).nodes["9"].values
    assert values == {"seed": 7, "steps": 8, "cfg": 1.0, "sampler_name": "euler"}


def test_values_of_an_unknown_class() -> None:
    """Newer editors write a slot for every widget; without them the values stay unnamed."""
    slots = [slot("seed", "INT", widget=True), slot("mode", "COMBO", widget=True)]
    known = graph([node(1, "Foreign", *slots, widgets_values=[5, "fixed", "fast"])]).nodes["1"]
    assert (known.values, known.rest) == ({"seed": 5, "mode": "fast"}, ())
    unknown = graph([node(1, "Foreign", widgets_values=[5, "fixed", "fast"])]).nodes["1"]
    assert (unknown.values, unknown.rest) == ({}, (5, "fixed", "fast"))
    mapped = graph([node(1, "Foreign", widgets_values={"frame_rate": 8})]).nodes["1"]
    assert mapped.values == {"frame_rate": 8}


def test_link_into_a_widget_replaces_its_value() -> None:
    primitive = node(2, "PrimitiveNode", out="COMBO", widgets_values=["b.safetensors", "fixed"])
    loader = node(1, "UNETLoader", slot("unet_name", "COMBO", 5, widget=True), widgets_values=["a", "default"])
    found = graph([primitive, loader], (5, 2, 0, 1, 0, "COMBO"))
    assert found.nodes.keys() == {"1"}
    assert found.nodes["1"].values == {"unet_name": "b.safetensors", "weight_dtype": "default"}


@pytest.mark.parametrize("form", ["lists", "objects"])
def test_reroutes_are_followed(form: str) -> None:
    nodes = [LOADER, node(2, "Reroute", slot("", "*", 1), out="*"), node(3, "Reroute", slot("", "*", 2)), SAMPLER]
    links: list[Any] = [[1, 1, 0, 2, 0, "*"], [2, 2, 0, 3, 0, "*"], [9, 3, 0, 9, 0, "MODEL"]]
    if form == "objects":
        keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        links = [dict(zip(keys, link, strict=True)) for link in links]
    found = read_editor({"nodes": nodes, "links": links, "version": 1}, CATALOG)
    assert found.nodes.keys() == {"1", "9"}
    assert model_of(found) == Link("1", 0)


def test_muted_is_gone_with_its_links() -> None:
    lora = node(2, "LoraLoaderModelOnly", slot("model", link=1), mode=2)
    found = graph([LOADER, lora, SAMPLER], (1, 1, 0, 2, 0, "MODEL"), (9, 2, 0, 9, 0, "MODEL"))
    assert found.nodes.keys() == {"1", "9"}
    assert model_of(found) is None


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ([slot("model", "MODEL", 1)], "1"),
        ([slot("strength", "FLOAT", 8), slot("model", "MODEL", 1)], "1"),
        ([slot("clip", "CLIP", 1)], None),
        ([slot("any", "*", 1)], "1"),
        ([slot("model", "MODEL", None)], None),
    ],
    ids=["beside", "first that fits", "none fits", "any type", "not linked"],
)
def test_bypassed_hands_on_what_fits(inputs: list[dict[str, Any]], expected: str | None) -> None:
    lora = node(2, "LoraLoaderModelOnly", *inputs, mode=4)
    found = graph([LOADER, lora, SAMPLER], (1, 1, 0, 2, len(inputs) - 1, "MODEL"), (9, 2, 0, 9, 0, "MODEL"))
    link = model_of(found)
    assert (link.node_id if link else None) == expected
    assert "2" not in found.nodes


@pytest.mark.parametrize("pack", ["", "easy "])
def test_set_and_get(pack: str) -> None:
    """KJNodes' nodes, and those of ComfyUI-Easy-Use."""
    nodes = [
        LOADER,
        node(2, f"{pack}{'s' if pack else 'S'}etNode", slot("MODEL", link=1), widgets_values=["the model"]),
        node(3, f"{pack}{'g' if pack else 'G'}etNode", widgets_values=["the model"]),
        SAMPLER,
        node(4, "GetNode", widgets_values=["nothing"]),
        {**SAMPLER, "id": 10, "inputs": [slot("model", link=10)]},
    ]
    found = graph(nodes, (1, 1, 0, 2, 0, "MODEL"), (9, 3, 0, 9, 0, "MODEL"), (10, 4, 0, 10, 0, "MODEL"))
    assert model_of(found) == Link("1", 0)
    assert "model" not in found.nodes["10"].links
    assert [f.code for f in found.findings] == ["lost-get"]
    assert "'nothing'" in found.findings[0].message


def test_a_group_node_fills_what_it_feeds(tmp_path: Path) -> None:
    """What is inside is not looked into, so nothing that it feeds is missing."""
    show = node(9, "PreviewImage", slot("images", "IMAGE", link=9), out="IMAGE")
    data = {"nodes": [node(2, "workflow/mine", out="IMAGE"), show], "links": [[9, 2, 0, 9, 0, "IMAGE"]]}
    assert read_editor(data, CATALOG).nodes["9"].filled == {"images"}
    assert codes(check(tmp_path, data).findings) == {"group-node"}


def test_broadcasting_nodes_are_said_to_be_unresolved() -> None:
    nodes = [LOADER, node(2, "Anything Everywhere", slot("anything", "*", 1)), SAMPLER]
    found = graph(nodes, (1, 1, 0, 2, 0, "MODEL"))
    assert found.open
    assert [f.code for f in found.findings] == ["broadcast"]


# --- subgraphs ----------------------------------------------------------------------------------------------------


def definition(name: str, nodes: list[dict[str, Any]], *links: tuple[Any, ...], **rest: Any) -> dict[str, Any]:
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    inputs = [{"name": "model", "type": "MODEL"}, {"name": "strength", "type": "FLOAT"}]
    return {
        "id": name,
        "name": name,
        "inputNode": {"id": -10},
        "outputNode": {"id": -20},
        "inputs": inputs,
        "outputs": [{"name": "MODEL", "type": "MODEL"}],
        "nodes": nodes,
        "links": [dict(zip(keys, link, strict=True)) for link in links],
        **rest,
    }


def lora(number: int, model: int, strength: int | None = None) -> dict[str, Any]:
    slots = [slot("model", link=model), slot("strength_model", "FLOAT", strength, widget=True)]
    return node(number, "LoraLoaderModelOnly", *slots, widgets_values=["x.safetensors", 0.5])


INNER = definition(
    "inner", [lora(1, 1, 3)], (1, -10, 0, 1, 0, "MODEL"), (2, 1, 0, -20, 0, "MODEL"), (3, -10, 1, 1, 1, "FLOAT")
)
BOX = {**node(5, "inner", slot("model", link=4)), "widgets_values": [0.9]}
AROUND = ((4, 1, 0, 5, 0, "MODEL"), (9, 5, 0, 9, 0, "MODEL"))


def test_subgraph_becomes_its_nodes() -> None:
    found = graph([LOADER, BOX, SAMPLER], *AROUND, definitions={"subgraphs": [INNER]})
    assert found.nodes.keys() == {"1", "9", "5:1"}
    assert model_of(found) == Link("5:1", 0)
    assert found.nodes["5:1"].links["model"] == Link("1", 0)
    assert found.nodes["5:1"].values["strength_model"] == 0.9, "the widget on the subgraph's node"


def test_promoted_widgets_by_pairs() -> None:
    box = {**BOX, "properties": {"proxyWidgets": [["1", "lora_name"], ["-1", "strength"]]}}
    box["widgets_values"] = ["y.safetensors", 0.7]
    found = graph([LOADER, box, SAMPLER], *AROUND, definitions={"subgraphs": [INNER]})
    assert found.nodes["5:1"].values == {"lora_name": "y.safetensors", "strength_model": 0.7}


@pytest.mark.parametrize("place", ["beside", "inside"])
def test_subgraph_in_a_subgraph(place: str) -> None:
    nested = node(3, "inner", slot("model", link=1), widgets_values=[])
    outer = definition("outer", [nested], (1, -10, 0, 3, 0, "MODEL"), (2, 3, 0, -20, 0, "MODEL"))
    listed = [outer, INNER] if place == "beside" else [{**outer, "definitions": {"subgraphs": [INNER]}}]
    found = graph([LOADER, {**BOX, "type": "outer"}, SAMPLER], *AROUND, definitions={"subgraphs": listed})
    assert model_of(found) == Link("5:3:1", 0)
    assert found.nodes["5:3:1"].links["model"] == Link("1", 0)
    assert found.nodes["5:3:1"].values["strength_model"] == 0.5, "no value outside: the one inside"


@pytest.mark.parametrize(("mode", "expected"), [(2, None), (4, Link("1", 0))], ids=["muted", "bypassed"])
def test_subgraph_that_does_not_run(mode: int, expected: Link | None) -> None:
    found = graph([LOADER, {**BOX, "mode": mode}, SAMPLER], *AROUND, definitions={"subgraphs": [INNER]})
    assert found.nodes.keys() == {"1", "9"}
    assert model_of(found) == expected


def test_subgraph_that_holds_itself() -> None:
    own = definition("inner", [node(3, "inner", slot("model", link=1))], (1, -10, 0, 3, 0, "MODEL"))
    found = graph([LOADER, BOX, SAMPLER], *AROUND, definitions={"subgraphs": [own]})
    assert [f.code for f in found.findings] == ["subgraph-cycle"]


def test_subgraphs_that_multiply_are_not_read_on() -> None:
    """Ten in each of twelve levels would be a thousand billion nodes."""
    listed = [definition("level12", [node(i, "PreviewAny") for i in range(10)])]
    listed += [definition(f"level{k}", [node(i, f"level{k + 1}") for i in range(10)]) for k in range(12)]
    began = time.monotonic()
    found = graph([node(1, "level0")], definitions={"subgraphs": listed})
    assert [f.code for f in found.findings] == ["too-large"]
    assert time.monotonic() - began < 10


# --- hostile and large files --------------------------------------------------------------------------------------


def check(tmp_path: Path, data: object, raw: bytes | None = None) -> FileReport:
    path = tmp_path / "workflow.json"
    path.write_bytes(raw if raw is not None else json.dumps(data).encode())
    return Linter(Options(find_models=False), NODE_CLASS_MAPPINGS).check(path)


def codes(found: tuple[Finding, ...]) -> set[str]:
    return {f.code for f in found}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff\xfe\x00{",
        b"[" * 100_000,
        b'{"nodes": [' + b'{"a":' * 5000,
        b"null",
        b"[]",
        b"{}",
        b'{"nodes": []}',
        b'{"nodes": 5, "links": []}',
        b'{"1": {"class_type": 7}}',
        b"1" * 5000,
        b'{"nodes": [{"id": 1}], "links": []}',
    ],
    ids=range(12),
)
def test_no_workflow_is_one_error(raw: bytes, tmp_path: Path) -> None:
    report = check(tmp_path, None, raw)
    assert "unreadable" in codes(report.findings)
    assert sum(f.level.value == "error" for f in report.findings) == 1


WRONG: Mapping[str, Any] = {
    "links of wrong types": {
        "nodes": [LOADER],
        "links": [None, 5, [], [1], [1, [], {}, None, "x"], {"id": []}, "text"],
    },
    "links to nowhere": {"nodes": [SAMPLER], "links": [[9, 77, 0, 9, 0, "MODEL"]]},
    "a link to itself": {
        "nodes": [node(2, "Reroute", slot("", "*", 1)), SAMPLER],
        "links": [[1, 2, 0, 2, 0, "*"], [9, 2, 0, 9, 0, "*"]],
    },
    "negative slots": {"nodes": [LOADER, SAMPLER], "links": [[9, 1, -1, 9, -5, "MODEL"]]},
    "huge numbers": {"nodes": [LOADER, SAMPLER], "links": [[9, 1, 10**30, 9, 0, "MODEL"]]},
    "inputs of wrong types": {
        "nodes": [{**LOADER, "inputs": "x", "outputs": 5, "properties": [], "title": {}, "mode": []}]
    },
    "slots of wrong types": {
        "nodes": [{**LOADER, "inputs": [None, {"name": 5, "type": {}, "link": "x"}], "outputs": [3]}]
    },
    "subgraphs of wrong types": {
        "nodes": [LOADER],
        "definitions": {"subgraphs": [None, {"id": 5}, {"id": "x", "nodes": 3, "inputs": [1]}]},
    },
    "a subgraph without its ends": {
        "nodes": [{**BOX, "type": "x"}, SAMPLER],
        "links": [[9, 5, 0, 9, 0, "MODEL"]],
        "definitions": {"subgraphs": [{"id": "x"}]},
    },
    "duplicate ids": {"nodes": [LOADER, {**LOADER, "type": "VAELoader"}], "links": []},
    "widgets of wrong types": {"nodes": [node(1, "QuantizeModel", widgets_values=[{}, [], None, 5, {"a": []}])]},
    "a null character": {"nodes": [node(1, "UNETLoader", widgets_values=["a\0b.safetensors"])]},
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_shapes_never_raise(name: str, tmp_path: Path) -> None:
    report = check(tmp_path, WRONG[name])
    assert report.form in ("editor", "")
    assert report.findings


def test_a_cycle_is_named(tmp_path: Path) -> None:
    data = {str(i): {"class_type": "LoraLoaderModelOnly", "inputs": {"model": [str((i + 1) % 3), 0]}} for i in range(3)}
    data["9"] = {"class_type": "PreviewAny", "inputs": {"source": ["0", 0]}}
    report = check(tmp_path, data)
    cycles = [f for f in report.findings if f.code == "cycle"]
    assert len(cycles) == 1
    assert "0" in cycles[0].message


@pytest.mark.parametrize("kind", ["chain", "reroutes", "behind reroutes", "wide", "api", "values"])
def test_ten_thousand_nodes_take_seconds(kind: str, tmp_path: Path) -> None:
    """Two seconds were the aim; five are allowed, because other work may run beside the tests."""
    many = range(2, 10_000)
    previous = [[i, i - 1, 0, i, 0, "MODEL"] for i in many]
    data: Any
    if kind == "api":
        data = {str(i): {"class_type": "LoraLoaderModelOnly", "inputs": {"model": [str(i - 1), 0]}} for i in many}
        data["1"] = {"class_type": "UnetLoaderGGUF", "inputs": {"unet_name": "a.gguf"}}
        data["0"] = {"class_type": "PreviewAny", "inputs": {"source": ["9999", 0]}}
    elif kind == "values":
        data = {"nodes": [node(1, "Foreign", widgets_values=list(range(1_000_000)))], "links": []}
    elif kind == "behind reroutes":
        half = range(2, 5_000)
        data = {"nodes": [LOADER, *(node(i, "Reroute", slot("", "*", i), out="*") for i in half)]}
        data["links"] = [[i, i - 1, 0, i, 0, "*"] for i in half]
        data["nodes"] += [node(i, "KSampler", slot("model", link=i)) for i in range(5_000, 10_000)]
        data["links"] += [[i, 4_999, 0, i, 0, "MODEL"] for i in range(5_000, 10_000)]
    elif kind == "wide":
        data = {"nodes": [LOADER, *(node(i, "KSampler", slot("model", link=i)) for i in many)]}
        data["links"] = [[i, 1, 0, i, 0, "MODEL"] for i in many]
    else:
        name = "Reroute" if kind == "reroutes" else "LoraLoaderModelOnly"
        data = {"nodes": [LOADER, *(node(i, name, slot("model", link=i)) for i in many)], "links": previous}
        data["nodes"].append(node(10_000, "PreviewAny", slot("source", "*", 10_000)))
        data["links"].append([10_000, 9999, 0, 10_000, 0, "MODEL"])
    linter = Linter(Options(find_models=False), NODE_CLASS_MAPPINGS)
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    began = time.monotonic()
    report = linter.check(path)
    assert time.monotonic() - began < 5
    assert (
        report.nodes
        == {"values": 1, "reroutes": 2, "behind reroutes": 5_001, "api": 10_000, "wide": 9_999, "chain": 10_000}[kind]
    )


def test_a_file_without_nodes() -> None:
    with pytest.raises(WorkflowError, match="has no nodes"):
        graph([])
