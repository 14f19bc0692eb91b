"""The text encoders and VAE that a family of diffusion models is usually run with, where no file of them was given.

Names and shapes are those of the published models, recorded by `benchmarks/assumed.py` from transformers' and
diffusers' own classes and the models' configurations. They count only where the diffusion model takes text of the width
that these encoders give: FLUX.2 has FLUX.1's blocks and another encoder.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..plan import Slot
from ..weight import TensorMeta
from .parts import ModelPart, Role

DATA = Path(__file__).with_name("assumed.json")


def with_assumed(parts: Sequence[ModelPart]) -> tuple[list[ModelPart], list[str]]:
    """The parts and what is assumed beside them, and what to say of it."""
    model = next((p for p in parts if p.role is Role.DIFFUSION), None)
    if model is None:
        return list(parts), []
    missing = [role for role in (Role.TEXT, Role.VAE) if not any(p.role is role for p in parts)]
    if not missing:
        return list(parts), []
    usual = usual_parts(model)
    found = [p for p in usual if p.role in missing]
    notes: list[str] = []
    for role in missing:
        names = [p.source for p in found if p.role is role]
        kind = "text encoders" if role is Role.TEXT else "VAE"
        if names:
            notes.append(f"{kind}: none given, so those usual for {model.family} are assumed: {', '.join(names)}")
        else:
            what = f"which are usual for this {model.family or 'unknown'} model is not known here"
            notes.append(f"{kind}: none given, and {what}: not counted")
    return [*parts, *found], notes


def usual_parts(model: ModelPart) -> tuple[ModelPart, ...]:
    """Text encoders and VAE that a diffusion model is usually run with; empty where that is not known."""
    rows: list[dict[str, Any]] = _data()["families"].get(model.family, [])
    for row in rows:
        pattern = re.compile(row["takes"])
        widths = {s.meta.shape[1] for s in model.slots if len(s.meta.shape) == 2 and pattern.search(s.meta.name)}
        if row["width"] in widths:
            return tuple(_part(name) for name in row["parts"])
    return ()


@functools.cache
def _part(name: str) -> ModelPart:
    import torch

    row = _data()["parts"][name]
    dtype = getattr(torch, row["dtype"])
    slots = tuple(
        Slot(TensorMeta(each, tuple(shape), dtype), linear)
        for written, (linear, shape) in row["tensors"].items()
        for each in _named(written)
    )
    nbytes = sum(s.meta.nbytes for s in slots)
    return ModelPart(name, Role(row["role"]), row["family"], slots, nbytes, row["title"], assumed=True)


def _named(written: str) -> list[str]:
    """`layers.{3}.weight` stands for three names."""
    match = re.search(r"\{(\d+)\}", written)
    if match is None:
        return [written]
    return [f"{written[: match.start()]}{i}{written[match.end() :]}" for i in range(int(match[1]))]


@functools.cache
def _data() -> dict[str, Any]:
    return json.loads(DATA.read_text(encoding="utf-8"))
