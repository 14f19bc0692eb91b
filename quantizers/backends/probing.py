"""What every availability probe shares: is the package there, new enough, and does one small weight survive it."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable

import torch

from ..base import Availability


def probe_package(
    package: str, minimum: tuple[int, ...], install: str, try_it: Callable[[], torch.Tensor]
) -> Availability:
    """Probe a PyPI package.

    Args:
        package: distribution name.
        minimum: lowest version known to work.
        install: what to do when it is missing: "Run `pip install ...`, or choose ...".
        try_it: quantizes and dequantizes a small weight; its result must be finite.
    """
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return Availability(False, f"{package} is not installed.", install)
    numbers = tuple(map(int, re.findall(r"\d+", version)[: len(minimum)]))
    if numbers < minimum:
        wanted = ".".join(map(str, minimum))
        upgrade = install.replace("pip install", "pip install --upgrade")
        return Availability(False, f"{package} {version} is too old; {wanted} or newer is needed.", upgrade, version)
    try:
        result = try_it()
    except Exception as err:  # whatever a foreign library raises at import or use, the reason is kept for the user
        reason = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        return Availability(False, f"{package} {version} does not run here: {reason}", _others(install), version)
    if not bool(torch.isfinite(result).all()):
        return Availability(False, f"{package} {version} gives non-finite values here.", _others(install), version)
    return Availability(True, version=version)


def _others(install: str) -> str:
    """Without "Run `pip install ...`, or", since the package is there."""
    return install.partition(", or ")[2].capitalize()


def sample_weight() -> torch.Tensor:
    """A fixed (64, 128) float32 weight for probes."""
    return torch.linspace(-1.0, 1.0, 64 * 128).reshape(64, 128)
