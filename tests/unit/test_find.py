"""Quantized weights are recognised in whatever holds them: real layers of every library that is installed here.

Packs that run only inside ComfyUI or on a GPU have stand-ins: classes of the same name, module and attributes. Those of
old torchao (0.9.0), quanto (0.2.0), hqq (0.2.8) and compressed-tensors (0.20.0) were checked against the real packages.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quantwire.quantizers.compat.find import Found, find_carriers
from quantwire.quantizers.compat.modes import Carrier
from torch import nn

DIM = 64
LIBRARY, QUANTWIRE, HOST = Carrier.LIBRARY, Carrier.QUANTWIRE, Carrier.HOST


def bnb_four_bit(quant_type: str) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    return bnb.nn.Linear4bit(DIM, DIM, quant_type=quant_type)


def bnb_int8() -> nn.Module:
    return pytest.importorskip("bitsandbytes").nn.Linear8bitLt(DIM, DIM, has_fp16_weights=False)


@pytest.mark.parametrize("quantized", [False, True], ids=["as-built", "quantized"])
@pytest.mark.parametrize("format_id", ["bnb-nf4", "bnb-fp4", "bnb-int8"])
def test_finds_bitsandbytes_layers(format_id: str, quantized: bool) -> None:
    make = bnb_int8 if format_id == "bnb-int8" else lambda: bnb_four_bit(format_id.removeprefix("bnb-"))
    net = nn.Sequential(nn.Linear(DIM, DIM), make(), nn.ReLU(), make())
    if quantized:
        net = net.to("cpu")
    kind = "Int8Params" if format_id == "bnb-int8" else "Params4bit"
    assert find_carriers(net) == [Found("1", LIBRARY, format_id, 2, kind)]


@pytest.mark.parametrize(
    ("qtype", "format_id", "kind"),
    [
        ("qint8", "quanto-qint8", "WeightQBytesTensor"),
        ("qint4", "quanto-qint4", "WeightQBitsTensor"),
        ("qint2", "quanto-qint2", "WeightQBitsTensor"),
        ("qfloat8_e4m3fn", "quanto-qfloat8-e4m3fn", "WeightQBytesTensor"),
        ("qfloat8_e5m2", "quanto-qfloat8-e5m2", "WeightQBytesTensor"),
    ],
)
def test_finds_quanto_layers_before_and_after_freeze(qtype: str, format_id: str, kind: str) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    # LayerNorm becomes a quanto module too, of which only the activations could be quantized: it does not count.
    net = nn.Sequential(nn.Linear(DIM, DIM), nn.LayerNorm(DIM), nn.Conv2d(2, 2, 3)).to(torch.bfloat16)
    quanto.quantize(net, weights=quanto.qtypes[qtype], activations=quanto.qint8)
    assert {(f.name, f.format_id, f.frozen) for f in find_carriers(net)} == {
        ("0", format_id, False),
        ("2", format_id, False),
    }
    quanto.freeze(net)
    assert find_carriers(net) == [Found("0", LIBRARY, format_id, 2, kind)]


@pytest.mark.parametrize("quant_type", ["Q8_0", "Q4_0", "Q4_K", "IQ4_XS"])
def test_finds_diffusers_gguf_layers(quant_type: str) -> None:
    gguf = pytest.importorskip("gguf")
    utils = pytest.importorskip("diffusers.quantizers.gguf.utils")
    quant = gguf.GGMLQuantizationType[quant_type]
    layer = utils.GGUFLinear(256, DIM)
    layer.weight = utils.GGUFParameter(
        torch.zeros(DIM, gguf.GGML_QUANT_SIZES[quant][1], dtype=torch.uint8), False, quant
    )
    format_id = f"gguf-{quant_type.lower().replace('_', '-')}"
    assert find_carriers(nn.ModuleDict({"proj": layer})) == [Found("proj", LIBRARY, format_id, 1, "GGUFParameter")]


@pytest.mark.parametrize("dtype", ["int8", "uint4", "int5", "float8_e4m3fn", "float4_e2m1fn"])
def test_finds_sdnq_layers(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDNQ_USE_TORCH_COMPILE", "0")
    sdnq = pytest.importorskip("sdnq")
    # sdnq leaves small layers as they are.
    net = nn.ModuleDict({"norm": nn.LayerNorm(256), "proj": nn.Linear(256, 256)}).to(torch.bfloat16)
    net = sdnq.sdnq_post_load_quant(net, weights_dtype=dtype, torch_dtype=torch.bfloat16)
    format_id = f"sdnq-{dtype}".replace("_", "-")
    assert find_carriers(net) == [Found("proj", LIBRARY, format_id, 1, "SDNQLinear")]


@pytest.mark.parametrize(
    ("config", "format_id", "kind"),
    [
        ("Int8WeightOnlyConfig", "torchao-int8wo", "Int8Tensor"),
        ("Int8DynamicActivationInt8WeightConfig", "torchao-int8dyn", "Int8Tensor"),
        ("Float8WeightOnlyConfig", "torchao-float8wo", "Float8Tensor"),
        ("IntxWeightOnlyConfig", "torchao-intxunpackedtoint8", "IntxUnpackedToInt8Tensor"),
    ],
)
def test_finds_torchao_tensors(config: str, format_id: str, kind: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    net = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)).to(torch.bfloat16)
    quantization.quantize_(net, getattr(quantization, config)())
    assert find_carriers(net) == [Found("1", LIBRARY, format_id, 2, kind)]


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.blocks[1](self.blocks[0](x)))


@pytest.mark.parametrize(
    ("mode", "format_id"),
    [
        ("INT8_SYM", "nncf-int8-sym"),
        ("INT8_ASYM", "nncf-int8-asym"),
        ("INT4_SYM", "nncf-int4-sym"),
        ("INT4_ASYM", "nncf-int4-asym"),
    ],
)
def test_finds_nncf_layers_by_the_name_of_the_layer(mode: str, format_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNCF_CI", "1")  # no telemetry
    nncf = pytest.importorskip("nncf")
    options = {} if "INT8" in mode else {"group_size": 32, "ratio": 1.0, "all_layers": True}
    data = nncf.Dataset([torch.zeros(2, DIM)])
    net = nncf.compress_weights(Blocks().eval(), mode=nncf.CompressWeightsMode[mode], dataset=data, **options)
    (only,) = find_carriers(net)
    assert (only.name, only.carrier, only.format_id, only.layers) == ("blocks.0", LIBRARY, format_id, 2)
    assert only.kind.endswith("WeightsDecompressor")
    (inside,) = find_carriers(nn.ModuleDict({"part": net}))
    assert inside.name == "part.blocks.0"


@pytest.mark.parametrize("storage", ["e4m3fn", "e5m2"])
def test_finds_layers_that_diffusers_casts(storage: str) -> None:
    hooks = pytest.importorskip("diffusers.hooks")
    net = nn.Sequential(nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)).to(torch.bfloat16)
    hooks.apply_layerwise_casting(net, getattr(torch, f"float8_{storage}"), torch.bfloat16, skip_modules_pattern=())
    wanted = [Found("0", LIBRARY, f"layerwise-fp8-{storage}", 2, "LayerwiseCastingHook")]
    assert find_carriers(net) == wanted
    with torch.no_grad():
        net(torch.zeros(1, DIM, dtype=torch.bfloat16))
    assert find_carriers(net) == wanted  # the weight goes back to its storage after each call


def test_finds_a_stand_in_of_comfyui_gguf_tensors_but_not_its_plain_ones() -> None:
    """ComfyUI-GGUF runs only inside ComfyUI; this class has the name, the attribute and the detach of its own."""
    gguf = pytest.importorskip("gguf")

    class GGMLTensor(torch.Tensor):
        tensor_type: Any

        def detach(self) -> GGMLTensor:
            return self

    def layer(quant_type: str) -> nn.Module:
        data = torch.zeros(DIM, 34, dtype=torch.uint8).as_subclass(GGMLTensor)
        data.tensor_type = gguf.GGMLQuantizationType[quant_type]
        module = nn.Module()
        module.weight = nn.Parameter(data, requires_grad=False)
        return module

    (only,) = find_carriers(nn.Sequential(layer("F16"), layer("Q8_0"), layer("F32")))
    assert only == Found("1", LIBRARY, "gguf-q8-0", 1, "GGMLTensor")
    assert only.key == "comfyui-gguf-q8-0"  # which the table knows as another thing than diffusers' parameters


def test_finds_our_layers_without_dequantizing_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    from quantwire.quantizers.registry import get_quantizer
    from quantwire.quantizers.spec import QuantSpec
    from quantwire.quantizers.weight import QuantizedLinear

    weight = get_quantizer("bnb-nf4").quantize(torch.randn(DIM, DIM), QuantSpec("bnb-nf4"))
    net = nn.Sequential(nn.ReLU(), QuantizedLinear(weight, None))

    def refuse(self: nn.Module) -> None:
        raise AssertionError("weight was read")

    monkeypatch.setattr(QuantizedLinear, "weight", property(refuse))
    assert find_carriers(net) == [Found("1", QUANTWIRE, "bnb-nf4", 1, "QuantizedLinear")]
    net[1].__class__ = type("ParametrizedQuantizedLinear", (QuantizedLinear,), {})  # as torch's parametrizations do
    assert find_carriers(net) == [Found("1", QUANTWIRE, "bnb-nf4", 1, "QuantizedLinear")]


def test_finds_several_kinds_in_order_and_shared_layers_once() -> None:
    pytest.importorskip("bitsandbytes")
    shared = bnb_int8()
    net = nn.Sequential(bnb_four_bit("nf4"), shared, shared, bnb_four_bit("fp4"), bnb_four_bit("nf4"))
    assert [(f.format_id, f.layers) for f in find_carriers(net)] == [("bnb-nf4", 2), ("bnb-int8", 1), ("bnb-fp4", 1)]


def test_finds_the_module_itself_and_nothing_in_a_plain_one() -> None:
    pytest.importorskip("bitsandbytes")
    assert find_carriers(bnb_four_bit("nf4"))[0].name == ""
    assert find_carriers(nn.Sequential(nn.Linear(DIM, DIM), nn.LayerNorm(DIM))) == []


def test_a_class_that_only_borrows_a_library_name_is_not_taken_for_it() -> None:
    class Params4bit(nn.Parameter):
        quant_type = "nf4"

    class QuantizedLinear(nn.Linear):
        """No `format_id`: somebody else's."""

    other = nn.Module()
    other.weight = Params4bit(torch.zeros(DIM, DIM))
    assert find_carriers(nn.Sequential(other, QuantizedLinear(DIM, DIM))) == []


def test_importing_the_rules_imports_neither_torch_nor_a_library() -> None:
    code = (
        "import sys, quantwire.quantizers.compat.rules, quantwire.quantizers.compat.find\n"
        "names = 'torch', 'bitsandbytes', 'optimum', 'diffusers', 'gguf', 'accelerate', 'sdnq', 'torchao', 'nncf'\n"
        "print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Other packs and libraries


def standing_in(name: str, module: str, base: type = nn.Module, **attributes: Any) -> Any:
    """A class as another package would define it."""
    return type(name, (base,), {"__module__": module, **attributes})


def holding(tensor: Any, name: str = "weight") -> nn.Module:
    module = nn.Module()
    module.register_parameter(name, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False))
    return module


def subclass(name: str, module: str, tensor: torch.Tensor, **attributes: Any) -> Any:
    """A parameter of a Tensor subclass that keeps its class when it is detached, as those of the packs do."""
    made = tensor.as_subclass(standing_in(name, module, torch.Tensor, detach=lambda self: self))
    for key, value in attributes.items():
        setattr(made, key, value)
    return made


def kinds(net: nn.Module) -> list[tuple[Carrier, str, str]]:
    return [(f.carrier, f.format_id, f.kind) for f in find_carriers(net)]


def test_finds_a_stand_in_of_forge_parameters_on_bitsandbytes_own() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    forge = standing_in("ForgeParams4bit", "ComfyUI_bnb_nf4_fp4_Loaders", bnb.nn.Params4bit)
    weight = forge(torch.zeros(DIM, DIM), requires_grad=False, quant_type="nf4")
    assert kinds(holding(weight)) == [(LIBRARY, "bnb-nf4", "ForgeParams4bit")]


@pytest.mark.parametrize("name", ["GGMLTensor", "PatchedTensor"])
def test_finds_a_stand_in_of_a_pack_that_derives_from_comfyui_gguf(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    base = standing_in("GGMLTensor", "custom_nodes.ComfyUI-GGUF.ops", torch.Tensor, detach=lambda self: self)
    cls = base if name == "GGMLTensor" else standing_in(name, "custom_nodes.another", base)
    weight = torch.zeros(DIM, 34, dtype=torch.uint8).as_subclass(cls)
    weight.tensor_type = gguf.GGMLQuantizationType.Q4_K
    (only,) = find_carriers(holding(weight))
    assert (only.format_id, only.kind, only.key) == ("gguf-q4-k", "GGMLTensor", "comfyui-gguf-q4-k")


def test_finds_a_stand_in_of_a_ggml_layer_whose_tensor_lost_its_class() -> None:
    layer = standing_in("GGMLLayer", "custom_nodes.ComfyUI-GGUF.ops")()
    layer.weight = nn.Parameter(torch.zeros(DIM, 34, dtype=torch.uint8), requires_grad=False)
    (only,) = find_carriers(layer)
    assert (only.format_id, only.key) == ("gguf-unknown", "comfyui-gguf-unknown")
    layer.weight = nn.Parameter(torch.zeros(DIM, DIM))
    assert find_carriers(layer) == []


def test_finds_a_stand_in_of_gguf_parameters_in_a_pack_and_of_its_layers_before_they_are_filled() -> None:
    gguf = pytest.importorskip("gguf")
    data, quant = torch.zeros(DIM, 34, dtype=torch.uint8), gguf.GGMLQuantizationType.Q5_K
    weight = subclass("GGUFParameter", "ComfyUI-WanVideoWrapper.gguf.gguf_utils", data, quant_type=quant)
    assert kinds(holding(weight)) == [(LIBRARY, "gguf-q5-k", "GGUFParameter (not diffusers')")]
    (found,) = find_carriers(holding(weight))
    assert found.key == "other-gguf-q5-k", "what is known of diffusers' layers says nothing of a pack's"
    layer = standing_in("CustomLinear", "ComfyUI-WanVideoWrapper.custom_linear", nn.Linear)(DIM, DIM, device="meta")
    layer.is_gguf = False
    assert find_carriers(layer) == []
    layer.is_gguf = True
    assert kinds(layer) == [(LIBRARY, "gguf-unknown", "CustomLinear")]
    assert find_carriers(layer)[0].key == "other-gguf-unknown"


@pytest.mark.parametrize("module", ["nunchaku.models.linear", "diffusers.quantizers.nunchaku.utils", "any_pack.linear"])
@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_finds_stand_ins_of_nunchaku_layers_and_of_their_copies(precision: str, module: str) -> None:
    svdq, awq = standing_in("SVDQW4A4Linear", module)(), standing_in("AWQW4A16Linear", module)()
    svdq.precision = precision
    unpacked = standing_in("AWQW4A16Linear", "somebody.else")()
    for layer, dtype in ((svdq, torch.int8), (awq, torch.int32)):
        layer.qweight = nn.Parameter(torch.zeros(DIM, DIM // 2, dtype=dtype), requires_grad=False)
    assert kinds(nn.Sequential(svdq, awq, unpacked)) == [
        (LIBRARY, f"nunchaku-svdq-{precision}", "SVDQW4A4Linear"),
        (LIBRARY, "nunchaku-awq-int4", "AWQW4A16Linear"),
    ]


def test_finds_stand_ins_of_nunchaku_blocks_whose_weights_torch_does_not_see() -> None:
    blocks = standing_in("NunchakuFluxTransformerBlocks", "nunchaku.models.transformers.transformer_flux")()
    blocks.m = object()  # a QuantizedFluxModel of its compiled code
    t5 = standing_in("W4Linear", "nunchaku.models.text_encoders.linear")()
    net = nn.ModuleDict({"transformer_blocks": nn.ModuleList([blocks]), "wi": t5, "norm": nn.LayerNorm(DIM)})
    assert [(f.name, f.format_id) for f in find_carriers(net)] == [
        ("transformer_blocks.0", "nunchaku-svdq"),
        ("wi", "nunchaku-awq-int4"),
    ]


def test_finds_a_stand_in_of_hqq_layers_once_they_are_quantized() -> None:
    layer = standing_in("HQQLinear", "hqq.core.quantize")()
    layer.W_q, layer.meta = None, None
    assert find_carriers(layer) == []
    del layer.W_q
    layer.W_q = nn.Parameter(torch.zeros(DIM, DIM // 2, dtype=torch.uint8), requires_grad=False)
    layer.meta = {"nbits": 4, "group_size": 64, "scale": torch.ones(DIM, 1)}
    assert kinds(layer) == [(LIBRARY, "hqq-int4", "HQQLinear")]


@pytest.mark.parametrize(
    ("name", "module", "bits", "format_id"),
    [
        ("TorchQuantLinear", "gptqmodel.nn_modules.qlinear.torch", "bits", "gptq-int4"),
        ("AwqTorchLinear", "gptqmodel.nn_modules.qlinear.torch_awq", "bits", "awq-int4"),
        ("QuantLinear", "auto_gptq.nn_modules.qlinear.qlinear_cuda_old", "bits", "gptq-int4"),
        ("WQLinear_GEMM", "awq.modules.linear.gemm", "w_bit", "awq-int4"),
        ("QuantLinear", "auto_round_extension.torch.qlinear_torch", "bits", "auto-round-int4"),
    ],
)
def test_finds_stand_ins_of_gptq_and_awq_layers(name: str, module: str, bits: str, format_id: str) -> None:
    layer = standing_in(name, module)()
    layer.register_buffer("qweight", torch.zeros(DIM // 8, DIM, dtype=torch.int32))
    setattr(layer, bits, 4)
    assert kinds(nn.Sequential(nn.Linear(2, 2), layer)) == [(LIBRARY, format_id, name)]
    layer.qweight = None
    del layer._buffers["qweight"]
    assert find_carriers(layer) == []


@pytest.mark.parametrize(
    ("num_bits", "word", "stored", "format_id"),
    [
        (4, "int", torch.int32, "compressed-tensors-int4"),
        (8, "float", torch.float8_e4m3fn, "compressed-tensors-float8"),
    ],
)
def test_finds_stand_ins_of_compressed_tensors_schemes_on_torchs_own_layers(
    num_bits: int, word: str, stored: torch.dtype, format_id: str
) -> None:
    scheme = standing_in("QuantizationScheme", "compressed_tensors.quantization.quant_scheme", object)()
    scheme.weights = SimpleNamespace(num_bits=num_bits, type=word)
    layer = nn.Linear(DIM, DIM)
    layer.quantization_scheme = scheme
    assert find_carriers(layer) == []  # not compressed, or decompressed when it was loaded
    layer.weight = nn.Parameter(torch.zeros(DIM, DIM).to(stored), requires_grad=False)
    assert kinds(layer) == [(LIBRARY, format_id, "Linear")]


@pytest.mark.parametrize(
    ("path", "arguments", "format_id"),
    [
        ("finegrained_fp8.FP8Linear", (DIM, DIM), "transformers-finegrained-fp8"),
        ("eetq.EetqLinear", (DIM, DIM), "transformers-eetq-int8"),
        ("bitnet.BitLinear", (DIM, DIM, False), "transformers-bitnet"),
        ("compressed_tensors.CompressedTensorsFP8Linear", (DIM, DIM), "compressed-tensors-float8"),
        ("fbgemm_fp8.FbgemmFp8Linear", (DIM, DIM, False), "transformers-fbgemm-fp8"),
    ],
)
def test_finds_layers_of_transformers(path: str, arguments: tuple[Any, ...], format_id: str) -> None:
    module, name = path.split(".")
    integration = pytest.importorskip(f"transformers.integrations.{module}")
    layer = getattr(integration, name)(*arguments)
    assert kinds(nn.ModuleDict({"wq": layer})) == [(LIBRARY, format_id, name)]


def test_finds_layers_and_parameters_of_diffusers_own_fp8_and_nvfp4() -> None:
    utils = pytest.importorskip("diffusers.quantizers.bfl.utils")
    weight = utils.BFLQuantizedParameter(torch.zeros(DIM, DIM).to(torch.float8_e4m3fn), "fp8r", torch.ones(DIM))
    net = nn.Sequential(utils.BFLFP8RLinear(DIM, DIM), utils.BFLNVFP4Linear(DIM, DIM), holding(weight))
    assert kinds(net) == [
        (LIBRARY, "bfl-fp8r", "BFLFP8RLinear"),
        (LIBRARY, "bfl-nvfp4", "BFLNVFP4Linear"),
        (LIBRARY, "bfl-fp8r", "BFLQuantizedParameter"),
    ]


def test_finds_layers_that_torch_itself_quantized() -> None:
    net = nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU())
    try:
        net = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    except RuntimeError as err:
        pytest.skip(f"this torch cannot: {err}")
    assert kinds(net) == [(LIBRARY, "torch-qint8", "Linear")]


def test_finds_stand_ins_of_sd_next_layers_new_and_old() -> None:
    new = standing_in("SDNQLinear", "modules.sdnq.layers", standing_in("SDNQLayer", "modules.sdnq.layers"))()
    new.sdnq_dequantizer = SimpleNamespace(weights_dtype="uint4")
    old = nn.Linear(DIM, DIM)  # whose class stays torch's
    old.sdnq_decompressor = standing_in("INT8SymmetricWeightsDecompressor", "modules.sdnq.decompressor")()
    assert kinds(nn.Sequential(new, old)) == [
        (LIBRARY, "sdnq-uint4", "SDNQLinear"),
        (LIBRARY, "sdnq-unknown", "Linear"),
    ]


@pytest.mark.parametrize("cls", ["QBytesTensor", "QBitsTensor"])
def test_finds_stand_ins_of_quanto_under_its_older_name(cls: str) -> None:
    base = standing_in("QTensor", "quanto.tensor.qtensor", torch.Tensor, detach=lambda self: self)
    weight = torch.zeros(DIM, DIM).as_subclass(standing_in(cls, "quanto.tensor.qbytes", base))
    weight.qtype = SimpleNamespace(name="qint8")
    assert kinds(holding(weight)) == [(LIBRARY, "quanto-qint8", cls)]


def test_finds_stand_ins_of_older_torchao_tensors_which_are_no_cells_of_the_newer() -> None:
    stored = SimpleNamespace(int_data=torch.zeros(DIM, DIM, dtype=torch.int8))
    levels = {"tensor_impl": stored, "quant_min": -128, "quant_max": 127}
    module = "torchao.dtypes.affine_quantized_tensor"
    weight = subclass("AffineQuantizedTensor", module, torch.zeros(DIM, DIM), **levels)
    module = "torchao.quantization.linear_activation_quantized_tensor"
    outer = subclass("LinearActivationQuantizedTensor", module, torch.zeros(2), original_weight_tensor=weight)
    four = {**levels, "quant_min": 0, "quant_max": 15}
    bits = subclass("AffineQuantizedTensor", module, torch.zeros(DIM, DIM), **four)
    stored8 = SimpleNamespace(float8_data=torch.zeros(2).to(torch.float8_e4m3fn))
    floats = subclass("AffineQuantizedTensor", module, torch.zeros(DIM), tensor_impl=stored8, quant_min=-448)
    nets = [holding(w) for w in (weight, outer, bits, floats)]
    assert [f.format_id for f in find_carriers(nn.Sequential(*nets))] == [
        "torchao-affine-int8",
        "torchao-affine-int8dyn",
        "torchao-affine-int4",
        "torchao-affine-float8-e4m3fn",
    ]


def test_finds_layers_that_accelerate_casts() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    net = nn.Sequential(nn.Linear(DIM, DIM), nn.LayerNorm(DIM)).to(torch.bfloat16)
    accelerate = pytest.importorskip("accelerate.big_modeling")
    accelerate.attach_layerwise_casting_hooks(net, torch.float8_e4m3fn, torch.bfloat16, skip_modules_pattern=("1",))
    assert hooks.LayerwiseCastingHook.__name__ == "LayerwiseCastingHook"
    assert kinds(net) == [(LIBRARY, "layerwise-fp8-e4m3fn", "LayerwiseCastingHook")]


@pytest.mark.parametrize("place", ["attribute", "buffer", "parameter"])
def test_finds_scaled_fp8_weights_and_not_those_without_a_scale(place: str) -> None:
    layer = nn.Linear(DIM, DIM)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    layer.scale_weight = None
    assert find_carriers(layer) == []
    del layer.scale_weight
    scale = torch.ones(())
    if place == "buffer":
        layer.register_buffer("scale_weight", scale)
    else:
        layer.scale_weight = scale if place == "attribute" else nn.Parameter(scale)
    assert kinds(layer) == [(LIBRARY, "scaled-fp8-e4m3fn", "Linear")]
    layer.weight = nn.Parameter(torch.zeros(DIM, DIM))
    assert find_carriers(layer) == []


def test_finds_a_stand_in_of_older_comfyui_layers_with_scaled_fp8() -> None:
    layer = standing_in("Linear", "comfy.ops", nn.Linear)(DIM, DIM)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e5m2), requires_grad=False)
    layer.scale_weight = nn.Parameter(torch.ones(()))
    assert kinds(layer) == [(HOST, "comfy-fp8-e5m2", "Linear")]


COMFY = ("fp8-e4m3fn", "fp8-e5m2", "nvfp4", "mxfp8", "int8", "int8-convrot", "w4a4-convrot", "w4a8")


@pytest.mark.parametrize("format_id", [f"comfy-{name}" for name in COMFY])
def test_finds_comfyui_tensors_under_the_formats_of_the_registry(format_id: str) -> None:
    pytest.importorskip("comfy_kitchen")
    from quantwire.quantizers.apply import make_layer
    from quantwire.quantizers.registry import require
    from quantwire.quantizers.spec import QuantSpec

    weight = require(format_id).quantize(torch.randn(256, 256, dtype=torch.bfloat16), QuantSpec(format_id))
    assert kinds(make_layer(weight, None, Carrier.LIBRARY)) == [(HOST, format_id, "QuantizedTensor")]


def test_names_a_layout_of_comfyui_that_the_registry_has_not_by_its_own_name() -> None:
    tensor = pytest.importorskip("comfy_kitchen.tensor")
    data = torch.zeros(DIM, DIM, dtype=torch.int8)
    params = tensor.TensorWiseINT8Layout.Params(torch.ones(DIM, 1), torch.bfloat16, (DIM, DIM))
    made = tensor.QuantizedTensor(data, "TensorWiseINT8Layout", params)
    assert kinds(holding(made)) == [(HOST, "comfy-int8", "QuantizedTensor")]
    made._layout_cls = "SomeNewLayout"
    assert kinds(holding(made)) == [(HOST, "comfy-somenew", "QuantizedTensor")]


# Where weights are kept


def test_finds_tensors_that_are_buffers() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    source = nn.Sequential(nn.Linear(DIM, DIM)).to(torch.bfloat16)
    quantization.quantize_(source, quantization.Int8WeightOnlyConfig())
    net = nn.Module()
    net.register_buffer("packed", source[0].weight.data)
    net.register_buffer("table", torch.zeros(2))
    assert kinds(net) == [(LIBRARY, "torchao-int8wo", "Int8Tensor")]


def offloadable(format_id: str) -> nn.Module:
    """Layers that accelerate can stream, or at least take off the device before it fails."""
    if format_id.startswith("bnb"):
        layer = bnb_int8() if format_id == "bnb-int8" else bnb_four_bit("nf4")
        return nn.Sequential(layer, nn.Linear(DIM, DIM)).to("cpu")
    net = nn.Sequential(nn.Linear(DIM, DIM), nn.LayerNorm(DIM)).to(torch.bfloat16)
    if format_id == "torchao-int8wo":
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
    else:
        hooks = pytest.importorskip("diffusers.hooks")
        hooks.apply_layerwise_casting(net, torch.float8_e4m3fn, torch.bfloat16, skip_modules_pattern=())
    return net


@pytest.mark.parametrize("format_id", ["bnb-nf4", "bnb-int8", "torchao-int8wo", "layerwise-fp8-e4m3fn"])
def test_finds_the_same_under_sequential_offload(format_id: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    net = offloadable(format_id)
    before = find_carriers(net)
    assert [f.format_id for f in before] == [format_id]
    accelerate.cpu_offload(net, execution_device=torch.device("cpu"))
    assert {p.device.type for p in net.parameters()} == {"meta"}
    assert find_carriers(net) == before


def test_finds_a_weight_of_which_only_the_hook_has_the_class() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    quantized = offloadable("torchao-int8wo")[0].weight
    net = nn.Sequential(nn.Linear(DIM, DIM, bias=False, device="meta"))
    assert find_carriers(net) == []
    kept = {"0.weight": quantized}
    hook = hooks.AlignDevicesHook(execution_device="cpu", offload=True)
    hook.weights_map = pytest.importorskip("accelerate.utils").PrefixedDataset(kept, "0.")
    net[0]._hf_hook = hooks.SequentialHook(hooks.ModelHook(), hook)
    assert kinds(net) == [(LIBRARY, "torchao-int8wo", "Int8Tensor")]


def test_does_not_read_a_weight_from_disk_to_name_it(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    net = nn.Sequential(nn.Linear(DIM, DIM))
    accelerate.disk_offload(net, str(tmp_path), execution_device=torch.device("cpu"))
    for file in tmp_path.glob("*.dat"):
        file.unlink()
    assert find_carriers(net) == []


# Tensors that nothing here knows


class Wrapped(torch.Tensor):
    """A wrapper subclass: its values are in the tensors inside."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapped:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.bfloat16)
        made.inner = inner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(str(func))


class Marked(nn.Parameter):
    """What serving libraries do: a parameter with a function that loads it."""


class Packed(nn.Parameter):
    """Bytes, and elsewhere what they mean."""


def test_finds_unknown_subclasses_under_the_names_of_their_classes() -> None:
    scaled = Marked(torch.zeros(DIM, DIM))
    scaled.scales = {"weight": torch.ones(DIM)}
    packed = Packed(torch.zeros(DIM, dtype=torch.uint8), requires_grad=False)
    packed.quant_type = "secret"
    net = nn.Sequential(holding(Wrapped(torch.zeros(DIM, dtype=torch.uint8))), holding(scaled), holding(packed))
    net.register_buffer("table", Wrapped(torch.zeros(2)))
    assert find_carriers(net) == [
        Found("", LIBRARY, "unknown-Wrapped", 2, "Wrapped"),
        Found("1", LIBRARY, "unknown-Marked", 1, "Marked"),
        Found("2", LIBRARY, "unknown-Packed", 1, "Packed"),
    ]


def test_raises_no_alarm_for_torchs_own_classes_and_plain_marks() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    marked = Marked(torch.zeros(DIM, DIM))
    marked.weight_loader = print
    with FakeTensorMode():
        fake = nn.Linear(DIM, DIM)
    net = nn.ModuleList([nn.Linear(DIM, DIM), nn.LazyLinear(DIM), fake, holding(marked)])
    net.register_buffer("buffer", nn.Buffer(torch.zeros(2)))
    net.register_buffer("waited_for", AsyncCollectiveTensor(torch.zeros(2)))
    net.register_buffer("bytes", torch.zeros(2, dtype=torch.uint8))
    net.register_buffer("nothing", None)
    assert type(fake.weight).__name__ == "FakeTensor"
    assert find_carriers(net) == []


def test_raises_no_alarm_for_distributed_tensors() -> None:
    distributed = pytest.importorskip("torch.distributed")
    tensor = pytest.importorskip("torch.distributed.tensor")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        weight = tensor.distribute_tensor(torch.zeros(DIM, DIM), mesh)
        assert type(weight).__name__ == "DTensor"
        assert find_carriers(holding(weight)) == []
    finally:
        distributed.destroy_process_group()


def test_raises_no_alarm_for_a_stand_in_of_comfyuis_lazy_parameters() -> None:
    cls = standing_in("LazyCastingParam", "comfy.model_patcher", nn.Parameter)
    lazy = cls(torch.zeros(DIM))
    lazy.model = nn.Linear(2, 2)
    assert find_carriers(holding(lazy)) == []


@pytest.mark.parametrize("make", [torch.jit.script, lambda net: torch.jit.trace(net, torch.zeros(1, 2))])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_looks_into_scripted_and_traced_modules(make: Any) -> None:
    assert find_carriers(make(nn.Sequential(nn.Linear(2, 2)))) == []


def test_finds_nothing_in_models_at_full_precision_and_is_quick_about_it() -> None:
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        flux = diffusers.FluxTransformer2DModel()
        t5 = transformers.T5EncoderModel(transformers.T5Config(d_model=8, num_layers=24, num_heads=1, d_ff=8))
    assert sum(1 for _ in flux.modules()) > 1000
    assert find_carriers(t5) == []
    seconds: list[float] = []
    for _ in range(7):
        start = time.process_time()  # others work on the machine too
        assert find_carriers(flux) == []
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.020
