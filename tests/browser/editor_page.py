"""One tab with the editor in it, and what the tests do there.

Steps that a user does with the pointer are done with the pointer; the graph is read, and loaded, through `window.app`,
which is the front end's interface to extensions.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from PIL.Image import Image as Picture
from PIL.Image import frombytes
from playwright.sync_api import ConsoleMessage, Error, Locator, Page, Response

ROOT = Path(__file__).resolve().parents[2]
SHOTS = ROOT / "out" / "browser"
WORKFLOWS = ROOT / "workflows"
# For a machine that does other work besides; nothing waits longer than it must. `QUANTWIRE_BROWSER_LIMIT_S` shortens it
# while one writes tests.
LIMIT_MS = 1000 * float(os.environ.get("QUANTWIRE_BROWSER_LIMIT_S", "90"))

# Messages of the browser's console, at level "error", that say nothing about the pack or the server.
EXPECTED_ERRORS = (
    # Chromium reports each refused request as a second message without the address; `responses` holds the first.
    "Failed to load resource: the server responded with a status of",
    # The front end asks the internet (its release notes, the pack registry, the size of a model that a template names),
    # which no test reaches; both servers forbid it in their page's policy, too.
    "violates the document's Content Security Policy",
    'violates the following Content Security Policy directive: "connect-src',
    "net::ERR_FAILED",
    "net::ERR_NAME_NOT_RESOLVED",
    "net::ERR_INTERNET_DISCONNECTED",
    "net::ERR_CONNECTION_",
    "net::ERR_BLOCKED_BY_CLIENT",
    # Front end 1.49.6 says it at its start by itself, also in a ComfyUI without this pack.
    "ComfyApp graph accessed before initialization",
)
# Addresses whose "not found" is an answer that the front end expects: files that a user may or may not have.
MAY_BE_ABSENT = ("/api/userdata/", "/api/userdata?dir=", "/userdata/", "/user.css", "/docs/", "/i18n/", ".map")

FIT = """() => {
  const c = window.app.canvas, nodes = window.app.graph._nodes;
  const b = nodes.reduce((a, n) => [Math.min(a[0], n.pos[0]), Math.min(a[1], n.pos[1] - 40),
    Math.max(a[2], n.pos[0] + n.size[0]), Math.max(a[3], n.pos[1] + n.size[1])], [1e9, 1e9, -1e9, -1e9]);
  const w = c.canvas.clientWidth, h = c.canvas.clientHeight;
  const s = Math.min((w - 160) / (b[2] - b[0]), (h - 160) / (b[3] - b[1]), 1);
  c.ds.scale = s; c.ds.offset = [-b[0] + 100 / s, -b[1] + 80 / s]; c.setDirty(true, true);
}"""
CENTRE = """(i) => {
  const n = window.app.graph.getNodeById(i), c = window.app.canvas;
  const [w, h] = [c.canvas.clientWidth, c.canvas.clientHeight];
  c.ds.scale = Math.min((w - 120) / n.size[0], (h - 260) / n.size[1], 1);
  c.ds.offset = [w / 2 / c.ds.scale - n.pos[0] - n.size[0] / 2, h / 2 / c.ds.scale - n.pos[1] - n.size[1] / 2];
  c.setDirty(true, true);
}"""
NODE_BOX = """([id, title]) => {
  const n = window.app.graph.getNodeById(id), c = window.app.canvas, r = c.canvas.getBoundingClientRect();
  const at = (x, y) => [(x + c.ds.offset[0]) * c.ds.scale + r.x, (y + c.ds.offset[1]) * c.ds.scale + r.y];
  const a = at(n.pos[0], n.pos[1] - title), b = at(n.pos[0] + n.size[0], n.pos[1] + n.size[1]);
  return { x: a[0], y: a[1], width: b[0] - a[0], height: b[1] - a[1], scale: c.ds.scale };
}"""
CLOSE_PANELS = """async () => {
  const m = window.app.extensionManager, s = m.sidebarTab ?? m, open = s.activeSidebarTabId;
  if (open) await m.command.execute(`Workspace.ToggleSidebarTab.${open}`);
  if (m.setting.get('Comfy.RightSidePanel.IsOpen')) await m.setting.set('Comfy.RightSidePanel.IsOpen', false);
}"""
PIXELS = """(i) => {
  const img = window.app.graph.getNodeById(i).imgs?.[0] ?? document.querySelector(`[data-node-id='${i}'] img`);
  const c = document.createElement('canvas');
  [c.width, c.height] = [img.naturalWidth, img.naturalHeight];
  const g = c.getContext('2d');
  g.drawImage(img, 0, 0);
  return [c.width, c.height, [...g.getImageData(0, 0, c.width, c.height).data]];
}"""
SET_WIDGET = """([id, name, value]) => {
  const n = window.app.graph.getNodeById(id), w = n.widgets.find((w) => w.name === name);
  const old = w.value;
  w.value = value;
  w.callback?.(value, window.app.canvas, n, n.pos);
  n.onWidgetChanged?.(name, value, old, w);
  window.app.graph.change?.(); window.app.canvas.setDirty(true, true);
  // What the pointer's release does after an edit: the change goes on the undo stack.
  window.app.extensionManager?.workflow?.activeWorkflow?.changeTracker?.captureCanvasState?.();
  window.app.extensionManager?.workflow?.activeWorkflow?.changeTracker?.checkState?.();
}"""


class Editor:
    """A tab.

    Attributes:
        page: Playwright's page.
        errors: what the page said at level "error", exceptions that nothing caught, and refused requests, since
            `forget_errors`.
        answers: every answer with a status of 400 and above, (status, method, address).
    """

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.url = page, url
        self.errors: list[str] = []
        self.answers: list[tuple[int, str, str]] = []
        page.set_default_timeout(LIMIT_MS)
        page.on("console", self._console)
        page.on("pageerror", self._exception)
        page.on("response", self._response)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not any(part in message.text for part in EXPECTED_ERRORS):
            self.errors.append(f"console: {message.text[:600]}")

    def _exception(self, err: Error) -> None:
        self.errors.append(f"exception: {err.stack or err.message}")

    def _response(self, answer: Response) -> None:
        if answer.status >= 400:
            self.answers.append((answer.status, answer.request.method, answer.url))
            absent = answer.status == 404 and any(part in answer.url for part in MAY_BE_ABSENT)
            if answer.url.startswith(self.url) and not absent:
                self.errors.append(f"answer: {answer.status} {answer.request.method} {answer.url}")

    def take_errors(self, *parts: str) -> list[str]:
        """The errors with one of `parts` in them, which the test expects; they no longer fail it."""
        taken = [e for e in self.errors if any(part in e for part in parts)]
        self.errors = [e for e in self.errors if e not in taken]
        return taken

    def js(self, code: str, argument: Any = None) -> Any:
        return self.page.evaluate(code, argument)

    def until(self, code: str, argument: Any = None, limit_ms: float = LIMIT_MS) -> None:
        """Wait until a JavaScript function returns something true."""
        self.page.wait_for_function(code, arg=argument, timeout=limit_ms)

    def open(self, wait: bool = True) -> None:
        self.page.goto(self.url, wait_until="domcontentloaded")
        if wait:
            self.until_ready()

    def until_ready(self) -> None:
        """The editor stands, the pack's nodes are registered, and the first workflow is loaded."""
        self.until(
            """() => window.app?.extensionManager?.workflow?.activeWorkflow &&
            window.LiteGraph?.registered_node_types?.QuantizeModel && window.app.graph &&
            !document.querySelector('#vue-app .p-progressspinner, .p-blockui-mask')"""
        )
        self.close_dialogs()

    def close_dialogs(self) -> None:
        """Escape what the front end opens by itself at a first start (its templates)."""
        for _ in range(3):
            if not self.page.locator("[role=dialog]:visible").count():
                return
            self.page.keyboard.press("Escape")
            self.page.wait_for_timeout(150)

    def tidy(self) -> None:
        """Back to how a test begins: the tab open, no dialog, no panel, the normal window."""
        if self.page.is_closed() or not self.js("() => !!window.app?.graph"):
            self.open()
        self.close_dialogs()
        self.js(CLOSE_PANELS)

    def sidebar(self, name: str) -> Locator:
        """Click the button of a panel at the left, which opens or closes it; the panel."""
        self.page.locator(f"[data-testid='{name}-tab-button'], .{name}-tab-button").first.click()
        return self.page.locator(".side-bar-panel").first

    def load(self, workflow: str | dict[str, Any]) -> None:
        """Load a graph in the editor's form, or the shipped workflow of that name, and fit it into the window."""
        if isinstance(workflow, str):
            workflow = json.loads((WORKFLOWS / f"{workflow}.json").read_text(encoding="utf-8"))
        self.js("async (g) => { await window.app.loadGraphData(g); }", workflow)
        self.until("(n) => window.app.graph._nodes.length === n", len(workflow["nodes"]))
        self.fit()

    def blank(self) -> None:
        """A new, empty workflow."""
        self.run_command("Comfy.NewBlankWorkflow")
        self.until("() => window.app.graph._nodes.length === 0")

    def fit(self) -> None:
        self.js(FIT)
        self.frames()

    def centre(self, node: Any) -> None:
        """Bring a node into the middle of the window, as large as there is room."""
        self.js(CENTRE, node)
        self.frames()

    def frames(self, n: int = 3) -> None:
        """Wait for the canvas to be drawn anew."""
        self.js("(n) => new Promise((d) => { const f = () => (n-- ? requestAnimationFrame(f) : d()); f(); })", n)

    def nodes(self) -> list[dict[str, Any]]:
        return self.js("() => window.app.graph._nodes.map((n) => ({ id: n.id, type: n.type, title: n.title }))")

    def node(self, kind: str) -> Any:
        """The id of the only (or first) node of this class."""
        found = [n["id"] for n in self.nodes() if n["type"] == kind]
        assert found, f"no {kind} among {[n['type'] for n in self.nodes()]}"
        return found[0]

    def missing(self) -> list[str]:
        """Classes in the graph that the editor does not know."""
        return self.js(
            """() => window.app.graph._nodes.filter((n) => !n.subgraph &&
            !window.LiteGraph.registered_node_types[n.type]).map((n) => n.type)"""
        )

    def widget(self, node: Any, name: str) -> Any:
        return self.js(
            "([i, n]) => window.app.graph.getNodeById(i).widgets.find((w) => w.name === n)?.value", [node, name]
        )

    def widgets(self, node: Any) -> list[str]:
        """Names of the widgets that are shown, in order."""
        return self.js(
            """(i) => window.app.graph.getNodeById(i).widgets
            .filter((w) => !w.hidden && !w.options?.hidden && w.type !== 'hidden' && w.type !== 'converted-widget')
            .map((w) => w.name)""",
            node,
        )

    def set_widget(self, node: Any, name: str, value: Any) -> None:
        """Change a widget as its own control does: value, callback, the node's hook."""
        self.js(SET_WIDGET, [node, name, value])

    def api(self) -> dict[str, Any]:
        """The graph in the form that the editor would queue."""
        return self.js("async () => (await window.app.graphToPrompt()).output")

    def box(self, node: Any) -> dict[str, float]:
        """Where a node is on the page, title included."""
        return self.js(NODE_BOX, [node, 30])

    def queue(self) -> str:
        """Queue the graph as the Run button does; the prompt's id."""
        with self.page.expect_response(lambda r: r.url.endswith("/prompt") and r.request.method == "POST") as answer:
            self.js("() => { window.app.queuePrompt(0, 1); }")
        assert answer.value.status == 200, answer.value.text()
        return answer.value.json()["prompt_id"]

    def queue_and_wait(self, limit_ms: float = 120_000) -> str:
        """Queue, and wait until the page itself heard that the run succeeded."""
        self.js(
            """() => {
              window.__ended = {};
              if (window.__listening) return;
              window.__listening = true;
              for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
                window.app.api.addEventListener(
                  kind, (e) => { window.__ended[e.detail.prompt_id] = [kind, e.detail]; });
            }"""
        )
        prompt_id = self.queue()
        self.until("(id) => window.__ended[id]", prompt_id, limit_ms)
        kind, detail = self.js("(id) => window.__ended[id]", prompt_id)
        assert kind == "execution_success", detail
        return prompt_id

    def picture(self, node: Any) -> Picture:
        """The first picture that a node shows, as the page decoded it."""
        self.until(
            "(i) => window.app.graph.getNodeById(i).imgs?.[0]?.naturalWidth || document.querySelector("
            "`[data-node-id='${i}'] img`)?.naturalWidth",
            node,
        )
        width, height, data = self.js(PIXELS, node)
        return frombytes("RGBA", (width, height), bytes(data)).convert("RGB")

    def run_command(self, name: str) -> None:
        """A command of the editor's registry, as its menu entry or key runs it."""
        self.js("async (n) => { await window.app.extensionManager.command.execute(n); }", name)

    def setting(self, name: str, value: Any = None) -> Any:
        """Read a setting, or write it where a value is given."""
        if value is None:
            return self.js("(n) => window.app.extensionManager.setting.get(n)", name)
        return self.js("async ([n, v]) => { await window.app.extensionManager.setting.set(n, v); }", [name, value])

    def click_node(self, node: Any, button: str = "left") -> None:
        """Click the title of a node: it becomes the selected one."""
        box = self.box(node)
        x, y = box["x"] + box["width"] * 0.4, box["y"] + 12 * box["scale"]
        self.page.mouse.click(x, y, button=button)  # type: ignore[arg-type]
        if button == "left":
            self.until("(i) => Object.keys(window.app.canvas.selected_nodes).includes(String(i))", node)

    def shot(self, name: str) -> Path:
        """A picture of the window, in out/browser."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        path = SHOTS / f"{name}.png"
        self.frames()
        self.page.screenshot(path=str(path))
        return path
