"""Write tensors that are in memory as a GGUF file: one type for all linear weights of a diffusion model.

Files on disk go through `convert.py`, which this uses, without a whole model in memory and with mixed recipes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..apply import Progress
from ..errors import SpecError
from ..ggml_types import type_name
from ..registry import format_ids, get_entry, require
from ..report import QuantReport
from ..spec import QuantSpec
from ..weight import QuantizedWeight
from .convert import Ticks, run_conversion
from .convert_plan import Request, plan_tensors
from .gguf_layout import text
from .recipes import pure
from .sources import MemorySource


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor | QuantizedWeight],
    spec: QuantSpec,
    progress: Progress | None = None,
) -> QuantReport:
    """Quantize a checkpoint into a GGUF file.

    Args:
        path: file to write; replaced only when the new one is complete.
        tensors: full-precision checkpoint in a layout that `detect` knows. Of a checkpoint with text encoders and VAE
            (`model.diffusion_model.` in front), only the diffusion model is written.
        spec: a gguf format.
    Raises:
        BackendUnavailable: a library that the format needs is missing.
        FileError: an unknown architecture, or the file cannot be written.
        SpecError, WeightError: a tensor that cannot be quantized; nan or inf in any tensor.
    """
    if get_entry(spec.format_id).backend != "gguf":
        raise SpecError(f"A GGUF file cannot hold {spec.format_id}, only {', '.join(_gguf_ids())}.")
    require(spec.format_id)
    request = Request(path, path, spec.format_id, spec.rules, spec.exclude, spec.include, overwrite=True, measure=True)
    source = MemorySource(path.name, tensors)
    recipe = pure(type_name(spec.format_id))
    conversion = plan_tensors(request, source, recipe, (text("quantwire.spec", spec.to_uri()),))
    ticks = Ticks(progress, conversion.total) if progress is not None else None
    report = run_conversion(conversion, ticks)
    if ticks is not None:
        ticks.close()
    report.uri = spec.to_uri()
    return report


def _gguf_ids() -> list[str]:
    return [f for f in format_ids() if get_entry(f).backend == "gguf"]
