"""`locales/`: the texts of nodes, commands and settings that the editor shows in the user's language.

The host serves `locales/LANGUAGE/{main,nodeDefs,commands,settings}.json`. `en` is made from the node classes and from
what the web extension declares. A translation keeps what was translated, gets an empty text for what is new, and loses
what is gone; what `web/lib/words.js` holds in both languages is taken from there. `sources.json` beside a translation
has a short hash of each English text and of its translation, so that one whose English has changed since is found. The
help pages of the nodes, `web/docs/NODE.md` and `web/docs/NODE/LANGUAGE.md`, are held there in the same way, as
`docs/NODE`; they are written by hand.

    python -m quantwire.nodes.locale_stubs --write                    # en anew, stubs in the other languages
    python -m quantwire.nodes.locale_stubs --check                    # exit code 1 where a text is missing or old
    python -m quantwire.nodes.locale_stubs --write --still-right KEY  # the English changed and the translation holds
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOCALES = ROOT / "locales"
WEB = ROOT / "web"
PAGES = WEB / "docs"
FILES = ("main", "nodeDefs", "commands", "settings")
REFERENCE = "en"
SOURCES = "sources.json"
# Texts that name what the host offers: none in `en` can stand for them, and without one the editor shows the host's.
FROM_THE_HOST = {("LoadGGUFTextEncoder", "type")}
OWN_TYPES = ("QUANT_CONFIG", "REPORT", "IMATRIX")

Tree = dict[str, Any]


def english() -> dict[str, Tree]:
    """The files of `en`, from the node classes and the web extension."""
    return {"main": _main(0), "nodeDefs": _nodes(), "commands": _commands(0), "settings": _settings(0)}


def translated_elsewhere(language: str) -> dict[str, Tree]:
    """What `web/lib/words.js` says in a language; nothing for one that it does not have."""
    if language != "zh":
        return {}
    return {
        "main": {"settingsCategories": _main(1)["settingsCategories"]},
        "commands": _commands(1),
        "settings": _settings(1),
    }


def _nodes() -> Tree:
    from . import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    found: Tree = {}
    for key, node in NODE_CLASS_MAPPINGS.items():
        found[key] = {
            "display_name": NODE_DISPLAY_NAME_MAPPINGS[key],
            "description": node.DESCRIPTION,  # type: ignore[attr-defined]
            "inputs": {name: _input(key, name, tooltip) for name, tooltip in inputs(node)},
            "outputs": {
                str(i): {"name": name, "tooltip": tooltip}
                for i, (name, tooltip) in enumerate(zip(node.RETURN_NAMES, node.OUTPUT_TOOLTIPS, strict=True))  # type: ignore[attr-defined]
            },
        }
    return found


def inputs(node: Any) -> Iterator[tuple[str, str]]:
    """Names and tooltips of a node's inputs, in the order of the editor."""
    types = node.INPUT_TYPES()
    for group in ("required", "optional"):
        for name, spec in types.get(group, {}).items():
            yield name, spec[1]["tooltip"]


def _input(node: str, name: str, tooltip: str) -> Tree:
    return {"name": name} if (node, name) in FROM_THE_HOST else {"name": name, "tooltip": tooltip}


def _main(column: int) -> Tree:
    from . import NODE_CLASS_MAPPINGS

    parts = {part: part for node in NODE_CLASS_MAPPINGS.values() for part in node.CATEGORY.split("/")}  # type: ignore[attr-defined]
    said = words()
    groups = {said[group][0]: said[group][column] for _, group, _ in setting_entries()}
    return {
        "nodeCategories": parts,
        "dataTypes": {name: name for name in OWN_TYPES},
        "settingsCategories": {"quantwire": "quantwire", **groups},
    }


def _settings(column: int) -> Tree:
    said = words()
    return {
        _key(setting): {"name": said[text][column], "tooltip": said[f"{text}Tip"][column]}
        for setting, _, text in setting_entries()
    }


def _commands(column: int) -> Tree:
    said = words()
    return {_key(command): {"label": said[text][column]} for command, text in command_entries()}


def _key(identity: str) -> str:
    """As the editor looks up an id that may hold dots."""
    return identity.replace(".", "_")


def words() -> dict[str, tuple[str, str]]:
    """`key: ["English", "Chinese"]` of `web/lib/words.js`."""
    text = (WEB / "lib" / "words.js").read_text(encoding="utf-8")
    string = r'"((?:[^"\\]|\\.)*)"'
    found = re.findall(rf"^\s+(\w+): \[\s*{string},\s*{string},?\s*\]", text, re.M)
    return {key: (json.loads(f'"{en}"'), json.loads(f'"{zh}"')) for key, en, zh in found}


def setting_entries() -> list[tuple[str, str, str]]:
    """(id, key of the group's words, key of the setting's words) of each setting in `web/settings.js`."""
    return re.findall(r'entry\("([\w.]+)", "(\w+)", "(\w+)"', (WEB / "settings.js").read_text(encoding="utf-8"))


def command_entries() -> list[tuple[str, str]]:
    """(id, key of the label's words) of each command that the extension registers."""
    found = dict[str, str]()
    for file in sorted(WEB.rglob("*.js")):
        text = file.read_text(encoding="utf-8")
        constants = dict(re.findall(r'^const (\w+) = "([\w.]+)";', text, re.M))
        for identity, label in re.findall(r'\bid: ("[\w.]+"|\w+),\s*label: (?:\(\) => )?say\("(\w+)"\)', text):
            found[constants.get(identity, identity).strip('"')] = label
    return list(found.items())


def flat(tree: Tree, *path: str) -> Iterator[tuple[str, str]]:
    """Every text with its path, joined by slashes."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, *path, key)
        else:
            yield "/".join((*path, key)), value


def read(language: str) -> dict[str, Tree]:
    """The files of a language as they are; empty where one is missing."""
    folder = LOCALES / language
    files = {name: folder / f"{name}.json" for name in FILES}
    return {n: json.loads(f.read_text(encoding="utf-8")) if f.exists() else {} for n, f in files.items()}


def read_sources(language: str) -> dict[str, str]:
    file = LOCALES / language / SOURCES
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def languages() -> list[str]:
    """The translations that there are."""
    return sorted(f.name for f in LOCALES.iterdir() if f.is_dir() and f.name != REFERENCE)


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def help_pages(language: str) -> dict[str, tuple[str, str]]:
    """`docs/NODE` -> the help page in English and in a language, empty where there is none."""
    found: dict[str, tuple[str, str]] = {}
    for page in sorted(PAGES.glob("*.md")):
        other = PAGES / page.stem / f"{language}.md"
        text = other.read_text(encoding="utf-8") if other.exists() else ""
        found[f"docs/{page.stem}"] = page.read_text(encoding="utf-8"), text
    return found


def problems() -> list[str]:
    """What is missing, empty, gone or older than its English text, one line each."""
    wanted = english()
    found: list[str] = []
    if read(REFERENCE) != wanted:
        found.append(f"{REFERENCE}: not what the node classes and web/ say; run --write.")
    texts = dict(flat(wanted))
    for language in languages():
        have = dict(flat(read(language)))
        sources = read_sources(language)
        found += [f"{language}: {key} is missing." for key in texts if key not in have]
        found += [f"{language}: {key} is of nothing any more." for key in have if key not in texts and not _hosts(key)]
        found += [f"{language}: {key} is empty." for key in have if not have[key].strip()]
        for key in texts:
            if have.get(key) and sources.get(key, "").split(" ")[0] != short_hash(texts[key]):
                found.append(f"{language}: {key} translates an older text; it is now: {texts[key]}")
        for key, (original, text) in help_pages(language).items():
            if not text.strip():
                found.append(f"{language}: {key} is missing.")
            elif sources.get(key, "").split(" ")[0] != short_hash(original):
                found.append(f"{language}: {key} translates an older page: look at what changed in web/{key}.md.")
        for name, tree in translated_elsewhere(language).items():
            for key, text in flat(tree, name):
                if have.get(key) != text:
                    found.append(f"{language}: {key} is not what web/lib/words.js says.")
    return found


def _hosts(key: str) -> bool:
    """A translation of a text that `en` leaves to the host."""
    return key in {f"nodeDefs/{node}/inputs/{name}/tooltip" for node, name in FROM_THE_HOST}


def write(still_right: Sequence[str] = ()) -> None:
    """Make `en` anew and put the other languages in step with it."""
    wanted = english()
    _dump(REFERENCE, wanted)
    texts = dict(flat(wanted))
    for language in languages():
        before, sources = dict(flat(read(language))), read_sources(language)
        elsewhere = {k: t for name, tree in translated_elsewhere(language).items() for k, t in flat(tree, name)}
        now = {key: elsewhere.get(key, before.get(key, "")) for key in texts}
        pairs = {key: (texts[key], text) for key, text in now.items()} | help_pages(language)
        kept: dict[str, str] = {}
        for key, (original, text) in pairs.items():
            hashes = f"{short_hash(original)} {short_hash(text)}"
            old = sources.get(key, "")
            # The same translation of another English text is old until somebody changes it or says that it holds.
            changed = not old or old.split(" ")[1] != short_hash(text) or key in elsewhere or key in still_right
            if text:
                kept[key] = hashes if changed else old
        hosts = {key: text for key, text in before.items() if _hosts(key)}
        _dump(language, {name: _translated(wanted[name], now | hosts, name) for name in FILES})
        _write(LOCALES / language / SOURCES, kept)


def _translated(tree: Tree, texts: dict[str, str], *path: str) -> Tree:
    """A tree with its texts from `texts`, and the tooltips among them that only the host has in English."""
    out: Tree = {}
    for key, value in tree.items():
        here = (*path, key)
        out[key] = _translated(value, texts, *here) if isinstance(value, dict) else texts["/".join(here)]
        tooltip = "/".join((*here, "tooltip"))
        if _hosts(tooltip):
            out[key]["tooltip"] = texts.get(tooltip, "")
    return out


def _dump(language: str, files: dict[str, Tree]) -> None:
    for name, tree in files.items():
        _write(LOCALES / language / f"{name}.json", tree)


def _write(file: Path, data: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check `locales/`."""
    parser = argparse.ArgumentParser(prog="python -m quantwire.nodes.locale_stubs", description="Texts of the editor.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="make en anew and stubs in the other languages")
    action.add_argument("--check", action="store_true", help="exit code 1 where a text is missing or old")
    parser.add_argument(
        "--still-right", nargs="+", default=[], metavar="KEY", help="translations that hold as they are"
    )
    args = parser.parse_args(argv)
    if args.write:
        write(args.still_right)
    found = problems()
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
