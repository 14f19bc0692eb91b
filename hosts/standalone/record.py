"""Which layers of the embedded host's models are recorded, and under which names.

The names are those of a GGUF file: ComfyUI's for a diffusion model, llama.cpp's for a text encoder that has such names.
diffusers' layers are narrower than the file's weights (`to_q`, `to_k` and `to_v` are rows of one `qkv`), and all rows
of a weight see the same input, so one layer of them is watched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...quantizers.files.layouts.llama_cpp import transformers_to_llama_cpp
from ...quantizers.weight import TensorMeta
from ..record import Recorder
from . import flux
from .models import DiffusionModel

TRANSFORMER = "transformer"
LLAMA_CPP = {"t5xxl": "t5encoder"}  # component -> its architecture in GGUF files
PREFIXES = {"clip_l": "text_model."}  # before the names in a file, for components that have none there


@dataclass
class Recording:
    """One recording.

    Attributes:
        components: those to record: `transformer`, `clip_l`, `t5xxl`.
        seen: those that ran, recorded or not.
    """

    components: Sequence[str] = (TRANSFORMER,)
    recorder: Recorder = field(default_factory=Recorder)
    seen: set[str] = field(default_factory=set)


_recording: ContextVar[Recording | None] = ContextVar("quantwire_recording", default=None)


@contextmanager
def recording(wanted: Recording) -> Iterator[Recording]:
    """Record the models that run inside the block."""
    token = _recording.set(wanted)
    try:
        yield wanted
    finally:
        _recording.reset(token)


@contextmanager
def recorded(model: Any) -> Iterator[None]:
    """For whatever runs a MODEL or CLIP: the block runs it. Without a recording this does nothing."""
    wanted = _recording.get()
    with ExitStack() as stack:
        if isinstance(model, DiffusionModel) and model.recorder is not None:
            stack.enter_context(model.recorder.watch(model.transformer, transformer_layers(model)))
        for name, module, layers in _components(model) if wanted is not None else ():
            wanted.seen.add(name)
            if name in wanted.components:
                stack.enter_context(wanted.recorder.watch(module, layers))
        yield


def _components(model: Any) -> Iterator[tuple[str, nn.Module, dict[str, nn.Module]]]:
    """(component, module, name of a weight -> layer) of a model object."""
    if isinstance(model, DiffusionModel):
        yield TRANSFORMER, model.transformer, transformer_layers(model)
        return
    for name, encoder in model.encoders.items():
        yield name, encoder.module, encoder_layers(name, encoder.module)


def transformer_layers(model: DiffusionModel) -> dict[str, nn.Module]:
    """ComfyUI's name of each linear weight -> the first of diffusers' layers that holds rows of it."""
    layers: dict[str, nn.Module] = {}
    for row in flux.key_map(model.config):
        if row.source.endswith(".weight") and not row.source.endswith("_norm.weight") and row.source not in layers:
            layers[row.source] = model.transformer.get_submodule(row.target.removesuffix(".weight"))
    return layers


def encoder_layers(component: str, encoder: nn.Module) -> dict[str, nn.Module]:
    """Name of each linear weight of a text encoder -> layer."""
    linear: dict[str, Any] = {f"{n}.weight": m for n, m in encoder.named_modules() if hasattr(m, "in_features")}
    if component in LLAMA_CPP:
        metas = {n: TensorMeta(n, tuple(p.shape), p.dtype) for n, p in encoder.named_parameters()}
        # The parameters of a quantized layer are named and shaped otherwise.
        metas = {n: meta for n, meta in metas.items() if f"{n.rpartition('.')[0]}.weight" not in linear}
        metas |= {n: TensorMeta(n, (m.out_features, m.in_features), torch.float32) for n, m in linear.items()}
        targets = transformers_to_llama_cpp(LLAMA_CPP[component], metas)
        return {t.name: linear[t.pieces[0].source] for t in targets if t.pieces[0].source in linear}
    return {f"{PREFIXES.get(component, '')}{name}": layer for name, layer in linear.items()}
