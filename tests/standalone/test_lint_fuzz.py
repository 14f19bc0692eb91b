"""Damaged workflows: whatever a file holds, lint answers with findings and never with an exception."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from quantwire.hosts.lint.lint import Linter, Options
from quantwire.nodes import NODE_CLASS_MAPPINGS
from quantwire.quantizers.compat.modes import HostName, OffloadMode

HERE = Path(__file__).parent
SHIPPED = HERE.parents[1] / "workflows"
FILES = [*sorted(SHIPPED.glob("*.json")), *sorted((SHIPPED / "api").glob("*.json"))]
FILES += sorted((HERE / "lint_workflows").rglob("*.json"))
ROUNDS = 16  # each file so often: several hundred cases in all
STRANGE: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**70, 1e308, float("nan"), "", "\0", "a\nb", "../../etc/passwd", "1", "QuantizeModel"),
    *([], {}, [[]], ["1", 0], ["1", -1], ["nowhere", 5], {"__value__": ["1", 0]}, [1, 2, 3, 4, 5, 6], "x" * 5000),
)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


def damaged(data: Any, dice: random.Random) -> Any:
    """One to six changes anywhere: a value replaced, taken out, doubled, or put elsewhere."""
    data = copy.deepcopy(data)
    for _ in range(dice.randint(1, 6)):
        spots = [p for p in places(data) if p]
        if not spots:
            break
        *above, key = dice.choice(spots)
        holder = data
        for step in above:
            holder = holder[step]
        kind = dice.randrange(4)
        if kind == 0:
            holder[key] = copy.deepcopy(dice.choice(STRANGE))
        elif kind == 1:
            del holder[key]
        elif kind == 2 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        else:
            source: Any = data
            for step in dice.choice(spots):
                try:
                    source = source[step]
                except (KeyError, IndexError, TypeError):
                    break
            holder[key] = copy.deepcopy(source)
    return data


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_damaged_workflows(path: Path, tmp_path: Path) -> None:
    original = json.loads(path.read_text(encoding="utf-8"))
    dice = random.Random(path.name)
    linters = [
        Linter(Options(offload, host, find_models=dice.random() < 0.5), NODE_CLASS_MAPPINGS)
        for offload, host in ((OffloadMode.SEQUENTIAL, None), *((None, h) for h in HostName))
    ]
    target = tmp_path / "workflow.json"
    for _ in range(ROUNDS):
        data = damaged(original, dice)
        target.write_text(json.dumps(data), encoding="utf-8")
        report = dice.choice(linters).check(target)
        for finding in report.findings:
            assert finding.message
            assert len(finding.message) < 4000, finding.message[:200]
            assert "\n" not in finding.where


@pytest.mark.parametrize("path", FILES[:4], ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_cut_and_flipped_bytes(path: Path, tmp_path: Path) -> None:
    raw = path.read_bytes()
    dice = random.Random(path.name)
    linter = Linter(Options(find_models=False), NODE_CLASS_MAPPINGS)
    target = tmp_path / "workflow.json"
    for _ in range(ROUNDS):
        broken = bytearray(raw[: dice.randrange(len(raw))] if dice.random() < 0.3 else raw)
        for _ in range(dice.randint(0, 8)):
            if broken:
                broken[dice.randrange(len(broken))] = dice.randrange(256)
        target.write_bytes(bytes(broken))
        linter.check(target)
