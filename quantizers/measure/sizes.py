"""The sizes of a model that its activations follow, read off its tensors: width, hidden size of the MLP, heads.

The names are those of ComfyUI's files, of diffusers and transformers, and of llama.cpp's GGUF text encoders.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from ..errors import SpecError
from ..plan import Slot
from .parts import Role

_TOP = r"^((model|diffusion_model|transformer|unet)\.)*"
# (pattern, axis): the first that is there counts. Top names are anchored, since blocks have a `proj_in` of their own.
_WIDTH = (
    (_TOP + r"(img_in|x_embedder|proj_in|patchify_proj|project_in)\.weight$", 0),
    (_TOP + r"(img_in|x_embedder|pos_embed|patch_embed)\.proj(\.1)?\.weight$", 0),
    (_TOP + r"all_x_embedder\.[\w-]+\.weight$", 0),
    (_TOP + r"(patch_embedding|init_x_linear|input_blocks\.0\.0|conv_in)\.weight$", 0),
    (_TOP + r"patch_embed(der)?\.proj\.weight$", 0),
)
_FIRST_BLOCK = (
    r"(^|\.)(double_blocks|transformer_blocks|joint_blocks|joint_transformer_blocks|blocks|layers|double_layers)\.0\."
)
_MLP = (
    (_FIRST_BLOCK + r"(img_mlp\.(0|fc1|net\.0\.proj)|img_mlp_fc1)\.weight$", 0),
    (_FIRST_BLOCK + r"(ff|ffn)\.(net\.0\.proj|0|linear_in|linear_1)\.weight$", 0),
    (_FIRST_BLOCK + r"(x_block\.)?(mlp|mlpX)\.(fc1|layer1|c_fc1|w1)\.weight$", 0),
    (_FIRST_BLOCK + r"feed_forward\.(w1|linear_1)\.weight$", 0),
    (r"double_stream_blocks\.0\.block\.ff_i\.experts\.0\.w1\.weight$", 0),
    (r"blocks\.block0\.blocks\.2\.block\.layer1\.weight$", 0),
)
# What takes the prompt in: its last axis is the width of the text encoder.
_CONTEXT = (
    (_TOP + r"(txt_in|context_embedder|condition_embedder|cond_seq_linear|cap_embedder\.1)\.weight$", 1),
    (_TOP + r"(text_embedding\.0|condition_embedder\.text_embedder\.linear_1|txt_in\.input_embedder)\.weight$", 1),
    (_TOP + r"(context_embedder\.proj_in|caption_projection\.linear_1|y_embedder\.y_proj\.fc1)\.weight$", 1),
    (_TOP + r"time_caption_embed\.caption_embedder\.1\.weight$", 1),
    (r"(^|\.)(attn2\.to_k|cross_attn\.k_proj|attn\.to_k\.0)\.weight$", 1),
)
_TEXT_WIDTH = (
    (r"(^|\.)(shared|embed_tokens|token_embedding|token_embd|wte)\.weight$", 1),
    (r"(^|\.)(q_proj|attn_q|SelfAttention\.q)\.weight$", 1),
)
_TEXT_MLP = (
    (r"(^|\.)(DenseReluDense\.wi(_0)?|mlp\.(gate_proj|fc1|c_fc|up_proj))\.weight$", 0),
    (r"(^|\.)ffn_(gate|up)\.weight$", 0),
)
# T5 alone keeps a tokens x tokens matrix for each head: its position bias.
_TEXT_HEADS = ((r"(^|\.)(relative_attention_bias|attn_rel_b)\.weight$", 1),)
_VAE_WIDTH = (
    (r"(^|\.)decoder\.(conv_out(\.conv)?|head\.2)\.weight$", 1),
    (r"^(\w+\.)?((taesd_)?decoder\.)?(layers\.)?(0|1)\.weight$", 0),
)


def read_sizes(role: Role, slots: Sequence[Slot]) -> dict[str, int]:
    """`width`; for diffusion models `mlp` and `context` too, for text encoders `mlp` and `heads`.

    Raises:
        SpecError: no matrix at all to read them off.
    """
    if role is Role.VAE:
        return {"width": _first(slots, _VAE_WIDTH) or _common_width(slots, 4)}
    if role is Role.TEXT:
        width = _first(slots, _TEXT_WIDTH) or _common_width(slots, 2)
        return {"width": width, "mlp": _first(slots, _TEXT_MLP) or 4 * width, "heads": _first(slots, _TEXT_HEADS)}
    width = _first(slots, _WIDTH) or _common_width(slots, 2)
    return {"width": width, "mlp": _first(slots, _MLP) or 4 * width, "context": _first(slots, _CONTEXT) or width}


def formula_of(role: Role, family: str, slots: Sequence[Slot]) -> str:
    """The name of the formula for a part; one that the data does not have where its kind is unknown."""
    names = _Names(slots)
    if role is Role.VAE:
        return _vae(names, slots)
    if role is Role.TEXT:
        return _text(family, names)
    if family == "flux":
        if names.have(r"(^|\.)distilled_guidance_layer\."):
            return "chroma"
        return "flux2" if names.have(r"(^|\.)(double|single)_stream_modulation") else "flux"
    if family == "sd3":
        return "sd3.5-medium" if names.have(r"\.0\.(x_block\.)?attn2\.") else "sd3"
    if family == "wan" and _first(slots, ((_TOP + r"patch_embedding\.weight$", 1),)) == 48:
        return "wan2.2-5b"
    return family or "?"


def _text(family: str, names: _Names) -> str:
    if family.startswith("t5") or names.have(r"\.SelfAttention\.q\.weight$|^enc\.blk\.0\."):
        # UMT5 has a position bias in every layer.
        return "umt5" if names.have(r"\.1\.(layer\.0\.SelfAttention\.relative_attention_bias|attn_rel_b)\.") else "t5"
    if family.lower().startswith(("clip", "openclip")) or names.have(r"(^|\.)text_model\.encoder\.|\.resblocks\.0\."):
        return "clip"
    if names.have(r"(^|\.)layers\.0\.mlp\.(gate|up)_proj\.weight$|^blk\.0\.ffn_gate\.weight$"):
        return "llm"
    return family or "?"


def _vae(names: _Names, slots: Sequence[Slot]) -> str:
    if names.have(r"(^|\.)taesd_decoder\.|^(vae\.)?(decoder\.)?layers\.\d+\."):
        return "taesd"
    if names.have(r"(^|\.)decoder\.mid(_block)?\.(block_1|resnets\.0)\.conv1\.weight$") and not _is_video(slots):
        return "kl"
    if names.have(r"(^|\.)decoder\.head\.2\.weight$|(^|\.)decoder\.conv_out\.weight$") and _is_video(slots):
        out = _first(slots, ((r"(^|\.)decoder\.(head\.2|conv_out)\.weight$", 0),))
        return "wan-vae" if out == 3 else "wan2.2-vae"
    out = _first(slots, ((r"(^|\.)decoder\.conv_out\.conv\.weight$", 0),))
    return {3: "hyvid-vae", 48: "ltx-vae"}.get(out, "?")


def _is_video(slots: Sequence[Slot]) -> bool:
    return any(len(s.meta.shape) == 5 and min(s.meta.shape[2:]) > 1 for s in slots)


class _Names:
    def __init__(self, slots: Iterable[Slot]) -> None:
        self._text = [s.meta.name for s in slots]

    def have(self, pattern: str) -> bool:
        found = re.compile(pattern)
        return any(found.search(name) for name in self._text)


def _first(slots: Sequence[Slot], patterns: Iterable[tuple[str, int]]) -> int:
    """The size of an axis of the first tensor that the first fitting pattern finds; 0 for none."""
    for pattern, axis in patterns:
        found = re.compile(pattern)
        for slot in slots:
            if len(slot.meta.shape) > axis and found.search(slot.meta.name):
                return slot.meta.shape[axis]
    return 0


def _common_width(slots: Iterable[Slot], ndim: int) -> int:
    """What most matrices (or, for 4, convolutions) take in: the width of a model whose names are not known."""
    counts = Counter(s.meta.shape[1] for s in slots if 2 <= len(s.meta.shape) <= 5 and len(s.meta.shape) >= ndim)
    if not counts:
        counts = Counter(s.meta.shape[-1] for s in slots if s.meta.shape)
    if not counts:
        raise SpecError("The model holds no matrix, so its width cannot be told.\nGive a whole model file.")
    return counts.most_common(1)[0][0]
