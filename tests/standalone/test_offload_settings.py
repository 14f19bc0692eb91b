"""What may be asked of offloading, and what is refused before a weight moves."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from offload_models import VARIANTS, tiny_flux
from quantwire.hosts.offload import OffloadSettings
from quantwire.hosts.standalone.offload import set_offload
from quantwire.hosts.standalone.offload.device import check_device
from quantwire.quantizers.compat.modes import HOST_MODES, HostName, OffloadMode
from quantwire.quantizers.compat.modes import VARIANTS as MATRIX
from quantwire.quantizers.errors import SpecError

GIB = 1 << 30
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "comfyui": ({"mode": "dynamic"}, "no offload mode 'dynamic'. It is a mode of ComfyUI"),
    "typo": ({"mode": "sequentiel"}, "Did you mean sequential"),
    "level": ({"mode": "group", "group_level": "row"}, "group_level must be block or leaf, got 'row'"),
    "place": ({"mode": "group", "keep_on": "tape"}, "keep_on must be memory or disk, got 'tape'"),
    "no-blocks": ({"mode": "group", "blocks_per_group": 0}, "at least 1, got 0"),
    "half-block": ({"mode": "group", "blocks_per_group": 1.5}, "whole number, got 1.5"),
    "true-blocks": ({"mode": "group", "blocks_per_group": True}, "whole number, got True"),
    "negative-size": ({"mode": "balanced", "device_gib": -1}, "device_gib must be 0"),
    "nan-size": ({"mode": "balanced", "device_gib": float("nan")}, "device_gib must be 0"),
    "crossed": ({"mode": "balanced", "low_watermark": 0.7, "high_watermark": 0.5}, "0.7 is above high_watermark 0.5"),
    "too-high": ({"mode": "balanced", "high_watermark": 1.5}, "shares in [0, 1] and (0, 1]"),
    "zero-high": ({"mode": "balanced", "low_watermark": 0, "high_watermark": 0}, "shares in [0, 1] and (0, 1]"),
    "model-disk": ({"mode": "model", "keep_on": "disk"}, "keep_on disk has no meaning with mode model"),
    "none-disk": ({"mode": "none", "keep_on": "disk"}, "keep_on disk has no meaning with mode none"),
    "stream": ({"mode": "sequential", "use_stream": True}, "use_stream has no meaning with mode sequential"),
    "stream-disk": ({"mode": "group", "use_stream": True, "keep_on": "disk"}, "copies from memory"),
    "stream-blocks": ({"mode": "group", "use_stream": True, "blocks_per_group": 3}, "one block at a time"),
    "size": ({"mode": "model", "device_gib": 8}, "device_gib 8 has no meaning with mode model"),
}


@pytest.mark.parametrize("given", WRONG)
def test_wrong_settings_are_refused(given: str) -> None:
    options, said = WRONG[given]
    with pytest.raises(SpecError) as caught:
        OffloadSettings(**options)
    assert said in str(caught.value).splitlines()[0]


def test_all_that_is_wrong_is_named() -> None:
    with pytest.raises(SpecError) as caught:
        OffloadSettings(OffloadMode.BALANCED, "row", 0, True, device_gib=-1, low_watermark=0.9)
    said = str(caught.value)
    for name in ("group_level must", "blocks_per_group must", "device_gib must", "low_watermark 0.9", "use_stream has"):
        assert name in said


def test_every_mode_of_the_host_can_be_asked_for_and_names_its_row() -> None:
    for mode in HOST_MODES[HostName.STANDALONE]:
        found = OffloadSettings(mode)
        assert OffloadSettings(mode.value) == found  # type: ignore[arg-type]
        assert found.variant is None if mode is OffloadMode.BALANCED else found.variant in MATRIX[mode]


def test_the_variants_tested_are_those_of_the_matrix() -> None:
    told = {(s.mode, s.variant) for s in VARIANTS.values() if s.variant is not None}
    streams = {(OffloadMode.GROUP, v) for v in ("block-stream", "leaf-stream")}
    named = {(m, v) for m in HOST_MODES[HostName.STANDALONE] for v in MATRIX[m] if m is not OffloadMode.BALANCED}
    assert told == named - streams
    assert {v.removeprefix("balanced-") for v in VARIANTS if v.startswith("balanced-")} == set(
        MATRIX[OffloadMode.BALANCED]
    )


@pytest.mark.parametrize("level", ["block", "leaf"])
def test_streams_are_refused_before_anything_runs_where_there_are_none(level: str) -> None:
    asked = OffloadSettings(OffloadMode.GROUP, group_level=level, use_stream=True)
    assert asked.variant == f"{level}-stream"
    with pytest.raises(SpecError, match="cpu has no streams") as caught:
        check_device(asked, torch.device("cpu"))
    assert "Turn use_stream off" in str(caught.value)
    check_device(asked, torch.device("cuda", 0))
    if not torch.accelerator.is_available():
        with pytest.raises(SpecError, match="cpu has no streams"):
            set_offload(tiny_flux(), asked)


def test_what_is_no_model_object_is_refused() -> None:
    with pytest.raises(SpecError, match="got Linear"):
        set_offload(torch.nn.Linear(2, 2), OffloadSettings(OffloadMode.MODEL))


@pytest.mark.parametrize(
    ("gib", "low", "high"), [(8, 0.0, 0.6), (12, 0.0, 0.6), (16, 0.2, 0.6), (24, 0.2, 0.8), (80, 0.2, 0.8)]
)
def test_watermarks_follow_the_size_of_the_device(gib: int, low: float, high: float) -> None:
    asked = OffloadSettings(OffloadMode.BALANCED)
    assert asked.low_nbytes(gib * GIB) == int(low * gib * GIB)
    assert asked.high_nbytes(gib * GIB) == int(high * gib * GIB)
    own = dataclasses.replace(asked, low_watermark=0.1, high_watermark=0.5)
    assert own.low_nbytes(gib * GIB) == int(0.1 * gib * GIB)
    assert own.high_nbytes(gib * GIB) == int(0.5 * gib * GIB)
