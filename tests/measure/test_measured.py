"""The stored measurements: that every format is in them, and how they rank."""

from __future__ import annotations

import json
import math

import pytest
from quantwire.quantizers.compat.modes import HostName
from quantwire.quantizers.measure import measured
from quantwire.quantizers.measure.measured import Quality, all_measured, quality, ranked, spread_db, trimmed
from quantwire.quantizers.measure.native import parse_device, running
from quantwire.quantizers.measure.parts import Role
from quantwire.quantizers.registry import format_ids, is_format

K_QUANTS = ["gguf-q8-0", "gguf-q6-k", "gguf-q5-k", "gguf-q4-k", "gguf-q3-k", "gguf-q2-k"]


def test_every_format_that_can_be_made_was_measured() -> None:
    assert set(all_measured()) == set(format_ids())
    for format_id, found in all_measured().items():
        assert found.measured, format_id
        assert found.psnr_db is not None, format_id
        assert found.sqnr_db is not None, format_id
        assert found.library, format_id


@pytest.mark.parametrize("role", [Role.DIFFUSION, Role.TEXT])
def test_more_bits_of_one_kind_are_better(role: Role) -> None:
    assert ranked(reversed(K_QUANTS), role) == K_QUANTS


def test_errors_of_layers_that_stayed_do_not_count() -> None:
    found = quality("gguf-q4-k")  # 30 of 36 layers of the text encoder stayed at full precision
    assert found.text_left
    assert found.cosine_error is not None
    assert found.output_db(Role.TEXT) is None
    whole = quality("gguf-q4-0")
    assert whole.output_db(Role.TEXT) == pytest.approx(-20 * math.log10(whole.cosine_error or 0))
    # Its cosine error would place it above formats of 6 bits.
    assert ranked(["gguf-q4-k", "gguf-q6-k", "sdnq-uint6"], Role.TEXT)[-1] == "gguf-q4-k"


def test_loss_is_the_score_as_an_error() -> None:
    found = quality("bnb-nf4")
    score, loss = found.score_db(), found.loss()
    assert score is not None
    assert loss == pytest.approx(10 ** (-score / 20))
    assert 0 < spread_db() < spread_db(Role.TEXT) < 20 * math.log10(2)


def test_a_format_that_was_never_measured_says_so_and_is_last() -> None:
    assert is_format("sdnq-uint7")
    found = quality("sdnq-uint7")
    assert not found.measured
    assert found.score_db() is None
    assert found.loss() is None
    assert str(found) == "never measured"
    assert ranked(["sdnq-uint7", "gguf-tq1-0"]) == ["gguf-tq1-0", "sdnq-uint7"]


def test_rounded_activations_cost_what_was_measured() -> None:
    found = quality("comfy-w4a4-convrot")
    assert found.psnr_db is not None
    assert found.rounding_db("int4") == pytest.approx(found.psnr_db - found.rounded["int4"])
    assert found.rounding_db("int4") > found.rounding_db("int8")
    assert found.rounding_db("") == 0
    score, plain = found.score_db(activations="int4"), found.score_db()
    assert score is not None
    assert plain is not None
    assert plain - score == pytest.approx(found.rounding_db("int4"))


@pytest.mark.parametrize("where", ["cuda:7.5", "cuda:8.6", "cuda:8.9", "cuda:9.0", "cuda:12.0", "rocm", "cpu"])
def test_what_native_products_of_comfyui_round_was_measured(where: str) -> None:
    for format_id in (f for f in format_ids() if f.startswith("comfy-")):
        how = running(format_id, parse_device(where, 1), HostName.COMFYUI)
        assert not how.activations or how.activations in quality(format_id).rounded, format_id


def test_a_run_is_trimmed_to_what_is_read() -> None:
    row = {"format": "gguf-q8-0", "library": "x 1", "digits": None, "sentences": None}
    digits = {"sqnr_db": 46.70001, "psnr_db": None, "accuracy": 1.0, "sampling_ratio": 1.2, "mib": 3.0}
    text = {"cosine_error_mean": 0.00012345, "cosine_error_max": 0.1, "layers_left": 2}
    machine = {"torch": "2", "system": "Linux", "cores": 2, "instruction_sets": ["AVX2"]}
    run = {"command": "c", "prompts": 2, "images_a_prompt": 3, "machine": machine}
    data = trimmed({**run, "rows": [row | {"digits": digits, "sentences": text}, {"format": "x", "library": ""}]})
    (found,) = (Quality(name, **values) for name, values in data["formats"].items())
    assert found == Quality("gguf-q8-0", 46.7, None, 1.0, 0.000123, 0.1, 2, 1.2, "x 1")
    assert data["pictures"] == 6
    stored = json.loads(measured.DATA.read_text(encoding="utf-8"))
    assert stored.keys() == data.keys()
    assert stored["pictures"] == 200
