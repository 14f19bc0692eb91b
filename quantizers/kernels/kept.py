"""Dequantized weights that are kept between products, up to a number of bytes that the user gave.

Speed for memory: a layer whose weight is kept multiplies as a full-precision one does. Off unless asked for
(`cache_mib`), and what is kept can be counted. Layers are served in the order in which they compute first; a layer
beyond the budget goes on expanding its weight at every product. What was kept is dropped when the quantized tensors
move, change, or belong to another dtype.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.modes import Carrier
from ..errors import SpecError
from ..weight import QuantizedWeight

MIB = 1 << 20
# Free memory of the device that keeping a weight leaves untouched, for activations.
RESERVE_NBYTES = 512 * MIB


@dataclass(frozen=True)
class _Entry:
    source: tuple[Any, ...]
    weight: Tensor


class KeptWeights:
    """The kept weights of one model.

    Args:
        limit_mib: MiB of dequantized weights at most; more than 0.
    """

    def __init__(self, limit_mib: int) -> None:
        if limit_mib <= 0:
            raise SpecError(f"cache_mib must be more than 0, got {limit_mib}.")
        self.limit_mib = limit_mib
        self._entries: weakref.WeakKeyDictionary[nn.Module, _Entry] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    @classmethod
    def of(cls, model: nn.Module) -> KeptWeights | None:
        """The kept weights of a model's layers."""
        return next((kept for m in model.modules() if (kept := getattr(m, "kept", None)) is not None), None)

    @property
    def nbytes(self) -> int:
        """Bytes kept now."""
        return sum(entry.weight.nbytes for entry in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def __bool__(self) -> bool:
        return True

    def get(
        self,
        layer: nn.Module,
        q: QuantizedWeight,
        dtype: torch.dtype,
        dequantize: Callable[[], Tensor],
        held: Iterable[Tensor] | None = None,
    ) -> Tensor | None:
        """The dequantized weight of a layer, or None where there is no room for it.

        Args:
            held: the tensors as the layer has them, which know of writes to them; default: those of `q`.
        """
        source = (dtype, *map(_state, q.tensors.values() if held is None else held))
        with self._lock:
            entry = self._entries.get(layer)
            if entry is not None and entry.source == source:
                return entry.weight
            self._entries.pop(layer, None)
            nbytes = q.numel * dtype.itemsize
            if self.nbytes + nbytes > self.limit_mib * MIB or not _has_room(q.tensors["qdata"].device, nbytes):
                return None
            with torch.inference_mode(False), torch.no_grad():
                weight = dequantize()
            self._entries[layer] = _Entry(source, weight)
            return weight

    def clear(self) -> None:
        """Give the memory back."""
        with self._lock:
            self._entries.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptWeights:
        return KeptWeights(self.limit_mib)

    def __reduce__(self) -> tuple[Any, ...]:
        return KeptWeights, (self.limit_mib,)

    def __str__(self) -> str:
        return f"{len(self)} layers kept dequantized, {self.nbytes / MIB:.0f} of at most {self.limit_mib} MiB"


def keep_dequantized(model: nn.Module, cache_mib: int, carrier: Carrier) -> str:
    """Let the quantized layers of a model keep dequantized weights, and say so for a report.

    Raises:
        SpecError: layers of a library, which keep nothing.
    """
    if carrier is Carrier.LIBRARY:
        raise SpecError("cache_mib: a library's own layers keep no dequantized weights.\nUse carrier quantwire.")
    kept = KeptWeights(cache_mib)
    # Ours, and the host's layers that hold a quantized weight.
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "kept") and _is_quantized(m)]
    for layer in layers:
        layer.kept = kept
    return (
        f"cache_mib: up to {cache_mib} MiB of dequantized weights of {len(layers)} layers are kept between products, "
        "beside the size above"
    )


def _is_quantized(layer: nn.Module) -> bool:
    return bool(getattr(layer, "format_id", None) or getattr(layer, "quant_format", None))


def _state(t: Tensor) -> tuple[Any, ...]:
    """What changes when a tensor moves or is written to; tensors of inference mode do not tell of writes."""
    return t.data_ptr(), t.device, t.shape, 0 if t.is_inference() else t._version


def _has_room(device: torch.device, nbytes: int) -> bool:
    from ..memory import device_facts

    try:
        return device_facts(device).free_nbytes >= nbytes + RESERVE_NBYTES
    except SpecError:  # a device that does not tell: the user's number alone holds
        return True
