"""A real Chromium, and pages that are watched: nothing from elsewhere, no errors, no markup that came as text."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.harness.waiting import PATIENCE
from tests.ui.stage import Stage

# First the one without windows of its own: what the others do for theirs is a quarter of the work of these tests.
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
WAIT = PATIENCE * 1000  # milliseconds
FOREIGN = "evil.example"  # an attacker's web site
REBOUND = "rebound.test"  # a name that points to this machine, as an attacker's may
# As on small devices: what one site may do to another is judged where requests are made, not by processes.
FEW_PROCESSES = ("--disable-site-isolation-trials", "--renderer-process-limit=1")


def chromium() -> str:
    """Return the browser's path."""
    given = os.environ.get("LLMUX_TEST_CHROMIUM")
    found = given or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("there is no Chromium: apt install chromium, or name one in LLMUX_TEST_CHROMIUM")
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run these last: Playwright's loop runs in this thread, and tests elsewhere have loops of their own."""
    here = Path(__file__).parent
    items.sort(key=lambda item: item.path.parent == here)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=WAIT)
    rules = f"--host-resolver-rules=MAP {REBOUND} 127.0.0.1, MAP {FOREIGN} 127.0.0.1, MAP localhost4 127.0.0.1"
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium(), args=[rules, *FEW_PROCESSES])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def make_stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Stage]]:
    """Return a maker of running llmuxes."""
    made: list[Stage] = []

    def make(*args: Any, **settings: Any) -> Stage:
        folder: Path = tmp_path_factory.mktemp("stage")
        made.append(Stage(folder, *args, **settings))
        made[-1].start()
        return made[-1]

    yield make
    for stage in made:
        stage.close()


class Windows:
    """Empty pages. Chromium starts processes for a new one, which is more work than most of these tests are."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._idle: list[Page] = []

    def take(self) -> Page:
        """Return a page in a context of its own: two in one would be tabs, of which one is throttled."""
        if not self._idle:
            context = self._browser.new_context()
            context.set_default_timeout(WAIT)
            self._idle.append(context.new_page())
        page = self._idle.pop()
        page.set_viewport_size({"width": 1280, "height": 900})
        return page

    def give_back(self, page: Page) -> None:
        """Leave nothing of a test in its page."""
        page.evaluate("sessionStorage.clear()")
        page.emulate_media(color_scheme="null", reduced_motion="null")
        page.mouse.move(0, 0)
        page.goto("about:blank")
        self._idle.append(page)


@pytest.fixture(scope="session")
def windows(browser: Browser) -> Windows:
    return Windows(browser)


@pytest.fixture
def visit(windows: Windows) -> Iterator[Callable[..., Page]]:
    """Return what opens the page of a stage; at the end the pages are looked over."""
    visits: list[tuple[Page, dict[Any, Callable[[Any], Any]], list[str]]] = []

    def open_page(stage: Stage, url: str = "") -> Page:
        page = windows.take()
        complaints: list[str] = []
        origin = url or stage.url
        watching: dict[Any, Callable[[Any], Any]] = {
            "request": lambda it: it.url.startswith((origin, "blob:")) or complaints.append(it.url),
            "pageerror": lambda error: complaints.append(str(error)),
            "dialog": lambda dialog: complaints.append(dialog.message),
            "console": lambda it: (
                it.type == "error" and "Failed to load" not in it.text and complaints.append(it.text)
            ),
        }
        for event, watch in watching.items():
            page.on(event, watch)
        page.goto(f"{origin}/llmux/ui")
        visits.append((page, watching, complaints))
        return page

    yield open_page
    for page, watching, complaints in visits:
        assert not complaints
        assert page.evaluate("window.hacked") is None
        assert page.evaluate("document.cookie + Object.keys(localStorage)") == ""
        for event, watch in watching.items():
            page.remove_listener(event, watch)
        windows.give_back(page)
