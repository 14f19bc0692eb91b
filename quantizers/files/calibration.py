"""Activation scales: how large the inputs of linear layers get in real use, and the `input_scale` that follows.

A file with the end `.json`: {"quantwire_calibration": 1, "runs": [...], "calls": n, "layers": {weight: {"amax", "rows",
"columns"}}}. Names are those of ComfyUI's files without prefix, `double_blocks.0.img_attn.qkv.weight`. What is kept is
the largest absolute value, and not a scale, so that one recording serves every format.

    fp8:   input_scale = amax / largest value of the dtype      (448 of e4m3fn, 57344 of e5m2)
    nvfp4: input_scale = amax / (448 * 6), the scale above the scales of the blocks

These are the scales that ComfyUI's layers find for each input when a file has none (comfy-kitchen tensor/fp8.py and
nvfp4.py at 0.2.40); with one in the file they need not look. Its other formats scale inputs by row or block, always
anew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from ..errors import FileError
from .checkpoint import replace_file

KEY = "quantwire_calibration"
VERSION = 1
MAX_NBYTES = 1 << 26
SHOWN = 3
# Format -> the input of which amax is the largest representable one.
LARGEST = {"comfy-fp8-e4m3fn": 448.0, "comfy-fp8-e5m2": 57344.0, "comfy-nvfp4": 448.0 * 6.0}


@dataclass(frozen=True)
class Inputs:
    """What reached one layer.

    Attributes:
        amax: largest absolute value.
        rows: inputs counted (tokens).
        columns: values of one.
    """

    amax: float
    rows: int
    columns: int


@dataclass(frozen=True)
class Calibration:
    """The inputs of many layers.

    Attributes:
        layers: name of a weight -> its inputs.
        runs: what they were recorded from.
        calls: of the model.
    """

    layers: Mapping[str, Inputs]
    runs: tuple[str, ...] = ()
    calls: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))

    def input_scale(self, name: str, format_id: str) -> float | None:
        """The `input_scale` of a weight in a format; None where the format has none, or nothing was recorded.

        An input that was zero throughout has none: a scale of 0 would divide by it.
        """
        found, largest = self.layers.get(name), LARGEST.get(format_id)
        return None if found is None or largest is None or not found.amax else found.amax / largest


def merge(parts: Sequence[Calibration]) -> Calibration:
    """The largest values of all of them.

    Raises:
        FileError: a weight with other columns in one of them: they are of different models.
    """
    layers: dict[str, Inputs] = {}
    for part in parts:
        for name, new in part.layers.items():
            old = layers.get(name, Inputs(0.0, 0, new.columns))
            if old.columns != new.columns:
                raise FileError(
                    f"'{name}': {old.columns} columns in one calibration, {new.columns} in another.\n"
                    "They are of different models; keep them in files of their own."
                )
            layers[name] = Inputs(max(old.amax, new.amax), old.rows + new.rows, new.columns)
    runs = tuple(dict.fromkeys(run for part in parts for run in part.runs))
    return Calibration(layers, runs, sum(part.calls for part in parts))


def read_calibration(path: Path) -> Calibration:
    """Read a file of `write_calibration`.

    Raises:
        FileError: missing, or not such a file.
    """
    try:
        if path.stat().st_size > MAX_NBYTES:
            raise FileError(f"{path.name}: not a calibration: {path.stat().st_size} bytes.")
        value: object = json.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise FileError(f"{path}: cannot be read: {err.strerror}.") from err
    except (ValueError, RecursionError) as err:
        raise FileError(f"{path.name}: not a calibration: no JSON.\n`quantwire calibrate` makes one.") from err
    data = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    if data.get(KEY) != VERSION:
        raise FileError(
            f'{path.name}: not a calibration of version {VERSION} ("{KEY}": {data.get(KEY)!r}).\n'
            "`quantwire calibrate` makes one."
        )
    try:
        layers = {str(name): _inputs(fields) for name, fields in data["layers"].items()}
        return Calibration(layers, tuple(map(str, data["runs"])), int(data["calls"]))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as err:
        raise FileError(f"{path.name}: corrupt calibration: {type(err).__name__}: {err}.") from err


def _inputs(fields: Mapping[str, Any]) -> Inputs:
    amax, rows, columns = float(fields["amax"]), int(fields["rows"]), int(fields["columns"])
    if not math.isfinite(amax) or amax < 0 or rows < 0 or columns < 1:
        raise ValueError(f"amax {amax}, {rows} rows, {columns} columns")
    return Inputs(amax, rows, columns)


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write the file in one step.

    Raises:
        FileError: it cannot be written; a file that was there is as it was.
    """
    layers = {n: {"amax": x.amax, "rows": x.rows, "columns": x.columns} for n, x in calibration.layers.items()}
    data = {KEY: VERSION, "runs": list(calibration.runs), "calls": calibration.calls, "layers": layers}
    replace_file(path, lambda temporary: _dump(temporary, data))


def _dump(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def describe(calibration: Calibration, idle: Sequence[str] = ()) -> str:
    """What was recorded, with the layers of the largest inputs, in lines."""
    layers = sorted(calibration.layers.items(), key=lambda item: -item[1].amax)
    largest = ", ".join(f"{name} {x.amax:.4g}" for name, x in layers[:SHOWN])
    lines = [f"{len(layers)} weights, {calibration.calls} model calls; largest inputs: {largest}"]
    if idle:
        lines.append(f"No input reached {len(idle)} weights, such as {idle[0]}: they are left out.")
    return "\n".join(lines)
