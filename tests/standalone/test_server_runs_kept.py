"""What outlives a server, what is bounded, and readers that do not read."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("aiohttp", reason="the server needs aiohttp, of the extra `editor`")

import aiohttp
from quantwire.hosts.standalone.server import events
from quantwire.hosts.standalone.server.history import History
from quantwire.hosts.standalone.server.previews import LatentColors
from quantwire.hosts.standalone.server.queue import Job, KnownId, PromptQueue
from quantwire.quantizers.errors import FileError

from .server_runs import SHOWN, Client, Steps, serving, steps

WORKFLOW = Path(__file__).resolve().parents[2] / "workflows" / "api" / "quantized.json"


def entry(prompt_id: str, text: str = "") -> dict[str, Any]:
    status = {"status_str": "success", "completed": True, "messages": [["execution_success", {"timestamp": 5}]]}
    return {"prompt": [0, prompt_id, SHOWN, {}, ["2"]], "outputs": {"2": {"text": [text]}}, "status": status}


# --- a restart ---


def test_a_stopped_server_keeps_what_waits_and_tells_what_it_stopped(tmp_path: Path) -> None:
    async def first() -> list[str]:
        async with serving(tmp_path) as s:
            tab = await s.client().connect()
            extra = {"api_key_comfy_org": "secret-key", "auth_token_comfy_org": "secret-token"}
            ids = [await tab.queue(SHOWN, extra_data=extra)]
            await tab.until_done()
            ids += [await tab.queue(steps(5), extra_data=extra), await tab.queue(SHOWN), await tab.queue(steps(1))]
            await asyncio.to_thread(Steps.entered.wait, 10)
            return ids

    async def second(ids: list[str]) -> None:
        async with serving(tmp_path) as s:
            tab = await s.client().connect()
            Steps.gate.release(1)
            while (await tab.get("/prompt"))["exec_info"]["queue_remaining"]:
                await asyncio.sleep(0.02)
            history = await tab.get("/history")
            assert list(history) == ids
            assert [e["status"]["status_str"] for e in history.values()] == ["success", "error", "success", "success"]
            name, data = history[ids[1]]["status"]["messages"][-1]
            assert name == "execution_interrupted"
            assert "stopped in mid-run" in data["exception_message"]
            _, answer = await tab.post("/prompt", {"prompt": SHOWN})
            assert answer["number"] == 4

    ids = asyncio.run(first())
    kept = b"".join(p.read_bytes() for p in (tmp_path / "user" / "__runs").rglob("*.json"))
    kept += b"".join(gzip.decompress(p.read_bytes()) for p in (tmp_path / "user").rglob("*.json.gz"))
    assert len(kept) > 1000
    assert b"secret" not in kept
    asyncio.run(second(ids))


def test_a_second_server_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path):
            with pytest.raises(FileError, match=r"in use by another server[\s\S]*--user"):
                async with serving(tmp_path):
                    pass

    asyncio.run(scenario())


def test_damaged_files_are_put_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    queue = PromptQueue(tmp_path, lambda: None)
    good = Job(3, str(uuid.uuid4()), SHOWN, {}, ["2"])
    queue.put(good)
    for name, text in {"a": "{", "b": "[]", "c": '{"number": 1}', "d": "\udcff"}.items():
        (tmp_path / "queue" / f"{name}.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    stranger = json.loads((tmp_path / "queue" / f"{good.prompt_id}.json").read_text())
    (tmp_path / "queue" / "e.json").write_text(json.dumps(stranger))  # an id that is not its name
    (tmp_path / "running" / "f.json").write_text("null")
    again = PromptQueue(tmp_path, lambda: None)
    with caplog.at_level(logging.WARNING):
        assert again.restore() == []
    assert [job.prompt_id for job in again.snapshot()[1]] == [good.prompt_id]
    assert again.next_number(front=False) == 4
    assert len(list(tmp_path.rglob("*.damaged"))) == 6
    assert len(caplog.records) == 6

    history = History(tmp_path / "history")
    history.add("x", entry("x"))
    (tmp_path / "history" / "0000000002-y.json.gz").write_bytes(b"\x1f\x8b damaged")
    fresh = History(tmp_path / "history")
    fresh.restore()
    assert [s["id"] for s in fresh.summaries()] == ["x"]


@pytest.mark.slow
def test_killed_in_mid_run_the_server_comes_back_with_its_queue(tmp_path: Path, demo_models: Path) -> None:
    def start() -> tuple[subprocess.Popen[str], str]:
        folders = [f"--{name}={tmp_path / name}" for name in ("out", "input", "user")]
        command = [sys.executable, "-m", "quantwire.cli", "serve", "--port=0", f"--models={demo_models}", *folders]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        line = next(text for text in process.stdout if "http://" in text)
        return process, line.split()[-1].rstrip("/")

    async def fill(base: str) -> tuple[str, list[str]]:
        async with aiohttp.ClientSession() as session:
            tab = await Client(session, base, "tab").connect()
            running = await tab.queue(json.loads(WORKFLOW.read_text(encoding="utf-8")))
            texts = [{"1": {"class_type": "PreviewAny", "inputs": {"source": f"text {i}"}}} for i in range(200)]
            waiting = [await tab.queue(prompt) for prompt in texts]
            heard = await tab.until(lambda kind, _: kind == "executing")
            assert heard[-1][1]["prompt_id"] == running
            return running, waiting

    async def look(base: str, running: str, waiting: list[str]) -> None:
        async with aiohttp.ClientSession() as session:
            tab = Client(session, base, "tab")
            deadline = time.monotonic() + 120
            while (await tab.get("/prompt"))["exec_info"]["queue_remaining"] and time.monotonic() < deadline:
                await asyncio.sleep(0.2)
            history = await tab.get("/history")
            assert list(history) == [running, *waiting]
            assert [e["outputs"]["1"]["text"] for e in history.values() if e["outputs"]][-1] == ["text 199"]
            states = {job["id"]: job["status"] for job in (await tab.get("/api/jobs"))["jobs"]}
            assert states == {running: "cancelled", **dict.fromkeys(waiting, "completed")}
            assert "stopped in mid-run" in history[running]["status"]["messages"][-1][1]["exception_message"]

    process, base = start()
    try:
        running, waiting = asyncio.run(fill(base))
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
        kept = tmp_path / "user" / "__runs"
        assert [p.stem for p in (kept / "running").glob("*.json")] == [running]
        assert len(list((kept / "queue").glob("*.json"))) == 200
        process, base = start()
        asyncio.run(look(base, running, waiting))
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()


# --- bounds ---


def test_history_keeps_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantwire.hosts.standalone.server.history.MAX_ENTRIES", 3)
    history = History(tmp_path)
    for name in "abcde":
        history.add(name, entry(name))
    assert [s["id"] for s in history.summaries()] == ["c", "d", "e"]
    assert sorted(p.name[11:12] for p in tmp_path.glob("*.gz")) == ["c", "d", "e"]
    noise = base64.b64encode(os.urandom(4000)).decode()
    monkeypatch.setattr("quantwire.hosts.standalone.server.history.MAX_NBYTES", 5000)
    history.add("f", entry("f", noise))
    history.add("g", entry("g", noise))
    assert [s["id"] for s in history.summaries()] == ["g"]
    fresh = History(tmp_path)
    fresh.restore()
    assert fresh.get("g") == history.get("g") == entry("g", noise)
    assert json.loads(b"".join(fresh.texts())) == {"g": entry("g", noise)}


def test_summaries_are_read_and_made_anew_only_where_they_do_not_fit(tmp_path: Path) -> None:
    history, index = History(tmp_path), tmp_path / "summaries.jsonl"
    for name in "abc":
        history.add(name, entry(name))
    history.delete(["a"])
    lines = [json.loads(line) for line in index.read_bytes().splitlines()]
    assert [line[1][11:12] for line in lines] == ["b", "c"]
    lines[0][3]["status"] = "from the index"  # fits its entry by its checksum, so the entry is not unpacked
    lines[1][2:] = [1, {"status": "of another entry"}]
    index.write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines) + b'[1, "half')
    fresh = History(tmp_path)
    fresh.restore()
    assert [s["status"] for s in fresh.summaries()] == ["from the index", "completed"]
    assert [json.loads(line)[3] for line in index.read_bytes().splitlines()] == fresh.summaries()


def test_the_index_of_summaries_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantwire.hosts.standalone.server.history.MAX_ENTRIES", 3)
    history = History(tmp_path)
    for name in range(20):
        history.add(str(name), entry(str(name)))
    assert len((tmp_path / "summaries.jsonl").read_bytes().splitlines()) <= 7


def test_one_id_enters_the_queue_once(tmp_path: Path) -> None:
    queue = PromptQueue(tmp_path, lambda: None)
    queue.put(Job(0, "same", {}, {}, []))
    with pytest.raises(KnownId):
        queue.put(Job(1, "same", {}, {}, []))
    assert queue.get() is not None
    with pytest.raises(KnownId):  # it runs
        queue.put(Job(2, "same", {}, {}, []))


def test_a_number_beyond_all_counting_does_not_stop_the_counting(tmp_path: Path) -> None:
    PromptQueue(tmp_path, lambda: None).put(Job(1e308, "far", {}, {}, []))
    queue = PromptQueue(tmp_path, lambda: None)
    queue.restore()
    assert [queue.next_number(False), queue.next_number(False)] == [0, 1]


def test_news_replace_older_news_and_previews_cost_nothing() -> None:
    async def scenario() -> None:
        outbox = events.Outbox("tab", asyncio.get_running_loop())

        def send() -> None:
            for step in range(50_000):
                outbox.put(f"progress {step}", ("progress",))
                outbox.put(b"x" * 1000, ("preview", "7"))
            outbox.put("done")

        thread = threading.Thread(target=send)
        thread.start()
        await asyncio.to_thread(thread.join)
        assert [await outbox.take() for _ in range(3)] == ["progress 49999", b"x" * 1000, "done"]

    asyncio.run(scenario())


def test_a_reader_that_never_reads_is_cut_off_and_costs_nobody_anything(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as s:
            reader = await s.client("tab").connect()
            port = int(s.base.rsplit(":", 1)[1])
            deaf = await asyncio.to_thread(_connect_and_never_read, port)
            while len(s.server.run.events._of("tab")) < 2:
                await asyncio.sleep(0.01)
            text = "x" * 20_000
            start, heard = time.monotonic(), list[tuple[str, Any]]()
            for number in range(1_500):
                s.server.run.events.send("executed", {"number": number, "text": text}, "tab")
                if number % 50 == 49:  # 1 MB
                    heard += await reader.until(lambda kind, data: kind == "executed" and data["number"] % 50 == 49)
            assert [d["number"] for kind, d in heard if kind == "executed"] == list(range(1_500))
            while len(s.server.run.events._of("tab")) > 1:
                await asyncio.sleep(0.01)
                assert time.monotonic() - start < 20
            await reader.queue(SHOWN)
            assert (await reader.until_done())[-2][0] in ("status", "execution_success")
            deaf.close()

    with caplog.at_level(logging.WARNING):
        asyncio.run(scenario())
    assert any("cut off" in r.message for r in caplog.records)


def _connect_and_never_read(port: int) -> socket.socket:
    """A websocket whose system buffer is as small as it gets."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    key = base64.b64encode(os.urandom(16)).decode()
    client.sendall(
        f"GET /ws?clientId=tab HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    return client


def test_a_reader_that_stalls_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "STALL_S", 0.3)

    async def scenario() -> None:
        async with serving(tmp_path) as s:
            deaf = await asyncio.to_thread(_connect_and_never_read, int(s.base.rsplit(":", 1)[1]))
            while not s.server.run.events.connected("tab"):
                await asyncio.sleep(0.01)
            # Less than what counts as too much, more than the system takes.
            for _ in range(60):
                s.server.run.events.send("executed", "x" * 100_000, "tab")
            start = time.monotonic()
            while s.server.run.events.connected("tab"):
                await asyncio.sleep(0.01)
                assert time.monotonic() - start < 10
            deaf.close()

    asyncio.run(scenario())


def test_connections_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_CONNECTIONS", 1)

    async def scenario() -> None:
        async with serving(tmp_path) as s:
            one = await s.client("one").connect()
            with pytest.raises(aiohttp.WSServerHandshakeError, match="503"):
                await s.client("two").connect()
            await one.socket.send_str("no json")
            await one.socket.send_str('{"type": "feature_flags", "data": 5}')
            await one.socket.send_str("x" * 100_000)  # more than the editor ever says: the connection ends
            while s.server.run.events.connected("one"):
                await asyncio.sleep(0.01)
            await s.client("two").connect()

    asyncio.run(scenario())


def test_what_browsers_cannot_parse_becomes_null_or_text() -> None:
    odd = {1: float("nan"), "b": (1, float("inf"), {2}), "c": Path("x"), "d": b"y"}
    assert events.jsonable(odd) == {"1": None, "b": [1, None, [2]], "c": "x", "d": "b'y'"}


# --- previews ---


def test_previews_learn_the_colours_of_the_vae_in_use() -> None:
    gen = torch.Generator().manual_seed(0)
    factors, bias = torch.randn(16, 3, generator=gen) * 0.05, torch.tensor([0.4, 0.5, 0.6])
    coarse = torch.randn(3, 16, 4, 6, generator=gen)
    latents = torch.nn.functional.interpolate(coarse, (16, 24), mode="bicubic").split(1)

    def pixels(latent: torch.Tensor) -> torch.Tensor:
        rgb = (latent.movedim(1, -1) @ factors + bias).clamp(0, 1)
        return rgb.repeat_interleave(8, 1).repeat_interleave(8, 2)

    colors = LatentColors()
    before = colors.picture(latents[2])
    assert before is not None
    assert before.size == (512, 341)
    grey = np.asarray(before)
    assert (grey == grey[..., :1]).all()
    assert grey.std() > 20
    for latent in latents[:2]:
        colors.learn(latent, pixels(latent))
    found = colors.picture(latents[2])
    assert found is not None
    small = torch.tensor(np.asarray(found.reduce(21, (0, 0, 504, 336)))) / 255
    wanted = pixels(latents[2])[0, ::8, ::8]
    assert small.shape == wanted.shape
    assert (small - wanted).abs().mean() < 0.05
    assert torch.corrcoef(torch.stack([small.flatten(), wanted.flatten()]))[0, 1] > 0.9


@pytest.mark.parametrize(
    "latent",
    [torch.zeros(1, 16, 1, 1), torch.full((2, 4, 3, 5), torch.nan), torch.ones(1, 16, 2, 900, dtype=torch.float16)],
    ids=["one place", "nan", "long"],
)
def test_odd_latents_have_previews_or_none(latent: torch.Tensor) -> None:
    colors = LatentColors()
    colors.learn(latent, torch.rand(latent.shape[0], latent.shape[2] * 8, latent.shape[3] * 8, 3))
    picture = colors.picture(latent)
    assert picture is not None
    assert max(picture.size) == 512
    assert colors.picture(latent[0]) is None
    assert colors.picture(latent[:0]) is None
    assert colors.picture(latent[:, :, None]) is None
