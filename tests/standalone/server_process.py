"""`quantwire serve` as a process of its own, with folders of its own, and clients on plain sockets."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A machine that does other work besides takes many times the usual second.
BOOT_S = 120
FRONT_END = "<!doctype html><title>front end</title>"


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The message of a refusal; fails for an answer that is none."""
        assert self.status >= 400, (self.status, self.body[:200])
        assert self.headers["Content-Type"].startswith("application/json"), self.headers
        return self.json()["error"]


@dataclass
class ServerProcess:
    """A running server.

    Attributes:
        base: folder that holds out, input, user and front_end.
        lines: what it printed so far, both streams.
    """

    process: subprocess.Popen[str]
    base: Path
    port: int
    lines: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def ask(
        self,
        path: str,
        body: Any = None,
        method: str = "",
        headers: Mapping[str, str] | None = None,
        timeout: float = 60,
    ) -> Answer:
        """GET, or POST where there is a body: bytes as they are, anything else as JSON. The path is sent as it is."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method or ("GET" if data is None else "POST"), path, data, dict(headers or {}))
            got = connection.getresponse()
            return Answer(got.status, got.headers, got.read())
        finally:
            connection.close()

    def raw(self, data: bytes, timeout: float = 60) -> bytes:
        """The answer to bytes that no HTTP library would send."""
        got = bytearray()
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as client:
            try:
                client.sendall(data)
                while not _whole(got) and (part := client.recv(1 << 16)):
                    got += part
            except ConnectionError:  # it answered and closed while we were still sending
                while part := client.recv(1 << 16):
                    got += part
        return bytes(got)

    def stop(self, how: signal.Signals = signal.SIGINT, timeout: float = 30) -> int:
        """Exit code."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(timeout)


def _whole(answer: bytearray) -> bool:
    """Whether an answer came as far as its Content-Length says."""
    head, end, body = bytes(answer).partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    return bool(end and length) and len(body) >= int(length[1])


def command(base: Path, *options: str) -> list[str]:
    """Its command line; the front end is one page, since most tests want none."""
    page = base / "front_end" / "index.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(FRONT_END)
    folders = [f"--{name}={base / name}" for name in ("out", "input", "user")]
    given = [*folders, f"--front-end={page.parent}", "--port=0", *options]
    return [sys.executable, "-m", "quantwire.cli", "serve", *given]


@contextmanager
def serving(base: Path, *options: str) -> Iterator[ServerProcess]:
    """A server over `base`, killed at the end where it still runs.

    Args:
        options: of `quantwire serve`; a later one wins.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen(
        command(base, *options), cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    server = ServerProcess(process, base, 0)
    reader = threading.Thread(target=_read, args=(process, server.lines), daemon=True)
    reader.start()
    try:
        server.port = _port(server)
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join(10)


def _read(process: subprocess.Popen[str], lines: list[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)


def _port(server: ServerProcess) -> int:
    end = time.monotonic() + BOOT_S
    while time.monotonic() < end:
        for line in list(server.lines):
            if line.startswith("The editor is at "):
                return int(line.rstrip().rstrip("/").rpartition(":")[2])
        assert server.process.poll() is None, server.log
        time.sleep(0.02)
    raise AssertionError(f"no address after {BOOT_S} s\n{server.log}")


@pytest.fixture(scope="session")
def server_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for all tests that leave it as it was, but for files of their own."""
    with serving(tmp_path_factory.mktemp("server"), f"--models={ROOT / 'demo' / 'models'}") as running:
        yield running
