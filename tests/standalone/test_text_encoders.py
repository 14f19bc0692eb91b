"""CLIP and T5 files of the embedded host: sizes, tokens, pooled vector, and files that lack something."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from quantwire.hosts.standalone.text_encoders import TextEncoder, load_text_encoder
from quantwire.quantizers.errors import FileError, SpecError
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

WORDS = ["a", "red", "cat", "on", "the", "moon"]
START, END = "<|startoftext|>", "<|endoftext|>"


def word_tokenizer(special: list[str], unknown: str | None = None) -> Tokenizer:
    vocabulary = {w: i for i, w in enumerate([*special, *WORDS])}
    kind = (
        tokenizers.models.WordLevel(vocabulary, unk_token=unknown)
        if unknown
        else tokenizers.models.WordLevel(vocabulary)
    )
    tokenizer = Tokenizer(kind)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.add_special_tokens(special)
    return tokenizer


def clip_tokenizer(unknown: str | None = END) -> str:
    tokenizer = word_tokenizer([START, END], unknown)
    ids = [(START, 0), (END, 1)]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(f"{START} $A {END}", special_tokens=ids)  # type: ignore[assignment]
    return tokenizer.to_str()


def t5_tokenizer() -> str:
    tokenizer = word_tokenizer(["<pad>", "</s>", "<unk>"], "<unk>")
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])  # type: ignore[assignment]
    return tokenizer.to_str()


def random_clip(heads: int = 2, hidden: int = 128) -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=8, hidden_size=hidden, intermediate_size=96, num_hidden_layers=3, num_attention_heads=heads,
        max_position_embeddings=77, hidden_act="quick_gelu", bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return shaken(CLIPTextModel(config))


def random_t5() -> T5EncoderModel:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=9, d_model=48, d_kv=8, d_ff=64, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu"
    )
    return shaken(T5EncoderModel(config))


def shaken(model: Any) -> Any:
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1)
    return model.eval()


def clip_state(model: nn.Module) -> dict[str, Tensor]:
    return {f"text_model.{n.removeprefix('text_model.')}": t.contiguous() for n, t in model.state_dict().items()}


@pytest.fixture
def clip_file(tmp_path: Path) -> Path:
    save_file(clip_state(random_clip()), tmp_path / "clip.safetensors", {"tokenizer_json": clip_tokenizer()})
    return tmp_path / "clip.safetensors"


@pytest.fixture
def t5_file(tmp_path: Path) -> Path:
    state = random_t5().state_dict()
    state.pop("encoder.embed_tokens.weight", None)  # files hold the shared embedding once
    save_file(state, tmp_path / "t5.safetensors", {"tokenizer_json": t5_tokenizer()})
    return tmp_path / "t5.safetensors"


def rewrite(path: Path, **metadata: str | None) -> None:
    """Change the metadata of a file; None removes an entry."""
    with safe_open(path, "pt") as file:
        tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
        merged = {**(file.metadata() or {}), **metadata}
    save_file(tensors, path, {k: v for k, v in merged.items() if v is not None})


def encode(paths: list[Path], text: str) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        return load_text_encoder(paths).encode(text)


# --- CLIP ---


def test_clip_equals_transformers(clip_file: Path) -> None:
    context, pooled = encode([clip_file], "a red cat")
    ids = torch.tensor([[0, 2, 3, 4, *[1] * 73]])
    with torch.inference_mode():
        want = random_clip()(input_ids=ids).last_hidden_state
    assert torch.equal(context, want)
    assert torch.equal(pooled, want[:, 4]), "at the first end token, not at the padding, which is the same token"
    assert context.dtype is torch.float32


def test_sizes_come_from_the_config_in_the_metadata(clip_file: Path) -> None:
    guessed = encode([clip_file], "a cat")[0]
    rewrite(clip_file, config=json.dumps({"num_attention_heads": 4, "hidden_act": "gelu"}))
    encoder = load_text_encoder([clip_file]).encoders["clip_l"]
    assert encoder.module.config.num_attention_heads == 4  # type: ignore[union-attr]
    assert not torch.equal(encode([clip_file], "a cat")[0], guessed)


def test_pad_to(clip_file: Path) -> None:
    rewrite(clip_file, pad_to="6")
    context, pooled = encode([clip_file], "a cat")
    assert context.shape == (1, 6, 128)
    assert torch.equal(pooled, context[:, 3])
    assert encode([clip_file], "a cat " * 5)[0].shape[1] == 12, "longer prompts are not cut"


def test_empty_prompt(clip_file: Path) -> None:
    context, pooled = encode([clip_file], "")
    assert context.shape == (1, 77, 128)
    assert torch.equal(pooled, context[:, 1])


def test_long_prompt_is_cut_with_a_warning(clip_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        long = encode([clip_file], "cat " * 100)[0]
    assert "The prompt has 101 tokens; those after the first 76 are left out." in caplog.text
    caplog.clear()
    assert torch.equal(long, encode([clip_file], "cat " * 75)[0])
    assert not caplog.text


def test_prompt_weights_are_named(clip_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        encode([clip_file], "a (red:1.2) cat")
    assert "taken as plain text" in caplog.text


def test_unknown_words(clip_file: Path, tmp_path: Path) -> None:
    """A word-level vocabulary maps them to its unknown token, here CLIP's end token, which only ends a prompt."""
    assert torch.equal(encode([clip_file], "a zebra cat")[0], encode([clip_file], "a cat")[0])
    rewrite(clip_file, tokenizer_json=clip_tokenizer(unknown=None))
    with pytest.raises(SpecError, match="cannot express the prompt 'a zebra'"):
        encode([clip_file], "a zebra")


def test_demo_tokenizer_takes_any_text(demo_models: Path) -> None:
    path = demo_models / "text_encoders" / "digits_clip.safetensors"
    for text in ("", "a zebra of 7½ €", "日本 🙂", "seven " * 200):
        context, pooled = encode([path], text)
        assert torch.isfinite(context).all()
        assert torch.isfinite(pooled).all()
    assert encode([path], "a handwritten seven")[0].shape == (1, 16, 128)


def test_projection_is_for_clip_alone(clip_file: Path, t5_file: Path) -> None:
    plain = encode([clip_file], "a cat")[1]
    state = {**clip_state(random_clip()), "text_projection.weight": 2 * torch.eye(128)}
    save_file(state, clip_file, {"tokenizer_json": clip_tokenizer()})
    assert torch.equal(encode([clip_file], "a cat")[1], 2 * plain), "as ComfyUI's type stable_diffusion"
    assert torch.equal(encode([clip_file, t5_file], "a cat")[1], plain), "as ComfyUI's type flux"


def test_tokenizer_beside_the_file(clip_file: Path) -> None:
    want = encode([clip_file], "a cat")[0]
    rewrite(clip_file, tokenizer_json=None)
    with pytest.raises(FileError, match=r"clip\.safetensors: no tokenizer\.\n.*'clip\.tokenizer\.json'"):
        load_text_encoder([clip_file])
    clip_file.with_name("clip.tokenizer.json").write_text(clip_tokenizer(), encoding="utf-8")
    assert torch.equal(encode([clip_file], "a cat")[0], want)


# --- T5 ---


def test_t5_equals_transformers(clip_file: Path, t5_file: Path) -> None:
    context, pooled = encode([clip_file, t5_file], "a zebra cat")
    ids = torch.tensor([[3, 2, 5, 1, *[0] * 252]])
    with torch.inference_mode():
        assert torch.equal(context, random_t5()(input_ids=ids).last_hidden_state)
    assert torch.equal(pooled, encode([clip_file], "a cat")[1])


def test_t5_does_not_cut(clip_file: Path, t5_file: Path) -> None:
    assert encode([clip_file, t5_file], "cat " * 300)[0].shape == (1, 301, 48)


def test_order_of_the_two_files(clip_file: Path, t5_file: Path) -> None:
    a, b = (encode(p, "a cat") for p in ([clip_file, t5_file], [t5_file, clip_file]))
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    assert str(load_text_encoder([t5_file, clip_file])) == "t5xxl + clip_l from t5.safetensors, clip.safetensors"


def test_dual_loader_node(clip_file: Path, t5_file: Path) -> None:
    from quantwire.hosts import use
    from quantwire.hosts.standalone.host import StandaloneHost
    from quantwire.hosts.standalone.loaders import DualCLIPLoader

    folder = clip_file.parent / "models" / "clip"  # ComfyUI's older name of text_encoders
    folder.mkdir(parents=True)
    for path in (clip_file, t5_file):
        shutil.copy(path, folder)
    with use(StandaloneHost([folder.parent])):
        (clip,) = DualCLIPLoader().load_clip(t5_file.name, clip_file.name)
        assert DualCLIPLoader.VALIDATE_INPUTS(t5_file.name, clip_file.name) is True
        assert "nothing.safetensors" in str(DualCLIPLoader.VALIDATE_INPUTS("nothing.safetensors", clip_file.name))
    assert isinstance(clip, TextEncoder)
    assert set(clip.encoders) == {"clip_l", "t5xxl"}


def test_wrong_pairs(clip_file: Path, t5_file: Path) -> None:
    with pytest.raises(FileError, match="a second clip_l encoder"):
        load_text_encoder([clip_file, clip_file])
    with pytest.raises(FileError, match="needs a CLIP-L encoder"):
        encode([t5_file], "a cat")


# --- files that lack something ---


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"config": "{"}, "'config' is no JSON"),
        ({"config": "[1]"}, "'config' is no JSON object"),
        ({"pad_to": "many"}, "'pad_to' is 'many'"),
        ({"tokenizer_json": "{}"}, "its tokenizer cannot be read"),
        ({"tokenizer_json": t5_tokenizer()}, "has no <|endoftext|> token"),
    ],
    ids=["config", "config-list", "pad_to", "tokenizer", "other-tokenizer"],
)
def test_damaged_metadata(clip_file: Path, metadata: dict[str, str], said: str) -> None:
    rewrite(clip_file, **metadata)
    with pytest.raises(FileError) as caught:
        load_text_encoder([clip_file])
    assert said in str(caught.value).splitlines()[0]


def test_tokenizer_of_another_model(clip_file: Path) -> None:
    tokenizer = Tokenizer.from_str(clip_tokenizer())
    tokenizer.add_tokens(["dog"])
    rewrite(clip_file, tokenizer_json=tokenizer.to_str())
    with pytest.raises(FileError, match="ids up to 8, the model 8 embeddings"):
        load_text_encoder([clip_file])


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("text_model.embeddings.position_embedding.weight", None, "position_embedding.weight' is missing"),
        ("text_model.encoder.layers.1.mlp.fc2.bias", None, "layers.1.mlp.fc2.bias' is missing"),
        ("text_model.encoder.layers.1.mlp.fc2.bias", torch.zeros(3), "has shape (3,), expected (128,)"),
        ("text_model.final_layer_norm.bias", torch.zeros(128, dtype=torch.int8), "is already quantized"),
        ("text_model.encoder.layers.0.self_attn.q_proj.weight", None, "not a CLIP-L or T5 text encoder"),
    ],
    ids=["position", "missing", "shape", "quantized", "unrecognised"],
)
def test_damaged_tensors(clip_file: Path, name: str, value: Tensor | None, said: str) -> None:
    state = clip_state(random_clip())
    state.pop(name)
    state |= {} if value is None else {name: value}
    save_file(state, clip_file, {"tokenizer_json": clip_tokenizer()})
    with pytest.raises(FileError) as caught:
        load_text_encoder([clip_file])
    assert said in str(caught.value).splitlines()[0]
