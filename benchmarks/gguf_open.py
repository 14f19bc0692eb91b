"""How long does it take to open a GGUF file and say what is in it, and does that depend on its size?

    python benchmarks/gguf_open.py [--repeats 15] [--peer-repeats 3] [--json FILE]

Files of a FLUX layout (780 float16 tensors) of 10 MB, 1 GiB and 20 GiB, sparse, so that they take no space on disk,
and a language model's with a vocabulary of 250,000 tokens (tokens, merges, scores, types); their headers are written
by the gguf package, in a temporary folder. Each is opened and summarised (architecture, tensors, values and bytes by
type) by `read_gguf_header`, by `read_gguf`, which also gives the tensors, and by gguf's `GGUFReader`, in turn, in one
process, with the header in the page cache: medians. `GGUFReader` takes seconds for a vocabulary, so that it runs fewer
times.
The bytes that were asked of the file are the kernel's own count (rchar of /proc/self/io). The first opening of all,
which loads what it needs, is given apart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from load import shapes
from quantwire.quantizers.files.checkpoint import read_gguf
from quantwire.quantizers.files.gguf_header import read_array, read_gguf_header
from quantwire.quantizers.weight import QuantizedWeight

LIMIT_S = 0.1
SIZES = {"flux, 10 MB": 10 * 10**6, "flux, 1 GiB": 1 << 30, "flux, 20 GiB": 20 << 30}
VOCABULARY = "250,000 tokens"
TOKENS = 250_000
KEYS = ("tokens", "merges", "scores", "token_type")


def hidden_of(nbytes: int) -> int:
    """Width of the model with the FLUX blocks (19 double, 38 single) whose float16 file has about so many bytes."""
    return max(
        h for h in range(8, 4096, 8) if 2 * sum(torch.Size(s).numel() for s in shapes(h, 19, 38).values()) <= nbytes
    )


def write(path: Path, arch: str, tensors: dict[str, tuple[int, ...]], fill: Callable[[Any], None]) -> None:
    """Header by gguf, then as many zeros as the tensors need, which the file system does not store."""
    writer = gguf.GGUFWriter(str(path), arch)
    fill(writer)
    for name, shape in tensors.items():
        nbytes = 2 * torch.Size(shape).numel()
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), nbytes, raw_dtype=gguf.GGMLQuantizationType.F16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    padded = sum(-(-2 * torch.Size(s).numel() // 32) * 32 for s in tensors.values())
    with open(path, "r+b") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + padded)


def vocabulary(writer: Any) -> None:
    rng = random.Random(0)
    letters = (
        "etaoinshrdlu\N{LATIN SMALL LETTER E WITH ACUTE}\N{CYRILLIC SMALL LETTER DE}\N{CJK UNIFIED IDEOGRAPH-6F22}"
    )
    tokens = ["".join(rng.choices(letters, k=rng.randint(1, 12))) for _ in range(TOKENS)]
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.merges", [f"{a} {b}" for a, b in zip(tokens, reversed(tokens), strict=True)])
    writer.add_array("tokenizer.ggml.scores", [-float(i) for i in range(TOKENS)])
    writer.add_array("tokenizer.ggml.token_type", [1] * TOKENS)


def llama() -> dict[str, tuple[int, ...]]:
    """32 layers of a model of 8 billion parameters."""
    kinds = {"attn_q": (4096, 4096), "attn_k": (1024, 4096), "attn_v": (1024, 4096), "attn_output": (4096, 4096)}
    kinds |= {"ffn_gate": (14336, 4096), "ffn_up": (14336, 4096), "ffn_down": (4096, 14336)}
    kinds |= {"attn_norm": (4096,), "ffn_norm": (4096,)}
    layers = {f"blk.{i}.{name}.weight": shape for i in range(32) for name, shape in kinds.items()}
    return {"token_embd.weight": (TOKENS, 4096), "output_norm.weight": (4096,), **layers}


def summary(arch: str, tensors: Iterable[tuple[str, int, int]]) -> dict[str, Any]:
    """Args: tensors: (type, values, bytes) of each."""
    types: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for kind, numel, nbytes in tensors:
        for i, n in enumerate((1, numel, nbytes)):
            types[kind][i] += n
    return {"architecture": arch, "types": dict(types)}


def by_header(path: Path) -> dict[str, Any]:
    header = read_gguf_header(path)
    tensors = ((t.kind, torch.Size(t.shape).numel(), t.nbytes) for t in header.tensors)
    return summary(str(header.metadata["general.architecture"]), tensors)


def by_tensors(path: Path) -> dict[str, Any]:
    read = read_gguf(path)
    names = {torch.float16: "F16"}
    plain = [t for t in read.tensors.values() if not isinstance(t, QuantizedWeight)]
    return summary(read.metadata["general.architecture"], ((names[t.dtype], t.numel(), t.nbytes) for t in plain))


def by_gguf(path: Path) -> dict[str, Any]:
    reader = gguf.GGUFReader(str(path))
    tensors = ((t.tensor_type.name, int(t.n_elements), int(t.n_bytes)) for t in reader.tensors)
    return summary(reader.fields["general.architecture"].contents(), tensors)


def asked_nbytes(path: Path) -> int | None:
    """Bytes that opening asks of the file system; None where the system does not count them."""

    def rchar() -> int:
        return int(Path("/proc/self/io").read_text(encoding="ascii").split()[1])

    if sys.platform != "linux":
        return None
    start = rchar()
    own = rchar() - start
    start = rchar()
    read_gguf_header(path)
    return rchar() - start - own


def timed(call: Callable[[Path], Any], path: Path) -> tuple[float, Any]:
    start = time.perf_counter()
    found = call(path)
    return time.perf_counter() - start, found


def measure(path: Path, repeats: int, peer_repeats: int) -> dict[str, Any]:
    calls = {"header": by_header, "read_gguf": by_tensors, "GGUFReader": by_gguf}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats):
        found = []
        for name, call in calls.items():
            if name == "GGUFReader" and i >= peer_repeats:
                continue
            took, result = timed(call, path)
            times[name].append(took)
            found.append(result)
        assert all(f == found[0] for f in found), "the readers disagree"
    medians = {f"{name}_s": statistics.median(values) for name, values in times.items()}
    return {"nbytes": path.stat().st_size, "asked_nbytes": asked_nbytes(path), **medians}


def vocabulary_times(path: Path, repeats: int) -> dict[str, float]:
    """Medians of reading the arrays themselves, when somebody needs them."""
    header = read_gguf_header(path)
    names = [f"tokenizer.ggml.{key}" for key in KEYS]
    return {n: statistics.median(timed(lambda p, n=n: read_array(p, header, n), path)[0] for _ in range(repeats))
            for n in names}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--peer-repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{i}.gguf" for i, name in enumerate((*SIZES, VOCABULARY))}
        for name, nbytes in SIZES.items():
            write(paths[name], "flux", shapes(hidden_of(nbytes), 19, 38), lambda writer: writer.add_file_type(1))
        write(paths[VOCABULARY], "llama", llama(), vocabulary)
        first_s = timed(by_header, paths["flux, 10 MB"])[0]
        for name, path in paths.items():
            rows[name] = measure(path, args.repeats, args.peer_repeats)
        arrays = vocabulary_times(paths[VOCABULARY], args.peer_repeats)
    for name, r in rows.items():
        asked = "?" if r["asked_nbytes"] is None else f"{r['asked_nbytes'] / 1024:.0f} KiB"
        print(
            f"{name:15} {r['nbytes'] / (1 << 20):8.0f} MiB, {asked:>9} read: header {r['header_s'] * 1e3:6.1f} ms, "
            f"read_gguf {r['read_gguf_s'] * 1e3:6.1f} ms, GGUFReader {r['GGUFReader_s'] * 1e3:7.1f} ms "
            f"({r['GGUFReader_s'] / r['header_s']:.1f} x header)"
        )
    print(f"first opening in the process: {first_s * 1e3:.1f} ms")
    print("reading an array: " + ", ".join(f"{n} {s * 1e3:.0f} ms" for n, s in arrays.items()))
    result = {"rows": rows, "first_s": first_s, "arrays_s": arrays, "repeats": args.repeats}
    result["versions"] = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    result["machine"] = f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores"
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if all(r["header_s"] < LIMIT_S for r in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
