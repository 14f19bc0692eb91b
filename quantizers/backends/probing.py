"""What every availability probe shares: is the package there, new enough, and does one small weight survive it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

import torch

from ..base import Availability


def probe_package(package: str, minimum: tuple[int, ...], install: str, try_it: Callable[[], torch.Tensor]) -> Availability:
    """Probe a PyPI package.

    Args:
        package: distribution name.
        minimum: lowest version known to work.
        install: what to do when it is missing.
        try_it: quantizes and dequantizes a small weight; its result must be finite.
    """
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return Availability(False, f"{package} is not installed.", install)
    wanted = ".".join(map(str, minimum))
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[: len(minimum)] if part.isdigit())
    if numbers < minimum:
        return Availability(False, f"{package} {version} is too old; {wanted} or newer is needed.", install, version)
    try:
        result = try_it()
    except Exception as err:  # whatever a foreign library raises at import or use, the reason is kept for the user
        reason = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        return Availability(False, f"{package} {version} does not run here: {reason}", install, version)
    if not bool(torch.isfinite(result).all()):
        return Availability(False, f"{package} {version} gives non-finite values here.", install, version)
    return Availability(True, version=version)


def sample_weight() -> torch.Tensor:
    """A fixed (64, 128) float32 weight for probes."""
    return torch.linspace(-1.0, 1.0, 64 * 128).reshape(64, 128)
