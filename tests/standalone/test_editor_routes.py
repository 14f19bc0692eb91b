"""The pack's routes over HTTP: a real aiohttp server on a real socket, as both hosts register them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from quantwire.hosts import use
from quantwire.hosts.editor import routes
from quantwire.hosts.standalone.host import StandaloneHost

aiohttp = pytest.importorskip("aiohttp", reason="aiohttp is not installed: these routes are those of its servers")
SHIPPED = Path(__file__).resolve().parents[2] / "workflows"
JSON = "application/json"
Ask = Callable[..., Awaitable[tuple[int, Any]]]


def serve(models: Path, work: Callable[[Ask], Awaitable[None]]) -> None:
    """Run `work` against a server with the routes; ask(method, path, body) gives (status, JSON)."""
    from aiohttp import web
    from aiohttp.test_utils import TestClient, TestServer

    async def run() -> None:
        app = web.Application(client_max_size=1024**3)
        app.add_routes([web.route(method, path, handler) for method, path, handler in routes.ROUTES])
        with use(StandaloneHost([models])):
            async with TestClient(TestServer(app)) as client:

                async def ask(method: str, path: str, body: Any = None, kind: str = JSON) -> tuple[int, Any]:
                    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
                    headers = {"Content-Type": kind} if body is not None else {}
                    answer = await client.request(method, path, data=data, headers=headers)
                    assert answer.content_type == "application/json"
                    return answer.status, await answer.json()

                await work(ask)

    asyncio.run(run())


def test_what_the_editor_asks(demo_models: Path) -> None:
    workflow = json.loads((SHIPPED / "conflict.json").read_text(encoding="utf-8"))

    async def work(ask: Ask) -> None:
        status, found = await ask("POST", "/quantwire/check", {"workflow": workflow})
        assert (status, found["host"]) == (200, "standalone")
        assert [f["node"] for f in found["findings"] if f["level"] == "block"] == ["3"]
        status, one = await ask("POST", "/quantwire/sizes", {"workflow": workflow, "node": 2, "formats": ["bnb-nf4"]})
        assert status == 200
        assert one["sizes"]["bnb-nf4"] < one["base_nbytes"]
        status, both = await ask("POST", "/quantwire/sizes", {"workflow": workflow, "nodes": ["2", "3"]})
        assert both["nodes"]["2"]["sizes"]["bnb-nf4"] == one["sizes"]["bnb-nf4"]
        assert list(both["nodes"]["3"]) == ["reason"]
        status, told = await ask("GET", "/quantwire/formats")
        assert status == 200
        assert told["nodes"]["QuantizeModel"]["widget"] == "format"

    serve(demo_models, work)


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("check", b"{", 400, "no JSON"),
        ("check", b"\xff\xfe", 400, "no JSON"),
        ("check", b"[" * 200_000, 400, "no JSON"),
        ("check", b"[]", 400, "no object"),
        ("check", {}, 400, "`workflow`"),
        ("check", {"workflow": []}, 400, "`workflow`"),
        ("check", {"workflow": {"nodes": []}}, 400, "no nodes"),
        ("check", {"prompt": {"1": 5}}, 400, "1"),
        ("sizes", {"workflow": {"nodes": []}, "node": "1"}, 400, "no nodes"),
        ("sizes", {"prompt": {}}, 400, "`node`"),
        ("sizes", {"prompt": {}, "nodes": "12"}, 400, "`nodes`"),
        ("sizes", {"prompt": {}, "nodes": [{}]}, 400, "`nodes`"),
        ("sizes", {"prompt": {}, "nodes": list(range(1000))}, 400, "`nodes`"),
    ],
    ids=lambda v: repr(v)[:30],
)
def test_a_bad_question_has_a_reason(demo_models: Path, path: str, body: Any, status: int, said: str) -> None:
    async def work(ask: Ask) -> None:
        got, found = await ask("POST", f"/quantwire/{path}", body)
        assert got == status
        assert list(found) == ["error"]
        assert said in found["error"]
        assert "Traceback" not in found["error"]

    serve(demo_models, work)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_what_another_site_can_send_is_refused(demo_models: Path, kind: str) -> None:
    """A page of any site may post these kinds to this machine without asking it first."""

    async def work(ask: Ask) -> None:
        for path in ("check", "sizes"):
            status, found = await ask("POST", f"/quantwire/{path}", {"prompt": {}}, kind)
            assert status == 415
            assert "application/json" in found["error"]
        status, _ = await ask("POST", "/quantwire/check", {"prompt": {}}, "application/json; charset=utf-8")
        assert status == 400

    serve(demo_models, work)


def test_sizes_do_not_wait_for_a_check(demo_models: Path) -> None:
    """The check of a large graph takes a second or so."""
    steps = {str(k): {"class_type": "OffloadCompat", "inputs": {"model": [str(k - 1), 0]}} for k in range(1, 4000)}

    async def work(ask: Ask) -> None:
        question = {"prompt": {"1": {"class_type": "KSampler", "inputs": {}}}, "node": "1"}
        await ask("POST", "/quantwire/sizes", question)
        long = asyncio.ensure_future(ask("POST", "/quantwire/check", {"prompt": steps}))
        while not routes.waiting():
            await asyncio.sleep(0)
        assert (await ask("POST", "/quantwire/sizes", question))[0] == 200
        assert not long.done()
        assert (await long)[0] == 200

    serve(demo_models, work)


def test_a_body_that_is_too_large_is_not_read(demo_models: Path) -> None:
    async def work(ask: Ask) -> None:
        status, found = await ask("POST", "/quantwire/check", b" " * (routes.MOST_NBYTES + 1))
        assert status == 413
        assert "32 MiB" in found["error"]

    serve(demo_models, work)


def test_the_event_loop_goes_on(demo_models: Path) -> None:
    """While questions are answered, and beyond so many at a time the server says so at once."""
    workflow = json.loads((SHIPPED / "conflict.json").read_text(encoding="utf-8"))

    async def work(ask: Ask) -> None:
        await ask("POST", "/quantwire/check", {"workflow": workflow})
        question = [ask("POST", "/quantwire/check", {"workflow": workflow}) for _ in range(3 * routes.MOST_WAITING)]
        answers = [status for status, _ in await asyncio.gather(*question)]
        assert set(answers) == {200, 429}
        assert answers.count(200) >= routes.MOST_WAITING
        status, _ = await ask("POST", "/quantwire/check", {"workflow": workflow})
        assert status == 200

    serve(demo_models, work)


def test_no_server_no_routes() -> None:
    """`register` finds ComfyUI's server only where this process runs one."""
    assert routes.register() is False
