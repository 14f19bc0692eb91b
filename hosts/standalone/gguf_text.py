"""T5 and CLIP text encoders from GGUF files, for the embedded host; safetensors files may stand beside them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...quantizers.apply import LayerMaker
from ...quantizers.compat.modes import Carrier
from ...quantizers.errors import FileError, SpecError
from ...quantizers.files.checkpoint import Checkpoint, read_checkpoint
from ...quantizers.files.gguf_header import read_array
from ...quantizers.files.gguf_parts import read_gguf_parts
from ...quantizers.files.text_encoder import TextFile, is_gguf, open_text_encoder, refuse_for_text_encoder
from ...quantizers.files.vocabulary import BYTE, CONTROL, PREFIX, UNKNOWN
from ...quantizers.plan import sensitive_reason
from ...quantizers.report import Entry, QuantReport
from ...quantizers.weight import QuantizedWeight, TensorMeta
from .text_encoders import Encoder, QuantizedParts, TextEncoder, Value, combine, load_encoder, shape_of, tokenizer_of

RUN_HERE = ("t5", "t5encoder")
SPACE = "\u2581"  # stands for a space in SentencePiece vocabularies


def load_text_encoders(paths: Sequence[Path], carrier: Carrier, maker: LayerMaker) -> tuple[TextEncoder, QuantReport]:
    """Open one or two text encoder files; block-quantized linear weights stay in their blocks.

    Raises:
        FileError: damaged, no text encoder, or one that the embedded host does not run.
        SpecError, WeightError: a layer that the carrier cannot hold; nan or inf in a tensor.
    """
    start = time.perf_counter()
    report = QuantReport(" + ".join(p.name for p in paths), "", carrier.value)
    loaded = [(path, _load(path, carrier, maker, report, f"{path.stem}." if len(paths) > 1 else "")) for path in paths]
    report.format_id = ", ".join(sorted({e.format_id for e in report.entries if e.format_id})) or "plain tensors only"
    clip = combine(loaded)
    report.seconds = time.perf_counter() - start
    return clip, report


def _load(path: Path, carrier: Carrier, maker: LayerMaker, report: QuantReport, prefix: str) -> tuple[str, Encoder]:
    if not is_gguf(path):
        checkpoint = read_checkpoint(path)
        metas = {n: TensorMeta(n, shape_of(v), torch.float32) for n, v in checkpoint.tensors.items()}
        refuse_for_text_encoder(path, {}, metas)
        found = load_encoder(checkpoint)
        report.entries += [_entry(prefix, n, v, False) for n, v in checkpoint.tensors.items()]
        return found
    file = open_text_encoder(path)
    known = file.architecture in RUN_HERE or any(n.startswith("text_model.") for n in file.values)
    if not known and "encoder.block.0.layer.0.SelfAttention.q.weight" not in file.values:
        raise FileError(
            f"{path.name}: a text encoder of architecture {file.architecture or '(none)'!r}; the embedded host runs T5 "
            "and CLIP-L.\nRun the graph in ComfyUI, where LoadGGUFTextEncoder opens this file."
        )
    if carrier is Carrier.LIBRARY and "shared.weight" in file.values:
        raise SpecError(
            f"{path.name}: diffusers' GGUF layers do not run in a T5, which casts to the dtype of a layer's "
            "weight, and theirs are bytes.\nUse carrier quantwire."
        )
    checkpoint = Checkpoint(path, {n: _in_float32(v) for n, v in file.values.items()}, _strings(file))
    name, encoder = load_encoder(checkpoint, QuantizedParts(maker, carrier, _tokenizer(file, checkpoint)))
    tables = {f"{n}.weight" for n, m in encoder.module.named_modules() if isinstance(m, torch.nn.Embedding)}
    tables |= {"shared.weight", "text_projection.weight"}
    held = {n: n.removeprefix("text_model.") not in tables for n in file.values}
    report.entries += [_entry(prefix, n, v, held[n]) for n, v in file.values.items()]
    report.notes += [f"{path.name}: architecture {file.architecture or '(none)'}", *file.notes]
    return name, encoder


def _in_float32(value: Value) -> Value:
    """The layers compute in float32: T5's activations leave float16's range, and the embedded host runs on a CPU."""
    return dataclasses.replace(value, orig_dtype=torch.float32) if isinstance(value, QuantizedWeight) else value


def _strings(file: TextFile) -> dict[str, str]:
    return {key: value for key, value in file.header.metadata.items() if isinstance(value, str)}


def _entry(prefix: str, name: str, value: Value, held: bool) -> Entry:
    if not isinstance(value, QuantizedWeight):
        reason = sensitive_reason(name.removesuffix(".weight")) or "plain in the file"
        return Entry(prefix + name, "keep", reason, value.nbytes, value.nbytes)
    full = value.numel * 2
    if held:
        return Entry(prefix + name, "quantize", "from the file", full, value.nbytes, format_id=value.format_id)
    kind = value.format_id.removeprefix("gguf-").upper().replace("-", "_")
    return Entry(prefix + name, "dequantize", f"{kind} in the file: not a linear weight", full, full)


def _tokenizer(file: TextFile, checkpoint: Checkpoint) -> Any:
    """Of the vocabulary in the file, else of the tokenizer.json beside it.

    Raises:
        FileError: neither is there.
    """
    if file.header.metadata.get(f"{PREFIX}model") != "t5":
        return tokenizer_of(checkpoint)
    first = read_gguf_parts(file.path)[0].path
    arrays: dict[str, Any] = {
        name: read_array(first, file.header, PREFIX + name)
        for name in ("tokens", "scores", "token_type", "precompiled_charsmap")
        if PREFIX + name in file.header.located or PREFIX + name in file.header.arrays
    }
    missing = next((n for n in ("tokens", "scores", "token_type") if n not in arrays), None)
    if missing:
        raise FileError(f"{file.path.name}: its vocabulary has no {PREFIX}{missing}.\nThe file is not complete.")
    return unigram_tokenizer(
        arrays["tokens"],
        arrays["scores"],
        arrays["token_type"],
        bytes(n & 255 for n in arrays.get("precompiled_charsmap", ())),
        bool(file.header.metadata.get(f"{PREFIX}add_space_prefix", True)),
        bool(file.header.metadata.get(f"{PREFIX}remove_extra_whitespaces", True)),
    )


def unigram_tokenizer(
    tokens: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    charsmap: bytes = b"",
    add_prefix: bool = True,
    remove_spaces: bool = True,
) -> Any:
    """A tokenizer of the tokenizers library that cuts text as the SentencePiece unigram model did.

    Args:
        types: SentencePiece's; see `vocabulary.py`.
        charsmap: SentencePiece's compiled normalization; none is the identity.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    unknown = next((i for i, kind in enumerate(types) if kind == UNKNOWN), 0)
    made: Any = Tokenizer(models.Unigram(list(zip(tokens, scores, strict=True)), unknown, BYTE in types))
    steps: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
    if remove_spaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if steps:
        made.normalizer = normalizers.Sequence(steps)
    scheme = "always" if add_prefix else "never"
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme)
    made.add_special_tokens([token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL])
    return made
