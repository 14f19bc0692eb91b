"""`quantwire serve`: what it says, what it refuses, and how it stops."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest
from quantwire.cli import main
from quantwire.commands import serve
from server_process import serving


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["serve", *options]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_it_prints_its_address_and_stops_when_told(tmp_path: Path, how: signal.Signals):
    with serving(tmp_path) as server:
        assert f"The editor is at http://127.0.0.1:{server.port}/" in server.log
        assert server.ask("/").status == 200
        with socket.create_connection(("127.0.0.1", server.port)) as idle:
            idle.sendall(b"GET / HTTP/1.1\r\n")  # a request that is never complete holds nothing up
            assert server.stop(how) == 0
    assert "Traceback" not in server.log
    assert sorted(p.name for p in tmp_path.iterdir()) == ["front_end", "input", "out", "user"]


def test_a_taken_port(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "index.html").touch()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        said = refused(capsys, f"--port={port}", "--front-end=.")
    assert f"--port: {port} is taken on 127.0.0.1.\n" in said
    assert "another --port" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port=70000"], "--port: 70000 is none"),
        (["--port=-1"], "--port: -1 is none"),
        (["--models=none"], "--models: 'none' is not a folder"),
        (["--out=file/x"], "--out: cannot write in 'file/x'"),
        (["--user=file"], "--user: cannot write in 'file'"),
        (["--front-end=none"], "--front-end: there is no index.html in 'none'"),
        (["--host=256.1.1.1"], "--host: '256.1.1.1' is no address of this machine"),
        (["--host=192.0.2.1", "--port=0"], "--host: '192.0.2.1' cannot be listened on"),
    ],
    ids=lambda o: o[0][2:] if isinstance(o, list) else "",
)
def test_bad_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "index.html").touch()
    assert said in refused(capsys, "--front-end=.", *options)


@pytest.mark.parametrize("missing", ["aiohttp", "comfyui_frontend_package"])
def test_a_missing_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str
):
    monkeypatch.chdir(tmp_path)
    find = serve.importlib.util.find_spec
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    said = refused(capsys)
    assert missing.replace("_", "-") in said
    assert "pip install quantwire[editor]" in said


@pytest.mark.slow
def test_two_servers_over_one_user_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with serving(tmp_path) as server:
        folders = [f"--{name}={tmp_path / name}" for name in ("out", "input", "user")]
        said = refused(capsys, *folders, f"--front-end={tmp_path / 'front_end'}", "--port=0")
        assert "in use by another server" in said
        assert server.ask("/").status == 200


@pytest.mark.slow
def test_another_address_is_warned_of(tmp_path: Path):
    with serving(tmp_path, "--host=0.0.0.0") as server:
        assert "no password" in server.log
        assert server.ask("/", headers={"Host": "evil.example"}).status == 403
        assert server.ask("/", headers={"Host": "10.1.2.3:80"}).status == 200
