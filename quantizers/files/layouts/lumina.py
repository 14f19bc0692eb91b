"""Lumina-Image 2 and Z-Image: diffusers' names to the original ones, which ComfyUI reads.

Sources (names): diffusers loaders/single_file_utils.py 0.42, comfy/utils.py and comfy/ldm/lumina.
"""

from __future__ import annotations

from .table import Rule, Table, move, under

_BLOCKS = ("layers.#", "noise_refiner.#", "context_refiner.#")


def _lumina_block(kind: str, modulated: bool) -> tuple[Rule, ...]:
    norm1 = "norm1.norm" if modulated else "norm1"
    return under(
        kind,
        kind,
        move("attention.qkv.*", "attn.to_q.*", "attn.to_k.*", "attn.to_v.*"),
        move("attention.q_norm.*", "attn.norm_q.*"),
        move("attention.k_norm.*", "attn.norm_k.*"),
        move("attention.out.*", "attn.to_out.0.*"),
        move("feed_forward.w1.*", "feed_forward.linear_1.*"),
        move("feed_forward.w2.*", "feed_forward.linear_2.*"),
        move("feed_forward.w3.*", "feed_forward.linear_3.*"),
        *((move("adaLN_modulation.1.*", "norm1.linear.*"),) if modulated else ()),
        move("attention_norm1.*", f"{norm1}.*"),
        move("attention_norm2.*", "norm2.*"),
        move("ffn_norm1.*", "ffn_norm1.*"),
        move("ffn_norm2.*", "ffn_norm2.*"),
    )


LUMINA2 = Table(
    (
        move("x_embedder.*", "x_embedder.*"),
        move("t_embedder.mlp.0.*", "time_caption_embed.timestep_embedder.linear_1.*"),
        move("t_embedder.mlp.2.*", "time_caption_embed.timestep_embedder.linear_2.*"),
        move("cap_embedder.#.*", "time_caption_embed.caption_embedder.#.*"),
        # A scale and no shift: nothing is swapped.
        move("final_layer.adaLN_modulation.1.*", "norm_out.linear_1.*"),
        move("final_layer.linear.*", "norm_out.linear_2.*"),
        *_lumina_block("layers.#", True),
        *_lumina_block("noise_refiner.#", True),
        *_lumina_block("context_refiner.#", False),
    ),
    _BLOCKS,
)


def _z_image_block(kind: str) -> tuple[Rule, ...]:
    return under(
        kind,
        kind,
        move("attention.qkv.*", "attention.to_q.*", "attention.to_k.*", "attention.to_v.*"),
        move("attention.q_norm.*", "attention.norm_q.*"),
        move("attention.k_norm.*", "attention.norm_k.*"),
        move("attention.out.*", "attention.to_out.0.*"),
        move("feed_forward.@", "feed_forward.@"),
        move("adaLN_modulation.0.*", "adaLN_modulation.0.*"),
        move("attention_norm1.*", "attention_norm1.*"),
        move("attention_norm2.*", "attention_norm2.*"),
        move("ffn_norm1.*", "ffn_norm1.*"),
        move("ffn_norm2.*", "ffn_norm2.*"),
    )


# diffusers has an embedder and a final layer for each patch size ("2-1"); the files have that one.
Z_IMAGE = Table(
    (
        move("x_embedder.*", "all_x_embedder.2-1.*"),
        move("final_layer.@", "all_final_layer.2-1.@"),
        move("t_embedder.mlp.#.*", "t_embedder.mlp.#.*"),
        move("cap_embedder.#.*", "cap_embedder.#.*"),
        move("x_pad_token", "x_pad_token"),
        move("cap_pad_token", "cap_pad_token"),
        move("siglip_pad_token", "siglip_pad_token"),
        move("siglip_embedder.#.*", "siglip_embedder.#.*"),
        *(rule for kind in (*_BLOCKS, "siglip_refiner.#") for rule in _z_image_block(kind)),
    ),
    (*_BLOCKS, "siglip_refiner.#"),
)
