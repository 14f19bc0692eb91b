"""One run as ComfyUI's server tells it: to the client that queued it, to a reloaded tab anew, and to the history."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ....quantizers.errors import QuantwireError
from .. import executor
from ..executor import NodeFailed
from ..progress import Interrupted, Listener, Progress
from ..workflow import NodePlace, PromptNode, as_link
from .events import Events, Outbox, jsonable, preview_message, text_message, text_progress
from .previews import LatentColors, jpeg
from .queue import Job

_log = logging.getLogger(__name__)

PROGRESS_S = 0.05
FEW_STEPS = 200
"""Bars that are shorter are told in full: to miss the last of 20 steps before a long one would show."""
PREVIEW_S = 0.1
MEMORY_TIPS = (
    "This error means that the memory did not suffice. Results of earlier runs were dropped; try a smaller format or "
    "image, a lower batch_size, or OffloadCompat with a mode that keeps less of the model in memory."
)


class RunEvents(Listener):
    """Everything that is known of one run, while it goes on and after."""

    def __init__(self, job: Job, events: Events, colors: LatentColors) -> None:
        self.job = job
        self.outputs: dict[str, Any] = {}
        self.messages: list[list[Any]] = []
        self.status = "error"
        self._events = events
        self._colors = colors
        self._previews = job.extra_data.get("preview_method") != "none"
        self._lock = threading.RLock()
        self._nodes: dict[str, dict[str, Any]] = {}
        self._executed: list[str] = []
        self._current: str | None = None
        self._text: tuple[str, str] | None = None
        self._preview: tuple[bytes, dict[str, Any]] | None = None
        self._told_progress = self._told_preview = float("-inf")
        self._resumed = False

    # --- the run as a whole, called by the worker ---

    def begin(self) -> None:
        self._message("execution_start", {})

    def succeed(self) -> None:
        self.status = "success"
        with self._lock:
            if self._resumed:  # a page that came back may not have had its nodes yet when it was told of their outputs
                self._show_all(lambda event, data: self._send(event, data))
        self._message("execution_success", {})

    def interrupt(self, error: BaseException | None, why: str = "") -> None:
        place = self._place(error)
        data = {"node_id": place.node_id, "node_type": place.class_type, "executed": list(self._executed)}
        if why:
            data["exception_message"] = why
        self._message("execution_interrupted", data, to_all=True)

    def fail(self, error: BaseException, out_of_memory: bool) -> None:
        place = self._place(error)
        original = error.original if isinstance(error, NodeFailed) else error
        text = _text(original)
        kind = type(original)
        self._message(
            "execution_error",
            {
                "node_id": place.node_id,
                "node_type": place.class_type,
                "executed": list(self._executed),
                "exception_message": f"{text}\n{MEMORY_TIPS}" if out_of_memory else text,
                "exception_type": kind.__qualname__
                if kind.__module__ == "builtins"
                else f"{kind.__module__}.{kind.__qualname__}",
                "traceback": _frames(_where_it_came_from(original)),
                "current_inputs": self._inputs(place.node_id),
                "current_outputs": list(self.outputs),
            },
        )

    def entry(self) -> dict[str, Any]:
        """For the history."""
        ids = ("node_id", "display_node", "real_node_id")
        return {
            "prompt": self.job.to_json(),
            "outputs": self.outputs,
            "status": {"status_str": self.status, "completed": self.status == "success", "messages": self.messages},
            "meta": {node: {**dict.fromkeys(ids, node), "parent_node": None} for node in self.outputs},
        }

    def finish(self) -> None:
        """After the history has it: the editor then reads the result."""
        self._send("executing", {"node": None, "prompt_id": self.job.prompt_id})

    # --- what the executor tells ---

    def run_start(self, cached: Sequence[str]) -> None:
        with self._lock:
            for node_id in cached:
                self._set(node_id, "finished")
            self._message("execution_cached", {"nodes": list(cached)})
            if cached:
                self._tell_progress(None)

    def node_cached(self, node: PromptNode, ui: Mapping[str, Any] | None) -> None:
        with self._lock:
            self._set(node.id, "finished")
            self._show(node, ui)

    def node_start(self, node: PromptNode) -> None:
        with self._lock:
            self._current, self._text, self._preview = node.id, None, None
            self._set(node.id, "running")
            self._tell_progress(None)
            self._send("executing", self._node(node.id))

    def progress(self, node: PromptNode, bar: Progress) -> None:
        # Bars within bars are parts of one step of the outer one.
        if bar.depth or not bar.total or bar.closed:
            return
        now = time.monotonic()
        with self._lock:
            self._set(node.id, "running", min(bar.done, bar.total), bar.total)
            often = now - self._told_progress < PROGRESS_S and bar.total > FEW_STEPS and bar.done < bar.total
            if not often:
                self._told_progress = now
                self._tell_progress(node.id)

    def text(self, node: PromptNode, text: str) -> None:
        with self._lock:
            self._text = node.id, text
            if self.job.client_id:
                self._events.send_text(text, node.id, self.job.client_id)

    def preview(self, node: PromptNode, latent: Any) -> None:
        now = time.monotonic()
        sid = self.job.client_id
        if not (self._previews and sid and self._events.connected(sid)) or now - self._told_preview < PREVIEW_S:
            return
        self._told_preview = now
        try:
            picture = self._colors.picture(latent)
            data = jpeg(picture) if picture is not None else None
        except (RuntimeError, ValueError, OSError) as err:  # a picture on the way is not worth the run
            self._previews = False
            _log.warning("No more previews in this run: %s", err)
            return
        if data is not None:
            with self._lock:
                self._preview = data, self._ids(node.id)
                self._events.send_preview(data, self._preview[1], sid)

    def decoded(self, node: PromptNode, latent: Any, images: Any) -> None:
        try:
            self._colors.learn(latent, images)
        except RuntimeError as err:  # previews stay as they are
            _log.warning("The colours of previews cannot be fitted: %s", err)

    def node_done(self, node: PromptNode, seconds: float, ui: Mapping[str, Any] | None) -> None:
        with self._lock:
            self._executed.append(node.id)
            self._show(node, ui)
            self._set(node.id, "finished")
            self._tell_progress(None)

    def node_error(self, node: PromptNode, error: BaseException) -> None:
        with self._lock:
            self._current = node.id
            self._set(node.id, "error")
            self._tell_progress(None)

    # --- a client that comes back ---

    def resume(self, outbox: Outbox) -> None:
        """Everything that a page must know which missed the run so far."""
        with self._lock:
            for event, data in self.messages:
                outbox.put(text_message(event, data))
            self._resumed = True
            self._show_all(lambda event, data: outbox.put(text_message(event, data)))
            if self._current is not None:
                outbox.put(text_message("executing", self._node(self._current)))
            outbox.put(text_message("progress_state", self._progress_state()))
            state = self._nodes.get(self._current or "")
            if state is not None and state["state"] == "running":
                outbox.put(text_message("progress", self._progress(self._current or "")))
            if self._text is not None:
                outbox.put(text_progress(self._text[1], self._text[0]))

    def resume_preview(self, outbox: Outbox) -> None:
        """Later than the rest: only a client that told its flags gets it in a form that names the node."""
        with self._lock:
            if self._preview is not None:
                outbox.put(preview_message(*self._preview, outbox.flags), ("preview", self._preview[1]["node_id"]))

    # --- telling ---

    def _send(self, event: str, data: Mapping[str, Any], replaces: Any = None) -> None:
        if self.job.client_id:
            self._events.send(event, data, self.job.client_id, replaces)

    def _message(self, event: str, data: Mapping[str, Any], to_all: bool = False) -> None:
        with self._lock:
            data = {"prompt_id": self.job.prompt_id, **data, "timestamp": int(time.time() * 1000)}
            self.messages.append([event, jsonable(data)])
            if to_all:
                self._events.send(event, data)
            else:
                self._send(event, data)

    def _show(self, node: PromptNode, ui: Mapping[str, Any] | None) -> None:
        if ui is not None:
            self.outputs[node.id] = jsonable(ui)
            self._send("executed", {**self._node(node.id), "output": self.outputs[node.id]})

    def _show_all(self, tell: Callable[[str, Mapping[str, Any]], None]) -> None:
        for node_id, ui in self.outputs.items():
            tell("executed", {**self._node(node_id), "output": ui})

    def _tell_progress(self, node_id: str | None) -> None:
        if not self.job.client_id:
            return
        self._send("progress_state", self._progress_state(), ("progress_state",))
        if node_id is not None:
            self._send("progress", self._progress(node_id), ("progress",))

    def _set(self, node_id: str, state: str, value: float | None = None, maximum: float | None = None) -> None:
        old = self._nodes.get(node_id, {"value": 0, "max": 1})
        maximum = maximum if maximum is not None else old["max"]
        value = value if value is not None else maximum if state == "finished" else old["value"]
        self._nodes[node_id] = {"value": value, "max": maximum, "state": state}

    def _ids(self, node_id: str) -> dict[str, Any]:
        same = dict.fromkeys(("node_id", "display_node_id", "real_node_id"), node_id)
        return {**same, "prompt_id": self.job.prompt_id, "parent_node_id": None}

    def _node(self, node_id: str) -> dict[str, Any]:
        return {"node": node_id, "display_node": node_id, "prompt_id": self.job.prompt_id}

    def _progress(self, node_id: str) -> dict[str, Any]:
        state = self._nodes[node_id]
        return {"value": state["value"], "max": state["max"], "prompt_id": self.job.prompt_id, "node": node_id}

    def _progress_state(self) -> dict[str, Any]:
        nodes = {node_id: {**state, **self._ids(node_id)} for node_id, state in self._nodes.items()}
        return {"prompt_id": self.job.prompt_id, "nodes": nodes}

    def _place(self, error: BaseException | None) -> NodePlace:
        """Where it happened; between two nodes, the one that ran last or the first output."""
        place = getattr(error, "node_place", None)
        if isinstance(place, NodePlace):
            return place
        node_id = self._current or next(iter(self.job.outputs), "")
        return NodePlace(node_id, "", str(self.job.prompt.get(node_id, {}).get("class_type", "")))

    def _inputs(self, node_id: str) -> dict[str, list[Any]]:
        """As the workflow has them: texts of tensors would say less, and cost their memory."""
        inputs = self.job.prompt.get(node_id, {}).get("inputs", {})
        links = {name: as_link(value) for name, value in inputs.items()}
        shown = {n: f"output {link.output} of node {link.node_id}" if link else inputs[n] for n, link in links.items()}
        return {name: [value if isinstance(value, (int, float, bool)) else str(value)] for name, value in shown.items()}


def stopped_entry(job: Job) -> dict[str, Any]:
    """The history of a prompt that was running when the server was killed."""
    run = RunEvents(job, Events({}, _nobody, _nobody), LatentColors())
    run.begin()
    run.interrupt(None, STOPPED)
    return run.entry()


def _nobody(outbox: Outbox) -> None: ...


STOPPED = "The server was stopped in mid-run. Queue the workflow again to run it."


def is_interruption(error: BaseException) -> bool:
    return isinstance(error, (Interrupted, KeyboardInterrupt))


def _text(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, QuantwireError) and text:
        return text
    # str(KeyError("x")) is only "'x'", and some errors have no text at all.
    return text if text and not isinstance(error, KeyError) else f"{type(error).__name__}: {text}".removesuffix(": ")


def _frames(error: BaseException) -> list[str]:
    """From the node's own function on: what called it is the same in every report."""
    own = (Path(executor.__file__), Path(__file__).with_name("runs.py"))
    first = error.__traceback__
    while first is not None and Path(first.tb_frame.f_code.co_filename) in own:
        first = first.tb_next
    return traceback.format_tb(first or error.__traceback__)


def _where_it_came_from(error: BaseException) -> BaseException:
    """The error itself, or the raw one that the executor explained by it."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    explained = last is None or Path(last.tb_frame.f_code.co_filename) == Path(executor.__file__)
    return error.__cause__ if explained and error.__cause__ is not None else error
