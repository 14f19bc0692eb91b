"""The editor's help pages: each node has one that names what the node has, with a picture, an example and its errors.

A page is `web/docs/NODE.md`, in another language `web/docs/NODE/LANGUAGE.md`. The editor takes links and pictures of
both as relative to `web/docs/`.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from quantwire.hosts.editor.formats import formats
from quantwire.hosts.lint.catalog import core_nodes
from quantwire.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, locale_stubs

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "web" / "docs"
LARGEST_PICTURE_NBYTES = 30_000
HEADS = {
    "en": ("Example", "Inputs", "Outputs", "Errors", "See also"),
    "zh": ("示例", "输入", "输出", "错误", "另见"),
}
MARK = "\0"
# Chinese says the same in about four tenths of the characters; one that has less than this has left something out.
SHORTEST = 0.25
PAGES = sorted(DOCS.glob("*.md")) + sorted(DOCS.glob("*/*.md"))
# A translated page may call these by the titles that the editor shows.
KNOWN_BY_TITLE = {*NODE_CLASS_MAPPINGS, "ModelSave"}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(DOCS).as_posix())


def node_of(page: Path) -> str:
    return page.stem if page.parent == DOCS else page.parent.name


def language_of(page: Path) -> str:
    return "en" if page.parent == DOCS else page.stem


def section(page: Path, number: int) -> str:
    """The text below one of the heads that every page has, up to the next head."""
    head = HEADS[language_of(page)][number]
    found = re.search(rf"^## {head}\n(.*?)(?=^## |\Z)", page.read_text(encoding="utf-8"), re.M | re.S)
    assert found, f"no section '{head}'"
    return found[1]


def first_cells(text: str) -> list[str]:
    rows = [re.split(r"(?<!\\)\|", line)[1].strip() for line in text.splitlines() if line.startswith("| ")]
    return [row for row in rows[1:] if row.strip("- ")]


def named(text: str) -> list[str]:
    return [name for cell in first_cells(text) for name in re.findall(r"`([^`]+)`", cell)]


def declared(node: str) -> dict[str, Any]:
    types = NODE_CLASS_MAPPINGS[node].INPUT_TYPES()  # type: ignore[attr-defined]
    return {name: spec for group in ("required", "optional") for name, spec in types.get(group, {}).items()}


def test_every_node_has_a_page_and_every_page_a_node() -> None:
    for language in HEADS:
        assert {node_of(p) for p in PAGES if language_of(p) == language} == set(NODE_CLASS_MAPPINGS)
    assert {language_of(p) for p in PAGES} == set(HEADS)


@each_page
def test_inputs_and_outputs_are_those_of_the_node(page: Path) -> None:
    node = NODE_CLASS_MAPPINGS[node_of(page)]
    assert sorted(named(section(page, 1))) == sorted(declared(node_of(page)))
    assert sorted(named(section(page, 2))) == sorted(node.RETURN_NAMES)  # type: ignore[attr-defined]


def parts(text: str) -> list[tuple[str, str]]:
    """(head, text below it) of each section; the first one is the title's."""
    found = re.split(r"^##? (.*)\n", text, flags=re.M)[1:]
    return list(zip(found[::2], found[1::2], strict=True))


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| ")]


def abridged(english: str, other: str, language: str) -> list[str]:
    """What a translated page lacks of the English one, by its sections."""
    ours, theirs = parts(english), parts(other)
    if len(ours) != len(theirs):
        return [f"{len(theirs)} sections, not {len(ours)}: {[head for head, _ in theirs]}"]
    fixed, heads = dict(zip(HEADS["en"], HEADS[language], strict=True)), list[str]()
    for (head, text), (translated, below) in zip(ours[1:], theirs[1:], strict=True):
        names = set(re.findall(r"[A-Za-z][\w.*-]{3,}", " ".join(re.findall(r"`([^`\n]+)`", text))))
        lacking = sorted(name for name in names - KNOWN_BY_TITLE if name not in below)
        if translated != fixed.get(head, translated):
            heads.append(f"{head}: {translated} stands in its place")
        # Inputs that share a row in English may have rows of their own.
        if head not in HEADS["en"][1:3] and len(rows(text)) != len(rows(below)):
            heads.append(f"{head}: {len(rows(below))} rows, not {len(rows(text))}")
        if lacking:
            heads.append(f"{head}: without {', '.join(lacking)}")
        if len(below) < SHORTEST * len(text):
            heads.append(f"{head}: {len(below)} characters for {len(text)}")
    return heads


@pytest.mark.parametrize("page", [p for p in PAGES if language_of(p) != "en"], ids=node_of)
def test_a_translated_page_has_what_the_english_one_has(page: Path) -> None:
    english = (DOCS / f"{node_of(page)}.md").read_text(encoding="utf-8")
    assert abridged(english, page.read_text(encoding="utf-8"), language_of(page)) == []


def test_an_abridged_page_is_noticed() -> None:
    english = (DOCS / "ConvertModel.md").read_text(encoding="utf-8")
    whole = (DOCS / "ConvertModel" / "zh.md").read_text(encoding="utf-8")
    assert abridged(english, re.sub(r"^## 布局\n.*?(?=^## )", "", whole, flags=re.M | re.S), "zh")[0].startswith(
        "9 sec"
    )
    assert abridged(english, re.sub(r"^\| plain-fp8 .*\n", "", whole, flags=re.M), "zh")[0] == "Layouts: 8 rows, not 9"
    assert abridged(english, whole.replace("`NAME.partial.jsonl`", ""), "zh") == [
        "When it is interrupted: without NAME.partial.jsonl"
    ]
    start, end = whole.index("文件先写成"), whole.index("## 错误")
    assert "When it is interrupted: 10 characters for" in " ".join(
        abridged(english, f"{whole[:start]}见英文帮助页。\n\n{whole[end:]}", "zh")
    )


@pytest.mark.parametrize("page", [p for p in PAGES if language_of(p) != "en"], ids=node_of)
def test_a_translated_page_calls_everything_as_the_editor_does(page: Path) -> None:
    """The title, and beside each id the label that the editor shows in this language."""
    words = locale_stubs.read(language_of(page))["nodeDefs"][node_of(page)]
    assert page.read_text(encoding="utf-8").startswith(f"# {words['display_name']}\n")
    for cell in first_cells(section(page, 1)):
        assert cell == "、".join(f"{words['inputs'][n]['name']} `{n}`" for n in re.findall(r"`([^`]+)`", cell))
    labels = dict(zip(NODE_CLASS_MAPPINGS[node_of(page)].RETURN_NAMES, words["outputs"].values(), strict=True))
    for cell in first_cells(section(page, 2)):
        assert cell == "、".join(f"{labels[n]['name']} `{n}`" for n in re.findall(r"`([^`]+)`", cell))


def test_pages_say_which_options_the_editor_hides() -> None:
    for node, rules in formats()["nodes"].items():
        assert ("The editor shows" in section(DOCS / f"{node}.md", 1)) == bool(rules["depends"]), node


@each_page
def test_the_title_and_the_picture(page: Path) -> None:
    text, node = page.read_text(encoding="utf-8"), node_of(page)
    english = f"# {NODE_DISPLAY_NAME_MAPPINGS[node]}\n"
    assert (english in text) == (language_of(page) == "en")
    folder = "img" if language_of(page) == "en" else f"img/{language_of(page)}"
    assert f"]({folder}/{node}.png)\n" in text
    picture = DOCS / folder / f"{node}.png"
    assert picture.stat().st_size < LARGEST_PICTURE_NBYTES
    with Image.open(picture) as image:
        image.load()
        assert image.format == "PNG"
        assert 340 <= image.width <= 700
        assert len(image.getcolors()) > 8, "a blank picture"


def test_no_picture_is_left_over() -> None:
    pictures = {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.png")}
    shown = {link for page in PAGES for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))}
    assert pictures == shown


@each_page
def test_no_star_stands_where_markdown_takes_it_for_emphasis(page: Path) -> None:
    text = re.sub(r"^(    |> |<!--).*$|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.M)
    assert "*" not in text, re.findall(r".{0,30}\*.{0,30}", text)


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (DOCS / target).is_file(), target
    assert "docs/" not in text, "users of the archive have no such folder; name a page of the project's documentation"
    for target in re.findall(r"`(\w+\.md)`", text):
        assert (ROOT / "docs" / target).is_file(), target
        assert re.search("project's\\s+documentation, page|项目文档的", section(page, 4))
    assert re.search(r"\]\(\w+(/zh)?\.md\)", section(page, 4)), "no link to another page"


@each_page
def test_examples_can_be_built(page: Path) -> None:
    """`NODE (INPUT VALUE, ...) -> NODE`: the nodes are there, have these inputs and choices, and fit together."""
    text = re.sub(r"\n    -> ", " -> ", section(page, 0))
    chains = [line.strip() for line in text.splitlines() if re.match(r"    \w+( \([^)]*\))? -> ", line)]
    assert chains
    assert any(node_of(page) in chain for chain in chains)
    for chain in chains:
        steps = [re.fullmatch(r"(\w+)(?: \((.+)\))?", step) for step in chain.split(" -> ")]
        kinds = []
        for step in steps:
            assert step, chain
            kinds.append(step[1])
            for setting in (step[2] or "").split(", ") if step[2] else ():
                check_setting(step[1], *setting.split(" ", 1))
        for left, right in itertools.pairwise(kinds):
            given, taken = outputs_of(left), links_of(right)
            assert "*" in given | taken or given & taken, f"{left} gives {given}, {right} takes {taken}"


@each_page
def test_the_template_that_a_page_names_has_the_node(page: Path) -> None:
    for name in re.findall(r"(?:template|模板) `([^`]+)`", section(page, 0)):
        workflow = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
        inside = [graph["nodes"] for graph in workflow.get("definitions", {}).get("subgraphs", [])]
        assert node_of(page) in {node["type"] for nodes in [workflow["nodes"], *inside] for node in nodes}


def outputs_of(kind: str) -> set[str]:
    node = NODE_CLASS_MAPPINGS.get(kind)
    return set(node.RETURN_TYPES if node else core_nodes()[kind].outputs)  # type: ignore[attr-defined]


def links_of(kind: str) -> set[str]:
    if kind in NODE_CLASS_MAPPINGS:
        return {spec[0] for spec in declared(kind).values() if isinstance(spec[0], str)}
    return {entry.type for entry in core_nodes()[kind].inputs.values()}


def check_setting(kind: str, name: str, value: str) -> None:
    if kind not in NODE_CLASS_MAPPINGS:
        assert name in core_nodes()[kind].inputs, f"{kind} has no {name}"
        return
    choices = declared(kind)[name][0]
    # The choices of a type of prompts are the host's; this test runs without one.
    if isinstance(choices, list) and name not in ("type",):
        assert value in choices, f"{kind}.{name} has no {value}"


@functools.cache
def texts_in_the_code() -> list[str]:
    """The files of the pack's code with the pieces of each text joined, and a mark for each value that is put in."""
    found: list[str] = []
    for folder in ("nodes", "hosts", "quantizers"):
        for file in (ROOT / folder).rglob("*.py"):
            joined = re.sub(r'"\n?\s*f?"', "", file.read_text(encoding="utf-8"))
            found.append(re.sub(r"\{[^{}]*\}", MARK, joined))
    return found


@each_page
def test_errors_are_those_that_the_code_raises(page: Path) -> None:
    """A message stands on the page as in the code, with `...` for what differs."""
    messages = named(section(page, 3))
    assert len(messages) >= 2
    assert len(messages) == len(set(messages)) == len(first_cells(section(page, 3)))
    for message in messages:
        # The words of the verdict are put in too.
        parts = message.replace(" cannot run with", " ... with").strip(".").split("...")
        longest = max(parts, key=len)
        # What is put in may be written out in the code.
        pattern = r"[^\"\n]{0,60}?".join(re.escape(part) for part in parts)
        assert len(longest) > 5, message
        assert any(longest in text and re.search(pattern, text) for text in texts_in_the_code()), (
            f"no such text in the code: {message}"
        )
