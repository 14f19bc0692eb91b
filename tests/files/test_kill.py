"""kill -9 at random moments of conversions: never half a file under the final name, and `--resume` ends bit-equal."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.files.model_file import open_model
from quantwire.quantizers.files.schemes.scan import scan
from small_flux import flux, names_in, save, sha256

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
# A process that has imported everything; for each line of its input it forks a child that converts, and kills it after
# so many seconds (0: never). A child begins with the conversion at once, so the moments lie within it.
KILLER = """
import json, os, signal, sys, time
import torch
torch.set_num_threads(1)
from quantwire.cli import main
import quantwire.quantizers.files.converting, quantwire.quantizers.files.verifying
from quantwire.quantizers.registry import require
for format_id in ("comfy-fp8-e4m3fn", "comfy-int8", "gguf-q8-0"):
    require(format_id)
for line in sys.stdin:
    arguments, seconds = json.loads(line)
    start, child = time.perf_counter(), os.fork()
    if not child:
        out = os.open(os.devnull, os.O_WRONLY)
        os.dup2(out, 1)
        os._exit(main(arguments))
    if seconds:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), time.perf_counter() - start]), flush=True)
"""
CASES: dict[str, list[str]] = {
    "a.safetensors": ["--type", "comfy-fp8-e4m3fn", "--keep", "*.1.img_mlp.2"],
    "m.safetensors": ["--type", "comfy-int8", "--shard-size", "1MB"],
    "a.gguf": ["--type", "gguf-q8-0"],
}
KILLS = {"a.safetensors": 30, "m.safetensors": 14, "a.gguf": 6}


class Killer:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", KILLER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, arguments: list[str], seconds: float = 0.0) -> tuple[int, float]:
        """(exit code, seconds until the end) of `quantwire convert`, killed after so many seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([["convert", *arguments], seconds]) + "\n")
        self._process.stdin.flush()
        code, took = json.loads(self._process.stdout.readline())
        return code, took

    def close(self) -> None:
        self._process.communicate(timeout=30)


def accepted(target: Path) -> bool:
    """Whether there is something under the final name that a loader would open."""
    index = target.with_name(f"{target.stem}.safetensors.index.json")
    try:
        found = scan(open_model(index if target.name.startswith("m.") else target))
    except FileError:
        return False
    return bool(found.layers)


def files_in(folder: Path) -> dict[str, str]:
    return {n: sha256(folder / n) for n in names_in(folder) if not n.endswith(".lock")}


@pytest.mark.slow
def test_fifty_kills(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", flux(blocks=4, width=256))
    chance, killer = random.Random(7), Killer()
    log: list[Any] = []
    for name, options in CASES.items():
        reference = tmp_path / "whole" / name
        arguments = [str(source), str(reference), *options]
        runs = [killer([*arguments, *again]) for again in ([], ["--overwrite"], ["--overwrite"])]
        assert [code for code, _ in runs] == [0, 0, 0]
        took = min(seconds for _, seconds in runs)
        whole = files_in(reference.parent)
        assert accepted(reference)
        for kill in range(3 * KILLS[name]):  # one that was done before its moment came does not count
            if sum(entry[:2] == (name, -9) for entry in log) == KILLS[name]:
                break
            target = tmp_path / f"{name}-{kill}" / name
            target.parent.mkdir()
            arguments = [str(source), str(target), *options]
            for _ in range(1 + kill % 2):  # half of them are killed again when they continue
                code, _ = killer(arguments, took * chance.uniform(0.02, 1.0))
                assert code in (0, -9, 2)
                assert code != 2 or accepted(target)  # is there already
                assert not accepted(target) or files_in(target.parent).items() >= whole.items()
            done = accepted(target)
            log.append((name, code, done, len(names_in(target.parent))))
            resumed, _ = killer([*arguments, "--resume"])
            if resumed == 2 and not done:  # killed before there was anything to continue
                assert not target.with_name(f"{target.name}.partial").exists()
                resumed, _ = killer(arguments)
            assert resumed == 0 or done
            left = files_in(target.parent)
            assert {n: s for n, s in left.items() if ".partial" not in n} == whole
            assert done or left == whole
        for path in reference.parent.iterdir():
            path.unlink()
    killer.close()
    killed = [entry for entry in log if entry[1] == -9]
    assert len(killed) == sum(KILLS.values()) == 50
    assert len({entry[3] for entry in killed}) > 1, "all were killed at the same stage"
