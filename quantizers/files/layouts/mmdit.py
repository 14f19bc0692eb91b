"""Stable Diffusion 3, AuraFlow and PixArt: diffusers' names to the original ones, which ComfyUI reads.

Sources (names): diffusers loaders/single_file_utils.py 0.42, comfy/utils.py, comfy/ldm/{aura,pixart} and
comfy/ldm/modules/diffusionmodules/mmdit.py.
"""

from __future__ import annotations

from .table import Rule, Table, move, swapped, under


def _mlp(to: str, source: str) -> tuple[Rule, ...]:
    return under(to, source, move("mlp.0.*", "linear_1.*"), move("mlp.2.*", "linear_2.*"))


def _attention(to: str, source: str) -> tuple[Rule, ...]:
    return (
        move(f"{to}.qkv.*", f"{source}.to_q.*", f"{source}.to_k.*", f"{source}.to_v.*"),
        move(f"{to}.ln_q.weight", f"{source}.norm_q.weight"),
        move(f"{to}.ln_k.weight", f"{source}.norm_k.weight"),
        move(f"{to}.proj.*", f"{source}.to_out.0.*"),
    )


SD3 = Table(
    (
        move("pos_embed", "pos_embed.pos_embed"),
        move("x_embedder.proj.*", "pos_embed.proj.*"),
        move("context_embedder.*", "context_embedder.*"),
        *_mlp("t_embedder", "time_text_embed.timestep_embedder"),
        *_mlp("y_embedder", "time_text_embed.text_embedder"),
        swapped("final_layer.adaLN_modulation.1.*", "norm_out.linear.*"),
        move("final_layer.linear.*", "proj_out.*"),
        *under(
            "joint_blocks.#",
            "transformer_blocks.#",
            *_attention("x_block.attn", "attn"),
            *_attention("x_block.attn2", "attn2"),
            move("x_block.adaLN_modulation.1.*", "norm1.linear.*"),
            move("x_block.mlp.fc1.*", "ff.net.0.proj.*"),
            move("x_block.mlp.fc2.*", "ff.net.2.*"),
            move("context_block.attn.qkv.*", "attn.add_q_proj.*", "attn.add_k_proj.*", "attn.add_v_proj.*"),
            move("context_block.attn.ln_q.weight", "attn.norm_added_q.weight"),
            move("context_block.attn.ln_k.weight", "attn.norm_added_k.weight"),
            move("context_block.attn.proj.*", "attn.to_add_out.*"),
            # The text side of the last block ends there: only scale and shift, which diffusers has the other way.
            Rule("context_block.adaLN_modulation.1.*", ("norm1_context.linear.*",), swap_in_last=True),
            move("context_block.mlp.fc1.*", "ff_context.net.0.proj.*"),
            move("context_block.mlp.fc2.*", "ff_context.net.2.*"),
        ),
    ),
    ("joint_blocks.#",),
    uneven=(r"^x_block\.attn2\.", r"^context_block\.(mlp|attn\.proj)\."),
)


def _feed_forward(to: str, source: str) -> tuple[Rule, ...]:
    return under(
        to,
        source,
        move("c_fc1.*", "linear_1.*"),
        move("c_fc2.*", "linear_2.*"),
        move("c_proj.*", "out_projection.*"),
    )


def _aura_attention(side: int, q: str, k: str, v: str, out: str) -> tuple[Rule, ...]:
    """Of the text (1) or the image (2); a single block has one for both, called that of the text."""
    return tuple(
        move(f"attn.w{side}{kind}.*", f"attn.{name}.*") for kind, name in zip("qkvo", (q, k, v, out), strict=True)
    )


AURA = Table(
    (
        move("register_tokens", "register_tokens"),
        move("positional_encoding", "pos_embed.pos_embed"),
        move("init_x_linear.*", "pos_embed.proj.*"),
        move("cond_seq_linear.*", "context_embedder.*"),
        *_mlp("t_embedder", "time_step_proj"),
        swapped("modF.1.*", "norm_out.linear.*"),
        move("final_linear.*", "proj_out.*"),
        *under(
            "double_layers.#",
            "joint_transformer_blocks.#",
            move("modX.1.*", "norm1.linear.*"),
            move("modC.1.*", "norm1_context.linear.*"),
            *_aura_attention(2, "to_q", "to_k", "to_v", "to_out.0"),
            *_aura_attention(1, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
            *_feed_forward("mlpX", "ff"),
            *_feed_forward("mlpC", "ff_context"),
        ),
        *under(
            "single_layers.#",
            "single_transformer_blocks.#",
            move("modCX.1.*", "norm1.linear.*"),
            *_aura_attention(1, "to_q", "to_k", "to_v", "to_out.0"),
            *_feed_forward("mlp", "ff"),
        ),
    ),
    ("double_layers.#", "single_layers.#"),
)

# diffusers has no `y_embedder.y_embedding`: it stands for a missing caption in training, and ComfyUI runs without it.
PIXART = Table(
    (
        move("x_embedder.proj.*", "pos_embed.proj.*"),
        move("y_embedder.y_embedding", "caption_projection.y_embedding"),
        move("y_embedder.y_proj.fc1.*", "caption_projection.linear_1.*"),
        move("y_embedder.y_proj.fc2.*", "caption_projection.linear_2.*"),
        *_mlp("t_embedder", "adaln_single.emb.timestep_embedder"),
        *_mlp("csize_embedder", "adaln_single.emb.resolution_embedder"),
        *_mlp("ar_embedder", "adaln_single.emb.aspect_ratio_embedder"),
        move("t_block.1.*", "adaln_single.linear.*"),
        move("final_layer.scale_shift_table", "scale_shift_table"),
        move("final_layer.linear.*", "proj_out.*"),
        *under(
            "blocks.#",
            "transformer_blocks.#",
            move("scale_shift_table", "scale_shift_table"),
            move("attn.qkv.*", "attn1.to_q.*", "attn1.to_k.*", "attn1.to_v.*"),
            move("attn.proj.*", "attn1.to_out.0.*"),
            move("cross_attn.q_linear.*", "attn2.to_q.*"),
            move("cross_attn.kv_linear.*", "attn2.to_k.*", "attn2.to_v.*"),
            move("cross_attn.proj.*", "attn2.to_out.0.*"),
            move("mlp.fc1.*", "ff.net.0.proj.*"),
            move("mlp.fc2.*", "ff.net.2.*"),
        ),
    ),
    ("blocks.#",),
    droppable=(r"pos_embed\.pos_embed",),  # sines and cosines, computed for each image size
)
