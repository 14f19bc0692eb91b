"""`quantwire run --server` against a stand-in: a small aiohttp server that speaks ComfyUI's protocol and runs nothing.

It says what a real server says only in rare moments: dying in mid-run, losing messages, naming files that lead outside.
`tests/comfyui/test_remote.py` runs the same command against a real one.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from quantwire.cli import main
from quantwire.hosts.comfyui import remote
from quantwire.quantizers.errors import FileError

aiohttp = pytest.importorskip("aiohttp", reason="the remote run needs aiohttp")
from aiohttp import web  # noqa: E402

WORKFLOW = {
    "1": {"class_type": "Load", "inputs": {"name": "a"}},
    "2": {"class_type": "Sample", "inputs": {"model": ["1", 0], "steps": 4}, "_meta": {"title": "Sampler"}},
    "3": {"class_type": "Save", "inputs": {"images": ["2", 0], "prefix": "x"}, "_meta": {"title": "Keep"}},
}
INFO = {
    "Load": {"input": {"required": {"name": [["a", "b"], {}]}}},
    "Sample": {"input": {"required": {"model": ["MODEL"], "steps": ["INT", {}]}}},
    "Save": {"input": {"required": {"images": ["IMAGE"]}, "optional": {"prefix": ["STRING", {}]}}},
}
PNG = b"\x89PNG stand-in"
SAVED = {"3": {"images": [{"filename": "x_00001_.png", "subfolder": "", "type": "output"}], "text": ["done"]}}


def states(**nodes: str | tuple[int, int]) -> dict[str, Any]:
    """progress_state for n1="finished", n2=(3, 4): at 3 of 4."""
    found = {}
    for name, what in nodes.items():
        state, (value, total) = (what, (0, 1)) if isinstance(what, str) else ("running", what)
        found[name[1:]] = {"state": state, "value": value, "max": total, "display_node_id": name[1:]}
    return {"type": "progress_state", "data": {"nodes": found}}


RUN = [
    {"type": "execution_start", "data": {}},
    {"type": "execution_cached", "data": {"nodes": ["1"]}},
    states(n2="running"),
    states(n2=(1, 4)),
    states(n2=(4, 4)),
    states(n2="finished", n3="running"),
    states(n2="finished", n3="finished"),
]
SUCCESS = {"type": "execution_success", "data": {}}


class StandIn:
    """A stand-in for a ComfyUI server: after a prompt it sends `events`, then does what `end` says."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = [*RUN, SUCCESS]
        self.outputs: dict[str, Any] = SAVED
        self.end = "history"
        self.answer: tuple[int, Any] | None = None
        self.stats: Any = {"system": {"comfyui_version": "0.33.0"}}
        self.history_delay_s = 0.1
        self.posted: list[dict[str, Any]] = []
        self.calls: list[tuple[str, Any]] = []
        self.running: list[list[Any]] = []
        self.pending: list[list[Any]] = []
        self.history: dict[str, Any] = {}
        self.sockets: dict[str, web.WebSocketResponse] = {}
        self.background: list[asyncio.Task[None]] = []
        self.interrupts_needed = 1
        self.loop = asyncio.new_event_loop()
        ready = threading.Event()
        self.thread = threading.Thread(target=self._serve, args=(ready,), daemon=True)
        self.thread.start()
        assert ready.wait(10)

    def _serve(self, ready: threading.Event) -> None:
        async def start() -> None:
            app = web.Application()
            app.add_routes(
                [
                    web.get("/system_stats", self.get_stats),
                    web.get("/object_info", self.get_nodes),
                    web.get("/object_info/{name}", self.object_info),
                    web.get("/ws", self.socket),
                    web.post("/prompt", self.prompt),
                    web.get("/history/{id}", self.get_history),
                    web.get("/queue", self.get_queue),
                    web.post("/queue", self.post_queue),
                    web.post("/interrupt", self.interrupt),
                    web.get("/view", self.view),
                ]
            )
            self.runner = web.AppRunner(app, shutdown_timeout=0.1)
            await self.runner.setup()
            await web.TCPSite(self.runner, "127.0.0.1", 0).start()
            self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"
            ready.set()

        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(start())
        self.loop.run_forever()

    def close(self) -> None:
        async def stop() -> None:
            for task in self.background:
                task.cancel()
            for socket in list(self.sockets.values()):
                await socket.close()
            await self.runner.cleanup()

        asyncio.run_coroutine_threadsafe(stop(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)

    async def json(self, data: Any, status: int = 200) -> web.Response:
        return web.json_response(data, status=status)

    async def get_stats(self, _: web.Request) -> web.Response:
        return await self.json(self.stats)

    async def get_nodes(self, _: web.Request) -> web.Response:
        return await self.json(INFO)

    async def object_info(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        return await self.json({name: INFO[name]} if name in INFO else {})

    async def socket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.sockets[request.query["clientId"]] = socket
        await socket.send_json({"type": "status", "data": {"status": {}, "sid": request.query["clientId"]}})
        async for _ in socket:
            pass
        return socket

    async def prompt(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.posted.append(body)
        if self.answer is not None and self.answer[0] != 200:
            return await self.json(self.answer[1], self.answer[0])
        item = [len(self.posted), body["prompt_id"], body["prompt"], {}, []]
        (self.pending if self.end == "wait" else self.running).append(item)
        self.background.append(asyncio.ensure_future(self.play(body["client_id"], body["prompt_id"])))
        errors = self.answer[1] if self.answer is not None else {}
        return await self.json({"prompt_id": body["prompt_id"], "number": 1, "node_errors": errors})

    async def play(self, client_id: str, prompt_id: str) -> None:
        socket = self.sockets[client_id]
        await socket.send_json({"type": "execution_error", "data": {"prompt_id": "another's", "node_id": "1"}})
        await socket.send_bytes(b"\0\0\0\1preview")
        for event in self.events:
            await socket.send_json({**event, "data": {**event["data"], "prompt_id": prompt_id}})
        if self.end == "die":
            await socket.close()
        elif self.end == "history":
            await asyncio.sleep(self.history_delay_s)
            self.running.clear()
            messages = [["execution_success", {"prompt_id": prompt_id}]]
            self.history[prompt_id] = {"outputs": self.outputs, "status": {"messages": messages}}
        elif self.end == "vanish":
            self.running.clear()

    async def get_history(self, request: web.Request) -> web.Response:
        found = self.history.get(request.match_info["id"])
        return await self.json({request.match_info["id"]: found} if found else {})

    async def get_queue(self, _: web.Request) -> web.Response:
        return await self.json({"queue_running": self.running, "queue_pending": self.pending})

    async def post_queue(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.calls.append(("queue", body))
        self.pending = [item for item in self.pending if item[1] not in body["delete"]]
        return web.Response()

    async def interrupt(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.calls.append(("interrupt", body))
        self.interrupts_needed -= 1
        if self.interrupts_needed <= 0:
            self.running = [item for item in self.running if item[1] != body["prompt_id"]]
        return web.Response()

    async def view(self, request: web.Request) -> web.Response:
        self.calls.append(("view", dict(request.query)))
        return web.Response(body=PNG) if "missing" not in request.query["filename"] else web.Response(status=404)


@pytest.fixture
def server() -> Iterator[StandIn]:
    stand_in = StandIn()
    yield stand_in
    stand_in.close()


@pytest.fixture
def run(server: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str], outcome: Any) -> Callable[..., Any]:
    """run(*arguments, url=..., workflow=...): the command in this process."""

    def call(*arguments: str, url: str | None = None, workflow: dict[str, Any] = WORKFLOW) -> Any:
        path = tmp_path / "w.json"
        path.write_text(json.dumps(workflow), encoding="utf-8")
        address = server.url if url is None else url
        code = main(["run", str(path), "--server", address, "--out", str(tmp_path / "out"), *arguments])
        said = capsys.readouterr()
        return outcome(code, said.out, said.err, tmp_path / "out")

    return call


# --- a run that goes well, against the stand-in ---


def test_stand_in_run(run: Any, server: StandIn, tmp_path: Path) -> None:
    done = run("--set", "Sampler.steps=6", "--set", "Keep.prefix=5", "--json", str(tmp_path / "r.json"))
    assert done.code == 0, done.err
    assert done.files == ["x_00001_.png"]
    assert (tmp_path / "out" / "x_00001_.png").read_bytes() == PNG
    assert done.out.splitlines() == [str(tmp_path / "out" / "x_00001_.png"), "[Keep] done"]
    shape = [
        "   cached  node 1 (Load)",
        r"   \d.\d\d s  node 2 'Sampler' (Sample)",
        r"   \d.\d\d s  node 3 'Keep' (Save)",
    ]
    for line, want in zip(done.err.splitlines(), shape, strict=True):
        assert re.fullmatch(want.replace("(", r"\(").replace(")", r"\)"), line)
    (body,) = server.posted
    assert body["prompt"]["2"]["inputs"]["steps"] == 6
    assert body["prompt"]["3"]["inputs"]["prefix"] == "5", "STRING, as the server says"
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", body["prompt_id"])
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert list(report) == ["status", "exit_code", "error", "outputs", "timings_s", "cached"]
    assert (report["outputs"], list(report["timings_s"]), report["cached"]) == (SAVED, ["2", "3"], ["1"])


def test_stand_in_temp_files_and_subfolders(run: Any, server: StandIn) -> None:
    server.outputs = {
        "3": {
            "images": [
                {"filename": "a b.png", "subfolder": "sub/deep", "type": "output"},
                {"filename": "p.png", "type": "temp"},
                {"filename": "in.png", "subfolder": "", "type": "input"},
            ],
            "animated": [False],
            "audio": [{"filename": "s.flac", "subfolder": "", "type": "output"}],
        }
    }
    done = run()
    assert done.code == 0, done.err
    assert done.files == ["s.flac", "sub/deep/a b.png", "temp/p.png"]
    assert len(done.out.splitlines()) == 3
    assert next(q for kind, q in server.calls if kind == "view") == {
        "filename": "a b.png", "subfolder": "sub/deep", "type": "output",
    }  # fmt: skip


def test_stand_in_names_that_exist_here_already(run: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x_00001_.png").write_bytes(b"of another run")
    done = run()
    assert done.files == ["x_00001_-2.png", "x_00001_.png"]
    assert (tmp_path / "out" / "x_00001_.png").read_bytes() == b"of another run"
    assert done.out.splitlines()[0].endswith("x_00001_-2.png")
    assert run().files == done.files, "the same content is not written twice"


@pytest.mark.parametrize("last", [[], [SUCCESS]], ids=["lost-message", "late-history"])
def test_stand_in_results_come_from_history(
    run: Any, server: StandIn, last: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "IDLE_S", 0.5)
    server.events, server.history_delay_s = [*RUN, *last], 0.3
    done = run()
    assert done.code == 0, done.err
    assert done.files == ["x_00001_.png"]


def test_stand_in_waiting_is_told(run: Any, server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "IDLE_S", 0.2)
    server.end, server.events = "wait", []
    server.running = [[0, "another's", {}, {}, []]]
    threading.Timer(1.0, server.pending.clear).start()
    done = run()
    assert done.code == 4
    assert f"  waiting  1 before it on {server.url}\n" in done.err
    assert "somebody removed it" in done.err


# --- refused, against the stand-in ---


def test_stand_in_refusal_lists_every_problem(run: Any, server: StandIn) -> None:
    def fault(kind: str, message: str, details: str, name: str | None) -> dict[str, Any]:
        return {
            "type": kind,
            "message": message,
            "details": details,
            "extra_info": {"input_name": name} if name else {},
        }

    node_errors = {
        "3": {"class_type": "Save", "errors": [fault("required_input_missing", "Required input is missing", "a", "a")]},
        "2": {
            "class_type": "Sample",
            "errors": [
                fault("value_smaller_than_min", "Value 0 smaller than min of 1", "steps", "steps"),
                fault("value_not_in_list", "Value not in list", "cfg: 'x' not in ['y']", "cfg"),
            ],
        },
    }
    server.answer = (400, {"error": {"type": "prompt_outputs_failed_validation"}, "node_errors": node_errors})
    done = run()
    done.assert_refused("3 problems", "node 2 'Sampler' (Sample).steps: Value 0 smaller than min of 1")
    assert done.err.splitlines()[1:] == [
        "node 2 'Sampler' (Sample).steps: Value 0 smaller than min of 1",
        "node 2 'Sampler' (Sample).cfg: Value not in list: 'x' not in ['y']",
        "node 3 'Keep' (Save).a: Required input is missing",
    ]


def test_stand_in_lacks_nodes(run: Any, server: StandIn) -> None:
    server.answer = (
        400,
        {"error": {"type": "missing_node_type", "message": "Node 'Lod' not found."}, "node_errors": {}},
    )
    changed = {**WORKFLOW, "1": {"class_type": "Lod", "inputs": {}}, "9": {"class_type": "Other", "inputs": {}}}
    done = run(workflow=changed)
    done.assert_refused("2 problems", "node 1 (Lod): the server has no node 'Lod'. Did you mean Load?")
    assert "node 9 (Other): the server has no node 'Other'." in done.err


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (
            400,
            {"error": {"message": "Prompt has no outputs", "details": ""}},
            "refuses the workflow: Prompt has no outputs",
        ),
        (500, "Internal Server Error", "POST /prompt: answered 500: Internal Server Error"),
        (200, {"2": {"errors": [{"message": "Bad", "details": ""}]}}, "node 2 'Sampler' (Sample): Bad"),
    ],
    ids=["no-outputs", "crash", "one-branch"],
)
def test_stand_in_refusals(run: Any, server: StandIn, status: int, body: Any, said: str) -> None:
    server.answer, server.end = (status, body), "wait" if status == 200 else "history"
    run().assert_refused(said)
    assert server.pending == [], "a prompt of which only a part would run is taken back"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (
            "http://127.0.0.1:1",
            "http://127.0.0.1:1: no connection to a ComfyUI server: Connection refused. Start ComfyUI",
        ),
        ("127.0.0.1:8188", "is not an http:// or https:// address. Write http://127.0.0.1:8188."),
        ("ftp://127.0.0.1", "is not an http:// or https:// address."),
        ("file:///etc/passwd", "is not an http:// or https:// address."),
        ("http://", "is not an http:// or https:// address."),
        ("http://127.0.0.1:port", "is not an http:// or https:// address."),
        ("http://127.0.0.1:8188/?a=1", "without ? and #"),
        ("", "is not an http:// or https:// address."),
    ],
)
def test_addresses_that_do_not_work(run: Any, url: str, said: str) -> None:
    done = run(url=url)
    done.assert_refused("ServerUnavailable", said)
    assert len(done.err.splitlines()) == 1


def test_password_of_the_address_is_not_printed(run: Any) -> None:
    done = run(url="http://user:secret@127.0.0.1:1")
    assert "secret" not in done.err


def test_server_that_is_not_comfyui(run: Any, server: StandIn) -> None:
    server.stats = {"hello": 1}
    done = run()
    done.assert_refused("something answers there, but not as ComfyUI does")
    assert server.posted == []


def test_bad_overrides_are_found_before_posting(run: Any, server: StandIn) -> None:
    run("--set", "Sampler.stepz=4").assert_refused("has no input 'stepz'. Did you mean steps?")
    run("--set", "Sampler.steps=many").assert_refused("expected INT, got 'many'")
    assert server.posted == []


def test_output_folder_is_checked_before_posting(run: Any, server: StandIn, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    run("--out", str(tmp_path / "file" / "sub")).assert_refused("FileError: --out:", "is not a writable folder")
    assert server.posted == []


def test_model_folders_are_the_servers(run: Any, tmp_path: Path) -> None:
    run("--models", str(tmp_path)).assert_refused("--models", "leave --models out")


def test_aiohttp_is_missing(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    run().assert_refused("BackendUnavailable: --server: aiohttp is not installed. Run `pip install aiohttp`.")


# --- failures in mid-run, against the stand-in ---


@pytest.mark.parametrize(
    ("kind", "name", "code"),
    [
        ("custom_nodes/quantwire.quantizers.errors.OffloadConflict", "OffloadConflict", 3),
        ("custom_nodes/quantwire.quantizers.errors.SpecError", "SpecError", 2),
        ("ValueError", "NodeFailed", 4),
        ("other_pack.errors.SpecError", "NodeFailed", 4),
        ("custom_nodes/quantwire.quantizers.errors.annotations", "NodeFailed", 4),
        ("ExecutionBlocked", "NodeFailed", 4),
    ],
)
def test_stand_in_node_failures(run: Any, server: StandIn, tmp_path: Path, kind: str, name: str, code: int) -> None:
    data = {"node_id": "2", "node_type": "Sample", "exception_type": kind, "exception_message": "no.\nWays out: x\n\n"}
    data["traceback"] = ["  File nodes.py\n"]  # type: ignore[assignment]
    server.events = [*RUN[:3], {"type": "execution_error", "data": data}]
    server.events += [SUCCESS] if kind == "ExecutionBlocked" else []
    done = run("--json", str(tmp_path / "r.json"))
    done.assert_refused(f"{name}: node 2 'Sampler' (Sample): ", "no.", code=code)
    assert "   failed  node 2 'Sampler' (Sample)\n" in done.err
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert (report["exit_code"], report["error"]["type"]) == (code, name)
    assert report["error"]["node"] == {"id": "2", "title": "Sampler", "class_type": "Sample"}
    assert "on the server:\n  File nodes.py" in run("--debug").err


def test_stand_in_dies_in_mid_run(run: Any, server: StandIn) -> None:
    server.events, server.end = RUN[:4], "die"
    done = run()
    done.assert_refused(f"ServerFailed: {server.url}: lost the run while node 2 'Sampler' (Sample) ran:", code=4)
    assert done.err.splitlines()[-1].startswith("ServerFailed")


def test_stand_in_forgets_the_prompt(run: Any, server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "IDLE_S", 0.3)
    server.events, server.end = RUN[:4], "vanish"
    run().assert_refused("neither in the queue nor in the history", code=4)


def test_stand_in_interrupted_by_somebody_else(run: Any, server: StandIn) -> None:
    server.events = [*RUN[:4], {"type": "execution_interrupted", "data": {"node_id": "2"}}]
    done = run()
    assert done.code == 130
    assert "  stopped  node 2 'Sampler' (Sample)\nInterrupted.\n" in done.err


@pytest.mark.parametrize(
    "entry",
    [
        {"filename": "../x.png", "subfolder": "", "type": "output"},
        {"filename": "/tmp/x.png", "subfolder": "", "type": "output"},
        {"filename": "x.png", "subfolder": "..", "type": "output"},
        {"filename": "x.png", "subfolder": "a/../../b", "type": "temp"},
        {"filename": "x.png", "subfolder": "/tmp", "type": "output"},
        {"filename": "x.png", "subfolder": "..\\b", "type": "output"},
        {"filename": "C:x.png", "subfolder": "", "type": "output"},
        {"filename": "..", "subfolder": "", "type": "output"},
        {"filename": "", "subfolder": "", "type": "output"},
        {"filename": "x\0.png", "subfolder": "", "type": "output"},
    ],
    ids=lambda e: ascii(f"{e['subfolder']}/{e['filename']}"),
)
def test_stand_in_names_that_lead_outside(run: Any, server: StandIn, tmp_path: Path, entry: Any) -> None:
    server.outputs = {"3": {"images": [entry]}}
    run().assert_refused("FileError", "leads outside")
    assert not list(tmp_path.rglob("*x.png"))


def test_link_that_leads_outside(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path)
    with pytest.raises(FileError, match="through a link"):
        remote.target_path(tmp_path / "out", {"filename": "x.png", "subfolder": "link", "type": "output"})


def test_stand_in_has_lost_the_file(run: Any, server: StandIn) -> None:
    server.outputs = {"3": {"images": [{"filename": "missing.png", "subfolder": "", "type": "output"}]}}
    run().assert_refused("the output 'missing.png' cannot be fetched: it answered 404", code=4)


# --- Ctrl-C, against the stand-in ---


@pytest.mark.skipif(os.name == "nt", reason="SIGINT cannot be sent to one process on Windows")
@pytest.mark.parametrize("where", ["running", "pending"])
def test_ctrl_c_stops_this_prompt_alone(server: StandIn, tmp_path: Path, where: str) -> None:
    server.events, server.end = (RUN[:4], "hang") if where == "running" else ([], "wait")
    server.interrupts_needed = 2  # a real server forgets one that comes before the first node
    others = [0, "another's", {}, {}, []]
    (server.pending if where == "running" else server.running).append(others)
    path = tmp_path / "w.json"
    path.write_text(json.dumps(WORKFLOW), encoding="utf-8")
    command = [sys.executable, "-m", "quantwire.cli", "run", str(path), "--server", server.url]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 60
        while not server.posted and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert err.endswith("Interrupted.\n")
    assert "Traceback" not in err
    assert ("stopped  node 2 'Sampler' (Sample)" in err) is (where == "running")
    own = server.posted[0]["prompt_id"]
    assert [body for kind, body in server.calls if kind == "queue"] == [{"delete": [own]}]
    interrupts = [body for kind, body in server.calls if kind == "interrupt"]
    assert interrupts == [{"prompt_id": own}] * (2 if where == "running" else 0)
    assert [*server.running, *server.pending] == [others]
