"""The memory forecast against what modules hold, kernels do and hosts place, and its verdicts."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.hosts.standalone.models import DiffusionModel, load_diffusion_model
from quantwire.hosts.standalone.offload.device import nbytes_of
from quantwire.quantizers.apply import OnFailure, quantize_linears
from quantwire.quantizers.auto import DeviceFacts
from quantwire.quantizers.compat.modes import Carrier, HostName, OffloadMode
from quantwire.quantizers.errors import SpecError
from quantwire.quantizers.measure import buffers
from quantwire.quantizers.measure.activations import RunShape
from quantwire.quantizers.measure.assumed import usual_parts, with_assumed
from quantwire.quantizers.measure.forecast import Forecast, forecast, modes_of
from quantwire.quantizers.measure.parts import ModelPart, Role, parts_of_file, parts_of_modules
from quantwire.quantizers.measure.stages import hold, split, watermarks
from quantwire.quantizers.overview import kernel_choices, rows
from quantwire.quantizers.plan import Slot
from quantwire.quantizers.registry import availability
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import TensorMeta

GIB = 2**30
SHAPE = RunShape(1024, 1024)


def gpu(gib: float) -> DeviceFacts:
    return DeviceFacts("cuda", "a GPU", int(gib * GIB), int(gib * GIB), (8, 6))


@pytest.fixture(scope="module")
def demo(demo_models: Path) -> tuple[ModelPart, ...]:
    names = ("diffusion_models/digits_flux", "text_encoders/digits_clip", "vae/digits_tae")
    return tuple(p for name in names for p in parts_of_file(demo_models / f"{name}.safetensors"))


@pytest.fixture(scope="module")
def model(demo_models: Path) -> DiffusionModel:
    return load_diffusion_model(demo_models / "diffusion_models" / "digits_flux.safetensors")


@pytest.fixture(scope="module")
def flux_dev() -> ModelPart:
    """FLUX.1 dev by its shapes: 11.9 B parameters."""
    h = 3072
    linear = {"img_in": (h, 64), "txt_in": (h, 4096), "final_layer.linear": (64, h)}
    linear |= {"final_layer.adaLN_modulation.1": (2 * h, h)}
    for name, k in (("time_in", 256), ("guidance_in", 256), ("vector_in", 768)):
        linear |= {f"{name}.in_layer": (h, k), f"{name}.out_layer": (h, h)}
    for i, side in itertools.product(range(19), ("img", "txt")):
        at = f"double_blocks.{i}.{side}"
        linear |= {f"{at}_mod.lin": (6 * h, h), f"{at}_attn.qkv": (3 * h, h), f"{at}_attn.proj": (h, h)}
        linear |= {f"{at}_mlp.0": (4 * h, h), f"{at}_mlp.2": (h, 4 * h)}
    for i in range(38):
        at = f"single_blocks.{i}"
        linear |= {f"{at}.linear1": (7 * h, h), f"{at}.linear2": (h, 5 * h), f"{at}.modulation.lin": (3 * h, h)}
    slots = [Slot(TensorMeta(f"{n}.weight", shape, torch.bfloat16), True) for n, shape in linear.items()]
    slots += [Slot(TensorMeta(f"{n}.bias", (shape[0],), torch.bfloat16), False) for n, shape in linear.items()]
    return ModelPart("transformer", Role.DIFFUSION, "flux", tuple(slots), sum(s.meta.nbytes for s in slots), "dev")


def mode_of(found: Forecast, mode: OffloadMode) -> Any:
    return next(m for m in found.modes if m.mode is mode)


@pytest.mark.parametrize("format_id", ["bnb-nf4", "gguf-q8-0", "quanto-qint4", "comfy-fp8-e4m3fn"])
def test_weights_are_those_of_the_modules(model: DiffusionModel, format_id: str) -> None:
    if not availability(format_id).works:
        pytest.skip(availability(format_id).reason)
    spec = QuantSpec(format_id)
    parts = parts_of_modules({"transformer": model.transformer}, Role.DIFFUSION, "demo")
    found = forecast(parts, {"transformer": spec}, RunShape(64, 64), gpu(8), HostName.STANDALONE, assume=False)
    layers, _ = quantize_linears(
        model.transformer, spec, carrier=Carrier.QUANTWIRE, on_failure=OnFailure.FULL_PRECISION
    )
    kept = {id(m) for n, m in model.transformer.named_modules() if n in layers}
    rest = sum(
        p.numel() * p.element_size()
        for m in model.transformer.modules()
        if id(m) not in kept
        for p in m.parameters(recurse=False)
    )
    assert found.nbytes == rest + sum(nbytes_of(layer) for layer in layers.values())


def test_file_and_module_agree(demo: tuple[ModelPart, ...], model: DiffusionModel) -> None:
    """Fused layers of the file are split as the module has them, so that the largest layer is the same."""
    parts = parts_of_modules({"transformer": model.transformer}, Role.DIFFUSION, "demo")
    peaks = [
        [(s.name, m.mode, s.weights, s.buffer) for m in found.modes for s in m.stages]
        for found in (
            forecast(p, {"transformer": QuantSpec("gguf-q8-0")}, SHAPE, gpu(8), HostName.STANDALONE, assume=False)
            for p in (parts, demo[:1])
        )
    ]
    assert peaks[0] == peaks[1]


def test_modes_take_less_the_more_they_move(flux_dev: ModelPart) -> None:
    found = forecast([flux_dev], {"transformer": QuantSpec("bnb-nf4")}, SHAPE, gpu(8), HostName.STANDALONE)
    peaks = {m.mode.value: m.peak for m in found.modes}
    assert list(peaks) == ["none", "model", "balanced", "group", "sequential"]
    sampling = [next(s.peak for s in m.stages if s.name == "sampling") for m in found.modes]
    assert sampling == sorted(sampling, reverse=True)
    weights = {h.part.name: h.nbytes for h in found.held}
    assert mode_of(found, OffloadMode.NONE).stages[0].weights == sum(weights.values())
    assert mode_of(found, OffloadMode.MODEL).stages[0].weights == weights["t5xxl"]
    assert mode_of(found, OffloadMode.MODEL).stages[1].weights == weights["transformer"]
    blocks: dict[str, int] = {}
    for d in flux_dev.plan(QuantSpec("bnb-nf4")).decisions:
        block = ".".join(d.meta.name.split(".")[:2]) if "_blocks." in d.meta.name else ""
        blocks[block] = blocks.get(block, 0) + d.nbytes_out
    assert mode_of(found, OffloadMode.GROUP).stages[1].weights == blocks.pop("") + max(blocks.values())
    high = watermarks(8 * GIB)[1]
    balanced = mode_of(found, OffloadMode.BALANCED).stages[1]
    assert 0.9 * high < balanced.weights <= high
    assert balanced.streamed == pytest.approx(weights["transformer"] - balanced.weights, rel=0.06)


@pytest.mark.parametrize(
    ("gib", "verdict"),
    [(24, "fits"), (12, "fits with mode model"), (8, "fits with mode balanced"), (1, "does not fit")],
)
def test_verdicts_of_flux(flux_dev: ModelPart, gib: float, verdict: str) -> None:
    found = forecast([flux_dev], {"transformer": QuantSpec("bnb-nf4")}, SHAPE, gpu(gib), HostName.STANDALONE)
    assert found.verdict == verdict
    assert str(found).startswith(verdict)
    assert max(map(len, str(found).splitlines())) <= 120
    assert found.fits == (found.best is not None) == any(m.fits for m in found.modes)
    if not found.fits:
        assert found.nearest.peak > found.room
        assert "needs least" in found.headline


def test_a_mode_that_would_break_the_weights_is_not_offered(flux_dev: ModelPart) -> None:
    """bitsandbytes' own 4-bit layers stop under sequential offload (see the compatibility table)."""
    specs = {"transformer": QuantSpec("bnb-nf4")}
    ours = forecast([flux_dev], specs, SHAPE, gpu(4), HostName.STANDALONE)
    theirs = forecast([flux_dev], specs, SHAPE, gpu(4), HostName.STANDALONE, carrier=Carrier.LIBRARY)
    assert mode_of(ours, OffloadMode.SEQUENTIAL).fits
    broken = mode_of(theirs, OffloadMode.SEQUENTIAL)
    assert not broken.offered
    assert not broken.fits
    assert broken.cause
    assert theirs.best is None or theirs.best.mode is not OffloadMode.SEQUENTIAL
    assert "breaks these weights" in str(theirs)


def test_comfyui_fills_what_is_free(flux_dev: ModelPart) -> None:
    found = forecast([flux_dev], {}, SHAPE, gpu(12), HostName.COMFYUI)
    assert [m.mode.value for m in found.modes] == ["dynamic", "partial", "novram", "none"]
    dynamic, partial = (mode_of(found, m).stages[1] for m in (OffloadMode.DYNAMIC, OffloadMode.PARTIAL))
    assert dynamic.peak == found.room
    assert partial.weights < dynamic.weights  # it keeps 1.2 GiB free
    assert dynamic.streamed > 0
    assert found.verdict == "fits with mode dynamic"
    assert forecast([flux_dev], {}, SHAPE, gpu(48), HostName.COMFYUI).verdict == "fits"
    assert OffloadMode.DYNAMIC not in modes_of(HostName.COMFYUI, "mps")


def test_a_cpu_has_one_mode(demo: tuple[ModelPart, ...]) -> None:
    cpu = DeviceFacts("cpu", "CPU", 8 * GIB, 8 * GIB)
    for host in HostName:
        found = forecast(demo, {}, RunShape(64, 64), cpu, host)
        assert [m.mode for m in found.modes] == [OffloadMode.NONE]
        assert any("CPU" in note for note in found.notes)


def test_loras_count(flux_dev: ModelPart) -> None:
    lora = 300 * 2**20
    for host, rises in ((HostName.STANDALONE, lora), (HostName.COMFYUI, 1)):
        without, with_lora = (
            forecast([flux_dev], {"transformer": QuantSpec("gguf-q8-0")}, SHAPE, gpu(48), host, n) for n in (0, lora)
        )
        peak = mode_of(with_lora, OffloadMode.NONE).stages[1].peak - mode_of(without, OffloadMode.NONE).stages[1].peak
        assert peak >= rises


def test_guidance_doubles_only_where_the_host_batches(flux_dev: ModelPart) -> None:
    def sampling(host: HostName, cfg: float) -> int:
        shape = RunShape(1024, 1024, cfg=cfg)
        return mode_of(forecast([flux_dev], {}, shape, gpu(48), host), OffloadMode.NONE).stages[1].activations

    assert sampling(HostName.STANDALONE, 7.0) == sampling(HostName.STANDALONE, 1.0)
    assert sampling(HostName.COMFYUI, 7.0) > 1.8 * sampling(HostName.COMFYUI, 1.0)
    small = forecast([flux_dev], {}, RunShape(1024, 1024, cfg=7.0), gpu(1), HostName.COMFYUI)
    assert small.modes[0].stages[1].activations == sampling(HostName.COMFYUI, 1.0)
    assert any("one after the other" in note for note in small.notes)


def test_tight_is_said(flux_dev: ModelPart) -> None:
    found = forecast([flux_dev], {}, SHAPE, gpu(64), HostName.STANDALONE)
    assert not found.tight
    best = found.best
    assert best is not None
    assert best.error_nbytes > 0
    exact = forecast([flux_dev], {}, SHAPE, DeviceFacts("cuda", "a GPU", best.peak + 2**28, 0), HostName.STANDALONE)
    assert exact.room == best.peak
    assert exact.best is not None
    assert exact.tight == (exact.best.mode is OffloadMode.NONE)
    assert ("tight" in exact.headline) == exact.tight


def test_assumed_parts_are_the_published_ones(flux_dev: ModelPart, demo: tuple[ModelPart, ...]) -> None:
    counts = {p.name: p.parameters for p in usual_parts(flux_dev)}
    # The models' own cards: 123 M, 4.76 B, 84 M.
    assert counts == {"clip_l": 123_060_480, "t5xxl": 4_762_310_656, "vae_kl16": 83_819_683}
    assert all(p.assumed for p in usual_parts(flux_dev))
    parts, notes = with_assumed(demo[:1])  # takes text 128 wide: not FLUX.1's encoders
    assert len(parts) == 1
    assert all("not counted" in note for note in notes)
    given, notes = with_assumed([flux_dev, demo[1]])
    assert [p.name for p in given] == ["transformer", demo[1].name, "vae_kl16"]
    assert len(notes) == 1


def test_a_controlnet_stands_beside_its_model(flux_dev: ModelPart) -> None:
    net = replace(flux_dev, name="net", role=Role.CONTROLNET, slots=flux_dev.slots[:200])
    net = replace(net, held_nbytes=net.full_nbytes)
    for mode in (OffloadMode.NONE, OffloadMode.MODEL):
        alone, both = (
            mode_of(forecast(parts, {}, SHAPE, gpu(64), HostName.STANDALONE), mode).stages[1].weights
            for parts in ([flux_dev], [flux_dev, net])
        )
        assert both == alone + net.held_nbytes


def test_a_part_that_is_not_there_is_named(flux_dev: ModelPart) -> None:
    with pytest.raises(SpecError, match="no part 't5'"):
        forecast([flux_dev], {"t5": QuantSpec("bnb-nf4")}, SHAPE, gpu(8), HostName.STANDALONE)
    with pytest.raises(SpecError, match="no component"):
        forecast([], {}, SHAPE, gpu(8), HostName.STANDALONE)


def test_json_holds_the_verdict(demo: tuple[ModelPart, ...]) -> None:
    found = forecast(demo, {"transformer": QuantSpec("gguf-q4-k")}, RunShape(64, 64), gpu(8), HostName.STANDALONE)
    data = found.to_dict()
    assert data["verdict"] == "fits"
    assert data["weights_nbytes"] == sum(p["nbytes"] for p in data["parts"])
    assert data["modes"][0]["peak_nbytes"] == max(s["peak_nbytes"] for s in data["modes"][0]["stages"])


@pytest.mark.parametrize(
    ("format_id", "rows", "capability", "nbytes"),
    [
        ("bnb-nf4", 4096, (8, 6), 2_000_000),
        ("bnb-nf4", 4, (8, 6), 0),
        ("bnb-int8", 4096, (8, 6), 0),
        ("bnb-int8", 4096, (7, 0), 4_000_000),
        ("quanto-qint8", 4096, None, 2_000_000),
        ("quanto-qfloat8-e4m3fn", 4096, None, 4_000_000),
        ("gguf-q4-k", 128, (8, 6), 0),
        ("gguf-q4-k", 4096, (8, 6), 2_000_000),
        ("gguf-q5-1", 4096, (8, 6), 8_000_000),
    ],
)
def test_what_cuda_unpacks(format_id: str, rows: int, capability: tuple[int, int] | None, nbytes: int) -> None:
    """As the libraries' sources say, see `native_rules`; bytes for a million values of 16 bits."""
    layer = buffers.Layer("x", "", 0, 0, format_id, 1000 * 1000)
    assert buffers.unpacked_nbytes(layer, "cuda", 2, rows, capability) == nbytes


@pytest.mark.parametrize("share", [0.3, 0.5, 0.62, 0.75, 0.97])
def test_balanced_splits_where_accelerate_does(model: DiffusionModel, share: float) -> None:
    from accelerate import infer_auto_device_map
    from quantwire.hosts.standalone.offload.carry import AWAY, ON_DEVICE, _not_to_split

    (part,) = parts_of_modules({"transformer": model.transformer}, Role.DIFFUSION, "demo")
    held = hold(part, None, SHAPE, HostName.STANDALONE)
    room = int(held.nbytes * share)
    found = infer_auto_device_map(model.transformer, {ON_DEVICE: room}, _not_to_split(model.transformer))
    away = tuple(f"{name}." if name else "" for name, where in found.items() if where == AWAY)
    stays = sum(p.nbytes for n, p in model.transformer.named_parameters() if not f"{n}.".startswith(away))
    weights, streamed, moving = split(held, room)
    assert away
    assert weights - moving == stays
    assert streamed == held.nbytes - stays


def test_what_is_not_counted_is_said(flux_dev: ModelPart) -> None:
    net = replace(flux_dev, name="net", role=Role.CONTROLNET, slots=flux_dev.slots[:200])
    found = forecast([flux_dev, net], {}, RunShape(1024, 1024, frames=3), gpu(64), HostName.STANDALONE)
    assert any(note.startswith("net: activations of a ControlNet") for note in found.notes)
    assert any("3 frames count as" in note for note in found.notes)
    cpu = DeviceFacts("cpu", "CPU", 64 * GIB, 64 * GIB)
    decoding = forecast([flux_dev], {}, SHAPE, cpu, HostName.STANDALONE).modes[0].stages[2]
    assert decoding.error_percent == 40
    assert "scratch space" in decoding.how
    assert "scratch" not in forecast([flux_dev], {}, SHAPE, gpu(64), HostName.STANDALONE).modes[0].stages[2].how


def test_a_lora_alone_is_told(flux_dev: ModelPart) -> None:
    with pytest.raises(SpecError, match="is a LoRA"):
        forecast([replace(flux_dev, role=Role.LORA)], {}, SHAPE, gpu(8), HostName.STANDALONE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_buffers_follow_the_kernels(kind: str) -> None:
    """What `buffers` assumes of each format is what its kernel does; gguf on CUDA asks the GPU itself."""
    wrong: list[str] = []
    for row in rows():
        if not row.works or not row.writable or row.id.startswith(("gguf-iq", "nncf")) or row.id == "comfy-w4a8":
            continue
        if kind == "cuda" and row.id.startswith("gguf-"):
            continue
        name = kernel_choices(row, torch.device(kind))[-1].name
        layer = buffers.Layer("x", "", 0, 0, row.id, 1000 * 1000)
        nbytes = buffers.unpacked_nbytes(layer, kind, 2)
        if name == "dequantize, F.linear":
            fine = nbytes == 6_000_000
        elif kind == "cuda" and row.id.startswith(("bnb-nf4", "bnb-fp4", "quanto-qint8")):
            fine = nbytes == 2_000_000  # the whole weight, for as many rows as a picture has
        elif kind == "cuda" and row.id.startswith("quanto-qfloat8"):
            fine = nbytes == 4_000_000  # cast, and scaled in another tensor
        elif "expand" in name:
            fine = nbytes == 2_000_000 + (0 if kind == "cpu" and row.id.startswith("gguf-") else 6_000_000)
        elif name.startswith("int8 x int8"):
            fine = nbytes == (buffers.PART_NUMEL * 8 if kind == "cpu" else 0)
        else:
            fine = nbytes == 0
        wrong += [] if fine else [f"{row.id}: {name}: {nbytes}"]
    assert not wrong
