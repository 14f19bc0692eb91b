"""Conflicts while a graph is edited: marks on the node and the link, the remedy as a click, the panel, the settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import pytest
from editor_page import Editor
from playwright.sync_api import Locator, Request

DEFAULTS = {"quantwire.check": True, "quantwire.check.levels": "warning", "quantwire.check.delay": 400}
# From the pointer's release to the mark, with the wait of 400 ms; about 450 ms where nothing else runs.
MARK_LIMIT_MS = 10_000
EDIT = """async ([id, name, value]) => {
  const n = app.graph.getNodeById(id), w = n.widgets.find((w) => w.name === name);
  const marked = () => !!document.querySelector('.qw-chip[data-level=block]');
  const before = marked(), start = performance.now();
  app.canvas.emitBeforeChange(); w.value = value; w.callback?.(value, app.canvas, n); app.canvas.emitAfterChange();
  while (marked() === before) {
    if (performance.now() - start > 60000) throw new Error('the mark did not change');
    await new Promise((done) => requestAnimationFrame(done));
  }
  return performance.now() - start;
}"""
CONTRAST = """(selector) => {
  const probe = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgb = (colour) => {
    probe.clearRect(0, 0, 1, 1); probe.fillStyle = colour; probe.fillRect(0, 0, 1, 1);
    return [...probe.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const linear = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = (colour) =>
    rgb(colour).map((c) => linear(c / 255)).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const clear = (e) => ['rgba(0, 0, 0, 0)', 'transparent'].includes(getComputedStyle(e).backgroundColor);
  return [...document.querySelectorAll(selector)].map((e) => {
    let behind = e;
    while (behind.parentElement && clear(behind)) behind = behind.parentElement;
    const [a, b] = [light(getComputedStyle(e).color), light(getComputedStyle(behind).backgroundColor)];
    return [e.textContent, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
  });
}"""


@pytest.fixture(autouse=True)
def as_before(editor: Editor) -> Iterator[None]:
    """The settings that a test changed, and the mode of the nodes."""
    modes = ("Comfy.VueNodes.Enabled", "Comfy.ColorPalette")
    found = {name: editor.setting(name) for name in modes}
    yield
    for name, value in {**DEFAULTS, **found}.items():
        if editor.setting(name) != value:
            editor.setting(name, value)


def block(editor: Editor) -> Locator:
    """The mark of a conflict on a node."""
    return editor.page.locator(".qw-chip[data-level=block]:visible")


def load(editor: Editor) -> Locator:
    """The workflow with a conflict, marked; the mark."""
    editor.load("conflict")
    block(editor).wait_for()
    editor.frames(5)
    return block(editor)


def codes(editor: Editor) -> list[str]:
    return editor.js("() => window.quantwire.findings().map((f) => f.code)")


def until_clean(editor: Editor) -> None:
    editor.until("() => !window.quantwire.findings().some((f) => f.level === 'block')")
    block(editor).wait_for(state="detached")


@pytest.fixture
def asked(editor: Editor) -> Iterator[list[dict[str, Any]]]:
    """The bodies of the questions that the page sends to /quantwire/check."""
    sent: list[dict[str, Any]] = []

    def note(request: Request) -> None:
        if request.url.endswith("/quantwire/check"):
            sent.append(request.post_data_json)

    editor.page.on("request", note)
    yield sent
    editor.page.remove_listener("request", note)


def test_the_page_knows_the_version_of_the_pack(editor: Editor) -> None:
    assert editor.js("() => window.quantwire.version") == metadata.version("quantwire")


def test_a_conflict_is_marked_on_its_node_and_its_link(editor: Editor) -> None:
    mark = load(editor)
    assert mark.inner_text().startswith("Conflict")
    assert "cannot run with sequential offload" in str(mark.get_attribute("title"))
    # At the upper left corner of the node that found it, and its frame around the node.
    box, at = editor.box(editor.node("OffloadCompat")), mark.bounding_box()
    frame = editor.page.locator(".qw-frame[data-level=block]").bounding_box()
    assert at
    assert frame
    assert abs(at["x"] - box["x"]) < 5
    assert box["y"] - 45 < at["y"] < box["y"]
    assert abs(frame["x"] - box["x"]) < 8
    assert abs(frame["width"] - box["width"]) < 12
    # Between the node that quantized and this one.
    dot, source = (
        editor.page.locator(".qw-dot[data-level=block]").bounding_box(),
        editor.box(editor.node("QuantizeModel")),
    )
    assert dot
    assert source["x"] + source["width"] - 15 <= dot["x"] + dot["width"] / 2 <= box["x"] + 15
    editor.shot("conflict")


def test_the_marks_come_with_an_edit_and_go_with_the_next(editor: Editor) -> None:
    load(editor)
    node = editor.node("QuantizeModel")
    gone = editor.js(EDIT, [node, "carrier", "quantwire"])
    back = editor.js(EDIT, [node, "carrier", "library"])
    assert editor.page.locator(".qw-dot[data-level=block]").count() == 1
    assert 400 <= gone < MARK_LIMIT_MS
    assert 400 <= back < MARK_LIMIT_MS
    print(f"marks gone after {gone:.0f} ms, back after {back:.0f} ms")


def test_a_click_on_the_remedy_cures_it_and_undo_brings_it_back(editor: Editor) -> None:
    mark = load(editor)
    node = editor.node("QuantizeModel")
    mark.click()
    card = editor.page.locator(".qw-card")
    assert "cannot run with sequential offload" in card.inner_text()
    editor.shot("conflict_card")
    card.get_by_role("button", name="Apply: Set carrier").click()
    assert editor.widget(node, "carrier") == "quantwire"
    until_clean(editor)
    assert card.count() == 0
    editor.page.keyboard.press("Control+z")
    block(editor).wait_for()
    assert editor.widget(node, "carrier") == "library"
    editor.page.keyboard.press("Control+Shift+z")
    until_clean(editor)
    assert editor.widget(node, "carrier") == "quantwire"


def test_the_mark_works_by_keyboard(editor: Editor) -> None:
    mark = load(editor)
    mark.focus()
    editor.page.keyboard.press("Enter")
    card = editor.page.get_by_role("dialog", name="Offload check: Conflict")
    card.wait_for()
    assert mark.get_attribute("aria-expanded") == "true"
    editor.page.keyboard.press("Escape")
    card.wait_for(state="detached")
    assert editor.js("() => document.activeElement.classList.contains('qw-chip')")
    editor.page.keyboard.press("Enter")
    for _ in range(2):  # past the button that closes
        editor.page.keyboard.press("Tab")
    assert "Apply: Set carrier" in editor.js("() => document.activeElement.ariaLabel")
    editor.page.keyboard.press("Enter")
    until_clean(editor)


def test_the_remedy_is_in_the_menu_of_the_node(editor: Editor) -> None:
    load(editor)
    editor.click_node(editor.node("OffloadCompat"), "right")
    editor.page.get_by_text("quantwire: Set carrier").first.click()
    until_clean(editor)
    assert editor.widget(editor.node("QuantizeModel"), "carrier") == "quantwire"


def test_nothing_is_sent_while_nothing_changes(editor: Editor, asked: list[dict[str, Any]]) -> None:
    load(editor)
    node = editor.node("OffloadCompat")
    asked.clear()
    # A place, a size and a colour are no change.
    editor.js(
        """(i) => { const n = app.graph.getNodeById(i); app.canvas.emitBeforeChange();
        n.pos = [n.pos[0] + 10, n.pos[1]]; n.color = '#322'; app.canvas.emitAfterChange(); }""",
        node,
    )
    editor.page.wait_for_timeout(1500)
    assert asked == []
    # Many edits in a row are one question, about the last of them.
    for value in (2, 3, 4, 5):
        editor.set_widget(node, "blocks_per_group", value)
    with editor.page.expect_response(lambda r: r.url.endswith("/quantwire/check")):
        pass
    editor.page.wait_for_timeout(600)
    assert len(asked) == 1
    (sent,) = [n for n in asked[0]["workflow"]["nodes"] if str(n["id"]) == str(node)]
    assert 5 in sent["widgets_values"]


@pytest.mark.parametrize("mode", [2, 4], ids=["muted", "bypassed"])
def test_a_node_that_does_not_run_has_no_mark(editor: Editor, mode: int) -> None:
    load(editor)
    editor.js("([i, m]) => { app.graph.getNodeById(i).mode = m; }", [editor.node("OffloadCompat"), mode])
    until_clean(editor)
    assert editor.page.locator(".qw-dot[data-level=block]").count() == 0


def test_a_conflict_inside_a_subgraph(editor: Editor) -> None:
    """Marked on the subgraph's node; the panel leads inside, and the remedy changes the node there."""
    load(editor)
    editor.js(
        """(ids) => { const nodes = ids.map((i) => app.graph.getNodeById(i));
        app.canvas.emitBeforeChange(); app.graph.convertToSubgraph(new Set(nodes)); app.canvas.emitAfterChange(); }""",
        [editor.node("QuantizeModel"), editor.node("OffloadCompat")],
    )
    outer = editor.page.locator(".qw-chip", has_text="Conflict inside")
    outer.wait_for()
    editor.shot("conflict_inside")
    editor.run_command("quantwire.check")
    panel = editor.page.locator(".qw-panel")
    panel.get_by_role("button", name="Go to node: Offload check").first.click()
    editor.until("() => app.canvas.graph !== app.graph && Object.keys(app.canvas.selected_nodes).length === 1")
    editor.page.locator(".qw-dot[data-level=block]:visible").wait_for()
    assert block(editor).inner_text().startswith("Conflict")
    assert "inside" not in block(editor).inner_text()
    editor.shot("conflict_in_subgraph")
    panel.get_by_role("button", name="Apply: Set carrier").click()
    until_clean(editor)
    inner = "() => app.canvas.graph.nodes.find((n) => n.type === 'QuantizeModel').widgets"
    assert editor.js(f"{inner}.find((w) => w.name === 'carrier').value") == "quantwire"
    editor.js("() => app.canvas.setGraph(app.graph)")


UNKNOWN_INSIDE = {
    "nodes": [{"id": 1, "type": "quantwire-test-box", "pos": [0, 0], "size": [200, 100], "inputs": [], "outputs": []}],
    "links": [],
    "version": 0.4,
    "definitions": {
        "subgraphs": [
            {
                "id": "quantwire-test-box",
                "version": 1,
                "name": "Box",
                "state": {"lastNodeId": 5, "lastLinkId": 0, "lastGroupId": 0, "lastRerouteId": 0},
                "revision": 0,
                "config": {},
                "inputNode": {"id": -10, "bounding": [0, 0, 100, 60]},
                "outputNode": {"id": -20, "bounding": [500, 0, 100, 60]},
                "inputs": [],
                "outputs": [],
                "widgets": [],
                "nodes": [{"id": 5, "type": "NoSuchNode", "pos": [0, 0], "size": [200, 100], "mode": 0}],
                "links": [],
                "groups": [],
            }
        ]
    },
}


def test_an_unknown_node_inside_a_subgraph_is_told(editor: Editor) -> None:
    """A run would fail at it, as at one outside."""
    editor.js("async (w) => { await app.loadGraphData(w); }", UNKNOWN_INSIDE)
    editor.until("() => window.quantwire.findings().some((f) => f.code === 'unknown-node' && f.node === '1:5')")
    editor.close_dialogs()


def test_a_remedy_for_an_older_graph_is_not_applied(editor: Editor) -> None:
    """A script changed another widget of the node and no check has followed yet: what cured then may not now."""
    mark = load(editor)
    node = editor.node("QuantizeModel")
    mark.click()
    card = editor.page.locator(".qw-card")
    editor.js(
        """(i) => { app.graph.getNodeById(i).widgets.find((w) => w.name === 'keep_layers').value = '*attn*';
        [...document.querySelectorAll('.qw-apply')].find((b) => b.ariaLabel.includes('Set carrier')).click(); }""",
        node,
    )
    editor.page.get_by_text("The workflow has changed since this was found").last.wait_for()
    assert editor.widget(node, "carrier") == "library"
    editor.page.keyboard.press("Escape")
    editor.page.wait_for_timeout(500)
    mark = block(editor)
    if not card.count():
        mark.click()
    card.get_by_role("button", name="Apply: Set carrier").click()
    until_clean(editor)


@pytest.mark.slow
def test_titles_are_no_html_in_the_menu(editor: Editor) -> None:
    """Some menus of the editor take their entries for HTML; titles are what a stranger's file has."""
    title = 'a<b>bold</b> <a href="https://example.org">log in</a>'
    load(editor)
    editor.js("(t) => { for (const n of app.graph._nodes) n.title = t; }", title)
    editor.page.wait_for_timeout(1500)
    editor.until("() => window.quantwire.findings().some((f) => f.title.includes('bold'))")
    editor.click_node(editor.node("OffloadCompat"), "right")
    entries = editor.page.get_by_text("quantwire: Set ")
    entries.first.wait_for()
    for entry in entries.all():
        assert "bold" not in entry.inner_text()
        assert entry.locator("b, a").count() == 0
    entries.first.click()
    until_clean(editor)


def test_the_settings_decide_what_is_marked(editor: Editor) -> None:
    """A value that is no choice is an error, and not a conflict."""
    load(editor)
    editor.set_widget(editor.node("OffloadCompat"), "action", "no such action")
    editor.until("() => window.quantwire.findings().some((f) => f.level === 'error')")
    editor.set_widget(editor.node("QuantizeModel"), "carrier", "quantwire")
    error = editor.page.locator(".qw-chip[data-level=error]")
    error.wait_for()
    editor.setting("quantwire.check.levels", "block")
    error.wait_for(state="detached")
    assert "error" in editor.js("() => window.quantwire.findings().map((f) => f.level)")
    editor.setting("quantwire.check.levels", "error")
    error.wait_for()
    editor.setting("quantwire.check", False)
    error.wait_for(state="detached")
    # The command checks all the same.
    editor.run_command("quantwire.check")
    error.wait_for()


def test_another_workflow_takes_the_marks_away(editor: Editor) -> None:
    load(editor)
    editor.load("quantized")
    block(editor).wait_for(state="detached", timeout=MARK_LIMIT_MS)
    editor.until("() => window.quantwire.findings().length === 0")
    load(editor)  # and they come back, though this graph was answered before


@pytest.mark.slow
def test_the_marks_follow_a_node_that_is_html(editor: Editor) -> None:
    """Nodes 2.0: the frame is around the node as the page has it, also after a drag."""
    editor.setting("Comfy.VueNodes.Enabled", True)
    load(editor)
    node = editor.node("OffloadCompat")
    element = editor.page.locator(f".lg-node[data-node-id='{node}']")
    element.wait_for()
    before = element.bounding_box()
    assert before
    x, y = before["x"] + before["width"] / 2, before["y"] + 8
    editor.page.mouse.move(x, y)
    editor.page.mouse.down()
    editor.page.mouse.move(x + 60, y + 40, steps=6)
    editor.page.mouse.up()
    editor.page.wait_for_timeout(700)  # the height of the element is looked at a few times a second
    now, frame = element.bounding_box(), editor.page.locator(".qw-frame[data-level=block]").bounding_box()
    assert now
    assert frame
    assert now["x"] > before["x"] + 20
    for side in ("x", "y", "width", "height"):
        assert abs(now[side] - frame[side]) < 12, (side, now, frame)
    editor.shot("conflict_nodes2")
    block(editor).click()
    editor.page.locator(".qw-card").get_by_role("button", name="Apply: Set carrier").click()
    until_clean(editor)


@pytest.mark.slow
@pytest.mark.parametrize("palette", ["dark", "light", "solarized", "nord"])
def test_the_words_can_be_read_in_every_theme(editor: Editor, palette: str) -> None:
    """Contrast of at least 4.5 (WCAG AA)."""
    editor.setting("Comfy.ColorPalette", palette)
    mark = load(editor)
    mark.click()
    editor.page.wait_for_timeout(300)
    found = editor.js(CONTRAST, ".qw-chip span, .qw-card h2, .qw-card h3, .qw-card p, .qw-remedies li, .qw-remedies b")
    editor.shot(f"conflict_{palette}")
    assert len(found) >= 6
    assert [entry for entry in found if entry[1] < 4.5] == []


@pytest.mark.slow
def test_the_words_are_chinese_where_the_editor_is(editor: Editor, new_window: Callable[[], Editor]) -> None:
    editor.setting("Comfy.Locale", "zh")
    try:
        tab = new_window()
        mark = load(tab)
        assert mark.inner_text().startswith("冲突")
        tab.run_command("quantwire.check")
        tab.page.locator(".qw-panel").get_by_text("重新检查").wait_for()
        tab.shot("conflict_zh")
    finally:
        editor.setting("Comfy.Locale", "en")


@pytest.mark.slow
def test_a_server_without_the_route_is_told_of_once(new_window: Callable[[], Editor]) -> None:
    """The answers of a server that lacks the route are made in the browser here: ComfyUI's 405, with its text."""
    tab = new_window()
    warnings: list[str] = []
    tab.page.on("console", lambda m: warnings.append(m.text) if m.type == "warning" and "quantwire" in m.text else None)
    sent: list[str] = []

    def refuse(route: Any) -> None:
        sent.append(route.request.url)
        route.fulfill(status=405, body="405: Method Not Allowed")

    tab.page.route("**/quantwire/check", refuse)
    for name in ("conflict", "quantized", "conflict"):
        tab.load(name)
        tab.page.wait_for_timeout(1500)
    assert len(sent) == 1
    assert len(warnings) == 1
    assert "restart" in warnings[0]
    tab.run_command("quantwire.check")
    tab.page.locator(".qw-panel").get_by_text("Restart it").wait_for()
    assert tab.page.locator(".qw-chip").count() == 0
    tab.take_errors("405")
