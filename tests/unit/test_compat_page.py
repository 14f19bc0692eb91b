"""docs/compatibility.md is what the table says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from quantwire.quantizers.compat import page
from quantwire.quantizers.compat.matrix import rows
from quantwire.quantizers.compat.modes import HOST_MODES, HostName
from quantwire.quantizers.compat.raw_errors import SIGNATURES


def test_the_page_is_up_to_date() -> None:
    """If this fails: `make pages`."""
    assert page.main(["--check"]) == 0


def test_a_page_out_of_date_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "PAGE", tmp_path / "compatibility.md")
    assert page.main(["--check"]) == 1
    assert page.main(["--write"]) == 0
    assert page.main(["--check"]) == 0
    text = page.PAGE.read_text(encoding="utf-8")
    page.PAGE.write_text(text.replace("**block**", "ok", 1), encoding="utf-8")
    assert page.main(["--check"]) == 1


def test_the_page_names_every_format_that_stops_every_mode_and_every_raw_error() -> None:
    text = page.text()
    assert all(f"`{row.format_id}`" in text for row in rows() if row.verdict.value == "block")
    assert all(mode.value in text for modes in HOST_MODES.values() for mode in modes)
    assert len(HostName) == len(page.HOSTS)
    assert all(s.cause in text for s in SIGNATURES)
    assert not re.search(r"\{\w+\}", text)  # a placeholder that nobody filled
