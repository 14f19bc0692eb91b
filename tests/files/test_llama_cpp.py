"""llama.cpp's names of text encoders: both ways on real transformers modules, and against gguf's own tables."""

from __future__ import annotations

import re
from typing import Any

import gguf
import pytest
import torch
import transformers
from quantwire.quantizers.errors import FileError, WeightError
from quantwire.quantizers.files.layouts.llama_cpp import (
    ARCHITECTURES,
    Heads,
    hyperparameters,
    llama_cpp_to_transformers,
    mmproj_to_transformers,
    transformers_to_llama_cpp,
)
from quantwire.quantizers.files.layouts.target import assemble
from quantwire.quantizers.files.quantized_file import Value
from quantwire.quantizers.registry import require
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedWeight, TensorMeta

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64,
}  # fmt: skip
T5: dict[str, Any] = {"vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
HEADS = Heads(4, 2)


def model_of(architecture: str) -> Any:
    """A small random model of transformers, with norms that are not one."""
    t = transformers
    qwen = {n: v for n, v in SMALL.items() if n != "head_dim"}
    makers: dict[str, Any] = {
        "t5": lambda: t.T5EncoderModel(t.T5Config(**T5, feed_forward_proj="relu")),
        "t5encoder": lambda: t.T5EncoderModel(t.T5Config(**T5, feed_forward_proj="gated-gelu")),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SMALL)),
        "mistral3": lambda: t.MistralForCausalLM(t.MistralConfig(**SMALL)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**qwen)),
        "qwen2vl": lambda: t.Qwen2VLTextModel(t.Qwen2VLTextConfig(**qwen)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SMALL)),
        "qwen3vl": lambda: t.Qwen3VLTextModel(t.Qwen3VLTextConfig(**SMALL)),
        "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**SMALL)),
        "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**SMALL)),
        "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**SMALL)),
    }
    torch.manual_seed(3)
    model = makers[architecture]()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.1)
    return model.eval()


def saved(model: Any) -> dict[str, torch.Tensor]:
    """As `save_pretrained` writes it: tied tensors once."""
    seen: set[int] = set()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor
    return tensors


def metas_of(tensors: dict[str, Any]) -> dict[str, TensorMeta]:
    return {
        n: TensorMeta(n, tuple(t.orig_shape if isinstance(t, QuantizedWeight) else t.shape), torch.bfloat16)
        if isinstance(t, QuantizedWeight)
        else TensorMeta(n, tuple(t.shape), t.dtype)
        for n, t in tensors.items()
    }


def converted(convert: Any, architecture: str, tensors: dict[str, Any], **options: Any) -> dict[str, Value]:
    return {t.name: assemble(t, tensors.__getitem__) for t in convert(architecture, metas_of(tensors), **options)}


def in_comfyui(name: str, architecture: str) -> str:
    """transformers saves bare models without the `model.` that ComfyUI's files have."""
    bare = architecture.startswith("t5") or name.startswith(("model.", "lm_head."))
    return name if bare else f"model.{name}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip(architecture: str) -> None:
    tensors = saved(model_of(architecture))
    there = converted(transformers_to_llama_cpp, architecture, tensors, heads=HEADS)
    back = converted(llama_cpp_to_transformers, architecture, there, heads=HEADS)
    wanted = {in_comfyui(n, architecture): t for n, t in tensors.items()}
    wanted.pop("encoder.embed_tokens.weight", None)
    assert back.keys() == wanted.keys()
    for name, tensor in wanted.items():
        # Norms of gemma go through plus one in float32.
        assert torch.allclose(back[name], tensor, rtol=0, atol=1e-7 if "gemma" in architecture else 0), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_are_those_of_gguf(architecture: str) -> None:
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, 2)
    tensors = saved(model_of(architecture))
    for made in transformers_to_llama_cpp(architecture, metas_of(tensors), heads=HEADS):
        (piece,) = made.pieces
        for name in (piece.source, f"model.{piece.source}"):
            theirs = table.get_name(name, try_suffixes=(".weight", ".bias"))
            if theirs is not None:
                break
        assert made.name == theirs


def rotated_in_pairs(x: torch.Tensor, theta: float = 10000.0) -> torch.Tensor:
    """llama.cpp's rotary embedding of llama (GGML_ROPE_TYPE_NORM): neighbours are the pairs. x: (T, heads, dim)."""
    tokens, _, dim = x.shape
    angles = torch.arange(tokens)[:, None] / theta ** (torch.arange(0, dim, 2) / dim)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turn).flatten(2)


def test_llama_rows_are_right_for_rotary_pairs() -> None:
    """Attention scores of transformers, which rotates halves, equal those of pairs on the reordered rows."""
    model = model_of("llama")
    layer = model.model.layers[0].self_attn
    there = converted(transformers_to_llama_cpp, "llama", saved(model), heads=HEADS)
    x = torch.randn(5, 64)
    positions = model.model.rotary_emb(x[None], torch.arange(5)[None])
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = (p(x).reshape(1, 5, -1, 32).transpose(1, 2) for p in (layer.q_proj, layer.k_proj))
    q, k = apply_rotary_pos_emb(q, k, *positions)
    wanted = q @ k.repeat_interleave(2, 1).transpose(2, 3)
    pairs = [x @ there[f"blk.0.attn_{n}.weight"].T for n in "qk"]
    q, k = (rotated_in_pairs(p.reshape(5, -1, 32)).transpose(0, 1) for p in pairs)
    assert torch.allclose(q @ k.repeat_interleave(2, 0).transpose(1, 2), wanted[0], rtol=1e-4, atol=1e-4)


def test_gemma_norms_are_plus_one() -> None:
    model = model_of("gemma3").to(torch.bfloat16)
    tensors = saved(model)
    there = converted(transformers_to_llama_cpp, "gemma3", tensors)
    for name, source in (
        ("output_norm", "model.norm"),
        ("blk.1.attn_q_norm", "model.layers.1.self_attn.q_norm"),
        ("blk.0.post_ffw_norm", "model.layers.0.post_feedforward_layernorm"),
    ):
        made: Any = there[f"{name}.weight"]
        assert made.dtype == torch.float32
        assert torch.equal(made, tensors[f"{source}.weight"].float() + 1)


def test_reordered_rows_of_quantized_weights_dequantize_to_the_reordered_weight() -> None:
    tensors: dict[str, Any] = saved(model_of("llama"))
    spec = QuantSpec("gguf-q8-0")
    quantizer = require(spec.format_id)
    there: dict[str, Any] = converted(transformers_to_llama_cpp, "llama", tensors, heads=HEADS)
    quantized = {n: quantizer.quantize(t, spec) if t.ndim == 2 else t for n, t in there.items()}
    back: dict[str, Any] = converted(llama_cpp_to_transformers, "llama", quantized, heads=HEADS)
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"):
        assert isinstance(back[name], QuantizedWeight)
        wanted = quantizer.dequantize(quantizer.quantize(tensors[name], spec), torch.float32)
        assert torch.equal(quantizer.dequantize(back[name], torch.float32), wanted)


def test_a_norm_in_blocks_cannot_be_shifted() -> None:
    tensors: dict[str, Any] = saved(model_of("gemma2"))
    there: dict[str, Any] = converted(transformers_to_llama_cpp, "gemma2", tensors)
    norm = there["output_norm.weight"]
    quantizer = require("gguf-q8-0")
    there["output_norm.weight"] = quantizer.quantize(norm[None], QuantSpec("gguf-q8-0"))
    with pytest.raises(WeightError, match=r"'output_norm\.weight': gguf-q8-0 cannot be added to"):
        converted(llama_cpp_to_transformers, "gemma2", there)


@pytest.mark.parametrize(
    ("architecture", "prefix"),
    [
        ("qwen2vl", "model.language_model."),
        ("gemma3", "language_model.model."),
        ("t5encoder", "text_encoders.t5xxl.transformer."),
        ("llama", "text_encoders.llama.transformer.model."),
    ],
)
def test_prefixes_of_files(architecture: str, prefix: str) -> None:
    tensors = {n.removeprefix("model."): t for n, t in saved(model_of(architecture)).items()}
    plain = converted(transformers_to_llama_cpp, architecture, tensors, heads=HEADS)
    inner = {n: t for n, t in tensors.items() if not n.startswith("lm_head")}
    with_prefix = {prefix + n: t for n, t in inner.items()}
    if "visual" not in with_prefix and architecture == "qwen2vl":
        with_prefix["model.visual.blocks.0.norm1.weight"] = torch.ones(4)
    got = converted(transformers_to_llama_cpp, architecture, with_prefix, heads=HEADS)
    plain.pop("output.weight", None)
    assert got.keys() == plain.keys()
    assert all(torch.equal(got[n], plain[n]) for n in plain)


def test_full_t5_leaves_the_decoder_out() -> None:
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, feed_forward_proj="gated-gelu"))
    there = converted(transformers_to_llama_cpp, "t5", dict(model.state_dict()))
    assert not [n for n in there if n.startswith("dec.")]
    file = {**there, "dec.blk.0.attn_q.weight": torch.zeros(4, 4), "output.weight": torch.zeros(64, 64)}
    assert len(converted(llama_cpp_to_transformers, "t5", file)) == len(there)


def test_hyperparameters() -> None:
    assert hyperparameters("llama", metas_of(saved(model_of("llama"))), HEADS) == {
        "llama.block_count": 2,
        "llama.embedding_length": 64,
        "llama.vocab_size": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
    }
    t5 = hyperparameters("t5encoder", metas_of(saved(model_of("t5encoder"))))
    assert t5["t5encoder.attention.head_count"] == 4
    assert t5["t5encoder.attention.relative_buckets_count"] == 32


def test_qwen_vision_tower() -> None:
    """Names and the joined q, k and v, against a small tower of transformers."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

    config = transformers.Qwen2_5_VLConfig().vision_config
    config.depth, config.num_heads, config.intermediate_size = 2, 4, 96
    config.hidden_size = config.out_hidden_size = 64
    tower = qwen.Qwen2_5_VisionTransformerPretrainedModel(config)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 3)
    file: dict[str, torch.Tensor] = {}
    for name, tensor in tower.state_dict().items():
        if "patch_embed" in name:
            continue
        if ".qkv." in name:  # as llama.cpp's converter cuts it
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                file[table.get_name(f"visual.{name.replace('qkv', letter)}", (".weight", ".bias")) or ""] = part
        else:
            file[table.get_name(f"visual.{name}", (".weight", ".bias")) or ""] = tensor
    back = {t.name: assemble(t, file.__getitem__) for t in mmproj_to_transformers(metas_of(file))}
    wanted = {f"visual.{n}": t for n, t in tower.state_dict().items() if "patch_embed" not in n}
    assert back.keys() == wanted.keys()
    assert all(torch.equal(back[n], wanted[n]) for n in wanted)


def drop(pattern: str, tensors: dict[str, Any]) -> dict[str, Any]:
    return {n: t for n, t in tensors.items() if not re.search(pattern, n)}


def test_refusals() -> None:
    there: dict[str, Any] = converted(transformers_to_llama_cpp, "llama", saved(model_of("llama")), heads=HEADS)
    with pytest.raises(FileError, match=r"'model\.layers\.1\.self_attn\.v_proj\.weight' is missing"):
        converted(llama_cpp_to_transformers, "llama", drop(r"1\.attn_v", there), heads=HEADS)
    experts = {**there, "blk.0.ffn_gate_inp.weight": torch.zeros(8, 64)}
    with pytest.raises(FileError, match=r"'blk\.0\.ffn_gate_inp\.weight' \(8, 64\) is no tensor of this kind"):
        converted(llama_cpp_to_transformers, "llama", experts, heads=HEADS)
    with pytest.raises(FileError, match=r"64 rows are not heads 128 wide"):
        converted(llama_cpp_to_transformers, "llama", drop("attn_q", there))
    with pytest.raises(FileError, match="No text encoder of architecture 'mamba'"):
        converted(llama_cpp_to_transformers, "mamba", there)
    with pytest.raises(FileError, match="No block of a text encoder"):
        converted(llama_cpp_to_transformers, "llama", drop("blk", there), heads=HEADS)
    with pytest.raises(FileError, match=r"No 'encoder\.block\.0\.layer\.0\.layer_norm\.weight'"):
        converted(transformers_to_llama_cpp, "t5", {"a.weight": torch.zeros(2, 2)})
    with pytest.raises(FileError, match=r"'v\.class_embd' \(64,\) is no part of a Qwen2\.5-VL vision tower"):
        mmproj_to_transformers({"v.class_embd": TensorMeta("v.class_embd", (64,), torch.float32)})
