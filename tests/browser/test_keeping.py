"""What is kept: workflows that the user saves, and the workflow inside a picture that a run wrote; undo."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from editor_page import Editor
from editor_server import EditorServer
from PIL import Image

DATA_TRANSFER = """([name, kind, data]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const moved = new DataTransfer();
  moved.items.add(new File([bytes], name, { type: kind }));
  return moved;
}"""


def drop(editor: Editor, path: Path, kind: str) -> None:
    """Drag a file onto the canvas."""
    data = base64.b64encode(path.read_bytes()).decode()
    moved = editor.page.evaluate_handle(DATA_TRANSFER, [path.name, kind, data])
    for event in ("dragenter", "dragover", "drop"):
        editor.page.dispatch_event("#graph-canvas", event, {"dataTransfer": moved, "clientX": 700, "clientY": 500})


def test_a_saved_workflow_is_there_after_a_reload(editor: Editor, editor_server: EditorServer) -> None:
    editor.load("quantized")
    editor.set_widget(editor.node("KSampler"), "seed", 4711)
    editor.page.keyboard.press("Control+s")
    dialog = editor.page.locator("[role=dialog]")
    dialog.locator("input").fill("kept by a test")
    dialog.get_by_role("button", name="Confirm").click()
    dialog.wait_for(state="hidden")
    editor.until("() => window.app.extensionManager.workflow.activeWorkflow.filename === 'kept by a test'")
    editor.until(
        """async () => {
          const answer = await fetch('/api/userdata?dir=workflows&recurse=true&split=false&full_info=true');
          return answer.ok && (await answer.json()).some((file) => file.path === 'kept by a test.json');
        }"""
    )
    assert (editor_server.base / "user" / "default" / "workflows" / "kept by a test.json").exists()
    editor.open()
    editor.blank()
    entry = editor.sidebar("workflows").get_by_text("kept by a test").last
    entry.wait_for()
    editor.shot("saved_workflow")
    entry.click()
    editor.until("() => window.app.graph._nodes.some((n) => n.type === 'KSampler')")
    assert editor.widget(editor.node("KSampler"), "seed") == 4711


def test_a_picture_on_the_canvas_opens_its_workflow(editor: Editor, editor_server: EditorServer) -> None:
    editor.load("full_precision")
    editor.set_widget(editor.node("SaveImage"), "filename_prefix", "dragged")
    before = editor.api()
    editor.queue_and_wait()
    path = max((editor_server.base / "output").glob("dragged*.png"))
    assert json.loads(Image.open(path).info["workflow"])["nodes"]
    editor.blank()
    drop(editor, path, "image/png")
    editor.until("() => window.app.graph._nodes.some((n) => n.type === 'SaveImage')")
    assert editor.api() == before
    editor.shot("dragged_picture")


def test_undo_takes_a_change_back(editor: Editor) -> None:
    editor.load("quantized")
    node = editor.node("QuantizeModel")
    editor.set_widget(node, "format", "quanto-qint8")
    editor.until("(i) => window.app.graph.getNodeById(i).widgets[0].value === 'quanto-qint8'", node)
    editor.run_command("Comfy.Undo")
    editor.until("(i) => window.app.graph.getNodeById(i).widgets[0].value === 'bnb-nf4'", node)
    editor.run_command("Comfy.Redo")
    editor.until("(i) => window.app.graph.getNodeById(i).widgets[0].value === 'quanto-qint8'", node)


def test_an_uploaded_picture_shows_in_load_image(editor: Editor, editor_server: EditorServer, tmp_path: Path) -> None:
    if not editor.js("() => !!window.LiteGraph.registered_node_types.LoadImage"):
        pytest.skip("the embedded host has no LoadImage: pictures are inputs in ComfyUI only")
    picture = tmp_path / "uploaded.png"
    Image.new("RGB", (48, 32), (200, 30, 60)).save(picture)
    editor.blank()
    editor.js(
        """() => { const n = window.LiteGraph.createNode('LoadImage'); n.pos = [300, 200];
        window.app.graph.add(n); window.app.canvas.ds.reset(); window.app.canvas.setDirty(true, true); }"""
    )
    editor.frames()
    editor.take_errors("filename=undefined")  # front end 1.49.6 asks for the first picture of an empty folder
    node = editor.node("LoadImage")
    with editor.page.expect_file_chooser() as chooser:
        editor.js("(i) => window.app.graph.getNodeById(i).widgets.find((w) => w.type === 'button').callback()", node)
    chooser.value.set_files(str(picture))
    editor.until("(i) => window.app.graph.getNodeById(i).widgets[0].value === 'uploaded.png'", node)
    shown = editor.picture(node)
    assert shown.size == (48, 32)
    assert shown.getpixel((20, 20)) == (200, 30, 60)
    assert (editor_server.base / "input" / "uploaded.png").read_bytes() == picture.read_bytes()
    editor.take_errors("filename=undefined")
    editor.shot("uploaded")
