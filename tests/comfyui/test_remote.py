"""`quantwire run --server` against a real ComfyUI server, on the shipped workflows."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from quantwire.cli import main

pytest.importorskip("aiohttp", reason="the remote run needs aiohttp")

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows" / "api"


class Outcome:
    """What one command did: exit code, standard output and error, files in the output folder, the report."""

    def __init__(self, code: int, out: str, err: str, folder: Path, report: Path) -> None:
        self.code, self.out, self.err = code, out, err
        self.files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        self.report = json.loads(report.read_text(encoding="utf-8"))


@pytest.fixture
def run(comfyui: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def call(workflow: str, *arguments: str) -> Outcome:
        path = WORKFLOWS / f"{workflow}.json"
        options = ["--server", comfyui.url, "--out", str(tmp_path / "out"), "--json", str(tmp_path / "r.json")]
        code = main(["run", str(path), *options, *arguments])
        said = capsys.readouterr()
        return Outcome(code, said.out, said.err, tmp_path / "out", tmp_path / "r.json")

    return call


def call_server(comfyui: Any, path: str, data: Any = None) -> Any:
    body = json.dumps(data).encode() if data is not None else None
    request = urllib.request.Request(comfyui.url + path, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read() or b"null")


def wait_for(condition: Callable[[], Any], limit_s: float = 60) -> Any:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"not so within {limit_s} s")


@pytest.mark.parametrize("workflow", ["full_precision", "quantized"])
def test_run_downloads_the_image(run: Any, comfyui: Any, workflow: str) -> None:
    done = run(workflow, "--set", "Sampler.steps=2", "--set", f"Save.filename_prefix=remote/{workflow}")
    assert done.code == 0, done.err
    (name,) = [f for f in done.files if f.endswith(".png")]
    assert name.startswith(f"remote/{workflow}_")
    assert name in done.out
    with Image.open(comfyui.base / "output" / name) as theirs, Image.open(done.out.splitlines()[-1]) as ours:
        assert ours.size == (64, 64)
        assert ours.tobytes() == theirs.tobytes()
        assert json.loads(ours.info["prompt"])["11"]["inputs"]["steps"] == 2
    assert " s  node 11 'Sampler' (KSampler)\n" in done.err
    report = done.report
    assert (report["status"], report["exit_code"], report["error"]) == ("ok", 0, None)
    graph = json.loads((WORKFLOWS / f"{workflow}.json").read_text(encoding="utf-8"))
    assert set(report["timings_s"]) | set(report["cached"]) == set(graph)
    assert report["outputs"]["13"]["images"][0]["filename"] == Path(name).name
    if workflow == "quantized":
        assert "[Report] diffusion_model: 18 linear layers in bnb-nf4" in done.out


def test_second_run_is_cached(run: Any) -> None:
    run("full_precision", "--set", "Sampler.seed=5", "--set", "Sampler.steps=1")
    done = run("full_precision", "--set", "Sampler.seed=5", "--set", "Sampler.steps=1")
    assert done.code == 0, done.err
    assert "   cached  node 11 'Sampler' (KSampler)\n" in done.err
    assert "11" in done.report["cached"]
    assert done.report["outputs"]["13"]["images"], "outputs of cached nodes come too"


def test_conflict_is_blocked(run: Any) -> None:
    done = run("conflict")
    assert done.code == 3, done.err
    assert "OffloadConflict: node 3 'Offload check' (OffloadCompat): " in done.err
    assert "KSampler" not in done.err
    assert done.files == []
    assert done.report["status"] == "blocked"
    assert done.report["error"]["node"] == {"id": "3", "title": "Offload check", "class_type": "OffloadCompat"}


def test_refused_graph_lists_every_problem(run: Any) -> None:
    done = run("quantized", "--set", "Sampler.steps=0", "--set", "Quantize.format=bnb-nf5", "--set", "VAE.vae_name=no")
    assert done.code == 2, done.err
    lines = done.err.splitlines()
    assert "InvalidWorkflow: " in lines[0]
    assert "3 problems" in lines[0]
    places = ["2 'Quantize' (QuantizeModel).format", "10 'VAE' (VAELoader).vae_name", "11 'Sampler' (KSampler).steps"]
    for place, line in zip(places, lines[1:], strict=True):
        assert line.startswith(f"node {place}: ")
    assert done.files == []


def test_nodes_that_the_server_lacks(comfyui: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = json.loads((WORKFLOWS / "quantized.json").read_text(encoding="utf-8"))
    graph["2"]["class_type"], graph["12"]["class_type"] = "QuantiseModel", "VAEDecodes"
    (tmp_path / "w.json").write_text(json.dumps(graph), encoding="utf-8")
    assert main(["run", str(tmp_path / "w.json"), "--server", comfyui.url, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert (
        "node 2 'Quantize' (QuantiseModel): the server has no node 'QuantiseModel'. Did you mean QuantizeModel" in err
    )
    assert "node 12 'Decode' (VAEDecodes): the server has no node 'VAEDecodes'. Did you mean VAEDecode" in err


def test_graph_of_which_one_branch_is_wrong(run: Any, comfyui: Any) -> None:
    done = run("quantized", "--set", "VAE.vae_name=no")  # the report's branch could run
    assert done.code == 2, done.err
    assert "InvalidWorkflow: node 10 'VAE' (VAELoader).vae_name: " in done.err
    queue = wait_for(lambda: (q := call_server(comfyui, "/queue")) and not q["queue_running"] and q)
    assert queue["queue_pending"] == []


def test_server_that_is_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    assert main(["run", str(WORKFLOWS / "full_precision.json"), "--server", url, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"ServerUnavailable: {url}: no connection to a ComfyUI server: ")
    assert len(err.splitlines()) == 1


@pytest.mark.skipif(os.name == "nt", reason="SIGINT cannot be sent to one process on Windows")
@pytest.mark.parametrize("where", ["running", "pending"])
def test_ctrl_c_stops_this_prompt_alone(run: Any, comfyui: Any, tmp_path: Path, where: str) -> None:
    other = json.loads((WORKFLOWS / "full_precision.json").read_text(encoding="utf-8"))
    other["11"]["inputs"].update(steps=1 if where == "running" else 10000, seed=time.time_ns() % 2**32)
    other_id = str(uuid.uuid4())

    def state() -> tuple[list[str], list[str]]:
        queue = call_server(comfyui, "/queue")
        return [i[1] for i in queue["queue_running"]], [i[1] for i in queue["queue_pending"]]

    def post_other() -> None:
        call_server(comfyui, "/prompt", {"prompt": other, "prompt_id": other_id, "client_id": "another"})
        wait_for(lambda: any(other_id in ids for ids in state()))

    if where == "pending":
        post_other()
    long = ["--set", "Sampler.steps=10000", "--set", f"Sampler.seed={time.time_ns() % 2**32}"]
    command = [sys.executable, "-m", "quantwire.cli", "run", str(WORKFLOWS / "full_precision.json"), *long]
    command += ["--server", comfyui.url, "--out", str(tmp_path / "stopped")]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: set(state()[0 if where == "running" else 1]) - {other_id})
        if where == "running":
            post_other()
            assert state()[1] == [other_id]
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1]
        assert process.returncode == 130, err
        assert err.endswith("Interrupted.\n")
        assert "Traceback" not in err
        assert ("stopped  node 11 'Sampler' (KSampler)\n" in err) is (where == "running")
        assert not (tmp_path / "stopped").exists()
        if where == "running":
            entry = wait_for(lambda: call_server(comfyui, f"/history/{other_id}").get(other_id))
            assert entry["status"]["status_str"] == "success"
        else:
            assert state() == ([other_id], [])
    finally:
        process.kill()
        if where == "pending":
            call_server(comfyui, "/interrupt", {"prompt_id": other_id})
    wait_for(lambda: state() == ([], []))
    done = run("full_precision", "--set", "Sampler.steps=1")
    assert done.code == 0, done.err
