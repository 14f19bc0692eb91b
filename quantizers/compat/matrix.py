"""The compatibility table: what happens to each carrier and format under each offload mode of each host.

Claims (`standalone_rules`, `comfyui_rules`) and measurements (`measured.json`, written by `quantwire compat --probe`)
are kept apart and joined here into one row a cell. A row is "probed" only where a probe or test ran that very cell; one
that disagrees with a claim fails the build. Verdicts worked out by code were not chosen: nobody can check those against
the libraries one by one.

Why plain tensors pass and tensor subclasses do not: accelerate takes a weight off the device with `weight.to("meta")`
and puts it back with `type(weight)(data, requires_grad=...)` (accelerate.utils.set_module_tensor_to_device). Whatever
the subclass kept outside `data` is lost on the way.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .modes import HOST_MODES, VARIANTS, Carrier, HostName, OffloadMode, VerdictLevel
from .row import Answer, Cell, Evidence, Measured, Row, Rule

__all__ = ["Answer", "Cell", "Measured", "Row", "Rule", "answer", "find_row", "measured", "probe_cells", "rows"]

MEASURED = Path(__file__).with_name("measured.json")
PROBES = "quantizers/compat/probes, run by `quantwire compat --probe`"

# Formats whose libraries have layers of their own, and states of them that behave otherwise than the format.
LIBRARY_BACKENDS = ("bnb", "quanto", "gguf", "sdnq", "torchao", "nncf", "layerwise")
STATES = ("quanto-unfrozen",)
# Kinds of tensors that only other packs make: an example stands for each.
FOREIGN = ("comfyui-gguf-q8-0", "comfyui-gguf-q4-k")
# diffusers' layer holds these types (diffusers.quantizers.gguf.utils.SUPPORTED_GGUF_QUANT_TYPES, 0.42).
DIFFUSERS_GGUF = tuple(
    f"gguf-{name}"
    for name in ("q8-0", "q4-0", "q4-1", "q5-0", "q5-1", "q2-k", "q3-k", "q4-k", "q5-k", "q6-k", "iq4-nl", "iq4-xs")
)
NO_LAYER = ("nncf-nf4",)  # NNCF has the data type, and no layer for it in torch
# Their libraries change a whole model, so the Quantize nodes cannot make such layers with carrier library.
WHOLE_MODEL = ("nncf", "layerwise")

# Worst first: where one of several variants is in force and nobody knows which.
_WORST = (VerdictLevel.BLOCK, VerdictLevel.WARN, VerdictLevel.UNKNOWN, VerdictLevel.OK)
# These exist to keep a part of a component away; that it fits whole is the exception.
_SPLITTING = (OffloadMode.BALANCED, OffloadMode.PARTIAL)
_ON_DEMAND = "stream"  # variants that nobody gets without asking for them
_DISK = "disk"  # memory is where weights are kept unless asked otherwise


@functools.cache
def _rules() -> tuple[Rule, ...]:
    from . import comfyui_rules, standalone_rules

    return (*standalone_rules.RULES, *comfyui_rules.RULES)


@functools.cache
def measured() -> Mapping[str, Measured]:
    """What the last probes saw, by `Cell.key`."""
    data: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.is_file() else {}
    versions: dict[str, str] = data.get("versions", {})
    return {
        key: Measured(
            cell["outcome"],
            cell.get("error", ""),
            cell.get("reason", ""),
            tuple(cell.get("libraries", ())),
            cell.get("device", "cpu"),
            versions,
        )
        for key, cell in data.get("cells", {}).items()
    }


def forget() -> None:
    """Read the table anew at its next use, after `measured.json` was written."""
    for cached in (_rules, _keys, measured, rows, find_row):
        cached.cache_clear()


@functools.cache
def rows() -> tuple[Row, ...]:
    """Every cell of the formats of the registry and of the named states."""
    found = (
        find_row(carrier, key, mode, host=host, variant=variant)
        for host in HostName
        for carrier, keys in _keys(host).items()
        for key in keys
        for mode in HOST_MODES[host]
        for variant in VARIANTS[mode]
    )
    return tuple(row for row in found if row is not None)


@functools.cache
def find_row(carrier: Carrier, key: str, mode: OffloadMode, *, host: HostName, variant: str) -> Row | None:
    """The row of one cell, or None when nothing is known.

    Args:
        key: format id, known here or not, or one of the states described at `Rule.formats`.
    """
    rule = next((r for r in _rules() if r.covers(carrier, key, mode, host, variant)), None)
    if rule is None:
        return None
    cell = Cell(carrier, key, mode, variant)
    seen = measured().get(cell.key) if host is HostName.STANDALONE else None
    if seen is not None and seen.outcome == "skipped":
        seen = None
    listed = key in _keys(host)[carrier]
    by_test = rule.probed and listed
    evidence: Evidence = "probed" if seen is not None or by_test else "documented" if rule.source else "none"
    source, versions, raw_error, observed = rule.source, rule.versions, rule.raw_error, ""
    if seen is not None:
        source, versions, raw_error, observed = PROBES, str(seen), seen.raw_error, seen.observed
    elif evidence == "none" and (twin := _twin(rule, cell)) is not None:
        evidence, source = "documented", f"measured with {twin[0]}, which is not this format"
        versions, raw_error, observed = str(twin[1]), twin[1].raw_error, twin[1].observed
    elif rule.probed and not listed:
        others = (k for k in _keys(host)[carrier] if rule.covers(carrier, k, mode, host, variant))
        evidence = "documented"
        source = f"{rule.source}: measured with {next(others, 'other formats')}, which is not this format"
    return Row(
        carrier,
        key,
        mode,
        variant,
        host,
        rule.verdict,
        rule.cause,
        evidence,
        source,
        raw_error if rule.verdict is not VerdictLevel.OK else "",
        versions,
        rule.note,
        rule.needs,
        observed if rule.verdict is not VerdictLevel.OK else "",
    )


def _twin(rule: Rule, cell: Cell) -> tuple[str, Measured] | None:
    """A format that the same rule covers and a probe ran, for formats that are not in the registry (`sdnq-int7`)."""
    if rule.host is not HostName.STANDALONE or rule.needs or "*" in rule.formats:
        return None
    for key in _keys(rule.host)[cell.carrier]:
        seen = measured().get(cell._replace(format_id=key).key)
        if seen is None or seen.outcome == "skipped":
            continue
        if rule.covers(cell.carrier, key, cell.mode, rule.host, cell.variant):
            return key, seen
    return None


def answer(carrier: Carrier, key: str, mode: OffloadMode, *, host: HostName, variant: str | None = None) -> Answer:
    """What a model with such weights does under a mode.

    Args:
        variant: how the mode is carried out; None is not known. Then it counts as kept in memory, without streams; a
            mode that exists to split counts as splitting; and a mode of which only some variants stop, those on disk
            too, is a warning that names them.
    """
    names = [variant] if variant is not None else [v for v in VARIANTS[mode] if _ON_DEMAND not in v]
    by_variant = {name: find_row(carrier, key, mode, host=host, variant=name) for name in names}
    levels = {name: VerdictLevel.UNKNOWN if row is None else row.verdict for name, row in by_variant.items()}
    usual = {name: level for name, level in levels.items() if _DISK not in name} or levels
    found = tuple(row for row in by_variant.values() if row is not None)
    stops = [name for name, level in levels.items() if level is VerdictLevel.BLOCK]
    surely = all(name in stops for name in usual) or (mode in _SPLITTING and any(name in stops for name in usual))
    if stops and not surely:
        runs = [name for name in names if name not in stops]
        may = "runs" if VerdictLevel.OK in levels.values() else "may run"
        cause = next(row.cause for row in found if row.verdict is VerdictLevel.BLOCK)
        return Answer(VerdictLevel.WARN, f"it {may} as {_listed(runs)} and stops as {_listed(stops)}: {cause}", found)
    worst = next(level for level in _WORST if level in levels.values())
    rows_of_it = tuple(row for row in found if row.verdict is worst)
    return Answer(worst, rows_of_it[0].cause if rows_of_it else "", rows_of_it)


def probe_cells() -> list[Cell]:
    """What `quantwire compat --probe` runs: every cell on accelerate and diffusers that a library here can make."""
    keys = {c: [k for k in ks if not k.startswith("comfyui-")] for c, ks in _keys(HostName.STANDALONE).items()}
    modes = HOST_MODES[HostName.STANDALONE]
    return [Cell(c, key, mode, v) for c, ks in keys.items() for key in ks for mode in modes for v in VARIANTS[mode]]


@functools.cache
def _keys(host: HostName) -> dict[Carrier, list[str]]:
    """The formats and states whose cells make up the table, by carrier."""
    from ..registry import format_ids

    formats = list(format_ids())
    library = [f for f in formats if f.partition("-")[0] in LIBRARY_BACKENDS and f not in NO_LAYER]
    library = [f for f in library if not f.startswith("gguf-") or f in DIFFUSERS_GGUF]
    states = STATES if host is HostName.STANDALONE else ()
    return {
        Carrier.QUANTWIRE: formats,
        Carrier.LIBRARY: [*library, *states, *FOREIGN],
        Carrier.HOST: [f for f in formats if f.startswith("comfy-")],
    }


def _listed(names: Iterable[str]) -> str:
    return " or ".join(names)
