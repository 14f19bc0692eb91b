"""A run as the user sees it: the picture in the node, progress, queue and history, errors on nodes, interrupting."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from editor_page import Editor
from editor_server import EditorServer
from PIL import Image

# Of a run that is still going when the test is through with it: seconds on a fast machine too.
MANY_STEPS = 2000


@pytest.fixture
def long_run(editor: Editor, editor_server: EditorServer) -> Any:
    """Queues a run that takes long, waits until its sampler works, and interrupts what still runs at the end."""

    def start() -> str:
        editor.load("full_precision")
        editor.set_widget(editor.node("KSampler"), "steps", MANY_STEPS)
        prompt_id = editor.queue()
        editor.until("() => window.app.graph._nodes.some((n) => n.type === 'KSampler' && n.progress > 0)")
        return prompt_id

    yield start
    editor_server.request("/queue", {"clear": True})
    editor_server.request("/interrupt", {})
    editor_server.wait_until_idle()


def saved(editor_server: EditorServer, prompt_id: str) -> Image.Image:
    """The picture that the prompt's SaveImage wrote, from its folder."""
    outputs = editor_server.history(prompt_id)["outputs"]
    (entry,) = [image for out in outputs.values() for image in out.get("images", []) if image["type"] == "output"]
    return Image.open(editor_server.base / "output" / entry["subfolder"] / entry["filename"]).convert("RGB")


def drawn(editor: Editor, node: Any) -> np.ndarray:
    """The lower half of a node as the window shows it, (h, w) grey: where SaveImage draws its picture."""
    editor.centre(node)
    clip = {k: v for k, v in editor.box(node).items() if k != "scale"}
    shown = Image.open(io.BytesIO(editor.page.screenshot(clip=clip))).convert("L")  # type: ignore[arg-type]
    return np.asarray(shown.crop((0, shown.height // 2, shown.width, shown.height)))


def test_the_demo_shows_its_picture_in_the_node(editor: Editor, editor_server: EditorServer) -> None:
    editor.load("quantized")
    node = editor.node("SaveImage")
    assert drawn(editor, node).max() < 150
    prompt_id = editor.queue_and_wait()
    shown = np.asarray(editor.picture(node), dtype=int)
    on_disk = np.asarray(saved(editor_server, prompt_id), dtype=int)
    assert shown.shape == on_disk.shape == (64, 64, 3)
    assert abs(shown - on_disk).max() <= 1
    # A bright stroke on a dark ground, not a plain square: a handwritten digit.
    assert 0.03 < (shown.mean(2) > 128).mean() < 0.5
    # And on the canvas itself, as drawn.
    on_canvas = drawn(editor, node)
    assert (on_canvas > 200).sum() > 100
    editor.fit()
    editor.shot("demo_run")


def test_the_report_is_on_its_node(editor: Editor) -> None:
    editor.load("quantized")
    editor.queue_and_wait()
    node = editor.node("PreviewAny")
    editor.until(
        "(i) => window.app.graph.getNodeById(i).widgets?.some((w) => /linear layers in bnb-nf4/.test(w.value))",
        node,
    )


def test_a_repeated_run_takes_what_is_unchanged_from_the_cache(editor: Editor, editor_server: EditorServer) -> None:
    editor.load("quantized")
    editor.set_widget(editor.node("SaveImage"), "filename_prefix", "again")
    prompt_id = editor.queue_and_wait()
    messages = dict(editor_server.history(prompt_id)["status"]["messages"])
    assert str(editor.node("KSampler")) in [str(n) for n in messages["execution_cached"]["nodes"]]
    assert saved(editor_server, prompt_id).size == (64, 64)


def test_the_queue_panel_and_the_assets_show_the_run(editor: Editor, editor_server: EditorServer) -> None:
    editor.load("quantized")
    editor.set_widget(editor.node("SaveImage"), "filename_prefix", "in_history")
    editor.queue_and_wait()
    name = max(p.name for p in (editor_server.base / "output").glob("in_history*.png"))
    editor.page.get_by_test_id("queue-overlay-toggle").click()
    entry = editor.page.get_by_test_id("job-assets-list").get_by_text(name).first
    entry.wait_for()
    editor.shot("queue_panel")
    editor.page.get_by_test_id("queue-overlay-toggle").click()
    panel = editor.sidebar("assets")
    picture = panel.locator(f"img[src*='{name.removesuffix('.png')}']").first
    editor.until("(i) => i.complete && i.naturalWidth === 64", picture.element_handle())
    editor.shot("assets_panel")


def test_progress_shows_while_it_runs(editor: Editor, long_run: Any) -> None:
    long_run()
    progress = "() => window.app.graph._nodes.find((n) => n.type === 'KSampler').progress"
    first = editor.js(progress)
    assert 0 < first < 1
    editor.until(f"(first) => (({progress})() ?? 1) > first", first)
    editor.until("() => /\\[\\d+%\\].*KSampler/.test(document.title)")
    editor.shot("progress")


def test_interrupting_ends_the_run(editor: Editor, editor_server: EditorServer, long_run: Any) -> None:
    prompt_id = long_run()
    editor.run_command("Comfy.Interrupt")
    entry = editor_server.history(prompt_id)
    kinds = [kind for kind, _ in entry["status"]["messages"]]
    assert "execution_interrupted" in kinds
    assert "execution_success" not in kinds
    editor.until("() => !/\\[\\d+%\\]/.test(document.title)")
    # The editor is ready for the next run, and that one ends well.
    editor.load("full_precision")
    editor.queue_and_wait()


def test_reloading_in_mid_run_finds_the_run_again(editor: Editor, editor_server: EditorServer, long_run: Any) -> None:
    prompt_id = long_run()
    editor.open()
    running = [entry[1] for entry in editor_server.request("/queue")["queue_running"]]
    assert running == [prompt_id]
    # The page that was reloaded hears of the run's progress again.
    editor.until("() => /\\[\\d+%\\]/.test(document.title)")
    editor.until("() => window.app.graph._nodes.some((n) => n.type === 'KSampler' && n.progress > 0)")
    editor.shot("reloaded_in_mid_run")


def test_a_bad_value_marks_its_node(editor: Editor) -> None:
    editor.load("quantized")
    sampler, loader = editor.node("KSampler"), editor.node("UNETLoader")
    editor.set_widget(sampler, "steps", 0)
    editor.set_widget(loader, "unet_name", "absent.safetensors")
    with editor.page.expect_response(lambda r: r.url.endswith("/prompt")) as answer:
        editor.page.get_by_test_id("queue-button").click()
    assert answer.value.status == 400
    editor.until("(n) => n.every((i) => window.app.graph.getNodeById(i).has_errors)", [sampler, loader])
    marked = editor.js("() => window.app.graph._nodes.filter((n) => n.has_errors).map((n) => n.id)")
    assert sorted(map(str, marked)) == sorted([str(sampler), str(loader)])
    kinds = editor.js("() => Object.values(window.app.lastNodeErrors).flatMap((n) => n.errors.map((e) => e.type))")
    assert "value_smaller_than_min" in kinds
    told = editor.js("() => Object.values(window.app.lastNodeErrors).flatMap((n) => n.errors.map((e) => e.details))")
    assert any("absent.safetensors" in text and "digits_flux.safetensors" in text for text in told), told
    editor.shot("bad_value")
    editor.take_errors("/prompt", "PromptExecutionError")
    editor.close_dialogs()


def test_a_missing_link_marks_its_node(editor: Editor) -> None:
    editor.load("full_precision")
    node = editor.node("VAEDecode")
    editor.js("(i) => window.app.graph.getNodeById(i).disconnectInput(0)", node)
    with editor.page.expect_response(lambda r: r.url.endswith("/prompt")) as answer:
        editor.js("() => { window.app.queuePrompt(0, 1); }")
    assert answer.value.status == 400
    editor.until("(i) => window.app.graph.getNodeById(i).has_errors", node)
    errors = editor.js("(i) => window.app.lastNodeErrors[i].errors", str(node))
    assert [(e["type"], e["details"].split(":")[0]) for e in errors] == [("required_input_missing", "samples")]
    editor.take_errors("/prompt", "PromptExecutionError")
    editor.close_dialogs()


def test_a_node_that_fails_says_why(editor: Editor, editor_server: EditorServer) -> None:
    editor.load("quantized")
    node = editor.node("QuantizeModel")
    editor.set_widget(node, "keep_layers", "(")
    prompt_id = editor.queue()
    entry = editor_server.history(prompt_id)
    (error,) = [data for kind, data in entry["status"]["messages"] if kind == "execution_error"]
    assert str(error["node_id"]) == str(node)
    line = error["exception_message"].strip().splitlines()[0]
    assert "'(' matches none of" in line
    editor.page.get_by_text("View details").click()
    editor.until("(t) => document.body.innerText.replaceAll(/\\s+/g, ' ').includes(t)", line[:60])
    editor.shot("node_error")
    editor.close_dialogs()
