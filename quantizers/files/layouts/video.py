"""Wan, LTX-Video and Cosmos: diffusers' names to the original ones, which ComfyUI reads.

Sources (names): diffusers loaders/single_file_utils.py 0.42, comfy/ldm/{wan,lightricks,cosmos}.
"""

from __future__ import annotations

from .table import Rule, Table, move, under


def _wan_attention(to: str, source: str) -> tuple[Rule, ...]:
    return under(
        to,
        source,
        move("q.*", "to_q.*"),
        move("k.*", "to_k.*"),
        move("v.*", "to_v.*"),
        move("o.*", "to_out.0.*"),
        move("norm_q.*", "norm_q.*"),
        move("norm_k.*", "norm_k.*"),
        move("k_img.*", "add_k_proj.*"),
        move("v_img.*", "add_v_proj.*"),
        move("norm_k_img.*", "norm_added_k.*"),
    )


_WAN_BLOCK = (
    move("modulation", "scale_shift_table"),
    *_wan_attention("self_attn", "attn1"),
    *_wan_attention("cross_attn", "attn2"),
    # The second norm of diffusers is the third of the original, which numbers them by position in the source.
    move("norm3.*", "norm2.*"),
    move("norm2.*", "norm3.*"),
    move("ffn.0.*", "ffn.net.0.proj.*"),
    move("ffn.2.*", "ffn.net.2.*"),
)
WAN = Table(
    (
        move("patch_embedding.*", "patch_embedding.*"),
        move("vace_patch_embedding.*", "vace_patch_embedding.*"),
        *under(
            "time_embedding",
            "condition_embedder.time_embedder",
            move("0.*", "linear_1.*"),
            move("2.*", "linear_2.*"),
        ),
        *under(
            "text_embedding",
            "condition_embedder.text_embedder",
            move("0.*", "linear_1.*"),
            move("2.*", "linear_2.*"),
        ),
        move("time_projection.1.*", "condition_embedder.time_proj.*"),
        move("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
        move("img_emb.proj.0.*", "condition_embedder.image_embedder.norm1.*"),
        move("img_emb.proj.1.*", "condition_embedder.image_embedder.ff.net.0.proj.*"),
        move("img_emb.proj.3.*", "condition_embedder.image_embedder.ff.net.2.*"),
        move("img_emb.proj.4.*", "condition_embedder.image_embedder.norm2.*"),
        move("head.modulation", "scale_shift_table"),
        move("head.head.*", "proj_out.*"),
        *under("blocks.#", "blocks.#", *_WAN_BLOCK),
        *under(
            "vace_blocks.#",
            "vace_blocks.#",
            *_WAN_BLOCK,
            move("before_proj.*", "proj_in.*"),
            move("after_proj.*", "proj_out.*"),
        ),
    ),
    ("blocks.#", "vace_blocks.#"),
    uneven=(r"^before_proj\.",),  # in the first only
)


def _ltxv_attention(name: str) -> tuple[Rule, ...]:
    return under(
        name,
        name,
        *(move(f"{part}.*", f"{part}.*") for part in ("to_q", "to_k", "to_v", "to_out.0")),
        move("q_norm.*", "norm_q.*"),
        move("k_norm.*", "norm_k.*"),
    )


LTXV = Table(
    (
        move("patchify_proj.*", "proj_in.*"),
        move("adaln_single.@", "time_embed.@"),
        move("caption_projection.@", "caption_projection.@"),
        move("scale_shift_table", "scale_shift_table"),
        move("proj_out.*", "proj_out.*"),
        *under(
            "transformer_blocks.#",
            "transformer_blocks.#",
            move("scale_shift_table", "scale_shift_table"),
            *_ltxv_attention("attn1"),
            *_ltxv_attention("attn2"),
            move("ff.@", "ff.@"),
        ),
    ),
    ("transformer_blocks.#",),
)


def _cosmos_ends(norm: str, modulation: str) -> tuple[Rule, ...]:
    return (
        move("x_embedder.proj.1.*", "patch_embed.proj.*"),
        move("t_embedder.1.linear_1.*", "time_embed.t_embedder.linear_1.*"),
        move("t_embedder.1.linear_2.*", "time_embed.t_embedder.linear_2.*"),
        move(f"{norm}.*", "time_embed.norm.*"),
        move(f"final_layer.{modulation}.1.*", "norm_out.linear_1.*"),
        move(f"final_layer.{modulation}.2.*", "norm_out.linear_2.*"),
        move("final_layer.linear.*", "proj_out.*"),
    )


def _cosmos1_attention(number: int) -> tuple[Rule, ...]:
    to, source = f"blocks.{number}.block.attn", f"attn{number + 1}"
    return under(
        to,
        source,
        move("to_q.0.*", "to_q.*"),
        move("to_q.1.*", "norm_q.*"),
        move("to_k.0.*", "to_k.*"),
        move("to_k.1.*", "norm_k.*"),
        move("to_v.0.*", "to_v.*"),
        move("to_out.0.*", "to_out.0.*"),
    )


COSMOS1 = Table(
    (
        *_cosmos_ends("affline_norm", "adaLN_modulation"),
        move("extra_pos_embedder.@", "learnable_pos_embed.@"),
        *under(
            "blocks.block#",
            "transformer_blocks.#",
            *_cosmos1_attention(0),
            *_cosmos1_attention(1),
            move("blocks.2.block.layer1.*", "ff.net.0.proj.*"),
            move("blocks.2.block.layer2.*", "ff.net.2.*"),
            *(
                move(f"blocks.{n}.adaLN_modulation.{k}.*", f"norm{n + 1}.linear_{k}.*")
                for n in range(3)
                for k in (1, 2)
            ),
        ),
    ),
    ("blocks.block#",),
)


def _cosmos2_attention(to: str, source: str) -> tuple[Rule, ...]:
    return under(
        to,
        source,
        move("q_proj.*", "to_q.*"),
        move("k_proj.*", "to_k.*"),
        move("v_proj.*", "to_v.*"),
        move("output_proj.*", "to_out.0.*"),
        move("q_norm.*", "norm_q.*"),
        move("k_norm.*", "norm_k.*"),
    )


COSMOS2 = Table(
    (
        *_cosmos_ends("t_embedding_norm", "adaln_modulation"),
        *under(
            "blocks.#",
            "transformer_blocks.#",
            *_cosmos2_attention("self_attn", "attn1"),
            *_cosmos2_attention("cross_attn", "attn2"),
            move("mlp.layer1.*", "ff.net.0.proj.*"),
            move("mlp.layer2.*", "ff.net.2.*"),
            *(
                move(f"adaln_modulation_{part}.{k}.*", f"norm{n}.linear_{k}.*")
                for n, part in ((1, "self_attn"), (2, "cross_attn"), (3, "mlp"))
                for k in (1, 2)
            ),
        ),
    ),
    ("blocks.#",),
)
