"""Names and shapes of real models, made by the classes of diffusers and transformers on the meta device.

Widths are those of published models, since diffusers' converters have them as constants; depths are cut.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from quantwire.quantizers.weight import TensorMeta
from torch import Tensor, nn

SDXL: dict[str, Any] = {
    "cross_attention_dim": 2048,
    "block_out_channels": (32, 64, 96),
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "attention_head_dim": (4, 4, 8),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}
SD1: dict[str, Any] = {"cross_attention_dim": 768, "block_out_channels": (32, 32, 64, 64), "norm_num_groups": 8}
UNCLIP: dict[str, Any] = {
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": 64,
}
HIDREAM: dict[str, Any] = {
    **{"patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 2, "num_single_layers": 2},
    **{"attention_head_dim": 16, "num_attention_heads": 2, "caption_channels": [64, 64], "text_emb_dim": 32},
    **{"num_routed_experts": 4, "num_activated_experts": 2, "axes_dims_rope": (8, 4, 4), "max_resolution": (8, 8)},
    "llama_layers": [0, 1],
}
WAN_I2V: dict[str, Any] = {"num_layers": 2, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}


def _diffusers(name: str, **config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import diffusers

        return getattr(diffusers, name)(**config)

    return make


def _transformers(name: str, config: str, **values: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        return getattr(transformers, name)(getattr(transformers, config)(**values))

    return make


# Id -> (family, architecture, model).
IMAGE_MODELS: dict[str, tuple[str, str, Callable[[], nn.Module]]] = {
    "flux-dev": (
        "flux",
        "flux",
        _diffusers("FluxTransformer2DModel", num_layers=2, num_single_layers=2, guidance_embeds=True),
    ),
    "flux-schnell": ("flux", "flux", _diffusers("FluxTransformer2DModel", num_layers=1, num_single_layers=3)),
    "flux2": ("flux2", "flux", _diffusers("Flux2Transformer2DModel", num_layers=2, num_single_layers=2)),
    "chroma": ("chroma", "flux", _diffusers("ChromaTransformer2DModel", num_layers=2, num_single_layers=2)),
    "hyvid": (
        "hyvid",
        "hyvid",
        _diffusers("HunyuanVideoTransformer3DModel", num_layers=2, num_single_layers=2, guidance_embeds=True),
    ),
    "sd3": ("sd3", "sd3", _diffusers("SD3Transformer2DModel", num_layers=3)),
    "sd3.5": (
        "sd3",
        "sd3",
        _diffusers("SD3Transformer2DModel", num_layers=12, dual_attention_layers=(0, 1), qk_norm="rms_norm"),
    ),
    "aura": (
        "aura",
        "aura",
        _diffusers("AuraFlowTransformer2DModel", num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=32),
    ),
    "pixart-sigma": (
        "pixart",
        "pixart",
        _diffusers("PixArtTransformer2DModel", num_layers=2, caption_channels=4096, use_additional_conditions=False),
    ),
    "pixart-alpha": (
        "pixart",
        "pixart",
        _diffusers("PixArtTransformer2DModel", num_layers=2, caption_channels=4096, use_additional_conditions=True),
    ),
    "lumina2": ("lumina2", "lumina2", _diffusers("Lumina2Transformer2DModel", num_layers=2)),
    "z-image": ("z-image", "lumina2", _diffusers("ZImageTransformer2DModel", n_layers=2)),
    "z-image-omni": ("z-image", "lumina2", _diffusers("ZImageTransformer2DModel", n_layers=2, siglip_feat_dim=1152)),
    "wan-t2v": ("wan", "wan", _diffusers("WanTransformer3DModel", num_layers=2)),
    "wan-i2v": ("wan", "wan", _diffusers("WanTransformer3DModel", **WAN_I2V)),
    "wan-flf2v": ("wan", "wan", _diffusers("WanTransformer3DModel", **WAN_I2V, pos_embed_seq_len=514)),
    "wan-vace": ("wan", "wan", _diffusers("WanVACETransformer3DModel", num_layers=3, vace_layers=[0, 2])),
    "qwen-image": ("qwen_image", "qwen_image", _diffusers("QwenImageTransformer2DModel", num_layers=2)),
    "hidream": ("hidream", "hidream", _diffusers("HiDreamImageTransformer2DModel", **HIDREAM)),
    "ltxv": ("ltxv", "ltxv", _diffusers("LTXVideoTransformer3DModel", num_layers=2)),
    "cosmos1": ("cosmos1", "cosmos", _diffusers("CosmosTransformer3DModel", num_layers=2)),
    "cosmos2": ("cosmos2", "cosmos", _diffusers("CosmosTransformer3DModel", num_layers=2, extra_pos_embed_type=None)),
    "sd1": ("sd1", "sd1", _diffusers("UNet2DConditionModel", **SD1)),
    "sd2": ("sd1", "sd1", _diffusers("UNet2DConditionModel", **SD1 | UNCLIP)),
    "sdxl": ("sdxl", "sdxl", _diffusers("UNet2DConditionModel", **SDXL)),
    "sdxl-one-layer": ("sdxl", "sdxl", _diffusers("UNet2DConditionModel", **SDXL | {"layers_per_block": 1})),
}
# In these the names of diffusers are those of ComfyUI.
SAME_NAMES = ("qwen-image", "hidream")

_SMALL: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 320},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}
_T5: dict[str, Any] = {
    **{"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 320},
    "feed_forward_proj": "gated-gelu",
}
_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
}
TEXT_MODELS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "t5encoder": ("t5encoder", _transformers("T5EncoderModel", "T5Config", **_T5)),
    "umt5": ("t5encoder", _transformers("UMT5EncoderModel", "UMT5Config", **_T5)),
    "t5": ("t5", _transformers("T5ForConditionalGeneration", "T5Config", **_T5)),
    "llama": ("llama", _transformers("LlamaForCausalLM", "LlamaConfig", **_SMALL)),
    "llama-inner": ("llama", _transformers("LlamaModel", "LlamaConfig", **_SMALL)),
    "mistral": ("llama", _transformers("MistralForCausalLM", "MistralConfig", **_SMALL)),
    "qwen2.5-vl": (
        "qwen2vl",
        _transformers(
            "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", text_config=_SMALL, vision_config=_VISION
        ),
    ),
    "qwen2": ("qwen2vl", _transformers("Qwen2ForCausalLM", "Qwen2Config", **_SMALL)),
    "qwen3": ("qwen3", _transformers("Qwen3ForCausalLM", "Qwen3Config", **_SMALL)),
    "qwen3-inner": ("qwen3", _transformers("Qwen3Model", "Qwen3Config", **_SMALL)),
    "qwen3-vl": (
        "qwen3vl",
        _transformers(
            "Qwen3VLForConditionalGeneration",
            "Qwen3VLConfig",
            text_config=_SMALL,
            vision_config=_VISION | {"deepstack_visual_indexes": [0]},
        ),
    ),
    "gemma": ("gemma", _transformers("GemmaForCausalLM", "GemmaConfig", **_SMALL | {"vocab_size": 256000})),
    "gemma2": ("gemma2", _transformers("Gemma2Model", "Gemma2Config", **_SMALL)),
    "gemma3": ("gemma3", _transformers("Gemma3ForCausalLM", "Gemma3TextConfig", **_SMALL)),
}


def on_meta(make: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what `save_pretrained` would write."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = make()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@functools.cache
def image_shapes(name: str) -> Mapping[str, tuple[int, ...]]:
    return on_meta(IMAGE_MODELS[name][2])


@functools.cache
def text_shapes(name: str) -> Mapping[str, tuple[int, ...]]:
    return on_meta(TEXT_MODELS[name][1])


def metas_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorMeta]:
    return {name: TensorMeta(name, shape, torch.bfloat16) for name, shape in shapes.items()}


def narrow_values(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Random tensors with all rows and at most two columns: conversions move rows only."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(*shape[:1], *(min(size, 2) for size in shape[1:]), generator=generator)
        for name, shape in shapes.items()
    }
