"""LoadGGUF on files that this pack wrote: the blocks in memory are those that QuantizeModel makes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from quantwire.hosts.standalone.executor import Executor
from quantwire.hosts.standalone.models import load_diffusion_model
from quantwire.hosts.standalone.validate import InvalidWorkflow
from quantwire.nodes.load import LoadGGUF
from quantwire.quantizers.backends.gguf import FLOAT16_SCALES
from quantwire.quantizers.errors import FileError, SpecError
from quantwire.quantizers.files.checkpoint import read_safetensors
from quantwire.quantizers.files.gguf_writer import write_gguf
from quantwire.quantizers.kernels.kept import MIB, KeptWeights
from quantwire.quantizers.registry import get_quantizer
from quantwire.quantizers.spec import QuantSpec
from torch import nn

TYPES = ("q8_0", "q4_0")
WAN = {
    "blocks.0.self_attn.q.weight": (32, 32),
    "head.modulation": (1, 2, 32),
    "text_embedding.0.weight": (32, 32),
    "head.head.weight": (32, 32),
}


@pytest.fixture(scope="module")
def written(demo_models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    tensors: Any = read_safetensors(demo_models / "diffusion_models" / "digits_flux.safetensors").tensors
    folder = tmp_path_factory.mktemp("gguf")
    for kind in TYPES:
        write_gguf(folder / f"{kind}.gguf", tensors, QuantSpec.from_uri(f"gguf;type={kind}"))
    return {kind: folder / f"{kind}.gguf" for kind in TYPES}


@pytest.fixture
def folder(host: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "unet"  # ComfyUI's older name of diffusion_models
    folder.mkdir(parents=True)
    return folder


def dequantized(layer: nn.Module) -> torch.Tensor:
    if type(layer).__name__ == "QuantizedLinear":
        q: Any = layer.quantized_weight  # type: ignore[union-attr]
        return get_quantizer(q.format_id).dequantize(q, torch.float32)
    weight: Any = layer.weight
    values = gguf.dequantize(weight.as_tensor().numpy(), weight.quant_type)
    return torch.from_numpy(values)


@pytest.mark.parametrize("carrier", ["quantwire", "library"])
@pytest.mark.parametrize("kind", TYPES)
def test_blocks_equal_those_of_quantize_model(
    executor: Executor, sampled: Any, make_node: Any, written: dict[str, Path], folder: Path, kind: str, carrier: str
) -> None:
    shutil.copy(written[kind], folder / "demo.gguf")
    graph = sampled("g", g=make_node("LoadGGUF", gguf_name="demo.gguf", carrier=carrier))
    quantize = make_node("QuantizeModel", model=["model", 0], format=f"gguf-{kind.replace('_', '-')}", carrier=carrier)
    graph |= {"q": quantize, "gguf": make_node("Keep", value=["g", 0]), "quantized": make_node("Keep", value=["q", 0])}
    result = executor.run(graph)
    ours, theirs = (result.results[n][0].transformer for n in ("gguf", "quantized"))
    layers = {n: m for n, m in theirs.named_modules() if type(m).__name__ in ("QuantizedLinear", "GGUFLinear")}
    assert len(layers) == 29
    for name, layer in layers.items():
        assert torch.equal(dequantized(ours.get_submodule(name)), dequantized(layer)), name
    for name, parameter in theirs.named_parameters():
        if name.rpartition(".")[0] not in layers:
            assert torch.equal(ours.get_parameter(name), parameter), name
    assert torch.isfinite(result.results["image"][0]).all()
    report = result.outputs["g"]["report"][0]
    assert (report["carrier"], sum(e["action"] == "quantize" for e in report["entries"])) == (carrier, 29)


def test_carriers_sample_alike(
    executor: Executor, sampled: Any, make_node: Any, written: dict[str, Path], folder: Path
) -> None:
    """Tolerance as in test_quantize_nodes.py; measured 0.0069."""
    shutil.copy(written["q8_0"], folder / "demo.gguf")
    found = []
    for carrier in ("quantwire", "library"):
        graph = sampled("g", g=make_node("LoadGGUF", gguf_name="demo.gguf", carrier=carrier))
        found.append(executor.run(graph).results["latent"][0]["samples"])
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 0.02


def test_block_types_outside_linear_layers(
    executor: Executor, sampled: Any, make_node: Any, demo_models: Path, folder: Path
) -> None:
    """Other converters put norms and biases in blocks too, and leave embedders in them."""
    tensors: Any = read_safetensors(demo_models / "diffusion_models" / "digits_flux.safetensors").tensors
    writer = gguf.GGUFWriter(str(folder / "all.gguf"), "flux")
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in tensors.items():
        writer.add_tensor(name, gguf.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for carrier in ("quantwire", "library"):
        graph = sampled("g", g=make_node("LoadGGUF", gguf_name="all.gguf", carrier=carrier))
        graph["full"] = make_node("Keep", value=["sampler2", 0])
        graph["sampler2"] = {**graph["sampler"], "inputs": {**graph["sampler"]["inputs"], "model": ["model", 0]}}
        result = executor.run(graph)
        latent, full = (result.results[n][0]["samples"] for n in ("latent", "full"))
        assert float((latent - full).norm() / full.norm()) < 0.1, carrier


def write(path: Path, tensors: dict[str, torch.Tensor], kinds: dict[str, str], arch: str) -> None:
    writer = gguf.GGUFWriter(str(path), arch)
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType[kinds.get(name, "F32")]
        writer.add_tensor(name, gguf.quantize(tensor.float().contiguous().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_layout_of_diffusers(
    executor: Executor, sampled: Any, make_node: Any, demo_models: Path, written: dict[str, Path], folder: Path
) -> None:
    """Rows move and keep their bytes, so the model is that of the file in ComfyUI's layout; where q, k and v are of
    several types, what they make together is plain, and the report says so."""
    source = load_diffusion_model(demo_models / "diffusion_models" / "digits_flux.safetensors").transformer.state_dict()
    kinds = {n: "Q8_0" for n, t in source.items() if t.ndim == 2 and "transformer_blocks." in n}
    mixed = "transformer_blocks.0.attn.to_v.weight"
    write(folder / "diffusers.gguf", source, {n: k for n, k in kinds.items() if n != mixed}, "flux")
    result = executor.run(
        {
            "g": make_node("LoadGGUF", gguf_name="diffusers.gguf"),
            "model": make_node("Keep", value=["g", 0]),
        }
    )
    report = result.outputs["g"]["report"][0]
    plain = [e for e in report["entries"] if e["action"] == "dequantize"]
    assert [e["name"] for e in plain] == [f"transformer_blocks.0.attn.to_{n}.weight" for n in "qkv"]
    assert {e["reason"] for e in plain} == {"made of parts in several types (float32, gguf-q8-0)"}
    ours: Any = result.results["model"][0].transformer
    for name in kinds:
        layer = ours.get_submodule(name.removesuffix(".weight"))
        ggml = gguf.GGMLQuantizationType.Q8_0
        if not name.startswith("transformer_blocks.0.attn.to_"):
            values = gguf.dequantize(gguf.quantize(source[name].float().numpy(), ggml), ggml)
            assert torch.equal(dequantized(layer), torch.from_numpy(values)), name
    assert torch.equal(ours.get_submodule("transformer_blocks.0.attn.to_v").weight, source[mixed].bfloat16())
    assert torch.isfinite(
        executor.run(sampled("g", g=make_node("LoadGGUF", gguf_name="diffusers.gguf"))).results["image"][0]
    ).all()


def test_blocks_across_rows(executor: Executor, sampled: Any, make_node: Any, demo_models: Path, folder: Path) -> None:
    """ComfyUI-GGUF's converter stores matrices of other widths as rows of 256; these are dequantized."""
    tensors: Any = read_safetensors(demo_models / "diffusion_models" / "digits_flux.safetensors").tensors
    name, ggml = "img_in.weight", gguf.GGMLQuantizationType.TQ2_0
    assert tensors[name].shape[1] == 64
    writer = gguf.GGUFWriter(str(folder / "rows.gguf"), "flux")
    writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensors[name].shape))
    rows = gguf.quantize(tensors[name].float().reshape(-1, 256).numpy(), ggml)
    for other, tensor in tensors.items():
        if other == name:
            writer.add_tensor(name, rows, raw_dtype=ggml)
        else:
            writer.add_tensor(other, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    graph = sampled("g", g=make_node("LoadGGUF", gguf_name="rows.gguf"))
    result = executor.run(graph | {"gguf": make_node("Keep", value=["g", 0])})
    expected = torch.from_numpy(gguf.dequantize(rows, ggml)).reshape(tensors[name].shape).bfloat16()
    assert torch.equal(result.results["gguf"][0].transformer.x_embedder.weight, expected)
    plain = [e for e in result.outputs["g"]["report"][0]["entries"] if e["action"] == "dequantize"]
    assert [(e["name"], e["reason"]) for e in plain] == [
        ("x_embedder.weight", "TQ2_0 in the file: its blocks run across its rows")
    ]


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q5_0", "IQ2_XXS", "IQ1_M", "MXFP4"])
def test_block_types(
    executor: Executor, sampled: Any, make_node: Any, demo_models: Path, folder: Path, kind: str
) -> None:
    """Random blocks with finite scales: the values mean nothing, the arithmetic does."""
    tensors: Any = read_safetensors(demo_models / "diffusion_models" / "digits_flux.safetensors").tensors
    name, ggml = "double_blocks.0.img_mlp.0.weight", gguf.GGMLQuantizationType[kind]
    size, nbytes = gguf.GGML_QUANT_SIZES[ggml]
    n, k = tensors[name].shape
    seeded = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (n * k // size, nbytes), dtype=torch.uint8, generator=seeded)
    if kind == "IQ1_M":
        blocks[:, 48:] &= 0x1F  # the nibbles of its float16 scale lie in four scale words
    elif kind == "MXFP4":
        blocks[:, 0] = 120  # an exponent
    else:
        for at in FLOAT16_SCALES[kind]:
            blocks[:, at : at + 2] = torch.tensor([0.001], dtype=torch.float16).view(torch.uint8)
    raw = blocks.reshape(n, -1).numpy()
    expected = torch.from_numpy(gguf.quants.dequantize(raw, ggml))
    assert torch.isfinite(expected).all()
    writer = gguf.GGUFWriter(str(folder / "k.gguf"), "flux")
    for other, tensor in tensors.items():
        if other == name:
            writer.add_tensor(name, raw, raw_dtype=ggml)
        else:
            writer.add_tensor(other, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    graph = sampled("g", g=make_node("LoadGGUF", gguf_name="k.gguf"))
    graph["gguf"] = make_node("Keep", value=["g", 0])
    result = executor.run(graph)
    layer: Any = result.results["gguf"][0].transformer.get_submodule("transformer_blocks.0.ff.net.0.proj")
    assert layer.format_id == f"gguf-{kind.lower().replace('_', '-')}"
    assert torch.equal(dequantized(layer), expected)
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(1), dtype=torch.bfloat16)
    wanted = nn.functional.linear(x.float(), expected, layer.bias.float())
    # Measured 0.0056 to 0.0074: for few tokens ggml rounds activations to 8 bits, and the result is bfloat16.
    assert float((layer(x).float() - wanted).norm() / wanted.norm()) < 0.015
    assert torch.isfinite(result.results["image"][0]).all()
    library = sampled("g", g=make_node("LoadGGUF", gguf_name="k.gguf", carrier="library"))
    if kind in ("IQ2_XXS", "IQ1_M", "MXFP4"):
        with pytest.raises(SpecError, match=r"diffusers has no layer for this block type"):
            executor.run(library)
    else:
        assert torch.isfinite(executor.run(library).results["image"][0]).all()


def test_damaged_files(
    executor: Executor, sampled: Any, make_node: Any, written: dict[str, Path], folder: Path
) -> None:
    whole = written["q4_0"].read_bytes()
    cases = {
        "short.gguf": whole[: len(whole) // 2],
        "head.gguf": whole[:100],
        "text.gguf": b"hello" * 9,
        "no.gguf": b"",
    }
    for name, content in cases.items():
        (folder / name).write_bytes(content)
        with pytest.raises(FileError, match=name):
            executor.run(sampled("g", g=make_node("LoadGGUF", gguf_name=name)))


def test_wrong_loader(
    executor: Executor, sampled: Any, make_node: Any, written: dict[str, Path], folder: Path, demo_models: Path
) -> None:
    shutil.copy(demo_models / "diffusion_models" / "digits_flux.safetensors", folder / "disguised.gguf")
    with pytest.raises(FileError, match=r"not a GGUF file.*\nOpen it with the UNETLoader"):
        executor.run(sampled("g", g=make_node("LoadGGUF", gguf_name="disguised.gguf")))
    (folder / "damaged.gguf").write_bytes(b"XXUF" + written["q4_0"].read_bytes()[4:])
    with pytest.raises(FileError, match=r"not a GGUF file \(it begins with b'XXUF'\).\nIt is damaged"):
        executor.run(sampled("g", g=make_node("LoadGGUF", gguf_name="damaged.gguf")))
    shutil.copy(written["q4_0"], folder / "disguised.safetensors")
    graph = sampled()
    graph["model"]["inputs"]["unet_name"] = "disguised.safetensors"
    with pytest.raises(FileError, match="LoadGGUF"):
        executor.run(graph)


@pytest.mark.parametrize(
    ("arch", "names", "expected"),
    [
        ("wan", WAN, r"architecture wan, and the embedded host runs flux\.\nLoadGGUF opens wan in ComfyUI"),
        ("t5encoder", {"token_embd.weight": (8, 32)}, "a text encoder.*\n.*LoadGGUFTextEncoder"),
        ("new", {"layer.weight": (4, 32)}, "No known diffusion model"),
    ],
)
def test_models_that_this_host_does_not_run(
    executor: Executor, make_node: Any, folder: Path, arch: str, names: dict[str, tuple[int, ...]], expected: str
) -> None:
    write(folder / "other.gguf", {n: torch.zeros(shape) for n, shape in names.items()}, {}, arch)
    with pytest.raises(FileError, match=expected):
        executor.run({"g": make_node("LoadGGUF", gguf_name="other.gguf"), "out": make_node("Keep", value=["g", 0])})


def test_missing_file_names_what_is_there(executor: Executor, sampled: Any, make_node: Any, folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "flux-Q8_0.gguf").write_bytes(b"")
    with pytest.raises(InvalidWorkflow) as caught:
        executor.run(sampled("g", g=make_node("LoadGGUF", gguf_name="flux-Q8.gguf")))
    text = str(caught.value)
    assert "sub/flux-Q8_0.gguf" in text
    assert str(folder) in text
    assert "digits_flux.safetensors" not in text
    assert "quantwire convert" in text


def test_a_replaced_file_is_read_again(
    executor: Executor, make_node: Any, written: dict[str, Path], folder: Path
) -> None:
    graph = {"g": make_node("LoadGGUF", gguf_name="demo.gguf"), "out": make_node("Keep", value=["g", 1])}
    formats = []
    for kind in TYPES:
        shutil.copy(written[kind], folder / "demo.gguf")
        formats.append(executor.run(graph).results["out"][0].format_id)
    assert formats == ["gguf-q8-0", "gguf-q4-0"]


def test_a_replaced_part_of_a_split_model_is_another_model(folder: Path) -> None:
    """llama.cpp's names tell which files belong together."""
    for i in (1, 2, 3):
        (folder / f"demo-0000{i}-of-00003.gguf").write_bytes(b"part")
    (folder / "odd-00009-of-00003.gguf").write_bytes(b"a name and no part")
    named = ["demo-00001-of-00003.gguf", "demo-00003-of-00003.gguf", "odd-00009-of-00003.gguf"]
    before = [LoadGGUF.IS_CHANGED(gguf_name=name) for name in named]
    assert [LoadGGUF.IS_CHANGED(gguf_name=name) for name in named] == before
    (folder / "demo-00002-of-00003.gguf").write_bytes(b"other part")
    changed = [LoadGGUF.IS_CHANGED(gguf_name=name) for name in named]
    assert [a != b for a, b in zip(changed, before, strict=True)] == [True, True, False]
    (folder / "demo-00002-of-00003.gguf").unlink()
    assert LoadGGUF.IS_CHANGED(gguf_name=named[0]) not in (before[0], changed[0])


def test_dequantized_weights_are_kept_within_the_budget(
    executor: Executor, sampled: Any, make_node: Any, written: dict[str, Path], folder: Path
) -> None:
    shutil.copy(written["q8_0"], folder / "demo.gguf")
    images = {}
    for mib in (0, 3):
        graph = sampled("g", g=make_node("LoadGGUF", gguf_name="demo.gguf", cache_mib=mib))
        graph |= {"model": make_node("Keep", value=["g", 0]), "report": make_node("Keep", value=["g", 1])}
        result = executor.run(graph)
        transformer, report = result.results["model"][0].transformer, result.results["report"][0]
        images[mib] = result.results["image"][0]
        kept = KeptWeights.of(transformer)
        assert (kept is not None) == bool(mib)
        if kept is not None:
            assert "up to 3 MiB of dequantized weights of 29 layers are kept" in str(report)
            assert 2 * MIB < kept.nbytes <= 3 * MIB
    assert float((images[3] - images[0]).abs().mean()) < 0.01


def test_library_layers_keep_nothing(
    executor: Executor, make_node: Any, written: dict[str, Path], folder: Path
) -> None:
    shutil.copy(written["q8_0"], folder / "demo.gguf")
    loader = make_node("LoadGGUF", gguf_name="demo.gguf", carrier="library", cache_mib=64)
    with pytest.raises(SpecError, match="cache_mib: a library's own layers"):
        executor.run({"g": loader, "out": make_node("Keep", value=["g", 0])})
