"""A real ComfyUI server with the pack in its custom_nodes, for as long as the tests run.

`COMFYUI_PATH` names a ComfyUI tree, `COMFYUI_PYTHON` the Python that runs it (default: the one that runs the tests).
`COMFYUI_GGUF_PATH` names a checkout of city96/ComfyUI-GGUF for the tests of its layers, which are skipped without.
The server gets a base directory of its own, so nothing is written into the tree.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import OTHER_TYPES, in_blocks, write_file
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BOOT_S = 120
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Of RMS, layer and group norms: near 1, or a random model would mute itself.
NORMS = (
    "norm.weight",
    ".in_layers.0.weight",
    ".out_layers.0.weight",
    "out.0.weight",
    "0.norm1.weight",
    "0.norm2.weight",
)
Graph = dict[str, dict[str, Any]]


@dataclass
class Comfy:
    """The running server.

    Attributes:
        base: its base directory, with models, output and custom_nodes.
        log: file that its output goes to.
    """

    url: str
    base: Path
    log: Path
    process: subprocess.Popen[bytes]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, data: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(data).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                text = answer.read()
        except urllib.error.HTTPError as err:
            raise AssertionError(f"{path}: {err.code}: {err.read().decode()}") from err
        return json.loads(text) if text else None

    def queue(self, graph: Graph) -> str:
        prompt_id = str(uuid.uuid4())
        self.post("/prompt", {"prompt": graph, "prompt_id": prompt_id, "client_id": "tests"})
        return prompt_id

    def wait(self, prompt_id: str, limit_s: float = 120) -> dict[str, Any]:
        """The history entry of a prompt, once it is done."""
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            assert self.process.poll() is None, self.tail()
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry and entry.get("status", {}).get("status_str"):
                return entry
            time.sleep(0.02)
        raise AssertionError(f"no result within {limit_s} s\n{self.tail()}")

    def run(self, graph: Graph) -> dict[str, Any]:
        """Run a graph that must succeed; the outputs by node id."""
        entry = self.wait(self.queue(graph))
        assert entry["status"]["status_str"] == "success", self.error(entry)
        return entry["outputs"]

    def fail(self, graph: Graph) -> dict[str, Any]:
        """Run a graph that must fail; the data of its execution_error."""
        entry = self.wait(self.queue(graph))
        assert entry["status"]["status_str"] == "error"
        return self.error(entry)

    def error(self, entry: dict[str, Any]) -> dict[str, Any]:
        wanted = ("execution_error", "execution_interrupted")
        found = [data for kind, data in entry["status"]["messages"] if kind in wanted]
        return found[-1] if found else {}

    def latent(self, graph: Graph, node_id: str = "save") -> torch.Tensor:
        """The latent that a SaveLatent node of the graph wrote."""
        return self.read_latent(self.run(graph)[node_id])

    def read_latent(self, output: dict[str, Any]) -> torch.Tensor:
        """The latent of a SaveLatent node's output."""
        (entry,) = output["latents"]
        return load_file(self.base / "output" / entry["subfolder"] / entry["filename"])["latent_tensor"].float()

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    def rss_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


@pytest.fixture(scope="session")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is unset: these tests need a ComfyUI tree, see `make test-comfyui`")
    tree = Path(os.environ["COMFYUI_PATH"]).resolve()
    base = tmp_path_factory.mktemp("comfyui")
    for name in ("custom_nodes", "input", "output", "user", "models/loras"):
        (base / name).mkdir(parents=True, exist_ok=True)
    (base / "custom_nodes" / "quantwire").symlink_to(ROOT)
    if os.environ.get("COMFYUI_GGUF_PATH"):
        (base / "custom_nodes" / "ComfyUI-GGUF").symlink_to(Path(os.environ["COMFYUI_GGUF_PATH"]).resolve())
    shutil.copytree(HERE / "probe_pack", base / "custom_nodes" / "quantwire_test_probe")
    write_models(tree, base / "models")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    log = base / "server.log"
    command = [python, "main.py", "--cpu", "--disable-auto-launch", "--disable-api-nodes"]
    command += ["--port", str(port), "--base-directory", str(base)]
    with open(log, "wb") as file:
        environment = {**os.environ, "QUANTWIRE_CACHE": str(base / "cache")}
        process = subprocess.Popen(command, cwd=tree, stdout=file, stderr=subprocess.STDOUT, env=environment)
    server = Comfy(f"http://127.0.0.1:{port}", base, log, process)
    try:
        end = time.monotonic() + BOOT_S
        while True:
            assert process.poll() is None, server.tail()
            assert time.monotonic() < end, server.tail()
            try:
                server.get("/system_stats")
                break
            except OSError:
                time.sleep(0.2)
        yield server
        write_summary(server.rows, ROOT / "out" / "comfyui" / "summary.md")
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def write_summary(rows: list[dict[str, Any]], path: Path) -> None:
    """What the matrix measured, as the table of docs/comfyui.md."""
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if "format" in row:
            cell = cells.setdefault((row["format"], row["source"]), {})
            kind = "error" if "error" in row else "cosine"
            cell[f"{kind} {row['mode']}"] = row[kind]
    lines = [
        "| format | by | error | LoRA cosine | error, partial / novram | LoRA cosine, partial / novram |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (format_id, source), c in cells.items():
        shown = [f"`{format_id}`", source, _number(c, "error default"), _number(c, "cosine default")]
        shown += [f"{_number(c, f'{k} partial')} / {_number(c, f'{k} novram')}" for k in ("error", "cosine")]
        lines.append(f"| {' | '.join(shown)} |")
    lines += [f"\n{name}: {value:.5f}" for row in rows if "format" not in row for name, value in row.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _number(cell: dict[str, float], name: str) -> str:
    return f"{cell[name]:.4f}" if name in cell else "-"


def write_models(tree: Path, models: Path) -> None:
    """The demo model at ComfyUI's sizes, its GGUF files, a LoRA, and small random SD3 and Wan models."""
    sys.path.insert(0, str(ROOT / "demo"))
    from export_comfyui import export, transformer
    from quantwire.quantizers.files.gguf_writer import write_gguf
    from quantwire.quantizers.spec import QuantSpec

    export(tree, models)
    flux = transformer()
    for name in ("Q8_0", "Q4_0"):
        spec = QuantSpec.from_uri(f"gguf;type={name.lower()}")
        write_gguf(models / "diffusion_models" / f"digits_flux-{name}.gguf", flux, spec)
    for name in OTHER_TYPES:
        write_file(models / "diffusion_models" / f"digits_flux-{name}.gguf", flux, in_blocks(name), "flux")
    save_file(random_lora(flux), models / "loras" / "lora.safetensors")
    for name, layout in json.loads((HERE / "layouts.json").read_text()).items():
        generator = torch.Generator().manual_seed(1)
        tensors = {
            n: (
                torch.randn(shape, generator=generator) * layout.get("std", 0.05)
                + (len(shape) == 1 and n.endswith(NORMS))
            ).to(DTYPES[dtype])
            for n, (dtype, shape) in layout["tensors"].items()
        }
        save_file(tensors, models / "diffusion_models" / f"{name}.safetensors", metadata=layout["metadata"])


def random_lora(flux: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rank 4 on every linear layer of the blocks but modulation; at strength 1 it moves the model by about 30 %."""
    generator = torch.Generator().manual_seed(5)
    lora: dict[str, torch.Tensor] = {}
    for name, w in flux.items():
        if w.ndim == 2 and "_blocks." in name and "_mod." not in name and "modulation" not in name:
            layer = f"diffusion_model.{name.removesuffix('.weight')}"
            lora[f"{layer}.lora_A.weight"] = torch.randn(4, w.shape[1], generator=generator) * 0.11
            lora[f"{layer}.lora_B.weight"] = torch.randn(w.shape[0], 4, generator=generator) * 0.11
    return lora
