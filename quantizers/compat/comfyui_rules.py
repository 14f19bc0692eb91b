"""What ComfyUI's memory modes do to each carrier and format, and which of its options lead to which mode.

`RULES` joins the table in `matrix`; `LAUNCH_FLAGS` is what `remedies` reads. File and line are of ComfyUI 0.33.0.

How the host treats a layer depends on its class alone. One with `comfy_cast_weights` can stay in host memory and is
copied for each call (comfy/model_patcher.py:1006, comfy/ops.py:337). Any other either moves whole or stays behind
(:1043-1047), and under dynamic VRAM is copied whole when the model is loaded (:1992-2001). So each library is judged as
packs use it: applied in place to a model that the host has loaded. `quantize_` of torchao, NNCF and diffusers' casting
keep the host's layers and change what is in them; bitsandbytes, quanto, SDNQ and GGUF put their own in their place.
"""

from __future__ import annotations

from dataclasses import dataclass

from .modes import Carrier, HostName, OffloadMode, VerdictLevel
from .row import Needs, Rule

_LIB, _OURS, _HOST = Carrier.LIBRARY, Carrier.QUANTWIRE, Carrier.HOST
_NONE, _PARTIAL, _NOVRAM, _DYNAMIC = OffloadMode.NONE, OffloadMode.PARTIAL, OffloadMode.NOVRAM, OffloadMode.DYNAMIC
_MODEL, _SEQ, _BAL, _GROUP = OffloadMode.MODEL, OffloadMode.SEQUENTIAL, OffloadMode.BALANCED, OffloadMode.GROUP
_OK, _WARN, _BLOCK, _UNKNOWN = VerdictLevel.OK, VerdictLevel.WARN, VerdictLevel.BLOCK, VerdictLevel.UNKNOWN
_WHOLE, _SPLIT = ("whole",), ("split",)


@dataclass(frozen=True)
class LaunchFlag:
    """What an option of ComfyUI's command line makes of its memory mode.

    Attributes:
        flag: empty is none of them.
        mode: on GPUs with dynamic VRAM: NVIDIA, and AMD from ROCm 7.14, with PyTorch 2.8 and a working comfy-aimdo
            (main.py:291-331).
        elsewhere: on other GPUs. Apple's and DirectML's differ, see `note`; without a GPU only `--cpu` starts.
        what: what it does, to stand after "it ".
    """

    flag: str
    mode: OffloadMode
    elsewhere: OffloadMode
    what: str
    note: str = ""


_SHARED = (
    "Apple's GPUs share the memory of the CPU and load models whole whatever the option (model_management.py:578)."
)
_DIRECTML = "DirectML loads models whole (model_management.py:122) unless started with --lowvram (:557)."
_FALLS_BACK = "Where comfy-aimdo does not work the host logs a warning and goes on without (main.py:331)."
LAUNCH_FLAGS: tuple[LaunchFlag, ...] = (
    LaunchFlag("", _DYNAMIC, _PARTIAL, "loads what is needed when it is needed", f"{_SHARED} {_DIRECTML}"),
    LaunchFlag("--disable-dynamic-vram", _PARTIAL, _PARTIAL, "loads a model whole if it fits, and streams the rest"),
    LaunchFlag(
        "--enable-dynamic-vram", _DYNAMIC, _DYNAMIC, "uses dynamic VRAM wherever comfy-aimdo works", _FALLS_BACK
    ),
    LaunchFlag("--lowvram", _DYNAMIC, _PARTIAL, "keeps text encoders on the CPU where there is no dynamic VRAM"),
    LaunchFlag("--novram", _NOVRAM, _NOVRAM, "streams every layer that it can", "Turns dynamic VRAM off."),
    LaunchFlag("--highvram", _NONE, _NONE, "loads models whole and keeps them", "Turns dynamic VRAM off."),
    LaunchFlag("--gpu-only", _NONE, _NONE, "loads models and text encoders whole and keeps them"),
    LaunchFlag("--cpu", _NONE, _NONE, "computes on the CPU, where nothing is moved"),
)

BNB = ("bnb-*",)
QINT2 = ("quanto-qint2",)
QINT4 = ("quanto-qint4",)
QUANTO = ("quanto-*",)
GGUF = ("gguf-*",)
COMFYUI_GGUF = ("comfyui-gguf-*",)
SDNQ_WHOLE_BYTES = ("sdnq-int8", "sdnq-uint8", "sdnq-float8-*")
SDNQ = ("sdnq-*",)
TORCHAO = ("torchao-*",)
NNCF = ("nncf-*",)
LAYERWISE = ("layerwise-*",)
ANY = ("*",)

TESTS = "tests/comfyui/test_offload_matrix.py"
MEASURED = f"{TESTS}::test_library"
OURS_MEASURED = f"{TESTS}::test_ours, tests/comfyui/test_matrix.py::test_format"
NATIVE_MEASURED = f"{TESTS}::test_native"
FOREIGN_MEASURED = f"{TESTS}::test_comfyui_gguf"
HOST_VERSION = "ComfyUI 0.33.0"
VERSIONS = {
    "bnb": "bitsandbytes 0.50.2",
    "quanto": "optimum-quanto 0.2.7",
    "gguf": "diffusers 0.42.1",
    "sdnq": "sdnq 0.2.8",
    "torchao": "torchao 0.18.0",
    "nncf": "nncf 3.4.0",
    "layerwise": "diffusers 0.42.1",
    "comfyui": "ComfyUI-GGUF 795e451",
}

LOADED = "it is loaded as it is"
STREAMED = "the host copies the plain tensors of each layer to the device when the layer computes"
GATHERED = "the host gathers the plain tensors of each layer into its own buffers on the device"
LEFT = (
    "the host streams layers of its own classes only; others that do not fit stay in host memory, away from their input"
)
LEFT_ALL = "the host streams layers of its own classes only; all others stay in host memory, away from their input"
AT_ONCE = (
    "the host neither streams nor evicts layers that are not of its classes: it loads them all at once, so they run "
    "only where the whole model fits the device"
)
BNB_DYNAMIC = "the host rebuilds each weight as a new parameter, which bitsandbytes' parameters do not allow"
QINT4_TWICE = (
    "in bfloat16 and groups of 128 quanto holds it in a class that stops when it is moved to the device where it "
    "already is, and the host moves layers twice"
)
SDNQ_CAST = (
    "the host casts each weight to the dtype that the layer had before it was quantized, which scrambles packed values"
)
SDNQ_ERROR = "NotImplementedError"  # of torch's bit operations on floats; the text names the operator of the format
SDNQ_WHOLE = (
    "the host casts each weight back to the dtype that the layer had before it was quantized, which saves no memory, "
    "and loads all at once"
)
TORCHAO_MOVE = (
    "ComfyUI runs nodes in torch's inference mode, in which torchao's tensors cannot move to another device; they run "
    "where they were made on the device that computes"
)
TORCHAO_COPY = "the host copies each weight into an empty one like it, an operation that torchao's tensors lack"
NNCF_SPLIT = (
    "the host moves a layer and leaves the scales that NNCF keeps beside it in host memory, since they are no "
    "parameters"
)
NNCF_DYNAMIC = "the host moves the scales that NNCF keeps beside a layer, and leaves the weights in host memory"
NNCF_STREAMED = (
    "weight and scales both stay in host memory, where NNCF decompresses them, and the host copies the result"
)
LAYERWISE_STREAMED = "diffusers' hook casts the weight in host memory, and the host copies the result"
LAYERWISE_DYNAMIC = "the hook changes the dtype of each weight around every call, and the host's buffers rely on it"
GGML_STREAMED = "ComfyUI-GGUF's layers are of the host's classes and copy their own tensors to the device"
GGML_DYNAMIC = (
    "ComfyUI-GGUF gives its models the host's older patcher, so they are loaded as with --disable-dynamic-vram, in "
    "part if they do not fit"
)
GGML_STATE = "accelerate keeps a layer's state dict meanwhile, and ComfyUI-GGUF's layers give one of empty tensors"
GGML_REBUILT = "accelerate rebuilds each weight from its class and data alone, which drops the type and shape of GGML's"

CPU_NOTE = "Values on one device; places with `meta` as the device that computes. Not run on a GPU."
BNB_NOTE = (
    "Measured: all of them stay in host memory. The error that follows on a GPU is documented in "
    "Comfy-Org/ComfyUI#6611: `All input tensors need to be on the same GPU`."
)
QINT4_NOTE = (
    "As quanto's other layers. On a CPU the host's load moves it to the device where it is, and it stops there."
)
PLAIN_NOTE = (
    " Layers that QuantizeModel makes with carrier library do not stop: the host loads them all at once, so the model "
    "must fit whole."
)
DYNAMIC_NOTE = (
    "comfy/memory_management.py:139, comfy/ops.py:126. That the tensors come out of the buffer as they went in is "
    "measured on a CPU; faulting them in is CUDA's and was read."
)
PLACED = (
    "Where it already is on the device, it runs; hooks that move it to another rebuild each weight and stop, as when "
    "it is split."
)


def _rule(
    carrier: Carrier,
    formats: tuple[str, ...],
    mode: OffloadMode,
    verdict: VerdictLevel,
    cause: str,
    variants: tuple[str, ...] = (),
    *,
    host: HostName = HostName.COMFYUI,
    source: str = MEASURED,
    probed: bool = True,
    needs: Needs = "",
    raw_error: str = "",
    note: str = CPU_NOTE,
) -> Rule:
    library = VERSIONS.get(formats[0].partition("-")[0], "")
    return Rule(
        carrier,
        formats,
        mode,
        verdict,
        cause,
        host=host,
        variants=variants,
        source=source,
        needs=needs,
        probed=probed,
        raw_error=raw_error,
        versions=", ".join(filter(None, (HOST_VERSION, library))),
        note=note,
    )


def _streamed(carrier: Carrier, source: str) -> tuple[Rule, ...]:
    """Weights in layers of the host's classes, in plain tensors."""
    return (
        _rule(carrier, ANY, _NONE, _OK, LOADED, source=source),
        _rule(carrier, ANY, _PARTIAL, _OK, LOADED, _WHOLE, source=source),
        _rule(carrier, ANY, _PARTIAL, _OK, STREAMED, _SPLIT, source=source),
        _rule(carrier, ANY, _NOVRAM, _OK, STREAMED, source=source),
        _rule(carrier, ANY, _DYNAMIC, _OK, GATHERED, source=source, probed=False, needs="gpu", note=DYNAMIC_NOTE),
    )


def _whole(
    formats: tuple[str, ...], verdict: VerdictLevel = _OK, cause: str = LOADED, error: str = ""
) -> tuple[Rule, ...]:
    return (
        _rule(_LIB, formats, _NONE, verdict, cause, raw_error=error),
        _rule(_LIB, formats, _PARTIAL, verdict, cause, _WHOLE, raw_error=error),
    )


def _left(formats: tuple[str, ...], note: str = CPU_NOTE) -> tuple[Rule, ...]:
    """Layers of a library's own classes."""
    return (
        _rule(_LIB, formats, _PARTIAL, _BLOCK, LEFT, _SPLIT, note=note),
        _rule(_LIB, formats, _NOVRAM, _BLOCK, LEFT_ALL, note=note),
    )


def _unmeasured() -> tuple[Rule, ...]:
    """quanto's 2 bits: as its other layers, but the first call compiles C++ for a minute, so no test makes them."""
    note = "Measured with the other formats of quanto: its own first call compiles C++ for a minute."
    cells = (
        (_NONE, _OK, LOADED, ()),
        (_PARTIAL, _OK, LOADED, _WHOLE),
        (_PARTIAL, _BLOCK, LEFT, _SPLIT),
        (_NOVRAM, _BLOCK, LEFT_ALL, ()),
        (_DYNAMIC, _WARN, AT_ONCE, ()),
    )
    return tuple(
        _rule(_LIB, QINT2, mode, level, cause, variants, probed=False, note=note)
        for mode, level, cause, variants in cells
    )


def _foreign() -> tuple[Rule, ...]:
    """ComfyUI-GGUF's tensors, in the host and under accelerate and diffusers."""
    here = (
        (_NONE, LOADED, ()),
        (_PARTIAL, LOADED, _WHOLE),
        (_PARTIAL, GGML_STREAMED, _SPLIT),
        (_NOVRAM, GGML_STREAMED, ()),
    )
    runs = ((_NONE, ()), (_MODEL, ()), (_BAL, _WHOLE), (_GROUP, ("block", "leaf", "block-disk", "leaf-disk")))
    empty = "NotImplementedError: Cannot copy out of meta tensor; no data!"
    rebuilt = "TypeError: GGMLTensor.__new__() missing 2 required keyword-only arguments"
    stops = (
        (_SEQ, GGML_STATE, (), empty),
        (_BAL, GGML_REBUILT, _SPLIT, rebuilt),
        (_BAL, GGML_STATE, ("split-disk",), empty),
    )
    known = "Comfy-Org/ComfyUI#13953, city96/ComfyUI-GGUF#427, city96/ComfyUI-GGUF:nodes.py"
    elsewhere = HostName.STANDALONE
    return (
        *(_rule(_LIB, COMFYUI_GGUF, mode, _OK, cause, v, source=FOREIGN_MEASURED) for mode, cause, v in here),
        _rule(_LIB, COMFYUI_GGUF, _DYNAMIC, _WARN, GGML_DYNAMIC, source=known, probed=False, needs="gpu", note=""),
        *(
            _rule(
                _LIB,
                COMFYUI_GGUF,
                mode,
                _OK,
                "measured, with the same output as without offload",
                v,
                host=elsewhere,
                source=FOREIGN_MEASURED,
                note=PLACED if mode is _BAL else "",
            )
            for mode, v in runs
        ),
        *(
            _rule(
                _LIB,
                COMFYUI_GGUF,
                mode,
                _BLOCK,
                cause,
                v,
                host=elsewhere,
                source=FOREIGN_MEASURED,
                raw_error=error,
                note="",
            )
            for mode, cause, v, error in stops
        ),
    )


RULES: tuple[Rule, ...] = (
    *_streamed(_OURS, OURS_MEASURED),
    *_streamed(_HOST, NATIVE_MEASURED),
    *_foreign(),
    # bitsandbytes
    *_whole(BNB),
    *_left(BNB, BNB_NOTE),
    _rule(
        _LIB,
        BNB,
        _DYNAMIC,
        _BLOCK,
        BNB_DYNAMIC,
        raw_error="RuntimeError: Creating a Parameter from an instance of type",
        note="comfy/model_patcher.py:2000, comfy/utils.py:978.",
    ),
    # optimum-quanto
    *_unmeasured(),
    *_whole(QINT4, _WARN, QINT4_TWICE, "AttributeError: 'TinyGemmWeightQBitsTensor' object has no attribute '_scale'"),
    _rule(_LIB, QINT4, _DYNAMIC, _WARN, AT_ONCE, probed=False, needs="gpu", note=QINT4_NOTE),
    *_whole(QUANTO),
    *_left(QUANTO),
    _rule(_LIB, QUANTO, _DYNAMIC, _WARN, AT_ONCE),
    # diffusers' GGUF layers
    *_whole(GGUF),
    *_left(GGUF),
    _rule(_LIB, GGUF, _DYNAMIC, _WARN, AT_ONCE),
    # SDNQ
    *_whole(SDNQ),
    *_left(SDNQ),
    _rule(_LIB, SDNQ_WHOLE_BYTES, _DYNAMIC, _WARN, SDNQ_WHOLE),
    _rule(_LIB, SDNQ, _DYNAMIC, _BLOCK, SDNQ_CAST, raw_error=SDNQ_ERROR, note=CPU_NOTE + PLAIN_NOTE),
    # torchao
    *_whole(TORCHAO, _WARN, TORCHAO_MOVE, "RuntimeError: Attempted to set the storage of a tensor on device"),
    _rule(_LIB, TORCHAO, _PARTIAL, _BLOCK, TORCHAO_COPY, _SPLIT),
    _rule(_LIB, TORCHAO, _NOVRAM, _BLOCK, TORCHAO_COPY),
    _rule(_LIB, TORCHAO, _DYNAMIC, _BLOCK, TORCHAO_COPY, note=CPU_NOTE + PLAIN_NOTE),
    # NNCF
    *_whole(NNCF),
    _rule(_LIB, NNCF, _PARTIAL, _BLOCK, NNCF_SPLIT, _SPLIT),
    _rule(_LIB, NNCF, _NOVRAM, _OK, NNCF_STREAMED),
    _rule(_LIB, NNCF, _DYNAMIC, _BLOCK, NNCF_DYNAMIC),
    # diffusers' layerwise casting
    *_whole(LAYERWISE),
    _rule(_LIB, LAYERWISE, _PARTIAL, _OK, LAYERWISE_STREAMED, _SPLIT),
    _rule(_LIB, LAYERWISE, _NOVRAM, _OK, LAYERWISE_STREAMED),
    _rule(_LIB, LAYERWISE, _DYNAMIC, _UNKNOWN, LAYERWISE_DYNAMIC, source="", probed=False, needs="gpu", note=""),
)
