"""How many bytes of tensors are alive while code runs, and the most that were: exact, whatever the device.

A dispatch mode sees every tensor that an operator returns and counts its storage until nothing holds it any more. It
works on real tensors and, without using memory, on fake ones. What an operator allocates and frees inside itself (a
library's scratch space) is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts storages that come to be inside the `with` block.

    Attributes:
        now, peak: bytes alive, and the most that were alive at once.
        at: the operator whose result made the peak.
        operators: the names of all that ran.
    """

    def __init__(self, leave_out: Iterable[Tensor] = ()) -> None:
        """
        Args:
            leave_out: tensors that do not count though operators return views of them: the weights.
        """
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.now = self.peak = 0
        self.at = ""
        self.operators: set[str] = set()
        self._left_out = frozenset(_address(t.untyped_storage()) for t in leave_out)
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def count(self, tensors: Iterable[Any], at: str = "given") -> None:
        """Add what is alive already, such as the inputs; values that are no tensors are passed over."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), at)

    def _add(self, storage: torch.UntypedStorage, at: str) -> None:
        key = _address(storage)
        if key in self._alive or key in self._left_out:
            return
        nbytes = storage.nbytes()
        self._alive[key] = (weakref.ref(storage, lambda _: self._drop(key)), nbytes)
        self.now += nbytes
        if self.now > self.peak:
            self.peak, self.at = self.now, at

    def _drop(self, key: int) -> None:
        self.now -= self._alive.pop(key)[1]

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators.add(str(func))
        self.count(tree_iter(out), str(func))
        return out


def _address(storage: torch.UntypedStorage) -> int:
    """Of the storage in C++: a view's is that of its base, whichever Python object stands for it."""
    return storage._cdata  # pyright: ignore[reportPrivateUsage]
