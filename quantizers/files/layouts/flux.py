"""FLUX.1, FLUX.2, Chroma and HunyuanVideo: diffusers' names to the original ones, which ComfyUI reads.

The norms of queries and keys are called `.scale`, as in the original files: ComfyUI and diffusers read that, while
`.weight` is read by ComfyUI alone.

Sources (names): diffusers loaders/single_file_utils.py 0.42, comfy/utils.py and comfy/ldm/{flux,chroma,hunyuan_video}.
"""

from __future__ import annotations

from .table import Rule, Table, move, swapped, under

_QKV = ("attn.to_q.*", "attn.to_k.*", "attn.to_v.*")
_ADDED_QKV = ("attn.add_q_proj.*", "attn.add_k_proj.*", "attn.add_v_proj.*")


def _embedder(to: str, source: str) -> tuple[Rule, ...]:
    return under(to, source, move("in_layer.*", "linear_1.*"), move("out_layer.*", "linear_2.*"))


_ENDS = (
    move("img_in.*", "x_embedder.*"),
    move("txt_in.*", "context_embedder.*"),
    move("final_layer.linear.*", "proj_out.*"),
)
_FINAL_SWAP = swapped("final_layer.adaLN_modulation.1.*", "norm_out.linear.*")
_ATTENTION = (
    move("img_attn.qkv.*", *_QKV),
    move("img_attn.norm.query_norm.scale", "attn.norm_q.weight"),
    move("img_attn.norm.key_norm.scale", "attn.norm_k.weight"),
    move("img_attn.proj.*", "attn.to_out.0.*"),
    move("txt_attn.qkv.*", *_ADDED_QKV),
    move("txt_attn.norm.query_norm.scale", "attn.norm_added_q.weight"),
    move("txt_attn.norm.key_norm.scale", "attn.norm_added_k.weight"),
    move("txt_attn.proj.*", "attn.to_add_out.*"),
)
_MLP = (
    move("img_mlp.0.*", "ff.net.0.proj.*"),
    move("img_mlp.2.*", "ff.net.2.*"),
    move("txt_mlp.0.*", "ff_context.net.0.proj.*"),
    move("txt_mlp.2.*", "ff_context.net.2.*"),
)
_MODULATION = (
    move("img_mod.lin.*", "norm1.linear.*"),
    move("txt_mod.lin.*", "norm1_context.linear.*"),
)
_SINGLE = (
    move("linear1.*", *_QKV, "proj_mlp.*"),
    move("linear2.*", "proj_out.*"),
    move("norm.query_norm.scale", "attn.norm_q.weight"),
    move("norm.key_norm.scale", "attn.norm_k.weight"),
)
_BLOCKS = ("double_blocks.#", "single_blocks.#")
_DOUBLE_FROM = "transformer_blocks.#"
_SINGLE_FROM = "single_transformer_blocks.#"

FLUX = Table(
    (
        *_ENDS,
        _FINAL_SWAP,
        *_embedder("time_in", "time_text_embed.timestep_embedder"),
        *_embedder("vector_in", "time_text_embed.text_embedder"),
        *_embedder("guidance_in", "time_text_embed.guidance_embedder"),
        *under(_BLOCKS[0], _DOUBLE_FROM, *_MODULATION, *_ATTENTION, *_MLP),
        *under(_BLOCKS[1], _SINGLE_FROM, move("modulation.lin.*", "norm.linear.*"), *_SINGLE),
    ),
    _BLOCKS,
)

CHROMA = Table(
    (
        *_ENDS,
        move("distilled_guidance_layer.in_proj.*", "distilled_guidance_layer.in_proj.*"),
        move("distilled_guidance_layer.out_proj.*", "distilled_guidance_layer.out_proj.*"),
        *_embedder("distilled_guidance_layer.layers.#", "distilled_guidance_layer.layers.#"),
        move("distilled_guidance_layer.norms.#.scale", "distilled_guidance_layer.norms.#.weight"),
        *under(_BLOCKS[0], _DOUBLE_FROM, *_ATTENTION, *_MLP),
        *under(_BLOCKS[1], _SINGLE_FROM, *_SINGLE),
    ),
    (*_BLOCKS, "distilled_guidance_layer.layers.#", "distilled_guidance_layer.norms.#"),
)

FLUX2 = Table(
    (
        *_ENDS,
        _FINAL_SWAP,
        *_embedder("time_in", "time_guidance_embed.timestep_embedder"),
        *_embedder("guidance_in", "time_guidance_embed.guidance_embedder"),
        move("double_stream_modulation_img.lin.*", "double_stream_modulation_img.linear.*"),
        move("double_stream_modulation_txt.lin.*", "double_stream_modulation_txt.linear.*"),
        move("single_stream_modulation.lin.*", "single_stream_modulation.linear.*"),
        *under(
            _BLOCKS[0],
            _DOUBLE_FROM,
            *_ATTENTION,
            move("img_mlp.0.*", "ff.linear_in.*"),
            move("img_mlp.2.*", "ff.linear_out.*"),
            move("txt_mlp.0.*", "ff_context.linear_in.*"),
            move("txt_mlp.2.*", "ff_context.linear_out.*"),
        ),
        *under(
            _BLOCKS[1],
            _SINGLE_FROM,
            move("linear1.*", "attn.to_qkv_mlp_proj.*"),
            move("linear2.*", "attn.to_out.*"),
            move("norm.query_norm.scale", "attn.norm_q.weight"),
            move("norm.key_norm.scale", "attn.norm_k.weight"),
        ),
    ),
    _BLOCKS,
)


def _mlp(to: str, source: str) -> tuple[Rule, ...]:
    return under(to, source, move("mlp.0.*", "linear_1.*"), move("mlp.2.*", "linear_2.*"))


def _stream(side: str, qkv: tuple[str, ...], added: str, out: str, mlp: str, norm: str) -> tuple[Rule, ...]:
    """The image or the text side of a block of HunyuanVideo."""
    return (
        move(f"{side}_mod.linear.*", f"{norm}.linear.*"),
        move(f"{side}_attn_qkv.*", *qkv),
        move(f"{side}_attn_q_norm.*", f"attn.norm_{added}q.*"),
        move(f"{side}_attn_k_norm.*", f"attn.norm_{added}k.*"),
        move(f"{side}_attn_proj.*", f"attn.{out}.*"),
        move(f"{side}_mlp.fc1.*", f"{mlp}.net.0.proj.*"),
        move(f"{side}_mlp.fc2.*", f"{mlp}.net.2.*"),
    )


HUNYUAN_VIDEO = Table(
    (
        move("img_in.proj.*", "x_embedder.proj.*"),
        move("final_layer.linear.*", "proj_out.*"),
        _FINAL_SWAP,
        *_mlp("time_in", "time_text_embed.timestep_embedder"),
        *_mlp("guidance_in", "time_text_embed.guidance_embedder"),
        *_embedder("vector_in", "time_text_embed.text_embedder"),
        move("txt_in.input_embedder.*", "context_embedder.proj_in.*"),
        *_mlp("txt_in.t_embedder", "context_embedder.time_text_embed.timestep_embedder"),
        move("txt_in.c_embedder.linear_1.*", "context_embedder.time_text_embed.text_embedder.linear_1.*"),
        move("txt_in.c_embedder.linear_2.*", "context_embedder.time_text_embed.text_embedder.linear_2.*"),
        *under(
            "txt_in.individual_token_refiner.blocks.#",
            "context_embedder.token_refiner.refiner_blocks.#",
            move("norm1.*", "norm1.*"),
            move("norm2.*", "norm2.*"),
            move("self_attn_qkv.*", *_QKV),
            move("self_attn_proj.*", "attn.to_out.0.*"),
            move("mlp.fc1.*", "ff.net.0.proj.*"),
            move("mlp.fc2.*", "ff.net.2.*"),
            # Two gates, no scale and shift: nothing is swapped.
            move("adaLN_modulation.1.*", "norm_out.linear.*"),
        ),
        *under(
            _BLOCKS[0],
            _DOUBLE_FROM,
            *_stream("img", _QKV, "", "to_out.0", "ff", "norm1"),
            *_stream("txt", _ADDED_QKV, "added_", "to_add_out", "ff_context", "norm1_context"),
        ),
        *under(
            _BLOCKS[1],
            _SINGLE_FROM,
            move("modulation.linear.*", "norm.linear.*"),
            move("linear1.*", *_QKV, "proj_mlp.*"),
            move("linear2.*", "proj_out.*"),
            move("q_norm.*", "attn.norm_q.*"),
            move("k_norm.*", "attn.norm_k.*"),
        ),
    ),
    (*_BLOCKS, "txt_in.individual_token_refiner.blocks.#"),
)
