"""Names of one layout from those of another, by tables.

A rule is a target's name and the names of the sources that it is made of, in order. In a name `#` is a block's number
and `*` is `weight` or `bias`, the same on both sides; `@` is any rest of a name.

Nothing is converted by half: a source that no rule names and that may not be left out is refused, and so is a target of
which a part is missing, a gap in the numbering of blocks, and a block that lacks what the others of its kind have.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import FileError
from ...meta import TensorMeta
from .target import Piece, Target, target

_MARKS = {"#": r"(?P<number>\d+)", "*": r"(?P<leaf>weight|bias)", "@": r"(?P<rest>.+)"}


@dataclass(frozen=True)
class Rule:
    """One target.

    Attributes:
        target: its name.
        sources: theirs.
        swap: exchange the halves of the rows: scale and shift stand in the other order.
        swap_in_last: do that in the block with the highest number only.
    """

    target: str
    sources: tuple[str, ...]
    swap: bool = False
    swap_in_last: bool = False


@dataclass(frozen=True)
class Table:
    """How one architecture is renamed.

    Attributes:
        rules: at most one fits each source.
        blocks: target name patterns (with `#` last) of the blocks that must be complete.
        uneven: regular expressions over the rest of a name in a block: what not every block has.
        droppable: regular expressions over source names: what the target layout has no place for, and computes.
    """

    rules: tuple[Rule, ...]
    blocks: tuple[str, ...] = ()
    uneven: tuple[str, ...] = ()
    droppable: tuple[str, ...] = ()


def move(to: str, *sources: str) -> Rule:
    """A target that is its sources below one another."""
    return Rule(to, sources)


def swapped(to: str, source: str) -> Rule:
    return Rule(to, (source,), swap=True)


def under(to: str, source: str, *rules: Rule) -> tuple[Rule, ...]:
    """Rules for what is below one module."""
    return tuple(
        Rule(f"{to}.{r.target}", tuple(f"{source}.{s}" for s in r.sources), r.swap, r.swap_in_last) for r in rules
    )


def convert(table: Table, metas: Mapping[str, TensorMeta], what: str, prefix: str = "") -> list[Target]:
    """The targets, in the order of their first sources.

    Args:
        metas: sources, by name without prefix.
        what: the architecture and layout, for messages.
        prefix: of the sources in the file; `Piece.source` has it.
    Raises:
        FileError: a source that no rule names, or an incomplete target or block.
    """
    rules = [(rule, [_compiled(s) for s in rule.sources]) for rule in table.rules]
    found: dict[str, tuple[Rule, dict[str, str]]] = {}
    last: dict[str, int] = defaultdict(int)
    unknown: list[TensorMeta] = []
    for name, meta in metas.items():
        hit = _find(rules, name)
        if hit is not None:
            rule, marks = hit
            found.setdefault(_fill(rule.target, marks), hit)
            last[rule.target] = max(last[rule.target], int(marks.get("number", 0)))
        elif not any(re.fullmatch(pattern, name) for pattern in table.droppable):
            unknown.append(meta)
    if unknown:
        shown = ", ".join(f"'{m.name}' {m.shape}" for m in unknown[:3])
        raise FileError(
            f"{len(unknown)} tensors have no place in ComfyUI's layout of {what}: {shown}.\n"
            "It is a variant that cannot be converted from diffusers' layout; use the single-file checkpoint of it."
        )
    _check_blocks(table, list(found), what)
    by_source = {prefix + name: meta for name, meta in metas.items()}
    return [
        target(name, _pieces(rule, marks, last[rule.target], prefix), by_source)
        for name, (rule, marks) in found.items()
    ]


def _compiled(name: str) -> re.Pattern[str]:
    parts = re.split(r"([#*@])", name)
    return re.compile("".join(_MARKS.get(part, re.escape(part)) for part in parts))


def _find(rules: list[tuple[Rule, list[re.Pattern[str]]]], name: str) -> tuple[Rule, dict[str, str]] | None:
    for rule, patterns in rules:
        for pattern in patterns:
            match = pattern.fullmatch(name)
            if match:
                return rule, match.groupdict()
    return None


def _fill(name: str, marks: Mapping[str, str]) -> str:
    for mark, group in (("#", "number"), ("*", "leaf"), ("@", "rest")):
        name = name.replace(mark, marks.get(group, mark))
    return name


def _pieces(rule: Rule, marks: Mapping[str, str], last: int, prefix: str) -> tuple[Piece, ...]:
    swap = rule.swap or (rule.swap_in_last and int(marks["number"]) == last)
    return tuple(Piece(prefix + _fill(source, marks), swap=swap) for source in rule.sources)


def _check_blocks(table: Table, names: list[str], what: str) -> None:
    """Every block from the first on is there, with all that blocks of its kind have."""
    for kind in table.blocks:
        pattern = re.compile(re.escape(kind).replace(r"\#", r"(\d+)") + r"\.(.+)")
        rests: dict[int, set[str]] = defaultdict(set)
        for match in filter(None, map(pattern.fullmatch, names)):
            if not any(re.search(p, match[2]) for p in table.uneven):
                rests[int(match[1])].add(match[2])
        every = set[str]().union(*rests.values())
        for number in range(max(rests, default=-1) + 1):
            missing = sorted(every - rests[number])
            if missing:
                shown = kind.replace("#", str(number))
                raise FileError(
                    f"{what}: '{shown}' lacks {', '.join(missing[:3])}, which other blocks have.\n"
                    "The file is not complete; join its parts if it is one of several."
                )
