"""Forecasts of activations against counted runs, and what they read off a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.quantizers.errors import SpecError
from quantwire.quantizers.families import FAMILIES
from quantwire.quantizers.measure.activations import RunShape, activations, load_formulas
from quantwire.quantizers.measure.live import LiveBytes
from quantwire.quantizers.measure.parts import ModelPart, Role, parts_of_file, parts_of_modules
from quantwire.quantizers.measure.sizes import formula_of, read_sizes
from quantwire.quantizers.plan import Slot
from quantwire.quantizers.weight import TensorMeta
from torch._subclasses.fake_tensor import FakeTensorMode

DEMO = Path(__file__).resolve().parents[2] / "demo" / "models"


def slots(**shapes: tuple[int, ...]) -> list[Slot]:
    """Slots named by keywords; `__` stands for a dot."""
    return [Slot(TensorMeta(n.replace("__", "."), s, torch.bfloat16), False) for n, s in shapes.items()]


def test_live_bytes_are_exact() -> None:
    x, weight = torch.ones(1000), torch.ones(1000)
    with LiveBytes([weight]) as live:
        live.count([x, "no tensor"])
        y = x + 1  # 4000 given, 4000 new
        z = y.view(10, 100)[3]  # a view costs nothing
        weight.view(-1)
        assert live.now == 8000
        del y
        assert live.now == 8000  # the view holds it
        del z
        assert live.now == 4000
        x.double()
    assert (live.peak, live.at) == (12000, "aten._to_copy.default")


def flux(heads: int, blocks: int) -> tuple[Any, ModelPart]:
    from diffusers import FluxTransformer2DModel

    model: Any = FluxTransformer2DModel(
        num_layers=blocks,
        num_single_layers=blocks,
        num_attention_heads=heads,
        joint_attention_dim=512,
        pooled_projection_dim=64,
    ).eval()
    return model, parts_of_modules({"model": model}, Role.DIFFUSION, "test")[0]


def run_flux(model: Any, side: int, batch: int, text: int) -> int:
    tokens = (side // 16) ** 2
    inputs = {
        "hidden_states": torch.randn(batch, tokens, 64),
        "encoder_hidden_states": torch.randn(batch, text, 512),
        "pooled_projections": torch.randn(batch, 64),
        "timestep": torch.ones(batch),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(text, 3),
    }
    with torch.no_grad(), LiveBytes([*model.parameters(), *model.buffers()]) as live:
        live.count(inputs.values())
        model(**inputs)
    return live.peak


@pytest.mark.parametrize(("side", "batch", "text"), [(256, 1, 64), (320, 2, 32)])
def test_flux_of_a_size_that_was_not_fitted_is_met(side: int, batch: int, text: int) -> None:
    model, part = flux(heads=2, blocks=1)
    said = activations(part.role, part.family, part.slots, RunShape(side, side, batch=batch, text_tokens=text), 4)
    assert said.exact_family
    assert said.nbytes == pytest.approx(run_flux(model, side, batch, text), rel=0.05)


@pytest.mark.slow
def test_depth_does_not_matter_and_fake_runs_equal_real_ones() -> None:
    real = run_flux(flux(heads=1, blocks=1)[0], 128, 1, 16)
    with FakeTensorMode():
        fake = [run_flux(flux(heads=1, blocks=n)[0], 128, 1, 16) for n in (1, 3)]
    assert fake == [real, real]


@pytest.mark.slow
def test_a_vae_is_met() -> None:
    from diffusers import AutoencoderKL

    with FakeTensorMode():
        vae: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32, 64, 128, 128),
            layers_per_block=2,
        ).eval()
        with torch.no_grad(), LiveBytes([*vae.parameters(), *vae.buffers()]) as live:
            vae.decode(torch.randn(1, 4, 48, 32))
        held = [Slot(TensorMeta(n, tuple(t.shape), t.dtype), False) for n, t in vae.state_dict().items()]
    said = activations(Role.VAE, "", held, RunShape(256, 384), 4)
    assert said.nbytes == pytest.approx(live.peak, rel=0.03)


def test_the_demos_files_and_its_modules_say_the_same() -> None:
    from quantwire.hosts.standalone.models import load_diffusion_model

    path = DEMO / "diffusion_models" / "digits_flux.safetensors"
    [of_file] = parts_of_file(path)
    [of_module] = parts_of_modules({"m": load_diffusion_model(path).transformer}, Role.DIFFUSION, "demo")
    assert read_sizes(of_file.role, of_file.slots) == read_sizes(of_module.role, of_module.slots)
    shape = RunShape(64, 64, text_tokens=16)
    assert activations(of_file.role, of_file.family, of_file.slots, shape, 2) == activations(
        of_module.role, of_module.family, of_module.slots, shape, 2
    )


@pytest.mark.parametrize(
    ("family", "formula", "comfyui", "diffusers", "sizes"),
    [
        (
            "wan",
            "wan",
            {
                "patch_embedding__weight": (1536, 16, 1, 2, 2),
                "blocks__0__ffn__0__weight": (8960, 1536),
                "text_embedding__0__weight": (1536, 4096),
            },
            {
                "patch_embedding__weight": (1536, 16, 1, 2, 2),
                "blocks__0__ffn__net__0__proj__weight": (8960, 1536),
                "condition_embedder__text_embedder__linear_1__weight": (1536, 4096),
            },
            {"width": 1536, "mlp": 8960, "context": 4096},
        ),
        (
            "sd3",
            "sd3.5-medium",
            {
                "x_embedder__proj__weight": (1536, 16, 2, 2),
                "joint_blocks__0__x_block__mlp__fc1__weight": (6144, 1536),
                "joint_blocks__0__x_block__attn2__qkv__weight": (4608, 1536),
                "context_embedder__weight": (1536, 4096),
            },
            {
                "pos_embed__proj__weight": (1536, 16, 2, 2),
                "transformer_blocks__0__ff__net__0__proj__weight": (6144, 1536),
                "transformer_blocks__0__attn2__to_q__weight": (1536, 1536),
                "context_embedder__weight": (1536, 4096),
            },
            {"width": 1536, "mlp": 6144, "context": 4096},
        ),
        (
            "flux",
            "flux2",
            {
                "model__diffusion_model__img_in__weight": (6144, 128),
                "model__diffusion_model__txt_in__weight": (6144, 15360),
                "model__diffusion_model__double_blocks__0__img_mlp__0__weight": (36864, 6144),
                "model__diffusion_model__single_stream_modulation__lin__weight": (18432, 6144),
            },
            {
                "x_embedder__weight": (6144, 128),
                "context_embedder__weight": (6144, 15360),
                "transformer_blocks__0__ff__linear_in__weight": (36864, 6144),
                "single_stream_modulation__linear__weight": (18432, 6144),
            },
            {"width": 6144, "mlp": 36864, "context": 15360},
        ),
    ],
)
def test_both_layouts_read_alike(
    family: str, formula: str, comfyui: dict[str, Any], diffusers: dict[str, Any], sizes: dict[str, int]
) -> None:
    for layout in (slots(**comfyui), slots(**diffusers)):
        assert formula_of(Role.DIFFUSION, family, layout) == formula
        assert read_sizes(Role.DIFFUSION, layout) == sizes


@pytest.mark.parametrize("prefix", ["taesd_decoder__", "decoder__layers__", "layers__"])
def test_taesd_under_each_of_its_names(prefix: str) -> None:
    held = slots(**{f"{prefix}1__weight": (64, 16, 3, 3), f"{prefix}3__conv__0__weight": (64, 64, 3, 3)})
    assert formula_of(Role.VAE, "", held) == "taesd"
    assert read_sizes(Role.VAE, held) == {"width": 64}


def test_llama_cpp_names_of_a_text_encoder() -> None:
    t5 = slots(
        token_embd__weight=(32128, 4096),
        enc__blk__0__ffn_gate__weight=(10240, 4096),
        enc__blk__0__attn_rel_b__weight=(32, 64),
    )
    assert formula_of(Role.TEXT, "t5", t5) == "t5"
    assert read_sizes(Role.TEXT, t5) == {"width": 4096, "mlp": 10240, "heads": 64}


def test_formulas_are_whole() -> None:
    formulas = load_formulas()
    for name, formula in formulas.items():
        assert formula["points"] >= 5, name
        assert all(c > 0 for terms in formula["moments"] for c in terms.values()), name
        assert formula["error_percent"] < 7 or name.startswith("any"), name
        assert 0 < formula["streamed"]["layer"] <= 1, name
        assert 0 < formula["streamed"]["block"] <= 1, name
    diffusion = {f.name for f in FAMILIES} - {"t5", "clip", "qwen-vl", "llm"}
    # Their operators read values that fake tensors do not have, or they make sound, which has no pixels.
    assert diffusion - set(formulas) == {"hidream", "ace-step", "stable-audio"}


def test_an_unknown_family_is_told_and_less_certain() -> None:
    held = slots(odd__weight=(512, 256), odder__weight=(256, 256))
    said = activations(Role.DIFFUSION, "", held, RunShape(512, 512), 2)
    known = load_formulas()["flux"]["error_percent"]
    assert not said.exact_family
    assert "was not measured" in said.how
    assert said.error_percent > 5 * known


def test_batch_guidance_frames_and_pixels_add_up() -> None:
    held = slots(patch_embedding__weight=(5120, 16, 1, 2, 2), blocks__0__ffn__0__weight=(13824, 5120))

    def of(**shape: Any) -> int:
        return activations(Role.DIFFUSION, "wan", held, RunShape(832, 480, **shape), 2).nbytes

    assert of(cfg=5.0) == of(batch=2)
    assert of(frames=81) > 2 * of(frames=33) > 4 * of(frames=13)
    assert of(frames=3) == of(frames=1)  # a latent frame stands for four
    assert of(text_tokens=1024) > of(text_tokens=512) == of()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"width": 0}, "width is 0"),
        ({"frames": -1}, "frames is -1"),
        ({"text_tokens": -2}, "text_tokens is -2"),
        ({"cfg": float("nan")}, "cfg is nan"),
    ],
)
def test_impossible_shapes(change: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        RunShape(**change)


def test_what_has_no_activations() -> None:
    with pytest.raises(SpecError, match="no activations of its own"):
        activations(Role.LORA, "", slots(a=(2, 2)), RunShape(), 2)
    with pytest.raises(SpecError, match="8 bytes a value"):
        activations(Role.VAE, "", slots(a=(2, 2)), RunShape(), 8)
    with pytest.raises(SpecError, match="no matrix"):
        activations(Role.DIFFUSION, "", [], RunShape(), 2)
