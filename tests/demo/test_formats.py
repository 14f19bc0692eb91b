"""The table of formats: the command that makes it runs, and the page holds every format."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from quantwire.quantizers.registry import format_ids

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """The JSON and the page of a real run of two formats."""
    out = tmp_path_factory.mktemp("formats")
    command = [sys.executable, str(ROOT / "benchmarks" / "formats.py"), "--quick", "--out", str(out)]
    done = subprocess.run(command, text=True, capture_output=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((out / "formats.json").read_text(encoding="utf-8"))
    return result, (out / "formats.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_both_models_are_measured(quick: tuple[dict, str]) -> None:
    rows = {r["format"]: r for r in quick[0]["rows"]}
    assert list(rows) == ["bnb-nf4", "gguf-q8-0"]
    for row in rows.values():
        assert row["full_accuracy"] >= 0.85
        assert row["digits"]["accuracy"] >= 0.85
        assert row["digits"]["sampling_ratio"] > 0
        assert row["digits"]["quantize_s"] > 0
        assert row["digits"]["layers_left"] == 0
    four, eight = (rows[f]["digits"] for f in rows)
    assert four["mib"] < eight["mib"]
    assert four["sqnr_db"] + 20 < eight["sqnr_db"]
    assert four["psnr_db"] + 10 < eight["psnr_db"]


@pytest.mark.slow
def test_sentence_pairs_rank_the_formats(quick: tuple[dict, str]) -> None:
    if quick[0]["no_sentences"]:
        pytest.skip(quick[0]["no_sentences"])
    four, eight = (r["sentences"] for r in quick[0]["rows"])
    assert 0 < 5 * eight["cosine_error_mean"] < four["cosine_error_mean"] < 0.2
    assert four["cosine_error_mean"] < four["cosine_error_max"]
    assert quick[0]["bfloat16_cosine_error"][0] < four["cosine_error_mean"]


@pytest.mark.slow
def test_the_page_shows_what_was_measured(quick: tuple[dict, str]) -> None:
    result, page = quick
    assert result["command"] in page
    for row in result["rows"]:
        (line,) = [x for x in page.splitlines() if x.startswith(f"| `{row['format']}` |")]
        cells = [c.strip() for c in line.strip("|").split("|")]
        digits, pairs = row["digits"], row.get("sentences")
        assert cells[2] == row["library"]
        assert cells[3:5] == [f"{digits['mib']:.2f}", f"{digits['percent_of_bf16']:.1f}"]
        assert cells[9] == f"{digits['sampling_ratio']:.2f}"
        if pairs:
            assert cells[10:] == [f"{pairs['cosine_error_mean']:.5f}", f"{pairs['cosine_error_max']:.5f}"]


def test_an_unknown_format_is_refused() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "formats.py"), "--formats", "bnb-nf5"]
    done = subprocess.run(command, text=True, capture_output=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "Did you mean bnb-nf4" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_committed_page_has_every_format() -> None:
    """If this fails: `make formats`."""
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    assert sorted(set(re.findall(r"^[|-] (?:\(1\) )?`([\w-]+)`", page, re.M))) == sorted(format_ids())
    assert "FAILED" not in page
