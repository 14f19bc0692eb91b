"""Text encoders under llama.cpp's names, and under those of transformers, which ComfyUI reads.

The names of whole modules and of the modules of a block stand in tables. Three things go beyond names:

- llama: the rows of q and k lie in pairs for rotary embeddings, where transformers has halves (`Piece.heads`).
- gemma: norms are stored plus one (`Piece.add`); transformers adds the one when it computes.
- qwen2vl: the vision tower is a file of its own ("mmproj"), with q, k and v apart.

Sources: ggml-org/llama.cpp gguf-py/gguf/{constants,tensor_mapping}.py for names, convert_hf_to_gguf.py for the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard, cast

from ...errors import FileError
from ...meta import TensorMeta
from .target import Piece, Target, target

HEAD_DIM = 128  # what is assumed where nothing tells
ASSUMED_HEADS = (
    f"nothing tells how wide the heads of attention are, and {HEAD_DIM} is assumed; if that is wrong, prompts lose "
    "their meaning (config.json beside a safetensors file, and `attention.head_count` in a GGUF file, would tell)"
)
# (width, rows of q, rows of k) of models whose heads are that wide: Llama 3 8B, Mistral Small 3, Ministral 3 3B.
# Source: Comfy-Org/ComfyUI comfy/text_encoders/llama.py at 0.33.0.
KNOWN_SHAPES = ((4096, 4096, 1024), (5120, 4096, 1024), (3072, 4096, 1024))
_TABLE = re.compile(r"(^|\.)(rope_freqs\.weight|rotary_emb\.inv_freq)$")  # half as long as a head is wide
_FIRST = re.compile(r"(^|\.)(blk\.0\.attn_(?P<here>[qk])|layers\.0\.self_attn\.(?P<there>[qk])_proj)\.weight$")
# What sees images. In a GGUF file of a text encoder it has no place: llama.cpp keeps it in a file of its own, "mmproj".
VISION = re.compile(r"(^|\.)(visual|vision_\w+|multi_modal_projector|mm_projector)\.")


@dataclass(frozen=True)
class Heads:
    """Heads of the queries, and of the keys and values."""

    q: int
    kv: int


@dataclass(frozen=True)
class Names:
    """One architecture.

    Attributes:
        stem: block prefix with `{}` for the number, (llama.cpp, transformers).
        whole: llama.cpp module -> transformers module, outside the blocks.
        block: the same inside a block.
        rotary: modules of a block whose rows are in pairs.
        shifted: norms are stored plus one.
        unused_here, unused_there: patterns of tensors that are left out, in llama.cpp and in transformers files.
        optional: llama.cpp modules outside the blocks that a complete file may lack.
    """

    stem: tuple[str, str]
    whole: Mapping[str, str]
    block: Mapping[str, str]
    rotary: tuple[str, ...] = ()
    shifted: bool = False
    unused_here: tuple[str, ...] = ()
    unused_there: tuple[str, ...] = ()
    alternatives: Mapping[str, str] = field(default_factory=dict[str, str])
    optional: tuple[str, ...] = ("output",)


_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_MLP = {
    **_MLP,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


# ComfyUI runs some models without their last norm, and their files leave it out (Mistral cut to 30 blocks for FLUX.2,
# Qwen3 for Ideogram 4).
_NO_LAST_NORM = ("output", "output_norm")


def _decoder(
    block: Mapping[str, str],
    rotary: tuple[str, ...] = (),
    shifted: bool = False,
    optional: tuple[str, ...] = ("output",),
) -> Names:
    return Names(
        stem=("blk.{}.", "model.layers.{}."),
        whole={"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
        block=block,
        rotary=rotary,
        shifted=shifted,
        unused_here=(r"rope_freqs\.weight", r"rope_factors_(long|short)\.weight"),  # tables; the host computes them
        unused_there=(
            r".*rotary_emb\.inv_freq",
            rf"(.*?){VISION.pattern}.*",
            r"spiece_model|tekken_model|tokenizer_json",  # metadata in a GGUF file
        ),
        optional=optional,
    )


_T5 = Names(
    stem=("enc.blk.{}.", "encoder.block.{}."),
    whole={"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm"},
    block={
        "attn_norm": "layer.0.layer_norm",
        "attn_q": "layer.0.SelfAttention.q",
        "attn_k": "layer.0.SelfAttention.k",
        "attn_v": "layer.0.SelfAttention.v",
        "attn_o": "layer.0.SelfAttention.o",
        "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
        "ffn_norm": "layer.1.layer_norm",
        "ffn_gate": "layer.1.DenseReluDense.wi_0",
        "ffn_up": "layer.1.DenseReluDense.wi_1",
        "ffn_down": "layer.1.DenseReluDense.wo",
    },
    unused_here=(r"dec\..*", r"output\.weight"),
    # The embedding is stored under up to three names (see `_without_prefix`), and the decoder encodes no prompt.
    unused_there=(r"decoder\..*", r"encoder\.embed_tokens\.weight", r"lm_head\.weight", r"spiece_model", "logit_scale"),
    # The first T5 has one matrix where later ones have a gate beside it.
    alternatives={"layer.1.DenseReluDense.wi": "ffn_up"},
)

ARCHITECTURES: dict[str, Names] = {
    "t5": _T5,
    "t5encoder": _T5,
    "llama": _decoder(_ATTENTION | _MLP, rotary=("attn_q", "attn_k"), optional=_NO_LAST_NORM),
    "mistral3": _decoder(_ATTENTION | _MLP, rotary=("attn_q", "attn_k"), optional=_NO_LAST_NORM),
    "qwen2": _decoder(_ATTENTION | _MLP),
    "qwen2vl": _decoder(_ATTENTION | _MLP),
    "qwen3": _decoder(_ATTENTION | _QK_NORM | _MLP, optional=_NO_LAST_NORM),
    "qwen3vl": _decoder(_ATTENTION | _QK_NORM | _MLP, optional=_NO_LAST_NORM),
    "gemma": _decoder(_ATTENTION | _MLP, shifted=True),
    "gemma2": _decoder(_ATTENTION | _GEMMA_MLP, shifted=True),
    "gemma3": _decoder(_ATTENTION | _QK_NORM | _GEMMA_MLP, shifted=True),
}


def gguf_heads(metadata: Mapping[str, Any], metas: Mapping[str, TensorMeta]) -> Heads | None:
    """What a GGUF file says of its heads, by its metadata or by its shapes; None where it says nothing."""
    key = f"{metadata.get('general.architecture')}.attention.head_count"
    q = metadata.get(key)
    kv = metadata.get(f"{key}_kv", q)
    return Heads(q, kv) if _is_count(q) and _is_count(kv) else shape_heads(metas)


def config_heads(config: Mapping[str, Any], metas: Mapping[str, TensorMeta]) -> Heads | None:
    """What a config.json says of the heads of these tensors; None where it says nothing, or is another model's."""
    inner: Any = config.get("text_config")
    said: Mapping[str, Any] = cast("dict[str, Any]", inner) if isinstance(inner, dict) else config
    q: Any = said.get("num_attention_heads")
    kv: Any = said.get("num_key_value_heads") or q
    width, q_rows, k_rows = _first_shapes(metas)
    if not _is_count(q) or not _is_count(kv) or said.get("hidden_size", width) != width or q_rows % q or k_rows % kv:
        return None
    one = said.get("head_dim") or q_rows // q
    return Heads(q, kv) if q_rows // q == k_rows // kv == one else None


def shape_heads(metas: Mapping[str, TensorMeta]) -> Heads | None:
    """Heads as wide as a stored table of rotary frequencies says, or as in models of just these shapes."""
    width, q_rows, k_rows = _first_shapes(metas)
    table = next((m.shape for n, m in metas.items() if _TABLE.search(n) and len(m.shape) == 1), None)
    if table is None and (width, q_rows, k_rows) not in KNOWN_SHAPES:
        return None
    one = HEAD_DIM if table is None else 2 * table[0]
    return Heads(q_rows // one, k_rows // one) if one and q_rows and not (q_rows % one or k_rows % one) else None


def _first_shapes(metas: Mapping[str, TensorMeta]) -> tuple[int, int, int]:
    """Width of the model, rows of the first block's q, and of its k; zeros where there are none."""
    shapes = {m["here"] or m["there"]: meta.shape for n, meta in metas.items() if (m := _FIRST.search(n))}
    q, k = (shapes.get(letter, ()) for letter in "qk")
    return (q[1], q[0], k[0]) if len(q) == len(k) == 2 else (0, 0, 0)


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def llama_cpp_to_transformers(
    architecture: str, metas: Mapping[str, TensorMeta], heads: Heads | None = None
) -> list[Target]:
    """The tensors of a text encoder under transformers' names.

    Args:
        architecture: a key of `ARCHITECTURES`.
        metas: of a GGUF file, by name.
        heads: of `llama`, see `gguf_heads` and `config_heads`; None takes heads 128 wide.
    Raises:
        FileError: an unknown architecture or tensor, missing tensors, or rows that are not so many heads.
    """
    names = _names(architecture)
    forward = _rules(names, names.stem[0], names.stem[1], names.whole, _here_to_there(names, metas))
    return _targets(names, metas, forward, names.unused_here, -1, heads)


def transformers_to_llama_cpp(
    architecture: str, metas: Mapping[str, TensorMeta], heads: Heads | None = None
) -> list[Target]:
    """The tensors of a text encoder under llama.cpp's names; those of a vision tower or a decoder are left out.

    Args:
        metas: of a safetensors file, by name, with whatever stands before all names of the model.
        heads: as above.
    Raises:
        FileError: as above.
    """
    names = _names(architecture)
    whole = {there: here for here, there in names.whole.items()}
    block = {**{there: here for here, there in names.block.items()}, **names.alternatives}
    forward = _rules(names, names.stem[1], names.stem[0], whole, block)
    return _targets(names, _without_prefix(names, metas), forward, names.unused_there, 1, heads)


def hyperparameters(architecture: str, metas: Mapping[str, TensorMeta], heads: Heads | None = None) -> dict[str, int]:
    """GGUF metadata that a loader needs beside the tensors, read off transformers' shapes.

    Not all that llama.cpp's own programs want: epsilons and rotary bases stand in a model's config.json only.

    Raises:
        FileError: an unknown architecture, or missing tensors.
    """
    names = _names(architecture)
    inner = _without_prefix(names, metas)
    first = names.stem[1].format(0)

    def shape(module: str) -> tuple[int, ...]:
        name = f"{module}.weight"
        if name not in inner:
            raise FileError(f"'{name}' is missing.\nThe file is not complete.")
        return inner[name].shape

    tokens, width = shape(names.whole["token_embd"])
    found = {
        "block_count": _block_count(names.stem[1], inner),
        "embedding_length": width,
        "vocab_size": tokens,
        "feed_forward_length": shape(f"{first}{names.block['ffn_down']}")[1],
    }
    q, k = (shape(f"{first}{names.block[n]}")[0] for n in ("attn_q", "attn_k"))
    table = inner.get(f"{first}{names.block.get('attn_rel_b', '-')}.weight")
    bias = None if table is None else table.shape
    if bias is not None:
        found |= {"attention.head_count": bias[1], "attention.relative_buckets_count": bias[0]}
    elif names.rotary:
        count = heads or Heads(q // HEAD_DIM, k // HEAD_DIM)
        found |= {"attention.head_count": count.q, "attention.head_count_kv": count.kv}
        found["attention.key_length"] = q // count.q
    return {f"{architecture}.{name}": value for name, value in found.items()}


def mmproj_to_transformers(metas: Mapping[str, TensorMeta]) -> list[Target]:
    """The vision tower of Qwen2.5-VL under transformers' names, without its patch embedding.

    That is a 3-D convolution kept as two 2-D ones, `v.patch_embd.weight` and `.weight.1`, which lie along another axis
    than rows.

    Raises:
        FileError: another vision tower.
    """
    made: list[Target] = []
    for name, meta in metas.items():
        match = re.fullmatch(r"v\.blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        if match and match[2] in ("attn_q", "attn_k", "attn_v"):
            if match[2] == "attn_q":
                parts = tuple(Piece(name.replace("attn_q", part)) for part in ("attn_q", "attn_k", "attn_v"))
                made.append(target(f"visual.blocks.{match[1]}.attn.qkv.{match[3]}", parts, metas))
        elif match and match[2] in _VISION_BLOCK:
            made.append(target(f"visual.blocks.{match[1]}.{_VISION_BLOCK[match[2]]}.{match[3]}", (Piece(name),), metas))
        elif name.rpartition(".")[0] in _VISION:
            module, _, leaf = name.rpartition(".")
            made.append(target(f"visual.{_VISION[module]}.{leaf}", (Piece(name),), metas))
        elif name not in PATCH_EMBEDDING:
            raise FileError(f"'{name}' {meta.shape} is no part of a Qwen2.5-VL vision tower.")
    return made


PATCH_EMBEDDING = ("v.patch_embd.weight", "v.patch_embd.weight.1")
_VISION = {"v.post_ln": "merger.ln_q", "mm.0": "merger.mlp.0", "mm.2": "merger.mlp.2"}
_VISION_BLOCK = {
    "ln1": "norm1",
    "ln2": "norm2",
    "attn_out": "attn.proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _names(architecture: str) -> Names:
    if architecture not in ARCHITECTURES:
        raise FileError(
            f"No text encoder of architecture '{architecture}' is known here.\nKnown are {', '.join(ARCHITECTURES)}."
        )
    return ARCHITECTURES[architecture]


def _here_to_there(names: Names, metas: Mapping[str, TensorMeta]) -> dict[str, str]:
    """The names in a block, by which of the alternatives the file has."""
    block = dict(names.block)
    for there, here in names.alternatives.items():
        if f"{names.stem[0].format(0)}ffn_gate.weight" not in metas:
            block[here] = there
    return block


@dataclass(frozen=True)
class _Rules:
    block: re.Pattern[str]
    stem: str
    whole: Mapping[str, str]
    inside: Mapping[str, str]

    def rename(self, name: str) -> str | None:
        module, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias"):
            return None
        match = self.block.fullmatch(module)
        if match:
            inside = self.inside.get(match[2])
            return None if inside is None else f"{self.stem.format(match[1])}{inside}.{leaf}"
        return f"{self.whole[module]}.{leaf}" if module in self.whole else None


def _rules(names: Names, before: str, after: str, whole: Mapping[str, str], inside: Mapping[str, str]) -> _Rules:
    pattern = re.escape(before).replace(r"\{\}", r"(\d+)") + r"(.+)"
    return _Rules(re.compile(pattern), after, whole, inside)


def _targets(
    names: Names,
    metas: Mapping[str, TensorMeta],
    rules: _Rules,
    unused: Iterable[str],
    direction: int,
    heads: Heads | None,
) -> list[Target]:
    skip = re.compile("|".join(unused))
    made: list[Target] = []
    for name, meta in metas.items():
        if skip.fullmatch(name):
            continue
        renamed = rules.rename(name)
        if renamed is None:
            raise FileError(f"'{name}' {meta.shape} is no tensor of this kind of text encoder.")
        here = name if direction < 0 else renamed
        piece = Piece(
            meta.name,
            heads=direction * _head_count(names, here, meta, heads),
            add=direction * 1.0 if names.shifted and here.endswith("norm.weight") else 0.0,
        )
        made.append(target(renamed, (piece,), {meta.name: meta}))
    _check_complete(names, rules, {t.name for t in made})
    return made


def _head_count(names: Names, here: str, meta: TensorMeta, heads: Heads | None) -> int:
    """Of a q or k whose rows are in pairs, else 0."""
    module = here.split(".")[-2]
    if module not in names.rotary:
        return 0
    if heads is not None:
        return heads.q if module == "attn_q" else heads.kv
    if meta.shape[0] % HEAD_DIM:
        raise FileError(
            f"'{meta.name}': {meta.shape[0]} rows are not heads {HEAD_DIM} wide, and nothing tells how wide they are.\n"
            "Put the model's config.json beside it; a GGUF file has to have `attention.head_count`."
        )
    return meta.shape[0] // HEAD_DIM


def _check_complete(names: Names, rules: _Rules, made: set[str]) -> None:
    """What stands outside the blocks is there, and every block up to the last has the matrices of the first."""
    whole = {there: here for here, there in names.whole.items()}
    missing = [n for n in rules.whole.values() if whole.get(n, n) not in names.optional and f"{n}.weight" not in made]
    block = re.compile(re.escape(rules.stem).replace(r"\{\}", r"(\d+)") + r"(.+)")
    found = {(int(m[1]), m[2]) for name in made if (m := block.fullmatch(name))}
    if not found:
        raise FileError("No block of a text encoder is in this file.")
    if missing:
        raise FileError(f"'{missing[0]}.weight' is missing.\nThe file is not complete.")
    first = {inside for number, inside in found if number == 0 and "rel" not in inside}
    for number in range(max(n for n, _ in found) + 1):
        missing = sorted(inside for inside in first if (number, inside) not in found)
        if missing or not first:
            what = f"'{rules.stem.format(number)}{missing[0]}'" if missing else "block 0"
            raise FileError(f"{what} is missing.\nThe file is not complete.")


def _block_count(stem: str, metas: Mapping[str, TensorMeta]) -> int:
    pattern = re.compile(re.escape(stem).replace(r"\{\}", r"(\d+)"))
    return len({m[1] for name in metas if (m := pattern.match(name))})


def _without_prefix(names: Names, metas: Mapping[str, TensorMeta]) -> dict[str, TensorMeta]:
    """The tensors by the names of ComfyUI: `model.layers...`, `encoder.block...`; each meta keeps its name in the file.

    Files say `layers...`, `model.layers...`, `model.language_model.layers...` or `language_model.model.layers...`, and
    put their own prefix before that.
    """
    inner = f"{names.stem[1].removeprefix('model.').format(0)}{names.block['attn_norm']}.weight"
    start = next((name.removesuffix(inner) for name in metas if name.endswith(inner)), None)
    if start is None:
        shown = ", ".join(list(metas)[:3]) or "no tensors"
        raise FileError(f"No '{inner}' is in this file, but {shown}, ....")
    if not names.stem[1].startswith("model."):
        inner_metas = {name.removeprefix(start): meta for name, meta in metas.items()}
        same = inner_metas.get("encoder.embed_tokens.weight")
        if same is not None and "shared.weight" not in inner_metas:
            inner_metas["shared.weight"] = same
        return inner_metas
    outer = re.sub(r"(model\.language_model|language_model\.model|model|language_model)\.$", "", start)
    renamed: dict[str, TensorMeta] = {}
    for name, meta in metas.items():
        if start and name.startswith(start):
            name = f"model.{name.removeprefix(start)}"
        elif not start and re.match(r"(layers|embed_tokens|norm|rotary_emb)\.", name):
            name = f"model.{name}"
        else:
            name = name.removeprefix(outer).removeprefix("language_model.")
        renamed[name] = meta
    return renamed
