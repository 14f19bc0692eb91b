"""Run a workflow on a ComfyUI server that is up already, over HTTP and its websocket.

    GET  /system_stats                        is it ComfyUI
    WS   /ws?clientId=                        execution_cached, progress_state, execution_success, execution_error, ...
    POST /prompt {prompt, client_id, prompt_id}
    GET  /history/{prompt_id}, GET /view      results
    POST /queue {delete}, POST /interrupt {prompt_id}

Progress comes from `progress_state`, which holds the state of every node, and not from `executing`, which tells no end
and comes twice for a node with lazy inputs. The websocket only tells what happens; if a message is lost, history is
read instead. No web framework's client but aiohttp: ComfyUI itself depends on it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit, urlunsplit

from ...quantizers import errors
from ...quantizers.errors import BackendUnavailable, FileError, QuantwireError, near
from ..standalone.executor import NodeFailed
from ..standalone.progress import Interrupted, Listener, Progress, first_sigint_sets
from ..standalone.validate import Problem, raise_problems
from ..standalone.workflow import Prompt, PromptNode, apply_overrides

if TYPE_CHECKING:
    import aiohttp

_log = logging.getLogger(__name__)

CONNECT_S = 10
SILENCE_S = 300
"""How long one answer may take: a server that loads a large model holds Python's lock and answers late."""
IDLE_S = 2.0
"""After so long without a message, history and queue are asked what became of the prompt."""
HISTORY_S = 30
STOP_S = 15
"""How long an interrupted node may take to notice; it does so at its next step."""
MESSAGE_LIMIT = 64 * 2**20
FILE_KEYS = {"filename", "type"}


class ServerUnavailable(QuantwireError):
    """No ComfyUI server at the address, or one that does not take the prompt."""


class ServerFailed(Exception):
    """The server went away, or lost the prompt, while it ran. No QuantwireError: the workflow may be fine."""


class RemoteTraceback(Exception):
    """The server's traceback, as the cause of the error that this process raises."""

    def __str__(self) -> str:
        return f"on the server:\n{self.args[0]}"


@dataclass
class RemoteResult:
    """As the embedded executor's RunResult, without return values: those stay on the server."""

    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By node id. File entries name the files as they are in the output folder here."""
    timings_s: dict[str, float] = field(default_factory=dict)
    """Seconds between the server's messages, in the order in which the nodes finished."""
    cached: list[str] = field(default_factory=list)


def run_remote(
    url: str, prompt: Prompt, overrides: Iterable[str], out: Path, listener: Listener | None = None
) -> tuple[Prompt, RemoteResult]:
    """Run a prompt on a server and fetch its files into `out`; returns the prompt with its overrides.

    The first Ctrl-C stops this prompt on the server and nothing else there.

    Raises:
        ServerUnavailable: nothing answers at `url`, or no ComfyUI does.
        WorkflowError: a bad override, or the server refuses the graph: an InvalidWorkflow with every problem. Also when
            it refuses only one branch and would run the others: in a batch run a missing output is worse than an error.
        QuantwireError: what one of the pack's nodes raised there, as the type that it has there.
        NodeFailed: any other failure of a node.
        ServerFailed: the connection broke in mid-run.
        Interrupted: by Ctrl-C, or by somebody on the server.
        FileError: an output cannot be written.
    """
    try:
        import aiohttp  # noqa: F401
    except ImportError as err:
        raise BackendUnavailable("--server: aiohttp is not installed. Run `pip install aiohttp`.") from err
    client = _Client(parse_url(url), out, listener or Listener())
    cancel = threading.Event()
    with first_sigint_sets(cancel):
        return asyncio.run(_until(cancel, client.run(prompt, list(overrides))))


def parse_url(url: str) -> str:
    """The base address without a trailing slash. A path is kept: the server may stand behind a proxy.

    Raises:
        ServerUnavailable: anything but an http or https address.
    """
    try:
        parts = urlsplit(url.strip())
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, half an IPv6 address
        parts, valid = urlsplit(""), False
    if not valid:
        hint = f" Write http://{url}." if url and "//" not in url and not url.startswith(":") else ""
        raise ServerUnavailable(f"--server: {url!r} is not an http:// or https:// address.{hint}")
    if parts.query or parts.fragment:
        raise ServerUnavailable(f"--server: {url!r}: give the address alone, without ? and #.")
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))


async def _until(cancel: threading.Event, work: Any) -> Any:
    """Await `work`; cancel it once when the event is set. Polled: a signal wakes no event loop on every platform."""
    task = asyncio.ensure_future(work)
    while not task.done() and not cancel.is_set():
        await asyncio.wait({task}, timeout=0.1)
    if not task.done():
        task.cancel()
    try:
        return await task
    except asyncio.CancelledError:
        raise Interrupted("Interrupted.") from None


class _Client:
    def __init__(self, base: str, out: Path, listener: Listener) -> None:
        self.base = base
        parts = urlsplit(base)
        self.shown = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))  # no password in messages
        self.out = out
        self.listener = listener
        self.client_id, self.prompt_id = str(uuid.uuid4()), str(uuid.uuid4())
        self.accepted = False
        self.blocked: Mapping[str, Any] | None = None
        self.prompt = Prompt({})
        self.result = RemoteResult()
        self.tracker = _Tracker(self.prompt, listener, self.result)
        self.session: Any = None

    # --- the course of a run ---

    async def run(self, prompt: Prompt, overrides: list[str]) -> tuple[Prompt, RemoteResult]:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
        async with aiohttp.ClientSession(timeout=timeout) as self.session:
            try:
                return await self.converse(prompt, overrides)
            except (aiohttp.ClientError, asyncio.TimeoutError, ConnectionError) as err:
                raise self.broken(_reason(err)) from err
            finally:
                self.tracker.close()

    async def converse(self, prompt: Prompt, overrides: list[str]) -> tuple[Prompt, RemoteResult]:
        await self.check_server()
        classes = await self.node_classes(prompt) if overrides else None
        self.prompt = apply_overrides(prompt, overrides, classes)
        self.tracker = _Tracker(self.prompt, self.listener, self.result)
        socket_url = f"{self.base}/ws?clientId={self.client_id}"
        async with self.session.ws_connect(socket_url, max_msg_size=MESSAGE_LIMIT) as socket:
            # Connected before posting, so that no message is missed.
            posting = asyncio.ensure_future(self.post_prompt())
            try:
                await asyncio.shield(posting)
                await self.follow(socket)
            except asyncio.CancelledError:
                await asyncio.wait({posting}, timeout=STOP_S)
                # A refusal, or a server that is gone: there is nothing to stop then.
                if not posting.done() or posting.exception() is None:
                    await self.stop()
                raise
        await self.fetch_outputs(await self.history())
        return self.prompt, self.result

    async def check_server(self) -> None:
        status, stats = await self.call("GET", "/system_stats")
        system = stats.get("system") if isinstance(stats, Mapping) else None
        if status != 200 or not isinstance(system, Mapping) or "comfyui_version" not in system:
            raise ServerUnavailable(
                f"{self.shown}: something answers there, but not as ComfyUI does (status {status} for /system_stats). "
                "Give the address that ComfyUI prints when it starts."
            )

    async def node_classes(self, prompt: Prompt) -> dict[str, type]:
        """What the server says of the workflow's nodes, as classes for `apply_overrides`."""
        classes: dict[str, type] = {}
        for name in sorted({node.class_type for node in prompt.nodes.values()}):
            _, answer = await self.call("GET", f"/object_info/{quote(name, safe='')}")
            info = answer.get(name) if isinstance(answer, Mapping) else None
            if isinstance(info, Mapping) and isinstance(info.get("input"), Mapping):
                classes[name] = _node_class(name, info["input"], prompt)
        return classes

    async def post_prompt(self) -> None:
        body = {"prompt": self.prompt.to_json(), "client_id": self.client_id, "prompt_id": self.prompt_id}
        status, answer = await self.call("POST", "/prompt", body)
        data: Mapping[str, Any] = answer if isinstance(answer, Mapping) else {}
        problems = _problems(self.prompt, data.get("node_errors"))
        error = data.get("error")
        if status == 200 and data.get("prompt_id"):
            self.accepted = True
            if problems:
                await self.stop()
        elif isinstance(error, Mapping) and error.get("type") == "missing_node_type":
            problems = await self.missing_nodes() or problems
        if not problems and not self.accepted:
            if isinstance(error, (str, Mapping)) and error:
                text = error if isinstance(error, str) else _sentence(error)
                problems = [Problem("refused", None, "", "", None, f"{self.shown} refuses the workflow: {text}")]
            else:
                raise ServerUnavailable(f"{self.shown}: POST /prompt: {_answer(status, answer)}. See the server's log.")
        raise_problems(problems, self.prompt.source)

    async def missing_nodes(self) -> list[Problem]:
        """Every node that the server lacks; its own error names the first alone."""
        _, known = await self.call("GET", "/object_info")
        if not isinstance(known, Mapping):
            return []
        return [
            Problem(
                "missing_node_type", *node.place, None,
                f"the server has no node {node.class_type!r}.{near(node.class_type, known)} "
                "Install the pack that it comes from there.",
            )
            for node in self.prompt.nodes.values()
            if node.class_type not in known
        ]  # fmt: skip

    async def follow(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """Hear messages until the prompt has succeeded; any other end raises."""
        import aiohttp

        told, receiving = False, asyncio.ensure_future(socket.receive())
        try:
            while True:
                # Not receive(timeout=...): that leaves the socket marked as closed.
                if not (await asyncio.wait({receiving}, timeout=IDLE_S))[0]:
                    ahead = await self.prompts_ahead()
                    if ahead is None:
                        return await self.read_end()
                    if ahead and not told:
                        told = True
                        print(f"{'waiting':>9}  {ahead} before it on {self.shown}", file=sys.stderr, flush=True)
                    continue
                message, receiving = receiving.result(), asyncio.ensure_future(socket.receive())
                if message.type is aiohttp.WSMsgType.TEXT:
                    event = json.loads(message.data)
                    if self.hear(event.get("type"), event.get("data")):
                        return
                elif message.type is not aiohttp.WSMsgType.BINARY:  # binary: preview images
                    raise self.broken("the server closed the connection")
        finally:
            receiving.cancel()

    async def read_end(self) -> None:
        """The end of a prompt whose last message did not arrive, from its history."""
        for kind, data in ((await self.history()).get("status") or {}).get("messages", []):
            if self.hear(kind, data):
                return
        raise self.broken("the prompt ended without a result")

    def hear(self, kind: Any, data: Any) -> bool:
        """Take in one message; True when the prompt has succeeded."""
        if not isinstance(data, Mapping) or data.get("prompt_id") != self.prompt_id:
            return False
        if kind == "execution_cached":
            self.tracker.cached(data.get("nodes", []))
        elif kind == "progress_state":
            self.tracker.update(data.get("nodes", {}))
        elif kind == "execution_error" and data.get("exception_type") == "ExecutionBlocked":
            self.blocked = data  # the server goes on with other branches; it is an error when they are done
        elif kind == "execution_error":
            raise self.failure(data)
        elif kind == "execution_interrupted":
            self.tracker.stop(Interrupted())
            raise Interrupted(f"Interrupted on {self.shown}.")
        elif kind == "execution_success":
            self.tracker.finish()
            if self.blocked is not None:
                raise self.failure(self.blocked)
            return True
        return False

    def failure(self, data: Mapping[str, Any]) -> Exception:
        """The exception for an `execution_error`: the pack's own type, else NodeFailed."""
        node = self.prompt.nodes.get(str(data.get("node_id")))
        node = node or PromptNode(str(data.get("node_id")), str(data.get("node_type")), {})
        module, _, name = str(data.get("exception_type", "")).rpartition(".")
        text = str(data.get("exception_message", "")).strip()
        own = getattr(errors, name, None) if module.endswith("quantizers.errors") else None
        error: Exception
        if isinstance(own, type) and issubclass(own, QuantwireError):
            error = own(text)
        else:
            error = NodeFailed(node.place, Exception(f"{name}: {text}" if text else name))
        error.__cause__ = RemoteTraceback("".join(data.get("traceback") or []) or text)
        setattr(error, "node_place", node.place)  # noqa: B010 - the types are not all ours
        self.tracker.stop(error, node)
        return error

    # --- stopping ---

    async def stop(self) -> None:
        """Take this prompt off the queue, or interrupt it if it runs; no other prompt is touched.

        Interrupted only when the queue says that it runs: servers before the one that reads `prompt_id` would stop
        whatever runs. Sent again until it is gone: one that comes before the first node is forgotten by the server.
        """
        import aiohttp

        try:
            await self.call("POST", "/queue", {"delete": [self.prompt_id]})
            end = time.monotonic() + STOP_S
            while (await self.queue())[0].count(self.prompt_id):
                if time.monotonic() > end:
                    _log.warning("%s: the prompt was told to stop and will at its next step.", self.shown)
                    break
                await self.call("POST", "/interrupt", {"prompt_id": self.prompt_id})
                await asyncio.sleep(0.2)
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, QuantwireError) as err:
            _log.warning("%s: the prompt may go on there, it could not be told to stop: %s", self.shown, _reason(err))
        self.tracker.stop(Interrupted())

    async def queue(self) -> tuple[list[str], list[str]]:
        """Ids of the prompts that run and of those that wait, in the order in which they will run."""
        _, answer = await self.call("GET", "/queue")
        data = answer if isinstance(answer, Mapping) else {}
        return (
            [item[1] for item in data.get("queue_running", [])],
            [item[1] for item in sorted(data.get("queue_pending", []), key=lambda item: item[0])],
        )

    async def prompts_ahead(self) -> int | None:
        """0 when it runs, None when it is neither running nor waiting."""
        running, pending = await self.queue()
        if self.prompt_id in running:
            return 0
        return pending.index(self.prompt_id) + len(running) if self.prompt_id in pending else None

    # --- results ---

    async def history(self) -> dict[str, Any]:
        """The prompt's history entry; it is written a little after the last message."""
        end = time.monotonic() + HISTORY_S
        while True:
            _, answer = await self.call("GET", f"/history/{self.prompt_id}")
            if isinstance(answer, Mapping) and self.prompt_id in answer:
                return answer[self.prompt_id]
            if await self.prompts_ahead() is None and time.monotonic() > end - HISTORY_S + IDLE_S:
                raise self.broken("the prompt is neither in the queue nor in the history; somebody removed it")
            if time.monotonic() > end:
                raise self.broken(f"no history of the prompt after {HISTORY_S} s")
            await asyncio.sleep(0.05)

    async def fetch_outputs(self, entry: Mapping[str, Any]) -> None:
        for node_id, ui in (entry.get("outputs") or {}).items():
            self.result.outputs[node_id] = {key: await self.fetch_all(value) for key, value in ui.items()}

    async def fetch_all(self, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return [
            await self.fetch(item) if isinstance(item, dict) and item.keys() >= FILE_KEYS else item for item in value
        ]

    async def fetch(self, item: dict[str, Any]) -> dict[str, Any]:
        """Download one file; its entry with the name that it got here."""
        if item["type"] not in ("output", "temp"):
            return item
        target = target_path(self.out, item)
        query = {key: str(item.get(key) or "") for key in ("filename", "subfolder", "type")}
        async with self.session.get(f"{self.base}/view", params=query, allow_redirects=False) as response:
            if response.status != 200:
                raise self.broken(f"the output {item['filename']!r} cannot be fetched: it answered {response.status}")
            data = await response.read()
        return {**item, "subfolder": query["subfolder"], "filename": _write(target, data).name}

    # --- plumbing ---

    async def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON of an answer; its text where it is not JSON."""
        async with self.session.request(method, self.base + path, json=body, allow_redirects=False) as response:
            text = await response.text(errors="replace")
            if response.status in (301, 302, 303, 307, 308):
                place = response.headers.get("Location", "another address")
                raise ServerUnavailable(f"{self.shown}: it redirects to {place}. Give the final address to --server.")
        try:
            return response.status, json.loads(text)
        except ValueError:
            return response.status, text

    def broken(self, reason: str) -> Exception:
        """The error for a broken connection: a bad address before the server took the prompt, a lost server after."""
        if not self.accepted:
            return ServerUnavailable(
                f"{self.shown}: no connection to a ComfyUI server: {reason}. "
                "Start ComfyUI there, or correct the address."
            )
        place = self.tracker.place
        where = f" while {place} ran" if place else ""
        self.tracker.stop(ServerFailed())
        return ServerFailed(f"{self.shown}: lost the run{where}: {reason}. See the server's log, then run again.")


class _Tracker:
    """Turns the server's node states into a Listener's calls."""

    def __init__(self, prompt: Prompt, listener: Listener, result: RemoteResult) -> None:
        self.prompt, self.listener, self.result = prompt, listener, result
        self.started: dict[str, float] = {}
        self.bars: dict[str, Progress] = {}

    @property
    def place(self) -> Any:
        """Where the run is, or None between two nodes."""
        running = [self.prompt.nodes[i].place for i in self.started]
        return running[-1] if running else None

    def cached(self, node_ids: Iterable[str]) -> None:
        for node_id in node_ids:
            if node_id in self.prompt.nodes and node_id not in self.result.cached:
                self.result.cached.append(node_id)
                self.listener.node_cached(self.prompt.nodes[node_id], None)

    def update(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        for node_id, state in states.items():
            # Nodes that a node expanded into have ids of their own; their bars are shown under its title.
            node = self.prompt.nodes.get(node_id) or self.prompt.nodes.get(str(state.get("display_node_id")))
            if node is None:
                continue
            if state.get("state") == "running":
                if node_id == node.id and node_id not in self.started and node_id not in self.result.timings_s:
                    self.started[node_id] = time.perf_counter()
                    self.listener.node_start(node)
                self.draw(node, node_id, state.get("value", 0), state.get("max", 1))
            else:
                self.close(node_id)
                if node_id in self.started:
                    self.done(node)
                elif node_id not in self.result.timings_s:  # taken from the cache in mid-run: a twin ran before it
                    self.cached([node_id])

    def draw(self, node: PromptNode, key: str, value: Any, total: Any) -> None:
        if not all(isinstance(n, (int, float)) for n in (value, total)) or total <= 1:
            return
        bar = self.bars.get(key)
        if bar is not None and (bar.total != total or value < bar.done):
            self.close(key)  # the node's next bar
            bar = None
        if bar is None:
            bar = self.bars[key] = Progress(int(total), "", depth=len(self.bars))
        bar.done = int(value)
        self.listener.progress(node, bar)

    def close(self, key: str | None = None) -> None:
        """Close one bar, or all."""
        for name in [key] if key is not None else list(self.bars):
            bar = self.bars.pop(name, None)
            if bar is not None:
                bar.closed = True
                node = self.prompt.nodes.get(name) or PromptNode(name, "", {})
                self.listener.progress(node, bar)

    def done(self, node: PromptNode) -> None:
        seconds = self.result.timings_s[node.id] = time.perf_counter() - self.started.pop(node.id)
        self.listener.node_done(node, seconds, None)

    def finish(self) -> None:
        """The run succeeded, so what is still open is done."""
        self.close()
        for node_id in list(self.started):
            self.done(self.prompt.nodes[node_id])

    def stop(self, error: BaseException, node: PromptNode | None = None) -> None:
        """Tell of the node that failed, or of those that were running."""
        self.close()
        for stopped in [node] if node else [self.prompt.nodes[i] for i in self.started]:
            self.listener.node_error(stopped, error)
        self.started.clear()


# --- what the server says ---------------------------------------------------------------------------------------


def _node_class(name: str, inputs: Mapping[str, Any], prompt: Prompt) -> type:
    groups = {group: dict(inputs.get(group) or {}) for group in ("required", "optional", "hidden")}
    known = {n for declared in groups.values() for n in declared}
    # Inputs that a node takes without declaring them by name, such as those of a dynamic combo, can be set too.
    used = {n for node in prompt.nodes.values() if node.class_type == name for n in node.inputs}
    groups["optional"] |= {n: ["*", {}] for n in used - known}
    return type(name, (), {"INPUT_TYPES": staticmethod(lambda: groups)})


def _problems(prompt: Prompt, node_errors: Any) -> list[Problem]:
    """The server's `node_errors`, in the order of the workflow."""
    problems: list[Problem] = []
    if not isinstance(node_errors, Mapping):
        return problems
    rank = {node_id: place for place, node_id in enumerate(prompt.nodes)}
    for node_id in sorted(node_errors, key=lambda i: rank.get(i, len(rank))):
        entry = node_errors[node_id]
        node = prompt.nodes.get(node_id) or PromptNode(node_id, str(entry.get("class_type", "")), {})
        for error in entry.get("errors", []):
            name = (error.get("extra_info") or {}).get("input_name")
            problems.append(Problem(str(error.get("type")), *node.place, name, _sentence(error, name)))
    return problems


def _sentence(error: Mapping[str, Any], name: str | None = None) -> str:
    """`message: details` on one line, without the input's name, which details begin with."""
    details = " ".join(str(error.get("details") or "").split())
    if name and details.startswith(name):
        details = details[len(name) :].lstrip(" :,-")
    message = " ".join(str(error.get("message") or error.get("type") or "no reason given").split()).rstrip(".")
    return f"{message}: {details}" if details else message


def _answer(status: int, answer: Any) -> str:
    text = " ".join(str(answer).split())[:200]
    return f"answered {status}" + (f": {text}" if text else "")


def _reason(err: BaseException) -> str:
    """One line; the system's own words where it has some."""
    status = getattr(err, "status", None)
    if isinstance(status, int) and status:
        return f"the server answered {status}"
    cause = getattr(err, "os_error", err)
    number = getattr(cause, "errno", None)
    if isinstance(cause, OSError) and isinstance(number, int) and number > 0:
        return os.strerror(number)
    text = getattr(cause, "strerror", None) or str(cause)
    if isinstance(err, (asyncio.TimeoutError, TimeoutError)):
        text = "no answer in time"
    return " ".join(str(text).split()).rstrip(".") or type(err).__name__


# --- files --------------------------------------------------------------------------------------------------------


def target_path(out: Path, item: Mapping[str, Any]) -> Path:
    """Where a file of the server goes: as in a local run, `temp` files into a folder of that name.

    Raises:
        FileError: its name leads out of `out`; a server is not trusted with paths of this machine.
    """
    name, subfolder = str(item["filename"]), str(item.get("subfolder") or "").replace("\\", "/")
    parts = PurePosixPath(subfolder).parts
    simple = all(part not in ("..", "/") and not set(part) & set(":\0") for part in parts)
    if not simple or name in ("", ".", "..") or set(name) & set("/\\:\0"):
        raise FileError(
            f"The server names an output '{subfolder}/{name}', which leads outside {out}; it is not fetched."
        )
    folder = out if item["type"] == "output" else out / "temp"
    target = folder.joinpath(*parts, name)
    if not target.resolve().parent.is_relative_to(out.resolve()):  # a link in the output folder
        raise FileError(
            f"The server's output '{subfolder}/{name}' leads outside {out} through a link; it is not fetched."
        )
    return target


def _write(target: Path, data: bytes) -> Path:
    """Write whole or not at all. A file of that name with other content stays, and the new one gets a number.

    The server counts names in its own folder, so they may collide with those of an earlier run here.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        first, number = target, 1
        while target.exists() and target.read_bytes() != data:
            number += 1
            target = first.with_name(f"{first.stem}-{number}{first.suffix}")
        temporary = target.with_name(target.name + ".tmp")
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as err:
        raise FileError(f"{target}: the output cannot be written: {err.strerror or err}.") from err
    if target != first:
        _log.warning("%s exists with other content, so the server's is written to %s.", first, target.name)
    return target
