"""Reference pages of the nodes: inputs and outputs from their declarations, then the help page that the editor shows.

Choices that are files are named by the model folder that they come from: every folder gets one marked file first.
"""

from __future__ import annotations

import inspect
import posixpath
import re
import tempfile
from pathlib import Path
from typing import Any

from quantwire.hosts import use
from quantwire.hosts.standalone.host import StandaloneHost
from quantwire.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

ROOT = Path(__file__).resolve().parents[2]
HELP = ROOT / "web" / "docs"
FOLDER = "reference/nodes"
MARK = "folder-of-"
FOLDERS = ("diffusion_models", "text_encoders", "vae", "loras", "checkpoints", "controlnet", "imatrix")
SUFFIXES = (".safetensors", ".gguf")
SHOWN_CHOICES = 12
_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)(#[^)]*)?\)")


def pages() -> dict[str, str | bytes]:
    """Path under docs/ -> Markdown, or the bytes of a picture that a help page shows."""
    with tempfile.TemporaryDirectory() as folder:
        host = StandaloneHost([_marked(Path(folder))])
        with use(host):
            made = {name: _page(name, node) for name, node in NODE_CLASS_MAPPINGS.items()}
    result: dict[str, str | bytes] = {f"{FOLDER}/index.md": _index()}
    for name, text in made.items():
        body, pictures = _with_help(name, text)
        result[f"{FOLDER}/{name}.md"] = body
        result |= pictures
    return result


def _marked(root: Path) -> Path:
    for name in FOLDERS:
        (root / name).mkdir()
        for suffix in SUFFIXES:
            (root / name / f"{MARK}{name}{suffix}").touch()
    return root


def _index() -> str:
    rows = [
        f"| [{NODE_DISPLAY_NAME_MAPPINGS[name]}]({name}.md) | `{name}` | {_cell(_first_sentence(node.DESCRIPTION))} |"
        for name, node in NODE_CLASS_MAPPINGS.items()
    ]
    head = ["# Nodes", "", "Made from the nodes' declarations. Ids are permanent: workflow files hold them.", ""]
    return "\n".join([*head, "| node | id | what it does |", "| --- | --- | --- |", *rows, ""])


def _page(name: str, node: Any) -> str:
    declared = node.INPUT_TYPES()
    lines = [f"# {NODE_DISPLAY_NAME_MAPPINGS[name]}", "", f"Id `{name}`, category `{node.CATEGORY}`.", ""]
    lines += [_cell(node.DESCRIPTION), "", "## Inputs", ""]
    lines += ["| input | type | default | values | what it is |", "| --- | --- | --- | --- | --- |"]
    for group in ("required", "optional"):
        for title, entry in declared.get(group, {}).items():
            lines.append(_input(title, group == "optional", entry[0], entry[1] if len(entry) > 1 else {}))
    lines += ["", "## Outputs", "", "| output | type | what it is |", "| --- | --- | --- |"]
    names = getattr(node, "RETURN_NAMES", node.RETURN_TYPES)
    for title, kind, tip in zip(names, node.RETURN_TYPES, node.OUTPUT_TOOLTIPS, strict=True):
        lines.append(f"| `{title}` | `{kind}` | {_cell(tip)} |")
    if not node.RETURN_TYPES:
        lines[-2:] = ["None: the node is an end of the graph."]
    elif getattr(node, "OUTPUT_NODE", False):
        lines += ["", "The node is also an end of the graph: it runs with nothing linked to its outputs."]
    lines += ["", *_choices(declared)]
    return "\n".join(lines)


def _input(title: str, optional: bool, kind: Any, options: dict[str, Any]) -> str:
    named = f"`{title}`" + (" (optional)" if optional else "")
    shown = "`COMBO`" if isinstance(kind, list) else f"`{kind}`"
    default = options.get("default")
    if default is None and isinstance(kind, list) and kind and not _folder(kind):
        default = kind[0]  # what the editor shows first
    text = "" if default is None else "empty" if default == "" else f"`{_literal(default)}`"
    return f"| {named} | {shown} | {text} | {_values(title, kind, options)} | {_cell(options.get('tooltip', ''))} |"


def _values(title: str, kind: Any, options: dict[str, Any]) -> str:
    if isinstance(kind, list):
        folder = _folder(kind)
        if folder:
            return f"files of {folder}"
        if len(kind) > SHOWN_CHOICES:
            return f"{len(kind)} choices, [below](#choices-of-{title})"
        return ", ".join(f"`{choice}`" for choice in kind)
    if "min" in options or "max" in options:
        low, high = (f"{options[k]:,}" if k in options else "any" for k in ("min", "max"))
        return f"{low} to {high}"
    return ""


def _folder(choices: list[Any]) -> str:
    """The model folders that a list of choices is read from; empty for a list that is none of files."""
    names = [str(c).partition(MARK)[2].rpartition(".")[0] for c in choices if MARK in str(c)]
    return ", ".join(f"`{n}`" for n in dict.fromkeys(names))


def _choices(declared: dict[str, Any]) -> list[str]:
    """The long lists of choices, after the tables."""
    lines: list[str] = []
    for group in declared.values():
        for title, entry in group.items():
            if isinstance(entry[0], list) and len(entry[0]) > SHOWN_CHOICES and not _folder(entry[0]):
                lines += [f"### Choices of {title}", "", ", ".join(f"`{c}`" for c in entry[0]), ""]
    return lines


def _with_help(name: str, text: str) -> tuple[str, dict[str, str | bytes]]:
    """The page with the editor's help page below it, and the pictures that this shows."""
    path = HELP / f"{name}.md"
    if not path.is_file():
        return text, {}
    lines = path.read_text(encoding="utf-8").splitlines()
    body = "\n".join(line for line in lines if not line.startswith(("# ", "<!--")))
    pictures: dict[str, str | bytes] = {}

    def own(match: re.Match[str]) -> str:
        target = match[2]
        source = (HELP / target).resolve()
        if "://" in target or not source.is_file() or source.suffix == ".md":
            return match[0]
        # A picture outside of web/docs gets a place below the nodes' own folder.
        place = posixpath.join(FOLDER, "files", source.relative_to(ROOT / "web").as_posix())
        pictures[place] = source.read_bytes()
        return f"{match[1]}{posixpath.relpath(place, FOLDER)})"

    body = re.sub(r"^(#{2,4}) ", r"#\1 ", _LINK.sub(own, body), flags=re.M)
    return f"{text}\n## Help\n\n{body.strip()}\n", pictures


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.])\s", inspect.cleandoc(text), maxsplit=1)[0]


def _literal(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _cell(text: str) -> str:
    """Plain text, in which stars and angle brackets mean themselves, for a cell of a table."""
    parts = re.split(r"(`[^`]*`)", " ".join(str(text).split()).replace("|", "\\|"))
    return "".join(p if p.startswith("`") else p.replace("*", "\\*").replace("<", "&lt;") for p in parts)
