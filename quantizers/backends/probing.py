"""What every availability probe shares: is the package there, new enough, and does a small layer compute with it."""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..base import Availability, Quantizer
from ..weight import QuantizedWeight

# Far above what quantized activations (int8: 0.01) and bfloat16 cost, far below a wrong product.
TOLERANCE = 0.1


def probe_package(
    quantizer: Quantizer,
    package: str,
    minimum: tuple[int, ...],
    install: str,
    sample: Callable[[], QuantizedWeight] | None = None,
) -> Availability:
    """Probe a PyPI package by quantizing a small weight and computing with it.

    Args:
        package: distribution name.
        minimum: lowest version known to work.
        install: what to do when it is missing: "Run `pip install ...`, or choose ...".
        sample: makes a weight, for formats that cannot be made here; default: one is quantized.
    """
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return Availability(False, f"{package} is not installed.", install)
    numbers = tuple(map(int, re.findall(r"\d+", version)[: len(minimum)]))
    if numbers < minimum:
        wanted = ".".join(map(str, minimum))
        upgrade = install.replace("pip install", "pip install --upgrade")
        return Availability(False, f"{package} {version} is too old; {wanted} or newer is needed.", upgrade, version)
    try:
        fault = _fault(quantizer, sample)
    except Exception as err:  # whatever a foreign library raises at import or use, the reason is kept for the user
        reason = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        fault = f"does not run here: {reason}"
    if fault:
        return Availability(False, f"{package} {version} {fault}", _others(install), version)
    return Availability(True, version=version)


def probe_torch_only(quantizer: Quantizer, others: str) -> Availability:
    """Probe a format that needs no package beside torch.

    Args:
        others: what to do where it does not run: "Choose ...".
    """
    return probe_version(quantizer, str(torch.__version__), others, what="torch")


def probe_version(
    quantizer: Quantizer,
    version: str,
    others: str,
    sample: Callable[[], QuantizedWeight] | None = None,
    what: str = "",
) -> Availability:
    """Probe a format whose library is known to be there.

    Args:
        version: of that library.
        others: what to do where it does not run: "Choose ...".
        sample: as in `probe_package`.
        what: name of the library, before the version.
    """
    try:
        fault = _fault(quantizer, sample)
    except Exception as err:  # a device or a torch build without the dtype; the reason is kept for the user
        reason = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        fault = f"does not run here: {reason}"
    if fault:
        return Availability(False, f"{what} {version} {fault}".strip(), others, version)
    return Availability(True, version=version)


@functools.cache
def is_installed(package: str) -> bool:
    """Whether a distribution is there; it is not imported."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def probe_stored(quantizer: Quantizer, sample: QuantizedWeight, others: str) -> Availability:
    """Probe with torch alone a format whose library only makes its weights, with a weight that is made already."""
    return probe_version(quantizer, str(torch.__version__), others, lambda: sample, "torch")


def sample_bytes(*shape: int) -> torch.Tensor:
    """Fixed uint8 values from 0 to 252, for packed samples."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) * 37 % 253).to(torch.uint8).reshape(shape)


def _fault(quantizer: Quantizer, sample: Callable[[], QuantizedWeight] | None) -> str | None:
    """Quantize, dequantize, multiply: what is wrong with the numbers, or None."""
    from ..spec import QuantSpec

    q = sample() if sample else quantizer.quantize(_values(64, 256), QuantSpec(quantizer.format_id))
    restored = quantizer.dequantize(q, torch.float32)
    if not bool(torch.isfinite(restored).all()):
        return "gives non-finite values here."
    # Few tokens and many may go different ways.
    for dtype, tokens in itertools.product((torch.float32, torch.bfloat16), (3, 64)):
        x = _values(tokens, q.orig_shape[1]).to(dtype)
        expected = F.linear(x.float(), restored)
        error = quantizer.linear(x, q, None).float() - expected
        # Written so that nan counts as wrong.
        if not bool(error.square().sum() <= TOLERANCE**2 * expected.square().sum()):
            return f"computes wrong products here ({dtype} activations)."
    return None


def _others(install: str) -> str:
    """Without "Run `pip install ...`, or", since the package is there."""
    others = install.partition(", or ")[2]
    return others[:1].upper() + others[1:]  # `capitalize` would write ComfyUI in small letters


def _values(*shape: int) -> torch.Tensor:
    """Fixed float32 values without the symmetry in which wrong products would cancel out."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) * 37 % 101).reshape(shape) / 50 - 0.9
