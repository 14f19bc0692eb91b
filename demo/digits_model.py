"""The digits model: its parts, its file layouts, its tokens and its sampler.

Three files in ComfyUI's folders, all weights bfloat16:

    diffusion_models/digits_flux.safetensors   FLUX keys as ComfyUI has them (`double_blocks.0.img_attn.qkv.weight`)
    text_encoders/digits_clip.safetensors      CLIP-L keys (`text_model.*`); the metadata holds "config" (JSON of the
                                               CLIPTextConfig fields), "tokenizer_json" and "pad_to"
    vae/digits_tae.safetensors                 `taesd_decoder.N.*` with N counted as ComfyUI's TAESD does, and the
                                               scalars `vae_scale`, `vae_shift` (float32); there is no encoder

In memory the parts are diffusers' FluxTransformer2DModel and AutoencoderTiny decoder and transformers' CLIPTextModel,
because they are tested against the published models. Their names differ from the files', so the tables below
translate, in both directions.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
PAD_TO = 16  # tokens per prompt in the embedded host; ComfyUI pads CLIP prompts to 77
LONG = 77
SHIFT = math.exp(1.15)  # ComfyUI's default FLUX shift
VAE_SCALE, VAE_SHIFT = 0.3611, 0.1159
FILES = {
    "flux": "diffusion_models/digits_flux.safetensors",
    "clip": "text_encoders/digits_clip.safetensors",
    "tae": "vae/digits_tae.safetensors",
}

# diffusers name -> FLUX name, inside one block. A tuple is concatenated along the output dimension.
DOUBLE = {
    ("norm1.linear",): "img_mod.lin",
    ("norm1_context.linear",): "txt_mod.lin",
    ("attn.to_q", "attn.to_k", "attn.to_v"): "img_attn.qkv",
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"): "txt_attn.qkv",
    ("attn.norm_q",): "img_attn.norm.query_norm",
    ("attn.norm_k",): "img_attn.norm.key_norm",
    ("attn.norm_added_q",): "txt_attn.norm.query_norm",
    ("attn.norm_added_k",): "txt_attn.norm.key_norm",
    ("ff.net.0.proj",): "img_mlp.0",
    ("ff.net.2",): "img_mlp.2",
    ("ff_context.net.0.proj",): "txt_mlp.0",
    ("ff_context.net.2",): "txt_mlp.2",
    ("attn.to_out.0",): "img_attn.proj",
    ("attn.to_add_out",): "txt_attn.proj",
}
SINGLE = {
    ("norm.linear",): "modulation.lin",
    ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"): "linear1",
    ("attn.norm_q",): "norm.query_norm",
    ("attn.norm_k",): "norm.key_norm",
    ("proj_out",): "linear2",
}
OUTER = {
    ("time_text_embed.timestep_embedder.linear_1",): "time_in.in_layer",
    ("time_text_embed.timestep_embedder.linear_2",): "time_in.out_layer",
    ("time_text_embed.text_embedder.linear_1",): "vector_in.in_layer",
    ("time_text_embed.text_embedder.linear_2",): "vector_in.out_layer",
    ("time_text_embed.guidance_embedder.linear_1",): "guidance_in.in_layer",
    ("time_text_embed.guidance_embedder.linear_2",): "guidance_in.out_layer",
    ("context_embedder",): "txt_in",
    ("x_embedder",): "img_in",
    ("proj_out",): "final_layer.linear",
    ("norm_out.linear",): "final_layer.adaLN_modulation.1",
}


def make_flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1, in_channels=64, out_channels=64, num_layers=2, num_single_layers=1, attention_head_dim=128,
        num_attention_heads=2, joint_attention_dim=128, pooled_projection_dim=128, guidance_embeds=True,
        axes_dims_rope=(16, 56, 56),
    )  # fmt: skip


def make_decoder() -> torch.nn.Module:
    width = (64, 64, 64, 64)
    return AutoencoderTiny(
        latent_channels=16, encoder_block_out_channels=width, decoder_block_out_channels=width
    ).decoder


def make_clip(tokenizer: Tokenizer) -> CLIPTextModel:
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=tokenizer.get_vocab_size(), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=LONG, hidden_act="quick_gelu", projection_dim=128,
            bos_token_id=bos, eos_token_id=eos, pad_token_id=eos,
        )
    )  # fmt: skip


def swap_halves(w: Tensor) -> Tensor:
    """FLUX's final modulation is (shift, scale), diffusers' is (scale, shift)."""
    return torch.cat(w.chunk(2)[::-1])


def flux_names(double: int = 2, single: int = 1) -> Iterable[tuple[tuple[str, ...], str]]:
    """Yield (diffusers module names, FLUX module name) of the whole transformer."""
    yield from OUTER.items()
    for table, ours, theirs, n in (
        (DOUBLE, "transformer_blocks", "double_blocks", double),
        (SINGLE, "single_transformer_blocks", "single_blocks", single),
    ):
        for i in range(n):
            for names, name in table.items():
                yield tuple(f"{ours}.{i}.{x}" for x in names), f"{theirs}.{i}.{name}"


def flux_to_comfy(sd: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a diffusers FLUX state dict to ComfyUI's keys; the inverse of `flux_from_comfy`."""
    out: dict[str, Tensor] = {}
    for names, name in flux_names():
        for end in ("weight", "bias"):
            if f"{names[0]}.{end}" in sd:
                w = torch.cat([sd[f"{x}.{end}"] for x in names])
                out[f"{name}.{end}"] = swap_halves(w) if name.startswith("final_layer.adaLN") else w
    return out


def flux_from_comfy(sd: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename ComfyUI's FLUX keys to diffusers' names.

    diffusers' own `convert_flux_transformer_checkpoint_to_diffusers` does the same for a hidden size of 3072 only: it
    splits `linear1` by that constant.
    """
    out: dict[str, Tensor] = {}
    for names, name in flux_names():
        for end in ("weight", "bias"):
            if (w := sd.get(f"{name}.{end}")) is None:
                continue
            w = swap_halves(w) if name.startswith("final_layer.adaLN") else w
            hidden = len(w) // 3 if len(names) == 3 else len(w) // 7  # linear1 is q, k, v and an MLP of 4 times hidden
            sizes = {1: [len(w)], 3: [hidden] * 3, 4: [hidden] * 3 + [4 * hidden]}[len(names)]
            out.update({f"{x}.{end}": part.contiguous() for x, part in zip(names, w.split(sizes), strict=True)})
    return out


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write to a temporary name in the same folder, then rename, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, partial, metadata)
    with open(partial, "rb+") as f:
        os.fsync(f.fileno())
    partial.chmod(0o644)  # safetensors creates its file for the owner alone
    partial.replace(path)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}  # noqa: SIM118, it is no mapping


def sub(sd: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in sd.items() if k.startswith(prefix)}


def encode(tokenizer: Tokenizer, prompts: list[str], length: int) -> Tensor:
    """Encode prompts to (B, length) int64: BOS, words, EOS, then EOS up to length; too long ones keep a last EOS."""
    eos = tokenizer.token_to_id(EOS)
    rows = [tokenizer.encode(p).ids[: length - 1] + [eos] for p in prompts]
    return torch.tensor([(r + [eos] * length)[:length] for r in rows])


def pack(x: Tensor) -> Tensor:
    """(B, 16, 8, 8) -> (B, 16, 64) tokens of 2x2 patches, channel first inside a token, as diffusers and ComfyUI do."""
    return x.reshape(-1, 16, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, 16, 64)


def unpack(x: Tensor) -> Tensor:
    return x.reshape(-1, 4, 4, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(-1, 16, 8, 8)


def image_ids() -> Tensor:
    ids = torch.zeros(16, 3)
    ids[:, 1], ids[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return ids


def velocity(flux: FluxTransformer2DModel, x: Tensor, t: Tensor, w: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    """Predict noise - x0 for packed x (B, 16, 64), t and guidance w (B,), context (B, L, 128), pooled (B, 128)."""
    return flux(
        hidden_states=x, timestep=t, guidance=w, encoder_hidden_states=context, pooled_projections=pooled,
        img_ids=image_ids(), txt_ids=torch.zeros(context.shape[1], 3), return_dict=False,
    )[0]  # fmt: skip


def shifted(t: Tensor) -> Tensor:
    return SHIFT * t / (1 + (SHIFT - 1) * t)


@torch.no_grad()
def sample(
    flux: FluxTransformer2DModel, context: Tensor, pooled: Tensor, noise: Tensor, steps: int, guidance: float
) -> Tensor:
    """Euler from noise (B, 16, 8, 8) to x0 of the same shape, 50 images at a time, in the transformer's dtype."""
    sigmas = [*shifted(torch.linspace(1, 1 / steps, steps)).tolist(), 0.0]
    dtype, done = flux.dtype, []
    for x, c, p in zip(pack(noise).split(50), context.to(dtype).split(50), pooled.to(dtype).split(50), strict=True):
        w = torch.full((len(x),), guidance, dtype=dtype)
        for now, then in pairwise(sigmas):
            t = torch.full((len(x),), now)
            x = x + (then - now) * velocity(flux, x.to(dtype), t, w, c, p).float()
        done.append(x)
    return unpack(torch.cat(done))


def load_models(out: Path) -> tuple[FluxTransformer2DModel, CLIPTextModel, Tokenizer, torch.nn.Module]:
    """Load the exported files back; weights are float32 that hold the files' bfloat16 values."""
    flux, decoder = make_flux(), make_decoder()
    flux.load_state_dict(flux_from_comfy(load(out / FILES["flux"])[0]))
    sd, metadata = load(out / FILES["clip"])
    tokenizer = Tokenizer.from_str(metadata["tokenizer_json"])
    clip = CLIPTextModel(CLIPTextConfig(**json.loads(metadata["config"])))
    clip.load_state_dict(sub(sd, "text_model."))
    tae = sub(load(out / FILES["tae"])[0], "taesd_decoder.")
    decoder.load_state_dict({f"layers.{int(k.split('.')[0]) - 1}.{k.split('.', 1)[1]}": v for k, v in tae.items()})
    return flux.float().eval(), clip.float().eval(), tokenizer, decoder.float().eval()


@torch.no_grad()
def decode(decoder: torch.nn.Module, latent: Tensor) -> np.ndarray:
    """Decode x0 (B, 16, 8, 8) to images (B, 64, 64, 3) in [0, 1]."""
    with torch.autocast("cpu", torch.bfloat16):
        images = torch.cat([decoder(x) for x in latent.split(50)])
    return images.float().add(1).div(2).clamp(0, 1).permute(0, 2, 3, 1).numpy()
