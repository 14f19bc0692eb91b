"""What to do instead, worked out from the table: nothing is offered whose own cell is not ok in it.

Each remedy names what to change (`kind`, `value`), so that `quantwire lint` and the editor can apply it, and carries
the cell that it leads to. Fixed texts beside the verdicts were not chosen: one that stops being true when a cell
changes would still be offered.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from ..registry import format_ids, get_entry, is_format
from .comfyui_rules import GATHERED, LAUNCH_FLAGS, LOADED, STREAMED, LaunchFlag
from .find import Found
from .matrix import DIFFUSERS_GGUF, NO_LAYER, WHOLE_MODEL, answer
from .modes import VARIANTS, Carrier, HostName, OffloadMode, VerdictLevel
from .row import Cell

LIMIT = 3
MOST_BITS = 1.5  # of a format that is offered, for each bit of the one that stops: twice the size is no way out
_FOREIGN = "comfyui-"  # tensors that another pack made of a file that ours reads too
_UNFROZEN = "quanto-unfrozen"
_MIB, _GIB = 1 << 20, 1 << 30
# Host, mode -> where to look next; those that take the least memory of the device first.
_NEXT_MODES: dict[OffloadMode, tuple[OffloadMode, ...]] = {
    OffloadMode.SEQUENTIAL: (OffloadMode.GROUP, OffloadMode.MODEL, OffloadMode.NONE),
    OffloadMode.GROUP: (OffloadMode.SEQUENTIAL, OffloadMode.MODEL, OffloadMode.NONE),
    OffloadMode.BALANCED: (OffloadMode.MODEL, OffloadMode.GROUP, OffloadMode.SEQUENTIAL, OffloadMode.NONE),
    OffloadMode.MODEL: (OffloadMode.GROUP, OffloadMode.SEQUENTIAL, OffloadMode.NONE),
    OffloadMode.NONE: (OffloadMode.MODEL, OffloadMode.GROUP, OffloadMode.SEQUENTIAL),
}
_WHAT_MODE_DOES: dict[OffloadMode, str] = {
    OffloadMode.NONE: "everything stays on the device, which must hold it",
    OffloadMode.MODEL: "whole components move in and out, so the largest must fit the device",
    OffloadMode.SEQUENTIAL: "layers are streamed one by one, which is slow and takes the least memory",
    OffloadMode.GROUP: "a few layers at a time are on the device",
}


# Of the options in `LAUNCH_FLAGS`; the others lead to the same modes.
_OFFERED_FLAGS = ("", "--novram", "--disable-dynamic-vram", "--highvram", "--cpu")


class RemedyKind(str, Enum):
    CARRIER = "carrier"  # value: quantwire
    SETTING = "setting"  # value: `name=value` of OffloadCompat, several separated by `;`
    MODE = "mode"  # value: the mode for OffloadCompat with set_mode
    FORMAT = "format"  # value: format id
    FLAG = "flag"  # value: option of ComfyUI's command line; empty is none of `LAUNCH_FLAGS`
    FIT = "fit"  # value: "whole"


@dataclass(frozen=True)
class Remedy:
    """One way out.

    Attributes:
        text: one sentence.
        cell, host: where it leads; that cell is ok in the table.
    """

    kind: RemedyKind
    value: str
    text: str
    cell: Cell
    host: HostName

    def to_dict(self) -> dict[str, str]:
        return {"kind": self.kind.value, "value": self.value, "text": self.text}


@dataclass(frozen=True)
class Space:
    """Bytes of the weights of a model, and what the device has free for them."""

    nbytes: int
    free: int

    def __str__(self) -> str:
        return f"it takes {_size(self.nbytes)} and {_size(self.free)} are free for it"


def _size(nbytes: int) -> str:
    return f"{nbytes / _GIB:.1f} GiB" if nbytes >= _GIB else f"{nbytes / _MIB:.0f} MiB"


@dataclass(frozen=True)
class _Conflict:
    carrier: Carrier
    key: str
    format_id: str
    mode: OffloadMode
    host: HostName
    variant: str | None
    space: Space | None


def offered(
    carrier: Carrier,
    key: str,
    mode: OffloadMode,
    *,
    host: HostName,
    variant: str | None = None,
    format_id: str = "",
    space: Space | None = None,
) -> tuple[Remedy, ...]:
    """Up to three ways out, best first.

    Args:
        key: format id or state, as the table names it.
        variant: how the mode is carried out; None is not known.
        format_id: what a state such as `quanto-unfrozen` is going to be; by default told from `key`.
        space: of the model, where it is known.
    """
    format_id = format_id or key.removeprefix(_FOREIGN)
    c = _Conflict(carrier, key, format_id, mode, host, variant, space)
    found = list(_all(c))
    # One of each kind first: three other modes are worth less than a mode, a format and a setting.
    first: dict[RemedyKind, Remedy] = {}
    for remedy in found:
        first.setdefault(remedy.kind, remedy)
    ranked = [*first.values(), *(r for r in found if r not in first.values())]
    return tuple(ranked[:LIMIT])


def remedies_for(
    found: Found, mode: OffloadMode, *, host: HostName, variant: str | None = None, space: Space | None = None
) -> tuple[Remedy, ...]:
    """`offered` for layers that were found in a module."""
    return offered(found.carrier, found.key, mode, host=host, variant=variant, format_id=found.format_id, space=space)


def _all(c: _Conflict) -> Iterator[Remedy]:
    yield from _carriers(c)
    yield from _settings(c)
    yield from _fits(c)
    yield from _modes(c) if c.host is HostName.STANDALONE else _flags(c)
    yield from _formats(c)


def _offer(
    c: _Conflict,
    kind: RemedyKind,
    value: str,
    text: str,
    *,
    carrier: Carrier | None = None,
    key: str | None = None,
    mode: OffloadMode | None = None,
    variant: str | None = None,
) -> Iterator[Remedy]:
    """The remedy, if the cell that it leads to is ok; what is not named stays as it is."""
    carrier, key, mode = carrier or c.carrier, key or c.key, mode or c.mode
    variant = c.variant if variant is None and mode is c.mode else variant
    for concrete in _concrete(mode, variant, c.host):
        if answer(carrier, key, mode, host=c.host, variant=concrete).level is not VerdictLevel.OK:
            return
    last = _concrete(mode, variant, c.host)[-1]
    yield Remedy(kind, value, text, Cell(carrier, key, mode, last), c.host)


def _concrete(mode: OffloadMode, variant: str | None, host: HostName) -> tuple[str, ...]:
    """The variants that must be ok: the one that is known, or all that nobody has to ask for."""
    if variant is not None:
        return (variant,)
    return tuple(v for v in VARIANTS[mode] if "stream" not in v)


def _carriers(c: _Conflict) -> Iterator[Remedy]:
    if c.carrier is Carrier.QUANTWIRE:
        return
    why = "the same values in plain tensors, which every mode can move"
    if c.key.startswith(_FOREIGN):
        text = (
            "Load the same file with carrier quantwire (LoadGGUF; text encoders: LoadGGUFTextEncoder), not with "
            f"ComfyUI-GGUF: {why}."
        )
    elif c.format_id.startswith("gguf-"):
        text = f"Load or quantize with carrier quantwire (LoadGGUF, QuantizeModel): {why}."
    elif is_format(c.format_id) and get_entry(c.format_id).writes:
        text = f"Quantize with carrier quantwire (QuantizeModel, format {c.format_id}): {why}."
    else:
        near = _nearest(c, format_ids())
        text = (
            f"Quantize the full-precision model with carrier quantwire (QuantizeModel, format {near}, which has about "
            "as many bits): plain tensors, which every mode can move."
        )
        yield from _offer(c, RemedyKind.CARRIER, "quantwire", text, carrier=Carrier.QUANTWIRE, key=near)
        return
    yield from _offer(c, RemedyKind.CARRIER, "quantwire", text, carrier=Carrier.QUANTWIRE, key=c.format_id)


def _settings(c: _Conflict) -> Iterator[Remedy]:
    """Other variants of the same mode; those that change one thing first."""
    if c.host is not HostName.STANDALONE or c.mode not in (
        OffloadMode.SEQUENTIAL,
        OffloadMode.BALANCED,
        OffloadMode.GROUP,
    ):
        return
    now = settings_of(c.mode, c.variant) if c.variant is not None else {}
    options: list[tuple[int, str, dict[str, str]]] = []
    for variant in VARIANTS[c.mode]:
        if variant == c.variant or variant == "whole":
            continue
        wanted = settings_of(c.mode, variant)
        changed = {k: v for k, v in wanted.items() if now.get(k) != v}
        options.append((len(changed), variant, changed))
    for _, variant, changed in sorted(options, key=lambda o: o[0]):
        said = " and ".join(f"`{name}` to {value}" for name, value in changed.items())
        text = f"Set {said} in OffloadCompat: {c.mode.value} offload then moves these layers in a way that they allow."
        value = ";".join(f"{name}={value}" for name, value in changed.items())
        yield from _offer(c, RemedyKind.SETTING, value, text, variant=variant)


def settings_of(mode: OffloadMode, variant: str) -> dict[str, str]:
    """The settings of OffloadCompat that lead to a variant of a mode."""
    if mode is OffloadMode.SEQUENTIAL:
        return {"keep_on": variant}
    if mode is OffloadMode.BALANCED:
        return {"keep_on": "disk" if variant.endswith("-disk") else "memory"}
    if mode is OffloadMode.GROUP:
        level, _, how = variant.partition("-")
        return {
            "group_level": level,
            "keep_on": "disk" if how == "disk" else "memory",
            "use_stream": "true" if how == "stream" else "false",
        }
    return {}


def _fits(c: _Conflict) -> Iterator[Remedy]:
    if c.mode not in (OffloadMode.PARTIAL, OffloadMode.BALANCED) or c.variant == "whole":
        return
    if c.space is not None and c.space.nbytes < c.space.free:  # something else keeps a part of it away
        return
    now = f" ({c.space})" if c.space is not None else ""
    if c.mode is OffloadMode.PARTIAL:
        text = (
            f"Let the model fit the GPU whole{now}: with fewer bits, a smaller image or other programs closed, ComfyUI "
            "keeps no layer back."
        )
    else:
        text = f"Let the component fit the device whole{now}: raise `device_gib`, or take fewer bits."
    yield from _offer(c, RemedyKind.FIT, "whole", text, variant="whole")


def _modes(c: _Conflict) -> Iterator[Remedy]:
    for mode in _NEXT_MODES.get(c.mode, ()):
        variants = ("leaf", "block") if mode is OffloadMode.GROUP else (VARIANTS[mode][0],)
        for variant in variants:
            how = f", `group_level` {variant}" if mode is OffloadMode.GROUP else ""
            text = f"Set `mode` to {mode.value}{how} and `set_mode` to true in OffloadCompat: {_WHAT_MODE_DOES[mode]}."
            made = list(_offer(c, RemedyKind.MODE, mode.value, text, mode=mode, variant=variant))
            yield from made
            if made:
                break


def _flags(c: _Conflict) -> Iterator[Remedy]:
    """ComfyUI's options that lead to another mode; first those with which the model need not fit the GPU."""
    for flag in sorted(
        (f for f in LAUNCH_FLAGS if f.flag in _OFFERED_FLAGS), key=lambda f: _OFFERED_FLAGS.index(f.flag)
    ):
        targets = {flag.mode, flag.elsewhere}
        if c.mode in targets or not all(_runs(c, mode) for mode in targets):
            continue
        start = f"with {flag.flag}" if flag.flag else "without options that change its memory mode"
        start += " in place of --novram" if flag.flag and c.mode is OffloadMode.NOVRAM else ""
        whole = {OffloadMode.NONE, OffloadMode.PARTIAL} & targets and flag.flag != "--cpu"
        text = (
            f"Start ComfyUI {start}: it {flag.what}{', so the model must fit the GPU' if whole else _price(c, flag)}."
        )
        variant = "whole" if flag.mode is OffloadMode.PARTIAL else ""
        yield from _offer(c, RemedyKind.FLAG, flag.flag, text, mode=flag.mode, variant=variant)


def _price(c: _Conflict, flag: LaunchFlag) -> str:
    """What these layers cost in a mode that streams them otherwise than the host's own."""
    (row, *_) = answer(c.carrier, c.key, flag.mode, host=c.host, variant="").rows
    return "" if row.cause in (LOADED, STREAMED, GATHERED) else f"; {row.cause}"


def _runs(c: _Conflict, mode: OffloadMode) -> bool:
    """Whether the layers run in a mode of ComfyUI, where the model fits the GPU."""
    variant = VARIANTS[mode][0]
    return answer(c.carrier, c.key, mode, host=c.host, variant=variant).level is VerdictLevel.OK


def _formats(c: _Conflict) -> Iterator[Remedy]:
    """The format with the most similar number of bits whose layers, held as now, run under the same offload."""
    most = _bits(c.format_id) * MOST_BITS
    others = [f for f in format_ids() if f != c.format_id and get_entry(f).bits <= most]
    if c.carrier is not Carrier.QUANTWIRE:
        makable = [f for f in others if c.carrier is not Carrier.LIBRARY or has_layer(f, c.host)]
        able = [f for f in makable if list(_offer(c, RemedyKind.FORMAT, f, "", key=f))]
        if able:
            near = _nearest(c, able)
            holder = "its library's" if c.carrier is Carrier.LIBRARY else "the host's"
            text = f"Set `format` of QuantizeModel to {near}: {holder} layers run under the same offload."
            yield from _offer(c, RemedyKind.FORMAT, near, text, key=near)
    if c.host is HostName.COMFYUI and c.carrier is Carrier.LIBRARY:
        native = [f for f in others if f.startswith("comfy-")]
        if not native:
            return
        near = _nearest(c, native)
        text = f"Load a file in ComfyUI's own format {near} with UNETLoader: the host streams its own layers."
        yield from _offer(c, RemedyKind.FORMAT, near, text, carrier=Carrier.HOST, key=near)


def has_layer(format_id: str, host: HostName) -> bool:
    """Whether the Quantize nodes can make a format with carrier library: its library has a layer of its own."""
    backend = get_entry(format_id).backend
    if backend == "gguf":  # diffusers' layer, which the embedded host uses
        return host is HostName.STANDALONE and format_id in DIFFUSERS_GGUF
    return backend not in WHOLE_MODEL and format_id not in NO_LAYER


def _nearest(c: _Conflict, formats: list[str]) -> str:
    """By bits, then of the same library, then as the registry lists them."""
    bits = _bits(c.format_id)
    backend = c.format_id.partition("-")[0]
    return min(formats, key=lambda f: (abs(get_entry(f).bits - bits), f.partition("-")[0] != backend))


def _bits(format_id: str) -> float:
    """Bits a weight; of formats that are not registered, the first number in the name, else 8."""
    if is_format(format_id):
        return get_entry(format_id).bits
    number = re.search(r"(?<![a-z]e)(\d+)", format_id)
    return float(number[1]) if number and 1 <= int(number[1]) <= 16 else 8.0
