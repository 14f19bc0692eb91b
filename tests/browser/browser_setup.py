"""Chromium as the tests start it, and what a tab may reach."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest
from playwright.sync_api import BrowserContext

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox",  # Chromium refuses to start as root with it, which containers run as
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WINDOW = {"width": 1600, "height": 900}


def missing(reason: str) -> NoReturn:
    """Skip, or fail where `QUANTWIRE_REQUIRE_BROWSER` is set."""
    if os.environ.get("QUANTWIRE_REQUIRE_BROWSER"):
        pytest.fail(f"{reason} QUANTWIRE_REQUIRE_BROWSER is set, so this is a failure.")
    pytest.skip(reason)


def find_chromium() -> Path:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if not found:
        missing(f"no Chromium: none of {', '.join(BROWSERS)} is in PATH; `apt-get install chromium` brings one.")
    return Path(found)


def own_machine_alone(context: BrowserContext) -> None:
    """Nothing of the internet: the front end asks for release notes and more, and would wait for the answers."""
    context.route(lambda url: not url.startswith(("http://127.0.0.1", "data:", "blob:")), lambda route: route.abort())
