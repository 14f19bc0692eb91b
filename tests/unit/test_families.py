"""Families: recognised from real models of diffusers and transformers on the meta device, and from ComfyUI's names.

ComfyUI's names and shapes are those of its models (comfy/ldm, comfy/text_encoders) made on the meta device; it is no
package that a test could import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from quantwire.quantizers.apply import slots_of
from quantwire.quantizers.families import FAMILIES, LARGE_NBYTES, UNKNOWN, find_family, in_first_block
from quantwire.quantizers.plan import Action, QuantPlan, Slot, make_plan
from quantwire.quantizers.registry import get_quantizer
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import TensorMeta

# Family, and what of each model stays, by name, as (layer, reason); everything else that is linear is quantized.
COMFYUI: dict[str, tuple[str, dict[str, tuple[int, ...]], dict[str, str]]] = {
    "flux": (
        "flux",
        {
            "img_in": (64, 64),
            "txt_in": (64, 64),
            "time_in.in_layer": (64, 64),
            "vector_in.out_layer": (64, 64),
            "guidance_in.in_layer": (64, 64),
            "double_blocks.0.img_mod.lin": (64, 64),
            "double_blocks.0.txt_mod.lin": (64, 64),
            "double_blocks.0.img_attn.qkv": (64, 64),
            "double_blocks.0.txt_mlp.2": (64, 64),
            "single_blocks.7.linear1": (64, 64),
            "single_blocks.7.modulation.lin": (64, 64),
            "final_layer.linear": (64, 64),
            "final_layer.adaLN_modulation.1": (64, 64),
        },
        {
            "img_in": "input projection",
            "txt_in": "input projection",
            "time_in.in_layer": "timestep and guidance embedder",
            "vector_in.out_layer": "timestep and guidance embedder",
            "guidance_in.in_layer": "timestep and guidance embedder",
            "double_blocks.0.img_mod.lin": "modulation",
            "double_blocks.0.txt_mod.lin": "modulation",
            "single_blocks.7.modulation.lin": "modulation",
            "final_layer.linear": "final layer",
            "final_layer.adaLN_modulation.1": "final layer",
        },
    ),
    "sd3": (
        "sd3",
        {
            "x_embedder.proj": (64, 64),
            "t_embedder.mlp.0": (64, 64),
            "y_embedder.mlp.2": (64, 64),
            "context_embedder": (64, 64),
            "joint_blocks.0.context_block.attn.qkv": (64, 64),
            "joint_blocks.0.x_block.mlp.fc1": (64, 64),
            "joint_blocks.0.x_block.adaLN_modulation.1": (64, 64),
            "final_layer.linear": (64, 64),
        },
        {
            "x_embedder.proj": "input projection",
            "t_embedder.mlp.0": "timestep and text embedder",
            "y_embedder.mlp.2": "timestep and text embedder",
            "context_embedder": "input projection",
            "joint_blocks.0.x_block.adaLN_modulation.1": "modulation",
            "final_layer.linear": "final layer",
        },
    ),
    "sdxl": (
        "sdxl",
        {
            "time_embed.0": (64, 64),
            "label_emb.0.0": (64, 64),
            "input_blocks.4.0.emb_layers.1": (64, 64),
            "input_blocks.4.1.proj_in": (64, 64),
            "input_blocks.4.1.transformer_blocks.0.attn2.to_k": (64, 2048),
            "input_blocks.4.1.proj_out": (64, 64),
        },
        {
            "time_embed.0": "timestep and label embedder",
            "label_emb.0.0": "timestep and label embedder",
            "input_blocks.4.0.emb_layers.1": "timestep into a block",
        },
    ),
    "sd15": (
        "sd1.5",
        {
            "time_embed.2": (64, 64),
            "input_blocks.1.1.transformer_blocks.0.attn2.to_k": (64, 768),
            "middle_block.1.transformer_blocks.0.ff.net.2": (64, 64),
        },
        {"time_embed.2": "timestep and label embedder"},
    ),
    "wan": (
        "wan",
        {
            "text_embedding.0": (64, 64),
            "time_embedding.2": (64, 64),
            "time_projection.1": (64, 64),
            "img_emb.proj.1": (64, 64),
            "blocks.0.self_attn.q": (64, 64),
            "blocks.0.cross_attn.k_img": (64, 64),
            "blocks.0.ffn.2": (64, 64),
            "head.head": (64, 64),
        },
        {
            "text_embedding.0": "text, image and timestep embedder",
            "time_embedding.2": "timestep embedder",
            "time_projection.1": "timestep embedder",
            "img_emb.proj.1": "text, image and timestep embedder",
            "head.head": "final layer",
        },
    ),
    "lumina2": (
        "lumina2",
        {
            "x_embedder": (64, 64),
            "cap_embedder.1": (64, 64),
            "noise_refiner.0.attention.qkv": (64, 64),
            "noise_refiner.0.adaLN_modulation.1": (64, 64),
            "layers.0.feed_forward.w1": (64, 64),
            "final_layer.linear": (64, 64),
        },
        {
            "x_embedder": "input projection",
            "cap_embedder.1": "timestep and caption embedder",
            "noise_refiner.0.adaLN_modulation.1": "modulation",
            "final_layer.linear": "final layer",
        },
    ),
    "z-image": (
        "z-image",
        {
            "x_embedder": (64, 64),
            "t_embedder.mlp.0": (64, 64),
            "noise_refiner.0.adaLN_modulation.0": (64, 64),
            "layers.0.attention.qkv": (64, 64),
        },
        {
            "x_embedder": "input projection",
            "t_embedder.mlp.0": "timestep and caption embedder",
            "noise_refiner.0.adaLN_modulation.0": "modulation",
        },
    ),
    "ace-step-1": (
        "ace-step",
        {
            "transformer_blocks.0.attn.to_q": (64, 64),
            "timestep_embedder.linear_1": (64, 64),
            "t_block.1": (64, 64),
            "speaker_embedder": (64, 64),
            "genre_embedder": (64, 64),
            "lyric_encoder.embed.out.0": (64, 64),
            "lyric_encoder.encoders.0.self_attn.linear_q": (64, 64),
            "lyric_proj": (64, 64),
            "final_layer.linear": (64, 64),
        },
        {
            "timestep_embedder.linear_1": "timestep embedder",
            "t_block.1": "timestep embedder",
            "speaker_embedder": "condition embedder",
            "genre_embedder": "condition embedder",
            "lyric_encoder.embed.out.0": "condition embedder",
            "lyric_proj": "condition embedder",
            "final_layer.linear": "final layer",
        },
    ),
    "ace-step-1.5": (
        "ace-step",
        {
            "decoder.time_embed.linear_1": (64, 64),
            "decoder.time_embed_r.linear_1": (64, 64),
            "decoder.condition_embedder": (64, 64),
            "decoder.layers.0.self_attn.q_proj": (64, 64),
            "decoder.layers.0.mlp.gate_proj": (64, 64),
            "tokenizer.audio_acoustic_proj": (64, 64),
            "detokenizer.proj_out": (64, 64),
        },
        {
            "decoder.time_embed.linear_1": "timestep embedder",
            "decoder.time_embed_r.linear_1": "timestep embedder",
            "decoder.condition_embedder": "condition embedder",
            "tokenizer.audio_acoustic_proj": "input projection",
            "detokenizer.proj_out": "final layer",
        },
    ),
    "stable-audio": (
        "stable-audio",
        {
            "to_timestep_embed.0": (64, 64),
            "to_cond_embed.0": (64, 64),
            "transformer.project_in": (64, 64),
            "transformer.layers.0.self_attn.to_qkv": (64, 64),
            "transformer.project_out": (64, 64),
        },
        {
            "to_timestep_embed.0": "timestep embedder",
            "to_cond_embed.0": "condition embedder",
            "transformer.project_in": "input projection",
            "transformer.project_out": "final layer",
        },
    ),
    "hyvid": (
        "hyvid",
        {
            "img_in.proj": (64, 64),
            "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": (64, 64),
            "time_in.mlp.0": (64, 64),
            "guidance_in.mlp.2": (64, 64),
            "double_blocks.0.img_attn_qkv": (64, 64),
            "double_blocks.0.img_mod.linear": (64, 64),
            "double_blocks.0.txt_mlp.fc1": (64, 64),
            "single_blocks.0.linear1": (64, 64),
            "single_blocks.0.modulation.linear": (64, 64),
            "final_layer.linear": (64, 64),
        },
        {
            "img_in.proj": "input projection",
            "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": "text and image embedder",
            "time_in.mlp.0": "timestep and guidance embedder",
            "guidance_in.mlp.2": "timestep and guidance embedder",
            "double_blocks.0.img_mod.linear": "modulation",
            "single_blocks.0.modulation.linear": "modulation",
            "final_layer.linear": "final layer",
        },
    ),
    "aura": (
        "aura",
        {
            "init_x_linear": (64, 64),
            "cond_seq_linear": (64, 64),
            "t_embedder.mlp.0": (64, 64),
            "double_layers.0.attn.w1q": (64, 64),
            "double_layers.0.mlpX.c_fc1": (64, 64),
            "double_layers.0.modX.1": (64, 64),
            "double_layers.0.modC.1": (64, 64),
            "single_layers.0.modCX.1": (64, 64),
            "modF.1": (64, 64),
            "final_linear": (64, 64),
        },
        {
            "init_x_linear": "input projection",
            "cond_seq_linear": "input projection",
            "t_embedder.mlp.0": "timestep embedder",
            "double_layers.0.modX.1": "modulation",
            "double_layers.0.modC.1": "modulation",
            "single_layers.0.modCX.1": "modulation",
            "modF.1": "final layer",
            "final_linear": "final layer",
        },
    ),
    "hidream": (
        "hidream",
        {
            "x_embedder.proj": (64, 64),
            "caption_projection.0.linear": (64, 64),
            "t_embedder.timestep_embedder.linear_1": (64, 64),
            "p_embedder.pooled_embedder.linear_1": (64, 64),
            "double_stream_blocks.0.block.attn1.to_q_t": (64, 64),
            "double_stream_blocks.0.block.ff_i.gate": (4, 64),
            "double_stream_blocks.0.block.ff_i.experts.3.w1": (64, 64),
            "double_stream_blocks.0.block.adaLN_modulation.1": (64, 64),
            "final_layer.linear": (64, 64),
        },
        {
            "x_embedder.proj": "input projection",
            "caption_projection.0.linear": "input projection",
            "t_embedder.timestep_embedder.linear_1": "timestep and text embedder",
            "p_embedder.pooled_embedder.linear_1": "timestep and text embedder",
            "double_stream_blocks.0.block.ff_i.gate": "router of the experts",
            "double_stream_blocks.0.block.adaLN_modulation.1": "modulation",
            "final_layer.linear": "final layer",
        },
    ),
    "cosmos-predict2": (
        "cosmos",
        {
            "x_embedder.proj.1": (64, 64),
            "t_embedder.1.linear_1": (64, 64),
            "blocks.0.self_attn.q_proj": (64, 64),
            "blocks.0.mlp.layer1": (64, 64),
            "blocks.0.adaln_modulation_cross_attn.1": (64, 64),
            "final_layer.linear": (64, 64),
        },
        {
            "x_embedder.proj.1": "input projection",
            "t_embedder.1.linear_1": "timestep embedder",
            "blocks.0.adaln_modulation_cross_attn.1": "modulation",
            "final_layer.linear": "final layer",
        },
    ),
    "cosmos1": (
        "cosmos",
        {
            "x_embedder.proj.1": (64, 64),
            "t_embedder.1.linear_1": (64, 64),
            "blocks.block0.blocks.0.block.attn.to_q.0": (64, 64),
            "blocks.block0.blocks.2.block.layer1": (64, 64),
            "blocks.block0.blocks.0.adaLN_modulation.1": (64, 64),
            "final_layer.adaLN_modulation.1": (64, 64),
        },
        {
            "x_embedder.proj.1": "input projection",
            "t_embedder.1.linear_1": "timestep embedder",
            "blocks.block0.blocks.0.adaLN_modulation.1": "modulation",
            "final_layer.adaLN_modulation.1": "final layer",
        },
    ),
    "ltxv": (
        "ltxv",
        {
            "patchify_proj": (64, 64),
            "adaln_single.linear": (64, 64),
            "caption_projection.linear_1": (64, 64),
            "transformer_blocks.0.attn1.to_q": (64, 64),
            "transformer_blocks.0.ff.net.0.proj": (64, 64),
            "proj_out": (64, 64),
        },
        {
            "patchify_proj": "input projection",
            "adaln_single.linear": "timestep embedder",
            "caption_projection.linear_1": "text embedder",
            "proj_out": "final layer",
        },
    ),
    "pixart": (
        "pixart",
        {
            "x_embedder.proj": (64, 64),
            "y_embedder.y_proj.fc1": (64, 64),
            "t_block.1": (64, 64),
            "blocks.0.attn.qkv": (64, 64),
            "blocks.0.cross_attn.kv_linear": (64, 64),
            "final_layer.linear": (64, 64),
        },
        {
            "x_embedder.proj": "input projection",
            "y_embedder.y_proj.fc1": "input projection",
            "t_block.1": "timestep embedder",
            "final_layer.linear": "final layer",
        },
    ),
    "t5": (
        "t5",
        {
            "transformer.encoder.block.0.layer.0.SelfAttention.q": (64, 64),
            "transformer.encoder.block.0.layer.1.DenseReluDense.wi_0": (64, 64),
            "transformer.encoder.block.0.layer.1.DenseReluDense.wo": (64, 64),
        },
        {"transformer.encoder.block.0.layer.1.DenseReluDense.wo": "wo (its products exceed float16)"},
    ),
    "clip": (
        "clip",
        {
            "transformer.text_model.encoder.layers.0.self_attn.q_proj": (64, 64),
            "transformer.text_model.encoder.layers.0.mlp.fc1": (64, 64),
            "transformer.text_projection": (64, 64),
        },
        {"transformer.text_projection": "projection of the pooled vector"},
    ),
    "qwen2.5-vl": (
        "qwen-vl",
        {
            "transformer.model.layers.0.self_attn.q_proj": (64, 64),
            "transformer.model.layers.0.mlp.down_proj": (64, 64),
            "transformer.visual.blocks.0.attn.qkv": (64, 64),
            "transformer.visual.blocks.0.mlp.down_proj": (64, 3420),
            "transformer.visual.merger.mlp.0": (64, 64),
        },
        dict.fromkeys(
            (
                "transformer.visual.blocks.0.attn.qkv",
                "transformer.visual.blocks.0.mlp.down_proj",
                "transformer.visual.merger.mlp.0",
            ),
            "vision tower (only image prompts pass it)",
        ),
    ),
    "qwen3": (
        "llm",
        {
            "transformer.model.layers.0.self_attn.q_proj": (64, 64),
            "transformer.model.layers.0.mlp.gate_proj": (64, 64),
            "transformer.lm_head": (64, 64),
        },
        {"transformer.lm_head": "final layer"},
    ),
}


def plan(slots: list[Slot], **patterns: Any) -> QuantPlan:
    return make_plan(slots, QuantSpec("bnb-nf4", **patterns), get_quantizer("bnb-nf4"))


def slot(name: str, shape: tuple[int, ...] = (64, 64), dtype: torch.dtype = torch.bfloat16) -> Slot:
    return Slot(TensorMeta(f"{name}.weight", shape, dtype), linear=True)


def kept(made: QuantPlan) -> dict[str, str]:
    found = {d.meta.name.removesuffix(".weight"): d for d in made.decisions if d.action is Action.KEEP}
    return {name: d.reason for name, d in found.items() if d.reason != "not a linear weight"}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("name", COMFYUI)
def test_comfyui_models(name: str, prefix: str) -> None:
    family, layers, stays = COMFYUI[name]
    made = plan([slot(prefix + layer, shape) for layer, shape in layers.items()])
    assert made.family == family
    assert kept(made) == {prefix + layer: f"{family}: {reason}" for layer, reason in stays.items()}


def diffusers_models() -> dict[str, tuple[str, Callable[[], torch.nn.Module]]]:
    """Family, and the model with its default config, which is that of a published one; depths are cut."""
    import diffusers as d
    import transformers as t

    sdxl: dict[str, Any] = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640),
        "cross_attention_dim": 2048,
    }
    hidream: dict[str, Any] = {
        **{"patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 2, "num_single_layers": 2},
        **{
            "num_attention_heads": 20,
            "attention_head_dim": 128,
            "caption_channels": [4096, 4096],
            "text_emb_dim": 2048,
        },
        **{"num_routed_experts": 4, "num_activated_experts": 2, "axes_dims_rope": (64, 32, 32)},
        **{"max_resolution": (128, 128), "llama_layers": [0, 1]},
    }
    return {
        "flux": ("flux", lambda: d.FluxTransformer2DModel(num_layers=2, num_single_layers=2)),
        "flux2": ("flux", lambda: d.Flux2Transformer2DModel(num_layers=1, num_single_layers=1)),
        "sd3": ("sd3", lambda: d.SD3Transformer2DModel(num_layers=2)),
        "wan": ("wan", lambda: d.WanTransformer3DModel(num_layers=2, image_dim=1280)),
        "qwen-image": ("qwen-image", lambda: d.QwenImageTransformer2DModel(num_layers=2)),
        "lumina2": ("lumina2", lambda: d.Lumina2Transformer2DModel(num_layers=2)),
        "z-image": ("z-image", lambda: d.ZImageTransformer2DModel(n_layers=2)),
        "sdxl": ("sdxl", lambda: d.UNet2DConditionModel(**sdxl)),
        "sd1.5": ("sd1.5", lambda: d.UNet2DConditionModel(cross_attention_dim=768)),
        "ace-step": ("ace-step", lambda: d.AceStepTransformer1DModel(num_hidden_layers=2)),
        "stable-audio": ("stable-audio", lambda: d.StableAudioDiTModel(num_layers=2)),
        "t5": ("t5", lambda: t.T5EncoderModel(t.T5Config(num_layers=2, feed_forward_proj="gated-gelu"))),
        "umt5": ("t5", lambda: t.UMT5EncoderModel(t.UMT5Config(num_layers=2))),
        "clip": ("clip", lambda: t.CLIPTextModelWithProjection(t.CLIPTextConfig(num_hidden_layers=2))),
        "qwen2.5-vl": ("qwen-vl", lambda: t.Qwen2_5_VLForConditionalGeneration(t.Qwen2_5_VLConfig())),
        "qwen3": ("llm", lambda: t.Qwen3Model(t.Qwen3Config(num_hidden_layers=2))),
        "aura": ("aura", lambda: d.AuraFlowTransformer2DModel(num_mmdit_layers=2, num_single_dit_layers=2)),
        "hidream": ("hidream", lambda: d.HiDreamImageTransformer2DModel(**hidream)),
        "cosmos": ("cosmos", lambda: d.CosmosTransformer3DModel(num_layers=2)),
        "ltxv": ("ltxv", lambda: d.LTXVideoTransformer3DModel(num_layers=2)),
        "ltx2": ("ltxv", lambda: d.LTX2VideoTransformer3DModel(num_layers=2)),
        "hyvid": ("hyvid", lambda: d.HunyuanVideoTransformer3DModel(num_layers=2, num_single_layers=4)),
        "hyvid1.5": ("hyvid", lambda: d.HunyuanVideo15Transformer3DModel(num_layers=8)),
        "pixart": ("pixart", lambda: d.PixArtTransformer2DModel(num_layers=8, caption_channels=4096)),
        "none": ("", lambda: d.MochiTransformer3DModel(num_layers=2)),
    }


@pytest.mark.parametrize("name", [*dict.fromkeys(n for n in (
    "flux", "flux2", "sd3", "wan", "qwen-image", "lumina2", "z-image", "sdxl", "sd1.5", "ace-step", "stable-audio",
    "aura", "hidream", "cosmos", "ltxv", "ltx2", "hyvid", "hyvid1.5", "pixart",
    "t5", "umt5", "clip", "qwen2.5-vl", "qwen3", "none",
))])  # fmt: skip
def test_models_of_diffusers_and_transformers(name: str) -> None:
    from accelerate import init_empty_weights

    family, make = diffusers_models()[name]
    with init_empty_weights():
        model = make()
    made = plan(slots_of(model))
    assert made.family == family
    stays = kept(made)
    assert stays or name == "qwen3"  # its lm_head is not part of the encoder
    # What the libraries keep in float32 stays.
    strict = getattr(model, "_keep_in_fp32_modules", None) or ()
    for decision in made.to_quantize:
        assert not set(decision.meta.name.split(".")) & set(strict), decision.meta.name
    # No block layer is lost: attention and MLP are most of every model.
    quantized = sum(d.meta.numel for d in made.to_quantize)
    linear = quantized + sum(d.meta.numel for d in made.decisions if d.meta.name.removesuffix(".weight") in stays)
    wo = name in ("t5", "umt5", "qwen2.5-vl")  # T5's wo and the vision tower are kept whatever they cost
    assert quantized / linear > (0.6 if wo else 0.5)


def test_modulation_stays_while_it_is_small() -> None:
    """FLUX.1's own size, in its own names: 27 % of it are modulation, 6 GiB."""
    small, large = (
        [
            slot("txt_in"),
            slot("double_blocks.0.img_attn.qkv"),
            *(slot(f"double_blocks.{i}.img_mod.lin", s) for i in range(4)),
        ]
        for s in ((4096, 16384), (4096, 16385))
    )
    assert LARGE_NBYTES == 4 * 4096 * 16384 * 2
    assert len([n for n in kept(plan(small)) if "img_mod" in n]) == 4
    assert plan(small).notes == ()
    assert [n for n in kept(plan(large)) if "img_mod" in n] == ["double_blocks.0.img_mod.lin"]
    (note,) = plan(large).notes
    assert note.startswith("modulation layers take 0.5 GiB of this model, so they are quantized too")
    again = plan(large, exclude=("img_mod",))
    assert len([n for n in kept(again) if "img_mod" in n]) == 4, "the user's pattern wins"
    assert again.notes == ()


def test_wo_in_float16_is_a_note() -> None:
    names = ("encoder.block.0.layer.0.SelfAttention.q", "encoder.block.0.layer.1.DenseReluDense.wo")
    (note,) = plan([slot(n, dtype=torch.float16) for n in names]).notes
    assert note.startswith("'encoder.block.0.layer.1.DenseReluDense.wo' is float16")
    assert plan([slot(n) for n in names]).notes == ()
    assert [d.meta.name for d in plan([slot(n) for n in names], include=("wo",)).to_quantize][1].endswith("wo.weight")


@pytest.mark.parametrize("block", ["double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn_qkv"])
def test_hunyuan_video_is_not_flux(block: str) -> None:
    """Its blocks have the names of FLUX's; of the original file the attention is called otherwise than in ComfyUI."""
    names = [block, "txt_in.individual_token_refiner.blocks.0.mlp.0", "final_layer.linear"]
    assert find_family(slot(n).meta for n in names).name == "hyvid"


def test_family_names_are_unique_and_every_entry_has_a_reason() -> None:
    names = [f.name for f in FAMILIES]
    assert len(names) == len(set(names))
    assert all(k.reason for f in (*FAMILIES, UNKNOWN) for k in f.keep)


@pytest.mark.parametrize(
    ("layer", "first"),
    [("blocks.0.mod.1", True), ("blocks.1.mod.0", False), ("norm", True), ("joint_blocks.10.mod", False)],
)
def test_first_block(layer: str, first: bool) -> None:
    assert in_first_block(layer) is first
