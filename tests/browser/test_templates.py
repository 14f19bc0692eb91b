"""Each shipped workflow opens with every node known, and queues what its API form says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from browser_setup import WINDOW, own_machine_alone
from editor_page import WORKFLOWS, Editor
from editor_server import EditorServer
from playwright.sync_api import Browser

NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json") if (WORKFLOWS / "api" / path.name).exists())


def differences(editor: Editor, made: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What the editor's graph has otherwise than the shipped one; an input that only the editor names may have its
    default and nothing else."""
    found = [f"node {i} only in one" for i in set(made) ^ set(wanted)]
    for i in set(made) & set(wanted):
        a, b = made[i], wanted[i]
        if a["class_type"] != b["class_type"]:
            found.append(f"{i}: {a['class_type']} instead of {b['class_type']}")
            continue
        found += [
            f"{i} {a['class_type']}.{name}: {a['inputs'].get(name)!r} instead of {value!r}"
            for name, value in b["inputs"].items()
            if a["inputs"].get(name) != value
        ]
        more = [name for name in a["inputs"] if name not in b["inputs"]]
        defaults = editor.js(DEFAULTS, a["class_type"]) if more else {}
        found += [
            f"{i} {a['class_type']}.{name}: {a['inputs'][name]!r}, which the shipped form lacks"
            for name in more
            if name not in defaults or defaults[name] != a["inputs"][name]
        ]
    return found


DEFAULTS = """(kind) => {
  const { input } = window.LiteGraph.registered_node_types[kind].nodeData, out = {};
  for (const [name, [type, more]] of Object.entries({ ...input.required, ...input.optional }))
    out[name] = more?.default ?? (Array.isArray(type) ? type[0] : more?.options?.[0]);
  return out;
}"""


@pytest.mark.parametrize("name", NAMES)
def test_a_template_opens_and_queues_what_it_says(editor: Editor, name: str) -> None:
    editor.load(name)
    assert editor.missing() == []
    wanted = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
    assert differences(editor, editor.api(), wanted) == []
    # What the editor says itself where it lacks a node.
    assert editor.page.get_by_text("Missing Node").count() == 0
    editor.shot(f"template_{name}")


OVERLAPS = """() => {
  const boxes = window.app.graph._nodes
    .map((n) => [n.pos[0], n.pos[1] - 30, n.pos[0] + n.size[0], n.pos[1] + n.size[1], n]);
  const found = [];
  for (const [i, a] of boxes.entries()) for (const b of boxes.slice(i + 1))
    if (a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3]) found.push(`${a[4].title} and ${b[4].title}`);
  return found;
}"""
HEIGHTS = "() => window.app.graph._nodes.filter((n) => n.type === 'OffloadCompat').map((n) => n.size[1])"


def test_offload_check_is_as_high_as_what_it_shows(editor: Editor, editor_server: EditorServer) -> None:
    editor_server.request("/quantwire/formats")  # seconds where nobody has asked yet, and the tab asks before us
    editor.load("low_vram_offload_compat")
    (height,) = editor.js(HEIGHTS)
    needed = editor.js("() => window.app.graph._nodes.find((n) => n.type === 'OffloadCompat').computeSize()[1]")
    assert needed <= height + 1
    assert height - needed < 90, "room for what it says when it ran, and no more"


@pytest.mark.slow
def test_without_the_extension_the_editor_makes_nodes_higher_and_covers_none(
    browser: Browser, editor_server: EditorServer
) -> None:
    context = browser.new_context(viewport=WINDOW, locale="en-US")  # type: ignore[arg-type]
    own_machine_alone(context)
    context.route("**/extensions/quantwire/**", lambda route: route.abort())
    tab = Editor(context.new_page(), editor_server.url)
    tab.open()
    for name in NAMES:
        tab.load(name)
        saved = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))["nodes"]
        before = [n["size"][1] for n in saved if n["type"] == "OffloadCompat"]
        assert all(a > b + 60 for a, b in zip(tab.js(HEIGHTS), before, strict=True)), name
        assert tab.js(OVERLAPS) == [], name
    context.close()


def test_the_server_offers_them(editor_server: EditorServer) -> None:
    assert sorted(editor_server.request("/api/workflow_templates")["quantwire"]) == NAMES


def test_the_template_dialog_opens_one(editor: Editor) -> None:
    editor.run_command("Comfy.BrowseTemplates")
    dialog = editor.page.locator("[role=dialog]")
    dialog.get_by_test_id("template-workflows-content").wait_for()
    dialog.get_by_text("quantwire", exact=True).first.click()
    card = dialog.get_by_test_id("template-workflow-quantized")
    card.wait_for()
    for name in NAMES:
        shown = dialog.get_by_test_id(f"template-workflow-{name}")
        shown.scroll_into_view_if_needed()
        # The front end shows a picture of its own where a template has none.
        editor.until(
            "(i) => i.complete && i.naturalWidth > 100 && !i.src.includes('default-template')",
            shown.locator("img").first.element_handle(),
        )
    editor.shot("template_dialog")
    card.scroll_into_view_if_needed()
    card.click()
    dialog.wait_for(state="hidden")
    editor.until("() => window.app.graph._nodes.some((n) => n.type === 'QuantizeModel')")
    assert editor.js("() => window.app.extensionManager.workflow.activeWorkflow.filename") == "quantized"


def test_each_template_has_a_thumbnail() -> None:
    assert [name for name in NAMES if not Path(WORKFLOWS / f"{name}.jpg").exists()] == []
