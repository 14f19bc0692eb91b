"""LoadGGUFTextEncoder in the embedded host, and what it refuses."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from quantwire.hosts.standalone.executor import Executor
from quantwire.hosts.standalone.gguf_text import unigram_tokenizer
from quantwire.hosts.standalone.validate import InvalidWorkflow
from quantwire.nodes.load_text import LoadGGUFTextEncoder
from quantwire.quantizers.errors import FileError, SpecError
from quantwire.quantizers.files.text_encoder import find_mmproj, open_text_encoder
from quantwire.quantizers.files.vocabulary import byte_letters, sentencepiece_metadata, sentencepiece_model, tekken_json
from quantwire.quantizers.weight import QuantizedLinear
from safetensors.torch import save_file
from text_gguf import metas_of, random_tensors, write_gguf, write_text_encoder
from torch import Tensor

T5: dict[str, Any] = {
    "vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
# A SentencePiece unigram vocabulary as T5's: specials, words with a leading space, letters.
WORDS = ["<pad>", "</s>", "<unk>", "\u2581", "\u2581seven", "\u2581a", "se", "ven", *"abcdefghijklmnopqrstuvwxyz"]
SCORES = [0.0, 0.0, 0.0, -3.0, -2.0, -1.5, -4.0, -4.5, *(-9.0 - i / 10 for i in range(26))]
TYPES = [3, 3, 2, *[1] * (len(WORDS) - 3)]
VOCABULARY: dict[str, Any] = {
    "tokenizer.ggml.model": "t5",
    "tokenizer.ggml.tokens": WORDS,
    "tokenizer.ggml.scores": SCORES,
    "tokenizer.ggml.token_type": TYPES,
    "tokenizer.ggml.add_space_prefix": True,
    "tokenizer.ggml.remove_extra_whitespaces": True,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.padding_token_id": 0,
}


def t5_model() -> tuple[Any, dict[str, Tensor]]:
    model = transformers.T5EncoderModel(transformers.T5Config(**T5)).eval()
    tensors = random_tensors(model)
    model.load_state_dict({**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"]})
    return model, tensors


@pytest.fixture
def folder(host: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "text_encoders"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def t5(folder: Path) -> Any:
    model, tensors = t5_model()
    write_text_encoder(folder / "t5.gguf", "t5encoder", tensors, keys=VOCABULARY)
    return model


def loaded(executor: Executor, make_node: Any, **inputs: Any) -> tuple[Any, Any]:
    graph = {"g": make_node("LoadGGUFTextEncoder", **inputs)}
    graph |= {name: make_node("Keep", value=["g", i]) for i, name in enumerate(("clip", "report"))}
    result = executor.run(graph).results
    return result["clip"][0], result["report"][0]


def failure(executor: Executor, make_node: Any, **inputs: Any) -> str:
    with pytest.raises(FileError) as caught:
        loaded(executor, make_node, **inputs)
    return str(caught.value)


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def test_t5_beside_the_demo_clip(executor: Executor, make_node: Any, t5: Any) -> None:
    names = {"clip_name1": "t5.gguf", "clip_name2": "digits_clip.safetensors"}
    clip, report = loaded(executor, make_node, **names, type="flux")
    module = clip.encoders["t5xxl"].module
    layers = [m for n, m in module.named_modules() if n.endswith(("SelfAttention.q", "wi_0", "wo"))]
    assert {type(m) for m in layers} == {QuantizedLinear}
    ids = clip.encoders["t5xxl"].tokens("a seven")
    assert ids[0, :3].tolist() == [5, 4, 1]
    context, pooled = clip.encode("a seven")
    assert relative(context, t5(input_ids=ids).last_hidden_state) < 0.02  # Q8_0
    assert pooled.shape[0] == 1
    done = [e for e in report.entries if e.action == "quantize"]
    assert len(done) == 14
    assert {e.format_id for e in done} == {"gguf-q8-0"}
    assert [e.name for e in report.entries if e.action == "dequantize"] == ["t5.shared.weight"]
    assert "t5.gguf: architecture t5encoder" in str(report)


def test_t5_without_blocks_computes_in_the_type_of_its_matrices(
    executor: Executor, make_node: Any, folder: Path
) -> None:
    model, tensors = t5_model()
    write_text_encoder(folder / "t5.gguf", "t5encoder", tensors, "BF16", keys=VOCABULARY)
    names = {"clip_name1": "t5.gguf", "clip_name2": "digits_clip.safetensors"}
    clip, report = loaded(executor, make_node, **names, type="flux")
    assert report.format_id == "plain tensors only"
    context, _ = clip.encode("a seven")
    wanted = model(input_ids=clip.encoders["t5xxl"].tokens("a seven")).last_hidden_state
    assert relative(context, wanted) < 0.03


def test_library_layers_are_refused_in_t5(executor: Executor, make_node: Any, t5: Any) -> None:
    with pytest.raises(SpecError, match=r"t5\.gguf: diffusers' GGUF layers do not run in a T5"):
        loaded(executor, make_node, clip_name1="t5.gguf", type="stable_diffusion", carrier="library")


def test_one_clip_file(executor: Executor, make_node: Any, folder: Path) -> None:
    clip, report = loaded(executor, make_node, clip_name1="digits_clip.safetensors", type="stable_diffusion")
    assert list(clip.encoders) == ["clip_l"]
    assert report.format_id == "plain tensors only"


@pytest.mark.parametrize("carrier", ["quantwire", "library"])
def test_clip_in_gguf_under_its_own_names(
    executor: Executor, make_node: Any, folder: Path, demo_models: Path, carrier: str
) -> None:
    """Some programs write CLIP into GGUF files as it is; llama.cpp has no architecture for it."""
    from safetensors import safe_open

    source = demo_models / "text_encoders" / "digits_clip.safetensors"
    with safe_open(str(source), "pt") as file:
        tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 - no dict: it has no iterator
        tokenizer = file.metadata()["tokenizer_json"]
        keys = {"config": file.metadata()["config"], "pad_to": file.metadata().get("pad_to", "77")}
    write_gguf(folder / "clip.gguf", "pig", tensors, keys=keys)
    (folder / "clip.tokenizer.json").write_text(tokenizer, encoding="utf-8")
    names = {"clip_name1": "clip.gguf", "type": "stable_diffusion", "carrier": carrier}
    clip, report = loaded(executor, make_node, **names)
    plain, _ = loaded(executor, make_node, clip_name1="digits_clip.safetensors", type="stable_diffusion")
    got, wanted = clip.encode("a handwritten seven"), plain.encode("a handwritten seven")
    assert relative(got[0], wanted[0]) < 0.03
    assert relative(got[1], wanted[1]) < 0.03
    assert "gguf-q8-0" in report.format_id


@pytest.mark.parametrize(
    ("names", "kind", "message"),
    [
        (["t5.gguf"], "flux", r"Type flux takes two files, got 1 \(t5\.gguf\)\. For one file: stable_diffusion\."),
        (["t5.gguf", "t5.gguf"], "flux", "A file is given twice"),
        (["t5.gguf", "digits_clip.safetensors"], "stable_diffusion", "takes one file, got 2 .* For two files: flux"),
        (["other.gguf"], "stable_diffusion", "'other.gguf' is not in"),
    ],
)
def test_count_and_type(executor: Executor, make_node: Any, t5: Any, names: list[str], kind: str, message: str) -> None:
    inputs = {f"clip_name{i}": name for i, name in enumerate(names, 1)}
    with pytest.raises(InvalidWorkflow, match=message):
        loaded(executor, make_node, **inputs, type=kind)
    assert re.search(message, str(LoadGGUFTextEncoder.VALIDATE_INPUTS(type=kind, **inputs)))


def test_other_files_are_refused_with_the_loader_that_fits(
    executor: Executor, make_node: Any, folder: Path, demo_models: Path
) -> None:
    flux = demo_models / "diffusion_models" / "digits_flux.safetensors"
    shutil.copy(flux, folder / "flux.safetensors")
    one = torch.ones(32, 32)
    write_gguf(folder / "flux.gguf", "flux", {f"double_blocks.0.img_attn.{n}.weight": one for n in ("qkv", "proj")})
    whole = ("model.diffusion_model.a.weight", "cond_stage_model.b.weight", "first_stage_model.c.weight")
    write_gguf(folder / "whole.gguf", "sd1", dict.fromkeys(whole, one))
    save_file({n: one.clone() for n in whole}, folder / "whole.safetensors")
    write_gguf(folder / "mmproj.gguf", "clip", {"v.blk.0.ln1.weight": one[0], "mm.0.weight": one})
    write_gguf(folder / "mamba.gguf", "mamba", {"token_embd.weight": one, "blk.0.ssm_a.weight": one})
    _, tensors = t5_model()
    write_text_encoder(folder / "umt5.gguf", "t5encoder", umt5(tensors), keys=VOCABULARY)
    write_text_encoder(folder / "bare.gguf", "t5encoder", tensors)

    def said(name: str) -> str:
        return failure(executor, make_node, clip_name1=name, type="stable_diffusion")

    assert re.search(
        r"flux\.safetensors: holds a diffusion model \(flux\).*\nOpen it with UNETLoader", said("flux.safetensors")
    )
    for name in ("whole.gguf", "whole.safetensors"):
        assert re.search(r"holds a whole checkpoint.*\n.*each part needs a loader of its own", said(name))
    assert re.search(r"holds the vision part \(mmproj\).*\nChoose the text encoder", said("mmproj.gguf"))
    assert re.search(r"architecture 'mamba', which is not known here.*\nKnown are t5, ", said("mamba.gguf"))
    assert "a umT5 text encoder" in said("umt5.gguf")
    assert re.search(r"bare\.gguf: no tokenizer.*\nPut the model's tokenizer\.json", said("bare.gguf"))


def umt5(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As umT5 has it: a table of positions in every block."""
    name = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    return {**tensors, name.format(1): tensors[name.format(0)]}


def qwen(folder: Path, width: int = 64) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": width, "intermediate_size": 96, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    model = transformers.Qwen2VLTextModel(transformers.Qwen2VLTextConfig(**sizes))
    write_text_encoder(folder / "Qwen2.5-VL-Tiny-Q4_K_M.gguf", "qwen2vl", random_tensors(model))


def mmproj(path: Path, width: int = 64, kind: str = "Q8_0") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {
        "v.patch_embd.weight": (32, 3, 14, 14), "v.patch_embd.weight.1": (32, 3, 14, 14), "v.post_ln.weight": (32,),
        "mm.0.weight": (128, 128), "mm.0.bias": (128,), "mm.2.weight": (width, 128), "mm.2.bias": (width,),
    }  # fmt: skip
    block: dict[str, tuple[int, ...]] = {f"attn_{n}.weight": (32, 32) for n in ("q", "k", "v", "out")}
    block |= {f"attn_{n}.bias": (32,) for n in ("q", "k", "v", "out")} | {"ln1.weight": (32,), "ln2.weight": (32,)}
    block |= {"ffn_gate.weight": (64, 32), "ffn_up.weight": (64, 32), "ffn_down.weight": (32, 64)}
    shapes |= {f"v.blk.0.{n}": shape for n, shape in block.items()}
    tensors = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    write_gguf(path, "clip", tensors, kind, {"clip.projector_type": "qwen2.5vl_merger", "general.type": "mmproj"})
    return tensors


def test_mmproj_is_found_by_what_is_in_it(tmp_path: Path) -> None:
    qwen(tmp_path)
    path = tmp_path / "Qwen2.5-VL-Tiny-Q4_K_M.gguf"
    assert "no vision part (mmproj) beside it" in open_text_encoder(path).notes[0]
    mmproj(tmp_path / "mmproj-big.gguf", width=96)
    assert (
        "mmproj-big.gguf does not fit: made for a text encoder of width 96, not 64" in open_text_encoder(path).notes[0]
    )
    tensors = mmproj(tmp_path / "some vision.gguf")  # a name that says nothing
    file = open_text_encoder(path)
    assert file.mmproj == tmp_path / "some vision.gguf"
    assert file.notes == ("vision part: some vision.gguf, found beside it",)
    patch: Any = file.values["visual.patch_embed.proj.weight"]
    wanted = torch.stack([tensors["v.patch_embd.weight"], tensors["v.patch_embd.weight.1"]], dim=2)
    assert torch.equal(patch, wanted)
    assert file.values["visual.blocks.0.attn.qkv.weight"].orig_shape == (96, 32)


def test_of_several_mmproj_the_closest_name_and_finest_values_win(tmp_path: Path) -> None:
    qwen(tmp_path)
    path = tmp_path / "Qwen2.5-VL-Tiny-Q4_K_M.gguf"
    for name in ("mmproj-Other-Model-f16", "Qwen2.5-VL-Tiny-mmproj-Q8_0", "Qwen2.5-VL-Tiny-mmproj-F16"):
        mmproj(tmp_path / f"{name}.gguf")
    found, note = find_mmproj(path, 64)
    assert found == tmp_path / "Qwen2.5-VL-Tiny-mmproj-F16.gguf"
    assert "mmproj-Other-Model-f16.gguf" in note
    assert "would fit too" in note


def test_ggufs_of_other_encoders_are_for_comfyui(executor: Executor, make_node: Any, folder: Path) -> None:
    qwen(folder)
    said = failure(executor, make_node, clip_name1="Qwen2.5-VL-Tiny-Q4_K_M.gguf", type="stable_diffusion")
    assert "architecture 'qwen2vl'; the embedded host runs T5 and CLIP-L.\nRun the graph in ComfyUI" in said


def test_vocabulary_round_trip() -> None:
    metadata = {k: v for k, v in VOCABULARY.items() if not isinstance(v, list)}
    arrays = {k.removeprefix("tokenizer.ggml."): v for k, v in VOCABULARY.items() if isinstance(v, list)}
    arrays["precompiled_charsmap"] = [1, 250, 3]
    back = sentencepiece_metadata(sentencepiece_model(metadata, arrays))
    assert back.pop("tokenizer.ggml.scores") == pytest.approx(SCORES)
    assert back.pop("tokenizer.ggml.precompiled_charsmap") == [1, 250, 3]
    assert back.pop("tokenizer.ggml.unknown_token_id") == 2
    back.pop("tokenizer.ggml.bos_token_id", None)  # SentencePiece's default id, which this vocabulary does not use
    assert back == {k: v for k, v in VOCABULARY.items() if k != "tokenizer.ggml.scores"}
    with pytest.raises(FileError, match="not a SentencePiece model"):
        sentencepiece_metadata(b"\x0a\xff\xff\xff\x0f")


def test_tekken() -> None:
    letters = byte_letters()
    tokens = ["<unk>", "<s>", "[INST]", *(letters[b] for b in range(256)), letters[0xC3] + letters[0xA9]]
    keys = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "tekken"}
    import base64
    import json

    made = json.loads(tekken_json(keys, {"tokens": tokens, "token_type": [3, 3, 3, *[1] * 257]}))
    assert made["config"] == {"default_vocab_size": 260, "default_num_special_tokens": 3}
    assert [base64.b64decode(w["token_bytes"]) for w in made["vocab"]] == [
        *(bytes([b]) for b in range(256)),
        b"\xc3\xa9",
    ]
    with pytest.raises(FileError, match="do not stand before all others"):
        tekken_json(keys, {"tokens": tokens, "token_type": [1, *[3] * 259]})


def test_unigram_tokenizer() -> None:
    tokenizer = unigram_tokenizer(WORDS, SCORES, TYPES)
    pieces = {text: tokenizer.encode(text).tokens for text in ("seven", "  a   seven ", "sevens")}
    assert pieces["seven"] == ["\u2581seven"]
    assert pieces["  a   seven "] == ["\u2581a", "\u2581seven"]
    assert pieces["sevens"] == ["\u2581seven", "s"]


def test_metas_are_those_of_the_file(folder: Path, t5: Any) -> None:
    file = open_text_encoder(folder / "t5.gguf")
    wanted = metas_of(t5.state_dict())
    for name, value in file.values.items():
        shape = value.shape if isinstance(value, Tensor) else value.orig_shape
        assert tuple(shape) == wanted[name].shape


def test_files_that_appear_beside_a_text_encoder_are_looked_at(folder: Path) -> None:
    """Who is told that the vision part is missing adds it and queues the same graph again."""
    for name in ("a.safetensors", "b-00001-of-00002.gguf", "b-00002-of-00002.gguf"):
        (folder / name).write_bytes(b"1")

    def states() -> list[str]:
        names = ("a.safetensors", "b-00001-of-00002.gguf")
        return [LoadGGUFTextEncoder.IS_CHANGED(clip_name1=name, type="flux") for name in names]

    before = states()
    assert states() == before
    (folder / "mmproj.gguf").write_bytes(b"1")
    found = states()
    assert (found[0], found[1] != before[1]) == (before[0], True)
    (folder / "mmproj.gguf").write_bytes(b"22")
    assert states()[1] not in (before[1], found[1])
    (folder / "mmproj.gguf").unlink()
    assert states() == before
    (folder / "b-00002-of-00002.gguf").write_bytes(b"22")
    assert states()[1] != before[1]
