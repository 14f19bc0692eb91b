"""Detection on real library layers, and what the verdicts say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from quantwire.quantizers.compat.matrix import ROWS, Row, find_row, ok_modes
from quantwire.quantizers.compat.modes import Carrier, OffloadMode, VerdictLevel
from quantwire.quantizers.compat.rules import Found, check, find_carriers, raise_on_block
from quantwire.quantizers.errors import OffloadConflict
from quantwire.quantizers.registry import available_formats
from torch import nn

DIM = 64
LIBRARY, QUANTWIRE = Carrier.LIBRARY, Carrier.QUANTWIRE
SEQUENTIAL, BALANCED = OffloadMode.SEQUENTIAL, OffloadMode.BALANCED


def found(format_id: str = "bnb-nf4", layers: int = 20, carrier: Carrier = LIBRARY, **kwargs: Any) -> Found:
    return Found("blocks.0.attn.to_q", carrier, format_id, layers, **kwargs)


def message(entries: list[Found], mode: OffloadMode = SEQUENTIAL, **kwargs: Any) -> str:
    with pytest.raises(OffloadConflict) as failure:
        raise_on_block(check(entries, mode, **kwargs), "transformer")
    return str(failure.value)


# Detection


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
    (verdict,) = check([only], SEQUENTIAL)
    assert verdict.level is VerdictLevel.UNKNOWN
    assert "GGMLTensor" in verdict.cause


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
        "import sys, quantwire.quantizers.compat.rules\n"
        "names = 'torch', 'bitsandbytes', 'optimum', 'diffusers', 'gguf', 'accelerate', 'sdnq', 'torchao', 'nncf'\n"
        "print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Verdicts


@pytest.mark.parametrize(
    ("format_id", "mode", "split", "level"),
    [
        ("bnb-nf4", BALANCED, None, VerdictLevel.BLOCK),
        ("bnb-nf4", BALANCED, True, VerdictLevel.BLOCK),
        ("bnb-nf4", BALANCED, False, VerdictLevel.OK),
        ("bnb-nf4", SEQUENTIAL, False, VerdictLevel.BLOCK),
        ("bnb-nf4", OffloadMode.MODEL, None, VerdictLevel.OK),
        ("bnb-int8", BALANCED, None, VerdictLevel.OK),
        ("bnb-int8", SEQUENTIAL, None, VerdictLevel.OK),
        ("quanto-qint8", BALANCED, False, VerdictLevel.BLOCK),
        ("quanto-qint4", BALANCED, None, VerdictLevel.BLOCK),
        ("gguf-q4-k", BALANCED, False, VerdictLevel.BLOCK),
        ("gguf-q5-1", SEQUENTIAL, None, VerdictLevel.BLOCK),
        ("gguf-q8-0", OffloadMode.NONE, None, VerdictLevel.OK),
    ],
)
def test_split_decides_only_the_rows_that_depend_on_it(
    format_id: str, mode: OffloadMode, split: bool | None, level: VerdictLevel
) -> None:
    (verdict,) = check([found(format_id)], mode, split=split)
    assert verdict.level is level


@pytest.mark.parametrize("mode", [OffloadMode.NONE, OffloadMode.MODEL, SEQUENTIAL, BALANCED])
@pytest.mark.parametrize("format_id", available_formats())
def test_every_registered_format_has_a_verdict_in_both_carriers(format_id: str, mode: OffloadMode) -> None:
    library, ours = check([found(format_id), found(format_id, carrier=QUANTWIRE)], mode)
    # Outside ComfyUI there are no layers of its formats.
    assert (library.level is VerdictLevel.UNKNOWN) == format_id.startswith("comfy-")
    assert ours.level is VerdictLevel.OK


def test_unfrozen_quanto_runs_everywhere_and_says_that_it_saves_nothing() -> None:
    entry = found("quanto-qint8", frozen=False)
    for mode in (SEQUENTIAL, BALANCED):
        (verdict,) = check([entry], mode)
        assert verdict.level is VerdictLevel.OK
        assert "not frozen" in verdict.headline
        assert "no memory is saved" in verdict.headline


@pytest.mark.parametrize(
    ("format_id", "mode"),
    [("bnb-nf4", OffloadMode.GROUP), ("hqq-int4", SEQUENTIAL), ("hqq-int4", OffloadMode.NONE)],
)
def test_unknown_pairs_are_said_to_be_unknown(format_id: str, mode: OffloadMode) -> None:
    (verdict,) = check([found(format_id)], mode)
    assert verdict.level is VerdictLevel.UNKNOWN
    assert format_id in verdict.headline
    assert "is not known to run" in verdict.headline
    assert verdict.row is None
    raise_on_block([verdict], "transformer")


def test_unknown_verdict_names_the_modes_that_are_known() -> None:
    (verdict,) = check([found("bnb-nf4")], OffloadMode.GROUP)
    assert verdict.remedies == ("Known to work with it: mode none, mode model.",)


# Messages


@pytest.mark.parametrize(
    "row", [r for r in ROWS if r.verdict is VerdictLevel.BLOCK], ids=lambda r: r.formats[0] + r.mode
)
def test_message_first_line_stands_alone_and_two_ways_out_follow(row: Row) -> None:
    format_id = row.formats[0].replace("*", "q4-k")
    lines = message([found(format_id)], row.mode).splitlines()
    assert lines[0] == (
        f"transformer: {format_id} (library layers, 20 of them) cannot run with {row.mode.value} offload: {row.cause}."
    )
    # The library's own error is quoted where it was seen; every probed row has one.
    quoted = [f"Without this check the library stops at 'blocks.0.attn.to_q' with `{row.raw_error}`."]
    assert row.raw_error or row.evidence == "documented"
    assert lines[1:-2] == [*(quoted if row.raw_error else []), "Ways out:"]
    assert lines[-2:] == [f"- {remedy}" for remedy in row.remedies[:2]]
    assert max(map(len, lines[:1])) < 240


def test_message_counts_one_layer_and_names_no_layer_for_the_module_itself() -> None:
    text = message([Found("", LIBRARY, "gguf-q8-0", 1)])
    assert text.startswith("transformer: gguf-q8-0 (one library layer) cannot run with sequential offload: ")
    assert "the library stops with `KeyError: None`" in text


def test_message_tells_of_every_blocked_kind_and_of_no_other() -> None:
    text = message([found("bnb-int8"), found("bnb-nf4"), found("quanto-qint8", 3)])
    starts = [line.split(" (")[0] for line in text.splitlines() if line.startswith("transformer: ")]
    assert starts == ["transformer: bnb-nf4", "transformer: quanto-qint8"]


def test_nothing_is_raised_without_a_block() -> None:
    raise_on_block(check([found("bnb-int8"), found("bnb-nf4", carrier=QUANTWIRE)], SEQUENTIAL), "transformer")
    raise_on_block([], "transformer")


@pytest.mark.parametrize("mode", list(OffloadMode))
def test_verdicts_are_json(mode: OffloadMode) -> None:
    for verdict in check([found(), found("hqq-int4"), found(carrier=QUANTWIRE)], mode):
        data = verdict.to_dict()
        assert json.loads(json.dumps(data)) == data
        assert data["level"] == verdict.level.value
        assert data["mode"] == mode.value
        assert (data["evidence"] == "none") is (verdict.level is VerdictLevel.UNKNOWN)


# Remedies


def is_ok(carrier: Carrier, format_id: str, mode: OffloadMode) -> bool:
    row = find_row(carrier, format_id, mode)
    return row is not None and row.verdict is VerdictLevel.OK


@pytest.mark.parametrize(
    ("row", "remedy"),
    [pytest.param(r, x, id=f"{r.formats[0]}-{r.mode.value}-{i}") for r in ROWS for i, x in enumerate(r.remedies)],
)
def test_remedies_lead_to_cells_that_are_ok(row: Row, remedy: str) -> None:
    named = re.findall(r"\b(carrier|mode|format) ([a-z0-9-]*[a-z0-9])", remedy)
    assert len(named) == 1, "a remedy names one way out"
    ((what, name),) = named
    for pattern in row.formats:
        format_id = pattern.replace("*", "q8-0")
        if what == "carrier":
            assert is_ok(Carrier(name), format_id, row.mode)
        elif what == "mode":
            assert is_ok(row.carrier, format_id, OffloadMode(name))
        else:
            assert name in available_formats()
            assert is_ok(row.carrier, name, row.mode)


def test_ok_modes_are_those_that_run_split_too() -> None:
    assert ok_modes(LIBRARY, "bnb-nf4") == [OffloadMode.NONE, OffloadMode.MODEL]
    assert ok_modes(LIBRARY, "bnb-int8") == [OffloadMode.NONE, OffloadMode.MODEL, SEQUENTIAL, BALANCED]
