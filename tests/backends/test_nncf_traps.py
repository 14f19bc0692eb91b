"""What NNCF does to a process that imports it, and that using it through us does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.absent import run_without
from quantwire.quantizers.registry import available_formats, get_quantizer
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import TensorMeta

FORMATS = [f for f in available_formats() if f.startswith("nncf-")]
pytestmark = pytest.mark.skipif(not FORMATS, reason="nncf does not run here")

# Records every attempt to leave the process: connections, name look-ups, and child processes, from which
# `openvino_telemetry` sends.
WATCH = """
import sys
seen = []
watched = ("socket.connect", "socket.sendto", "socket.getaddrinfo", "subprocess.Popen", "os.fork", "os.posix_spawn")
def hook(event, args):
    if event in watched:
        seen.append(event)
sys.addaudithook(hook)
import json, os, torch
"""
USE = """
from quantwire.quantizers.registry import availability, format_ids, get_quantizer
from quantwire.quantizers.spec import QuantSpec
names = [f for f in format_ids() if f.startswith("nncf-")]
assert len(names) == 5
for name in names:
    assert availability(name).works, availability(name)
    get_quantizer(name).quantize(torch.randn(32, 256), QuantSpec(name))
"""
REPORT = """
from nncf.telemetry.wrapper import telemetry
print(json.dumps([type(telemetry).__name__, "openvino_telemetry" in sys.modules, seen, os.environ.get("NNCF_CI")]))
"""


def python(code: str, home: Path) -> Any:
    """The last line of stdout, from JSON. Files that NNCF writes for a user go to `home`."""
    env = {k: v for k, v in os.environ.items() if k not in ("CI", "NNCF_CI", "NNCF_DEV")} | {"HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def client_ids(home: Path) -> list[Path]:
    return [p for p in home.rglob("*") if "intel" in p.relative_to(home).parts[0].lower()]


def test_the_library_by_itself_has_telemetry(tmp_path: Path) -> None:
    pytest.importorskip("openvino_telemetry", reason="NNCF cannot send anything without it")
    kind, sender, _, _ = python(WATCH + "import nncf\n" + REPORT, tmp_path)
    assert (kind, sender) == ("NNCFTelemetry", True)
    assert client_ids(tmp_path)


def test_through_us_it_sends_nothing(tmp_path: Path) -> None:
    kind, sender, seen, switch = python(WATCH + USE + REPORT, tmp_path)
    assert (kind, sender) == ("MagicMock", False)  # NNCF's own stub
    assert seen == []
    assert switch is None  # the environment is as it was
    assert client_ids(tmp_path) == []


def test_an_nncf_imported_before_us_is_told_nothing(tmp_path: Path) -> None:
    """Its telemetry is then alive, so none of its functions used here may report to it."""
    pytest.importorskip("openvino_telemetry", reason="NNCF cannot send anything without it")
    spy = """
import nncf, openvino_telemetry
from nncf.telemetry.wrapper import telemetry
seen.clear()
told = []
for name in ("start_session", "send_event", "end_session"):
    setattr(telemetry, name, lambda *args, **kwargs: told.append(args))
"""
    report = """
ours = [type(telemetry).__name__, list(told), list(seen)]
nncf.compress_weights(torch.nn.Linear(32, 32), dataset=nncf.Dataset([torch.ones(1, 32)]))
print()
print(json.dumps([*ours, len(told) > 0]))
"""
    assert python(WATCH + spy + USE + report, tmp_path) == ["NNCFTelemetry", [], [], True]


def test_the_process_stays_as_it_was(tmp_path: Path) -> None:
    snapshot = """
import logging, types, warnings
import torch.nn.functional as F
places = {"torch": torch, "functional": F, "Tensor": torch.Tensor, "Module": torch.nn.Module, "Linear": torch.nn.Linear,
          "linalg": torch.linalg, "special": torch.special, "_C._nn": torch._C._nn, "jit": torch.jit}
def state():
    names = {(p, k): id(v) for p, place in places.items() for k, v in vars(place).items()
             if callable(v) and not isinstance(v, types.ModuleType)}
    root = logging.getLogger()
    return names, logging.getLoggerClass(), root.level, list(root.handlers), list(warnings.filters), dict(os.environ)
torch.compile  # a lazy attribute
before = state()
"""
    compare = """
after = state()
changed = [k for k in before[0] if after[0].get(k) != before[0][k]]
same = [a == b for a, b in zip(before[1:], after[1:])]
print(json.dumps([changed, "nncf" in sys.modules, "nncf.torch" in sys.modules, same]))
"""
    assert python(WATCH + snapshot + USE + compare, tmp_path) == [[], True, False, [True] * 5]


def test_a_missing_library_is_a_reason(tmp_path: Path) -> None:
    code = """
import json
from quantwire.quantizers.registry import availability, format_ids
states = {f: availability(f) for f in format_ids() if f.startswith("nncf-")}
print(json.dumps({f: [s.works, s.reason, s.remedy] for f, s in states.items()}))
"""
    states = json.loads(run_without(tmp_path, code, "nncf"))
    assert sorted(states) == sorted(FORMATS)
    for state in states.values():
        assert state == [
            False,
            "nncf is not installed.",
            "Run `pip install nncf`, or choose bnb-int8, bnb-nf4 or a gguf format.",
        ]


def test_a_missing_sender_changes_nothing(tmp_path: Path) -> None:
    code = WATCH + USE + REPORT
    assert json.loads(run_without(tmp_path, code, "openvino_telemetry").splitlines()[-1])[:3] == [
        "MagicMock",
        False,
        [],
    ]


@pytest.mark.parametrize("format_id", ["nncf-int4-sym", "nncf-int4-asym", "nncf-nf4"])
def test_a_ratio_is_refused_with_the_reason(format_id: str) -> None:
    spec = QuantSpec.from_uri(f"{format_id};ratio=0.8")
    reason = get_quantizer(format_id).refuse(spec, TensorMeta("w.weight", (64, 256), torch.bfloat16))
    assert reason == "ratio=0.8 needs NNCF's comparison of all layers of a model, which is not made here; use 1"


def test_nf4_has_the_values_of_the_library() -> None:
    from nncf.quantization.algorithms.weight_compression.constants import NF4_QUANTILES
    from quantwire.quantizers.backends.nncf import NF4

    assert torch.equal(torch.tensor(NF4), torch.from_numpy(NF4_QUANTILES))
