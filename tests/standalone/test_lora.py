"""LoRA files in the embedded host: every key naming, the effect against merged weights, and quantized models."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.hosts import use
from quantwire.hosts.standalone import flux, models
from quantwire.hosts.standalone.host import StandaloneHost
from quantwire.hosts.standalone.loaders import LoraLoaderModelOnly
from quantwire.hosts.standalone.lora import LoraLinear, apply_lora
from quantwire.hosts.standalone.models import DiffusionModel, load_diffusion_model
from quantwire.nodes.common import FROM_CONFIG
from quantwire.nodes.quantize import QuantizeModel
from quantwire.quantizers.errors import FileError, SpecError
from quantwire.quantizers.provenance import spec_of
from quantwire.quantizers.registry import available_formats, get_entry, get_quantizer
from quantwire.quantizers.spec import QuantSpec
from safetensors.torch import load_file, save_file
from torch import Tensor

RANK, ALPHA = 4, 2.0
# ComfyUI names of layers of every kind: a fused one, the swapped one, one that is renamed only.
LAYERS = {
    "double_blocks.0.img_attn.qkv": (768, 256),
    "double_blocks.1.txt_mlp.0": (1024, 256),
    "single_blocks.0.linear1": (1792, 256),
    "final_layer.adaLN_modulation.1": (512, 256),
}


@pytest.fixture(scope="module")
def model(demo_models: Path) -> DiffusionModel:
    return load_diffusion_model(demo_models / "diffusion_models" / "digits_flux.safetensors", torch.float32)


def factors(seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """(down, up) by ComfyUI's layer name."""
    g = torch.Generator().manual_seed(seed)
    return {
        n: (torch.randn(RANK, k, generator=g) * 0.05, torch.randn(rows, RANK, generator=g) * 0.05)
        for n, (rows, k) in LAYERS.items()
    }


def save(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({n: t.clone().contiguous() for n, t in tensors.items()}, path)
    return path


def comfy_keys(f: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    pairs = [
        (f"diffusion_model.{n}.lora_{ab}.weight", t) for n, fs in f.items() for ab, t in zip("AB", fs, strict=True)
    ]
    return dict(pairs)


def kohya_keys(f: dict[str, tuple[Tensor, Tensor]], prefix: str = "lora_unet_") -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, (down, up) in f.items():
        base = prefix + name.replace(".", "_")
        out |= {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up, f"{base}.alpha": torch.tensor(ALPHA)}
    return out


def diffusers_factors(f: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """The same LoRA split by hand into diffusers' layers."""
    out: dict[str, tuple[Tensor, Tensor]] = {}
    down, up = f["double_blocks.0.img_attn.qkv"]
    out |= {f"transformer_blocks.0.attn.to_{n}": (down, u) for n, u in zip("qkv", up.chunk(3), strict=True)}
    out["transformer_blocks.1.ff_context.net.0.proj"] = f["double_blocks.1.txt_mlp.0"]
    down, up = f["single_blocks.0.linear1"]
    parts = up.split([256, 256, 256, 1024])
    names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    out |= {f"single_transformer_blocks.0.{n}": (down, u) for n, u in zip(names, parts, strict=True)}
    down, up = f["final_layer.adaLN_modulation.1"]
    out["norm_out.linear"] = (down, torch.cat([up[256:], up[:256]]))
    return out


def diffusers_keys(f: dict[str, tuple[Tensor, Tensor]], prefix: str, leaf: str = "") -> dict[str, Tensor]:
    split = diffusers_factors(f).items()
    return {f"{prefix}{n}.lora_{ab}{leaf}.weight": t for n, fs in split for ab, t in zip("AB", fs, strict=True)}


NAMINGS: dict[str, tuple[Any, float]] = {
    "comfyui": (comfy_keys, 1.0),
    "kohya": (kohya_keys, ALPHA / RANK),
    "diffusers": (lambda f: diffusers_keys(f, "transformer."), 1.0),
    "peft": (lambda f: diffusers_keys(f, "base_model.model.", ".default"), 1.0),
    "kohya-of-diffusers": (lambda f: kohya_keys(diffusers_factors(f), "lora_transformer_"), ALPHA / RANK),
    "bare": (lambda f: {n.removeprefix("diffusion_model."): t for n, t in comfy_keys(f).items()}, 1.0),
}


def merged(demo_models: Path, tmp_path: Path, *added: tuple[dict[str, tuple[Tensor, Tensor]], float]) -> DiffusionModel:
    """The reference: the checkpoint's own tensors with the product added, loaded as any file."""
    tensors = {n: t.float() for n, t in load_file(demo_models / "diffusion_models" / "digits_flux.safetensors").items()}
    for f, scale in added:
        for name, (down, up) in f.items():
            tensors[f"{name}.weight"] += scale * up @ down
    return load_diffusion_model(save(tmp_path / "merged.safetensors", tensors))


def call(model: DiffusionModel) -> Tensor:
    g = torch.Generator().manual_seed(1)
    x, context, pooled = (torch.randn(*s, generator=g) for s in ((1, 16, 8, 8), (1, 16, 128), (1, 128)))
    with torch.inference_mode():
        return flux.velocity(model.transformer, x, 0.7, context, pooled, 3.5, model.dtype)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("naming", NAMINGS)
def test_effect_equals_merged_weights(model: DiffusionModel, demo_models: Path, tmp_path: Path, naming: str) -> None:
    """float32; measured 1.8e-7, where the LoRA itself moves the output by 5e-3 or more."""
    keys, scale = NAMINGS[naming]
    lora = save(tmp_path / "lora.safetensors", keys(factors()))
    plain = call(model)
    got = apply_lora(model, lora, 0.8)
    want = call(merged(demo_models, tmp_path, (factors(), 0.8 * scale)))
    assert distance(call(got), want) < 5e-6
    assert distance(want, plain) > 2e-3
    assert torch.equal(call(model), plain), "the input is not changed"


def test_loras_stack(model: DiffusionModel, demo_models: Path, tmp_path: Path) -> None:
    a, b = (
        save(tmp_path / "a.safetensors", comfy_keys(factors(0))),
        save(tmp_path / "b.safetensors", kohya_keys(factors(1))),
    )
    got = apply_lora(apply_lora(model, a, 1.0), b, -0.5)
    want = merged(demo_models, tmp_path, (factors(0), 1.0), (factors(1), -0.5 * ALPHA / RANK))
    assert distance(call(got), call(want)) < 5e-6
    layer: Any = got.transformer.get_submodule("transformer_blocks.0.attn.to_q")
    assert isinstance(layer, LoraLinear)
    assert isinstance(layer.layer, LoraLinear)


FORMATS = ["bnb-nf4", "bnb-int8", "quanto-qint8", "gguf-q4-0", "sdnq-uint4", "torchao-int8wo"]


@pytest.mark.parametrize("carrier", ["quantwire", "library"])
@pytest.mark.parametrize("format_id", FORMATS)
def test_on_a_quantized_model(model: DiffusionModel, tmp_path: Path, format_id: str, carrier: str) -> None:
    """Beside the quantized layer the LoRA keeps its effect: measured cosine 0.982 (bnb-int8) to 0.99998."""
    low = dataclasses.replace(model, transformer=model.transformer)
    lora = save(tmp_path / "lora.safetensors", comfy_keys(factors()))
    with use(StandaloneHost([tmp_path])):
        quantized = QuantizeModel().quantize(low, format_id, carrier)["result"][0]
    effect = call(apply_lora(quantized, lora, 1.0)) - call(quantized)
    want = call(apply_lora(low, lora, 1.0)) - call(low)
    cosine = torch.nn.functional.cosine_similarity(effect.flatten(), want.flatten(), dim=0)
    assert float(cosine) > 0.95


def test_quantizing_a_model_with_a_lora(model: DiffusionModel, tmp_path: Path) -> None:
    """The base layers are quantized, the LoRA beside them stays."""
    lora = save(tmp_path / "lora.safetensors", comfy_keys(factors()))
    with use(StandaloneHost([tmp_path])):
        after = QuantizeModel().quantize(apply_lora(model, lora, 1.0), "quanto-qint8")["result"][0]
        before = apply_lora(QuantizeModel().quantize(model, "quanto-qint8")["result"][0], lora, 1.0)
    assert torch.equal(call(after), call(before))


def effect_cosine(effect: Tensor, wanted: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(effect.flatten(), wanted.flatten(), dim=0))


def quantized_by(model: DiffusionModel, folder: Path, uri: str, **inputs: Any) -> DiffusionModel:
    with use(StandaloneHost([folder])):
        return QuantizeModel().quantize(model, FROM_CONFIG, config=QuantSpec.from_uri(uri), **inputs)["result"][0]


# Those that round activations too have a noise of their own, beside which a small LoRA stands.
ACTIVATIONS_TOO = ("bnb-int8", "torchao-int8dyn", "comfy-int8", "comfy-int8-convrot")
WEIGHT_ONLY_8_BIT = [f for f in available_formats() if 8 <= get_entry(f).bits < 9 and f not in ACTIVATIONS_TOO]


@pytest.mark.parametrize("format_id", WEIGHT_ONLY_8_BIT)
def test_exact_keeps_the_effect_at_8_bits(model: DiffusionModel, tmp_path: Path, format_id: str) -> None:
    lora = save(tmp_path / "lora.safetensors", comfy_keys(factors()))
    quantized = quantized_by(model, tmp_path, format_id)
    effect = call(apply_lora(quantized, lora, 1.0)) - call(quantized)
    assert effect_cosine(effect, call(apply_lora(model, lora, 1.0)) - call(model)) >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("format_id", [f for f in available_formats() if get_entry(f).bits < 5])
def test_requantizing_is_worse_than_exact_at_4_bits(model: DiffusionModel, tmp_path: Path, format_id: str) -> None:
    lora = save(tmp_path / "lora.safetensors", comfy_keys(factors()))
    wanted = call(apply_lora(model, lora, 1.0)) - call(model)
    cosine: dict[str, float] = {}
    for mode in ("exact", "requantize"):
        quantized = quantized_by(model, tmp_path, format_id, lora=mode)
        cosine[mode] = effect_cosine(call(apply_lora(quantized, lora, 1.0)) - call(quantized), wanted)
    assert cosine["requantize"] < cosine["exact"]


@pytest.mark.parametrize(
    "uri", ["bnb;bits=4;bits4-quant-type=nf4;bits4-use-double-quant=true", "bnb;bits=8;int8-threshold=3", "gguf-q4-0"]
)
def test_requantize_keeps_format_and_options_and_adds_in_float32(
    model: DiffusionModel, tmp_path: Path, uri: str
) -> None:
    name, spec = "transformer_blocks.0.attn.to_q", QuantSpec.from_uri(uri)
    quantized = quantized_by(model, tmp_path, uri, lora="requantize")
    before: Any = quantized.transformer.get_submodule(name)
    lora = save(tmp_path / "lora.safetensors", comfy_keys(factors()))
    after: Any = apply_lora(quantized, lora, 0.5).transformer.get_submodule(name)
    down, up = diffusers_factors(factors())[name]
    weight = before.quantized_weight
    quantizer = get_quantizer(spec.format_id)
    full = torch.addmm(quantizer.dequantize(weight, torch.float32), up, down, alpha=0.5)
    wanted = quantizer.quantize(full.to(weight.orig_dtype), spec)
    got = after.quantized_weight
    assert type(after) is type(before)
    assert got.format_id == spec.format_id
    assert spec_of(got.format_id, got.meta) == spec
    assert dict(got.meta) == dict(weight.meta)
    assert got.tensors.keys() == wanted.tensors.keys()
    assert all(torch.equal(got.tensors[n], t) for n, t in wanted.tensors.items())
    assert after.bias is before.bias or torch.equal(after.bias, before.bias)


def test_requantized_loras_stack_on_the_weight_without_any(model: DiffusionModel, tmp_path: Path) -> None:
    """Both are added to the first quantized weight, which is then rounded once, not once a LoRA."""
    name = "transformer_blocks.0.attn.to_q"
    a, b = (save(tmp_path / f"{n}.safetensors", comfy_keys(factors(n))) for n in (0, 1))
    quantized = quantized_by(model, tmp_path, "bnb-nf4", lora="requantize")
    first: Any = apply_lora(quantized, a, 1.0)
    both: Any = apply_lora(first, b, 0.5).transformer.get_submodule(name)
    quantizer, spec = get_quantizer("bnb-nf4"), QuantSpec("bnb-nf4")

    def added(layer: Any, *loras: tuple[int, float]) -> dict[str, Tensor]:
        full = quantizer.dequantize(layer.quantized_weight, torch.float32)
        for seed, strength in loras:
            down, up = diffusers_factors(factors(seed))[name]
            full = torch.addmm(full, up, down, alpha=strength)
        return dict(quantizer.quantize(full, spec).tensors)

    got = both.quantized_weight.tensors
    wanted = added(quantized.transformer.get_submodule(name), (0, 1.0), (1, 0.5))
    twice = added(first.transformer.get_submodule(name), (1, 0.5))
    assert all(torch.equal(got[n], t) for n, t in wanted.items())
    assert not torch.equal(got["qdata"], twice["qdata"])


def test_requantize_merges_an_earlier_lora_before_quantizing(
    model: DiffusionModel, demo_models: Path, tmp_path: Path
) -> None:
    """The result is that of a checkpoint with the LoRAs in it, so each weight is rounded once."""
    a, b = (save(tmp_path / f"{n}.safetensors", comfy_keys(factors(n))) for n in (0, 1))
    with_loras = apply_lora(apply_lora(model, a, 0.8), b, 0.3)
    before = call(with_loras)
    got = quantized_by(with_loras, tmp_path, "quanto-qint8", lora="requantize")
    assert not any(isinstance(m, LoraLinear) for m in got.transformer.modules())
    reference = merged(demo_models, tmp_path, (factors(0), 0.8), (factors(1), 0.3))
    wanted = quantized_by(reference, tmp_path, "quanto-qint8")
    # float32 sums in another order move a few values over a rounding step; measured 1.0e-5.
    assert distance(call(got), call(wanted)) < 1e-4
    assert torch.equal(call(with_loras), before), "the input is not changed"


def test_requantize_is_refused_for_library_layers_before_any_work(model: DiffusionModel, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="a library's own layer cannot be quantized again"):
        quantized_by(model, tmp_path, "bnb-nf4", lora="requantize", carrier="library", on_failure="full precision")


def test_on_8_bit_float_storage(model: DiffusionModel, tmp_path: Path) -> None:
    lora = save(tmp_path / "lora.safetensors", comfy_keys(factors()))
    stored = models.store_as(model, torch.float8_e4m3fn)
    effect = call(apply_lora(stored, lora, 1.0)) - call(stored)
    want = call(apply_lora(model, lora, 1.0)) - call(model)
    assert float(torch.nn.functional.cosine_similarity(effect.flatten(), want.flatten(), dim=0)) > 0.95


def test_text_encoder_parts_are_left_out(model: DiffusionModel, tmp_path: Path) -> None:
    plain = save(tmp_path / "plain.safetensors", kohya_keys(factors()))
    te = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(4, 8)}
    both = save(tmp_path / "both.safetensors", {**kohya_keys(factors()), **te})
    assert torch.equal(call(apply_lora(model, both, 1.0)), call(apply_lora(model, plain, 1.0)))


def test_strength_zero_leaves_the_model(model: DiffusionModel) -> None:
    assert LoraLoaderModelOnly().load_lora_model_only(model, "whatever", 0.0) == (model,)


DOWN = "lora_unet_double_blocks_1_txt_mlp_0.lora_down.weight"
STRANGER = {f"lora_unet_double_blocks_9_txt_mlp_0.lora_{d}.weight": torch.zeros(4, 4) for d in ("down", "up")}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.clear() or t.update(x=torch.zeros(1)), "no LoRA for this model in it (it has x"),
        (lambda t: t.pop(DOWN.replace("down", "up")), "has no partner"),
        (lambda t: t.update({"lora_unet_input_blocks_1.lora_down.weight": torch.zeros(4, 8)}), "has no partner"),
        (lambda t: t.update({"lora_unet_single_blocks_0_linear1.dora_scale": torch.zeros(1)}), "dora_scale"),
        (lambda t: t.update({DOWN: torch.zeros(4, 9)}), "does not fit"),
        (lambda t: t.update({DOWN: torch.zeros(5, 256)}), "do not multiply"),
        (lambda t: t.update({DOWN: torch.zeros(4)}), "do not multiply"),
        (lambda t: t.update(STRANGER), "double_blocks_9"),
    ],
    ids=["no-lora", "no-partner", "other-model", "dora", "width", "rank", "flat", "no-such-layer"],
)
def test_wrong_files(model: DiffusionModel, tmp_path: Path, change: Any, said: str) -> None:
    tensors = kohya_keys(factors())
    change(tensors)
    with pytest.raises(FileError) as caught:
        apply_lora(model, save(tmp_path / "lora.safetensors", tensors), 1.0)
    first = str(caught.value).splitlines()[0]
    assert first.startswith("lora.safetensors:")
    assert said in first


def test_a_model_file_is_no_lora(model: DiffusionModel, demo_models: Path) -> None:
    with pytest.raises(FileError, match="no LoRA for this model"):
        apply_lora(model, demo_models / "vae" / "digits_tae.safetensors", 1.0)
