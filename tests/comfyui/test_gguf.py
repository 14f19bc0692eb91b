"""LoadGGUF in the real ComfyUI: files of several converters and architectures, against the unquantized model.

FLUX in more block types, with a LoRA, stands in test_matrix.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import in_blocks, rearranged, write_file, write_sparse
from graphs import MODES, calls, node, sampled, unet
from quantwire.quantizers.ggml_types import TYPES, format_id
from safetensors.torch import load_file, save_file

SAME = 1e-5  # as in test_matrix.py
EMPTY = {
    "tiny_wan21": node("EmptyHunyuanLatentVideo", width=128, height=128, length=5, batch_size=1),
    "tiny_sd1": node("EmptyLatentImage", width=64, height=64, batch_size=2),
}
WAN_CONFIG = {"config": '{"transformer": {"text_dim": 768}}'}  # the tiny model's text is narrower than every Wan's


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def as_sd_cpp(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """No architecture, the prefix of a checkpoint, and everything but vectors in blocks."""

    def types(name: str, t: torch.Tensor) -> str:
        return "Q8_0" if t.ndim == 2 else "F16"

    write_file(path, tensors, types, None, prefix="model.diffusion_model.")


def as_wan(path: Path, tensors: dict[str, torch.Tensor], flat: bool = False, merged: bool = False) -> None:
    """The 5-D patch embedding as it is, as a matrix with its shape in a key, or as stable-diffusion.cpp merges it."""
    name = "patch_embedding.weight"
    n, c, *rest = tensors[name].shape
    shapes = {name: (n, c * rest[0] * rest[1] * rest[2])} if flat else {name: (n * c, *rest)} if merged else {}
    write_file(path, tensors, in_blocks("Q8_0"), "wan", shapes=shapes, orig_shapes=flat, keys=WAN_CONFIG)


def as_unet(kind: str) -> Callable[[Path, dict[str, torch.Tensor]], None]:
    """Convolutions in blocks too, and rows of 320 and of 3 x 3 in rows of 256."""

    def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        def types(name: str, t: torch.Tensor) -> str:
            return kind if t.ndim > 1 and t.shape[-1] % 256 == 0 and name != "out.2.weight" else "F32"

        write_file(path, tensors, types, "sd1", shapes=rearranged(tensors))

    return write


def with_vectors_in_blocks(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Norms, biases and bare parameters in blocks too, where they have whole ones."""

    def types(name: str, t: torch.Tensor) -> str:
        return "Q8_0" if t.shape[-1] % 32 == 0 else "F32"

    write_file(path, tensors, types, "sd3")


# File -> family, how it is written, largest relative error of one model call, tensors dequantized at load.
FILES: dict[str, tuple[str, Callable[..., None], float, int]] = {
    "sd3-cpp": ("tiny_sd3", as_sd_cpp, 0.02, 0),
    "sd3-vectors": ("tiny_sd3", with_vectors_in_blocks, 0.02, 34),
    "wan-5d": ("tiny_wan21", as_wan, 0.02, 0),
    "wan-flat": ("tiny_wan21", lambda p, t: as_wan(p, t, flat=True), 0.02, 0),
    "wan-merged": ("tiny_wan21", lambda p, t: as_wan(p, t, merged=True), 0.02, 0),
    "sd1-q8-0": ("tiny_sd1", as_unet("Q8_0"), 0.02, 21),
    "sd1-q4-k": ("tiny_sd1", as_unet("Q4_K"), 0.3, 50),
}


@pytest.fixture(scope="session")
def tiny(comfyui: Any) -> Callable[[str], dict[str, torch.Tensor]]:
    return lambda family: load_file(comfyui.base / "models" / "diffusion_models" / f"{family}.safetensors")


@pytest.fixture(scope="session")
def full(comfyui: Any) -> Callable[[str], torch.Tensor]:
    """The latent of the unquantized model of a family."""
    found: dict[str, torch.Tensor] = {}

    def latent(family: str) -> torch.Tensor:
        if family not in found:
            graph = sampled(("model", 0), {"model": unet(f"{family}.safetensors")}, latent=EMPTY.get(family))
            found[family] = comfyui.latent(graph)
        return found[family]

    return latent


@pytest.mark.parametrize("file", FILES)
def test_families(comfyui: Any, tiny: Any, full: Any, file: str) -> None:
    family, write, bound, plain = FILES[file]
    write(comfyui.base / "models" / "diffusion_models" / f"{file}.gguf", tiny(family))
    loader = {"model": node("LoadGGUF", gguf_name=f"{file}.gguf")}
    graph, saves = calls("model", loader, latent=EMPTY.get(family))
    outputs = comfyui.run(graph)
    latents = {mode: comfyui.read_latent(outputs[saves[False, mode]]) for mode in MODES}
    error = relative(latents["default"], full(family))
    comfyui.rows.append({f"LoadGGUF {file}": error})
    report = outputs["model"]["report"][0]
    dequantized = [e for e in report["entries"] if e["action"] == "dequantize"]
    assert 0 < error <= bound
    for mode in MODES:
        assert relative(latents[mode], latents["default"]) <= SAME
    assert len(dequantized) == plain
    assert not report["warnings"]


def test_layout_of_diffusers(comfyui: Any) -> None:
    """The same rows under other names: bit for bit the model of the file in ComfyUI's layout."""
    from quantwire.hosts.standalone import flux

    folder = comfyui.base / "models" / "diffusion_models"
    tensors = load_file(folder / "digits_flux.safetensors")
    rows = list(flux.key_map(flux.config_of(tensors, "digits_flux")))
    other = {row.target: flux.select_rows(tensors[row.source], row).contiguous() for row in rows}
    write_file(folder / "diffusers.gguf", other, in_blocks("Q5_0"), "flux")
    latents = []
    for name in ("digits_flux-Q5_0", "diffusers"):
        loader = {"model": node("LoadGGUF", gguf_name=f"{name}.gguf")}
        outputs = comfyui.run(sampled(("model", 0), loader))
        latents.append(comfyui.read_latent(outputs["save"]))
    assert torch.equal(*latents)
    assert "tensor names of diffusers were turned into ComfyUI's" in outputs["model"]["text"][0]


def test_every_block_type(comfyui: Any) -> None:
    """One layer in each, of zeros; the values of a block are the conformance suite's."""
    folder = comfyui.base / "models" / "diffusion_models"
    shapes = {n: tuple(t.shape) for n, t in load_file(folder / "digits_flux.safetensors").items()}
    wide = {n: s for n, s in shapes.items() if len(s) == 2 and s[1] % 256 == 0}
    assert len(wide) >= len(TYPES)
    rest = {n: s for n, s in shapes.items() if n not in wide}
    write_sparse(folder / "types.gguf", wide | rest, list(TYPES), "flux")
    outputs = comfyui.run(sampled(("model", 0), {"model": node("LoadGGUF", gguf_name="types.gguf")}))
    formats = {e["format_id"] for e in outputs["model"]["report"][0]["entries"]} - {""}
    assert formats == {format_id(name) for name in TYPES}
    assert torch.isfinite(comfyui.read_latent(outputs["save"])).all()


# Models whose widths the host fixes: full width, one layer.
WIDE: dict[str, dict[str, Any]] = {
    "qwen_image": {"image_model": "qwen_image", "in_channels": 64, "num_layers": 1},
    "lumina2": {
        **{"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 3840, "cap_feat_dim": 2560},
        **{"n_layers": 2, "qk_norm": True, "n_heads": 30, "n_kv_heads": 30, "axes_dims": [32, 48, 48]},
        **{"axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3},
        **{"z_image_modulation": True, "time_scale": 1000.0},
    },
}


@pytest.mark.parametrize("arch", WIDE)
def test_wide_models_stay_on_the_disk(comfyui: Any, arch: str) -> None:
    """Qwen-Image and Z-Image: recognised, loaded into layers, and not read: no page of the blocks is in memory."""
    asked = {"tell": node("ProbeLayout", config=json.dumps(WIDE[arch]))}
    shapes = json.loads(comfyui.run(asked)["tell"]["text"][0])
    size = write_sparse(comfyui.base / "models" / "diffusion_models" / f"{arch}.gguf", shapes, ["Q4_0"], arch)
    before = comfyui.rss_mib()
    loader = {"model": node("LoadGGUF", gguf_name=f"{arch}.gguf")}
    outputs = comfyui.run({**loader, "tell": node("ProbeModel", model=["model", 0])})
    grown = comfyui.rss_mib() - before
    report = outputs["model"]["report"][0]
    blocks = [e["name"] for e in report["entries"] if e["format_id"]]
    facts = json.loads(outputs["tell"]["text"][0])
    assert report["notes"][0] == f"architecture {arch} (the file says: {arch})"
    assert not report["warnings"]
    assert sorted(blocks) == sorted(n for n, shape in shapes.items() if len(shape) == 2 and shape[1] % 32 == 0)
    assert facts["quantized_layers"] == len(blocks)
    assert size > 150 * 2**20
    assert grown < 40


def test_model_that_only_the_host_knows(comfyui: Any) -> None:
    config = {
        **{"image_model": "krea2", "features": 256, "channels": 16, "patch": 2, "layers": 1, "heads": 2, "kvheads": 1},
        **{"txtlayers": 2, "txtdim": 256},
    }
    asked = {"tell": node("ProbeLayout", config=json.dumps(config))}
    shapes = json.loads(comfyui.run(asked)["tell"]["text"][0])
    write_sparse(comfyui.base / "models" / "diffusion_models" / "krea2.gguf", shapes, ["Q8_0"], "krea2")
    loader = {"model": node("LoadGGUF", gguf_name="krea2.gguf")}
    outputs = comfyui.run({**loader, "tell": node("ProbeModel", model=["model", 0])})
    report = outputs["model"]["report"][0]
    assert report["warnings"] == ["architecture not known here, detected by ComfyUI (the file says: krea2)"]
    blocks = sum(e["action"] == "quantize" for e in report["entries"])
    assert json.loads(outputs["tell"]["text"][0])["quantized_layers"] == blocks > 10


def unet_lora(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rank 4 on every linear layer and convolution of the blocks."""
    generator = torch.Generator().manual_seed(5)
    lora: dict[str, torch.Tensor] = {}
    for name, w in tensors.items():
        if w.ndim > 1 and "_block" in name:
            layer = f"diffusion_model.{name.removesuffix('.weight')}"
            lora[f"{layer}.lora_down.weight"] = torch.randn(4, *w.shape[1:], generator=generator) * 0.06
            lora[f"{layer}.lora_up.weight"] = (
                torch.randn(w.shape[0], 4, *[1] * (w.ndim - 2), generator=generator) * 0.06
            )
    return lora


def test_lora_on_a_unet(comfyui: Any, tiny: Any, full: Any) -> None:
    """On layers in blocks and on dequantized convolutions; the effect is compared as in test_matrix.py."""
    tensors, models = tiny("tiny_sd1"), comfyui.base / "models"
    as_unet("Q8_0")(models / "diffusion_models" / "sd1-lora.gguf", tensors)
    save_file(unet_lora(tensors), models / "loras" / "unet.safetensors")
    nodes = {
        "model": unet("tiny_sd1.safetensors"),
        "lora": node("LoraLoaderModelOnly", model=["model", 0], lora_name="unet.safetensors", strength_model=1.0),
    }
    wanted = comfyui.latent(sampled(("lora", 0), nodes, latent=EMPTY["tiny_sd1"])) - full("tiny_sd1")
    moved = float(wanted.norm() / full("tiny_sd1").norm())
    assert 0.1 < moved < 0.9
    loader = {"model": node("LoadGGUF", gguf_name="sd1-lora.gguf")}
    graph, saves = calls("model", loader, lora="unet.safetensors", latent=EMPTY["tiny_sd1"])
    outputs = comfyui.run(graph)
    latents = {call: comfyui.read_latent(outputs[save]) for call, save in saves.items()}
    for mode in MODES:
        effect = latents[True, mode] - latents[False, "default"]
        cosine = float(torch.nn.functional.cosine_similarity(effect.flatten(), wanted.flatten(), dim=0))
        assert cosine > 0.99
        assert relative(latents[True, mode], latents[True, "default"]) <= SAME


OTHERS: dict[str, tuple[dict[str, tuple[int, ...]], str | None, tuple[str, ...]]] = {
    "all-in-one": (
        {"model.diffusion_model.x_embedder.proj.weight": (4, 4), "first_stage_model.decoder.conv_in.weight": (4, 4)},
        None,
        ("holds a whole checkpoint", "quantwire convert", "VAELoader"),
    ),
    "text-encoder": (
        {"token_embd.weight": (8, 32), "enc.blk.0.attn_q.weight": (32, 32)},
        "t5encoder",
        ("holds a text encoder", "LoadGGUFTextEncoder"),
    ),
    "unknown": ({"layer.weight": (4, 32)}, "newmodel", ("No known diffusion model", "'layer.weight' (4, 32)")),
}


@pytest.mark.parametrize("case", OTHERS)
def test_files_of_something_else_are_refused(comfyui: Any, case: str) -> None:
    shapes, arch, expected = OTHERS[case]
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    write_file(comfyui.base / "models" / "diffusion_models" / f"{case}.gguf", tensors, lambda *_: "F32", arch)
    loader = {"model": node("LoadGGUF", gguf_name=f"{case}.gguf")}
    said = comfyui.fail(sampled(("model", 0), loader))["exception_message"]
    assert said.startswith(f"{case}.gguf: ")
    for text in expected:
        assert text in said


def test_a_tensor_of_another_shape_is_refused(comfyui: Any, tiny: Any) -> None:
    tensors = tiny("tiny_sd3")
    name = "joint_blocks.1.x_block.attn.proj.weight"
    tensors[name] = tensors[name][:64].clone()
    write_file(comfyui.base / "models" / "diffusion_models" / "narrow.gguf", tensors, in_blocks("Q8_0"), "sd3")
    loader = {"model": node("LoadGGUF", gguf_name="narrow.gguf")}
    said = comfyui.fail(sampled(("model", 0), loader))["exception_message"]
    assert f"'{name}' has shape (64, 128), the model needs (128, 128)" in said


def test_what_a_file_lacks_is_reported(comfyui: Any, tiny: Any) -> None:
    tensors = tiny("tiny_sd3")
    del tensors["joint_blocks.1.x_block.attn.proj.bias"]
    write_file(comfyui.base / "models" / "diffusion_models" / "short.gguf", tensors, in_blocks("Q8_0"), "sd3")
    graph = sampled(("model", 0), {"model": node("LoadGGUF", gguf_name="short.gguf")})
    (warning,) = comfyui.run(graph)["model"]["report"][0]["warnings"]
    assert warning == "the file has nothing for 1 parameters: joint_blocks.1.x_block.attn.proj.bias"


def test_kept_weights_change_nothing_and_are_said(comfyui: Any) -> None:
    """`cache_mib`, in every load mode: what cannot be kept, as a layer that is off the device, computes as before."""
    latents = {}
    for mib in (0, 6):  # some of the 14 MiB that all layers take dequantized
        loader = {"model": node("LoadGGUF", gguf_name="digits_flux-Q8_0.gguf", cache_mib=mib)}
        graph, saves = calls("model", loader, lora="lora.safetensors")
        outputs = comfyui.run(graph)
        notes = " ".join(outputs["model"]["report"][0]["notes"])
        assert ("up to 6 MiB of dequantized weights of 18 layers are kept" in notes) == bool(mib)
        latents[mib] = {key: comfyui.read_latent(outputs[save]) for key, save in saves.items()}
    for key, latent in latents[0].items():
        assert relative(latents[6][key], latent) < SAME, key


def test_kept_weights_are_within_the_budget_and_go_with_the_model(comfyui: Any) -> None:
    loader = {"model": node("LoadGGUF", gguf_name="digits_flux-Q8_0.gguf", cache_mib=6)}
    graph = sampled(("model", 0), loader)
    graph["tell"] = node("ProbeModel", model=["model", 0], after=["sampler", 0])
    # Unloads every model first.
    graph["unload"] = node("ProbeLoad", model=["model", 0], mode="default", after=["sampler", 0])
    graph["told"] = node("ProbeModel", model=["unload", 0])
    facts = [json.loads(comfyui.run(graph)[name]["text"][0])["kept_nbytes"] for name in ("tell", "told")]
    assert 4 << 20 < max(facts) <= 6 << 20
    assert min(facts) == 0


def test_kept_weights_go_when_the_host_unloads_a_part(comfyui: Any) -> None:
    loader = {"model": node("LoadGGUF", gguf_name="digits_flux-Q8_0.gguf", cache_mib=6)}
    graph = sampled(("model", 0), loader)
    graph["tell"] = node("ProbeModel", model=["model", 0], after=["sampler", 0], unload=True)
    assert json.loads(comfyui.run(graph)["tell"]["text"][0])["kept_nbytes"] == 0


def test_a_link_in_the_model_folder_is_followed_and_a_way_out_of_it_is_not(comfyui: Any, tmp_path: Path) -> None:
    folder = comfyui.base / "models" / "diffusion_models"
    kept = tmp_path / "other_disk.gguf"
    kept.write_bytes((folder / "digits_flux-Q8_0.gguf").read_bytes())
    (folder / "linked.gguf").symlink_to(kept)
    loader = {"model": node("LoadGGUF", gguf_name="linked.gguf")}
    assert comfyui.run(sampled(("model", 0), loader))["model"]["report"][0]["format_id"] == "gguf-q8-0"
    outside = os.path.relpath(kept, folder)
    with pytest.raises(AssertionError, match="is not in"):
        comfyui.queue(sampled(("model", 0), {"model": node("LoadGGUF", gguf_name=outside)}))
