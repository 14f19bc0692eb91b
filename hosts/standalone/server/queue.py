"""Prompts that wait and the one that runs; each is a small file too, so that a restart finds them again.

`queue/ID.json` waits, `running/ID.json` runs: a rename between the two is all that marks a start, and what lies in
`running` when a server starts was running when the last one died. It is reported and not run again by itself: it may
be what killed the server.
"""

from __future__ import annotations

import heapq
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from .answers import Refused, json_object
from .events import text_json

if TYPE_CHECKING:
    from .app import Server

_log = logging.getLogger(__name__)

MAX_PENDING = 1_000
MAX_PENDING_NBYTES = 256 << 20
"""Of JSON; a prompt with its editor workflow has some 100 KB."""


MAX_NUMBER = 2**53
"""JavaScript counts in whole steps up to here."""


class QueueFull(Exception):
    """The message says how full, and what to do."""


class KnownId(Exception):
    """A prompt of this id waits or runs."""


@dataclass(frozen=True, eq=False)
class Job:
    """One prompt that somebody queued.

    Attributes:
        number: place in the queue, the lowest first; negative ones were put in front.
        prompt: API form.
        extra_data: as the client sent it, less account data, with `client_id` and `create_time` (ms).
        outputs: ids of the output nodes to run.
        cancel: set to stop it.
    """

    number: float
    prompt_id: str
    prompt: dict[str, Any]
    extra_data: dict[str, Any]
    outputs: list[str]
    cancel: threading.Event = field(default_factory=threading.Event)

    @property
    def client_id(self) -> str:
        """Empty when nobody asked to be told."""
        return str(self.extra_data.get("client_id") or "")

    def to_json(self) -> list[Any]:
        """As /queue and /history show it."""
        return [self.number, self.prompt_id, self.prompt, self.extra_data, self.outputs]

    @cached_property
    def texts(self) -> tuple[bytes, ...]:
        """The same as JSON, made once: the editor asks for the whole queue after every run."""
        return tuple(map(text_json, self.to_json()))


def number_of(value: float) -> float:
    """Whole numbers as int: `5`, not `5.0`, in what clients read."""
    return int(value) if float(value).is_integer() else value


class PromptQueue:
    """Any thread.

    Args:
        folder: where `queue` and `running` lie.
        changed: called after every change, without a lock held.
    """

    def __init__(self, folder: Path, changed: Callable[[], None]) -> None:
        self._waiting_folder, self._running_folder = folder / "queue", folder / "running"
        for made in (self._waiting_folder, self._running_folder):
            made.mkdir(parents=True, exist_ok=True)
        self._changed = changed
        self._lock = threading.Condition()
        self._heap: list[tuple[float, int, Job]] = []
        self._sizes: dict[str, int] = {}
        self._running: Job | None = None
        self._count = 0
        self._stopped = self._woken = False
        self._next_number = 0

    # --- in and out ---

    def next_number(self, front: bool) -> float:
        with self._lock:
            number, self._next_number = self._next_number, self._next_number + 1
        return -number if front else number

    def put(self, job: Job) -> None:
        """Raises QueueFull, KnownId."""
        data = _record(job)
        with self._lock:
            if self._has(job.prompt_id):
                raise KnownId(job.prompt_id)
            if len(self._heap) >= MAX_PENDING or sum(self._sizes.values()) + len(data) > MAX_PENDING_NBYTES:
                raise QueueFull(f"{len(self._heap)} prompts wait already. Wait for some to finish, or clear the queue.")
            self._push(job, len(data))
            # Under the lock: else the worker may take it, and look for its file, before it is there.
            save(self._waiting_folder / f"{job.prompt_id}.json", data)
            self._lock.notify()
        self._changed()

    def _push(self, job: Job, nbytes: int) -> None:
        self._count += 1
        self._sizes[job.prompt_id] = nbytes
        heapq.heappush(self._heap, (job.number, self._count, job))

    def wait(self) -> bool:
        """Wait until `get` has something to answer; whether it is a prompt, as things are."""
        with self._lock:
            self._lock.wait_for(lambda: self._heap or self._stopped or self._woken)
            return bool(self._heap) and not self._stopped

    def get(self) -> Job | None:
        """Wait for the next prompt, which then counts as running; None when the queue was stopped or `wake` called."""
        with self._lock:
            self._lock.wait_for(lambda: self._heap or self._stopped or self._woken)
            self._woken = False
            if self._stopped or not self._heap:
                return None
            job = self._running = heapq.heappop(self._heap)[2]
            self._sizes.pop(job.prompt_id, None)
            name = f"{job.prompt_id}.json"
            try:
                os.replace(self._waiting_folder / name, self._running_folder / name)
            except OSError as err:
                _log.warning("A run that starts cannot be noted in %s: %s", self._running_folder, err)
        self._changed()
        return job

    def wake(self) -> None:
        with self._lock:
            self._woken = True
            self._lock.notify()

    def done(self, job: Job) -> None:
        with self._lock:
            self._running = None
            _remove(self._running_folder / f"{job.prompt_id}.json")
        self._changed()

    def stop(self) -> None:
        """`get` answers None from now on; what waits stays in its files."""
        with self._lock:
            self._stopped = True
            if self._running is not None:
                self._running.cancel.set()
            self._lock.notify_all()

    @property
    def stopped(self) -> bool:
        return self._stopped

    # --- what others ask ---

    def snapshot(self) -> tuple[list[Job], list[Job]]:
        """Running and waiting prompts, the next one first."""
        with self._lock:
            return ([self._running] if self._running else [], [entry[2] for entry in sorted(self._heap)])

    def remaining(self) -> int:
        with self._lock:
            return len(self._heap) + (self._running is not None)

    def has(self, prompt_id: str) -> bool:
        with self._lock:
            return self._has(prompt_id)

    def _has(self, prompt_id: str) -> bool:
        return prompt_id in self._sizes or (self._running is not None and self._running.prompt_id == prompt_id)

    def interrupt(self, prompt_id: str | None = None) -> bool:
        """Stop the run in progress if it is that prompt, or whatever it is; in one step, so it never hits the next."""
        with self._lock:
            if self._running is None or prompt_id not in (None, self._running.prompt_id):
                return False
            self._running.cancel.set()
            return True

    def delete(self, prompt_ids: Iterable[str] | None = None) -> list[str]:
        """Take waiting prompts out, all with None.

        Returns:
            ids of those that were there.
        """
        wanted = None if prompt_ids is None else set(prompt_ids)
        with self._lock:
            gone = [e[2].prompt_id for e in self._heap if wanted is None or e[2].prompt_id in wanted]
            self._heap = [e for e in self._heap if e[2].prompt_id not in set(gone)]
            heapq.heapify(self._heap)
            for prompt_id in gone:
                self._sizes.pop(prompt_id, None)
                _remove(self._waiting_folder / f"{prompt_id}.json")
        if gone:
            self._changed()
        return gone

    # --- over a restart ---

    def restore(self) -> list[Job]:
        """Queue again what waited when the last server ended.

        Returns:
            what was running then; `forget_dead` drops its files.
        """
        waiting = sorted(_read_jobs(self._waiting_folder), key=lambda found: found[0])
        with self._lock:
            for _, job, nbytes in waiting[:MAX_PENDING]:
                self._push(job, nbytes)
            self._lock.notify()
        dead = [job for _, job, _ in _read_jobs(self._running_folder)]
        numbers = [abs(job.number) for job in (*dead, *(job for _, job, _ in waiting))]
        self._next_number = max([self._next_number, *(int(n) + 1 for n in numbers if n < MAX_NUMBER)])
        return dead

    def forget_dead(self, job: Job) -> None:
        _remove(self._running_folder / f"{job.prompt_id}.json")


def _record(job: Job) -> bytes:
    """The JSON object that lies in the job's file."""
    names = ("number", "prompt_id", "prompt", "extra_data", "outputs")
    parts = [b'"%s": %s' % (name.encode(), text) for name, text in zip(names, job.texts, strict=True)]
    return b"{" + b", ".join([b'"queued_at": %s' % text_json(time.time()), *parts]) + b"}"


def _read_jobs(folder: Path) -> list[tuple[tuple[float, float], Job, int]]:
    """(place, job, size) of each file; one that holds no job is put aside as `.damaged`."""
    found: list[tuple[tuple[float, float], Job, int]] = []
    for half in folder.glob("*.tmp"):  # the server was killed while it wrote it
        _remove(half)
    for path in folder.glob("*.json"):
        try:
            data = path.read_bytes()
            r = json.loads(data)
            job = Job(number_of(r["number"]), r["prompt_id"], r["prompt"], r["extra_data"], list(r["outputs"]))
            if job.prompt_id != path.stem or not isinstance(job.prompt, dict) or not isinstance(job.extra_data, dict):
                raise ValueError("it is not what this server writes")
            found.append(((float(job.number), float(r["queued_at"])), job, len(data)))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as err:
            _log.warning("%s holds no prompt and is put aside: %s", path, err)
            try:
                path.replace(path.with_suffix(".damaged"))
            except OSError:
                _remove(path)
    return found


def save(path: Path, data: bytes) -> bool:
    """Write a file whole or not at all; a disk that takes no more costs the memory of a restart, not the run."""
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        return True
    except OSError as err:
        _log.warning("%s cannot be written, so a restart will not know of it: %s", path, err.strerror or err)
        _remove(temporary)
        return False


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as err:
        _log.warning("%s cannot be removed: %s", path, err.strerror or err)


# --- routes ------------------------------------------------------------------------------------------------------


def routes(server: Server) -> list[web.RouteDef]:
    async def get_queue(_: web.Request) -> web.Response:
        running, waiting = server.run.queue.snapshot()
        body = await server.in_thread(
            lambda: b'{"queue_running": %s, "queue_pending": %s}' % (_list(running), _list(waiting))
        )
        return web.Response(body=body, content_type="application/json")

    async def post_queue(request: web.Request) -> web.Response:
        data = await json_object(request)
        if data.get("clear"):
            await server.in_thread(lambda: server.run.queue.delete())
        if "delete" in data:
            ids = id_list(data["delete"], "delete")
            await server.in_thread(lambda: server.run.queue.delete(ids))
        return web.Response()

    async def post_interrupt(request: web.Request) -> web.Response:
        data = await json_object(request) if (await request.read()).strip() else {}
        prompt_id = data.get("prompt_id")
        if prompt_id is not None and not isinstance(prompt_id, str):
            raise Refused(400, f"prompt_id must be text, got {type(prompt_id).__name__}.")
        server.run.queue.interrupt(prompt_id or None)
        return web.Response()

    return [
        web.get("/queue", get_queue),
        web.post("/queue", post_queue),
        web.post("/interrupt", post_interrupt),
    ]


def _list(jobs: Iterable[Job]) -> bytes:
    return b"[" + b", ".join(b"[" + b", ".join(job.texts) + b"]" for job in jobs) + b"]"


def id_list(value: Any, name: str) -> list[str]:
    """Raises Refused: no list of texts."""
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise Refused(400, f"{name} must be a list of prompt ids.")
    return value
