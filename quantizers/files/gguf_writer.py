"""Write a FLUX-layout GGUF file that ComfyUI-GGUF, diffusers and LoadGGUF read.

Block types go to the linear weights that a plan would quantize; sensitive 2-D weights stay bfloat16 and vectors float32,
as the files in circulation have them. One tensor is quantized at a time; the file appears under its name when it is
whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..apply import quantize_tensor
from ..errors import FileError
from ..plan import Action, Slot, make_plan
from ..registry import require
from ..report import Entry, QuantReport
from ..spec import QuantSpec
from ..weight import TensorMeta
from .checkpoint import publish

ARCHITECTURES = {"double_blocks.0.img_attn.qkv.weight": "flux"}


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor],
    spec: QuantSpec,
    progress: Callable[[Iterable[object], int], Iterable[object]] | None = None,
) -> QuantReport:
    """Quantize a checkpoint into a GGUF file.

    Args:
        path: file to write; replaced only when the new one is complete.
        tensors: full-precision checkpoint in ComfyUI's key layout.
        spec: a gguf format.
    Raises:
        FileError: an architecture that has no name here.
        SpecError, WeightError: a tensor that cannot be quantized.
    """
    require(spec.format_id)
    import gguf

    names = {n.removeprefix("model.diffusion_model."): t for n, t in tensors.items()}
    arch = next((a for key, a in ARCHITECTURES.items() if key in names), None)
    if arch is None:
        raise FileError(f"No GGUF architecture is known for these tensors ({', '.join(list(names)[:3])}, ...).")
    slots = [Slot(TensorMeta(n, tuple(t.shape), t.dtype), t.ndim == 2 and n.endswith(".weight")) for n, t in names.items()]
    plan = make_plan(slots, spec, require(spec.format_id))
    plan.raise_on_refusal()
    report = QuantReport(path.name, spec.format_id, uri=spec.to_uri())
    kind = gguf.GGMLQuantizationType[spec.format_id.removeprefix("gguf-").upper().replace("-", "_")]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    writer = gguf.GGUFWriter(str(temporary), arch)
    try:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for decision in progress(plan.decisions, len(plan.decisions)) if progress else plan.decisions:
            name = decision.meta.name  # type: ignore[attr-defined]
            tensor = names[name]
            if decision.action is Action.QUANTIZE:  # type: ignore[attr-defined]
                weight, entry = quantize_tensor(name, tensor, spec)
                writer.add_tensor(name, weight.tensors["qdata"].numpy(), raw_dtype=kind)
                report.entries.append(entry)
            elif tensor.ndim == 2:
                raw = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
                writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
                report.entries.append(_kept(name, decision.reason, tensor, 2))  # type: ignore[attr-defined]
            else:
                writer.add_tensor(name, tensor.to(torch.float32).numpy())
                report.entries.append(_kept(name, decision.reason, tensor, 4))  # type: ignore[attr-defined]
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return report


def _kept(name: str, reason: str, tensor: Tensor, itemsize: int) -> Entry:
    return Entry(name, "keep", reason, tensor.numel() * tensor.element_size(), tensor.numel() * itemsize)
