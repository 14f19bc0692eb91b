"""CLIP of the embedded host: CLIP-L-type and T5 text encoders on transformers modules.

ComfyUI brings the tokenizers of the encoders that it knows; here a file brings its own: the complete JSON of the
tokenizers library in the safetensors metadata (`tokenizer_json`), or in `NAME.tokenizer.json` beside `NAME.safetensors`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...quantizers.errors import FileError
from ...quantizers.files.checkpoint import Checkpoint, read_checkpoint

CLIP_LENGTH = 77
T5_LENGTH = 256  # the shortest prompt that ComfyUI pads T5 to for FLUX


@dataclass(frozen=True)
class Encoder:
    """One text encoder.

    Attributes:
        module: transformers model in eval mode.
        tokenizer: `tokenizers.Tokenizer`.
        length: number of tokens that prompts are padded or cut to.
        end: id of the end token; pad: id of the padding token.
    """

    module: nn.Module
    tokenizer: Any
    length: int
    end: int
    pad: int

    def tokens(self, text: str) -> Tensor:
        """(1, length) int64: the text, an end token, padding."""
        ids: list[int] = [i for i in self.tokenizer.encode(text).ids if i != self.end][: self.length - 1]
        ids += [self.end]
        return torch.tensor([ids + [self.pad] * (self.length - len(ids))])


@dataclass(frozen=True)
class TextEncoder:
    """CLIP: one or two encoders by ComfyUI's names (`clip_l`, `t5xxl`)."""

    encoders: Mapping[str, Encoder]
    source: str

    def encode(self, text: str) -> tuple[Tensor, Tensor]:
        """Encode one prompt.

        Returns:
            context (1, T, D) float32: hidden states after the final norm, of T5 if there is one, else of CLIP.
            pooled (1, P) float32: CLIP's hidden state at the first end token.
        Raises:
            FileError: no CLIP-type encoder for the pooled output.
        """
        if "clip_l" not in self.encoders:
            raise FileError(f"{self.source}: FLUX needs a CLIP-L encoder for its pooled vector; only T5 is loaded.")
        clip = self.encoders["clip_l"]
        ids = clip.tokens(text)
        hidden: Tensor = clip.module(input_ids=ids).last_hidden_state
        first_end = (ids == clip.end).int().argmax(dim=1)
        pooled = hidden[torch.arange(len(ids)), first_end]
        if "t5xxl" in self.encoders:
            t5 = self.encoders["t5xxl"]
            hidden = t5.module(input_ids=t5.tokens(text)).last_hidden_state
        return hidden.float(), pooled.float()

    def __str__(self) -> str:
        return f"{' + '.join(self.encoders)} from {self.source}"


def load_text_encoder(paths: list[Path]) -> TextEncoder:
    """Open one CLIP file, or a CLIP and a T5 file in either order.

    Raises:
        FileError: neither kind, two of the same kind, no tokenizer, or a damaged file.
    """
    encoders: dict[str, Encoder] = {}
    for path in paths:
        name, encoder = _load(read_checkpoint(path))
        if name in encoders:
            raise FileError(f"{path.name}: a second {name} encoder; FLUX takes one clip_l and one t5xxl.")
        encoders[name] = encoder
    return TextEncoder(encoders, ", ".join(p.name for p in paths))


def _load(checkpoint: Checkpoint) -> tuple[str, Encoder]:
    names = checkpoint.tensors
    if any(n.endswith("encoder.layers.0.self_attn.q_proj.weight") for n in names):
        return "clip_l", _load_clip(checkpoint)
    if "encoder.block.0.layer.0.SelfAttention.q.weight" in names:
        return "t5xxl", _load_t5(checkpoint)
    raise FileError(
        f"{checkpoint.path.name}: not a CLIP-L or T5 text encoder (it has {', '.join(list(names)[:3])}, ...).\n"
        "The embedded host runs these two; run others in ComfyUI."
    )


def _load_clip(checkpoint: Checkpoint) -> Encoder:
    from transformers import CLIPTextConfig, CLIPTextModel

    state = {re.sub(r"^(.*\.)?text_model\.", "", n): t for n, t in _plain(checkpoint).items()}
    state = {n: t for n, t in state.items() if n.startswith(("embeddings.", "encoder.", "final_layer_norm."))}
    state.pop("embeddings.position_ids", None)
    tokenizer = _tokenizer(checkpoint)
    end = _token_id(tokenizer, ("<|endoftext|>",), checkpoint)
    layers = 1 + max(int(n.split(".")[2]) for n in state if n.startswith("encoder.layers."))
    vocabulary, hidden = state["embeddings.token_embedding.weight"].shape
    config: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "max_position_embeddings": state["embeddings.position_embedding.weight"].shape[0],
        "hidden_act": "quick_gelu",
        "eos_token_id": end,
    }
    config |= json.loads(checkpoint.metadata.get("config", "{}"))
    with torch.device("meta"):
        module = CLIPTextModel(CLIPTextConfig(**config))
    # Position ids are a buffer that is not saved; the meta one has no values.
    module.embeddings.position_ids = torch.arange(config["max_position_embeddings"]).expand((1, -1))
    length = min(int(checkpoint.metadata.get("pad_to", CLIP_LENGTH)), config["max_position_embeddings"])
    return Encoder(_finish(module, state, checkpoint), tokenizer, length, end, end)


def _load_t5(checkpoint: Checkpoint) -> Encoder:
    from transformers import T5Config, T5EncoderModel

    state = _plain(checkpoint)
    tokenizer = _tokenizer(checkpoint)
    end = _token_id(tokenizer, ("</s>",), checkpoint)
    pad = _token_id(tokenizer, ("<pad>",), checkpoint)
    first = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = state[f"{first}.relative_attention_bias.weight"].shape
    gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in state
    config = T5Config(
        vocab_size=state["shared.weight"].shape[0],
        d_model=state["shared.weight"].shape[1],
        d_kv=state[f"{first}.q.weight"].shape[0] // heads,
        d_ff=state["encoder.block.0.layer.1.DenseReluDense.wo.weight"].shape[1],
        num_layers=1 + max(int(n.split(".")[2]) for n in state if n.startswith("encoder.block.")),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu" if gated else "relu",
    )
    with torch.device("meta"):
        module = T5EncoderModel(config)
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    return Encoder(_finish(module, state, checkpoint), tokenizer, T5_LENGTH, end, pad)


def _plain(checkpoint: Checkpoint) -> dict[str, Tensor]:
    plain = {n: t for n, t in checkpoint.tensors.items() if isinstance(t, Tensor)}
    odd = next((n for n in checkpoint.tensors if n not in plain or plain[n].dtype.itemsize < 2), None)
    if odd is not None:
        raise FileError(f"{checkpoint.path.name}: '{odd}' is already quantized; a full-precision file is needed here.")
    return plain


def _finish(module: nn.Module, state: Mapping[str, Tensor], checkpoint: Checkpoint) -> nn.Module:
    wanted = {n: tuple(t.shape) for n, t in module.state_dict().items()}
    for name, shape in wanted.items():
        if name not in state:
            raise FileError(f"{checkpoint.path.name}: tensor '{name}' is missing.")
        if tuple(state[name].shape) != shape:
            raise FileError(f"{checkpoint.path.name}: '{name}' has shape {tuple(state[name].shape)}, expected {shape}.")
    module.load_state_dict({n: state[n] for n in wanted}, assign=True)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module.eval()


def _tokenizer(checkpoint: Checkpoint) -> Any:
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


def _token_id(tokenizer: Any, names: tuple[str, ...], checkpoint: Checkpoint) -> int:
    for name in names:
        if (found := tokenizer.token_to_id(name)) is not None:
            return found
    raise FileError(f"{checkpoint.path.name}: its tokenizer has no {' or '.join(names)} token.")
