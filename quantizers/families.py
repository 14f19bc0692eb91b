r"""Model families: how to recognise one from its tensors, and which of its linear layers stay at full precision.

A family is found by tensor names that only it has, in ComfyUI's layout or in that of diffusers and transformers; the
names were read off both code bases, as were those of the layers to keep. Of each model these stay: what turns the
input, the text and the timestep into the hidden width and what turns it back (under 1 % of the weights, and everything
passes through them), norms, and what the libraries themselves keep in float32 (`_keep_in_fp32_modules`,
`_skip_layerwise_casting_patterns`).

Modulation layers (adaLN) are another matter: they are 27 % of FLUX.1, 33 % of SD3.5 large and of Qwen-Image, and 2 % of
Z-Image. Keeping them where they are large would take more memory than the quantized rest, so they stay where all of
them together take at most `LARGE_NBYTES`, and else in the first blocks only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .weight import TensorMeta

LARGE_NBYTES = 512 * 1024 * 1024
# What may stand before the names of a whole model: ComfyUI's, diffusers' and checkpoint prefixes.
_TOP = r"^((model|diffusion_model|transformer|control_model)\.)*"
_FIRST_NUMBER = re.compile(r"\.(\d+)(\.|$)")


@dataclass(frozen=True)
class Keep:
    """Layers to keep.

    Attributes:
        pattern: regular expression over the layer name.
        reason: a few words.
        unless_large: quantized, except in the first blocks, where together they take more than `LARGE_NBYTES`.
        not_float16: needs bfloat16 or float32; transformers' T5 has `_keep_in_fp32_modules = ["wo"]`.
    """

    pattern: str
    reason: str
    unless_large: bool = False
    not_float16: bool = False


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: as it stands in plans and reports.
        signatures: groups of regular expressions over tensor names; one group, all of it, must be found.
        keep: what stays, first match counts.
        absent: regular expressions that must not be found.
        width: (tensor name pattern, values of its last axis), where names alone cannot tell.
    """

    name: str
    signatures: tuple[tuple[str, ...], ...]
    keep: tuple[Keep, ...]
    absent: tuple[str, ...] = ()
    width: tuple[str, tuple[int, ...]] | None = field(default=None)


def _parts(*names: str) -> str:
    """A pattern for dotted parts of a name; each may be a regular expression."""
    return rf"(^|\.)({'|'.join(names)})(\.|$)"


def _top(*names: str) -> str:
    """The same at the top of the model: blocks may have a `proj_out` of their own."""
    return rf"{_TOP}({'|'.join(names)})(\.|$)"


_FINAL = Keep(_top("proj_out", "final_layer", "norm_out"), "final layer")
_UNET = (
    Keep(_parts("time_embed", "label_emb", "time_embedding", "add_embedding"), "timestep and label embedder"),
    Keep(_parts("emb_layers", "time_emb_proj"), "timestep into a block", unless_large=True),
    Keep(_parts("class_embedding", "controlnet_cond_embedding"), "embedder"),
)
_UNET_SIGNATURES = (
    (r"(^|\.)input_blocks\.\d+\.1\.transformer_blocks\.0\.attn2\.to_k\.weight$",),
    (r"(^|\.)down_blocks\.\d+\.attentions\.0\.transformer_blocks\.0\.attn2\.to_k\.weight$",),
)
_UNET_CONTEXT = r"(input_blocks|down_blocks)\..*attn2\.to_k\.weight$"
_LLM_KEEP = (
    Keep(_parts("embed_tokens", r"\w*embedding"), "embedding"),
    Keep(_parts(r"\w*norm\w*"), "norm"),
    Keep(_parts("lm_head"), "final layer"),
)
_LLM_LAYER = r"(^|\.)layers\.0\.self_attn\.q_proj\.weight$"

FAMILIES: tuple[Family, ...] = (
    Family(
        "flux",
        (
            (r"(^|\.)double_blocks\.0\.img_attn\.qkv\.weight$", r"(^|\.)(txt_in|time_in|final_layer)\."),
            (r"(^|\.)single_transformer_blocks\.0\.(proj_mlp|attn\.to_qkv_mlp_proj)\.weight$",),
            # A ControlNet need not have single blocks.
            (r"(^|\.)controlnet_x_embedder\.weight$", r"(^|\.)transformer_blocks\.0\.attn\.add_q_proj\.weight$"),
        ),
        (
            _FINAL,
            Keep(
                _parts(
                    "img_in", "txt_in", "x_embedder", "context_embedder", "pos_embed_input", r"controlnet_\w*embedder"
                ),
                "input projection",
            ),
            Keep(
                _parts("time_in", "vector_in", "guidance_in", "time_text_embed", "time_guidance_embed"),
                "timestep and guidance embedder",
            ),
            Keep(_parts("distilled_guidance_layer"), "guidance, in place of modulation"),
            Keep(_parts(r"(double|single)_stream_modulation\w*"), "modulation, one for all blocks"),
            Keep(_parts("img_mod", "txt_mod", "modulation", r"norm\d?(_context)?"), "modulation", unless_large=True),
        ),
        absent=(r"(^|\.)(individual_token_refiner|context_embedder\.token_refiner)\.",),  # HunyuanVideo: same blocks
    ),
    Family(
        "sd3",
        (
            (r"(^|\.)joint_blocks\.0\.context_block\.attn\.qkv\.weight$",),
            (
                r"(^|\.)transformer_blocks\.0\.norm1_context\.linear\.weight$",
                r"(^|\.)pos_embed\.proj\.weight$",
                r"(^|\.)time_text_embed\.",
            ),
        ),
        (
            _FINAL,
            Keep(_parts("x_embedder", "context_embedder", r"pos_embed\w*"), "input projection"),
            Keep(_parts("t_embedder", "y_embedder", "time_text_embed"), "timestep and text embedder"),
            Keep(_parts("adaLN_modulation", r"norm\d?(_context)?"), "modulation", unless_large=True),
        ),
        absent=(r"(^|\.)single_transformer_blocks\.",),
    ),
    Family("sdxl", _UNET_SIGNATURES, _UNET, width=(_UNET_CONTEXT, (2048, 1280))),
    Family("sd1.5", _UNET_SIGNATURES, _UNET, width=(_UNET_CONTEXT, (768, 1024))),
    Family(
        "wan",
        (
            (r"(^|\.)blocks\.0\.self_attn\.q\.weight$", r"(^|\.)(head\.head|text_embedding\.0)\.weight$"),
            (r"(^|\.)blocks\.0\.attn1\.to_q\.weight$", r"(^|\.)condition_embedder\.time_proj\.weight$"),
        ),
        (
            Keep(_top("head", "proj_out", "norm_out"), "final layer"),
            Keep(_parts(r"\w*patch_embedding"), "input projection"),
            Keep(_parts("text_embedding", "img_emb", "condition_embedder"), "text, image and timestep embedder"),
            Keep(_parts("time_embedding", "time_projection"), "timestep embedder"),
        ),
    ),
    Family(
        "qwen-image",
        (
            (
                r"(^|\.)transformer_blocks\.0\.img_mod\.1\.weight$",
                r"(^|\.)transformer_blocks\.0\.attn\.add_q_proj\.weight$",
            ),
        ),
        (
            _FINAL,
            Keep(_parts("img_in", "txt_in", "txt_norm", r"controlnet_\w*embedder"), "input projection"),
            Keep(_parts("time_text_embed"), "timestep embedder"),
            Keep(_parts("img_mod", "txt_mod"), "modulation", unless_large=True),
        ),
    ),
    *(
        Family(
            name,
            signatures,
            (
                Keep(_top("final_layer", "all_final_layer", "norm_out"), "final layer"),
                Keep(_parts("x_embedder", "all_x_embedder"), "input projection"),
                Keep(
                    _parts(
                        "t_embedder", "cap_embedder", "time_caption_embed", "siglip_embedder", "clip_text_pooled_proj"
                    ),
                    "timestep and caption embedder",
                ),
                Keep(_parts("adaLN_modulation", r"norm\d"), "modulation", unless_large=True),
            ),
        )
        for name, signatures in {
            "z-image": ((r"(^|\.)noise_refiner\.0\.adaLN_modulation\.0\.weight$", r"(^|\.)(all_)?x_embedder\."),),
            "lumina2": (
                (r"(^|\.)noise_refiner\.0\.adaLN_modulation\.1\.weight$", r"(^|\.)x_embedder\."),
                (r"(^|\.)noise_refiner\.0\.norm1\.linear\.weight$", r"(^|\.)time_caption_embed\."),
            ),
        }.items()
    ),
    Family(
        "hyvid",
        (
            (
                r"(^|\.)individual_token_refiner\.",
                r"(^|\.)double_blocks\.0\.img_attn(_qkv|\.qkv)\.weight$",
            ),
            (
                r"(^|\.)context_embedder\.token_refiner\.",
                r"(^|\.)transformer_blocks\.0\.attn\.add_q_proj\.weight$",
            ),
        ),
        (
            _FINAL,
            Keep(_parts("img_in", "x_embedder"), "input projection"),
            Keep(
                _parts(
                    "txt_in", r"context_embedder(_\d)?", "byt5_in", "vision_in", "image_embedder", r"cond_type_embed\w*"
                ),
                "text and image embedder",
            ),
            Keep(
                _parts("time_in", "time_r_in", "vector_in", "guidance_in", "time_text_embed", "time_embed"),
                "timestep and guidance embedder",
            ),
            Keep(_parts("img_mod", "txt_mod", "modulation", r"norm\d?(_context)?"), "modulation", unless_large=True),
        ),
    ),
    Family(
        "aura",
        (
            (r"(^|\.)double_layers\.0\.attn\.w1q\.weight$", r"(^|\.)cond_seq_linear\.weight$"),
            (r"(^|\.)joint_transformer_blocks\.0\.attn\.add_q_proj\.weight$", r"(^|\.)time_step_proj\."),
        ),
        (
            Keep(_top("final_linear", "modF", "proj_out", "norm_out"), "final layer"),
            Keep(_parts("init_x_linear", "cond_seq_linear", "context_embedder", r"pos_embed\w*"), "input projection"),
            Keep(_parts("t_embedder", "time_step_proj"), "timestep embedder"),
            Keep(_parts("modX", "modC", "modCX", r"norm\d(_context)?"), "modulation", unless_large=True),
        ),
    ),
    Family(
        "hidream",
        ((r"(^|\.)double_stream_blocks\.0\.block\.ff_i\.", r"(^|\.)caption_projection\.0\.linear\.weight$"),),
        (
            _FINAL,
            Keep(_parts("x_embedder", "caption_projection"), "input projection"),
            Keep(_parts("t_embedder", "p_embedder"), "timestep and text embedder"),
            Keep(_parts("gate"), "router of the experts"),
            Keep(_parts("adaLN_modulation"), "modulation", unless_large=True),
        ),
    ),
    Family(
        "cosmos",
        (
            (r"(^|\.)blocks\.block0\.blocks\.0\.block\.attn\.to_q\.0\.weight$",),
            (r"(^|\.)blocks\.0\.adaln_modulation_cross_attn\.1\.weight$", r"(^|\.)blocks\.0\.mlp\.layer1\.weight$"),
            (r"(^|\.)transformer_blocks\.0\.norm1\.linear_1\.weight$", r"(^|\.)time_embed\.t_embedder\."),
        ),
        (
            _FINAL,
            Keep(
                _parts("x_embedder", "patch_embed", "extra_pos_embedder", "learnable_pos_embed", "crossattn_proj"),
                "input projection",
            ),
            Keep(_parts("t_embedder", "time_embed"), "timestep embedder"),
            Keep(_parts("llm_adapter"), "text embedder"),
            Keep(_parts("adaLN_modulation", r"adaln_modulation\w*", r"norm\d"), "modulation", unless_large=True),
        ),
    ),
    Family(
        "ltxv",
        (
            (r"(^|\.)patchify_proj\.weight$", r"(^|\.)adaln_single\."),
            (r"(^|\.)time_embed\.emb\.timestep_embedder\.", _TOP + r"proj_in\.weight$"),
        ),
        (
            Keep(_top("proj_out", "audio_proj_out"), "final layer"),
            Keep(_top("proj_in", "audio_proj_in", r"(audio_)?patchify_proj"), "input projection"),
            Keep(
                _parts(r"(audio_)?caption_projection", r"(audio|video)_embeddings_connector"),
                "text embedder",
            ),
            Keep(_parts(r"\w*adaln_single", r"(audio_)?time_embed", r"av_cross_attn_\w+"), "timestep embedder"),
        ),
    ),
    Family(
        "pixart",
        (
            (r"(^|\.)t_block\.1\.weight$", r"(^|\.)blocks\.0\.cross_attn\.kv_linear\.weight$"),
            (r"(^|\.)adaln_single\.linear\.weight$", r"(^|\.)transformer_blocks\.0\.attn2\.to_k\.weight$"),
        ),
        (
            _FINAL,
            Keep(_parts("x_embedder", r"pos_embed\w*", "y_embedder", "caption_projection"), "input projection"),
            Keep(_parts("t_embedder", "t_block", "csize_embedder", "ar_embedder", "adaln_single"), "timestep embedder"),
        ),
        absent=(r"(^|\.)patchify_proj\.",),
    ),
    Family(
        "ace-step",
        (
            (r"(^|\.)genre_embedder\.weight$", r"(^|\.)lyric_encoder\."),
            (r"(^|\.)time_embed_r\.linear_1\.weight$", r"(^|\.)condition_embedder\.weight$"),
        ),
        (
            Keep(_parts("final_layer", "proj_out", "project_out"), "final layer"),
            Keep(_parts("proj_in", "project_in", "audio_acoustic_proj", "embed_tokens"), "input projection"),
            Keep(_parts("timestep_embedder", "t_block", r"time_embed(_r)?"), "timestep embedder"),
            Keep(
                _parts(
                    "speaker_embedder",
                    "genre_embedder",
                    "lyric_embs",
                    "lyric_proj",
                    "text_projector",
                    "condition_embedder",
                )
                + r"|lyric_encoder\.embed\.",
                "condition embedder",
            ),
        ),
    ),
    Family(
        "stable-audio",
        (
            (r"(^|\.)to_timestep_embed\.0\.weight$", r"(^|\.)transformer\.project_in\.weight$"),
            (r"(^|\.)global_proj\.0\.weight$", r"(^|\.)cross_attention_proj\.0\.weight$"),
        ),
        (
            Keep(rf"{_TOP}(proj_out|project_out)(\.|$)", "final layer"),
            Keep(rf"{_TOP}(proj_in|project_in)(\.|$)", "input projection"),
            Keep(_parts("to_timestep_embed", "timestep_proj"), "timestep embedder"),
            Keep(
                _parts("to_cond_embed", "to_global_embed", "to_prepend_embed", "global_proj", "cross_attention_proj"),
                "condition embedder",
            ),
        ),
    ),
    Family(
        "t5",
        ((r"(^|\.)encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight$",),),
        (
            Keep(_parts("wo"), "wo (its products exceed float16)", not_float16=True),
            Keep(_parts("shared", "embed_tokens", "relative_attention_bias"), "embedding"),
            Keep(_parts(r"\w*layer_norm"), "norm"),
            Keep(_parts("lm_head"), "final layer"),
        ),
    ),
    Family(
        "clip",
        ((r"(^|\.)text_model\.encoder\.layers\.0\.self_attn\.q_proj\.weight$",),),
        (
            Keep(_parts("embeddings", "token_embedding", "position_embedding"), "embedding"),
            Keep(_parts(r"layer_norm\d?", "final_layer_norm"), "norm"),
            Keep(_parts("text_projection", "visual_projection"), "projection of the pooled vector"),
        ),
    ),
    Family(
        "qwen-vl",
        (
            (r"(^|\.)visual\.blocks\.0\.attn\.qkv\.weight$", _LLM_LAYER),
            (r"(^|\.)visual\.patch_embed\.", _LLM_LAYER),
        ),
        # 3 to 6 % of the weights. The MLP of Qwen2.5-VL's tower is 3420 wide, which no group or block size divides.
        (Keep(_parts("visual"), "vision tower (only image prompts pass it)"), *_LLM_KEEP),
    ),
    Family("llm", ((_LLM_LAYER, r"(^|\.)layers\.0\.mlp\.(gate|up)_proj\.weight$"),), _LLM_KEEP),
)

# For every other model. The names are those that the families above share.
UNKNOWN = Family(
    "",
    (),
    (
        Keep(
            r"(^|\.)(img_in|txt_in|vector_in|time_in|guidance_in|x_embedder|context_embedder|time_text_embed"
            r"|\w+_embedder|\w*patch_embed\w*|pos_embed\w*|time_embed\w*|time_projection|text_embedding"
            r"|condition_embedder|\w+_emb)(\.|$)",
            "embedder",
        ),
        Keep(
            _parts(r"\w*embeddings?", "embed_tokens", "shared", "text_projection", "relative_attention_bias"),
            "embedding",
        ),
        Keep(
            _parts(r"\w*_mod", "modulation", "adaLN_modulation", r"norm\w*", r"\w+_norm", r"layer_norm\w*"),
            "norm or modulation",
            unless_large=True,
        ),
        Keep(_top("proj_out", "final_layer", "head", "lm_head", "norm_out"), "final layer"),
    ),
)


def find_family(tensors: Iterable[TensorMeta]) -> Family:
    """The family of a model by the names of all its tensors and a few shapes; `UNKNOWN` where none fits."""
    metas = list(tensors)
    names = "\n".join(m.name for m in metas)
    return next((f for f in FAMILIES if _fits(f, names, metas)), UNKNOWN)


def _fits(family: Family, names: str, metas: Sequence[TensorMeta]) -> bool:
    def found(pattern: str) -> bool:
        return re.search(pattern, names, re.MULTILINE) is not None

    if not any(all(map(found, group)) for group in family.signatures) or any(map(found, family.absent)):
        return False
    if family.width is None:
        return True
    pattern, widths = family.width
    return any(m.shape[-1] in widths for m in metas if m.shape and re.search(pattern, m.name))


def reason_to_keep(family: Family, layer: str) -> Keep | None:
    """The first entry that names a layer, whatever its size."""
    return next((k for k in family.keep if re.search(k.pattern, layer)), None)


def shown_reason(family: Family, keep: Keep) -> str:
    """`flux: final layer`, or `sensitive: final layer` for an unknown family."""
    return f"{family.name or 'sensitive'}: {keep.reason}"


def in_first_block(layer: str) -> bool:
    """Whether the first number in a layer's name is 0, or it has none."""
    number = _FIRST_NUMBER.search(layer)
    return number is None or number.group(1) == "0"
