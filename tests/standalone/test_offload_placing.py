"""Placing a model for an offload mode: really in force, without a trace in the model itself, and gone with it."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from offload_models import GIB, VARIANTS, files, same, settings, tiny_flux, velocities
from quantwire.hosts.modules import with_layers
from quantwire.hosts.offload import OffloadSettings
from quantwire.hosts.record import Recorder
from quantwire.hosts.standalone import flux
from quantwire.hosts.standalone.lora import LoraLinear
from quantwire.hosts.standalone.models import DiffusionModel, store_as
from quantwire.hosts.standalone.offload import RESIDENCY, offload_now, placed_now, running, set_offload
from quantwire.hosts.standalone.offload.carry import place
from quantwire.hosts.standalone.offload.copies import own_copy
from quantwire.hosts.standalone.offload.device import CPU, nbytes_of
from quantwire.hosts.standalone.offload.placed import Placed
from quantwire.hosts.standalone.progress import Interrupted
from quantwire.hosts.standalone.record import recorded
from quantwire.quantizers.compat.modes import Carrier, OffloadMode
from quantwire.quantizers.errors import FileError, WeightError
from quantwire.quantizers.kernels.kept import KeptWeights, keep_dequantized
from quantwire.quantizers.registry import get_quantizer
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedLinear
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

EVERY = pytest.mark.parametrize("variant", VARIANTS)
LAYER = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return tiny_flux()


@pytest.fixture(scope="module")
def wanted(model: DiffusionModel) -> list[Tensor]:
    return velocities(model)


def placed(model: DiffusionModel) -> Placed:
    return placed_now(model)["transformer"]


def under(model: DiffusionModel, variant: str) -> DiffusionModel:
    return set_offload(model, settings(variant, model.transformer))


def lora(layer: Any) -> LoraLinear:
    n, k = layer.out_features, layer.in_features
    generator = torch.Generator().manual_seed(3)
    down, up = torch.randn(4, k, generator=generator), torch.randn(n, 4, generator=generator)
    return LoraLinear(layer, down.bfloat16(), up.bfloat16(), 0.5)


# --- in force ---


@EVERY
def test_placement_is_in_force(model: DiffusionModel, variant: str) -> None:
    offloaded = under(model, variant)
    assert placed_now(offloaded) == {}, "nothing moves before the model runs"
    velocities(offloaded)
    copy = placed(offloaded)
    mode, told = offload_now(offloaded)
    assert (mode, told) == (copy.settings.mode, copy.variant)
    assert variant in (f"{mode.value}-{told}", mode.value, "sequential", "group-blocks")
    modules = list(copy.module.modules())
    away = {n for n, p in copy.module.named_parameters() if p.is_meta}
    assert bool(away) == variant.startswith(("sequential", "balanced-split"))
    accelerate = sum(hasattr(m, "_hf_hook") for m in modules)
    diffusers = sum(hasattr(m, "_diffusers_hook") for m in modules)
    assert bool(accelerate) == bool(away)
    assert bool(diffusers) == variant.startswith("group")
    blocks = len(model.transformer.transformer_blocks) + len(model.transformer.single_transformer_blocks)  # type: ignore[arg-type]
    if variant == "group-block":
        assert diffusers == blocks + 1, "one a block, and one for what stands around them"
    if variant.startswith("group-leaf"):
        assert diffusers > 10 * blocks
    on_disk = variant.endswith("disk")
    assert bool(copy.folder) == on_disk
    assert bool(copy.disk) == (on_disk and not variant.startswith("group"))
    if os.name == "posix":
        named = on_disk and copy.disk is None
        assert bool(files(copy.folder)) == named, "a mapped file has no name, so that it goes with the process"
    if variant == "group-block-disk":
        assert len(files(copy.folder)) == blocks + 1
    if on_disk:
        assert stat.S_IMODE(copy.folder.stat().st_mode) == 0o700  # type: ignore[union-attr]
        nbytes = sum(p.stat().st_size for p in copy.folder.iterdir())  # type: ignore[union-attr]
        if copy.disk is not None:
            nbytes += sum(copy.disk[name].nbytes for name in set(copy.disk._names.values()))
        whole = nbytes_of(model.transformer)
        assert 0.1 * whole < nbytes < 1.1 * whole, "written once"


def test_a_group_on_disk_is_emptied_between_uses(model: DiffusionModel) -> None:
    offloaded = under(model, "group-block-disk")
    velocities(offloaded)
    own, weight = (
        placed(offloaded).module.get_parameter(f"{LAYER}.weight"),
        model.transformer.get_parameter(f"{LAYER}.weight"),
    )
    assert own.data_ptr() != weight.data_ptr()
    assert own.shape == weight.shape


@EVERY
def test_the_next_run_finds_it_in_place(model: DiffusionModel, variant: str) -> None:
    offloaded = under(model, variant)
    velocities(offloaded)
    first = placed(offloaded)
    velocities(dataclasses.replace(offloaded, source="the same weights under another name"))
    assert placed(offloaded) is first


def test_a_split_keeps_to_its_cap(model: DiffusionModel) -> None:
    whole = nbytes_of(model.transformer)
    for share in (0.35, 0.5, 0.7):
        asked = OffloadSettings(OffloadMode.BALANCED, device_gib=whole / GIB, high_watermark=share)
        offloaded = set_offload(model, asked)
        velocities(offloaded)
        copy = placed(offloaded)
        blocks = [b for b in copy.module.modules() if type(b).__name__ in copy.module._no_split_modules]  # type: ignore[operator]
        assert all(len({p.is_meta for p in b.parameters()}) == 1 for b in blocks), "a block stays together"
        largest = max(sum(p.nbytes for p in b.parameters()) for b in blocks)
        assert copy.nbytes <= max(0, share * whole - largest), "room is left for the layer that is brought in"
    assert copy.nbytes > 0
    assert offload_now(set_offload(model, OffloadSettings(OffloadMode.BALANCED)))[1] == "whole"
    above = OffloadSettings(OffloadMode.BALANCED, device_gib=2 * whole / GIB, high_watermark=0.5)
    assert offload_now(set_offload(model, above))[1] == "whole", "as large as the cap, not larger"


# --- other branches ---


@EVERY
def test_the_model_that_was_placed_is_as_it_was(model: DiffusionModel, variant: str) -> None:
    before = {n: (id(p), p.data_ptr(), p.clone()) for n, p in model.transformer.named_parameters()}
    state = [set(vars(m)) for m in model.transformer.modules()]
    velocities(under(model, variant))
    for name, p in model.transformer.named_parameters():
        identity, pointer, value = before[name]
        assert (id(p), p.data_ptr()) == (identity, pointer)
        assert torch.equal(p, value)
    assert [set(vars(m)) for m in model.transformer.modules()] == state


@EVERY
def test_a_lora_after_and_before(model: DiffusionModel, variant: str) -> None:
    layers = {LAYER: lora(model.transformer.get_submodule(LAYER)), "x_embedder": lora(model.transformer.x_embedder)}
    with_lora = model.with_transformer(with_layers(model.transformer, layers))
    expected = velocities(with_lora)
    assert not same(expected, velocities(model))
    offloaded = under(model, variant)
    velocities(offloaded)
    after = offloaded.with_transformer(with_layers(offloaded.transformer, layers))
    assert after.offload == offloaded.offload
    assert same(velocities(after), expected)
    assert same(velocities(under(with_lora, variant)), expected)


def test_two_modes_of_the_same_weights(model: DiffusionModel, wanted: list[Tensor]) -> None:
    every = [under(model, v) for v in VARIANTS]
    for offloaded in (*every, *reversed(every)):
        assert same(velocities(offloaded), wanted)


@EVERY
def test_tensors_of_inference_mode(wanted: list[Tensor], variant: str) -> None:
    """The executor loads inside inference mode; `.data` of such tensors takes none from outside of it."""
    with torch.inference_mode():
        made = tiny_flux()
    assert next(made.transformer.parameters()).is_inference()
    offloaded = under(made, variant)
    assert same(velocities(offloaded), wanted)
    with torch.no_grad(), running(offloaded) as ready:
        assert not torch.is_inference_mode_enabled()
        assert not any(p.is_inference() for p in ready.transformer.parameters())


@EVERY
def test_weights_stored_in_float8_keep_their_own_hooks(model: DiffusionModel, variant: str) -> None:
    stored = store_as(model, torch.float8_e4m3fn)
    expected = velocities(stored)
    offloaded = under(stored, variant)
    assert same(velocities(offloaded), expected)
    assert same(velocities(offloaded), expected)
    linear = placed(offloaded).module.get_submodule(LAYER)
    assert linear.weight.dtype is torch.float8_e4m3fn  # type: ignore[union-attr]
    assert stored.transformer.get_submodule(LAYER).weight.dtype is torch.float8_e4m3fn  # type: ignore[union-attr]


def test_hooks_of_others_are_refused(model: DiffusionModel) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    hooked = tiny_flux()
    add_hook_to_module(hooked.transformer.x_embedder, ModelHook())  # type: ignore[arg-type]
    with pytest.raises(WeightError, match="'x_embedder': a hook replaced the forward"):
        velocities(under(hooked, "sequential"))


@EVERY
def test_recording_sees_the_layers_that_run(model: DiffusionModel, variant: str) -> None:
    def sums(made: DiffusionModel) -> dict[str, Tensor]:
        recorder = Recorder()
        made = dataclasses.replace(made, recorder=recorder)
        generator = torch.Generator().manual_seed(1)
        x, context, pooled = (torch.randn(*s, generator=generator) for s in ((1, 16, 4, 4), (1, 5, 96), (1, 80)))
        with torch.inference_mode(), running(made) as ready, recorded(ready):
            flux.velocity(ready.transformer, x, 0.5, context, pooled, 3.5, made.dtype)
        assert not recorder.idle
        assert recorder.calls == 1
        return {name: entry.squares for name, entry in recorder.matrix("test").entries.items()}

    expected, found = sums(model), sums(under(model, variant))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[n], found[n]) for n in expected)


# --- dequantized weights that a layer keeps ---


@EVERY
def test_kept_weights_are_neither_stale_nor_in_the_way(
    model: DiffusionModel, variant: str, caplog: pytest.LogCaptureFixture
) -> None:
    linear: Any = model.transformer.get_submodule(LAYER)
    weight = get_quantizer("quanto-qint8").quantize(linear.weight.data, QuantSpec("quanto-qint8"))
    made = model.with_transformer(with_layers(model.transformer, {LAYER: QuantizedLinear(weight, linear.bias)}))
    without = velocities(made)
    keep_dequantized(made.transformer, 64, Carrier.QUANTWIRE)
    expected = velocities(made)
    kept = KeptWeights.of(made.transformer)
    assert kept is not None
    assert len(kept) == 1
    offloaded = under(made, variant)
    stays = variant in ("none", "model")
    with caplog.at_level(logging.WARNING):
        assert same(velocities(offloaded), expected if stays else without)
    own: Any = placed(offloaded).module.get_submodule(LAYER)
    assert (own.kept is kept) == stays
    assert ("cache_mib is not used with offload mode" in caplog.text) != stays
    assert len(kept) == 1, "the other branch goes on with what it kept, and nothing is kept twice"
    assert same(velocities(made), expected)


# --- threads ---


@EVERY
def test_threads_that_share_a_model_run_one_after_another(
    model: DiffusionModel, wanted: list[Tensor], variant: str
) -> None:
    offloaded = under(model, variant)
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(same(velocities(offloaded), wanted))
        except Exception as err:
            found.append(err)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


def test_waiting_for_another_run_can_be_interrupted(model: DiffusionModel) -> None:
    from quantwire.hosts.standalone.progress import Listener, NodeScope, node_scope
    from quantwire.hosts.standalone.workflow import PromptNode

    offloaded, caught = under(model, "model"), threading.Event()

    def wait() -> None:
        with node_scope(NodeScope(PromptNode("1", "KSampler", {}), Listener(), lambda: True)):
            try:
                velocities(offloaded)
            except Interrupted:
                caught.set()

    with running(offloaded):
        thread = threading.Thread(target=wait)
        thread.start()
        assert caught.wait(10)
        thread.join()


# --- failures ---


@EVERY
def test_an_interrupted_run_can_go_on(model: DiffusionModel, wanted: list[Tensor], variant: str) -> None:
    offloaded = under(model, variant)
    with pytest.raises(Interrupted), running(offloaded):
        raise Interrupted("Interrupted.")
    first = placed(offloaded)
    assert same(velocities(offloaded), wanted)
    assert placed(offloaded) is first


@EVERY
def test_a_failure_in_the_middle_of_a_layer_leaves_no_half_moved_copy(
    model: DiffusionModel, wanted: list[Tensor], variant: str
) -> None:
    offloaded = under(model, variant)

    def run() -> None:
        with running(offloaded) as ready:
            ready.transformer.get_submodule(LAYER).register_forward_pre_hook(lambda module, args: 1 // 0)
            flux.velocity(ready.transformer, *_inputs(), 3.5, torch.bfloat16)

    with pytest.raises(ZeroDivisionError):
        run()
    assert placed_now(offloaded) == {}
    assert same(velocities(offloaded), wanted)


def _inputs() -> tuple[Tensor, float, Tensor, Tensor]:
    return torch.zeros(1, 16, 4, 4), 0.5, torch.zeros(1, 5, 96), torch.zeros(1, 80)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.endswith("disk")])
def test_a_full_disk_is_named(
    wanted: list[Tensor], variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel refuses more bytes in one file, as a quota does."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    offloaded = under(tiny_flux(), variant)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(FileError) as caught:
            velocities(offloaded)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path) in str(caught.value).splitlines()[0]
    assert files(tmp_path) == [], "no half-written folder stays"
    assert placed_now(offloaded) == {}
    assert same(velocities(offloaded), wanted), "once there is room"


def test_too_little_room_is_said_before_writing(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantwire.hosts.standalone.offload import disk

    free = disk.shutil.disk_usage(tempfile.gettempdir()).free
    said = pytest.raises(FileError, match=r"MiB of weights are to be kept on disk.*MiB are free there")
    with said as caught, disk.private_folder(free + (1 << 30)):
        pass
    assert "TMPDIR" in str(caught.value)


def test_a_temporary_folder_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python would take another one without a word, or raise an error without a way out."""
    from quantwire.hosts.standalone.offload.disk import private_folder

    gone = tmp_path / "gone"
    monkeypatch.setenv("TMPDIR", str(gone))
    with pytest.raises(FileError, match=f"TMPDIR is {gone}.*\n.*or choose keep_on memory"), private_folder(1):
        pass
    monkeypatch.delenv("TMPDIR")
    monkeypatch.setattr(tempfile, "tempdir", str(gone))
    no_folder = r"no folder can be made for offloaded weights.*\n.*or choose keep_on memory"
    with pytest.raises(FileError, match=no_folder), private_folder(1):
        pass
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(gone)])
    nowhere = r"There is no folder for temporary files.*\n.*or choose keep_on memory"
    with pytest.raises(FileError, match=nowhere), private_folder(1):
        pass


ABANDONS = """
import os, signal, sys, tempfile
from quantwire.hosts.standalone.offload.disk import private_folder
with private_folder(1) as folder:
    (folder / "group_0.safetensors").write_bytes(b"1234")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(os.name != "posix", reason="the system removes no folder of an open file")
def test_folders_of_processes_that_were_killed_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantwire.hosts.standalone.offload.disk import private_folder

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    other = subprocess.Popen(
        [sys.executable, "-c", ABANDONS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    try:
        left = Path(other.stdout.readline().strip())  # type: ignore[union-attr]
        with private_folder(1) as own:
            assert (left / "group_0.safetensors").read_bytes() == b"1234", "it is in use"
            with private_folder(1):
                assert own.is_dir(), "and so is that of this process"
        other.send_signal(signal.SIGTERM)
        assert other.wait() == -signal.SIGTERM
        assert left.is_dir()
    finally:
        other.kill()
        other.communicate()
    with private_folder(1):
        assert not left.exists()
    assert files(tmp_path) == [], "no lock stays either"


# --- the end ---


@EVERY
def test_memory_and_files_go_with_the_model(variant: str) -> None:
    made = tiny_flux()
    offloaded = under(made, variant)
    velocities(offloaded)
    copy = placed(offloaded)
    folder, module = copy.folder, weakref.ref(made.transformer)
    weights = [StorageWeakRef(p.untyped_storage()) for p in made.transformer.parameters()]
    weights += [StorageWeakRef(p.untyped_storage()) for p in copy.module.parameters() if not p.is_meta]
    assert not any(ref.expired() for ref in weights)
    del made, offloaded
    assert module() is None, "the copy does not hold the model"
    assert copy.closed
    assert not list(copy.module.parameters())
    assert folder is None or not folder.exists()
    del copy
    gc.collect()
    assert all(ref.expired() for ref in weights)


@EVERY
def test_a_mode_that_no_model_object_has_any_more_is_released(
    model: DiffusionModel, wanted: list[Tensor], variant: str
) -> None:
    first, second = under(model, variant), under(model, variant)
    velocities(first)
    velocities(second)
    copy = placed(second)
    assert placed(first) is copy
    del first
    assert not copy.closed, "the other one asks for the same"
    renamed = dataclasses.replace(second, source="renamed")
    del second
    assert placed(renamed) is copy
    folder = copy.folder
    del renamed
    assert copy.closed
    assert not list(copy.module.parameters())
    assert folder is None or not folder.exists()
    assert copy not in RESIDENCY.inside()
    assert same(velocities(model), wanted)
    assert same(velocities(under(model, variant)), wanted)


def test_an_object_that_dies_while_another_is_placed_is_not_forgotten(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copies are locked then, and who dies cannot wait."""
    from quantwire.hosts.standalone import offload

    dying = [under(model, "model")]
    velocities(dying[0])
    copy = placed(dying[0])
    real = offload.place

    def place_slowly(*args: Any) -> Placed:
        dying.clear()
        assert not copy.closed
        return real(*args)

    monkeypatch.setattr(offload, "place", place_slowly)
    other = under(model, "sequential")
    velocities(other)
    assert copy.closed
    assert not placed(other).closed


# --- copies ---


def test_a_copy_shares_memory_and_no_object() -> None:
    model = tiny_flux().transformer
    twin = own_copy(model)
    for (name, a), (_, b) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert a is not b, name
        assert a.data_ptr() == b.data_ptr()
    twin.x_embedder.weight.data = torch.zeros_like(twin.x_embedder.weight)  # type: ignore[union-attr]
    assert model.x_embedder.weight.any()  # type: ignore[union-attr]


def test_tied_weights_stay_tied_unless_told() -> None:
    net = nn.Sequential(nn.Embedding(8, 4), nn.Embedding(8, 4)).requires_grad_(False)
    net[1].weight = nn.Parameter(net[0].weight.data, requires_grad=False)  # two parameters on the same memory
    tied, apart = own_copy(net), own_copy(net, tied=False)
    assert tied[0].weight is tied[1].weight  # type: ignore[index]
    assert apart[0].weight.data_ptr() != apart[1].weight.data_ptr()  # type: ignore[index]
    assert nbytes_of(net) == nbytes_of(tied) == 8 * 4 * 4


def test_moving_out_drops_the_copy_and_takes_the_old_memory() -> None:
    """On a stand-in device that holds no values; the CPU's own moves would show nothing."""
    model = tiny_flux().transformer
    copy = place("transformer", model, OffloadSettings(OffloadMode.MODEL), torch.device("meta"))
    assert copy.device != CPU
    pointers = [p.data_ptr() for p in model.parameters()]
    copy.move_in()
    assert all(p.is_meta for p in copy.module.parameters())
    copy.move_out()
    assert [p.data_ptr() for p in copy.module.parameters()] == pointers
    copy.close()
