"""Dequantized weights that are kept between products, up to a number of bytes that the user gave.

Speed for memory: a layer whose weight is kept multiplies as a full-precision one does. Off unless asked for
(`cache_mib`), and what is kept can be counted. Layers are served in the order in which they compute first; a layer
beyond the budget goes on expanding its weight at every product. Layers that share their quantized tensors share what is
kept. It is dropped when the quantized tensors move, change, or are needed in another dtype, and not used while
torch.compile traces.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..compat.modes import Carrier
from ..errors import SpecError
from ..weight import QuantizedWeight

MIB = 1 << 20
# Free memory of the device that keeping a weight leaves untouched, for activations.
RESERVE_NBYTES = 512 * MIB


@dataclass(frozen=True, eq=False)
class _Entry:
    """A weight, and weak references to the storages that it was made from: no other storage takes their place."""

    source: tuple[Any, ...]
    weight: Tensor
    storages: tuple[StorageWeakRef, ...]


class KeptWeights:
    """The kept weights of one model and of its copies that share tensors with it.

    Args:
        limit_mib: MiB of dequantized weights at most; more than 0.
    """

    def __init__(self, limit_mib: int) -> None:
        if limit_mib <= 0:
            raise SpecError(f"cache_mib must be more than 0, got {limit_mib}.")
        self.limit_mib = limit_mib
        # A weight lives as long as one of the layers that multiply by it.
        self._entries: weakref.WeakValueDictionary[tuple[Any, ...], _Entry] = weakref.WeakValueDictionary()
        self._layers: weakref.WeakKeyDictionary[nn.Module, _Entry] = weakref.WeakKeyDictionary()
        # Device -> how many weights were kept when it had no room for another one of so many bytes.
        self._refused: dict[torch.device, tuple[int, int]] = {}
        self._lock = threading.Lock()

    @classmethod
    def of(cls, model: nn.Module) -> KeptWeights | None:
        """The kept weights of a model's layers."""
        return next((kept for m in model.modules() if (kept := getattr(m, "kept", None)) is not None), None)

    @property
    def nbytes(self) -> int:
        """Bytes kept now."""
        with self._lock:
            return self._nbytes()

    def _nbytes(self) -> int:
        return sum(entry.weight.nbytes for entry in self._entries.values())

    def __len__(self) -> int:
        with self._lock:
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
        tensors = tuple(q.tensors.values() if held is None else held)
        source = (dtype, *map(_state, tensors))
        with self._lock:
            entry = self._layers.get(layer)
            if entry is not None and entry.source == source:
                return entry.weight
            self._layers.pop(layer, None)
            entry = self._entries.get(source)
            if entry is None:
                if not self._fits(q.tensors["qdata"].device, q.numel * dtype.itemsize):
                    return None
                with torch.inference_mode(False), torch.no_grad():
                    weight = dequantize()
                entry = _Entry(source, weight, tuple(StorageWeakRef(t.untyped_storage()) for t in tensors))
                self._entries[source] = entry
            self._layers[layer] = entry
            return entry.weight

    def _fits(self, device: torch.device, nbytes: int) -> bool:
        """Whether there is room; asking the device takes longer than a small product, so a no is remembered."""
        count, least = self._refused.get(device, (-1, 0))
        if count == len(self._entries) and nbytes >= least:
            return False
        if self._nbytes() + nbytes <= self.limit_mib * MIB and _has_room(device, nbytes):
            return True
        self._refused[device] = (len(self._entries), nbytes)
        return False

    def drop(self, layer: nn.Module) -> None:
        """The tensors of a layer changed: forget what was made from them, for all layers that share them."""
        with self._lock:
            entry = self._layers.get(layer)
            for other in [m for m, e in self._layers.items() if e is entry] if entry is not None else ():
                del self._layers[other]

    def moved(self, layer: nn.Module, elsewhere: bool) -> None:
        """A layer's tensors were made anew.

        Args:
            elsewhere: on another device. Who moves layers needs the memory, or has changed how much there is, so
                nothing is kept on.
        """
        if elsewhere:
            self.clear()
        else:
            self.drop(layer)

    def clear(self) -> None:
        """Give the memory back."""
        with self._lock:
            self._layers.clear()
            self._refused.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptWeights:
        return KeptWeights(self.limit_mib)

    def __reduce__(self) -> tuple[Any, ...]:
        return KeptWeights, (self.limit_mib,)

    def __str__(self) -> str:
        return f"{len(self)} weights kept dequantized, {self.nbytes / MIB:.0f} of at most {self.limit_mib} MiB"


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
    """What changes when a tensor is replaced or written to. Tensors of inference mode do not tell of writes, nor does
    `.data`: who writes in that way calls `drop`."""
    version = 0 if t.is_inference() else t._version
    storage: Any = t.untyped_storage()
    return storage._cdata, t.data_ptr(), t.shape, t.stride(), version


def _has_room(device: torch.device, nbytes: int) -> bool:
    from ..memory import device_facts

    try:
        return device_facts(device).free_nbytes >= nbytes + RESERVE_NBYTES
    except SpecError:  # a device that does not tell: the user's number alone holds
        return True
