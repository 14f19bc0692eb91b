"""Conformance cases of bnb."""

from __future__ import annotations

from .case import Case

CASES: list[Case] = []
