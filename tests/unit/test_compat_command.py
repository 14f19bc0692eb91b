"""What `quantwire compat` prints: formats that behave alike once, each cell of a format asked for; and its file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from quantwire import cli
from quantwire.commands.compat_table import WIDTH, detailed, grouped
from quantwire.quantizers.compat.matrix import rows
from quantwire.quantizers.compat.modes import HOST_MODES, VARIANTS, Carrier, HostName, OffloadMode, VerdictLevel
from quantwire.quantizers.compat.row import Row

REASONED = (VerdictLevel.BLOCK, VerdictLevel.WARN)


@pytest.fixture(scope="module")
def paragraphs() -> list[str]:
    """One a group; without the hint at the end."""
    return "\n".join(grouped(rows())).split("\n\n")[:-1]


def head_of(paragraph: str) -> tuple[str, str, list[str]]:
    """Host, carrier and formats."""
    head = re.split(r"\n  (?=\S)", paragraph)[0]
    host, carrier, formats = " ".join(head.split()).split(" / ")
    return host, carrier, formats.split(", ")


def entries_of(paragraph: str) -> list[tuple[str, str]]:
    """Verdict, and text of its entry, cells first."""
    found = re.findall(r"\n  (block|warn|unknown|ok) +(\S(?:.|\n {4,})*)", paragraph)
    return [(verdict, " ".join(text.split())) for verdict, text in found]


def cells_of(entry: str) -> set[tuple[str, str]]:
    """Mode and variant of each cell that an entry names."""
    found: set[tuple[str, str]] = set()
    for part in entry.split("; "):
        mode, _, variants = re.sub(r" \([^)]*\).*", "", part).partition(" ")
        found |= {(mode, v) for v in (variants.split(", ") if variants else VARIANTS[OffloadMode(mode)])}
    return found


def test_every_cell_is_in_one_group_under_its_verdict(paragraphs: list[str]) -> None:
    said: dict[tuple[str, ...], str] = {}
    for paragraph in paragraphs:
        host, carrier, formats = head_of(paragraph)
        for verdict, entry in entries_of(paragraph):
            # Causes hold semicolons too; the cells end with the last evidence in brackets before one.
            cells = re.match(r"(?:[a-z, ;-]+ \((?:measured|documented|not measured)[a-z, ]*\)(?:; )?)+", entry)
            assert cells, entry
            for format_id in formats:
                for cell in cells_of(cells[0].removesuffix("; ")):
                    key = (host, carrier, format_id, *cell)
                    assert key not in said
                    said[key] = verdict
    assert said == {
        (r.host.value, r.carrier.value, r.format_id, r.mode.value, r.variant): r.verdict.value for r in rows()
    }


def test_formats_with_the_same_cells_share_a_group_and_others_do_not(paragraphs: list[str]) -> None:
    def behaviour(host: str, carrier: str, format_id: str) -> tuple[object, ...]:
        own = (r for r in rows() if (r.host.value, r.carrier.value, r.format_id) == (host, carrier, format_id))
        library = "" if carrier == "quantwire" else format_id.partition("-")[0]
        cells = ((r.verdict, r.evidence, r.needs, r.cause if r.verdict in REASONED else "") for r in own)
        return host, carrier, library, *cells

    heads = [head_of(p) for p in paragraphs]
    of_group = [{behaviour(host, carrier, f) for f in formats} for host, carrier, formats in heads]
    assert all(len(found) == 1 for found in of_group)
    assert len(set().union(*of_group)) == len(of_group)


def test_what_stops_comes_first(paragraphs: list[str]) -> None:
    order = [v.value for v in (VerdictLevel.BLOCK, VerdictLevel.WARN, VerdictLevel.UNKNOWN, VerdictLevel.OK)]
    for host in HostName:
        ranks = [[order.index(v) for v, _ in entries_of(p)] for p in paragraphs if p.startswith(f"{host.value} ")]
        assert all(found == sorted(found) for found in ranks)
        assert [found[0] for found in ranks] == sorted(found[0] for found in ranks)
        assert ranks[0][0] == 0


def test_a_group_says_each_cause_and_way_out_once_and_none_that_some_of_its_formats_lack(paragraphs: list[str]) -> None:
    for paragraph in paragraphs:
        host, carrier, formats = head_of(paragraph)
        listed = re.findall(r"\n  - ((?:.|\n {4})*)", paragraph)
        ways_out = [re.sub(r"^(?:[a-z, ;-]+): ", "", " ".join(text.split())) for text in listed]
        assert len(set(ways_out)) == len(ways_out)
        causes = [entry.partition(") ")[2] for verdict, entry in entries_of(paragraph) if verdict in ("block", "warn")]
        assert len(set(causes)) == len(causes)
        for format_id in formats:
            own = [r for r in rows() if (r.host.value, r.carrier.value, r.format_id) == (host, carrier, format_id)]
            offered = {remedy.text for row in own for remedy in row.remedies}
            assert {t.replace("the same format", f"format {format_id}") for t in ways_out} <= offered
            assert bool(listed) or not offered or len(formats) > 1


@pytest.mark.parametrize("text", ["grouped", "detailed"])
def test_no_line_is_longer_than_the_terminal_it_is_made_for(text: str) -> None:
    lines = list(grouped(rows()) if text == "grouped" else detailed(rows(), {}))
    assert max(map(len, lines)) <= WIDTH
    assert text == "detailed" or len(lines) < 500


def test_without_a_format_the_groups_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compat", "--host", "comfyui"]) == 0
    own = [row for row in rows() if row.host is HostName.COMFYUI]
    assert capsys.readouterr().out.splitlines() == list(grouped(own))


def test_with_a_format_every_cell_is_printed_with_causes_and_ways_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compat", "--carrier", "library", "--format", "bnb-nf4", "--host", "standalone"]) == 0
    out = capsys.readouterr().out
    own = [r for r in rows() if (r.host, r.carrier, r.format_id) == (HostName.STANDALONE, Carrier.LIBRARY, "bnb-nf4")]
    assert out.startswith("standalone / library / bnb-nf4\n")
    assert len(own) == sum(len(VARIANTS[mode]) for mode in HOST_MODES[HostName.STANDALONE])
    flat = " ".join(out.split())
    for row in own:
        name = f"{row.mode.value} {row.variant}".strip()
        assert re.search(rf"^  {name} +{row.verdict.value} +", out, re.MULTILINE)
        if row.verdict in REASONED:
            assert said_of(row) <= {text for text in said_of(row) if text in flat}
    first = next(line for line in out.splitlines()[1:] if line.startswith("  "))
    assert " block " in first


def said_of(row: Row) -> set[str]:
    texts = {row.cause, row.note, row.raw_error, *(f"- {remedy.text}" for remedy in row.remedies)}
    return {" ".join(text.split()) for text in texts if text}


# --- the file of --json ---


@pytest.mark.parametrize("command", [["compat", "--format", "bnb-nf4"], ["run", "no_such.json"], ["lint", "."]])
@pytest.mark.parametrize("target", ["", ".", "/", "folder", "../{name}"])
def test_a_folder_or_no_name_is_refused_as_the_file_of_a_report(
    command: list[str], target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    target = target.format(name=tmp_path.name)
    before = {*tmp_path.rglob("*"), *tmp_path.parent.iterdir()}
    assert cli.main([*command, "--json", target]) == 2
    err = capsys.readouterr().err
    assert err.startswith("FileError: --json: '")
    assert "is a folder.\nName a file, such as '" in err
    assert err.count("--json") == 1
    assert {*tmp_path.rglob("*"), *tmp_path.parent.iterdir()} == before


def test_a_report_that_cannot_take_its_place_leaves_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of that name that comes while the report is being written."""
    from quantwire.commands import paths
    from quantwire.quantizers.errors import FileError

    target = tmp_path / "report.json"
    write = Path.write_bytes

    def write_and_make_a_folder(self: Path, *args: object, **kwargs: object) -> int:
        target.mkdir()
        return write(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "write_bytes", write_and_make_a_folder)
    with pytest.raises(FileError, match=r"--json: .*report.json cannot be written: Is a directory"):
        paths.write_json(target, {}, "--json")
    assert list(tmp_path.iterdir()) == [target]


def test_a_report_replaces_the_one_before_and_leaves_no_other_file(tmp_path: Path) -> None:
    target = tmp_path / "new" / "rows.json"
    target.parent.mkdir()
    target.write_text("before")
    assert cli.main(["compat", "--format", "bnb-nf4", "--mode", "none", "--json", str(target)]) == 0
    assert {row["format"] for row in json.loads(target.read_text(encoding="utf-8"))} == {"bnb-nf4"}
    assert list(target.parent.iterdir()) == [target]
