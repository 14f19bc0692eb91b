"""Text encoders through the converter: sizes and tokenizers arrive in the GGUF file, and come back out of it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from quantwire.quantizers.files.convert import run_conversion
from quantwire.quantizers.files.convert_plan import Request, plan_conversion
from quantwire.quantizers.files.text_encoder import open_text_encoder
from quantwire.quantizers.files.vocabulary import sentencepiece_metadata, sentencepiece_model, tekken_json
from quantwire.quantizers.weight import QuantizedWeight
from safetensors.torch import save_file
from text_gguf import random_tensors
from torch import Tensor


def convert(folder: Path, tensors: dict[str, Tensor]) -> Any:
    save_file(tensors, folder / "in.safetensors")
    run_conversion(plan_conversion(Request(folder / "in.safetensors", folder / "out.gguf", "Q8_0")))
    return open_text_encoder(folder / "out.gguf")


def as_bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def test_gemma2_with_its_sentencepiece_model(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 8, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32,
    }  # fmt: skip
    tensors = random_tensors(transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes)))
    vocabulary = {
        "tokens": ["<pad>", "<eos>", "<bos>", "<unk>", "\u2581a", "b", "<0x0A>", "c"],
        "scores": [0.0, 0.0, 0.0, 0.0, -1.0, -2.0, 0.0, -3.5],
        "token_type": [3, 3, 3, 2, 1, 1, 6, 1],
        "precompiled_charsmap": [0, 200, 7],
    }
    keys = {"model": "llama", "add_space_prefix": False, "remove_extra_whitespaces": False, "bos_token_id": 2}
    model = sentencepiece_model({f"tokenizer.ggml.{k}": v for k, v in keys.items()}, vocabulary)
    file = convert(tmp_path, {**tensors, "spiece_model": as_bytes(model)})
    assert file.architecture == "gemma2"
    assert sentencepiece_metadata(file.vocabulary("spiece_model")) == sentencepiece_metadata(model)
    assert file.header.metadata["gemma2.block_count"] == 2
    assert file.header.metadata["gemma2.embedding_length"] == 64
    assert file.header.metadata["tokenizer.ggml.add_space_prefix"] is False
    for name, tensor in tensors.items():
        if tensor.ndim < 2:
            assert torch.allclose(file.values[name], tensor, rtol=0, atol=1e-6), name
    assert gguf.GGUFReader(tmp_path / "out.gguf").fields["tokenizer.ggml.tokens"].contents()[4] == "\u2581a"


def test_mistral_with_its_tekken_json(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128,
    }  # fmt: skip
    model = transformers.MistralModel(transformers.MistralConfig(**sizes))
    tensors = {f"model.{n}": v for n, v in random_tensors(model).items()}
    words = [*(bytes([b]) for b in range(256)), "\u00e9".encode()]
    tekken = {
        "config": {"default_vocab_size": 260, "default_num_special_tokens": 3},
        "vocab": [{"rank": i, "token_bytes": base64.b64encode(w).decode()} for i, w in enumerate(words)],
        "special_tokens": [{"rank": 0, "token_str": "<unk>"}, {"rank": 1, "token_str": "<s>"}],
    }
    file = convert(tmp_path, {**tensors, "tekken_model": as_bytes(json.dumps(tekken).encode())})
    assert file.architecture == "llama"
    made = json.loads(file.vocabulary("tekken_model"))
    assert made["config"] == tekken["config"]
    assert made["vocab"] == tekken["vocab"]
    assert [token["token_str"] for token in made["special_tokens"]] == ["<unk>", "<s>", "<SPECIAL_2>"]
    assert file.header.metadata["llama.attention.head_count_kv"] == 1
    q: Any = file.values["model.layers.0.self_attn.q_proj.weight"]
    assert isinstance(q, QuantizedWeight)
    from quantwire.quantizers.registry import require

    got = require(q.format_id).dequantize(q, torch.float32)
    wanted = tensors["model.layers.0.self_attn.q_proj.weight"]
    assert float((got - wanted).norm() / wanted.norm()) < 0.01
    assert json.loads(tekken_json(file.header.metadata, {"tokens": ["<s>", "a"], "token_type": [3, 1]}))
