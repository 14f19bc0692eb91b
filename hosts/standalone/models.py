"""MODEL, CLIP and VAE of the embedded host: immutable objects around diffusers and transformers modules."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...quantizers.apply import LayerMaker, check_finite, make_layer
from ...quantizers.compat.modes import Carrier
from ...quantizers.errors import FileError
from ...quantizers.files.checkpoint import Checkpoint, read_checkpoint
from ...quantizers.files.gguf_model import dequantized, in_rows, open_gguf_model
from ...quantizers.ggml_types import type_name
from ...quantizers.kernels.kept import keep_dequantized
from ...quantizers.plan import sensitive_reason
from ...quantizers.report import Entry, QuantReport
from ...quantizers.weight import QuantizedWeight
from ..modules import share_tree
from ..record import Watcher
from . import flux

if TYPE_CHECKING:
    from ...quantizers.compat.guard import Guard
    from ..offload import OffloadSettings

FAMILY = "flux"  # `general.architecture` of the models that this host runs


@dataclass(frozen=True)
class DiffusionModel:
    """MODEL: the transformer and what sampling must know of its family.

    Attributes:
        transformer: diffusers module in eval mode.
        config: sizes read off the file.
        source: file name, for messages.
        dtype: in which it computes, whatever its weights are stored as.
        recorder: what is told of the inputs of its layers when it is sampled with.
        guard: OffloadCompat's check, called before it is sampled with.
        offload: how its weights are placed when it is sampled with; None leaves them where they are.
    """

    transformer: nn.Module
    config: flux.FluxConfig
    source: str
    dtype: torch.dtype
    recorder: Watcher | None = None
    guard: Guard | None = field(default=None, compare=False)
    offload: OffloadSettings | None = None

    @property
    def shift_mu(self) -> float:
        """Exponential time shift of the noise schedule; schnell-type models (no guidance) have none."""
        return flux.SHIFT_MU if self.config.guidance else 0.0

    def with_transformer(self, transformer: nn.Module) -> DiffusionModel:
        return dataclasses.replace(self, transformer=transformer)

    def __str__(self) -> str:
        c = self.config
        return f"FLUX {c.double_blocks}+{c.single_blocks} blocks, hidden {c.hidden}, from {self.source}"


def load_diffusion_model(path: Path, dtype: torch.dtype | None = None) -> DiffusionModel:
    """Open a full-precision FLUX file in ComfyUI's key layout.

    Args:
        path: `.safetensors` file.
        dtype: compute dtype; None takes the file's own.
    Raises:
        FileError: not such a file, or one that holds quantized weights.
        WeightError: nan or inf in a tensor.
    """
    checkpoint = read_checkpoint(path)
    if any(isinstance(v, QuantizedWeight) for v in checkpoint.tensors.values()):
        raise FileError(f"{path.name}: holds GGUF-quantized weights.\nLoad it with the LoadGGUF node.")
    tensors = flux_tensors(checkpoint.tensors, checkpoint.path)
    dtype = dtype or dtype_of(tensors, path)
    transformer, _ = _assemble(tensors, checkpoint, dtype, Carrier.QUANTWIRE)
    return DiffusionModel(transformer, flux.config_of(tensors, path.name), path.name, dtype)


def store_as(model: DiffusionModel, storage: torch.dtype) -> DiffusionModel:
    """The same model with its weights stored in an 8-bit float and cast to the compute dtype layer by layer.

    As in ComfyUI every weight is rounded, also those of modulation and norms, which diffusers would leave out; the
    norms are too small to be worth storing so, and hold the rounded values in the compute dtype.
    """
    from diffusers.hooks import apply_layerwise_casting

    transformer = share_tree(model.transformer)
    for module in transformer.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            rounded = p.to(storage).to(p.dtype)
            module.register_parameter(name, nn.Parameter(rounded, requires_grad=False))
    apply_layerwise_casting(transformer, storage, model.dtype, skip_modules_pattern=())
    return model.with_transformer(transformer)


def load_gguf(
    path: Path, carrier: Carrier, maker: LayerMaker = make_layer, progress: Any = None, cache_mib: int = 0
) -> tuple[DiffusionModel, QuantReport]:
    """Open a FLUX GGUF file; block-quantized weights of linear layers stay in their blocks, others become bfloat16.

    Args:
        cache_mib: MiB of dequantized weights that may be kept between products; 0 keeps none.
    Raises:
        FileError: not a GGUF file, damaged, or something else than a model that the embedded host has.
        WeightError: nan or inf in a tensor, or in the scales of its blocks.
    """
    start = time.perf_counter()
    source = open_gguf_model(path)
    if source.found is None:
        raise source.problem or FileError(f"{path.name}: not a model that is known here.")
    if source.found.architecture != FAMILY:
        raise FileError(
            f"{path.name}: a model of architecture {source.found.architecture}, and the embedded host runs {FAMILY}.\n"
            f"LoadGGUF opens {source.found.architecture} in ComfyUI: run this graph there, or on its server with "
            "`quantwire run WORKFLOW.json --server URL`."
        )
    tensors = flux_tensors(source.values, path)
    checkpoint = Checkpoint(path, tensors, source.metadata)
    transformer, entries = _assemble(tensors, checkpoint, torch.bfloat16, carrier, maker, progress, source.plain)
    types = sorted({v.format_id for v in tensors.values() if isinstance(v, QuantizedWeight)})
    report = QuantReport(path.name, ", ".join(types) or "plain tensors only", carrier.value, entries=entries)
    report.notes += source.notes
    plain = [e.name for e in entries if e.action == "dequantize"]
    if plain:
        report.notes.append(f"{len(plain)} tensors in blocks were dequantized at load: {', '.join(plain[:5])}")
    if cache_mib:
        report.notes.append(keep_dequantized(transformer, cache_mib, carrier))
    report.seconds = time.perf_counter() - start
    return DiffusionModel(transformer, flux.config_of(tensors, path.name), path.name, torch.bfloat16), report


def flux_tensors(values: Mapping[str, flux.Value], path: Path) -> dict[str, flux.Value]:
    """The tensors under the names of ComfyUI's FLUX layout.

    Raises:
        FileError: a model of another family or layout.
    """
    tensors = flux.comfy_names(values)
    if not flux.is_flux(tensors):
        seen = ", ".join(list(tensors)[:3]) or "no tensors"
        raise FileError(
            f"{path.name}: not a FLUX transformer in ComfyUI's key layout (it has {seen}, ...).\n"
            "The embedded host runs FLUX-layout models; run other families in ComfyUI."
        )
    return tensors


def dtype_of(tensors: Mapping[str, flux.Value], path: Path) -> torch.dtype:
    """In which a full-precision file's model computes.

    Raises:
        FileError: its weights are of another type.
    """
    dtype = next(v.dtype for n, v in tensors.items() if n == "double_blocks.0.img_attn.qkv.weight")  # type: ignore[union-attr]
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise FileError(f"{path.name}: its weights are {dtype}; the embedded host opens float32, float16 and bfloat16.")
    return dtype


def _assemble(
    tensors: Mapping[str, flux.Value],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    carrier: Carrier,
    maker: LayerMaker = make_layer,
    progress: Any = None,
    made_plain: Mapping[str, str] = MappingProxyType({}),
) -> tuple[nn.Module, list[Entry]]:
    """A model on the tensors of a file, and what became of each.

    Args:
        made_plain: tensors that were in blocks and are so no more -> why.
    """
    file = checkpoint.path.name
    config = flux.config_of(tensors, file)
    model = flux.build(config)
    state: dict[str, Tensor] = {}
    quantized: dict[str, QuantizedWeight] = {}
    plain: dict[str, str] = {}
    used: set[str] = set()
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for row in flux.key_map(config):
        if row.source not in tensors:
            raise FileError(f"{file}: tensor '{row.source}' is missing.")
        source = tensors[row.source]
        if row.source not in used:
            check_finite(row.source, source)
        used.add(row.source)
        reason = made_plain.get(row.source, "")
        if isinstance(source, QuantizedWeight) and not (row.target in linear and in_rows(source)):
            # A bias or norm in blocks: nothing to multiply by, so plain is cheapest.
            why = "its blocks run across its rows" if row.target in linear else "not a linear weight"
            reason = f"{type_name(source.format_id)} in the file: {why}"
            source = dequantized(source, dtype)
        if reason:
            plain[row.target] = reason
        value = flux.select_rows(source, row)
        if isinstance(value, QuantizedWeight):
            quantized[row.target.removesuffix(".weight")] = value
        else:
            state[row.target] = value.to(dtype)
    check_complete(model, state, quantized, file, set(tensors) - used)
    fill(model, state, quantized, carrier, maker, progress)
    return model, entries_of(state, quantized, plain)


def fill(
    model: nn.Module,
    state: Mapping[str, Tensor],
    quantized: Mapping[str, QuantizedWeight],
    carrier: Carrier,
    maker: LayerMaker = make_layer,
    progress: Any = None,
) -> None:
    """Put the tensors into a model on the meta device, without copying them.

    Args:
        state: parameter name -> value.
        quantized: name of a linear layer -> weight.
    """
    model.load_state_dict(dict(state), strict=False, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, weight in _iterate(quantized, progress):
        _install(model, name, maker(weight, state.get(f"{name}.bias"), carrier))


def entries_of(
    state: Mapping[str, Tensor],
    quantized: Mapping[str, QuantizedWeight],
    plain: Mapping[str, str] = MappingProxyType({}),
) -> list[Entry]:
    """The report of a model that was quantized in its file.

    Args:
        plain: tensors of `state` that were in blocks -> why they are not now.
    """
    kept: list[Entry] = []
    for n, v in state.items():
        action = "dequantize" if n in plain else "keep"
        reason = plain.get(n) or sensitive_reason(n.removesuffix(".weight")) or "plain in the file"
        kept.append(Entry(n, action, reason, v.nbytes, v.nbytes))
    done = [
        Entry(f"{n}.weight", "quantize", "from the file", weight.numel * 2, weight.nbytes, format_id=weight.format_id)
        for n, weight in quantized.items()
    ]
    return kept + done


def _iterate(quantized: Mapping[str, QuantizedWeight], progress: Any) -> Iterable[tuple[str, QuantizedWeight]]:
    return progress(list(quantized.items()), len(quantized)) if progress else quantized.items()


def _install(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def check_complete(
    model: nn.Module, state: Mapping[str, Tensor], quantized: Mapping[str, Any], file: str, unused: set[str]
) -> None:
    """Every parameter has a value of its shape, and every tensor of the file a place.

    Raises:
        FileError: names the first that has not.
    """
    for name, parameter in model.named_parameters():
        layer = name.removesuffix(".weight")
        if layer in quantized:
            found = quantized[layer].orig_shape
        elif name in state:
            found = tuple(state[name].shape)
        else:
            raise FileError(f"{file}: nothing for parameter '{name}'.")
        if tuple(parameter.shape) != found:
            raise FileError(f"{file}: '{name}' has shape {found}, expected {tuple(parameter.shape)}.")
    if unused:
        raise FileError(f"{file}: {len(unused)} unknown tensors, such as '{min(unused)}'.")
