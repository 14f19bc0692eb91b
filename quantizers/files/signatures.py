"""Which tensors tell one model from all others, for every architecture that GGUF loaders know.

`architecture` is what stands as `general.architecture` in files that ComfyUI-GGUF loads (its `IMG_ARCH_LIST` and
`TXT_ARCH_LIST`, and the keys by which its converter knows models): FLUX.2 and Chroma go by `flux`, Z-Image by
`lumina2`, both Cosmos generations by `cosmos`. It loads no PixArt and no gemma or gemma2; PixArt has the name that
other tools give it, and gemma and gemma2 those of llama.cpp.

Names are without the prefix that a file may have. Models whose names are the same in diffusers and in ComfyUI
(HiDream, Qwen-Image) stand under "comfyui" only.
"""

from __future__ import annotations

from dataclasses import dataclass

IMAGE = "diffusion model"
TEXT = "text encoder"


@dataclass(frozen=True)
class Signature:
    """One model in one layout.

    Attributes:
        family: the model; `architecture` is its string in GGUF files.
        layout: "comfyui", "diffusers", "transformers" or "llama.cpp".
        names: tensors that must be there, with the number of their dimensions, 0 for any: some GGUF writers leave out
            leading dimensions of 1.
        absent: regular expressions over names that must not be there.
        sizes: (regular expression over names, axis, sizes of which one tensor must have one), where names cannot tell.
    """

    family: str
    architecture: str
    layout: str
    names: tuple[tuple[str, int], ...]
    absent: tuple[str, ...] = ()
    sizes: tuple[str, int, tuple[int, ...]] | None = None
    component: str = IMAGE


def _names(*names: str) -> tuple[tuple[str, int], ...]:
    """Matrices, or what is said behind a colon."""
    split = (name.partition(":") for name in names)
    return tuple((name, int(dimensions or 2)) for name, _, dimensions in split)


_NOT_FLUX1 = (
    r"^distilled_guidance_layer\.",
    r"^double_stream_modulation_img\.",
    r"^txt_in\.individual_token_refiner\.",
)
_PIXART_WIDTH = (1152,)  # Allegro and Sana have the same names and other widths
# Width of the text, and what SDXL has for its sizes and pooled text.
_UNETS = {
    "sd1": ((768, 1024), (), ()),
    "sdxl": ((2048, 1280), ("label_emb.0.0.weight",), ("add_embedding.linear_1.weight",)),
}
# The names of all UNets are the same; SD 1 and 2 differ from SDXL and its refiner in the width of the text.
UNET_CONTEXT = r"(^|\.)(input_blocks|down_blocks)\..*\.attn2\.to_k\.weight$"

COMFYUI = (
    Signature(
        "flux",
        "flux",
        "comfyui",
        _names("img_in.weight", "double_blocks.0.img_attn.qkv.weight", "txt_in.weight", "final_layer.linear.weight"),
        _NOT_FLUX1,
    ),
    Signature(
        "flux2",
        "flux",
        "comfyui",
        _names(
            "img_in.weight",
            "double_blocks.0.img_attn.qkv.weight",
            "double_stream_modulation_img.lin.weight",
            "final_layer.linear.weight",
        ),
    ),
    Signature(
        "chroma",
        "flux",
        "comfyui",
        _names("double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.in_proj.weight", "txt_in.weight"),
    ),
    *(
        Signature(
            "hyvid",
            "hyvid",
            "comfyui",
            _names(
                "txt_in.individual_token_refiner.blocks.0.norm1.weight:1",
                f"double_blocks.0.{qkv}.weight",
                "final_layer.linear.weight",
            ),
        )
        for qkv in ("img_attn_qkv", "img_attn.qkv")
    ),
    Signature(
        "sd3",
        "sd3",
        "comfyui",
        _names(
            "joint_blocks.0.context_block.attn.qkv.weight",
            "joint_blocks.0.x_block.attn.qkv.weight",
            "x_embedder.proj.weight:4",
            "final_layer.linear.weight",
        ),
    ),
    Signature(
        "aura",
        "aura",
        "comfyui",
        _names("double_layers.0.attn.w1q.weight", "cond_seq_linear.weight", "final_linear.weight"),
    ),
    Signature(
        "hidream",
        "hidream",
        "comfyui",
        _names(
            "caption_projection.0.linear.weight",
            "double_stream_blocks.0.block.ff_i.shared_experts.w3.weight",
            "final_layer.linear.weight",
        ),
    ),
    Signature(
        "cosmos1",
        "cosmos",
        "comfyui",
        _names("blocks.block0.blocks.0.block.attn.to_q.0.weight", "x_embedder.proj.1.weight"),
    ),
    Signature(
        "cosmos2",
        "cosmos",
        "comfyui",
        _names(
            "blocks.0.mlp.layer1.weight",
            "blocks.0.adaln_modulation_cross_attn.1.weight",
            "x_embedder.proj.1.weight",
        ),
    ),
    Signature(
        "ltxv",
        "ltxv",
        "comfyui",
        _names(
            "adaln_single.emb.timestep_embedder.linear_2.weight",
            "patchify_proj.weight",
            "transformer_blocks.0.scale_shift_table",
            "proj_out.weight",
        ),
    ),
    Signature(
        "wan",
        "wan",
        "comfyui",
        _names("blocks.0.self_attn.q.weight", "head.modulation:0", "text_embedding.0.weight", "head.head.weight"),
    ),
    Signature(
        "qwen_image",
        "qwen_image",
        "comfyui",
        _names(
            "transformer_blocks.0.img_mod.1.weight",
            "transformer_blocks.0.txt_mod.1.weight",
            "transformer_blocks.0.attn.add_q_proj.weight",
            "transformer_blocks.0.txt_mlp.net.2.weight",
            "txt_norm.weight:1",
            "img_in.weight",
            "norm_out.linear.weight",
        ),
    ),
    *(
        Signature(
            family,
            "lumina2",
            "comfyui",
            _names(
                f"noise_refiner.0.adaLN_modulation.{at}.weight",
                "context_refiner.0.attention.qkv.weight",
                "cap_embedder.1.weight",
                "x_embedder.weight",
            ),
        )
        for family, at in (("lumina2", 1), ("z-image", 0))
    ),
    Signature(
        "pixart",
        "pixart",
        "comfyui",
        _names("t_block.1.weight", "blocks.0.cross_attn.kv_linear.weight", "y_embedder.y_proj.fc1.weight"),
        sizes=(r"^t_block\.1\.weight$", 1, _PIXART_WIDTH),
    ),
    *(
        Signature(
            family,
            family,
            "comfyui",
            _names("input_blocks.0.0.weight:4", "time_embed.0.weight", "out.2.weight:4", *pooled),
            sizes=(UNET_CONTEXT, -1, widths),
        )
        for family, (widths, pooled, _) in _UNETS.items()
    ),
)

DIFFUSERS = (
    Signature(
        "flux",
        "flux",
        "diffusers",
        _names(
            "x_embedder.weight",
            "transformer_blocks.0.attn.add_q_proj.weight",
            "single_transformer_blocks.0.proj_mlp.weight",
            "time_text_embed.text_embedder.linear_1.weight",
            "norm_out.linear.weight",
            "proj_out.weight",
        ),
    ),
    Signature(
        "flux2",
        "flux",
        "diffusers",
        _names(
            "x_embedder.weight",
            "double_stream_modulation_img.linear.weight",
            "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight",
            "norm_out.linear.weight",
            "proj_out.weight",
        ),
    ),
    Signature(
        "chroma",
        "flux",
        "diffusers",
        _names(
            "x_embedder.weight",
            "distilled_guidance_layer.in_proj.weight",
            "single_transformer_blocks.0.proj_mlp.weight",
            "proj_out.weight",
        ),
    ),
    Signature(
        "hyvid",
        "hyvid",
        "diffusers",
        _names(
            "context_embedder.token_refiner.refiner_blocks.0.attn.to_q.weight",
            "single_transformer_blocks.0.proj_mlp.weight",
            "norm_out.linear.weight",
            "proj_out.weight",
        ),
    ),
    Signature(
        "sd3",
        "sd3",
        "diffusers",
        _names(
            "pos_embed.proj.weight:4",
            "transformer_blocks.0.attn.add_q_proj.weight",
            "transformer_blocks.0.norm1_context.linear.weight",
            "time_text_embed.text_embedder.linear_1.weight",
            "norm_out.linear.weight",
            "proj_out.weight",
        ),
        absent=(r"^single_transformer_blocks\.",),
    ),
    Signature(
        "aura",
        "aura",
        "diffusers",
        _names(
            "joint_transformer_blocks.0.attn.add_q_proj.weight",
            "register_tokens:0",
            "pos_embed.pos_embed:3",
            "norm_out.linear.weight",
            "proj_out.weight",
        ),
    ),
    Signature(
        "pixart",
        "pixart",
        "diffusers",
        _names(
            "pos_embed.proj.weight:4",
            "adaln_single.linear.weight",
            "transformer_blocks.0.attn2.to_k.weight",
            "caption_projection.linear_1.weight",
            "proj_out.weight",
        ),
        sizes=(r"^adaln_single\.linear\.weight$", 1, _PIXART_WIDTH),
    ),
    Signature(
        "lumina2",
        "lumina2",
        "diffusers",
        _names(
            "x_embedder.weight",
            "time_caption_embed.caption_embedder.1.weight",
            "noise_refiner.0.attn.to_q.weight",
            "norm_out.linear_2.weight",
        ),
        absent=(r"^ref_image_refiner\.",),  # OmniGen2
    ),
    Signature(
        "z-image",
        "lumina2",
        "diffusers",
        _names("all_x_embedder.2-1.weight", "noise_refiner.0.attention.to_q.weight", "cap_embedder.1.weight"),
    ),
    Signature(
        "wan",
        "wan",
        "diffusers",
        _names(
            "patch_embedding.weight:5",
            "blocks.0.attn1.to_q.weight",
            "condition_embedder.time_embedder.linear_1.weight",
            "proj_out.weight",
        ),
    ),
    Signature(
        "ltxv",
        "ltxv",
        "diffusers",
        _names(
            "proj_in.weight",
            "time_embed.emb.timestep_embedder.linear_1.weight",
            "transformer_blocks.0.scale_shift_table",
            "caption_projection.linear_1.weight",
            "proj_out.weight",
        ),
        absent=(r"^audio_proj_in\.",),
    ),
    *(
        Signature(
            family,
            "cosmos",
            "diffusers",
            (
                *_names(
                    "patch_embed.proj.weight",
                    "time_embed.t_embedder.linear_1.weight",
                    "transformer_blocks.0.norm1.linear_1.weight",
                    "norm_out.linear_2.weight",
                    "proj_out.weight",
                ),
                *learned,
            ),
            absent,
        )
        for family, learned, absent in (
            ("cosmos1", (("learnable_pos_embed.pos_emb_t", 2),), ()),
            ("cosmos2", (), (r"^learnable_pos_embed\.",)),
        )
    ),
    *(
        Signature(
            family,
            family,
            "diffusers",
            _names(
                "conv_in.weight:4",
                "time_embedding.linear_1.weight",
                "down_blocks.0.resnets.0.conv1.weight:4",
                "conv_out.weight:4",
                *pooled,
            ),
            sizes=(UNET_CONTEXT, -1, widths),
        )
        for family, (widths, _, pooled) in _UNETS.items()
    ),
)

# Text encoders: names without whatever stands before the first of them.
_VISUAL = r"(^|\.)visual\."
_Q, _UP = "layers.0.self_attn.q_proj.weight", "layers.0.mlp.up_proj.weight"
_QK_NORM, _FFN_NORM = "layers.0.self_attn.q_norm.weight:1", "layers.0.pre_feedforward_layernorm.weight:1"
_Q_BIAS = "layers.0.self_attn.q_proj.bias:1"
_NO_QK_NORM = r"(^|\.)layers\.0\.self_attn\.q_norm\."
_NO_FFN_NORM = r"(^|\.)layers\.0\.pre_feedforward_layernorm\."
_NO_Q_BIAS = r"(^|\.)layers\.0\.self_attn\.q_proj\.bias$"
_PLAIN = (
    ("blk.0.attn_q_norm.weight:1", False),
    ("blk.0.post_ffw_norm.weight:1", False),
    ("blk.0.attn_q.bias:1", False),
)
_T5 = "block.0.layer.0.SelfAttention.q.weight"


# Gemma 1 has the names of Llama, in both layouts.
_GEMMA1 = (r"^(embed_tokens|token_embd)\.weight$", 0, (256000,))


def _text(
    architecture: str,
    layout: str,
    *names: str,
    absent: tuple[str, ...] = (),
    sizes: tuple[str, int, tuple[int, ...]] | None = None,
) -> Signature:
    return Signature(architecture, architecture, layout, _names(*names), absent, sizes, TEXT)


TEXT_ENCODERS = (
    _text("t5", "transformers", f"encoder.{_T5}", "decoder.block.0.layer.0.SelfAttention.q.weight"),
    _text("t5encoder", "transformers", f"encoder.{_T5}", absent=(r"(^|\.)decoder\.block\.0\.",)),
    _text("qwen3vl", "transformers", _Q, _UP, _QK_NORM, "visual.patch_embed.proj.bias:1", absent=(_NO_FFN_NORM,)),
    _text("qwen3", "transformers", _Q, _UP, _QK_NORM, absent=(_NO_FFN_NORM, _VISUAL)),
    _text("qwen2vl", "transformers", _Q, _UP, _Q_BIAS, absent=(_NO_QK_NORM, _NO_FFN_NORM)),
    _text("gemma3", "transformers", _Q, _UP, _QK_NORM, _FFN_NORM),
    _text("gemma2", "transformers", _Q, _UP, _FFN_NORM, absent=(_NO_QK_NORM,)),
    _text("gemma", "transformers", _Q, _UP, absent=(_NO_QK_NORM, _NO_FFN_NORM, _NO_Q_BIAS), sizes=_GEMMA1),
    _text("llama", "transformers", _Q, _UP, absent=(_NO_QK_NORM, _NO_FFN_NORM, _NO_Q_BIAS)),
    _text("t5", "llama.cpp", "enc.blk.0.attn_q.weight", "dec.blk.0.attn_q.weight", "token_embd.weight"),
    _text("t5encoder", "llama.cpp", "enc.blk.0.attn_q.weight", "token_embd.weight", absent=(r"^dec\.",)),
    *(
        _text(
            architecture,
            "llama.cpp",
            *("blk.0.attn_q.weight", "blk.0.ffn_up.weight", "token_embd.weight"),
            *(has for has, there in marks if there),
            absent=tuple(rf"^{has.partition(':')[0]}$".replace(".", r"\.") for has, there in marks if not there),
            sizes=_GEMMA1 if architecture == "gemma" else None,
        )
        for architecture, marks in {
            "qwen3": (("blk.0.attn_q_norm.weight:1", True), ("blk.0.post_ffw_norm.weight:1", False)),
            "qwen2vl": (("blk.0.attn_q.bias:1", True), ("blk.0.attn_q_norm.weight:1", False)),
            "gemma3": (("blk.0.attn_q_norm.weight:1", True), ("blk.0.post_ffw_norm.weight:1", True)),
            "gemma2": (("blk.0.attn_q_norm.weight:1", False), ("blk.0.post_ffw_norm.weight:1", True)),
            "gemma": _PLAIN,
            "llama": _PLAIN,
        }.items()
    ),
)

SIGNATURES = (*COMFYUI, *DIFFUSERS, *TEXT_ENCODERS)

# What is no model to convert: (what it is, what to do, regular expressions of which one is enough). These come first:
# an adapter has names of the model that it is for.
ADAPTERS = (
    (
        "A LoRA, no model",
        "Load it with a LoRA loader, on top of the model; or merge it into the full-precision model and convert that.",
        (r"\.lora_(A|B|up|down|mid)(\.|$)", r"\.(lora_magnitude_vector|dora_scale)", r"\.(lokr|hada|oft|boft)_\w+$"),
    ),
    (
        "A ControlNet, no diffusion model",
        "Load it with a ControlNet loader; GGUF loaders read diffusion models and text encoders only.",
        (
            r"(^|\.)(controlnet_blocks|controlnet_single_blocks|controlnet_down_blocks|controlnet_cond_embedding)\.",
            r"(^|\.)(controlnet_x_embedder|input_hint_block|zero_convs|control_layers|control_model|lora_controlnet)(\.|$)",
        ),
    ),
)
# These are told only of what is no known model: a checkpoint may hold such parts beside one.
OTHERS = (
    (
        "A VAE, no diffusion model",
        "Keep it as it is: a VAE is small, and GGUF loaders read diffusion models and text encoders only.",
        (
            r"(^|\.)(decoder|encoder)\.(conv_in|conv1|conv_out|middle|up_blocks|down_blocks|up|down)\.",
            r"^(first_stage_model|vae|taesd_decoder|taesd_encoder)\.",
            r"^(decoder|encoder)\.layers\.0\.weight$",
        ),
    ),
    (
        "A CLIP text encoder, which GGUF files are not made of",
        "Keep it as it is: GGUF loaders have no architecture for it, and it is small.",
        (
            r"(^|\.)text_model\.encoder\.layers\.0\.",
            r"(^|\.)transformer\.resblocks\.0\.",
            r"(^|\.)token_embedding\.weight$",
        ),
    ),
    (
        "An image encoder, no diffusion model",
        "Keep it as it is: GGUF loaders read diffusion models and text encoders only.",
        (r"(^|\.)vision_model\.encoder\.layers\.0\.", r"(^|\.)embeddings\.patch_embedding\.", r"^v\.blk\.0\."),
    ),
    (
        "LTX-2 in diffusers' layout cannot be converted",
        "It lacks the text connectors, which diffusers keeps elsewhere. Use the single-file checkpoint.",
        (r"^av_cross_attn_",),
    ),
    (
        "HunyuanVideo 1.5 in diffusers' layout cannot be converted",
        "Use the single-file checkpoint in ComfyUI's layout.",
        (r"^context_embedder_2\.",),
    ),
    (
        "Wan-Animate 2 in diffusers' layout cannot be converted",
        "Use the single-file checkpoint in ComfyUI's layout.",
        (r"^blocks\.0\.self_attn\.to_q\.weight$",),
    ),
)
