"""One door for every conversion: by the type that is asked for, to GGUF, plain safetensors or a native format."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from ..report import QuantReport
from . import convert as slabs
from . import native
from .convert_plan import Conversion, Request, dry_run, dry_run_json, plan_conversion
from .journal import remains


class Bar(Protocol):
    """What tqdm makes: grows by bytes of the new file."""

    def update(self, n: int, /) -> object: ...


Bars = Callable[[int], AbstractContextManager[Bar]]


@dataclass(frozen=True)
class Description:
    """A plan to look at."""

    text: str
    data: dict[str, Any]

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        return self.data


def describe(request: Request) -> Description:
    """What a conversion would do; raises what it would raise before any work.

    What only stands in the way of writing the file is a warning.
    """
    planned = _plan(dataclasses.replace(request, overwrite=True))
    if isinstance(planned, native.NativeConversion):
        lines, data = native.dry_run(planned), native.dry_run_json(planned)
    else:
        lines, data = dry_run(planned), dry_run_json(planned)
    obstacles, left = _obstacles(request), _left(planned)
    data["notes"] += left
    data["warnings"] += obstacles
    return Description("\n".join([lines, *left, *(f"WARNING: {o}" for o in obstacles)]), data)


def _left(planned: Conversion | native.NativeConversion) -> list[str]:
    """What would become of an interrupted conversion."""
    request = planned.request
    if isinstance(planned, native.NativeConversion):
        said = remains(request.target, planned.total, native.identity(planned), False, request.restart)
    else:
        said = remains(request.target, planned.total, slabs.identity(planned), planned.resumable, request.restart)
    return [said] if said else []


def _obstacles(request: Request) -> list[str]:
    """Why the file could not be written as things are."""
    target = request.target
    found = [f"{target} is there already; --overwrite replaces it"] if target.exists() and not request.overwrite else []
    folder = next(p for p in target.absolute().parents if p.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        found.append(f"{target} cannot be written: '{folder}' is not a writable folder")
    return found


def convert(request: Request, bars: Bars) -> QuantReport:
    """Convert a file.

    Args:
        bars: makes a progress bar of so many bytes.
    Raises:
        QuantwireError: what cannot be; a target that was there is as it was.
    """
    planned = _plan(request)
    with bars(planned.total) as bar:
        if isinstance(planned, native.NativeConversion):
            return native.run(planned, bar.update)
        return slabs.run_conversion(planned, bar.update)


def _plan(request: Request) -> Conversion | native.NativeConversion:
    spec = native.native_spec(request)
    return plan_conversion(request) if spec is None else native.plan_native(request, spec)
