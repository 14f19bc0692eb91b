"""What `quantwire fit` chooses: the search by itself, and over forecasts of the demo model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from quantwire.quantizers.compat.modes import HostName, VerdictLevel
from quantwire.quantizers.errors import SpecError
from quantwire.quantizers.measure.activations import RunShape
from quantwire.quantizers.measure.fit import Candidate, Outcome, Prefer, choose
from quantwire.quantizers.measure.fitted import RECIPE, Fit, candidates, fit
from quantwire.quantizers.measure.native import parse_device
from quantwire.quantizers.measure.parts import ModelPart, Role, parts_of_file
from quantwire.quantizers.plan import Slot
from quantwire.quantizers.rules import RuleSet, parse_rules
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import TensorMeta

SMALL = RunShape(64, 64)
RESERVE = 1 << 28  # what a device keeps back at least
MIB, GIB = 1 << 20, 1 << 30


def part(name: str, role: Role, rows: int = 1 << 22) -> ModelPart:
    slots = (Slot(TensorMeta("blocks.0.attn.qkv.weight", (rows, 1024), torch.bfloat16), True),)
    return ModelPart(name, role, "", slots, slots[0].meta.nbytes, f"{name}.safetensors")


MODEL, TEXT = part("model", Role.DIFFUSION), part("text", Role.TEXT, 1 << 21)
FULL = Candidate(None)
INT8 = Candidate(QuantSpec("quanto-qint8"), 0.004, 8, native=False)
NATIVE8 = Candidate(QuantSpec("bnb-int8"), 0.007, 8, native=True)
FP8 = Candidate(QuantSpec("comfy-fp8-e4m3fn"), 0.03, 8, native=True)
NF4 = Candidate(QuantSpec("bnb-nf4"), 0.1, 4, native=False)
QINT2 = Candidate(QuantSpec("quanto-qint2"), 0.5, 2, native=False)
WAYS = [QINT2, NF4, FP8, NATIVE8, INT8, FULL]


def within(nbytes: int, streaming: int = 0, parts: tuple[ModelPart, ...] = (MODEL,)):
    """A device of so many bytes, which can run models of `streaming` bytes more by copying what does not fit."""

    def trial(specs: Mapping[str, QuantSpec]) -> Outcome:
        peak = sum(p.nbytes(specs.get(p.name)) for p in parts)
        streams = peak > nbytes
        copied = max(0, peak - nbytes)
        mode = "partial" if streams else "none"
        return Outcome(peak <= nbytes + streaming, mode, streams, peak, "sampling", streamed=copied)

    return trial


def names(*parts: ModelPart, ways: list[Candidate] = WAYS, **limits: int) -> list[str]:
    found = choose(parts, {p.name: ways for p in parts}, within(parts=parts, **limits))
    return [pick.candidate.name for pick in found.picks]


def test_full_precision_where_it_fits() -> None:
    assert names(MODEL, nbytes=8 * GIB) == ["as it is"]


def test_of_equals_the_native_one() -> None:
    """0.007 is less than twice 0.004; fp8, native too, is not its equal."""
    assert names(MODEL, nbytes=8 * GIB - 1) == ["bnb-int8"]
    usual = Candidate(QuantSpec("gguf-q8-0"), 0.0035, 8.5, native=False)
    assert names(MODEL, nbytes=8 * GIB - 1, ways=[usual, INT8]) == ["gguf-q8-0"], "of two emulated the better one"
    assert names(MODEL, nbytes=8 * GIB - 1, ways=[NF4, FP8, INT8]) == ["quanto-qint8"]


def test_quality_before_speed_down_to_four_bits() -> None:
    assert names(MODEL, nbytes=3 * GIB, streaming=100 * GIB) == ["bnb-nf4"]


def test_streams_the_smallest_rather_than_take_fewer_bits() -> None:
    assert names(MODEL, nbytes=2 * GIB, streaming=100 * GIB) == ["bnb-nf4"]


def test_of_what_streams_about_as_much_the_better_one() -> None:
    """gguf-q4-0 copies 0.25 GiB more than the smallest and loses less; 8 bits copy 2 GiB more."""
    q40 = Candidate(QuantSpec("gguf-q4-0"), 0.07, 4.5, native=False)
    ways = [NF4, q40, INT8, FULL]
    found = choose([MODEL], {"model": ways}, within(GIB, 100 * GIB))
    assert found.model.candidate is q40
    assert "at most 512.0 MiB more than the least" in found.model.why


def test_a_slow_library_is_asked_only_where_it_may_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    nbytes = ModelPart.nbytes
    monkeypatch.setattr(
        ModelPart, "nbytes", lambda self, spec: (asked.append(spec.format_id if spec else ""), nbytes(self, spec))[1]
    )
    slow = Candidate(QuantSpec("gguf-q5-1"), 0.02, 6, native=False, slow=True)
    names(MODEL, nbytes=8 * GIB, ways=[FULL, INT8, slow, NF4])
    assert "gguf-q5-1" not in asked
    assert names(MODEL, nbytes=4 * GIB - 1, ways=[FULL, INT8, slow, NF4]) == ["gguf-q5-1"]


def test_prefer_quality_streams_what_loses_nothing() -> None:
    found = choose([MODEL], {"model": WAYS}, within(2 * GIB, 100 * GIB), Prefer.QUALITY)
    assert (found.model.candidate, found.outcome.streams) == (FULL, True)


def test_few_bits_only_where_nothing_else_runs() -> None:
    assert names(MODEL, nbytes=2 * GIB) == ["quanto-qint2"]


def test_the_model_comes_before_what_reads_the_prompt() -> None:
    """12 GiB hold one of them whole; the other gets the best that is left."""
    assert names(MODEL, TEXT, nbytes=11 * GIB) == ["as it is", "bnb-int8"]


def test_nothing_fits() -> None:
    with pytest.raises(SpecError, match=r"Nothing fits [^\n]*\n[^\n]*quanto-qint2[^\n]*\nMake the image smaller"):
        names(MODEL, nbytes=GIB // 2)


@pytest.mark.parametrize(
    ("stage", "kind", "said"),
    [
        ("decoding", "cuda", "VAEDecodeTiled"),
        ("text encoding", "cuda", "run text encoders on the CPU"),
        ("text encoding", "cpu", "close what else takes memory"),
    ],
)
def test_what_helps_is_of_the_stage_and_the_device(stage: str, kind: str, said: str) -> None:
    def trial(specs: Mapping[str, QuantSpec]) -> Outcome:
        return Outcome(False, "none", False, 9 * GIB, stage)

    with pytest.raises(SpecError) as told:
        choose([MODEL, TEXT], {"model": WAYS}, trial, Prefer.BALANCED, 8 * GIB, kind)
    assert said in str(told.value)
    assert ("on the CPU" in str(told.value)) is (stage == "text encoding" and kind != "cpu")
    assert max(map(len, str(told.value).splitlines())) <= 110


def test_no_diffusion_model() -> None:
    with pytest.raises(SpecError, match=r"no diffusion model.*text \(text encoder\)"):
        names(TEXT, nbytes=GIB)


@pytest.fixture(scope="module")
def demo(demo_models: Path) -> list[ModelPart]:
    files = ("diffusion_models/digits_flux", "text_encoders/digits_clip", "vae/digits_tae")
    return [p for name in files for p in parts_of_file(demo_models / f"{name}.safetensors")]


def fitted(parts: list[ModelPart], nbytes: int, host: HostName = HostName.STANDALONE, device: str = "cpu") -> Fit:
    return fit(parts, parse_device(device, RESERVE + nbytes), host, SMALL)


@pytest.mark.parametrize(
    ("host", "device"),
    [
        pytest.param(HostName.COMFYUI, "cuda:8.6", marks=pytest.mark.slow),
        (HostName.STANDALONE, "cuda:8.9"),
        (HostName.STANDALONE, "cpu"),
    ],
)
def test_less_memory_never_gives_more_quality(demo: list[ModelPart], host: HostName, device: str) -> None:
    whole = fitted(demo, 1 << 30, host, device)
    assert whole.choice.model.candidate.spec is None
    losses: list[float] = []
    for nbytes in (whole.choice.outcome.peak_nbytes - MIB, whole.choice.outcome.peak_nbytes - 3 * MIB):
        found = fitted(demo, nbytes, host, device)
        mode = next(m for m in found.found.modes if m.mode.value == found.mode)
        assert mode.fits
        assert mode.level is not VerdictLevel.BLOCK
        assert mode.streams or mode.peak + mode.error_nbytes <= nbytes
        losses.append(found.choice.model.candidate.loss)
        assert max(map(len, str(found).splitlines())) <= 120
    assert losses[0] <= 2 * losses[1], "no better than what counts as equal"


def test_the_answer_says_why_and_how(demo: list[ModelPart]) -> None:
    peak = fitted(demo, 1 << 30).choice.outcome.peak_nbytes
    found = fitted(demo, peak - MIB)
    model = found.choice.model
    assert model.candidate.spec is not None
    text = str(found)
    assert f"full precision ({12.0} MiB) does not fit" in text
    assert f"LoadAndQuantize with format {model.candidate.name}" in text
    data = found.to_dict()
    assert data["picks"][0]["format"] == model.candidate.spec.format_id
    assert data["picks"][0]["nbytes"] == model.part.nbytes(model.candidate.spec)
    assert data["expected_peak_nbytes"] <= peak - MIB


@pytest.mark.slow
def test_a_linked_recipe_is_taken_where_it_fits(demo: list[ModelPart]) -> None:
    rules = RuleSet(parse_rules("double_blocks = quanto-qint8\nsingle_blocks = bnb-nf4"))
    device = parse_device("cpu", 1 << 30)
    found = fit(demo, device, HostName.STANDALONE, SMALL, config=rules)
    assert found.choice.model.candidate.name == RECIPE
    plan = found.choice.model.part.plan(found.choice.specs()["transformer"])
    assert set(plan.format_ids) == {"quanto-qint8", "bnb-nf4"}
    keep = fit(demo, parse_device("cpu", RESERVE + 10 * MIB), HostName.STANDALONE, SMALL, config=rules)
    assert keep.choice.model.candidate.name != RECIPE
    assert "linked recipe was not taken" in keep.warnings[0]


def test_a_recipe_that_does_not_run_there_is_not_taken(demo: list[ModelPart]) -> None:
    device, recipe = parse_device("mps", 1 << 33), QuantSpec("comfy-fp8-e4m3fn")
    found = fit(demo, device, HostName.COMFYUI, SMALL, config=recipe)
    assert found.choice.model.candidate.name != RECIPE
    assert "comfy-fp8-e4m3fn does not run on Apple GPU" in found.warnings[0]
    json.dumps(found.to_dict(), allow_nan=False)


def test_guidance_is_counted_and_said(demo: list[ModelPart]) -> None:
    device = parse_device("cuda:8.6", 1 << 33)
    one, two = (fit(demo, device, HostName.COMFYUI, RunShape(512, 512, cfg=cfg)) for cfg in (1.0, 5.0))
    peaks = [next(s.peak for s in f.found.modes[0].stages if s.name == "sampling") for f in (one, two)]
    assert peaks[1] > peaks[0]
    assert "cfg 5" in str(two).splitlines()[0]


def test_quantized_already_stays_and_tells_what_else(demo: list[ModelPart]) -> None:
    import dataclasses

    model = demo[0]
    held = dataclasses.replace(model, formats={"bnb-nf4": 29}, held_nbytes=model.nbytes(QuantSpec("bnb-nf4")))
    found = fitted([held, *demo[1:]], 1 << 30)
    assert found.choice.model.candidate.spec is None
    assert "quantized already (bnb-nf4)" in str(found)
    assert "from a full-precision file: it would fit as it is" in str(found)


def flux1() -> ModelPart:
    """FLUX.1 dev as published: 11.9 B parameters, 22.2 GiB, from the shapes of its layers."""
    h, shapes = 3072, {"img_in": (3072, 64), "txt_in": (3072, 4096)}
    for name, k in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        shapes |= {f"{name}.in_layer": (h, k), f"{name}.out_layer": (h, h)}
    for i in range(19):
        for side in ("img", "txt"):
            block = f"double_blocks.{i}.{side}"
            shapes |= {f"{block}_mod.lin": (6 * h, h), f"{block}_attn.qkv": (3 * h, h), f"{block}_attn.proj": (h, h)}
            shapes |= {f"{block}_mlp.0": (4 * h, h), f"{block}_mlp.2": (h, 4 * h)}
    for i in range(38):
        block = f"single_blocks.{i}"
        shapes |= {
            f"{block}.linear1": (7 * h, h),
            f"{block}.linear2": (h, 5 * h),
            f"{block}.modulation.lin": (3 * h, h),
        }
    shapes |= {"final_layer.linear": (64, h), "final_layer.adaLN_modulation.1": (2 * h, h)}
    slots = tuple(Slot(TensorMeta(f"{n}.weight", s, torch.bfloat16), True) for n, s in shapes.items())
    nbytes = sum(s.meta.nbytes for s in slots)
    return ModelPart("transformer", Role.DIFFUSION, "flux", slots, nbytes, "flux1-dev.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("host", HostName)
@pytest.mark.parametrize(("vram", "bits"), [("8", 4.0), ("12", 6.0), ("16", 8.0), ("32", 16.0)])
def test_flux_on_cards_as_they_are_sold(host: HostName, vram: str, bits: float) -> None:
    """With its usual text encoders and VAE, at 1024 x 1024, no card streams weights at every step."""
    found = fit([flux1()], parse_device("cuda:8.6", int(vram) << 30), host, RunShape())
    assert not found.choice.outcome.streams
    assert found.choice.model.candidate.bits >= bits
    assert found.choice.outcome.peak_nbytes < int(vram) << 30


def test_candidates_lose_what_was_measured(demo: list[ModelPart]) -> None:
    from quantwire.quantizers.measure.measured import quality

    found = {c.name: c for c in candidates(demo[0], parse_device("cuda:8.9", 1 << 33), HostName.COMFYUI)}
    assert found["comfy-fp8-e4m3fn"].native
    assert not found["bnb-nf4"].native
    assert found["bnb-nf4"].loss == quality("bnb-nf4").loss(Role.DIFFUSION)
    fp8 = quality("comfy-fp8-e4m3fn")
    assert found["comfy-fp8-e4m3fn"].loss == fp8.loss(Role.DIFFUSION, "fp8") > fp8.loss(Role.DIFFUSION)
    assert found["as it is"].loss == 0
    assert [c.name for c in candidates(demo[2], parse_device("cpu", 1 << 33), HostName.COMFYUI)] == ["as it is"]
