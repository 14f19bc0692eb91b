"""The worker of the embedded server: one thread that runs the queue, one prompt after another.

A run belongs to the server and not to the tab that queued it: closing the browser stops nothing. One executor lives as
long as the server, so a second run of a workflow finds its models loaded.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from ....quantizers.errors import FileError
from ... import use
from .answers import json_object
from .events import Events, Outbox, text_json, text_message
from .history import History
from .jobs import job_id_fault
from .previews import LatentColors
from .queue import MAX_NUMBER, Job, KnownId, PromptQueue, QueueFull, number_of
from .runs_check import fault, judge
from .system import features

if TYPE_CHECKING:
    from ..executor import Executor
    from .app import Server
    from .runs_listener import RunEvents

_log = logging.getLogger(__name__)

ACCOUNT_KEYS = ("auth_token_comfy_org", "api_key_comfy_org")
"""What the editor sends for ComfyUI's paid services: no node here asks for it, and it must not end in a file."""
STOP_S = 10.0
KNOWN = fault("invalid_prompt_id", "prompt_id was used before", "Omit it, and the server makes one.")


class RunState:
    """Queue, history, connections and the worker.

    Raises:
        FileError: the user folder cannot be written to, or another server uses it.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        # Two underscores: like ComfyUI's, the routes of user data never reach it.
        folder = server.config.user / "__runs"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock_file = _lock(folder / "lock")
            self.queue = PromptQueue(folder, self.tell_status)
            self.history = History(folder / "history")
        except OSError as err:
            raise FileError(
                f"The user folder {server.config.user} cannot be used: {err.strerror or err}.\n"
                "Name a folder that can be written to with --user."
            ) from err
        self.events = Events(features(server.config), self._resume, self._resume_preview)
        self.colors = LatentColors()
        self.current: RunEvents | None = None
        self._free = threading.Event()
        self._loading: asyncio.Future[None] | None = None
        self._preparing = False
        self._thread: threading.Thread | None = None
        # One thread: 200 prompts at once are checked one after another, and leave the other threads to other routes.
        self.checker = ThreadPoolExecutor(1, "quantwire-check")

    # --- life ---

    def start(self) -> None:
        """Read what earlier servers left, and begin to work through the queue.

        Not in the worker: the first page that is served must find its queue and history there.
        """
        try:
            self._restore()
        except Exception:  # a folder of a later version, say, must not keep the editor from opening
            _log.exception("What earlier servers left in the queue and history cannot be read")
        self._thread = threading.Thread(target=self._work, name="quantwire-run", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = STOP_S) -> bool:
        """Interrupt the run in progress and end the worker; what waits stays for the next server.

        Returns:
            whether it ended in time. A node that never looks whether it was interrupted holds the thread, which ends
            with the process; the next server then says in the history that the run was stopped. Libraries that are
            being loaded are not waited for: no prompt was taken yet.
        """
        self.queue.stop()
        self.checker.shutdown(wait=False, cancel_futures=True)
        ended, end = True, time.monotonic() + timeout_s
        if (thread := self._thread) is not None:
            while thread.is_alive() and not self._preparing and time.monotonic() < end:
                thread.join(0.02)
            ended = not thread.is_alive()
        if ended:
            self._lock_file.close()
        return ended

    def _restore(self) -> None:
        self.history.restore()
        for job in self.queue.restore():
            if job.prompt_id not in self.history:
                from .runs_listener import stopped_entry

                self.history.add(job.prompt_id, stopped_entry(job))
            self.queue.forget_dead(job)

    # --- the worker ---

    def _work(self) -> None:
        executor: Executor | None = None
        while not self.queue.stopped:
            if executor is None and self.queue.wait():
                self._prepare()
            job = self.queue.get()
            if self._free.is_set():
                self._free.clear()
                if executor is not None:
                    _free(executor)
            if job is not None:
                executor = self._one(job, executor)

    def _prepare(self) -> None:
        """Load what a run needs while its prompt still waits: a server that is stopped meanwhile has not lost it."""
        from .runs_libraries import load

        self._preparing = True
        try:
            importlib.import_module("..executor", __package__)
            with use(self._server.host):
                _ = self._server.node_classes
            load()
        except Exception:  # the run fails with the same reason, in words
            _log.exception("what a run needs cannot be loaded")
        finally:
            self._preparing = False

    def _one(self, job: Job, executor: Executor | None) -> Executor | None:
        """Run a prompt and note how it ended; whatever happens, this thread goes on."""
        from .runs_listener import RunEvents

        run = self.current = RunEvents(job, self.events, self.colors)
        start = time.perf_counter()
        try:
            run.begin()
            try:
                from ..executor import Executor
                from .runs_libraries import load

                load()
                executor = executor or Executor(self._server.node_classes)
                with use(self._server.host):
                    self._run(run, executor)
            except BaseException as err:  # the host cannot be loaded, say: the editor shows why
                _log.exception("a run failed outside of its nodes")
                run.fail(err, out_of_memory=False)
            _log.info("Prompt %s: %s after %.2f s", job.prompt_id, run.status, time.perf_counter() - start)
            self.history.add(job.prompt_id, run.entry())
        except Exception:  # a full disk, say: the worker must live, and the next prompt has its turn
            _log.exception("the end of a run cannot be noted")
        finally:
            self.current = None
            self.queue.done(job)
            run.finish()
        return executor

    def _run(self, run: RunEvents, executor: Executor) -> None:
        from ..workflow import parse_workflow
        from .runs_listener import STOPPED, is_interruption

        job = run.job
        info = job.extra_data.get("extra_pnginfo")
        out_of_memory = False
        try:
            executor.run(
                parse_workflow(job.prompt),
                info if isinstance(info, dict) else None,
                targets=job.outputs,
                cancel=job.cancel,
                listener=run,
            )
            run.succeed()
        except BaseException as err:
            out_of_memory = _is_out_of_memory(err)
            if is_interruption(err):
                run.interrupt(err, STOPPED if self.queue.stopped else "")
            else:
                _log.error("%s", err, exc_info=_log.isEnabledFor(logging.DEBUG))
                run.fail(err, out_of_memory)
        if out_of_memory:
            _free(executor)  # after the exception is gone: its frames hold the tensors

    async def libraries(self) -> None:
        """Wait until a question that needs the large libraries may be answered beside a run."""
        if self._loading is None:
            from .runs_libraries import load

            self._loading = asyncio.ensure_future(asyncio.to_thread(load))
        await asyncio.shield(self._loading)

    def free(self) -> None:
        """Drop cached results, and so the models, before the next run begins."""
        self._free.set()
        self.queue.wake()

    # --- what clients hear ---

    def status(self) -> dict[str, Any]:
        return {"exec_info": {"queue_remaining": self.queue.remaining()}}

    def tell_status(self) -> None:
        self.events.send("status", {"status": self.status()}, replaces=("status",))

    def _resume(self, outbox: Outbox) -> None:
        outbox.put(text_message("status", {"status": self.status(), "sid": outbox.sid}))
        if (run := self._run_of(outbox)) is not None:
            run.resume(outbox)

    def _resume_preview(self, outbox: Outbox) -> None:
        if (run := self._run_of(outbox)) is not None:
            run.resume_preview(outbox)

    def _run_of(self, outbox: Outbox) -> RunEvents | None:
        run = self.current
        return run if run is not None and run.job.client_id == outbox.sid else None


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    original = getattr(error, "original", error)
    return isinstance(original, (MemoryError, torch.OutOfMemoryError))


def _free(executor: Executor) -> None:
    import torch

    executor.forget()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _lock(path: Path) -> Any:
    """Hold the file for as long as this process lives.

    Raises:
        FileError: another process holds it.
    """
    file = path.open("a+b")
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        file.close()
        raise FileError(
            f"{path.parent.parent} is in use by another server, whose queue and history lie there.\n"
            "Stop that one, or name another folder with --user."
        ) from err
    return file


# --- routes ------------------------------------------------------------------------------------------------------


def routes(server: Server) -> list[web.RouteDef]:
    async def get_prompt(_: web.Request) -> web.Response:
        return web.json_response(server.run.status())

    async def post_prompt(request: web.Request) -> web.Response:
        status, answer = await _queued(server, await json_object(request))
        return web.Response(body=text_json(answer), status=status, content_type="application/json")

    async def post_free(request: web.Request) -> web.Response:
        data = await json_object(request)
        if data.get("unload_models") or data.get("free_memory"):
            server.run.free()
        return web.Response()

    return [
        web.get("/prompt", get_prompt),
        web.post("/prompt", post_prompt),
        web.post("/free", post_free),
        web.get("/ws", server.run.events.handle),
    ]


async def _queued(server: Server, data: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Check a prompt and put it into the queue: status and answer."""
    if wrong := _shape_fault(data, server.run):
        return 400, {"error": wrong, "node_errors": {}}
    state, targets = server.run, data.get("partial_execution_targets")
    prompt_id = data.get("prompt_id") or str(uuid.uuid4())
    number = number_of(data["number"]) if "number" in data else state.queue.next_number(bool(data.get("front")))

    def work() -> tuple[int, dict[str, Any]]:
        with use(server.host):
            verdict = judge(data["prompt"], server.node_classes, None if targets is None else set(targets))
        if verdict.error is not None:
            return 400, verdict.refusal()
        # Again, since another request may have brought the same id meanwhile; here they come one by one.
        if prompt_id in state.history:
            raise KnownId(prompt_id)
        state.queue.put(Job(number, prompt_id, data["prompt"], _extra_data(data), verdict.outputs))
        return 200, {"prompt_id": prompt_id, "number": number, "node_errors": verdict.node_errors}

    try:
        return await asyncio.get_running_loop().run_in_executor(state.checker, work)
    except KnownId:
        return 400, {"error": KNOWN, "node_errors": {}}
    except QueueFull as err:
        return 429, {"error": fault("queue_full", str(err)), "node_errors": {}}


def _shape_fault(data: Mapping[str, Any], state: RunState) -> dict[str, Any] | None:
    """What is wrong with the request around the prompt."""
    if "prompt" not in data:
        return fault("no_prompt", "No prompt provided")
    prompt_id, number = data.get("prompt_id"), data.get("number", 0)
    if prompt_id is not None and (why := job_id_fault(prompt_id)):
        return fault("invalid_prompt_id", "prompt_id must be a valid UUID", why)
    if prompt_id is not None and (state.queue.has(prompt_id) or prompt_id in state.history):
        return KNOWN
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) <= MAX_NUMBER:
        return fault("invalid_request", "number must be a number of at most 2**53", str(number)[:80])
    targets = data.get("partial_execution_targets")
    if targets is not None and not (isinstance(targets, list) and all(isinstance(t, (str, int)) for t in targets)):
        return fault("invalid_request", "partial_execution_targets must be a list of node ids")
    for name, kind in (("extra_data", dict), ("client_id", str)):
        if data.get(name) is not None and not isinstance(data[name], kind):
            return fault("invalid_request", f"{name} must be {'an object' if kind is dict else 'text'}")
    return None


def _extra_data(data: Mapping[str, Any]) -> dict[str, Any]:
    extra = {name: value for name, value in (data.get("extra_data") or {}).items() if name not in ACCOUNT_KEYS}
    if data.get("client_id"):
        extra["client_id"] = data["client_id"]
    return {**extra, "create_time": int(time.time() * 1000)}
