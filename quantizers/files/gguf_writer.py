"""Write a FLUX-layout GGUF file that ComfyUI-GGUF, diffusers and LoadGGUF read.

Block types go to the linear weights that a plan would quantize; sensitive 2-D weights stay bfloat16 and vectors
float32, as the files in circulation have them. The plan gives every size before any work, so the header is written
first and then one tensor at a time is quantized and written: beside the source, memory holds one tensor. The same input
gives the same bytes, which is why no date and no versions stand in the metadata.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..apply import FLOAT_DTYPES, Progress, check_finite, quantize_tensor
from ..errors import FileError, SpecError, WeightError
from ..plan import Action, Decision, QuantPlan, Slot, make_plan
from ..registry import format_ids, get_entry, require
from ..report import Entry, QuantReport
from ..spec import QuantSpec
from ..weight import QuantizedWeight, TensorMeta
from .checkpoint import replace_file

ARCHITECTURES = {"double_blocks.0.img_attn.qkv.weight": "flux"}
PREFIX = "model.diffusion_model."
FILE_TYPES = {"gguf-q8-0": 7, "gguf-q4-0": 2}  # llama.cpp's LLAMA_FTYPE_MOSTLY_Q8_0 and _Q4_0


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor | QuantizedWeight],
    spec: QuantSpec,
    progress: Progress | None = None,
) -> QuantReport:
    """Quantize a checkpoint into a GGUF file.

    Args:
        path: file to write; replaced only when the new one is complete.
        tensors: full-precision checkpoint in ComfyUI's key layout. Of a checkpoint with text encoders and VAE
            (`model.diffusion_model.` in front), only the diffusion model is written.
        spec: a gguf format.
    Raises:
        BackendUnavailable: the gguf package is missing.
        FileError: an architecture that has no name here, or the file cannot be written.
        SpecError, WeightError: a tensor that cannot be quantized; nan or inf in any tensor.
    """
    if get_entry(spec.format_id).backend != "gguf":
        raise SpecError(f"A GGUF file cannot hold {spec.format_id}, only {', '.join(_gguf_ids())}.")
    quantizer = require(spec.format_id)
    start = time.perf_counter()
    source = _diffusion_model(tensors)
    arch = next((a for key, a in ARCHITECTURES.items() if key in source), None)
    if arch is None:
        shown = ", ".join(list(source)[:3]) or "no tensors"
        raise FileError(f"No GGUF architecture is known for these tensors ({shown}, ...).")
    slots = [
        Slot(TensorMeta(n, tuple(t.shape), t.dtype), t.ndim == 2 and n.endswith(".weight")) for n, t in source.items()
    ]
    plan = make_plan(slots, spec, quantizer)
    plan.raise_on_refusal(_gguf_ids())
    strange = [format_id for format_id in plan.format_ids if format_id not in _gguf_ids()]
    if strange:
        raise SpecError(f"A GGUF file cannot hold {strange[0]}.\nRules may name {', '.join(_gguf_ids())} and keep.")
    report = QuantReport(path.name, spec.format_id, carrier="", uri=spec.to_uri())
    replace_file(path, lambda temporary: _write(temporary, arch, plan, source, report, progress))
    report.seconds = time.perf_counter() - start
    return report


def _gguf_ids() -> list[str]:
    return [f for f in format_ids() if get_entry(f).backend == "gguf"]


def _diffusion_model(tensors: Mapping[str, Tensor | QuantizedWeight]) -> dict[str, Tensor]:
    prefix = PREFIX if any(name.startswith(PREFIX) for name in tensors) else ""
    source: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.startswith(prefix):
            continue
        if isinstance(tensor, QuantizedWeight):
            raise WeightError(f"'{name}': already quantized ({tensor.format_id}).\nConvert the full-precision file.")
        if tensor.dtype not in FLOAT_DTYPES:
            raise WeightError(
                f"'{name}': dtype is {tensor.dtype}, expected float32, float16 or bfloat16.\n"
                "Convert the full-precision file."
            )
        source[name.removeprefix(prefix)] = tensor
    return source


def _write(
    temporary: Path,
    arch: str,
    plan: QuantPlan,
    source: Mapping[str, Tensor],
    report: QuantReport,
    progress: Progress | None,
) -> None:
    import gguf

    writer = cast(Any, gguf).GGUFWriter(str(temporary), arch)
    try:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(FILE_TYPES[plan.spec.format_id])
        writer.add_string("quantwire.spec", plan.spec.to_uri())
        for decision in plan.decisions:
            kind, nbytes = _stored(decision, plan.spec)
            ggml_type = gguf.GGMLQuantizationType[kind]
            writer.add_tensor_info(decision.meta.name, decision.meta.shape, None, nbytes, raw_dtype=ggml_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        work = plan.decisions
        steps: Iterable[Decision] = progress(work, len(work)) if progress else work
        for decision in steps:
            raw, entry = _bytes_of(decision, source[decision.meta.name], plan.spec)
            writer.write_tensor_data(raw.numpy())
            report.entries.append(entry)
    finally:
        writer.close()


def _stored(decision: Decision, spec: QuantSpec) -> tuple[str, int]:
    """(ggml type name, bytes) of a tensor in the file."""
    meta = decision.meta
    if decision.action is Action.QUANTIZE:
        return (decision.spec or spec).format_id.removeprefix("gguf-").upper().replace("-", "_"), decision.nbytes_out
    return ("BF16", 2 * meta.numel) if len(meta.shape) == 2 else ("F32", 4 * meta.numel)


def _bytes_of(decision: Decision, tensor: Tensor, spec: QuantSpec) -> tuple[Tensor, Entry]:
    """The file's bytes of one tensor as uint8, and its line in the report."""
    name = decision.meta.name
    if decision.action is Action.QUANTIZE:
        weight, entry = quantize_tensor(name, tensor, decision.spec or spec)
        return weight.tensors["qdata"].cpu(), entry
    check_finite(name, tensor)
    dtype = torch.bfloat16 if tensor.ndim == 2 else torch.float32
    raw = tensor.detach().to("cpu", dtype).contiguous().reshape(-1).view(torch.uint8)
    return raw, Entry(name, "keep", decision.reason, decision.meta.nbytes, raw.numel())
