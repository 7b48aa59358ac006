"""Take the pictures of the operators' page that the documentation has: ``make page``. Needs Chromium.

llmux runs with the demo's models, real engines and hooks, keys, a ledger and prices, under some load. The ledger's
days before today are made up; everything else is as it happens. Pictures have few colours, to be small.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from playwright.sync_api import ElementHandle, Page, sync_playwright

from llmux.accounts.ledger_file import Row, Store
from llmux.config.accounts import HOUSE
from tests.engine.real import status_of, wait_until
from tests.harness.ports import free_port
from tests.ui.conftest import chromium

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
sys.path.insert(0, str(QUICKSTART))  # the demo is no package
demo, tiny_gguf = importlib.import_module("demo"), importlib.import_module("tiny_gguf")
COLOURS = 256
WIDTH = 1200
WARM_UP = 40.0  # seconds of load before the first picture
DAY = 86_400_000  # milliseconds

KEYS = {  # the models that each asks for, how often in a minute, and tokens of an answer
    "alice": ({"atlas": 3, "gpt-4o-mini": 1}, 10, 80),
    "ci-bot": ({"quill": 4, "claude-haiku": 1}, 24, 60),
    "search": ({"text-embedding-3-small": 1}, 20, 0),
    "nightly": ({"atlas": 1}, 4, 80),
}


class House:
    """The demo's llmux, with accounts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        models = tiny_gguf.demo_folder()
        models.mkdir(parents=True, exist_ok=True)
        for shape in demo.SHAPES:
            if not (path := models / f"{shape.name}.gguf").exists():
                tiny_gguf.write(path, shape)
        self.env = {
            **os.environ,
            "LLMUX_DEMO_DIR": str(models),
            "LLMUX_DEMO_RUN": str(folder),
            "LLMUX_DEMO_PYTHON": sys.executable,
            "LLMUX_DEMO_PORT": str(self.port),
            **{f"LLMUX_DEMO_{shape.name.upper()}_PORT": str(free_port()) for shape in demo.SHAPES},
        }
        self.config = folder / "config.yaml"
        text = (QUICKSTART / "config.yaml").read_text()
        text = text.replace("../../hooks", str(ROOT / "hooks")).replace(" engine.py", f" {QUICKSTART}/engine.py")
        accounts = {
            "ledger": str(folder / "ledger.db"),
            "prices": {"currency": "usd", "gpu_hour": 2.5},
            "admin_key": "admin",
            "api_keys": [{"name": name, "key": f"key-of-{name}"} for name in KEYS],
        }
        self.config.write_text(text + yaml.safe_dump(accounts))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run it."""
        command = [str(Path(sys.executable).with_name("llmux")), "-c", str(self.config)]
        with (self.folder / "llmux.log").open("wb") as log:
            process = subprocess.Popen(command, env=self.env, stdout=log, stderr=log)
        try:
            wait_until(lambda: status_of(f"{self.url}/ready") == 200, what="/ready")
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)

    def ask(self, path: str, body: Any = None, key: str = "admin", method: str | None = None) -> Any:
        """Send a request and return its JSON, or None where that is not what comes."""
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        with (
            contextlib.suppress(OSError, http.client.HTTPException),
            urllib.request.urlopen(request, timeout=120) as response,
        ):
            text = response.read()
            with contextlib.suppress(ValueError):
                return json.loads(text)
        return None

    def chat(self, model: str, key: str, tokens: int) -> None:
        """Have a model write, or embed where no tokens are wanted."""
        if tokens:
            message = {"role": "user", "content": "Tell me about the GPU. " * 8}
            more = {"stream": True, "stream_options": {"include_usage": True}}
            self.ask(
                "/v1/chat/completions", {"model": model, "max_tokens": tokens, "messages": [message], **more}, key
            )
        else:
            self.ask("/v1/embeddings", {"model": model, "input": "what a switch costs"}, key)

    def load(self, stop: threading.Event) -> list[threading.Thread]:
        """Send requests until told to stop."""

        def act(name: str) -> None:
            models, often, tokens = KEYS[name]
            dice = random.Random(name)
            while not stop.wait(dice.expovariate(often / 60)):
                model = dice.choices(list(models), list(models.values()))[0]
                length = tokens and dice.randrange(tokens // 2, tokens * 2)
                threading.Thread(target=self.chat, args=(model, f"key-of-{name}", length), daemon=True).start()

        threads = [threading.Thread(target=act, args=(name,), daemon=True) for name in KEYS]
        for thread in threads:
            thread.start()
        return threads


CAUSES = {
    "alice": 0.1,
    "ci-bot": 0.05,
    "search": 0.0,
    "nightly": 0.8,
}  # of the requests, in the days that are made up
SERVED = {"alice": ("atlas", "quill"), "ci-bot": ("quill", "atlas"), "search": ("vector",), "nightly": ("atlas",)}


def made_up(path: Path, days: int = 30) -> None:
    """Write the ledger of the days before today."""
    dice, store, now = random.Random(7), Store(path), round(time.time() * 1000)
    for day in range(days, 0, -1):
        then = now - day * DAY
        weekend = time.gmtime(then / 1000).tm_wday > 4
        rows = [
            _row(dice, then, key, model)
            for key, (_, often, _) in KEYS.items()
            for place, model in enumerate(SERVED[key])
            for _ in range(
                round(often * dice.uniform(2, 6) * (0.3 if weekend and key != "nightly" else 1) / (1 + place))
            )
        ]
        idle = (0, 0, dice.randrange(9 * 10**7), 0, None, None, 0, "", 2)
        rows.append(Row(then, "", HOUSE, "", "", "", 0, 0, 0, 0, 0, idle[2] * 5 // 7200, "usd", None, *idle))
        for at in range(0, len(rows), 500):
            store.write(rows[at : at + 500])
    store.close()


def _row(dice: random.Random, then: int, key: str, model: str) -> Row:
    tokens = KEYS[key][2]
    gpu = round(dice.uniform(0.5, 1.5) * (tokens or 2) * 60_000)
    switch = round(dice.expovariate(1 / 9e6)) if dice.random() < CAUSES[key] else 0
    cost, output = (gpu + switch) * 5 // 7200, tokens and dice.randrange(tokens, tokens * 8)
    return Row(
        then, "", key, model, model, model, dice.randrange(60, 3000), 0, output, 0, 0, cost, "usd", None,
        dice.randrange(4000), gpu // 1000, gpu, switch, None, None, 200 if dice.random() > 0.02 else 499, "",
    )  # fmt: skip


def shot(page: Page, path: Path, height: int) -> None:
    """Take a picture, as small as it may be."""
    page.set_viewport_size({"width": WIDTH, "height": height})
    page.wait_for_timeout(300)
    page.screenshot(path=path)
    with Image.open(path) as picture:
        full = picture.convert("RGB")
    # The colours that most of it has stay as they are; the edges of letters take the nearest.
    common = sorted(full.getcolors(1 << 24) or (), reverse=True)[:COLOURS]
    palette = Image.new("P", (1, 1))
    palette.putpalette(bytes(value for _, colour in common for value in colour))  # type: ignore[attr-defined]
    full.quantize(palette=palette, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size} bytes")  # noqa: T201 - it reports to people


def bottom(page: Page, selector: str) -> int:
    """Return how high the page must be to have all of an element."""
    box = page.locator(selector).bounding_box()
    assert box is not None
    return round(box["y"] + box["height"] + 14)


def _waited(row: ElementHandle) -> float:
    cell = row.query_selector("[data-label=waited]")
    number, unit = (cell.inner_text() if cell is not None else "0 ms").split()[:2]
    return float(number) if unit == "s" else 0.0


def take(house: House, out: Path) -> None:
    """Take all of them."""
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium())
        page = browser.new_page(viewport={"width": WIDTH, "height": 1000})
        page.goto(f"{house.url}/llmux/ui")
        page.get_by_role("textbox", name="Key").fill("admin")
        page.get_by_role("button", name="Use it").click()
        page.locator("body[data-link=live]").wait_for()
        # While one model drains for another.
        page.locator("#steps li.here", has_text="drain").wait_for(timeout=120_000)
        shot(page, out / "page.png", bottom(page, "#of-costs"))
        page.get_by_role("tab", name="Requests").click()
        page.locator("#ended tbody tr").first.wait_for()
        page.wait_for_timeout(1500)
        rows = page.locator("#ended tbody tr").element_handles()[:6]  # they move as others come
        button = max(rows, key=_waited).query_selector("button")
        assert button is not None
        button.click()
        shot(page, out / "page-requests.png", bottom(page, "#ended tbody tr:nth-child(8)"))
        page.get_by_role("tab", name="Usage").click()
        page.locator("#uses tbody tr").first.wait_for()
        shot(page, out / "page-usage.png", bottom(page, "#of-causers"))
        browser.close()


def main(arguments: Sequence[str]) -> None:
    """Take them, into the folder that is given, or that of the quickstart."""
    out = Path(arguments[0]) if arguments else QUICKSTART
    with tempfile.TemporaryDirectory() as folder:
        house, stop = House(Path(folder)), threading.Event()
        made_up(Path(folder) / "ledger.db")
        with house.running():
            threads = house.load(stop)
            stop.wait(WARM_UP)
            try:
                take(house, out)
            finally:
                stop.set()
                for thread in threads:
                    thread.join()


if __name__ == "__main__":
    main(sys.argv[1:])
