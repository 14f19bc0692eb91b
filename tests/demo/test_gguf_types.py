"""The tables of docs/gguf.md: the commands that make them run, and the page holds every type and recipe."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from quantwire.quantizers.files.recipes import FLOATS, RECIPES
from quantwire.quantizers.ggml_types import TYPES, format_id
from quantwire.quantizers.report import Entry, QuantReport

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "gguf.md"
sys.path.insert(0, str(ROOT / "benchmarks"))


def run(script: str, out: Path) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), "--quick", "--out", str(out)]
    done = subprocess.run(command, text=True, capture_output=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return (out / f"{script}.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The JSON and the tables of a real run of three types."""
    out = tmp_path_factory.mktemp("gguf_types")
    text = run("gguf_types", out)
    return json.loads((out / "gguf_types.json").read_text(encoding="utf-8")), text


@pytest.mark.slow
def test_three_types_are_made_loaded_and_drawn_with(quick: tuple[dict[str, Any], str]) -> None:
    rows = {r["type"]: r for r in quick[0]["rows"]}
    assert list(rows) == ["Q8_0", "Q4_K_M", "gguf-iq4-xs"]
    assert all(r["accuracy"] >= 0.85 and r["sampling_s"] > 0 and not r["failed"] for r in rows.values())
    eight, mixed, four = rows.values()
    assert eight["nbytes"] > mixed["nbytes"] > four["nbytes"]
    assert eight["sqnr_db"] > mixed["sqnr_db"] + 15 > four["sqnr_db"] + 15
    assert eight["psnr_db"] > mixed["psnr_db"] + 10
    assert (eight["bits"], four["bits"]) == (8.5, 4.25)
    assert 4.5 < mixed["bits"] < 6.5
    assert mixed["remarks"] == "4 of 18 layers in Q5_K; 3 of 18 layers in Q6_K"
    for row in rows.values():
        assert f"| `{row['type']}` | {row['bits']:.2f} | {row['nbytes'] / 2**20:.2f} |" in quick[1]


@pytest.mark.slow
def test_sizes_come_from_the_published_shapes(tmp_path: Path) -> None:
    text = run("gguf_sizes", tmp_path)
    found = json.loads((tmp_path / "gguf_sizes.json").read_text(encoding="utf-8"))["FLUX.1 dev"]
    assert found["architecture"] == "flux"
    assert found["weights"] == 11_901_408_320  # of black-forest-labs/FLUX.1-dev
    assert found["nbytes"]["BF16"] > 2 * found["weights"]
    assert 8.5 / 8 * found["weights"] < found["nbytes"]["Q8_0"] < 8.8 / 8 * found["weights"]
    assert "| 24 GiB | Q8_0 |" in text


def test_what_draws_no_digits_or_is_not_in_its_blocks_is_a_failure() -> None:
    import gguf_types

    assert not gguf_types.too_low("Q4_K_M", 0.90, 1.0)
    assert "0.890" in gguf_types.too_low("Q4_K_M", 0.89, 1.0)
    assert gguf_types.too_low("gguf-q8-0", 0.97, 1.0)
    made = QuantReport("x.gguf", "gguf-q4-k", entries=[Entry("a", "quantize", "", 2, 1, format_id="gguf-q4-k")])
    gguf_types.require_the_same_types(made, made.to_dict())
    for other in (
        {"entries": []},
        {"entries": [{"name": "a", "action": "quantize", "format_id": "gguf-q8-0"}]},
        {"entries": [*made.to_dict()["entries"], {"name": "b", "action": "dequantize", "format_id": ""}]},
    ):
        with pytest.raises(ValueError, match=r"x\.gguf"):
            gguf_types.require_the_same_types(made, other)


def test_tables_go_where_the_page_wants_them(tmp_path: Path) -> None:
    from docs_tables import write_between

    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a: start -->\nold\n<!-- a: stop -->\nafter\n", encoding="utf-8")
    for _ in range(2):
        write_between(page, "a", "new")
        text = page.read_text(encoding="utf-8")
        assert text == "before\n<!-- a: start -->\n\nnew\n\n<!-- a: stop -->\nafter\n"
    with pytest.raises(ValueError, match="once each"):
        write_between(page, "b", "new")
    assert page.read_text(encoding="utf-8") == text


def test_the_committed_page_has_every_type() -> None:
    """If this fails: `make gguf`."""
    text = PAGE.read_text(encoding="utf-8").partition("<!-- gguf_types: start -->")[2]
    made = {format_id(kind) for kind in TYPES} | {r.name for r in RECIPES.values() if r.base not in FLOATS}
    assert made - set(re.findall(r"`([\w-]+)`", text)) == set()
    assert "FAILED" not in text
    assert "TOO LOW" not in text
