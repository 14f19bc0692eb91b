"""What runs on this machine: the rows of `quantwire formats`, and which kernel each format would use for a product."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .apply import quantize_tensor
from .errors import QuantwireError, SpecError
from .registry import availability, format_ids, get_entry, get_quantizer
from .spec import QuantSpec

# Rows of activations: one vector, a small batch, a text encoder, a small and a large picture.
TOKENS = (1, 16, 256, 1024, 4096)
# The least K that takes every block size in use (256), four times; a second's work for the slowest format.
SHAPE = (512, 1024)
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Row:
    """One format; `reason` and `remedy` are empty where it works, `writable` is False for one that is only read."""

    id: str
    works: bool
    reason: str
    remedy: str
    version: str
    bits: float
    backend: str
    writable: bool


@dataclass(frozen=True)
class KernelChoice:
    """The kernel of a product for a range of `TOKENS`, and why that one."""

    tokens: tuple[int, ...]
    name: str
    reason: str

    def __str__(self) -> str:
        first, last = self.tokens[0], self.tokens[-1]
        upper = "+" if last == TOKENS[-1] else "" if first == last else f"-{last}"
        return f"{first}{upper} tokens: {self.name} ({self.reason})"


def rows() -> Iterator[Row]:
    """Every listed format, those that are only read too; asking imports their libraries."""
    for format_id in format_ids(writable=False):
        entry, state = get_entry(format_id), availability(format_id)
        yield Row(
            format_id,
            state.works,
            state.reason,
            state.remedy,
            state.version,
            entry.bits,
            entry.backend,
            entry.writes,
        )


def kernel_choices(row: Row, device: torch.device) -> list[KernelChoice]:
    """What `Quantizer.kernel` answers for a (512, 1024) weight of the format at `TOKENS`, equal neighbours together.

    Raises:
        QuantwireError: no such weight can be made, with the reason.
    """
    if not row.writable:
        raise SpecError(f"{row.id} weights come from files; none can be made here to ask with.")
    w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(DTYPE)
    q, _ = quantize_tensor("sample.weight", w, QuantSpec(row.id))
    choices: list[KernelChoice] = []
    for tokens in TOKENS:
        kernel = get_quantizer(row.id).kernel(q, device, DTYPE, tokens)
        if choices and (choices[-1].name, choices[-1].reason) == (kernel.name, kernel.reason):
            choices[-1] = KernelChoice((*choices[-1].tokens, tokens), kernel.name, kernel.reason)
        else:
            choices.append(KernelChoice((tokens,), kernel.name, kernel.reason))
    return choices


def verdict(row: Row) -> str:
    """Whether it runs, with the library's version, or why not and what to do."""
    if not row.works:
        return f"does not run: {row.reason} {row.remedy}".rstrip()
    version = f" ({row.version})" if row.version else ""
    return f"works here{version}" if row.writable else f"read only{version}"


def summary(row: Row) -> str:
    return get_entry(row.id).summary


def to_json(row: Row, device: torch.device | None) -> dict[str, Any]:
    """The row; with a device, its kernels there too, and `kernels_reason` where none could be asked for."""
    data = asdict(row)
    if device is not None and row.works:
        try:
            data["kernels"] = [asdict(choice) for choice in kernel_choices(row, device)]
        except QuantwireError as err:
            data |= {"kernels": [], "kernels_reason": str(err).splitlines()[0]}
    return data


def kernel_text(row: Row, device: torch.device) -> str:
    """The choices in one line, or why there are none."""
    try:
        return "; ".join(map(str, kernel_choices(row, device)))
    except QuantwireError as err:
        return f"kernel not known: {str(err).splitlines()[0]}"


def compute_device() -> torch.device:
    """The GPU where torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def count_text(found: list[Row]) -> str:
    working = [r for r in found if r.works]
    writable = sum(r.writable for r in working)
    return f"{len(working)} of {len(found)} formats work here ({writable} writable)"
