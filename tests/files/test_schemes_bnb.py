"""Files that bitsandbytes' own layers save: every layer found, and bit for bit the library's own numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.files.model_file import open_model
from quantwire.quantizers.files.schemes.scan import scan
from quantwire.quantizers.registry import availability, get_quantizer
from quantwire.quantizers.spec import QuantSpec
from small_scans import codes, dequantized, fault, json_bytes, json_of, same_weight, scan_of, weight_of
from torch import Tensor, nn

pytestmark = pytest.mark.skipif(
    not availability("bnb-nf4").works, reason=f"bitsandbytes: {availability('bnb-nf4').reason}"
)
PREFIXES = ("", "model.diffusion_model.")
Tensors = dict[str, Tensor]


def weight(n: int = 64, k: int = 128, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)).to(dtype)


def four_bit(w: Tensor, kind: str = "nf4", nested: bool = False, block: int = 64, storage: Any = torch.uint8) -> Any:
    """bitsandbytes' own layer, quantized on this machine."""
    import bitsandbytes as bnb

    n, k = w.shape
    layer: Any = bnb.nn.Linear4bit(k, n, bias=True, quant_type=kind, compress_statistics=nested, quant_storage=storage)
    layer.weight = bnb.nn.Params4bit(
        w.clone(), requires_grad=False, quant_type=kind, compress_statistics=nested, blocksize=block,
        quant_storage=storage, module=layer,
    )  # fmt: skip
    return layer.to("cpu")


def saved(layer: nn.Module, prefix: str = "block.to_q.") -> Tensors:
    return {prefix + name: t for name, t in layer.state_dict().items()}


@pytest.mark.parametrize("prefix", PREFIXES, ids=["bare", "all-in-one"])
@pytest.mark.parametrize("nested", [False, True], ids=["single", "double-quant"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit(tmp_path: Path, kind: str, nested: bool, prefix: str) -> None:
    import bitsandbytes.functional as F

    layer = four_bit(weight(), kind, nested)
    found = scan_of(tmp_path, {**saved(layer, f"{prefix}a."), "norm.weight": torch.ones(4)})
    assert found.faults == ()
    assert list(found.layers) == [f"{prefix}a.weight"]
    assert set(found.plain) == {f"{prefix}a.bias", "norm.weight"}
    one = found.layers[f"{prefix}a.weight"]
    assert (one.scheme, one.type, one.format_id, one.dtype) == ("bnb", kind, f"bnb-{kind}", "BF16")
    assert (one.options["block_size"], one.options["double_quant"]) == (64, nested)
    assert found.shapes[f"{prefix}a.weight"] == (64, 128)
    theirs = F.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(dequantized(found, f"{prefix}a.weight", torch.bfloat16), theirs)
    double = ";bits4-use-double-quant=true" if nested else ""
    spec = QuantSpec.from_uri(f"bnb;bits=4;bits4-quant-type={kind}{double}")
    own = get_quantizer(f"bnb-{kind}").quantize(weight(), spec)
    assert same_weight(weight_of(found, f"{prefix}a.weight"), own)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32, torch.int8], ids=str)
def test_storage_blocks_and_dtypes(tmp_path: Path, storage: torch.dtype, block: int, dtype: torch.dtype) -> None:
    import bitsandbytes.functional as F

    layer = four_bit(weight(dtype=dtype), "nf4", True, block, storage)
    assert layer.weight.dtype == storage
    found = scan_of(tmp_path, saved(layer))
    assert found.faults == ()
    (name,) = found.layers
    assert found.layers[name].options["block_size"] == block
    assert weight_of(found, name).orig_dtype == dtype
    assert weight_of(found, name).tensors["qdata"].dtype == storage
    packed = layer.weight.data.view(-1).view(torch.uint8).unsqueeze(1)
    theirs = F.dequantize_4bit(packed, layer.weight.quant_state)
    assert torch.equal(dequantized(found, name, dtype), theirs)


def test_odd_number_of_values(tmp_path: Path) -> None:
    import bitsandbytes.functional as F

    packed, state = F.quantize_4bit(weight(5, 13), quant_type="nf4")
    tensors = {"x.weight": packed, **{f"x.weight.{k}": t for k, t in state.as_dict(packed=True).items()}}
    found = scan_of(tmp_path, tensors)
    assert found.faults == ()
    assert weight_of(found, "x.weight").orig_shape == (5, 13)
    assert weight_of(found, "x.weight").tensors["qdata"].shape == (33, 1)


@pytest.mark.parametrize("prefix", PREFIXES, ids=["bare", "all-in-one"])
def test_int8(tmp_path: Path, prefix: str) -> None:
    import bitsandbytes as bnb
    import bitsandbytes.functional as F

    layer: Any = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weight(dtype=torch.float16), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    tensors = saved(layer, f"{prefix}a.")
    assert f"{prefix}a.SCB" in tensors
    assert f"{prefix}a.weight_format" in tensors
    found = scan_of(tmp_path, tensors)
    assert found.faults == ()
    one = found.layers[f"{prefix}a.weight"]
    assert (one.scheme, one.type, one.format_id) == ("bnb", "int8", "bnb-int8")
    assert found.plain == (f"{prefix}a.bias",)
    theirs = F.int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB)
    assert torch.equal(dequantized(found, one.name, torch.float32), theirs)
    assert weight_of(found, one.name).meta["threshold"] == 6.0


def test_threshold_of_the_folder(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(4, 8, dtype=torch.int8), "a.SCB": torch.ones(4)}
    found = scan_of(tmp_path, tensors, config={"quantization_config": {"llm_int8_threshold": 4.5}})
    assert weight_of(found, "a.weight").meta["threshold"] == 4.5


def test_other_orders_are_named(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(4, 8, dtype=torch.int8), "a.SCB": torch.ones(4)}
    found = scan_of(tmp_path, {**tensors, "a.weight_format": torch.tensor(3, dtype=torch.uint8)})
    assert found.layers["a.weight"].format_id == ""
    with pytest.raises(FileError, match="col_ampere"):
        found.read("a.weight")


STATE = "block.to_q.weight.quant_state.bitsandbytes__nf4"
Damage = Callable[[Tensors], Any]


def _state(**changes: Any) -> Damage:
    return lambda t: t.__setitem__(STATE, json_bytes({**json_of(t[STATE]), **changes}))


def _cut(name: str) -> Damage:
    return lambda t: t.__setitem__(name, t[name][:-1])


DAMAGE: dict[str, tuple[Damage, str]] = {
    "no weight": (lambda t: t.pop("block.to_q.weight"), "weight-missing"),
    "no absmax": (lambda t: t.pop("block.to_q.weight.absmax"), "tensor-missing"),
    "no codebook": (lambda t: t.pop("block.to_q.weight.quant_map"), "tensor-missing"),
    "no state": (lambda t: t.pop(STATE), "quant-state-missing"),
    "no nested absmax": (lambda t: t.pop("block.to_q.weight.nested_absmax"), "tensor-missing"),
    "state no JSON": (lambda t: t.__setitem__(STATE, t[STATE][:-2]), "quant-state"),
    "no shape": (_state(shape=None), "quant-state"),
    "other shape": (_state(shape=[64, 256]), "weight-size"),
    "block size": (_state(blocksize=48), "quant-state"),
    "dtype": (_state(dtype="int3"), "quant-state"),
    "offset": (_state(nested_offset="x"), "quant-state"),
    "absmax cut": (_cut("block.to_q.weight.absmax"), "tensor-shape"),
    "weight cut": (_cut("block.to_q.weight"), "weight-size"),
    "absmax dtype": (
        lambda t: t.__setitem__("block.to_q.weight.absmax", t["block.to_q.weight.absmax"].float()),
        "tensor-dtype",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_a_fault(tmp_path: Path, what: str) -> None:
    tensors = saved(four_bit(weight(), nested=True))
    damage, code = DAMAGE[what]
    damage(tensors)
    found = scan_of(tmp_path, tensors)
    assert codes(found) == [code]
    assert fault(found, code).fatal
    assert fault(found, code).effect
    for name, layer in found.layers.items():
        assert layer.format_id == ""
        with pytest.raises(FileError, match=r"block\.to_q"):
            found.read(name)


def test_other_codebook_is_refused(tmp_path: Path) -> None:
    tensors = saved(four_bit(weight()))
    tensors["block.to_q.weight.quant_map"] = tensors["block.to_q.weight.quant_map"].flip(0)
    with pytest.raises(FileError, match="not the codebook of nf4"):
        scan_of(tmp_path, tensors).read("block.to_q.weight")


def test_int8_without_rows_of_scales(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(4, 8, dtype=torch.int8), "a.SCB": torch.ones(3)}
    assert codes(scan_of(tmp_path, tensors)) == ["tensor-shape"]
    assert codes(scan_of(tmp_path, {"a.SCB": torch.ones(3)})) == ["weight-missing"]
    assert codes(scan_of(tmp_path, {"a.weight": torch.ones(4, 8), "a.SCB": torch.ones(4)})) == ["tensor-dtype"]


def test_folder_that_diffusers_writes(tmp_path: Path) -> None:
    """FLUX with diffusers' own replacement of layers and its own `save_pretrained`; loading one on a CPU it refuses."""
    import bitsandbytes as bnb
    from diffusers import BitsAndBytesConfig, FluxTransformer2DModel
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer
    from diffusers.quantizers.bitsandbytes.utils import replace_with_bnb_linear

    config: Any = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    sizes: dict[str, Any] = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 64}
    sizes |= {"num_attention_heads": 1, "joint_attention_dim": 64, "pooled_projection_dim": 64}
    model: Any = FluxTransformer2DModel(in_channels=64, axes_dims_rope=(16, 24, 24), **sizes).to(torch.bfloat16)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model = replace_with_bnb_linear(model, modules_to_not_convert=["proj_out"], quantization_config=config)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    for name, layer in layers.items():
        w = before[f"{name}.weight"]
        layer.weight = bnb.nn.Params4bit(w, requires_grad=False, compress_statistics=True, quant_type="nf4").to("cpu")
        layer.bias = None if layer.bias is None else nn.Parameter(before[f"{name}.bias"], requires_grad=False)
    model.register_to_config(quantization_config=config)
    model.hf_quantizer = BnB4BitDiffusersQuantizer(config, pre_quantized=True)
    model.save_pretrained(tmp_path)
    found = scan(open_model(tmp_path))
    assert found.faults == ()
    assert set(found.layers) == {f"{name}.weight" for name in layers}
    assert len(layers) > 20
    assert dict(found.shapes) == {name: tuple(t.shape) for name, t in before.items()}
    for name, layer in layers.items():
        theirs = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(dequantized(found, f"{name}.weight", torch.bfloat16), theirs), name
