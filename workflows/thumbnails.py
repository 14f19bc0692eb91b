"""Write NAME.jpg for the shipped workflows: the graph in a running editor, with its real output where the demo runs.

    python -m quantwire.workflows.thumbnails models DIR
    quantwire serve --models DIR --models demo/models            (or ComfyUI with these folders)
    python -m quantwire.workflows.thumbnails write http://127.0.0.1:8188 [NAME ...]

`models` writes files under the names that the templates ask for, so that the editor marks nothing as missing, and makes
the file of the workflow `gguf`. Those of diffusion models have the header of the published model and holes for weights,
so the sizes that nodes show are true; others are empty. The folder must not be one that other tools read models from.
`write` needs Playwright, Pillow and a Chromium in PATH.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..quantizers.errors import FileError, QuantwireError
from . import parts
from .build import DEMO, FOLDER, WORKFLOWS
from .memory import CASES, model_part
from .published import write_header

# File -> the case whose model has its shapes.
HEADERS = {
    **{parts.FLUX_DEV: "flux_nf4", parts.FLUX_SCHNELL: "flux_nf4", parts.SD35: "sd35_int8"},
    **{parts.SDXL: "sdxl_int8_convrot", parts.WAN_HIGH: "wan_q4_k", parts.WAN_LOW: "wan_q4_k"},
    **{parts.QWEN: "qwen_image_nvfp4", parts.ACE: "audio_int8"},
}
SIZE, SCALE = (640, 360), 3
MOST_NBYTES = 60_000
STOPPED = "conflict"  # the workflow that is made to be stopped
WAIT_S = 120
MARGIN = 30  # around the graph, in its own units
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
# Only the canvas and what nodes show above it: the editor's own bars and notices are no part of the workflow.
STYLE = """
body * { visibility: hidden !important; }
#graph-canvas, .dom-widget, .dom-widget * { visibility: visible !important; }
"""
# The note is in the picture where it costs little, else left of it.
FRAME = """([width, height, margin]) => {
  const around = (boxes) => {
    const left = Math.min(...boxes.map(b => b[0])), top = Math.min(...boxes.map(b => b[1]));
    const right = Math.max(...boxes.map(b => b[0] + b[2])), bottom = Math.max(...boxes.map(b => b[1] + b[3]));
    return [left - margin, top - margin, right - left + 2 * margin, bottom - top + 2 * margin];
  };
  const scaleOf = (box) => Math.min(width / box[2], height / box[3]);
  const groups = window.app.graph._groups.map(g => [...g.pos, ...g.size]);
  const notes = window.app.graph._nodes.filter(n => n.type === 'MarkdownNote')
    .map(n => [n.pos[0], n.pos[1] - 30, n.size[0], n.size[1] + 30]);
  const graph = around(groups), all = around([...groups, ...notes]);
  const whole = scaleOf(all) > 0.85 * scaleOf(graph);
  const [left, top, w, h] = whole ? all : graph, scale = scaleOf([left, top, w, h]);
  const canvas = window.app.canvas;
  canvas.ds.scale = scale;
  canvas.ds.offset = [(whole ? (width / scale - w) / 2 : 0) - left, (height / scale - h) / 2 - top];
  canvas.low_quality_zoom_threshold = 0;
  canvas.min_font_size_for_lod = 0;
  canvas.show_info = false;
  canvas.deselectAll();
  canvas.setDirty(true, true);
}"""
IDS = "async () => Object.keys(await (await fetch('/api/history')).json())"
DONE = """async (before) => {
  const history = await (await fetch('/api/history')).json();
  const run = Object.entries(history).find(([id, entry]) => !before.includes(id) && entry.status?.status_str);
  return run ? run[1].status.status_str : null;
}"""


def write_models(folder: Path) -> None:
    from ..cli import main as command

    for file in {f for workflow in WORKFLOWS for f in workflow.files}:
        path = folder / file.folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        if file in HEADERS:
            write_header(path, model_part(CASES[HEADERS[file]]).slots)
    source = FOLDER.parent / "demo" / "models" / "diffusion_models" / "digits_flux.safetensors"
    target = folder / "diffusion_models" / "digits_flux-Q8_0.gguf"
    if not target.exists() and command(["convert", str(source), str(target), "--type", "Q8_0"]):
        raise FileError(f"{target}: not written.")


def write(url: str, names: Sequence[str]) -> None:
    """Raises FileError: no Chromium in PATH; QuantwireError: a picture is too large."""
    from playwright.sync_api import sync_playwright

    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise FileError("There is no chromium in PATH.\nInstall it: `apt-get install chromium`.")
    demo = {w.name for w in DEMO}
    with sync_playwright() as playwright, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        context = playwright.chromium.launch_persistent_context(
            *(profile,),
            executable_path=browser,
            args=FLAGS,
            viewport={"width": _pixels()[0], "height": _pixels()[1]},
        )
        page = context.pages[0]
        page.goto(url, wait_until="domcontentloaded")
        page.wait_for_function("() => window.app?.graph && window.app.extensionManager", timeout=90_000)
        page.wait_for_timeout(4000)
        page.add_style_tag(content=STYLE)
        for name in names or [w.name for w in WORKFLOWS]:
            (FOLDER / f"{name}.jpg").write_bytes(_small(_picture(page, name, name in demo)))
        context.close()


def _picture(page: Any, name: str, runs: bool) -> bytes:
    page.evaluate("graph => window.app.loadGraphData(graph)", json.loads((FOLDER / f"{name}.json").read_text("utf-8")))
    page.wait_for_timeout(1500)
    if runs:
        before = page.evaluate(IDS)
        page.evaluate("() => window.app.queuePrompt(0, 1)")
        ended = None
        for _ in range(WAIT_S):
            page.wait_for_timeout(1000)
            ended = page.evaluate(DONE, before)
            if ended:
                break
        if (ended == "success") is not (name != STOPPED):
            raise QuantwireError(f"{name}: the run ended with {ended!r}.\nSee what the server said of it.")
        page.wait_for_timeout(2500)
    page.keyboard.press("Escape")
    page.evaluate(FRAME, [*_pixels(), MARGIN])
    page.wait_for_timeout(1500)
    return page.screenshot()


def _pixels() -> tuple[int, int]:
    return SIZE[0] * SCALE, SIZE[1] * SCALE


def _small(picture: bytes) -> bytes:
    from PIL import Image

    with Image.open(io.BytesIO(picture)) as image:
        scaled = image.convert("RGB").resize(SIZE, Image.Resampling.LANCZOS)
    for quality in (88, 80, 70, 60):
        file = io.BytesIO()
        scaled.save(file, "JPEG", quality=quality, optimize=True)
        if file.tell() < MOST_NBYTES:
            return file.getvalue()
    raise QuantwireError(f"The picture takes more than {MOST_NBYTES} bytes at quality 60.\nShow less of the graph.")


if __name__ == "__main__":
    do, where, *rest = sys.argv[1:]
    if do == "models":
        write_models(Path(where))
    else:
        write(where, rest)
