"""The pictures in the nodes' help pages: each node as the real editor draws it, in `web/docs/img/`.

    python tests/browser/node_pictures.py [NODE ...] [--url http://127.0.0.1:8199] [--locale zh]

Without `--url` it starts `quantwire serve` on the demo models. A picture that looks as before is not written again, so
that a run on another machine, with other fonts in the same widths, changes no file. Needs Chromium.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from editor_server import running
from PIL import Image
from playwright.sync_api import Page, sync_playwright
from quantwire.nodes import NODE_CLASS_MAPPINGS

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "web" / "docs" / "img"
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
MARGIN = 12
# As large as text in the help panel, about 400 pixels wide, stays readable.
LARGEST_NBYTES = 30_000
# Nodes on the canvas, and no badge that names the pack above each of them.
SETTINGS = """
async locale => {
  const set = window.app.extensionManager.setting.set;
  await set("Comfy.VueNodes.Enabled", false);
  await set("Comfy.NodeBadge.NodeSourceBadgeMode", "None");
  await set("Comfy.Locale", locale);
}
"""
PLACE = """
async ([type, x, y]) => {
  const graph = window.app.graph;
  graph.clear();
  const node = window.LiteGraph.createNode(type);
  graph.add(node);
  node.pos = [0, 0];
  const [width, height] = node.computeSize();
  node.setSize([Math.max(width, 340), height]);
  const { ds } = window.app.canvas;
  ds.scale = 1;
  ds.offset = [x, y];
  window.app.canvas.deselectAll?.();
  window.app.canvas.setDirty(true, true);
  return [node.size[0], node.size[1], window.LiteGraph.NODE_TITLE_HEIGHT];
}
"""


@contextmanager
def opened(url: str, locale: str) -> Iterator[Page]:
    """The editor in Chromium, in a language, with the classic canvas and nothing of it open."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        raise SystemExit("no Chromium here: install it, for example with `apt-get install chromium`")
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        window: Any = {"width": 1400, "height": 1200}
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=found, headless=True, viewport=window, args=list(FLAGS)
        )
        try:
            page = context.pages[0]
            page.goto(url, wait_until="domcontentloaded")
            ready = "() => window.app?.graph && window.app.extensionManager?.setting"
            page.wait_for_function(ready, timeout=90_000)
            page.evaluate(
                SETTINGS,
                locale,
            )
            page.reload(wait_until="domcontentloaded")
            page.wait_for_function(ready, timeout=90_000)
            page.wait_for_timeout(2500)
            page.keyboard.press("Escape")
            yield page
        finally:
            context.close()


def picture(page: Page, node: str) -> bytes:
    """A PNG of one node with its widgets at their defaults."""
    x, y = 500, 150
    width, height, title = page.evaluate(PLACE, [node, x, y])
    page.wait_for_timeout(500)
    box = page.evaluate("() => { const r = window.app.canvas.canvas.getBoundingClientRect(); return [r.x, r.y]; }")
    clip: Any = {
        "x": box[0] + x - MARGIN,
        "y": box[1] + y - title - MARGIN,
        "width": width + 2 * MARGIN,
        "height": height + title + 2 * MARGIN,
    }
    return small(page.screenshot(clip=clip))


def small(png: bytes) -> bytes:
    """The picture in as many colours as a file of `LARGEST_NBYTES` holds."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    for colors in (128, 64, 32, 16):
        out = io.BytesIO()
        image.quantize(colors, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
        if len(out.getvalue()) < LARGEST_NBYTES:
            return out.getvalue()
    raise SystemExit(f"the picture takes {len(out.getvalue())} bytes in 16 colours; the most is {LARGEST_NBYTES}")


def same(file: Path, png: bytes) -> bool:
    """Whether a file shows the same picture already."""
    if not file.exists():
        return False
    with Image.open(file) as old, Image.open(io.BytesIO(png)) as new:
        return old.size == new.size and old.convert("RGB").tobytes() == new.convert("RGB").tobytes()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Pictures of the nodes for their help pages.")
    parser.add_argument("nodes", nargs="*", metavar="NODE", help="only these")
    parser.add_argument("--url", help="an editor that runs already")
    parser.add_argument("--locale", default="en", help="language of the editor")
    args = parser.parse_args(argv)
    unknown = set(args.nodes) - set(NODE_CLASS_MAPPINGS)
    if unknown:
        parser.error(f"no such node: {', '.join(sorted(unknown))}")
    folder = IMAGES if args.locale == "en" else IMAGES / args.locale
    folder.mkdir(parents=True, exist_ok=True)
    nodes = args.nodes or with_page(args.locale)
    if args.url:
        draw(args.url, args.locale, nodes, folder)
        return
    with tempfile.TemporaryDirectory() as base, running("standalone", Path(base)) as server:
        draw(server.url, args.locale, nodes, folder)


def with_page(locale: str) -> list[str]:
    """The nodes that have a help page in a language."""
    docs = IMAGES.parent
    return [n for n in NODE_CLASS_MAPPINGS if (docs / (f"{n}.md" if locale == "en" else f"{n}/{locale}.md")).exists()]


def draw(url: str, locale: str, nodes: Sequence[str], folder: Path) -> None:
    with opened(url, locale) as page:
        for node in nodes:
            png = picture(page, node)
            file = folder / f"{node}.png"
            if not same(file, png):
                file.write_bytes(png)
                print(f"{file.relative_to(ROOT)}: {len(png)} bytes")


if __name__ == "__main__":
    main()
