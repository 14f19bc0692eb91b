"""The shapes of the compatibility table: rules as they are written, measured cells, and the rows that join them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .modes import Carrier, HostName, OffloadMode, VerdictLevel

if TYPE_CHECKING:
    from .remedies import Remedy

# What probes raise where a library goes on in silence (`probes.moving`, `probes.held`).
PROBES_OWN = ("LeftBehind", "KeptNear")
Evidence = Literal["probed", "documented", "none"]
Needs = Literal["", "gpu", "comfyui"]


@dataclass(frozen=True)
class Rule:
    """What somebody claims of several cells at once. The first rule that covers a cell decides it.

    Attributes:
        formats: format ids; `*` matches any text. Some are no formats but states of one: `quanto-unfrozen`
            (quantize() without freeze()) and `comfyui-gguf-*` (ComfyUI-GGUF's own tensor class). `other-gguf-*` are
            layers of packs that move them themselves, which no rule covers.
        variants: as in `VARIANTS`; empty is every one.
        cause: one sentence without its full stop, fit to stand after "cannot run with ... offload: ".
        source: for what no probe of `quantwire compat --probe` measures: test id in this repository, or where it is
            documented.
        needs: what a machine must have for the cell to be measured there.
        probed: a test in `source` measures it, outside of `quantwire compat --probe`.
        raw_error: how the library's own error begins, where it was seen by somebody; probes tell it themselves.
        versions: what `source` was measured with or read in.
    """

    carrier: Carrier
    formats: tuple[str, ...]
    mode: OffloadMode
    verdict: VerdictLevel
    cause: str
    host: HostName = HostName.STANDALONE
    variants: tuple[str, ...] = ()
    source: str = ""
    needs: Needs = ""
    probed: bool = False
    raw_error: str = ""
    versions: str = ""
    note: str = ""

    def covers(self, carrier: Carrier, key: str, mode: OffloadMode, host: HostName, variant: str) -> bool:
        return (
            self.carrier is carrier
            and self.mode is mode
            and self.host is host
            and (not self.variants or variant in self.variants)
            and any(fnmatchcase(key, pattern) for pattern in self.formats)
        )


class Cell(NamedTuple):
    """One thing that a probe runs, on accelerate and diffusers."""

    carrier: Carrier
    format_id: str
    mode: OffloadMode
    variant: str

    @property
    def key(self) -> str:
        """As in `measured.json`: `library/bnb-nf4/sequential/memory`."""
        return "/".join(filter(None, (self.carrier.value, self.format_id, self.mode.value, self.variant)))


@dataclass(frozen=True)
class Measured:
    """What a probe saw.

    Attributes:
        outcome: equal: twice the output of the same module without offload, bit by bit. differs: another output.
            error: the library raised. skipped: not run, see `reason`.
        error: `Type: first line of the message`; of a type in `PROBES_OWN` where the library raised none.
        libraries: packages that took part.
        device: where it computed.
    """

    outcome: Literal["equal", "differs", "error", "skipped"]
    error: str = ""
    reason: str = ""
    libraries: tuple[str, ...] = ()
    device: str = "cpu"
    versions: Mapping[str, str] = field(default_factory=lambda: dict[str, str]())

    @property
    def raw_error(self) -> str:
        """The library's own error."""
        return "" if self.observed else self.error

    @property
    def observed(self) -> str:
        """What a probe says in its own words."""
        kind, _, text = self.error.partition(": ")
        return text if kind in PROBES_OWN else ""

    def __str__(self) -> str:
        named = (f"{name} {self.versions[name]}" for name in self.libraries if name in self.versions)
        return f"{', '.join(named)} on {self.device}"


@dataclass(frozen=True)
class Row:
    """One cell: a carrier and format under one variant of a mode of one host.

    Attributes:
        raw_error: how the library's own error begins; empty where it raises none, or nobody saw it.
        observed: what a probe saw that the library does not say: parts of a weight that stayed when it was moved.
    """

    carrier: Carrier
    format_id: str
    mode: OffloadMode
    variant: str
    host: HostName
    verdict: VerdictLevel
    cause: str
    evidence: Evidence
    source: str
    raw_error: str
    versions: str
    note: str
    needs: Needs
    observed: str = ""

    @property
    def cell(self) -> Cell:
        return Cell(self.carrier, self.format_id, self.mode, self.variant)

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        """Ways out, best first, each of which is ok in this table; none where it runs."""
        from .remedies import offered

        if self.verdict in (VerdictLevel.OK, VerdictLevel.UNKNOWN):
            return ()
        return offered(self.carrier, self.format_id, self.mode, host=self.host, variant=self.variant)

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return {
            "carrier": self.carrier.value,
            "format": self.format_id,
            "mode": self.mode.value,
            "variant": self.variant,
            "host": self.host.value,
            "verdict": self.verdict.value,
            "evidence": self.evidence,
            "cause": self.cause,
            "remedy": [r.text for r in self.remedies],
            "versions": self.versions,
            "raw_error": self.raw_error,
            "observed": self.observed,
            "source": self.source,
            "needs": self.needs,
            "note": self.note,
        }


@dataclass(frozen=True)
class Answer:
    """What is known of a carrier and format under a mode; `rows` are those that it was taken from."""

    level: VerdictLevel
    cause: str
    rows: tuple[Row, ...] = ()
