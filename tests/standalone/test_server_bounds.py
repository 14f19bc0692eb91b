"""What one client may cost the others: bodies, pictures, connections and names; on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("aiohttp", reason="the server needs aiohttp, of the extra `editor`")

from quantwire.hosts.standalone.images import save_pngs
from quantwire.hosts.standalone.server import pictures
from quantwire.hosts.standalone.server.answers import Refused
from quantwire.hosts.standalone.server.app import Server, ServerConfig
from quantwire.hosts.standalone.server.confine import inside
from quantwire.hosts.standalone.server.connections import MAX_CONNECTIONS, Connections
from quantwire.hosts.standalone.server.logs import LogLines
from quantwire.hosts.standalone.server.security import refuse_host
from quantwire.hosts.standalone.server.userdata import _delete, _list, _tree
from quantwire.quantizers.errors import WorkflowError
from server_process import ServerProcess, serving

MIB = 1 << 20


# --- bodies ---


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/prompt", b'{"prompt":{"1":{"inputs":{"a":[' + b"[]," * 2_000_000 + b"[]]}}}}", 413),
        ("/prompt", b'{"prompt":"' + b"x" * 9 * MIB + b'"}', 413),
        ("/queue", b'{"a":[' + b"1.5," * 400_000 + b"1]}", 413),
        ("/history", b'{"a":"' + b"x" * 2 * MIB + b'"}', 413),
        ("/settings", b'{"a":"' + b"x" * 2 * MIB + b'"}', 413),
        ("/queue", b'{"a":' + nested(150) + b"}", 400),
        ("/prompt", b'{"prompt":{},"number":1' + b"0" * 4001 + b"}", 400),
        ("/prompt", b'{"prompt":{},"number":1e308}', 400),
    ],
    ids=["values", "long", "queue", "history", "settings", "deep", "digits", "number"],
)
def test_a_body_that_costs_too_much_is_refused_at_once(
    server_process: ServerProcess, path: str, body: bytes, status: int
):
    start = time.monotonic()
    answer = server_process.ask(f"/api{path}", body)
    assert answer.status == status, answer.body[:200]
    assert answer.json()["error"]
    assert time.monotonic() - start < 5


def test_user_data_may_be_longer_than_what_is_parsed(server_process: ServerProcess):
    assert server_process.ask("/userdata/large.json", b"x" * 9 * MIB).status == 200


def test_an_error_does_not_repeat_a_large_value(server_process: ServerProcess):
    prompt = {"1": {"class_type": "SaveImage", "inputs": {"filename_prefix": [0] * 50_000, "images": {"x": "y" * MIB}}}}
    answer = server_process.ask("/prompt", {"prompt": prompt})
    assert (answer.status, len(answer.body) < 20_000) == (400, True), len(answer.body)
    assert set(answer.json()["node_errors"]) == {"1"}


# --- pictures ---


def test_no_picture_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from PIL import EpsImagePlugin

    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\necho called > {tmp_path}/called\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow looks once and remembers
    picture = tmp_path / "e.png"
    Image.new("RGB", (4, 4)).save(picture, "EPS")
    for look in (
        lambda: pictures.smaller(picture, "webp", 90, False),
        lambda: pictures.channel(picture, "rgb"),
        lambda: pictures.masked(picture, io.BytesIO(picture.read_bytes())),
    ):
        with pytest.raises(Refused, match="cannot be opened as a picture"):
            look()
    assert not (tmp_path / "called").exists()


def test_previews_are_small_and_few_at_a_time(tmp_path: Path):
    wide = tmp_path / "wide.png"
    Image.new("RGB", (6000, 30)).save(wide)
    body, _ = pictures.smaller(wide, "webp", 90, False)
    assert Image.open(io.BytesIO(body)).size == (2048, 10)
    assert Image.MAX_IMAGE_PIXELS is not None
    assert pictures.MAX_PIXELS < Image.MAX_IMAGE_PIXELS  # above, Pillow warns on the terminal
    server, now, most = Server(ServerConfig(tmp_path)), [0], [0]

    def look() -> None:
        now[0] += 1
        most[0] = max(most[0], now[0])
        time.sleep(0.02)
        now[0] -= 1

    async def all_at_once() -> None:
        await asyncio.gather(*(server.with_pictures(look) for _ in range(8)))

    asyncio.run(all_at_once())
    assert most == [2]


# --- files ---


def test_a_file_is_sent_and_not_its_packed_neighbour(server_process: ServerProcess):
    base = server_process.base
    headers = {"Accept-Encoding": "gzip, br"}
    for folder, path in (
        (base / "out", "/view?filename=n.png"),
        (base / "user" / "default", "/userdata/n.png"),
        (base / "front_end", "/n.png"),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "n.png").write_bytes(b"mine")
        for suffix in (".gz", ".br"):
            (folder / f"n.png{suffix}").write_bytes(b"other")
        answer = server_process.ask(path, headers=headers)
        assert (answer.status, answer.body, answer.headers.get("Content-Encoding")) == (200, b"mine", None), path
        part = server_process.ask(path, headers={**headers, "Range": "bytes=1-2"})
        assert (part.status, part.body) == (206, b"in")
        again = server_process.ask(path, headers={**headers, "If-None-Match": answer.headers["ETag"]})
        assert (again.status, again.body) == (304, b"")


def test_templates_are_workflows_and_pictures_and_pages_have_a_policy(server_process: ServerProcess):
    for name in ("build.py", "memory.txt", "__init__.py", "api/quantized.json/x"):
        assert server_process.ask(f"/api/workflow_templates/quantwire/{name}").status in (404, 403), name
    for name in ("quantized.json", "quantized.jpg"):
        assert server_process.ask(f"/api/workflow_templates/quantwire/{name}").status == 200, name
    page = server_process.ask("/index.html")
    assert page.headers["Content-Security-Policy"] == server_process.ask("/").headers["Content-Security-Policy"]
    assert "script-src" in page.headers["Content-Security-Policy"]


def test_a_listing_beside_deletes(tmp_path: Path):
    done = threading.Event()
    names = [tmp_path / f"{n}.json" for n in range(60)]

    def churn() -> None:
        while not done.is_set():
            for path in names:
                path.write_bytes(b"")
            for path in names:
                path.unlink()

    other = threading.Thread(target=churn)
    other.start()
    try:
        for _ in range(60):
            assert all(info["size"] == 0 for info in _list(tmp_path, ".", True, True, False))
            assert all(entry["size"] == 0 for entry in _tree(tmp_path, ""))
            for path in names[::20]:
                with contextlib.suppress(Refused):  # 404 and nothing else
                    _delete(tmp_path, path.name)
                with contextlib.suppress(FileNotFoundError):
                    path.write_bytes(b"")
    finally:
        done.set()
        other.join()


@pytest.mark.skipif(os.name == "nt", reason="there a backslash is a separator already")
def test_a_prefix_from_windows_makes_a_folder(tmp_path: Path):
    ((path, subfolder),) = save_pngs(torch.zeros(1, 2, 2, 3), tmp_path, "C:\\folder\\img", 1, None, None)
    assert (path, subfolder) == (tmp_path / "C:" / "folder" / "img_00001_.png", "C:/folder")
    assert inside(tmp_path, f"{subfolder}/{path.name}").is_file()
    with pytest.raises(WorkflowError, match="leads out"):
        save_pngs(torch.zeros(1, 2, 2, 3), tmp_path, "..\\img", 1, None, None)


@pytest.mark.parametrize("odd", ["\x00", "\n", "\x7f", "\ud800"])
def test_a_prefix_that_no_file_can_have_is_named(tmp_path: Path, odd: str):
    with pytest.raises(WorkflowError, match="holds the character") as caught:
        save_pngs(torch.zeros(1, 2, 2, 3), tmp_path, f"a{odd}b", 1, None, None)
    assert ascii(odd) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# --- who may ask ---


@pytest.mark.parametrize(
    ("host", "bound", "asked", "answers"),
    [
        ("mybox.lan", "192.168.1.5", "192.168.1.5:8199", True),
        ("mybox.lan", "192.168.1.5", "mybox.lan:8199", True),
        ("mybox.lan", "192.168.1.5", "192.168.1.6:8199", False),
        ("0", "0.0.0.0", "192.168.1.6:8199", True),
        ("", "::", "192.168.1.6:8199", True),
        ("0", "0.0.0.0", "evil.example", False),
    ],
)
def test_a_server_answers_under_the_address_that_it_printed(host: str, bound: str, asked: str, answers: bool):
    assert (refuse_host([asked], ServerConfig(Path(), host=host, bound=bound)) is None) is answers


@pytest.mark.slow
def test_a_short_word_for_every_address(tmp_path: Path):
    with serving(tmp_path, "--host=0") as server:
        assert server.ask("/", headers={"Host": f"10.1.2.3:{server.port}"}).status == 200
        assert server.ask("/", headers={"Host": "evil.example"}).status == 403


# --- connections ---


def test_silent_connections_make_room(server_process: ServerProcess):
    with contextlib.ExitStack() as stack:
        address = ("127.0.0.1", server_process.port)
        silent = [stack.enter_context(socket.create_connection(address, 10)) for _ in range(MAX_CONNECTIONS + 20)]
        assert server_process.ask("/features", timeout=10).status == 200
        for first in silent[:15]:
            with contextlib.suppress(ConnectionResetError):
                assert first.recv(1) == b""
    assert server_process.ask("/features", timeout=10).status == 200


def test_a_connection_must_say_what_it_wants(tmp_path: Path):
    class Echo(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.transport.write(data)

    async def closed(reader: asyncio.StreamReader) -> bool:
        try:
            return await asyncio.wait_for(reader.read(1), 0.7) == b""
        except ConnectionResetError:
            return True
        except asyncio.TimeoutError:
            return False

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Connections(Echo, most=2, header_s=0.3), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        for part in (b"GET / HTTP/1.1\r\n", b"\r", b"\n"):
            opened[0][1].write(part)
            assert await opened[0][0].readexactly(len(part)) == part
        assert [await closed(reader) for reader, _ in opened] == [False, True]
        # Both places are in use by those who asked: a third is turned away, and gets in when one of them leaves.
        second = await asyncio.open_connection("127.0.0.1", port)
        second[1].write(b"\r\n\r\n")
        assert await second[0].readexactly(4) == b"\r\n\r\n"
        third = await asyncio.open_connection("127.0.0.1", port)
        assert await closed(third[0])
        second[1].close()
        await asyncio.sleep(0.05)
        fourth = await asyncio.open_connection("127.0.0.1", port)
        fourth[1].write(b"\r\n\r\n")
        assert await fourth[0].readexactly(4) == b"\r\n\r\n"
        server.close()
        for _, writer in (*opened, second, third, fourth):
            writer.close()

    asyncio.run(scenario())


# --- the process ---


def test_a_slip_in_a_librarys_logging_fails_nobody(capsys: pytest.CaptureFixture[str]):
    handler, logger = LogLines(lambda *_: None), logging.Logger("a library")
    logger.addHandler(handler)
    logger.warning("%d things", "a")
    logger.warning("%d things", 2)
    assert [line["m"] for line in handler.lines] == ["WARNING: 2 things\n"]
    assert "--- Logging error ---" in capsys.readouterr().err


@pytest.mark.slow
def test_the_libraries_are_not_looked_through_at_the_end():
    code = "import gc; from quantwire.hosts.standalone.server.runs_libraries import load; load(); "
    frozen = subprocess.run(
        [sys.executable, "-c", code + "print(gc.get_freeze_count())"], capture_output=True, text=True, check=True
    )
    assert int(frozen.stdout) > 100_000
