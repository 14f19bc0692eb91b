"""Passing over the strings of a GGUF header: with numpy and without, by one measure."""

from __future__ import annotations

import random
import struct
import sys

import pytest
from quantwire.quantizers.files.gguf_source import _pass_short


def packed(strings: list[bytes]) -> bytes:
    return b"".join(struct.pack("<Q", len(s)) + s for s in strings)


@pytest.mark.parametrize("numpy", [True, False], ids=["numpy", "alone"])
@pytest.mark.parametrize("long", [None, 0, 300, 999], ids=str)
def test_what_is_passed_over_is_whole_strings(monkeypatch: pytest.MonkeyPatch, numpy: bool, long: int | None) -> None:
    if not numpy:
        monkeypatch.delitem(sys.modules, "numpy")
    draw = random.Random(0)
    strings = [bytes(draw.randrange(1, 256) for _ in range(draw.randrange(1, 40))) for _ in range(1000)]
    if long is not None:
        strings[long] = b"x" * 5000
    raw = b"ab" + packed(strings) + b"\0" * 40
    for most in (1000, 999, 256, 3):
        passed, at = _pass_short(raw, 2, most)
        assert passed <= most
        assert at == 2 + len(packed(strings[:passed]))
        if most >= 256 and long != 0:
            assert passed >= 256
        if long is not None:
            assert passed <= long


def test_strings_of_zeros_and_of_lengths_are_no_trap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "numpy")
    strings = [b"\3\0\0\0\0\0\0\0abc"] * 600
    passed, at = _pass_short(packed(strings), 0, 600)
    assert (passed, at) == (512, 512 * 19)
