"""More than one tab: both see one queue, and closing a page stops nothing."""

from __future__ import annotations

from collections.abc import Callable

from editor_page import Editor
from editor_server import EditorServer

STEPS = 60


def test_a_second_tab_sees_the_run_and_closing_the_first_stops_nothing(
    editor: Editor, editor_server: EditorServer, new_tab: Callable[[], Editor]
) -> None:
    second = new_tab()
    second.load("full_precision")
    second.set_widget(second.node("KSampler"), "steps", STEPS)
    second.set_widget(second.node("KSampler"), "seed", 99)
    second.set_widget(second.node("SaveImage"), "filename_prefix", "closed_tab")
    prompt_id = second.queue()
    second.until("() => window.app.graph._nodes.some((n) => n.type === 'KSampler' && n.progress > 0)")
    # The other tab counts it.
    editor.until("() => document.querySelector('[data-testid=queue-overlay-toggle]').innerText.startsWith('1')")
    second.page.close()
    entry = editor_server.history(prompt_id)
    assert entry["status"]["status_str"] == "success"
    assert list((editor_server.base / "output").glob("closed_tab*.png"))
    # And the tab that stays learns that the queue is empty, and can run.
    editor.until("() => document.querySelector('[data-testid=queue-overlay-toggle]').innerText.startsWith('0')")
    editor.load("full_precision")
    editor.queue_and_wait()
