"""Which tensor of which model gets which ggml type, against llama.cpp's own choices."""

from __future__ import annotations

from typing import Any

import gguf
import pytest
import torch
from quantwire.quantizers.errors import SpecError
from quantwire.quantizers.files.architectures import Found
from quantwire.quantizers.files.layouts.target import Piece, Target
from quantwire.quantizers.files.recipes import (
    FALLBACKS,
    FLOATS,
    RECIPES,
    Choice,
    choose,
    find_recipe,
    kept_kind,
    nbytes,
    role_of,
)
from quantwire.quantizers.ggml_types import TYPES
from quantwire.quantizers.rules import Rule

IMAGE = Found("flux", "diffusion model", "comfyui", "", ())
TEXT = Found("llama", "text encoder", "llama.cpp", "", ())


def tensor(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Target:
    return Target(name, shape, dtype, (Piece(name),))


def flux(blocks: int = 16, width: int = 256) -> list[Target]:
    """A FLUX layout with as many single blocks as double ones."""
    found = [tensor("img_in.weight", width, 64), tensor("txt_in.weight", width, 4096)]
    for i in range(blocks):
        b = f"double_blocks.{i}"
        found += [tensor(f"{b}.img_attn.qkv.weight", 3 * width, width), tensor(f"{b}.img_attn.qkv.bias", 3 * width)]
        found += [tensor(f"{b}.img_attn.proj.weight", width, width), tensor(f"{b}.img_mlp.0.weight", 4 * width, width)]
        found.append(tensor(f"{b}.img_mlp.2.weight", width, 4 * width))
    for i in range(blocks):
        found += [tensor(f"single_blocks.{i}.linear1.weight", 7 * width, width)]
        found += [tensor(f"single_blocks.{i}.linear2.weight", width, 5 * width)]
    return [*found, tensor("final_layer.linear.weight", 64, width)]


def llama(blocks: int = 16, heads: int = 1) -> list[Target]:
    found = [tensor("token_embd.weight", 512, 256)]
    for i in range(blocks):
        b = f"blk.{i}"
        found += [tensor(f"{b}.attn_q.weight", 256, 256), tensor(f"{b}.attn_k.weight", 256 // heads, 256)]
        found += [tensor(f"{b}.attn_v.weight", 256 // heads, 256), tensor(f"{b}.attn_output.weight", 256, 256)]
        found += [tensor(f"{b}.ffn_gate.weight", 512, 256), tensor(f"{b}.ffn_up.weight", 512, 256)]
        found += [tensor(f"{b}.ffn_down.weight", 256, 512), tensor(f"{b}.attn_norm.weight", 256)]
    return found


def kinds(found: Found, targets: list[Target], recipe: str, **options: Any) -> dict[str, str]:
    choices, _ = choose(found, targets, find_recipe(recipe), **options)
    return {c.target.name: c.kind for c in choices}


def layers(table: dict[str, str], name: str) -> list[str]:
    return [kind for n, kind in table.items() if n.endswith(name)]


def test_file_types_are_those_of_llama_cpp() -> None:
    for name, recipe in RECIPES.items():
        number: Any = gguf.LlamaFileType(recipe.file_type)
        expected = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}.get(name, f"MOSTLY_{name}")
        assert number.name == expected


@pytest.mark.parametrize("name", [n for n in RECIPES if n not in FLOATS])
def test_every_recipe_on_both_kinds_of_models(name: str) -> None:
    """Every type in a table exists, fits the rows, and the file's size follows from it."""
    for found, targets in ((IMAGE, flux()), (TEXT, llama())):
        names = {t.name for t in targets}
        choices, _ = choose(found, targets, RECIPES[name], importance=names)
        used = {c.kind for c in choices if c.quantized}
        assert RECIPES[name].base in used
        assert used <= set(TYPES)
        assert all(c.target.shape[-1] % TYPES[c.kind].block == 0 for c in choices if c.quantized)
        assert all(c.change in ("", "upgrade") for c in choices)


def test_names_and_aliases() -> None:
    assert find_recipe("q4_k_m") is RECIPES["Q4_K_M"] is find_recipe("Q4_K")
    assert find_recipe("Q3_K") is RECIPES["Q3_K_M"]
    assert (find_recipe("gguf-q4-k").base, dict(find_recipe("gguf-q4-k").upgrades)) == ("Q4_K", {})
    with pytest.raises(SpecError, match=r"^Unknown GGUF type 'Q4_KM'\. Did you mean Q4_K_M"):
        find_recipe("Q4_KM")
    with pytest.raises(SpecError, match=r"Types: F32, F16, BF16, Q4_0"):
        find_recipe("bnb-nf4")


def test_q4_k_m_of_an_image_model() -> None:
    table = kinds(IMAGE, flux(), "Q4_K_M")
    # llama.cpp's use_more_bits for 16 layers: 0, 1, every third from 4 on, 14, 15.
    more = ["Q6_K" if i in (0, 1, 4, 7, 10, 13, 14, 15) else "Q4_K" for i in range(16)]
    assert layers(table, "img_mlp.2.weight") == more
    assert layers(table, "linear2.weight") == more
    assert set(layers(table, "attn.qkv.weight")) == {"Q5_K"}
    assert set(layers(table, "attn.proj.weight") + layers(table, "mlp.0.weight")) == {"Q4_K"}
    assert {table["img_in.weight"], table["txt_in.weight"], table["final_layer.linear.weight"]} == {"BF16"}
    assert set(layers(table, "qkv.bias")) == {"F32"}


def test_q4_k_s_has_fewer_upgrades() -> None:
    table = kinds(IMAGE, flux(), "Q4_K_S")
    assert layers(table, "attn.qkv.weight") == ["Q5_K"] * 4 + ["Q4_K"] * 12
    assert layers(table, "img_mlp.2.weight") == ["Q5_K"] * 2 + ["Q4_K"] * 14


QKV = {"Q3_K_M": "Q4_K", "Q3_K_L": "Q4_K", "IQ3_M": "Q4_K", "Q4_K_M": "Q5_K", "Q5_K_M": "Q6_K"}


@pytest.mark.parametrize(
    "recipe", [n for n, r in RECIPES.items() if "qkv" in r.upgrades or "qkv" in r.without_importance]
)
def test_fused_qkv_as_in_the_patch_or_else_as_v(recipe: str) -> None:
    """In the recipes that the patch changes, its types; in the others those of attention v."""
    importance = {t.name for t in flux()} if RECIPES[recipe].output == "Q5_K" and recipe != "IQ3_XXS" else None
    fused = layers(kinds(IMAGE, flux(), recipe, importance=importance), "attn.qkv.weight")
    if recipe in QKV:
        assert fused == [QKV[recipe]] * 16
    else:
        split = [tensor(f"double_blocks.{i}.attn.to_v.weight", 256, 256) for i in range(16)]
        names = None if importance is None else {t.name for t in split}
        assert fused == list(kinds(IMAGE, split, recipe, importance=names).values())


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (
            "Q3_K_M",
            {"attn_v": ["Q5_K"] * 2 + ["Q4_K"] * 14, "ffn_down": ["Q5_K"] + ["Q4_K"] * 15, "attn_output": "Q4_K"},
        ),
        ("Q3_K_L", {"attn_v": "Q5_K", "ffn_down": "Q5_K", "attn_output": "Q5_K", "attn_q": "Q3_K"}),
        ("Q2_K", {"attn_v": "Q3_K", "ffn_down": "Q3_K", "attn_output": "Q3_K", "ffn_up": "Q2_K"}),
        (
            "IQ3_XXS",
            {"attn_q": "IQ2_S", "attn_k": "IQ2_S", "attn_v": "IQ3_S", "ffn_down": ["Q4_K"] * 2 + ["Q3_K"] * 14},
        ),
        ("IQ3_XS", {"ffn_up": ["IQ3_S"] * 2 + ["IQ3_XXS"] * 12 + ["IQ3_S"] * 2, "attn_q": "IQ3_XXS"}),
        ("IQ4_XS", {"ffn_down": ["Q5_K"] * 2 + ["IQ4_XS"] * 14, "attn_v": "IQ4_XS"}),
    ],
)
def test_text_encoders_as_llama_cpp_quantizes_them(recipe: str, expected: dict[str, Any]) -> None:
    """Expected values worked out from `llama_tensor_get_type_impl` for a model of 16 layers without a matrix."""
    table = kinds(TEXT, llama(), recipe)
    for role, wanted in expected.items():
        assert layers(table, f"{role}.weight") == ([wanted] * 16 if isinstance(wanted, str) else wanted), role
    assert table["token_embd.weight"] == ("Q5_K" if recipe == "IQ3_XXS" else "Q6_K")
    assert set(layers(table, "attn_norm.weight")) == {"F32"}


def test_grouped_queries_get_a_better_v() -> None:
    assert set(layers(kinds(TEXT, llama(heads=4), "Q2_K"), "attn_v.weight")) == {"Q4_K"}
    assert set(layers(kinds(TEXT, llama(heads=2), "Q2_K"), "attn_v.weight")) == {"Q3_K"}


def test_an_importance_matrix_changes_the_choice_as_in_llama_cpp() -> None:
    names = {t.name for t in llama()}
    assert set(layers(kinds(TEXT, llama(), "IQ4_XS", importance=names), "ffn_down.weight")) == {"IQ4_XS"}


def test_large_modulation_goes_up_and_small_stays_whole() -> None:
    small = [*flux(2), *(tensor(f"double_blocks.{i}.img_mod.lin.weight", 1536, 256) for i in range(2))]
    assert set(layers(kinds(IMAGE, small, "Q4_K_M"), "mod.lin.weight")) == {"BF16"}
    large = [*flux(2), *(tensor(f"double_blocks.{i}.img_mod.lin.weight", 18432, 12288) for i in range(2))]
    assert layers(kinds(IMAGE, large, "Q4_K_M"), "mod.lin.weight") == ["BF16", "Q5_K"]
    assert layers(kinds(IMAGE, large, "Q4_K_S"), "mod.lin.weight") == ["BF16", "Q4_K"]


@pytest.mark.parametrize("kind", [k for k, t in TYPES.items() if t.block > 32 and not t.needs_importance])
def test_rows_that_are_no_whole_blocks_fall_back_as_in_llama_cpp(kind: str) -> None:
    targets = [*flux(2), tensor("double_blocks.0.txt_mlp.0.weight", 64, 96), tensor("double_blocks.1.x.weight", 64, 40)]
    choices, _ = choose(IMAGE, targets, find_recipe(f"gguf-{kind.lower().replace('_', '-')}"))
    by_name: dict[str, Choice] = {c.target.name: c for c in choices}
    first, second = by_name["double_blocks.0.txt_mlp.0.weight"], by_name["double_blocks.1.x.weight"]
    assert (first.kind, first.change) == (FALLBACKS[kind], "fallback")
    assert f"rows of 96 are not whole blocks of {TYPES[kind].block}" in first.reason
    assert (second.kind, second.change) == ("BF16", "fallback")


def test_types_that_need_a_matrix_are_refused_without_one() -> None:
    with pytest.raises(
        SpecError, match=r"^IQ2_XS: 'double_blocks.0.* would be IQ2_XS, which needs an importance matrix"
    ):
        choose(IMAGE, flux(2), RECIPES["IQ2_XS"])
    some = {"double_blocks.0.img_mlp.0.weight"}
    choices, _ = choose(IMAGE, flux(2), RECIPES["IQ2_XS"], importance=some)
    by_name = {c.target.name: c for c in choices}
    assert by_name["double_blocks.0.img_mlp.0.weight"].kind == "IQ2_XS"
    other = by_name["double_blocks.1.img_mlp.0.weight"]
    assert (other.kind, other.change) == ("Q2_K", "fallback")
    assert "there is none for it" in other.reason


def test_rules_win_over_recipe_and_families() -> None:
    rules = (Rule("img_in", "F16"), Rule("*.img_mlp.0", "q6_k"), Rule("re:single_blocks.0.", "keep"))
    table = kinds(
        IMAGE, flux(2), "Q4_K_M", rules=rules, exclude=("double_blocks.1.img_attn.proj",), include=("txt_in",)
    )
    assert (table["img_in.weight"], table["txt_in.weight"]) == ("F16", "Q4_K")
    assert set(layers(table, "img_mlp.0.weight")) == {"Q6_K"}
    assert table["single_blocks.0.linear1.weight"] == table["double_blocks.1.img_attn.proj.weight"] == "BF16"
    with pytest.raises(SpecError, match=r"^A GGUF file cannot hold bnb-nf4\."):
        kinds(IMAGE, flux(2), "Q4_K_M", rules=(Rule("img_in", "bnb-nf4"),))
    with pytest.raises(SpecError, match=r"^Pattern 'nothing' matches none"):
        kinds(IMAGE, flux(2), "Q4_K_M", exclude=("nothing",))


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (tensor("img_in.weight", 256, 64), "BF16"),
        (tensor("img_in.weight", 256, 64, dtype=torch.float16), "F16"),
        (tensor("img_in.weight", 256, 64, dtype=torch.float32), "F32"),
        (tensor("modulation.weight", 1 << 13, (1 << 11) + 64, dtype=torch.float32), "BF16"),
        (tensor("norm.weight", 256), "F32"),
        (tensor("head.modulation", 1, 2, 1536), "F32"),
        (tensor("scale_shift_table", 6, 2048, dtype=torch.float16), "F32"),
        (tensor("patch_embedding.weight", 5120, 16, 1, 2, 2), "F32"),
        (tensor("input_blocks.1.0.in_layers.2.weight", 320, 320, 3, 3), "F16"),
        (tensor("input_blocks.0.0.weight", 320, 4, 3, 3), "F32"),
        (tensor("double_stream_blocks.0.block.ff_i.gate.weight", 4, 2560), "F32"),
    ],
    ids=lambda t: t.name if isinstance(t, Target) else t,
)
def test_what_is_kept_stays_readable_for_other_loaders(target: Target, expected: str) -> None:
    """BF16 only for weights of linear layers: ComfyUI-GGUF and diffusers hold it in blocks elsewhere."""
    assert kept_kind(target) == expected


ROLES = {
    "v": [
        "blk.0.attn_v",
        "blocks.0.self_attn.v",
        "transformer_blocks.0.attn1.to_v",
        "x.attn.add_v_proj",
        "block.attn.to_v.0",
    ],
    "qkv": ["double_blocks.0.img_attn.qkv", "joint_blocks.0.x_block.attn.qkv", "double_blocks.0.img_attn_qkv"],
    "out": [
        *("double_blocks.0.img_attn.proj", "blocks.0.cross_attn.o", "x.attn1.to_out.0", "layers.0.attention.out"),
        *("double_blocks.0.txt_attn_proj", "blk.0.attn_output", "enc.blk.0.attn_o", "x.attn.to_add_out"),
    ],
    "down": [
        *("double_blocks.0.img_mlp.2", "single_blocks.0.linear2", "blocks.0.ffn.2", "x.mlp.fc2", "x.ff.net.2"),
        *(
            "layers.0.feed_forward.w2",
            "transformer_blocks.0.img_mlp.net.2",
            "blocks.0.mlp.layer2",
            "blk.0.ffn_down",
            "x.block.layer2",
        ),
    ],
    "modulation": [
        *("double_blocks.0.img_mod.lin", "x_block.adaLN_modulation.1", "transformer_blocks.0.txt_mod.1"),
        *("single_blocks.0.modulation.lin", "blocks.0.adaln_modulation_mlp.1", "double_layers.0.modX.1"),
    ],
    "": ["img_in", "blocks.0.self_attn.norm_q", "single_blocks.0.linear1", "x.to_v_scale", "out.2"],
}


@pytest.mark.parametrize(("role", "name"), [(r, n) for r, names in ROLES.items() for n in names])
def test_roles(role: str, name: str) -> None:
    assert role_of(f"{name}.weight") == role


def test_sizes() -> None:
    assert nbytes("Q4_K", (3, 512)) == 3 * 2 * 144
    assert nbytes("F32", (2, 3, 4)) == 96
