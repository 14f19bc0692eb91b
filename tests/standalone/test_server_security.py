"""The embedded server refuses other web sites, paths that lead out and bodies without end, and goes on serving."""

from __future__ import annotations

import re
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantwire.hosts.standalone.server import confine
from quantwire.hosts.standalone.server.answers import Refused
from quantwire.hosts.standalone.server.app import ServerConfig
from quantwire.hosts.standalone.server.security import refuse_host
from quantwire.hosts.standalone.server.uploads import safe_name
from server_process import ServerProcess

MIB = 1 << 20
SECRET = "nobody may read this"
JSON_ROUTES = ["/prompt", "/queue", "/history", "/free", "/settings", "/jobs/cancel", "/quantwire/check"]


@pytest.fixture(autouse=True)
def still_serves(server_process: ServerProcess):
    """Whatever a test did, the server answers after it, and reported no failure of its own."""
    before = len(server_process.lines)
    yield
    assert server_process.ask("/api/features").status == 200
    assert "Traceback" not in "".join(server_process.lines[before:])


# --- other web sites ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "evil.example@127.0.0.1"}, 403),
        ({"Host": "2130706433"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "LOCALHOST"}, 200),
        ({"Host": "[::1]:8199"}, 200),
        ({"Host": "127.9.9.9"}, 200),
        ({"Host": "localhost:5", "Origin": "http://localhost:5"}, 200),
        ({"Host": "localhost:5", "Origin": "https://localhost:5"}, 200),
        ({"Host": "localhost", "Origin": "https://localhost"}, 200),
        ({"Host": "localhost:5", "Origin": "http://localhost:6"}, 403),
        ({"Host": "localhost:5", "Origin": "http://127.0.0.1:5"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "file://"}, 403),
        ({"Origin": ""}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
    ],
    ids=str,
)
def test_only_the_editors_own_page_may_ask(server_process: ServerProcess, headers: dict[str, str], status: int):
    answer = server_process.ask("/api/queue", headers=headers)
    assert answer.status == status
    assert status == 200 or answer.error


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1"])
def test_a_foreign_page_changes_nothing(server_process: ServerProcess, origin: str):
    for path, body in (("/api/settings", {"stolen": 1}), ("/api/userdata/workflows%2Fx.json", b"{}"), ("/prompt", {})):
        assert server_process.ask(path, body, headers={"Origin": origin}).status == 403
    assert "stolen" not in server_process.ask("/api/settings").json()
    assert server_process.ask("/api/userdata/workflows%2Fx.json").status == 404


@pytest.mark.parametrize("headers", ["Origin: http://evil.example", "Origin: null", "Sec-Fetch-Site: cross-site"])
def test_a_foreign_page_gets_no_websocket(server_process: ServerProcess, headers: str):
    answer = server_process.raw(_upgrade(server_process, headers))
    assert answer.startswith(b"HTTP/1.1 403 ")


def test_a_link_from_elsewhere_opens_the_editor_and_nothing_else(server_process: ServerProcess):
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert server_process.ask("/", headers=followed).status == 200
    assert server_process.ask("/?template=x", headers=followed).status == 403
    assert server_process.ask("/api/queue", headers=followed).status == 403
    assert server_process.ask("/", headers={**followed, "Sec-Fetch-Dest": "iframe"}).status == 403


def test_no_answer_invites_other_sites(server_process: ServerProcess):
    page, preflight = server_process.ask("/"), server_process.ask("/api/prompt", method="OPTIONS")
    for answer in (page, preflight, server_process.ask("/api/queue"), server_process.ask("/api/view?filename=../x")):
        assert not [name for name in answer.headers if name.lower().startswith("access-control-")]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "frame-ancestors 'self'" in answer.headers["Content-Security-Policy"]
    assert "connect-src 'self'" in page.headers["Content-Security-Policy"]
    assert preflight.status == 405


@pytest.mark.parametrize(
    ("bound", "host", "answers"),
    [
        ("0.0.0.0", "192.168.1.7:8199", True),
        ("::", "[fe80::1]:8199", True),
        ("0.0.0.0", "evil.example", False),
        ("192.168.1.7", "192.168.1.7:8199", True),
        ("192.168.1.7", "192.168.1.8:8199", False),
        ("workstation", "Workstation:8199", True),
        ("workstation", "evil.example", False),
        ("127.0.0.1", "192.168.1.7", False),
    ],
)
def test_hosts_that_a_server_elsewhere_answers_to(bound: str, host: str, answers: bool):
    assert (refuse_host([host], ServerConfig(Path(), host=bound)) is None) is answers


# --- paths -------------------------------------------------------------------------------------------------------

OUT = [
    "..%2Fsecret.txt",
    "%2e%2e%2fsecret.txt",
    "x%2F..%2F..%2Fsecret.txt",
    "%2Fetc%2Fpasswd",
    "link.txt",
    "linked%2Fsecret.txt",
    "..%5Csecret.txt",
    "..%252Fsecret.txt",
    "secret.txt%00.png",
    "..",
    ".",
    "%2E%2E%2F%2E%2E%2Fuser",
    "a" * 3000,
    "x%2F" * 500 + "y",
    "%ff%fe",
    "%ED%A0%80",
]


@pytest.fixture
def traps(server_process: ServerProcess) -> None:
    """A secret outside of every folder, and links to it inside of each."""
    base = server_process.base
    (base / "secret.txt").write_text(SECRET)
    for folder in (base / "out", base / "input", base / "user" / "default", base / "front_end"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, target in (("link.txt", base / "secret.txt"), ("linked", base)):
            if not (folder / name).is_symlink():
                (folder / name).symlink_to(target)


@pytest.mark.usefixtures("traps")
@pytest.mark.parametrize("name", OUT, ids=lambda n: n[:30])
def test_no_route_leads_out_of_its_folder(server_process: ServerProcess, name: str):
    paths = [
        f"/api/view?filename={name}",
        f"/view?type=input&filename={name}",
        f"/api/view?filename={name}%20[temp]",
        f"/api/view?filename=secret.txt&subfolder={name.removesuffix('secret.txt')}",
        f"/api/userdata/{name}",
        f"/userdata?dir={name}",
        f"/api/v2/userdata?path={name}",
        f"/{name}",
        f"/extensions/quantwire/{name}",
        f"/api/workflow_templates/quantwire/{name}",
        f"/api/models/{name}",
        f"/api/experiment/models/preview/vae/0/{name}",
        f"/api/view_metadata/vae?filename={name}.safetensors",
        f"/internal/files/{name}",
        f"/api/history/{name}",
        f"/docs/{name}/en.md",
        f"/api/object_info/{name}",
    ]
    for path in paths:
        answer = server_process.ask(path)
        assert SECRET.encode() not in answer.body, path
        assert b"secret.txt" not in answer.body or answer.status >= 400, path
        assert answer.status < 500, (path, answer.body)
    kept = server_process.ask(f"/api/userdata/{name}", b"overwritten")
    assert kept.status in (200, 400, 403, 405), kept.body
    assert (server_process.base / "secret.txt").read_text() == SECRET
    moved = server_process.ask(f"/api/userdata/comfy.templates.json/move/{name}?overwrite=false", b"")
    assert moved.status in (200, 400, 403, 404, 405, 409)
    assert server_process.ask(f"/api/userdata/{name}", method="DELETE").status < 500
    assert (server_process.base / "secret.txt").read_text() == SECRET


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.characters(), max_size=40) | st.text("./\\%x:\0é", max_size=30))
def test_any_name_stays_inside_or_is_refused(tmp_path_factory: pytest.TempPathFactory, name: str):
    root = tmp_path_factory.getbasetemp() / "root"
    root.mkdir(exist_ok=True)
    made = _made_or_status(confine.inside, root, name)
    assert made in (400, 403) or (made.resolve().is_relative_to(root.resolve()) and made.resolve() != root.resolve())


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.characters(), max_size=300))
def test_any_upload_gets_a_harmless_name(name: str):
    made = _made_or_status(safe_name, name)
    if made == 400:
        return
    assert made not in ("", ".", "..")
    assert not re.search(r'[\x00-\x1f/\\:*?"<>|]', made)
    assert len(made.encode()) <= confine.MAX_NAME_NBYTES
    assert made[0] not in ".- "


@pytest.mark.parametrize(
    ("sent", "made"),
    [
        ("../../x.png", "x.png"),
        ("C:\\a\\b.png", "b.png"),
        (".bashrc", "bashrc"),
        ("nul.png", "_nul.png"),
        ("-rf", "_-rf"),
    ],
)
def test_upload_names(sent: str, made: str):
    assert safe_name(sent) == made


@pytest.mark.parametrize("name", ["x.html", "x.svg", "x.xml", "x.js", "x.xhtml", "x", "x.HTML"])
def test_files_that_hold_scripts_are_downloaded(server_process: ServerProcess, name: str):
    folder = server_process.base / "out"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("<script>alert(1)</script>")
    (server_process.base / "user" / "default" / name).write_text("<script>alert(1)</script>")
    for path in (f"/view?filename={name}", f"/api/userdata/{name}"):
        answer = server_process.ask(path)
        assert answer.headers["Content-Type"] == "application/octet-stream"
        assert answer.headers["Content-Disposition"].startswith("attachment")


# --- bodies ------------------------------------------------------------------------------------------------------

BROKEN = {
    "empty": b"",
    "cut": b'{"prompt":',
    "list": b"[1]",
    "null": b"null",
    "deep": b"[" * 200_000,
    "deep object": b'{"a":' * 50_000,
    "no UTF-8": b"\xff\xfe{}",
    "long number": b"9" * 6000,
    "NaN": b'{"x": NaN}',
    "infinite": b'{"x": 1e999}',
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN.keys())
def test_what_is_no_json_is_a_400_that_says_so(server_process: ServerProcess, body: bytes):
    for path in JSON_ROUTES:
        answer = server_process.ask(f"/api{path}", body, headers={"Content-Type": "application/json"})
        assert answer.status == 400, (path, answer.body)
        assert answer.error


def test_a_hundred_megabytes_are_refused(server_process: ServerProcess):
    start = time.monotonic()
    assert _post(server_process, "/api/prompt", b"x" * 100 * MIB).startswith(b"HTTP/1.1 413 ")
    assert time.monotonic() - start < 10


def test_a_large_body_is_refused_before_it_is_sent(server_process: ServerProcess):
    for path in ("/api/prompt", "/api/settings", "/api/userdata/big.json", "/upload/image"):
        kind = "Content-Type: multipart/form-data; boundary=B"
        answer = _post(server_process, path, b"", kind, f"Content-Length: {200 * MIB}", length=False)
        assert answer.startswith(b"HTTP/1.1 413 "), (path, answer[:200])
    assert not (server_process.base / "user" / "default" / "big.json").exists()


def test_a_body_of_unknown_length_is_cut_off(server_process: ServerProcess):
    part = b"100000\r\n" + b"x" * MIB + b"\r\n"
    answer = _post(server_process, "/api/userdata/big.json", part * 40, "Transfer-Encoding: chunked", length=False)
    assert answer.startswith(b"HTTP/1.1 413 "), answer[:200]
    assert not (server_process.base / "user" / "default" / "big.json").exists()


@pytest.mark.slow  # sends 101 MiB in small parts
def test_an_upload_over_the_limit_is_refused_and_leaves_nothing(server_process: ServerProcess):
    before = sorted((server_process.base / "input").iterdir())
    body = _form({"image": ("big.bin", b"x" * 101 * MIB)})
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in (body[i : i + MIB] for i in range(0, len(body), MIB)))
    heads = ("Content-Type: multipart/form-data; boundary=B", "Transfer-Encoding: chunked")
    answer = _post(server_process, "/upload/image", chunks + b"0\r\n\r\n", *heads, length=False)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert sorted((server_process.base / "input").iterdir()) == before


BAD_FORMS = {
    "no form": (b"hello", "text/plain"),
    "no boundary": (b"hello", "multipart/form-data"),
    "other boundary": (b"--A\r\n\r\n--A--", "multipart/form-data; boundary=B"),
    "unfinished": (b'--B\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nx', None),
    "no headers": (b"--B\r\nx\r\n--B--\r\n", None),
    "control character": (
        b'--B\r\nContent-Disposition: form-data; name="image"; filename="\x01"\r\n\r\nx\r\n--B--\r\n',
        None,
    ),
    "form in a form": (b"--B\r\nContent-Type: multipart/mixed; boundary=C\r\n\r\n--C--\r\n--B--\r\n", None),
    "many fields": (b'--B\r\nContent-Disposition: form-data; name="x"\r\n\r\n1\r\n' * 50 + b"--B--\r\n", None),
    "no file": (b'--B\r\nContent-Disposition: form-data; name="x"\r\n\r\n1\r\n--B--\r\n', None),
}


@pytest.mark.parametrize(("body", "kind"), BAD_FORMS.values(), ids=BAD_FORMS.keys())
def test_broken_forms_are_refused(server_process: ServerProcess, body: bytes, kind: str | None):
    headers = {"Content-Type": kind or "multipart/form-data; boundary=B"}
    for path in ("/upload/image", "/api/upload/mask"):
        assert server_process.ask(path, body, headers=headers).status == 400


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"subfolder": "../.."}, 403),
        ({"subfolder": "/tmp"}, 403),
        ({"subfolder": "linked"}, 403),
        ({"type": "user"}, 400),
    ],
    ids=str,
)
@pytest.mark.usefixtures("traps")
def test_uploads_stay_in_their_folder(server_process: ServerProcess, fields: dict[str, str], status: int):
    body = _form({"image": ("evil.txt", b"x"), **fields})
    answer = server_process.ask("/upload/image", body, headers={"Content-Type": "multipart/form-data; boundary=B"})
    assert answer.status == status
    assert not list(server_process.base.rglob("evil*"))


def test_a_picture_that_unfolds_to_gigabytes_is_not_opened(server_process: ServerProcess):
    (server_process.base / "out").mkdir(exist_ok=True)
    (server_process.base / "out" / "bomb.png").write_bytes(_png(60_000, 60_000))
    for what in ("preview=webp;90", "channel=rgb", "channel=a"):
        answer = server_process.ask(f"/view?filename=bomb.png&{what}")
        assert (answer.status, "bomb.png" in answer.error) == (400, True)


NO_HTTP = {
    "TLS": b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "negative length": b"POST /prompt HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    "long line": b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 50_000 + b"\r\n",
}


@pytest.mark.parametrize("data", NO_HTTP.values(), ids=NO_HTTP.keys())
def test_what_is_no_http_is_refused(server_process: ServerProcess, data: bytes):
    assert re.match(rb"HTTP/1\.[01] 4\d\d ", server_process.raw(data))


@pytest.mark.slow  # as long as the limit
def test_a_body_that_never_arrives_is_given_up(server_process: ServerProcess):
    start = time.monotonic()
    head = b"POST /prompt HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 100\r\n\r\n{"
    assert server_process.raw(head, timeout=90).startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - start < 60


# --- what they are made of ---------------------------------------------------------------------------------------


def _made_or_status(make: Callable[..., Any], *args: Any) -> Any:
    try:
        return make(*args)
    except Refused as err:
        return err.status


def _upgrade(server: ServerProcess, headers: str) -> bytes:
    lines = [
        "GET /ws HTTP/1.1", f"Host: 127.0.0.1:{server.port}", "Upgrade: websocket", "Connection: Upgrade",
        "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", headers,
    ]  # fmt: skip
    return "\r\n".join([*lines, "", ""]).encode()


def _post(server: ServerProcess, path: str, body: bytes, *headers: str, length: bool = True) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
    lines += [f"Content-Length: {len(body)}"] if length else []
    return server.raw("\r\n".join([*lines, "", ""]).encode() + body)


def _form(fields: dict[str, str | tuple[str, bytes]]) -> bytes:
    made = b""
    for name, value in fields.items():
        extra, data = (f'; filename="{value[0]}"', value[1]) if isinstance(value, tuple) else ("", value.encode())
        made += f'--B\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'.encode() + data + b"\r\n"
    return made + b"--B--\r\n"


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
