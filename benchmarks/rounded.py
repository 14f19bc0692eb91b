"""What do ComfyUI's native products cost beside the weights, whose activations they round?

    python benchmarks/rounded.py [--formats comfy-int8 ...] [--out out]

`formats.py` multiplies by ComfyUI's formats weight only, as this pack does outside ComfyUI. Inside it, a GPU that can
multiplies rounded activations: in int8, int4, fp8, mxfp8 or nvfp4. Here the digits model is sampled so: with
comfy-kitchen's own layers where they round on a CPU too (int8, int4), else by rounding the activations with its layouts
before the product. The result is the PSNR of 200 pictures against those of full precision, which goes into
quantizers/measure/formats.json beside what `formats.py` measured of the same format. A full run of `formats.py` ends
with this.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import formats
import numpy as np
import torch
import torch.nn.functional as F
from quantwire.hosts import use
from quantwire.hosts.standalone.host import StandaloneHost
from quantwire.quantizers.backends.comfy import FORMATS
from quantwire.quantizers.backends.comfy.expansion import stored
from quantwire.quantizers.kernels import expand
from quantwire.quantizers.measure import measured
from quantwire.quantizers.registry import get_quantizer
from quantwire.quantizers.weight import QuantizedWeight
from torch import Tensor

# Format -> in what its native products round activations; w4a4 by the generation of the GPU.
ACTIVATIONS = {
    "comfy-int8": ("int8",),
    "comfy-int8-convrot": ("int8",),
    "comfy-w4a4-convrot": ("int4", "int8"),
    "comfy-w4a8": ("int8",),
    "comfy-fp8-e4m3fn": ("fp8",),
    "comfy-fp8-e5m2": ("fp8",),
    "comfy-mxfp8": ("mxfp8",),
    "comfy-nvfp4": ("nvfp4",),
}
LAYOUTS = {"fp8": "TensorCoreFP8Layout", "mxfp8": "TensorCoreMXFP8Layout", "nvfp4": "TensorCoreNVFP4Layout"}
Product = Callable[[Tensor, QuantizedWeight, Tensor | None], Tensor]


def product(format_id: str, activations: str) -> Product:
    """The native product on a CPU, with its rounding."""
    quantizer: Any = get_quantizer(format_id)
    tensors = importlib.import_module("comfy_kitchen.tensor")
    plain, algo = quantizer.linear, FORMATS[format_id].algo

    def by_layout(x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Tensor:
        """comfy-kitchen's layer: a linear product with its tensor as the weight."""
        weight = tensors.QuantizedTensor(q.tensors["qdata"], FORMATS[format_id].layout, quantizer.params(q, x.dtype))
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        return F.linear(flat, weight, None if bias is None else bias.to(x.dtype)).reshape(*x.shape[:-1], -1)

    def rounding(x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Tensor:
        layout = getattr(tensors, LAYOUTS[activations])
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        rounded = layout.dequantize(*layout.quantize(flat))[: flat.shape[0], : flat.shape[1]]
        return plain(rounded.to(x.dtype).reshape(x.shape), q, bias)

    def turned(x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Tensor:
        """Rotated activations in int8 rows by int4 weights."""
        eager = importlib.import_module("comfy_kitchen.backends.eager.quantization")
        group = int(q.meta["convrot_groupsize"])
        flat = x.reshape(-1, x.shape[-1]).to(torch.float32)
        h = eager._build_hadamard(group, device=x.device, dtype=torch.float32)
        x8, scale = eager.quantize_int8_rowwise(eager._rotate_activation(flat, h, group))
        back = (x8.to(torch.float32) * scale.reshape(-1, 1)).to(x.dtype)
        return expand.linear(back, stored(q, algo), bias).reshape(*x.shape[:-1], -1)

    if activations in LAYOUTS:
        return rounding
    return turned if format_id == "comfy-w4a4-convrot" and activations == "int8" else by_layout


@contextmanager
def native(format_id: str, activations: str) -> Iterator[None]:
    """Every layer in the format multiplies so within the block."""
    quantizer: Any = get_quantizer(format_id)
    quantizer.linear = product(format_id, activations)
    try:
        yield
    finally:
        del quantizer.linear


def pictures(workflow: str, changes: list[str], size: formats.Size, out: Path) -> np.ndarray:
    sampling = formats.sampling(workflow, changes, size, out)
    for run in formats.demo.runs()[: size.prompts]:
        sampling.run(*run)
    return np.stack(sampling.images)


def psnr_rounded(format_id: str, activations: str, size: formats.Size, out: Path, full: np.ndarray) -> float | None:
    """PSNR against `full`, None where no picture differs."""
    changes = [f"Quantize.format={format_id}", "Quantize.on_failure=full precision"]
    with native(format_id, activations):
        images = pictures("quantized", [*changes, f"Save.filename_prefix={format_id}-{activations}"], size, out)
    return formats.psnr_db(images, full)


def measure(format_ids: list[str], size: formats.Size, out: Path) -> Iterator[tuple[str, str, float | None]]:
    """(format, activations, PSNR) within the host that is in use; None where no picture differs."""
    full = pictures("full_precision", ["Save.filename_prefix=full"], size, out)
    for format_id in format_ids:
        for activations in ACTIVATIONS[format_id]:
            yield format_id, activations, psnr_rounded(format_id, activations, size, out, full)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--formats", nargs="+", choices=list(ACTIVATIONS), default=list(ACTIVATIONS), metavar="FORMAT")
    parser.add_argument("--quick", action="store_true", help="few images, and nothing is written: does it run?")
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    size = formats.Size(prompts=2, batch=2) if args.quick else formats.Size()
    args.out.mkdir(parents=True, exist_ok=True)
    with use(StandaloneHost([formats.demo.MODELS], args.out / "formats_images")) as host:
        for format_id, activations, psnr in measure(args.formats, size, host.output):
            weight_only = measured.quality(format_id).psnr_db
            print(f"{format_id} with {activations} activations: PSNR {psnr}, weight only {weight_only}", flush=True)
            if not args.quick and psnr is not None:
                measured.add_rounded(format_id, activations, psnr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
