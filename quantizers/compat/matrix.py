"""The compatibility table: what happens to each carrier and format under each offload mode.

A row is data, and most rows are measured: the test that `source` names builds a small module of real library layers,
runs it under the mode, and fails when the outcome is not the row's verdict, or the library's error does not begin with
`raw_error`. Rules written as code were not chosen: nobody can check those against the libraries one by one.

Why plain tensors pass and tensor subclasses do not: accelerate takes a weight off the device with `weight.to("meta")`
and puts it back with `type(weight)(data, requires_grad=...)` (accelerate.utils.set_module_tensor_to_device). Whatever
the subclass kept outside `data` is lost on the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from .modes import Carrier, OffloadMode, VerdictLevel

When = Literal["always", "split"]
Evidence = Literal["probed", "documented"]


@dataclass(frozen=True)
class Row:
    """One cell, or several formats that share it.

    Attributes:
        formats: format ids; `*` matches any text. Two prefixes are no formats but states of one: `quanto-unfrozen`
            (quantize() without freeze()) and `comfyui-gguf-*` (ComfyUI-GGUF's own tensor class).
        when: "split" is for a component of which some layers are kept in host memory or on disk while it runs; it
            takes precedence over "always".
        verdict: "warn" where it runs from host memory and stops when a part is kept on disk.
        cause: one sentence without its full stop, fit to stand after "cannot run with ... offload: ".
        remedies: what to do instead, best first. A carrier, mode or format is named as `carrier quantwire`,
            `mode model`, `format bnb-int8`, and is itself ok in this table (a test reads them).
        evidence: "probed" by a test here, or "documented" by somebody else.
        source: test id in this repository, or where the documentation is.
        raw_error: how the library's own error begins, as `Type: message`; empty when it runs.
        versions: what it was measured with.
        note: what the measurement did not reach, and references.
    """

    carrier: Carrier
    formats: tuple[str, ...]
    mode: OffloadMode
    when: When
    verdict: VerdictLevel
    cause: str
    remedies: tuple[str, ...]
    evidence: Evidence
    source: str
    raw_error: str
    versions: str
    note: str = ""

    def covers(self, carrier: Carrier, key: str, mode: OffloadMode) -> bool:
        return self.carrier is carrier and self.mode is mode and any(fnmatchcase(key, f) for f in self.formats)


TESTS = "tests/backends/test_offload_conflicts.py"
BASE = "torch 2.13.0 on CPU, accelerate 1.15.0"
BNB = f"bitsandbytes 0.50.2, {BASE}"
QUANTO = f"optimum-quanto 0.2.7, {BASE}"
GGUF = f"diffusers 0.42.1, gguf 0.19.0, {BASE}"
SDNQ = f"sdnq 0.2.8, {BASE}"
TORCHAO = f"torchao 0.18.0, {BASE}"
NNCF = f"nncf 3.4.0, {BASE}"
LAYERWISE = f"diffusers 0.42.1, {BASE}"

BNB_4BIT = ("bnb-nf4", "bnb-fp4")
BNB_8BIT = ("bnb-int8",)
QUANTO_8BIT = ("quanto-qint8", "quanto-qfloat8-e4m3fn", "quanto-qfloat8-e5m2")
QUANTO_4BIT = ("quanto-qint4",)
QUANTO_2BIT = ("quanto-qint2",)
QUANTO_UNFROZEN = ("quanto-unfrozen",)
GGUF_ANY = ("gguf-*",)
SDNQ_ANY = ("sdnq-*",)
TORCHAO_ANY = ("torchao-int8*", "torchao-int4*", "torchao-float8*")
NNCF_ANY = ("nncf-*",)
LAYERWISE_ANY = ("layerwise-*",)
ANY = ("*",)

USE_QUANTWIRE = "Use carrier quantwire: it holds the weights in plain tensors, which every kind of offload can move."
USE_MODEL = "Use mode model: it moves each component in one piece, so the largest must fit the device."
USE_INT8 = "Use format bnb-int8: its library's layers run under the same offload."
USE_NONE = "Use mode none: keep the whole model on the device, as ComfyUI does with --highvram."
WAYS_OUT = (USE_QUANTWIRE, USE_MODEL, USE_INT8)

COMFYUI = "ComfyUI 0.33.0"
REAL_HOST = "tests/comfyui/test_matrix.py, run by `make test-comfyui`"
STREAMED = "the host streams the plain tensors of each layer; measured on a CPU by forcing the offloaded path"
GATHERED = "the host gathers the plain tensors of each layer; read in its source, not run, because it needs CUDA"
NOT_ITS_OWN = (
    "the host streams layers of its own classes only; others that do not fit stay in host memory, away from their input"
)
SUBCLASS = "the host moves and casts each weight as a plain tensor, which drops what the library keeps beside its data"
BNB_CAUSE = (
    "sending a weight off the device also moves the quantization state that its stored copy shares, which loses it"
)
_REBUILT = "accelerate rebuilds each weight from its class and data alone, which drops a "
QUANTO_CAUSE = _REBUILT + "quanto tensor's scale, axis and size"
GGUF_CAUSE = _REBUILT + "GGUF parameter's quant type"
NNCF_CAUSE = (
    "NNCF decompresses a weight in every operation that touches it, also in accelerate's, while it holds no data yet"
)
TORCHAO_DISK = (
    "it runs from host memory, and stops as soon as a part is kept on disk, which torchao's tensors do not allow"
)

META_ERROR = "NotImplementedError: Cannot copy out of meta tensor; no data!"
QBYTES_ERROR = "TypeError: WeightQBytesTensor.__new__() missing 6 required positional arguments"
QBITS_ERROR = "TypeError: WeightQBitsTensor.__new__() missing 7 required positional arguments"
GGUF_ERROR = "KeyError: None"
# The formats of each of torchao's tensor classes.
TORCHAO_TENSORS = {
    "Int8Tensor": ("torchao-int8*",),
    "Int4OpaqueTensor": ("torchao-int4*",),
    "Float8Tensor": ("torchao-float8*",),
}

INT8_GPU = "Needs an accelerate whose hooks keep int8 statistics (`SCB`), as 1.15 does. Documented on a GPU in "
INT8_SPLIT = (
    INT8_GPU
    + "huggingface/accelerate#1699. huggingface/diffusers#10653 reports device_map='balanced' with int8 to end "
    "in a device mismatch in early 2025; not reproduced."
)
WHOLE_MOVES = "On one device; that a move between two works is documented in "
PLACED = (
    "Measured: split, it fails; unsplit, it fails when dispatch hooks move it to another device (diffusers' "
    "device_map='balanced' always dispatches with hooks) and works where it already is or without hooks. Blocked in "
    "every case, because balanced exists to split what does not fit."
)


def _ok(
    carrier: Carrier,
    formats: tuple[str, ...],
    mode: OffloadMode,
    test: str,
    versions: str,
    *,
    when: When = "always",
    cause: str = "measured, with the same output as without offload",
    note: str = "",
) -> Row:
    source = f"{TESTS}::{test}"
    return Row(carrier, formats, mode, when, VerdictLevel.OK, cause, (), "probed", source, "", versions, note)


def _block(
    formats: tuple[str, ...],
    mode: OffloadMode,
    test: str,
    versions: str,
    cause: str,
    raw_error: str,
    *,
    when: When = "always",
    note: str = "",
) -> Row:
    """A blocked cell of library layers; `quantwire` layers have none."""
    level, source = VerdictLevel.BLOCK, f"{TESTS}::{test}"
    return Row(
        Carrier.LIBRARY, formats, mode, when, level, cause, WAYS_OUT, "probed", source, raw_error, versions, note
    )


def _warn_disk(mode: OffloadMode, test: str, *, when: When = "always") -> tuple[Row, ...]:
    """One for each of torchao's tensor classes, which their errors name."""
    level, source = VerdictLevel.WARN, f"{TESTS}::{test}"
    return tuple(
        Row(_LIB, f, mode, when, level, TORCHAO_DISK, WAYS_OUT, "probed", source, _undispatched(tensor), TORCHAO)
        for tensor, f in TORCHAO_TENSORS.items()
    )


def _undispatched(tensor: str) -> str:
    return f"NotImplementedError: {tensor} dispatch: attempting to run unimplemented operator"


def _every_mode(formats: tuple[str, ...], versions: str) -> tuple[Row, ...]:
    """Library layers on plain parameters, which run in every mode of accelerate."""
    return (
        _ok(_LIB, formats, _NONE, "test_none", versions),
        _ok(_LIB, formats, _MODEL, "test_model", versions, note="On one device."),
        _ok(_LIB, formats, _SEQ, "test_sequential", versions),
        _ok(_LIB, formats, _BAL, "test_balanced_on_one_device", versions),
        _ok(_LIB, formats, _BAL, "test_balanced_split", versions, when="split"),
    )


def _documented(formats: tuple[str, ...], mode: OffloadMode, source: str, versions: str) -> Row:
    level = VerdictLevel.OK
    return Row(
        Carrier.LIBRARY,
        formats,
        mode,
        "always",
        level,
        "documented, not measured by a test",
        (),
        "documented",
        source,
        "",
        versions,
    )


def _in_comfyui(
    carrier: Carrier, formats: tuple[str, ...], mode: OffloadMode, cause: str, source: str, *, blocked: bool = False
) -> Row:
    """A cell of ComfyUI's modes, measured in the real host where `source` says so; the tests here have no ComfyUI.

    How a library's error begins there was not seen, so blocked cells quote none.
    """
    level = VerdictLevel.BLOCK if blocked else VerdictLevel.OK
    ways_out = (USE_QUANTWIRE, USE_NONE) if blocked else ()
    return Row(carrier, formats, mode, "always", level, cause, ways_out, "documented", source, "", COMFYUI)


_NONE, _MODEL, _SEQ, _BAL = OffloadMode.NONE, OffloadMode.MODEL, OffloadMode.SEQUENTIAL, OffloadMode.BALANCED
_PARTIAL, _NOVRAM, _DYNAMIC = OffloadMode.PARTIAL, OffloadMode.NOVRAM, OffloadMode.DYNAMIC
_LIB, _OURS, _HOST = Carrier.LIBRARY, Carrier.QUANTWIRE, Carrier.HOST
_UNFROZEN = "its weights are still in full precision, so no memory is saved before freeze()"
_QINT2 = "optimum-quanto 0.2.7, measured by hand: the first forward compiles C++ for a minute, so no test does it"

ROWS: tuple[Row, ...] = (
    _ok(_LIB, BNB_4BIT, _NONE, "test_none", BNB),
    _ok(_LIB, BNB_4BIT, _MODEL, "test_model", BNB, note=WHOLE_MOVES + "huggingface/diffusers#10653."),
    _block(
        BNB_4BIT,
        _SEQ,
        "test_sequential",
        BNB,
        BNB_CAUSE,
        META_ERROR,
        note="huggingface/diffusers#10800, bitsandbytes-foundation/bitsandbytes#1525. In early 2025 the error was "
        "`ValueError: Blockwise quantization only supports 16/32-bit floats, but got torch.uint8`.",
    ),
    _ok(_LIB, BNB_4BIT, _BAL, "test_balanced_on_one_device", BNB),
    _block(BNB_4BIT, _BAL, "test_balanced_split", BNB, BNB_CAUSE, META_ERROR, when="split"),
    _ok(_LIB, BNB_8BIT, _NONE, "test_none", BNB),
    _ok(
        _LIB,
        BNB_8BIT,
        _MODEL,
        "test_model",
        BNB,
        note="On one device. Before bitsandbytes 0.48 diffusers left int8 components on the device: "
        "huggingface/diffusers#10653.",
    ),
    _ok(_LIB, BNB_8BIT, _SEQ, "test_sequential", BNB, note=INT8_GPU + "huggingface/diffusers#13776."),
    _ok(_LIB, BNB_8BIT, _BAL, "test_balanced_on_one_device", BNB),
    _ok(_LIB, BNB_8BIT, _BAL, "test_balanced_split", BNB, when="split", note=INT8_SPLIT),
    _ok(_LIB, QUANTO_8BIT + QUANTO_4BIT, _NONE, "test_none", QUANTO),
    _ok(
        _LIB,
        QUANTO_8BIT + QUANTO_4BIT,
        _MODEL,
        "test_model",
        QUANTO,
        note=WHOLE_MOVES + "huggingface/diffusers#10526.",
    ),
    _documented(QUANTO_2BIT, _NONE, _QINT2, QUANTO),
    _documented(QUANTO_2BIT, _MODEL, _QINT2, QUANTO),
    _block(
        QUANTO_8BIT,
        _SEQ,
        "test_sequential",
        QUANTO,
        QUANTO_CAUSE,
        QBYTES_ERROR,
        note="huggingface/diffusers#10526.",
    ),
    _block(QUANTO_4BIT + QUANTO_2BIT, _SEQ, "test_sequential", QUANTO, QUANTO_CAUSE, QBITS_ERROR),
    _block(QUANTO_8BIT, _BAL, "test_balanced_moved", QUANTO, QUANTO_CAUSE, QBYTES_ERROR, note=PLACED),
    _block(QUANTO_4BIT + QUANTO_2BIT, _BAL, "test_balanced_moved", QUANTO, QUANTO_CAUSE, QBITS_ERROR, note=PLACED),
    _ok(_LIB, QUANTO_UNFROZEN, _NONE, "test_none", QUANTO, cause=_UNFROZEN),
    _ok(_LIB, QUANTO_UNFROZEN, _MODEL, "test_model", QUANTO, cause=_UNFROZEN),
    _ok(_LIB, QUANTO_UNFROZEN, _SEQ, "test_sequential", QUANTO, cause=_UNFROZEN),
    _ok(_LIB, QUANTO_UNFROZEN, _BAL, "test_balanced_on_one_device", QUANTO, cause=_UNFROZEN),
    _ok(_LIB, QUANTO_UNFROZEN, _BAL, "test_balanced_split", QUANTO, when="split", cause=_UNFROZEN),
    _ok(_LIB, GGUF_ANY, _NONE, "test_none", GGUF),
    _ok(_LIB, GGUF_ANY, _MODEL, "test_model", GGUF, note=WHOLE_MOVES + "huggingface/diffusers#14698."),
    _block(GGUF_ANY, _SEQ, "test_sequential", GGUF, GGUF_CAUSE, GGUF_ERROR, note="huggingface/diffusers#14691."),
    _block(GGUF_ANY, _BAL, "test_balanced_moved", GGUF, GGUF_CAUSE, GGUF_ERROR, note=PLACED),
    *_every_mode(SDNQ_ANY, SDNQ),
    *_every_mode(LAYERWISE_ANY, LAYERWISE),
    _ok(_LIB, TORCHAO_ANY, _NONE, "test_none", TORCHAO),
    _ok(_LIB, TORCHAO_ANY, _MODEL, "test_model", TORCHAO, note="On one device."),
    *_warn_disk(_SEQ, "test_sequential"),
    _ok(_LIB, TORCHAO_ANY, _BAL, "test_balanced_on_one_device", TORCHAO),
    *_warn_disk(_BAL, "test_balanced_split", when="split"),
    _ok(_LIB, NNCF_ANY, _NONE, "test_none", NNCF),
    _ok(_LIB, NNCF_ANY, _MODEL, "test_model", NNCF, note="On one device."),
    _block(NNCF_ANY, _SEQ, "test_sequential", NNCF, NNCF_CAUSE, META_ERROR),
    _ok(_LIB, NNCF_ANY, _BAL, "test_balanced_on_one_device", NNCF),
    _block(NNCF_ANY, _BAL, "test_balanced_split", NNCF, NNCF_CAUSE, META_ERROR, when="split"),
    _documented(("comfyui-gguf-*",), _NONE, "city96/ComfyUI-GGUF:ops.py", "ComfyUI-GGUF at 03842fa"),
    _ok(_OURS, ANY, _NONE, "test_none", BASE),
    _ok(_OURS, ANY, _MODEL, "test_model", BASE, note="On one device."),
    _ok(_OURS, ANY, _SEQ, "test_sequential", BASE),
    _ok(_OURS, ANY, _BAL, "test_balanced_on_one_device", BASE),
    _ok(_OURS, ANY, _BAL, "test_balanced_split", BASE, when="split"),
    *(_in_comfyui(c, ANY, m, STREAMED, REAL_HOST) for c in (_OURS, _HOST) for m in (_PARTIAL, _NOVRAM)),
    *(_in_comfyui(c, ANY, _DYNAMIC, GATHERED, "ComfyUI:comfy/memory_management.py") for c in (_OURS, _HOST)),
    _in_comfyui(_HOST, ANY, _NONE, "the host's own layers", REAL_HOST),
    *(
        _in_comfyui(_LIB, BNB_4BIT + BNB_8BIT, m, SUBCLASS, "Comfy-Org/ComfyUI#6611", blocked=True)
        for m in (_PARTIAL, _NOVRAM, _DYNAMIC)
    ),
    *(
        _in_comfyui(_LIB, QUANTO_8BIT + QUANTO_4BIT + QUANTO_2BIT, m, SUBCLASS, "Comfy-Org/ComfyUI#6611", blocked=True)
        for m in (_PARTIAL, _NOVRAM)
    ),
    *(
        _in_comfyui(_LIB, f, m, NOT_ITS_OWN, "ComfyUI:comfy/model_patcher.py, ModelPatcher.load", blocked=True)
        for f in (SDNQ_ANY, TORCHAO_ANY, NNCF_ANY, LAYERWISE_ANY)
        for m in (_PARTIAL, _NOVRAM)
    ),
    _in_comfyui(_LIB, ("comfyui-gguf-*",), _DYNAMIC, SUBCLASS, "Comfy-Org/ComfyUI#13953", blocked=True),
)


def find_row(carrier: Carrier, key: str, mode: OffloadMode, *, split: bool | None = None) -> Row | None:
    """The row that decides, or None when nothing is known.

    Args:
        key: format id, or one of the states described at `Row.formats`.
        split: whether some layers are kept off the compute device; None (not known) counts as True.
    """
    rows = [r for r in ROWS if r.covers(carrier, key, mode)]
    order: tuple[When, ...] = ("always",) if split is False else ("split", "always")
    return next((r for when in order for r in rows if r.when == when), None)


def ok_modes(carrier: Carrier, key: str) -> list[OffloadMode]:
    """Modes in which this is known to run, split or not."""
    found = ((mode, find_row(carrier, key, mode)) for mode in OffloadMode)
    return [mode for mode, row in found if row is not None and row.verdict is VerdictLevel.OK]
