"""What the notes of the templates advise and count: formats that the model takes, sizes of published files."""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from quantwire.quantizers.measure.assumed import usual_parts
from quantwire.quantizers.measure.parts import ModelPart
from quantwire.quantizers.registry import format_ids
from quantwire.quantizers.spec import QuantSpec
from quantwire.workflows import ace_step, build, memory
from quantwire.workflows.published import NBYTES, as_published

FOLDER = Path(build.__file__).parent
# Whose model has the shapes of the one that the template opens.
SHAPES = {**{name: name for name in memory.CASES}, "convert_a_file": "flux_nf4", "low_vram_offload_compat": "flux_nf4"}
STAYS = "full precision"  # of `on_failure`: what a format cannot take is no error
ADVISED = {w.name: sorted({f for f in re.findall(r"`([^`]+)`", w.note) if f in format_ids()}) for w in build.TEMPLATES}


@functools.cache
def model_of(case: str) -> ModelPart:
    return memory.model_part(memory.CASES[case])


def refusals(name: str, format_id: str) -> list[str]:
    plan = model_of(SHAPES[name]).plan(QuantSpec(format_id))
    assert plan.to_quantize, f"{format_id} takes no layer of {name}"
    return [d.reason for d in plan.refused]


def nodes_of(name: str) -> list[dict[str, Any]]:
    return list(json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8")).values())


def stays(name: str, format_id: str) -> bool:
    """Whether the graph goes on where this format refuses a layer."""
    asked = [n["inputs"] for n in nodes_of(name) if n["inputs"].get("format") == format_id]
    return bool(asked) and all(inputs.get("on_failure") == STAYS for inputs in asked)


def test_every_template_has_shapes() -> None:
    assert set(SHAPES) == {w.name for w in build.TEMPLATES}
    assert sum(map(len, ADVISED.values())) >= 9


@pytest.mark.parametrize(("name", "format_id"), [(n, f) for n, formats in ADVISED.items() for f in formats])
def test_model_takes_the_format_that_its_note_names(name: str, format_id: str) -> None:
    refused = refusals(name, format_id)
    assert not refused or stays(name, format_id), f"{len(refused)} layers: {refused[0]}"


@pytest.mark.parametrize("name", SHAPES)
def test_model_takes_the_format_of_its_graph(name: str) -> None:
    kinds = ("QuantizeModel", "LoadAndQuantize")
    for node in nodes_of(name):
        if node["class_type"] in kinds:
            format_id = node["inputs"]["format"]
            refused = refusals(name, format_id)
            assert not refused or node["inputs"]["on_failure"] == STAYS, (format_id, refused[0])
        if node["class_type"] == "QuantizeTextEncoder":
            encoder = part_of(SHAPES[name], node["inputs"]["encoders"])
            assert not encoder.plan(QuantSpec(node["inputs"]["format"])).refused


def test_a_refusal_would_be_seen() -> None:
    """SD3.5 Large has rows of 2,432, no multiple of 256; SDXL's template says of its refusals that layers stay."""
    assert "2432 is not a multiple" in refusals("sd35_int8", "gguf-q4-k")[0]
    assert not stays("sd35_int8", "comfy-int8")
    assert refusals("sdxl_int8_convrot", "comfy-int8-convrot")


# --- sizes ---------------------------------------------------------------------------------------------------------

OPENED = {
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors": ("wan_q4_k", "umt5xxl"),
    "qwen_2.5_vl_7b_fp8_scaled.safetensors": ("qwen_image_nvfp4", "qwen2.5vl"),
    "t5-v1_1-xxl-encoder-Q5_K_M.gguf": ("flux_gguf_t5_gguf", "t5xxl"),
    "flux1-dev-Q4_K_S.gguf": ("flux_gguf_t5_gguf", "transformer"),
}
WHOLE = {
    "t5xxl_fp16.safetensors": ("flux_nf4", "t5xxl"),
    "clip_l.safetensors": ("flux_nf4", "clip_l"),
    "clip_g.safetensors": ("sd35_int8", "clip_g"),
    "flux1-dev.safetensors": ("flux_nf4", "transformer"),
    "acestep_v1.5_turbo.safetensors": ("audio_int8", "transformer"),
}


def part_of(case: str, name: str) -> ModelPart:
    model = model_of(case)
    return next(p for p in (model, *usual_parts(model)) if p.name == name)


def test_every_file_that_a_template_opens_quantized_is_counted() -> None:
    assert {(c, p) for c, case in memory.CASES.items() for p in case.opened} == set(OPENED.values())
    assert {*OPENED, *WHOLE} == set(NBYTES)
    names = {f.name for w in build.TEMPLATES for f in w.files}
    assert set(NBYTES) <= names
    assert {n for n in names if "fp8" in n or n.endswith(".gguf")} == set(OPENED)


@pytest.mark.parametrize("file", OPENED)
def test_layout_takes_what_the_published_file_takes(file: str) -> None:
    """Half a percent is left for headers, tokenizers inside, small tensors at 32 bits, and a size known to 0.1 %."""
    case, name = OPENED[file]
    part = as_published(part_of(case, name), memory.CASES[case].opened[name])
    assert part.held_nbytes == pytest.approx(NBYTES[file], rel=0.005)
    assert part.held_nbytes < part.full_nbytes
    assert part.formats


@pytest.mark.parametrize("file", WHOLE)
def test_shapes_take_what_the_published_file_takes(file: str) -> None:
    """T5's file has its table under two names."""
    twice = 2 * 32128 * 4096 if file.startswith("t5xxl") else 0
    assert part_of(*WHOLE[file]).full_nbytes + twice == pytest.approx(NBYTES[file], rel=0.001)


def test_pages_and_templates_agree_on_t5_in_gguf() -> None:
    row = re.search(r"^\| Q5_K_M \|.*\| ([\d.]+) \|$", (FOLDER.parent / "docs" / "gguf.md").read_text("utf-8"), re.M)
    assert row
    part = as_published(part_of("flux_nf4", "t5xxl"), "Q5_K_M")
    assert f"{part.held_nbytes / 2**30:.2f}" == row[1]


def test_ace_step_has_what_comfyui_builds() -> None:
    """Counted in ComfyUI 0.33.0; tests/comfyui compares the shapes."""
    rows = ace_step.tensors()
    assert len({name for name, _, _ in rows}) == len(rows) == 677
    assert sum(math.prod(shape) for _, shape, _ in rows) == 2_393_872_518
    assert model_of("audio_int8").family == "ace-step"


def test_sum_of_the_comparison_is_right() -> None:
    said = memory.read()["compare_three_formats"]
    *each, total = map(float, re.findall(r"([\d.]+) GiB", said))
    assert total == pytest.approx(sum(each), abs=0.03)
    assert len(each) == 5
