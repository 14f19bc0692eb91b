"""The errors that libraries raise when their quantized weights meet an offload mode: what they say, where, and why.

Each was seen from the real library, most of them in `tests/backends/test_raw_errors.py`; `versions` says from which.
Texts are told by how they begin or by what they are sure to contain, because versions word them differently; the place
decides first, because the same texts are raised by programs that have nothing to do with quantization.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import OffloadConflict, QuantwireError, SpecError

ACCELERATE = "accelerate."
GROUP = "diffusers.hooks."
COMFYUI = "comfy."
BNB = "bitsandbytes."
GGUF = "diffusers.quantizers.gguf."
QUANTO = ("optimum.quanto.", "quanto.")
# What moves or rebuilds weights on its own account.
MOVERS = (ACCELERATE, GROUP, COMFYUI)
# Where quantized layers compute. NNCF's function hooks are not among them: they see every call of a model.
LAYERS = (BNB, *QUANTO, GGUF, "torchao.", "sdnq.", "modules.sdnq.", "nncf.torch.quantization.", "comfy_kitchen.")

BNB_4BIT = ("bnb-nf4", "bnb-fp4")
QUANTO_ANY = ("quanto-*",)
LIBRARIES = ("bnb-*", "quanto-*", "gguf-*", "comfyui-gguf-*", "sdnq-*", "torchao-*", "nncf-*", "layerwise-*", "comfy-*")


@dataclass(frozen=True)
class Place:
    """Where an error must come from. Names are prefixes of `module:function`; an empty field is not looked at.

    Attributes:
        stop: the innermost frame that is not torch's.
        via: any frame.
        holds: format ids as patterns, one of which the model holds.
        own_call: it stopped in the call of a leaf layer, with only torch's frames and the layer's own below.
    """

    stop: tuple[str, ...] = ()
    via: tuple[str, ...] = ()
    holds: tuple[str, ...] = ()
    own_call: bool = False


@dataclass(frozen=True)
class Signature:
    """One raw error in all its wordings.

    Attributes:
        texts: regular expressions, searched in the message; any of them.
        places: any of them.
        who: what failed, where the model does not tell.
        formats: patterns of the formats that fail so, a concrete one first.
        cause: one sentence without its full stop.
        kind: what it becomes; in a mode that offloads always an OffloadConflict.
        devices: tensors that a call needs are on different devices. Without offload that is a caller's own mistake,
            unless the layer that it stopped in has its own tensors on more than one.
        versions: those that raised it when it was measured.
    """

    types: tuple[type[Exception], ...]
    texts: tuple[str, ...]
    places: tuple[Place, ...]
    who: str
    formats: tuple[str, ...]
    cause: str
    kind: type[QuantwireError] = OffloadConflict
    versions: str = ""
    devices: bool = False


_REBUILT = "the weight is rebuilt from its class and data alone, which drops "
_META = r"Cannot copy out of meta tensor"
_DEVICES = (
    r"Expected all tensors to be on the same device",
    r"Tensor on device \S+ is not on the expected device",
    r"All input tensors need to be on the same GPU",
    r"Input and parameter tensors are not at the same device",
)
_LOST = "a host that moves weights itself leaves behind what the library keeps beside them"

SIGNATURES: tuple[Signature, ...] = (
    Signature(
        (NotImplementedError,),
        (_META,),
        (Place(stop=(BNB,), via=MOVERS),),
        "bitsandbytes 4-bit layers",
        BNB_4BIT,
        "sending a weight off the device also moved the quantization state that its stored copy shares, which lost it",
        versions="bitsandbytes 0.46.1 to 0.50.2 with accelerate 0.33.0 to 1.15.0",
    ),
    Signature(
        (RuntimeError,),
        (r"Tensor\.item\(\) cannot be called on meta tensors",),
        (Place(stop=(BNB,), via=MOVERS),),
        "bitsandbytes 4-bit layers",
        BNB_4BIT,
        "the quantization state of a weight is read after it was moved off every device that holds data",
        versions="bitsandbytes 0.50.2 with accelerate 1.15.0",
    ),
    Signature(
        (NotImplementedError,),
        (_META,),
        (Place(stop=(ACCELERATE,), via=("nncf.torch.",)),),
        "NNCF layers",
        ("nncf-int8-sym", "nncf-*"),
        "NNCF decompresses a weight in every operation that touches it, also in accelerate's, while it holds no data",
        versions="nncf 3.4.0 with accelerate 1.15.0",
    ),
    Signature(
        (TypeError,),
        (r"\w*Q(Bytes|Bits)Tensor\.__new__\(\) missing \d+ required positional argument",),
        (Place(stop=(*MOVERS, *QUANTO, "transformers.")),),
        "frozen quanto weights",
        ("quanto-qint8", "quanto-*"),
        _REBUILT + "the scale, axis and size of a quanto tensor",
        versions="optimum-quanto 0.2.6, 0.2.7 with accelerate 0.33.0 to 1.15.0; as QBytesTensor 0.2.1 to 0.2.4",
    ),
    Signature(
        (AttributeError,),
        (r"'str' object has no attribute 'to'",),
        (Place(stop=("accelerate.big_modeling:",), holds=QUANTO_ANY),),
        "frozen quanto weights",
        ("quanto-qint8", "quanto-*"),
        "quanto of this version puts words among the tensors of its state dict, and accelerate moves each entry",
        versions="optimum-quanto 0.2.1, 0.2.2 with accelerate 1.15.0",
    ),
    Signature(
        (ValueError,),
        (r"The dtype of a (weights Tensor|\w*Q(Bits|Bytes)Tensor) cannot be changed",),
        (Place(stop=QUANTO),),
        "frozen quanto weights",
        ("quanto-qint8", "quanto-*"),
        "they were asked to change their data type, which frozen quanto weights never do",
        SpecError,
        "optimum-quanto 0.2.1 to 0.2.7; the class is QBitsTensor up to 0.2.4",
    ),
    Signature(
        (RuntimeError,),
        (r"Attempted to access the data pointer on an invalid python storage",),
        (Place(via=("diffusers.hooks.group_offloading:",)),),
        "tensor subclasses",
        ("quanto-qint8", "quanto-*", "torchao-*", "comfy-*"),
        "they are to be kept on disk, and a tensor of this class has no memory of its own that could be written to a "
        "file",
        versions="optimum-quanto 0.2.7 with diffusers 0.42.1",
    ),
    Signature(
        (KeyError,),
        (r"^None$",),
        (Place(stop=(GGUF,), via=(*MOVERS, "transformers.")),),
        "GGUF layers of diffusers",
        ("gguf-q8-0", "gguf-*"),
        _REBUILT + "the quant type of a GGUF parameter",
        versions="diffusers 0.42.1 with accelerate 1.15.0",
    ),
    Signature(
        (ValueError, RuntimeError),
        (r"Blockwise (4bit )?quantization only supports 16/32-bit floats, but got torch\.u?int",),
        (Place(stop=(BNB,), via=("bitsandbytes.nn.",)), Place(stop=(BNB,), holds=BNB_4BIT)),
        "bitsandbytes 4-bit layers",
        BNB_4BIT,
        "a weight that is quantized already was quantized again, because its class was rebuilt without its "
        "quantization state",
        versions="bitsandbytes 0.47.0 to 0.49.2 (RuntimeError, `4bit`), 0.50.2 (ValueError, `4bit` for 4-bit weights "
        "and without it for blocks of 8 bits); up to 0.45.5 without `4bit`, raised on a GPU only",
    ),
    Signature(
        (AttributeError,),
        (r"'(Parameter|Tensor)' object has no attribute 'S?CB'",),
        (Place(stop=("bitsandbytes.nn.",)),),
        "bitsandbytes int8 layers",
        ("bnb-int8",),
        "the weight became a plain parameter, without the statistics that belong to it",
        versions="bitsandbytes 0.50.2",
    ),
    Signature(
        (AssertionError, RuntimeError),
        (r"must be divisible by", r"shape '\[.*\]' is invalid for input of size"),
        (Place(stop=("bitsandbytes.functional:_convert_weight_packed_for_cpu",)),),
        "bitsandbytes 4-bit layers",
        BNB_4BIT,
        "on this CPU bitsandbytes repacks 4-bit weights at their first use, which takes rows divisible by 32 and "
        "columns divisible by 64",
        SpecError,
        "bitsandbytes 0.50.2 on a CPU with AVX512-BF16",
    ),
    Signature(
        (RuntimeError,),
        (r"Creating a Parameter from an instance of type (Params4bit|Int8Params) requires that detach\(\)",),
        (Place(stop=(*MOVERS, BNB)),),
        "bitsandbytes layers",
        ("bnb-nf4", "bnb-*"),
        "the weight was sent to a device that holds no data, where bitsandbytes' classes do not survive",
        versions="bitsandbytes 0.50.2",
    ),
    Signature(
        (NotImplementedError,),
        (r"^\w+ dispatch: attempting to run unimplemented operator",),
        (Place(stop=("torchao.",), via=("accelerate.utils.offload:", GROUP, COMFYUI)),),
        "torchao layers",
        ("torchao-int8wo", "torchao-*"),
        "a weight was to be kept on disk, which torchao's tensors do not allow",
        versions="torchao 0.18.0 with accelerate 1.15.0",
    ),
    Signature(
        (RuntimeError, TypeError),
        (r"\.numpy\(\) is not supported for tensor subclasses",),
        (Place(stop=("accelerate.utils.offload:", GROUP, "torchao."), via=(ACCELERATE, GROUP)),),
        "tensor subclasses",
        ("torchao-int8wo", "torchao-*", "quanto-*", "comfy-*"),
        "a weight was to be kept on disk, and a tensor of this class has no memory of its own that could be written",
    ),
    Signature(
        (ValueError,),
        (r"Disk offloading is not supported for TorchAO",),
        (Place(stop=("diffusers.hooks.group_offloading:",)),),
        "torchao layers",
        ("torchao-int8wo", "torchao-*"),
        "a weight was to be kept on disk, which torchao's tensors do not allow",
        versions="diffusers 0.42.1 with torchao 0.18.0",
    ),
    Signature(
        (TypeError,),
        (r"\w+\.__new__\(\) got an unexpected keyword argument 'requires_grad'",),
        (Place(stop=("accelerate.utils.modeling:set_module_tensor_to_device",)),),
        "tensor subclasses",
        ("comfy-fp8-e4m3fn", "comfy-*", "torchao-*"),
        _REBUILT + "everything else that a tensor of this class is made of",
        versions="comfy-kitchen 0.2.40 with accelerate 1.15.0",
    ),
    Signature(
        (RuntimeError,),
        (
            r"default implementation of __deepcopy__\(\) for wrapper subclasses",
            r"copy_\(\) on an invalid python storage",
        ),
        (Place(stop=("copy:", *QUANTO), holds=LIBRARIES),),
        "tensor subclasses",
        ("quanto-qint8", "quanto-*", "comfy-*"),
        "the model was to be copied, and tensors of this class cannot be copied",
        SpecError,
        "optimum-quanto 0.2.7, comfy-kitchen 0.2.40",
    ),
    Signature(
        (KeyError,),
        (r"^None$",),
        (Place(stop=(GGUF,), via=("copy:",)),),
        "GGUF layers of diffusers",
        ("gguf-q8-0", "gguf-*"),
        "the model was to be copied, and GGUF parameters of diffusers cannot be copied",
        SpecError,
        "diffusers 0.42.1",
    ),
    Signature(
        (RuntimeError,),
        _DEVICES,
        (Place(stop=LAYERS), Place(stop=("diffusers.hooks.",), holds=("layerwise-*",)), Place(own_call=True)),
        "a quantized layer",
        ("", *LIBRARIES),
        "its weight, or a part of it, and its input are on different devices; " + _LOST,
        versions="torch 2.13.0 (`Expected all tensors` from compiled operators, `Tensor on device` from those in "
        "Python) with optimum-quanto 0.2.2 to 0.2.7, diffusers 0.42.1, torchao 0.18.0, comfy-kitchen 0.2.40",
        devices=True,
    ),
)
