"""Conformance cases of torchao."""

from __future__ import annotations

from .case import Case

CASES: list[Case] = []
