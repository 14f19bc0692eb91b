"""`quantwire run` on a graph whose library layers break while it samples: exit code 3, and the error explained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GRAPH = Path(__file__).resolve().parents[2] / "workflows" / "api" / "conflict.json"
SETTINGS = ("OffloadCompat.action=report", "OffloadCompat.set_mode=true", "OffloadCompat.mode=sequential")


@pytest.mark.slow  # a process each, which imports the libraries
@pytest.mark.parametrize(
    ("library", "format_id", "kind", "raw"),
    [
        ("bitsandbytes", "bnb-nf4", "Params4bit", "NotImplementedError: Cannot copy out of meta tensor; no data!"),
        (
            "optimum.quanto",
            "quanto-qint8",
            "WeightQBytesTensor",
            "TypeError: WeightQBytesTensor.__new__() missing 6 required positional arguments",
        ),
    ],
    ids=["nf4", "quanto"],
)
def test_a_raw_error_becomes_a_conflict(
    library: str, format_id: str, kind: str, raw: str, demo_models: Path, tmp_path: Path
) -> None:
    pytest.importorskip(library)
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "quantwire.cli", "run", GRAPH, "--models", demo_models]
    command += ["--out", tmp_path / "out", "--json", report, "--set", f"QuantizeModel.format={format_id}"]
    for setting in SETTINGS:
        command += ["--set", setting]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 3, done.stderr
    lines = done.stderr.splitlines()
    start = next(
        i for i, line in enumerate(lines) if line.startswith("OffloadConflict: node 11 'Sampler' (KSampler): ")
    )
    first, second, *ways_out = lines[start:]
    assert f"{format_id} (29 layers of {kind}) stopped with sequential offload (memory): " in first
    assert second.startswith("It stopped at 'transformer_blocks.0.attn.to_q' (")
    assert raw in second
    assert ways_out[0] == "Ways out:"
    assert f"carrier quantwire (QuantizeModel, format {format_id})" in ways_out[1]
    assert "Traceback" not in done.stderr
    error = json.loads(report.read_text(encoding="utf-8"))["error"]
    assert (error["type"], error["node"]["class_type"]) == ("OffloadConflict", "KSampler")
