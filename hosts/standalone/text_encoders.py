"""CLIP of the embedded host: CLIP-L-type and T5 text encoders on transformers modules.

ComfyUI brings the tokenizers of the encoders that it knows; here a file brings its own: the complete JSON of the
tokenizers library in the safetensors metadata (`tokenizer_json`), or in `NAME.tokenizer.json` beside
`NAME.safetensors`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...quantizers.apply import LayerMaker, check_finite
from ...quantizers.compat.modes import Carrier
from ...quantizers.errors import FileError, SpecError
from ...quantizers.files.checkpoint import Checkpoint, read_checkpoint
from ...quantizers.files.gguf_model import dequantized
from ...quantizers.weight import QuantizedWeight
from .guard import check_before
from .offload import running
from .record import recorded

if TYPE_CHECKING:
    from ...quantizers.compat.guard import Guard
    from ..offload import OffloadSettings

log = logging.getLogger(__name__)

CLIP_LENGTH = 77
T5_LENGTH = 256  # what ComfyUI pads T5 to for FLUX; longer prompts are not cut
# Their rows are cast to float32 by the first norm, so they need not take twice the memory.
T5_TABLES = ("shared.weight", "encoder.embed_tokens.weight")
Value = Tensor | QuantizedWeight
_WEIGHTED = re.compile(r"\(.*:[\d.]+\)|\bembedding:")


@dataclass(frozen=True)
class Encoder:
    """One text encoder.

    Attributes:
        module: transformers model in eval mode.
        tokenizer: `tokenizers.Tokenizer`.
        pad_to: number of tokens that prompts are padded to.
        limit: the most tokens that it takes; None is no limit.
        end: id of the end token; pad: id of the padding token.
        projection: (P, P) of the pooled vector, where the file has one.
    """

    module: nn.Module
    tokenizer: Any
    pad_to: int
    limit: int | None
    end: int
    pad: int
    projection: Tensor | None = None

    def tokens(self, text: str) -> Tensor:
        """(1, T) int64: the text, an end token, padding. A text over the limit is cut, with a warning.

        Raises:
            SpecError: the tokenizer cannot express the text.
        """
        try:
            encoded: list[int] = self.tokenizer.encode(text).ids
        except Exception as err:  # the library raises bare Exception
            raise SpecError(f"The tokenizer cannot express the prompt {text!r}: {err}.") from err
        ids = [i for i in encoded if i != self.end]
        if self.limit is not None and len(ids) > self.limit - 1:
            log.warning("The prompt has %d tokens; those after the first %d are left out.", len(ids), self.limit - 1)
            ids = ids[: self.limit - 1]
        ids = [*ids, self.end]
        return torch.tensor([ids + [self.pad] * (self.pad_to - len(ids))])


@dataclass(frozen=True)
class TextEncoder:
    """CLIP: one or two encoders by ComfyUI's names (`clip_l`, `t5xxl`).

    Attributes:
        guard: OffloadCompat's check, called before a prompt is encoded.
        offload: how its weights are placed when it encodes; None leaves them where they are.
    """

    encoders: Mapping[str, Encoder]
    source: str
    guard: Guard | None = field(default=None, compare=False)
    offload: OffloadSettings | None = None

    def encode(self, text: str) -> tuple[Tensor, Tensor]:
        """Encode one prompt.

        Returns:
            context (1, T, D) float32: hidden states after the final norm, of T5 if there is one, else of CLIP.
            pooled (1, P) float32: CLIP's hidden state at the first end token; projected where CLIP stands alone, as
            ComfyUI does for the type `stable_diffusion` and not for `flux`.
        Raises:
            FileError: no CLIP-type encoder for the pooled output.
            SpecError: a tokenizer cannot express the text.
            OffloadConflict: the guard on it found that it cannot run as it is now.
        """
        check_before(self)
        if "clip_l" not in self.encoders:
            raise FileError(f"{self.source}: FLUX needs a CLIP-L encoder for its pooled vector; only T5 is loaded.")
        if _WEIGHTED.search(text):
            log.warning(
                "Prompt weights, as in (word:1.2), and embeddings are taken as plain text by the embedded host."
            )
        with running(self) as placed, recorded(placed):
            return placed._encoded(text)

    def _encoded(self, text: str) -> tuple[Tensor, Tensor]:
        clip = self.encoders["clip_l"]
        ids = clip.tokens(text)
        hidden: Tensor = clip.module(input_ids=ids).last_hidden_state
        pooled = hidden[:, int((ids[0] == clip.end).int().argmax())].float()
        if "t5xxl" in self.encoders:
            t5 = self.encoders["t5xxl"]
            hidden = t5.module(input_ids=t5.tokens(text)).last_hidden_state
        elif clip.projection is not None:
            pooled = nn.functional.linear(pooled, clip.projection.float())
        return hidden.float(), pooled

    def __str__(self) -> str:
        return f"{' + '.join(self.encoders)} from {self.source}"


def load_text_encoder(paths: list[Path]) -> TextEncoder:
    """Open one CLIP file, or a CLIP and a T5 file in either order.

    Raises:
        FileError: neither kind, two of the same kind, no tokenizer, or a damaged file.
        WeightError: nan or inf in a tensor.
    """
    return combine([(path, load_encoder(read_checkpoint(path))) for path in paths])


def combine(loaded: list[tuple[Path, tuple[str, Encoder]]]) -> TextEncoder:
    """One CLIP of several encoders.

    Raises:
        FileError: two of the same kind.
    """
    encoders: dict[str, Encoder] = {}
    for path, (name, encoder) in loaded:
        if name in encoders:
            raise FileError(f"{path.name}: a second {name} encoder; FLUX takes one clip_l and one t5xxl.")
        encoders[name] = encoder
    return TextEncoder(encoders, ", ".join(path.name for path, _ in loaded))


@dataclass(frozen=True)
class QuantizedParts:
    """How an encoder takes weights that are quantized in its file.

    Attributes:
        maker, carrier: make the linear layers.
        tokenizer: of the file.
    """

    maker: LayerMaker
    carrier: Carrier
    tokenizer: Any


def load_encoder(checkpoint: Checkpoint, parts: QuantizedParts | None = None) -> tuple[str, Encoder]:
    """Make an encoder of a file.

    Args:
        parts: for a file whose linear weights are quantized; None refuses those.
    Returns:
        ComfyUI's name of it, and the encoder.
    Raises:
        FileError, WeightError: as for `load_text_encoder`.
    """
    names = checkpoint.tensors
    if any(n.endswith("encoder.layers.0.self_attn.q_proj.weight") for n in names):
        return "clip_l", _load_clip(checkpoint, parts)
    if "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in names:
        raise FileError(
            f"{checkpoint.path.name}: a umT5 text encoder.\nThe embedded host runs T5; run umT5 in ComfyUI."
        )
    if "encoder.block.0.layer.0.SelfAttention.q.weight" in names:
        return "t5xxl", _load_t5(checkpoint, parts)
    raise FileError(
        f"{checkpoint.path.name}: not a CLIP-L or T5 text encoder (it has {', '.join(list(names)[:3])}, ...).\n"
        "The embedded host runs these two; run others in ComfyUI."
    )


def _load_clip(checkpoint: Checkpoint, parts: QuantizedParts | None) -> Encoder:
    from transformers import CLIPTextConfig, CLIPTextModel

    values = _values(checkpoint, parts)
    state = {re.sub(r"^(.*\.)?text_model\.", "", n): t for n, t in values.items()}
    tokenizer = parts.tokenizer if parts else tokenizer_of(checkpoint)
    end = _token_id(tokenizer, "<|endoftext|>", checkpoint)
    vocabulary, hidden = _shape(state, "embeddings.token_embedding.weight", checkpoint)
    positions, _ = _shape(state, "embeddings.position_embedding.weight", checkpoint)
    config: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": _shape(state, "encoder.layers.0.mlp.fc1.weight", checkpoint)[0],
        "num_hidden_layers": _count(state, r"encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(hidden // 64, 1),
        "max_position_embeddings": positions,
        "hidden_act": "quick_gelu",
        "eos_token_id": end,
    }
    config |= _given_config(checkpoint)
    with torch.device("meta"):
        module = CLIPTextModel(CLIPTextConfig(**config))
    # Position ids are a buffer that is not saved; the meta one has no values.
    module.embeddings.position_ids = torch.arange(positions).expand((1, -1))
    _check_vocabulary(tokenizer, vocabulary, checkpoint)
    pad_to = checkpoint.metadata.get("pad_to", str(CLIP_LENGTH))
    if not pad_to.isdecimal():
        raise FileError(f"{checkpoint.path.name}: its metadata 'pad_to' is {pad_to!r}, expected a number of tokens.")
    projection = next((t for n, t in values.items() if n.endswith("text_projection.weight")), None)
    if projection is not None:
        check_finite("text_projection.weight", projection)
        projection = _plain(projection)
    limit = min(CLIP_LENGTH, positions)
    finished = _finish(module, state, checkpoint, parts)
    return Encoder(finished, tokenizer, min(int(pad_to), limit), limit, end, end, projection)


def _load_t5(checkpoint: Checkpoint, parts: QuantizedParts | None) -> Encoder:
    from transformers import T5Config, T5EncoderModel

    state = _values(checkpoint, parts)
    tokenizer = parts.tokenizer if parts else tokenizer_of(checkpoint)
    end = _token_id(tokenizer, "</s>", checkpoint)
    pad = _token_id(tokenizer, "<pad>", checkpoint)
    first = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = _shape(state, f"{first}.relative_attention_bias.weight", checkpoint)
    vocabulary, hidden = _shape(state, "shared.weight", checkpoint)
    gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in state
    config = T5Config(
        vocab_size=vocabulary,
        d_model=hidden,
        d_kv=_shape(state, f"{first}.q.weight", checkpoint)[0] // heads,
        d_ff=_shape(state, "encoder.block.0.layer.1.DenseReluDense.wo.weight", checkpoint)[1],
        num_layers=_count(state, r"encoder\.block\.(\d+)\."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu" if gated else "relu",
    )
    with torch.device("meta"):
        module = T5EncoderModel(config)
    _check_vocabulary(tokenizer, vocabulary, checkpoint)
    state["encoder.embed_tokens.weight"] = state["shared.weight"] = _plain(state["shared.weight"])
    return Encoder(_finish(module, state, checkpoint, parts), tokenizer, T5_LENGTH, None, end, pad)


def _shape(state: Mapping[str, Value], name: str, checkpoint: Checkpoint) -> tuple[int, int]:
    shape = shape_of(state[name]) if name in state else ()
    if len(shape) != 2:
        found = f"has shape {shape}, expected two dimensions" if name in state else "is missing"
        raise FileError(f"{checkpoint.path.name}: tensor '{name}' {found}.")
    return shape[0], shape[1]


def shape_of(value: Value) -> tuple[int, ...]:
    return value.orig_shape if isinstance(value, QuantizedWeight) else tuple(value.shape)


def _count(state: Mapping[str, Value], pattern: str) -> int:
    return len({m[1] for name in state if (m := re.match(pattern, name))})


def _given_config(checkpoint: Checkpoint) -> dict[str, Any]:
    try:
        config = json.loads(checkpoint.metadata.get("config", "{}"))
    except ValueError as err:
        raise FileError(f"{checkpoint.path.name}: its metadata 'config' is no JSON: {err}.") from err
    if not isinstance(config, dict):
        raise FileError(f"{checkpoint.path.name}: its metadata 'config' is no JSON object.")
    return config


def _check_vocabulary(tokenizer: Any, vocabulary: int, checkpoint: Checkpoint) -> None:
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= vocabulary:
        raise FileError(
            f"{checkpoint.path.name}: its tokenizer has ids up to {highest}, the model {vocabulary} embeddings.\n"
            "The tokenizer is another model's."
        )


def _values(checkpoint: Checkpoint, parts: QuantizedParts | None) -> dict[str, Value]:
    for name, value in checkpoint.tensors.items():
        if value.dtype.itemsize < 2 if isinstance(value, Tensor) else parts is None:
            todo = "\nLoad it with LoadGGUFTextEncoder." if isinstance(value, QuantizedWeight) else ""
            raise FileError(
                f"{checkpoint.path.name}: '{name}' is already quantized; a full-precision file is needed here.{todo}"
            )
    return dict(checkpoint.tensors)


def _plain(value: Value) -> Tensor:
    """Embeddings and projections have no layer that could hold blocks; float16 is what ComfyUI gives them."""
    return dequantized(value, torch.float16) if isinstance(value, QuantizedWeight) else value


def _finish(
    module: nn.Module, state: Mapping[str, Value], checkpoint: Checkpoint, parts: QuantizedParts | None
) -> nn.Module:
    wanted = {n: tuple(t.shape) for n, t in module.state_dict().items()}
    for name, shape in wanted.items():
        if name not in state:
            raise FileError(f"{checkpoint.path.name}: tensor '{name}' is missing.")
        if shape_of(state[name]) != shape:
            raise FileError(f"{checkpoint.path.name}: '{name}' has shape {shape_of(state[name])}, expected {shape}.")
        check_finite(name, state[name])
    linear = {f"{n}.weight" for n, m in module.named_modules() if isinstance(m, nn.Linear)} if parts else set[str]()
    quantized = {n: v for n in wanted if n in linear and isinstance(v := state[n], QuantizedWeight)}
    plain = {n: _plain(state[n]) for n in wanted if n not in quantized}
    if parts:  # GGUF files mix types; layers compute in that of their input
        compute = torch.float32 if quantized else next(t.dtype for n, t in plain.items() if n in linear)
        plain = {n: t if n in T5_TABLES else t.to(compute) for n, t in plain.items()}
    module.load_state_dict(plain, strict=False, assign=True)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    for name, weight in quantized.items():
        layer = name.removesuffix(".weight")
        bias = plain.get(f"{layer}.bias")
        parent, _, leaf = layer.rpartition(".")
        setattr(module.get_submodule(parent), leaf, parts.maker(weight, bias, parts.carrier))  # type: ignore[union-attr]
    return module.eval()


def tokenizer_of(checkpoint: Checkpoint) -> Any:
    """The complete tokenizer in the metadata, or in the file beside it.

    Raises:
        FileError: there is none, or it cannot be read.
    """
    import tokenizers

    text = checkpoint.metadata.get("tokenizer_json")
    beside = checkpoint.path.with_suffix(".tokenizer.json")
    if text is None and beside.is_file():
        text = beside.read_text(encoding="utf-8")
    if text is None:
        raise FileError(
            f"{checkpoint.path.name}: no tokenizer.\nPut the model's tokenizer.json beside it as '{beside.name}'."
        )
    try:
        tokenizer: Any = tokenizers.Tokenizer.from_str(text)
    except Exception as err:  # the library raises bare Exception for every fault of the JSON
        raise FileError(f"{checkpoint.path.name}: its tokenizer cannot be read: {err}.") from err
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _token_id(tokenizer: Any, name: str, checkpoint: Checkpoint) -> int:
    found = tokenizer.token_to_id(name)
    if found is None:
        raise FileError(f"{checkpoint.path.name}: its tokenizer has no {name} token.")
    return found
