"""What the pack's web extension adds: settings, the check and its panel, sizes and options by format, badges."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from editor_page import Editor
from editor_server import EditorServer

BADGE = re.compile(r"12\.0 → |25\.2 → ")


@pytest.fixture
def settings(editor: Editor) -> Iterator[None]:
    """The pack's settings are as before when the test ends."""
    yield
    for name, value in (("quantwire.sizes", True), ("quantwire.badges", True), ("quantwire.check", True)):
        if editor.setting(name) != value:
            editor.setting(name, value)


def label(editor: Editor) -> str:
    """What stands at the format widget of the quantizing node."""
    return editor.js(
        """() => { const n = window.app.graph._nodes.find((n) => n.type === 'QuantizeModel');
        const w = n.widgets.find((w) => w.name === 'format'); return w.label ?? w.name; }"""
    )


def until_sized(editor: Editor, node: object, format_id: str = "bnb-nf4") -> float:
    """The predicted bytes in a format, once the server has told."""
    editor.until("([i, f]) => window.quantwire.sizes()[i]?.sizes?.[f]", [str(node), format_id])
    return editor.js("([i, f]) => window.quantwire.sizes()[i].sizes[f]", [str(node), format_id])


def test_the_settings_are_in_the_dialog_and_work(editor: Editor, settings: None) -> None:
    editor.run_command("Comfy.ShowSettingsDialog")
    dialog = editor.page.locator("[role=dialog]").last
    dialog.get_by_text("quantwire", exact=True).first.click()
    dialog.get_by_text("Predicted sizes", exact=True).wait_for()
    for name in ("Check while editing", "Wait after an edit (ms)", "Marked on the graph", "Badges after a run"):
        assert dialog.get_by_text(name, exact=True).is_visible(), name
    editor.shot("settings")
    assert editor.setting("quantwire.sizes") is True
    row = dialog.locator("[data-setting-id='quantwire.sizes'], :has(> * :text-is('Predicted sizes'))").last
    row.locator("input[role=switch], input[type=checkbox], [role=switch]").first.click(force=True)
    editor.until("() => window.app.extensionManager.setting.get('quantwire.sizes') === false")
    editor.close_dialogs()


def test_the_check_lists_what_it_found(editor: Editor) -> None:
    editor.load("conflict")
    editor.run_command("quantwire.check")
    panel = editor.page.locator(".qw-panel")
    panel.get_by_text("1 conflict").wait_for()
    entry = panel.locator("li[data-level=block]").first
    assert "OffloadCompat" in entry.inner_text() or "Offload check" in entry.inner_text()
    assert panel.locator("li[data-level=block] button").count() >= 1
    editor.shot("check_panel")


def test_the_check_says_where_nothing_is_found(editor: Editor) -> None:
    editor.load("quantized")
    panel = editor.sidebar("quantwire")
    panel.get_by_text("Check again").click()
    panel.get_by_text("Nothing found").wait_for()
    editor.shot("check_panel_clean")


def test_the_predicted_size_follows_the_format(editor: Editor) -> None:
    editor.load("quantized")
    node = editor.node("QuantizeModel")
    smaller = until_sized(editor, node)
    editor.until("() => window.app.graph._nodes.find((n) => n.type === 'QuantizeModel').widgets[0].label")
    first = label(editor)
    assert re.search(r"\d \w?i?B", first), first
    assert "%" in first
    editor.shot("size_nf4")
    editor.set_widget(node, "format", "bnb-int8")
    editor.until(
        "([i, old]) => ![undefined, old].includes(window.app.graph.getNodeById(i).widgets[0].label)", [node, first]
    )
    larger = until_sized(editor, node, "bnb-int8")
    assert smaller < larger < editor.js("(i) => window.quantwire.sizes()[i].base_nbytes", str(node))
    editor.until("(i) => /%/.test(window.app.graph.getNodeById(i).widgets[0].label ?? '')", node)
    second = label(editor)
    assert int(re.search(r"(\d+) %", second)[1]) > int(re.search(r"(\d+) %", first)[1])  # type: ignore[index]
    editor.shot("size_int8")


def test_the_predicted_size_is_what_the_run_reports(editor: Editor) -> None:
    editor.load("quantized")
    node = editor.node("QuantizeModel")
    predicted = until_sized(editor, node)
    editor.queue_and_wait()
    editor.until("(i) => window.quantwire.badges().some((b) => b.node === i)", str(node))
    (badge,) = [b for b in editor.js("() => window.quantwire.badges()") if b["node"] == str(node)]
    assert badge["nbytes_after"] == pytest.approx(predicted, rel=0.02)
    assert badge["nbytes_after"] < badge["nbytes_before"]


def test_the_size_can_be_turned_off(editor: Editor, settings: None) -> None:
    editor.load("quantized")
    until_sized(editor, editor.node("QuantizeModel"))
    editor.setting("quantwire.sizes", False)
    editor.until("() => !/iB/.test(window.app.graph._nodes.find((n) => n.type === 'QuantizeModel').widgets[0].label)")
    assert label(editor) == "format"


def test_a_widget_that_the_user_renamed_keeps_its_name(editor: Editor) -> None:
    """The editor offers what it shows, the size too, as the old name; only the name goes into the workflow's file."""
    editor.load("quantized")
    node = editor.node("QuantizeModel")
    editor.until("(i) => /%/.test(window.app.graph.getNodeById(i).widgets[0].label ?? '')", node)
    rename = """([i, name]) => { const n = window.app.graph.getNodeById(i), w = n.widgets[0];
      w.label = name ?? w.label; n.inputs.find((s) => s.widget?.name === w.name).label = w.label; }"""
    shown = "([i, name]) => window.app.graph.getNodeById(i).widgets[0].label?.startsWith(`${name} · `)"
    saved = "(i) => window.app.graph.getNodeById(i).serialize().inputs.find((s) => s.widget?.name === 'format').label"
    for given, kept in ((None, "format"), ("mine", "mine")):
        editor.js(rename, [node, given])
        editor.set_widget(node, "keep_layers", f"*{kept}*")
        editor.set_widget(node, "keep_layers", "")
        editor.until(shown, [node, kept])
        assert editor.js("(i) => window.app.graph.getNodeById(i).widgets[0].label.split(' · ').length", node) == 2
        assert editor.js(saved, node) == kept


def test_hidden_is_one_node_and_not_its_kind(editor: Editor) -> None:
    """Widgets of one class may share their options; a copy has the values of hidden widgets, too."""
    editor.load("quantized")
    node = editor.node("OffloadCompat")
    editor.until("(i) => window.app.graph.getNodeById(i).widgets.some((w) => w.hidden)", node)
    editor.set_widget(node, "blocks_per_group", 7)
    other = editor.js(
        """(i) => { const c = window.app.canvas, before = new Set(window.app.graph._nodes);
        c.deselectAll(); (c.select ?? c.selectNode).call(c, window.app.graph.getNodeById(i));
        c.copyToClipboard(); c.pasteFromClipboard();
        return window.app.graph._nodes.find((n) => !before.has(n)).id; }""",
        node,
    )
    assert editor.widget(other, "blocks_per_group") == 7
    editor.set_widget(other, "mode", "group")
    editor.until(
        "(i) => !window.app.graph.getNodeById(i).widgets.find((w) => w.name === 'blocks_per_group').hidden", other
    )
    hidden = """(i) => { const w = window.app.graph.getNodeById(i).widgets.find((w) => w.name === 'blocks_per_group');
      return [Boolean(w.hidden), Boolean(w.options.hidden)]; }"""
    assert editor.js(hidden, other) == [False, False]
    assert editor.js(hidden, node) == [True, True]


@pytest.mark.slow
def test_the_tooltip_of_a_format_is_chinese_where_the_editor_is(
    editor: Editor, new_window: Callable[[], Editor]
) -> None:
    """The explanation of the widget and that of the size below it."""
    editor.setting("Comfy.Locale", "zh")
    try:
        tab = new_window()
        tab.load("quantized")
        node = tab.node("QuantizeModel")
        tip = "(i) => window.app.graph.getNodeById(i).widgets[0].tooltip ?? ''"
        tab.until("(i) => /预计大小/.test(window.app.graph.getNodeById(i).widgets[0].tooltip ?? '')", node)
        tab.until("(i) => /权重要变成的格式/.test(window.app.graph.getNodeById(i).widgets[0].tooltip ?? '')", node)
        assert "The format" not in tab.js(tip, node)
    finally:
        editor.setting("Comfy.Locale", "en")


def test_only_the_options_of_the_mode_are_shown_and_no_value_is_lost(editor: Editor) -> None:
    editor.load("quantized")
    node = editor.node("OffloadCompat")
    editor.until("(i) => window.app.graph.getNodeById(i).widgets.some((w) => w.hidden)", node)
    saved = editor.js("(i) => window.app.graph.getNodeById(i).serialize().widgets_values", node)
    assert "blocks_per_group" not in editor.widgets(node)
    editor.set_widget(node, "mode", "group")
    editor.until(
        "(i) => !window.app.graph.getNodeById(i).widgets.find((w) => w.name === 'blocks_per_group').hidden", node
    )
    assert {"group_level", "blocks_per_group", "use_stream"} <= set(editor.widgets(node))
    editor.shot("options_group")
    editor.set_widget(node, "blocks_per_group", 5)
    editor.set_widget(node, "mode", "auto")
    editor.frames(5)
    # Saved and queued in the old places, hidden or not.
    after = editor.js("(i) => window.app.graph.getNodeById(i).serialize().widgets_values", node)
    names = editor.js("(i) => window.app.graph.getNodeById(i).widgets.map((w) => w.name)", node)
    assert [(n, v) for n, v, old in zip(names, after, saved, strict=True) if v != old] == [("blocks_per_group", 5)]
    assert editor.api()[str(node)]["inputs"]["blocks_per_group"] == 5


def test_a_badge_shows_size_and_quality_after_a_run(editor: Editor, settings: None) -> None:
    editor.load("quantized")
    editor.queue_and_wait()
    chip = editor.page.locator(".qw-layer").get_by_text(BADGE).first
    chip.wait_for()
    assert "dB" in chip.locator("xpath=ancestor-or-self::*[contains(., 'dB')][1]").inner_text()
    at, box = chip.bounding_box(), editor.box(editor.node("QuantizeModel"))
    assert at
    assert box["x"] - 20 <= at["x"] <= box["x"] + box["width"]
    assert abs(at["y"] - box["y"]) < 60
    editor.shot("badge")
    # It tells of an earlier run once the node was changed.
    editor.set_widget(editor.node("QuantizeModel"), "format", "bnb-int8")
    editor.until("(i) => window.quantwire.badges().find((b) => b.node === i).stale", str(editor.node("QuantizeModel")))
    editor.setting("quantwire.badges", False)
    chip.wait_for(state="detached")


def test_a_badge_stays_with_its_workflow(editor: Editor, editor_server: EditorServer) -> None:
    """A run that ends while another workflow is open leaves no badge on that one, whose nodes have the same ids."""
    editor.load("quantized")
    editor.set_widget(editor.node("KSampler"), "steps", 100)
    editor.set_widget(editor.node("QuantizeModel"), "keep_layers", "*attn*")
    editor.queue()
    other = {**editor.js("async () => (await window.app.graphToPrompt()).workflow"), "id": OTHER}
    editor.load(other)
    editor_server.wait_until_idle()
    editor.frames(10)
    assert editor.js("() => window.quantwire.badges()") == []


OTHER = "0b8a3a52-6a3b-4e4c-9c4e-2f8f5a9f9d11"
