"""How much memory do activations take? Measures architectures on fake tensors, fits formulas, checks them on real runs.

    python benchmarks/activations.py [--only FORMULA...] [--rows FILE] [--write]

Each architecture runs once for every resolution on CPU under FakeTensorMode: shapes and dtypes are real, memory is not
taken, and the kernels of attention are chosen as in a real run on CPU. It takes about 20 minutes. `--write` replaces
quantizers/measure/activations.json. benchmarks/activations_check.py compares with real runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from activation_list import archs
from activation_models import Arch
from quantwire.quantizers.measure.activations import DATA, RunShape, product, variables
from quantwire.quantizers.measure.live import LiveBytes
from quantwire.quantizers.measure.parts import Role
from quantwire.quantizers.measure.sizes import read_sizes
from quantwire.quantizers.plan import Slot
from quantwire.quantizers.weight import TensorMeta
from scipy.optimize import linprog
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@dataclass(frozen=True)
class Row:
    """One run: bytes at the peak, and the operator that was running then. `sizes` are the model's."""

    formula: str
    title: str
    shape: RunShape
    dtype_nbytes: int
    sizes: dict[str, int]
    peak: int
    at: str

    @property
    def what(self) -> str:
        s = self.shape
        return f"{s.width}x{s.height} x{s.frames}, batch {s.batch}, text {s.text_tokens}, {self.dtype_nbytes} bytes"

    def variables(self, geometry: Any) -> dict[str, float]:
        return variables({"geometry": geometry}, self.sizes, self.shape, self.dtype_nbytes)

    @classmethod
    def read(cls, data: dict[str, Any]) -> Row:
        return cls(**{**data, "shape": RunShape(**data["shape"])})


class RealStaysReal(TorchDispatchMode):
    """Runs operators whose tensors are all real outside of the fake mode: masks, whose values a model reads."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        if tensors and not any(isinstance(t, FakeTensor) for t in tensors):
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def measure(arch: Arch) -> list[Row]:
    """Every shape in bfloat16, and the first two in float32."""
    out: list[Row] = []
    for dtype, shapes in ((torch.bfloat16, arch.shapes), (torch.float32, arch.shapes[:2])):
        with FakeTensorMode(allow_non_fake_inputs=True):
            torch.set_default_dtype(dtype)
            try:
                model = arch.build().eval()
            finally:
                torch.set_default_dtype(torch.float32)
            run: Any = getattr(model, arch.call) if arch.call else model
            slots = [Slot(TensorMeta(n, tuple(p.shape), p.dtype), False) for n, p in model.state_dict().items()]
            sizes = read_sizes(Role(arch.role), slots)
            for shape in shapes:
                inputs = arch.inputs(shape, dtype, arch)
                live = LiveBytes([*model.parameters(), *model.buffers()])
                with torch.no_grad(), live, RealStaysReal():
                    live.count(tree_iter(inputs))
                    run(**inputs)
                row = Row(arch.formula, arch.title, shape, dtype.itemsize, sizes, live.peak, live.at)
                out.append(row)
                print(f"  {row.title}, {row.what}: {row.peak / 2**20:.1f} MiB at {row.at}", flush=True)
    return out


def fit(rows: list[Row], terms: tuple[str, ...], geometry: Any, moments: int) -> tuple[list[dict[str, float]], float]:
    """The non-negative coefficients with the least largest relative error, of the largest of `moments` sums.

    A linear program for each way to share the rows out: those of a sum must come out within the error, and no other sum
    may exceed them by more. Rows go to the sum that was largest, until nothing moves.
    """
    found_at = [r.variables(geometry) for r in rows]
    a = np.array([[product(t, v) for t in terms] for v in found_at])
    y = np.array([r.peak for r in rows], dtype=float)
    x = a / y[:, None]
    scale = x.max(0) + 1e-300  # a linear program with coefficients of one magnitude
    x = x / scale
    best: tuple[list[dict[str, float]], float] | None = None
    places = sorted({r.at for r in rows})
    for start in range(6 if moments > 1 else 1):
        rng = np.random.default_rng(start)
        # The first try: by the operator at the peak, which is another one where the peak is at another moment.
        by_place = np.array([min(places.index(at), moments - 1) for at in (r.at for r in rows)])
        group = rng.integers(0, moments, len(rows)) if start else by_place
        for _ in range(12):
            found, error = _minimax(x, group, moments)
            predicted = found @ x.T
            if best is None or error < best[1] - 0.01:
                coefficients = [{t: float(v) for t, v in zip(terms, c / scale, strict=True) if v > 0} for c in found]
                best = ([c for c in coefficients if c], error)
            now = predicted.argmax(0)
            if (now == group).all():
                break
            group = now
    assert best
    return best


def _minimax(x: np.ndarray, group: np.ndarray, moments: int) -> tuple[np.ndarray, float]:
    """(moments, k) coefficients for rows scaled to a target of 1, and the largest error in percent."""
    n, k = x.shape
    upper: list[np.ndarray] = []
    lower: list[np.ndarray] = []
    for m in range(moments):
        for i in range(n):
            row = np.zeros(moments * k + 1)
            row[m * k : (m + 1) * k], row[-1] = x[i], -1
            upper.append(row)
            if group[i] == m:
                row = -row
                row[-1] = -1
                lower.append(row)
    bounds = [1.0] * len(upper) + [-1.0] * len(lower)
    cost = np.zeros(moments * k + 1)
    cost[-1] = 1
    # A hair of a price for each coefficient, so that what does not help is 0.
    cost[:-1] = 1e-5
    out = linprog(cost, np.array(upper + lower), bounds, bounds=[(0, None)] * (moments * k + 1), method="highs")
    return out.x[:-1].reshape(moments, k), 100 * float(out.x[-1])


def fitted(rows: list[Row], terms: tuple[str, ...], geometry: Any) -> tuple[list[dict[str, float]], float]:
    """One sum, or as many as bring the error under 3 %."""
    best = fit(rows, terms, geometry, 1)
    for moments in (2, 3):
        if best[1] < 3:
            break
        more = fit(rows, terms, geometry, moments)
        if more[1] < best[1] * 0.8:
            best = more
    return best


ANY = {"diffusion model": ("all*width*dtype",), "text encoder": ("text*width*dtype",), "VAE": ("pixels*dtype",)}
ANY_NAMES = {"diffusion model": "any", "text encoder": "any text encoder", "VAE": "any VAE"}


def formulas(rows: list[Row]) -> dict[str, Any]:
    """A formula for each family, and one for each role from tokens and width alone, for what is not in the list."""
    out: dict[str, Any] = {}
    listed = archs()
    for name in dict.fromkeys(a.formula for a in listed):
        first = next(a for a in listed if a.formula == name)
        mine = [r for r in rows if r.formula == name]
        if mine:
            moments, error = fitted(mine, first.terms, first.geometry)
            out[name] = _formula(first.title, first.role, first.geometry, moments, error, len(mine))
            print(f"{name}: {error:.2f} %, {len(moments)} sums of {[len(m) for m in moments]} products")
    for role, terms in ANY.items():
        geometry = {a.formula: a.geometry for a in listed if a.role == role}
        mine = [r for r in rows if r.formula in geometry]
        x = np.array([product(terms[0], r.variables(geometry[r.formula])) / r.peak for r in mine])
        # The middle of the extremes on a scale of ratios, so that it is wrong by the same factor either way.
        c = 1 / float(np.sqrt(x.min() * x.max()))
        error = 100 * float(np.sqrt(x.max() / x.min()) - 1)
        usual = {
            "diffusion model": {"spatial": 16, "text_tokens": 512},
            "VAE": {"spatial": 8, "text_tokens": 1, "guided": False},
        }
        shown = usual.get(role, {"spatial": 8, "text_tokens": 512})
        out[ANY_NAMES[role]] = _formula(f"any {role}", role, shown, [{terms[0]: c}], error, len(mine))
        print(f"{ANY_NAMES[role]}: {error:.0f} %, {c:.1f} {terms[0]}")
    return out


def _formula(title: str, role: str, geometry: Any, moments: Any, error: float, points: int) -> dict[str, Any]:
    short = [{t: float(f"{c:.6g}") for t, c in terms.items()} for terms in moments]
    kept = {"title": title, "role": role, "geometry": geometry, "moments": short}
    return kept | {"error_percent": round(error, 2), "points": points}


def with_streamed(found: dict[str, Any]) -> dict[str, Any]:
    """The formulas with what benchmarks/streaming.py has added to those of the same name."""
    before: dict[str, Any] = json.loads(DATA.read_text())["formulas"] if DATA.exists() else {}
    kept = {name: {"streamed": f["streamed"]} for name, f in before.items() if "streamed" in f}
    for name in found.keys() - kept.keys():
        print(f"{name}: run benchmarks/streaming.py --only {name} --write", file=sys.stderr)
    return {name: formula | kept.get(name, {}) for name, formula in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="*", metavar="FORMULA", help="measure these and keep the rest; none: only fit")
    parser.add_argument("--rows", type=Path, default=Path("out/activations.json"), help="all measurements (JSON)")
    parser.add_argument("--write", action="store_true", help="replace quantizers/measure/activations.json")
    args = parser.parse_args()
    todo = [a for a in archs() if args.only is None or a.formula in args.only]
    again = {a.formula for a in todo}
    rows: list[Row] = []
    if args.only is not None and args.rows.exists():
        rows = [r for r in map(Row.read, json.loads(args.rows.read_text())) if r.formula not in again]
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    for arch in todo:
        rows += measure(arch)
        args.rows.write_text(json.dumps([asdict(r) for r in rows]) + "\n")
    made = {
        "made_by": "python benchmarks/activations.py --write",
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "attention": "scaled_dot_product_attention as chosen on CPU",
        "formulas": with_streamed(formulas(rows)),
    }
    if args.write:
        DATA.write_text(json.dumps(made, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
