"""Which product each format takes, as data: the first rule that covers a case decides it.

Versions that were read: comfy-kitchen 0.2.40, bitsandbytes 0.50.2, optimum-quanto 0.2.7, torch 2.13.0, ComfyUI 0.33.0.
Compute capabilities are NVIDIA's; int8 tensor cores came with 7.5, fp8 with 8.9, fp4 and block-scaled fp8 with 10.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..auto import DeviceFacts
from ..compat.modes import HostName
from .native import Runs

_NATIVE, _EMULATED, _NOT, _UNKNOWN = Runs.NATIVE, Runs.EMULATED, Runs.NOT, Runs.UNKNOWN
_GPUS = ("cuda", "rocm")  # torch calls both `cuda`
Capability = tuple[int, int]


@dataclass(frozen=True)
class Rule:
    """What happens to formats on kinds of devices.

    Attributes:
        formats: ids; `*` matches any text.
        kinds: of devices; empty is all.
        least, most_capability: lowest and highest compute capability; asked of cuda alone.
        most: most rows of activations; 0 is any number.
        more_than: more rows of activations than this.
        host: None is every host.
        buffer, activations: as in `Running`.
    """

    formats: tuple[str, ...]
    level: Runs
    product: str
    why: str
    source: str
    kinds: tuple[str, ...] = ()
    least: Capability = (0, 0)
    most_capability: Capability = (99, 9)
    most: int = 0
    more_than: int = 0
    host: HostName | None = None
    buffer: bool = False
    activations: str = ""

    def covers(self, format_id: str, device: DeviceFacts, host: HostName, tokens: int) -> bool:
        return (
            any(fnmatchcase(format_id, pattern) for pattern in self.formats)
            and (not self.kinds or device.kind in self.kinds)
            and (device.kind != "cuda" or self.least <= (device.capability or (0, 0)) <= self.most_capability)
            and (not self.most or tokens <= self.most)
            and tokens > self.more_than
            and (self.host is None or host is self.host)
        )


_COMFYUI = HostName.COMFYUI
# Tensors of float8 dtypes: values, or the scales of nvfp4 and w4a8.
_FP8_TENSORS = (
    *("comfy-fp8-*", "comfy-mxfp8", "comfy-nvfp4", "comfy-w4a8"),
    *("quanto-qfloat8-*", "sdnq-float8-e4m3fn", "sdnq-float8-e5m2", "sdnq-float8-e4m3fnuz", "sdnq-float8-e5m2fnuz"),
    *("torchao-float8wo", "layerwise-*"),
)
_COMFY_INT8 = ("comfy-int8", "comfy-int8-convrot")
_INT8_ROWS = ("torchao-int8wo", "quanto-qint8", "comfy-int8", "nncf-int8-sym", "sdnq-int8")
# kernels/triton_gguf/blocks.py: BLOCKS
_TRITON = ("gguf-q8-0", "gguf-q4-0", "gguf-q4-k", "gguf-q5-k", "gguf-q6-k", "gguf-iq4-xs")

_INT8_MM = "int8 x int8, torch._int_mm"
_EXPAND = "expand in blocks, F.linear"
_W4A8 = "int8 x int8, comfy-kitchen w4a8_int8_linear"
_W4A4 = "comfy-kitchen convrot_w4a4_linear"
_NATIVE_FUNCTIONS = "torch 2.13.0: torchgen/packaged/ATen/native/native_functions.yaml"

_MPS = (
    Rule(
        _FP8_TENSORS, _NOT, "", "Apple GPUs hold no float8 tensors", "github.com/pytorch/pytorch/issues/148420; "
        "ComfyUI comfy/model_management.py:1291", ("mps",),
    ),
    Rule(
        _COMFY_INT8, _NOT, "", "torch has no int8 product on Apple GPUs, and ComfyUI takes no other for this format",
        f"{_NATIVE_FUNCTIONS}:4108; comfy_kitchen/backends/eager/quantization.py:755", ("mps",), host=_COMFYUI,
    ),
)  # fmt: skip

_HOSTS_OWN = (
    Rule(
        ("comfy-fp8-*",), _NATIVE, "fp8 x fp8, torch scaled_mm", "compute capability 8.9 multiplies in fp8",
        "ComfyUI comfy/model_management.py:1954; comfy_kitchen/tensor/fp8.py:39", ("cuda",), (8, 9), host=_COMFYUI,
        activations="fp8",
    ),
    Rule(
        ("comfy-mxfp8",), _NATIVE, "mxfp8 x mxfp8, torch scaled_mm",
        "compute capability 10.0 multiplies in block-scaled fp8",
        "ComfyUI comfy/model_management.py:1988; comfy_kitchen/tensor/mxfp8.py:38", ("cuda",), (10, 0), host=_COMFYUI,
        activations="mxfp8",
    ),
    Rule(
        ("comfy-nvfp4",), _NATIVE, "fp4 x fp4, comfy-kitchen scaled_mm_nvfp4", "compute capability 10.0 multiplies in "
        "fp4", "ComfyUI comfy/model_management.py:1978; comfy_kitchen/backends/cuda/__init__.py:5221", ("cuda",),
        (10, 0), host=_COMFYUI, activations="nvfp4",
    ),
    Rule(
        ("comfy-fp8-*", "comfy-mxfp8", "comfy-nvfp4"), _EMULATED, "dequantize, F.linear",
        "ComfyUI emulates it here: fp8 wants compute capability 8.9, mxfp8 and nvfp4 10.0",
        "ComfyUI comfy/ops.py:1652-1665", host=_COMFYUI, buffer=True,
    ),
    Rule(
        _COMFY_INT8, _NATIVE, "int8 x int8, comfy-kitchen int8_linear",
        "compute capability 7.5 has int8 tensor cores; activations are rounded row by row",
        "comfy_kitchen/backends/cuda/__init__.py:5192, tensor/int8.py:79", ("cuda",), (7, 5), host=_COMFYUI,
        activations="int8",
    ),
    Rule(
        _COMFY_INT8, _UNKNOWN, "int8 x int8, comfy-kitchen int8_linear",
        "native on RDNA 3 and 4; whether torch._int_mm, which other AMD GPUs take, runs was not read",
        "comfy_kitchen/backends/hip/__init__.py:209, :3032", ("rocm",), host=_COMFYUI, activations="int8",
    ),
    Rule(
        _COMFY_INT8, _NATIVE, _INT8_MM, "comfy-kitchen's plain path; activations are rounded row by row",
        f"comfy_kitchen/backends/eager/quantization.py:985; {_NATIVE_FUNCTIONS}:4108", ("xpu", "cpu"), host=_COMFYUI,
        activations="int8",
    ),
    Rule(
        (*_COMFY_INT8, "comfy-w4a8"), _UNKNOWN, _INT8_MM,
        "below compute capability 7.5 there are no int8 tensor cores, and whether the product runs was not read",
        "comfy_kitchen/backends/cuda/__init__.py:5192, backends/eager/quantization.py:985", ("cuda",),
        most_capability=(7, 4), host=_COMFYUI, activations="int8",
    ),
    Rule(
        ("comfy-w4a4-convrot",), _NATIVE, f"int8 x int4, {_W4A4}",
        "from compute capability 9.0 activations take 8 bits, and int8 tensor cores multiply",
        "comfy_kitchen/backends/cuda/__init__.py:369, :1352", ("cuda",), (9, 0), host=_COMFYUI, activations="int8",
    ),
    Rule(
        ("comfy-w4a4-convrot",), _NATIVE, f"int4 x int4, {_W4A4}", "compute capability 7.5 to 8.9 has int4 tensor "
        "cores; activations are rounded to 4 bits", "comfy_kitchen/backends/cuda/__init__.py:369, :5116",
        ("cuda",), (7, 5), host=_COMFYUI, activations="int4",
    ),
    Rule(
        ("comfy-w4a4-convrot",), _UNKNOWN, _W4A4, "native on RDNA 3 and 4; other AMD GPUs multiply in floating point",
        "comfy_kitchen/backends/hip/__init__.py:209, :3122", ("rocm",), host=_COMFYUI, activations="int4",
    ),
    Rule(
        ("comfy-w4a4-convrot",), _EMULATED, "unpack both sides, matmul",
        "comfy-kitchen's plain path; activations are rounded to 4 bits all the same",
        "comfy_kitchen/backends/eager/convrot_w4a4.py:165", host=_COMFYUI, buffer=True, activations="int4",
    ),
    Rule(
        ("comfy-w4a8",), _NATIVE, _W4A8, "compute capability 8.0; activations are rounded to 8 bits",
        "comfy_kitchen/backends/cuda/__init__.py:4953, tensor/w4a8_int8.py:159", ("cuda",), (8, 0), host=_COMFYUI,
        activations="int8",
    ),
    Rule(
        ("comfy-w4a8",), _UNKNOWN, _W4A8,
        "native on RDNA 3 and 4; whether torch._int_mm, which other AMD GPUs take, runs was not read",
        "comfy_kitchen/backends/hip/__init__.py:209, :3090", ("rocm",), host=_COMFYUI, activations="int8",
    ),
    Rule(
        ("comfy-w4a8",), _NATIVE, "unpack to int8, torch._int_mm", "comfy-kitchen's plain path",
        "comfy_kitchen/backends/eager/w4a8_int8.py:682", host=_COMFYUI, buffer=True, activations="int8",
    ),
)  # fmt: skip

_BNB = (
    Rule(
        ("bnb-int8",), _NATIVE, "bitsandbytes int8 x int8", "int8 tensor cores; outlier columns in 16 bits",
        "bitsandbytes/backends/cuda/ops.py:78, cuda_specs.py:20", _GPUS, (7, 5), activations="int8",
    ),
    Rule(
        ("bnb-int8",), _EMULATED, "bitsandbytes, in float32", "below compute capability 7.5 bitsandbytes multiplies "
        "slowly", "bitsandbytes/diagnostics/cuda.py:131, backends/cuda/ops.py:149", _GPUS, buffer=True,
    ),
    Rule(
        ("bnb-int8",), _NATIVE, _INT8_MM, "activations are rounded row by row; outlier columns in 16 bits",
        "quantizers/backends/bnb/int8.py: kernel", ("cpu",), activations="int8",
    ),
    Rule(
        ("bnb-nf4", "bnb-fp4"), _EMULATED, "bitsandbytes gemm_4bit", "for few rows the weight is decoded in registers",
        "bitsandbytes/backends/cuda/ops.py:600, :828", _GPUS, most=4,
    ),
    Rule(
        ("bnb-nf4", "bnb-fp4"), _EMULATED, "bitsandbytes gemm_4bit",
        "up to 1,536 rows bitsandbytes decodes in registers where that is faster on this GPU, else into a buffer",
        "bitsandbytes/backends/cuda/ops.py:584, :926", ("cuda",), most=1536, buffer=True,
    ),
    Rule(
        ("bnb-nf4", "bnb-fp4"), _EMULATED, "bitsandbytes gemm_4bit", "for so many rows it dequantizes the whole weight "
        "and calls F.linear", "bitsandbytes/backends/cuda/ops.py:954, :898", _GPUS, buffer=True,
    ),
)  # fmt: skip

_OTHERS = (
    Rule(
        ("quanto-qint8", "quanto-qfloat8-*"), _EMULATED, "quanto qbytes_mm",
        "with activations in floating point quanto scales the whole weight and calls matmul",
        "optimum/quanto/library/qbytes_mm.py:24, :74", _GPUS, buffer=True,
    ),
    Rule(
        ("torchao-int8dyn",), _NATIVE, _INT8_MM, "activations are rounded row by row",
        f"quantizers/kernels/int8.py: refusal; {_NATIVE_FUNCTIONS}:4108", ("cpu",), activations="int8",
    ),
    Rule(
        ("torchao-int8dyn",), _NATIVE, _INT8_MM, "int8 tensor cores; activations are rounded row by row",
        f"quantizers/kernels/int8.py: refusal; {_NATIVE_FUNCTIONS}:4108", ("cuda",), (7, 5), more_than=16,
        activations="int8",
    ),
    Rule(
        ("torchao-int8dyn",), _UNKNOWN, _INT8_MM, "it runs on AMD GPUs whose hipBLASLt has it; which was not read",
        f"quantizers/kernels/int8.py: refusal; {_NATIVE_FUNCTIONS}:4108", ("rocm",), more_than=16, activations="int8",
    ),
    Rule(
        ("torchao-int8dyn",), _UNKNOWN, _INT8_MM, "below compute capability 7.5 there are no int8 tensor cores, and "
        "whether the product runs was not read", "quantizers/kernels/int8.py: refusal", ("cuda",),
        most_capability=(7, 4), more_than=16, activations="int8",
    ),
    Rule(
        _INT8_ROWS, _EMULATED, "aten _weight_int8pack_mm", "up to 32 rows torch's own product reads the int8 weight",
        "quantizers/kernels/int8.py: few_tokens_refusal", ("cpu",), most=32,
    ),
    Rule(
        ("gguf-q4-0", "gguf-q4-1"), _NATIVE, "ggml mul_mat", "up to 8 rows ggml rounds activations to 8 bits",
        "quantizers/backends/gguf/choose.py: FEW_TOKENS", ("cpu",), most=8, activations="int8",
    ),
    Rule(
        ("gguf-q8-0", "gguf-q4-k", "gguf-q5-k"), _NATIVE, "ggml mul_mat", "up to 12 rows ggml rounds activations to 8 "
        "bits", "quantizers/backends/gguf/choose.py: FEW_TOKENS", ("cpu",), most=12, activations="int8",
    ),
    Rule(
        ("gguf-nvfp4",), _NATIVE, "ggml mul_mat", "up to 16 rows ggml rounds activations to 8 bits",
        "quantizers/backends/gguf/choose.py: FEW_TOKENS", ("cpu",), most=16, activations="int8",
    ),
)  # fmt: skip

_GGUF = (
    Rule(
        ("gguf-q4-0", "gguf-q4-1", "gguf-q8-0", "gguf-q4-k", "gguf-q5-k", "gguf-nvfp4"), _EMULATED, _EXPAND,
        "for so many rows ggml's dequantization, a tile at a time", "quantizers/backends/gguf/__init__.py: kernel",
        ("cpu",), buffer=True,
    ),
    Rule(
        ("gguf-*",), _NATIVE, "ggml mul_mat", "up to 24 rows ggml rounds activations to 8 bits",
        "quantizers/backends/gguf/choose.py: FEW_TOKENS_OTHERS", ("cpu",), most=24, activations="int8",
    ),
    Rule(
        ("gguf-*",), _EMULATED, _EXPAND, "for so many rows ggml's dequantization, a tile at a time",
        "quantizers/backends/gguf/__init__.py: kernel", ("cpu",), buffer=True,
    ),
    Rule(
        _TRITON, _EMULATED, "Triton kernels of this pack", "up to 128 rows the blocks are decoded in registers",
        "quantizers/kernels/triton_gguf/ops.py: way", ("cuda",), (8, 0), most=128,
    ),
    Rule(
        _TRITON, _EMULATED, "Triton kernels of this pack", "for so many rows they decode into a buffer for cuBLAS",
        "quantizers/kernels/triton_gguf/ops.py: way", ("cuda",), (8, 0), buffer=True,
    ),
    Rule(
        ("gguf-*",), _EMULATED, _EXPAND, "torch operations, a tile at a time",
        "quantizers/kernels/triton_gguf/availability.py: device_refusal", buffer=True,
    ),
)  # fmt: skip

_ROTATED = Rule(
    ("comfy-int8-convrot", "comfy-w4a4-convrot", "comfy-w4a8"), _EMULATED, f"rotate x, {_EXPAND}",
    "outside ComfyUI weight only: the activations are rotated, and the weight is expanded a tile at a time",
    "quantizers/backends/comfy/__init__.py: kernel", buffer=True,
)  # fmt: skip
_MATMUL = "the option quantized-matmul=true takes sdnq's own product in 8 bits"
_SDNQ = (
    Rule(
        ("sdnq-int8", "sdnq-uint8", "sdnq-int4", "sdnq-uint4", "sdnq-float8-e4m3fn", "sdnq-float4-e2m1fn"), _EMULATED,
        _EXPAND, f"weight only, a tile at a time; {_MATMUL}", "quantizers/backends/sdnq/form.py: form_of", buffer=True,
    ),
    Rule(
        ("sdnq-*",), _EMULATED, "dequantize, F.linear", f"weight only, all of a layer at once; {_MATMUL}",
        "quantizers/backends/sdnq/form.py: form_of", buffer=True,
    ),
)  # fmt: skip
_ANY = Rule(
    ("*",), _EMULATED, _EXPAND, "weight only: the weight is expanded a tile at a time",
    "quantizers/base.py: kernel", buffer=True,
)  # fmt: skip

RULES: tuple[Rule, ...] = (*_MPS, *_HOSTS_OWN, *_BNB, *_OTHERS, *_GGUF, _ROTATED, *_SDNQ, _ANY)
