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

FORMATS = [
    "bnb-int8",
    "bnb-nf4",
    "bnb-fp4",
    "quanto-qint8",
    "quanto-qint4",
    "quanto-qfloat8-e4m3fn",
    "gguf-q8-0",
    "gguf-q4-0",
    "comfy-fp8-e4m3fn",
    "comfy-fp8-e5m2",
    "comfy-nvfp4",
    "comfy-mxfp8",
    "comfy-int8",
    "comfy-int8-convrot",
    "comfy-w4a4-convrot",
    "comfy-w4a8",
]
READ_ONLY = [
    f"gguf-{name}"
    for name in (
        *("q4-1", "q5-0", "q5-1", "q2-k", "q3-k", "q4-k", "q5-k", "q6-k", "iq1-s", "iq1-m", "iq2-xxs", "iq2-xs"),
        *("iq2-s", "iq3-xxs", "iq3-s", "iq4-nl", "iq4-xs", "tq1-0", "tq2-0", "mxfp4", "nvfp4"),
    )
]

# Prints format id -> message of BackendUnavailable for one format of each library.
ASK = """
import json
from quantwire.quantizers.errors import BackendUnavailable
from quantwire.quantizers.registry import require
messages = {}
for format_id in ("bnb-nf4", "quanto-qint8", "gguf-q8-0"):
    try:
        require(format_id)
    except BackendUnavailable as err:
        messages[format_id] = str(err)
print(json.dumps(messages))
"""

# Takes the place of the finder behind sys.path, for modules and for installed distributions alike, so that the three
# libraries are as absent as if they had never been installed.
HIDE = """
import importlib.machinery, sys
HIDDEN = {"bitsandbytes", "optimum", "optimum-quanto", "gguf"}
class Hiding:
    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in HIDDEN
        return None if hidden else importlib.machinery.PathFinder.find_spec(name, path, target)
    def find_distributions(self, context):
        return [] if context.name in HIDDEN else importlib.machinery.PathFinder.find_distributions(context)
sys.meta_path = [Hiding() if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
"""


def ask(code: str) -> dict[str, str]:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_format_ids_are_permanent() -> None:
    assert format_ids() == FORMATS  # shared workflows and files hold these ids; add, never rename
    assert [f for f in format_ids(writable=False) if f not in FORMATS] == READ_ONLY


def test_read_only_formats_are_every_other_type_that_gguf_dequantizes() -> None:
    import gguf

    known = {f"gguf-{t.name.lower().replace('_', '-')}" for t in gguf.quants._type_traits} - {"gguf-bf16"}
    assert known == {f for f in format_ids(writable=False) if f.startswith("gguf-")}


@pytest.mark.parametrize("format_id", READ_ONLY)
def test_read_only_formats_run_and_cannot_be_asked_for(format_id: str) -> None:
    assert require(format_id).format_id == format_id
    for make in (QuantSpec, QuantSpec.from_uri):
        with pytest.raises(SpecError, match=f"^{format_id} can be loaded but not made"):
            make(format_id)


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
    assert state.reason == f"gguf {state.version} {reason}"


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
    assert ask(HIDE + ASK) == {
        "bnb-nf4": "bnb-nf4: bitsandbytes is not installed.\n"
        "Run `pip install bitsandbytes`, or choose quanto-qint4 or gguf-q4-0.",
        "quanto-qint8": "quanto-qint8: optimum-quanto is not installed.\n"
        "Run `pip install optimum-quanto`, or choose bnb-int8, bnb-nf4 or a gguf format.",
        "gguf-q8-0": "gguf-q8-0: gguf is not installed.\nRun `pip install gguf`, or choose a bnb or quanto format.",
    }


def test_a_library_that_is_too_old(tmp_path: Path) -> None:
    for name, version in (("bitsandbytes", "0.45.5"), ("optimum-quanto", "0.2.6rc1"), ("gguf", "0.9")):
        distribution(tmp_path, name, version)
    messages = ask(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{ASK}")
    assert [m.splitlines()[0] for m in messages.values()] == [
        "bnb-nf4: bitsandbytes 0.45.5 is too old; 0.46 or newer is needed.",
        "quanto-qint8: optimum-quanto 0.2.6rc1 is too old; 0.2.7 or newer is needed.",
        "gguf-q8-0: gguf 0.9 is too old; 0.17 or newer is needed.",
    ]
    assert "Run `pip install --upgrade gguf`" in messages["gguf-q8-0"]


def test_a_library_that_fails_to_import_keeps_its_reason(tmp_path: Path) -> None:
    distribution(tmp_path, "gguf", "0.99")
    (tmp_path / "gguf.py").write_text("raise OSError('libggml.so: wrong ELF class\\nmore')\n")
    quick = ASK.replace('"quanto-qint8", ', "")  # whose import takes seconds, and gguf with it
    messages = ask(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{quick}")
    assert messages["gguf-q8-0"] == (
        "gguf-q8-0: gguf 0.99 does not run here: libggml.so: wrong ELF class\nChoose a bnb or quanto format."
    )
    assert "bnb-nf4" not in messages
