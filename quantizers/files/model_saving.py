"""Save a quantized model that is in memory: the same numbers in a file, nothing quantized again.

Layers go into the layout of their library, or of ComfyUI's own files; GGUF blocks into a GGUF file. Layers of several
libraries go into the pack's own layout, which holds all formats, unless another one that can is asked for.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..apply import Progress
from ..errors import FileError, SpecError
from ..ggml_types import TYPES, type_name
from ..registry import get_entry
from ..report import Entry, QuantReport
from ..weight import QuantizedWeight
from .convert import Ticks, run_conversion
from .convert_plan import Request, plan_tensors
from .quantized_file import Value
from .recipes import pure
from .saving import save_weights
from .sources import MemorySource
from .writers import WRITERS, writer_for
from .writers.base import Writer
from .writers.own import Own

AUTO, GGUF = "auto", "gguf"


@dataclass(frozen=True)
class ModelTensors:
    """What a model object holds.

    Attributes:
        tensors: name -> value, in ComfyUI's key layout without a prefix where `warnings` do not say otherwise.
        title: of the model.
        family: `general.architecture`, or empty.
        notes, warnings: for the report.
    """

    tensors: Mapping[str, Value]
    title: str
    family: str = ""
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def formats(self) -> Counter[str]:
        """Format id -> how many layers."""
        return Counter(v.format_id for v in self.tensors.values() if isinstance(v, QuantizedWeight))


def layout_of(model: ModelTensors, asked: str = AUTO) -> str:
    """The layout to save in: a writer's id or `gguf`.

    Raises:
        SpecError: nothing is quantized, or the layout cannot hold a format of the model.
    """
    formats = model.formats
    if not formats:
        raise SpecError(
            f"{model.title}: no layer is quantized, so there is nothing for SaveQuantized.\n"
            "Link QuantizeModel before it, or save full-precision models with ComfyUI's ModelSave."
        )
    blocks = [f for f in formats if get_entry(f).backend == GGUF]
    if asked == GGUF or (asked == AUTO and len(blocks) == len(formats)):
        others = sorted(set(formats) - set(blocks))
        if others:
            raise SpecError(
                f"A GGUF file cannot hold {', '.join(others)}.\nLeave the layout at auto, or quantize to gguf formats."
            )
        return GGUF
    if asked != AUTO:
        for format_id in formats:
            writer_for(format_id, asked)
        return asked
    usual = {writer_for(format_id).id for format_id in formats}
    return usual.pop() if len(usual) == 1 else Own.id


def save_model(
    path: Path, model: ModelTensors, layout: str = AUTO, overwrite: bool = False, progress: Progress | None = None
) -> QuantReport:
    """Write a file.

    Args:
        path: ends in .gguf for the layout `gguf`, in .safetensors for every other one.
        overwrite: replace what is there.
    Raises:
        SpecError: as `layout_of`, or a layer that the layout cannot hold.
        FileError: it is there already, or cannot be written; what was there is as it was.
    """
    start = time.perf_counter()
    chosen = layout_of(model, layout)
    suffix = f".{GGUF}" if chosen == GGUF else ".safetensors"
    if path.suffix.lower() != suffix:
        raise FileError(f"'{path.name}': a file in the layout {chosen} ends in {suffix}.\nGive it such a name.")
    if os.path.lexists(path) and not overwrite:
        raise FileError(f"{path}: is there already.\nSet overwrite to replace it, or give another name.")
    _refuse_without_values(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    report = _save_gguf(path, model, progress) if chosen == GGUF else _save(path, model, WRITERS[chosen], progress)
    report.family = model.family or report.family
    report.notes += [n for n in model.notes if n not in report.notes]
    report.warnings += model.warnings
    if layout == AUTO and chosen == Own.id and len(model.formats) > 1:
        report.notes.append(f"several libraries' formats ({', '.join(sorted(model.formats))}): the pack's own layout")
    report.seconds = time.perf_counter() - start
    return report


def _refuse_without_values(model: ModelTensors) -> None:
    for name, value in model.tensors.items():
        held = [value] if isinstance(value, Tensor) else list(value.tensors.values())
        if any(t.device.type == "meta" for t in held):
            raise SpecError(f"'{name}': has no values (meta device).\nSave the model before it is offloaded.")


def _save(path: Path, model: ModelTensors, writer: Writer, progress: Progress | None) -> QuantReport:
    report = QuantReport(path.name, model.formats.most_common(1)[0][0], carrier="")
    report.notes.append(f"layout {writer.id}: {writer.title}")
    report.entries = [_entry(name, value) for name, value in model.tensors.items()]
    ticks = Ticks(progress, report.nbytes_out) if progress is not None else None
    save_weights(path, model.tensors, writer, overwrite=True, advance=ticks or (lambda nbytes: None))
    if ticks is not None:
        ticks.close()
    return report


def _entry(name: str, value: Value) -> Entry:
    if isinstance(value, Tensor):
        return Entry(name, "keep", "as in the model", value.nbytes, value.nbytes)
    nbytes = value.numel * value.orig_dtype.itemsize
    return Entry(name, "quantize", "as in the model", nbytes, value.nbytes, format_id=value.format_id)


def _save_gguf(path: Path, model: ModelTensors, progress: Progress | None) -> QuantReport:
    """A GGUF file with the blocks as they are."""
    main = model.formats.most_common(1)[0][0]
    source = MemorySource(path.name, model.tensors, blocks=True)
    request = Request(path, path, main, architecture=model.family, overwrite=True, restart=True)
    conversion = plan_tensors(request, source, pure(type_name(main)), as_stored=True)
    held = Counter(c.kind for c in conversion.choices if c.kind in TYPES)
    if held.total() != model.formats.total():
        raise SpecError(
            f"{model.title}: {model.formats.total() - held.total()} layers cannot stand in a GGUF file as they are.\n"
            f"Use the layout {Own.id}."
        )
    ticks = Ticks(progress, conversion.total) if progress is not None else None
    report = run_conversion(conversion, ticks)
    if ticks is not None:
        ticks.close()
    return report
