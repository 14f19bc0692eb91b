"""How each format multiplies on each kind of device: in its own numbers, in floating point, or not at all.

Answers for devices that are not here too, from rules that name the line of the library or of this pack which they were
read in (`native_rules`). What the CPU does was measured: every format is sampled there by `benchmarks/formats.py`. What
GPUs do was read in the sources. Asking a library to find out was not chosen: its answer is only about this machine.

"Emulated" formats save memory and no arithmetic: the weight becomes floating point for each product.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ..auto import DeviceFacts
from ..compat.modes import HostName
from ..errors import SpecError
from ..registry import get_entry

KINDS = ("cuda", "rocm", "xpu", "mps", "cpu")
IMAGE_TOKENS = 4096  # of a picture of 1024 x 1024 in most models: rows of a product in one step
TEXT_TOKENS = 256  # of a text encoder
FIRST_CAPABILITY, LAST_CAPABILITY = 5, 12  # Maxwell, the first of torch's builds, to Blackwell
BFLOAT16_CAPABILITY = (8, 0)
_DEVICE = re.compile(r"cuda:(\d{1,2})\.(\d)")


class Runs(str, Enum):
    """How a device multiplies by weights of a format."""

    NATIVE = "native"  # quantized activations by quantized weights, in integers or small floats
    EMULATED = "emulated"  # the weight becomes floating point, then a product in 16 bits
    NOT = "not runnable"
    UNKNOWN = "not known"  # the sources do not tell, and nobody tried


@dataclass(frozen=True)
class Running:
    """What is known of one format on one device.

    Attributes:
        product: the kernel, in a few words.
        why: one clause.
        buffer: whether whole tiles of the weight are written to memory in floating point; False where they are decoded
            inside the product.
        source: file and line, or page, where it was read.
        measured: it ran here, in this pack's benchmarks; else it was read in `source`.
        activations: what they are rounded to: `int8`, `int4`, `fp8`, `mxfp8`, `nvfp4`; empty where they are not.
    """

    format_id: str
    level: Runs
    product: str
    why: str
    buffer: bool
    source: str
    measured: bool
    activations: str = ""

    @property
    def in_tiles(self) -> bool:
        """Whether the buffer holds a tile of the weight at a time, not all of it."""
        return self.buffer and self.product.endswith("expand in blocks, F.linear")

    def __str__(self) -> str:
        return f"{self.level.value}: {self.product} ({self.why})" if self.product else f"{self.level.value}: {self.why}"

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return {
            "format": self.format_id,
            "level": self.level.value,
            "product": self.product,
            "why": self.why,
            "buffer": self.buffer,
            "source": self.source,
            "evidence": "measured" if self.measured else "read",
            "activations": self.activations,
        }


def running(
    format_id: str, device: DeviceFacts, host: HostName = HostName.STANDALONE, tokens: int = IMAGE_TOKENS
) -> Running:
    """How a device multiplies `tokens` rows of bfloat16 activations by weights of a format, held by carrier quantwire.

    Args:
        device: `kind` is one of `KINDS`; `capability` counts for cuda.
        host: ComfyUI multiplies by its own formats itself; the others, and all of them elsewhere, are this pack's.
    Raises:
        SpecError: an unknown format or kind of device, or a CUDA device without its compute capability.
    """
    from .native_rules import RULES

    get_entry(format_id)
    check_device(device)
    rule = next(r for r in RULES if r.covers(format_id, device, host, tokens))
    measured = device.kind == "cpu"
    return Running(format_id, rule.level, rule.product, rule.why, rule.buffer, rule.source, measured, rule.activations)


def check_device(device: DeviceFacts) -> None:
    """Raise SpecError for a kind of device that nothing is known of, or a CUDA device without compute capability."""
    if device.kind not in KINDS:
        raise SpecError(f"'{device.kind}' is no kind of device that is known here.\nKinds: {', '.join(KINDS)}.")
    if device.kind == "cuda" and device.capability is None:
        raise SpecError("A CUDA device needs its compute capability.\nWrite it as cuda:8.6; `nvidia-smi` tells it.")


def device_note(device: DeviceFacts) -> str:
    """What to know of a device whatever the format; empty where nothing."""
    if device.kind != "cuda" or device.capability is None or device.capability >= BFLOAT16_CAPABILITY:
        return ""
    major, minor = device.capability
    return (
        f"Compute capability {major}.{minor} does not multiply in bfloat16, which came with 8.0: torch emulates it, "
        "and ComfyUI takes float16 or float32 instead"
    )


def parse_device(text: str, memory_nbytes: int) -> DeviceFacts:
    """A device by its kind, such as `cuda:8.6`, `rocm`, `mps` or `cpu`, with all of its memory free.

    Raises:
        SpecError: what is written there is no such device.
    """
    word = text.strip().lower()
    match = _DEVICE.fullmatch(word)
    if match is not None:
        major, minor = int(match[1]), int(match[2])
        if not FIRST_CAPABILITY <= major <= LAST_CAPABILITY:
            raise SpecError(
                f"'{text}': no GPU that is known here has this compute capability.\n"
                f"They go from {FIRST_CAPABILITY}.0 to {LAST_CAPABILITY}.9; `nvidia-smi --query-gpu=compute_cap` tells "
                "it."
            )
        return DeviceFacts("cuda", f"CUDA {major}.{minor}", memory_nbytes, memory_nbytes, (major, minor))
    if word in KINDS and word != "cuda":
        names = {"cpu": "CPU", "mps": "Apple GPU", "rocm": "AMD GPU", "xpu": "Intel GPU"}
        return DeviceFacts(word, names[word], memory_nbytes, memory_nbytes)
    if word == "cuda":
        raise SpecError("cuda needs a compute capability.\nWrite it as cuda:8.6; `nvidia-smi` tells it.")
    raise SpecError(f"'{text}' is no device.\nWrite cuda:8.6 (with the compute capability), rocm, xpu, mps or cpu.")
