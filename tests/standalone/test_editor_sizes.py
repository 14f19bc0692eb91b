"""POST /quantwire/sizes and GET /quantwire/formats, and the numbers for a badge."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from quantwire.hosts import use
from quantwire.hosts.editor.formats import FORMAT_WIDGETS, formats
from quantwire.hosts.editor.sizes import sizes
from quantwire.hosts.standalone.host import StandaloneHost
from quantwire.hosts.standalone.workflow import NodeSpec
from quantwire.nodes import NODE_CLASS_MAPPINGS
from quantwire.nodes.common import badge_of
from quantwire.quantizers.registry import format_ids

LOADER = {"class_type": "UNETLoader", "inputs": {"unet_name": "digits_flux.safetensors", "weight_dtype": "default"}}
ENCODER = {"class_type": "CLIPLoader", "inputs": {"clip_name": "digits_clip.safetensors", "type": "stable_diffusion"}}


@pytest.fixture(autouse=True)
def host(demo_models: Path) -> Iterator[StandaloneHost]:
    with use(StandaloneHost([demo_models])) as found:
        assert isinstance(found, StandaloneHost)
        yield found


def model(**inputs: Any) -> dict[str, Any]:
    return {"class_type": "QuantizeModel", "inputs": {"model": ["1", 0], "format": "bnb-nf4", **inputs}}


def of(node: dict[str, Any], *wanted: str, **others: dict[str, Any]) -> dict[str, Any]:
    nodes = {"1": LOADER, "2": ENCODER, "9": node, **others}
    return sizes(nodes, ["9"], list(wanted) or None)["9"]


@pytest.mark.parametrize("format_id", ["bnb-nf4", "quanto-qint8", "gguf-q4-k", "comfy-int8"])
def test_the_predicted_size_is_that_of_the_run(host: StandaloneHost, demo_models: Path, format_id: str) -> None:
    from quantwire.hosts.standalone.models import load_diffusion_model

    told = of(model(), format_id)
    loaded = load_diffusion_model(demo_models / "diffusion_models" / "digits_flux.safetensors")
    ran = NODE_CLASS_MAPPINGS["QuantizeModel"]().quantize(loaded, format_id)
    (badge,) = ran["ui"]["quantwire"]
    assert told["sizes"] == {format_id: badge["nbytes_after"]}
    assert told["base_nbytes"] == badge["nbytes_before"]
    share = round(100 * badge["nbytes_after"] / badge["nbytes_before"])
    assert told["text"][format_id].endswith(f" MiB, {share} %")
    assert badge["format"] == format_id
    assert badge["sqnr_db"] > 10
    json.dumps(badge)


def test_every_format_at_once() -> None:
    told = of(model(), *format_ids())
    assert told["sizes"].keys() | told["refused"].keys() == set(format_ids())
    assert of(model())["sizes"] == {"bnb-nf4": told["sizes"]["bnb-nf4"]}
    assert len(told["sizes"]) > 40


def test_options_of_the_node_count() -> None:
    whole, kept = of(model(), "bnb-nf4"), of(model(keep_layers="ff.net.0.proj"), "bnb-nf4")
    assert kept["sizes"]["bnb-nf4"] > whole["sizes"]["bnb-nf4"]
    config = {"class_type": "QuantConfig", "inputs": {"uri": "bnb-nf4;bits4-use-double-quant=true"}}
    doubly = of(model(config=["5", 0], format="from config"), "from config", **{"5": config})
    assert doubly["sizes"]["from config"] < whole["sizes"]["bnb-nf4"]
    assert doubly["text"]["from config"].startswith("bnb-nf4: ")
    rules = {"class_type": "QuantRules", "inputs": {"rules": "*.ff.* = keep"}}
    assert of(model(config=["5", 0]), "bnb-nf4", **{"5": rules})["sizes"]["bnb-nf4"] > whole["sizes"]["bnb-nf4"]


def test_a_pattern_without_a_layer_is_told() -> None:
    told = of(model(keep_layers="no_such_layer"), "bnb-nf4")
    assert told["sizes"] == {}
    assert "no_such_layer" in told["refused"]["bnb-nf4"]


def test_auto_names_its_choice() -> None:
    told = of(model(format="auto"), "auto")
    chosen = told["text"]["auto"].partition(":")[0]
    assert chosen in format_ids()
    assert told["sizes"]["auto"] == of(model(), chosen)["sizes"][chosen]


def test_text_encoders_and_loaders() -> None:
    encoder = {"class_type": "QuantizeTextEncoder", "inputs": {"clip": ["2", 0], "format": "bnb-nf4"}}
    told = of(encoder, "bnb-nf4")
    assert 0 < told["sizes"]["bnb-nf4"] < told["base_nbytes"]
    kept = of({**encoder, "inputs": {**encoder["inputs"], "per_encoder": "clip_l = keep"}}, "bnb-nf4")
    assert kept["sizes"]["bnb-nf4"] == told["base_nbytes"]
    loading = {
        "class_type": "LoadAndQuantize",
        "inputs": {"model_name": "digits_flux.safetensors", "format": "bnb-nf4"},
    }
    assert of(loading, "bnb-nf4")["sizes"] == of(model(), "bnb-nf4")["sizes"]


def test_a_conversion_is_told_as_the_file_becomes(tmp_path: Path, demo_models: Path) -> None:
    """The very bytes of the file that ConvertModel then writes."""
    folder = tmp_path / "diffusion_models"
    folder.mkdir()
    source = demo_models / "diffusion_models" / "digits_flux.safetensors"
    (folder / source.name).write_bytes(source.read_bytes())
    inputs = {"model_name": f"diffusion_models/{source.name}", "type": "Q8_0"}
    with use(StandaloneHost([tmp_path])):
        told = of({"class_type": "ConvertModel", "inputs": inputs})
        NODE_CLASS_MAPPINGS["ConvertModel"]().convert(**inputs)
    (made,) = folder.glob("*.gguf")
    assert told["sizes"] == {"Q8_0": made.stat().st_size}
    assert told["base_nbytes"] == source.stat().st_size


def without_source(**extra: Any) -> dict[str, Any]:
    return {"class_type": "QuantizeModel", "inputs": {"format": "bnb-nf4", **extra}}


@pytest.mark.parametrize(
    ("node", "others", "said"),
    [
        (without_source(), {}, "nothing is linked"),
        (without_source(model=["8", 0]), {"8": model()}, "quantizes it already"),
        (model(), {"1": {**LOADER, "inputs": {**LOADER["inputs"], "unet_name": "gone.safetensors"}}}, "'gone.safe"),
        (model(), {"1": {**LOADER, "inputs": {**LOADER["inputs"], "weight_dtype": "fp8_e5m2"}}}, "fp8_e5m2"),
        (model(model=["9", 0]), {}, "its own outputs"),
        (model(config=["8", 0]), {"8": {"class_type": "FindRecipe", "inputs": {}}}, "when the graph runs"),
        ({"class_type": "KSampler", "inputs": {}}, {}, "no format"),
    ],
    ids=["no-link", "twice", "no-file", "cast", "cycle", "config", "other-node"],
)
def test_what_is_not_known_has_a_reason(node: dict[str, Any], others: dict[str, Any], said: str) -> None:
    told = of(node, "bnb-nf4", **others)
    assert list(told) == ["reason"]
    assert said in told["reason"]


CONVERT = {"model_name": "diffusion_models/digits_flux.safetensors", "type": "Q8_0"}


def convert(**inputs: Any) -> dict[str, Any]:
    return {"class_type": "ConvertModel", "inputs": {**CONVERT, **inputs}}


@pytest.mark.parametrize(
    ("node", "said"),
    [
        (convert(keep_layers=7), "`keep_layers` is 7, and no text"),
        (convert(imatrix_name=5), "`imatrix_name` is 5"),
        (convert(calibration_name={"a": 1}), "`calibration_name` is {'a': 1}"),
        (convert(layout=3), "`layout` is 3"),
        (convert(type=["a"]), "`type` is ['a']"),
        (model(model=["77", 0]), "node 77, which it is linked to, is not in the workflow"),
        (model(config=["78", 0]), "node 78, which it is linked to, is not in the workflow"),
        (model(format=None), "`format` is None, and no text"),
        (model(format=5), "`format` is 5, and no text"),
        (model(format=["2", 0]), "`format` comes from a link"),
        (model(keep_layers=["2", 0]), "`keep_layers` comes from a link"),
        ({"class_type": "LoadAndQuantize", "inputs": {"model_name": 5, "format": "bnb-nf4"}}, "no file is chosen"),
    ],
    ids=lambda v: str(v)[:60] if isinstance(v, str) else "",
)
def test_an_odd_value_has_a_reason_and_costs_the_other_nodes_nothing(node: dict[str, Any], said: str) -> None:
    told = sizes({"1": LOADER, "2": ENCODER, "3": model(), "9": node}, ["9", "3"])
    assert list(told["9"]) == ["reason"]
    assert said in told["9"]["reason"]
    assert told["3"]["sizes"]["bnb-nf4"] > 0


def test_an_empty_value_is_none() -> None:
    assert of(model(keep_layers=None)) == of(model())
    assert of(convert(keep_layers=None, imatrix_name=None)) == of(convert())


def test_a_fault_of_one_node_is_its_own(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever fails: the other nodes have their sizes, and the log has the traceback."""
    from quantwire.nodes import conversion

    monkeypatch.setattr(conversion, "resolve", lambda name: {}[name])
    told = sizes({"1": LOADER, "3": model(), "9": convert()}, ["9", "3"])
    assert "KeyError" in told["9"]["reason"]
    assert told["3"]["sizes"]["bnb-nf4"] > 0
    assert "Traceback" in caplog.text


def test_a_file_that_is_replaced_is_read_again(tmp_path: Path, demo_models: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "diffusion_models"
    folder.mkdir()
    source = load_file(demo_models / "diffusion_models" / "digits_flux.safetensors")
    path = folder / "digits_flux.safetensors"
    save_file({name: t.to(torch.bfloat16) for name, t in source.items()}, path)
    with use(StandaloneHost([tmp_path])):
        half = of(model(), "bnb-nf4")["base_nbytes"]
        save_file({name: t.float() for name, t in source.items()}, path)
        assert of(model(), "bnb-nf4")["base_nbytes"] == 2 * half


def test_widgets_that_depend_are_widgets() -> None:
    """Each is an input of its class, with the class's default, and every value is one that the other widget takes."""
    told = formats()
    assert told["formats"].keys() == set(format_ids())
    for name, node in told["nodes"].items():
        spec = NodeSpec.of(NODE_CLASS_MAPPINGS[name])
        assert node["widget"] is None or node["widget"] == FORMAT_WIDGETS[name]
        for widget, rule in node["depends"].items():
            info = spec.get(widget)
            assert info is not None
            assert rule["default"] == info.options["default"]
            for condition in rule["when"]:
                by = spec.get(condition["widget"])
                assert by is not None
                choices = by.choices if by.choices is not None else [True, False]
                assert set(condition["in"]) <= set(choices), (name, widget)
                assert set(condition["in"]) != set(choices), (name, widget)


def test_the_carrier_is_shown_for_formats_that_have_layers(host: StandaloneHost) -> None:
    """What is out of sight in the editor is what `carrier` library is refused for."""
    import torch
    from quantwire.quantizers.compat.modes import Carrier
    from quantwire.quantizers.errors import SpecError
    from quantwire.quantizers.registry import availability, get_quantizer
    from quantwire.quantizers.spec import QuantSpec

    (rule,) = formats()["nodes"]["QuantizeModel"]["depends"]["carrier"]["when"]
    w = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    slow = ("gguf-iq1", "gguf-iq2", "gguf-iq3")  # seconds each to make
    for format_id in (f for f in format_ids() if availability(f).works and not f.startswith(slow)):
        weight = get_quantizer(format_id).quantize(w, QuantSpec(format_id))
        try:
            host.make_layer(weight, None, Carrier.LIBRARY)
            made = True
        except SpecError:
            made = False
        assert made == (format_id in rule["in"]), format_id


def test_probed_formats_say_whether_they_run() -> None:
    assert {f["available"] for f in formats()["formats"].values()} <= {None, True, False}


def test_a_report_without_numbers_has_no_badge() -> None:
    assert badge_of("text") == {}
