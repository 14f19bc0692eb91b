"""The compatibility table's rows of ComfyUI, in the real host.

Small modules of each carrier's layers are loaded by the host's own code in every memory mode, see
`probe_pack/offload.py`. What came of it must be the verdict of the row; every probed row of the host is run here, and
the formats of the quantwire carrier that are not, in `test_matrix.py`.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from typing import Any

import pytest
from graphs import node, unet
from quantwire.quantizers.compat.comfyui_rules import FOREIGN_MEASURED, LAUNCH_FLAGS, MEASURED, NATIVE_MEASURED
from quantwire.quantizers.compat.matrix import FOREIGN, Row, rows
from quantwire.quantizers.compat.modes import HostName, OffloadMode, VerdictLevel

# Of each of the layouts in which our layers hold values.
OURS = (
    *("bnb-nf4", "bnb-int8", "quanto-qint8", "quanto-qint4", "comfy-fp8-e4m3fn", "comfy-nvfp4", "comfy-int8"),
    *("sdnq-uint4", "torchao-int8wo", "nncf-int4-asym", "layerwise-fp8-e4m3fn", "gguf-q8-0", "gguf-q4-k"),
)
# A split is measured with next to none and with half of the layers on the device; it stops if either does.
CELLS = {
    (OffloadMode.NONE, ""): ("none",),
    (OffloadMode.PARTIAL, "whole"): ("partial/whole",),
    (OffloadMode.PARTIAL, "split"): ("partial/few", "partial/half"),
    (OffloadMode.NOVRAM, ""): ("novram",),
    (OffloadMode.DYNAMIC, ""): ("dynamic",),
}
# To put a tensor on `meta` torch makes a new parameter of it, which a move between real devices does not take.
ONLY_ON_META = "RuntimeError: Creating a Parameter from an instance of type"
OK, WARN, BLOCK = VerdictLevel.OK, VerdictLevel.WARN, VerdictLevel.BLOCK
Cells = dict[str, dict[str, Any]]


def probed(source: str, host: HostName = HostName.COMFYUI) -> list[Row]:
    found = [r for r in rows() if r.host is host and r.evidence == "probed" and source in r.source]
    assert found, f"no row names {source}"
    return found


LIBRARY = probed(MEASURED)
BACKENDS = sorted({row.format_id.partition("-")[0] for row in LIBRARY})


@functools.cache
def measured(comfyui: Any, probe: str, formats: tuple[str, ...], carrier: str = "") -> dict[str, Cells]:
    inputs = {"carrier": carrier} if carrier else {}
    outputs = comfyui.run({"probe": node(probe, formats=" ".join(formats), **inputs)})
    return json.loads(outputs["probe"]["text"][0])


@pytest.fixture
def probe(comfyui: Any) -> Any:
    # Comfy is a mutable dataclass without a hash; the cache keys on its identity.
    type(comfyui).__hash__ = object.__hash__  # type: ignore[method-assign]
    return functools.partial(measured, comfyui)


def verdict_of(row: Row, cells: Cells) -> VerdictLevel:
    mine = [cells[name] for name in CELLS[row.mode, row.variant]]
    if row.mode is OffloadMode.NONE or row.variant == "whole":
        return whole(mine[0])
    levels = [away(cell) for cell in mine if not immovable(cell)]
    assert levels
    return next(level for level in (BLOCK, WARN, OK) if level in levels)


def immovable(cell: dict[str, Any]) -> bool:
    """Whether the second device shows nothing of a cell."""
    places = cell["places"]
    return places["stage"] == "move" and places["error"].startswith(ONLY_ON_META)


def whole(cell: dict[str, Any]) -> VerdictLevel:
    """All on one device: the CPU shows whether it computes there, `meta` whether it gets there. One of both warns."""
    computes, moves = cell["values"] == "equal", immovable(cell) or not cell["places"]["error"]
    return OK if computes and moves else WARN if computes or moves else BLOCK


def away(cell: dict[str, Any]) -> VerdictLevel:
    """Some layers in host memory: none of them may be left there for good."""
    places = cell["places"]
    if cell["values"] != "equal" and not cell["values"].startswith("AttributeError: 'TinyGemm"):
        return BLOCK
    if places["error"] or places["stranded"]:
        return BLOCK
    return WARN if places["resident"] else OK


def errors(row: Row, cells: Cells) -> list[str]:
    mine = [cells[name] for name in CELLS[row.mode, row.variant]]
    return [error for cell in mine for error in (cell["values"], cell["places"]["error"])]


def agree(row: Row, cells: Cells) -> None:
    seen = [cells[name] for name in CELLS[row.mode, row.variant]]
    where = f"{row.carrier.value} {row.format_id} {row.mode.value} {row.variant}: {seen}"
    assert verdict_of(row, cells) is row.verdict, where
    assert any(error.startswith(row.raw_error) for error in errors(row, cells)), where


@pytest.mark.parametrize("backend", BACKENDS)
def test_library(probe: Any, backend: str) -> None:
    """Layers that a library made of the host's, in place."""
    mine = [row for row in LIBRARY if row.format_id.partition("-")[0] == backend]
    found = probe("ProbeOffload", tuple(dict.fromkeys(row.format_id for row in mine)), "library")
    for row in mine:
        agree(row, found[row.format_id])


def test_unfrozen_quanto_layers_stop_as_frozen_ones_do(probe: Any) -> None:
    cells = probe("ProbeOffload", ("quanto-unfrozen",), "library")["quanto-unfrozen"]
    for row in LIBRARY:
        if row.format_id == "quanto-qint8":
            assert verdict_of(row, cells) is row.verdict, (row, cells)


@pytest.mark.parametrize("format_id", ["bnb-nf4", "quanto-qint8", "sdnq-uint4", "torchao-int8wo"])
def test_layers_of_the_library_carrier_stay_in_host_memory(comfyui: Any, format_id: str) -> None:
    """The same of a model that the host has loaded and QuantizeModel has quantized."""
    quantize = node("QuantizeModel", model=["model", 0], format=format_id, carrier="library")
    graph = {"model": unet(), "q": quantize, "tell": node("ProbePlaces", model=["q", 0])}
    found = json.loads(comfyui.run(graph)["tell"]["text"][0])
    assert found["layers"] >= 18
    assert found["left"] == found["layers"]


@pytest.mark.parametrize("format_id", OURS)
def test_ours(probe: Any, format_id: str) -> None:
    streams(probe("ProbeOffload", (format_id,), "quantwire")[format_id])


def streams(cells: Cells) -> None:
    for name, cell in cells.items():
        places = cell["places"]
        assert cell["values"] == "equal", (name, cell)
        assert (places["error"], places["stranded"], places["resident"]) == ("", 0, 0), (name, cell)
        kept = {"none": 6, "partial/whole": 6, "partial/few": 0, "novram": 0, "dynamic": 0}.get(name, places["kept"])
        assert (places["kept"], places["streamed"]) == (kept, 6 - kept)
    assert 0 < cells["partial/half"]["places"]["kept"] < 6
    assert cells["dynamic"]["gathered"] == "equal"


def test_native(probe: Any) -> None:
    """The host's own quantized layers, from tensors as native files hold them."""
    formats = tuple(dict.fromkeys(row.format_id for row in probed(NATIVE_MEASURED)))
    for cells in probe("ProbeOffload", formats, "host").values():
        streams(cells)


def test_comfyui_gguf(probe: Any) -> None:
    """ComfyUI-GGUF's layers, in the host's modes, and in those of accelerate and diffusers."""
    if not os.environ.get("COMFYUI_GGUF_PATH"):
        pytest.skip("COMFYUI_GGUF_PATH is unset: this test needs a checkout of city96/ComfyUI-GGUF")
    found = probe("ProbeForeign", tuple(key.removeprefix("comfyui-") for key in FOREIGN))
    for row in probed(FOREIGN_MEASURED):
        agree(row, found[row.format_id.removeprefix("comfyui-")])
    for row in probed(FOREIGN_MEASURED, HostName.STANDALONE):
        cell = "/".join(filter(None, ("standalone", row.mode.value, row.variant)))
        seen: Any = found[row.format_id.removeprefix("comfyui-")][cell]
        assert (seen == "equal") is (row.verdict is OK), (row, seen)
        assert row.verdict is OK or seen.startswith(row.raw_error), (row, seen)


def test_launch_flags() -> None:
    """Every option named is one of the host's, and those that leave dynamic VRAM on are those that the table says."""
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is unset: this test needs a ComfyUI tree")
    code = (
        "import json, sys, comfy.cli_args as c\n"
        "def told(flag):\n"
        "    c.args = c.parser.parse_args(flag.split())\n"
        "    return c.enables_dynamic_vram()\n"
        "print(json.dumps({flag: told(flag) for flag in json.loads(sys.argv[1])}))"
    )
    flags = json.dumps([entry.flag for entry in LAUNCH_FLAGS])
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    done = subprocess.run(
        [python, "-c", code, flags], cwd=os.environ["COMFYUI_PATH"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {entry.flag: entry.mode is OffloadMode.DYNAMIC for entry in LAUNCH_FLAGS}
