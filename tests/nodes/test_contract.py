"""What ComfyUI's editor and every graph file rely on: ids, inputs, outputs and the text on them."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest
import quantwire
from quantwire.hosts.standalone.core_nodes import CORE_NODES
from quantwire.hosts.standalone.workflow import NodeSpec
from quantwire.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

ALL: dict[str, Any] = {**CORE_NODES, **NODE_CLASS_MAPPINGS}
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN")
each_node = pytest.mark.parametrize("node", ALL.values(), ids=ALL)
each_own_node = pytest.mark.parametrize("node", NODE_CLASS_MAPPINGS.values(), ids=NODE_CLASS_MAPPINGS)


def declared(node: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    types = node.INPUT_TYPES()
    return {
        n: (v[0], v[1] if len(v) > 1 else {}) for g in ("required", "optional") for n, v in types.get(g, {}).items()
    }


def test_ids_are_permanent() -> None:
    """Shared workflows hold them: an id may be added here, never renamed or removed."""
    assert list(NODE_CLASS_MAPPINGS) == [
        "QuantizeModel",
        "QuantizeTextEncoder",
        "QuantizeControlNet",
        "QuantConfig",
        "QuantRules",
        "LoadGGUF",
        "LoadGGUFTextEncoder",
        "LoadAndQuantize",
        "LoadQuantized",
        "OffloadCompat",
        "InspectModel",
        "RepairModel",
        "ConvertModel",
        "SaveQuantized",
        "RecordImatrix",
        "SaveImatrix",
        "SaveCalibration",
        "AdviseFormat",
        "BenchmarkModel",
        "CompareQuality",
        "FindRecipe",
        "FitModel",
        "MemoryForecast",
    ]
    assert set(NODE_DISPLAY_NAME_MAPPINGS) == set(NODE_CLASS_MAPPINGS)


def test_core_nodes_are_those_promised() -> None:
    assert set(CORE_NODES) == {
        "UNETLoader", "CLIPLoader", "DualCLIPLoader", "VAELoader", "LoraLoaderModelOnly", "CLIPTextEncode",
        "FluxGuidance", "EmptySD3LatentImage", "KSampler", "VAEDecode", "SaveImage", "PreviewImage", "PreviewAny",
    }  # fmt: skip


def test_mappings_are_lazy() -> None:
    """Importing the package must not cost the host the nodes, let alone torch."""
    code = (
        "import sys, quantwire; assert 'torch' not in sys.modules and 'quantwire.nodes' not in sys.modules;"
        "assert 'QuantizeModel' in quantwire.NODE_CLASS_MAPPINGS; assert 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError, match="NO_SUCH"):
        _ = quantwire.NO_SUCH  # type: ignore[attr-defined]


@each_node
def test_inputs(node: Any) -> None:
    assert set(node.INPUT_TYPES()) <= {"required", "optional", "hidden"}
    NodeSpec.of(node)
    for name, (kind, options) in declared(node).items():
        assert options.get("tooltip", "").endswith("."), name
        assert isinstance(kind, (str, list)), name
        if isinstance(kind, list) and "default" in options:
            assert options["default"] in kind, name


@each_node
def test_description(node: Any) -> None:
    assert node.DESCRIPTION.endswith(".")
    assert node.CATEGORY


@each_node
def test_function_takes_every_input(node: Any) -> None:
    parameters = inspect.signature(getattr(node, node.FUNCTION)).parameters
    names = [n for n in parameters if n != "self"]
    assert set(names) == {*declared(node), *node.INPUT_TYPES().get("hidden", {})}
    optional = node.INPUT_TYPES().get("optional", {})
    assert all(parameters[n].default is not inspect.Parameter.empty for n in optional), "ComfyUI omits unset ones"


@each_node
def test_function_defaults_are_the_widgets(node: Any) -> None:
    parameters = inspect.signature(getattr(node, node.FUNCTION)).parameters
    for name, (kind, options) in declared(node).items():
        default = parameters[name].default
        if (
            "default" in options
            and default is not inspect.Parameter.empty
            and (kind in WIDGETS or isinstance(kind, list))
        ):
            assert default == options["default"], name


@each_own_node
def test_outputs(node: Any) -> None:
    assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) == len(node.OUTPUT_TOOLTIPS)
    assert all(t.endswith(".") for t in node.OUTPUT_TOOLTIPS)


@each_node
def test_checks_take_only_inputs(node: Any) -> None:
    for check in ("VALIDATE_INPUTS", "IS_CHANGED"):
        if hasattr(node, check):
            found = inspect.signature(getattr(node, check)).parameters.values()
            assert {p.name for p in found if p.kind is not p.VAR_KEYWORD} <= set(declared(node))
