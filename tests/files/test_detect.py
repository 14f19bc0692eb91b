"""What files are, from their headers: components, types, origin, loaders, and names that disagree."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from header_files import header_of, on_meta, plain, write_header
from quantwire.cli import main
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.files.components import Component
from quantwire.quantizers.files.detect import FileFacts, detect_file
from quantwire.quantizers.files.gguf_layout import layout, number, text, total_nbytes
from quantwire.quantizers.files.loading import COMFYUI, LIBRARIES, STANDALONE, Library, is_installed
from quantwire.quantizers.formats import BACKENDS
from real_models import IMAGE_MODELS, TEXT_MODELS
from safetensors.torch import save_file

FLUX = "diffusion_models/digits_flux.safetensors"


def node(facts: FileFacts, host: str = COMFYUI) -> str:
    return next(x.node for x in facts.loads if x.host == host)


def note(facts: FileFacts, host: str = COMFYUI) -> str:
    return next(x.note for x in facts.loads if x.host == host)


def nf4(weights: dict[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    """Weights as bitsandbytes' own layers write them."""
    functional = pytest.importorskip("bitsandbytes").functional
    found: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", **options)
        found[name] = packed
        found |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    return found


@pytest.fixture(scope="module")
def flux_nf4(demo_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, its blocks quantized by bitsandbytes."""
    from quantwire.quantizers.files.checkpoint import read_safetensors

    tensors = dict(read_safetensors(demo_models / FLUX).tensors)
    inner = {n: t for n, t in tensors.items() if "_blocks." in n and n.endswith(".weight") and t.ndim == 2}
    path = tmp_path_factory.mktemp("nf4") / "flux-nf4.safetensors"
    rest = {n: t.clone() for n, t in tensors.items() if n not in inner}
    save_file(rest | nf4({n: t.clone() for n, t in inner.items()}), path, {"format": "pt"})
    return path


def test_a_plain_diffusion_model(demo_models: Path) -> None:
    facts = detect_file(demo_models / FLUX)
    assert facts.main.component is Component.DIFFUSION
    assert (facts.main.family, facts.main.layout, facts.main.prefix) == ("flux", "comfyui", "")
    assert [(t.type, t.scheme, t.bits) for t in facts.types] == [("BF16", "", 16.0)]
    assert (node(facts), node(facts, STANDALONE)) == ("UNETLoader", "UNETLoader")
    assert facts.memory.weights == facts.memory.full_precision == facts.nbytes
    assert facts.title == "FLUX.1 diffusion model, plain BF16"
    assert not facts.warnings


def test_bitsandbytes(flux_nf4: Path, demo_models: Path) -> None:
    facts = detect_file(flux_nf4)
    assert facts.types[0].format_id == "bnb-nf4"
    assert facts.types[0].bits == pytest.approx(4.5, abs=0.1)
    assert sum(t.nbytes for t in facts.types) == facts.nbytes
    assert facts.libraries == ("bitsandbytes",)
    assert (node(facts), node(facts, STANDALONE)) == ("LoadQuantized", "LoadQuantized")
    loading = facts.loads[0]
    assert loading.libraries == (Library("bitsandbytes", installed=True, needed=False),)
    plain_shapes = {name: shape for name, (_, shape) in header_of(demo_models / FLUX).items()}
    inner = {n: math.prod(s) for n, s in plain_shapes.items() if "_blocks." in n and n.endswith(".weight")}
    assert facts.memory.largest == 2 * inner[facts.memory.largest_layer] == 2 * max(inner.values())
    assert facts.memory.full_precision > facts.memory.weights
    assert facts.title == "FLUX.1 diffusion model, bitsandbytes nf4"
    assert not facts.warnings


@pytest.mark.parametrize("name", ["flux-dev", "flux2", "sd3", "wan-t2v", "sd1", "sdxl", "z-image", "hyvid"])
def test_models_of_diffusers(name: str, tmp_path: Path) -> None:
    family, _, make = IMAGE_MODELS[name]
    with torch.device("meta"):
        state = make().state_dict()
    facts = detect_file(write_header(tmp_path / "model.safetensors", plain(state.items())))
    assert (facts.main.component, facts.main.family) == (Component.DIFFUSION, family)
    # ComfyUI 0.33's UNETLoader does not know these under the names of diffusers.
    assert node(facts) == ("" if name in ("flux2", "wan-t2v", "hyvid") else "UNETLoader")
    assert node(facts, STANDALONE) == ""
    assert ("in ComfyUI's layout" if family == "flux" else "Only FLUX.1 runs") in note(facts, STANDALONE)


@pytest.mark.parametrize("name", ["t5encoder", "llama"])
def test_text_encoders(name: str, tmp_path: Path) -> None:
    family, make = TEXT_MODELS[name]
    with torch.device("meta"):
        state = make().state_dict()
    facts = detect_file(write_header(tmp_path / "model.safetensors", plain(state.items())))
    assert (facts.main.component, facts.main.family) == (Component.TEXT, family)
    assert node(facts) == "CLIPLoader"
    assert node(facts, STANDALONE) == ("CLIPLoader" if name == "t5encoder" else "")


def test_other_components(tmp_path: Path) -> None:
    import diffusers
    import transformers as t

    small = {"num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 64, "num_attention_heads": 4}
    vision = {"num_hidden_layers": 1, "intermediate_size": 64, "hidden_size": 64, "num_attention_heads": 4}
    unet = {"cross_attention_dim": 2048, "block_out_channels": (32, 32, 32, 32), "norm_num_groups": 8}
    cases: list[tuple[dict[str, Any], Component, str, str]] = [
        (on_meta(diffusers.AutoencoderKL, latent_channels=16, block_out_channels=(32,)), Component.VAE, "image", "16"),
        (on_meta(diffusers.AutoencoderKL, latent_channels=4, block_out_channels=(32,)), Component.VAE, "image", "4"),
        (on_meta(diffusers.AutoencoderKLWan, base_dim=16), Component.VAE, "video", "16"),
        (on_meta(diffusers.AutoencoderTiny, latent_channels=16), Component.VAE, "tiny (TAESD)", "16"),
        (
            plain(_meta(lambda: t.CLIPTextModel(t.CLIPTextConfig(hidden_size=768, **small))).items()),
            Component.TEXT, "CLIP-L", "768",
        ),
        (
            plain(_meta(lambda: t.CLIPTextModelWithProjection(t.CLIPTextConfig(hidden_size=1280, **small))).items()),
            Component.TEXT, "CLIP-G", "1280",
        ),
        (
            plain(_meta(lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**vision))).items()),
            Component.CLIP_VISION, "", "",
        ),
        (on_meta(diffusers.ControlNetModel, **unet), Component.CONTROLNET, "sdxl", ""),
        (on_meta(diffusers.FluxControlNetModel, num_layers=1, num_single_layers=1), Component.CONTROLNET, "flux", ""),
    ]  # fmt: skip
    for i, (tensors, component, family, detail) in enumerate(cases):
        facts = detect_file(write_header(tmp_path / f"{i}.safetensors", tensors))
        assert (facts.main.component, facts.main.family) == (component, family), i
        assert facts.main.detail.startswith(detail), i
        assert node(facts).startswith({"CLIP-L": "CLIPLoader", "CLIP-G": "CLIPLoader"}.get(family, "")), i
        assert node(facts), i


def _meta(make: Any) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return make().state_dict()


LORAS = {
    "kohya": (
        {
            "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (16, 3072),
            "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": (9216, 16),
            "lora_unet_double_blocks_0_img_attn_qkv.alpha": (),
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (16, 768),
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": (3072, 16),
        },
        "flux", "LoRA, kohya's names, rank 16, for the text encoder too",
    ),
    "peft": (
        {
            "transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight": (8, 3072),
            "transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight": (12288, 8),
        },
        "flux", "LoRA, PEFT's names, rank 8",
    ),
    "loha": (
        {
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.hada_w1_a": (640, 4),
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.hada_w1_b": (4, 2048),
        },
        "", "LoHa, kohya's names, rank 4",
    ),
    "lokr": ({"lycoris_unet_blocks_0_cross_attn_k.lokr_w1": (8, 8)}, "wan", "LoKr, kohya's names"),
    "dora": (
        {
            "blocks.0.cross_attn.k.lora_A.weight": (4, 64),
            "blocks.0.cross_attn.k.lora_B.weight": (64, 4),
            "blocks.0.cross_attn.k.lora_magnitude_vector": (64,),
        },
        "wan", "DoRA, PEFT's names, rank 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LORAS)
def test_loras(kind: str, tmp_path: Path) -> None:
    tensors, family, detail = LORAS[kind]
    metadata = {"ss_base_model_version": "flux1", "ss_network_dim": "16", "modelspec.license": "MIT"}
    header = {name: ("BF16", shape) for name, shape in tensors.items()}
    facts = detect_file(write_header(tmp_path / "lora.safetensors", header, metadata))
    assert (facts.main.component, facts.main.family, facts.main.detail) == (Component.LORA, family, detail)
    assert node(facts) == "LoraLoader or LoraLoaderModelOnly"
    assert facts.metadata == {"licence": "MIT", "base model": "flux1", "rank": "16"}
    assert facts.written_by == ("kohya's trainers (ss_ metadata)",)


@pytest.mark.parametrize(
    ("tensors", "component"),
    [
        ({"emb_params": (4, 768)}, Component.EMBEDDING),
        ({"clip_l": (4, 768), "clip_g": (4, 1280)}, Component.EMBEDDING),
        ({"model.1.sub.0.RDB1.conv1.0.weight": (32, 64, 3, 3)}, Component.UPSCALER),
        ({"redux_up.weight": (12288, 1152), "redux_down.weight": (4096, 12288)}, Component.STYLE),
        ({"image_proj.proj.weight": (8, 8), "ip_adapter.1.to_k_ip.weight": (8, 8)}, Component.IP_ADAPTER),
        ({"something.else": (8, 8)}, Component.UNKNOWN),
    ],
)
def test_small_files(tensors: dict[str, tuple[int, ...]], component: Component, tmp_path: Path) -> None:
    facts = detect_file(write_header(tmp_path / "x.safetensors", {n: ("F32", s) for n, s in tensors.items()}))
    assert facts.main.component is component
    if component is Component.UNKNOWN:
        assert "'something.else' (8, 8)" in facts.main.detail
        assert "no component of a model was recognised" in note(facts)


def _checkpoint(demo_models: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    text_encoder = header_of(demo_models / "text_encoders/digits_clip.safetensors", "text_encoders.clip_l.transformer.")
    vae = header_of(demo_models / "vae/digits_tae.safetensors", "vae.")
    return header_of(demo_models / FLUX, "model.diffusion_model.") | text_encoder | vae


def test_an_all_in_one_checkpoint(demo_models: Path, tmp_path: Path) -> None:
    facts = detect_file(write_header(tmp_path / "all.safetensors", _checkpoint(demo_models)))
    assert [p.component for p in facts.parts] == [Component.DIFFUSION, Component.TEXT, Component.VAE]
    assert [p.prefix for p in facts.parts] == ["model.diffusion_model.", "text_encoders.clip_l.", "vae."]
    assert sum(p.nbytes for p in facts.parts) == facts.nbytes
    alone = detect_file(demo_models / FLUX)
    assert (facts.parts[0].nbytes, facts.parts[0].tensors) == (alone.nbytes, alone.tensors)
    assert node(facts) == "CheckpointLoaderSimple"
    assert facts.title.startswith("all-in-one checkpoint of FLUX.1 diffusion model")


def test_a_checkpoint_with_a_quantized_model(flux_nf4: Path, demo_models: Path, tmp_path: Path) -> None:
    from quantwire.quantizers.files.checkpoint import read_safetensors
    from safetensors.torch import load_file

    tensors = {f"model.diffusion_model.{n}": t for n, t in load_file(flux_nf4).items()}
    vae = read_safetensors(demo_models / "vae/digits_tae.safetensors").tensors
    path = tmp_path / "all-nf4.safetensors"
    save_file(tensors | {f"vae.{n}": t.clone() for n, t in vae.items()}, path)
    facts = detect_file(path)
    assert node(facts) == "LoadQuantized"
    assert "text encoders and VAE are left out" in note(facts)
    assert facts.types[0].format_id == "bnb-nf4"
    assert facts.main.nbytes == detect_file(flux_nf4).nbytes


# ("file name", what the content is, whether it disagrees)
NAMES = [
    ("flux-nf4.safetensors", "nf4", False),
    ("flux-bf16.safetensors", "nf4", True),
    ("flux-fp8.safetensors", "nf4", True),
    ("flux-nvfp4.safetensors", "nf4", True),
    ("flux-fp4.safetensors", "nf4", True),
    ("flux_svdq-int4.safetensors", "nf4", True),
    ("flux_int8.safetensors", "nf4", True),
    ("flux-Q4_K_M.safetensors", "nf4", True),
    ("flux1-dev.safetensors", "nf4", False),
    ("t5xxl_fp16_and_nf4.safetensors", "nf4", False),
    ("flux1-dev-bf16.safetensors", "plain", False),
    ("flux1-dev-fp16.safetensors", "plain", True),
    ("flux1-dev-fp8-e4m3fn.safetensors", "plain", True),
    ("fp80000.safetensors", "plain", False),
    ("model.gguf.safetensors", "plain", False),
    ("flux-Q4_K_S.gguf", "gguf", False),
    ("flux-Q8_0.gguf", "gguf", True),
    ("flux-IQ4_XS.gguf", "gguf", True),
    ("flux.safetensors", "gguf", True),
]


@pytest.mark.parametrize(("name", "content", "wrong"), NAMES, ids=[n for n, _, _ in NAMES])
def test_names_are_hints(
    name: str, content: str, wrong: bool, flux_nf4: Path, demo_models: Path, tmp_path: Path
) -> None:
    if content == "gguf":
        _gguf(tmp_path / name, "Q4_K")
    else:
        shutil.copy(flux_nf4 if content == "nf4" else demo_models / FLUX, tmp_path / name)
    facts = detect_file(tmp_path / name)
    assert bool(facts.warnings) is wrong, facts.warnings
    assert facts.main.family == "flux"


LAYOUTS = {
    "quanto-qint8": ("optimum-quanto", "LoadQuantized", "qint8"),
    "sdnq-int8": ("sdnq", "LoadQuantized", "int8"),
    "torchao-int8wo": ("torchao", "LoadQuantized", "int8"),
    "comfy-fp8-e4m3fn": ("ComfyUI", "UNETLoader", "fp8-e4m3fn"),
}


@pytest.mark.parametrize("format_id", LAYOUTS)
def test_the_pack_s_own_conversions(format_id: str, demo_models: Path, tmp_path: Path) -> None:
    library, loader, word = LAYOUTS[format_id]
    path = tmp_path / f"flux-{word}.safetensors"
    assert main(["convert", str(demo_models / FLUX), str(path), "--type", format_id]) == 0
    facts = detect_file(path)
    assert [t.format_id for t in facts.types] == [format_id, ""]
    assert facts.libraries == (library,)
    assert (node(facts), node(facts, STANDALONE)) == (loader, "LoadQuantized")
    assert "quantwire" in facts.written_by
    assert facts.metadata["made from"].startswith("digits_flux.safetensors (sha256 of its header: ")
    assert facts.metadata["made by"].startswith("quantwire ")
    assert "made as" in facts.metadata
    assert not facts.warnings


@pytest.mark.parametrize("software", ['{"name": "ai-toolkit", "version": "0.5"}', "ai-toolkit 0.5", '"ai-toolkit 0.5"'])
def test_software_is_named(software: str, tmp_path: Path) -> None:
    facts = detect_file(write_header(tmp_path / "x.safetensors", {"a": ("F32", (1,))}, {"software": software}))
    assert facts.written_by == ("ai-toolkit 0.5",)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"source": 1}', '{"source": {"headers": 3}}', "[" * 100_000])
def test_provenance_that_is_none(text: str, tmp_path: Path) -> None:
    path = write_header(tmp_path / "x.safetensors", {"a": ("F32", (1,))}, {"quantwire_conversion": text})
    assert set(detect_file(path).metadata) <= {"made from"}


def test_a_wrong_name_is_told_with_the_content(flux_nf4: Path, tmp_path: Path) -> None:
    path = shutil.copy(flux_nf4, tmp_path / "flux-fp8.safetensors")
    assert detect_file(Path(path)).warnings == ("Named fp8, but holds bitsandbytes nf4.",)


def _tensors(kind: str) -> list[tuple[str, str, tuple[int, ...]]]:
    names = [("img_in", 64), ("txt_in", 512), ("double_blocks.0.img_attn.qkv", 256), ("final_layer.linear", 256)]
    return [(f"{name}.weight", kind if "blocks" in name else "F32", (256, k)) for name, k in names]


def _gguf(path: Path, kind: str, part: tuple[int, int] | None = None) -> Path:
    tensors = _tensors(kind)
    keys = [text("general.architecture", "flux"), text("general.license", "apache-2.0")]
    if part is not None:
        keys += [number("split.no", part[0]), number("split.count", part[1]), number("split.tensors.count", 4)]
        tensors = tensors[part[0] * 2 : part[0] * 2 + 2]
    header, places = layout(keys, tensors)
    path.write_bytes(header + bytes(total_nbytes(header, places) - len(header)))
    return path


def test_gguf(tmp_path: Path) -> None:
    facts = detect_file(_gguf(tmp_path / "flux-Q4_K_M.gguf", "Q4_K"))
    assert [(t.type, t.format_id, t.layers) for t in facts.types] == [("Q4_K", "gguf-q4-k", 1), ("F32", "", 3)]
    assert (facts.container, node(facts), node(facts, STANDALONE)) == ("GGUF", "LoadGGUF", "LoadGGUF")
    assert facts.metadata == {"licence": "apache-2.0", "architecture": "flux"}
    assert facts.loads[0].libraries == ()


def test_gguf_in_parts(tmp_path: Path) -> None:
    for i in range(2):
        _gguf(tmp_path / f"m-0000{i + 1}-of-00002.gguf", "Q8_0", (i, 2))
    facts = detect_file(tmp_path / "m-00002-of-00002.gguf")
    assert facts.files == ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")
    assert (facts.tensors, facts.main.family) == (4, "flux")


def test_parts_of_safetensors(demo_models: Path, tmp_path: Path) -> None:
    every = list(header_of(demo_models / FLUX).items())
    where: dict[str, str] = {}
    for i, some in enumerate((every[:30], every[30:])):
        name = f"model-0000{i + 1}-of-00002.safetensors"
        write_header(tmp_path / name, dict(some))
        where |= {tensor: name for tensor, _ in some}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    for given in ("model.safetensors.index.json", "model-00001-of-00002.safetensors", ""):
        facts = detect_file(tmp_path / given)
        assert (facts.container, facts.tensors, len(facts.files)) == ("sharded safetensors", len(every), 2)
        assert "single files" in note(facts)


def test_a_pipeline_folder(flux_nf4: Path, demo_models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "FLUX-nf4"
    for name in ("transformer", "vae", "text_encoder", "scheduler", "tokenizer", "text_encoder_2"):
        (folder / name).mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    shutil.copy(flux_nf4, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    (folder / "transformer" / "config.json").write_text('{"_diffusers_version": "0.36.0"}')
    shutil.copy(demo_models / "vae/digits_tae.safetensors", folder / "vae" / "diffusion_pytorch_model.safetensors")
    shutil.copy(demo_models / "text_encoders/digits_clip.safetensors", folder / "text_encoder" / "model.safetensors")
    (folder / "text_encoder_2" / "pytorch_model.bin").write_bytes(b"PK\3\4" + bytes(100))
    facts = detect_file(folder)
    assert list(facts.folders) == ["text_encoder", "transformer", "vae"]
    assert facts.others == ("scheduler", "tokenizer")
    assert facts.folders["transformer"].types[0].format_id == "bnb-nf4"
    assert "diffusers 0.36.0" in facts.folders["transformer"].written_by
    assert facts.nbytes == sum(f.nbytes for f in facts.folders.values())
    assert len(facts.warnings) == 1
    assert "text_encoder_2: " in facts.warnings[0]
    assert "may run code" in facts.warnings[0]
    json.dumps(facts.to_dict())


def test_damaged_files_are_described_as_far_as_they_go(flux_nf4: Path, tmp_path: Path) -> None:
    raw = flux_nf4.read_bytes()
    path = tmp_path / "flux-nf4.safetensors"
    path.write_bytes(raw[: len(raw) // 2])
    facts = detect_file(path)
    assert "truncated" in facts.damage
    assert facts.warnings[0] == facts.damage
    assert facts.main.family == "flux"
    assert (node(facts), node(facts, STANDALONE)) == ("", "")
    path.write_bytes(raw[:100])
    with pytest.raises(FileError, match="truncated"):
        detect_file(path)


def test_a_layer_that_cannot_be_loaded_is_told(flux_nf4: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(flux_nf4)
    name = next(n for n in tensors if n.endswith(".absmax"))
    del tensors[name]
    path = tmp_path / "flux-nf4.safetensors"
    save_file(tensors, path)
    facts = detect_file(path)
    assert facts.warnings
    assert node(facts) == ""
    assert facts.faults


@pytest.mark.parametrize("name", ["model.pt", "model.ckpt", "model.safetensors"])
def test_pickles_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(4)}, tmp_path / name)
    with pytest.raises(FileError, match=r"torch\.save is not read, because reading one may run code"):
        detect_file(tmp_path / name)


def test_every_backend_with_a_library_is_known() -> None:
    packages = {b.name: b.package for b in BACKENDS if b.package and b.name != "gguf"}
    assert {name: package for name, (package, _) in LIBRARIES.items()} == packages


def test_libraries_are_looked_for_without_importing_them() -> None:
    before = set(sys.modules)
    for _, module in LIBRARIES.values():
        assert is_installed(module) is (importlib.util.find_spec(module.partition(".")[0]) is not None)
    assert not is_installed("optimum.no_such_module")
    assert not is_installed("no_such_package.inner")
    assert {m for m in set(sys.modules) - before if m.partition(".")[0] in ("torchao", "nncf", "sdnq")} == set()


class _Refuses:
    """An import hook that finds nothing of the libraries that take long to import."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] in ("torch", "numpy", "safetensors", "gguf"):
            raise AssertionError(f"{name} was imported")


@pytest.mark.parametrize("kind", ["plain", "nf4", "gguf", "truncated"])
def test_no_library_is_imported(
    kind: str, flux_nf4: Path, demo_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = {"plain": demo_models / FLUX, "nf4": flux_nf4}.get(kind, tmp_path / "x.gguf")
    if kind == "gguf":
        _gguf(path, "Q4_K")
    elif kind == "truncated":
        path.write_bytes(flux_nf4.read_bytes()[:-1])
    roots = ("quantwire", "torch", "numpy", "safetensors", "gguf")
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in roots}
    monkeypatch.setattr(sys, "meta_path", [_Refuses(), *sys.meta_path])
    for name in before:
        del sys.modules[name]
    try:
        inspect = importlib.import_module("quantwire.quantizers.files.inspect")
        assert str(inspect.inspect(path, "*"))
        assert inspect.inspect(path).to_dict()["tensors"]
    finally:
        for name in [n for n in sys.modules if n.partition(".")[0] in roots]:
            del sys.modules[name]
        sys.modules.update(before)
