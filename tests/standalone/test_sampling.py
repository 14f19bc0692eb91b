"""KSampler's schedules and steps, against values that ComfyUI's own functions gave.

The reference values are the output of `simple_scheduler` and `normal_scheduler` (comfy/samplers.py) on
`ModelSamplingFlux()` and on `ModelSamplingDiscreteFlow` with FluxSchnell's settings (comfy/model_sampling.py), ComfyUI
0.33.0, with `KSampler.set_steps`' cut for denoise; the functions were executed on torch 2.13, CPU.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.hosts.standalone import flux, sampling
from quantwire.hosts.standalone.executor import Executor
from quantwire.hosts.standalone.models import DiffusionModel, load_diffusion_model
from quantwire.hosts.standalone.text_encoders import load_text_encoder
from quantwire.quantizers.errors import WorkflowError
from torch import Tensor

REFERENCE = {
    ("dev", "simple", 1, 1.0): [1, 0],
    ("dev", "simple", 4, 1.0): [1, 0.90453076, 0.75951093, 0.51284409, 0],
    ("dev", "simple", 7, 1.0): [1, 0.94989479, 0.88759035, 0.8081407, 0.70316905, 0.55826634, 0.344928, 0],
    ("dev", "simple", 3, 0.6): [0.82570159, 0.67798674, 0.44119978, 0],
    ("dev", "normal", 1, 1.0): [1, 0],
    ("dev", "normal", 4, 1.0): [1, 0.86337638, 0.61249208, 0.000996524, 0],
    ("dev", "normal", 7, 1.0): [1, 0.94046533, 0.86337638, 0.75962627, 0.61249208, 0.38756847, 0.000996524, 0],
    ("dev", "normal", 3, 0.6): [0.75962627, 0.51315957, 0.000996524, 0],
    ("dev", "sgm_uniform", 1, 1.0): [1, 0],
    ("dev", "sgm_uniform", 4, 1.0): [1, 0.90456712, 0.75962627, 0.51315957, 0],
    ("dev", "sgm_uniform", 7, 1.0): [1, 0.94989008, 0.88762748, 0.80818105, 0.70329845, 0.55843532, 0.34534806, 0],
    ("dev", "sgm_uniform", 3, 0.6): [0.82577735, 0.67815906, 0.44158882, 0],
    ("schnell", "simple", 1, 1.0): [1, 0],
    ("schnell", "simple", 4, 1.0): [1, 0.75, 0.5, 0.25, 0],
    ("schnell", "simple", 7, 1.0): [1, 0.85799998, 0.71499997, 0.57200003, 0.42899999, 0.28600001, 0.14300001, 0],
    ("schnell", "simple", 3, 0.6): [0.60000002, 0.40000001, 0.2, 0],
    ("schnell", "normal", 1, 1.0): [1, 0],
    ("schnell", "normal", 4, 1.0): [1, 0.667, 0.33399999, 0.001, 0],
    ("schnell", "normal", 7, 1.0): [1, 0.83350003, 0.667, 0.50050002, 0.33399999, 0.1675, 0.001, 0],
    ("schnell", "normal", 3, 0.6): [0.50050002, 0.25075001, 0.001, 0],
    ("schnell", "sgm_uniform", 1, 1.0): [1, 0],
    ("schnell", "sgm_uniform", 4, 1.0): [1, 0.75024998, 0.50050002, 0.25075001, 0],
    ("schnell", "sgm_uniform", 7, 1.0): [1, 0.85728574, 0.71457142, 0.57185709, 0.42914286, 0.28642857, 0.14371429, 0],
    ("schnell", "sgm_uniform", 3, 0.6): [0.60039997, 0.40059999, 0.2008, 0],
}


@pytest.mark.parametrize(
    ("case", "sigmas"), REFERENCE.items(), ids=lambda v: "-".join(map(str, v)) if len(v) == 4 else ""
)
def test_sigmas_are_those_of_comfyui(case: tuple[str, str, int, float], sigmas: list[float]) -> None:
    kind, scheduler, steps, denoise = case
    found = sampling.sigmas(scheduler, steps, denoise, flux.SHIFT_MU if kind == "dev" else 0.0)
    torch.testing.assert_close(found, torch.tensor(sigmas, dtype=torch.float32), rtol=0, atol=5e-7)


def test_simple_picks_the_same_index_where_the_division_is_not_exact() -> None:
    """57 * (10,000 / 76) is a little under 7500 in floating point, and ComfyUI truncates it to 7499."""
    assert int(57 * (10_000 / 76)) == 7499
    assert sampling.time_grid("simple", 76, flux.SHIFT_MU)[57] == 1 - 7499 / 10_000
    assert sampling.time_grid("simple", 38, 0.0)[19] == 1 - 499 / 1000


@pytest.fixture(scope="module")
def model(demo_models: Path) -> DiffusionModel:
    return load_diffusion_model(demo_models / "diffusion_models" / "digits_flux.safetensors")


@pytest.fixture(scope="module")
def conditions(demo_models: Path) -> tuple[sampling.Conditioning, sampling.Conditioning]:
    clip = load_text_encoder([demo_models / "text_encoders" / "digits_clip.safetensors"])
    made = []
    for text in ("a handwritten seven", "a two"):
        with torch.inference_mode():
            context, pooled = clip.encode(text)
        made.append([(context, {"pooled_output": pooled, "guidance": 3.5})])
    return made[0], made[1]


def run(model: DiffusionModel, conditions: Any, latent: Tensor | None = None, **options: Any) -> Tensor:
    latent = torch.zeros(1, 16, 8, 8) if latent is None else latent
    settings: dict[str, Any] = {"seed": 7, "steps": 3, "cfg": 1.0, "scheduler": "simple", **options}
    with torch.inference_mode():
        return sampling.sample(model, positive=conditions[0], negative=conditions[1], latent=latent, **settings)


def by_hand(
    model: DiffusionModel, conditions: Any, sigmas: list[float], latent: Tensor, cfg: float = 1.0, seed: int = 7
) -> Tensor:
    """ComfyUI's loop: denoised images, guidance between them, Euler steps of their difference quotient."""
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
    x = sigmas[0] * noise + (1 - sigmas[0]) * (latent - 0.1159) * 0.3611 if latent.any() else sigmas[0] * noise
    with torch.inference_mode():
        for now, then in itertools.pairwise(sigmas):
            denoised = []
            for [(context, extra)] in conditions:
                g, context = extra.get("guidance", 3.5), context.expand(len(x), -1, -1)
                pooled = extra["pooled_output"].expand(len(x), -1)
                v = flux.velocity(model.transformer, x, now, context, pooled, g, model.dtype)
                denoised.append(x - now * v)
            guided = denoised[0] if cfg == 1.0 else denoised[1] + cfg * (denoised[0] - denoised[1])
            x = x + (x - guided) / now * (then - now)
    return x / 0.3611 + 0.1159


def test_euler_steps(model: DiffusionModel, conditions: Any) -> None:
    sigmas = sampling.sigmas("simple", 3, 1.0, model.shift_mu).tolist()
    empty = torch.zeros(2, 16, 8, 12)
    want = by_hand(model, conditions, sigmas, empty)
    torch.testing.assert_close(run(model, conditions, empty), want, rtol=0, atol=0.05)
    assert run(model, conditions, empty).dtype is torch.float32


def test_negative_prompt_counts_with_cfg(model: DiffusionModel, conditions: Any) -> None:
    sigmas = sampling.sigmas("simple", 3, 1.0, model.shift_mu).tolist()
    want = by_hand(model, conditions, sigmas, torch.zeros(1, 16, 8, 8), cfg=2.5)
    got = run(model, conditions, cfg=2.5)
    assert float((got - want).norm() / want.norm()) < 0.02
    assert torch.equal(run(model, conditions), run(model, (conditions[0], conditions[0])))
    assert not torch.equal(run(model, conditions, cfg=2.5), run(model, (conditions[0], conditions[0]), cfg=2.5))


def test_denoise_starts_from_the_latent(model: DiffusionModel, conditions: Any) -> None:
    latent = run(model, conditions)
    sigmas = sampling.sigmas("simple", 3, 0.6, model.shift_mu).tolist()
    want = by_hand(model, conditions, sigmas, latent, seed=8)
    got = run(model, conditions, latent, denoise=0.6, seed=8)
    assert float((got - want).norm() / want.norm()) < 0.02


def test_seed_alone_decides(model: DiffusionModel, conditions: Any) -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    a = run(model, conditions)
    assert torch.equal(torch.random.get_rng_state(), state), "the process's own generator is left alone"
    torch.manual_seed(2)
    assert torch.equal(run(model, conditions), a)
    assert not torch.equal(run(model, conditions, seed=8), a)
    assert torch.isfinite(run(model, conditions, seed=2**64 - 1)).all()


@pytest.mark.parametrize(
    ("shape", "said"),
    [((1, 4, 8, 8), "16 channels"), ((1, 16, 7, 8), "even sizes"), ((16, 8, 8), "16 channels")],
    ids=["channels", "odd", "dims"],
)
def test_latents_that_do_not_fit(model: DiffusionModel, conditions: Any, shape: Any, said: str) -> None:
    with pytest.raises(WorkflowError, match=said):
        run(model, conditions, torch.zeros(shape))


def test_conditionings_that_do_not_fit(model: DiffusionModel, conditions: Any) -> None:
    [(_, extra)] = conditions[0]
    with pytest.raises(WorkflowError, match="one conditioning, got 2"):
        run(model, (conditions[0] * 2, conditions[1]))
    wide = [(torch.zeros(1, 5, 4096), extra)]
    with pytest.raises(WorkflowError, match="encodings of width 128 and pooled vectors of width 128, got 4096 and 128"):
        run(model, (wide, conditions[1]))
    assert run(model, (conditions[0], wide)).isfinite().all(), "at cfg 1 the negative prompt is not used"
    with pytest.raises(WorkflowError, match="4096"):
        run(model, (conditions[0], wide), cfg=2.0)


def test_choices_are_validated_before_the_run() -> None:
    from quantwire.hosts.standalone.core_nodes import CORE_NODES

    graph = {"1": {"class_type": "KSampler", "inputs": {"sampler_name": "dpmpp_2m", "scheduler": "karras", "steps": 0}}}
    graph["2"] = {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}
    with pytest.raises(WorkflowError) as caught:
        Executor(CORE_NODES).run(graph)
    assert all(word in str(caught.value) for word in ("dpmpp_2m", "karras", "below the minimum 1"))
