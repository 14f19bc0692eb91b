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
import importlib.util
import mmap
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from quantwire import cli
from quantwire.nodes import NODE_CLASS_MAPPINGS
from quantwire.quantizers.compat.raw_errors import SIGNATURES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "demo" / "README.md"])
SOURCES = ("quantizers", "hosts", "nodes", "commands")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
TROUBLES = DOCS / "troubleshooting.md"
# The texts in the boxes of troubleshooting.md. What the page fills in stands in guillemets; behind `=` it is a text of
# the code again. What is left must be a line of a text in the code, and whole.
OURS = (
    "'«...»': «12» of «4096» values are nan or inf.",
    "Nothing fits the device's memory«= of «1.00 GiB»»: the smallest choice takes «1.50 GiB»«= while «decoding»».",
    "«transformer»: «=«bnb-nf4» («=«29» «=«library» layer«s»»«= of «Params4bit»»«»») «=cannot run» «=with «sequential» "
    "offload«= («memory»)»»: «=sending a weight off the device also moves the quantization state that its stored copy "
    "shares, which loses it».»",
    "«bnb-nf4»: «=«bitsandbytes» is not installed».",
    "K=«1000» is not a multiple of block size «32»",
    "'«nothere.safetensors»' is not in «.../diffusion_models».«»",
    "«=this host has no node «'UltimateSDUpscale'».«»» «=Run this workflow in ComfyUI» to use a node that this host "
    "lacks.",
    "«=format «'bnb-nf5'» is not among its «64» choices.»«= Did you mean «bnb-nf4, bnb-fp4, bnb-int8»?»",
    '«my_workflow.json»: this is the editor\'s own form (it has "nodes" and "links"); export it in API form: in '
    "ComfyUI, Workflow > Export (API).",
    "'«transformer_blocks.0.attn.to_q»': already quantized («bnb-nf4», «quantwire» carrier).",
    "«short.safetensors»: «=truncated: the tensors need «6909470» bytes, «2862464» are there.»",
    "«header-trailing»: «=«16» bytes follow the last tensor.»",
    "«out/digits-Q4_K_M.gguf»: is there already.",
    "--port: «8199» is taken on «127.0.0.1».",
    "serve: comfyui-frontend-package, the editor itself, is not installed.",
    "The Host '«server.example»' is not one that this server answers to. Open it under the address that it printed, or "
    "start it with --host and the name that you use.",
    "The Origin '«http://other.example»' is not this server; only the editor's own pages may ask.",
    "'«../secret.png»' leads out of its folder.",
    "The body has «104857600» bytes; at most «33554432» are taken.",
    "«http://127.0.0.1:8188»: no connection to a ComfyUI server: «Connection refused». Start ComfyUI there, or correct "
    "the address.",
)
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
def templates() -> set[tuple[str, ...]]:
    """The lines of every text in the code but docstrings, cut where a value is filled in."""
    found: set[tuple[str, ...]] = set()
    for path in [ROOT / "cli.py", *(p for top in SOURCES for p in (ROOT / top).rglob("*.py"))]:
        todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
        while todo:
            node = todo.pop()
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values)
                todo += [v for v in node.values if not isinstance(v, ast.Constant)]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            else:
                todo += ast.iter_child_nodes(node)
                continue
            # `doctor` tells what it finds in a header without this word.
            text += "\n" + text.removeprefix("corrupt: ")
            found |= {tuple(line.split("\0")) for line in text.splitlines() if line.strip()}
    return found


def read_template(marked: str) -> tuple[str, list[tuple[str, ...]]]:
    """An entry of OURS as it stands on the page, and the lines of the code that it is made of."""
    stack: list[list[str]] = [[""]]
    plain: list[str] = [""]
    own: list[bool] = [True]
    lines: list[tuple[str, ...]] = []
    for at, char in enumerate(marked):
        if char == "«":
            stack.append([""])
            own.append(marked[at + 1] == "=")
        elif char == "»":
            parts = tuple(stack.pop())
            lines += [parts] if own.pop() else []
            stack[-1].append("")
        elif char != "=" or marked[at - 1] != "«":
            stack[-1][-1] += char
            plain[0] += char
    return plain[0], [*lines, tuple(stack[0])]


@functools.cache
def ours() -> dict[str, list[tuple[str, ...]]]:
    """The texts as the page has them -> those of their lines that no text of the code is."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for marked in OURS:
        plain, lines = read_template(marked)
        # A line without words only joins others.
        found[plain] = [t for t in lines if any(map(str.strip, t)) and t not in templates()]
    return found


def is_ours(text: str) -> bool:
    """It is one of OURS, and the code still has every line that makes it."""
    return ours().get(text) == []


def boxes(kind: str) -> list[str]:
    return [text for title, text in BOX.findall(TROUBLES.read_text(encoding="utf-8")) if title == kind]


def mutations(text: str) -> Iterator[str]:
    """Wrong texts: a word replaced, left out, doubled or swapped, a third replaced, more behind it."""
    words = text.split(" ")
    for i, word in enumerate(words):
        yield " ".join([*words[:i], "purple", *words[i + 1 :]])
        yield " ".join([*words[:i], word, *words[i:]])
        if len(words) > 1:
            yield " ".join([*words[:i], *words[i + 1 :]])
        if i and word != words[i - 1]:
            yield " ".join([*words[: i - 1], word, words[i - 1], *words[i + 1 :]])
    third = max(1, len(words) // 3)
    yield " ".join([*words[:-third], *["purple"] * third])
    yield " ".join([*["purple"] * third, *words[third:]])
    yield f"{text} and the moon is cheese"


def test_the_texts_of_troubleshooting_are_those_of_the_code() -> None:
    assert {kind for kind, _ in BOX.findall(TROUBLES.read_text(encoding="utf-8"))} == {"quantwire", "library"}
    assert len(boxes("quantwire")) >= 20
    assert {text: lines for text, lines in ours().items() if lines} == {}, "not in the code"
    assert sorted(boxes("quantwire")) == sorted(ours())


@pytest.mark.parametrize("text", boxes("quantwire"), ids=lambda text: text[:30])
def test_a_wrong_text_of_ours_is_noticed(text: str) -> None:
    assert is_ours(text)
    assert [wrong for wrong in mutations(text) if is_ours(wrong)] == []


@pytest.mark.parametrize("marked", OURS, ids=lambda text: text[:30])
def test_a_text_that_the_code_has_otherwise_is_noticed(marked: str) -> None:
    """With a word of the code's own replaced, no line of the code is left that makes it."""
    words = re.findall(r"\b[A-Za-z]{2,}\b", re.sub(r"«[^=«»][^«»]*»", "", marked))
    assert words
    for word in words:
        _, lines = read_template(re.sub(rf"\b{word}\b", "purple", marked))
        assert [t for t in lines if t not in templates()], word


def raised(call: Callable[[], object]) -> str:
    with pytest.raises(Exception) as error:  # noqa: PT011 - the text is what is looked at
        call()
    return str(error.value)


def of_quanto(call: Callable[[Any], object]) -> Callable[[], object]:
    """On a frozen 8-bit weight of quanto."""

    def made() -> object:
        quanto = pytest.importorskip("optimum.quanto")
        model = torch.nn.Sequential(torch.nn.Linear(32, 32))
        quanto.quantize(model, weights=quanto.qint8)
        quanto.freeze(model)
        return call(model[0].weight)

    return made


def copied_from_meta() -> object:
    return torch.empty(1, device="meta").to("cpu")


def quantized_twice() -> object:
    return pytest.importorskip("bitsandbytes").functional.quantize_4bit(torch.zeros(64, dtype=torch.uint8))


def without_quant_type() -> object:
    pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    plain = torch.zeros(32, dtype=torch.uint8)
    plain.quant_type = None  # type: ignore[attr-defined]
    return dequantize_gguf_tensor(plain)


def without_statistics() -> object:
    return torch.nn.Parameter(torch.zeros(1)).SCB  # type: ignore[attr-defined]


def rebuilt(weight: Any) -> object:
    return type(weight)(torch.zeros(1), requires_grad=False)


RAISED: dict[str, Callable[[], object]] = {
    "Cannot copy out of meta tensor; no data!": copied_from_meta,
    "WeightQBytesTensor.__new__() missing 6 required positional arguments: 'axis', 'size', 'stride', 'data', 'scale', "
    "and 'activation_qtype'": of_quanto(rebuilt),
    "None": without_quant_type,
    "Blockwise 4bit quantization only supports 16/32-bit floats, but got torch.uint8": quantized_twice,
    "'Parameter' object has no attribute 'SCB'": without_statistics,
    "The dtype of a weights Tensor cannot be changed": of_quanto(lambda weight: weight.to(torch.float16)),
}
# Those that take a GPU or torchao's own path through diffusers; tests below read them in the libraries.
READ = {
    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
    "Disk offloading is not supported for TorchAO quantized tensors because safetensors cannot serialize TorchAO "
    "subclass tensors.",
}


def is_a_librarys(text: str) -> bool:
    """One of the whole texts that tests here raise or read, which the pack knows by its signatures."""
    return text in {*RAISED, *READ} and any(re.search(t, text) for s in SIGNATURES for t in s.texts)


def test_the_texts_of_libraries_are_whole() -> None:
    assert set(boxes("library")) == {*RAISED, *READ}
    assert [text for text in boxes("library") if not is_a_librarys(text)] == []
    assert [wrong for text in boxes("library") for wrong in mutations(text) if is_a_librarys(wrong)] == []


@pytest.mark.slow
@pytest.mark.parametrize("text", RAISED, ids=lambda text: text[:30])
def test_libraries_raise_these_texts(text: str) -> None:
    """Torch appends advice to some of its texts, in a sentence of its own."""
    said = raised(RAISED[text])
    assert said == text or said.startswith((f"{text} ", f"{text}\n"))


def test_the_text_of_diffusers_is_in_its_source() -> None:
    spec = importlib.util.find_spec("diffusers")
    assert spec
    source = Path(str(spec.origin)).parent / "hooks" / "group_offloading.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    constants = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    (text,) = (t for t in READ if t.startswith("Disk"))
    assert any(c.startswith(text) for c in constants)


@pytest.mark.skipif(sys.platform != "linux", reason="libtorch has another name there")
def test_the_text_of_two_devices_is_in_torch() -> None:
    (text,) = (t for t in READ if t.startswith("Expected"))
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        assert content.find(text.partition("cuda:0")[0].encode()) >= 0


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
