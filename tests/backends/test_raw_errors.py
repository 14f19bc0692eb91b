"""Raw errors of the installed libraries, provoked under the real calls of accelerate and diffusers, and explained."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.quantizers.compat.find import find_carriers
from quantwire.quantizers.compat.modes import HostName, OffloadMode
from quantwire.quantizers.compat.translate import translate
from quantwire.quantizers.errors import OffloadConflict, QuantwireError, SpecError
from quantwire.quantizers.registry import availability, get_quantizer
from quantwire.quantizers.spec import QuantSpec
from torch import Tensor, nn

accelerate = pytest.importorskip("accelerate")

DIM = 256
CPU = torch.device("cpu")  # accelerate compares device maps with the string "cpu", so it takes this one for another
META_TEXT = "Cannot copy out of meta tensor; no data!"


class Net(nn.Module):
    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def plain(dim: int = DIM) -> Net:
    torch.manual_seed(0)
    return Net(dim).to(torch.bfloat16).eval().requires_grad_(False)


def replaced(make: Callable[[nn.Linear], nn.Module], dim: int = DIM) -> nn.Module:
    net = plain(dim)
    for name, layer in list(net.named_children()):
        setattr(net, name, make(layer))  # type: ignore[arg-type]
    return net.eval()


def bnb(format_id: str, dim: int = DIM) -> nn.Module:
    library = pytest.importorskip("bitsandbytes")

    def make(linear: nn.Linear) -> nn.Module:
        if format_id == "bnb-int8":
            layer = library.nn.Linear8bitLt(dim, dim, has_fp16_weights=False)
        else:
            quant_type = format_id.removeprefix("bnb-")
            layer = library.nn.Linear4bit(dim, dim, compute_dtype=torch.bfloat16, quant_type=quant_type)
        layer.load_state_dict(linear.state_dict())
        return layer.to("cpu")  # the move is what quantizes

    return replaced(make, dim)


def quanto(qtype: str, dim: int = DIM) -> nn.Module:
    library = pytest.importorskip("optimum.quanto")
    net = plain(dim)
    library.quantize(net, weights=library.qtypes[qtype])
    library.freeze(net)
    return net


def native(format_id: str) -> nn.Module:
    """With the layers that the format's backend makes for other tools."""
    state = availability(format_id)
    if not state.works:
        pytest.skip(f"{format_id}: {state.reason}")
    quantizer: Any = get_quantizer(format_id)
    spec = QuantSpec(format_id)
    return replaced(lambda linear: quantizer.to_native(quantizer.quantize(linear.weight.data, spec), linear.bias))


def gguf() -> nn.Module:
    types = pytest.importorskip("gguf").GGMLQuantizationType
    utils = pytest.importorskip("diffusers.quantizers.gguf.utils")
    quantizer: Any = get_quantizer("gguf-q8-0")

    def make(linear: nn.Linear) -> nn.Module:
        data = quantizer.quantize(linear.weight.data, QuantSpec("gguf-q8-0")).tensors["qdata"]
        layer = utils.GGUFLinear(DIM, DIM, bias=True, compute_dtype=torch.bfloat16)
        layer.weight = utils.GGUFParameter(data, quant_type=types.Q8_0)
        layer.bias = nn.Parameter(linear.bias.data.clone(), requires_grad=False)
        return layer

    return replaced(make)


def nncf(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setenv("NNCF_CI", "1")  # no telemetry
    library = pytest.importorskip("nncf")
    return library.compress_weights(plain(), mode=library.CompressWeightsMode.INT8_SYM, dataset=library.Dataset([x()]))


def x() -> Tensor:
    return torch.randn(4, DIM, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


def sequential(net: nn.Module) -> Any:
    accelerate.cpu_offload(net, execution_device=CPU)
    return net(x()[:, : net.a.in_features])  # type: ignore[union-attr, index]


def on_disk(net: nn.Module, folder: Path) -> Any:
    accelerate.disk_offload(net, folder, execution_device=CPU)
    return net(x())


def split(net: nn.Module) -> Any:
    accelerate.dispatch_model(net, device_map={"a": CPU, "b": "cpu"}, main_device=CPU)
    return net(x())


def group_on_disk(net: nn.Module, folder: Path) -> Any:
    hooks = pytest.importorskip("diffusers.hooks")
    hooks.apply_group_offloading(
        net, onload_device=CPU, offload_device=CPU, offload_type="leaf_level", offload_to_disk_path=str(folder)
    )
    return net(x())


def raw(call: Callable[[], object]) -> Exception:
    with torch.no_grad(), pytest.raises(Exception) as failure:  # noqa: PT011 - what it says is checked by the caller
        call()
    return failure.value


def explained(err: Exception, text: str, **known: Any) -> QuantwireError:
    """The translation of an error that begins so; without it the test ends here."""
    assert f"{type(err).__name__}: {err}".startswith(text)
    translation = translate(err, **known)
    assert translation is not None
    first, second, *_ = lines = str(translation).splitlines()
    assert first.endswith(".")
    assert len(first) < 250
    assert second.startswith("It stopped")
    assert f"`{type(err).__name__}: {str(err).splitlines()[0][:60].rstrip('.')}" in second
    assert lines[2] == "Ways out:"
    assert "quantwire" in lines[3]
    return translation


# --- the four of which users know the text ---


def test_cannot_copy_out_of_meta_tensor() -> None:
    err = raw(lambda: sequential(bnb("bnb-nf4")))
    translation = explained(err, f"NotImplementedError: {META_TEXT}")
    assert type(translation) is OffloadConflict
    first, second, *ways_out = str(translation).splitlines()
    assert first.startswith("bnb-nf4 (2 layers of Params4bit) stopped with sequential offload (memory): ")
    assert second.startswith("It stopped at 'a' (Linear4bit), in bitsandbytes.functional.to, with")
    assert any("`mode` to model" in way for way in ways_out)


def test_missing_6_required_positional_arguments() -> None:
    err = raw(lambda: sequential(quanto("qint8")))
    translation = explained(
        err, "TypeError: WeightQBytesTensor.__new__() missing 6 required positional arguments: 'axis', 'size',"
    )
    assert type(translation) is OffloadConflict
    assert str(translation).startswith("quanto-qint8 (2 layers of WeightQBytesTensor) stopped with sequential offload")


def test_blockwise_quantization_only_supports_floats_as_4_bit_weights_say_it_now() -> None:
    """Since 0.46 with `4bit`; a RuntimeError up to 0.49."""
    params = bnb("bnb-nf4").a.weight  # type: ignore[union-attr]
    # As accelerate and others rebuild a weight: from its class and data, without what it knows of being quantized.
    err = raw(lambda: type(params)(params.data, requires_grad=False).to("cpu"))
    text = r"(Value|Runtime)Error: Blockwise 4bit quantization only supports 16/32-bit floats, but got torch.uint8"
    assert re.match(text, f"{type(err).__name__}: {err}")
    translation = translate(err)
    assert type(translation) is OffloadConflict
    assert str(translation).startswith("bitsandbytes 4-bit layers stopped: a weight that is quantized already")


def test_blockwise_quantization_only_supports_floats_in_the_old_words() -> None:
    """4-bit weights said it so up to bitsandbytes 0.45.5, and only on a GPU; from 0.50 the 8-bit function does."""
    functional = pytest.importorskip("bitsandbytes").functional
    net = bnb("bnb-nf4")
    with torch.no_grad():
        try:
            functional.quantize_blockwise(net.a.weight.data)  # type: ignore[union-attr]
        except Exception as err:
            failure = err
        else:
            pytest.skip("this bitsandbytes quantizes integers without a word; up to 0.45.5 and from 0.50 it refuses")
    assert str(failure) == "Blockwise quantization only supports 16/32-bit floats, but got torch.uint8"
    assert translate(failure) is None  # whoever calls the function himself has no model that is offloaded
    translation = explained(
        failure,
        "ValueError: Blockwise",
        found=find_carriers(net),
        mode=OffloadMode.SEQUENTIAL,
        host=HostName.STANDALONE,
    )
    assert type(translation) is OffloadConflict
    assert str(translation).startswith("bnb-nf4 (2 layers of Params4bit) stopped with sequential offload: ")


def test_expected_all_tensors_to_be_on_the_same_device() -> None:
    """On a GPU every operator says it; without one, torch's operators that are compiled for both devices do."""
    weight: Any = quanto("qint8").a.weight  # type: ignore[union-attr]
    err = raw(lambda: torch.ops.aten.silu_backward(torch.ones(DIM, DIM, dtype=torch.bfloat16, device="meta"), weight))
    text = "RuntimeError: Expected all tensors to be on the same device, but found at least two"
    translation = explained(err, text, mode=OffloadMode.SEQUENTIAL)
    assert type(translation) is OffloadConflict
    assert translate(err) is None
    assert translate(err, mode=OffloadMode.NONE) is None
    assert translate(err, host=HostName.COMFYUI, mode=OffloadMode.PARTIAL, variant="whole") is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: quanto("qint8"), lambda: native("torchao-int8wo"), lambda: native("comfy-fp8-e4m3fn"), gguf,
        lambda: native("sdnq-int8"),
    ],
    ids=["quanto", "torchao", "comfy", "gguf", "sdnq"],
)  # fmt: skip
def test_an_input_on_another_device_is_the_mistake_of_the_caller(make: Callable[[], nn.Module]) -> None:
    """Nothing was moved: the weights are all on one device, and no hooks of offloading are there."""
    net = make()
    err = raw(lambda: net(x().to("meta")))
    assert "device" in str(err)
    assert translate(err) is None


def test_an_input_on_another_device_than_layerwise_casting_is_the_mistake_of_the_caller() -> None:
    hooks = pytest.importorskip("diffusers.hooks")
    net = plain()
    hooks.apply_layerwise_casting(net, torch.float8_e4m3fn, torch.bfloat16, skip_modules_pattern=())
    err = raw(lambda: net(x().to("meta")))
    assert "device" in str(err)
    assert translate(err) is None


@pytest.mark.parametrize("part", ["_data", "_scale"])
def test_devices_differ_in_a_layer_as_operators_in_python_say_it(part: str) -> None:
    net = quanto("qint8")
    weight: Any = net.b.weight  # type: ignore[union-attr]
    setattr(weight, part, getattr(weight, part).to("meta"))
    translation = explained(raw(lambda: net(x())), "RuntimeError: Tensor on device")
    assert type(translation) is OffloadConflict
    assert "It stopped at 'b' (QLinear), in optimum.quanto." in str(translation)


# --- the others ---


@pytest.mark.parametrize(
    ("qtype", "dim", "text"),
    [
        ("qfloat8_e4m3fn", 256, "WeightQBytesTensor.__new__() missing 6"),
        ("qint4", 128, "WeightQBitsTensor.__new__() missing 7"),
        ("qint4", 256, "TinyGemmWeightQBitsTensor.__new__() missing 6"),
    ],
)
def test_quanto_rebuilt(qtype: str, dim: int, text: str) -> None:
    translation = explained(raw(lambda: sequential(quanto(qtype, dim))), f"TypeError: {text}")
    assert str(translation).startswith(f"quanto-{qtype.replace('_', '-')} (2 layers of ")


def test_split_between_devices() -> None:
    translation = explained(raw(lambda: split(bnb("bnb-fp4"))), f"NotImplementedError: {META_TEXT}")
    assert str(translation).startswith("bnb-fp4 (2 layers of Params4bit) stopped with balanced offload (split): ")
    assert "It stopped at 'b' (Linear4bit)" in str(translation)


def test_gguf_of_diffusers_rebuilt() -> None:
    translation = explained(raw(lambda: sequential(gguf())), "KeyError: None")
    assert type(translation) is OffloadConflict
    assert str(translation).startswith("gguf-q8-0 (2 layers of GGUFParameter) stopped with sequential offload")


def test_nncf_under_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nncf(monkeypatch)
    err = raw(lambda: sequential(net))
    translation = explained(err, f"NotImplementedError: {META_TEXT}")
    assert str(translation).startswith("nncf-int8-sym (2 layers of INT8SymmetricWeightsDecompressor) stopped with")
    assert "It stopped at 'a.weight' (INT8SymmetricWeightsDecompressor)" in str(translation)


def test_comfy_kitchen_rebuilt() -> None:
    err = raw(lambda: sequential(native("comfy-fp8-e4m3fn")))
    translation = explained(err, "TypeError: QuantizedTensor.__new__() got an unexpected keyword argument 'requires_g")
    assert type(translation) is OffloadConflict


def test_torchao_kept_on_disk(tmp_path: Path) -> None:
    err = raw(lambda: on_disk(native("torchao-int8wo"), tmp_path))
    translation = explained(err, "NotImplementedError: Int8Tensor dispatch: attempting to run unimplemented operator")
    assert "stopped with sequential offload (disk): " in str(translation)
    assert "`keep_on` to memory" in str(translation)
    assert len(str(translation).splitlines()[1]) < 400  # the raw error lists every argument


def test_torchao_group_kept_on_disk(tmp_path: Path) -> None:
    err = raw(lambda: group_on_disk(native("torchao-int8wo"), tmp_path))
    translation = explained(err, "ValueError: Disk offloading is not supported for TorchAO quantized tensors")
    assert "stopped with group offload (leaf-disk): " in str(translation)


def test_quanto_group_kept_on_disk(tmp_path: Path) -> None:
    err = raw(lambda: group_on_disk(quanto("qint8"), tmp_path))
    translation = explained(err, "RuntimeError: Attempted to access the data pointer on an invalid python storage")
    assert str(translation).startswith(
        "quanto-qint8 (2 layers of WeightQBytesTensor) stopped with group offload (leaf-"
    )


@pytest.mark.parametrize(("qtype", "text"), [("qint8", "a weights Tensor"), ("qint4", "a WeightQBitsTensor")])
def test_quanto_cast(qtype: str, text: str) -> None:
    err = raw(lambda: quanto(qtype, 128).to(torch.float16))
    assert type(explained(err, f"ValueError: The dtype of {text} cannot be changed")) is SpecError
    known = {"mode": OffloadMode.PARTIAL, "host": HostName.COMFYUI}  # the host casts what it streams
    assert type(explained(err, "ValueError", **known)) is OffloadConflict


def test_int8_weight_made_a_plain_parameter() -> None:
    net = bnb("bnb-int8")
    layer: Any = net.a
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    translation = explained(raw(lambda: net(x())), "AttributeError: 'Parameter' object has no attribute 'CB'")
    assert "It stopped at 'a' (Linear8bitLt)" in str(translation)


def test_4_bit_repacked_for_the_cpu() -> None:
    net = bnb("bnb-nf4", dim=72)  # neither 32 nor 64 divides it
    try:
        net(x()[:, :72])
    except Exception as err:
        failure = err
    else:
        pytest.skip("bitsandbytes repacks 4-bit weights on CPUs with AVX512-BF16 only")
    assert isinstance(failure, (AssertionError, RuntimeError))
    translation = translate(failure)
    assert type(translation) is SpecError
    assert str(translation).startswith("bnb-nf4 (2 layers of Params4bit) stopped: on this CPU bitsandbytes repacks")


@pytest.mark.parametrize("make", [lambda: quanto("qint8"), gguf, lambda: native("comfy-fp8-e4m3fn")])
def test_copied(make: Callable[[], nn.Module]) -> None:
    net = make()
    translation = translate(raw(lambda: copy.deepcopy(net)))
    assert type(translation) is SpecError
    assert "cannot be copied" in str(translation)


def test_layerwise_casting_on_two_devices() -> None:
    hooks = pytest.importorskip("diffusers.hooks")
    net = plain()
    hooks.apply_layerwise_casting(net, torch.float8_e4m3fn, torch.bfloat16, skip_modules_pattern=())
    net.b.bias = nn.Parameter(net.b.bias.data.to("meta"), requires_grad=False)
    err = raw(lambda: net(x()))
    translation = explained(err, "RuntimeError: Tensor on device")
    assert type(translation) is OffloadConflict
    assert "It stopped at 'b' (Linear)" in str(translation)
    net.b.to("meta")
    err = raw(lambda: net(x()))
    assert translate(err) is None  # a layer that is whole, and elsewhere
    assert type(explained(err, "RuntimeError: Tensor on device", mode=OffloadMode.GROUP)) is OffloadConflict


# --- what only looks like one ---


def test_full_precision_on_meta_is_not_translated() -> None:
    """The same type and text, from accelerate itself: a model that was never loaded."""
    err = raw(lambda: sequential(plain().to("meta")))
    assert isinstance(err, NotImplementedError)
    assert str(err).startswith(META_TEXT)
    assert translate(err) is None


def test_device_mismatch_beside_quantized_layers_is_not_translated() -> None:
    """In a model of library layers, but in code of somebody else."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quantized = quanto("qint8")
            self.register_buffer("shift", torch.ones(DIM, device="meta"))

        def forward(self, x: Tensor) -> Tensor:
            return self.quantized(x) + self.shift

    net = Mixed()
    err = raw(lambda: net(x()))
    assert "device" in str(err)
    assert translate(err, found=find_carriers(net), mode=OffloadMode.SEQUENTIAL) is None


def test_quantwire_layers_on_two_devices_are_not_translated() -> None:
    """That would be a bug of ours, and no conflict that another carrier could solve."""
    from quantwire.quantizers.weight import QuantizedLinear

    quantizer: Any = get_quantizer("bnb-nf4")
    pytest.importorskip("bitsandbytes")
    spec = QuantSpec("bnb-nf4")
    net = replaced(lambda linear: QuantizedLinear(quantizer.quantize(linear.weight.data, spec), linear.bias))
    net.b.bias = nn.Parameter(net.b.bias.data.to("meta"), requires_grad=False)  # type: ignore[union-attr]
    err = raw(lambda: net(x()))
    assert translate(err) is None
