"""How long does a user of `quantwire serve` wait? Milliseconds of the steps, with one real server and one real browser.

    python benchmarks/editor.py [--repeats 15] [--json FILE] [--no-browser]

From a cold start: the page, the list of formats, the node definitions, the first check, the first run. Then, warm:
checks of the shipped workflow with a conflict and of a graph with 12 copies of its model branch (78 nodes), predicted
sizes, a run of the demo workflow, and the time from an edit that makes a conflict to the mark on the canvas, 400 ms of
which the editor waits for the user to go on. At last the stop. Medians, with least and most.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = ROOT / "workflows"
COPIES = 12
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
READY = "() => window.quantwire && window.app?.extensionManager?.workflow?.activeWorkflow && window.app.graph"
# Sets the mode of the offload check and resolves with the milliseconds until its mark is there, or is gone.
EDIT = """async ([mode, marked]) => {
  const node = window.app.graph._nodes.find((n) => n.type === "OffloadCompat");
  const widget = node.widgets.find((w) => w.name === "mode"), start = performance.now();
  widget.value = mode;
  widget.callback?.(mode, window.app.canvas, node, node.pos);
  node.onWidgetChanged?.("mode", mode, null, widget);
  // What the pointer's release does after an edit.
  const tracker = window.app.extensionManager.workflow.activeWorkflow.changeTracker;
  (tracker.captureCanvasState ?? tracker.checkState)?.call(tracker);
  while (!!document.querySelector(".qw-chip") !== marked) await new Promise((go) => requestAnimationFrame(go));
  return performance.now() - start;
}"""


class Server:
    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "quantwire.cli", "serve", "--port", "0", "--models", str(ROOT / "demo/models")]
        self.start = time.perf_counter()
        self.process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split()[-1].rstrip("/")

    def ask(self, path: str, data: Any = None) -> Any:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            text = answer.read()
        return json.loads(text) if text[:1] in (b"{", b"[") else None

    def run(self, graph: Any) -> None:
        """Queue a workflow and wait until it is done."""
        prompt_id = str(uuid.uuid4())
        self.ask("/prompt", {"prompt": graph, "prompt_id": prompt_id})
        while not (entry := self.ask(f"/history/{prompt_id}").get(prompt_id)):
            time.sleep(0.005)
        assert entry["status"]["status_str"] == "success", entry["status"]

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0


def many(graph: dict[str, Any]) -> dict[str, Any]:
    """The workflow with its branch from the loader to the picture several times."""
    shared = {i for i, n in graph.items() if n["class_type"] in ("CLIPLoader", "CLIPTextEncode", "FluxGuidance")}
    shared |= {i for i, n in graph.items() if n["class_type"] in ("EmptySD3LatentImage", "VAELoader")}
    made = {i: graph[i] for i in shared}
    for copy in range(COPIES):
        for i, node in graph.items():
            if i in shared or node["class_type"] == "PreviewAny":
                continue
            inputs = {
                k: [f"{v[0]}0{copy}", v[1]] if isinstance(v, list) and v[0] not in shared else v
                for k, v in node["inputs"].items()
            }
            made[f"{i}0{copy}"] = {**node, "inputs": inputs}
    return made


def timed_ms(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - start)


def edits_ms(url: str, repeats: int) -> tuple[list[float], list[float]]:
    """(until the mark is there, until it is gone) after an edit, in the real editor."""
    from playwright.sync_api import sync_playwright

    browser_path = next(filter(None, map(shutil.which, BROWSERS)))
    workflow = json.loads((WORKFLOWS / "conflict.json").read_text(encoding="utf-8"))
    there: list[float] = []
    gone: list[float] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=FLAGS)
        page = browser.new_page(viewport={"width": 1600, "height": 900})
        page.goto(url)
        page.wait_for_function(READY, timeout=120_000)
        page.evaluate("(w) => window.app.loadGraphData(w)", workflow)
        page.wait_for_selector(".qw-chip", timeout=120_000)
        for _ in range(repeats):
            gone.append(page.evaluate(EDIT, ["none", False]))
            there.append(page.evaluate(EDIT, ["sequential", True]))
        browser.close()
    return there, gone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-browser", action="store_true")
    args = parser.parse_args()
    api = {
        n: json.loads((WORKFLOWS / "api" / f"{n}.json").read_text(encoding="utf-8")) for n in ("conflict", "quantized")
    }
    rows: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        server.ask("/")
        rows["start to page"] = [1000 * (time.perf_counter() - server.start)]
        rows["list of formats, cold"] = [timed_ms(lambda: server.ask("/quantwire/formats"))]
        rows["node definitions, after it"] = [timed_ms(lambda: server.ask("/object_info"))]
        rows["check, cold"] = [timed_ms(lambda: server.ask("/quantwire/check", {"prompt": api["conflict"]}))]
        rows["run, the first"] = [timed_ms(lambda: server.run(api["quantized"]))]
        large = many(api["conflict"])
        found = server.ask("/quantwire/check", {"prompt": large})["findings"]
        assert sum(f["level"] == "block" for f in found) == COPIES
        sizes = {"prompt": api["quantized"], "node": "2"}
        seeds = iter(range(1, 10_000))

        def run() -> None:
            graph = json.loads(json.dumps(api["quantized"]))
            graph["11"]["inputs"]["seed"] = next(seeds)
            server.run(graph)

        steps: dict[str, Callable[[], Any]] = {
            "check, 13 nodes, 1 conflict": lambda: server.ask("/quantwire/check", {"prompt": api["conflict"]}),
            f"check, {len(large)} nodes, {COPIES} conflicts": lambda: server.ask("/quantwire/check", {"prompt": large}),
            "predicted size": lambda: server.ask("/quantwire/sizes", sizes),
            "run with another seed": run,
        }
        for _ in range(args.repeats):
            for name, step in steps.items():
                rows.setdefault(name, []).append(timed_ms(step))
        if not args.no_browser:
            rows["edit to mark"], rows["edit to no mark"] = edits_ms(server.url, args.repeats)
        rows["stop"] = [timed_ms(server.stop)]
    print(f"{'':36}{'median ms':>11}{'least':>9}{'most':>9}")
    for name, values in rows.items():
        print(f"{name:36}{statistics.median(values):11.0f}{min(values):9.0f}{max(values):9.0f}")
    facts = {p: version(p) for p in ("torch", "aiohttp", "comfyui-frontend-package")}
    facts |= {"python": platform.python_version(), "cores": str(os.cpu_count()), "machine": platform.machine()}
    print(facts)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"rows_ms": rows, **facts}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
