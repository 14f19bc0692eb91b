"""The documentation: links lead somewhere, commands are ones that the program takes, texts of errors are the code's.

The reference pages are made when the site is built (docs/site), so they cannot be out of date; what is tested of them
is that nothing is left out.
"""

from __future__ import annotations

import argparse
import ast
import functools
import html.parser
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from quantwire import cli
from quantwire.nodes import NODE_CLASS_MAPPINGS
from quantwire.quantizers.compat.raw_errors import SIGNATURES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "demo" / "README.md"])
SOURCES = ("quantizers", "hosts", "nodes", "commands")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
TROUBLES = DOCS / "troubleshooting.md"
BOX = re.compile(r'^```text title="(\w+)"\n(.*?)\n```$', re.M | re.S)


def without_code(text: str) -> str:
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "", text)


@pytest.fixture(scope="module")
def sections() -> Iterator[dict[str, dict[str, str | bytes]]]:
    """What docs/site makes: title of a group -> path under docs -> content."""
    sys.path.insert(0, str(DOCS / "site"))
    try:
        yield importlib.import_module("hook").sections()
    finally:
        sys.path.remove(str(DOCS / "site"))


@pytest.fixture(scope="module")
def made(sections: dict[str, dict[str, str | bytes]]) -> set[Path]:
    return {DOCS / path for pages in sections.values() for path in pages}


def dead_links(page: Path, text: str, made: set[Path]) -> list[str]:
    """Relative links of a page that lead to no file."""
    found = re.findall(r"\]\(([^)\s]+)(?:\s[^)]*)?\)", without_code(text))
    targets = [unquote(t.partition("#")[0]) for t in found if not re.match(r"[a-z]+:", t)]
    places = [(t, Path(os.path.normpath(page.parent / t))) for t in targets if t]
    return [t for t, place in places if not place.exists() and place not in made]


@each_page
def test_no_relative_link_is_dead(page: Path, made: set[Path]) -> None:
    assert dead_links(page, page.read_text(encoding="utf-8"), made) == []


def test_a_dead_link_is_noticed(made: set[Path]) -> None:
    text = "[a](gguf.md), [b](gone.md#x), `[c](code.md)`, [d](https://e.org), [f](reference/nodes/LoadGGUF.md)"
    assert dead_links(DOCS / "index.md", text, made) == ["gone.md"]


def commands_in(text: str) -> Iterator[list[str]]:
    """Calls of `quantwire` in the code of a page; templates of arguments, with [..] or .., are left out."""
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in re.findall(r"^(?: {4,}|\$ |\t)?(?:\.venv/bin/)?quantwire +(.+)$", joined, re.M):
        if not re.search(r"\[|\.\.\.|\$\(", line):
            yield shlex.split(line.partition(" #")[0].partition(";")[0] if "'" not in line else line, comments=True)


@functools.cache
def parser() -> argparse.ArgumentParser:
    return cli._parser([])


@each_page
def test_every_command_is_one_that_the_program_takes(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in commands_in(page.read_text(encoding="utf-8")):
        try:
            parser().parse_args(cli._joined(arguments))
        except SystemExit:
            pytest.fail(f"quantwire {shlex.join(arguments)}\n{capsys.readouterr().err}")
        named = [a for a in arguments if a.startswith(("demo/", "workflows/"))]
        assert [a for a in named if not (ROOT / a).exists()] == []


def test_commands_are_found_in_the_pages() -> None:
    count = {page.relative_to(ROOT): len([*commands_in(page.read_text(encoding="utf-8"))]) for page in PAGES}
    assert count[Path("docs/troubleshooting.md")] >= 4
    assert count[Path("README.md")] >= 15
    assert sum(count.values()) >= 60


def test_a_wrong_command_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    (arguments,) = commands_in("text\n\n    quantwire convert a.safetensors b.gguf --tpye Q4_0\n")
    with pytest.raises(SystemExit):
        parser().parse_args(arguments)
    assert "--type" in capsys.readouterr().err


@functools.cache
def messages() -> set[tuple[str, ...]]:
    """The lines of every text in the code, cut where a value is filled in; those that say at least three words."""
    found: set[tuple[str, ...]] = set()
    for path in [ROOT / "cli.py", *(p for top in SOURCES for p in (ROOT / top).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            else:
                continue
            found |= {tuple(line.split("\0")) for line in text.splitlines() if len(line.split()) >= 3}
    return found


def is_ours(text: str) -> bool:
    """The words of one line of the code stand in it, in order, and are a quarter of it or more."""
    for parts in messages():
        own = sum(map(len, parts))
        if own < 12 or own * 4 < len(text):
            continue
        at = 0
        for part in parts:
            at = text.find(part, at)
            if at < 0:
                break
            at += len(part)
        else:
            return True
    return False


def is_a_librarys(text: str) -> bool:
    return any(re.search(t, text) for signature in SIGNATURES for t in signature.texts)


def test_the_texts_of_troubleshooting_are_those_that_are_raised() -> None:
    boxes = BOX.findall(TROUBLES.read_text(encoding="utf-8"))
    assert {kind for kind, _ in boxes} == {"quantwire", "library"}
    assert [text for kind, text in boxes if kind == "quantwire" and not is_ours(text)] == []
    assert [text for kind, text in boxes if kind == "library" and not is_a_librarys(text)] == []


@pytest.mark.parametrize("text", ["bnb-nf4: bitsandbytes is not there.", "this host lacks the node 'X'.", "None of it"])
def test_a_text_that_nothing_raises_is_noticed(text: str) -> None:
    assert not is_ours(text)
    assert not is_a_librarys(text)


def test_every_environment_variable_is_documented() -> None:
    read: set[str] = set()
    for path in (p for top in SOURCES for p in (ROOT / top).rglob("*.py")):
        read |= set(re.findall(r"\"(QUANTWIRE_[A-Z_]+)\"", path.read_text(encoding="utf-8")))
    page = (DOCS / "reference" / "environment.md").read_text(encoding="utf-8")
    assert read
    assert read == set(re.findall(r"^\| `(QUANTWIRE_[A-Z_]+)`", page, re.M))


def test_every_node_has_a_page_with_all_its_inputs(sections: dict[str, dict[str, str | bytes]]) -> None:
    for name, node in NODE_CLASS_MAPPINGS.items():
        page = str(sections["Nodes"][f"reference/nodes/{name}.md"])
        for group in node.INPUT_TYPES().values():
            for title, entry in group.items():
                (row,) = re.findall(rf"^\| `{title}`(?: \(optional\))? \| .*$", page.partition("## Outputs")[0], re.M)
                plain = row.replace("\\*", "*").replace("&lt;", "<").replace("\\|", "|")
                assert " ".join(entry[1]["tooltip"].split()) in plain
        assert "folder-of-" not in page
        assert str(ROOT) not in page


def test_every_command_has_a_page_with_all_its_options(sections: dict[str, dict[str, str | bytes]]) -> None:
    (commands,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert {"run", "help", *cli.COMMANDS} <= set(commands.choices)
    for name, command in commands.choices.items():
        page = str(sections["Commands"][f"reference/commands/{name}.md"])
        assert all(f"`{o}" in page for a in command._actions if a.dest != "help" for o in a.option_strings)
        assert str(ROOT) not in page
        assert "%(" not in page


def test_every_route_and_schema_is_listed(sections: dict[str, dict[str, str | bytes]]) -> None:
    from quantwire.hosts.editor.routes import ROUTES

    routes = str(sections["Server routes"]["reference/routes.md"])
    assert all(f"| {method} | `{path}` |" in routes for method, path, _ in ROUTES)
    assert all(f"`{path}`" in routes for path in ("/prompt", "/queue", "/object_info", "/view", "/ws"))
    schemas = str(sections["JSON schemas"]["reference/schemas.md"])
    assert all(path.name in schemas for path in (DOCS / "schemas").glob("*.json"))


class _Addresses(html.parser.HTMLParser):
    """Where a page leads, and what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given: dict[str, Any] = dict(attrs)
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag in ("script", "img", "iframe") and given.get("src"):
            self.loaded.append(given["src"])
        elif tag == "link" and given.get("rel") in ("stylesheet", "icon", "preconnect"):
            self.loaded.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The built site, and what MkDocs said."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout + done.stderr


@pytest.mark.slow
def test_the_site_builds_without_a_warning(site: tuple[Path, str]) -> None:
    folder, said = site
    assert not re.search(r"WARNING|ERROR", said), said
    for name in NODE_CLASS_MAPPINGS:
        assert (folder / "reference" / "nodes" / name / "index.html").is_file()
    assert not list(folder.rglob("*.py"))


@pytest.mark.slow
def test_the_site_is_whole_and_needs_no_network(site: tuple[Path, str]) -> None:
    folder, _ = site
    dead: list[str] = []
    for page in folder.rglob("*.html"):
        if page.name == "404.html":  # written for the root of a server
            continue
        found = _Addresses()
        found.feed(page.read_text(encoding="utf-8"))
        assert not [a for a in found.loaded if urlsplit(a).netloc], page
        for address in [*found.loaded, *found.links]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc or not parts.path:
                continue
            place = Path(os.path.normpath(page.parent / unquote(parts.path)))
            if not (place.is_file() or (place / "index.html").is_file()):
                dead.append(f"{page.relative_to(folder)}: {address}")
    assert dead == []
