"""What every test shares. Nothing here imports torch or the pack: some tests measure those imports."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Must be set before torch loads OpenMP: threads that spin while they wait slow a busy machine down a hundredfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The browser's tests last: Playwright keeps an event loop in this thread until they are all done."""
    browser = ROOT / "tests" / "browser"
    items.sort(key=lambda item: item.path.is_relative_to(browser))


@pytest.fixture(scope="session")
def demo_models() -> Path:
    """The trained demo models; `QUANTWIRE_DEMO_MODELS` names another folder of the same layout."""
    return Path(os.environ.get("QUANTWIRE_DEMO_MODELS", ROOT / "demo" / "models"))
