"""Record what goes into linear layers while a model runs: for each layer the sum of squares of each input column, and
the largest absolute value of all of them.

A forward pre-hook on each layer sees its input, whatever the layer is (full precision, quantized, with a LoRA beside
it). Sums are float64 and taken in blocks of 1 MiB: squares of bfloat16 and float16 values are exact in it, and so are
their sums in all but extreme cases, so the order of the calls does not matter. Sums in float32 took 60 % of the time
and lost what small inputs add to a large sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..quantizers.errors import WorkflowError
from ..quantizers.files.calibration import Calibration, Inputs
from ..quantizers.files.imatrix import Imatrix, Sums

GPU_BLOCK_VALUES = 1 << 23  # 64 MiB
BLOCK_VALUES = 1 << 17  # 1 MiB of float64, which stays in the cache: 8.8 ms for 4608 x 3072 values, 16.6 in 8 MiB


class Watcher(Protocol):
    """What a host tells of the models that it samples with."""

    def watch(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> AbstractContextManager[None]:
        """Around every run of a model; see `Recorder.watch`."""
        ...


class Recorder:
    """Sums and largest values over all calls of the layers that it watched.

    Attributes:
        calls: how often the watched models ran.
        idle: names of watched weights that no input has reached.
    """

    def __init__(self) -> None:
        # numpy: a tensor made inside torch.inference_mode cannot be added to outside of it.
        self._squares: dict[str, np.ndarray] = {}
        self._counts: dict[str, int] = {}
        self._amax: dict[str, float] = {}
        self.calls = 0
        self.idle: set[str] = set()

    @contextmanager
    def watch(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Record the inputs of layers inside the block.

        Args:
            model: what runs them; its calls are counted.
            layers: name of a weight -> the layer that multiplies by it.
        Raises:
            WorkflowError: in the model's run: nan or inf in an input, or other columns than under this name before.
        """
        with ExitStack() as stack:
            stack.enter_context(_removed(model.register_forward_pre_hook(self._count)))
            for name, layer in layers.items():
                if name not in self._counts:
                    self.idle.add(name)
                hook = layer.register_forward_pre_hook(self._hook(name), with_kwargs=True)
                stack.enter_context(_removed(hook))
            yield

    def _count(self, module: nn.Module, args: Any) -> None:
        self.calls += 1

    def _hook(self, name: str) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.add(name, args[0] if args else next(iter(kwargs.values())))

        return see

    def add(self, name: str, x: Tensor) -> None:
        """Add inputs of one layer.

        Args:
            x: (..., K) floating point; not modified.
        Raises:
            WorkflowError: as for `watch`.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        total = self._squares.setdefault(name, np.zeros(rows.shape[1]))
        if total.shape != (rows.shape[1],):
            raise WorkflowError(
                f"'{name}': an input of {rows.shape[1]} columns after one of {len(total)}: the workflow runs different "
                "models, whose sums cannot be added.\nRecord them in workflows of their own."
            )
        added, largest = column_squares(rows)
        if not np.isfinite(added).all():
            raise WorkflowError(
                f"'{name}': nan or inf in the input of this layer, so nothing can be learned from this run.\n"
                "The model overflows in its dtype, or its file is damaged: look at the images that it makes."
            )
        total += added
        self._amax[name] = max(self._amax.get(name, 0.0), math.sqrt(largest))
        self._counts[name] = self._counts.get(name, 0) + len(rows)
        self.idle.discard(name)

    def matrix(self, dataset: str) -> Imatrix:
        """What was recorded.

        Args:
            dataset: where the inputs came from.
        """
        entries = {
            name: Sums(torch.from_numpy(self._squares[name].copy())[None], torch.tensor([count]))
            for name, count in self._counts.items()
        }
        most = max(self._counts.values(), default=0)
        return Imatrix(entries, (dataset,), self.calls, math.ceil(most / max(self.calls, 1)))

    def calibration(self, run: str) -> Calibration:
        """What was recorded, as largest values.

        Args:
            run: where the inputs came from.
        """
        layers = {n: Inputs(self._amax[n], count, len(self._squares[n])) for n, count in self._counts.items()}
        return Calibration(layers, (run,), self.calls)


def column_squares(rows: Tensor) -> tuple[np.ndarray, float]:
    """(K,) float64 sums over (M, K) of the squares of each column, and the largest square."""
    # MPS has no float64. On a GPU the time goes into starting kernels, and there is no such cache to stay in.
    dtype = torch.float32 if rows.device.type == "mps" else torch.float64
    step = max(1, (BLOCK_VALUES if rows.device.type == "cpu" else GPU_BLOCK_VALUES) // rows.shape[1])
    total = torch.zeros(rows.shape[1], dtype=dtype, device=rows.device)
    largest = torch.zeros((), dtype=dtype, device=rows.device)
    for block in rows.split(step):
        squares = block.to(dtype, copy=True).square_()
        total += squares.sum(0)
        if squares.numel():
            largest = torch.maximum(largest, squares.max())
    return total.cpu().numpy().astype(np.float64), float(largest)


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def describe(matrix: Imatrix, idle: Sequence[str] = ()) -> str:
    """One line for each thing worth knowing about a recorded matrix."""
    counts = [int(c) for sums in matrix.entries.values() for c in sums.counts]
    lines = [f"{len(matrix.entries)} weights, {matrix.chunk_count} model calls"]
    if counts:
        lines[0] += f", {min(counts):,} to {max(counts):,} inputs of a layer"
    if idle:
        lines.append(f"No input reached {len(idle)} weights, such as {idle[0]}: they are left out.")
    return "\n".join(lines)
