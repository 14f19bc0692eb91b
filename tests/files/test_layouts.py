"""diffusers' layout to ComfyUI's: back through diffusers' own converters every tensor is what it was, bit for bit.

The names and shapes of every model here were compared once with those of ComfyUI 0.33's own classes on the meta device
and with its own key maps (`convert_diffusers_mmdit`), which are in no package that a test could import.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quantwire.quantizers.apply import quantize_tensor
from quantwire.quantizers.errors import FileError, WeightError
from quantwire.quantizers.files.architectures import comfyui_targets, detect, gguf_targets
from quantwire.quantizers.files.layouts import Piece, Target, apply, assemble, target
from quantwire.quantizers.files.layouts.diffusers import diffusers_to_comfyui
from quantwire.quantizers.registry import get_quantizer
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedWeight, TensorMeta
from real_models import IMAGE_MODELS, SAME_NAMES, SD1, SDXL, UNCLIP, image_shapes, metas_of, narrow_values
from torch import Tensor

CONVERTERS = {
    "flux": "convert_flux_transformer_checkpoint_to_diffusers",
    "flux2": "convert_flux2_transformer_checkpoint_to_diffusers",
    "chroma": "convert_chroma_transformer_checkpoint_to_diffusers",
    "hyvid": "convert_hunyuan_video_transformer_to_diffusers",
    "sd3": "convert_sd3_transformer_checkpoint_to_diffusers",
    "aura": "convert_auraflow_transformer_checkpoint_to_diffusers",
    "lumina2": "convert_lumina2_to_diffusers",
    "z-image": "convert_z_image_transformer_checkpoint_to_diffusers",
    "wan": "convert_wan_transformer_to_diffusers",
    "ltxv": "convert_ltx_transformer_checkpoint_to_diffusers",
    "hidream": "convert_hidream_transformer_to_diffusers",
    "cosmos2": "convert_cosmos_transformer_checkpoint_to_diffusers",
}
UNET_CONFIGS: dict[str, dict[str, Any]] = {
    "sd1": SD1 | {"layers_per_block": 2},
    "sd2": SD1 | UNCLIP | {"layers_per_block": 2},
    "sdxl": SDXL | {"layers_per_block": 2},
    "sdxl-one-layer": SDXL | {"layers_per_block": 1},
}


def targets_of(values: dict[str, Tensor]) -> list[Target]:
    """For tensors narrower than the real ones, which detection still knows by their names."""
    metas = {name: TensorMeta(name, tuple(t.shape), t.dtype) for name, t in values.items()}
    return comfyui_targets(detect(metas), metas)


def converted(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(source, ComfyUI's) tensors; the converter is given all rows of the real model and two columns."""
    found = detect(metas_of(image_shapes(name)))
    values = narrow_values(image_shapes(name))
    metas = {n: TensorMeta(n, tuple(t.shape), t.dtype) for n, t in values.items()}
    made: dict[str, Tensor] = {}
    for item in comfyui_targets(found, metas):
        tensor = assemble(item, values.__getitem__)
        assert isinstance(tensor, Tensor)
        made[item.name] = tensor
    return values, made


class Unpopped(dict[str, Tensor]):
    """diffusers 0.42 takes every tensor out of the checkpoint before it looks which generation of Cosmos it is."""

    def pop(self, key: str) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self[key]


def back(name: str, made: dict[str, Tensor]) -> dict[str, Tensor]:
    """Through diffusers' converter; it takes its argument apart."""
    from diffusers.loaders import single_file_utils

    if name in UNET_CONFIGS:
        prefixed = {f"model.diffusion_model.{n}": t for n, t in made.items()}
        return single_file_utils.convert_ldm_unet_checkpoint(prefixed, UNET_CONFIGS[name])
    if name == "cosmos1":  # the converter tells the generations apart by a name with the prefix of the original files
        prefixed = Unpopped({f"net.{n}": t for n, t in made.items()})
        return single_file_utils.convert_cosmos_transformer_checkpoint_to_diffusers(prefixed)
    return getattr(single_file_utils, CONVERTERS[IMAGE_MODELS[name][0]])(dict(made))


@pytest.mark.parametrize("name", [n for n in IMAGE_MODELS if not n.startswith(("pixart", "qwen"))])
def test_back_through_diffusers(name: str) -> None:
    values, made = converted(name)
    restored = back(name, made)
    if name == "wan-flf2v":  # the converter has no name for it
        restored["condition_embedder.image_embedder.pos_embed"] = restored.pop("img_emb.emb_pos")
    assert restored.keys() == values.keys()
    for key, tensor in values.items():
        assert torch.equal(restored[key], tensor), key


# The names of one block and of what is outside the blocks, as ComfyUI has them, and what each is made of.
PIXART_ENDS = {
    "x_embedder.proj": ("pos_embed.proj",),
    "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
    "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
    "t_embedder.mlp.0": ("adaln_single.emb.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("adaln_single.emb.timestep_embedder.linear_2",),
    "t_block.1": ("adaln_single.linear",),
    "final_layer.linear": ("proj_out",),
}
PIXART_SIZES = {
    "csize_embedder.mlp.0": ("adaln_single.emb.resolution_embedder.linear_1",),
    "csize_embedder.mlp.2": ("adaln_single.emb.resolution_embedder.linear_2",),
    "ar_embedder.mlp.0": ("adaln_single.emb.aspect_ratio_embedder.linear_1",),
    "ar_embedder.mlp.2": ("adaln_single.emb.aspect_ratio_embedder.linear_2",),
}
PIXART_BLOCK = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}


@pytest.mark.parametrize("name", ["pixart-sigma", "pixart-alpha"])
def test_pixart_is_as_comfyui_has_it(name: str) -> None:
    values, made = converted(name)
    modules = PIXART_ENDS | (PIXART_SIZES if name == "pixart-alpha" else {})
    expected = {"final_layer.scale_shift_table": values["scale_shift_table"]}
    for i in range(2):
        to, source = f"blocks.{i}", f"transformer_blocks.{i}"
        expected[f"{to}.scale_shift_table"] = values[f"{source}.scale_shift_table"]
        modules |= {f"{to}.{k}": tuple(f"{source}.{s}" for s in v) for k, v in PIXART_BLOCK.items()}
    for to, sources in modules.items():
        for leaf in ("weight", "bias"):
            expected[f"{to}.{leaf}"] = torch.cat([values[f"{s}.{leaf}"] for s in sources])
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("name", SAME_NAMES)
def test_models_with_the_same_names_stay_as_they_are(name: str) -> None:
    values, made = converted(name)
    assert made.keys() == values.keys()
    assert all(torch.equal(made[key], tensor) for key, tensor in values.items())


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_every_source_is_used_once_and_no_value_is_lost(name: str) -> None:
    metas = metas_of(image_shapes(name))
    made = comfyui_targets(detect(metas), metas)
    sources = [p.source for t in made for p in t.pieces]
    assert sorted(sources) == sorted(metas)
    assert len({t.name for t in made}) == len(made)
    assert sum(t.meta.numel for t in made) == sum(m.numel for m in metas.values())
    assert gguf_targets(detect(metas), metas) == made


def test_what_is_swapped() -> None:
    """The final modulation, and in SD3 that of the text in the last block; HunyuanVideo's refiner has gates there."""
    swapped: dict[str, list[str]] = {}
    for name in ("flux-dev", "flux2", "chroma", "hyvid", "sd3.5", "aura", "lumina2", "z-image"):
        metas = metas_of(image_shapes(name))
        swapped[name] = [t.name for t in comfyui_targets(detect(metas), metas) if any(p.swap for p in t.pieces)]
    final = ["final_layer.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias"]
    text = [f"joint_blocks.11.context_block.adaLN_modulation.1.{leaf}" for leaf in ("weight", "bias")]
    assert swapped == {
        **{"flux-dev": final, "flux2": final[:1], "chroma": [], "hyvid": final, "sd3.5": text + final},
        **{"aura": ["modF.1.weight"], "lumina2": [], "z-image": []},
    }


def test_a_prefix_stays_in_the_sources_only() -> None:
    metas = metas_of({f"transformer.{n}": s for n, s in image_shapes("flux-schnell").items()})
    found = detect(metas)
    assert (found.prefix, found.layout) == ("transformer.", "diffusers")
    made = comfyui_targets(found, metas)
    assert all(p.source in metas for t in made for p in t.pieces)
    assert {t.name for t in made} == {t.name for t in targets_of(narrow_values(image_shapes("flux-schnell")))}


def drop(*names: str) -> Callable[[dict[str, TensorMeta]], None]:
    return lambda metas: [metas.pop(n) for n in names] and None


def drop_block(block: str) -> Callable[[dict[str, TensorMeta]], None]:
    return lambda metas: [metas.pop(n) for n in list(metas) if n.startswith(block)] and None


def reshape(name: str, shape: tuple[int, ...]) -> Callable[[dict[str, TensorMeta]], None]:
    return lambda metas: metas.update({name: dataclasses.replace(metas[name], shape=shape)})


def more(name: str) -> Callable[[dict[str, TensorMeta]], None]:
    return lambda metas: metas.update({name: TensorMeta(name, (4, 4), torch.bfloat16)})


BROKEN = {
    "a part of qkv": ("flux-dev", drop("transformer_blocks.1.attn.to_k.weight"), "to_k.weight': missing"),
    "a bias of qkv": ("sd3", drop("transformer_blocks.1.attn.to_k.bias"), "to_k.bias': missing"),
    "the mlp of linear1": ("chroma", drop("single_transformer_blocks.1.proj_mlp.weight"), "proj_mlp.weight': missing"),
    "a tensor of one block": (
        "wan-t2v",
        drop("blocks.1.ffn.net.2.weight"),
        "'blocks.1' lacks ffn.2.weight, which other blocks have",
    ),
    "a whole block": ("sd3", drop_block("transformer_blocks.1."), "'joint_blocks.1' lacks"),
    "a layer of a UNet": ("sdxl", drop_block("down_blocks.1.resnets.0."), "gaps in its levels or layers"),
    "a level of a UNet": ("sd1", drop_block("up_blocks.2."), "gaps in its levels or layers"),
    "a tensor too many": ("flux-dev", more("ip_adapter.0.weight"), "1 tensors have no place .*'ip_adapter.0.weight'"),
    "a variant": ("hyvid", more("image_embedder.norm_in.weight"), "variant that cannot be converted"),
    "widths that differ": (
        "pixart-sigma",
        reshape("transformer_blocks.0.attn1.to_v.weight", (1152, 1151)),
        "parts do not fit together",
    ),
    "an odd modulation": ("flux-dev", reshape("norm_out.linear.bias", (6143,)), "6143 rows cannot be halved"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_nothing_is_converted_by_half(case: str) -> None:
    name, spoil, message = BROKEN[case]
    metas = metas_of(image_shapes(name))
    found = detect(metas)
    spoil(metas)
    with pytest.raises(FileError, match=message) as caught:
        comfyui_targets(found, metas)
    assert "\n" in str(caught.value) or "fit together" in message or "halved" in message


def test_a_family_without_a_table_is_refused_by_name() -> None:
    with pytest.raises(FileError, match="'mochi': diffusers' layout of it cannot be converted, only flux, flux2"):
        diffusers_to_comfyui("mochi", metas_of(image_shapes("sd3")))


# Pieces.


def rows(count: int, columns: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))


def quantized(tensor: Tensor, format_id: str = "gguf-q8-0") -> QuantizedWeight:
    return quantize_tensor("w.weight", tensor, QuantSpec(format_id))[0]


def meta(name: str, tensor: Tensor) -> TensorMeta:
    return TensorMeta(name, tuple(tensor.shape), tensor.dtype)


PIECES = {
    "whole": (Piece("a"),),
    "rows": (Piece("a", 4, 12),),
    "from": (Piece("a", 8),),
    "swapped": (Piece("a", swap=True),),
    "swapped rows": (Piece("a", 2, 8, swap=True),),
    "heads": (Piece("a", heads=4),),
    "heads back": (Piece("a", heads=-2),),
    "joined": (Piece("a"), Piece("b"), Piece("a", 0, 3)),
}


@pytest.mark.parametrize("case", PIECES)
def test_quantized_bytes_move_like_values(case: str) -> None:
    """Quantizing what was put together and putting together what was quantized is the same, bit for bit."""
    sources = {"a": rows(16), "b": rows(5, seed=1)}
    made = target("t.weight", PIECES[case], {n: meta(n, t) for n, t in sources.items()})
    plain = assemble(made, sources.__getitem__)
    assert isinstance(plain, Tensor)
    assert tuple(plain.shape) == made.shape
    blocks = {n: quantized(t) for n, t in sources.items()}
    weight = assemble(made, blocks.__getitem__)
    assert isinstance(weight, QuantizedWeight)
    assert weight.orig_shape == made.shape
    assert torch.equal(weight.tensors["qdata"], quantized(plain).tensors["qdata"])


def test_heads_are_llama_cpps_order() -> None:
    """In a head of six rows the halves 0 1 2 and 3 4 5 become pairs; negative is the way back."""
    tensor = torch.arange(12).reshape(12, 1).float()
    pairs = apply(Piece("a", heads=2), tensor)
    assert pairs[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(apply(Piece("a", heads=-2), pairs), tensor)
    bias = apply(Piece("a", heads=2), tensor[:, 0])
    assert torch.equal(bias, pairs[:, 0])


def test_a_whole_piece_is_the_tensor_itself() -> None:
    tensor = rows(4)
    assert apply(Piece("a"), tensor) is tensor
    weight = quantized(tensor)
    assert assemble(target("a", (Piece("a"),), {"a": meta("a", tensor)}), lambda _: weight) is weight


def test_dtypes_of_parts_meet_in_the_wider() -> None:
    sources = {"a": rows(2).half(), "b": rows(2).bfloat16()}
    made = target("t", (Piece("a"), Piece("b")), {n: meta(n, t) for n, t in sources.items()})
    assert made.dtype is torch.float32
    tensor = assemble(made, sources.__getitem__)
    assert isinstance(tensor, Tensor)
    assert tensor.dtype is torch.float32
    assert torch.equal(tensor[2:], sources["b"].float())


@pytest.mark.parametrize("small", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("wide", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_8_bit_floats_take_the_dtype_of_the_other_part(small: torch.dtype, wide: torch.dtype) -> None:
    """Which torch has no promotion for."""
    values: dict[str, Tensor] = {"a": torch.arange(8).to(small), "b": torch.arange(8).to(wide)}
    metas = {name: TensorMeta(name, t.shape, t.dtype) for name, t in values.items()}
    for names in (("a", "b"), ("b", "a")):
        made = target("x", tuple(map(Piece, names)), metas)
        assert made.dtype == wide
        joined = assemble(made, values.__getitem__)
        assert isinstance(joined, Tensor)
        assert torch.equal(joined, torch.arange(8).repeat(2).to(wide))


def test_8_bit_floats_of_two_kinds_meet_in_bfloat16() -> None:
    """Which holds every value of both."""
    values = {"a": torch.tensor([448.0]).to(torch.float8_e4m3fn), "b": torch.tensor([57344.0]).to(torch.float8_e5m2)}
    metas = {name: TensorMeta(name, t.shape, t.dtype) for name, t in values.items()}
    made = target("x", (Piece("a"), Piece("b")), metas)
    assert made.dtype == torch.bfloat16
    joined = assemble(made, values.__getitem__)
    assert isinstance(joined, Tensor)
    assert torch.equal(joined.float(), torch.tensor([448.0, 57344.0]))


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (Piece("a", 0, 17), "16 rows, expected at least 17"),
        (Piece("a", 3, 8, swap=True), "5 rows cannot be halved"),
        (Piece("a", heads=3), "16 rows are not 3 heads of an even width"),
        (Piece("b"), "'b': missing, and 't' is made of it"),
    ],
)
def test_pieces_that_do_not_fit(piece: Piece, message: str) -> None:
    with pytest.raises(FileError, match=message):
        target("t", (piece,), {"a": meta("a", rows(16))})


def test_a_source_that_is_not_what_the_header_said() -> None:
    made = target("t", (Piece("a"),), {"a": meta("a", rows(16))})
    with pytest.raises(FileError, match=r"'t': shape \(15, 64\), expected \(16, 64\)"):
        assemble(made, lambda _: rows(15))


def test_parts_in_several_formats_are_refused() -> None:
    sources = {"a": quantized(rows(4)), "b": quantized(rows(4), "gguf-q4-0")}
    made = target("t", (Piece("a"), Piece("b")), dict.fromkeys(sources, meta("a", rows(4))))
    with pytest.raises(WeightError, match=r"parts are in several formats.*'a' gguf-q8-0, 'b' gguf-q4-0"):
        assemble(made, sources.__getitem__)


def test_weights_whose_rows_are_not_apart_are_refused() -> None:
    tensors = {"qdata": torch.zeros(192, 1, dtype=torch.uint8), "absmax": torch.ones(6)}
    weight = QuantizedWeight("bnb-nf4", tensors, (4, 96), torch.float32)
    with pytest.raises(WeightError, match=r"'a': bnb-nf4 of shape .* cannot be cut or joined by rows: K=96 is not"):
        apply(Piece("a", 0, 2), weight)
    assert apply(Piece("a"), weight) is weight
    scale = QuantizedWeight("quanto-qint8", {"qdata": torch.zeros(4, 8), "scale": torch.ones(3)}, (4, 8), torch.float32)
    with pytest.raises(WeightError, match=r"'a': quanto-qint8 .* its scale has shape \(3,\)"):
        apply(Piece("a", 0, 2), scale)


def test_weights_with_scales_are_cut_rearranged_and_joined() -> None:
    codes = torch.arange(-32, 32, dtype=torch.int8).reshape(8, 8)
    weight = QuantizedWeight(
        "quanto-qint8", {"qdata": codes, "scale": torch.arange(1.0, 9.0).unsqueeze(1)}, (8, 8), torch.float32
    )
    exact = dequantize(weight)
    for piece in (Piece("a", 2, 6), Piece("a", swap=True), Piece("a", heads=2), Piece("a", 0, 4, heads=-1)):
        assert torch.equal(dequantize(apply(piece, weight)), apply(piece, exact)), piece
    made = target("t", (Piece("a", 4), Piece("a", 0, 4, swap=True)), {"a": meta("a", exact)})
    joined = assemble(made, {"a": weight}.__getitem__)
    assert isinstance(joined, QuantizedWeight)
    assert torch.equal(dequantize(joined), assemble(made, {"a": exact}.__getitem__))


def dequantize(weight: QuantizedWeight) -> torch.Tensor:
    return get_quantizer(weight.format_id).dequantize(weight, torch.float32)
