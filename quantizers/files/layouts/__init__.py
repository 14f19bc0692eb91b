"""Names and arrangements of the same weights in different programs' files, and how to get from one to another."""

from __future__ import annotations

from .target import Piece, Target, apply, assemble, target

__all__ = ["Piece", "Target", "apply", "assemble", "target"]
