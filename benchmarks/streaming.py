"""How much of a model's activations is alive while a large layer, or a block, is on the device?

    python benchmarks/streaming.py [--only FORMULA...] [--write]

Modes that stream weights have a layer or block of them on the device only while it computes, and the peak of the
activations is often elsewhere: between two products. Of the published sizes of benchmarks/activation_list.py, on fake
tensors, this takes for each module with weights of its own, and for each repeated block, the bytes that are alive while
it runs, and adds its weights. What the largest such sum has beyond the largest layer (block), as a share of the peak of
the activations, is stored with the formula; `measure/stages` multiplies by it. `--write` adds it to
quantizers/measure/activations.json. Nothing of the models that benchmarks/forecast.py checks forecasts with is used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from activation_list import archs
from activation_models import Arch
from activations import RealStaysReal
from quantwire.quantizers.measure.activations import DATA, RunShape
from quantwire.quantizers.measure.buffers import block_names
from quantwire.quantizers.measure.live import LiveBytes
from quantwire.quantizers.measure.stages import ONE_VECTOR
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter

# Of each role: the usual ones, from small to large.
SHAPES = {
    "image": (RunShape(512, 512), RunShape(1024, 1024)),
    "video": (RunShape(480, 480, 1), RunShape(832, 480, 33)),
    "text encoder": (RunShape(text_tokens=77), RunShape(text_tokens=512)),
    "clip": (RunShape(text_tokens=77), RunShape(text_tokens=77, batch=4)),
    "VAE": (RunShape(512, 512), RunShape(1024, 1024)),
}


@dataclass
class Window:
    """The time in which a module runs."""

    nbytes: int
    peak: int = 0


class Windows(LiveBytes):
    """Counts what is alive while modules run."""

    def __init__(self, leave_out: Any) -> None:
        super().__init__(leave_out)
        self.open: dict[str, Window] = {}
        self.peaks: dict[str, Window] = {}

    def _add(self, storage: torch.UntypedStorage, at: str) -> None:
        super()._add(storage, at)
        for window in self.open.values():
            window.peak = max(window.peak, self.now)

    @contextmanager
    def watching(self, modules: dict[str, tuple[nn.Module, int]]) -> Iterator[None]:
        """Modules by name, and the bytes of weights that are there while each runs."""
        handles: list[Any] = []
        for name, (module, nbytes) in modules.items():
            handles += [
                module.register_forward_pre_hook(self._opener(name, nbytes)),
                module.register_forward_hook(self._closer(name)),
            ]
        yield
        for handle in handles:
            handle.remove()

    def _opener(self, name: str, nbytes: int) -> Callable[..., None]:
        def opened(*_: Any) -> None:
            self.open[name] = Window(nbytes, self.now)

        return opened

    def _closer(self, name: str) -> Callable[..., None]:
        def closed(*_: Any) -> None:
            window, before = self.open.pop(name), self.peaks.get(name)
            if before is None or window.peak > before.peak:
                self.peaks[name] = window

        return closed


def measure(arch: Arch) -> dict[str, float]:
    """`layer` and `block`: the largest shares over the shapes."""
    kind = "clip" if arch.formula == "clip" else arch.role if arch.role in SHAPES else ""
    kind = kind or ("video" if "temporal" in arch.geometry else "image")
    shares: dict[str, float] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = arch.build().eval()
        finally:
            torch.set_default_dtype(torch.float32)
        run: Any = getattr(model, arch.call) if arch.call else model
        for shape in SHAPES[kind]:
            for what, watched in (("layer", layers(model)), ("block", blocks(model))):
                if not watched:
                    continue
                inputs = arch.inputs(shape, torch.bfloat16, arch)
                live = Windows([*model.parameters(), *model.buffers()])
                with torch.no_grad(), live.watching(watched), live, RealStaysReal():
                    live.count(tree_iter(inputs))
                    run(**inputs)
                ran = {name: watched[name][1] for name in live.peaks}
                largest = max(n for name, n in ran.items() if what == "block" or not ONE_VECTOR.search(f"{name}."))
                most = max(w.peak + w.nbytes for w in live.peaks.values())
                share = (most - largest) / live.peak
                shares[what] = max(shares.get(what, 0.0), share)
                at = max(live.peaks, key=lambda n: live.peaks[n].peak + live.peaks[n].nbytes)
                print(f"  {arch.title}, {shape.width}x{shape.height} x{shape.frames}, {what}: {share:.3f} at {at}")
    return shares


def layers(model: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """Modules that hold weights themselves: what accelerate brings in one at a time."""
    own = {n: (m, sum(p.nbytes for p in m.parameters(recurse=False))) for n, m in model.named_modules()}
    return {name: found for name, found in own.items() if found[1]}


def blocks(model: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """The repeated blocks of a model, as forecasts tell them by name."""
    names = set(block_names(n.rpartition(".")[0] for n, _ in model.named_parameters()).values())
    return {n: (m, sum(p.nbytes for p in m.parameters())) for n, m in model.named_modules() if n in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", metavar="FORMULA")
    parser.add_argument("--write", action="store_true", help="add to quantizers/measure/activations.json")
    args = parser.parse_args()
    listed = archs()
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(a.formula for a in listed):
        if args.only and name not in args.only:
            continue
        found[name] = measure(next(a for a in listed if a.formula == name))
        print(f"{name}: {found[name]}", flush=True)
        if args.write:
            write(name, found[name])
    return 0


def write(name: str, shares: dict[str, float]) -> None:
    data = json.loads(DATA.read_text())
    formulas: dict[str, Any] = data["formulas"]
    formulas[name]["streamed"] = {what: round(share, 4) for what, share in shares.items()}
    for any_name in ("any", "any text encoder", "any VAE"):
        like = [
            f["streamed"] for f in formulas.values() if f["role"] == formulas[any_name]["role"] and f.get("streamed")
        ]
        most = {what: max((s[what] for s in like if what in s), default=1.0) for what in ("layer", "block")}
        if like:
            formulas[any_name]["streamed"] = most
    DATA.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
