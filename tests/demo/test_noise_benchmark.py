"""benchmarks/noise.py runs end to end; `--quick` has two formats and few images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_quick_run(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "noise.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "noise.json").read_text())
    assert found["wrong"] == found["wrong_with_pack_threshold"] == 0
    worst_good, best_broken = found["gap"]
    assert worst_good < found["threshold"] < best_broken
    for group in found["sets"]:
        assert len(group["good"]) == len(group["broken"]) == 8
        assert {run["kind"] for run in group["good"]} == {"picture"}
        assert "picture" not in {run["kind"] for run in group["broken"]}
    assert {run["kind"] for run in found["sets"][0]["broken"]} == {"nan", "noise"}
