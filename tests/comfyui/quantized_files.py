"""Quantized files as their libraries write them, of the tensors of a model."""

from __future__ import annotations

import importlib
import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from quantwire.hosts.standalone.models import load_diffusion_model
from quantwire.quantizers.backends.comfy import FORMATS
from quantwire.quantizers.backends.nncf.library import load as load_nncf
from quantwire.quantizers.files.quantized_file import write_quantized
from quantwire.quantizers.registry import require
from quantwire.quantizers.spec import QuantSpec
from safetensors.torch import save_file
from torch import Tensor, nn

Tensors = Mapping[str, Tensor]
Make = Callable[[Tensors], tuple[dict[str, Tensor], dict[str, str]]]
FP8_LARGEST = 448.0
METADATA = "_quantization_metadata"
# Embedders, the last layers and modulation, which QuantizeModel keeps too.
PLAIN_IN_DIFFUSERS = ("x_embedder", "context_embedder", "time_text_embed", "norm", "norm1", "norm1_context", "norm_out")


def chosen(tensors: Tensors) -> list[str]:
    """The weights that QuantizeModel quantizes: linear layers of the blocks but modulation."""
    return [n for n, t in tensors.items() if t.ndim == 2 and "blocks." in n and "mod" not in n and "adaLN" not in n]


def tree(tensors: Tensors, layer: Callable[[nn.Linear], nn.Module] = lambda linear: linear) -> nn.Module:
    """A module with these parameters, the chosen weights in linear layers."""
    root, linear = nn.Module(), {n.removesuffix(".weight") for n in chosen(tensors)}
    for name in sorted(linear):
        w, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
        made = nn.Linear(w.shape[1], w.shape[0], bias=bias is not None)
        made.load_state_dict({"weight": w} | ({} if bias is None else {"bias": bias}))
        parent, leaf = _parent(root, name)
        parent.add_module(leaf, layer(made))
    for name, t in tensors.items():
        if name.rpartition(".")[0] not in linear:
            parent, leaf = _parent(root, name)
            parent.register_parameter(leaf, nn.Parameter(t.clone(), requires_grad=False))
    return root


def _parent(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    return root, leaf


def bnb(kind: str, nested: bool = False) -> Make:
    def make(tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, str]]:
        library = importlib.import_module("bitsandbytes")
        return tree(tensors, lambda linear: _bnb_layer(library, linear, kind, nested)).state_dict(), {}

    return make


def _bnb_layer(bnb: Any, linear: nn.Linear, kind: str, nested: bool = False) -> nn.Module:
    n, k = linear.weight.shape
    bias = linear.bias is not None
    if kind == "int8":
        new = bnb.nn.Linear8bitLt(k, n, bias, has_fp16_weights=False)
    else:
        new = bnb.nn.Linear4bit(k, n, bias, quant_type=kind, compress_statistics=nested)
    new.load_state_dict(linear.state_dict())
    return new.to("cpu")


def quanto(kind: str) -> Make:
    def make(tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, str]]:
        library = importlib.import_module("optimum.quanto")
        root = tree(tensors)
        library.quantize(root, weights=library.qtypes[kind])
        library.freeze(root)
        return root.state_dict(), {}

    return make


def torchao(config: str, **options: Any) -> Make:
    def make(tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, str]]:
        from torchao import quantization
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        root = tree(tensors)
        made = getattr(quantization, config)(set_inductor_config=False, **options)
        quantization.quantize_(root, made)
        flat, metadata = flatten_tensor_state_dict(root.state_dict())
        return flat, metadata

    return make


def comfy(
    format_id: str,
    metadata: bool = False,
    extra: Mapping[str, Any] | None = None,
    **more: Callable[[Tensor], Tensor],
) -> Make:
    """By comfy-kitchen's own quantizer.

    Args:
        metadata: tell the formats in the file's metadata, not in tensors.
        extra: more of the JSON of each layer.
        more: make more tensors of each layer, of its weight.
    """

    def make(tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, str]]:
        library, native = importlib.import_module("comfy_kitchen.tensor"), FORMATS[format_id]
        conf: dict[str, Any] = {"format": native.algo, **(extra or {})}
        if format_id == "comfy-int8-convrot":
            conf |= {"convrot": True, "convrot_groupsize": 256}
        out, names = dict(tensors), chosen(tensors)
        for name in names:
            layer = name.removesuffix(".weight")
            w = out.pop(name).contiguous()
            out |= library.QuantizedTensor.from_float(w, native.layout, **native.options).state_dict(name)
            out |= {f"{layer}.{part}": of(w) for part, of in more.items()}
            if not metadata:
                out[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)
        layers = {name.removesuffix(".weight"): conf for name in names}
        header = {METADATA: json.dumps({"format_version": "1.0", "layers": layers})}
        return out, header if metadata else {}

    return make


def scaled_fp8(marker: int = 2, input_scale: float | None = None, new: bool = False) -> Make:
    """Args:
    marker: elements of `scaled_fp8`; 2 asks for products at full precision.
    new: `weight_scale`, without a marker.
    """

    def make(tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, str]]:
        out = dict(tensors)
        for name in chosen(tensors):
            layer, w = name.removesuffix(".weight"), tensors[name].float()
            scale = w.abs().max() / FP8_LARGEST
            out[name] = (w / scale).to(torch.float8_e4m3fn)
            out[f"{layer}.weight_scale" if new else f"{layer}.scale_weight"] = scale
            if input_scale is not None:
                out[f"{layer}.scale_input"] = torch.tensor(input_scale)
        if not new:
            out["scaled_fp8"] = torch.zeros(marker).to(torch.float8_e4m3fn)
        return out, {}

    return make


def plain_fp8(dtype: torch.dtype) -> Make:
    return lambda tensors: ({name: t.to(dtype) for name, t in tensors.items()}, {})


def write(path: Path, made: tuple[dict[str, Tensor], dict[str, str]], prefix: str = "") -> Path:
    """Write a file; with a prefix as a whole checkpoint, which holds a part of a VAE too."""
    tensors, metadata = made
    named = {prefix + name: t.detach().clone().contiguous() for name, t in tensors.items()}
    if prefix and METADATA in metadata:
        said = json.loads(metadata[METADATA])
        layers = {prefix + layer: conf for layer, conf in said["layers"].items()}
        metadata = {**metadata, METADATA: json.dumps({**said, "layers": layers})}
    if prefix:
        named["first_stage_model.decoder.conv_in.weight"] = torch.zeros(4, 4, 3, 3)
    save_file(named, path, metadata=metadata or None)
    return path


def sdnq(kind: str) -> Make:
    def make(tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, str]]:
        library = importlib.import_module("sdnq")
        config = library.SDNQConfig(weights_dtype=kind)
        root = tree(tensors, lambda linear: library.sdnq_quantize_layer(linear, config)[0])
        return root.state_dict(), {"quantization_config": json.dumps({**config.to_dict(), "quant_method": "sdnq"})}

    return make


class _Each(nn.Module):
    """Runs every linear layer once, for libraries that watch a model run."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root = root

    def forward(self, x: Tensor) -> list[Tensor]:
        return [m(x[:, : m.in_features]) for m in self.root.modules() if isinstance(m, nn.Linear)]


def nncf(mode: str, **options: Any) -> Make:
    def make(tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, str]]:
        library = load_nncf("nncf")
        x = torch.ones(1, max(t.shape[1] for t in tensors.values() if t.ndim == 2))
        made = library.compress_weights(
            _Each(tree(tensors)).eval(),
            mode=library.CompressWeightsMode(mode),
            dataset=library.Dataset([x]),
            **options,
        )
        # The library names a layer's parts by its full name, which begins with the wrapper here.
        return {n.replace("root.", "").replace("root:", ""): t for n, t in made.state_dict().items()}, {}

    return make


# Layout of compressed-tensors -> arguments of its weights.
COMPRESSED: dict[str, dict[str, Any]] = {
    "pack-quantized": {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32},
    "int-quantized": {"type": "int", "strategy": "channel"},
    "float-quantized": {"type": "float", "strategy": "channel"},
}


def compressed(layout: str, tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A model as compressed-tensors stores it, and its values as the library restores them."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**COMPRESSED[layout])
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor: Any = BaseCompressor.get_value_from_registry(layout)
    stored, values = dict(tensors), dict(tensors)
    for name in chosen(tensors):
        w = stored.pop(name)
        rows = w.reshape(w.shape[0], -1, args.group_size or w.shape[1])
        scale, zero_point = calculate_qparams(rows.amin(dim=-1), rows.amax(dim=-1), args)
        made = compressor.compress({"weight": w, "weight_scale": scale, "weight_zero_point": zero_point}, scheme)
        values[name] = compressor.decompress(dict(made), scheme)["weight"].float().contiguous()
        stored |= {f"{name.removesuffix('weight')}{part}": t for part, t in made.items()}
    return stored, values


def compressed_config(layout: str) -> dict[str, Any]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**COMPRESSED[layout]))
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=layout)
    return {"quantization_config": json.loads(config.model_dump_json())}


def write_sparse(path: Path, shapes: Mapping[str, list[int]]) -> set[str]:
    """ComfyUI's int8 of zeros, which takes no room on the disk.

    Returns:
        the weights in int8.
    """
    header: dict[str, Any] = {}
    at = 0

    def add(name: str, dtype: str, shape: list[int], size: int) -> None:
        nonlocal at
        end = at + math.prod(shape) * size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end

    weights = {name for name, shape in shapes.items() if len(shape) == 2 and name.endswith(".weight")}
    for name, shape in shapes.items():
        if name in weights:
            add(name.removesuffix("weight") + "weight_scale", "F32", [shape[0], 1], 4)
            add(name, "I8", list(shape), 1)
        else:
            add(name, "BF16", list(shape), 2)
    layers = {name.removesuffix(".weight"): {"format": "int8_tensorwise"} for name in weights}
    header["__metadata__"] = {METADATA: json.dumps({"format_version": "1.0", "layers": layers})}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + at)
    return weights


def write_own(path: Path, tensors: Tensors, format_id: str) -> Path:
    """In the pack's own layout."""
    names = set(chosen(tensors))
    quantizer, spec = require(format_id), QuantSpec.from_uri(format_id)
    values = ((n, quantizer.quantize(t, spec) if n in names else t) for n, t in tensors.items())
    write_quantized(path, values, {})
    return path


def diffusers_model(model: Path, work: Path, config: Any = None) -> nn.Module:
    """diffusers' class on a FLUX file in ComfyUI's layout.

    Args:
        config: by which diffusers quantizes it as it loads it.
    """
    import diffusers

    if not work.is_dir():
        load_diffusion_model(model, torch.float32).transformer.save_pretrained(work)
    options = {} if config is None else {"quantization_config": config}
    return diffusers.FluxTransformer2DModel.from_pretrained(work, torch_dtype=torch.float32, **options)


def diffusers_bnb(model: Path, work: Path, kind: str, nested: bool = False) -> nn.Module:
    """What diffusers makes with BitsAndBytesConfig, for which it wants a GPU: the library's layers in its class."""
    import bitsandbytes as bnb

    made: Any = diffusers_model(model, work)
    for name, linear in list(made.named_modules()):
        if isinstance(linear, nn.Linear) and not any(part in name for part in PLAIN_IN_DIFFUSERS):
            new = _bnb_layer(bnb, linear, kind, nested)
            parent, _, leaf = name.rpartition(".")
            setattr(made.get_submodule(parent), leaf, new)
    four = kind != "int8"
    config = {"quant_method": "bitsandbytes", "load_in_4bit": four, "load_in_8bit": not four}
    made.register_to_config(quantization_config=config | ({"bnb_4bit_quant_type": kind} if four else {}))
    return made


def values(model: nn.Module) -> dict[str, Tensor]:
    """The full-precision state dict of a quantized model, its weights by their libraries' own dequantizers."""
    import bitsandbytes as bnb

    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        for leaf, p in module.named_parameters(recurse=False):
            if not getattr(module, "sdnq_dequantizer", None) or leaf == "bias":
                found[f"{name}.{leaf}"] = p
        weight = getattr(module, "weight", None)
        if isinstance(module, bnb.nn.Linear4bit):
            found[f"{name}.weight"] = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            found[f"{name}.weight"] = bnb.functional.int8_vectorwise_dequant(weight.CB, weight.SCB)
        elif getattr(module, "sdnq_dequantizer", None):
            params = importlib.import_module("sdnq").utils.get_sdnq_params(module)
            found[f"{name}.weight"] = module.sdnq_dequantizer(**params, dtype=torch.float32)
        elif hasattr(weight, "dequantize") and type(weight.data) is not Tensor:
            found[f"{name}.weight"] = weight.dequantize()
    return {n: t.detach().to(torch.float32).contiguous() for n, t in found.items()}
