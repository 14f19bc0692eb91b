"""Format id -> quantizer, made on demand.

Entries are data: asking for the list of formats imports no backend, asking for a quantizer imports its module but not
its library, which is imported at the first probe or use.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from dataclasses import dataclass

from .base import Availability, Quantizer
from .errors import BackendUnavailable, SpecError, near


@dataclass(frozen=True)
class FormatEntry:
    """One line of the registry.

    Attributes:
        format_id: permanent kebab-case id; files and shared workflows hold it.
        backend: name of the folder under `backends/`, and the first word of a URI.
        factory: function in that package which takes the format id and returns the `Quantizer`.
        bits: nominal bits a weight.
        summary: a few words for lists.
        writes: False for formats that can be loaded but not made here.
    """

    format_id: str
    backend: str
    factory: str
    bits: float
    summary: str
    writes: bool = True


_entries: dict[str, FormatEntry] = {}


def register(entries: Iterable[FormatEntry]) -> None:
    """Add formats; all or none.

    Raises:
        SpecError: an id is already taken, or appears twice; the registry is unchanged.
    """
    new: dict[str, FormatEntry] = {}
    for entry in entries:
        if entry.format_id in _entries or entry.format_id in new:
            raise SpecError(f"Format '{entry.format_id}' is already registered.")
        new[entry.format_id] = entry
    _entries.update(new)


def format_ids(*, writable: bool = True) -> list[str]:
    """All ids in registration order; with `writable`, only those that can be made here."""
    return [e.format_id for e in _entries.values() if e.writes or not writable]


def get_entry(format_id: str) -> FormatEntry:
    """Look an id up.

    Raises:
        SpecError: unknown id; near ones are offered.
    """
    try:
        return _entries[format_id]
    except KeyError:
        hint = near(format_id, _entries)
        raise SpecError(f"Unknown format '{format_id}'.{hint}\nFormats: {', '.join(format_ids())}.") from None


@functools.cache
def get_quantizer(format_id: str) -> Quantizer:
    """The quantizer of a format; its library is not imported yet."""
    entry = get_entry(format_id)
    module = importlib.import_module(f".backends.{entry.backend}", __package__)
    return getattr(module, entry.factory)(format_id)


@functools.cache
def availability(format_id: str) -> Availability:
    """The quantizer's probe, run once a process."""
    return get_quantizer(format_id).probe()


def available_formats() -> list[str]:
    """The writable formats that run on this machine; asking imports their libraries."""
    return [f for f in format_ids() if availability(f).works]


def require(format_id: str) -> Quantizer:
    """The quantizer, if it can run here.

    Raises:
        SpecError: unknown id.
        BackendUnavailable: with the probe's reason and remedy.
    """
    quantizer = get_quantizer(format_id)
    state = availability(format_id)
    if not state.works:
        raise BackendUnavailable(f"{format_id}: {state.reason}\n{state.remedy}")
    return quantizer


# Bits a weight with the scales; llama.cpp and other converters make files of these.
_READ_ONLY_GGUF = [
    FormatEntry(f"gguf-{name}", "gguf", "make_reader", bits, f"GGUF {name.upper().replace('-', '_')}", writes=False)
    for name, bits in {
        **{"q4-1": 5, "q5-0": 5.5, "q5-1": 6, "q2-k": 2.625, "q3-k": 3.4375, "q4-k": 4.5, "q5-k": 5.5, "q6-k": 6.5625},
        **{"iq1-s": 1.5625, "iq1-m": 1.75, "iq2-xxs": 2.0625, "iq2-xs": 2.3125, "iq2-s": 2.5625, "iq3-xxs": 3.0625},
        **{"iq3-s": 3.4375, "iq4-nl": 4.5, "iq4-xs": 4.25, "tq1-0": 1.6875, "tq2-0": 2.0625, "mxfp4": 4.25},
        **{"nvfp4": 4.5},
    }.items()
]

register(
    [
        FormatEntry("bnb-int8", "bnb", "make", 8, "LLM.int8, one scale a row, W8A8 with outlier columns"),
        FormatEntry("bnb-nf4", "bnb", "make", 4, "NormalFloat4, blocks of 64"),
        FormatEntry("bnb-fp4", "bnb", "make", 4, "4-bit float, blocks of 64"),
        FormatEntry("quanto-qint8", "quanto", "make", 8, "int8, one scale a row, weight only"),
        FormatEntry("quanto-qint4", "quanto", "make", 4, "uint4 with shift, groups of up to 128, weight only"),
        FormatEntry("quanto-qfloat8-e4m3fn", "quanto", "make", 8, "float8 e4m3, one scale a row, weight only"),
        FormatEntry("gguf-q8-0", "gguf", "make", 8.5, "GGUF Q8_0, blocks of 32"),
        FormatEntry("gguf-q4-0", "gguf", "make", 4.5, "GGUF Q4_0, blocks of 32"),
        *_READ_ONLY_GGUF,
        FormatEntry("comfy-fp8-e4m3fn", "comfy", "make", 8, "ComfyUI native fp8, one scale a tensor"),
        FormatEntry("comfy-fp8-e5m2", "comfy", "make", 8, "ComfyUI native fp8 with more range, one scale a tensor"),
        FormatEntry("comfy-nvfp4", "comfy", "make", 4.5, "ComfyUI native NVFP4, blocks of 16"),
        FormatEntry("comfy-mxfp8", "comfy", "make", 8.25, "ComfyUI native MXFP8, blocks of 32"),
        FormatEntry("comfy-int8", "comfy", "make", 8, "ComfyUI native int8, one scale a row"),
        FormatEntry("comfy-int8-convrot", "comfy", "make", 8, "ComfyUI native int8, columns rotated first"),
        FormatEntry("comfy-w4a4-convrot", "comfy", "make", 4, "ComfyUI native int4 weights and activations, rotated"),
        FormatEntry("comfy-w4a8", "comfy", "make", 4.5, "ComfyUI native 4-bit codebook weights, int8 activations"),
    ]
)
