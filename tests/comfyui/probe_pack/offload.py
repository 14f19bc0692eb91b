"""What the host's own loading code does to a small module of each carrier's layers, measured on a CPU.

The modules are made of the host's layers, and quantized in place, as packs do that apply a library to a model which the
host has loaded. Each is loaded in every memory mode, by the host's code, twice:

- onto the CPU, which shows values, and nothing of where weights are: what is left in host memory is on the CPU too;
- onto `meta` as the compute device, which shows places and no values: a weight that stays behind meets an input on
  another device, as it would on a GPU.

Dynamic VRAM lends its buffers from a CUDA driver. Without one its load still runs: it moves the layers that are not of
the host's classes, and leaves the others to be cast layer by layer.
"""

from __future__ import annotations

import json
import tempfile
import types
from pathlib import Path

# A model that fits is loaded by the same call, with full_load, without offload and with partial load.
MODES = ("none", "partial/few", "partial/half", "novram", "dynamic")
NEED_A_MOVE = ("none", "partial/half")
FOREIGN_CELLS = (
    ("none", ""),
    ("model", ""),
    ("sequential", "memory"),
    ("sequential", "disk"),
    ("balanced", "whole"),
    ("balanced", "split"),
    ("balanced", "split-disk"),
    ("group", "block"),
    ("group", "leaf"),
    ("group", "block-disk"),
    ("group", "leaf-disk"),
)


def pack_module(name):
    import importlib
    import sys

    pack = next(module for module in sys.modules if module.endswith("custom_nodes/quantwire"))
    return importlib.import_module(f"{pack}.{name}")


def hosted():
    """The module of the pack's probes, of the host's layers."""
    import comfy.ops

    net = pack_module("quantizers.compat.probes.net")
    module = net.full_precision(pack_module("quantizers.compat.probes.build").WIDTH)
    for parent, name, layer in linears(module):
        setattr(parent, name, comfy.ops.manual_cast.Linear(layer.in_features, layer.out_features, dtype=net.DTYPE))
        getattr(parent, name).load_state_dict(layer.state_dict())
    norm = comfy.ops.manual_cast.LayerNorm(module.width, dtype=net.DTYPE)
    norm.load_state_dict(module.norm.state_dict())
    module.norm = norm
    return module.requires_grad_(False).eval()


def linears(module):
    import torch

    return [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, torch.nn.Linear)
    ]


def replaced(module, make):
    for parent, name, layer in linears(module):
        setattr(parent, name, make(layer))
    return module.eval()


QUANTIZED = {}


def quantized(layer, format_id):
    """Kept, since some formats take seconds; by a few values of the weight, which are the same in every module."""
    registry, spec = pack_module("quantizers.registry"), pack_module("quantizers.spec")
    key = format_id, *layer.weight.data[0, :4].tolist()
    if key not in QUANTIZED:
        QUANTIZED[key] = registry.get_quantizer(format_id).quantize(layer.weight.data, spec.QuantSpec(format_id))
    kept = QUANTIZED[key]
    return kept.with_tensors({name: tensor.clone() for name, tensor in kept.tensors.items()})


def ours(layer, format_id):
    return pack_module("hosts.comfyui.linear").make_linear(quantized(layer, format_id), layer.bias)


def native(layer, format_id):
    """The host's own quantized layer, from the tensors of a native file."""
    import comfy.ops

    state = ours(layer, format_id).state_dict()
    n, k = layer.weight.shape
    dtype, emulated = layer.weight.dtype, pack_module("hosts.comfyui.linear").emulated_formats()
    made = comfy.ops.mixed_precision_ops({"mixed_ops": True}, dtype, disabled=emulated).Linear(k, n, dtype=dtype)
    made.load_state_dict(state)
    return made


def built(carrier, format_id):
    import comfy.model_management as mm

    module = hosted()
    mm.archive_model_dtypes(module)  # as the host does to every diffusion model, before anybody quantizes it
    if carrier != "library":
        make = ours if carrier == "quantwire" else native
        return replaced(module, lambda layer: make(layer, format_id))
    build = pack_module("quantizers.compat.probes.build")
    build.quiet()
    return build.LIBRARY[format_id.partition("-")[0]](module, format_id).requires_grad_(False).eval()


def patcher(module):
    import comfy.model_patcher
    import torch

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.diffusion_model = module

    model, cpu = Model(), torch.device("cpu")
    model.device = cpu
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def load(model, mode, device):
    """Load by the host's code; the budgets are those that make it choose what the mode stands for."""
    model.load_device = device
    if mode == "dynamic":
        load_dynamic(model, device)
        return
    entries = model._load_list()
    largest = max(entry[0] for entry in entries)  # what streaming the largest layer takes
    budgets = {
        "none": 0,
        "partial/few": int(1.2 * largest),
        "partial/half": int(1.2 * largest) + sum(entry[1] for entry in entries) // 2,
        "novram": 0.1,
    }
    model.load(device, lowvram_model_memory=budgets[mode], full_load=budgets[mode] == 0)


def load_dynamic(model, device):
    """The load of the host's ModelPatcherDynamic, without the buffers that CUDA would lend it."""
    import comfy.model_patcher as mp

    names = ("load", "restore_loaded_backups")
    own = {name: getattr(mp.ModelPatcherDynamic, name) for name in names}
    own["_vbar_get"] = lambda self, create=False: None
    model.__class__ = types.new_class("Dynamic", (mp.ModelPatcher,), exec_body=lambda space: space.update(own))
    model.model.dynamic_vbars, model.model.dynamic_pins = {}, {device: {"hostbufs_initialized": True}}
    model.load(device)


def told(err):
    first = (str(err).splitlines() or [""])[0]
    return f"{type(err).__name__}: {first}"


def called(model, device):
    import torch

    net = pack_module("quantizers.compat.probes.net")
    module = model.model.diffusion_model
    with torch.no_grad():
        return module(net.inputs(pack_module("quantizers.compat.probes.build").WIDTH).to(device))


def values(make, mode, expected):
    """`equal`, `differs` or the error, of two calls on the CPU."""
    import torch

    model = patcher(make())
    try:
        load(model, mode, torch.device("cpu"))
        outputs = [called(model, "cpu") for _ in range(2)]
    except Exception as err:
        return told(err)
    return "equal" if all(torch.equal(output, expected) for output in outputs) else "differs"


def places(make, mode, immovable):
    """Where the linear layers went, and how a call ended.

    `kept` and `streamed` are layers of the host's classes, on the device and in host memory; `resident` and `stranded`
    the same of other classes, which nothing copies to the device when they compute.
    """
    import torch

    model, device = patcher(make()), torch.device("meta")
    if mode in NEED_A_MOVE and immovable:
        return {"error": immovable, "stage": "move"}
    try:
        load(model, mode, device)
    except Exception as err:
        return {"error": told(err), "stage": "load"}
    found = dict.fromkeys(("kept", "streamed", "resident", "stranded"), 0)
    for layer in model.model.diffusion_model.modules():
        if hasattr(layer, "in_features"):
            there, castable = all(t.is_meta for t in own_tensors(layer)), hasattr(layer, "comfy_cast_weights")
            found[("kept" if there else "streamed") if castable else ("resident" if there else "stranded")] += 1
    try:
        called(model, device)
    except Exception as err:
        return {**found, "error": told(err), "stage": "call"}
    return {**found, "error": "", "stage": ""}


def move_error(make):
    """How moving a module of such layers to another device ends."""
    try:
        make().to("meta")
    except Exception as err:
        return told(err)
    return ""


def every_mode(make, modes=MODES):
    expected, immovable = called(patcher(make()), "cpu"), move_error(make)
    cells = {mode: {"values": values(make, mode, expected), "places": places(make, mode, immovable)} for mode in modes}
    return {**cells, "partial/whole": cells["none"]}, expected


def own_tensors(module):
    found = (*module._parameters.values(), *module._buffers.values())
    return [t for t in found if t is not None]


def gathered(make, expected):
    """The forward of the layers on weights that the host gathered into one buffer of bytes and read back, as it does
    for dynamic VRAM and for streams."""
    import comfy.memory_management as memory
    import comfy.model_management as mm
    import torch

    model = patcher(make())
    try:
        for _, _, layer in linears(model.model.diffusion_model):
            source = [layer.weight.data, layer.bias.data]
            buffer = torch.empty(memory.vram_aligned_size(source), dtype=torch.uint8)
            mm.cast_to_gathered(source, buffer)
            weight, bias = memory.interpret_gathered_like(source, buffer)
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            layer.bias = torch.nn.Parameter(bias, requires_grad=False)
        return "equal" if torch.equal(called(model, "cpu"), expected) else "differs"
    except Exception as err:
        return told(err)


class ProbeOffload:
    """Facts about each format in every memory mode, as JSON."""

    RETURN_TYPES = ()
    FUNCTION = "tell"
    OUTPUT_NODE = True
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        carriers = ["library", "quantwire", "host"]
        return {"required": {"carrier": (carriers,), "formats": ("STRING", {"default": ""})}}

    def tell(self, carrier, formats):
        found = {format_id: self._format(carrier, format_id) for format_id in formats.split()}
        return {"ui": {"text": [json.dumps(found)]}}

    def _format(self, carrier, format_id):
        def make():
            return built(carrier, format_id)

        cells, expected = every_mode(make)
        cells["dynamic"]["gathered"] = gathered(make, expected)
        return cells


class ProbePlaces:
    """Where the host leaves the quantized layers of a model with `--novram`, as JSON; the model is used up."""

    RETURN_TYPES = ()
    FUNCTION = "tell"
    OUTPUT_NODE = True
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def tell(self, model):
        import torch

        load(model, "novram", torch.device("meta"))
        layers = [m for m in model.model.diffusion_model.modules() if hasattr(m, "in_features")]
        layers = [m for m in layers if not hasattr(m, "comfy_cast_weights")]
        found = {
            "layers": len(layers),
            "left": sum(not all(t.is_meta for t in own_tensors(m)) for m in layers),
        }
        return {"ui": {"text": [json.dumps(found)]}}


class ProbeForeign:
    """ComfyUI-GGUF's own layers, in the host's memory modes and under accelerate and diffusers, as JSON."""

    RETURN_TYPES = ()
    FUNCTION = "tell"
    OUTPUT_NODE = True
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"formats": ("STRING", {"default": ""})}}

    def tell(self, formats):
        found = {format_id: self._format(format_id) for format_id in formats.split()}
        return {"ui": {"text": [json.dumps(found)]}}

    def _format(self, format_id):
        def make():
            return replaced(hosted(), lambda layer: foreign_layer(layer, format_id))

        modes = [mode for mode in MODES if mode != "dynamic"]  # its loader makes patchers of the host's older kind
        cells, expected = every_mode(make, modes)
        for mode, variant in FOREIGN_CELLS:
            cells["/".join(filter(None, ("standalone", mode, variant)))] = standalone(make, mode, variant, expected)
        return cells


def foreign_layer(layer, format_id):
    import sys

    import gguf

    ops = next(m for name, m in sys.modules.items() if name.endswith("ComfyUI-GGUF.ops"))
    n, k = layer.weight.shape
    data = quantized(layer, format_id).tensors["qdata"].reshape(n, -1).contiguous()
    kind = gguf.GGMLQuantizationType[format_id.removeprefix("gguf-").upper().replace("-", "_")]
    made = ops.GGMLOps.Linear(k, n)
    state = {
        "weight": ops.GGMLTensor(data, tensor_type=kind, tensor_shape=layer.weight.shape),
        "bias": ops.GGMLTensor(
            layer.bias.data.float(), tensor_type=gguf.GGMLQuantizationType.F32, tensor_shape=layer.bias.shape
        ),
    }
    made.load_state_dict(state)
    return made


def standalone(make, mode, variant, expected):
    import torch

    modes, place = pack_module("quantizers.compat.modes"), pack_module("quantizers.compat.probes.place")
    model = patcher(make())
    with tempfile.TemporaryDirectory() as folder:
        try:
            placed = place.place(
                model.model.diffusion_model, modes.OffloadMode(mode), variant, torch.device("cpu"), Path(folder)
            )
            model.model.diffusion_model = placed.module
            outputs = []
            for _ in range(2):
                outputs.append(called(model, "cpu"))
                placed.rest()
        except Exception as err:
            return told(err)
    return "equal" if all(torch.equal(output, expected) for output in outputs) else "differs"


NODES = (ProbeOffload, ProbePlaces, ProbeForeign)
