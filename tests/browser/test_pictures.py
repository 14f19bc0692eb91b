"""The README's pictures, from the real editor.

    QUANTWIRE_WRITE_PICTURES=1 python -m pytest tests/browser/test_pictures.py

Without that the pictures are made and looked at all the same, into out/browser, and those of the README must be there.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser_setup import own_machine_alone
from editor_page import SHOTS, Editor
from editor_server import ROOT, EditorServer
from PIL import Image
from playwright.sync_api import Browser

pytestmark = pytest.mark.slow
PICTURES = ROOT / "docs" / "pictures"
LARGEST_NBYTES = 250_000
WINDOW = {"width": 1400, "height": 800}

SHOW = """([ids, left, top, right, bottom]) => {
  const c = window.app.canvas, nodes = ids.map((i) => window.app.graph.getNodeById(i));
  const x0 = Math.min(...nodes.map((n) => n.pos[0])), y0 = Math.min(...nodes.map((n) => n.pos[1] - 30));
  const x1 = Math.max(...nodes.map((n) => n.pos[0] + n.size[0]));
  const y1 = Math.max(...nodes.map((n) => n.pos[1] + n.size[1]));
  const w = c.canvas.clientWidth - left - right, h = c.canvas.clientHeight - top - bottom;
  c.ds.scale = Math.min(w / (x1 - x0), h / (y1 - y0), 1);
  c.ds.offset = [left / c.ds.scale - x0, top / c.ds.scale - y0];
  c.setDirty(true, true);
}"""


@pytest.fixture(scope="module")
def tab(browser: Browser, editor_server: EditorServer) -> Iterator[Editor]:
    """A window of its own, with more pixels, so that text in a scaled picture stays readable."""
    context = browser.new_context(viewport=WINDOW, device_scale_factor=1.5, locale="en-US")  # type: ignore[arg-type]
    own_machine_alone(context)
    editor_server.request("/quantwire/formats")  # a tab that waits in vain for the first answer stretches its nodes
    made = Editor(context.new_page(), editor_server.url)
    made.open()
    for name in ("Comfy.Minimap.Visible", "Comfy.Graph.CanvasInfo"):
        made.setting(name, False)
    made.run_command("Workspace.ToggleFocusMode")  # no menus
    yield made
    made.setting("Comfy.Graph.CanvasInfo", True)
    context.close()


def show(tab: Editor, nodes: list[Any], margins: tuple[int, int, int, int]) -> None:
    """Bring nodes into view, `margins` pixels (left, top, right, bottom) from the window's edges."""
    tab.js(SHOW, [nodes, *margins])
    tab.frames(5)


def around(boxes: list[dict[str, float]], margin: float = 14) -> dict[str, float]:
    """The part of the window that holds all boxes, with a margin."""
    x0, y0 = (max(min(b[k] for b in boxes) - margin, 0) for k in "xy")
    x1 = min(max(b["x"] + b["width"] for b in boxes) + margin, WINDOW["width"])
    y1 = min(max(b["y"] + b["height"] for b in boxes) + margin, WINDOW["height"])
    return {"x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0}


def keep(tab: Editor, name: str, clip: dict[str, float]) -> Image.Image:
    """Take the picture, in 256 colours: a third of the bytes, and no difference in sight."""
    shot = Image.open(io.BytesIO(tab.page.screenshot(clip=clip))).convert("RGB")  # type: ignore[arg-type]
    small = shot.quantize(256, kmeans=2, dither=Image.Dither.NONE)
    folder = PICTURES if os.environ.get("QUANTWIRE_WRITE_PICTURES") else SHOTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    small.save(path, optimize=True)
    assert path.stat().st_size < LARGEST_NBYTES
    return shot


def assert_readme_has(name: str) -> None:
    path: Path = PICTURES / f"{name}.png"
    assert path.exists(), f"{path} is missing: run with QUANTWIRE_WRITE_PICTURES=1"
    assert path.stat().st_size < LARGEST_NBYTES


def test_picture_of_a_conflict(tab: Editor) -> None:
    tab.load("conflict")
    nodes = [tab.node("QuantizeModel"), tab.node("OffloadCompat")]
    tab.until("() => window.quantwire.findings().some((f) => f.level === 'block')")
    show(tab, nodes, (40, 90, 460, 60))
    tab.page.locator(".qw-row button[data-level=block]").first.click()
    card = tab.page.locator(".qw-card")
    card.wait_for()
    tab.page.mouse.move(700, 5)
    tab.frames(10)
    box = card.bounding_box()
    assert box
    clip = around([*(tab.box(n) for n in nodes), dict(box)])  # type: ignore[list-item]
    clip["y"] -= 24  # the chip above the title
    clip["height"] += 24
    shot = keep(tab, "conflict", clip)
    red, green, blue = (np.asarray(shot)[..., c].astype(int) for c in range(3))
    assert ((red > 150) & (green < 110) & (blue < 110)).sum() > 500, "no mark in the picture"
    assert_readme_has("conflict")


def test_picture_of_the_demo_run(tab: Editor) -> None:
    tab.load("quantized")
    tab.queue_and_wait()
    tab.picture(tab.node("SaveImage"))
    tab.page.locator(".qw-row .qw-chip").first.wait_for()
    nodes = [n["id"] for n in tab.nodes() if n["type"] != "MarkdownNote"]
    show(tab, nodes, (40, 70, 40, 96))
    tab.until("() => !document.body.innerText.includes('Job completed')")
    save = {k: v for k, v in tab.box(tab.node("SaveImage")).items() if k != "scale"}
    picture = Image.open(io.BytesIO(tab.page.screenshot(clip=save))).convert("L")  # type: ignore[arg-type]
    assert (np.asarray(picture) > 200).sum() > 200, "no digit in the node Save"
    keep(tab, "demo_run", around([tab.box(n) for n in nodes], 34))
    assert_readme_has("demo_run")
