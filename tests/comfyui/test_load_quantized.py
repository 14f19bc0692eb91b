"""LoadQuantized in the real ComfyUI: files as the libraries write them, in each layout, from the header to the latent.

What is compared is one model call (the latent after one step from pure noise). ComfyUI's own files: with UNETLoader,
bit by bit. Others in ComfyUI's key layout: with QuantizeModel in the same format. Folders of diffusers: with a file of
the values that the library's own dequantizer gives, which ComfyUI's own converter for diffusers' names reads.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantized_files as files
import torch
from graphs import MODES, calls, node, sampled, unet
from quantwire.hosts.standalone.models import load_diffusion_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SAME = 1e-5  # as in test_matrix.py
PREFIX = "model.diffusion_model."
Tensors = dict[str, torch.Tensor]

# What ComfyUI's own loader reads.
NATIVE: dict[str, files.Make] = {
    **{format_id: files.comfy(format_id) for format_id in files.FORMATS},
    **{f"{name} metadata": files.comfy(name, True) for name in ("comfy-nvfp4", "comfy-int8", "comfy-fp8-e4m3fn")},
    "fp8 input_scale": files.comfy("comfy-fp8-e4m3fn", input_scale=lambda _: torch.tensor(0.02)),
    "nvfp4 scales": files.comfy(
        "comfy-nvfp4",
        input_scale=lambda _: torch.tensor(0.002),
        pre_quant_scale=lambda w: torch.linspace(0.5, 1.5, w.shape[1]),
    ),
    "fp8 full_precision": files.comfy("comfy-fp8-e4m3fn", extra={"full_precision_matrix_mult": True}),
    "w4a4 linear_dtype": files.comfy("comfy-w4a4-convrot", extra={"linear_dtype": "int8"}),
    "scaled_fp8": files.scaled_fp8(),
    "scaled_fp8 scale_input": files.scaled_fp8(0, 0.02),
    "plain fp8 e4m3fn": files.plain_fp8(torch.float8_e4m3fn),
    "plain fp8 e5m2": files.plain_fp8(torch.float8_e5m2),
}
# Row -> (file, what QuantizeModel is given).
OTHERS: dict[str, tuple[files.Make, str]] = {
    "bnb-nf4": (files.bnb("nf4"), "bnb-nf4"),
    "bnb-nf4 nested": (files.bnb("nf4", nested=True), "bnb-nf4;bits4-use-double-quant=true"),
    "bnb-fp4": (files.bnb("fp4"), "bnb-fp4"),
    "bnb-int8": (files.bnb("int8"), "bnb-int8"),
    "quanto-qint8": (files.quanto("qint8"), "quanto-qint8"),
    "quanto-qint4": (files.quanto("qint4"), "quanto-qint4"),
    "quanto-qint2": (files.quanto("qint2"), "quanto-qint2"),
    "quanto-qfloat8": (files.quanto("qfloat8_e4m3fn"), "quanto-qfloat8-e4m3fn"),
    "torchao-int8wo": (files.torchao("Int8WeightOnlyConfig", version=2), "torchao-int8wo"),
    "torchao-float8wo": (files.torchao("Float8WeightOnlyConfig"), "torchao-float8wo"),
    "nncf-int8-sym": (files.nncf("int8_sym"), "nncf-int8-sym"),
    "nncf-int4-asym": (files.nncf("int4_asym", ratio=1.0, group_size=128, all_layers=True), "nncf-int4-asym"),
    "sdnq-uint4": (files.sdnq("uint4"), "sdnq-uint4"),
    "sdnq-int8": (files.sdnq("int8"), "sdnq-int8"),
    "scaled fp8, new": (files.scaled_fp8(new=True), "comfy-fp8-e4m3fn"),
}
QWEN = {"image_model": "qwen_image", "in_channels": 64, "num_layers": 1}
OWN = ["bnb-nf4", "comfy-nvfp4", "quanto-qint4", "sdnq-uint4", "torchao-int4wo", "nncf-int4-asym", "gguf-q8-0"]


def loading(name: str, **inputs: Any) -> dict[str, Any]:
    return node("LoadQuantized", model_name=name, **inputs)


def quantizing(uri: str, model: str = "digits_flux.safetensors", **inputs: Any) -> dict[str, dict[str, Any]]:
    """UNETLoader and QuantizeModel; node `q`."""
    nodes = {"model": unet(model), "uri": node("QuantConfig", uri=uri)}
    format_id = uri.partition(";")[0]
    return {**nodes, "q": node("QuantizeModel", model=["model", 0], format=format_id, config=["uri", 0], **inputs)}


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module")
def folder(comfyui: Any) -> Path:
    return comfyui.base / "models" / "diffusion_models"


@pytest.fixture(scope="module")
def full(folder: Path) -> Tensors:
    """The model in float32, in which ComfyUI holds it on a CPU."""
    return {n: t.float() for n, t in load_file(folder / "digits_flux.safetensors").items()}


@pytest.fixture(scope="module")
def written(folder: Path, full: Tensors) -> Callable[..., str]:
    """Name of the file of a row, which is written when it is first asked for."""

    def write(row: str, prefix: str = "") -> str:
        name = f"{row}{'-all' if prefix else ''}.safetensors".replace(" ", "_").replace(",", "")
        if not (folder / name).is_file():
            make = NATIVE[row] if row in NATIVE else OTHERS[row][0]
            files.write(folder / name, make(full), prefix)
        return name

    return write


@pytest.mark.parametrize("prefix", ["", PREFIX], ids=["comfyui", "all-in-one"])
@pytest.mark.parametrize("row", NATIVE)
def test_native_files_equal_the_hosts_loader(comfyui: Any, written: Any, row: str, prefix: str) -> None:
    name = written(row, prefix)
    wanted = comfyui.latent(sampled(("model", 0), {"model": unet(name)}))
    outputs = comfyui.run(sampled(("q", 0), {"q": loading(name)}))
    assert torch.equal(comfyui.read_latent(outputs["save"]), wanted)
    report = outputs["q"]["report"][0]
    assert sum(e["action"] == "quantize" for e in report["entries"]) >= 18
    assert ("1 tensors of other parts (first_stage_model" in " ".join(report["notes"])) == bool(prefix)
    assert not report["warnings"]


@pytest.mark.parametrize("row", ["fp8 input_scale", "nvfp4 scales", "fp8 full_precision", "w4a4 linear_dtype"])
def test_native_files_come_out_as_they_went_in(comfyui: Any, folder: Path, written: Any, row: str) -> None:
    """ModelSave writes every tensor of every quantized layer again, scales of inputs and options included."""
    save = node("ModelSave", model=["q", 0], filename_prefix=f"saved/{row.replace(' ', '_')}")
    comfyui.run({"q": loading(written(row)), "save": save})
    (path,) = (comfyui.base / "output" / "saved").glob(f"{row.replace(' ', '_')}*.safetensors")
    before, after = load_file(folder / written(row)), load_file(path)
    layers = [n.removesuffix("comfy_quant") for n in before if n.endswith(".comfy_quant")]
    names = [n for n in before if n.startswith(tuple(layers)) and not n.endswith((".bias", ".comfy_quant"))]
    assert len(names) >= 3 * len(layers) - (0 if "scale" in row else len(layers))
    for name in names:
        assert before[name].shape == after[PREFIX + name].shape, name
        pair = (t[name if t is before else PREFIX + name].reshape(-1).view(torch.uint8) for t in (before, after))
        assert torch.equal(*pair), name
    for layer in layers:
        told = [
            json.loads(bytes(t.tolist())) for t in (before[f"{layer}comfy_quant"], after[f"{PREFIX}{layer}comfy_quant"])
        ]
        assert {**told[1], **told[0]} == told[1]


@pytest.mark.parametrize("row", OTHERS)
def test_other_files_equal_quantize_model(comfyui: Any, written: Any, row: str) -> None:
    uri = OTHERS[row][1]
    wanted = comfyui.latent(sampled(("q", 0), quantizing(uri)))
    outputs = comfyui.run(sampled(("q", 0), {"q": loading(written(row))}))
    assert off(comfyui.read_latent(outputs["save"]), wanted) <= SAME
    done = [e for e in outputs["q"]["report"][0]["entries"] if e["action"] == "quantize"]
    assert {e["format_id"] for e in done} == {uri.partition(";")[0]}
    assert len(done) == 18
    assert all(e["kernel"] for e in done)
    if not row.startswith("nncf"):  # whose names of parts are those of one model's modules
        whole = comfyui.latent(sampled(("q", 0), {"q": loading(written(row, PREFIX))}))
        assert off(whole, wanted) <= SAME


@pytest.mark.parametrize("format_id", OWN)
def test_own_files_equal_quantize_model(comfyui: Any, folder: Path, full: Tensors, format_id: str) -> None:
    name = files.write_own(folder / f"own-{format_id}.safetensors", full, format_id).name
    wanted = comfyui.latent(sampled(("q", 0), quantizing(format_id)))
    assert off(comfyui.latent(sampled(("q", 0), {"q": loading(name)})), wanted) <= SAME


@pytest.mark.parametrize("layout", files.COMPRESSED)
def test_compressed_tensors(comfyui: Any, folder: Path, full: Tensors, layout: str) -> None:
    """The values are those of the library's own decompressor."""
    tensors, values = files.compressed(layout, full)
    place = folder / layout
    place.mkdir()
    files.write(place / "diffusion_pytorch_model.safetensors", (tensors, {}))
    (place / "config.json").write_text(json.dumps(files.compressed_config(layout)))
    save_file(values, folder / f"{layout}-values.safetensors")
    wanted = comfyui.latent(sampled(("model", 0), {"model": unet(f"{layout}-values.safetensors")}))
    outputs = comfyui.run(sampled(("q", 0), {"q": loading(f"{layout}/diffusion_pytorch_model.safetensors")}))
    assert off(comfyui.read_latent(outputs["save"]), wanted) <= SAME
    done = [e["format_id"] for e in outputs["q"]["report"][0]["entries"] if e["action"] == "quantize"]
    assert len(done) == 18


def by_diffusers(kind: str) -> Any:
    import diffusers

    plain = {"modules_to_not_convert": list(files.PLAIN_IN_DIFFUSERS)}
    if kind == "quanto":
        return diffusers.QuantoConfig(weights_dtype="int8", **plain)
    if kind == "sdnq":
        from sdnq import SDNQConfig

        return SDNQConfig(weights_dtype="int8", **plain)
    from torchao.quantization import Int8WeightOnlyConfig

    return diffusers.TorchAoConfig(Int8WeightOnlyConfig(version=2, set_inductor_config=False), **plain)


# LLM.int8 quantizes activations too; the values alone do not.
FOLDERS = {"bnb nf4": SAME, "bnb nf4 nested": SAME, "bnb int8": 0.02, "quanto": SAME, "sdnq": SAME, "torchao": SAME}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_of_diffusers(comfyui: Any, folder: Path, tmp_path_factory: Any, kind: str) -> None:
    source, work = folder / "digits_flux.safetensors", tmp_path_factory.getbasetemp() / "diffusers"
    if kind.startswith("bnb"):
        made = files.diffusers_bnb(source, work, kind.split()[1], nested="nested" in kind)
    else:
        made = files.diffusers_model(source, work, by_diffusers(kind))
    place = folder / kind.replace(" ", "_")
    made.save_pretrained(place, **({"max_shard_size": "4MB"} if kind == "quanto" else {}))
    save_file(files.values(made), folder / f"{place.name}-values.safetensors")
    wanted = comfyui.latent(sampled(("model", 0), {"model": unet(f"{place.name}-values.safetensors")}))
    weights = sorted(place.glob("*.safetensors"))
    assert len(weights) > 1 if kind == "quanto" else len(weights) == 1
    name = f"{place.name}/{weights[0].name}"
    outputs = comfyui.run(sampled(("q", 0), {"q": loading(name)}))
    assert off(comfyui.read_latent(outputs["save"]), wanted) <= FOLDERS[kind]
    report = outputs["q"]["report"][0]
    assert "tensor names of diffusers were turned into ComfyUI's" in report["notes"]
    assert sum(e["action"] == "quantize" for e in report["entries"]) >= 17
    assert not any(e["action"] == "dequantize" for e in report["entries"])


@pytest.mark.parametrize("row", ["bnb-nf4", "quanto-qint8", "comfy-nvfp4", "scaled_fp8"])
def test_loras_and_load_modes(comfyui: Any, written: Any, row: str) -> None:
    """Every load mode gives the same, and a LoRA what it gives on QuantizeModel's layers of the same format."""
    graph, saves = calls("q", {"q": loading(written(row))}, lora="lora.safetensors")
    outputs = comfyui.run(graph)
    latents = {call: comfyui.read_latent(outputs[save]) for call, save in saves.items()}
    for lora in (False, True):
        for mode in MODES:
            assert off(latents[lora, mode], latents[lora, "default"]) <= SAME
    assert off(latents[True, "default"], latents[False, "default"]) > 0.05
    uri = OTHERS[row][1] if row in OTHERS else {"scaled_fp8": "comfy-fp8-e4m3fn"}.get(row, row)
    nodes = quantizing(uri)
    nodes["lora"] = node("LoraLoaderModelOnly", model=["q", 0], lora_name="lora.safetensors", strength_model=1.0)
    assert off(latents[True, "default"], comfyui.latent(sampled(("lora", 0), nodes))) <= SAME


@pytest.mark.parametrize("row", ["bnb-nf4", "comfy-int8", "quanto-qint4"])
def test_stays_quantized_and_can_be_made_again(comfyui: Any, folder: Path, written: Any, row: str) -> None:
    name = written(row)
    nodes = {"q": loading(name), "again": node("ProbeRemake", model=["q", 0])}
    graph = sampled(("again", 0), nodes)
    graph["tell"] = node("ProbeModel", model=["q", 0])
    outputs = comfyui.run(graph)
    assert torch.equal(comfyui.read_latent(outputs["save"]), comfyui.latent(sampled(("q", 0), {"q": loading(name)})))
    facts = json.loads(outputs["tell"]["text"][0])
    held = sum(e["nbytes_out"] for e in outputs["q"]["report"][0]["entries"])
    assert held <= facts["size"] <= held + 45_000  # the host counts 40 KB of sigmas, and the JSON of its layers
    assert held <= (folder / name).stat().st_size
    assert facts["cached"]


def test_a_wide_model_stays_on_the_disk(comfyui: Any, folder: Path) -> None:
    """No page of the quantized weights is in memory once the model is loaded."""
    asked = {"tell": node("ProbeLayout", config=json.dumps(QWEN))}
    shapes = json.loads(comfyui.run(asked)["tell"]["text"][0])
    weights = files.write_sparse(folder / "wide.safetensors", shapes)
    assert (folder / "wide.safetensors").stat().st_size > 200 * 2**20
    before = comfyui.rss_mib()
    outputs = comfyui.run({"q": loading("wide.safetensors"), "tell": node("ProbeModel", model=["q", 0])})
    assert comfyui.rss_mib() - before < 40
    report = outputs["q"]["report"][0]
    assert {e["name"] for e in report["entries"] if e["action"] == "quantize"} == weights
    assert json.loads(outputs["tell"]["text"][0])["quantized_layers"] == len(weights)


def test_library_carrier(comfyui: Any, written: Any) -> None:
    wanted = comfyui.latent(sampled(("q", 0), quantizing("quanto-qint8", carrier="library")))
    load = {"q": loading(written("quanto-qint8"), carrier="library")}
    assert torch.equal(comfyui.latent(sampled(("q", 0), load)), wanted)
    said = comfyui.fail(sampled(("q", 0), {"q": loading(written("fp8 input_scale"), carrier="library")}))
    assert "has scales for its input" in said["exception_message"]


WAN = node("EmptyHunyuanLatentVideo", width=128, height=128, length=5, batch_size=1)


def family_of(folder: Path, family: str) -> tuple[Tensors, dict[str, str]]:
    with safe_open(str(folder / f"{family}.safetensors"), "pt") as file:
        metadata = file.metadata() or {}
    return {n: t.float() for n, t in load_file(folder / f"{family}.safetensors").items()}, metadata


@pytest.mark.parametrize("family", ["tiny_sd3", "tiny_wan21"])
@pytest.mark.parametrize("row", ["bnb-nf4", "comfy-nvfp4"])
def test_other_families(comfyui: Any, folder: Path, family: str, row: str) -> None:
    empty = WAN if family == "tiny_wan21" else None
    tensors, metadata = family_of(folder, family)
    made, header = (NATIVE[row] if row in NATIVE else OTHERS[row][0])(tensors)
    name = files.write(folder / f"{family}-{row}.safetensors", (made, {**metadata, **header})).name
    nodes = {"q": unet(name)} if row in NATIVE else quantizing(OTHERS[row][1], f"{family}.safetensors")
    wanted = comfyui.latent(sampled(("q", 0), nodes, latent=empty))
    assert off(comfyui.latent(sampled(("q", 0), {"q": loading(name)}, latent=empty)), wanted) <= SAME


@pytest.mark.parametrize("format_id", ["comfy-nvfp4", "comfy-mxfp8"])
def test_padded_weights_get_the_shape_of_the_model(comfyui: Any, folder: Path, format_id: str) -> None:
    """200 columns are stored as 208 or 224; ComfyUI's own loader takes the stored rows for the model's width."""
    tensors, metadata = family_of(folder, "tiny_wan21")
    for name, t in tensors.items():
        if ".ffn.0." in name:
            tensors[name] = t[:200].clone()
        elif ".ffn.2.weight" in name:
            tensors[name] = t[:, :200].clone()
    plain = files.write(folder / "wan-200.safetensors", (tensors, metadata)).name
    made, _ = files.comfy(format_id)(tensors)
    name = files.write(folder / f"wan-200-{format_id}.safetensors", (made, metadata)).name
    wanted = comfyui.latent(sampled(("q", 0), quantizing(format_id, plain), latent=WAN))
    outputs = comfyui.run(sampled(("q", 0), {"q": loading(name)}, latent=WAN))
    assert off(comfyui.read_latent(outputs["save"]), wanted) <= SAME
    actions = [e["action"] for e in outputs["q"]["report"][0]["entries"]]
    assert actions.count("quantize") == len(files.chosen(tensors))
    assert "dequantize" not in actions


def test_lora_on_layers_whose_product_the_host_fuses(comfyui: Any, folder: Path) -> None:
    """ComfyUI multiplies Wan's feed-forward in int8 past the layer, where a LoRA must count too."""
    tensors, metadata = family_of(folder, "tiny_wan21")
    name = files.write(folder / "wan-int8.safetensors", (files.comfy("comfy-int8")(tensors)[0], metadata)).name
    generator, lora = torch.Generator().manual_seed(2), dict[str, torch.Tensor]()
    for n, w in tensors.items():
        if n.endswith(".ffn.2.weight"):
            layer = f"diffusion_model.{n.removesuffix('.weight')}"
            lora[f"{layer}.lora_A.weight"] = torch.randn(4, w.shape[1], generator=generator) * 0.3
            lora[f"{layer}.lora_B.weight"] = torch.randn(w.shape[0], 4, generator=generator) * 0.3
    save_file(lora, folder.parent / "loras" / "wan_ffn.safetensors")
    latents = {}
    for source, nodes in {"q": {"q": loading(name)}, "full": {"full": unet("tiny_wan21.safetensors")}}.items():
        graph, saves = calls(source, nodes, lora="wan_ffn.safetensors", latent=WAN)
        outputs = comfyui.run(graph)
        latents[source] = {call: comfyui.read_latent(outputs[save]) for call, save in saves.items()}
    full, got = latents["full"], latents["q"]
    wanted = full[True, "default"] - full[False, "default"]
    assert off(full[True, "default"], full[False, "default"]) > 0.05
    for mode in MODES:
        effect = got[True, mode] - got[False, "default"]
        assert float(torch.nn.functional.cosine_similarity(effect.flatten(), wanted.flatten(), dim=0)) > 0.99
        assert off(got[False, mode], got[False, "default"]) <= 0.01  # streamed layers are not fused


def test_gguf_files_are_opened_too(comfyui: Any) -> None:
    wanted = comfyui.latent(sampled(("q", 0), {"q": node("LoadGGUF", gguf_name="digits_flux-Q4_0.gguf")}))
    assert torch.equal(comfyui.latent(sampled(("q", 0), {"q": loading("digits_flux-Q4_0.gguf")})), wanted)


def no_scale(made: Tensors) -> Tensors:
    return {n: t for n, t in made.items() if n != "double_blocks.0.img_attn.qkv.weight_scale"}


def unmarked(made: Tensors) -> Tensors:
    return {n: t for n, t in made.items() if not n.endswith(".comfy_quant")}


def gptq(made: Tensors) -> Tensors:
    layer = "double_blocks.0.img_attn.qkv"
    w = made[f"{layer}.weight"]
    rest = {n: t for n, t in made.items() if n != f"{layer}.weight"}
    return rest | {
        f"{layer}.qweight": torch.zeros(w.shape[1] // 8, w.shape[0], dtype=torch.int32),
        f"{layer}.qzeros": torch.zeros(w.shape[1] // 128, w.shape[0] // 8, dtype=torch.int32),
        f"{layer}.scales": torch.ones(w.shape[1] // 128, w.shape[0], dtype=torch.float16),
        f"{layer}.g_idx": torch.arange(w.shape[1], dtype=torch.int32) // 128,
    }


def not_a_number(made: Tensors) -> Tensors:
    codes = made["double_blocks.0.img_attn.qkv.weight"].view(torch.uint8).clone()
    codes[7, 9] = 0x7F
    return made | {"double_blocks.0.img_attn.qkv.weight": codes.view(torch.float8_e4m3fn)}


def infinite_scale(made: Tensors) -> Tensors:
    return made | {"double_blocks.0.img_attn.qkv.weight_scale": torch.tensor(torch.inf)}


def no_old_scale(made: Tensors) -> Tensors:
    return {n: t for n, t in made.items() if n != "double_blocks.0.img_attn.qkv.scale_weight"}


def codes_alone(made: Tensors) -> Tensors:
    return {n: t for n, t in unmarked(made).items() if not n.endswith(".weight_scale")}


REFUSED: dict[str, tuple[str, Callable[[Tensors], Tensors], tuple[str, ...]]] = {
    "no scale": ("comfy-int8", no_scale, ("'double_blocks.0.img_attn.qkv", "quantwire doctor")),
    "no comfy_quant": ("comfy-nvfp4", unmarked, ("comfy_quant", "quantwire doctor")),
    "gptq": ("", gptq, ("GPTQ",)),
    "no old scale": ("scaled_fp8", no_old_scale, ("qkv.weight' is F8_E4M3 without a scale", "quantwire doctor")),
    "codes alone": ("comfy-int8", codes_alone, ("codes whose scales are missing", "quantwire doctor")),
    "nan among codes": ("comfy-fp8-e4m3fn", not_a_number, ("qkv.weight': its qdata holds nan or inf",)),
    "infinite scale": ("comfy-fp8-e4m3fn", infinite_scale, ("qkv.weight': its scale holds nan or inf",)),
    "full precision": ("", lambda made: made, ("no weight of the diffusion model", "QuantizeModel", "LoadAndQuantize")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(comfyui: Any, folder: Path, full: Tensors, case: str) -> None:
    row, spoil, expected = REFUSED[case]
    made = NATIVE[row](full)[0] if row else dict(full)
    name = files.write(folder / f"refused-{case.replace(' ', '_')}.safetensors", (spoil(made), {})).name
    said = comfyui.fail(sampled(("q", 0), {"q": loading(name)}))["exception_message"]
    assert said.startswith(name)
    for text in expected:
        assert text in said


def in_diffusers_layout(folder: Path) -> Tensors:
    model: Any = load_diffusion_model(folder / "digits_flux.safetensors")
    return dict(model.transformer.state_dict())


def test_parts_of_one_matrix_in_several_formats_are_dequantized(comfyui: Any, folder: Path) -> None:
    """q in bfloat16 and k and v in fp8, which ComfyUI has as one matrix: the values stay what they are."""
    plain = in_diffusers_layout(folder)
    cast = {n: t.to(torch.float8_e4m3fn) if n.endswith(("attn.to_k.weight", "attn.to_v.weight")) else t
            for n, t in plain.items()}  # fmt: skip
    save_file(cast, folder / "mixed.safetensors")
    save_file({n: t.to(plain[n].dtype) for n, t in cast.items()}, folder / "mixed-values.safetensors")
    wanted = comfyui.latent(sampled(("model", 0), {"model": unet("mixed-values.safetensors")}))
    outputs = comfyui.run(sampled(("q", 0), {"q": loading("mixed.safetensors")}))
    assert off(comfyui.read_latent(outputs["save"]), wanted) <= SAME
    report = outputs["q"]["report"][0]
    done = [e for e in report["entries"] if e["action"] == "dequantize"]
    assert done
    assert all("plain, layerwise-fp8-e4m3fn, which cannot be one weight" in e["reason"] for e in done)
    assert any("tensors were dequantized at load" in note for note in report["notes"])


def test_nvfp4_in_diffusers_layout_is_refused_with_the_name_of_the_file(comfyui: Any, folder: Path) -> None:
    save_file(NATIVE["comfy-nvfp4"](in_diffusers_layout(folder))[0], folder / "parts.safetensors")
    said = comfyui.fail(sampled(("q", 0), {"q": loading("parts.safetensors")}))["exception_message"]
    assert said.startswith("parts.safetensors: '")
    assert "comfy-nvfp4" in said


def test_files_of_something_else_are_refused(comfyui: Any, folder: Path) -> None:
    shutil.copy(folder.parent / "text_encoders" / "digits_clip.safetensors", folder / "a_clip.safetensors")
    said = comfyui.fail(sampled(("q", 0), {"q": loading("a_clip.safetensors")}))["exception_message"]
    assert "text encoder" in said.splitlines()[0]
    assert "Open it with CLIPLoader" in said
    shutil.copy(folder.parent / "loras" / "lora.safetensors", folder / "a_lora.safetensors")
    said = comfyui.fail(sampled(("q", 0), {"q": loading("a_lora.safetensors")}))["exception_message"]
    assert "LoRA" in said.splitlines()[0]
    assert "Open it with LoraLoader" in said
