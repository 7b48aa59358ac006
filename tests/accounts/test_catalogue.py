"""What models of remotes cost, as genai-prices lists them; and what happens without it."""

import contextlib
import json
import sqlite3
from decimal import Decimal
from types import SimpleNamespace

import pytest

from llmux.accounts import pricing as listing
from llmux.accounts.pricing import Catalogue, Elsewhere, TokenPrice, prices_of
from llmux.config import Config
from tests.server.house import Log, until
from tests.targets.remote_host import CHAT, RemoteHost, answer

PATH = "/v1/chat/completions"
USED = {"prompt_tokens": 1000, "completion_tokens": 100, "prompt_tokens_details": {"cached_tokens": 400}}


class Package:
    """Lists one model, at 2, 0.5 and 8 dollars for a million tokens; twice that from 200,000 on."""

    Usage = SimpleNamespace

    def __init__(self):
        self.asked = []

    def calc_price(self, usage, **by):
        self.asked.append(by)
        if by not in ({"model_ref": "theirs/m"}, {"model_ref": "sold", "provider_id": "r"}):
            raise LookupError("no such model")
        plain = usage.input_tokens - usage.cache_read_tokens
        price = Decimal(2 * plain) + usage.cache_read_tokens / Decimal(2) + 8 * usage.output_tokens
        return SimpleNamespace(total_price=price / 10**6 * (2 if usage.input_tokens >= 200_000 else 1))


@pytest.fixture
def package(monkeypatch):
    package = Package()
    monkeypatch.setattr(listing, "_package", lambda: package)
    monkeypatch.setattr(listing, "_version", lambda: "1.2.3")
    return package


def elsewhere(model="theirs/m", private=False):
    return Elsewhere(model, "r", "https://models.example/v1", private)


def test_what_a_request_costs(package):
    log = Log()
    catalogue = Catalogue(log.emit)
    assert catalogue.price_of("r/m", elsewhere(), (1000, 400, 100)) == 600 * 2 + 200 + 800
    assert catalogue.price_of("r/m", elsewhere(), (200_000, 0, 0)) == 800_000  # a tier
    assert [catalogue.price_of("r/m", elsewhere(), (1, 1, 0)) for _ in range(4)] == [0, 1, 0, 1]  # nothing is lost
    assert package.asked[:3] == [
        {"model_ref": "theirs/m", "provider_api_url": "https://models.example/v1"},
        {"model_ref": "theirs/m", "provider_id": "r"},
        {"model_ref": "theirs/m"},
    ]
    assert not log.events


@pytest.mark.usefixtures("package")
def test_what_is_not_listed_is_told_once():
    log = Log()
    catalogue = Catalogue(log.emit)
    for _ in range(2):
        assert catalogue.price_of("r/m", elsewhere("mine"), (10, 0, 10)) is None
    assert catalogue.price_of("r/n", elsewhere(private=True), (10, 0, 10)) is None  # it is ours
    assert catalogue.price_of("r/o", elsewhere("sold", private=True), (10, 0, 0)) == 20  # but by the remote's name
    assert [(told["model"], told["hint"]) for told in log.named("price_unknown")] == [
        ("r/m", "give prices.models.r/m"),
        ("r/n", "give prices.models.r/n"),
    ]


@pytest.mark.usefixtures("package")
def test_rates_are_found_in_advance():
    catalogue = Catalogue(Log().emit)
    catalogue.look_up([("r/m", elsewhere()), ("r/n", elsewhere("mine"))])
    assert catalogue.rates == {"r/m": TokenPrice(2_000_000, 500_000, 8_000_000)}


def test_without_the_package_there_is_no_price(monkeypatch):
    monkeypatch.setattr(listing, "_package", lambda: None)
    log = Log()
    catalogue = Catalogue(log.emit)
    catalogue.look_up([("r/m", elsewhere())])
    assert catalogue.price_of("r/m", elsewhere(), (1, 0, 1)) is None
    (told,) = log.named("price_unknown")
    assert "pip install 'llmux[prices]'" in told["hint"]


def test_the_real_package():
    pytest.importorskip("genai_prices")
    catalogue = Catalogue(Log().emit)
    openai = Elsewhere("gpt-5-mini", "mine", "https://api.openai.com/v1", private=False)
    assert catalogue.price_of("mine/x", openai, (1_000, 400, 100)) == 600 * 0.25 + 400 * 0.025 + 100 * 2
    named = Elsewhere("gpt-5-mini", "openai", "http://127.0.0.1:9", private=True)
    catalogue.look_up([("openai/x", named)])
    assert catalogue.rates == {"openai/x": TokenPrice(250_000, 25_000, 2_000_000)}
    assert catalogue.document.startswith("genai-prices ")


@pytest.mark.parametrize(
    ("url", "private"),
    [
        ("https://api.openai.com/v1", False),
        ("http://127.0.0.1:8000", True),
        ("http://192.168.1.5:8000", True),
        ("http://[fd00::1]:8000", True),
        ("https://8.8.8.8", False),
        ("http://gpu-box:8000", True),
        ("http://gpu.local", True),
    ],
)
def test_what_is_private(url, private):
    config = Config(
        models={"q": {"port": 8001, "wake": "w", "sleep": "s", "alive": "a"}},
        remotes={"r": {"url": url, "models": {"m": "theirs/m", "n": "x"}}},
        prices={"models": {"r/n": {"input": 1}}},
    )
    assert prices_of(config).elsewhere == {"r/m": Elsewhere("theirs/m", "r", config.remotes["r"].url, private)}


def rows(house):
    with contextlib.closing(sqlite3.connect(house.folder / "ledger.db")) as connection, connection:
        found = connection.execute(
            "SELECT served, input, output, cost, price FROM requests ORDER BY id"
        ).fetchall()
        return found, dict(connection.execute("SELECT version, document FROM prices").fetchall())


@pytest.mark.usefixtures("package")
async def test_a_remotes_requests_cost_what_is_listed(house):
    """In the ledger and against a budget."""
    keys = [{"name": "alice", "key": "key-of-alice", "remote": True, "budget": {"usd": 0.005, "per": "day"}}]
    async with RemoteHost(answer(CHAT | {"usage": USED})) as host:
        remotes = {"r": host.settings(models={"m": "sold", "n": "unlisted"})}
        prices = {"gpu_hour": 3600}
        await house.open("a", ledger="ledger.db", prices=prices, remotes=remotes, api_keys=keys)

        async def ask(model):
            return await house.ask("POST", PATH, {"model": model}, Authorization="Bearer key-of-alice")

        assert house.front.gate._estimate("r/m", SimpleNamespace(seconds=None), 1000, 350) == 100 * 2 + 900 * 8
        assert (await ask("r/n")).status == 200  # which costs nothing
        statuses = [(await ask("r/m")).status for _ in range(4)]
        assert statuses == [200, 200, 200, 429]
        assert house.front.gate.budgets()["alice"].spent == 3 * 2200
        await house.close()
        found, documents = rows(house)
    assert [row[:4] for row in found] == [
        ("r/n", 1000, 100, 0),
        *[("r/m", 1000, 100, 2200)] * 3,
        ("", 0, 0, 0),
    ]
    assert found[0][4] is None
    assert documents[found[1][4]] == "genai-prices 1.2.3"
    assert len(house.log.named("price_unknown")) == 1


@pytest.mark.usefixtures("package")
async def test_prices_in_another_currency_are_not_mixed(house):
    async with RemoteHost(answer(CHAT | {"usage": USED})) as host:
        remotes = {"r": host.settings(models={"m": "sold"})}
        given = {"ledger": "ledger.db", "remotes": remotes, "remotes_for_all": True}
        await house.open("a", prices={"currency": "eur", "gpu_hour": 1}, **given)
        told = "prices: r/m cost nothing: prices that are listed elsewhere are in usd"
        assert told in house.switcher.config.warnings
        assert (await house.chat("r/m")).status == 200
        config = house.config("a", prices={"gpu_hour": 1}, **given)
        house.switcher.replace(config)
        house.front.configure(config)
        await until(lambda: "r/m" in house.switcher.accounts.rates)
        assert (await house.chat("r/m")).status == 200
        await house.close()
    found, _ = rows(house)
    assert [row[3] for row in found] == [0, 2200]


async def test_what_the_package_does_wrong_ends_nothing(house, package, monkeypatch):
    def wrong(_usage, **_by):
        raise TypeError("another version")

    monkeypatch.setattr(package, "calc_price", wrong)
    async with RemoteHost(answer(CHAT | {"usage": USED})) as host:
        remotes = {"r": host.settings()}
        await house.open("a", ledger="ledger.db", prices={}, remotes=remotes, remotes_for_all=True)
        assert (await house.chat("r/m")).status == 200
        assert (await house.chat("a")).status == 200
        (row,) = (await house.ask("GET", "/llmux/usage?by=&model=a")).json()["usage"]
        assert row["requests"] == 1
        assert json.dumps(house.log.named("internal_error"), default=str)
