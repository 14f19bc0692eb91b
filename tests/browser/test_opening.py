"""The editor opens, and a user finds the pack in it: node search, node library, tooltips, help, Chinese."""

from __future__ import annotations

import json
from typing import Any

import pytest
from editor_page import Editor
from editor_server import ROOT, EditorServer
from quantwire.nodes import NODE_CLASS_MAPPINGS


@pytest.fixture(scope="module")
def pack() -> list[str]:
    return sorted(NODE_CLASS_MAPPINGS)


def node_words(locale: str) -> dict[str, Any]:
    return json.loads((ROOT / "locales" / locale / "nodeDefs.json").read_text(encoding="utf-8"))


def test_the_editor_opens_without_an_error(editor: Editor) -> None:
    assert "ComfyUI" in editor.page.title()
    assert editor.page.get_by_test_id("queue-button").is_visible()
    # The extension is loaded and says its version.
    assert editor.js("() => window.quantwire.version")
    editor.shot("open")


def test_no_request_of_the_editor_fails(editor: Editor, editor_server: EditorServer) -> None:
    """A 500 would be the server's fault, a 405 a route's."""
    own = [a for a in editor.answers if a[2].startswith(editor_server.url)]
    assert not [a for a in own if a[0] not in (400, 404)], own


def test_every_node_of_the_pack_is_registered(editor: Editor, pack: list[str]) -> None:
    found = editor.js(
        "(names) => names.map((n) => [n, window.LiteGraph.registered_node_types[n]?.nodeData?.category ?? null])", pack
    )
    assert [name for name, category in found if not category] == []
    assert {category.split("/")[0] for _, category in found} == {"quantwire"}


def test_every_input_has_a_tooltip(editor: Editor, pack: list[str]) -> None:
    bare = editor.js(
        """(names) => names.flatMap((name) => {
          const data = window.LiteGraph.registered_node_types[name].nodeData;
          const inputs = { ...data.input?.required, ...data.input?.optional };
          return Object.keys(inputs).filter((i) => !inputs[i][1]?.tooltip).map((i) => `${name}.${i}`);
        })""",
        pack,
    )
    assert bare == []


def test_the_search_finds_a_node_and_adds_it(editor: Editor) -> None:
    editor.blank()
    editor.page.mouse.dblclick(700, 500)
    box = editor.page.locator("[role=dialog] input, .comfy-vue-node-search-container input").first
    box.wait_for()
    box.fill("offload compat")
    editor.page.get_by_text("Offload Compatibility").first.wait_for()
    editor.shot("search")
    editor.page.keyboard.press("Enter")
    editor.until("() => window.app.graph._nodes.some((n) => n.type === 'OffloadCompat')")
    editor.page.keyboard.press("Escape")


def test_the_node_library_has_the_pack(editor: Editor) -> None:
    folder = editor.sidebar("node-library").get_by_text("quantwire", exact=True).first
    folder.scroll_into_view_if_needed()
    folder.click()
    editor.page.locator(".side-bar-panel").get_by_text("Quantize Model", exact=True).first.wait_for()
    editor.shot("node_library")


def test_a_widget_shows_its_tooltip(editor: Editor) -> None:
    editor.load("quantized")
    box = editor.box(editor.node("QuantizeModel"))
    row = 30 + 58  # title, two slots, half a row
    editor.page.mouse.move(box["x"] + 60 * box["scale"], box["y"] + (row - 2) * box["scale"])
    editor.page.mouse.move(box["x"] + 62 * box["scale"], box["y"] + row * box["scale"])
    tip = editor.page.locator(".node-tooltip")
    tip.wait_for()
    assert "What the weights become" in tip.inner_text()
    editor.shot("tooltip")
    editor.page.mouse.move(1200, 800)


@pytest.mark.parametrize("kind_of_node", ["QuantizeModel", "OffloadCompat"])
def test_the_help_page_shows_text_and_a_picture(editor: Editor, kind_of_node: str) -> None:
    editor.load("quantized")
    editor.click_node(editor.node(kind_of_node))
    editor.page.get_by_test_id("info-button").click()
    panel = editor.page.get_by_test_id("properties-panel")
    picture = panel.locator("img").first
    picture.scroll_into_view_if_needed()
    editor.until("(i) => i.complete && i.naturalWidth > 100", picture.element_handle())
    page = (ROOT / "web" / "docs" / f"{kind_of_node}.md").read_text(encoding="utf-8")
    heading = next(line.strip("# ") for line in page.splitlines() if line.startswith("## "))
    assert heading in panel.inner_text()
    editor.shot(f"help_{kind_of_node}")


def test_chinese_shows_chinese(editor: Editor) -> None:
    editor.load("quantized")
    words = node_words("zh")
    try:
        editor.setting("Comfy.Locale", "zh")
        editor.page.get_by_text("运行", exact=True).first.wait_for()
        editor.run_command("Comfy.RefreshNodeDefinitions")
        # A node that is made now: one that stands keeps the title that its workflow gave it.
        names = editor.js(
            """() => {
              const n = window.LiteGraph.createNode('QuantizeModel');
              return [n.title, n.inputs.map((i) => i.label ?? i.localized_name ?? i.name)];
            }"""
        )
        assert names[0] == words["QuantizeModel"]["display_name"]
        assert words["QuantizeModel"]["inputs"]["model"]["name"] in names[1]
        assert any("\u4e00" <= c <= "\u9fff" for c in names[0])
        editor.shot("chinese")
    finally:
        editor.setting("Comfy.Locale", "en")
        editor.page.get_by_text("Run", exact=True).first.wait_for()
