"""Help on backends, formats and URI arguments: the text of `quantwire help` and the QuantConfig node's help page.

Both are made from what `formats/*.py` declare, so they cannot drift apart or from what a URI accepts. torch is not
imported, which lets `quantwire help` answer at once.

    python -m quantwire.quantizers.help --write    # makes web/docs/QuantConfig.md anew
    python -m quantwire.quantizers.help --check    # exit code 1 when that file is out of date
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import SpecError, near
from .formats import BACKENDS, Backend, FormatEntry

PAGE = Path(__file__).resolve().parents[1] / "web" / "docs" / "QuantConfig.md"
WIDTH = 110
# Arguments of every backend; `spec.COMMON` lists their names.
COMMON_EFFECTS = {
    "include": "Quantize these layers even though the default rules keep them: layer patterns separated by commas.",
    "exclude": "Keep these layers at full precision: layer patterns separated by commas; wins over include.",
    "rules": (
        "Another format for single layers: `pattern = format`, separated by commas, where the format is an id, a URI "
        "or `keep`. Two rules that want different things of one layer are an error."
    ),
}
GRAMMAR = (
    "A URI is `backend;argument=value;argument=value`. The backend's own arguments choose the format; what is left out "
    "stays at its default. The library's package name is another name of the backend, and a bare format id, such as "
    "`bnb-nf4`, is a URI too. A value or a list's item that holds `;`, `,` or quotes stands in quotes. An unknown "
    "argument or value is refused with the valid ones."
)
PATTERNS = (
    "A layer pattern is a glob over the whole dotted layer name (`*.attn.*`), or, without a wildcard, any dotted part "
    "of it (`blocks.3`), or, after `re:`, a regular expression found anywhere in it."
)

# What the node's page says beside what the formats declare.
PAGE_HEAD = """\
# Quantization Config

Options of a backend as a URI, for the `config` input of the Quantize nodes: what their menus of formats leave at a
default. The URI is checked when the graph is queued.

![Quantization Config](img/QuantConfig.png)

## Example

    QuantConfig (uri bnb;bits=4;bits4-quant-type=nf4)
    -> QuantizeModel (format from config)
    -> KSampler

With double quantization, which saves 0.37 bits a weight: `bnb;bits=4;bits4-quant-type=nf4;bits4-use-double-quant=true`.

## Inputs

| input | what it is |
| --- | --- |
| `uri` | A backend with arguments, or a bare format id. |

## Outputs

| output | what it is |
| --- | --- |
| `config` | For the `config` input of the Quantize nodes, Load and Quantize, Quantization Rules and Memory Forecast. |

## The URI
"""
PAGE_FOOT = """
## Errors

| message | what to do |
| --- | --- |
| `Unknown backend or format '...'.` | The message offers near names and lists all. |
| `...: argument '...' is given twice in '...'.` | Give it once. |
| `format is ..., but the linked config is for ....` | Set that `format` to `from config`, or change the URI. |

## See also

[Quantization Rules](QuantRules.md), [Quantize Model](QuantizeModel.md), [Find Recipe](FindRecipe.md); in the
project's documentation, page `formats.md`: all formats compared."""


def backends() -> list[Backend]:
    """Those that offer at least one format."""
    return [b for b in BACKENDS if b.entries]


def find_backend(name: str) -> Backend:
    """By its own name, its library's, or that of one of its formats.

    Raises:
        SpecError: unknown; near names are offered.
    """
    for backend in backends():
        own = (backend.name, backend.package or backend.name)
        if name in own or any(name == e.format_id for e in backend.entries):
            return backend
    names = [b.name for b in backends()]
    known = [*names, *(e.format_id for b in backends() for e in b.entries)]
    raise SpecError(f"Unknown backend or format '{name}'.{near(name, known)}\nBackends: {', '.join(names)}.")


def uri(backend: Backend, entry: FormatEntry) -> str | None:
    """The shortest URI with the backend's arguments that chooses a format; None where none does."""
    if not entry.writes or entry.format_id not in backend.chosen:
        return None
    return ";".join([backend.name, *(f"{k}={value_text(v)}" for k, v in backend.chosen[entry.format_id].items())])


def value_text(value: Any) -> str:
    """A value as a URI writes it; `not set` for None."""
    if value is None:
        return "not set"
    return str(value).lower() if isinstance(value, bool) else str(value).removesuffix(".0")


def valid_values(backend: Backend, name: str) -> str:
    """What an argument accepts, in words; of a selector with many values, those that menus offer."""
    argument = backend.arguments[name]
    if argument.kind == "bool":
        return "true or false"
    if argument.choices:
        rare = _rare_values(backend, name)
        more = f" and {len(rare)} more, see above" if rare else ""
        return ", ".join(c for c in argument.choices if c not in rare) + more
    if argument.low is not None and argument.high is not None:
        noun = "whole number" if argument.kind == "int" else "number"
        return f"{noun} from {_number(argument.low)} to {_number(argument.high)}"
    return {"int": "whole number", "float": "number"}.get(argument.kind, "text")


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


def _rare_values(backend: Backend, name: str) -> list[str]:
    """Values of a selector that choose only formats which lists leave out."""
    values = {True: list[str](), False: list[str]()}
    for entry in backend.entries:
        if name in backend.chosen.get(entry.format_id, {}):
            values[entry.listed].append(value_text(backend.chosen[entry.format_id][name]))
    return [v for v in values[False] if v not in values[True]]


def used_by(backend: Backend, name: str) -> str:
    """Which formats an argument belongs to."""
    argument = backend.arguments[name]
    if name in backend.selectors:
        return "chooses the format"
    listed = {e.format_id for e in backend.entries if e.listed and e.writes}
    if not argument.applies or listed <= set(argument.applies):
        return "all formats"
    hidden = len(set(argument.applies) - listed)
    shown = [f for f in argument.applies if f in listed]
    return ", ".join([*shown, *([f"{hidden} more that only a URI names"] if hidden else [])])


def overview() -> str:
    """The backends, one paragraph each."""
    lines = ["Backends; `quantwire help BACKEND` shows the formats and arguments of one.", ""]
    for b in backends():
        made, read = (sum(e.listed and e.writes is w for e in b.entries) for w in (True, False))
        count = f"{made} formats" + (f", {read} more to read only" if read else "")
        lines += [f"{b.name:10} {_library(b)}; {count}", *_wrap(b.about, 11)]
    return "\n".join(lines)


def _library(backend: Backend) -> str:
    return f"{backend.package} ({backend.licence})" if backend.package else "needs torch only"


def text(chosen: Sequence[Backend]) -> str:
    """Everything about some backends, for a terminal; what they share stands at the end."""
    lines: list[str] = []
    for backend in chosen:
        lines += [f"{backend.name}: {_library(backend)}", *_wrap(backend.about), ""]
        lines += [*_formats(backend), *_arguments(backend), ""]
    return "\n".join([*lines, *_common_arguments()])


def page() -> str:
    """The QuantConfig node's help page in Markdown."""
    lines = [
        "<!-- Made by `python -m quantwire.quantizers.help --write`; edit quantizers/formats/*.py instead. -->",
        PAGE_HEAD,
        GRAMMAR,
        "",
        "`quantwire formats` tells which formats run on a machine; `quantwire help BACKEND` shows the same help in a "
        "terminal.",
        "",
        "## Arguments of every backend",
        "",
        *_table(("argument", "effect"), [(f"`{k}`", effect) for k, effect in COMMON_EFFECTS.items()]),
        "",
        PATTERNS,
    ]
    for backend in backends():
        lines += ["", *_section(backend)]
    return "\n".join([*lines, PAGE_FOOT]) + "\n"


def _formats(backend: Backend) -> Iterator[str]:
    entries = [e for e in backend.entries if e.listed and e.writes]
    uris = {e.format_id: uri(backend, e) or e.format_id for e in entries}
    if entries:
        yield "Formats"
        width = max(map(len, uris))
        column = max(map(len, uris.values()))
        for e in entries:
            yield f"  {e.format_id:{width}}  {e.bits:>5g} bit  {uris[e.format_id]:{column}}  {e.summary}"
        yield ""
    for title, others in _other_formats(backend):
        yield title
        yield from _wrap(", ".join(others), 2)
        yield ""


def _other_formats(backend: Backend) -> Iterator[tuple[str, list[str]]]:
    readers = [f"{e.format_id} ({e.bits:g})" for e in backend.entries if e.listed and not e.writes]
    if readers:
        yield "Read only, with bits a weight; files of these types open, none are made here", readers
    for name in backend.selectors:
        rare = _rare_values(backend, name)
        if rare:
            yield f"In no menu, but {name}=VALUE in a URI takes them too", rare


def _arguments(backend: Backend) -> Iterator[str]:
    yield f"Arguments, as in {backend.name};ARGUMENT=VALUE;ARGUMENT=VALUE"
    for name, argument in backend.arguments.items():
        values, default = valid_values(backend, name), value_text(argument.default)
        yield from _wrap(f"{name}: {values}; default {default}; {used_by(backend, name)}", 2, 6)
        yield from _wrap(argument.effect, 6)


def _common_arguments() -> Iterator[str]:
    yield "Arguments of every backend"
    for name, effect in COMMON_EFFECTS.items():
        yield f"  {name}: all formats"
        yield from _wrap(effect.replace("`", ""), 6)
    yield from ("", *_wrap(PATTERNS.replace("`", "")))


def _section(backend: Backend) -> Iterator[str]:
    yield f"## {backend.name}"
    yield ""
    yield f"{backend.about} Library: {_library(backend)}." if backend.package else backend.about
    entries = [e for e in backend.entries if e.listed and e.writes]
    if entries:
        rows = [(f"`{e.format_id}`", f"{e.bits:g}", f"`{uri(backend, e) or e.format_id}`", e.summary) for e in entries]
        yield from ("", *_table(("format", "bits", "URI", "what it is"), rows))
    for title, others in _other_formats(backend):
        yield from ("", f"{title}: {', '.join(others)}.")
    if backend.arguments:
        rows = [
            (f"`{name}`", valid_values(backend, name), value_text(a.default), used_by(backend, name), a.effect)
            for name, a in backend.arguments.items()
        ]
        yield from ("", *_table(("argument", "values", "default", "formats", "effect"), rows))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (heads, ["---"] * len(heads), *rows):
        cells = [cell.replace("|", "\\|") for cell in row]
        yield f"| {' | '.join(cells)} |"


def _wrap(text: str, indent: int = 0, hanging: int | None = None) -> list[str]:
    later = indent if hanging is None else hanging
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=" " * indent,
        subsequent_indent=" " * later,
        break_long_words=False,
        break_on_hyphens=False,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the help page."""
    parser = argparse.ArgumentParser(prog="python -m quantwire.quantizers.help", description="Node help page.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help=f"make {PAGE.name} anew")
    action.add_argument("--check", action="store_true", help="exit code 1 when it is out of date")
    args = parser.parse_args(argv)
    if args.write:
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(page(), encoding="utf-8")
        print(PAGE)
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page():
        return 0
    print(f"{PAGE} is out of date: run `python -m quantwire.quantizers.help --write`.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
