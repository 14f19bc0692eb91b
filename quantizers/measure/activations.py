"""The most memory that everything beside the weights takes, for one denoising step, one prompt or one decoded picture.

    peak = the largest of a family's sums, each: coefficient x tokens x width x bytes per value, and more such products

The coefficients are not guessed: `benchmarks/activations.py` runs the published architectures on fake tensors, which
take no memory, counts the storages that are alive (`live.LiveBytes`), and fits them over resolutions, widths, batch
sizes and dtypes. Attention is that of `scaled_dot_product_attention`, which keeps no tokens x tokens matrix on CPU and
in the flash and memory-efficient kernels of GPUs. Not in it: a kernel's own scratch space, and what dequantizing needs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import SpecError
from ..plan import Slot
from .parts import Role
from .sizes import formula_of, read_sizes
from .units import show_size

DATA = Path(__file__).with_name("activations.json")


@dataclass(frozen=True)
class RunShape:
    """What is generated.

    Attributes:
        width, height: pixels.
        frames: of a video; 1 for an image.
        batch: images or videos at once.
        text_tokens: of the prompt; 0 for what the family's prompts are padded to.
        cfg: above 1, prompt and negative prompt go through the model as one batch of twice the size. Give 1 for a host
            that runs them one after the other.
    """

    width: int = 1024
    height: int = 1024
    frames: int = 1
    batch: int = 1
    text_tokens: int = 0
    cfg: float = 1.0

    def __post_init__(self) -> None:
        for name in ("width", "height", "frames", "batch"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} is {getattr(self, name)}.\nGive a number of at least 1.")
        if self.text_tokens < 0:
            raise SpecError(f"text_tokens is {self.text_tokens}.\nGive a number above zero, or 0 for the usual one.")
        if not math.isfinite(self.cfg):
            raise SpecError(f"cfg is {self.cfg}.\nGive a number.")


@dataclass(frozen=True)
class Estimate:
    """Bytes of activations.

    Attributes:
        nbytes: at the worst moment.
        error_percent: the largest deviation of the formula from what it was fitted to, either way.
        how: where the number comes from, in one line.
        exact_family: false where the nearest formula stands in for a model that was not measured.
        formula: its name.
        rows: of a product with a layer: tokens of the batch.
        while_layer, while_block: share of `nbytes` that comes together with the largest layer, or block, where weights
            are on the device only while they compute (`benchmarks/streaming.py`).
    """

    nbytes: int
    error_percent: float
    how: str
    exact_family: bool = True
    formula: str = ""
    rows: int = 1
    while_layer: float = 1.0
    while_block: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "nbytes": self.nbytes,
            "error_percent": self.error_percent,
            "how": self.how,
            "exact_family": self.exact_family,
        }

    def __str__(self) -> str:
        return f"{show_size(self.nbytes)} +- {self.error_percent:.0f} %: {self.how}"


def activations(role: Role, family: str, slots: Sequence[Slot], shape: RunShape, dtype_nbytes: int) -> Estimate:
    """Peak of the activations of one part: one step of a diffusion model, one prompt, or one decode of a VAE.

    Args:
        role, family, slots: of the `ModelPart`.
        dtype_nbytes: bytes of one value of the activations, 2 or 4.
    Raises:
        SpecError: a LoRA or ControlNet, which has no run of its own; an impossible dtype.
    """
    if role not in (Role.DIFFUSION, Role.TEXT, Role.VAE):
        raise SpecError(
            f"A {role.value} has no activations of its own.\nAsk for the diffusion model that it goes with."
        )
    if dtype_nbytes not in (2, 4):
        raise SpecError(f"Activations of {dtype_nbytes} bytes a value.\nGive 2 (float16, bfloat16) or 4 (float32).")
    formulas = load_formulas()
    name = formula_of(role, family, slots)
    known = name in formulas
    if not known:
        name = {Role.DIFFUSION: "any", Role.TEXT: "any text encoder", Role.VAE: "any VAE"}[role]
    formula = formulas[name]
    sizes = read_sizes(role, slots)
    values = variables(formula, sizes, shape, dtype_nbytes)
    nbytes = peak(formula, values)
    if known:
        how = f"formula of {formula['title']}, measured on CPU with {formula['points']} runs"
    else:
        what = f"'{family}'" if family else "an unknown model"
        how = f"{what} was not measured: from tokens and width, as of all {role.value}s that were"
    rows = values["text" if role is Role.TEXT else "all"]
    shares: Mapping[str, float] = formula.get("streamed", {})
    layer, block = shares.get("layer", 1.0), shares.get("block", 1.0)
    return Estimate(round(nbytes), formula["error_percent"], how, known, name, round(rows), layer, block)


def variables(
    formula: Mapping[str, Any], sizes: Mapping[str, int], shape: RunShape, dtype_nbytes: int
) -> dict[str, float]:
    """The values that a formula's products name.

    `image` and `text` are tokens (or latent values of a U-Net) of the whole batch, `pixels` are those decoded,
    `picture` those of one frame, `window` those decoded at once.
    """
    geometry = formula["geometry"]
    batch = shape.batch * (2 if shape.cfg > 1 and geometry.get("guided", True) else 1)
    spatial = sizes.get("spatial") or geometry["spatial"]
    temporal = geometry.get("temporal", 1)
    columns, rows = math.ceil(shape.width / spatial), math.ceil(shape.height / spatial)
    frames = (shape.frames - 1) // temporal + 1
    text = shape.text_tokens or geometry["text_tokens"]
    values: dict[str, float] = {
        "batch": batch,
        "image": batch * columns * rows * frames,
        "text": batch * text,
        "all": batch * (columns * rows * frames + text),
        "square": batch * text * text,
        "pixels": shape.batch * shape.width * shape.height * shape.frames,
        "picture": shape.batch * shape.width * shape.height,
        "window": shape.batch * shape.width * shape.height * min(shape.frames, geometry.get("window", shape.frames)),
        "dtype": dtype_nbytes,
    }
    return {**values, **sizes}


def peak(formula: Mapping[str, Any], values: Mapping[str, float]) -> float:
    """Bytes: the largest of the formula's sums."""
    return max(_sum(terms, values) for terms in formula["moments"])


def _sum(terms: Mapping[str, float], values: Mapping[str, float]) -> float:
    return sum(c * product(name, values) for name, c in terms.items())


def product(name: str, values: Mapping[str, float]) -> float:
    """The value of `image*width*dtype`."""
    return math.prod(values[part] for part in name.split("*")) if name != "one" else 1.0


def is_of_images(name: str) -> bool:
    """Whether a formula is that of a model which makes single images; False where it is not known."""
    return (
        name in load_formulas() and not name.startswith("any") and "temporal" not in load_formulas()[name]["geometry"]
    )


@cache
def load_formulas() -> dict[str, Any]:
    """Formula name -> title, geometry, moments, error and number of points, as the benchmark wrote them."""
    return json.loads(DATA.read_text(encoding="utf-8"))["formulas"]
