"""The demo's claims: the weights are small, the classifier reads, and `demo/run.py` keeps its bounds and its time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 120


def test_weights_are_at_most_16_mb() -> None:
    files = list((ROOT / "demo" / "models").rglob("*.safetensors"))
    assert len(files) == 3
    assert sum(f.stat().st_size for f in files) <= 16_000_000


@pytest.mark.slow
def test_demo_keeps_its_bounds(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "demo" / "run.py"), "--out", str(tmp_path)]
    for _ in range(2):  # a neighbour's load on a shared machine has doubled a run; a second one shows whose time it was
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
        seconds = time.perf_counter() - start
        print(done.stdout)
        assert done.returncode == 0, done.stdout + done.stderr
        if seconds <= LIMIT_S:
            break
    rows = {r["format"]: r for r in json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))}
    keys = ["format", "weights_mib", "percent_of_bf16", "quantize_s", "sampling_s", "accuracy", "sqnr_db", "status"]
    assert all(list(r) == keys for r in rows.values())
    full = rows["full precision"]["accuracy"]
    assert full >= 0.90
    assert rows["wrong 8-bit load"]["accuracy"] < 0.30
    eight = ["bnb-int8", "quanto-qint8", "quanto-qfloat8-e4m3fn", "comfy-int8-convrot", "comfy-fp8-e4m3fn", "gguf-q8-0"]
    four = ["bnb-nf4", "bnb-fp4", "quanto-qint4", "gguf-q4-0"]
    assert all(rows[f]["accuracy"] >= full - 0.02 for f in eight)
    assert all(rows[f]["accuracy"] >= full - 0.10 for f in four)
    assert (tmp_path / "contact_sheet.png").stat().st_size > 10_000
    assert seconds <= LIMIT_S


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "demo" / "run.py"), "--out", str(tmp_path), "--formats", "bnb-nf4,sdnk-uint4"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "Unknown format 'sdnk-uint4'. Did you mean sdnq-uint4" in done.stderr
    assert not list(tmp_path.iterdir())
