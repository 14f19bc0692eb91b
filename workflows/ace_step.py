"""ACE-Step 1.5 as ComfyUI builds it from `acestep_v1.5_turbo.safetensors`: names and shapes.

Read from ComfyUI 0.33.0: `AceStepConditionGenerationModel` in comfy/ldm/ace/ace_step15.py, with its defaults. diffusers
has the decoder alone; the encoder of text, lyrics and timbre and what tokenizes audio are half as much again.
"""

from __future__ import annotations

from collections.abc import Iterator

WIDTH, HEADS, KEYS, HEAD, INNER, TEXT, LATENT, CODES, PATCH = 2048, 16, 8, 128, 6144, 1024, 64, 6, 2
Shape = tuple[int, ...]
Row = tuple[str, Shape, bool]  # name, shape, whether it is the weight of a linear layer


def tensors() -> list[Row]:
    return [("null_condition_emb", (1, 1, WIDTH), False), *_decoder(), *_encoder(), *_tokenizers()]


def _decoder() -> Iterator[Row]:
    yield "decoder.scale_shift_table", (1, 2, WIDTH), False
    # 64 channels of noise, and 128 of what the song is made from.
    yield from _plain("decoder.proj_in.1", (WIDTH, 3 * LATENT, PATCH))
    for embedder in ("decoder.time_embed", "decoder.time_embed_r"):
        yield from _linear(f"{embedder}.linear_1", WIDTH, 256)
        yield from _linear(f"{embedder}.linear_2", WIDTH, WIDTH)
        yield from _linear(f"{embedder}.time_proj", 6 * WIDTH, WIDTH)
    yield from _linear("decoder.condition_embedder", WIDTH, WIDTH)
    for i in range(24):
        at = f"decoder.layers.{i}"
        yield f"{at}.scale_shift_table", (1, 6, WIDTH), False
        for name in ("self_attn", "cross_attn"):
            yield from _norm(f"{at}.{name}_norm")
            yield from _attention(f"{at}.{name}")
        yield from _norm(f"{at}.mlp_norm")
        yield from _mlp(f"{at}.mlp")
    yield from _norm("decoder.norm_out")
    yield "decoder.proj_out.1.weight", (WIDTH, LATENT, PATCH), False
    yield "decoder.proj_out.1.bias", (LATENT,), False


def _encoder() -> Iterator[Row]:
    yield "encoder.text_projector.weight", (WIDTH, TEXT), True
    yield from _layers("encoder.lyric_encoder", TEXT, 8)
    yield "encoder.timbre_encoder.special_token", (1, 1, WIDTH), False
    yield from _layers("encoder.timbre_encoder", LATENT, 4)


def _tokenizers() -> Iterator[Row]:
    yield from _linear("tokenizer.audio_acoustic_proj", WIDTH, LATENT)
    yield "tokenizer.attention_pooler.special_token", (1, 1, WIDTH), False
    yield from _layers("tokenizer.attention_pooler", WIDTH, 2)
    yield from _linear("tokenizer.quantizer.project_in", CODES, WIDTH)
    yield from _linear("tokenizer.quantizer.project_out", WIDTH, CODES)
    yield "detokenizer.special_tokens", (1, 5, WIDTH), False
    yield from _layers("detokenizer", WIDTH, 2)
    yield from _linear("detokenizer.proj_out", LATENT, WIDTH)


def _layers(at: str, takes: int, count: int) -> Iterator[Row]:
    yield from _linear(f"{at}.embed_tokens", WIDTH, takes)
    yield from _norm(f"{at}.norm")
    for i in range(count):
        yield from _attention(f"{at}.layers.{i}.self_attn")
        yield from _norm(f"{at}.layers.{i}.input_layernorm")
        yield from _norm(f"{at}.layers.{i}.post_attention_layernorm")
        yield from _mlp(f"{at}.layers.{i}.mlp")


def _attention(at: str) -> Iterator[Row]:
    for name, rows in (("q_proj", HEADS * HEAD), ("k_proj", KEYS * HEAD), ("v_proj", KEYS * HEAD)):
        yield f"{at}.{name}.weight", (rows, WIDTH), True
    yield f"{at}.o_proj.weight", (WIDTH, HEADS * HEAD), True
    yield from _norm(f"{at}.q_norm", HEAD)
    yield from _norm(f"{at}.k_norm", HEAD)


def _mlp(at: str) -> Iterator[Row]:
    yield f"{at}.gate_proj.weight", (INNER, WIDTH), True
    yield f"{at}.up_proj.weight", (INNER, WIDTH), True
    yield f"{at}.down_proj.weight", (WIDTH, INNER), True


def _norm(name: str, width: int = WIDTH) -> Iterator[Row]:
    yield f"{name}.weight", (width,), False


def _linear(name: str, rows: int, columns: int) -> Iterator[Row]:
    yield f"{name}.weight", (rows, columns), True
    yield f"{name}.bias", (rows,), False


def _plain(name: str, shape: Shape) -> Iterator[Row]:
    yield f"{name}.weight", shape, False
    yield f"{name}.bias", (shape[0],), False
