"""All schemes, in the order in which they may claim a layer: a layer belongs to the first one that finds it."""

from __future__ import annotations

from .base import Scheme

SCHEMES: tuple[Scheme, ...] = ()
