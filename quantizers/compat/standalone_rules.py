"""What accelerate and diffusers do to each carrier and format: the claims of the table for the embedded host.

`quantwire compat --probe` runs every cell that these rules cover and says where one is wrong.
"""

from __future__ import annotations

from .modes import Carrier, OffloadMode, VerdictLevel
from .row import Needs, Rule

_LIB, _OURS, _HOST = Carrier.LIBRARY, Carrier.QUANTWIRE, Carrier.HOST
_NONE, _MODEL, _SEQ, _BAL, _GROUP = (
    OffloadMode.NONE,
    OffloadMode.MODEL,
    OffloadMode.SEQUENTIAL,
    OffloadMode.BALANCED,
    OffloadMode.GROUP,
)
ALL_MODES = (_NONE, _MODEL, _SEQ, _BAL, _GROUP)

BNB_4BIT = ("bnb-nf4", "bnb-fp4")
BNB_8BIT = ("bnb-int8",)
QUANTO = ("quanto-qint8", "quanto-qfloat8-*", "quanto-qint4", "quanto-qint2")
QUANTO_UNFROZEN = ("quanto-unfrozen",)
GGUF = ("gguf-*",)
COMFYUI_GGUF = ("comfyui-gguf-*",)
SDNQ = ("sdnq-*",)
TORCHAO = ("torchao-int8*", "torchao-int4*", "torchao-float8*")
NNCF = ("nncf-*",)
LAYERWISE = ("layerwise-*",)
ANY = ("*",)

SPLIT = ("split", "split-disk")
MEMORY = ("block", "leaf")
DISK = ("block-disk", "leaf-disk")
STREAM = ("block-stream", "leaf-stream")

MEASURED = "measured, with the same output as without offload"
UNFROZEN = "its weights are still in full precision, so no memory is saved before freeze()"
BNB_CAUSE = (
    "sending a weight off the device also moves the quantization state that its stored copy shares, which loses it"
)
_REBUILT = "accelerate rebuilds each weight from its class and data alone, which drops a "
QUANTO_CAUSE = _REBUILT + "quanto tensor's scale, axis and size"
GGUF_CAUSE = _REBUILT + "GGUF parameter's quant type"
COMFY_CAUSE = _REBUILT + "QuantizedTensor's layout and scales"
NNCF_CAUSE = (
    "NNCF decompresses a weight in every operation that touches it, also in accelerate's, while it holds no data yet"
)
TORCHAO_DISK = "torchao's tensors cannot be written to disk piece by piece"
_BY_DATA = "diffusers moves a weight by its data alone, which "
QUANTO_GROUP = _BY_DATA + "a quanto tensor does not follow"
COMFY_GROUP = _BY_DATA + "a QuantizedTensor does not follow"
BNB_GROUP = _BY_DATA + "leaves the scales and states that bitsandbytes keeps beside it on the other device"
BNB_GROUP_STAYS = BNB_GROUP + ": it runs only where the layers were on the device before"
INT8_COPY = "int8 layers of bitsandbytes compute from a copy of the weight in `state`, which "
INT8_KEPT = INT8_COPY + "stays on the device when the weight leaves it, so that no memory is saved"
INT8_MOVED = (
    INT8_COPY + "does not move with the module: no memory is saved where they were quantized on the device, and layers "
    "that were quantized on the CPU stop"
)
NNCF_GROUP = (
    "NNCF steps into every operation of a pass, also diffusers' own, so what diffusers moves never reaches a weight"
)
TORCHAO_STREAMED = "diffusers before its own code for torchao's tensors left parts of them in host memory"
STREAMED = "plain tensors are pinned and copied one by one"
NOT_RUN = "nobody has measured it: copying on a stream of its own needs a GPU"

INT8_GPU = (
    "The output is right. Needs an accelerate whose hooks keep int8 statistics (`SCB`), as 1.15 does. Documented on a "
    "GPU in "
)
INT8_SPLIT = (
    INT8_GPU
    + "huggingface/accelerate#1699. huggingface/diffusers#10653 reports device_map='balanced' with int8 to end "
    "in a device mismatch in early 2025; not reproduced."
)
INT8_ELSEWHERE = (
    "Quantize on the device that computes: of layers quantized on the CPU, `to(device)` leaves the copy there."
)
INT8_MODEL = (
    "Measured with layers that were quantized on the CPU. bitsandbytes-foundation/bitsandbytes#1332; before "
    "bitsandbytes 0.48 diffusers left int8 components on the device (huggingface/diffusers#10653)."
)
MODEL_ON_CPU = "On a CPU every `to(device)` of the hook is made to copy, which shows what does not move along."
PLACED = (
    "Where it already is on the device, it runs; diffusers' device_map='balanced' always dispatches with hooks, which "
    "stop as soon as they move it."
)
BNB_STAYS = (
    "Measured on a CPU: the states stay where they were. What follows on a GPU was not run: bitsandbytes 0.50 hands "
    "their addresses to its kernel without looking at the device, so an illegal access or a slow read of host memory "
    "is as likely as an error that says so."
)
BNB_BEFORE = (
    "Measured with layers that were on the CPU when the hooks were put in. Those that were on the device keep their "
    "states there."
)
BNB_STREAMS = (
    "diffusers' guide to speed and memory puts nf4 on the GPU first and streams its leaves "
    "(docs/source/en/optimization/speed-memory-optims.md). Not run here: a stream of its own needs a GPU."
)
TORCHAO_STREAMS = (
    "huggingface/diffusers#13281 and #13276 report a device mismatch. diffusers 0.42 has code of its own for these "
    "tensors, which was read and not run: a stream of its own needs a GPU."
)
BNB_REPACKED = (
    "On a CPU that repacks 4-bit weights at the first product (AVX512-BF16, `support_avx512bf16_for_cpu`) the output "
    "differs: what comes back from disk is not repacked."
)
NNCF_SILENT = "From disk it does not stop: the output is noise."
GROUP_SOURCE = "diffusers:src/diffusers/hooks/group_offloading.py"
BNB_SOURCE = f"{GROUP_SOURCE}, bitsandbytes:bitsandbytes/nn/modules.py"
GUIDE = "diffusers:docs/source/en/optimization/speed-memory-optims.md"


def _rule(
    carrier: Carrier,
    formats: tuple[str, ...],
    mode: OffloadMode,
    verdict: VerdictLevel,
    cause: str,
    variants: tuple[str, ...] = (),
    *,
    source: str = "",
    needs: Needs = "",
    note: str = "",
) -> Rule:
    return Rule(carrier, formats, mode, verdict, cause, variants=variants, source=source, needs=needs, note=note)


def _ok(formats: tuple[str, ...], *modes: OffloadMode, cause: str = MEASURED, note: str = "") -> tuple[Rule, ...]:
    """Library layers that run in every variant but those of streams, which need a GPU."""
    return tuple(
        _rule(_LIB, formats, mode, VerdictLevel.OK, cause, (*MEMORY, *DISK) if mode is _GROUP else (), note=note)
        for mode in modes
    )


def _block(
    formats: tuple[str, ...], mode: OffloadMode, cause: str, variants: tuple[str, ...] = (), note: str = ""
) -> Rule:
    return _rule(_LIB, formats, mode, VerdictLevel.BLOCK, cause, variants, note=note)


def _warn(
    formats: tuple[str, ...],
    mode: OffloadMode,
    cause: str,
    variants: tuple[str, ...] = (),
    *,
    source: str = "",
    needs: Needs = "",
    note: str = "",
) -> Rule:
    return _rule(_LIB, formats, mode, VerdictLevel.WARN, cause, variants, source=source, needs=needs, note=note)


RULES: tuple[Rule, ...] = (
    # Ours: plain parameters.
    *(_rule(_OURS, ANY, mode, VerdictLevel.OK, MEASURED) for mode in (_NONE, _MODEL, _SEQ, _BAL)),
    _rule(_OURS, ANY, _GROUP, VerdictLevel.OK, MEASURED, (*MEMORY, *DISK)),
    _rule(_OURS, ANY, _GROUP, VerdictLevel.OK, STREAMED, STREAM, source=GROUP_SOURCE, needs="gpu"),
    # bitsandbytes
    *_ok(BNB_4BIT, _NONE),
    *_ok(BNB_4BIT, _MODEL, note=MODEL_ON_CPU),
    _block(
        BNB_4BIT,
        _SEQ,
        BNB_CAUSE,
        note="huggingface/diffusers#10800, bitsandbytes-foundation/bitsandbytes#1525. In early 2025 the error was "
        "`ValueError: Blockwise quantization only supports 16/32-bit floats, but got torch.uint8`.",
    ),
    _block(BNB_4BIT, _BAL, BNB_CAUSE, SPLIT),
    *_ok(BNB_4BIT, _BAL),
    _block(BNB_4BIT, _GROUP, BNB_GROUP, MEMORY, note=BNB_STAYS),
    _warn(BNB_4BIT, _GROUP, BNB_GROUP_STAYS, DISK, note=f"{BNB_BEFORE} {BNB_REPACKED}"),
    _warn(BNB_4BIT, _GROUP, BNB_GROUP_STAYS, STREAM, note=BNB_STREAMS, source=GUIDE, needs="gpu"),
    *_ok(BNB_8BIT, _NONE, note=INT8_ELSEWHERE),
    _warn(BNB_8BIT, _MODEL, INT8_MOVED, note=INT8_MODEL),
    _warn(BNB_8BIT, _SEQ, INT8_KEPT, note=INT8_GPU + "huggingface/diffusers#13776."),
    _warn(BNB_8BIT, _BAL, INT8_KEPT, SPLIT, note=INT8_SPLIT),
    *_ok(BNB_8BIT, _BAL),
    # A leaf's own `to`, unlike that of the block around it, sends the copy away too, and nothing brings it back.
    _block(BNB_8BIT, _GROUP, BNB_GROUP, ("leaf",), note=BNB_STAYS),
    _warn(BNB_8BIT, _GROUP, INT8_MOVED, ("block", *DISK), note=BNB_BEFORE),
    _warn(BNB_8BIT, _GROUP, INT8_MOVED, STREAM, source=BNB_SOURCE, needs="gpu"),
    # optimum-quanto
    *_ok(QUANTO_UNFROZEN, *ALL_MODES, cause=UNFROZEN),
    *_ok(QUANTO, _NONE, _MODEL),
    _block(QUANTO, _SEQ, QUANTO_CAUSE, note="huggingface/diffusers#10526."),
    _block(QUANTO, _BAL, QUANTO_CAUSE, note=PLACED),
    _block(QUANTO, _GROUP, QUANTO_GROUP, (*MEMORY, *DISK), note="huggingface/diffusers#12610."),
    # diffusers' GGUF layers
    *_ok(GGUF, _NONE, _MODEL, _GROUP),
    _block(GGUF, _SEQ, GGUF_CAUSE, note="huggingface/diffusers#14691."),
    _block(GGUF, _BAL, GGUF_CAUSE, note=PLACED),
    # libraries that keep plain parameters, or cast them
    *_ok(SDNQ, *ALL_MODES),
    *_ok(LAYERWISE, *ALL_MODES),
    # torchao
    *_ok(TORCHAO, _NONE, _MODEL),
    _block(TORCHAO, _SEQ, TORCHAO_DISK, ("disk",)),
    *_ok(TORCHAO, _SEQ),
    _block(TORCHAO, _BAL, TORCHAO_DISK, ("split-disk",)),
    *_ok(TORCHAO, _BAL),
    _block(TORCHAO, _GROUP, TORCHAO_DISK, DISK),
    *_ok(TORCHAO, _GROUP),
    _warn(TORCHAO, _GROUP, TORCHAO_STREAMED, STREAM, source=GROUP_SOURCE, needs="gpu", note=TORCHAO_STREAMS),
    # NNCF
    *_ok(NNCF, _NONE, _MODEL),
    _block(NNCF, _SEQ, NNCF_CAUSE),
    _block(NNCF, _BAL, NNCF_CAUSE, SPLIT),
    *_ok(NNCF, _BAL),
    _block(NNCF, _GROUP, NNCF_GROUP, MEMORY),
    _block(NNCF, _GROUP, NNCF_GROUP, DISK, note=NNCF_SILENT),
    # ComfyUI's own tensors, outside of ComfyUI
    *(_rule(_HOST, ANY, mode, VerdictLevel.OK, MEASURED) for mode in (_NONE, _MODEL)),
    _rule(_HOST, ANY, _SEQ, VerdictLevel.BLOCK, COMFY_CAUSE),
    _rule(_HOST, ANY, _BAL, VerdictLevel.BLOCK, COMFY_CAUSE, note=PLACED),
    _rule(_HOST, ANY, _GROUP, VerdictLevel.BLOCK, COMFY_GROUP, (*MEMORY, *DISK)),
    # Streams
    *(
        _rule(carrier, ANY, _GROUP, VerdictLevel.UNKNOWN, NOT_RUN, STREAM, needs="gpu")
        for carrier in (Carrier.LIBRARY, Carrier.HOST)
    ),
)
