"""A workflow as the editor saves it: LiteGraph's JSON, version 0.4, with groups and a note, laid out by rule.

Heights are those that the editor gives the nodes: 20 for a row of slots, 24 for a widget, 54 for a text field, 14
besides, and a title bar of 30 above. A node that shows a picture or a text when it ran gets room for it: the pack's
nodes say in two lines what they did.

A node is as high as what the pack's extension shows of it. Without that the editor makes it higher by itself when it
opens the file, and there is room for that: nothing is covered then.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from .describe import Group, Node, Workflow
from .slots import Input, hidden_in, inputs_of, is_of_pack, outputs_of

TITLE, SLOT, WIDGET, TEXT, REST, SAID = 30, 20, 24, 54, 14, 70
WIDTH, COLUMN_GAP, NODE_GAP = 320, 50, 26
PAD, HEAD, GROUP_GAP = 24, 50, 50
NOTE_ID, NOTE_WIDTH, LINE, LINE_CHARACTERS = 100, 440, 17, 70
# Room for what a node shows, and for a prompt of some lines.
SHOWN = {
    **{"PreviewAny": 260, "SaveImage": 380, "PreviewImage": 380, "SaveVideo": 420, "SaveAudioAdvanced": 136},
    **{"CLIPTextEncode": 170, "TextEncodeAceStepAudio1.5": 620},
}
Box = dict[str, Any]


def editor_form(workflow: Workflow) -> Box:
    places, groups = laid_out(workflow)
    nodes = workflow.nodes.items()
    boxes = {node_id: _box(node_id, node, order, places[node_id]) for order, (node_id, node) in enumerate(nodes)}
    links = list(_links(workflow, boxes))
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"quantwire/{workflow.name}")),
        "revision": 0,
        "last_node_id": max(NOTE_ID, *map(int, workflow.nodes)),
        "last_link_id": len(links),
        "nodes": [*boxes.values(), _note(workflow, len(boxes))],
        "links": links,
        "groups": groups,
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def widgets_of(node: Node) -> Iterator[tuple[Input, Any]]:
    """Widgets in the editor's order, each with its value."""
    for found in inputs_of(node.kind, node.inputs):
        value = node.inputs.get(found.name, found.default)
        if found.is_widget and not isinstance(value, tuple):
            yield found, value


def laid_out(workflow: Workflow) -> tuple[dict[str, list[int]], list[Box]]:
    """(x, y, width, height) of every node below its title bar, and the groups around them."""
    places: dict[str, list[int]] = {}
    groups: list[Box] = []

    def place(group: Group, left: int, top: int) -> tuple[int, int, int]:
        width, height, reach = _place(workflow, group, left, top, places)
        groups.append(_group(group, len(groups) + 1, [left, top, width, height]))
        return left + width + GROUP_GAP, top + height + GROUP_GAP, reach + NODE_GAP - HEAD

    start, top = NOTE_WIDTH + COLUMN_GAP, 0
    first = start
    for group in workflow.aside:
        right, below, reach = place(group, start, top)
        first, top = max(first, right), max(below, reach)
    top = 0
    for band in workflow.bands:
        left, bottoms = first, [top]
        for group in band:
            left, *deep = place(group, left, top)
            bottoms += deep
        top = max(bottoms)
    return places, groups


def _place(workflow: Workflow, group: Group, left: int, top: int, places: dict[str, list[int]]) -> tuple[int, int, int]:
    """Width and height of a group, and how deep its nodes reach where all widgets are shown."""
    x, deepest, reach = left + PAD, top, top
    for column in group.columns:
        y = top + HEAD
        for node_id in column:
            height, grown = heights_of(workflow.nodes[node_id])
            places[node_id] = [x, y + TITLE, WIDTH, height]
            y += TITLE + height
            deepest, reach = max(deepest, y), max(reach, y - height + grown)
            y += max(NODE_GAP, grown - height)
        x += WIDTH + COLUMN_GAP
    return x - COLUMN_GAP + PAD - left, deepest + PAD - top, reach


def heights_of(node: Node) -> tuple[int, int]:
    """Height with the widgets that have an effect, and with all."""
    inputs = inputs_of(node.kind, node.inputs)
    slots = sum(not i.is_widget for i in inputs)
    shown = [i for i, _ in widgets_of(node) if i.shown]
    texts = sum(i.is_text for i in shown)
    seeds = sum(bool(i.options.get("control_after_generate")) for i in shown)
    height = REST + SLOT * max(slots, len(outputs_of(node.kind))) + WIDGET * (len(shown) - texts + seeds) + TEXT * texts
    height += SAID if is_of_pack(node.kind) else 0
    hidden = WIDGET * len(hidden_in(node.kind, node.inputs))
    least = SHOWN.get(node.kind, 0)
    return max(height - hidden, least), max(height, least)


def _group(group: Group, number: int, bounding: list[int]) -> Box:
    return {
        **{"id": number, "title": group.title, "bounding": bounding},
        **{"color": group.colour, "font_size": 24, "flags": {}},
    }


def _box(node_id: str, node: Node, order: int, place: list[int]) -> Box:
    values: list[Any] = []
    for found, value in widgets_of(node):
        values += [value, "fixed"] if found.options.get("control_after_generate") else [value]
    slots = [i for i in inputs_of(node.kind, node.inputs) if not i.is_widget]
    properties: Box = {"Node name for S&R": node.kind}
    if node.files:
        properties["models"] = [file.listed for file in node.files]
    return {
        "id": int(node_id),
        "type": node.kind,
        "pos": place[:2],
        "size": place[2:],
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": [{"name": i.name, "type": i.kind, "link": None} for i in slots],
        "outputs": [{"name": name, "type": kind, "links": []} for name, kind in outputs_of(node.kind)],
        "title": node.title,
        "properties": properties,
        "widgets_values": values,
    }


def _links(workflow: Workflow, boxes: dict[str, Box]) -> Iterator[list[Any]]:
    """Six-tuples; both ends are told of each."""
    number = 0
    for node_id, box in boxes.items():
        for place, slot in enumerate(box["inputs"]):
            value = workflow.nodes[node_id].inputs.get(slot["name"])
            if value is None:
                continue
            source, output = value
            number += 1
            end = boxes[source]["outputs"][output]
            end["links"].append(number)
            slot["link"] = number
            yield [number, int(source), output, int(node_id), place, end["type"]]


def _note(workflow: Workflow, order: int) -> Box:
    lines = sum(1 + len(line) // LINE_CHARACTERS for line in workflow.note.splitlines())
    return {
        "id": NOTE_ID, "type": "MarkdownNote", "pos": [0, TITLE], "size": [NOTE_WIDTH, 60 + LINE * lines], "flags": {},
        "order": order, "mode": 0, "inputs": [], "outputs": [], "title": "Read me", "properties": {},
        "widgets_values": [workflow.note],
    }  # fmt: skip
