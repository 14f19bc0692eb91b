"""Quantized files of one FLUX model, each written by the library or program whose layout it has."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import quantized_files as files
import torch
from quantwire.hosts.standalone.models import DiffusionModel, load_diffusion_model
from quantwire.quantizers.files.checkpoint import read_safetensors
from safetensors.torch import save_file
from torch import Tensor, nn

PREFIX = "model.diffusion_model."
WEIGHTS = "diffusion_pytorch_model.safetensors"
KEPT = list(files.PLAIN_IN_DIFFUSERS)  # embedders, norms and modulation, in diffusers' names
SHARD = "4MB"
GROUP = 128


@dataclass(frozen=True)
class Model:
    """The full-precision model: a file in ComfyUI's layout, and the same as diffusers saves it.

    Attributes:
        work: a folder for what is made on the way.
    """

    path: Path
    work: Path

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return {name: t.clone() for name, t in read_safetensors(self.path).tensors.items()}  # type: ignore[union-attr]

    @cached_property
    def loaded(self) -> DiffusionModel:
        return load_diffusion_model(self.path)

    @cached_property
    def folder(self) -> Path:
        self.loaded.transformer.save_pretrained(self.work / "plain")  # type: ignore[operator]
        return self.work / "plain"

    def diffusers(self, **options: Any) -> Any:
        """The class of diffusers on its own copy of the weights, in bfloat16."""
        from diffusers import FluxTransformer2DModel

        return FluxTransformer2DModel.from_pretrained(self.folder, torch_dtype=torch.bfloat16, **options)


Maker = Callable[[Model, Path], Path]
"""Writes a file into an empty folder; returns the path to open."""


def single(make: files.Make, prefix: str = "") -> Maker:
    """One file in ComfyUI's layout; with a prefix a checkpoint that holds a part of a VAE too."""
    return lambda model, folder: files.write(folder / "model.safetensors", make(model.tensors), prefix)


def plain(model: Model, folder: Path) -> Path:
    return Path(shutil.copy(model.path, folder / "model.safetensors"))


def int8_one_scale(tensors: files.Tensors) -> tuple[dict[str, Tensor], dict[str, str]]:
    """ComfyUI's int8 with one scale for each tensor, by comfy-kitchen."""
    library, out = importlib.import_module("comfy_kitchen.tensor"), dict(tensors)
    conf = torch.tensor(list(json.dumps({"format": "int8_tensorwise"}).encode()), dtype=torch.uint8)
    for name in files.chosen(tensors):
        w = out.pop(name).contiguous()
        quantized = library.QuantizedTensor.from_float(w, "TensorWiseINT8Layout", per_channel=False)
        out |= {**quantized.state_dict(name), name.replace(".weight", ".comfy_quant"): conf.clone()}
    return out, {}


def named_in_metadata(tensors: files.Tensors) -> tuple[dict[str, Tensor], dict[str, str]]:
    made, metadata = files.comfy("comfy-nvfp4", metadata=True)(tensors)
    return made, {"format": "pt", **metadata}


def own(format_id: str) -> Maker:
    return lambda model, folder: files.write_own(folder / "model.safetensors", model.tensors, format_id)


def bnb(kind: str, nested: bool = False, **saving: Any) -> Maker:
    """diffusers' own replacement of layers and save; loading with a config quantizes on a GPU only."""

    def make(model: Model, folder: Path) -> Path:
        library = importlib.import_module("bitsandbytes")
        quantizers = importlib.import_module("diffusers.quantizers.bitsandbytes")
        from diffusers import BitsAndBytesConfig
        from diffusers.quantizers.bitsandbytes.utils import replace_with_bnb_linear

        four = kind != "int8"
        more = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested} if four else {}
        config: Any = BitsAndBytesConfig(
            load_in_4bit=four, load_in_8bit=not four, bnb_4bit_compute_dtype=torch.bfloat16, **more
        )
        made = model.diffusers()
        before = {name: t.clone() for name, t in made.state_dict().items()}
        made = replace_with_bnb_linear(made, modules_to_not_convert=KEPT, quantization_config=config)
        for name, layer in made.named_modules():
            if isinstance(layer, library.nn.Linear4bit | library.nn.Linear8bitLt):
                layer.weight = _bnb_weight(library.nn, before[f"{name}.weight"], kind, nested)
                layer.bias = nn.Parameter(before[f"{name}.bias"], requires_grad=False)
        made.register_to_config(quantization_config=config)
        kinds = {True: quantizers.BnB4BitDiffusersQuantizer, False: quantizers.BnB8BitDiffusersQuantizer}
        made.hf_quantizer = kinds[four](config, pre_quantized=True)
        made.save_pretrained(folder / "model", **saving)
        return folder / "model"

    return make


def _bnb_weight(library: Any, w: Tensor, kind: str, nested: bool) -> Any:
    if kind == "int8":
        return library.Int8Params(w.half(), requires_grad=False, has_fp16_weights=False).to("cpu")
    return library.Params4bit(w, requires_grad=False, compress_statistics=nested, quant_type=kind).to("cpu")


def diffusers_config(config: Callable[[], Any]) -> Maker:
    """Quantized by diffusers as it loads, by its own config of the library."""

    def make(model: Model, folder: Path) -> Path:
        model.diffusers(quantization_config=config()).save_pretrained(folder / "model")
        return folder / "model"

    return make


def quanto_config() -> Any:
    from diffusers import QuantoConfig

    return QuantoConfig(weights_dtype="int8", modules_to_not_convert=KEPT)


def torchao_config(name: str) -> Callable[[], Any]:
    def config() -> Any:
        from diffusers import TorchAoConfig

        return TorchAoConfig(
            getattr(importlib.import_module("torchao.quantization"), name)(), modules_to_not_convert=KEPT
        )

    return config


def quanto(kind: str) -> Maker:
    """By quanto's own class for models of diffusers."""

    def make(model: Model, folder: Path) -> Path:
        library = importlib.import_module("optimum.quanto")
        exclude = [f"*{name}*" for name in KEPT]
        library.QuantizedDiffusersModel.quantize(model.diffusers(), weights=kind, exclude=exclude).save_pretrained(
            folder / "model"
        )
        return folder / "model"

    return make


def sdnq(kind: str) -> Maker:
    def make(model: Model, folder: Path) -> Path:
        from quantwire.quantizers.backends.sdnq.library import library

        # Which layers are kept is left to the library.
        config = library().quantizer.SDNQConfig(weights_dtype=kind)
        made = library().quantizer.sdnq_post_load_quant(model.diffusers(), quantization_config=config)
        library().loader.save_sdnq_model(made, str(folder / "model"))
        return folder / "model"

    return make


def nncf(mode: str) -> Maker:
    """NNCF's weight compression of the whole model; it has no file of its own, so its state dict is saved."""

    def make(model: Model, folder: Path) -> Path:
        from quantwire.quantizers.backends.nncf.library import load

        library, made, c = load("nncf"), model.diffusers().eval(), model.loaded.config
        inputs = {
            "hidden_states": torch.zeros(1, 4, c.in_channels, dtype=torch.bfloat16),
            "encoder_hidden_states": torch.zeros(1, 2, c.context_dim, dtype=torch.bfloat16),
            "pooled_projections": torch.zeros(1, c.pooled_dim, dtype=torch.bfloat16),
            "timestep": torch.zeros(1, dtype=torch.bfloat16), "guidance": torch.ones(1),
            "img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(2, 3),
        }  # fmt: skip
        made = library.compress_weights(
            made, mode=library.CompressWeightsMode(mode), dataset=library.Dataset([inputs]),
            ignored_scope=library.IgnoredScope(patterns=[f".*{name}.*" for name in KEPT], validate=False),
        )  # fmt: skip
        state = {name: t.contiguous().clone() for name, t in made.state_dict().items()}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return folder / "model.safetensors"

    return make


def compressed(layout: str, **settings: Any) -> Maker:
    """By the package's own compressors, with the config of a folder."""

    def make(model: Model, folder: Path) -> Path:
        quantization = importlib.import_module("compressed_tensors.quantization")
        compressors = importlib.import_module("compressed_tensors.compressors")
        scheme = quantization.QuantizationScheme(targets=["Linear"], weights=quantization.QuantizationArgs(**settings))
        compressor = compressors.BaseCompressor.get_value_from_registry(layout)
        out: dict[str, Tensor] = {}
        for name, t in model.diffusers().state_dict().items():
            if t.ndim != 2 or any(kept in name.split(".") for kept in KEPT) or "blocks" not in name:
                out[name] = t
                continue
            parts = compressor.compress(_with_scales(t, scheme.weights), scheme)
            out |= {f"{name.removesuffix('weight')}{part}": p.contiguous() for part, p in parts.items()}
        place = folder / "model"
        place.mkdir()
        save_file({name: t.clone() for name, t in out.items()}, place / WEIGHTS, {"format": "pt"})
        config = quantization.QuantizationConfig(config_groups={"group_0": scheme}, format=layout)
        saved = json.loads((model.folder / "config.json").read_text())
        saved["quantization_config"] = json.loads(config.model_dump_json())
        (place / "config.json").write_text(json.dumps(saved))
        return place

    return make


def _with_scales(w: Tensor, args: Any) -> dict[str, Tensor]:
    utils = importlib.import_module("compressed_tensors.quantization.utils")
    state = {"weight": w}
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = utils.generate_gparam(w.amin(), w.amax()).reshape(1).float()
    groups = w.reshape(w.shape[0], -1, args.group_size or w.shape[1])
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    scale, zero = utils.calculate_qparams(low, high, args, global_scale=state.get("weight_global_scale"))
    return state | {"weight_scale": scale, "weight_zero_point": zero}


Packed = Callable[[str, int, int], dict[str, Tensor]]


def gptq(layer: str, n: int, k: int) -> dict[str, Tensor]:
    return {
        f"{layer}.qweight": torch.zeros(k // 8, n, dtype=torch.int32),
        f"{layer}.qzeros": torch.zeros(k // GROUP, n // 8, dtype=torch.int32),
        f"{layer}.scales": torch.ones(k // GROUP, n, dtype=torch.float16),
        f"{layer}.g_idx": torch.arange(k, dtype=torch.int32) // GROUP,
    }


def awq(layer: str, n: int, k: int) -> dict[str, Tensor]:
    return {
        f"{layer}.qweight": torch.zeros(k, n // 8, dtype=torch.int32),
        f"{layer}.qzeros": torch.zeros(k // GROUP, n // 8, dtype=torch.int32),
        f"{layer}.scales": torch.ones(k // GROUP, n, dtype=torch.float16),
    }


def tinychat(layer: str, n: int, k: int) -> dict[str, Tensor]:
    return {
        f"{layer}.qweight": torch.zeros(n // 4, k, dtype=torch.int16),
        f"{layer}.scales": torch.ones(k // GROUP, n, dtype=torch.float16),
        f"{layer}.scaled_zeros": torch.zeros(k // GROUP, n, dtype=torch.float16),
    }


def fp8_with_scale(layer: str, n: int, k: int) -> dict[str, Tensor]:
    return {
        f"{layer}.weight": torch.zeros(n, k, dtype=torch.float8_e4m3fn),
        f"{layer}.scale": torch.full((), 0.5),
    }


def svdquant(layer: str, n: int, k: int) -> dict[str, Tensor]:
    return {
        f"{layer}.qweight": torch.zeros(n, k // 2, dtype=torch.int8),
        f"{layer}.wscales": torch.ones(k // 64, n, dtype=torch.bfloat16),
        f"{layer}.proj_down": torch.ones(k, 32, dtype=torch.bfloat16),
        f"{layer}.proj_up": torch.ones(n, 32, dtype=torch.bfloat16),
        f"{layer}.smooth_factor": torch.ones(k, dtype=torch.bfloat16),
    }


def as_published(packed: Packed) -> Maker:
    """Laid out as published, without values: the packages quantize on CUDA only, and such files are not loaded."""

    def make(model: Model, folder: Path) -> Path:
        return files.write(folder / "model.safetensors", (_packed(model.tensors, packed), {}))

    return make


def _packed(tensors: Mapping[str, Tensor], packed: Packed) -> dict[str, Tensor]:
    names = set(files.chosen(tensors))
    out = {name: t for name, t in tensors.items() if name not in names}
    for name in sorted(names):
        out |= packed(name.removesuffix(".weight"), *tensors[name].shape)
    return out


def gguf_file(kind: str) -> Maker:
    """By the gguf package, its blocks by ggml."""

    def make(model: Model, folder: Path) -> Path:
        path = folder / "model.gguf"
        gguf_files.write_file(path, model.tensors, gguf_files.in_blocks(kind), "flux")
        return path

    return make


def gguf_parts(model: Model, folder: Path) -> Path:
    """In parts, as the gguf package and llama.cpp's gguf-split name them."""
    writer = gguf.GGUFWriter(str(folder / "model.gguf"), "flux", split_max_tensors=30)
    choose = gguf_files.in_blocks("Q8_0")
    for name, t in model.tensors.items():
        kind = gguf.GGMLQuantizationType[choose(name, t)]
        writer.add_tensor(name, gguf.quants.quantize(t.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(folder.glob("*.gguf"))
