"""What the compatibility table says of weights in a workflow file, in words that name the file's nodes."""

from __future__ import annotations

from dataclasses import dataclass

from ...quantizers.compat.matrix import answer
from ...quantizers.compat.modes import HOST_MODES, Carrier, HostName, OffloadMode, VerdictLevel
from ...quantizers.compat.remedies import Remedy, RemedyKind, offered
from ...quantizers.registry import format_ids
from ..standalone.workflow import NodePlace
from .graph import Finding, Level
from .sources import QUANTIZERS, UNTOLD, Held

NOUNS = {"MODEL": "the model", "CLIP": "the text encoders", "VAE": "the VAE", "CONTROL_NET": "the ControlNet"}
HOLDERS = {
    Carrier.QUANTWIRE: "quantwire's layers",
    Carrier.LIBRARY: "the library's own layers",
    Carrier.HOST: "ComfyUI's own layers",
}
SAID = {
    VerdictLevel.BLOCK: "cannot run",
    VerdictLevel.WARN: "may run badly",
    VerdictLevel.UNKNOWN: "is not known to run",
}
WITH_FORMAT = (*QUANTIZERS, "LoadAndQuantize")
WITH_CARRIER = (*WITH_FORMAT, "LoadGGUF", "LoadGGUFTextEncoder", "LoadQuantized")
# Ways out that need no option or mode of the other host.
ANYWHERE = (RemedyKind.CARRIER, RemedyKind.FORMAT)


@dataclass(frozen=True)
class Use:
    """A mode that weights are judged for.

    Attributes:
        variant: how it is carried out; None is not known.
        sized: it is that variant only where the component does not fit the device.
    """

    mode: OffloadMode
    variant: str | None = None
    sized: bool = False


@dataclass(frozen=True)
class Conflict:
    """What an offload finding was worked out from.

    Attributes:
        ways: as many as the finding has remedies, in their order.
    """

    held: Held
    mode: OffloadMode
    ways: tuple[Remedy, ...]


@dataclass(frozen=True)
class Verdicts:
    """For one file.

    Attributes:
        host: what the file is checked for.
        has_check: the file has an OffloadCompat.
    """

    host: HostName
    has_check: bool

    def finding(self, place: NodePlace, h: Held, use: Use, action: str, behind: str) -> Finding | None:
        """None where the weights run in that mode.

        Args:
            place: where they meet it.
            action: of the check; what is block stops.
            behind: a sentence to add, with a space before it.
        """
        mode, host = use.mode, host_of(use.mode, self.host)
        if h.key in UNTOLD:
            return self.untold(place, h, use, host)
        got = answer(h.carrier, h.key, mode, host=host, variant=use.variant)
        if got.level is VerdictLevel.OK:
            return None
        whole = answer(h.carrier, h.key, mode, host=host, variant="whole").level if use.sized else got.level
        verdict = VerdictLevel.WARN if whole is not VerdictLevel.BLOCK is got.level else got.level
        how = "without offload" if mode is OffloadMode.NONE else f"with {mode.value} offload"
        how += f" if {NOUNS[h.kind]} must be split" if verdict is not got.level else ""
        origin = "" if h.origin == place else f", from {h.origin}"
        cause = got.cause or "no measurement or document covers it"
        message = (
            f"{h.label} ({HOLDERS[h.carrier]} in {NOUNS[h.kind]}{origin}) {SAID[got.level]} {how}: {cause}.{behind}"
        )
        level = Level.BLOCK if verdict is VerdictLevel.BLOCK else Level.WARNING
        if action != "block":
            level = Level.NOTE if action == "report" else Level.WARNING
            message += f" The check is set to {action}, so the graph goes on."
        data = {
            "carrier": h.carrier.value,
            "format": h.key,
            "mode": mode.value,
            "host": host.value,
            "verdict": verdict.value,
            "from": h.origin.node_id,
        }
        code = "offload-conflict" if verdict is VerdictLevel.BLOCK else "offload"
        ways = self.ways_out(h, use, host)
        conflict = Conflict(h, mode, ways)
        return Finding(level, code, place, message, self.told(place, h, ways), data, conflict)

    def untold(self, place: NodePlace, h: Held, use: Use, host: HostName) -> Finding | None:
        """A format that is chosen when the graph runs; None where none of them is stopped."""
        levels = {f: answer(h.carrier, f, use.mode, host=host, variant=use.variant).level for f in format_ids()}
        stopped = [f for f, level in levels.items() if level is VerdictLevel.BLOCK]
        if not stopped:
            return None
        how = "without offload" if use.mode is OffloadMode.NONE else f"with {use.mode.value} offload"
        origin = "" if h.origin == place else f", from {h.origin}"
        message = (
            f"{h.label} ({HOLDERS[h.carrier]} in {NOUNS[h.kind]}{origin}) is known when the graph runs, so it was not "
            f"judged; some formats cannot run {how}, such as {', '.join(stopped[:3])}."
        )
        remedy = f"Choose the format in {h.origin} to have it judged, or set its `carrier` to quantwire."
        return Finding(Level.NOTE, "not-judged", place, message, (remedy,), {"from": h.origin.node_id})

    def ways_out(self, h: Held, use: Use, host: HostName) -> tuple[Remedy, ...]:
        """Those of the table that this file's host has."""
        ways = offered(h.carrier, h.key, use.mode, host=host, variant=use.variant)
        return tuple(way for way in ways if host is self.host or way.kind in ANYWHERE)

    def told(self, place: NodePlace, h: Held, ways: tuple[Remedy, ...]) -> tuple[str, ...]:
        """As texts, with this file's nodes named."""
        texts = [_in_file(way, h) for way in ways]
        if self.has_check:
            return tuple(texts)
        new = f"in an OffloadCompat that you put before {place}"
        return tuple(text.replace("in OffloadCompat", new) for text in texts)


def _in_file(way: Remedy, h: Held) -> str:
    """The table's texts name the pack's nodes; here it is known which nodes the file has.

    What foreign or GGUF files hold has no widget for its format, so a Quantize node must make it anew.
    """
    (carrier, key, _, _), own = way.cell, h.origin.class_type
    why = way.text.partition(": ")[2]
    if way.kind not in ANYWHERE or (way.kind is RemedyKind.CARRIER and h.key == f"comfyui-{key}"):
        return way.text
    if carrier is Carrier.HOST:
        return f"Load a file in ComfyUI's own format {key} with ComfyUI's own loader: the host streams such layers."
    if way.kind is RemedyKind.CARRIER and key == h.key and own in WITH_CARRIER:
        return f"Set `carrier` of {h.origin} to {carrier.value}: {why}"
    if own in WITH_FORMAT:
        held = f"`carrier` to {carrier.value} and " if carrier is not h.carrier else ""
        return f"Set {held}`format` to {key} in {h.origin}: {why}"
    quantizer = next((name for name, kind in QUANTIZERS.items() if kind == h.kind), "QuantizeModel")
    return (
        f"Load the full-precision model and put {quantizer} behind it, with carrier {carrier.value} and format {key}: "
        f"{why}"
    )


def other(host: HostName) -> HostName:
    return next(h for h in HostName if h is not host)


def host_of(mode: OffloadMode, host: HostName) -> HostName:
    """The host that has a mode: the one asked for if it has it."""
    return host if mode in HOST_MODES[host] else other(host)
