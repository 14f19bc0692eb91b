"""The format `auto`: what it picks for which device, memory and model, and what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quantwire.quantizers import memory
from quantwire.quantizers.auto import (
    GIB,
    Choice,
    DeviceFacts,
    ModelFacts,
    candidates,
    choose_format,
    predict_sizes,
)
from quantwire.quantizers.errors import SpecError
from quantwire.quantizers.plan import Slot
from quantwire.quantizers.registry import availability, is_format
from quantwire.quantizers.weight import TensorMeta

FLUX = ModelFacts(11_900_000_000, 23_800_000_000)
SDXL = ModelFacts(2_570_000_000, 5_140_000_000)
# Bytes of FLUX.1's transformer by bits a weight.
FLUX_SIZES = {
    "comfy-fp8-e4m3fn": 12_000_000_000,
    "comfy-int8": 12_050_000_000,
    "bnb-int8": 12_050_000_000,
    "quanto-qint8": 12_040_000_000,
    "gguf-q6-k": 9_800_000_000,
    "comfy-nvfp4": 6_950_000_000,
    "bnb-nf4": 6_990_000_000,
    "quanto-qint4": 6_800_000_000,
    "gguf-q4-0": 6_990_000_000,
}


def cuda(total: float, free: float, capability: tuple[int, int], name: str = "GPU") -> DeviceFacts:
    return DeviceFacts("cuda", name, int(free * GIB), int(total * GIB), capability)


def without(*names: str) -> dict[str, int]:
    return {n: size for n, size in FLUX_SIZES.items() if n not in names}


@pytest.mark.parametrize(
    ("device", "sizes", "expected"),
    [
        pytest.param(cuda(8, 7.1, (8, 6)), FLUX_SIZES, "bnb-nf4", id="8-gb-ampere"),
        pytest.param(cuda(8, 7.1, (12, 0)), FLUX_SIZES, "comfy-nvfp4", id="8-gb-blackwell"),
        pytest.param(cuda(8, 7.1, (12, 0)), without("comfy-nvfp4"), "bnb-nf4", id="8-gb-blackwell-without-kitchen"),
        pytest.param(cuda(8, 7.1, (8, 6)), without("bnb-nf4"), "quanto-qint4", id="8-gb-without-bnb"),
        pytest.param(cuda(12, 11.2, (8, 6)), FLUX_SIZES, "gguf-q6-k", id="12-gb-ampere"),
        pytest.param(cuda(12, 11.2, (8, 9)), without("gguf-q6-k"), "bnb-nf4", id="12-gb-without-6-bit"),
        pytest.param(cuda(16, 15, (8, 9)), FLUX_SIZES, "comfy-fp8-e4m3fn", id="16-gb-ada"),
        pytest.param(cuda(24, 23, (8, 6)), FLUX_SIZES, "comfy-int8", id="24-gb-ampere"),
        pytest.param(cuda(24, 23, (8, 9)), FLUX_SIZES, "comfy-fp8-e4m3fn", id="24-gb-ada"),
        pytest.param(cuda(24, 23, (7, 5)), without("comfy-int8"), "quanto-qint8", id="24-gb-turing"),
        pytest.param(DeviceFacts("rocm", "GPU", 7 * GIB, 8 * GIB), FLUX_SIZES, "bnb-nf4", id="8-gb-rocm"),
        pytest.param(DeviceFacts("cpu", "CPU", 28 * GIB, 32 * GIB), FLUX_SIZES, "quanto-qint8", id="cpu-32"),
        pytest.param(DeviceFacts("cpu", "CPU", 9 * GIB, 16 * GIB), FLUX_SIZES, "bnb-nf4", id="cpu-16"),
        pytest.param(DeviceFacts("mps", "Apple GPU", 20 * GIB, 24 * GIB), FLUX_SIZES, "quanto-qint8", id="mps-24"),
        pytest.param(DeviceFacts("mps", "Apple GPU", 8 * GIB, 16 * GIB), FLUX_SIZES, "quanto-qint4", id="mps-16"),
    ],
)
def test_choice(device: DeviceFacts, sizes: dict[str, int], expected: str) -> None:
    choice = choose_format(device, FLUX, sizes)
    assert (choice.format_id, choice.fits) == (expected, True)
    assert choice == choose_format(device, FLUX, dict(reversed(sizes.items()))), "the order of the sizes has no say"


def test_what_it_says() -> None:
    assert choose_format(cuda(8, 7.1, (8, 6), "RTX 3070"), FLUX, FLUX_SIZES) == Choice(
        "bnb-nf4",
        "auto: RTX 3070 with 8 GiB, compute capability 8.6, 11.9 B parameters (22.2 GiB): bnb-nf4 takes 6.5 GiB of "
        "7.1 GiB free, comfy-int8 would take 11.2 GiB",
    )
    small = choose_format(cuda(24, 23, (8, 6)), SDXL, {"comfy-int8": SDXL.nbytes // 2})
    assert small.why.endswith("comfy-int8 takes 2.4 GiB of 23.0 GiB free; it would fit at full precision too")


def test_nothing_fits() -> None:
    choice = choose_format(cuda(6, 5.2, (8, 6)), FLUX, FLUX_SIZES)
    assert (choice.format_id, choice.fits) == ("quanto-qint4", False)
    assert choice.why.endswith(
        "quanto-qint4: the smallest choice takes 6.3 GiB of 5.2 GiB free, so part of it must be offloaded"
    )


def test_the_reserve_is_kept_free() -> None:
    size = {"bnb-nf4": 4 * GIB}
    assert choose_format(cuda(8, 4.41, (8, 6)), FLUX, size).fits
    assert not choose_format(cuda(8, 4.39, (8, 6)), FLUX, size).fits


def test_no_format_runs() -> None:
    with pytest.raises(SpecError, match=r"^auto: no format for Apple GPU runs here and holds every layer"):
        choose_format(DeviceFacts("mps", "Apple GPU", GIB, GIB), FLUX, {"bnb-nf4": 1})


def test_sizes_are_those_of_the_plans() -> None:
    def slots(k: int) -> list[Slot]:
        return [Slot(TensorMeta(f"blocks.{i}.mlp.weight", (64, k), torch.bfloat16), linear=True) for i in range(3)] + [
            Slot(TensorMeta("conv.weight", (8, 4, 3, 3), torch.bfloat16), linear=False)
        ]

    facts, sizes = predict_sizes([(slots(256), (), ("blocks.0",))], ["bnb-nf4", "gguf-q8-0", "no-such-format"])
    assert facts == ModelFacts(3 * 64 * 256 + 288, 2 * (3 * 64 * 256 + 288))
    rest = 2 * (64 * 256 + 288)
    assert sizes == {"bnb-nf4": rest + 2 * (64 * 128 + 4 * 256), "gguf-q8-0": rest + 2 * 64 * 256 // 32 * 34}
    _, sizes = predict_sizes([(slots(33), (), ())], ["bnb-int8", "gguf-q8-0"])
    assert list(sizes) == ["bnb-int8"], "gguf cannot hold K=33"


@pytest.mark.parametrize("kind", ["cuda", "cpu", "mps", "rocm", "xpu"])
def test_some_candidate_runs_here(kind: str) -> None:
    ids = candidates(DeviceFacts(kind, kind, GIB, GIB, (12, 0) if kind == "cuda" else None))
    assert len(ids) == len(set(ids))
    assert any(is_format(f) and availability(f).works for f in ids)


def test_this_machine() -> None:
    facts = memory.device_facts(torch.device("cpu"))
    assert (facts.kind, facts.capability) == ("cpu", None)
    assert 0 < facts.free_nbytes <= facts.total_nbytes
    with pytest.raises(SpecError, match="how much memory is free on meta is not known"):
        memory.device_facts(torch.device("meta"))


def test_what_the_systems_say(tmp_path: Path) -> None:
    said = "MemTotal:       32878240 kB\nMemFree:          512340 kB\nMemAvailable:   20123456 kB\nHugePages_Total: 0\n"
    assert memory.meminfo(said) == (20123456 * 1024, 32878240 * 1024)
    said = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\nPages free:                          10240.\n"
        "Pages active:                       500000.\nPages inactive:                       1024.\n"
        "Pages speculative:                       8.\n"
    )
    assert memory.vm_stat(said) == 16384 * (10240 + 1024 + 8)
    with pytest.raises(SpecError, match="not understood"):
        memory.vm_stat("nothing")
    group = {
        "memory.max": str(8 * GIB),
        "memory.current": str(6 * GIB),
        "memory.stat": f"anon 1\ninactive_file {GIB}\n",
    }
    assert memory._within_limit(20 * GIB, 32 * GIB, tmp_path) == (20 * GIB, 32 * GIB)
    for name, text in group.items():
        (tmp_path / name).write_text(text)
    assert memory._within_limit(20 * GIB, 32 * GIB, tmp_path) == (3 * GIB, 8 * GIB)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._within_limit(20 * GIB, 32 * GIB, tmp_path) == (20 * GIB, 32 * GIB)


def test_what_shares_the_memory_is_taken_off() -> None:
    card = cuda(16, 15, (8, 9))
    alone = choose_format(card, FLUX, FLUX_SIZES)
    assert choose_format(card, FLUX, FLUX_SIZES, {}) == alone
    choice = choose_format(card, FLUX, FLUX_SIZES, {"t5xxl": 5 * GIB, "clip_l": GIB // 4})
    assert (alone.format_id, choice.format_id) == ("comfy-fp8-e4m3fn", "bnb-nf4"), "8.95 GiB are left, q6-k takes 9.1"
    assert "of 15.0 GiB free, of which t5xxl takes 5.0 GiB and clip_l takes 256.0 MiB" in choice.why
    assert not choose_format(card, FLUX, FLUX_SIZES, {"t5xxl": 15 * GIB}).fits
