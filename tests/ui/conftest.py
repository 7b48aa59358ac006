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

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
WAIT = PATIENCE * 1000  # milliseconds
FOREIGN = "evil.example"  # an attacker's web site
REBOUND = "rebound.test"  # a name that points to this machine, as an attacker's may


def chromium() -> str:
    """Return the browser's path."""
    given = os.environ.get("LLMUX_TEST_CHROMIUM")
    found = given or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("there is no Chromium: apt install chromium, or name one in LLMUX_TEST_CHROMIUM")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # No longer: Playwright's loop runs in this thread, and tests elsewhere have loops of their own.
    expect.set_options(timeout=WAIT)
    rules = f"--host-resolver-rules=MAP {REBOUND} 127.0.0.1, MAP {FOREIGN} 127.0.0.1, MAP localhost4 127.0.0.1"
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium(), args=[rules])
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


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Return what opens the page of a stage in a browser of its own; at the end they are looked over."""
    visits: list[tuple[Page, str, list[str]]] = []

    def open_page(stage: Stage, url: str = "", width: int = 1280, height: int = 900, **options: Any) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(WAIT)
        page = context.new_page()
        complaints: list[str] = []
        origin = url or stage.url
        page.on("request", lambda it: it.url.startswith((origin, "blob:")) or complaints.append(it.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on(
            "console",
            lambda it: it.type == "error" and "Failed to load" not in it.text and complaints.append(it.text),
        )
        page.goto(f"{origin}/llmux/ui")
        visits.append((page, origin, complaints))
        return page

    yield open_page
    for page, _, complaints in visits:
        assert not complaints
        assert page.evaluate("window.hacked") is None
        assert page.evaluate("document.cookie + Object.keys(localStorage)") == ""
        page.context.close()
