"""Quantized files in the embedded host: every scheme and both layouts against the same weights quantized in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.hosts import use
from quantwire.hosts.standalone import flux
from quantwire.hosts.standalone.host import StandaloneHost
from quantwire.hosts.standalone.models import DiffusionModel, load_diffusion_model
from quantwire.hosts.standalone.quantized import load_quantized
from quantwire.nodes.quantize import QuantizeModel
from quantwire.quantizers.apply import quantize_tensor
from quantwire.quantizers.compat.modes import Carrier
from quantwire.quantizers.errors import FileError, SpecError, WeightError
from quantwire.quantizers.files.checkpoint import read_safetensors
from quantwire.quantizers.files.writers import writer_for
from quantwire.quantizers.registry import get_quantizer
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedLinear, QuantizedWeight
from safetensors.torch import save_file
from torch import Tensor

# (URI, layout of the writer; empty for its usual one)
TYPES = [
    ("bnb-nf4", ""),
    ("bnb-nf4;bits4-use-double-quant=true", ""),
    ("bnb-fp4;bits4-block-size=128", ""),
    ("bnb-int8", ""),
    ("comfy-fp8-e4m3fn", "comfy"),
    ("comfy-fp8-e4m3fn", "comfy-metadata"),
    ("comfy-fp8-e5m2", "comfy"),
    ("comfy-fp8-e4m3fn", "scaled-fp8"),
    ("comfy-nvfp4", ""),
    ("comfy-mxfp8", ""),
    ("comfy-int8", ""),
    ("comfy-int8-convrot;convrot-group-size=64", ""),
    ("comfy-w4a4-convrot;convrot-group-size=64", ""),
    ("comfy-w4a8;convrot-group-size=64", ""),
    ("quanto-qint8", ""),
    ("quanto-qint4", ""),
    ("quanto-qint2", ""),
    ("quanto-qfloat8-e4m3fn", ""),
    ("sdnq-int8", ""),
    ("sdnq-uint4", ""),
    ("torchao-int8wo", ""),
    ("torchao-float8wo", ""),
    ("layerwise-fp8-e4m3fn", ""),
    ("nncf-int4-asym;group-size=32", ""),
    ("gguf-q4-0", "quantwire"),
]
NEAR = ("bnb-nf4", "comfy-fp8-e4m3fn-comfy", "comfy-nvfp4", "quanto-qint4", "sdnq-uint4")  # the others are slow


def each_type() -> pytest.MarkDecorator:
    cases: list[Any] = []
    for uri, layout in TYPES:
        name = f"{uri.replace(';', ',')}{f'-{layout}' if layout else ''}"
        cases.append(pytest.param(uri, layout, id=name, marks=() if name in NEAR else pytest.mark.slow))
    return pytest.mark.parametrize(("uri", "layout"), cases)


@pytest.fixture(scope="module")
def demo(demo_models: Path) -> Path:
    return demo_models / "diffusion_models" / "digits_flux.safetensors"


@pytest.fixture(scope="module")
def plain(demo: Path) -> DiffusionModel:
    return load_diffusion_model(demo)


@pytest.fixture(scope="module")
def tensors(demo: Path) -> Mapping[str, Tensor]:
    return read_safetensors(demo).tensors  # type: ignore[return-value]


@pytest.fixture(scope="module")
def host(demo_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandaloneHost]:
    with use(StandaloneHost([demo_models], tmp_path_factory.mktemp("out"))) as active:
        yield active


@pytest.fixture(scope="module")
def in_memory(host: StandaloneHost, plain: DiffusionModel) -> Any:
    """uri -> the demo model through QuantizeModel."""
    made: dict[str, DiffusionModel] = {}

    def quantized(uri: str) -> DiffusionModel:
        if uri not in made:
            spec = QuantSpec.from_uri(uri)
            made[uri] = QuantizeModel().quantize(plain, spec.format_id, config=spec)["result"][0]  # type: ignore[index]
        return made[uri]

    return quantized


def layers_of(model: DiffusionModel) -> dict[str, QuantizedWeight]:
    modules = model.transformer.named_modules()
    return {name: m.quantized_weight for name, m in modules if isinstance(m, QuantizedLinear)}


def values(weight: QuantizedWeight) -> Tensor:
    return get_quantizer(weight.format_id).dequantize(weight, torch.float32)


def velocity(model: DiffusionModel) -> Tensor:
    seed, c = torch.Generator().manual_seed(3), model.config
    x = torch.randn(1, c.in_channels // 4, 8, 8, generator=seed)
    context, pooled = torch.randn(1, 5, c.context_dim, generator=seed), torch.randn(1, c.pooled_dim, generator=seed)
    guidance = 3.5 if c.guidance else None
    with torch.inference_mode():
        return flux.velocity(model.transformer, x, 0.7, context, pooled, guidance, model.dtype)


def save(
    path: Path, weights: Mapping[str, QuantizedWeight], others: Mapping[str, Tensor], layout: str = ""
) -> dict[str, Any]:
    """Write weights `X.weight` as the writers lay them out; returns the notes."""
    writer = writer_for(next(iter(weights.values())).format_id, layout)
    notes = {name: writer.note(name, weight) for name, weight in weights.items()}
    found: dict[str, Tensor] = dict(others)
    for name, weight in weights.items():
        found |= writer.tensors(name, weight)
    found |= writer.once(notes)
    metadata = {"format": "pt", **writer.metadata(notes)}
    save_file({name: t.contiguous().clone() for name, t in found.items()}, str(path), metadata)
    return notes


def save_folder(folder: Path, model: DiffusionModel, layout: str = "") -> None:
    """A quantized model as a folder in diffusers' layout."""
    folder.mkdir()
    weights = {f"{name}.weight": weight for name, weight in layers_of(model).items()}
    layers = set(layers_of(model))
    others = {n: p.detach() for n, p in model.transformer.named_parameters() if not _inside(n, layers)}
    others |= {f"{n}.bias": m.bias for n, m in model.transformer.named_modules() if n in layers and m.bias is not None}
    notes = save(folder / "diffusion_pytorch_model.safetensors", weights, others, layout)
    writer = writer_for(next(iter(weights.values())).format_id, layout)
    matrices = tuple(n for n, t in others.items() if t.dim() == 2)
    config: dict[str, Any] = {"_class_name": "FluxTransformer2DModel"}
    quantization = writer.config(notes, matrices)
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in getattr(writer, "beside", lambda _: {})(notes).items():
        (folder / name).write_text(json.dumps(content))


def _inside(name: str, layers: set[str]) -> bool:
    return name.rpartition(".")[0] in layers


@each_type()
def test_diffusers_folders_hold_what_was_quantized(in_memory: Any, tmp_path: Path, uri: str, layout: str) -> None:
    model = in_memory(uri)
    save_folder(tmp_path / "transformer", model, layout)
    loaded, report = load_quantized(tmp_path / "transformer")
    ours, theirs = layers_of(loaded), layers_of(model)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert ours[name].orig_shape == weight.orig_shape, name
        assert torch.equal(values(ours[name]), values(weight)), name
    assert loaded.dtype == model.dtype
    assert torch.equal(velocity(loaded), velocity(model))
    assert sum(e.action == "quantize" for e in report.entries) == len(theirs)
    assert report.format_id


def fused(tensors: Mapping[str, Tensor], uri: str) -> dict[str, QuantizedWeight]:
    """The weights of the file's blocks, quantized as they stand there: q, k and v as one."""
    spec = QuantSpec.from_uri(uri)
    names = [n for n, t in tensors.items() if t.dim() == 2 and "blocks." in n and "mod" not in n]
    return {n: quantize_tensor(n, tensors[n], spec)[0] for n in names}


@each_type()
def test_comfyui_files_are_cut_by_rows(
    tensors: Mapping[str, Tensor], plain: DiffusionModel, tmp_path: Path, uri: str, layout: str
) -> None:
    """As a part of a whole checkpoint for every other type."""
    prefix = "model.diffusion_model." if TYPES.index((uri, layout)) % 2 else ""
    weights = fused(tensors, uri)
    others = {prefix + n: t for n, t in tensors.items() if n not in weights}
    if prefix:
        others["first_stage_model.decoder.conv_in.weight"] = torch.zeros(4, 4, 3, 3)
    save(tmp_path / "model.safetensors", {prefix + n: w for n, w in weights.items()}, others, layout)
    loaded, report = load_quantized(tmp_path / "model.safetensors")
    found = layers_of(loaded)
    rows = {r.target: r for r in flux.key_map(plain.config) if r.source in weights}
    assert {f"{name}.weight" for name in found} == set(rows)
    for target, row in rows.items():
        expected = values(weights[row.source])[row.start : row.stop]
        assert torch.equal(values(found[target.removesuffix(".weight")]), expected), target
    for name, parameter in plain.transformer.named_parameters():
        if not _inside(name, set(found)):
            assert torch.equal(loaded.transformer.get_parameter(name), parameter), name
    assert torch.isfinite(velocity(loaded)).all()
    assert ("1 tensors of other parts (first_stage_model" in str(report.notes)) == bool(prefix)


ROW_BY_ROW = ["bnb-nf4", "quanto-qint8", "sdnq-int8", "torchao-int8wo", "comfy-int8", "gguf-q8-0"]


@pytest.mark.slow
@pytest.mark.parametrize("uri", ROW_BY_ROW)
def test_cut_weights_are_those_of_quantize_model(
    in_memory: Any, tensors: Mapping[str, Tensor], tmp_path: Path, uri: str
) -> None:
    """Where each row is quantized by itself, cutting and quantizing may change places."""
    expected = layers_of(in_memory(uri))
    weights = fused(tensors, uri)
    save(tmp_path / "model.safetensors", weights, {n: t for n, t in tensors.items() if n not in weights})
    found = layers_of(load_quantized(tmp_path / "model.safetensors")[0])
    both = found.keys() & expected.keys()
    assert len(both) > 15
    for name in both:
        assert torch.equal(values(found[name]), values(expected[name])), name


@pytest.mark.parametrize("uri", ["bnb-nf4", pytest.param("quanto-qint8", marks=pytest.mark.slow)])
def test_the_library_carries_the_weights_too(tensors: Mapping[str, Tensor], tmp_path: Path, uri: str) -> None:
    weights = fused(tensors, uri)
    save(tmp_path / "model.safetensors", weights, {n: t for n, t in tensors.items() if n not in weights})
    ours, _ = load_quantized(tmp_path / "model.safetensors")
    theirs, report = load_quantized(tmp_path / "model.safetensors", Carrier.LIBRARY)
    kinds = {type(m).__name__ for _, m in theirs.transformer.named_modules() if "inear" in type(m).__name__}
    assert kinds == {"Linear", {"bnb-nf4": "Linear4bit", "quanto-qint8": "QLinear"}[uri]}
    assert report.carrier == "library"
    a, b = velocity(ours), velocity(theirs)
    assert float((a - b).norm() / a.norm()) < 0.02


def test_what_the_report_says(tensors: Mapping[str, Tensor], tmp_path: Path) -> None:
    weights = fused(tensors, "bnb-nf4")
    save(tmp_path / "model.safetensors", weights, {n: t for n, t in tensors.items() if n not in weights})
    _, report = load_quantized(tmp_path / "model.safetensors")
    data, text = report.to_dict(), str(report)
    assert (data["format_id"], data["carrier"], data["family"]) == ("bnb-nf4", "quantwire", "flux")
    done = [e for e in data["entries"] if e["action"] == "quantize"]
    assert all(e["format_id"] == "bnb-nf4" and "bitsandbytes" in e["reason"] for e in done)
    assert sum(e["nbytes_out"] for e in done) == sum(w.nbytes for w in weights.values())
    assert f"in the file: {len(weights)} layers of bitsandbytes, nf4" in data["notes"]
    assert "written by bitsandbytes, layout of comfyui" in data["notes"]
    assert "bnb-nf4" in text


def damaged(tensors: Mapping[str, Tensor], folder: Path, change: Any, uri: str = "comfy-fp8-e4m3fn") -> Path:
    """A file in one of the schemes after `change` of its tensors."""
    from safetensors import safe_open

    weights = fused(tensors, uri)
    save(folder / "good.safetensors", weights, {n: t for n, t in tensors.items() if n not in weights})
    with safe_open(folder / "good.safetensors", "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    change(found)
    save_file(found, str(folder / "model.safetensors"), metadata)
    return folder / "model.safetensors"


FIRST = "double_blocks.0.img_attn.qkv"


def test_faults_are_refused_with_what_tells_more(tensors: Mapping[str, Tensor], tmp_path: Path) -> None:
    path = damaged(tensors, tmp_path, lambda t: t.pop(f"{FIRST}.weight.absmax"), "bnb-nf4")
    with pytest.raises(FileError, match=rf"model.safetensors: .*{FIRST}.*absmax.*\n`quantwire doctor {path}` tells"):
        load_quantized(path)


def test_scales_that_are_not_numbers_are_refused(tensors: Mapping[str, Tensor], tmp_path: Path) -> None:
    path = damaged(tensors, tmp_path, lambda t: t[f"{FIRST}.weight.absmax"].fill_(torch.nan), "bnb-nf4")
    with pytest.raises(WeightError, match=f"^model.safetensors: '{FIRST}.weight': its absmax holds nan or inf"):
        load_quantized(path)


def test_plain_values_that_are_not_numbers_are_refused(tensors: Mapping[str, Tensor], tmp_path: Path) -> None:
    path = damaged(tensors, tmp_path, lambda t: t[f"{FIRST}.bias"].fill_(torch.inf))
    with pytest.raises(WeightError, match="holds nan or inf"):
        load_quantized(path)


def test_scales_of_activations(tensors: Mapping[str, Tensor], tmp_path: Path) -> None:
    path = damaged(tensors, tmp_path, lambda t: t.update({f"{FIRST}.input_scale": torch.tensor(0.5)}))
    _, report = load_quantized(path)
    assert any(note.startswith("1 layers have an input_scale") for note in report.notes)
    columns = torch.ones(tensors[f"{FIRST}.weight"].shape[1])
    path = damaged(tensors, tmp_path, lambda t: t.update({f"{FIRST}.pre_quant_scale": columns}))
    with pytest.raises(SpecError, match=f"'{FIRST}.pre_quant_scale' scales each column.*\n.*ComfyUI"):
        load_quantized(path)


def test_layers_in_no_format_of_ours_are_refused(tensors: Mapping[str, Tensor], tmp_path: Path) -> None:
    def in_tiles(t: dict[str, Tensor]) -> None:
        t[f"{FIRST}.weight_format"] = torch.tensor(2, dtype=torch.uint8)

    path = damaged(tensors, tmp_path, in_tiles, "bnb-int8")
    with pytest.raises(FileError, match=f"'{FIRST}.weight' is int8: its values are in the order col_turing"):
        load_quantized(path)


def test_what_is_no_quantized_model_is_refused(demo_models: Path, demo: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"no weight of the diffusion model in it is quantized\.\n.*QuantizeModel"):
        load_quantized(demo)
    with pytest.raises(FileError, match=r"digits_clip\.safetensors: holds a text encoder, and LoadQuantized opens"):
        load_quantized(demo_models / "text_encoders" / "digits_clip.safetensors")
    with pytest.raises(FileError, match=r"digits_tae\.safetensors: holds a VAE.*\n.*VAELoader"):
        load_quantized(demo_models / "vae" / "digits_tae.safetensors")
    sdxl = {"input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(4, 4)}
    save_file(sdxl, str(tmp_path / "other.safetensors"))
    with pytest.raises(FileError, match=r"other\.safetensors: "):
        load_quantized(tmp_path / "other.safetensors")


def test_incomplete_models_are_refused(tensors: Mapping[str, Tensor], tmp_path: Path) -> None:
    path = damaged(tensors, tmp_path, lambda t: t.pop("final_layer.linear.bias"))
    with pytest.raises(FileError, match=r"model.safetensors: 'final_layer.linear.bias' is missing"):
        load_quantized(path)
    path = damaged(tensors, tmp_path, lambda t: t.update({"double_blocks.0.odd": torch.ones(3)}))
    with pytest.raises(FileError, match=r"1 unknown tensors, such as 'double_blocks.0.odd'"):
        load_quantized(path)


def test_gguf_files_go_to_their_loader(tensors: Mapping[str, Tensor], tmp_path: Path) -> None:
    from quantwire.quantizers.files.gguf_writer import write_gguf

    write_gguf(tmp_path / "model.gguf", tensors, QuantSpec("gguf-q8-0"))  # type: ignore[arg-type]
    model, report = load_quantized(tmp_path / "model.gguf")
    assert report.format_id == "gguf-q8-0"
    assert torch.isfinite(velocity(model)).all()


def test_a_dropped_scale_is_refused(tensors: Mapping[str, Tensor], tmp_path: Path) -> None:
    """Read as a plain cast the layer would be noise, without a word."""

    def drop(t: dict[str, Tensor]) -> None:
        del t[f"{FIRST}.weight_scale"], t[f"{FIRST}.comfy_quant"]

    path = damaged(tensors, tmp_path, drop)
    with pytest.raises(
        FileError, match=rf"^model.safetensors: '{FIRST}.weight' is F8_E4M3 without a scale, and \d+ la"
    ):
        load_quantized(path)


def test_codes_without_scales_are_refused(tensors: Mapping[str, Tensor], tmp_path: Path) -> None:
    def drop(t: dict[str, Tensor]) -> None:
        for name in [name for name in t if name.endswith(".SCB")]:
            del t[name], t[name.replace("SCB", "weight_format")]

    path = damaged(tensors, tmp_path, drop, "bnb-int8")
    with pytest.raises(
        FileError, match=r"^model.safetensors: 'double_blocks.0.*' is I8 .* codes whose scales are missing"
    ):
        load_quantized(path)


def test_scales_of_one_beside_plain_weights_change_nothing(tensors: Mapping[str, Tensor], tmp_path: Path) -> None:
    def scaled(t: dict[str, Tensor]) -> None:
        t["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
        for name in [name for name in t if name.endswith(".comfy_quant")]:
            del t[name]
            layer = name.removesuffix(".comfy_quant")
            t[f"{layer}.scale_weight"] = t.pop(f"{layer}.weight_scale")

    def surplus(t: dict[str, Tensor]) -> None:
        scaled(t)
        t["img_in.scale_weight"] = torch.tensor(1.0)

    wanted = velocity(load_quantized(damaged(tensors, tmp_path, scaled))[0])
    model, report = load_quantized(damaged(tensors, tmp_path, surplus))
    assert torch.equal(velocity(model), wanted)
    assert any("'img_in.scale_weight' beside BF16" in text for text in report.warnings)
