"""The quantizer of every sdnq format: see the package docstring."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ...base import Availability, Kernel, Quantizer
from ...errors import SpecError
from ...formats.sdnq import bits_of, library_name
from ...kernels.choose import int8_rows
from ...kernels.expand import Expansion
from ...weight import FullPrecisionGuard, QuantizedWeight, TensorMeta
from ..probing import probe_package
from .form import form_of
from .library import dequantizer_of, layer_like, library, to_meta, to_ours, to_theirs

if TYPE_CHECKING:
    from ...spec import QuantSpec

INSTALL = (
    "Run `pip install sdnq` (its licence is GPL-3.0-only, so installing it is your choice), or choose quanto-qint8, "
    "bnb-nf4 or a gguf format."
)
# Below it the library's quantized product dequantizes instead.
MATMUL_TOKENS = 32
MATMUL_DEVICES = ("cpu", "cuda", "xpu")
SVD_SEED = 0
# Stored in a torch dtype of that width, so any number of values fits.
UNPACKED_BITS = (8, 16)
# Weight types that the library's dynamic search does not know.
WITHOUT_ORDER = ("bfloat16", "float8_e4m3fnuz", "float8_e5m2fnuz")
# The widest packing that the dynamic search may come to puts 16 values together.
DYNAMIC_VALUES = 16


class Sdnq(Quantizer):
    def __init__(self, format_id: str) -> None:
        self.format_id = format_id
        self.weight_type = library_name(format_id)
        self.bits = bits_of(format_id.removeprefix("sdnq-"))

    def probe(self) -> Availability:
        return probe_package(self, "sdnq", (0, 2, 8), INSTALL)

    def refuse(self, spec: QuantSpec, t: TensorMeta) -> str | None:
        return self._refuse_options(spec) or self._refuse_shape(spec, t)

    def _refuse_options(self, spec: QuantSpec) -> str | None:
        """Options that do something only beside another one, or that the library cannot do for this type."""
        for name, switch in (("svd-rank", "use-svd"), ("svd-steps", "use-svd"), ("dynamic-threshold", "dynamic")):
            if name in dict(spec.options) and not spec.option(switch, False):
                return f"option {name} does nothing without {switch}=true"
        if spec.option("quantized-matmul", False) and self.weight_type == "bfloat16":
            return "sdnq multiplies bfloat16 storage as float16, which overflows; leave quantized-matmul out"
        if spec.option("dynamic", False) and self.weight_type in WITHOUT_ORDER:
            return f"{self.weight_type} is not among the types that dynamic walks through; start at another one"
        return None

    def _refuse_shape(self, spec: QuantSpec, t: TensorMeta) -> str | None:
        if len(t.shape) != 2:
            return f"shape {t.shape} is not (N, K)"
        n, k = t.shape
        if not t.numel:
            return f"N={n} by K={k} holds no values"
        together = DYNAMIC_VALUES if spec.option("dynamic", False) else self._packed_together
        if t.numel % together:
            why = "the packed types that dynamic may choose" if spec.option("dynamic", False) else self.weight_type
            return f"N={n} by K={k} is {t.numel} values, no multiple of the {together} that {why} packs together"
        if spec.option("use-hadamard", False) and k % 4:
            return f"K={k} is not a multiple of 4, the smallest Hadamard rotation"
        rank = int(spec.option("svd-rank", 32))
        if spec.option("use-svd", False) and rank * (n + k) >= t.numel:
            return f"svd-rank {rank}: its factors alone are as large as the weight of N={n} by K={k}"
        return None

    @property
    def _packed_together(self) -> int:
        """How many values fill whole words: 8-bit words up to 7 bits, 16-bit words above 8."""
        if self.bits in UNPACKED_BITS:
            return 1
        word = 8 if self.bits < 8 else 16
        return word // math.gcd(word, self.bits)

    def predict_nbytes(self, spec: QuantSpec, t: TensorMeta) -> int:
        """With `dynamic` the size of the starting type: which one is taken depends on the values."""
        n, k = t.shape
        use_svd = bool(spec.option("use-svd", False))
        rank = int(spec.option("svd-rank", 32)) if use_svd else 0
        group_size, matmul = int(spec.option("group-size", 0)), bool(spec.option("quantized-matmul", False))
        stored = _stored_nbytes(self.weight_type, n, k, group_size, matmul, use_svd)
        return stored + rank * (n + k) * t.dtype.itemsize

    def quantize(self, w: Tensor, spec: QuantSpec) -> QuantizedWeight:
        """qdata as in the package docstring; scale, zero_point (unsigned types) float32; svd_up, svd_down in w.dtype.

        The library's SVD is randomized. It runs from a fixed seed, so that one weight always gives the same bytes, and
        leaves the random state of the process as it was.
        """
        arguments: dict[str, Any] = {
            "layer_class_name": "Linear",
            "weights_dtype": self.weight_type,
            "group_size": int(spec.option("group-size", 0)),
            "svd_rank": int(spec.option("svd-rank", 32)),
            "svd_steps": int(spec.option("svd-steps", 8)),
            "use_svd": bool(spec.option("use-svd", False)),
            "use_hadamard": bool(spec.option("use-hadamard", False)),
            "use_quantized_matmul": bool(spec.option("quantized-matmul", False)),
        }
        with _seeded(w.device) if arguments["use_svd"] else nullcontext():
            dequantizer, tensors = self._by_library(w.detach().contiguous(), spec, arguments)
        if arguments["use_svd"] and tensors["svd_up"] is None:
            # The library swallows whatever stopped its SVD and goes on without; here that is a failure.
            raise SpecError(f"{self.format_id}: sdnq's SVD of a {tuple(w.shape)} weight failed.\nLeave use-svd out.")
        meta = to_meta(dequantizer) | {"quantized_matmul": arguments["use_quantized_matmul"]}
        return QuantizedWeight(self.format_id, to_ours(tensors), tuple(w.shape), w.dtype, meta)

    def _by_library(self, w: Tensor, spec: QuantSpec, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        quantizer = library().quantizer
        if not spec.option("dynamic", False):
            return quantizer.sdnq_quantize_layer_weight(w, **arguments)
        threshold = float(spec.option("dynamic-threshold", 0.0)) or None
        found = quantizer.sdnq_quantize_layer_weight_dynamic(w, **arguments, dynamic_loss_threshold=threshold)
        if found is None:
            limit = f"dynamic-threshold {threshold:g}" if threshold else "the library's rule"
            raise SpecError(
                f"{self.format_id}: no weight type of up to 16 bits loses as little as {limit} allows.\n"
                "Raise dynamic-threshold, or exclude the layer."
            )
        return found

    def dequantize(self, q: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        dequantizer = dequantizer_of(q)
        transposed = dequantizer.use_quantized_matmul
        return dequantizer(**to_theirs(q), dtype=dtype, skip_quantized_matmul=transposed, skip_compile=True)

    def form(self, q: QuantizedWeight) -> Expansion | None:
        return form_of(q)

    def kernel(self, q: QuantizedWeight, device: torch.device, dtype: torch.dtype, tokens: int) -> Kernel:
        if q.meta["quantized_matmul"]:
            reason = _no_quantized_product(q, device, tokens)
            if not reason:
                name = f"sdnq {q.meta['quantized_matmul_dtype']} matmul"
                return Kernel(name, "the library's own product, by quantized-matmul", _quantized_product)
            return dataclasses.replace(super().kernel(q, device, dtype, tokens), reason=reason)
        if set(q.tensors) == {"qdata", "scale"} and q.tensors["qdata"].dtype is torch.int8:
            form = form_of(q)
            if form is not None and q.tensors["scale"].numel() == q.orig_shape[0]:
                return int8_rows(_parts, self._form, q.orig_shape, device, dtype, tokens)
        return super().kernel(q, device, dtype, tokens)

    def to_native(self, q: QuantizedWeight, bias: Tensor | None) -> nn.Module:
        """`SDNQLinear`, made as the library makes it of an `nn.Linear`."""
        sdnq = library()
        n, k = q.orig_shape
        source: Any = nn.Linear(k, n, bias=bias is not None, device="meta")
        source.sdnq_dequantizer = dequantizer_of(q)
        forward = sdnq.forward.get_forward_func(
            "Linear", q.meta["quantized_matmul_dtype"], q.meta["use_quantized_matmul"]
        )
        layer: Any = sdnq.layers.get_sdnq_wrapper_class(source, forward)
        tensors = to_theirs(q)
        for name in sdnq.quantizer.sdnq_keys:
            t = tensors.get(name)
            setattr(layer, name, None if t is None else nn.Parameter(t.clone(), requires_grad=False))
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        layer.register_load_state_dict_pre_hook(StorageGuard(self.format_id))
        return layer.eval()


@dataclass(frozen=True)
class StorageGuard(FullPrecisionGuard):
    """Lets a layer's own float8 values back in: `weight` is their name too, and float8 is a floating-point dtype."""

    def __call__(self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *rest: object) -> None:
        value, storage = state_dict.get(prefix + "weight"), cast(Tensor, module.weight).dtype
        stored = isinstance(value, Tensor) and value.dtype == storage and storage.itemsize == 1
        if not (stored and prefix + "scale" in state_dict):
            super().__call__(module, state_dict, prefix, *rest)


def _parts(q: QuantizedWeight) -> tuple[Tensor, Tensor]:
    return q.tensors["qdata"].reshape(q.orig_shape), q.tensors["scale"]


@functools.lru_cache(maxsize=4096)  # a model has few shapes and many layers
def _stored_nbytes(weight_type: str, n: int, k: int, group_size: int, matmul: bool, after_svd: bool) -> int:
    """Bytes of the quantized values, scales and zero points: the library's own rules, run without values."""
    _, tensors = library().quantizer.sdnq_quantize_layer_weight(
        torch.empty(n, k, device="meta"),
        layer_class_name="Linear",
        weights_dtype=weight_type,
        group_size=group_size,
        use_quantized_matmul=matmul,
        using_pre_calculated_svd=after_svd,
    )
    return sum(t.numel() * t.element_size() for t in to_ours(tensors).values())


def _no_quantized_product(q: QuantizedWeight, device: torch.device, tokens: int) -> str | None:
    """Why the quantized product that was asked for is not taken, or None."""
    n, k = q.orig_shape
    if not q.meta["use_quantized_matmul"]:
        wanted = "N and K to be multiples of 16 and at least 32"
        chosen = str(q.meta["weights_dtype"])
        if min(n, k) < 32 or n % 16 or k % 16:
            return f"N={n}, K={k}: sdnq's quantized product needs {wanted}"
        return f"sdnq has no quantized product here for {chosen}, which dynamic chose"
    if device.type not in MATMUL_DEVICES:
        return f"sdnq's quantized product is known to run on {', '.join(MATMUL_DEVICES)}, not on {device.type}"
    if tokens < MATMUL_TOKENS:
        return f"{tokens} tokens: sdnq multiplies in quantized form from {MATMUL_TOKENS} up"
    return None


def _quantized_product(x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """The library's own forward function, on our plain tensors."""
    forward = library().forward.get_forward_func("Linear", q.meta["quantized_matmul_dtype"], True)
    return forward(layer_like(q, bias), x)


@contextmanager
def _seeded(device: torch.device) -> Generator[None]:
    """The generator of one device at a fixed seed, and back as it was afterwards."""
    module: Any = torch if device.type == "cpu" else torch.get_device_module(device)
    arguments = () if device.type in ("cpu", "mps") else (device,)
    state = module.get_rng_state(*arguments)
    try:
        seed = torch.Generator(device).manual_seed(SVD_SEED)
        module.set_rng_state(seed.get_state(), *arguments)
        yield
    finally:
        module.set_rng_state(state, *arguments)
