"""Which components are on the device, who leaves for whom, and text encoders with their tied weights."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from offload_models import GIB, VARIANTS, settings
from quantwire.hosts.offload import OffloadSettings
from quantwire.hosts.standalone.guard import components_now
from quantwire.hosts.standalone.offload import RESIDENCY, offload_now, placed_now, set_offload
from quantwire.hosts.standalone.offload.carry import place
from quantwire.hosts.standalone.offload.device import CPU, nbytes_of
from quantwire.hosts.standalone.offload.placed import Placed
from quantwire.hosts.standalone.offload.residency import Residency
from quantwire.hosts.standalone.text_encoders import Encoder, TextEncoder
from quantwire.hosts.standalone.vae import load_vae
from quantwire.quantizers.compat.modes import OffloadMode
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

MIB = 1 << 20
META = torch.device("meta")  # a second device: it holds no values, and shows what was moved to it


class Words:
    """A tokenizer of numbers, which these models need no more of."""

    class _Encoded:
        def __init__(self, ids: list[int]) -> None:
            self.ids = ids

    def encode(self, text: str) -> Words._Encoded:
        return Words._Encoded([int(word) for word in text.split()])


def shaken(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1, generator=generator)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def clip() -> TextEncoder:
    """CLIP and T5, whose shared embedding is two parameters on one memory, as the loader makes them."""
    small = shaken(CLIPTextModel(CLIPTextConfig(
        vocab_size=16, hidden_size=128, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=12, hidden_act="quick_gelu", eos_token_id=1,
    )))  # fmt: skip
    t5 = shaken(T5EncoderModel(T5Config(
        vocab_size=16, d_model=48, d_kv=8, d_ff=64, num_layers=3, num_heads=3, feed_forward_proj="gated-gelu"
    )))  # fmt: skip
    t5.encoder.embed_tokens.weight = nn.Parameter(t5.shared.weight.data, requires_grad=False)
    encoders = {"clip_l": Encoder(small, Words(), 8, 12, 1, 1), "t5xxl": Encoder(t5, Words(), 8, None, 1, 0)}
    return TextEncoder(encoders, "made here")


def encoded(clip: TextEncoder) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        return clip.encode("3 4 5")


@pytest.mark.parametrize("variant", VARIANTS)
def test_text_encoders_are_bit_equal(clip: TextEncoder, variant: str) -> None:
    wanted = encoded(clip)
    offloaded = set_offload(clip, settings(variant, clip.encoders["t5xxl"].module))
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(encoded(offloaded), wanted, strict=True))
    placed = placed_now(offloaded)
    assert set(placed) == {"clip_l", "t5xxl"}
    if variant in ("sequential", "sequential-disk"):
        for p in placed.values():
            assert all(t.is_meta for t in p.module.parameters())
    if variant.startswith("group-block"):
        hooks = {n for n, m in placed["t5xxl"].module.named_modules() if hasattr(m, "_diffusers_hook")}
        assert {f"encoder.block.{i}" for i in range(3)} <= hooks, "not the whole encoder as one group"
    assert all(torch.equal(a, b) for a, b in zip(encoded(clip), wanted, strict=True))


def test_tied_weights_are_written_once_and_read_under_both_names(clip: TextEncoder) -> None:
    offloaded = set_offload(clip, OffloadSettings(OffloadMode.SEQUENTIAL, keep_on="disk"))
    encoded(offloaded)
    disk = placed_now(offloaded)["t5xxl"].disk
    assert disk is not None
    shared = clip.encoders["t5xxl"].module.shared.weight  # type: ignore[union-attr]
    assert torch.equal(disk["shared.weight"], shared)
    assert torch.equal(disk["encoder.embed_tokens.weight"], shared)
    assert len(set(disk._names.values())) == len(disk) - 1
    assert disk["shared.weight"].data_ptr() % 64 == 0, "kernels of int8 weights crash on others"


@pytest.mark.parametrize("variant", VARIANTS)
def test_vae_is_bit_equal(demo_models: Path, variant: str) -> None:
    vae = load_vae(next((demo_models / "vae").glob("*.safetensors")))
    latent = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = vae.decode(latent)
        offloaded = set_offload(vae, settings(variant, vae.decoder))
        for _ in range(2):
            assert torch.equal(offloaded.decode(latent), wanted)


# --- who is on the device ---


@pytest.fixture(autouse=True)
def _empty() -> None:
    for placed in RESIDENCY.inside():
        RESIDENCY.leave(placed)


def made(name: str, mode: OffloadMode, **options: Any) -> Placed:
    """A component of 1 MiB on the stand-in device."""
    module = nn.Linear(512, 512, bias=False).requires_grad_(False)
    found = place(name, module, OffloadSettings(mode, **options), META)
    found.original = module  # type: ignore[attr-defined]
    return found


def names(residency: Residency) -> list[str]:
    return [p.name for p in residency.inside()]


def balanced(mib: float, low: float, high: float = 1.0) -> dict[str, Any]:
    return {"device_gib": mib * MIB / GIB, "low_watermark": low, "high_watermark": high}


def test_model_keeps_one_component_on_the_device() -> None:
    residency = Residency()
    parts = [made(name, OffloadMode.MODEL) for name in "abc"]
    for part in (*parts, parts[0]):
        residency.enter(part)
        assert names(residency) == [part.name]
        assert [p.is_in for p in parts] == [p is part for p in parts]
        assert all(next(p.module.parameters()).is_meta == p.is_in for p in parts)
    for part in parts:
        residency.leave(part)
        assert torch.equal(part.module.weight, part.original.weight)  # type: ignore[union-attr, attr-defined, arg-type]
        assert part.module.weight.data_ptr() == part.original.weight.data_ptr()  # type: ignore[union-attr, attr-defined, operator]


def test_balanced_moves_out_those_used_longest_ago() -> None:
    residency = Residency()
    a, b, c, d = (made(name, OffloadMode.BALANCED, **balanced(10, 0.3)) for name in "abcd")  # three fit below the mark
    for part in (a, b, c):
        residency.enter(part)
    assert names(residency) == ["a", "b", "c"]
    residency.enter(a)
    assert names(residency) == ["b", "c", "a"]
    residency.enter(d)
    assert names(residency) == ["c", "a", "d"]
    assert not b.is_in
    residency.enter(b)
    assert names(residency) == ["a", "d", "b"]


def test_balanced_with_a_low_mark_of_zero_keeps_only_what_runs() -> None:
    residency = Residency()
    a, b = (made(name, OffloadMode.BALANCED, device_gib=8) for name in "ab")  # at most 12 GiB: the default is 0
    residency.enter(a)
    residency.enter(b)
    assert names(residency) == ["b"]
    c, d = (made(name, OffloadMode.BALANCED, device_gib=16) for name in "cd")
    residency.enter(c)
    residency.enter(d)
    assert names(residency) == ["b", "c", "d"]


def test_modes_side_by_side() -> None:
    residency = Residency()
    stays, whole = made("stays", OffloadMode.NONE), made("whole", OffloadMode.MODEL)
    idle = made("idle", OffloadMode.BALANCED, **balanced(4, 0.5))
    residency.enter(stays)
    residency.enter(idle)
    assert names(residency) == ["stays", "idle"]
    residency.enter(whole)
    assert names(residency) == ["stays", "whole"], "model takes the device for itself, but for what stays"
    residency.enter(idle)
    assert names(residency) == ["stays", "idle"], "one under model goes whoever comes"
    residency.enter(whole)
    streamed = place("streamed", nn.Linear(4, 4), OffloadSettings(OffloadMode.SEQUENTIAL), torch.device("cpu"))
    residency.enter(streamed)
    assert names(residency) == ["stays", "whole"], "it has nothing on the device, and runs on another one"


def test_what_is_gone_is_forgotten() -> None:
    residency = Residency()
    part, gone = made("part", OffloadMode.NONE), made("gone", OffloadMode.NONE)
    residency.enter(part)
    residency.enter(gone)
    assert residency.held(META) == 2 * MIB
    gone.close()
    assert names(residency) == ["part"]
    del part
    gc.collect()
    assert names(residency) == []


def test_a_split_component_is_known_as_soon_as_it_is_placed(clip: TextEncoder) -> None:
    """Before it computes: others are placed then, and an interruption may come first."""
    module = clip.encoders["t5xxl"].module
    asked = settings("balanced-split", module)
    first = place("first", module, asked, CPU)
    assert first.variant == "split"
    assert first.is_in
    assert names(RESIDENCY) == ["first"]
    assert RESIDENCY.held(CPU) == first.nbytes > 0
    second = place("second", module, asked, CPU)
    assert names(RESIDENCY) == ["second"], "on at most 12 GiB only the one that is used stays"
    assert not first.is_in
    RESIDENCY.enter(first)
    assert names(RESIDENCY) == ["first"]
    assert not second.is_in
    for placed in (first, second):
        placed.close()


def test_the_mode_of_each_component(clip: TextEncoder) -> None:
    """A split T5 says nothing about the CLIP beside it."""
    from accelerate import cpu_offload

    assert components_now(clip) == dict.fromkeys(("clip_l", "t5xxl"), (OffloadMode.NONE, ""))
    small, large = sorted(nbytes_of(e.module) for e in clip.encoders.values())
    asked = OffloadSettings(OffloadMode.BALANCED, **balanced((small + large) / 2 / MIB, 0.2))
    split = set_offload(clip, asked)
    names_by_size = sorted(clip.encoders, key=lambda n: nbytes_of(clip.encoders[n].module))
    wanted = dict(zip(names_by_size, ((OffloadMode.BALANCED, "whole"), (OffloadMode.BALANCED, "split")), strict=True))
    assert components_now(split) == wanted
    assert offload_now(split) == (OffloadMode.BALANCED, "split")
    encoded(split)
    assert components_now(split) == wanted, "once placed too"
    hooked, plain = nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4)
    cpu_offload(hooked, execution_device=CPU)
    pipe = SimpleNamespace(text_encoder=hooked, transformer=plain)
    assert components_now(pipe) == {
        "text_encoder": (OffloadMode.SEQUENTIAL, "memory"), "transformer": (OffloadMode.NONE, "")
    }  # fmt: skip


def test_a_guard_is_told_the_mode_of_each_component(clip: TextEncoder) -> None:
    small, large = sorted(nbytes_of(e.module) for e in clip.encoders.values())
    asked = OffloadSettings(OffloadMode.BALANCED, **balanced((small + large) / 2 / MIB, 0.2))
    told: dict[str, Any] = {}

    def guard(components: dict[str, nn.Module], mode: OffloadMode, variant: str | None) -> None:
        told.update(dict.fromkeys(components, (mode, variant)))

    encoded(dataclasses.replace(set_offload(clip, asked), guard=guard))
    assert set(told) == {"clip_l", "t5xxl"}
    assert {variant for _, variant in told.values()} == {"whole", "split"}


def test_what_the_allocator_keeps_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-in numbers of a device: the arithmetic, where no accelerator is at hand."""
    from quantwire.hosts.standalone.offload import device as at

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 9 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    asked = OffloadSettings(OffloadMode.BALANCED)
    assert at.device_nbytes(asked, gpu, held=2 * GIB) == (3 + 2 + 5) * GIB
    assert at.device_nbytes(dataclasses.replace(asked, device_gib=6), gpu, held=2 * GIB) == 6 * GIB


def test_a_run_enters_its_components_one_by_one(clip: TextEncoder, demo_models: Path) -> None:
    asked = OffloadSettings(OffloadMode.MODEL)
    offloaded = set_offload(clip, asked)
    vae = set_offload(load_vae(next((demo_models / "vae").glob("*.safetensors"))), asked)
    encoded(offloaded)
    assert [p.name for p in RESIDENCY.inside()] == ["t5xxl"]
    vae.decode(torch.zeros(1, 16, 2, 2))
    assert [p.name for p in RESIDENCY.inside()] == ["vae"]
    nothing = dataclasses.replace(offloaded, offload=OffloadSettings(OffloadMode.NONE))
    encoded(nothing)
    assert [p.name for p in RESIDENCY.inside()] == ["clip_l", "t5xxl"]
