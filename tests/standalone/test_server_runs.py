"""Prompts, runs and what the editor hears of them: a real server on a real port, with small nodes."""

from __future__ import annotations

import asyncio
import gzip
import json
import struct
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("aiohttp", reason="the server needs aiohttp, of the extra `editor`")

import aiohttp
from quantwire.hosts.standalone.executor import Executor
from quantwire.hosts.standalone.progress import Interrupted

from .server_runs import NODES, SHOWN, Number, Serving, Steps, node, serving, steps

Scenario = Callable[[Callable[[Serving], Awaitable[None]]], None]


@pytest.fixture
def on_server(tmp_path: Path) -> Scenario:
    """Run a scenario against a server of its own."""

    def run(scenario: Callable[[Serving], Awaitable[None]]) -> None:
        async def main() -> None:
            async with serving(tmp_path) as s:
                await asyncio.wait_for(scenario(s), 50)

        asyncio.run(main())

    return run


def of(heard: list[tuple[str, Any]], kind: str) -> list[Any]:
    return [data for what, data in heard if what == kind]


def test_a_run_is_told_as_comfyui_tells_it(on_server: Scenario) -> None:
    async def scenario(s: Serving) -> None:
        tab = await s.client().connect(supports_preview_metadata=True)
        prompt_id = await tab.queue(SHOWN, extra_data={"extra_pnginfo": {"workflow": {"id": "w"}}})
        heard = await tab.until_done()
        order = [kind for kind, _ in heard if kind not in ("status", "progress_state")]
        assert order == [
            "execution_start", "execution_cached", "executing", "executing", "executed", "execution_success",
            "executing",
        ]  # fmt: skip
        assert all(data["prompt_id"] == prompt_id for kind, data in heard if kind != "status")
        shown = {"text": ["5"], "info": [{"workflow": {"id": "w"}}], "odd": [None, None]}
        assert of(heard, "executed")[0] == {"node": "2", "display_node": "2", "prompt_id": prompt_id, "output": shown}
        last = of(heard, "progress_state")[-1]["nodes"]
        assert {n: (v["state"], v["value"], v["max"]) for n, v in last.items()} == {
            "1": ("finished", 1, 1),
            "2": ("finished", 1, 1),
        }
        assert of(heard, "status")[-1] == {"status": {"exec_info": {"queue_remaining": 0}}}
        (text,) = tab.binary
        assert text == struct.pack(">II", 3, 1) + b"2" + b"value 5"
        entry = (await tab.get(f"/history/{prompt_id}"))[prompt_id]
        assert entry["outputs"] == {"2": shown}
        assert (entry["status"]["status_str"], entry["status"]["completed"]) == ("success", True)
        assert [m[0] for m in entry["status"]["messages"]] == [
            "execution_start", "execution_cached", "execution_success",
        ]  # fmt: skip
        assert entry["prompt"][2] == SHOWN
        assert entry["meta"]["2"]["display_node"] == "2"

    on_server(scenario)


def test_a_second_run_is_cached_and_still_shows_its_outputs(on_server: Scenario) -> None:
    async def scenario(s: Serving) -> None:
        tab = await s.client().connect()
        await tab.queue(SHOWN)
        await tab.until_done()
        await tab.queue(SHOWN)
        heard = await tab.until_done()
        assert sorted(of(heard, "execution_cached")[0]["nodes"]) == ["1", "2"]
        assert of(heard, "executed")[0]["output"]["text"] == ["5"]
        assert Number.runs == 1
        await tab.post("/free", {"free_memory": True})
        await asyncio.sleep(0.2)  # a prompt that comes at once may run before
        await tab.queue(SHOWN)
        assert of(await tab.until_done(), "execution_cached")[0]["nodes"] == []
        assert Number.runs == 2

    on_server(scenario)


def test_progress_and_previews_come_in_the_form_that_the_client_understands(on_server: Scenario) -> None:
    async def scenario(s: Serving) -> None:
        new, old = await s.client().connect(supports_preview_metadata=True), await s.client().connect()
        Steps.gate.release(1)
        prompt_id = await new.queue(steps(2))
        await new.until(lambda kind, data: kind == "progress" and data["value"] == 1)
        Steps.gate.release(1)
        heard = await new.until_done()
        assert of(heard, "progress")[-1] == {"value": 2, "max": 2, "prompt_id": prompt_id, "node": "7"}
        await old.until_done()
        kind, length = struct.unpack(">II", new.binary[0][:8])
        about = json.loads(new.binary[0][8 : 8 + length])
        assert kind == 4
        assert (about["node_id"], about["prompt_id"], about["image_type"]) == ("7", prompt_id, "image/jpeg")
        assert new.binary[0][8 + length :].startswith(b"\xff\xd8")
        assert struct.unpack(">II", old.binary[0][:8]) == (1, 1)
        assert old.binary[0][8:].startswith(b"\xff\xd8")

    on_server(scenario)


def test_no_previews_when_the_editor_wants_none(on_server: Scenario) -> None:
    async def scenario(s: Serving) -> None:
        tab = await s.client().connect()
        Steps.gate.release(2)
        await tab.queue(steps(2), extra_data={"preview_method": "none"})
        await tab.until_done()
        assert tab.binary == []

    on_server(scenario)


def test_what_is_wrong_is_said_node_by_node(on_server: Scenario) -> None:
    async def scenario(s: Serving) -> None:
        tab = s.client()
        status, answer = await tab.post("/prompt", {"prompt": {"1": node("Number", value=101), "2": SHOWN["2"]}})
        assert status == 400
        assert answer["error"]["type"] == "prompt_outputs_failed_validation"
        found = answer["node_errors"]["1"]
        assert (found["class_type"], found["dependent_outputs"]) == ("Number", ["2"])
        (fault,) = found["errors"]
        assert fault["type"] == "value_bigger_than_max"
        assert fault["extra_info"] == {"input_name": "value", "received_value": 101}
        assert "101" in fault["details"]
        status, answer = await tab.post("/prompt", {"prompt": {**SHOWN, "3": node("NoSuchNode")}})
        assert (status, answer["error"]["type"]) == (400, "missing_node_type")
        assert answer["error"]["extra_info"]["class_type"] == "NoSuchNode"
        assert list(answer["node_errors"]) == ["3"]
        status, answer = await tab.post("/prompt", {"prompt": {"1": SHOWN["1"]}})
        assert (status, answer["error"]["type"]) == (400, "prompt_no_outputs")

    on_server(scenario)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({}, "no_prompt"),
        ({"prompt": {}}, "prompt_no_outputs"),
        ({"prompt": []}, "invalid_prompt"),
        ({"prompt": {"1": 5}}, "invalid_prompt"),
        ({"prompt": {"nodes": [], "links": []}}, "invalid_prompt"),
        ({"prompt": SHOWN, "prompt_id": "../../x"}, "invalid_prompt_id"),
        ({"prompt": SHOWN, "prompt_id": 7}, "invalid_prompt_id"),
        ({"prompt": SHOWN, "number": "first"}, "invalid_request"),
        ({"prompt": SHOWN, "extra_data": []}, "invalid_request"),
        ({"prompt": SHOWN, "client_id": {}}, "invalid_request"),
        ({"prompt": SHOWN, "partial_execution_targets": "2"}, "invalid_request"),
        ({"prompt": SHOWN, "partial_execution_targets": ["1"]}, "prompt_no_outputs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_malformed_prompt_is_refused(on_server: Scenario, body: dict[str, Any], kind: str) -> None:
    async def scenario(s: Serving) -> None:
        status, answer = await s.client().post("/prompt", body)
        assert (status, answer["error"]["type"]) == (400, kind)
        assert set(answer["error"]) == {"type", "message", "details", "extra_info"}

    on_server(scenario)


def test_good_outputs_run_beside_bad_ones_and_targets_alone(on_server: Scenario) -> None:
    async def scenario(s: Serving) -> None:
        tab = await s.client().connect()
        two = {**SHOWN, "3": node("Number", value=-1), "4": node("Show", value=["3", 0])}
        _, answer = await tab.post("/prompt", {"prompt": two, "client_id": "tab"})
        assert answer["node_errors"]["3"]["dependent_outputs"] == ["4"]
        heard = await tab.until_done()
        assert [d["node"] for d in of(heard, "executed")] == ["2"]
        two["3"]["inputs"]["value"] = 9
        await tab.queue(two, partial_execution_targets=["4"])
        heard = await tab.until_done()
        assert [d["node"] for d in of(heard, "executed")] == ["4"]
        runs = Number.runs
        for targets, nodes in ((None, ["1", "2", "3", "4"]), (["2"], ["1", "2"]), (None, ["1", "2", "3", "4"])):
            await tab.queue(two, partial_execution_targets=targets)
            assert sorted(of(await tab.until_done(), "execution_cached")[0]["nodes"]) == nodes
        assert Number.runs == runs  # what was not asked for is kept for when it is

    on_server(scenario)


def test_a_failing_node_is_marked_and_the_next_prompt_runs(on_server: Scenario) -> None:
    async def scenario(s: Serving) -> None:
        tab = await s.client().connect()
        failing = {"1": SHOWN["1"], "5": node("Fails", how="value", value=["1", 0])}
        prompt_id = await tab.queue(failing)
        heard = await tab.until_done()
        (error,) = of(heard, "execution_error")
        assert (error["node_id"], error["node_type"], error["exception_type"]) == ("5", "Fails", "ValueError")
        assert error["exception_message"] == "cannot take 5"
        assert error["executed"] == ["1"]
        assert error["current_inputs"] == {"how": ["value"], "value": ["output 0 of node 1"]}
        assert len(error["traceback"]) == 1
        assert "server_runs.py" in error["traceback"][0]
        assert of(heard, "progress_state")[-1]["nodes"]["5"]["state"] == "error"
        (job,) = (await tab.get("/api/jobs?status=failed"))["jobs"]
        assert (job["id"], job["execution_error"]["node_id"]) == (prompt_id, "5")
        for how in ("memory", "exit"):
            await tab.queue({"5": node("Fails", how=how, value=0)})
            (error,) = of(await tab.until_done(), "execution_error")
            if how == "memory":
                assert error["exception_type"] == "MemoryError"
                assert error["exception_message"].startswith("no more\n")
                assert "batch_size" in error["exception_message"]
            else:
                assert error["exception_message"] == "a node wanted to leave"
        await tab.queue(SHOWN)
        heard = await tab.until_done()
        assert of(heard, "execution_success")
        assert of(heard, "execution_cached")[0]["nodes"] == []  # memory ran out: nothing was kept

    on_server(scenario)


def test_interrupt_stops_the_run_in_progress_and_no_other(on_server: Scenario) -> None:
    async def scenario(s: Serving) -> None:
        tab = await s.client().connect()
        running, waiting = await tab.queue(steps(2)), await tab.queue(steps(2, seed=1))
        await asyncio.to_thread(Steps.entered.wait, 10)
        await tab.post("/interrupt", {"prompt_id": waiting})  # does not run: nothing to stop
        Steps.gate.release(1)
        await tab.until(lambda kind, data: kind == "progress" and data["value"] == 1)
        await tab.post("/interrupt", {"prompt_id": running})
        heard = await tab.until_done(running)
        (stopped,) = of(heard, "execution_interrupted")
        assert (stopped["prompt_id"], stopped["node_id"], stopped["node_type"]) == (running, "7", "Steps")
        Steps.gate.release(2)
        assert of(await tab.until_done(waiting), "execution_success")
        states = {j["id"]: j["status"] for j in (await tab.get("/api/jobs"))["jobs"]}
        assert states == {running: "cancelled", waiting: "completed"}
        entry = (await tab.get("/history"))[running]
        assert entry["status"]["status_str"] == "error"
        await tab.post("/interrupt")  # nothing runs
        await tab.queue(SHOWN)
        assert of(await tab.until_done(), "execution_success")

    on_server(scenario)


def test_jobs_are_cancelled_wherever_they_are(on_server: Scenario) -> None:
    async def scenario(s: Serving) -> None:
        tab = await s.client().connect()
        ids = [await tab.queue(steps(1, seed=i)) for i in range(3)]
        await asyncio.to_thread(Steps.entered.wait, 10)
        assert await tab.post(f"/api/jobs/{ids[1]}/cancel") == (200, {"cancelled": True})
        assert await tab.post("/api/jobs/cancel", {"job_ids": ids}) == (200, {"cancelled": True})
        await tab.until_done(ids[0])
        assert await tab.post("/api/jobs/cancel", {"job_ids": ids}) == (200, {"cancelled": False})
        assert (await tab.post("/api/jobs/cancel", {"job_ids": ["x"]}))[0] == 400
        assert [j["id"] for j in (await tab.get("/api/jobs"))["jobs"]] == [ids[0]]
        full = await tab.get(f"/api/jobs/{ids[0]}")
        assert full["workflow"]["prompt"] == steps(1)
        assert (await tab.post("/api/jobs?status=odd"))[0] == 405

    on_server(scenario)


def test_a_reloaded_tab_finds_the_run_again(on_server: Scenario) -> None:
    async def scenario(s: Serving) -> None:
        tab = await s.client().connect(supports_preview_metadata=True)
        prompt_id = await tab.queue({**SHOWN, **steps(2)})
        Steps.gate.release(1)
        await tab.until(lambda kind, data: kind == "progress" and data["value"] == 1)
        await tab.socket.close()
        again, other = await s.client().connect(), await s.client("other").connect()
        await again.socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
        heard = await again.until(lambda kind, _: kind == "progress")
        kinds = [kind for kind, _ in heard]
        assert kinds[:4] == ["status", "execution_start", "execution_cached", "executed"]
        assert of(heard, "executing")[-1] == {"node": "7", "display_node": "7", "prompt_id": prompt_id}
        assert of(heard, "progress_state")[-1]["nodes"]["7"]["value"] == 1
        assert of(heard, "progress")[-1]["value"] == 1
        Steps.gate.release(1)
        heard = await again.until_done()
        assert [d["node"] for d in of(heard, "executed")][-2:] == ["2", "7"]  # once more, now that the page has nodes
        assert struct.unpack(">I", again.binary[0][:4]) == (4,)
        heard = await other.until(lambda kind, d: kind == "status" and not d["status"]["exec_info"]["queue_remaining"])
        assert {kind for kind, _ in heard} == {"status"}
        assert other.binary == []

    on_server(scenario)


def test_two_clients_hear_of_their_own_runs_only(on_server: Scenario) -> None:
    async def scenario(s: Serving) -> None:
        one, two = await s.client("one").connect(), await s.client("two").connect()
        first = await one.queue(SHOWN)
        second = await two.queue({"1": node("Number", value=6), "2": SHOWN["2"]})
        for client, own in ((one, first), (two, second)):
            heard = await client.until_done()
            assert {d["prompt_id"] for kind, d in heard if kind != "status"} == {own}
        nobody = (await one.post("/prompt", {"prompt": {"1": node("Number", value=7), "2": SHOWN["2"]}}))[1]
        for _ in range(100):
            if nobody["prompt_id"] in await one.get("/history"):
                break
            await asyncio.sleep(0.05)
        assert (await one.get("/history"))[nobody["prompt_id"]]["outputs"]["2"]["text"] == ["7"]

    on_server(scenario)


def test_two_hundred_prompts_wait_in_their_order(on_server: Scenario) -> None:
    async def scenario(s: Serving) -> None:
        tab = await s.client().connect()
        first = await tab.queue(steps(1))
        await asyncio.to_thread(Steps.entered.wait, 10)
        bodies = [{"prompt": {"1": node("Number", value=i % 100), "2": SHOWN["2"]}} for i in range(200)]
        answers = await asyncio.gather(*(tab.post("/prompt", b) for b in bodies))
        assert {status for status, _ in answers} == {200}
        urgent = await tab.queue(SHOWN, front=True)
        queue = await tab.get("/api/queue")
        assert [job[1] for job in queue["queue_running"]] == [first]
        waiting = [job[1] for job in queue["queue_pending"]]
        assert waiting[0] == urgent
        in_order = sorted((a["number"], a["prompt_id"]) for _, a in answers)
        assert waiting[1:] == [prompt_id for _, prompt_id in in_order]
        assert (await tab.get("/prompt"))["exec_info"]["queue_remaining"] == 202
        pages = await tab.get("/api/jobs?status=pending&limit=50&offset=190")
        assert (len(pages["jobs"]), pages["pagination"]["total"]) == (11, 201)
        await tab.post("/queue", {"delete": waiting[40:]})
        Steps.gate.release(1)
        while (await tab.get("/prompt"))["exec_info"]["queue_remaining"]:
            await asyncio.sleep(0.05)
        ended = await tab.get("/history?max_items=1000")
        assert list(ended) == [first, *waiting[:40]]
        assert all(e["status"]["status_str"] == "success" for e in ended.values())
        assert len(await tab.get("/history?max_items=10&offset=5")) == 10
        await tab.post("/history", {"clear": True})
        assert await tab.get("/history") == {}

    on_server(scenario)


def test_a_full_queue_says_so(on_server: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantwire.hosts.standalone.server.queue.MAX_PENDING", 1)

    async def scenario(s: Serving) -> None:
        tab = s.client()
        await tab.queue(steps(1))
        await asyncio.to_thread(Steps.entered.wait, 10)
        await tab.queue(SHOWN)
        status, answer = await tab.post("/prompt", {"prompt": SHOWN})
        assert (status, answer["error"]["type"]) == (429, "queue_full")
        await tab.post("/queue", {"clear": True})
        assert (await tab.get("/queue"))["queue_pending"] == []
        await tab.queue(SHOWN)

    on_server(scenario)


def test_a_prompt_id_counts_once(on_server: Scenario) -> None:
    async def scenario(s: Serving) -> None:
        tab = await s.client().connect()
        chosen = str(uuid.uuid4())
        assert await tab.queue(SHOWN, prompt_id=chosen) == chosen
        await tab.until_done()
        status, answer = await tab.post("/prompt", {"prompt": SHOWN, "prompt_id": chosen})
        assert (status, answer["error"]["type"]) == (400, "invalid_prompt_id")

    on_server(scenario)


def test_a_run_can_be_cancelled_before_it_begins_and_results_be_forgotten() -> None:
    executor, cancel = Executor(NODES), threading.Event()
    cancel.set()
    Number.runs = 0
    with pytest.raises(Interrupted):
        executor.run(SHOWN, cancel=cancel)
    assert Number.runs == 0
    executor.run(SHOWN)
    executor.interrupt()  # nothing runs, so this is for nobody
    assert executor.run(SHOWN).cached == ["1", "2"]
    executor.forget()
    assert executor.run(SHOWN, targets=["2"]).cached == []
    Steps.gate, Steps.entered = threading.Semaphore(0), threading.Event()
    thread = threading.Thread(target=lambda: executor.run(steps(1)))
    thread.start()
    Steps.entered.wait(10)
    with pytest.raises(RuntimeError, match="running"):
        executor.forget()
    Steps.gate.release(1)
    thread.join(10)
    assert not thread.is_alive()


def test_a_deep_workflow_is_shown_while_it_waits_and_a_deeper_one_is_refused(on_server: Scenario) -> None:
    def nested(levels: int) -> Any:
        made: Any = []
        for _ in range(levels):
            made = [made]
        return made

    async def scenario(s: Serving) -> None:
        tab = await s.client().connect()
        await tab.queue(steps(2))
        deep = await tab.queue(SHOWN, extra_data={"extra_pnginfo": {"x": nested(90)}})
        status, answer = await tab.post("/prompt", {"prompt": SHOWN, "extra_data": {"x": nested(200)}})
        assert (status, "levels" in answer["error"]) == (400, True)
        queue = await tab.get("/queue")
        ((number, prompt_id, prompt, extra, outputs),) = queue["queue_pending"]
        assert (number, prompt_id, prompt, outputs) == (1, deep, SHOWN, ["2"])
        assert extra["extra_pnginfo"] == {"x": nested(90)}
        Steps.gate.release(2)
        await tab.until_done(deep)
        assert (await tab.get(f"/history/{deep}"))[deep]["prompt"][3] == extra

    on_server(scenario)


def test_memory_that_is_freed_before_the_first_run_is_not_freed_after_it(on_server: Scenario) -> None:
    async def scenario(s: Serving) -> None:
        tab = await s.client().connect()
        assert (await tab.post("/free", {"unload_models": True}))[0] == 200
        await tab.queue(SHOWN)
        await tab.until_done()
        await tab.queue(SHOWN)
        assert of(await tab.until_done(), "execution_cached")[0]["nodes"] == ["1", "2"]

    on_server(scenario)


def test_the_history_is_unpacked_beside_the_event_loop(on_server: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(s: Serving) -> None:
        tab = await s.client().connect()
        for _ in range(3):
            await tab.queue(SHOWN)
            await tab.until_done()
        threads: list[int] = []
        real = gzip.decompress

        def unpack(data: bytes) -> bytes:
            threads.append(threading.get_ident())
            return real(data)

        monkeypatch.setattr(gzip, "decompress", unpack)
        assert len(await tab.get("/history")) == 3
        assert len(threads) == 3
        assert threading.get_ident() not in threads

    on_server(scenario)


def test_a_prompt_waits_while_libraries_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loading, loaded = threading.Event(), threading.Event()

    def load() -> None:
        loading.set()
        loaded.wait(30)

    async def scenario() -> None:
        async with serving(tmp_path) as s:
            monkeypatch.setattr("quantwire.hosts.standalone.server.runs_libraries.load", load)
            tab = await s.client().connect()
            await tab.queue(SHOWN)
            assert await asyncio.to_thread(loading.wait, 20)
            start.append(time.monotonic())

    start: list[float] = []
    try:
        asyncio.run(scenario())
        assert time.monotonic() - start[0] < 5
        kept = tmp_path / "user" / "__runs"
        assert (len(list((kept / "queue").iterdir())), list((kept / "running").iterdir())) == (1, [])
    finally:
        loaded.set()


def test_a_sleeping_client_is_asked_whether_it_is_there(on_server: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantwire.hosts.standalone.server.events.HEARTBEAT_S", 0.2)

    async def scenario(s: Serving) -> None:
        async with s.session.ws_connect(f"{s.base}/ws?clientId=a", autoping=False) as socket:
            kinds = {(await socket.receive(5)).type for _ in range(3)}
        assert aiohttp.WSMsgType.PING in kinds

    on_server(scenario)


def test_old_previews_are_removed_and_nothing_else(tmp_path: Path) -> None:
    temp = tmp_path / "out" / "temp"
    temp.mkdir(parents=True)
    for name in ("preview_00001_.png", "preview_00002_.png.tmp", "mine.png", "preview_a.png"):
        (temp / name).write_bytes(b"x")

    async def scenario() -> None:
        async with serving(tmp_path):
            assert sorted(p.name for p in temp.iterdir()) == ["mine.png", "preview_a.png"]
            (temp / "preview_00007_.png").write_bytes(b"x")

    asyncio.run(scenario())
    assert sorted(p.name for p in temp.iterdir()) == ["mine.png", "preview_a.png"]
