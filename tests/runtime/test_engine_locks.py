"""Which engines another llmux controls, too; with real sockets, in one process."""

from __future__ import annotations

import asyncio
import json
import resource
import socket

import pytest

from llmux.config import Config
from llmux.runtime import engine_locks
from llmux.runtime.engine_locks import EngineLocks, Other, engines_of
from tests.server.house import Log, until


@pytest.fixture
async def two(free_name):  # noqa: ARG001 - for its sake
    logs = Log(), Log()
    made = [EngineLocks(log, file, 100) for log, file in zip(logs, ("/one.yaml", "/other.yaml"), strict=True)]
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


async def test_one_that_waited_no_longer_for_the_answer_is_named_all_the_same(two):
    """The holder may be busy, or stopped."""
    (one, other), (log, _) = two
    other._me = Other(22, "/other.yaml")
    one.follow(lambda: ["a:1"])
    other.follow(lambda: ["a:1"])  # on the thread of the holder, which cannot answer
    await until(lambda: log.events)
    by = "the llmux with pid 22 (/other.yaml)"
    assert log.named("engine_controlled_twice") == [{"engines": ["a:1"], "by": by}]


async def test_a_flood_of_questions_from_whomever_names_few_in_the_log(two):
    """Any user of the machine can send them: 20,000 made 80 MB of log, and as much memory."""
    (one, _), (log, _) = two
    one.follow(lambda: ["a:1"])
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        for pid in range(1, 2 * engine_locks.NAMED):
            client.sendto(json.dumps([pid, "y" * 3900]).encode(), engine_locks._name("a:1"))
            await asyncio.sleep(0)
        await until(lambda: len(log.events) == engine_locks.NAMED)
    assert (await asyncio.to_thread(engine_locks._ask, "a:1", Other(7, "/late.yaml"))) == one._me
    assert len(log.events) == len(one._askers) == engine_locks.NAMED


async def test_where_few_files_may_be_open_the_last_engines_have_no_locks(two, monkeypatch):
    """They would take those with which hooks are started, and clients accepted."""
    (one, other), (_, log) = two
    one._most = 3
    engines = [f"a:{n}" for n in range(6)]
    one.follow(lambda: engines)
    assert list(one._held) == engines[:3]
    one.follow(lambda: engines[2:])
    assert list(one._held) == engines[2:5]
    other.follow(lambda: engines[5:])
    assert not other.taken
    assert log.events == []
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (1024, 1024))
    assert [engine_locks.most_locks(models) for models in (1, 100, 2000)] == [64, 200, 256]


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
    own = ["localhost", "LocalHost.", "127.0.0.1", "[::1]", "[0:0::0:1]", "0.0.0.0", "[::]", "[::ffff:127.0.0.1]"]
    urls = [*(f"http://{name}:8001/" for name in own), "http://GPU:1/x", "https://gpu:1", "http://127.0.0.2:1"]
    models = {f"m{n}": {"url": url, "shared_address": True, **hooks} for n, url in enumerate(urls)}
    engines = engines_of(Config.model_validate({"models": models}))
    assert engines == ["127.0.0.1:8001"] * len(own) + ["gpu:1/x", "gpu:1", "127.0.0.2:1"]
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
