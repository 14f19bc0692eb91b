"""OffloadCompat sets the mode in whole workflows: the same image in every mode, and nothing left behind."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from offload_models import VARIANTS, files
from PIL import Image
from quantwire.hosts import use
from quantwire.hosts.standalone import core_nodes
from quantwire.hosts.standalone.executor import Executor
from quantwire.hosts.standalone.host import StandaloneHost
from quantwire.hosts.standalone.offload import RESIDENCY
from quantwire.hosts.standalone.progress import Interrupted, Listener, Progress
from quantwire.nodes import NODE_CLASS_MAPPINGS
from quantwire.quantizers.compat.modes import OffloadMode

WHOLE_DEVICE_GIB = 0.006  # the demo model takes 4 MiB in nf4: more than 0.6 of this, so that it is split


def inputs(variant: str) -> dict[str, Any]:
    """What OffloadCompat is given for a variant."""
    found = VARIANTS[variant]
    return {
        "mode": found.mode.value,
        "set_mode": True,
        "group_level": found.group_level,
        "blocks_per_group": found.blocks_per_group,
        "use_stream": found.use_stream,
        "keep_on": found.keep_on,
        "device_gib": WHOLE_DEVICE_GIB if found.device_gib else 0.0,
    }


def through(graph: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The graph with model, text encoder and VAE led through OffloadCompat."""
    check = graph["3"]["inputs"]
    check.update(settings, clip=["4", 0], vae=["10", 0])
    for node in ("5", "7"):
        graph[node]["inputs"]["clip"] = ["3", 2]
    graph["12"]["inputs"]["vae"] = ["3", 3]
    return graph


def pixels(folder: Path, prefix: str) -> np.ndarray:
    (path,) = folder.glob(f"{prefix}*.png")
    return np.asarray(Image.open(path))


@pytest.fixture
def own_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made in the test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def folders(parent: Path) -> list[str]:
    """Those of offloaded weights; libraries make some of their own beside them."""
    return [name for name in files(parent) if name.startswith("quantwire-offload-")]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_image_is_the_same(
    variant: str, quantwire: Callable[..., Any], api: Callable[[str], Any], tmp_path: Path, own_temporary: Path
) -> None:
    """Two samplers: one on the offloaded model, one on the branch that had no mode set."""
    graph = through(api("quantized"), inputs(variant))
    for old, new in (("11", "31"), ("12", "32"), ("13", "33")):
        graph[new] = json.loads(json.dumps(graph[old]))
    graph["31"]["inputs"]["model"] = ["2", 0]
    graph["32"]["inputs"] |= {"samples": ["31", 0], "vae": ["10", 0]}
    graph["33"]["inputs"] |= {"images": ["32", 0], "filename_prefix": "plain"}
    done = quantwire(graph)
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    assert np.array_equal(pixels(tmp_path / "out", "quantized"), pixels(tmp_path / "out", "plain"))
    assert folders(own_temporary) == [], "weights on disk go with the run"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "group", "use_stream": True}, "no streams"),
        ({"mode": "group", "blocks_per_group": 0}, "blocks_per_group"),
        ({"mode": "model", "keep_on": "disk"}, "keep_on disk has no meaning with mode model"),
        ({"mode": "balanced", "low_watermark": 0.9, "high_watermark": 0.5}, "low_watermark 0.9"),
        ({"mode": "novram"}, "novram"),
    ],
    ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else "",
)
def test_what_cannot_be_carried_out_stops_before_sampling(
    settings: dict[str, Any], said: str, quantwire: Callable[..., Any], api: Callable[[str], Any]
) -> None:
    done = quantwire(through(api("quantized"), {**settings, "set_mode": True}))
    assert done.code == 2, done.err
    assert said in done.err
    assert "Sampler" not in done.err
    assert done.files == []
    assert "Traceback" not in done.err


class InterruptAt(Listener):
    """Cancels a run at its second step of sampling."""

    executor: Executor

    def progress(self, node: Any, bar: Progress) -> None:
        if bar.desc == "sampling" and bar.done == 2:
            self.executor.interrupt()


@pytest.mark.parametrize("variant", ["model", "sequential", "balanced-split-disk", "group-block-disk"])
def test_a_run_interrupted_in_the_middle_of_sampling_can_be_run_again(
    variant: str, api: Callable[[str], Any], demo_models: Path, tmp_path: Path, own_temporary: Path
) -> None:
    graph = through(api("quantized"), inputs(variant))
    graph["11"]["inputs"]["steps"] = 3
    classes = {**core_nodes.CORE_NODES, **NODE_CLASS_MAPPINGS}
    listener = InterruptAt()
    with use(StandaloneHost([demo_models], tmp_path / "out")):
        executor = listener.executor = Executor(classes, listener)
        with pytest.raises(Interrupted):
            executor.run(graph)
        assert files(tmp_path / "out") == [] if (tmp_path / "out").exists() else True
        listener.progress = lambda node, bar: None  # type: ignore[method-assign]
        again = executor.run(graph)
        assert "2" in again.cached, "the model was kept, and with it its place"
        assert bool(folders(own_temporary)) == variant.endswith("disk")
        graph["3"]["inputs"].update(set_mode=False, mode="none", keep_on="memory", device_gib=0.0)
        graph["13"]["inputs"]["filename_prefix"] = "plain"
        executor.run(graph)
    assert np.array_equal(pixels(tmp_path / "out", "quantized"), pixels(tmp_path / "out", "plain"))


def test_modes_that_a_graph_has_left_take_nothing(
    api: Callable[[str], Any], demo_models: Path, tmp_path: Path, own_temporary: Path
) -> None:
    """The model is kept from run to run, and only OffloadCompat runs again."""
    with use(StandaloneHost([demo_models], tmp_path / "out")):
        executor = Executor({**core_nodes.CORE_NODES, **NODE_CLASS_MAPPINGS})
        for variant in ("none", "sequential-disk", "group-block-disk", "balanced-whole", "group-leaf-disk", "model"):
            graph = through(api("quantized"), inputs(variant))
            graph["11"]["inputs"]["steps"] = 1
            again = executor.run(graph)
            assert variant == "none" or "2" in again.cached
            assert {p.settings.mode for p in RESIDENCY.inside()} <= {VARIANTS[variant].mode}
            assert len(folders(own_temporary)) == (3 if variant.endswith("disk") else 0), "one a component"


def test_what_is_in_place_goes_with_the_graph(
    api: Callable[[str], Any], demo_models: Path, tmp_path: Path, own_temporary: Path
) -> None:
    graph = through(api("quantized"), inputs("sequential-disk"))
    graph["11"]["inputs"]["steps"] = 1
    with use(StandaloneHost([demo_models], tmp_path / "out")):
        executor = Executor({**core_nodes.CORE_NODES, **NODE_CLASS_MAPPINGS})
        executor.run(graph)
        assert len(folders(own_temporary)) == 3, "one folder a component"
        executor.run({"1": {"class_type": "PreviewAny", "inputs": {"source": "another graph"}}})
    assert folders(own_temporary) == []
    assert not any(p.settings.mode is OffloadMode.SEQUENTIAL for p in RESIDENCY.inside())
