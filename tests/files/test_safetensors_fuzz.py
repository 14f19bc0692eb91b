"""Damaged safetensors files: whatever is in a header, a file is refused by name, or its tensors are what it says.

Each case is a valid file in one of the layouts of quantized weights with one to four mutations: bytes, cuts, numbers
set to what breaks readers, and changes of the JSON that leave it JSON (tensors renamed, doubled or dropped, dtypes,
shapes and offsets changed, fields of any type, and the same inside the JSON that small tensors and metadata hold). A
case may take a second of CPU time, and address space may grow by 256 MiB.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import json
import math
import random
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged_files import SIZES, joined, layout, seeds
from quantwire.quantizers.errors import FileError, QuantwireError
from quantwire.quantizers.files.detect import detect_file
from quantwire.quantizers.files.doctor import diagnose
from quantwire.quantizers.files.model_file import ModelFile, open_model
from quantwire.quantizers.files.schemes.scan import scan
from quantwire.quantizers.files.writers import writer_for
from quantwire.quantizers.registry import require
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedWeight
from safetensors.torch import save

resource: Any = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits memory through /proc and RLIMIT_AS")

MAX_NBYTES, MAX_S = 256 << 20, 1.0
POWERS = (7, 8, 15, 16, 20, 24, 28, 31, 32, 33, 40, 53, 61, 62, 63, 64, 70, 200)
EXTREMES = [0, 1, 2, 3, *((1 << e) + d for e in POWERS for d in (-1, 0, 1))]
ODD: list[Any] = [
    *(None, True, False, -1, 1.5, 1e308, "", "x", "\0", "\ud83d", "..", [], {}, [[]], [{}], {"a": {}}, "F32", "{}"),
    *("nan", [1, 2, 3], [-1], [0, 0], ["1"], {"format": None}, {"layers": []}, {"layers": {"x": 1}}, 10**25),
    "[" * 2000,
]  # fmt: skip
DTYPES = [*SIZES, "BOOL", "F4", "C64", "F8_E8M0", "F31", "f32"]


@functools.cache
def written() -> tuple[tuple[dict[str, Any], bytes], ...]:
    """Layers of the libraries' own layouts, in files as the pack writes them."""
    made: list[tuple[dict[str, Any], bytes]] = []
    for format_id in ("bnb-nf4", "quanto-qint4", "torchao-int8wo", "comfy-nvfp4", "comfy-w4a8"):
        writer = writer_for(format_id)
        w = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
        weight = require(format_id).quantize(w, QuantSpec(format_id))
        name = "double_blocks.0.img_mlp.0.weight"
        raw = save(writer.tensors(name, weight), {"format": "pt", **writer.metadata({name: writer.note(name, weight)})})
        start = 8 + int.from_bytes(raw[:8], "little")
        made.append((json.loads(raw[8:start]), raw[start:]))
    return tuple(made)


class Mutator:
    """Damages one file in ways that follow from a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.files = [*(layout(*given) for given in seeds().values()), *written()]

    def case(self) -> bytes:
        rng = self.rng
        header, data = rng.choice(self.files)
        if rng.random() < 0.75:
            header = copy.deepcopy(header)
            for _ in range(rng.randint(1, 3)):
                data = self._damaged(header, data)
            if rng.random() < 0.7:
                data = packed(header, data)
        content = bytearray(joined(spoiled(rng, header), data))
        if rng.random() < 0.4:
            for _ in range(rng.randint(1, 4)):
                self._bytes(content)
        return bytes(content)

    def _damaged(self, header: dict[str, Any], data: bytes) -> bytes:
        """Change the JSON; returns the data, which small JSON tensors are part of."""
        rng = self.rng
        names = [name for name in header if name != "__metadata__"]
        if not names:
            return data
        name = rng.choice(names)
        kind = rng.randrange(9)
        if kind == 0:
            del header[name]
        elif kind == 1:
            odd = [name + ".x", name[:-1], "weight", "", ".", name.replace(".", ".."), "a" * 2000]
            header[rng.choice(odd)] = header.pop(name)
        elif kind == 2:
            header["copy." + name] = copy.deepcopy(header[name])
        elif kind == 3 and isinstance(header[name], dict):
            header[name]["dtype"] = rng.choice(DTYPES)
        elif kind == 4 and isinstance(header[name], dict):
            header[name]["shape"] = [rng.choice([1, 2, 16, 32, 64, *EXTREMES]) for _ in range(rng.randint(0, 4))]
        elif kind == 5:
            self._value(header)
        elif kind == 6:
            metadata = header.get("__metadata__")
            if isinstance(metadata, dict) and metadata:
                key = rng.choice(list(metadata))
                metadata[key] = self._text(metadata[key])
            else:
                header["__metadata__"] = copy.deepcopy(rng.choice(ODD))
        else:
            return self._small(header, data)
        return data

    def _value(self, tree: Any) -> None:
        """Something odd at a random place of a JSON value."""
        while isinstance(tree, (dict, list)) and tree:
            keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
            key = self.rng.choice(keys)
            if not isinstance(tree[key], (dict, list)) or not tree[key] or self.rng.random() < 0.2:
                tree[key] = copy.deepcopy(self.rng.choice([*ODD, *EXTREMES]))
                return
            tree = tree[key]

    def _text(self, text: Any) -> Any:
        try:
            value = json.loads(text)
        except (ValueError, TypeError, RecursionError):
            return copy.deepcopy(self.rng.choice(ODD))
        if self.rng.random() < 0.8:
            self._value(value)
            return json.dumps(value)
        return json.dumps(self.rng.choice(ODD))

    def _small(self, header: dict[str, Any], data: bytes) -> bytes:
        """Change a JSON tensor, with its size."""
        for name, entry in header.items():
            if not name.endswith((".comfy_quant", "__nf4")) or not isinstance(entry, dict):
                continue
            with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
                start, end = entry["data_offsets"]
                raw = self._text(data[start:end].decode()).encode(errors="surrogatepass")[: 1 << 17]
                entry |= {"shape": [len(raw)], "data_offsets": [len(data), len(data) + len(raw)]}
                return data + raw
        return data

    def _bytes(self, content: bytearray) -> None:
        rng = self.rng
        kind = rng.randrange(5)
        length = min(len(content), 8 + int.from_bytes(content[:8], "little"))
        if kind == 0 or len(content) < 16:
            del content[rng.randrange(len(content) + 1) :]
        elif kind == 1:
            struct.pack_into("<Q", content, 0, rng.choice(EXTREMES) % (1 << 64))
        elif kind == 2:
            content += bytes(rng.randrange(1, 99))
        elif kind == 3:
            at = rng.randrange(8, max(length, 9))
            del content[at : at + rng.randrange(1, 40)]
        else:
            content[rng.randrange(length)] = rng.randrange(256)


def spoiled(rng: random.Random, header: dict[str, Any]) -> bytes:
    """The header as JSON, sometimes with another number in it, or a piece of it twice."""
    raw = json.dumps(header).encode()
    if rng.random() < 0.1:
        digits = [i for i, byte in enumerate(raw) if 48 <= byte < 58]
        if digits:
            at = rng.choice(digits)
            raw = raw[:at] + str(rng.choice(EXTREMES)).encode() + raw[at + 1 :]
    if rng.random() < 0.05:
        at, nbytes = rng.randrange(len(raw)), rng.randrange(1, 80)
        raw = raw[:at] + raw[at : at + nbytes] + raw[at:]
    return raw


def packed(header: dict[str, Any], data: bytes) -> bytes:
    """Offsets that fit the tensors again, where those are possible: what is wrong then is further inside."""
    out = b""
    for entry in header.values():
        with contextlib.suppress(KeyError, TypeError, ValueError, IndexError):
            nbytes = math.prod(entry["shape"]) * SIZES[entry["dtype"]]
            if 0 <= nbytes <= 1 << 16:
                start = entry["data_offsets"][0] if isinstance(entry["data_offsets"][0], int) else 0
                entry["data_offsets"] = [len(out), len(out) + nbytes]
                out += data[max(start, 0) : max(start, 0) + nbytes].ljust(nbytes, b"\1")
    return out


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """One second of CPU time, and 256 MiB more address space than now; beyond it an allocation fails."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MAX_NBYTES, hard))
    start = time.thread_time()
    try:
        yield
    finally:
        took = time.thread_time() - start
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert took < MAX_S, f"{took:.2f} s"


def check_consistent(file: ModelFile, size: int) -> None:
    """Independent of the reader: sizes by dtype and shape, places inside the file, nothing twice."""
    end = 0
    for entry in sorted(file.entries.values(), key=lambda e: (e.start, e.nbytes)):
        if entry.dtype in SIZES:
            assert entry.nbytes == SIZES[entry.dtype] * math.prod(entry.shape)
        assert entry.start >= end, "overlap"
        end = entry.start + entry.nbytes
    assert end <= size


def read(path: Path, outcomes: Counter[str], deep: bool) -> None:
    """All that reads a file of unknown origin."""
    try:
        file = open_model(path)
    except FileError:
        outcomes["refused"] += 1
        file = None
    if file is not None:
        outcomes["opened"] += 1
        check_consistent(file, path.stat().st_size)
        found = scan(file)
        outcomes["layers"] += bool(found.layers)
        outcomes["faults"] += bool(found.faults)
        for layer in found.layers.values() if deep else ():
            if layer.format_id and math.prod(layer.shape) < 1 << 20:
                with contextlib.suppress(QuantwireError):
                    weight = found.read(layer.name)
                    assert isinstance(weight, (QuantizedWeight, torch.Tensor))
                    outcomes["weights"] += 1
    for look in (detect_file, diagnose):
        with contextlib.suppress(FileError):
            look(path)
            outcomes[look.__name__] += 1


def run(path: Path, seed: int, count: int, deep: bool = True) -> Counter[str]:
    mutator, outcomes = Mutator(seed), Counter[str]()
    for given in seeds().values():  # libraries are imported at first use
        path.write_bytes(joined(*layout(*given)))
        read(path, Counter(), deep)
    gc.collect()
    gc.disable()  # it takes as long as the rest of the process has objects
    try:
        for i in range(count):
            content = mutator.case()
            path.write_bytes(content)
            try:
                with bounded():
                    read(path, outcomes, deep)
            except BaseException as err:
                kept = Path(path.parent, f"case-{seed}-{i}.safetensors")
                kept.write_bytes(content)
                raise AssertionError(f"{kept}: {type(err).__name__}: {err}") from err
            if i % 1000 == 999:
                gc.collect()
    finally:
        gc.enable()
    return outcomes


def test_every_seed_is_a_sound_file(tmp_path: Path) -> None:
    path = tmp_path / "seed.safetensors"
    for name, given in seeds().items():
        path.write_bytes(joined(*layout(*given)))
        found = scan(open_model(path))
        assert not found.faults, name
        assert bool(found.layers) == (name != "plain"), name


def test_a_thousand_damaged_files(tmp_path: Path) -> None:
    outcomes = run(tmp_path / "a.safetensors", 0, 1000)
    assert min(outcomes[k] for k in ("refused", "opened", "layers", "faults", "weights")) >= 30, outcomes


@pytest.mark.slow
def test_twenty_thousand_damaged_files(tmp_path: Path) -> None:
    outcomes = run(tmp_path / "a.safetensors", 1, 20_000, deep=False)
    assert min(outcomes[k] for k in ("refused", "opened", "layers", "faults", "diagnose", "detect_file")) >= 600, (
        outcomes
    )
