"""The core of the suite where the editor is another: an older front end, Nodes 2.0 (HTML nodes), a narrow window."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser_setup import WINDOW, missing, own_machine_alone
from editor_page import WORKFLOWS, Editor
from editor_server import ROOT, EditorServer, running
from playwright.sync_api import Browser

pytestmark = pytest.mark.slow
# Two minor versions with a public API change in between are older than what constraints.txt names.
OLDER = "1.55.18"
NARROW = {"width": 390, "height": 844}
MANY_STEPS = 2000


def older_front_end() -> Path:
    """The older front end's files, downloaded once beside the tests' other output."""
    folder = ROOT / "out" / "front_ends" / OLDER
    static = folder / "comfyui_frontend_package" / "static"
    if not (static / "index.html").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        package = f"comfyui-frontend-package=={OLDER}"
        done = subprocess.run([*pip, "--target", str(folder), package], capture_output=True, text=True, timeout=300)
        if done.returncode:
            missing(f"{package} cannot be downloaded: {done.stderr.strip()[-300:]}")
    return static


@pytest.fixture(scope="module", params=["older_front_end", "nodes_2", "narrow"])
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def server(
    variant: str, kind: str, chromium: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EditorServer]:
    """The server of all tests; a further one where the front end is another."""
    if variant != "older_front_end":
        yield request.getfixturevalue("editor_server")
        return
    static = str(older_front_end())
    if os.environ.get("QUANTWIRE_FRONT_END"):
        pytest.skip("QUANTWIRE_FRONT_END names a front end already, and the suite runs on that one")
    with running(kind, tmp_path_factory.mktemp("older"), static) as older:
        yield older


@pytest.fixture(scope="module")
def tab(variant: str, server: EditorServer, browser: Browser) -> Iterator[Editor]:
    size = NARROW if variant == "narrow" else WINDOW
    context = browser.new_context(viewport=size, locale="en-US")  # type: ignore[arg-type]
    own_machine_alone(context)
    made = Editor(context.new_page(), server.url)
    made.open()
    try:
        if variant == "nodes_2":
            made.setting("Comfy.VueNodes.Enabled", True)
        yield made
    finally:
        if variant == "nodes_2":
            made.setting("Comfy.VueNodes.Enabled", False)
        context.close()


@pytest.fixture(autouse=True)
def no_errors_here(tab: Editor, server: EditorServer, request: pytest.FixtureRequest) -> Iterator[None]:
    server.wait_until_idle()
    tab.tidy()
    yield
    errors, tab.errors = tab.errors, []
    assert not errors, "\n".join(errors)


def test_it_opens_with_the_pack(tab: Editor, variant: str) -> None:
    assert tab.js("() => window.quantwire.version")
    version = tab.js("() => window.__COMFYUI_FRONTEND_VERSION__")
    if variant == "older_front_end":
        assert version == OLDER
    tab.load("quantized")
    if variant == "nodes_2":
        tab.page.locator("[data-node-id] >> text=Quantize").first.wait_for()
    tab.shot(f"{variant}_open")


@pytest.mark.parametrize("name", ["quantized", "flux_nf4", "compare_three_formats"])
def test_templates_open_and_queue_what_they_say(tab: Editor, name: str) -> None:
    tab.load(name)
    assert tab.missing() == []
    wanted = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
    made = tab.api()
    assert set(made) == set(wanted)
    for i, node in wanted.items():
        assert {k: made[i]["inputs"].get(k) for k in node["inputs"]} == node["inputs"], i


def test_size_and_options_follow_the_choice(tab: Editor, variant: str) -> None:
    tab.load("quantized")
    node, compat = tab.node("QuantizeModel"), tab.node("OffloadCompat")
    tab.until("(i) => /%/.test(window.app.graph.getNodeById(i).widgets[0].label ?? '')", node)
    first = tab.js("(i) => window.app.graph.getNodeById(i).widgets[0].label", node)
    tab.set_widget(node, "format", "bnb-int8")
    tab.until("([i, old]) => window.app.graph.getNodeById(i).widgets[0].label !== old", [node, first])
    assert "blocks_per_group" not in tab.widgets(compat)
    tab.set_widget(compat, "mode", "group")
    tab.until(
        "(i) => !window.app.graph.getNodeById(i).widgets.find((w) => w.name === 'blocks_per_group').hidden", compat
    )
    if variant == "nodes_2":
        shown = tab.page.locator(f"[data-node-id='{compat}']")
        shown.get_by_text("blocks_per_group").wait_for()
        tab.page.locator(f"[data-node-id='{node}']").get_by_text("%").first.wait_for()
    if variant == "narrow":
        tab.centre(compat)
    tab.shot(f"{variant}_sizes")


def test_a_conflict_is_marked_and_mended_with_a_click(tab: Editor, variant: str) -> None:
    tab.load("quantized")
    node = tab.node("QuantizeModel")
    tab.until("() => window.quantwire.findings().every((f) => f.level !== 'block')")
    tab.set_widget(node, "carrier", "library")
    tab.set_widget(tab.node("OffloadCompat"), "mode", "sequential")
    tab.until("() => window.quantwire.findings().some((f) => f.level === 'block')")
    tab.page.locator(".qw-frame[data-level=block]").first.wait_for(state="attached")
    tab.fit()
    tab.shot(f"{variant}_conflict")
    if variant == "narrow":  # where the whole graph is in view, the mark is below the Run button
        tab.centre(tab.node("OffloadCompat"))
    chip = tab.page.locator(".qw-row button[data-level=block]").first
    chip.click()
    card = tab.page.locator(".qw-card")
    card.wait_for()
    tab.shot(f"{variant}_conflict_card")
    card.locator(".qw-apply").first.click()
    tab.until("() => window.quantwire.findings().every((f) => f.level !== 'block')")
    tab.page.locator(".qw-frame[data-level=block]").wait_for(state="detached")


def test_the_demo_runs_and_shows_its_picture(tab: Editor, variant: str) -> None:
    tab.load("quantized")
    tab.queue_and_wait()
    picture = tab.picture(tab.node("SaveImage"))
    assert picture.size == (64, 64)
    assert 0.03 < (np.asarray(picture.convert("L")) > 128).mean() < 0.5
    tab.until("() => window.quantwire.badges().length")
    if variant == "narrow":
        tab.centre(tab.node("SaveImage"))
    tab.shot(f"{variant}_run")


def test_a_reload_in_mid_run_finds_it_again(tab: Editor, server: EditorServer, variant: str) -> None:
    tab.load("full_precision")
    tab.set_widget(tab.node("KSampler"), "steps", MANY_STEPS)
    prompt_id = tab.queue()
    tab.until("() => /\\[\\d+%\\]/.test(document.title)")
    try:
        tab.open()
        assert [entry[1] for entry in server.request("/queue")["queue_running"]] == [prompt_id]
        tab.until("() => /\\[\\d+%\\]/.test(document.title)")
        tab.shot(f"{variant}_reloaded")
    finally:
        server.request("/interrupt", {})
        server.wait_until_idle()
