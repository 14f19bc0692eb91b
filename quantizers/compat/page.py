"""The page docs/compatibility.md, from the table.

python -m quantwire.quantizers.compat.page --write     # `make pages`
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from .comfyui_rules import LAUNCH_FLAGS
from .matrix import measured, rows
from .modes import HOST_MODES, VARIANTS, Carrier, HostName, OffloadMode, VerdictLevel
from .raw_errors import SIGNATURES
from .row import Row

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
MADE_BY = "<!-- Made by `make pages` from quantizers/compat; `quantwire compat --probe --write` measures anew. -->"
Column = tuple[OffloadMode, str]

INTRO = """# Quantized weights under offload

What happens to quantized weights when a program moves them between devices: one row for every carrier, format, mode and
host. `quantwire compat --json` prints the rows. OffloadCompat, `quantwire lint` and the translated errors answer from
this table.

A **carrier** is what holds the weights: *quantwire* is this pack's layers (plain tensors), *library* the layers that
the libraries themselves and other tools make (bitsandbytes' `Params4bit`, quanto's tensors, ...), *host* ComfyUI's own
`QuantizedTensor`.

**{probed} of {total} cells are measured.** `quantwire compat --probe` runs the real libraries in each of them, and the
build fails where a measured outcome and a verdict disagree. *ok* is: twice the output of the same module without
offload, bit by bit. *block* is: the library raises, or leaves a part of a weight on the other device. *warn* is: it
runs in some cases, or saves no memory; the tables below say which. Cells that were not measured are marked: ° is read
in documentation or source, ᵍ needs a GPU, ? is not known.

Measured with {versions} ({machine}).
"""

HOSTS = {
    HostName.STANDALONE: (
        "accelerate and diffusers",
        "What `quantwire run` offloads with, and SD.Next, dgenerate and other programs on diffusers. model: "
        "`cpu_offload_with_hook`. sequential: `cpu_offload` (memory), `disk_offload` (disk). balanced: "
        "`dispatch_model` with everything on the device (whole), or a layer kept in memory (split) or on disk "
        "(split-disk). group: diffusers' group offloading, by block or leaf, kept in memory or on disk, or copied on a "
        "stream.\n\n"
        'A machine without an accelerator stands in for one: accelerate takes `torch.device("cpu")` for a compute '
        'device and keeps what is mapped to `"cpu"` or `"disk"` away from it, so weights really leave and come '
        "back. In model mode every `to(device)` of the hook is made to copy there, and group offloading's own "
        "transfer is run once with a copy as what was moved; a part that does not follow would have stayed on the "
        "other device. Layers are made on the CPU. Between passes no layer may hold its whole weight beside what was "
        "kept away, and with what was kept away set to zeros the output must change.",
    ),
    HostName.COMFYUI: (
        "ComfyUI",
        "none: `--highvram`, `--gpu-only`, `--cpu`. partial: the default without dynamic VRAM; whole where the model "
        "fits, split where it does not. novram: `--novram`. dynamic: dynamic VRAM, the default on NVIDIA.",
    ),
}


FLAGS = """What an option of ComfyUI 0.33 makes of its memory mode. Dynamic VRAM is there on NVIDIA GPUs, and on
AMD's from ROCm 7.14, with PyTorch 2.8 and comfy-aimdo."""

ERRORS = """What the libraries say when nobody checked before. Under this pack's nodes such an error is raised again
with its cause and ways out, the original behind it; it is told by its type and the place that it comes from first, by
its text second."""


def text() -> str:
    """The whole page."""
    table = rows()
    probed = sum(row.evidence == "probed" for row in table)
    parts = [MADE_BY, INTRO.format(probed=probed, total=len(table), versions=_versions(), machine=_machine())]
    for host, (title, about) in HOSTS.items():
        own = [row for row in table if row.host is host]
        parts += [f"## {title}", about, _grid(own, host), f"### What stops, and why: {title}", _reasons(own)]
    parts += ["## ComfyUI's memory modes", FLAGS, _flags(), "## Raw errors", ERRORS, _errors()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _versions() -> str:
    seen = next(iter(measured().values()), None)
    return ", ".join(f"{n} {v}" for n, v in sorted(seen.versions.items())) if seen is not None else "nothing yet"


def _machine() -> str:
    return ", ".join(sorted({cell.device for cell in measured().values()})) or "no machine"


def _grid(own: Sequence[Row], host: HostName) -> str:
    """Formats with the same verdicts share a line."""
    columns: list[Column] = [(mode, variant) for mode in HOST_MODES[host] for variant in VARIANTS[mode]]
    cells: dict[tuple[Carrier, str], dict[Column, str]] = {}
    for row in own:
        cells.setdefault((row.carrier, row.format_id), {})[row.mode, row.variant] = _mark(row)
    lines: dict[tuple[Carrier, str, tuple[str, ...]], list[str]] = {}
    for (carrier, format_id), marks in cells.items():
        family = "" if carrier is Carrier.QUANTWIRE else format_id.partition("-")[0]
        found = tuple(marks.get(column, "?") for column in columns)
        lines.setdefault((carrier, family, found), []).append(format_id)
    head = ["carrier", "formats", *(f"{mode.value} {variant}".strip() for mode, variant in columns)]
    body = [[carrier.value, _formats(ids), *marks] for (carrier, _, marks), ids in lines.items()]
    return _table(head, body)


def _mark(row: Row) -> str:
    if row.verdict is VerdictLevel.UNKNOWN:
        return "?ᵍ" if row.needs == "gpu" else "?"
    word = "**block**" if row.verdict is VerdictLevel.BLOCK else row.verdict.value
    if row.evidence == "probed":
        return word
    return word + ("ᵍ" if row.needs == "gpu" else "°")


def _reasons(own: Sequence[Row]) -> str:
    """One line for each cause and error that blocks or warns."""
    groups: dict[tuple[str, str, str, str, str], list[Row]] = {}
    for row in own:
        if row.verdict in (VerdictLevel.BLOCK, VerdictLevel.WARN):
            groups.setdefault((row.carrier.value, row.cause, row.raw_error, row.observed, row.note), []).append(row)
    if not groups:
        return "Nothing."
    head = ["formats", "modes", "cause", "the library's own error, or what was measured", "ways out"]
    body = [
        [
            f"{carrier}: {_formats(dict.fromkeys(r.format_id for r in found))}",
            "; ".join(dict.fromkeys(f"{r.mode.value} {r.variant}".strip() for r in found)),
            f"{cause}. {note}".strip(),
            f"`{_cell(error)}`" if error else _cell(observed),
            " ".join(remedy.text for remedy in found[0].remedies[:2]),
        ]
        for (carrier, cause, error, observed, note), found in groups.items()
    ]
    return _table(head, body)


def _flags() -> str:
    head = ["option", "with dynamic VRAM", "on other GPUs", "what it does"]
    body = [
        [f"`{f.flag}`" if f.flag else "none", f.mode.value, f.elsewhere.value, f"{f.what}. {f.note}".strip()]
        for f in LAUNCH_FLAGS
    ]
    return _table(head, body)


def _errors() -> str:
    """A line a signature; the texts are regular expressions, shown without their escapes."""
    head = ["error", "text", "raised with", "cause"]
    body = [
        [
            ", ".join(kind.__name__ for kind in s.types),
            " or ".join(f"`{_cell(_plain(t))}`" for t in s.texts),
            s.versions or "not seen here",
            f"{s.who}: {s.cause}",
        ]
        for s in SIGNATURES
    ]
    return _table(head, body)


def _plain(pattern: str) -> str:
    for written in (r"\w*", r"\w+", r"\S+", ".*"):
        pattern = pattern.replace(written, "...")
    for written, shown in ((r"\d+", "N"), ("\\", ""), ("^", ""), ("$", "")):
        pattern = pattern.replace(written, shown)
    return pattern


def _formats(ids: Iterable[str]) -> str:
    names = list(ids)
    return ", ".join(f"`{name}`" for name in names) if len(names) <= 16 else f"all {len(names)} formats"


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help=f"make {PAGE.name} anew")
    action.add_argument("--check", action="store_true", help="fail when the page is not what the table says")
    args = parser.parse_args(argv)
    if args.write:
        PAGE.write_text(text(), encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text():
        return 0
    print(f"{PAGE} is not what the table says; run `make pages`.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
