"""Format id -> quantizer, made on demand.

Entries are data: asking for the list of formats imports no backend, asking for a quantizer imports its module but not
its library, which is imported at the first probe or use.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .errors import BackendUnavailable, SpecError, near
from .formats import BACKENDS, FormatEntry

if TYPE_CHECKING:
    from .base import Availability, Quantizer

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
    """Listed ids in registration order; with `writable`, only those that can be made here."""
    return [e.format_id for e in _entries.values() if e.listed and (e.writes or not writable)]


def is_format(format_id: str) -> bool:
    """Whether the id is registered, listed or not."""
    return format_id in _entries


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
    return _if_it_works(format_id, availability(format_id))


@functools.cache
def _reading(format_id: str) -> Availability:
    state = availability(format_id)
    return state if state.works else get_quantizer(format_id).probe_reading()


def require_reader(format_id: str) -> Quantizer:
    """The quantizer, if weights that are in the format already can be restored and multiplied here.

    Raises:
        SpecError: unknown id.
        BackendUnavailable: with the probe's reason and remedy.
    """
    return _if_it_works(format_id, _reading(format_id))


def _if_it_works(format_id: str, state: Availability) -> Quantizer:
    if not state.works:
        raise BackendUnavailable(f"{format_id}: {state.reason}\n{state.remedy}")
    return get_quantizer(format_id)


register(entry for backend in BACKENDS for entry in backend.entries)
