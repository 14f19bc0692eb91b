"""FLUX in ComfyUI's key layout on diffusers' model: the key map, the sizes, one call, and 8-bit storage."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from quantwire.hosts import modules
from quantwire.hosts.standalone import flux
from quantwire.hosts.standalone.models import load_diffusion_model, store_as
from quantwire.quantizers.errors import FileError, WeightError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

D = 256


def random_model(guidance: bool = True, dtype: torch.dtype = torch.float32) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=128,
        num_attention_heads=D // 128, joint_attention_dim=96, pooled_projection_dim=80, guidance_embeds=guidance,
        axes_dims_rope=(16, 56, 56),
    )  # fmt: skip
    for p in model.parameters():
        nn.init.normal_(p, std=0.05)
    return model.to(dtype).eval()


def comfy_layout(model: nn.Module) -> dict[str, Tensor]:
    """The inverse of the loader, written down from ComfyUI's model rather than from the key map under test."""
    sd, out = model.state_dict(), {}

    def move(target: str, *sources: str) -> None:
        for leaf in ("weight", "bias"):
            parts = [sd.pop(f"{s}.{leaf}") for s in sources if f"{s}.{leaf}" in sd]
            if parts:
                out[f"{target}.{leaf}"] = torch.cat(parts)

    for ours, theirs in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance")):
        move(f"{ours}.in_layer", f"time_text_embed.{theirs}_embedder.linear_1")
        move(f"{ours}.out_layer", f"time_text_embed.{theirs}_embedder.linear_2")
    move("img_in", "x_embedder")
    move("txt_in", "context_embedder")
    move("final_layer.linear", "proj_out")
    move("final_layer.adaLN_modulation.1", "norm_out.linear")
    for leaf in ("weight", "bias"):  # ComfyUI: shift, scale; diffusers: scale, shift
        name = f"final_layer.adaLN_modulation.1.{leaf}"
        out[name] = torch.cat([out[name][D:], out[name][:D]])
    for i in range(2):
        a, b = f"double_blocks.{i}", f"transformer_blocks.{i}"
        for s, c, n in (("img", "", "norm_"), ("txt", "_context", "norm_added_")):
            names = ("to_q", "to_k", "to_v") if s == "img" else ("add_q_proj", "add_k_proj", "add_v_proj")
            move(f"{a}.{s}_mod.lin", f"{b}.norm1{c}.linear")
            move(f"{a}.{s}_attn.qkv", *(f"{b}.attn.{x}" for x in names))
            move(f"{a}.{s}_attn.norm.query_norm", f"{b}.attn.{n}q")
            move(f"{a}.{s}_attn.norm.key_norm", f"{b}.attn.{n}k")
            move(f"{a}.{s}_attn.proj", f"{b}.attn." + ("to_out.0" if s == "img" else "to_add_out"))
            move(f"{a}.{s}_mlp.0", f"{b}.ff{c}.net.0.proj")
            move(f"{a}.{s}_mlp.2", f"{b}.ff{c}.net.2")
        a, b = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        move(f"{a}.modulation.lin", f"{b}.norm.linear")
        move(f"{a}.linear1", f"{b}.attn.to_q", f"{b}.attn.to_k", f"{b}.attn.to_v", f"{b}.proj_mlp")
        move(f"{a}.linear2", f"{b}.proj_out")
        move(f"{a}.norm.query_norm", f"{b}.attn.norm_q")
        move(f"{a}.norm.key_norm", f"{b}.attn.norm_k")
    assert not sd, f"left over: {list(sd)}"
    return out


def call(model: nn.Module, guidance: float | None = 3.5, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(1)
    x, context, pooled = (torch.randn(*s, generator=g) for s in ((2, 16, 8, 12), (2, 5, 96), (2, 80)))
    with torch.no_grad():
        return flux.velocity(model, x, 0.7613, context, pooled, guidance, dtype)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_file(comfy_layout(random_model()), tmp_path / "flux.safetensors")
    return tmp_path / "flux.safetensors"


@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
def test_key_map_covers_every_parameter_once(guidance: bool) -> None:
    model = random_model(guidance)
    config = flux.FluxConfig(D, 2, 2, 64, 96, 80, guidance)
    targets = [r.target for r in flux.key_map(config)]
    assert len(targets) == len(set(targets))
    assert set(targets) == set(dict(model.named_parameters()))
    source = comfy_layout(model)
    assert {r.source for r in flux.key_map(config)} == set(source)
    rows = dict.fromkeys(source, 0)
    for row in flux.key_map(config):
        rows[row.source] += flux.select_rows(source[row.source], row).shape[0]  # type: ignore[union-attr]
    assert rows == {n: t.shape[0] for n, t in source.items()}, "every row of the file lands in the model once"


@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_round_trip_is_bit_equal(tmp_path: Path, guidance: bool, dtype: torch.dtype) -> None:
    reference = random_model(guidance, dtype)
    save_file(comfy_layout(reference), tmp_path / "flux.safetensors")
    loaded = load_diffusion_model(tmp_path / "flux.safetensors")
    assert loaded.dtype is dtype
    assert loaded.config == flux.FluxConfig(D, 2, 2, 64, 96, 80, guidance)
    for name, p in reference.named_parameters():
        assert torch.equal(loaded.transformer.get_parameter(name), p), name
    value = 3.5 if guidance else None
    assert torch.equal(call(loaded.transformer, value, dtype), call(reference, value, dtype))
    assert not any(p.requires_grad for p in loaded.transformer.parameters())


def test_older_names(tmp_path: Path) -> None:
    """All-in-one files put a prefix in front, and the first files called the weight of a norm `scale`."""
    reference = random_model()
    old = {
        "model.diffusion_model." + (n[: -len("weight")] + "scale" if "_norm.weight" in n else n): t
        for n, t in comfy_layout(reference).items()
    }
    save_file(old, tmp_path / "old.safetensors")
    assert torch.equal(call(load_diffusion_model(tmp_path / "old.safetensors").transformer), call(reference))


def test_time_and_guidance_keep_float32() -> None:
    """ComfyUI embeds them before it rounds to bfloat16; diffusers rounds first, which is 6 % of the demo's velocity.

    Reference: the same weights in float32. Measured 0.0075 on these random weights; rounding first gives 0.30.
    """
    low = random_model(dtype=torch.bfloat16)
    want = call(random_model(dtype=torch.bfloat16).float())
    got = call(low, dtype=torch.bfloat16)
    rounded = low.time_text_embed
    assert not rounded._forward_pre_hooks, "the hook that does it is taken off again"
    assert float((got - want).norm() / want.norm()) < 0.015


def test_patches_and_positions() -> None:
    """Tokens are 2x2 patches, channel first, row by row, and the output is put back in the same way."""

    class Echo(nn.Module):
        time_text_embed = nn.Identity()

        def forward(self, hidden_states: Tensor, img_ids: Tensor, **_: Any) -> tuple[Tensor]:
            self.seen = hidden_states, img_ids
            return (hidden_states,)

    model, x = Echo(), torch.arange(2 * 16 * 4 * 6).float().reshape(2, 16, 4, 6)
    out = flux.velocity(model, x, 1.0, torch.zeros(2, 3, 8), torch.zeros(2, 8), 3.5, torch.float32)
    assert torch.equal(out, x)
    tokens, ids = model.seen
    assert torch.equal(tokens[1, 4], x[1, :, 2:4, 2:4].flatten())
    assert ids[4].tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("double_blocks.1.txt_mlp.2.bias"), "double_blocks.1.txt_mlp.2.bias"),
        (lambda t: t.pop("vector_in.in_layer.weight"), "vector_in.in_layer.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "unknown tensors, such as 'extra'"),
        (lambda t: t.update({"img_in.weight": torch.zeros(D + 8, 64)}), "not a multiple of FLUX's head size"),
        (lambda t: t.update({"img_in.weight": torch.zeros(D)}), "expected two dimensions"),
        (lambda t: t.update({"txt_in.bias": torch.zeros(3)}), "context_embedder.bias"),
        (lambda t: t.pop("img_in.weight"), "not a FLUX transformer"),
        (lambda t: t.update({"double_blocks.900.img_mod.lin.bias": torch.zeros(1)}), "double_blocks.2"),
        (lambda t: t.update({n: v.to(torch.int8) for n, v in t.items()}), "int8"),
    ],
    ids=["missing", "missing-size", "unknown", "odd-hidden", "flat", "shape", "other-family", "gap", "int8"],
)
def test_damaged_checkpoints(saved: Path, change: Any, said: str) -> None:
    tensors = load_file(saved)
    change(tensors)
    save_file(tensors, saved)
    with pytest.raises(FileError, match=r"flux\.safetensors") as caught:
        load_diffusion_model(saved)
    assert said in str(caught.value).splitlines()[0]


# --- 8-bit storage (weight_dtype of UNETLoader) ---


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_storage_computes_with_rounded_weights(tmp_path: Path, storage: torch.dtype) -> None:
    reference = random_model(dtype=torch.bfloat16)
    save_file(comfy_layout(reference), tmp_path / "flux.safetensors")
    plain = load_diffusion_model(tmp_path / "flux.safetensors")
    stored = store_as(plain, storage)
    assert stored.dtype is torch.bfloat16
    linear = [m for m in stored.transformer.modules() if isinstance(m, nn.Linear)]
    assert all(m.weight.dtype is storage for m in linear)
    before = call(plain.transformer, dtype=torch.bfloat16)
    assert torch.equal(before, call(reference, dtype=torch.bfloat16)), "the input keeps its weights"
    with torch.no_grad():
        for p in reference.parameters():
            p.copy_(p.to(storage).to(p.dtype))
    for _ in range(2):  # the second call sees what the first cast back
        assert torch.equal(call(stored.transformer, dtype=torch.bfloat16), call(reference, dtype=torch.bfloat16))


def test_fp8_storage_works_in_both_trees(tmp_path: Path) -> None:
    save_file(comfy_layout(random_model(dtype=torch.bfloat16)), tmp_path / "flux.safetensors")
    stored = store_as(load_diffusion_model(tmp_path / "flux.safetensors"), torch.float8_e4m3fn)
    want = call(stored.transformer, dtype=torch.bfloat16)
    twin = modules.share_tree(stored.transformer)
    name = "transformer_blocks.0.attn.to_q"
    changed = modules.with_layers(stored.transformer, {name: nn.Linear(D, D).to(torch.bfloat16)})
    assert torch.equal(call(twin, dtype=torch.bfloat16), want)
    assert not torch.equal(call(changed, dtype=torch.bfloat16), want)
    assert torch.equal(call(stored.transformer, dtype=torch.bfloat16), want)


# --- copies of module trees ---


def test_share_tree_shares_parameters_and_nothing_else() -> None:
    model = random_model()
    calls: list[str] = []
    block = model.transformer_blocks[0]
    block.register_forward_hook(lambda m, a, k, o: calls.append("post"), with_kwargs=True, always_call=True)
    block.register_forward_pre_hook(lambda m, a, k: calls.append("pre"), with_kwargs=True)
    block.register_full_backward_hook(lambda *a: None)
    block.register_buffer("temporary", torch.zeros(1), persistent=False)
    twin = modules.share_tree(model)
    assert twin is not model
    for (name, a), (_, b) in zip(model.named_modules(), twin.named_modules(), strict=True):
        assert a is not b
        assert type(a) is type(b)
        for key, value in vars(nn.Module()).items():
            mine, theirs = vars(a)[key], vars(b)[key]
            if isinstance(value, (dict, set)):
                assert mine is not theirs, f"{name}.{key}"
                assert list(mine) == list(theirs)
    assert all(p is twin.get_parameter(n) for n, p in model.named_parameters())
    assert torch.equal(call(twin), call(model))
    assert calls == ["pre", "post"] * 2
    assert "transformer_blocks.0.temporary" not in twin.state_dict()
    twin.transformer_blocks[0]._forward_hooks.clear()
    twin.register_forward_hook(lambda *a: calls.append("twin"))
    call(model)
    assert calls == ["pre", "post"] * 3


def test_with_layers_replaces_a_shared_layer_everywhere() -> None:
    shared, other = nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    twin = modules.with_layers(model, {"0": other})
    assert twin[0] is twin[2] is other
    assert model[0] is model[2] is shared
    with pytest.raises(AttributeError, match="nine"):
        modules.with_layers(model, {"nine": other})


def test_with_layers_refuses_a_tree_whose_forward_is_bound_elsewhere() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = random_model()
    add_hook_to_module(model.transformer_blocks[1], ModelHook())
    modules.with_layers(model, {"transformer_blocks.0.attn.to_q": nn.Linear(D, D)})
    with pytest.raises(WeightError, match=r"transformer_blocks\.1\.attn\.to_q.*FluxTransformerBlock"):
        modules.with_layers(model, {"transformer_blocks.1.attn.to_q": nn.Linear(D, D)})


def test_model_object_is_frozen(saved: Path) -> None:
    model = load_diffusion_model(saved)
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.source = "x"  # type: ignore[misc]
    assert str(model) == "FLUX 2+2 blocks, hidden 256, from flux.safetensors"
