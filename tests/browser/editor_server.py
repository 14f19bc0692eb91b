"""The server whose editor the browser tests open: `quantwire serve`, or a real ComfyUI with the pack in it.

`QUANTWIRE_EDITOR=comfyui` takes the ComfyUI tree that `COMFYUI_PATH` and `COMFYUI_PYTHON` name, as tests/comfyui does.
`QUANTWIRE_FRONT_END` names the `static` folder of another front end; without it ComfyUI serves the one that it pins.
Each server has folders of its own, so nothing is written into the tree or into a user's folders.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# A machine that does other work besides takes many times the usual few seconds.
BOOT_S = 180


@dataclass
class EditorServer:
    """A running server.

    Attributes:
        kind: "standalone" or "comfyui".
        base: folder that holds its models, input, output and user folders and its log.
    """

    kind: str
    url: str
    base: Path
    process: subprocess.Popen[bytes]

    @property
    def log(self) -> str:
        return "\n".join((self.base / "server.log").read_text(errors="replace").splitlines()[-60:])

    def request(self, path: str, data: Any = None) -> Any:
        """GET, or POST of JSON where data is given; the JSON answer, None where it is empty."""
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"} if body else {})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as err:
            raise AssertionError(f"{path}: {err.code}: {err.read().decode(errors='replace')}\n{self.log}") from err
        return json.loads(text) if text else None

    def idle(self) -> bool:
        queue = self.request("/queue")
        return not queue["queue_running"] and not queue["queue_pending"]

    def wait_until_idle(self, limit_s: float = 120) -> None:
        end = time.monotonic() + limit_s
        while not self.idle():
            assert time.monotonic() < end, f"still running after {limit_s} s\n{self.log}"
            time.sleep(0.05)

    def history(self, prompt_id: str, limit_s: float = 120) -> dict[str, Any]:
        """The finished entry of a prompt."""
        end = time.monotonic() + limit_s
        while True:
            entry = self.request(f"/history/{prompt_id}").get(prompt_id)
            if entry and entry.get("status", {}).get("status_str"):
                return entry
            assert time.monotonic() < end, f"{prompt_id} has no result after {limit_s} s\n{self.log}"
            time.sleep(0.05)


def make_models(base: Path, comfyui: Path | None) -> None:
    """The demo models and a Q8_0 file of the transformer, in the sizes of the host that reads them."""
    sys.path.insert(0, str(ROOT / "demo"))
    from quantwire.quantizers.files.gguf_writer import write_gguf
    from quantwire.quantizers.spec import QuantSpec

    models = base / "models"
    if comfyui:
        from export_comfyui import export, transformer

        export(comfyui, models)
        flux = transformer()
    else:
        from safetensors.torch import load_file

        source = Path(os.environ.get("QUANTWIRE_DEMO_MODELS", ROOT / "demo" / "models"))
        shutil.copytree(source, models, dirs_exist_ok=True)
        flux = load_file(models / "diffusion_models" / "digits_flux.safetensors")
    target = models / "diffusion_models" / "digits_flux-Q8_0.gguf"
    write_gguf(target, flux, QuantSpec.from_uri("gguf;type=q8_0"))


def command(kind: str, base: Path, port: int, front_end: str | None, comfyui: Path | None) -> list[str]:
    if kind == "standalone":
        line = [sys.executable, "-m", "quantwire.cli", "serve", "--port", str(port)]
        for name, folder in (("models", "models"), ("input", "input"), ("out", "output"), ("user", "user")):
            line += [f"--{name}", str(base / folder)]
        return line + (["--front-end", front_end] if front_end else [])
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    line = [python, "main.py", "--cpu", "--disable-auto-launch", "--disable-api-nodes", "--port", str(port)]
    line += ["--base-directory", str(base)]
    return line + (["--front-end-root", front_end] if front_end else [])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(kind: str, base: Path, front_end: str | None = None) -> Iterator[EditorServer]:
    """A server in `base`, which is made ready, until the block ends."""
    comfyui = Path(os.environ["COMFYUI_PATH"]).resolve() if kind == "comfyui" else None
    for name in ("custom_nodes", "input", "output", "user", "models"):
        (base / name).mkdir(parents=True, exist_ok=True)
    if not (base / "models" / "diffusion_models").exists():
        make_models(base, comfyui)
    if comfyui and not (base / "custom_nodes" / "quantwire").is_symlink():
        (base / "custom_nodes" / "quantwire").symlink_to(ROOT)
    port = free_port()
    environment = {**os.environ, "QUANTWIRE_CACHE": str(base / "cache")}
    with open(base / "server.log", "ab") as log:
        process = subprocess.Popen(
            command(kind, base, port, front_end, comfyui),
            cwd=comfyui or base,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    server = EditorServer(kind, f"http://127.0.0.1:{port}", base, process)
    try:
        _wait_for_boot(server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)


def _wait_for_boot(server: EditorServer) -> None:
    end = time.monotonic() + BOOT_S
    while True:
        assert server.process.poll() is None, f"the server ended by itself\n{server.log}"
        assert time.monotonic() < end, f"no answer after {BOOT_S} s\n{server.log}"
        try:
            server.request("/system_stats")
            return
        except OSError:
            time.sleep(0.1)
