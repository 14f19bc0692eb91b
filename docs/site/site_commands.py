"""Reference pages of the command line, from its argument parsers."""

from __future__ import annotations

import argparse
import re
import textwrap
from typing import Any

from quantwire import cli

FOLDER = "reference/commands"
WIDTH = 100


def pages() -> dict[str, str | bytes]:
    """Path under docs/ -> Markdown: a list of the commands, and a page for each."""
    parser = cli._parser([])  # with every command
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    helps = {action.dest: action.help or "" for action in commands._choices_actions}
    result: dict[str, str | bytes] = {f"{FOLDER}/index.md": _index(helps)}
    for name, command in commands.choices.items():
        result[f"{FOLDER}/{name}.md"] = _page(name, command, helps[name])
    return result


def _index(helps: dict[str, str]) -> str:
    rows = [f"| [`quantwire {name}`]({name}.md) | {_cell(text)} |" for name, text in helps.items()]
    codes = [f"| {code} | {status} |" for code, status in cli.STATUS.items()]
    return "\n".join(
        [
            "# Commands",
            "",
            "Made from the argument parsers. In a clone the program is `.venv/bin/quantwire`. Every command takes",
            "`--debug`, which adds tracebacks and debug logs.",
            "",
            *("| command | what it does |", "| --- | --- |", *rows, ""),
            "## Exit codes",
            "",
            *("| code | meaning |", "| --- | --- |", *codes, ""),
            "Blocked: a conflict of quantized weights and offload mode, found by OffloadCompat, by `quantwire lint` or",
            "in a library's raw error. An error is one line on standard error and, where there is one, what to do.",
            "",
        ]
    )


def _page(name: str, command: argparse.ArgumentParser, summary: str) -> str:
    arguments = [a for a in command._actions if a.help != argparse.SUPPRESS and a.dest != "help"]
    lines = [f"# quantwire {name}", "", _text(command.description or f"{summary[:1].upper()}{summary[1:]}."), ""]
    lines += ["```text", *_usage(command), "```", ""]
    for title, chosen in (
        ("Argument", [a for a in arguments if not a.option_strings]),
        ("Option", [a for a in arguments if a.option_strings]),
    ):
        if any(_help(a) for a in chosen):  # arguments without a word on them are told in the description
            rows = [f"| {_name(a)} | {_cell(_help(a))} |" for a in chosen]
            lines += [f"## {title}s", "", f"| {title.lower()} | what it does |", "| --- | --- |", *rows, ""]
    if command.epilog:
        lines += ["```text", textwrap.dedent(command.epilog).strip(), "```", ""]
    return "\n".join(lines)


def _usage(command: argparse.ArgumentParser) -> list[str]:
    """The usage line, folded at a width of our own: argparse takes the terminal's."""
    text = " ".join(command.format_usage().removeprefix("usage: ").split())
    return textwrap.wrap(text, WIDTH, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False)


def _name(action: argparse.Action) -> str:
    metavar: Any = action.metavar
    if metavar is None:
        metavar = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    if isinstance(metavar, tuple):
        metavar = " ".join(metavar)
    if not action.option_strings:
        return f"`{metavar if action.metavar else action.dest}`"
    value = "" if action.nargs == 0 else f" [{metavar}]" if action.nargs == "?" else f" {metavar}"
    return ", ".join(f"`{option}{value}`" for option in action.option_strings)


def _help(action: argparse.Action) -> str:
    text = (action.help or "") % {"default": action.default, "prog": "quantwire"}
    repeated = isinstance(action, argparse._AppendAction) and "repeat" not in text
    return f"{text}{'; ' if text and repeated else ''}{'may be given several times' if repeated else ''}"


def _text(text: str) -> str:
    """Plain text, in which stars and angle brackets mean themselves."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(p if p.startswith("`") else p.replace("*", "\\*").replace("<", "&lt;") for p in parts)


def _cell(text: str) -> str:
    return _text(text).replace("|", "\\|")
