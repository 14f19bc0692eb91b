"""The editor in a real browser: Debian's Chromium, driven by Playwright.

Without a Chromium the tests are skipped with that reason; they fail instead where `QUANTWIRE_REQUIRE_BROWSER` is set.
One server, one browser and one tab serve all tests. A test fails on any error that the page reports and that the test
did not take; it starts with the server idle, no dialog open, and the settings of a first start.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from browser_setup import FLAGS, WINDOW, find_chromium, own_machine_alone
from editor_page import SHOTS, Editor
from editor_server import EditorServer, running
from playwright.sync_api import Browser, BrowserContext, sync_playwright

FAILED = pytest.StashKey[bool]()


@pytest.fixture(scope="session")
def chromium() -> Path:
    return find_chromium()


@pytest.fixture(scope="session")
def kind() -> str:
    """The host whose editor is tested."""
    name = os.environ.get("QUANTWIRE_EDITOR", "standalone")
    assert name in ("standalone", "comfyui"), f"QUANTWIRE_EDITOR={name}: choose standalone or comfyui"
    if name == "comfyui" and not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is unset: QUANTWIRE_EDITOR=comfyui needs a ComfyUI tree, see `make test-comfyui`")
    return name


@pytest.fixture(scope="session")
def editor_server(kind: str, chromium: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EditorServer]:
    """The server of all tests; `chromium` first, so that nothing is started in vain."""
    with running(kind, tmp_path_factory.mktemp("editor"), os.environ.get("QUANTWIRE_FRONT_END")) as server:
        yield server


@pytest.fixture(scope="session")
def browser(chromium: Path) -> Iterator[Browser]:
    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=str(chromium), headless=True, args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture(scope="session")
def context(browser: Browser) -> Iterator[BrowserContext]:
    """Shared by the tabs, so that the front end's files are read from the server once."""
    made = browser.new_context(viewport=WINDOW, locale="en-US")  # type: ignore[arg-type]
    own_machine_alone(made)
    yield made
    made.close()


@pytest.fixture(scope="session")
def editor(context: BrowserContext, editor_server: EditorServer) -> Iterator[Editor]:
    """The tab of all tests, with the editor ready; opening one takes seconds."""
    tab = Editor(context.new_page(), editor_server.url)
    tab.open()
    # It covers nodes.
    tab.setting("Comfy.Minimap.Visible", False)
    yield tab
    tab.page.close()


@pytest.fixture
def new_tab(context: BrowserContext, editor_server: EditorServer) -> Iterator[Callable[[], Editor]]:
    """Opens further tabs; they are closed, and their errors looked at, when the test ends."""
    tabs: list[Editor] = []

    def make() -> Editor:
        tabs.append(Editor(context.new_page(), editor_server.url))
        tabs[-1].open()
        return tabs[-1]

    yield make
    errors = [e for tab in tabs for e in tab.errors]
    for tab in tabs:
        if not tab.page.is_closed():
            tab.page.close()
    assert not errors, "\n".join(errors)


@pytest.fixture
def new_window(browser: Browser, editor_server: EditorServer) -> Iterator[Callable[[], Editor]]:
    """Opens a tab of a user who was never here before, as for another language.

    In the shared context the tab behind one that was opened in another language gets no workflow from the front end.
    """
    made: list[BrowserContext] = []
    tabs: list[Editor] = []

    def make() -> Editor:
        made.append(browser.new_context(viewport=WINDOW, locale="en-US"))  # type: ignore[arg-type]
        own_machine_alone(made[-1])
        tabs.append(Editor(made[-1].new_page(), editor_server.url))
        tabs[-1].open()
        return tabs[-1]

    yield make
    errors = [e for tab in tabs for e in tab.errors]
    for each in made:
        each.close()
    assert not errors, "\n".join(errors)


@pytest.fixture(autouse=True)
def no_page_errors(request: pytest.FixtureRequest) -> Iterator[None]:
    """What the page reported as an error, and the test did not take, fails the test."""
    tab: Editor | None = request.getfixturevalue("editor") if "editor" in request.fixturenames else None
    if tab:
        tab.tidy()
        request.getfixturevalue("editor_server").wait_until_idle()
    yield
    if tab:
        errors, tab.errors = tab.errors, []
        if request.node.stash.get(FAILED, False) or errors:
            tab.shot("failed-" + re.sub(r"\W+", "_", request.node.name))
        assert not errors, "\n".join(errors)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        item.stash[FAILED] = report.failed
    return report
