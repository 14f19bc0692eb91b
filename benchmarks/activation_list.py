"""Which architectures benchmarks/activations.py measures: published sizes first, then narrower ones of the same family.

Sizes: the `config.json` of the models' repositories, many of which are the defaults of diffusers and transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from activation_models import (
    DIT,
    IMAGES,
    TEXT,
    VAE,
    VIDEOS,
    Arch,
    Inputs,
    clip,
    flux,
    flux_inputs,
    kl,
    llm,
    made,
    t5,
    text,
    text_inputs,
    tokens,
    vae_inputs,
)
from quantwire.quantizers.measure.activations import RunShape
from torch._subclasses.fake_tensor import unset_fake_temporarily

D, T, V = "diffusion model", "text encoder", "VAE"
PROMPTS = (*(RunShape(text_tokens=n) for n in (77, 256, 512, 1024)), RunShape(batch=2, text_tokens=256))
CLIP_PROMPTS = (RunShape(text_tokens=77), RunShape(batch=2, text_tokens=77), RunShape(batch=4, text_tokens=77))
PICTURES = (RunShape(512, 512), RunShape(832, 1216), RunShape(512, 512, batch=2), RunShape(1536, 1536))
CLIPS = (
    RunShape(512, 512),
    RunShape(480, 480, 17),
    RunShape(1024, 1024),
    RunShape(832, 480, 33),
    RunShape(832, 480, 81),
    RunShape(640, 480, 9),
    RunShape(1280, 704, 49),
)


def image_geometry(text_tokens: int, spatial: int = 16, **more: Any) -> dict[str, Any]:
    return {"spatial": spatial, "text_tokens": text_tokens, **more}


def latents(shape: RunShape, arch: Arch, channels: int, patch: int = 2) -> tuple[int, ...]:
    f, h, w = tokens(shape, arch)
    size = (h * patch, w * patch)
    return (shape.batch, channels, *([f] if "temporal" in arch.geometry else []), *size)


def spatial_inputs(shape: RunShape, dtype: torch.dtype, arch: Arch) -> Inputs:
    """For models that take latents as pictures: `extra` has channels, patch, context, and other inputs by name."""
    e, b = arch.extra, shape.batch
    out: Inputs = {
        e.get("latents", "hidden_states"): torch.randn(
            latents(shape, arch, e["channels"], e.get("patch", 2)), dtype=dtype
        ),
        "timestep": torch.ones(b, dtype=e.get("time", dtype)),
        "encoder_hidden_states": torch.randn(b, text(shape, arch), e["context"], dtype=dtype),
    }
    for name, width in e.get("vectors", {}).items():
        out[name] = torch.ones((b, width) if width else b, dtype=dtype)
    if e.get("mask"):
        out["encoder_attention_mask"] = e["mask"](b, text(shape, arch))
    return out | e.get("fixed", {})


def unet_inputs(shape: RunShape, dtype: torch.dtype, arch: Arch) -> Inputs:
    out = spatial_inputs(shape, dtype, arch)
    if arch.formula == "sdxl":
        b = shape.batch
        out["added_cond_kwargs"] = {
            "text_embeds": torch.ones(b, 1280, dtype=dtype),
            "time_ids": torch.ones(b, 6, dtype=dtype),
        }
    return out


def qwen_inputs(shape: RunShape, dtype: torch.dtype, arch: Arch) -> Inputs:
    _, h, w = tokens(shape, arch)
    b = shape.batch
    return {
        "hidden_states": torch.randn(b, h * w, 64, dtype=dtype),
        "encoder_hidden_states": torch.randn(b, text(shape, arch), 3584, dtype=dtype),
        "timestep": torch.ones(b, dtype=dtype),
        "img_shapes": [[(1, h, w)]] * b,
    }


def z_image_inputs(shape: RunShape, dtype: torch.dtype, arch: Arch) -> Inputs:
    _, h, w = tokens(shape, arch)
    return {
        "x": [torch.randn(16, 1, h * 2, w * 2, dtype=dtype) for _ in range(shape.batch)],
        "t": torch.ones(shape.batch, dtype=dtype),
        "cap_feats": [torch.randn(text(shape, arch), 2560, dtype=dtype) for _ in range(shape.batch)],
    }


def ltx_inputs(shape: RunShape, dtype: torch.dtype, arch: Arch) -> Inputs:
    f, h, w = tokens(shape, arch)
    b, t = shape.batch, text(shape, arch)
    return {
        "hidden_states": torch.randn(b, f * h * w, 128, dtype=dtype),
        "encoder_hidden_states": torch.randn(b, t, 4096, dtype=dtype),
        "timestep": torch.ones(b, dtype=dtype),
        "encoder_attention_mask": torch.ones(b, t, dtype=dtype),
        "num_frames": f,
        "height": h,
        "width": w,
    }


def bool_mask(batch: int, length: int) -> torch.Tensor:
    with unset_fake_temporarily():  # its values are read
        return torch.ones(batch, length, dtype=torch.bool)


def sd3(heads: int, layers: int, dual: tuple[int, ...] = ()) -> Any:
    return made(
        "SD3Transformer2DModel",
        num_layers=layers,
        num_attention_heads=heads,
        caption_projection_dim=64 * heads,
        pos_embed_max_size=384,
        qk_norm="rms_norm",
        dual_attention_layers=dual,
    )


def sdxl(base: int) -> Any:
    return made(
        "UNet2DConditionModel",
        block_out_channels=(base, 2 * base, 4 * base),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(base // 64, base // 32, base // 16),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def sd15(base: int) -> Any:
    return made(
        "UNet2DConditionModel",
        block_out_channels=(base, 2 * base, 4 * base, 4 * base),
        attention_head_dim=8,
        cross_attention_dim=768,
    )


def wan(heads: int, ffn: int, layers: int, channels: int = 16) -> Any:
    return made(
        "WanTransformer3DModel",
        num_attention_heads=heads,
        ffn_dim=ffn,
        num_layers=layers,
        in_channels=channels,
        out_channels=channels,
    )


def image_models() -> list[Arch]:
    f = {"channels": 64, "context": 4096}
    f2 = {"channels": 128, "context": 15360, "axes": 4}
    s3: Any = {"channels": 16, "context": 4096, "vectors": {"pooled_projections": 2048}}
    xl: Any = {"latents": "sample", "channels": 4, "patch": 1, "context": 2048}
    aura: Any = {"channels": 4, "context": 2048}
    pix: Any = {
        "channels": 4,
        "context": 4096,
        "fixed": {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    }
    lum: Any = {"channels": 16, "context": 2304, "mask": bool_mask}
    sana: Any = {"channels": 32, "context": 2304, "patch": 1}
    g16, g8 = image_geometry, image_geometry(77, 8)

    def flux2(heads: int, double: int, single: int) -> Any:
        return made("Flux2Transformer2DModel", num_layers=double, num_single_layers=single, num_attention_heads=heads)

    def chroma(heads: int, double: int, single: int) -> Any:
        return made("ChromaTransformer2DModel", num_layers=double, num_single_layers=single, num_attention_heads=heads)

    def qwen(heads: int, layers: int) -> Any:
        return made("QwenImageTransformer2DModel", num_layers=layers, num_attention_heads=heads)

    def z_image(heads: int, layers: int) -> Any:
        return made("ZImageTransformer2DModel", dim=128 * heads, n_layers=layers, n_heads=heads, n_kv_heads=heads)

    def lumina(width: int, heads: int, kv: int, layers: int) -> Any:
        return made(
            "Lumina2Transformer2DModel",
            hidden_size=width,
            num_layers=layers,
            num_attention_heads=heads,
            num_kv_heads=kv,
            cap_feat_dim=2304,
        )

    def auraflow(heads: int, mm: int, single: int) -> Any:
        return made(
            "AuraFlowTransformer2DModel",
            num_mmdit_layers=mm,
            num_single_dit_layers=single,
            num_attention_heads=heads,
            caption_projection_dim=256 * heads,
            pos_embed_max_size=9216,
        )

    def pixart(heads: int, layers: int) -> Any:
        return made(
            "PixArtTransformer2DModel",
            num_attention_heads=heads,
            num_layers=layers,
            cross_attention_dim=72 * heads,
            caption_channels=4096,
            use_additional_conditions=False,
        )

    def sana_dit(heads: int, cross: int, layers: int) -> Any:
        return made(
            "SanaTransformer2DModel",
            num_attention_heads=heads,
            num_cross_attention_heads=cross,
            cross_attention_dim=112 * cross,
            num_layers=layers,
        )

    medium = tuple(range(13))
    return [
        Arch("flux", "FLUX.1 dev", D, flux(24, 19, 38), flux_inputs, g16(512), IMAGES, DIT, extra=f),
        Arch("flux", "FLUX.1, 12 heads", D, flux(12, 2, 4), flux_inputs, g16(512), IMAGES, DIT, extra=f),
        Arch("flux", "FLUX.1, 4 heads", D, flux(4, 2, 4), flux_inputs, g16(512), IMAGES, DIT, extra=f),
        Arch("flux2", "FLUX.2 dev", D, flux2(48, 8, 48), flux_inputs, g16(512), IMAGES, DIT, extra=f2),
        Arch("flux2", "FLUX.2, 24 heads", D, flux2(24, 2, 4), flux_inputs, g16(512), IMAGES, DIT, extra=f2),
        Arch("chroma", "Chroma", D, chroma(24, 19, 38), flux_inputs, g16(512), IMAGES, DIT, extra=f),
        Arch("chroma", "Chroma, 12 heads", D, chroma(12, 2, 4), flux_inputs, g16(512), IMAGES, DIT, extra=f),
        Arch("sd3", "Stable Diffusion 3.5 large", D, sd3(38, 38), spatial_inputs, g16(333), IMAGES, DIT, extra=s3),
        Arch("sd3", "Stable Diffusion 3, 24 heads", D, sd3(24, 4), spatial_inputs, g16(333), IMAGES, DIT, extra=s3),
        Arch("sd3.5-medium", "SD 3.5 medium", D, sd3(24, 24, medium), spatial_inputs, g16(333), IMAGES, DIT, extra=s3),
        Arch("sd3.5-medium", "12 heads", D, sd3(12, 4, (0, 1)), spatial_inputs, g16(333), IMAGES, DIT, extra=s3),
        Arch("sdxl", "Stable Diffusion XL", D, sdxl(320), unet_inputs, g8, IMAGES, DIT, extra=xl),
        Arch("sdxl", "half as wide", D, sdxl(128), unet_inputs, g8, IMAGES, DIT, extra=xl),
        Arch("sd1.5", "Stable Diffusion 1.5", D, sd15(320), unet_inputs, g8, IMAGES, DIT, extra=xl | {"context": 768}),
        Arch("sd1.5", "half as wide", D, sd15(160), unet_inputs, g8, IMAGES, DIT, extra=xl | {"context": 768}),
        Arch("qwen-image", "Qwen-Image", D, qwen(24, 60), qwen_inputs, g16(256), IMAGES, DIT),
        Arch("qwen-image", "Qwen-Image, 12 heads", D, qwen(12, 4), qwen_inputs, g16(256), IMAGES, DIT),
        Arch("z-image", "Z-Image", D, z_image(30, 30), z_image_inputs, g16(256), IMAGES, DIT),
        Arch("z-image", "Z-Image, 15 heads", D, z_image(15, 4), z_image_inputs, g16(256), IMAGES, DIT),
        Arch("lumina2", "Lumina 2", D, lumina(2304, 24, 8, 26), spatial_inputs, g16(256), IMAGES, DIT, extra=lum),
        Arch("lumina2", "half as wide", D, lumina(1152, 12, 4, 4), spatial_inputs, g16(256), IMAGES, DIT, extra=lum),
        Arch("aura", "AuraFlow", D, auraflow(12, 4, 32), spatial_inputs, g16(256), IMAGES, DIT, extra=aura),
        Arch("aura", "AuraFlow, 6 heads", D, auraflow(6, 2, 4), spatial_inputs, g16(256), IMAGES, DIT, extra=aura),
        Arch("pixart", "PixArt Sigma", D, pixart(16, 28), spatial_inputs, g16(300), IMAGES, DIT, extra=pix),
        Arch("pixart", "PixArt, 8 heads", D, pixart(8, 4), spatial_inputs, g16(300), IMAGES, DIT, extra=pix),
        Arch("sana", "Sana 1.6B", D, sana_dit(70, 20, 20), spatial_inputs, g16(300, 32), IMAGES, DIT, extra=sana),
        Arch("sana", "half as wide", D, sana_dit(35, 10, 4), spatial_inputs, g16(300, 32), IMAGES, DIT, extra=sana),
    ]


def video_models() -> list[Arch]:
    def video(text_tokens: int, temporal: int = 4, spatial: int = 16) -> dict[str, Any]:
        return {"spatial": spatial, "temporal": temporal, "text_tokens": text_tokens}

    w: Any = {"channels": 16, "context": 4096}
    hy: Any = w | {"mask": bool_mask, "vectors": {"pooled_projections": 768, "guidance": 0}}
    cos: Any = {"channels": 16, "context": 1024}

    def hunyuan(heads: int, double: int, single: int) -> Any:
        return made(
            "HunyuanVideoTransformer3DModel",
            num_attention_heads=heads,
            num_layers=double,
            num_single_layers=single,
        )

    def ltx(heads: int, dim: int, layers: int) -> Any:
        return made(
            "LTXVideoTransformer3DModel",
            num_attention_heads=heads,
            attention_head_dim=dim,
            cross_attention_dim=heads * dim,
            num_layers=layers,
        )

    def cosmos(heads: int, layers: int) -> Any:
        # Its padding mask is one channel of the input, and resizing it needs torchvision.
        return made(
            "CosmosTransformer3DModel",
            num_attention_heads=heads,
            num_layers=layers,
            extra_pos_embed_type=None,
            concat_padding_mask=False,
        )

    return [
        Arch("wan", "Wan 2.1 14B", D, wan(40, 13824, 40), spatial_inputs, video(512), VIDEOS, DIT, extra=w),
        Arch("wan", "Wan 2.1 1.3B", D, wan(12, 8960, 30), spatial_inputs, video(512), VIDEOS, DIT, extra=w),
        Arch(
            "wan2.2-5b",
            "Wan 2.2 5B",
            D,
            wan(24, 14336, 30, 48),
            spatial_inputs,
            video(512, spatial=32),
            VIDEOS,
            DIT,
            extra=w | {"channels": 48},
        ),
        Arch("hyvid", "HunyuanVideo", D, hunyuan(24, 20, 40), spatial_inputs, video(256), VIDEOS, DIT, extra=hy),
        Arch("hyvid", "12 heads", D, hunyuan(12, 2, 4), spatial_inputs, video(256), VIDEOS, DIT, extra=hy),
        Arch("ltxv", "LTX-Video 2B", D, ltx(32, 64, 28), ltx_inputs, video(256, 8, 32), VIDEOS, DIT),
        Arch("ltxv", "LTX-Video 13B", D, ltx(32, 128, 8), ltx_inputs, video(256, 8, 32), VIDEOS, DIT),
        Arch("cosmos", "Cosmos Predict2 2B", D, cosmos(16, 28), spatial_inputs, video(512), VIDEOS, DIT, extra=cos),
        Arch("cosmos", "Cosmos Predict2 14B", D, cosmos(40, 8), spatial_inputs, video(512), VIDEOS, DIT, extra=cos),
    ]


def text_models() -> list[Arch]:
    g5, gc = image_geometry(512, 8), image_geometry(77, 8)

    def encoder(formula: str, title: str, build: Any) -> Arch:
        clip_like = formula == "clip"
        shapes = CLIP_PROMPTS if clip_like else PROMPTS
        return Arch(formula, title, T, build, text_inputs, gc if clip_like else g5, shapes, TEXT)

    return [
        encoder("t5", "T5-XXL", t5(4096, 10240, 64, 24)),
        encoder("t5", "T5-XL", t5(2048, 5120, 32, 4)),
        encoder("t5", "T5-base", t5(768, 2048, 12, 4)),
        encoder("umt5", "UMT5-XXL", t5(4096, 10240, 64, 24, "UMT5EncoderModel")),
        encoder("umt5", "UMT5-base", t5(768, 2048, 12, 4, "UMT5EncoderModel")),
        encoder("clip", "CLIP-L", clip(768, 12, 12)),
        encoder("clip", "CLIP-G", clip(1280, 32, 20)),
        encoder("clip", "CLIP with a narrow MLP", clip(512, 2, 8, mlp=2)),
        encoder("llm", "Llama 3.1 8B", llm("LlamaModel", 4096, 14336, 32, 32, 8)),
        encoder("llm", "Qwen2.5 7B", llm("Qwen2Model", 3584, 18944, 28, 28, 4)),
        encoder("llm", "Qwen3 4B", llm("Qwen3Model", 2560, 9728, 36, 32, 8, head_dim=128)),
        # Gemma 3 and not 2: for the soft cap on the attention of 2, transformers has no kernel without a T x T matrix.
        encoder("llm", "Gemma 3 12B", llm("Gemma3TextModel", 3840, 15360, 48, 16, 8, head_dim=256)),
    ]


def vaes() -> list[Arch]:
    g8 = {"spatial": 8, "text_tokens": 1, "guided": False}
    # `window`: frames that are decoded at once; the rest of a video follows.
    g84, g168 = g8 | {"temporal": 4, "window": 4}, g8 | {"temporal": 4, "spatial": 16, "window": 4}
    hunyuan = g8 | {"temporal": 4, "window": 17}
    g32 = g8 | {"temporal": 8, "spatial": 32}

    def vae(formula: str, title: str, build: Any, latent: int, geometry: Any = g8, **extra: Any) -> Arch:
        video = "temporal" in geometry
        shapes = CLIPS if video else PICTURES
        return Arch(
            formula,
            title,
            V,
            build,
            vae_inputs,
            geometry,
            shapes,
            VAE,
            "decode",
            {"latent": latent, "video": video} | extra,
        )

    residual: Any = {
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
    }
    return [
        vae("kl", "AutoencoderKL", kl(128, 16), 16),
        vae("kl", "AutoencoderKL, half as wide", kl(64, 4), 4),
        vae("taesd", "TAESD", made("AutoencoderTiny", latent_channels=16), 16, argument="x"),
        vae("wan-vae", "Wan 2.1 and Qwen-Image VAE", made("AutoencoderKLWan"), 16, g84),
        vae("wan2.2-vae", "Wan 2.2 VAE", made("AutoencoderKLWan", **residual), 48, g168),
        vae("hyvid-vae", "HunyuanVideo VAE", made("AutoencoderKLHunyuanVideo"), 16, hunyuan),
        vae("ltx-vae", "LTX-Video VAE", made("AutoencoderKLLTXVideo"), 128, g32),
    ]


def archs() -> list[Arch]:
    return [*image_models(), *video_models(), *text_models(), *vaes()]
