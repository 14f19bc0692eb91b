"""How formats run on devices: the rules against the kernels, the libraries and the sources that they name."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from quantwire.quantizers.apply import quantize_tensor
from quantwire.quantizers.auto import DeviceFacts
from quantwire.quantizers.compat.modes import HostName
from quantwire.quantizers.errors import SpecError
from quantwire.quantizers.measure.native import KINDS, Runs, parse_device, running
from quantwire.quantizers.measure.native_rules import RULES
from quantwire.quantizers.registry import availability, format_ids, get_quantizer
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedWeight

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("gguf-q8-0", "gguf-q4-k", "gguf-iq4-nl", "gguf-nvfp4", "comfy-int8", "comfy-w4a8", "comfy-nvfp4")
QUICK += ("comfy-fp8-e4m3fn", "layerwise-fp8-e4m3fn")
# Around every number of rows at which a rule changes.
TOKENS = (1, 4, 8, 9, 12, 13, 16, 17, 24, 25, 32, 33, 128, 4096)
COMFYUI, STANDALONE = HostName.COMFYUI, HostName.STANDALONE
VERSIONS = {"comfy_kitchen": ("comfy-kitchen", "0.2.40"), "bitsandbytes": ("bitsandbytes", "0.50.2")}
VERSIONS |= {"optimum": ("optimum-quanto", "0.2.7"), "torchgen": ("torch", "2.13.0")}


def device(text: str) -> DeviceFacts:
    return parse_device(text, 8 << 30)


def weight(format_id: str) -> QuantizedWeight:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    return quantize_tensor("sample.weight", w, QuantSpec(format_id))[0]


def check_against_kernels(format_id: str) -> None:
    q, cpu = weight(format_id), device("cpu")
    for tokens in TOKENS:
        kernel = get_quantizer(format_id).kernel(q, torch.device("cpu"), torch.bfloat16, tokens)
        assert running(format_id, cpu, STANDALONE, tokens).product == kernel.name, f"{tokens} rows: {kernel.reason}"


def check_float8(format_id: str) -> None:
    """Apple GPUs hold no float8: a format cannot run there exactly when one of its tensors is of such a dtype."""
    small = any("float8" in str(t.dtype) for t in weight(format_id).tensors.values())
    assert (running(format_id, device("mps"), STANDALONE).level is Runs.NOT) is small


@pytest.mark.parametrize("format_id", QUICK)
def test_the_rules_for_a_cpu_are_what_the_kernels_do(format_id: str) -> None:
    check_against_kernels(format_id)
    check_float8(format_id)


@pytest.mark.slow
@pytest.mark.parametrize("format_id", [f for f in format_ids() if f not in QUICK])
def test_the_rules_for_a_cpu_are_what_the_kernels_of_every_format_do(format_id: str) -> None:
    if not availability(format_id).works:
        pytest.skip(availability(format_id).reason)
    check_against_kernels(format_id)
    check_float8(format_id)


LAYOUTS = {
    "comfy-fp8-e4m3fn": "TensorCoreFP8Layout",
    "comfy-mxfp8": "TensorCoreMXFP8Layout",
    "comfy-nvfp4": "TensorCoreNVFP4Layout",
    "comfy-int8": "TensorWiseINT8Layout",
    "comfy-w4a4-convrot": "TensorCoreConvRotW4A4Layout",
}


@pytest.mark.parametrize("format_id", LAYOUTS)
def test_the_least_capability_is_the_librarys(format_id: str) -> None:
    tensors = importlib.import_module("comfy_kitchen.tensor")
    major, minor = getattr(tensors, LAYOUTS[format_id]).MIN_SM_VERSION
    below = (major, minor - 1) if minor else (major - 1, 9)
    assert running(format_id, device(f"cuda:{major}.{minor}"), COMFYUI).level is Runs.NATIVE
    assert running(format_id, device(f"cuda:{below[0]}.{below[1]}"), COMFYUI).level is not Runs.NATIVE


@pytest.mark.parametrize(
    ("format_id", "where", "host", "level", "activations"),
    [
        ("comfy-fp8-e4m3fn", "cuda:8.9", STANDALONE, Runs.EMULATED, ""),  # outside ComfyUI weight only
        ("comfy-nvfp4", "cuda:8.9", COMFYUI, Runs.EMULATED, ""),
        ("comfy-nvfp4", "cuda:12.0", COMFYUI, Runs.NATIVE, "nvfp4"),
        ("comfy-w4a4-convrot", "cuda:8.6", COMFYUI, Runs.NATIVE, "int4"),
        ("comfy-w4a4-convrot", "cuda:9.0", COMFYUI, Runs.NATIVE, "int8"),
        ("comfy-w4a4-convrot", "cpu", COMFYUI, Runs.EMULATED, "int4"),
        ("comfy-w4a8", "cuda:7.5", COMFYUI, Runs.NATIVE, "int8"),
        ("comfy-int8", "mps", COMFYUI, Runs.NOT, ""),
        ("comfy-int8", "cuda:7.0", COMFYUI, Runs.UNKNOWN, "int8"),
        ("comfy-fp8-e4m3fn", "rocm", COMFYUI, Runs.EMULATED, ""),
        ("comfy-int8", "rocm", COMFYUI, Runs.UNKNOWN, "int8"),  # by the kind of GPU, which `rocm` does not tell
        ("comfy-w4a8", "rocm", COMFYUI, Runs.UNKNOWN, "int8"),
        ("comfy-w4a4-convrot", "rocm", COMFYUI, Runs.UNKNOWN, "int4"),
        ("torchao-int8dyn", "rocm", STANDALONE, Runs.UNKNOWN, "int8"),
        ("bnb-int8", "cuda:7.5", STANDALONE, Runs.NATIVE, "int8"),
        ("bnb-int8", "cuda:7.0", STANDALONE, Runs.EMULATED, ""),
        ("bnb-nf4", "cuda:8.6", STANDALONE, Runs.EMULATED, ""),
        ("quanto-qint8", "cuda:8.6", STANDALONE, Runs.EMULATED, ""),
        ("torchao-int8dyn", "xpu", STANDALONE, Runs.EMULATED, ""),
        ("gguf-q4-k", "cuda:8.6", COMFYUI, Runs.EMULATED, ""),
    ],
)
def test_what_runs_how(format_id: str, where: str, host: HostName, level: Runs, activations: str) -> None:
    found = running(format_id, device(where), host)
    assert (found.level, found.activations) == (level, activations)
    assert found.measured is (where == "cpu")


def test_few_rows_need_no_buffer() -> None:
    assert not running("bnb-nf4", device("cuda:8.6"), tokens=1).buffer
    assert running("bnb-nf4", device("cuda:8.6"), tokens=4096).buffer
    assert not running("gguf-q4-k", device("cuda:8.6"), tokens=128).buffer
    assert running("gguf-q4-k", device("cuda:7.5"), tokens=128).buffer


@pytest.mark.parametrize("host", HostName)
@pytest.mark.parametrize("where", [*(kind for kind in KINDS if kind != "cuda"), "cuda:5.0", "cuda:8.6", "cuda:12.0"])
def test_every_format_has_an_answer(where: str, host: HostName) -> None:
    for format_id in format_ids(writable=False):
        found = running(format_id, device(where), host)
        assert found.why
        assert found.source
        assert found.to_dict()["evidence"] == ("measured" if where == "cpu" else "read")
        assert str(found).startswith(found.level.value)


def places() -> Iterator[tuple[str, str]]:
    """(file, line or name) of every place that a rule names, but for ComfyUI's own, which is not installed here."""
    for source in sorted({rule.source for rule in RULES}):
        folder = ""
        for part in re.split(r"[;,] ", source):
            if part.startswith(("ComfyUI ", "github.com/")):
                folder = ""
                continue
            path, _, place = re.sub(r"^torch \S+: ", "", part).partition(":")
            package = folder.partition("/")[0]
            path = path or folder  # `:828` is of the same file, `tensor/int8.py:79` of the same package
            folder = path if path.startswith((*VERSIONS, "quantizers")) else f"{package}/{path}"
            yield folder, place.strip()


def test_sources_are_where_the_rules_say() -> None:
    seen: set[str] = set()
    for path, place in places():
        package = path.partition("/")[0]
        seen.add(package)
        if package == "quantizers":
            assert place in (ROOT / path).read_text(encoding="utf-8"), f"{path}: {place}"
            continue
        name, version = VERSIONS[package]
        if importlib.metadata.version(name).partition("+")[0] != version:
            continue  # the rules were read in another version
        lines = (Path(torch.__file__).parents[1] / path).read_text(encoding="utf-8").splitlines()
        assert int(re.split(r"\D", place)[0]) <= len(lines), f"{path}: {place}"
    assert seen == {"quantizers", *VERSIONS}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cuda", "compute capability"),
        ("cuda:0.0", "5.0 to 12.9"),
        ("cuda:99.9", "5.0 to 12.9"),
        ("cuda:86", "is no device"),
        ("gpu", "is no device"),
        ("", "is no device"),
    ],
)
def test_wrong_devices(text: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        parse_device(text, 1)


def test_a_cuda_device_without_capability_is_refused() -> None:
    with pytest.raises(SpecError, match="needs its compute capability"):
        running("gguf-q8-0", DeviceFacts("cuda", "a GPU", 1, 1))
    with pytest.raises(SpecError, match="no kind of device"):
        running("gguf-q8-0", DeviceFacts("npu", "an NPU", 1, 1))
    with pytest.raises(SpecError, match="Unknown format"):
        running("gguf-q9", device("cpu"))
