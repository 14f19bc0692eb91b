"""Help says what URIs accept, completely, and the node's page is what the data say today."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from quantwire import WEB_DIRECTORY
from quantwire.nodes import NODE_CLASS_MAPPINGS
from quantwire.quantizers import help as quant_help
from quantwire.quantizers.errors import SpecError
from quantwire.quantizers.formats import Backend
from quantwire.quantizers.registry import format_ids, get_entry
from quantwire.quantizers.spec import COMMON, QuantSpec

BACKENDS = quant_help.backends()
MADE = format_ids()


def backend_of(format_id: str) -> Backend:
    return quant_help.find_backend(get_entry(format_id).backend)


@pytest.mark.parametrize("format_id", MADE)
def test_the_uri_shown_is_the_uri_of_the_format(format_id: str) -> None:
    shown = quant_help.uri(backend_of(format_id), get_entry(format_id))
    assert shown == QuantSpec(format_id).to_uri()
    assert QuantSpec.from_uri(shown) == QuantSpec(format_id)
    assert shown in quant_help.text([backend_of(format_id)])
    assert f"`{shown}`" in quant_help.page()


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_every_argument_is_explained(backend: Backend) -> None:
    text = " ".join(quant_help.text([backend]).split())
    page = quant_help.page()
    for name, argument in backend.arguments.items():
        values = quant_help.valid_values(backend, name)
        default = quant_help.value_text(argument.default)
        assert f"{name}: {values}; default {default}; {quant_help.used_by(backend, name)}" in text
        assert argument.effect, name
        assert argument.effect in text
        assert f"| `{name}` | {values} | {default} |" in page
    assert all(f" {name}: all formats" in text for name in COMMON)
    assert backend.about in text
    assert backend.package in text
    assert backend.licence in text


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_every_value_shown_is_accepted_and_every_choice_is_shown(backend: Backend) -> None:
    text = quant_help.text([backend])
    for name, argument in backend.arguments.items():
        for value in argument.choices:
            assert value in text, (name, value)
            argument.parse(backend.name, name, value)


def test_every_listed_format_stands_in_the_text_and_on_the_page() -> None:
    page = quant_help.page()
    texts = quant_help.text(BACKENDS)
    for format_id in format_ids(writable=False):
        assert format_id in texts
        assert format_id in page


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.package], ids=lambda b: b.name)
def test_a_backend_is_found_by_its_library_and_its_formats(backend: Backend) -> None:
    assert quant_help.find_backend(backend.package) is backend
    assert all(quant_help.find_backend(e.format_id) is backend for e in backend.entries)


def test_arguments_of_every_backend_are_those_of_the_spec() -> None:
    assert tuple(quant_help.COMMON_EFFECTS) == COMMON


def test_an_unknown_name_is_refused_with_near_ones() -> None:
    with pytest.raises(SpecError, match=r"Unknown backend or format 'bnb-nf5'\. Did you mean bnb-nf4"):
        quant_help.find_backend("bnb-nf5")


def test_the_page_is_up_to_date() -> None:
    """If this fails: `make pages`."""
    assert quant_help.PAGE.read_text(encoding="utf-8") == quant_help.page()
    assert quant_help.main(["--check"]) == 0


def test_a_page_out_of_date_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "docs" / "QuantConfig.md"
    monkeypatch.setattr(quant_help, "PAGE", page)
    assert quant_help.main(["--check"]) == 1
    assert quant_help.main(["--write"]) == 0
    assert quant_help.main(["--check"]) == 0
    page.write_text(page.read_text(encoding="utf-8").replace("nf4", "nf5"), encoding="utf-8")
    assert quant_help.main(["--check"]) == 1


def test_the_page_lies_where_the_host_looks_for_it() -> None:
    root = quant_help.PAGE.parents[2]
    assert (root / WEB_DIRECTORY / "docs").resolve() == quant_help.PAGE.parent
    assert quant_help.PAGE.stem in NODE_CLASS_MAPPINGS


def test_help_needs_no_torch() -> None:
    code = "import sys; from quantwire.cli import main; main(['help', 'bnb']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0
