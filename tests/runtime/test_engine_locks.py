"""Which engines another llmux controls, too; with real sockets, in one process."""

from __future__ import annotations

import asyncio
import socket

import pytest

from llmux.config import Config
from llmux.runtime import engine_locks
from llmux.runtime.engine_locks import EngineLocks, Other, engines_of
from tests.server.house import Log, until


@pytest.fixture
async def two(free_name):  # noqa: ARG001 - for its sake
    logs = Log(), Log()
    made = [EngineLocks(log, file) for log, file in zip(logs, ("/one.yaml", "/other.yaml"), strict=True)]
    yield made, logs
    for each in made:
        each.close()


@pytest.fixture
def free_name(monkeypatch, tmp_path):
    """Names that no other test has."""
    name = engine_locks._name
    monkeypatch.setattr(engine_locks, "_name", lambda engine: f"{name(engine)}{str(tmp_path)[-20:]}")
    monkeypatch.setattr(engine_locks, "PATIENCE", 0.01)


async def test_a_lock_goes_to_the_other_when_its_holder_lets_go(two, monkeypatch):
    (one, other), (_, log) = two
    monkeypatch.setattr(engine_locks, "RETRY", 0.01)
    one.follow(lambda: ["a:1", "a:2"])
    other.follow(lambda: ["a:2", "a:3"])
    assert set(other.taken) == {"a:2"}
    assert [each["engine"] for each in engine_locks.document(other)] == ["a:2"]
    one.follow(lambda: ["a:1"])
    await until(lambda: not other.taken)
    one.follow(lambda: ["a:1", "a:2"])
    assert set(one.taken) == {"a:2"}
    assert len(log.named("engine_controlled_twice")) == 1


async def test_each_side_names_the_other_once(two):
    (one, other), (log, other_log) = two
    one._me, other._me = Other(11, "/one.yaml"), Other(22, "/other.yaml")
    one.follow(lambda: [f"a:{n}" for n in range(30)])
    answered = asyncio.to_thread(engine_locks._ask, "a:0", other._me)
    assert await answered == one._me
    assert await asyncio.to_thread(engine_locks._ask, "a:1", other._me) == one._me
    by = "the llmux with pid 22 (/other.yaml)"
    assert log.named("engine_controlled_twice") == [{"engines": ["a:0"], "by": by}]
    other.follow(lambda: [f"a:{n}" for n in range(30)])  # its holder cannot answer: it runs on this thread
    (told,) = other_log.named("engine_controlled_twice")
    assert (len(told["engines"]), told["by"]) == (30, "another llmux")


async def test_nonsense_is_survived(two):
    (one, _), (log, _) = two
    one.follow(lambda: ["a:1"])
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        for message in (b"", b"{", b"[]", b"[1e999, 2]", b"null", b"9" * 4000, b"[" * 4000, b'["x", 1]'):
            client.sendto(message, engine_locks._name("a:1"))
            await asyncio.sleep(0)
    assert await asyncio.to_thread(engine_locks._ask, "a:1", Other()) == one._me
    assert log.events == []


async def test_where_there_are_no_locks_nothing_is_said(two, monkeypatch):
    (one, other), (_, log) = two
    monkeypatch.setattr(engine_locks, "_name", lambda _engine: "/no/such/folder/lock")
    for each in (one, other):
        each.follow(lambda: ["a:1"])
    assert not other.taken
    assert log.events == []


def test_an_engine_has_one_name():
    hooks = {"wake": ":", "sleep": ":", "alive": ":"}
    urls = [
        "http://localhost:8001",
        "http://[::1]:8001",
        "http://127.0.0.1:8001/",
        "http://GPU:1/x",
        "https://gpu:1",
    ]
    models = {f"m{n}": {"url": url, "shared_address": True, **hooks} for n, url in enumerate(urls)}
    engines = engines_of(Config.model_validate({"models": models}))
    assert engines == ["127.0.0.1:8001"] * 3 + ["gpu:1/x", "gpu:1"]
    assert len(engine_locks._name("x" * 500)) < 107


async def test_a_reload_takes_and_lets_go_and_what_is_awake_is_held_until_it_sleeps(house, two):
    """Also at the address that it was woken at."""
    (one, other), (log, _) = two
    switcher = await house.open("a b")
    switcher.engine_locks = one
    one.follow(switcher._engines)
    before = set(one._held)
    assert len(before) == 1  # both are served by the house's engine
    assert (await house.chat("a")).status == 200
    hooks = {"wake": ":", "sleep": ":", "alive": "false"}
    switcher.replace(house.config(models={"c": {"port": 9, **hooks}, "d": {"port": 10, **hooks}}))
    assert set(one._held) >= {"127.0.0.1:9", "127.0.0.1:10"}
    await until(lambda: set(one._held) == {"127.0.0.1:9", "127.0.0.1:10"})
    other.follow(lambda: before)
    assert not other.taken
    assert log.events == []
