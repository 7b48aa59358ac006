"""Keys on both ways through llmux: who is let in, and what the engine gets to see."""

from __future__ import annotations

import asyncio
import threading

import pytest
from argon2 import PasswordHasher

from llmux.config.access import fits, new_key
from llmux.middleware import authentication
from tests.harness.waiting import PATIENCE
from tests.server.house import message, until

KEY, OTHER, ROOT = (new_key() for _ in range(3))
HASH, OTHER_HASH, ROOT_HASH = map(PasswordHasher(1, 8, 1).hash, (KEY, OTHER, ROOT))  # of little work


def request(*more: str, model: str = "a") -> bytes:
    head, _, rest = message("POST", "/v1/chat/completions", {"model": model}).partition(b"\r\n")
    return head + b"\r\n" + "".join(f"{line}\r\n" for line in more).encode() + rest


async def ask(house, *more: str):
    return await house.raw(request(*more))


def shown(house) -> list[bytes]:
    """The credentials in the last head that the engine got."""
    lines = house.engine.heads[-1].split(b"\r\n")
    return [line for line in lines if line.lower().startswith((b"authorization", b"x-api-key"))]


async def test_a_known_key_takes_the_short_way_and_stays_with_llmux(house, fast):
    house.up("a")
    await house.open(api_keys=[HASH, OTHER_HASH, "plain"])
    await ask(house, "X-API-Key: plain")
    fast.clear()
    for header in (f"Authorization: Bearer {KEY}", f"authorization: bearer  {KEY}", f"x-api-KEY: {KEY}"):
        assert (await ask(house, header)).status == 200
        assert shown(house) == []
    assert fast == [False, True, True]  # the first had to be looked at


CASES = [
    ([f"Authorization: Bearer {KEY}", "X-API-Key: engine"], 200, [b"X-API-Key: engine"]),
    ([f"X-API-Key: {KEY}", "Authorization: Bearer engine"], 200, [b"Authorization: Bearer engine"]),
    ([f"X-API-Key: {KEY}", f"Authorization: Bearer {OTHER}"], 200, []),
    ([f"X-API-Key: {ROOT}", f"Authorization: Bearer {OTHER}"], 200, []),
    ([f"Authorization: Bearer {ROOT}"], 200, []),
    ([f"Authorization: Basic {KEY}", f"X-API-Key: {KEY}"], 200, [f"Authorization: Basic {KEY}".encode()]),
    ([f"Authorization: Basic {KEY}"], 401, None),
    ([f"Authorization: {KEY}"], 401, None),
    ([f"Authorization: Bearer {KEY}x"], 401, None),
    ([f"Authorization: Bearer {HASH}"], 401, None),
    (["X-API-Key: engine", "Authorization: Bearer engine"], 401, None),
    ([], 401, None),
    ([f"X-API-Key: {KEY}", f"X-API-Key: {KEY}"], 200, []),
    (["X-API-Key: no", f"X-API-Key: {KEY}"], 401, None),
]


@pytest.mark.parametrize(("headers", "status", "seen"), CASES)
async def test_both_ways_judge_alike(house, headers, status, seen):
    house.up("a")
    await house.open(api_keys=[HASH, OTHER_HASH], admin_key=ROOT_HASH)
    for key in (KEY, OTHER, ROOT):
        assert (await ask(house, f"X-API-Key: {key}")).status == 200
    for fast in (True, False):
        house.front.fast_path.open = fast
        before = len(house.engine.heads)
        reply = await ask(house, *headers)
        assert reply.status == status
        assert len(house.engine.heads) - before == (status == 200)
        if status == 200:
            assert shown(house) == seen
        else:
            assert reply.error["code"] == "invalid_api_key"
            assert "x-api-key" not in reply.error["message"].lower()  # Claude Code shows no such message
            assert reply.headers["www-authenticate"] == "Bearer"
            assert reply.headers["x-should-retry"] == "false"
            assert reply.marked


async def test_without_keys_credentials_are_the_engines(house, fast):
    house.up("a")
    await house.open()
    await ask(house)
    for _ in range(2):
        assert (await ask(house, f"X-API-Key: {KEY}", "Authorization: Bearer x")).status == 200
        assert shown(house) == [f"X-API-Key: {KEY}".encode(), b"Authorization: Bearer x"]
        house.front.fast_path.open = False
    assert fast == [False, True]  # the first opened the engine's connection


async def test_an_admin_key_that_a_client_shows_by_mistake_stays_with_llmux(house):
    house.up("a")
    await house.open(admin_key="root")
    for _ in range(2):
        assert (await ask(house, "Authorization: Bearer root", "X-API-Key: engine")).status == 200
        assert shown(house) == [b"X-API-Key: engine"]
        assert (await ask(house)).status == 200
        house.front.fast_path.open = False


async def test_a_key_that_waits_to_be_looked_at_does_not_hold_up_others(house, monkeypatch):
    house.up("a")
    await house.open(api_keys=["plain", HASH])
    held, go = asyncio.Event(), asyncio.Event()

    async def look(*_):
        held.set()
        await go.wait()

    monkeypatch.setattr(authentication.Keyring, "_look", look)
    line = await house.line()
    line.send(request("X-API-Key: wrong"))
    await held.wait()
    assert (await ask(house, "X-API-Key: plain")).status == 200
    go.set()
    assert (await line.reply()).status == 401


async def test_too_many_wrong_keys_are_429_and_known_ones_are_served(house, monkeypatch):
    monkeypatch.setattr(authentication, "BURST", 2)
    monkeypatch.setattr(authentication, "EVERY", 60.0)  # no further one becomes due meanwhile
    house.up("a")
    await house.open(api_keys=[HASH, OTHER_HASH])
    assert (await ask(house, f"X-API-Key: {KEY}")).status == 200
    replies = [await ask(house, f"X-API-Key: wrong{n}") for n in range(4)]
    assert [reply.status for reply in replies] == [401, 401, 429, 429]
    assert replies[-1].error["code"] == "too_many_attempts"
    assert 1 <= int(replies[-1].headers["retry-after"]) <= 60
    assert (await ask(house, f"X-API-Key: {KEY}")).status == 200
    assert (await ask(house)).status == 401  # nothing to look at


async def test_operators(house):
    await house.open(api_keys=[HASH], admin_key=ROOT_HASH)

    async def wake(**headers):
        return await house.ask("POST", "/llmux/models/a/wake", **headers)

    assert (await wake()).status == 401
    refused = await wake(X_API_Key=KEY)
    assert refused.status == 401
    assert (await house.ask("GET", "/v1/models", X_API_Key=KEY)).status == 200
    assert "takes the admin key" in (await wake(X_API_Key=KEY)).error["message"]
    assert (await wake(X_API_Key=ROOT)).status == 202
    assert (await wake(X_API_Key=KEY, Authorization=f"Bearer {ROOT}")).status == 202
    assert (await house.ask("GET", "/upstream/a/v1/x", X_API_Key=ROOT, Authorization="x")).status == 200
    assert shown(house) == [b"Authorization: x"]


@pytest.mark.parametrize(
    "header", ["X-Forwarded-For", "Forwarded", "X-Real-IP", "X-Forwarded-Proto", "X-Forwarded-Host", "Via"]
)
async def test_what_comes_through_a_proxy_is_not_from_this_machine(house, header):
    await house.open()
    reply = await house.ask("POST", "/llmux/models/a/wake", **{header: "127.0.0.1"})
    assert (reply.status, reply.error["code"]) == (403, "forbidden")
    assert (await house.ask("POST", "/llmux/models/a/wake")).status == 202


@pytest.fixture
def checked(monkeypatch):
    """A check of a key that waits until it is set."""
    done = threading.Event()
    monkeypatch.setattr(authentication.Keyring.__init__, "__kwdefaults__", {"check": _waiting(done)})
    yield done
    done.set()


def _waiting(done: threading.Event):
    def check(key: bytes, text: str) -> bool:
        return done.wait(PATIENCE) and fits(key, text)

    return check


async def test_a_key_that_a_reload_removes_as_it_is_found_lets_nothing_in(house, checked):
    house.up("a")
    await house.open(api_keys=[HASH, "plain"], admin_key=ROOT_HASH)
    ring = house.front._keys.ring
    for path, key in (("/v1/chat/completions", KEY), ("/llmux/lease", ROOT)):
        checked.clear()
        line = await house.begin("POST", path, {"model": "a"}, X_API_Key=key)
        await until(lambda: ring._pending)
        [task] = ring._pending.values()
        task.add_done_callback(
            lambda _: house.front.configure(house.config("a", api_keys=["plain"], admin_key="x"))
        )
        checked.set()
        assert (await line.reply()).status == 401
        house.front.configure(house.config("a", api_keys=[OTHER_HASH, "plain"], admin_key=ROOT_HASH))


@pytest.mark.parametrize("path", ["/llmux/events", "/llmux/history"])
async def test_a_key_that_a_reload_removes_while_another_is_looked_at_opens_no_stream(house, checked, path):
    await house.open(api_keys=["old", "kept"], admin_key=ROOT_HASH)
    line = await house.begin("GET", path, X_API_Key="old", Authorization="Bearer unknown")
    await until(lambda: house.front._keys.ring._pending)
    house.front.configure(house.config("a", api_keys=["kept"], admin_key=ROOT_HASH))
    checked.set()
    assert (await line.reply()).status == 401


async def test_a_reload_changes_keys_at_once_also_after_a_request_on_the_fast_path(house):
    house.up("a")
    await house.open(api_keys=["old", HASH])
    assert (await ask(house, f"X-API-Key: {KEY}")).status == 200
    held = await house.line()
    held.send(message("POST", "/v1/hold", {"model": "a"}, X_API_Key="old"))
    await until(lambda: house.in_flight("a"))
    config = house.config(api_keys=["new", HASH])
    house.switcher.replace(config)
    house.front.configure(config)
    statuses = [(await ask(house, f"X-API-Key: {key}")).status for key in ("old", "new", KEY)]
    assert statuses == [401, 200, 200]
    house.engine.go.set()
    assert (await held.reply()).status == 200  # what was let in is not thrown out
    held.send(request("X-API-Key: old"))
    assert (await held.reply()).status == 401


async def test_no_key_is_kept_with_what_is_known_of_a_head(house, fast):
    house.up("a")
    await house.open(api_keys=[HASH])
    for _ in range(3):
        assert (await ask(house, f"X-API-Key: {KEY}")).status == 200
    line = await house.line()
    for _ in range(3):
        line.send(request(f"X-API-Key: {KEY}"))
        assert (await line.reply()).status == 200
    assert [one._last_head for one, _ in house._runner.server.open_connections()][-1:] == [None]
    assert fast == [False, True, True, True, True, True]
    known = house.front.fast_path.known
    assert len(known) == 1
    lines = [line for head in known.values() for line in head._lines]
    assert KEY.encode() not in b"".join([*known, *lines])


async def test_the_access_log_says_whose_key_it_was_and_never_the_key(house):
    house.up("a")
    await house.open(api_keys=[{"name": "laptop", "key": HASH}, "plain-secret"], access_log=True)
    for key in (KEY, KEY, "plain-secret", "wrong-secret"):
        await ask(house, f"X-API-Key: {key}")
    await until(lambda: len(house.log.named("request_finished")) == 4)
    lines = house.log.named("request_finished")
    assert [line.get("key") for line in lines] == ["laptop", "laptop", None, None]
    told = repr(house.log.events)
    assert not [key for key in (KEY, "plain-secret", "wrong-secret", HASH) if key in told]
