"""The list of formats, and what a missing, old or broken library leads to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from quantwire.quantizers.backends.gguf import Gguf
from quantwire.quantizers.errors import SpecError
from quantwire.quantizers.formats import FormatEntry
from quantwire.quantizers.registry import format_ids, get_entry, get_quantizer, register, require
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedWeight
from torch import Tensor

# Ids are permanent: files, caches and shared workflows hold them. Add to these lists, never rename or take away. The
# order is that of menus.
FORMATS = [
    "bnb-int8",
    "bnb-nf4",
    "bnb-fp4",
    "quanto-qint8",
    "quanto-qint4",
    "quanto-qint2",
    "quanto-qfloat8-e4m3fn",
    "quanto-qfloat8-e5m2",
    "comfy-fp8-e4m3fn",
    "comfy-fp8-e5m2",
    "comfy-nvfp4",
    "comfy-mxfp8",
    "comfy-int8",
    "comfy-int8-convrot",
    "comfy-w4a4-convrot",
    "comfy-w4a8",
    "sdnq-int8",
    "sdnq-uint8",
    "sdnq-int6",
    "sdnq-uint6",
    "sdnq-int5",
    "sdnq-uint5",
    "sdnq-int4",
    "sdnq-uint4",
    "sdnq-uint3",
    "sdnq-uint2",
    "sdnq-float8-e4m3fn",
    "sdnq-float4-e2m1fn",
    "torchao-int8wo",
    "torchao-int8dyn",
    "torchao-int4wo",
    "torchao-float8wo",
    "nncf-int8-sym",
    "nncf-int8-asym",
    "nncf-int4-sym",
    "nncf-int4-asym",
    "nncf-nf4",
    "layerwise-fp8-e4m3fn",
    "layerwise-fp8-e5m2",
    "gguf-q8-0",
    "gguf-q4-0",
    "gguf-q4-1",
    "gguf-q5-0",
    "gguf-q5-1",
    "gguf-q2-k",
    "gguf-q3-k",
    "gguf-q4-k",
    "gguf-q5-k",
    "gguf-q6-k",
    "gguf-iq1-s",
    "gguf-iq1-m",
    "gguf-iq2-xxs",
    "gguf-iq2-xs",
    "gguf-iq2-s",
    "gguf-iq3-xxs",
    "gguf-iq3-s",
    "gguf-iq4-nl",
    "gguf-iq4-xs",
    "gguf-tq1-0",
    "gguf-tq2-0",
    "gguf-mxfp4",
    "gguf-nvfp4",
]
# Ids that menus leave out and that only a URI names; a sample.
UNLISTED = ("sdnq-int2", "sdnq-uint7", "sdnq-int12", "sdnq-uint16", "sdnq-float6-e3m2fn", "sdnq-float16")

ASKED = ("bnb-nf4", "quanto-qint8", "comfy-nvfp4", "sdnq-uint4", "torchao-int4wo", "nncf-nf4", "gguf-q8-0")

# Prints format id -> message of BackendUnavailable for one format of each library.
ASK = """
import json
from quantwire.quantizers.errors import BackendUnavailable
from quantwire.quantizers.registry import require
messages = {}
for format_id in ASKED:
    try:
        require(format_id)
    except BackendUnavailable as err:
        messages[format_id] = str(err)
print(json.dumps(messages))
"""

# Takes the place of the finder behind sys.path, for modules and for installed distributions alike, so that the
# libraries are as absent as if they had never been installed.
HIDE = """
import importlib.machinery, sys
HIDDEN = {"bitsandbytes", "optimum", "optimum-quanto", "comfy_kitchen", "comfy-kitchen"}
HIDDEN |= {"sdnq", "torchao", "nncf", "gguf", "libggml", "libggml-python"}
class Hiding:
    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in HIDDEN
        return None if hidden else importlib.machinery.PathFinder.find_spec(name, path, target)
    def find_distributions(self, context):
        return [] if context.name in HIDDEN else importlib.machinery.PathFinder.find_distributions(context)
sys.meta_path = [Hiding() if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
"""


def ask(before: str = "", formats: tuple[str, ...] = ASKED) -> dict[str, str]:
    """What a process of its own says of each format that cannot run there, after the statements of `before`."""
    code = f"{before}\nASKED = {formats!r}\n{ASK}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_format_ids_are_permanent() -> None:
    assert format_ids() == FORMATS
    assert format_ids(writable=False) == FORMATS


@pytest.mark.parametrize("format_id", UNLISTED)
def test_unlisted_ids_are_permanent_too(format_id: str) -> None:
    assert format_id not in format_ids(writable=False)
    assert QuantSpec(format_id).format_id == format_id
    assert QuantSpec.from_uri(QuantSpec(format_id).to_uri()).format_id == format_id


def test_there_is_a_format_for_every_type_that_gguf_dequantizes() -> None:
    import gguf

    known = {f"gguf-{t.name.lower().replace('_', '-')}" for t in gguf.quants._type_traits} - {"gguf-bf16"}
    assert known == {f for f in format_ids(writable=False) if f.startswith("gguf-")}


class BrokenProduct(Gguf):
    """Quantizes and dequantizes as it should; stands in for bitsandbytes 0.46 to 0.49 on 4-bit weights."""

    def linear(self, x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


class WrongProduct(Gguf):
    def linear(self, x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Tensor:
        return super().linear(x, q, bias).flip(-1)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (BrokenProduct, "does not run here: mat1 and mat2 shapes cannot be multiplied"),
        (WrongProduct, "computes wrong products here (torch.float32 activations)."),
    ],
)
def test_a_library_whose_product_fails_is_unavailable(kind: type[Gguf], reason: str) -> None:
    state = kind("gguf-q8-0").probe()
    assert (state.works, state.remedy) == (False, "Choose a bnb or quanto format.")
    assert state.reason == f"libggml-python {state.version} {reason}"


@pytest.mark.parametrize("format_id", FORMATS)
def test_every_format_has_its_quantizer(format_id: str) -> None:
    assert get_quantizer(format_id).format_id == format_id
    assert get_quantizer(format_id) is get_quantizer(format_id)
    assert get_entry(format_id).backend == format_id.partition("-")[0]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["new-a", "bnb-nf4"], "Format 'bnb-nf4' is already registered."),
        (["new-a", "new-a"], "Format 'new-a' is already registered."),
    ],
    ids=["taken", "twice"],
)
def test_a_failed_register_changes_nothing(ids: list[str], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        register([FormatEntry(i, "bnb", "make", 4, "") for i in ids])
    assert format_ids() == FORMATS
    with pytest.raises(SpecError, match="Unknown format 'new-a'"):
        get_entry("new-a")


def test_unknown_id_offers_near_names() -> None:
    with pytest.raises(SpecError) as failure:
        require("gguf-q8_0")
    first, second = str(failure.value).splitlines()
    assert first.startswith("Unknown format 'gguf-q8_0'. Did you mean gguf-q8-0")
    assert second == f"Formats: {', '.join(FORMATS)}."


def test_a_missing_library() -> None:
    assert ask(HIDE, (*ASKED, "layerwise-fp8-e4m3fn")) == {
        "bnb-nf4": "bnb-nf4: bitsandbytes is not installed.\n"
        "Run `pip install bitsandbytes`, or choose quanto-qint4 or gguf-q4-0.",
        "quanto-qint8": "quanto-qint8: optimum-quanto is not installed.\n"
        "Run `pip install optimum-quanto`, or choose bnb-int8, bnb-nf4 or a gguf format.",
        "comfy-nvfp4": "comfy-nvfp4: comfy-kitchen is not installed.\n"
        "Run `pip install comfy-kitchen`, or update ComfyUI, which brings it; or choose a bnb, quanto or gguf format.",
        "sdnq-uint4": "sdnq-uint4: sdnq is not installed.\n"
        "Run `pip install sdnq` (its licence is GPL-3.0-only, so installing it is your choice), or choose "
        "quanto-qint8, bnb-nf4 or a gguf format.",
        "torchao-int4wo": "torchao-int4wo: torchao is not installed.\n"
        "Run `pip install torchao`, or choose bnb-int8, bnb-nf4 or a gguf format.",
        "nncf-nf4": "nncf-nf4: nncf is not installed.\n"
        "Run `pip install nncf`, or choose bnb-int8, bnb-nf4 or a gguf format.",
        "gguf-q8-0": "gguf-q8-0: libggml-python is not installed.\n"
        "Run `pip install libggml-python`, or choose a bnb or quanto format.",
    }  # and nothing of layerwise, which needs torch alone


def test_a_library_that_is_too_old(tmp_path: Path) -> None:
    needed = {
        "bitsandbytes": ("bnb-nf4", "0.45.5", "0.46"),
        "optimum-quanto": ("quanto-qint8", "0.2.6rc1", "0.2.7"),
        "comfy-kitchen": ("comfy-nvfp4", "0.2.30", "0.2.31"),
        "sdnq": ("sdnq-uint4", "0.2.7", "0.2.8"),
        "torchao": ("torchao-int4wo", "0.17.1", "0.18"),
        "nncf": ("nncf-nf4", "3.3", "3.4"),
        "libggml-python": ("gguf-q4-k", "0.19.1", "0.20"),
    }
    for name, (_, version, _) in needed.items():
        distribution(tmp_path, name, version)
    asked = tuple("gguf-q4-k" if f == "gguf-q8-0" else f for f in ASKED)
    messages = ask(f"import sys; sys.path.insert(0, {str(tmp_path)!r})", asked)
    assert [m.splitlines()[0] for m in messages.values()] == [
        f"{format_id}: {name} {version} is too old; {least} or newer is needed."
        for name, (format_id, version, least) in needed.items()
    ]
    assert "Run `pip install --upgrade nncf`" in messages["nncf-nf4"]
    assert "Run `pip install --upgrade libggml-python`" in messages["gguf-q4-k"]


def test_files_are_read_where_nothing_can_be_made() -> None:
    """GGUF weights need torch alone; the grids of the IQ2, IQ3 and IQ1 types stand in the gguf package."""
    code = f"""{HIDE}
from quantwire.quantizers.errors import BackendUnavailable
from quantwire.quantizers.registry import availability, format_ids, require_reader
for format_id in format_ids():
    if format_id.startswith("gguf-"):
        assert not availability(format_id).works, format_id
        try:
            require_reader(format_id)
        except BackendUnavailable as err:
            print(format_id, str(err).splitlines())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = dict(line.split(" ", 1) for line in run.stdout.splitlines())
    assert said.keys() == {f"gguf-{n}" for n in ("iq1-s", "iq1-m", "iq2-xxs", "iq2-xs", "iq2-s", "iq3-xxs", "iq3-s")}
    assert all("gguf package" in text for text in said.values())


def test_a_library_that_fails_to_import_keeps_its_reason(tmp_path: Path) -> None:
    distribution(tmp_path, "gguf", "0.99")
    (tmp_path / "gguf.py").write_text("raise OSError('libggml.so: wrong ELF class\\nmore')\n")
    distribution(tmp_path, "comfy-kitchen", "0.99")
    (tmp_path / "comfy_kitchen.py").write_text("raise ImportError\n")
    # layerwise needs no library; those of the others take seconds to import.
    asked = ("gguf-q8-0", "comfy-nvfp4", "layerwise-fp8-e4m3fn")
    # Without ggml's C library gguf's own code quantizes.
    before = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.modules['libggml'] = None"
    assert ask(before, asked) == {
        "gguf-q8-0": "gguf-q8-0: gguf 0.99 does not run here: libggml.so: wrong ELF class\n"
        "Choose a bnb or quanto format.",
        "comfy-nvfp4": "comfy-nvfp4: comfy-kitchen 0.99 does not run here: ImportError\n"
        "Update ComfyUI, which brings it; or choose a bnb, quanto or gguf format.",
    }
