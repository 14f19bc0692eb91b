"""The compatibility table against the real libraries.

Every probed row of the table is run: a small module of the row's own layers, under the real accelerate calls that the
mode stands for. The row's verdict decides what must happen, so a wrong verdict fails here, and so does a library
version that behaves differently.

A machine without an accelerator stands in for one in two ways. `MAIN` is the CPU as a `torch.device`: accelerate
compares device maps with the string "cpu", so that it takes this one for a compute device and keeps the layers mapped
to "cpu" or "disk" away from it. `meta` is a second device in the tests that only place weights and compute nothing.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.quantizers.compat.matrix import ROWS, TESTS, Row
from quantwire.quantizers.compat.modes import Carrier, VerdictLevel
from quantwire.quantizers.compat.rules import check, find_carriers
from quantwire.quantizers.registry import availability, available_formats, get_quantizer
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedLinear
from torch import Tensor, nn

accelerate = pytest.importorskip("accelerate")

# Of the layers; GGUF has blocks of 256 values. At 256 quanto holds qint4 in a class of its own, whose error differs.
DIM, GGUF_DIM = 128, 256
MAIN = torch.device("cpu")
SPLITS = ("cpu", "disk")
ROTATED = ("comfy-int8-convrot", "comfy-w4a4-convrot", "comfy-w4a8")  # by 256 columns if not told otherwise
# What a pattern of the table is probed with: every way in which the library stores values. Q4_K stands for the types
# of llama.cpp with blocks of 256, int5 for sdnq's types that do not divide a byte. NNCF has no nf4 in torch.
EXAMPLES = {
    "gguf-*": ["gguf-q8-0", "gguf-q4-0", "gguf-q4-k"],
    "sdnq-*": ["sdnq-int8", "sdnq-uint4", "sdnq-int5", "sdnq-float8-e4m3fn", "sdnq-float4-e2m1fn"],
    "torchao-int8*": ["torchao-int8wo", "torchao-int8dyn"],
    "torchao-int4*": ["torchao-int4wo"],
    "torchao-float8*": ["torchao-float8wo"],
    "nncf-*": ["nncf-int8-sym", "nncf-int8-asym", "nncf-int4-sym", "nncf-int4-asym"],
    "layerwise-*": ["layerwise-fp8-e4m3fn", "layerwise-fp8-e5m2"],
    "*": available_formats(),
}


class Net(nn.Module):
    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.dim = dim
        self.a, self.b, self.c = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., : self.dim]
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


def build(carrier: Carrier, format_id: str) -> Net:
    torch.manual_seed(0)
    backend = format_id.partition("-")[0]
    net = Net(GGUF_DIM if backend == "gguf" else DIM).to(torch.bfloat16).eval().requires_grad_(False)
    if carrier is Carrier.LIBRARY and backend in WHOLE_MODEL:
        return WHOLE_MODEL[backend](net, format_id)
    make = (
        quantwire_layer if carrier is Carrier.QUANTWIRE else bnb_layer if format_id.startswith("bnb-") else gguf_layer
    )
    for name, layer in list(net.named_children()):
        setattr(net, name, make(layer, format_id))
    return net.eval()


def quantwire_layer(linear: Any, format_id: str) -> nn.Module:
    state = availability(format_id)
    if not state.works:
        pytest.skip(f"{format_id}: {state.reason}")
    spec = QuantSpec.from_uri(f"{format_id};convrot-group-size=64" if format_id in ROTATED else format_id)
    return QuantizedLinear(get_quantizer(format_id).quantize(linear.weight.data, spec), linear.bias)


def bnb_layer(linear: Any, format_id: str) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    if format_id == "bnb-int8":
        layer = bnb.nn.Linear8bitLt(DIM, DIM, has_fp16_weights=False)
    else:
        quant_type = format_id.removeprefix("bnb-")
        layer = bnb.nn.Linear4bit(DIM, DIM, compute_dtype=torch.bfloat16, quant_type=quant_type)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")  # the move is what quantizes


def gguf_layer(linear: Any, format_id: str) -> nn.Module:
    gguf = pytest.importorskip("gguf")
    utils = pytest.importorskip("diffusers.quantizers.gguf.utils")
    quant_type = gguf.GGMLQuantizationType[format_id.removeprefix("gguf-").upper().replace("-", "_")]
    data = get_quantizer(format_id).quantize(linear.weight.data, QuantSpec(format_id)).tensors["qdata"]
    layer = utils.GGUFLinear(GGUF_DIM, GGUF_DIM, bias=True, compute_dtype=torch.bfloat16)
    layer.weight = utils.GGUFParameter(data, quant_type=quant_type)
    layer.bias = nn.Parameter(linear.bias.data.clone(), requires_grad=False)
    return layer


def build_quanto(net: Net, format_id: str) -> Net:
    quanto = pytest.importorskip("optimum.quanto")
    unfrozen = format_id == "quanto-unfrozen"
    qtype = "qint8" if unfrozen else format_id.removeprefix("quanto-").replace("-", "_")
    quanto.quantize(net, weights=quanto.qtypes[qtype])
    if not unfrozen:
        quanto.freeze(net)
    return net


def build_sdnq(net: Net, format_id: str) -> Net:
    sdnq = pytest.importorskip("sdnq")
    dtype = format_id.removeprefix("sdnq-").replace("-", "_")
    return sdnq.sdnq_post_load_quant(net, weights_dtype=dtype, torch_dtype=torch.bfloat16)


def build_torchao(net: Net, format_id: str) -> Net:
    quantization = pytest.importorskip("torchao.quantization")
    if format_id == "torchao-int4wo":  # the library's `quantize_` has none for a CPU, but its layer for one exists
        quantizer = get_quantizer(format_id)
        for name, layer in list(net.named_children()):
            weight = quantizer.quantize(layer.weight.data, QuantSpec(format_id))  # type: ignore[union-attr]
            setattr(net, name, quantizer.to_native(weight, layer.bias))  # type: ignore[arg-type]
        return net
    names = {
        "torchao-int8wo": "Int8WeightOnlyConfig",
        "torchao-int8dyn": "Int8DynamicActivationInt8WeightConfig",
        "torchao-float8wo": "Float8WeightOnlyConfig",
    }
    quantization.quantize_(net, getattr(quantization, names[format_id])())
    return net


def build_nncf(net: Net, format_id: str) -> Net:
    nncf = pytest.importorskip("nncf")
    mode = nncf.CompressWeightsMode[format_id.removeprefix("nncf-").replace("-", "_").upper()]
    options = {} if "int8" in format_id else {"group_size": 64, "ratio": 1.0, "all_layers": True}
    return nncf.compress_weights(net, mode=mode, dataset=nncf.Dataset([inputs()]), **options)


def build_layerwise(net: Net, format_id: str) -> Net:
    hooks = pytest.importorskip("diffusers.hooks")
    storage = getattr(torch, f"float8_{format_id.removeprefix('layerwise-fp8-')}")
    hooks.apply_layerwise_casting(net, storage, torch.bfloat16, skip_modules_pattern=())
    return net


# Libraries that quantize a module tree and not one layer.
WHOLE_MODEL: dict[str, Callable[[Net, str], Net]] = {
    "quanto": build_quanto,
    "sdnq": build_sdnq,
    "torchao": build_torchao,
    "nncf": build_nncf,
    "layerwise": build_layerwise,
}


@pytest.fixture(autouse=True)
def _quiet_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNCF_CI", "1")  # no telemetry
    monkeypatch.setenv("SDNQ_USE_TORCH_COMPILE", "0")


def inputs() -> Tensor:
    return torch.randn(4, GGUF_DIM, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


def cells(test: str, *variants: str) -> pytest.MarkDecorator:
    """Parametrise with every format of every probed row that names this test as its source."""
    rows = [r for r in ROWS if r.evidence == "probed" and r.source == f"{TESTS}::{test}"]
    assert rows, f"no row names {test}"
    params = [
        pytest.param(row, format_id, variant, id="-".join(filter(None, (row.carrier.value, format_id, variant))))
        for row in rows
        for pattern in row.formats
        for format_id in EXAMPLES.get(pattern, [pattern])
        for variant in variants or ("",)
    ]
    return pytest.mark.parametrize(("row", "format_id", "variant"), params)


def agree(
    row: Row, format_id: str, place: Callable[[Net], nn.Module], *, split: bool | None = None, disk: bool = False
) -> None:
    """Run one cell; the verdict of the row, of `check` on the real module and of the library must be the same.

    Args:
        place: puts the module under the mode; what it returns is then called twice, since some states last one call.
        disk: whether a part is kept on disk: what a warning is about.
    """
    with torch.no_grad():
        expected = build(row.carrier, format_id)(inputs())
        net = build(row.carrier, format_id)
        (verdict,) = check(find_carriers(net), row.mode, split=split)
        assert verdict.row is row
        assert verdict.level is row.verdict
        if row.verdict is VerdictLevel.BLOCK or (row.verdict is VerdictLevel.WARN and disk):
            with pytest.raises(Exception) as failure:  # noqa: PT011 - the type is part of the text below
                place(net)(inputs())
            assert f"{failure.type.__name__}: {failure.value}".startswith(row.raw_error)
            return
        assert row.verdict in (VerdictLevel.OK, VerdictLevel.WARN)
        placed = place(net)
        for _ in range(2):
            assert torch.equal(placed(inputs()), expected)


def offloaded(module: nn.Module) -> set[str]:
    return {name for name, child in module.named_children() if any(p.is_meta for p in child.parameters())}


@cells("test_none")
def test_none(row: Row, format_id: str, variant: str) -> None:
    agree(row, format_id, lambda net: net.to(MAIN))


@cells("test_model")
def test_model(row: Row, format_id: str, variant: str) -> None:
    def place(net: Net) -> nn.Module:
        net, hook = accelerate.cpu_offload_with_hook(net, execution_device=MAIN)
        net(inputs())
        hook.offload()
        return net

    agree(row, format_id, place)


@cells("test_sequential", *SPLITS)
def test_sequential(row: Row, format_id: str, variant: str, tmp_path: Path) -> None:
    def place(net: Net) -> nn.Module:
        if variant == "disk":
            accelerate.disk_offload(net, tmp_path, execution_device=MAIN)
        else:
            accelerate.cpu_offload(net, execution_device=MAIN)
        assert offloaded(net) == {"a", "b", "c"}
        return net

    agree(row, format_id, place, disk=variant == "disk")


def dispatch(net: nn.Module, away: str, folder: Path) -> nn.Module:
    places = {name: away if name == "b" else MAIN for name, _ in net.named_children()}  # NNCF's hooks are a child too
    net = accelerate.dispatch_model(net, device_map=places, main_device=MAIN, offload_dir=folder)
    assert offloaded(net) == {"b"}
    return net


@cells("test_balanced_split", *SPLITS)
def test_balanced_split(row: Row, format_id: str, variant: str, tmp_path: Path) -> None:
    agree(row, format_id, lambda net: dispatch(net, variant, tmp_path), split=True, disk=variant == "disk")


@cells("test_balanced_moved", *SPLITS, "hooks-to-another-device")
def test_balanced_moved(row: Row, format_id: str, variant: str, tmp_path: Path) -> None:
    """Blocked in every case: some layers kept away, or all of them moved by hooks as diffusers' `balanced` does."""

    def place(net: Net) -> nn.Module:
        if variant in SPLITS:
            return dispatch(net, variant, tmp_path)
        return accelerate.dispatch_model(net, device_map={"": "meta"}, main_device="meta", force_hooks=True)

    agree(row, format_id, place, split=None if variant in SPLITS else False)


@cells("test_balanced_on_one_device", "plain", "hooks")
def test_balanced_on_one_device(row: Row, format_id: str, variant: str) -> None:
    def place(net: Net) -> nn.Module:
        return accelerate.dispatch_model(net, device_map={"": MAIN}, force_hooks=variant == "hooks")

    agree(row, format_id, place, split=False)


@pytest.mark.parametrize("hooks", [False, True], ids=["plain", "hooks"])
@pytest.mark.parametrize("format_id", ["quanto-qint8", "quanto-qint4", "quanto-qfloat8-e4m3fn", "gguf-q8-0"])
def test_balanced_works_where_nothing_moves_although_the_table_blocks_it(format_id: str, hooks: bool) -> None:
    """The part of the blocked cells that would have run, as their note says."""
    with torch.no_grad():
        expected = build(Carrier.LIBRARY, format_id)(inputs())
        net = accelerate.dispatch_model(build(Carrier.LIBRARY, format_id), device_map={"": MAIN}, force_hooks=hooks)
        assert torch.equal(net(inputs()), expected)


@pytest.mark.parametrize("away", SPLITS)
def test_full_precision_runs_under_the_same_calls(away: str, tmp_path: Path) -> None:
    """A failure above is the quantized layers' own, not that of the calls."""
    torch.manual_seed(0)
    net = Net().to(torch.bfloat16)
    with torch.no_grad():
        expected = net(inputs())
        assert torch.equal(dispatch(copy.deepcopy(net), away, tmp_path)(inputs()), expected)
        accelerate.cpu_offload(net, execution_device=MAIN)
        assert torch.equal(net(inputs()), expected)


def test_every_probed_row_names_a_test_that_exists() -> None:
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    here = {f"{TESTS}::{node.name}" for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert Path(__file__).as_posix().endswith(TESTS)
    assert {r.source for r in ROWS if r.evidence == "probed"} <= here


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r.carrier.value}-{r.formats[0]}-{r.mode.value}-{r.when}")
def test_every_row_is_complete(row: Row) -> None:
    assert all((row.formats, row.cause, row.source, row.versions))
    assert not row.cause.endswith(".")
    if row.verdict in (VerdictLevel.BLOCK, VerdictLevel.WARN):
        assert len(row.remedies) >= 2
        # A probed row quotes the error that its probe saw; an error that nobody here saw is not made up.
        assert bool(row.raw_error) == (row.evidence == "probed")
    else:
        assert not row.raw_error
