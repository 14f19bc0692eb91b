"""Real files of libraries with one tensor of another size or dtype: each is found by the header alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from file_makers import Model
from file_types import TYPES
from quantwire.quantizers.files.doctor import Severity, diagnose
from quantwire.quantizers.files.model_file import open_model
from quantwire.quantizers.files.schemes.scan import scan
from scheme_files import edited
from torch import Tensor

KINDS = {kind.id: kind for kind in TYPES}


def halved(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1)[: tensor.numel() // 2].clone()


def wide(tensor: Tensor) -> Tensor:
    return tensor.float()


CASES: tuple[tuple[str, str, Callable[[Tensor], Tensor] | None], ...] = (
    ("quanto-qint4", "qdata", halved),
    ("sdnq-int8", "qdata", None),
    ("sdnq-uint4", "scale", halved),
    ("sdnq-uint4", "zero_point", halved),
    ("torchao-int8wo", "qdata", halved),
    ("torchao-int8wo", "zero_point", wide),
    ("torchao-float8wo", "qdata", halved),
    ("compressed-tensors-int8", "qdata", halved),
    ("compressed-tensors-int8", "qdata", wide),
    ("compressed-tensors-int8", "scale", halved),
    ("comfy-w4a8", "codebook", lambda tensor: tensor.int()),
)


@pytest.fixture(scope="module")
def made(demo_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    model = Model(demo_models / "diffusion_models" / "digits_flux.safetensors", tmp_path_factory.mktemp("model"))
    held: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in held:
            held[kind] = KINDS[kind].make(model, tmp_path_factory.mktemp(kind))
        return held[kind]

    return make


@pytest.mark.parametrize(
    ("kind", "role", "change"), CASES, ids=[f"{k}-{r}-{getattr(c, '__name__', 'gone')}" for k, r, c in CASES]
)
def test_one_layer_is_damaged(
    tmp_path: Path, made: Callable[[str], Path], kind: str, role: str, change: Callable[[Tensor], Tensor] | None
) -> None:
    sound = made(kind)
    assert diagnose(sound).worst in (None, Severity.NOTE)
    name = next(iter(scan(open_model(sound)).layers.values())).tensors[role]
    weights = sound if sound.is_file() else next(sound.glob("*.safetensors"))

    def damage(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        tensor = tensors.pop(name)
        if change is not None:
            tensors[name] = change(tensor)

    bad = tmp_path / weights.name
    if sound.is_dir():
        shutil.copytree(sound, tmp_path / "x")
        bad = tmp_path / "x" / weights.name
    edited(weights, bad, damage)
    found = diagnose(bad.parent if sound.is_dir() else bad)
    assert found.worst in (Severity.ERROR, Severity.WARNING), found
