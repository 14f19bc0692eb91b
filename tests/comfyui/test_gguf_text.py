"""LoadGGUFTextEncoder in the real ComfyUI against its own loaders on the same weights, dequantized to float32.

One to four files, GGUF and safetensors mixed. The encoders have random weights; all but CLIP-L are made at small sizes,
by `probe_pack/small.py`, and each is recognised by the host as the published one.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from graphs import Graph, node
from quantwire.quantizers.files.layouts.llama_cpp import Heads
from quantwire.quantizers.files.vocabulary import byte_letters, sentencepiece_metadata
from safetensors.torch import load_file, save_file
from text_gguf import random_tensors, write_gguf, write_text_encoder
from torch import Tensor

SIZES = json.loads((Path(__file__).parent / "probe_pack" / "small.json").read_text())
CONFIGS, FILES = SIZES["configs"], SIZES["files"]
QWEN = CONFIGS["Qwen25_7BVLI_Config"]
PROMPT = "a red car"
MODES = ("default", "partial", "novram")
LOADERS = {1: "CLIPLoader", 2: "DualCLIPLoader", 3: "TripleCLIPLoader", 4: "QuadrupleCLIPLoader"}
ERROR = 1e-3  # embeddings and norms are float16 here, float32 there; measured 3e-4 and less


def on_meta(cls: Any, config: Any) -> Any:
    with torch.device("meta"):
        return cls(config)


def t5_base(folder: Path) -> None:
    sizes = FILES["t5_config_base.json"] | {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_heads": 12}
    both(folder, "t5_base", "t5encoder", on_meta(t.T5EncoderModel, t.T5Config(**sizes, feed_forward_proj="relu")))


def t5_xxl(folder: Path) -> None:
    config = t.T5Config(**FILES["t5_config_xxl.json"], num_layers=24, feed_forward_proj="gated-gelu")
    both(folder, "t5_xxl", "t5encoder", on_meta(t.T5EncoderModel, config))


def umt5(folder: Path) -> None:
    """d_ff at its real size, by which the host recognises it."""
    sizes = FILES["umt5_config_xxl.json"] | {"d_ff": 10240, "num_layers": 24, "feed_forward_proj": "gated-gelu"}
    vocabulary = train(folder, ["--model_type=unigram", "--pad_id=0", "--eos_id=1", "--unk_id=2", "--bos_id=-1"])
    both(folder, "umt5", "t5encoder", on_meta(t.UMT5EncoderModel, t.UMT5Config(**sizes)), vocabulary=vocabulary)


def gemma2(folder: Path) -> None:
    options = ["--model_type=bpe", "--byte_fallback=true", "--normalization_rule_name=identity", "--pad_id=0"]
    options += ["--eos_id=1", "--bos_id=2", "--unk_id=3", "--bos_piece=<bos>", "--eos_piece=<eos>"]
    vocabulary = train(folder, [*options, "--add_dummy_prefix=false", "--remove_extra_whitespaces=false"])
    config = t.Gemma2Config(**CONFIGS["Gemma2_2B_Config"], head_dim=256)
    both(folder, "gemma2", "gemma2", on_meta(t.Gemma2ForCausalLM, config), vocabulary=vocabulary)


def llama(folder: Path) -> None:
    """In the safetensors file with the unused rows that HunyuanVideo's has; llama.cpp cuts those off."""
    config = t.LlamaConfig(**CONFIGS["Llama2Config"], head_dim=128, vocab_size=128256)
    model = on_meta(t.LlamaModel, config)
    tensors = rounded({f"model.{n}": v for n, v in random_tensors(model).items()})
    write_text_encoder(folder / "llama.gguf", "llama", tensors, heads=Heads(4, 2))
    save_file(tensors, folder / "llama.safetensors")
    table = tensors["model.embed_tokens.weight"]
    padded = torch.cat([table, table.new_zeros(64, table.shape[1])])
    save_file({**tensors, "model.embed_tokens.weight": padded}, folder / "llama_padded.safetensors")


def mistral(folder: Path) -> None:
    """Ministral 3, whose tokenizer the host wants as a tekken.json: three special tokens and the single bytes."""
    config = t.MistralConfig(**CONFIGS["Ministral3_3BConfig"], head_dim=128)
    tensors = rounded({f"model.{n}": v for n, v in random_tensors(on_meta(t.MistralModel, config)).items()})
    letters = byte_letters()
    tokens = ["<unk>", "<s>", "[INST]", *(letters[byte] for byte in range(256))]
    keys: dict[str, Any] = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "tekken"}
    keys |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [3] * 3 + [1] * 256}
    write_text_encoder(folder / "mistral.gguf", "mistral3", tensors, heads=Heads(2, 1), keys=keys)
    ranks = [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode()} for i in range(256)]
    sizes = {"default_vocab_size": 259, "default_num_special_tokens": 3}
    special = [{"rank": i, "token_str": token} for i, token in enumerate(tokens[:3])]
    tekken = json.dumps({"config": sizes, "vocab": ranks, "special_tokens": special}).encode()
    save_file({**tensors, "tekken_model": as_bytes(tekken)}, folder / "mistral.safetensors")


def clip_g(folder: Path) -> None:
    config = t.CLIPTextConfig(**FILES["clip_config_bigg.json"], vocab_size=49408, num_hidden_layers=32)
    model = on_meta(t.CLIPTextModelWithProjection, config)
    tensors = {n.removeprefix("text_model."): v for n, v in rounded(random_tensors(model)).items()}
    named = {n if n.startswith("text_projection") else f"text_model.{n}": v for n, v in tensors.items()}
    save_file(named, folder / "clip_g.safetensors")
    write_gguf(folder / "clip_g.gguf", "pig", named)


def qwen2vl(folder: Path) -> None:
    """Text and vision in one safetensors file, in two GGUF files."""
    config = t.Qwen2Config(**QWEN, head_dim=128, vocab_size=152064)
    text = rounded({f"model.{n}": v for n, v in random_tensors(on_meta(t.Qwen2Model, config)).items()})
    vision = vision_tensors()
    write_text_encoder(folder / "qwen" / "tiny-qwen-Q8_0.gguf", "qwen2vl", text)
    write_gguf(folder / "qwen" / "vision of qwen.gguf", "clip", vision, "F16", {"general.type": "mmproj"})
    write_text_encoder(folder / "qwen alone" / "tiny.gguf", "qwen2vl", text)
    save_file({**text, **comfyui_vision(vision)}, folder / "qwen.safetensors")


def vision_tensors() -> dict[str, Tensor]:
    """As llama.cpp's converter makes them of Qwen2.5-VL."""
    wide, inner, out = SIZES["vision"]["hidden_size"], SIZES["vision"]["intermediate_size"], QWEN["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "v.patch_embd.weight": (wide, 3, 14, 14), "v.patch_embd.weight.1": (wide, 3, 14, 14),
        "v.post_ln.weight": (wide,), "mm.0.weight": (4 * wide, 4 * wide), "mm.0.bias": (4 * wide,),
        "mm.2.weight": (out, 4 * wide), "mm.2.bias": (out,),
    }  # fmt: skip
    for i in range(SIZES["vision"]["num_layers"]):
        block: dict[str, tuple[int, ...]] = {f"attn_{n}.weight": (wide, wide) for n in ("q", "k", "v", "out")}
        block |= {f"attn_{n}.bias": (wide,) for n in ("q", "k", "v", "out")} | {"ln1.weight": (wide,)}
        block |= {"ln2.weight": (wide,), "ffn_gate.weight": (inner, wide), "ffn_up.weight": (inner, wide)}
        block |= {"ffn_down.weight": (wide, inner), "ffn_gate.bias": (inner,), "ffn_up.bias": (inner,)}
        shapes |= {f"v.blk.{i}.{n}": shape for n, shape in block.items()} | {f"v.blk.{i}.ffn_down.bias": (wide,)}
    generator = torch.Generator().manual_seed(4)
    return {n: torch.randn(s, generator=generator) * (0.05 if len(s) > 1 else 0.2) for n, s in shapes.items()}


def comfyui_vision(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under the names of the host, written out here rather than made by what is tested."""
    made = {
        "visual.patch_embed.proj.weight": torch.stack([tensors[f"v.patch_embd.weight{n}"] for n in ("", ".1")], dim=2),
        "visual.merger.ln_q.weight": tensors["v.post_ln.weight"],
        **{f"visual.merger.mlp.{n}": tensors[f"mm.{n}"] for n in ("0.weight", "0.bias", "2.weight", "2.bias")},
    }
    for i in range(SIZES["vision"]["num_layers"]):
        here, there = f"v.blk.{i}", f"visual.blocks.{i}"
        for leaf in ("weight", "bias"):
            made[f"{there}.attn.qkv.{leaf}"] = torch.cat([tensors[f"{here}.attn_{n}.{leaf}"] for n in "qkv"])
            made[f"{there}.attn.proj.{leaf}"] = tensors[f"{here}.attn_out.{leaf}"]
            made |= {f"{there}.mlp.{n}_proj.{leaf}": tensors[f"{here}.ffn_{n}.{leaf}"] for n in ("gate", "up", "down")}
        made |= {f"{there}.norm{n}.weight": tensors[f"{here}.ln{n}.weight"] for n in (1, 2)}
    return made


def train(folder: Path, options: list[str]) -> bytes:
    """A SentencePiece model of the README, trained by the package that ComfyUI brings."""
    code = "import sys, sentencepiece; sentencepiece.SentencePieceTrainer.Train(' '.join(sys.argv[1:]))"
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    path = folder / f"spm{len(list(folder.glob('*.model')))}"
    given = f"--input={Path(__file__).parents[2] / 'README.md'} --model_prefix={path} --vocab_size=600 --minloglevel=2"
    subprocess.run([python, "-c", code, *given.split(), *options], check=True, timeout=60)
    return path.with_suffix(".model").read_bytes()


def both(folder: Path, name: str, architecture: str, model: Any, vocabulary: bytes = b"") -> None:
    """The same random weights as GGUF in Q8_0 and as safetensors."""
    tensors = random_tensors(model)
    for key, tensor in tensors.items():
        if key.endswith("SelfAttention.q.weight"):
            tensor *= 0.1  # T5 does not scale attention; trained weights do
    keys = sentencepiece_metadata(vocabulary) if vocabulary else None
    tensors = rounded(tensors)
    write_text_encoder(folder / f"{name}.gguf", architecture, tensors, keys=keys)
    tokenizer = {"spiece_model": as_bytes(vocabulary)} if vocabulary else {}
    save_file({**tensors, **tokenizer}, folder / f"{name}.safetensors")


def as_bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def rounded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices with values that Q8_0 holds exactly (multiples of a power of two), so that only loading is compared."""
    return {n: v if v.ndim < 2 else exact_in_q8_0(v) for n, v in tensors.items()}


def exact_in_q8_0(w: Tensor) -> Tensor:
    blocks = w.reshape(-1, 32)
    scale = 2.0 ** torch.ceil(torch.log2(blocks.abs().amax(1, keepdim=True) / 127))
    whole = (blocks / scale).round_()
    whole[:, 0] = 127  # the largest, from which the format takes its scale
    return (whole * scale).reshape(w.shape)


MAKERS: dict[str, Callable[[Path], None]] = {
    f.__name__: f for f in (t5_base, t5_xxl, umt5, gemma2, llama, mistral, clip_g, qwen2vl)
}
# Case -> (type, files of the node, files of the host's loader).
CLIP_L = "digits_clip.safetensors"
CASES: dict[str, tuple[str, list[str], list[str]]] = {
    "stable_audio": ("stable_audio", ["t5_base.gguf"], ["t5_base.safetensors"]),
    "wan": ("wan", ["umt5.gguf"], ["umt5.safetensors"]),
    "lumina2": ("lumina2", ["gemma2.gguf"], ["gemma2.safetensors"]),
    "flux2": ("flux2", ["mistral.gguf"], ["mistral.safetensors"]),
    "qwen_image": ("qwen_image", ["qwen/tiny-qwen-Q8_0.gguf"], ["qwen.safetensors"]),
    "hunyuan_video": ("hunyuan_video", ["llama.gguf", CLIP_L], ["llama_padded.safetensors", CLIP_L]),
    "sd3": (
        "sd3",
        ["t5_xxl.gguf", CLIP_L, "clip_g.safetensors"],
        ["t5_xxl.safetensors", CLIP_L, "clip_g.safetensors"],
    ),
    "hidream": (
        "hidream",
        [CLIP_L, "clip_g.gguf", "t5_xxl.gguf", "llama.gguf"],
        [CLIP_L, "clip_g.safetensors", "t5_xxl.safetensors", "llama.safetensors"],
    ),
}


OFFLOADED = ("stable_audio", "lumina2", "qwen_image")  # in each load mode; the others as they are


@pytest.fixture(scope="module")
def files(comfyui: Any) -> Path:
    folder = comfyui.base / "models" / "text_encoders"
    for name in ("qwen", "qwen alone"):
        (folder / name).mkdir()
    for make in MAKERS.values():
        make(folder)
    return folder


def stock(kind: str, names: list[str]) -> dict[str, Any]:
    inputs: dict[str, Any] = {f"clip_name{i}": n for i, n in enumerate(names, 1)}
    if len(names) == 1:
        inputs = {"clip_name": names[0]}
    return node(LOADERS[len(names)], **inputs, **({"type": kind} if len(names) < 3 else {}))


def ours(kind: str, names: list[str]) -> dict[str, Any]:
    return node("LoadGGUFTextEncoder", **{f"clip_name{i}": n for i, n in enumerate(names, 1)}, type=kind)


def encoded(loader: dict[str, Any], name: str, modes: tuple[str, ...] = MODES[:1]) -> Graph:
    """The prompt through a CLIP in each load mode, one after the other, each saved as `NAME_MODE`."""
    graph: Graph = {f"{name}_clip": loader}
    before: dict[str, Any] = {}
    for mode in modes:
        key = f"{name}_{mode}"
        graph[f"{key}_load"] = node("ProbeLoadClip", clip=[f"{name}_clip", 0], mode=mode, **before)
        graph[f"{key}_encode"] = node("CLIPTextEncode", clip=[f"{key}_load", 0], text=PROMPT)
        graph[f"{key}_save"] = node("ProbeConditioning", conditioning=[f"{key}_encode", 0], name=key)
        before = {"after": [f"{key}_encode", 0]}
    return graph


def relative(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("case", CASES)
def test_equals_the_hosts_loader(comfyui: Any, files: Path, case: str) -> None:
    kind, names, full = CASES[case]
    modes = MODES if case in OFFLOADED else MODES[:1]
    graph = encoded(stock(kind, full), f"{case}_stock") | encoded(ours(kind, names), f"{case}_ours", modes)
    outputs = comfyui.run(graph)
    saved = {m: load_file(comfyui.base / "output" / f"{case}_ours_{m}.safetensors") for m in modes}
    wanted = load_file(comfyui.base / "output" / f"{case}_stock_default.safetensors")
    report = outputs[f"{case}_ours_clip"]["text"][0]
    assert "gguf-q8-0" in report
    for name, tensor in wanted.items():
        error = relative(saved["default"][name], tensor)
        if name == "attention_mask":
            assert error == 0
            continue
        comfyui.rows.append({f"LoadGGUFTextEncoder, {case}, {name}": error})
        assert error < ERROR, name
        for mode in modes[1:]:
            assert relative(saved[mode][name], saved["default"][name]) <= 1e-5, (mode, name)


def test_a_lora_on_weights_in_blocks(comfyui: Any, files: Path) -> None:
    """SDXL's second encoder in GGUF; the LoRA is applied in floating point, in each load mode."""
    wide, generator = FILES["clip_config_bigg.json"]["hidden_size"], torch.Generator().manual_seed(6)
    lora: dict[str, Tensor] = {}
    for i in range(32):
        layer = f"lora_te2_text_model_encoder_layers_{i}_self_attn_v_proj"
        lora[f"{layer}.lora_down.weight"] = torch.randn(4, wide, generator=generator) * 0.3
        lora[f"{layer}.lora_up.weight"] = torch.randn(wide, 4, generator=generator) * 0.3
        lora[f"{layer}.alpha"] = torch.tensor(4.0)
    save_file(lora, comfyui.base / "models" / "loras" / "te2.safetensors")

    def graph(loader: dict[str, Any], name: str, modes: tuple[str, ...]) -> Graph:
        nodes = encoded(loader, name, modes)
        inputs = {"model": ["model", 0], "lora_name": "te2.safetensors", "strength_model": 0.0, "strength_clip": 1.0}
        nodes[f"{name}_lora"] = node("LoraLoader", clip=[f"{name}_clip", 0], **inputs)
        for mode in modes:
            nodes[f"{name}_{mode}_load"]["inputs"]["clip"] = [f"{name}_lora", 1]
        return nodes

    model = {"model": node("UNETLoader", unet_name="digits_flux.safetensors", weight_dtype="default")}
    kind, full = "sdxl", [CLIP_L, "clip_g.safetensors"]
    comfyui.run(model | graph(stock(kind, full), "lora_stock", MODES[:1]) | encoded(stock(kind, full), "no_lora"))
    comfyui.run(model | graph(ours(kind, [CLIP_L, "clip_g.gguf"]), "lora_ours", MODES))
    wanted, without = (
        load_file(comfyui.base / "output" / f"{n}_default.safetensors") for n in ("lora_stock", "no_lora")
    )
    assert relative(without["cond"], wanted["cond"]) > 0.05
    for mode in MODES:
        got = load_file(comfyui.base / "output" / f"lora_ours_{mode}.safetensors")
        assert relative(got["cond"], wanted["cond"]) < ERROR, mode


def test_what_the_model_object_is(comfyui: Any, files: Path) -> None:
    graph: Graph = {"clip": ours("stable_audio", ["t5_base.gguf"]), "probe": node("ProbeClip", clip=["clip", 0])}
    facts = json.loads(comfyui.run(graph)["probe"]["text"][0])
    assert facts["quantized_layers"] == 3 * 6
    assert facts["formats"] == ["gguf-q8-0"]
    assert "ModelPatcher" in facts["remade"]
    in_blocks, table = 3 * (4 * 768 * 768 + 2 * 768 * 3072), 2048 * 768
    assert 0.99 < facts["size"] / (in_blocks * 34 / 32 + table * 2) < 1.01


def test_images_through_the_vision_part_beside_it(comfyui: Any, files: Path) -> None:
    def graph(loader: dict[str, Any], name: str) -> Graph:
        encode = node("TextEncodeQwenImageEdit", clip=["clip", 0], prompt=PROMPT, image=["image", 0])
        save = node("ProbeConditioning", conditioning=["encode", 0], name=name)
        image = node("EmptyImage", width=64, height=64, batch_size=1, color=0x3366AA)
        return {"clip": loader, "image": image, "encode": encode, "save": save}

    kind, names, full = CASES["qwen_image"]
    report = comfyui.run(graph(ours(kind, names), "edit_ours"))["clip"]["text"][0]
    assert "vision part: vision of qwen.gguf, found beside it" in report
    comfyui.run(graph(stock(kind, full), "edit_stock"))
    got, wanted = (load_file(comfyui.base / "output" / f"edit_{n}.safetensors")["cond"] for n in ("ours", "stock"))
    assert relative(got, wanted) < ERROR


def test_without_its_vision_part(comfyui: Any, files: Path) -> None:
    kind, _, full = CASES["qwen_image"]
    alone = ours(kind, ["qwen alone/tiny.gguf"])
    graph = encoded(alone, "alone") | encoded(stock(kind, full), "with_vision")
    report = comfyui.run(graph)["alone_clip"]["text"][0]
    assert "no vision part (mmproj) beside it" in report
    got = load_file(comfyui.base / "output" / "alone_default.safetensors")["cond"]
    wanted = load_file(comfyui.base / "output" / "with_vision_default.safetensors")["cond"]
    assert relative(got, wanted) < ERROR
    image = node("EmptyImage", width=64, height=64, batch_size=1, color=0x3366AA)
    encode = node("TextEncodeQwenImageEdit", clip=["alone_clip", 0], prompt=PROMPT, image=["image", 0])
    save = node("ProbeConditioning", conditioning=["encode", 0], name="edit_alone")
    failed = comfyui.fail({"alone_clip": alone, "image": image, "encode": encode, "save": save})
    assert "no file brought the vision part" in failed["exception_message"]


def test_refusals(comfyui: Any, files: Path) -> None:
    diffusion = comfyui.base / "models" / "diffusion_models"
    shutil.copy(diffusion / "digits_flux-Q8_0.gguf", files / "flux.gguf")
    one = torch.ones(32, 32)
    write_gguf(files / "whole.gguf", "sd1", dict.fromkeys(("model.diffusion_model.a", "first_stage_model.b"), one))

    def said(kind: str, *names: str) -> str:
        return comfyui.fail({**encoded(ours(kind, list(names)), "refused")})["exception_message"]

    assert "holds a diffusion model (flux)" in said("stable_diffusion", "flux.gguf")
    assert "Open it with LoadGGUF." in said("stable_diffusion", "flux.gguf")
    assert "holds a whole checkpoint" in said("stable_diffusion", "whole.gguf")
    assert "Choose the text encoder that it belongs to" in said("qwen_image", "qwen/vision of qwen.gguf")
    assert "nothing for layer 'clip_l." in said("hunyuan_video", "llama.gguf", "t5_base.gguf")
    wrong = said("wan", "t5_xxl.gguf")
    assert "t5_xxl.gguf: " in wrong
    assert "of type wan" in wrong
    bare = {n: v.float() for n, v in load_file(files / "gemma2.safetensors").items() if n != "spiece_model"}
    write_text_encoder(files / "bare.gguf", "gemma2", bare)
    assert "bare.gguf: no tokenizer" in said("lumina2", "bare.gguf")


def test_the_number_of_files_is_checked_before_the_run(comfyui: Any, files: Path) -> None:
    with pytest.raises(AssertionError, match=r"Type flux takes two files, got 1 \(t5_base\.gguf\)\. For one file: sta"):
        comfyui.queue(encoded(ours("flux", ["t5_base.gguf"]), "count"))


def test_types_are_the_hosts(comfyui: Any) -> None:
    info = comfyui.get("/object_info")
    types = info["LoadGGUFTextEncoder"]["input"]["required"]["type"][0]
    for loader in ("CLIPLoader", "DualCLIPLoader"):
        assert set(info[loader]["input"]["required"]["type"][0]) <= set(types)
