"""The example outputs of docs/measuring.md: runs each command that the page shows, and puts what it said under it.

    python benchmarks/measuring_page.py [--only forecast ...] [--page docs/measuring.md]

A place in the page is `<!-- NAME: start -->` ... `<!-- NAME: stop -->`; what stands in EXAMPLES under NAME is run in
the project's folder, and its standard output goes between. Pictures go to docs/measuring/. Forecasts, advice and fits
read headers only, so `out/docs/flux1-dev-size.safetensors`, with the header of FLUX.1 dev's published size and no data
(sparse: it takes no disk), stands for a model that nobody has to download. Exit code 1 when a command ends otherwise
than the page says.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docs_tables import write_between
from inspect_time import flux

ROOT = Path(__file__).resolve().parents[1]
MOST_LINES = 60


@dataclass(frozen=True)
class Example:
    """One command as a user types it, after `quantwire`.

    Attributes:
        pictures: files that it writes, for the page.
        code: the exit code that the page promises.
    """

    command: str
    pictures: tuple[str, ...] = ()
    code: int = 0


DEMO = "demo/models/diffusion_models/digits_flux.safetensors"
LARGE = "out/docs/flux1-dev-size.safetensors"
PICTURES = "docs/measuring"
EXAMPLES: dict[str, Example] = {
    "forecast": Example(
        f"forecast {LARGE} --format gguf-q4-k --text-format gguf-q8-0 --vram 12GB --host comfyui"
        f" --plot {PICTURES}/forecast.png",
        (f"{PICTURES}/forecast.png",),
    ),
    "advise": Example(
        f"advise {LARGE} --vram 12GB --device cuda:8.9 --tiers --plot {PICTURES}/advise.png",
        (f"{PICTURES}/advise.png",),
    ),
    "convert": Example(f"convert {DEMO} out/docs/digits_nf4.safetensors --type bnb-nf4 --overwrite"),
    "compare": Example(
        f"compare {DEMO} out/docs/digits_nf4.safetensors --workflow workflows/api/full_precision.json --seeds 4"
        f" --plot {PICTURES}/compare.png",
        (f"{PICTURES}/compare.png",),
    ),
    "bench": Example(
        "bench workflows/api/full_precision.json --against bnb-nf4 gguf-q8-0 gguf-q4-0 --repeats 5 --out out/docs/bench"
    ),
    "recipe": Example(
        "recipe workflows/api/full_precision.json --budget 6.6MB --out out/docs/rules.txt"
        f" --plot {PICTURES}/recipe.png",
        (f"{PICTURES}/recipe.png",),
    ),
    "fit": Example(f"fit {LARGE} --vram 8GB --device cuda:8.6 --host comfyui"),
}


def write_header(path: Path) -> None:
    """A safetensors file of FLUX.1 dev's names and shapes in bfloat16, with holes for data."""
    entries: dict[str, Any] = {}
    end = 0
    for name, shape in flux(3072):
        size = 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + end)


def shown(text: str) -> str:
    """Standard output as the page shows it: without paths of this machine, and cut where it is long."""
    text = text.replace(f"{ROOT}{os.sep}", "").replace(str(Path.home()), "~")
    lines = [re.sub(r"\s+$", "", line) for line in text.strip().splitlines()]
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], f"... and {len(lines) - MOST_LINES + 1} more lines"]
    return "\n".join(lines)


def run(name: str, example: Example) -> str:
    """The Markdown of one example.

    Raises:
        RuntimeError: the command ended otherwise than the page says, or a picture is missing.
    """
    command = [sys.executable, "-m", "quantwire.cli", *shlex.split(example.command)]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    if done.returncode != example.code:
        raise RuntimeError(f"{name}: exit code {done.returncode}, not {example.code}:\n{done.stdout}\n{done.stderr}")
    missing = [p for p in example.pictures if not (ROOT / p).is_file()]
    if missing:
        raise RuntimeError(f"{name}: {', '.join(missing)} was not written.")
    print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
    body = [f"```console\n$ quantwire {example.command}\n{shown(done.stdout)}\n```"]
    body += [f"![{name}]({Path(p).relative_to('docs').as_posix()})" for p in example.pictures]
    return "\n\n".join(body)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=list(EXAMPLES), metavar="NAME", help="some of the examples")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "measuring.md")
    args = parser.parse_args()
    (ROOT / PICTURES).mkdir(exist_ok=True)
    write_header(ROOT / LARGE)
    failed = False
    for name in args.only or EXAMPLES:
        try:
            write_between(args.page, name, run(name, EXAMPLES[name]))
        except RuntimeError as err:
            failed = True
            print(err, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
