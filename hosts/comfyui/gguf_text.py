"""Text encoders from GGUF and safetensors files through the host's own detection, layers, tokenizers and patcher.

Linear weights stay in the blocks of the file. Token embeddings are looked up by row, which the host does for its own
8-bit formats only, so they are dequantized at load, a few rows at a time; the report counts them.
"""

from __future__ import annotations

import functools
import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...quantizers.compat.modes import Carrier
from ...quantizers.errors import FileError, SpecError
from ...quantizers.files.gguf_model import in_rows
from ...quantizers.files.quantized_file import Value
from ...quantizers.files.text_encoder import TextFile, is_gguf, open_text_encoder, refuse_for_text_encoder
from ...quantizers.files.vocabulary import wanted_tokenizer
from ...quantizers.plan import sensitive_reason
from ...quantizers.registry import require_reader
from ...quantizers.report import MIB, Entry, QuantReport
from ...quantizers.weight import QuantizedWeight, TensorMeta
from .layouts import PREFIX, to_quantized_tensor
from .linear import attach_exact_patches, operations

log = logging.getLogger(__name__)

EMBEDDINGS = re.compile(
    r"(.*\.)?(shared|embed_tokens|token_embedding|position_embedding|relative_attention_bias)\.weight"
)
ROWS_AT_ONCE = 4096  # of an embedding; a whole one of umT5 would take 4 GiB in float32
VISION = ("visual", "vision_model", "multi_modal_projector")


def types_by_count() -> dict[int, list[str]]:
    """Number of files -> the types that the host's own loaders offer for so many."""
    import importlib

    host: Any = importlib.import_module("nodes")  # the host's, not the pack's
    found: dict[int, list[str]] = {}
    for count, loader in ((1, "CLIPLoader"), (2, "DualCLIPLoader")):
        found[count] = list(host.NODE_CLASS_MAPPINGS[loader].INPUT_TYPES()["required"]["type"][0])
    # These two ask for no type: there is one use for so many encoders.
    for count, loader, only in ((3, "TripleCLIPLoader", "sd3"), (4, "QuadrupleCLIPLoader", "hidream")):
        if loader in host.NODE_CLASS_MAPPINGS:
            found[count] = [only]
    return found


def load_text_encoder(paths: Sequence[Path], kind: str, carrier: Carrier) -> tuple[Any, QuantReport]:
    """Open one to four text encoder files as one CLIP.

    Args:
        kind: type of CLIP, of `types_by_count`.
    Raises:
        FileError: damaged, no text encoder, or files that are not those that the type needs.
        SpecError: the library carrier, which the host could not offload.
    """
    if carrier is Carrier.LIBRARY:
        raise SpecError("Library layers for GGUF exist in diffusers only, not in ComfyUI.\nUse carrier quantwire.")
    start = time.perf_counter()
    clip, report = _load(list(paths), kind)
    report.seconds = time.perf_counter() - start
    return clip, report


def load_patcher(paths: list[str], kind: str, disable_dynamic: bool = False) -> Any:
    """For `cached_patcher_init`."""
    return _load([Path(p) for p in paths], kind, disable_dynamic)[0].patcher


def _load(paths: list[Path], kind: str, disable_dynamic: bool = False) -> tuple[Any, QuantReport]:
    import comfy.model_management as mm
    import comfy.sd
    import folder_paths
    from comfy.patcher_extension import CallbacksMP

    dtype = mm.text_encoder_dtype(mm.text_encoder_device())
    dtype = dtype if dtype in (torch.float16, torch.bfloat16, torch.float32) else torch.float16  # --fp8_*-text-enc
    report = QuantReport(" + ".join(p.name for p in paths), "")
    states = [_state(path, dtype, report, f"{path.stem}." if len(paths) > 1 else "") for path in paths]
    formats = sorted({e.format_id for e in report.entries if e.format_id})
    report.format_id = ", ".join(formats) or "plain tensors only"
    try:
        clip = comfy.sd.load_text_encoder_state_dicts(
            states,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            # A type that is none of these is what the host's own loaders make of it.
            clip_type=getattr(comfy.sd.CLIPType, kind.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION),
            model_options={"custom_operations": text_operations(dtype)},
            disable_dynamic=disable_dynamic,
        )
    except (ValueError, RuntimeError) as err:
        if isinstance(err, RuntimeError) and "loading state_dict" not in str(err):  # out of memory, among others
            raise
        why = " ".join(str(err).split())
        raise FileError(
            f"{report.title}: ComfyUI cannot make text encoders of type {kind} of it: {why[:300]}\n"
            "The files are for another type, or for another model than ComfyUI knows under this type."
        ) from err
    clip.patcher.cached_patcher_init = (load_patcher, ([str(p) for p in paths], kind))
    clip.patcher.add_callback_with_key(CallbacksMP.ON_LOAD, "quantwire", attach_exact_patches)
    _settle(clip.cond_stage_model, paths, kind, report)
    for warning in report.warnings:
        log.warning("%s: %s", report.title, warning)
    return clip, report


@functools.cache
def text_operations(dtype: torch.dtype) -> Any:
    """The pack's operations, with linear layers that may stay empty, and an embedding that takes a vocabulary without
    unused rows.

    llama.cpp's converter cuts the rows behind the last token off (262,208 rows of Gemma 3 become 262,144); the host
    makes the embedding at the original's size.
    """
    base: Any = operations(dtype)

    class PaddedEmbedding(base.Embedding):
        rows_in_file = 0

        def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
            weight = state_dict.get(f"{prefix}weight")
            if weight is not None and weight.ndim == 2 and weight.shape[0] != self.num_embeddings:
                missing = self.num_embeddings - weight.shape[0]
                if missing < 0:
                    raise FileError(
                        f"'{prefix}weight' has {weight.shape[0]} rows, and ComfyUI's text encoder has "
                        f"{self.num_embeddings} tokens.\nThe file is for another model than the chosen type."
                    )
                self.rows_in_file = weight.shape[0]
                state_dict[f"{prefix}weight"] = torch.cat([weight, weight.new_zeros(missing, weight.shape[1])])
            super()._load_from_state_dict(state_dict, prefix, *args)

    class EmptyLinear(base.Linear):
        """Has no weight until one is loaded; the host's own has no such attribute, and stumbles over files that are
        not those of the type before `_settle` can say so."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.register_parameter("weight", None)

    class TextOperations(base):
        Linear = EmptyLinear
        Embedding = PaddedEmbedding

    return TextOperations


def _state(path: Path, dtype: torch.dtype, report: QuantReport, prefix: str) -> dict[str, Any]:
    """The state dict of a file as the host's loaders would have it; its entries and notes go into the report."""
    if not is_gguf(path):
        return _safetensors_state(path, report, prefix)
    file = open_text_encoder(path)
    report.notes += [f"{path.name}: architecture {file.architecture or '(none)'}", *file.notes]
    state: dict[str, Any] = {}
    for name, value in file.values.items():
        state[name], entry = _taken(name, value, dtype)
        report.entries.append(_renamed(entry, prefix))
    _add_tokenizer(file, state, report)
    return _with_projection(path, state, report)


def _safetensors_state(path: Path, report: QuantReport, prefix: str) -> dict[str, Any]:
    import comfy.utils

    state, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    metas = {n: TensorMeta(n, tuple(t.shape), t.dtype) for n, t in state.items()}
    refuse_for_text_encoder(path, {}, metas)
    state, _ = comfy.utils.convert_old_quants(state, model_prefix="", metadata=metadata)
    for name, t in state.items():
        reason = sensitive_reason(name.removesuffix(".weight")) or "plain in the file"
        report.entries.append(Entry(prefix + name, "keep", reason, t.nbytes, t.nbytes))
    return _with_projection(path, state, report)


def _taken(name: str, value: Value, dtype: torch.dtype) -> tuple[Any, Entry]:
    """A tensor as the host gets it, and its line in the report."""
    if isinstance(value, QuantizedWeight):
        kind = value.format_id.removeprefix("gguf-").upper().replace("-", "_")
        if EMBEDDINGS.fullmatch(name) or not in_rows(value):
            why = "an embedding is looked up by row" if EMBEDDINGS.fullmatch(name) else "its blocks run across its rows"
            tensor = rows_dequantized(value, dtype)
            return tensor, Entry(name, "dequantize", f"{kind} in the file: {why}", tensor.numel() * 2, tensor.nbytes)
        held = QuantizedWeight(value.format_id, value.tensors, value.orig_shape, dtype, value.meta)
        entry = Entry(name, "quantize", "from the file", value.numel * 2, value.nbytes, format_id=value.format_id)
        return to_quantized_tensor(held), entry
    # The host gives the whole encoder the dtype of its last norm, which GGUF files keep in float32.
    tensor = value.to(dtype) if value.is_floating_point() and _fits(value, dtype) else value
    reason = sensitive_reason(name.removesuffix(".weight")) or "plain in the file"
    return tensor, Entry(name, "keep", reason, value.nbytes, tensor.nbytes)


def _fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.ndim < 2 and (not tensor.numel() or float(tensor.abs().max()) <= torch.finfo(dtype).max)


def rows_dequantized(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The values, made a few rows at a time, so that what is made on the way stays small."""
    quantizer = require_reader(weight.format_id)
    if not in_rows(weight):
        return quantizer.dequantize(weight, dtype).reshape(weight.orig_shape)
    out = torch.empty(weight.orig_shape, dtype=dtype)
    qdata = weight.tensors["qdata"]
    for start in range(0, len(out), ROWS_AT_ONCE):
        part = qdata[start : start + ROWS_AT_ONCE]
        rows = weight.with_tensors({"qdata": part}, (len(part), weight.orig_shape[1]))
        out[start : start + len(part)] = quantizer.dequantize(rows, dtype)
    return out


def _renamed(entry: Entry, prefix: str) -> Entry:
    import dataclasses

    return dataclasses.replace(entry, name=prefix + entry.name)


def _add_tokenizer(file: TextFile, state: dict[str, Any], report: QuantReport) -> None:
    """Put the vocabulary into the state dict where the host's tokenizers come from it.

    Raises:
        FileError: the file has none, and the host neither.
    """
    name = wanted_tokenizer(file.architecture, file.header.metadata, state)
    if not name or name in state:
        return
    state[name] = torch.frombuffer(bytearray(file.vocabulary(name)), dtype=torch.uint8)
    report.notes.append(f"{file.path.name}: tokenizer made of the vocabulary in the file")


def _with_projection(path: Path, state: dict[str, Any], report: QuantReport) -> dict[str, Any]:
    """CLIP files of some programs leave out the projection that they do not use; the host's layer needs a weight."""
    probe = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    if probe in state and "text_projection.weight" not in state and "text_projection" not in state:
        state["text_projection.weight"] = torch.eye(state[probe].shape[1], dtype=torch.float16)
        report.notes.append(f"{path.name}: has no text projection; the pooled vector is not projected")
    return state


def _settle(model: nn.Module, paths: list[Path], kind: str, report: QuantReport) -> None:
    """Check that every layer got a weight, and set what the host's own loaders set otherwise.

    Raises:
        FileError: a layer has no weight.
    """
    for encoder in [m for m in model.modules() if hasattr(m, "special_tokens") and hasattr(m, "transformer")]:
        transformer: Any = encoder.transformer
        for name in VISION:
            part = getattr(transformer, name, None)
            if part is not None and any(_is_empty(m) for m in part.modules()):
                setattr(transformer, name, MissingVision(name))
                report.notes.append("prompts may hold text only: the files have no vision part for this text encoder")
    for name, module in model.named_modules():
        if _is_empty(module):
            raise FileError(
                f"{' + '.join(p.name for p in paths)}: nothing for layer '{name}' of type {kind}.\n"
                "These are not the text encoders of that type, or a file is not complete."
            )
        if not str(getattr(module, "quant_format", PREFIX)).startswith(PREFIX):
            module._full_precision_mm = True  # the host's own formats: as its CLIPLoader multiplies with them
        if getattr(module, "rows_in_file", 0):
            held: Any = module
            report.notes.append(f"'{name}': {held.rows_in_file} rows in the file, {held.num_embeddings} in the model")
    plain = [e for e in report.entries if e.action == "dequantize"]
    if plain:
        size = sum(e.nbytes_out for e in plain) / MIB
        names = ", ".join(e.name for e in plain[:3])
        report.notes.append(f"{len(plain)} tensors were dequantized at load, {size:.1f} MiB: {names}")


def _is_empty(module: nn.Module) -> bool:
    """Whether a linear layer of ours has no weight."""
    return hasattr(module, "factory_kwargs") and getattr(module, "weight", None) is None


class MissingVision(nn.Module):
    """Stands where the vision part of a text encoder would be."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part

    def forward(self, *_: Any, **__: Any) -> Tensor:
        raise FileError(
            f"The prompt holds an image, and no file brought the vision part of this text encoder ('{self.part}').\n"
            "Put the model's mmproj file beside the GGUF file, or load the safetensors file."
        )
