"""Text encoders from file to file: tokenizers, heads, the name of the architecture, and what is left out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.files.checkpoint import read_gguf
from quantwire.quantizers.files.convert_plan import Request, plan_conversion
from quantwire.quantizers.files.converting import convert as convert_file
from quantwire.quantizers.files.converting import describe
from quantwire.quantizers.files.gguf_header import read_gguf_header
from quantwire.quantizers.files.gguf_model import dequantized
from quantwire.quantizers.files.layouts.llama_cpp import ASSUMED_HEADS, Heads, hyperparameters
from quantwire.quantizers.files.text_encoder import open_text_encoder
from quantwire.quantizers.files.vocabulary import sentencepiece_metadata, sentencepiece_model, tekken_metadata
from safetensors.torch import load_file, save_file
from test_llama_cpp import model_of, saved
from test_text_keys import as_bytes
from text_gguf import metas_of, random_tensors, write_gguf, write_text_encoder
from torch import Tensor
from tqdm import tqdm

VOCABULARY: dict[str, list[Any]] = {
    "tokens": ["<pad>", "</s>", "<unk>", "\u2581a", "b", "<0x0A>", "c"],
    "scores": [0.0, 0.0, 0.0, -1.0, -2.0, 0.0, -3.5],
    "token_type": [3, 3, 2, 1, 1, 6, 1],
}
WORDS = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.unknown_token_id": 2}
SPIECE = sentencepiece_model(WORDS, VOCABULARY)
TEKKEN = {
    "config": {"default_vocab_size": 4, "default_num_special_tokens": 2},
    "vocab": [{"rank": 0, "token_bytes": "YQ=="}, {"rank": 1, "token_bytes": "Yg=="}],
    "special_tokens": [{"rank": 0, "token_str": "<unk>"}, {"rank": 1, "token_str": "<s>"}],
}
Q = "model.layers.0.self_attn.q_proj.weight"
K = "model.layers.1.self_attn.k_proj.weight"


def save(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path)
    return path


def convert(request: Request) -> Any:
    return convert_file(request, lambda total: tqdm(total=total, disable=True))


def run(source: Path, target: Path, kind: str = "F32", **options: Any) -> Any:
    return convert(Request(source, target, kind, overwrite=True, **options))


def gemma2() -> dict[str, Tensor]:
    sizes: dict[str, Any] = {
        "vocab_size": 7, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32,
    }  # fmt: skip
    return random_tensors(transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes)))


def umt5() -> dict[str, Tensor]:
    config = transformers.UMT5Config(
        vocab_size=7, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return random_tensors(transformers.UMT5EncoderModel(config))


def llama(heads: int = 4, kv: int = 2, width: int = 64) -> dict[str, Tensor]:
    """Llama as Llama 3.2 1B has it: heads of 64."""
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=heads * width, intermediate_size=96, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv, head_dim=width, tie_word_embeddings=True,
    )  # fmt: skip
    return random_tensors(transformers.LlamaForCausalLM(config))


def config_json(folder: Path, **changes: Any) -> None:
    said = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256} | changes
    (folder / "config.json").write_text(json.dumps(said))


# Tokenizers


@pytest.mark.parametrize("kind", ["BF16", "comfy-fp8-e4m3fn"])
@pytest.mark.parametrize(
    ("name", "data"), [("spiece_model", SPIECE), ("tokenizer_json", b"{}" * 40_001)], ids=["spiece", "json"]
)
def test_a_tokenizer_passes_through_unchanged(tmp_path: Path, kind: str, name: str, data: bytes) -> None:
    source = save(tmp_path / "gemma.safetensors", {**gemma2(), name: as_bytes(data)})
    report = run(source, tmp_path / "out.safetensors", kind)
    made = load_file(tmp_path / "out.safetensors")
    assert made[name].dtype is torch.uint8
    assert bytes(made[name].numpy()) == data
    assert f"tokenizer: {name}" in report.notes
    assert not any("integer buffers" in note for note in report.notes)
    assert torch.equal(made["model.norm.weight"].bfloat16(), gemma2()["model.norm.weight"].bfloat16())


def test_a_dry_run_knows_the_size_with_a_tokenizer(tmp_path: Path) -> None:
    source = save(tmp_path / "gemma.safetensors", {**gemma2(), "spiece_model": as_bytes(SPIECE)})
    plan = plan_conversion(Request(source, tmp_path / "out.safetensors", "F16"))
    run(source, tmp_path / "out.safetensors", "F16")
    assert (tmp_path / "out.safetensors").stat().st_size == plan.total


def test_a_checkpoint_gives_its_text_encoder_its_own_tokenizer(tmp_path: Path) -> None:
    tensors = {f"text_encoders.gemma2_2b.transformer.{n}": t for n, t in gemma2().items()}
    tensors |= {"text_encoders.gemma2_2b.spiece_model": as_bytes(SPIECE)}
    tensors |= {"text_encoders.other.spiece_model": as_bytes(b"other")}
    run(save(tmp_path / "all.safetensors", tensors), tmp_path / "out.safetensors", "F16")
    assert bytes(load_file(tmp_path / "out.safetensors")["spiece_model"].numpy()) == SPIECE


@pytest.mark.parametrize("make", [gemma2, umt5])
def test_a_sentencepiece_model_goes_to_gguf_and_back(tmp_path: Path, make: Any) -> None:
    source = save(tmp_path / "in.safetensors", {**make(), "spiece_model": as_bytes(SPIECE)})
    run(source, tmp_path / "there.gguf", "F32")
    report = run(tmp_path / "there.gguf", tmp_path / "back.safetensors", "F32")
    back = load_file(tmp_path / "back.safetensors")
    assert sentencepiece_metadata(bytes(back["spiece_model"].numpy())) == sentencepiece_metadata(SPIECE)
    assert "tokenizer: spiece_model" in report.notes
    assert not report.warnings


def test_a_tekken_json_goes_to_gguf_and_back(tmp_path: Path) -> None:
    raw = json.dumps(TEKKEN).encode()
    source = save(tmp_path / "in.safetensors", {**llama(2, 1, 128), "tekken_model": as_bytes(raw)})
    run(source, tmp_path / "there.gguf", "F32")
    run(tmp_path / "there.gguf", tmp_path / "back.safetensors", "comfy-fp8-e4m3fn")
    back = bytes(load_file(tmp_path / "back.safetensors")["tekken_model"].numpy())
    assert tekken_metadata(back) == tekken_metadata(raw)


def test_a_vocabulary_that_cannot_be_rebuilt_is_warned_of(tmp_path: Path) -> None:
    write_text_encoder(tmp_path / "gemma.gguf", "gemma2", gemma2())
    report = run(tmp_path / "gemma.gguf", tmp_path / "out.safetensors", "BF16")
    (warning,) = [w for w in report.warnings if "no tokenizer in the new file" in w]
    assert "'spiece_model'" in warning
    write_text_encoder(tmp_path / "llama.gguf", "llama", llama(2, 1, 128), heads=Heads(2, 1))
    assert not any("tokenizer" in w for w in run(tmp_path / "llama.gguf", tmp_path / "l.safetensors", "BF16").warnings)


def test_a_tokenizer_json_has_no_place_in_gguf(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", {**gemma2(), "tokenizer_json": as_bytes(b"{}")})
    assert any("'tokenizer_json' is left out" in w for w in run(source, tmp_path / "a.gguf", "Q8_0").warnings)


def test_native_files_tell_what_is_left_out(tmp_path: Path) -> None:
    extra = {"model.position_ids": torch.arange(3), "vae.decoder.conv_in.weight": torch.ones(2, 2, 1, 1)}
    tensors = {f"text.{n}": t for n, t in gemma2().items()}
    source = save(tmp_path / "in.safetensors", {**tensors, **extra})
    request = Request(source, tmp_path / "out.safetensors", "comfy-fp8-e4m3fn")
    for notes in (describe(request).data["notes"], convert(request).notes):
        assert any("1 integer buffers, such as model.position_ids" in n for n in notes)
        assert any("no part of this model, such as vae.decoder.conv_in.weight" in n for n in notes)


# Heads


def test_heads_of_64_from_gguf_and_back(tmp_path: Path) -> None:
    """What a file of llama.cpp says of its heads counts, whatever the shapes would allow."""
    tensors = llama()
    write_text_encoder(tmp_path / "in.gguf", "llama", tensors, "F32", Heads(4, 2))
    for kind in ("F32", "comfy-fp8-e4m3fn"):
        report = run(tmp_path / "in.gguf", tmp_path / f"{kind}.safetensors", kind, exclude=("*.0.self_attn.q_proj",))
        assert torch.equal(load_file(tmp_path / f"{kind}.safetensors")[Q].float(), tensors[Q])
        assert not any("heads" in w for w in report.warnings)
    config_json(tmp_path)
    run(tmp_path / "F32.safetensors", tmp_path / "out.gguf", "F32")
    first, last = (read_gguf(tmp_path / f"{n}.gguf").tensors for n in ("in", "out"))
    assert all(torch.equal(as_float(first[n]), as_float(last[n])) for n in first)


def as_values(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else dequantized(value, torch.float32)


def as_float(value: Any) -> Tensor:
    assert isinstance(value, Tensor)
    return value.float()


@pytest.mark.parametrize("where", ["file", "index", "folder", "nested"])
def test_heads_from_config_json(tmp_path: Path, where: str) -> None:
    tensors = llama()
    save(tmp_path / "model.safetensors", tensors)
    index = tmp_path / "model.safetensors.index.json"
    if where == "index":
        index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model.safetensors")}))
    config_json(tmp_path)
    if where == "nested":
        inner = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({"text_config": inner, "hidden_size": 1}))
    sources = {"index": index, "folder": tmp_path}
    target = tmp_path / "out" / "out.gguf"
    report = run(sources.get(where, tmp_path / "model.safetensors"), target)
    assert not report.warnings
    header = read_gguf_header(target)
    assert header.metadata["llama.attention.head_count"] == 4
    assert header.metadata["llama.attention.head_count_kv"] == 2
    back = open_text_encoder(target).values
    assert all(torch.equal(as_float(back[n]), tensors[n]) for n in (Q, K))


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (None, ""),
        ({"num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}, "of another model"),
        ({"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 256}, "of another model"),
        ("{", "cannot be read"),
        ([], ""),
    ],
    ids=["none", "other model", "uneven", "damaged", "no object"],
)
def test_heads_that_nothing_tells_are_warned_of(tmp_path: Path, config: Any, why: str) -> None:
    save(tmp_path / "in.safetensors", llama())
    if config is not None:
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    report = run(tmp_path / "in.safetensors", tmp_path / "out.gguf")
    (warning,) = [w for w in report.warnings if ASSUMED_HEADS in w]
    assert why in warning
    # Where rows are not reordered, it does not matter.
    assert not run(tmp_path / "in.safetensors", tmp_path / "out.safetensors").warnings


def test_heads_that_a_gguf_file_does_not_tell(tmp_path: Path) -> None:
    write_text_encoder(tmp_path / "in.gguf", "llama", llama(), "F32", Heads(4, 2))
    named = {n: as_float(t) for n, t in read_gguf(tmp_path / "in.gguf").tensors.items()}
    write_gguf(tmp_path / "bare.gguf", "llama", named, "F32")
    assert ASSUMED_HEADS in run(tmp_path / "bare.gguf", tmp_path / "a.safetensors").warnings
    assert ASSUMED_HEADS in open_text_encoder(tmp_path / "bare.gguf").notes
    write_gguf(tmp_path / "table.gguf", "llama", {**named, "rope_freqs.weight": torch.ones(32)}, "F32")
    report = run(tmp_path / "table.gguf", tmp_path / "b.safetensors")
    assert not report.warnings
    assert torch.equal(load_file(tmp_path / "b.safetensors")[Q], llama()[Q])


def test_shapes_that_only_models_with_heads_of_128_have(tmp_path: Path) -> None:
    """Mistral and Llama 3 8B need no config.json."""
    tensors = {n: t.bfloat16() for n, t in llama(32, 8, 128).items() if ".0." in n or "layers" not in n}
    source = save(tmp_path / "in.safetensors", tensors)
    plan = plan_conversion(Request(source, tmp_path / "out.gguf", "BF16"))
    assert not plan.warnings
    assert {p.heads for c in plan.choices for p in c.target.pieces} == {0, 32, 8}


# Names of architectures


@pytest.mark.parametrize("declared", ["qwen3vl", "qwen2", "qwen3", "mistral3", "t5"])
def test_gguf_to_gguf_keeps_the_architecture_and_its_keys(tmp_path: Path, declared: str) -> None:
    keys = {f"{declared}.context_length": 512, f"{declared}.rope.scaling": "none"}
    write_text_encoder(tmp_path / "in.gguf", declared, saved(model_of(declared)), "F16", Heads(4, 2), keys)
    report = run(tmp_path / "in.gguf", tmp_path / "out.gguf", "Q8_0")
    before, after = (read_gguf_header(tmp_path / f"{n}.gguf").metadata for n in ("in", "out"))
    assert after["general.architecture"] == declared
    assert {k: v for k, v in before.items() if k.startswith(f"{declared}.")}.items() <= after.items()
    assert report.family == declared


def test_an_architecture_that_is_asked_for_renames_its_keys(tmp_path: Path) -> None:
    keys = {"qwen3.context_length": 512}
    write_text_encoder(tmp_path / "in.gguf", "qwen3", saved(model_of("qwen3")), "F16", keys=keys)
    run(tmp_path / "in.gguf", tmp_path / "out.gguf", "F16", architecture="qwen3vl")
    after = read_gguf_header(tmp_path / "out.gguf").metadata
    assert after["general.architecture"] == "qwen3vl"
    assert after["qwen3vl.context_length"] == 512
    assert not [k for k in after if k.startswith("qwen3.")]
    with pytest.raises(FileError, match="is no tensor of this kind of text encoder"):
        run(tmp_path / "in.gguf", tmp_path / "b.gguf", "F16", architecture="gemma2")


def test_an_unknown_name_in_the_file_gives_way_to_what_the_tensors_say(tmp_path: Path) -> None:
    write_text_encoder(tmp_path / "in.gguf", "llama", llama(2, 1, 128), "F16", Heads(2, 1))
    raw = (tmp_path / "in.gguf").read_bytes().replace(b"llama", b"piggy")
    (tmp_path / "in.gguf").write_bytes(raw)
    run(tmp_path / "in.gguf", tmp_path / "out.gguf", "F16")
    after = read_gguf_header(tmp_path / "out.gguf").metadata
    assert after["general.architecture"] == "llama"
    assert after["llama.attention.head_count"] == 2
    assert not [k for k in after if k.startswith("piggy")]


# Vision parts


@pytest.mark.parametrize("vision", ["visual.blocks.0.norm1.weight", "model.visual.merger.ln_q.weight"])
def test_a_vision_part_that_is_left_out_is_a_warning(tmp_path: Path, vision: str) -> None:
    tensors = {f"model.{n}": t for n, t in saved(model_of("qwen2vl")).items()}
    source = save(tmp_path / "in.safetensors", {**tensors, vision: torch.ones(8)})
    report = run(source, tmp_path / "out.gguf", "F16")
    (warning,) = report.warnings
    assert re.search(rf"vision part \(1 tensors, such as {re.escape(vision)}\).*image prompts.*mmproj", warning)
    assert not any("no part of this model" in n for n in report.notes)
    run(source, tmp_path / "out.safetensors", "F16")
    assert vision in load_file(tmp_path / "out.safetensors")


@pytest.mark.parametrize("name", ["vision_tower.a.weight", "multi_modal_projector.mm.weight", "vision_model.b.weight"])
def test_other_vision_parts(tmp_path: Path, name: str) -> None:
    tensors = {**{f"language_model.{n}": t for n, t in gemma2().items()}, name: torch.ones(4, 4)}
    report = run(save(tmp_path / "in.safetensors", tensors), tmp_path / "out.gguf", "F16")
    assert any("image prompts will not work" in w for w in report.warnings)


def test_gguf_files_have_no_vision_part_to_convert(tmp_path: Path) -> None:
    write_text_encoder(tmp_path / "in.gguf", "qwen2vl", saved(model_of("qwen2vl")), "F16")
    assert any("mmproj" in w for w in run(tmp_path / "in.gguf", tmp_path / "out.safetensors", "F16").warnings)
    assert not run(tmp_path / "in.gguf", tmp_path / "out.gguf", "F16").warnings


# What is missing


def test_an_embedding_under_its_second_name(tmp_path: Path) -> None:
    tensors = saved(model_of("t5encoder"))
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    source = save(tmp_path / "in.safetensors", tensors)
    run(source, tmp_path / "out.gguf", "F32")
    back = open_text_encoder(tmp_path / "out.gguf").values
    assert torch.equal(as_float(back["shared.weight"]), tensors["encoder.embed_tokens.weight"])
    del tensors["encoder.embed_tokens.weight"]
    with pytest.raises(FileError, match=r"'token_embd\.weight' is missing"):
        run(save(tmp_path / "in.safetensors", tensors), tmp_path / "none.gguf", "F32")
    with pytest.raises(FileError, match=r"'shared\.weight' is missing"):
        hyperparameters("t5encoder", metas_of(tensors))


@pytest.mark.parametrize("architecture", ["t5encoder", "llama", "qwen2vl", "qwen3", "gemma3"])
@pytest.mark.parametrize("module", ["token_embd", "output_norm"])
def test_what_stands_outside_the_blocks_must_be_there(tmp_path: Path, architecture: str, module: str) -> None:
    """But for the last norm of what ComfyUI runs without it."""
    whole, path = tmp_path / "whole.gguf", tmp_path / "in.gguf"
    write_text_encoder(whole, architecture, saved(model_of(architecture)), "F16", Heads(4, 2))
    tensors = {n: t for n, t in read_gguf(whole).tensors.items() if module not in n}
    counts = {"llama.attention.head_count": 4, "llama.attention.head_count_kv": 2}
    write_gguf(path, architecture, {n: as_values(t) for n, t in tensors.items()}, "F16", counts)
    if module == "output_norm" and architecture in ("llama", "qwen3"):
        run(path, tmp_path / "out.safetensors")
        return
    with pytest.raises(FileError):
        run(path, tmp_path / "out.safetensors")
    with pytest.raises(FileError, match=r"weight' is missing|which is not known|expected"):
        open_text_encoder(path)
