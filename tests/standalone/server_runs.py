"""A server in this process on a real port, with small node classes of the test's own, and a client of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import torch
from aiohttp import web
from quantwire.hosts import current
from quantwire.hosts.standalone.progress import progress, show_decoded, show_preview
from quantwire.hosts.standalone.server import runs_libraries
from quantwire.hosts.standalone.server.app import Server, ServerConfig, make_app


class Number:
    """A node that others build upon; how often it ran is counted."""

    RETURN_TYPES = ("INT",)
    FUNCTION = "run"
    runs = 0

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"value": ("INT", {"default": 1, "min": 0, "max": 100})}}

    def run(self, value: int) -> tuple[int]:
        Number.runs += 1
        return (value,)


class Show:
    RETURN_TYPES = ("INT",)
    FUNCTION = "run"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"value": ("INT", {})}, "hidden": {"info": "EXTRA_PNGINFO"}}

    def run(self, value: int, info: Any = None) -> dict[str, Any]:
        current().show_text(f"value {value}")
        return {"ui": {"text": [str(value)], "info": [info], "odd": [math.nan, math.inf]}, "result": (value,)}


class Steps:
    """Counts with a bar and previews, as slowly as the gate lets it; `entered` is set once it runs."""

    RETURN_TYPES = ("INT",)
    FUNCTION = "run"
    OUTPUT_NODE = True
    gate = threading.Semaphore(0)
    entered = threading.Event()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"steps": ("INT", {"default": 3}), "seed": ("INT", {"default": 0})}}

    def run(self, steps: int, seed: int) -> dict[str, Any]:
        Steps.entered.set()
        with progress(steps, "counting") as bar:
            for step in range(steps):
                while not Steps.gate.acquire(timeout=0.01):
                    bar.update(0)
                show_preview(torch.linspace(-1, 1, 16 * 24).reshape(1, 16, 4, 6) + step)
                bar.update()
        show_decoded(torch.ones(1, 16, 4, 6), torch.rand(1, 32, 48, 3))
        return {"ui": {"images": [{"filename": "x.png", "subfolder": "", "type": "output"}]}, "result": (steps,)}


class Fails:
    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"how": (["value", "memory", "exit"],), "value": ("INT", {"default": 0})}}

    def run(self, how: str, value: int = 0) -> None:
        if how == "exit":
            raise SystemExit("a node wanted to leave")
        raise MemoryError("no more") if how == "memory" else ValueError(f"cannot take {value}")


NODES: dict[str, type] = {cls.__name__: cls for cls in (Number, Show, Steps, Fails)}


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


SHOWN = {"1": node("Number", value=5), "2": node("Show", value=["1", 0])}


def steps(count: int, seed: int = 0) -> dict[str, Any]:
    return {"7": node("Steps", steps=count, seed=seed)}


class Client:
    """One editor tab: its socket's messages, and requests."""

    def __init__(self, session: aiohttp.ClientSession, base: str, sid: str) -> None:
        self.session, self.base, self.sid = session, base, sid
        self.socket: Any = None
        self.binary: list[bytes] = []

    async def connect(self, **flags: Any) -> Client:
        self.socket = await self.session.ws_connect(
            f"{self.base}/ws?clientId={self.sid}", headers={"Origin": self.base}
        )
        if flags:
            await self.socket.send_json({"type": "feature_flags", "data": flags})
            await self.until(lambda kind, _: kind == "feature_flags")
        return self

    async def next(self) -> tuple[str, Any]:
        """The next message of text; binary ones before it are kept."""
        while True:
            message = await asyncio.wait_for(self.socket.receive(), 30)
            if message.type is aiohttp.WSMsgType.BINARY:
                self.binary.append(message.data)
                continue
            assert message.type is aiohttp.WSMsgType.TEXT, message
            said = json.loads(message.data)
            return said["type"], said["data"]

    async def until(self, wanted: Callable[[str, Any], bool]) -> list[tuple[str, Any]]:
        """Everything up to and with the wanted message."""
        heard = [await self.next()]
        while not wanted(*heard[-1]):
            heard.append(await self.next())
        return heard

    async def until_done(self, prompt_id: str | None = None) -> list[tuple[str, Any]]:
        def ended(kind: str, data: Any) -> bool:
            return kind == "executing" and data["node"] is None and prompt_id in (None, data["prompt_id"])

        return await self.until(ended)

    async def post(self, path: str, data: Any = None) -> tuple[int, Any]:
        async with self.session.post(self.base + path, json=data) as answer:
            text = await answer.text()
            return answer.status, json.loads(text) if text else None

    async def get(self, path: str) -> Any:
        async with self.session.get(self.base + path) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.json()

    async def queue(self, prompt: Any, **more: Any) -> str:
        status, answer = await self.post("/prompt", {"prompt": prompt, "client_id": self.sid, **more})
        assert status == 200, answer
        return answer["prompt_id"]


class Serving:
    def __init__(self, server: Server, base: str, session: aiohttp.ClientSession) -> None:
        self.server, self.base, self.session = server, base, session

    def client(self, sid: str = "tab") -> Client:
        return Client(self.session, self.base, sid)


@contextlib.asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[Serving]:
    (folder / "front").mkdir(exist_ok=True)
    (folder / "front" / "index.html").write_text("<title>front end</title>", encoding="utf-8")
    config = ServerConfig(
        front_end=folder / "front", output=folder / "out", input=folder / "in", user=folder / "user", port=0
    )
    server = Server(config)
    runs_libraries._loaded.set()  # these nodes need none
    server.__dict__["node_classes"] = NODES  # takes the place of the property's first answer
    Steps.gate, Steps.entered, Number.runs = threading.Semaphore(0), threading.Event(), 0
    runner = web.AppRunner(make_app(server), access_log=None, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    base = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with aiohttp.ClientSession() as session:
            yield Serving(server, base, session)
    finally:
        await runner.cleanup()
