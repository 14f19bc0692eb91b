"""One door for every conversion: by the type that is asked for, to GGUF, plain or quantized safetensors."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import SpecError
from ..report import QuantReport
from . import convert as slabs
from . import quantizing
from .convert_plan import GGUF, Conversion, Request, dry_run, dry_run_json, plan_conversion
from .diffusers_folder import into_folder
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
    request = into_folder(request)
    planned = _plan(dataclasses.replace(request, overwrite=True))
    if isinstance(planned, quantizing.QuantizedConversion):
        lines, data = quantizing.dry_run(planned), quantizing.dry_run_json(planned)
    else:
        lines, data = dry_run(planned), dry_run_json(planned)
    obstacles, left = _obstacles(request), _left(planned)
    data["notes"] += left
    data["warnings"] += obstacles
    return Description("\n".join([lines, *left, *(f"WARNING: {o}" for o in obstacles)]), data)


def _left(planned: Conversion | quantizing.QuantizedConversion) -> list[str]:
    """What would become of an interrupted conversion."""
    request = planned.request
    if isinstance(planned, quantizing.QuantizedConversion):
        said = quantizing.left(planned)
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
    planned = _plan(into_folder(request))
    if isinstance(planned, quantizing.QuantizedConversion):
        with bars(planned.work) as bar:
            return quantizing.run(planned, bar.update)
    with bars(planned.total) as bar:
        return slabs.run_conversion(planned, bar.update)


def _plan(request: Request) -> Conversion | quantizing.QuantizedConversion:
    spec = quantizing.quantized_spec(request)
    if spec is not None:
        return quantizing.plan_quantized(request, spec)
    if request.folder:
        raise SpecError(
            f"A folder takes quantized formats such as bnb-nf4, and {request.type} is none.\n"
            "Name the target *.safetensors or *.gguf."
        )
    kind = "GGUF" if request.target.suffix.lower() == GGUF else "plain"
    if request.layout:
        raise SpecError(
            f"--layout: {request.layout} holds quantized layers, and {request.type} is {kind}.\nLeave it out."
        )
    if request.shard_nbytes:
        raise SpecError(f"--shard-size: files of {kind} values are written whole.\nLeave it out.")
    return plan_conversion(request)
