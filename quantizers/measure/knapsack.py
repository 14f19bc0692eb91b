"""One option for each item, the cheapest together under a budget of bytes: the multiple-choice knapsack.

By dynamic programming. Sizes are counted in their greatest common divisor, so the choice is exact wherever the budget
has at most `STEPS` of them; sizes of layers share large divisors. Else sizes are rounded up to a coarser unit, which
never breaks the budget, and what rounding left over is spent on the best single upgrades. A Lagrangian bound, below
which no choice can be, tells how far from the best the result can be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STEPS = 1 << 17
_BISECTIONS = 60


@dataclass(frozen=True)
class Picks:
    """One option an item.

    Attributes:
        options: index of the option of each item.
        nbytes, cost: of all of them together.
        bound: no choice within the budget costs less than this.
        exact: whether sizes were counted to the byte, so that none costs less than `cost`.
    """

    options: tuple[int, ...]
    nbytes: int
    cost: float
    bound: float
    exact: bool


def knapsack(sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], budget: int) -> Picks:
    """Choose.

    Args:
        sizes, costs: of the options of each item; every item has at least one.
        budget: bytes of all items together.
    Raises:
        ValueError: even the smallest options together exceed the budget.
    """
    kept = [_worthwhile(s, c) for s, c in zip(sizes, costs, strict=True)]
    least = sum(sizes[i][options[0]] for i, options in enumerate(kept))
    if least > budget:
        raise ValueError(f"The smallest options take {least} bytes together, and the budget is {budget}.")
    extra = [[sizes[i][o] - sizes[i][options[0]] for o in options] for i, options in enumerate(kept)]
    cost = [[float(costs[i][o]) for o in options] for i, options in enumerate(kept)]
    room = min(budget - least, sum(e[-1] for e in extra))
    unit = math.gcd(*(e for row in extra for e in row)) or 1
    exact = room // unit <= STEPS
    if not exact:
        unit = -(-room // STEPS)
    places = _dynamic([[-(-e // unit) for e in row] for row in extra], cost, room // unit)
    if not exact:
        _spend_rest(places, extra, cost, room)
    chosen = tuple(options[place] for options, place in zip(kept, places, strict=True))
    total = sum(c[place] for c, place in zip(cost, places, strict=True))
    nbytes = sum(sizes[i][o] for i, o in enumerate(chosen))
    return Picks(chosen, nbytes, total, total if exact else _bound(extra, cost, room), exact)


def _worthwhile(sizes: Sequence[int], costs: Sequence[float]) -> list[int]:
    """The options that no other one beats in both, smallest first."""
    kept: list[int] = []
    for option in sorted(range(len(sizes)), key=lambda o: (sizes[o], costs[o])):
        if not kept or costs[option] < costs[kept[-1]]:
            kept.append(option)
    return kept


def _dynamic(extra: list[list[int]], cost: list[list[float]], room: int) -> list[int]:
    """`best[r]` is the least cost of the items so far in r units; the way back is kept, a byte a cell."""
    best = np.zeros(room + 1)
    ways: list[np.ndarray] = []
    for sizes, prices in zip(extra, cost, strict=True):
        new = best + prices[0]
        way = np.zeros(room + 1, np.uint8)
        for option in range(1, len(sizes)):
            size = sizes[option]
            if size > room:
                break
            candidate = best[: room + 1 - size] + prices[option]
            better = candidate < new[size:]
            new[size:][better] = candidate[better]
            way[size:][better] = option
        best = new
        ways.append(way)
    places: list[int] = []
    for sizes, way in zip(reversed(extra), reversed(ways), strict=True):
        places.append(int(way[room]))
        room -= sizes[places[-1]]
    return places[::-1]


def _spend_rest(places: list[int], extra: list[list[int]], cost: list[list[float]], room: int) -> None:
    """Change single items for the better while there is room, the most gain a byte first."""
    left = room - sum(e[p] for e, p in zip(extra, places, strict=True))
    while True:
        found = [
            ((cost[i][p] - cost[i][o]) / (extra[i][o] - extra[i][p]), i, o)
            for i, p in enumerate(places)
            for o in range(p + 1, len(extra[i]))
            if extra[i][o] - extra[i][p] <= left
        ]
        if not found:
            return
        _, item, option = max(found)
        left -= extra[item][option] - extra[item][places[item]]
        places[item] = option


def _bound(extra: list[list[int]], cost: list[list[float]], room: int) -> float:
    """The largest value of the Lagrangian dual, by bisection on the price of a byte."""
    low, high = 0.0, max((c[0] - c[-1]) / max(e[-1], 1) + 1e-30 for e, c in zip(extra, cost, strict=True)) * 1e6
    best = 0.0
    for _ in range(_BISECTIONS):
        price = (low + high) / 2
        options = [min(range(len(e)), key=lambda o: c[o] + price * e[o]) for e, c in zip(extra, cost, strict=True)]
        used = sum(e[o] for e, o in zip(extra, options, strict=True))
        value = sum(c[o] for c, o in zip(cost, options, strict=True)) + price * (used - room)
        best = max(best, value)
        low, high = (price, high) if used > room else (low, price)
    return best
