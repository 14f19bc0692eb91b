"""From the quantized layers that a module holds to verdicts: what an offload mode would do to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .find import Found
from .matrix import answer
from .modes import Carrier, HostName, OffloadMode, VerdictLevel
from .remedies import Remedy, Space, remedies_for
from .row import Row
from .standalone_rules import MEASURED

_SAID = {
    VerdictLevel.OK: "can run",
    VerdictLevel.WARN: "may run badly",
    VerdictLevel.BLOCK: "cannot run",
    VerdictLevel.UNKNOWN: "is not known to run",
}
_HOLDERS = {
    Carrier.QUANTWIRE: "quantwire",
    Carrier.LIBRARY: "library",
    Carrier.HOST: "ComfyUI",
}
# Classes of packs that users know by name, and not by their classes.
_PACKS = {"GGMLTensor": "ComfyUI-GGUF", "GGMLLayer": "ComfyUI-GGUF"}


@dataclass(frozen=True)
class Verdict:
    """What is known of one `Found` under one mode.

    Attributes:
        variant: how the mode is carried out; None is not known.
        cause: one sentence without its full stop.
        remedies: ways out, best first; empty where it runs.
        rows: the cells that it was taken from; empty where nothing is known.
    """

    level: VerdictLevel
    found: Found
    mode: OffloadMode
    cause: str
    remedies: tuple[Remedy, ...]
    rows: tuple[Row, ...] = ()
    host: HostName = HostName.STANDALONE
    variant: str | None = None

    @property
    def row(self) -> Row | None:
        """The cell that decided."""
        return next((r for r in self.rows if r.verdict is self.level), self.rows[0] if self.rows else None)

    @property
    def headline(self) -> str:
        """One sentence that stands alone."""
        f = self.found
        holder = f"{_HOLDERS[f.carrier]} layer{'s' if f.layers != 1 else ''}"
        kind = f"{_PACKS[f.kind]}'s {f.kind}" if f.kind in _PACKS else f.kind
        layers = f"{f.layers} {holder}{f' of {kind}' if kind else ''}{'' if f.frozen else ', not frozen'}"
        return f"{f.format_id} ({layers}) {_SAID[self.level]} {described(self.mode, self.variant)}: {self.cause}."

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        row, f = self.row, self.found
        return {
            "level": self.level.value,
            "mode": self.mode.value,
            "variant": self.variant,
            "host": self.host.value,
            "carrier": f.carrier.value,
            "format_id": f.format_id,
            "layers": f.layers,
            "first_layer": f.name,
            "kind": f.kind,
            "frozen": f.frozen,
            "cause": self.cause,
            "remedies": [r.text for r in self.remedies],
            "changes": [r.to_dict() for r in self.remedies],
            "evidence": row.evidence if row else "none",
            "source": row.source if row else "",
            "raw_error": row.raw_error if row else "",
            "observed": row.observed if row else "",
            "versions": row.versions if row else "",
            "note": row.note if row else "",
        }


def described(mode: OffloadMode, variant: str | None) -> str:
    """`without offload`, `with sequential offload`, `with group offload (leaf-disk)`."""
    if mode is OffloadMode.NONE:
        return "without offload"
    return f"with {mode.value} offload{f' ({variant})' if variant else ''}"


def check(
    found: Sequence[Found],
    mode: OffloadMode,
    *,
    host: HostName = HostName.STANDALONE,
    variant: str | None = None,
    space: Space | None = None,
) -> list[Verdict]:
    """One verdict for each entry of `found`, in order; never silent.

    Args:
        variant: how the mode is carried out; None is not known.
        space: bytes of the component and what is free for it, told in the remedies.
    """
    return [_judge(f, mode, host, variant, space) for f in found]


def explain(verdict: Verdict, component: str) -> str:
    """The message of a conflict; its first line stands alone."""
    lines = [f"{component}: {verdict.headline}"]
    if verdict.row is not None and verdict.row.raw_error:
        first = f" at '{verdict.found.name}'" if verdict.found.name else ""
        lines.append(f"Without this check the library stops{first} with `{verdict.row.raw_error}`.")
    elif verdict.row is not None and verdict.row.observed:
        lines.append(f"Measured with a small model: {verdict.row.observed}.")
    return "\n".join([*lines, *ways_out(verdict)])


def ways_out(verdict: Verdict) -> list[str]:
    """Lines, none where there is no way out."""
    return ["Ways out:", *(f"- {remedy.text}" for remedy in verdict.remedies)] if verdict.remedies else []


def _judge(found: Found, mode: OffloadMode, host: HostName, variant: str | None, space: Space | None) -> Verdict:
    known = answer(found.carrier, found.key, mode, host=host, variant=variant)
    ways_out: tuple[Remedy, ...] = ()
    if known.level is not VerdictLevel.OK:
        ways_out = remedies_for(found, mode, host=host, variant=variant, space=space)
    cause = "measured" if mode is OffloadMode.NONE and known.cause == MEASURED else known.cause
    if not cause:
        holder = f"held by {found.kind}" if found.kind else f"in {_HOLDERS[found.carrier]} layers"
        cause = f"no measurement or document covers {found.format_id} {holder} in this mode"
    return Verdict(known.level, found, mode, cause, ways_out, known.rows, host, variant)
