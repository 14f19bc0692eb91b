"""A process that runs cells one after another and writes a line before and after each.

The first says which cell is in flight, so that a process that a library takes down is charged to that cell. Lines go to
a file of their own: libraries print to both standard streams.

    {"start": "library/bnb-nf4/none"}
    {"done": "library/bnb-nf4/none", "result": {"outcome": "equal", ...}}

On an accelerator a process ends after an error with `AGAIN`: an illegal access there fails whatever the process does
next, which would be charged to the cells after it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..modes import Carrier, OffloadMode
from ..row import Cell

AGAIN = 75


def main(argv: Sequence[str]) -> int:
    """Run the cells of a file.

    Args:
        argv: file with a JSON list of [carrier, format, mode, variant]; file that the lines are written to.
    """
    from .build import quiet

    quiet()
    from .cell import probe
    from .net import compute_device

    cells = [_cell(*entry) for entry in json.loads(Path(argv[0]).read_text(encoding="utf-8"))]
    with Path(argv[1]).open("a", encoding="utf-8") as out:
        for cell in cells:
            _write(out, {"start": cell.key})
            result = probe(cell)
            _write(out, {"done": cell.key, "result": dataclasses.asdict(result)})
            if result.outcome == "error" and compute_device().type != "cpu":
                return AGAIN
    return 0


def _cell(carrier: str, format_id: str, mode: str, variant: str) -> Cell:
    return Cell(Carrier(carrier), format_id, OffloadMode(mode), variant)


def _write(out: Any, line: dict[str, Any]) -> None:
    out.write(json.dumps(line) + "\n")
    out.flush()  # before the next cell can take the process down


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
