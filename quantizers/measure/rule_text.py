r"""Rules for single layers, written as few lines as they can be, that name exactly the layers that they should.

    re:^(double_blocks\.(0|3)\.img_mlp\.0|transformer_blocks\.(0|3)\.ff\.net\.0\.proj)$ = gguf-q6-k

Where a model is loaded under other names than its file has, a line names both, so that the same text fits the model in
a graph, the file, and a host that keeps the file's names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from ..rules import Rule, to_text

# Of checkpoints; the module of the model has names without it.
_BEFORE = "model.diffusion_model."
_OPTIONAL = rf"({re.escape(_BEFORE)})?"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")


def rules_text(targets: Mapping[str, str], layers: Mapping[str, Sequence[str]]) -> str:
    """One line for the units of a kind that get the same target.

    Args:
        targets: unit -> `keep`, format id or URI.
        layers: unit -> its layers in the model as it is loaded.
    """
    kinds: dict[tuple[str, str], list[str]] = {}
    for unit, target in targets.items():
        kinds.setdefault((_kind(unit)[0], target), []).append(unit)
    before = _OPTIONAL if any(unit.startswith(_BEFORE) for unit in targets) else ""
    rules: list[Rule] = []
    for (_, target), units in kinds.items():
        here = [layer for unit in units for layer in layers[unit]]
        bodies = [_body(units, targets)]
        if set(here) != set(units):
            every = [layer for unit in targets for layer in layers[unit]]
            bodies += [body for group in _by_kind(here) if (body := _body(group, every))]
        rules.append(Rule(f"re:^{before}({'|'.join(bodies)})$", target))
    return to_text(rules)


def _kind(name: str) -> tuple[str, str]:
    """(the name with its first number left open, that number)."""
    name = name.removeprefix(_BEFORE)
    found = _NUMBER.search(name)
    if found is None:
        return name, ""
    return f"{name[: found.start()]}#{name[found.end() :]}", found.group()


def _by_kind(names: Sequence[str]) -> list[list[str]]:
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(_kind(name)[0], []).append(name)
    return list(kinds.values())


def _body(names: Sequence[str], every: Collection[str]) -> str:
    """A regular expression for names of one kind; the number is left open where all of the kind are meant."""
    kind = _kind(names[0])[0]
    numbers = [_kind(name)[1] for name in names]
    before, mark, after = kind.partition("#")
    if not mark:
        return re.escape(kind)
    whole = sum(1 for name in every if _kind(name)[0] == kind) == len(names)
    inner = r"\d+" if whole else numbers[0] if len(numbers) == 1 else f"({'|'.join(numbers)})"
    return f"{re.escape(before)}{inner}{re.escape(after)}"
