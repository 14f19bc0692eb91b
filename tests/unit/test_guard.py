"""The guard: it looks again when modules or the mode changed, and costs next to nothing when they did not."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quantwire.quantizers.apply import make_layer
from quantwire.quantizers.compat.guard import Action, Guard, fingerprint
from quantwire.quantizers.compat.installed import installed
from quantwire.quantizers.compat.modes import Carrier, HostName, OffloadMode, VerdictLevel
from quantwire.quantizers.errors import OffloadConflict
from quantwire.quantizers.registry import get_quantizer
from quantwire.quantizers.spec import QuantSpec
from torch import nn

NONE, SEQUENTIAL = (OffloadMode.NONE, ""), (OffloadMode.SEQUENTIAL, "memory")


def tree() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)))


def layer(format_id: str, carrier: Carrier) -> nn.Module:
    weight = get_quantizer(format_id).quantize(torch.randn(64, 64), QuantSpec(format_id))
    return make_layer(weight, None, carrier)


def library_layer() -> nn.Module:
    return layer("bnb-nf4", Carrier.LIBRARY)


def guard(action: Action = Action.BLOCK, mode: OffloadMode | None = None, variant: str | None = None) -> Guard:
    return Guard(HostName.STANDALONE, action, mode, variant)


def test_it_looks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[object] = []
    examine = Guard.examine
    monkeypatch.setattr(Guard, "examine", lambda self, *args: looks.append(args) or examine(self, *args))
    watched, model = guard(), tree()
    for _ in range(3):
        watched({"transformer": model}, *NONE)
    assert len(looks) == 1
    watched({"transformer": model}, *SEQUENTIAL)
    watched({"transformer": model}, *NONE)
    assert len(looks) == 2  # both modes are known by now
    model[0].weight.data = torch.zeros(64, 64)  # as hosts do that move weights
    watched({"transformer": model}, *NONE)
    assert len(looks) == 2
    model[0] = nn.Linear(64, 64)
    watched({"transformer": model}, *NONE)
    assert len(looks) == 3


def test_a_layer_replaced_in_place_is_noticed() -> None:
    watched, model = guard(), tree()
    watched({"transformer": model}, *SEQUENTIAL)
    model[2][0] = library_layer()
    with pytest.raises(OffloadConflict) as caught:
        watched({"transformer": model}, *SEQUENTIAL)
    first, second, *_ = str(caught.value).splitlines()
    assert first.startswith("transformer: bnb-nf4 (1 library layer of Params4bit) cannot run with sequential offload")
    assert "right before the model ran" in second
    with pytest.raises(OffloadConflict):  # a conflict is not remembered as passed
        watched({"transformer": model}, *SEQUENTIAL)


def test_a_parameter_of_another_class_is_noticed() -> None:
    watched, model = guard(), tree()
    watched({"transformer": model}, *SEQUENTIAL)
    model[0].weight = library_layer().weight
    with pytest.raises(OffloadConflict, match=r"^transformer: bnb-nf4"):
        watched({"transformer": model}, *SEQUENTIAL)


def test_a_buffer_of_another_class_is_noticed() -> None:
    model = tree()
    model[1].register_buffer("scale", torch.zeros(64, 64))
    before = fingerprint({"transformer": model})
    model[1]._buffers["scale"] = library_layer().weight
    assert fingerprint({"transformer": model}) != before


def test_a_changed_mode_is_noticed() -> None:
    watched, model = guard(), nn.Sequential(library_layer())
    watched({"transformer": model}, *NONE)
    with pytest.raises(OffloadConflict):
        watched({"transformer": model}, *SEQUENTIAL)
    watched({"transformer": model}, *NONE)


def test_what_the_host_does_counts_beside_a_chosen_mode() -> None:
    model = nn.Sequential(library_layer())
    watched = guard(mode=OffloadMode.MODEL, variant="")
    watched({"transformer": model}, *NONE)
    with pytest.raises(OffloadConflict, match="cannot run with sequential offload"):
        watched({"transformer": model}, *SEQUENTIAL)
    chosen = guard(mode=OffloadMode.SEQUENTIAL, variant="memory")
    with pytest.raises(OffloadConflict, match="cannot run with sequential offload"):
        chosen({"transformer": model}, *NONE)


def test_another_variant_of_the_chosen_mode_counts_too() -> None:
    """Chosen: from memory, which these layers allow. The host has its own kept on disk."""
    model = nn.Sequential(layer("torchao-int8wo", Carrier.LIBRARY))
    watched = guard(mode=OffloadMode.SEQUENTIAL, variant="memory")
    watched({"transformer": model}, *SEQUENTIAL)
    with pytest.raises(OffloadConflict, match=r"cannot run with sequential offload \(disk\)"):
        watched({"transformer": model}, OffloadMode.SEQUENTIAL, "disk")
    grouped = guard(mode=OffloadMode.GROUP, variant="leaf")
    with pytest.raises(OffloadConflict, match=r"cannot run with group offload \(leaf-disk\)"):
        grouped({"transformer": model}, OffloadMode.GROUP, "leaf-disk")


def test_the_host_tells_whether_balanced_splits() -> None:
    model, chosen = nn.Sequential(library_layer()), guard(mode=OffloadMode.BALANCED, variant="split")
    chosen({"transformer": model}, OffloadMode.BALANCED, "whole")
    with pytest.raises(OffloadConflict, match=r"cannot run with balanced offload \(split\)"):
        chosen({"transformer": model}, OffloadMode.BALANCED, "split")
    with pytest.raises(OffloadConflict, match=r"cannot run with balanced offload \(split\)"):
        chosen({"transformer": model}, *NONE)


def test_balanced_that_keeps_nothing_away_is_judged_by_its_hooks() -> None:
    """accelerate's hooks rebuild each weight; the embedded host moves a component that fits as in mode model."""
    from accelerate import dispatch_model

    model = nn.Sequential(layer("quanto-qint8", Carrier.LIBRARY))
    whole = (OffloadMode.BALANCED, "whole")
    (moved,) = guard().examine({"m": model}, *whole)["m"]
    assert (moved.level, moved.mode, moved.variant) == (VerdictLevel.OK, *whole)
    dispatched = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    dispatch_model(dispatched, {"": torch.device("cpu")}, force_hooks=True)  # type: ignore[dict-item]
    assert installed([dispatched]) == whole
    dispatched[0] = model[0]  # putting its hooks on such layers stops already
    with pytest.raises(OffloadConflict, match=r"quanto-qint8 .* cannot run with balanced offload \(whole\)"):
        guard()({"m": dispatched}, *whole)


def test_components_are_remembered_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[set[str]] = []
    examine = Guard.examine
    monkeypatch.setattr(Guard, "examine", lambda self, *args: looks.append(set(args[0])) or examine(self, *args))
    watched, both = guard(), {"a": tree(), "b": tree()}
    watched.passed({"a": both["a"]}, *NONE)
    watched(both, *NONE)
    watched(both, *NONE)
    both["a"][0] = nn.Linear(64, 64)
    watched(both, *NONE)
    assert looks == [{"b"}, {"a"}]


@pytest.mark.parametrize("action", [Action.WARN, Action.REPORT])
def test_other_actions_do_not_stop(action: Action, caplog: pytest.LogCaptureFixture) -> None:
    watched, model = guard(action), nn.Sequential(library_layer())
    with caplog.at_level(logging.WARNING):
        watched({"transformer": model}, *SEQUENTIAL)
        watched({"transformer": model}, *SEQUENTIAL)
    assert len(caplog.records) == (1 if action is Action.WARN else 0)
    if action is Action.WARN:
        first, second, *ways = caplog.records[0].message.splitlines()
        assert "cannot run with sequential offload" in first
        assert second == "Ways out:"
        assert len(ways) >= 2


def test_a_device_without_an_index_is_any_of_its_type() -> None:
    """Metal's device is `mps`, and its tensors lie on `mps:0`."""
    from quantwire.hosts.comfyui.memory import _is_same

    mps, first, second = torch.device("mps"), torch.device("cuda", 0), torch.device("cuda", 1)
    assert _is_same(torch.device("mps", 0), mps)
    assert _is_same(torch.device("cpu"), torch.device("cpu"))
    assert _is_same(first, first)
    assert not _is_same(first, second)
    assert not _is_same(torch.device("cpu"), mps)


def test_examine_tells_levels_by_component() -> None:
    found = guard().examine({"a": nn.Sequential(library_layer()), "b": tree()}, *SEQUENTIAL)
    assert {name: [v.level for v in verdicts] for name, verdicts in found.items()} == {"a": [VerdictLevel.BLOCK]}


def test_hooks_change_the_fingerprint() -> None:
    from accelerate import cpu_offload

    model = tree()
    before = fingerprint({"m": model})
    assert fingerprint({"m": model}) == before
    cpu_offload(model, torch.device("cpu"))
    assert fingerprint({"m": model}) != before


def test_nothing_changed_costs_less_than_a_millisecond() -> None:
    """On a module tree as large as FLUX's, which has 1,275 modules."""
    model = nn.Sequential(*(nn.Sequential(*(nn.Linear(1, 1) for _ in range(24))) for _ in range(51)))
    assert sum(1 for _ in model.modules()) == 1276
    watched = guard()
    watched({"transformer": model}, *NONE)
    took: list[float] = []
    for _ in range(200):  # of the thread's own time: other processes must not count
        start = time.thread_time()
        watched({"transformer": model}, *NONE)
        took.append(time.thread_time() - start)
    assert min(took) < 1e-3


def _sequential(model: nn.Module) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, torch.device("cpu"))


def _on_disk(model: nn.Module) -> None:
    from accelerate import disk_offload

    disk_offload(model, tempfile.mkdtemp(), torch.device("cpu"))


def _whole(model: nn.Module) -> None:
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(model, torch.device("cpu"))


def _dispatch(places: dict[str, str]) -> Callable[[nn.Module], None]:
    def put(model: nn.Module) -> None:
        from accelerate import dispatch_model

        options: dict[str, Any] = {"main_device": "cpu", "offload_dir": tempfile.mkdtemp(), "force_hooks": True}
        dispatch_model(model, places, **options)

    return put


def _group(level: str, disk: bool = False) -> Callable[[nn.Module], None]:
    def put(model: nn.Module) -> None:
        from diffusers.hooks import apply_group_offloading

        options: dict[str, Any] = {"num_blocks_per_group": 1} if level == "block" else {}
        options |= {"offload_to_disk_path": tempfile.mkdtemp()} if disk else {}
        apply_group_offloading(model, torch.device("cpu"), offload_type=f"{level}_level", **options)

    return put


@pytest.mark.parametrize(
    ("put", "wanted"),
    [
        (lambda model: None, None),
        (_whole, (OffloadMode.MODEL, "")),
        (_sequential, (OffloadMode.SEQUENTIAL, "memory")),
        (_on_disk, (OffloadMode.SEQUENTIAL, "disk")),
        (_dispatch({"0": "cpu", "1": "cpu", "2": "cpu"}), (OffloadMode.BALANCED, "whole")),
        (_dispatch({"0": "cpu", "1": "cpu", "2": "disk"}), (OffloadMode.BALANCED, "split-disk")),
        (_group("leaf"), (OffloadMode.GROUP, "leaf")),
        (_group("block"), (OffloadMode.GROUP, "block")),
        (_group("leaf", disk=True), (OffloadMode.GROUP, "leaf-disk")),
    ],
    ids=["none", "model", "sequential", "disk", "balanced", "split-disk", "leaf", "block", "leaf-disk"],
)
def test_hooks_of_the_libraries_tell_the_mode(put: Callable[[nn.Module], Any], wanted: object) -> None:
    model = tree()
    put(model)
    assert installed([tree(), model]) == wanted


@pytest.mark.parametrize(
    ("put", "wanted"),
    [
        (_sequential, (OffloadMode.SEQUENTIAL, "memory")),
        (_on_disk, (OffloadMode.SEQUENTIAL, "disk")),
        (_dispatch({"": "cpu"}), (OffloadMode.BALANCED, "whole")),
    ],
    ids=["sequential", "disk", "balanced"],
)
def test_a_model_with_weights_of_its_own_beside_its_layers(put: Callable[[nn.Module], Any], wanted: object) -> None:
    """Diffusion transformers keep tables and tokens so; accelerate puts two hooks on such a model."""
    model = tree()
    model.register_parameter("scale_shift_table", nn.Parameter(torch.ones(2), requires_grad=False))
    put(model)
    assert installed([model]) == wanted
