"""A full-precision FLUX file as a quantized model, quantized tensor by tensor as it is read.

The rows are cut to diffusers' layers before they are quantized, not after: in several formats blocks cross rows, scales
are swizzled or bytes are packed along the first axis, and only before is the result that of QuantizeModel.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...quantizers.apply import LayerMaker, make_layer
from ...quantizers.choices import OnFailure
from ...quantizers.compat.modes import Carrier
from ...quantizers.errors import FileError
from ...quantizers.files.cache import default_cache
from ...quantizers.files.on_load import Request, quantize_file
from ...quantizers.files.stream import Part, TensorFile
from ...quantizers.report import QuantReport
from ...quantizers.spec import QuantSpec
from ...quantizers.weight import QuantizedWeight
from . import flux
from .models import DiffusionModel, check_complete, dtype_of, fill, flux_tensors
from .progress import check_interrupted


def load_and_quantize(
    path: Path,
    spec: QuantSpec,
    carrier: Carrier = Carrier.QUANTWIRE,
    on_failure: OnFailure = OnFailure.ERROR,
    cached: bool = True,
    maker: LayerMaker = make_layer,
    progress: Any = None,
) -> tuple[DiffusionModel, QuantReport]:
    """Open a full-precision FLUX file in ComfyUI's key layout with its linear layers quantized.

    Raises:
        FileError: not such a file, damaged, or one that holds quantized weights.
        BackendUnavailable, SpecError, WeightError: as for QuantizeModel.
    """
    start = time.perf_counter()
    file = TensorFile(path)
    tensors = flux_tensors(file.shapes, path)
    config = flux.config_of(tensors, path.name)
    dtype = dtype_of(tensors, path)
    model = flux.build(config)

    def parts() -> Sequence[Part]:
        found, unused = flux_parts(file, config, dtype)
        state = {p.name: torch.empty(p.shape, device="meta") for p in found}
        check_complete(model, state, {}, path.name, unused)
        return found

    request = Request(file, "diffusers FLUX", parts, spec, carrier, on_failure)
    cache = default_cache() if cached else None
    checkpoint, report = quantize_file(request, cache, progress=progress, poll=check_interrupted)
    state = {n: v for n, v in checkpoint.tensors.items() if isinstance(v, Tensor)}
    quantized = {n.removesuffix(".weight"): v for n, v in checkpoint.tensors.items() if isinstance(v, QuantizedWeight)}
    fill(model, state, quantized, carrier, maker)
    report.seconds = time.perf_counter() - start
    return DiffusionModel(model, config, path.name, dtype), report


def flux_parts(file: TensorFile, config: flux.FluxConfig, dtype: torch.dtype) -> tuple[Sequence[Part], set[str]]:
    """Every parameter of diffusers' model as rows of the file, and the tensors that have no place in it.

    Raises:
        FileError: a tensor is missing.
    """
    names = {flux.comfy_name(name): name for name in file.shapes}
    parts: list[Part] = []
    for row in flux.key_map(config):
        if row.source not in names:
            raise FileError(f"{file.path.name}: tensor '{row.source}' is missing.")
        shape = list(file.shapes[names[row.source]].shape)
        shape[:1] = [len(range(*slice(row.start, row.stop).indices(n))) for n in shape[:1]]
        # In FLUX every matrix is the weight of a linear layer.
        linear = len(shape) == 2 and row.target.endswith(".weight")
        rows = (row.start, row.stop)
        parts.append(Part(row.target, names[row.source], tuple(shape), dtype, linear, rows, row.swap))
    used = {part.source for part in parts}
    return parts, {name for name in file.shapes if name not in used}
