"""What the error translator tells apart, what it says, and what it keeps. Real raw errors: tests/backends."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quantwire.hosts.standalone.executor import Executor, NodeFailed
from quantwire.nodes.explain import explain_errors
from quantwire.quantizers.compat.find import Found
from quantwire.quantizers.compat.matrix import answer
from quantwire.quantizers.compat.modes import Carrier, HostName, OffloadMode, VerdictLevel
from quantwire.quantizers.compat.raw_errors import SIGNATURES, Signature
from quantwire.quantizers.compat.translate import translate, translated
from quantwire.quantizers.errors import OffloadConflict, QuantwireError, SpecError
from torch import nn

QBYTES = "WeightQBytesTensor.__new__() missing 6 required positional arguments: 'axis', 'size', 'stride', 'data', 'sca"
META = "Cannot copy out of meta tensor; no data!"
SAME_DEVICE = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
MODELING = "accelerate.utils.modeling:set_module_tensor_to_device"
HOOKS = "accelerate.hooks:pre_forward"


def standing_in(err: Exception, *places: str) -> Exception:
    """The error as raised from frames of these names, outermost first; for places that cannot be had here."""

    def raiser() -> None:
        raise err.with_traceback(None)

    call: Callable[[], None] = raiser
    for place in reversed(places):
        module, _, function = place.partition(":")
        scope: dict[str, Any] = {"__name__": module, "call": call}
        exec(f"def {function}(): call()", scope)
        call = scope[function]
    # The helper's own frame is innermost; it goes, so that the last place is where it was raised.
    try:
        call()
    except Exception as raised:
        step = raised.__traceback__
        while step is not None and step.tb_next is not None and step.tb_next.tb_frame.f_code is not raiser.__code__:
            step = step.tb_next
        if step is not None and places:
            step.tb_next = None
        return raised
    raise AssertionError


# --- wordings that no library installed here has ---

# (error, frames, how the translation begins, measured with). The first three were raised by those versions with
# accelerate 0.33.0 and 1.15.0, torch 2.13.0 on a CPU; the others stand in the sources of the versions named, where a
# GPU is needed to raise them. "stopped with sequential" are those that only offload makes a conflict of.
RECORDED = [
    (
        TypeError("QBytesTensor.__new__() missing 5 required positional arguments: 'axis', 'size', 'stride', 'data'"),
        ("accelerate.big_modeling:dispatch_model", "accelerate.hooks:init_hook", MODELING),
        "frozen quanto weights stopped with balanced offload: ",
        "optimum-quanto 0.2.1, 0.2.2, 0.2.4",
    ),
    (
        RuntimeError("Blockwise 4bit quantization only supports 16/32-bit floats, but got torch.uint8"),
        (
            HOOKS, MODELING, "bitsandbytes.nn.modules:to", "bitsandbytes.nn.modules:_quantize",
            "bitsandbytes.functional:quantize_4bit", "torch._ops:__call__", "bitsandbytes.backends.default.ops:_",
            "torch:_check", "torch:_check_with",
        ),
        "bitsandbytes 4-bit layers stopped: a weight that is quantized already",
        "bitsandbytes 0.47.0, 0.48.2, 0.49.2",
    ),
    (
        ValueError("The dtype of a QBitsTensor cannot be changed"),
        ("torch.nn.modules.module:convert", "optimum.quanto.tensor.qbits.qbits_ops:_to_copy"),
        "frozen quanto weights stopped: they were asked to change their data type",
        "optimum-quanto 0.2.1, 0.2.2",
    ),
    (
        ValueError("Blockwise quantization only supports 16/32-bit floats, but got torch.uint8"),
        (
            "accelerate.hooks:pre_forward", MODELING, "bitsandbytes.nn.modules:to",
            "bitsandbytes.nn.modules:_quantize", "bitsandbytes.functional:quantize_4bit",
        ),
        "bitsandbytes 4-bit layers stopped: a weight that is quantized already",
        "read in bitsandbytes 0.43.3, 0.44.1, 0.45.5",
    ),
    (
        RuntimeError(SAME_DEVICE),
        ("diffusers.models.transformers.transformer_flux:forward", "bitsandbytes.nn.modules:forward"),
        "a quantized layer stopped with sequential offload: its weight, or a part of it, and its input are on",
        "read in torch 2.13.0",
    ),
    (
        RuntimeError("All input tensors need to be on the same GPU, but found some tensors to not be on a GPU:"),
        ("bitsandbytes.autograd._functions:forward", "bitsandbytes.functional:is_on_gpu"),
        "a quantized layer stopped with sequential offload: its weight, or a part of it, and its input are on",
        "bitsandbytes 0.45.5",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("err", "places", "begins", "versions"), RECORDED, ids=[r[3] for r in RECORDED])
def test_recorded_wordings_of_other_versions_raised_from_stand_in_frames(
    err: Exception, places: tuple[str, ...], begins: str, versions: str
) -> None:
    offloads = "stopped with sequential" in begins
    translation = translate(standing_in(err, *places), mode=OffloadMode.SEQUENTIAL if offloads else None)
    assert translation is not None
    assert str(translation).startswith(begins)
    assert (translate(standing_in(err, *places)) is None) == offloads
    assert str(err).splitlines()[0][:60] in str(translation)
    assert translate(standing_in(err, "custom_nodes.other.model:forward")) is None


# --- look-alikes: the same type and text from somewhere else ---


class QBytesTensor:
    """A user's own class of the same name."""

    def __new__(cls, axis: int, size: int, stride: int, data: int, scale: int) -> QBytesTensor:
        return super().__new__(cls)


def own_key_error() -> None:
    _ = {}[None]


def own_device_mismatch() -> None:
    _ = torch.ones(2) + torch.ones(2, device="meta")


def own_compiled_device_mismatch() -> None:
    torch.ops.aten.silu_backward(torch.ones(2, 2), torch.ones(2, 2, device="meta"))


def own_layer_on_two_devices() -> None:
    layer = nn.Linear(2, 2)
    layer.bias = nn.Parameter(torch.ones(2, device="meta"))
    layer(torch.ones(1, 2))


def own_meta_copy() -> None:
    nn.Linear(2, 2, device="meta").to("cpu")


def own_class() -> None:
    QBytesTensor(0)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (own_key_error, "None"),
        (own_device_mismatch, "Tensor on device"),
        (own_compiled_device_mismatch, "Expected all tensors to be on the same device"),
        (own_layer_on_two_devices, "Tensor on device"),
        (own_meta_copy, "Cannot copy out of meta tensor; no data!"),
        (own_class, "QBytesTensor.__new__() missing 4 required positional arguments"),
    ],
)
@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "beside-library-layers"])
def test_errors_of_other_code_are_left_alone(call: Callable[[], None], text: str, quantized: bool) -> None:
    found = [Found("a", Carrier.LIBRARY, f, 2, kind) for f, kind in (("quanto-qint8", "WeightQBytesTensor"),)]
    with pytest.raises(Exception, match=re.escape(text)) as failure:
        call()
    known: dict[str, Any] = {"found": found, "mode": OffloadMode.SEQUENTIAL} if quantized else {}
    assert translate(failure.value, **known) is None


@pytest.mark.parametrize(
    ("err", "places"),
    [
        (TypeError(META), (HOOKS, "bitsandbytes.functional:to")),
        (RuntimeError(QBYTES), (HOOKS, MODELING)),
        (KeyError("None"), (HOOKS, "diffusers.quantizers.gguf.utils:__new__")),
        (KeyError(None), ("diffusers.quantizers.gguf.utils:__new__",)),
        (NotImplementedError(META), ("bitsandbytes.functional:to",)),
        (NotImplementedError(META), ("bitsandbytes_other.functional:to", HOOKS)),
        (TypeError(QBYTES), (MODELING, "custom_nodes.other.tensors:make")),
        (RuntimeError("CUDA error: invalid argument"), (HOOKS, "bitsandbytes.functional:to")),
    ],
    ids=["type", "type-2", "text", "no-mover", "nobody-moves", "package", "deeper", "other-text"],
)
def test_type_place_and_text_must_all_fit_in_stand_in_frames(err: Exception, places: tuple[str, ...]) -> None:
    assert translate(standing_in(err, *places)) is None


class DriverOutOfMemory(torch.OutOfMemoryError):
    pass


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, DriverOutOfMemory])
def test_out_of_memory_is_never_translated(kind: type[Exception]) -> None:
    """Even where a library were to use one of the texts: hosts recognise it by type, and free memory."""
    place = "optimum.quanto.tensor.weights.qbytes:forward"
    mode = OffloadMode.SEQUENTIAL
    assert translate(standing_in(RuntimeError(SAME_DEVICE), place), mode=mode) is not None
    assert issubclass(kind, RuntimeError)
    assert translate(standing_in(kind(SAME_DEVICE), place), mode=mode) is None
    with pytest.raises(MemoryError), translated(mode=mode):
        raise MemoryError


@pytest.mark.parametrize("err", [SpecError(META), OffloadConflict(META), KeyboardInterrupt()])
def test_our_own_errors_and_interruptions_pass(err: BaseException) -> None:
    with pytest.raises(type(err)) as failure, translated():
        raise err
    assert failure.value is err
    assert failure.value.__cause__ is None


# --- what it says ---


def conflict(**known: Any) -> QuantwireError:
    translation = translate(standing_in(TypeError(QBYTES), HOOKS, MODELING), **known)
    assert translation is not None
    return translation


def test_without_knowledge_it_offers_the_carrier_that_the_table_proves() -> None:
    first, second, *rest = str(conflict()).splitlines()
    assert first == (
        "frozen quanto weights stopped: the weight is rebuilt from its class and data alone, which drops the scale, "
        "axis and size of a quanto tensor."
    )
    assert second.startswith("It stopped in accelerate.utils.modeling.set_module_tensor_to_device with `TypeError: We")
    assert rest[0] == "Ways out:"
    assert "run with offload mode none, model, sequential" in rest[1]
    for mode in (OffloadMode.NONE, OffloadMode.MODEL, OffloadMode.SEQUENTIAL):
        level = answer(Carrier.QUANTWIRE, "quanto-qint8", mode, host=HostName.STANDALONE).level
        assert level is VerdictLevel.OK


def test_with_knowledge_the_ways_out_are_those_of_the_table() -> None:
    found = [
        Found("blocks.0.mlp", Carrier.LIBRARY, "sdnq-int8", 3, "SDNQTensor"),
        Found("blocks.0.to_q", Carrier.LIBRARY, "quanto-qint8", 7, "WeightQBytesTensor"),
    ]
    text = str(conflict(found=found, mode=OffloadMode.SEQUENTIAL, host=HostName.STANDALONE))
    assert text.startswith("quanto-qint8 (7 layers of WeightQBytesTensor) stopped with sequential offload: ")
    ways_out = text.partition("Ways out:\n")[2].splitlines()
    assert 1 < len(ways_out) <= 3
    assert "carrier quantwire (QuantizeModel, format quanto-qint8)" in ways_out[0]


def test_a_combination_that_the_table_has_as_running_is_to_be_reported() -> None:
    found = [Found("a", Carrier.LIBRARY, "quanto-qint8", 1, "WeightQBytesTensor")]
    text = str(conflict(found=found, mode=OffloadMode.MODEL, host=HostName.STANDALONE))
    assert "The table has this combination as one that runs: please report the traceback." in text


@pytest.mark.parametrize(
    ("mode", "variant"), [(OffloadMode.NONE, ""), (OffloadMode.PARTIAL, None), (OffloadMode.PARTIAL, "split")]
)
def test_a_host_is_not_told_to_change_what_another_pack_does(mode: OffloadMode, variant: str | None) -> None:
    """accelerate's hooks in ComfyUI, which itself moves nothing: its options and OffloadCompat would not help.

    It may take the weights that the hooks sent away for layers that it streams itself.
    """
    found = [Found("a", Carrier.LIBRARY, "quanto-qint8", 1, "WeightQBytesTensor")]
    frames = ("comfy.samplers:outer_sample", "accelerate.big_modeling:cpu_offload", MODELING)
    err = standing_in(TypeError(QBYTES), *frames)
    text = str(translate(err, host=HostName.COMFYUI, mode=mode, variant=variant, found=found))
    assert "stopped with sequential offload (memory): " in text
    assert "carrier quantwire (QuantizeModel, format quanto-qint8)" in text
    assert "OffloadCompat" not in text
    assert "Start ComfyUI" not in text


@pytest.mark.parametrize("signature", SIGNATURES, ids=lambda s: f"{s.types[0].__name__}-{s.who}".replace(" ", "-"))
def test_every_signature_is_complete(signature: Signature) -> None:
    assert not signature.cause.endswith(".")
    assert signature.places
    assert all(place.stop or place.via or place.own_call for place in signature.places)
    assert all(re.compile(text) for text in signature.texts)
    assert "*" not in signature.formats[0]


# --- how it is raised ---


def test_the_original_is_chained() -> None:
    original = standing_in(TypeError(QBYTES), HOOKS, MODELING)

    @translated(mode=OffloadMode.SEQUENTIAL, host=HostName.STANDALONE, found=lambda: [])
    def run() -> None:
        raise original

    with pytest.raises(OffloadConflict, match="frozen quanto weights stopped with sequential offload: ") as failure:
        run()
    assert failure.value.__cause__ is original


def test_other_errors_pass_through_the_context_as_they_are() -> None:
    with pytest.raises(ValueError, match="other") as failure, translated():
        raise ValueError("other")
    assert failure.value.__cause__ is None


def test_nothing_of_the_traceback_is_kept() -> None:
    """Without the collector of cycles: what a failed run had on the device must be free for the next one at once."""
    seen: list[weakref.ref[torch.Tensor]] = []
    namespace: dict[str, Any] = {"__name__": "accelerate.utils.modeling", "text": QBYTES}
    exec("def set_module_tensor_to_device(held): raise TypeError(text)", namespace)

    def run() -> None:
        tensor = torch.ones(1)
        seen.append(weakref.ref(tensor))
        with translated():
            namespace["set_module_tensor_to_device"](tensor)

    gc.collect()
    gc.disable()
    try:
        with pytest.raises(OffloadConflict) as failure:
            run()
        assert seen[0]() is not None
        del failure
        assert seen[0]() is None
    finally:
        gc.enable()


class Failing:
    """A node whose library fails as quanto does."""

    FUNCTION = "run"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    CATEGORY = "test"
    text = QBYTES

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def run(self) -> tuple[()]:
        raise standing_in(TypeError(self.text), HOOKS, MODELING)


class FailingOtherwise(Failing):
    text = "something else"


def test_the_executor_explains_what_any_node_raises() -> None:
    with pytest.raises(OffloadConflict) as failure:
        Executor({"Failing": Failing}).run({"1": {"class_type": "Failing", "inputs": {}}})
    assert isinstance(failure.value.__cause__, TypeError)
    assert failure.value.node_place.node_id == "1"  # type: ignore[attr-defined]
    with pytest.raises(NodeFailed, match="something else"):
        Executor({"Failing": FailingOtherwise}).run({"1": {"class_type": "Failing", "inputs": {}}})


def test_nodes_of_the_pack_explain_by_themselves() -> None:
    """In ComfyUI nobody else does."""
    from quantwire.nodes import NODE_CLASS_MAPPINGS

    for node in NODE_CLASS_MAPPINGS.values():
        function = getattr(node, node.FUNCTION)  # type: ignore[attr-defined]
        assert function.__module__ == node.__module__ or hasattr(function, "__wrapped__")
        assert hasattr(function, "__wrapped__")

    class Own(Failing):
        pass

    class OwnOtherwise(FailingOtherwise):
        pass

    explain_errors(Own)
    explain_errors(OwnOtherwise)
    with pytest.raises(OffloadConflict) as failure:
        Own().run()
    assert isinstance(failure.value.__cause__, TypeError)
    with pytest.raises(TypeError, match="something else"):
        OwnOtherwise().run()
