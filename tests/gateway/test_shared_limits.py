"""Limits, budgets and roles of a gateway's keys, over several gateways and a real store."""

from __future__ import annotations

import asyncio
import base64
import json

import pytest

from llmux.accounts.limits import period
from llmux.config.gateway import GatewayConfig
from llmux.errors import ForbiddenError, LimitError, QuotaError
from llmux.fleet.store import _USE, Store, StoreError
from llmux.gateway.shared_limits import SharedGate
from tests.gateway.test_store import Shared, eventually
from tests.harness.lease.raw import HOST
from tests.harness.store_server import Server
from tests.server.fixtures import one_loop

pytest.importorskip("redis")

HOSTS = {"one": {"url": "http://127.0.0.1:1"}}
NOW = 1_700_000_000.0  # the 14th of a month


class Gateway:
    """The part of one that lets requests in."""

    def __init__(self, store, name, document, file=None):
        self.store, self.name = store, name
        self.time, self.wall = asyncio.get_running_loop().time, NOW
        self.gate = SharedGate(self.time, lambda _model: False, lambda: self.wall)
        self.configure(document | {"state": str(file or "/dev/null/state.json")})

    def configure(self, document):
        self.gate.configure_gateway(GatewayConfig.model_validate({"hosts": HOSTS, **document}), {"alias": "a"}.get)

    def ask(self, key="alice", model="a", size=0):
        headers = []
        return self.gate.enter(self.gate.grants[key], model, model, size, "id", headers)

    def admitted(self, most, **more):
        """How many of so many requests are let in."""
        count = 0
        for _ in range(most):
            try:
                self.ask(**more)
            except (LimitError, QuotaError):
                continue
            count += 1
        return count

    def end(self, passed, read=0, wrote=0):
        body = json.dumps({"usage": {"prompt_tokens": read, "completion_tokens": wrote}}).encode()
        passed.ended(("/v1/chat/completions", 200, True, 0, True, b"", [body], 0), 0.0)

    async def tell(self):
        await self.gate.exchange(self.store, self.name)
        await self.store.fly(self.name, {})


@pytest.fixture
def server():
    found = Server()
    yield found
    found.close()


@pytest.fixture
async def store(server):
    found = Store(server.url)

    async def answers():
        try:
            await found.hosts()
        except StoreError:
            return False
        return True

    await eventually(answers)
    yield found
    await found.close()


def keys(*, prices=None, **settings):
    document = {"api_keys": [{"name": "alice", "key": "k", **settings}]}
    return document | ({"prices": prices} if prices else {})


def limits(**given):
    return keys(limits=given)


TOKENS = {"models": {"a": {"input": 1.0, "output": 1.0}}}  # a millionth each


async def test_a_rate_is_one_over_all_gateways(store):
    first, second = (Gateway(store, name, limits(requests="60/d")) for name in "xy")
    total = 0
    for _ in range(20):
        for each in (first, second):
            total += each.admitted(5)
            await each.tell()
    assert 60 <= total <= 65  # what came to one since the other has told it
    late = Gateway(store, "z", limits(requests="60/d"))
    await late.tell()
    assert late.admitted(5) == 0


async def test_requests_at_several_gateways_at_once_are_made_up_for(store):
    first, second = (Gateway(store, name, limits(requests="864/d")) for name in "xy")  # one in 100 s, grows evenly
    assert first.admitted(864) == second.admitted(864) == 864
    for each in (first, second, first):
        await each.tell()
    left = first.gate._balances["alice"].requests[0].full_at - first.time()
    assert 2 * 86_400 - 60 < left <= 2 * 86_400  # seconds: the next is a day later than with one gateway
    assert first.admitted(1) == 0


@pytest.mark.parametrize("by", [3600, 20_000 * 86_400], ids=["an hour", "to 1970"])
async def test_a_store_whose_clock_is_put_back_refuses_nobody_for_as_long(store, monkeypatch, by):
    first, second, idle = (Gateway(store, name, limits(requests="864/d")) for name in "xyz")  # one in 100 s
    assert first.admitted(864) == 864
    for each in (first, second, idle):
        await each.tell()
    earlier = f"(function() local t = redis.call('TIME'); t[1] = t[1] - {by}; return t end)()"
    monkeypatch.setattr("llmux.fleet.store._USE", _USE.replace("redis.call('TIME')", earlier))
    second.gate._use("alice", 10, 0.0, 0)  # as those that were let in before it knew
    for each in (second, first, idle, second, first, idle):
        await each.tell()
    late = Gateway(store, "late", limits(requests="864/d"))
    await late.tell()
    for each in (first, second, idle, late):
        left = each.gate._balances["alice"].requests[0].full_at - each.time()
        assert left == pytest.approx(86_400 + 1000, abs=30)
        assert each.admitted(1) == 0


async def test_tokens_are_corrected_everywhere(store):
    first, second = (Gateway(store, name, limits(tokens="1000/d")) for name in "xy")
    passed = first.ask(size=700)  # 200 to read, and 500 to write
    await first.tell()
    await second.tell()
    assert second.admitted(1, size=0) == 0
    first.end(passed, read=90, wrote=10)
    await first.tell()
    await second.tell()
    assert second.gate._balances["alice"].tokens[0].left(second.time()).remaining in {899, 900}
    assert second.admitted(1, size=0) == 1


async def test_requests_under_way_count_at_all_gateways_until_theirs_dies(store, monkeypatch):
    first, second = (Gateway(store, name, limits(concurrent=4)) for name in "xy")
    running = [first.ask() for _ in range(3)]
    await first.tell()
    await second.tell()
    assert second.admitted(5) == 1
    await second.tell()
    await first.tell()
    assert first.admitted(1) == 0
    first.end(running.pop())
    assert first.admitted(2) == 1
    monkeypatch.setattr("llmux.fleet.store.FLIGHT", 0.05)
    await first.tell()

    async def gone():
        await second.tell()
        return second.gate.others == 0

    await eventually(gone)
    assert second.admitted(5) == 3


async def test_a_batch_whose_answer_was_lost_counts_once(store):
    first, second = (Gateway(store, name, limits(requests="60/d")) for name in "xy")
    await second.tell()
    await first.tell()
    assert first.admitted(10) == 10
    tell, told = store.use, []

    async def lose(*args):
        told.append(args)
        await tell(*args)
        raise StoreError("the answer was lost")

    first.store = type("Lossy", (), {"use": staticmethod(lose), "fly": store.fly})()
    for _ in range(3):
        with pytest.raises(StoreError):
            await first.tell()
    first.store = store
    assert first.admitted(4) == 4  # alone, each of them counts for the other one as well
    await first.tell()
    await first.tell()
    assert len(told) == 3
    await second.tell()
    assert second.gate._balances["alice"].requests[0].left(second.time()).remaining == 46


async def test_alone_each_takes_its_share(store, server):
    first, second = (Gateway(store, name, limits(requests="40/d", concurrent=100)) for name in "xy")
    for each in (first, second, first):
        await each.tell()
    server.close()
    for each in (first, second):
        with pytest.raises(StoreError):
            await each.tell()
        assert each.gate.alone
    assert first.admitted(100) == 20
    assert second.admitted(100) == 20


async def test_alone_requests_under_way_count_twice_and_that_is_over_with_the_outage(store):
    first, second = (Gateway(store, name, limits(concurrent=4)) for name in "xy")
    running = [first.ask()]
    for each in (first, second, first):
        await each.tell()
    working, broken = store, Store(f"redis://{HOST}:1/0")
    first.store.fly, first.store = store.fly, type("Gone", (), {"use": broken.use, "fly": store.fly})()
    with pytest.raises(StoreError):
        await first.tell()
    running.append(first.ask())
    assert first.admitted(5) == 0  # two of four are its share
    first.end(running.pop())
    running.append(first.ask())
    first.store = working
    await first.tell()
    assert first.admitted(5) == 2
    for passed in running:
        first.end(passed)
    await first.tell()
    await second.tell()
    assert second.admitted(5) == 2
    await broken.close()


async def test_a_store_that_was_emptied_is_told_what_is_known(store):
    document = keys(limits={"requests": "60/d"}, budget={"usd": 1, "per": "month"}, prices=TOKENS)
    first, second = (Gateway(store, name, document) for name in "xy")
    first.end(first.ask(), read=100, wrote=200)
    await first.tell()
    await second.tell()
    await store._redis.flushall()
    await second.tell()  # has used nothing itself
    await second.tell()
    late = Gateway(store, "z", document)
    await late.tell()
    assert late.gate.budgets()["alice"].spent == 300
    assert late.gate._balances["alice"].requests[0].left(late.time()).remaining == 59


async def test_a_budget_is_one_over_all_gateways(store):
    document = keys(budget={"usd": 0.001, "per": "day"}, prices=TOKENS)  # a thousand tokens
    first, second = (Gateway(store, name, document) for name in "xy")
    passed = first.ask(size=350)  # 100 and 500 are reserved
    for each in (first, second):
        await each.tell()
    second.end(second.ask(), read=0, wrote=400)
    with pytest.raises(LimitError, match="reserved by its requests under way"):
        second.ask()
    first.end(passed, read=100, wrote=500)
    await second.tell()
    await first.tell()
    with pytest.raises(QuotaError, match="is spent"):
        first.ask()
    await second.tell()
    with pytest.raises(QuotaError, match="is spent"):
        second.ask()
    first.wall = second.wall = NOW + 86_400
    for each in (first, second):
        await each.tell()
        assert each.admitted(1) == 1


async def test_a_clock_that_is_set_and_set_back_does_not_begin_a_budget_anew():
    """Not without a store either."""
    one = Gateway(None, "x", keys(budget={"usd": 0.001, "per": "month"}, prices=TOKENS))
    one.end(one.ask(), wrote=600)
    one.wall = NOW + 40 * 86_400
    one.end(one.ask(), wrote=900)
    one.wall = NOW
    one.end(one.ask(), wrote=399)
    assert one.gate.budgets()["alice"].spent == 999
    one.wall = NOW + 40 * 86_400
    assert one.gate.budgets()["alice"].spent == 900


async def test_what_counts_no_more_is_forgotten(store):
    """A gateway that runs for years keeps the last periods of each budget, and no key that was removed."""
    document = keys(budget={"usd": 1, "per": "day"}, prices=TOKENS, limits={"requests": "6000/m", "concurrent": 4})
    one = Gateway(store, "x", document)
    gate = one.gate
    for day in range(100):
        one.wall = NOW + day * 86_400
        one.end(one.ask(), wrote=1 + day)
        await one.tell()
    assert len(gate._spent) <= 33
    assert gate.budgets()["alice"].spent == 100
    one.configure({"api_keys": [{"name": "bob", "key": "k" * 20}]})
    one.wall += 40 * 86_400
    await one.tell()
    assert (gate._spent, gate._held) == ({}, {})
    gate._forget(one.time() + 60, one.wall)  # once its rate has recovered
    assert gate._full_at == {}


async def test_what_the_store_was_not_told_yet_counts_though_the_clock_was_ahead_then(store):
    document = keys(budget={"usd": 0.001, "per": "day"}, prices=TOKENS)
    one, other = (Gateway(store, name, document) for name in "xy")
    one.end(one.ask(), wrote=600)
    one.wall = NOW + 40 * 86_400
    await one.tell()
    one.wall = NOW
    for each in (one, other):
        await each.tell()
        assert each.gate.budgets()["alice"].spent == 600
    assert await store._redis.pttl(f"{{llmux}}:use:budget:{period('day', NOW)[0]}:alice") > 60_000


async def test_alone_a_budget_is_shared_out(store, server):
    document = keys(budget={"usd": 0.001, "per": "day"}, prices=TOKENS)
    first, second = (Gateway(store, name, document) for name in "xy")
    for each in (first, second, first):
        await each.tell()
    server.close()
    with pytest.raises(StoreError):
        await first.tell()
    first.end(first.ask(), read=0, wrote=500)
    with pytest.raises(QuotaError, match="is spent"):
        first.ask()
    assert first.gate.document()["spent"] == {"budget:1699920000:alice": 500}  # not what is thought of the other


async def test_what_was_spent_survives_and_what_was_reserved_by_one_that_was_killed(store, tmp_path):
    document = keys(budget={"usd": 1, "per": "month"}, prices=TOKENS)
    file = tmp_path / "state" / "gateway.json"
    first = Gateway(store, "x", document, file)
    first.gate.save()
    first.end(first.ask(), read=100, wrote=200)
    passed = first.ask(size=350)
    first.gate.save()
    assert file.stat().st_mode & 0o777 == 0o600
    again = Gateway(store, "x2", document, file)  # the first was killed
    assert again.gate.budgets()["alice"].spent == 300 + passed.reserved
    await again.tell()
    third = Gateway(store, "x3", document, file)  # and so was that, before it had saved the next time
    await third.tell()
    late = Gateway(store, "y", document)
    await late.tell()
    assert late.gate.budgets()["alice"].spent == 300 + passed.reserved
    again.gate.save()
    assert json.loads(file.read_text())["spent"] == {"budget:1698796800:alice": 300 + passed.reserved}
    for nonsense in ("nonsense", "[]", '{"spent": {"budget:1698796800:alice": Infinity}}', "[" * 100_000):
        file.write_text(nonsense)
        wrong = Gateway(store, "x4", document, file)
        assert wrong.gate.budgets()["alice"].spent == 0
        assert str(file) in wrong.gate.unreadable
    assert not again.gate.unreadable


async def spent(store, document):
    late = Gateway(store, "late", document)
    await late.tell()
    return late.gate.budgets()["alice"].spent


@pytest.mark.parametrize("told", [False, True], ids=["not told", "told, but not answered"])
async def test_what_was_spent_without_the_store_survives_a_kill_and_counts_once(store, tmp_path, told):
    document = keys(budget={"usd": 1, "per": "month"}, prices=TOKENS)
    file = tmp_path / "gateway.json"
    first, other = Gateway(store, "x", document, file), Gateway(store, "y", document)
    first.end(first.ask(), wrote=300)
    for each in (first, other):
        await each.tell()

    async def lose(*args):
        if told:
            await store.use(*args)
        raise StoreError("the store is frozen")

    first.end(first.ask(), wrote=20)
    first.store = type("Frozen", (), {"use": staticmethod(lose)})()
    with pytest.raises(StoreError):
        await first.tell()
    first.end(first.ask(), wrote=1)
    first.gate.save()  # and it is killed
    other.end(other.ask(), wrote=4000)
    await other.tell()
    again = Gateway(store, "x2", document, file)
    assert again.gate.budgets()["alice"].spent == 321
    again.gate.save()
    again = Gateway(store, "x3", document, file)  # that one was, too
    for _ in range(3):
        await again.tell()
    assert await spent(store, document) == 4321
    again.gate.save()
    again = Gateway(store, "x4", document, file)
    for _ in range(2):
        await again.tell()
    assert again.gate.budgets()["alice"].spent == await spent(store, document) == 4321


async def test_a_batch_is_in_the_file_before_it_is_told(store, tmp_path):
    document = keys(budget={"usd": 1, "per": "month"}, prices=TOKENS)
    file = tmp_path / "gateway.json"
    first = Gateway(store, "x", document, file)
    first.end(first.ask(), wrote=300)
    await first.tell()  # and it is killed, before it has saved anything itself
    again = Gateway(store, "x2", document, file)
    assert again.gate.budgets()["alice"].spent == 300
    await again.tell()
    await again.tell()
    assert await spent(store, document) == 300


async def test_a_store_that_was_emptied_is_told_by_the_one_that_knows_more(store):
    document = keys(budget={"usd": 1, "per": "month"}, prices=TOKENS)
    first, second = (Gateway(store, name, document) for name in "xy")
    first.end(first.ask(), wrote=300)
    for each in (first, second, first):
        await each.tell()
    first.end(first.ask(), wrote=20)
    await first.tell()
    await store._redis.flushall()
    for each in (second, second, first):  # it has not heard of the last twenty
        await each.tell()
    assert first.gate.budgets()["alice"].spent == 320
    await first.tell()
    assert await spent(store, document) == 320


async def test_roles_and_models(store):
    role = {"models": ["small-*", "a"], "limits": {"requests": "2/d"}}
    document = {"roles": {"free": role}, **keys(role="free")}
    gateway = Gateway(store, "x", document)
    with pytest.raises(ForbiddenError, match="may not use the model 'large'"):
        gateway.ask(model="large")
    assert gateway.ask(model="small-1")
    assert gateway.ask(model="alias")  # of a
    assert gateway.admitted(1, model="a") == 0
    gateway.configure({"roles": {"free": {**role, "limits": {"requests": "3/d"}}}, **keys(role="free")})
    assert gateway.admitted(9) == 3  # another limit
    gateway.configure({"roles": {"free": {**role, "limits": {}}}, **keys(role="free")})
    assert gateway.ask() is None  # nothing is counted
    gateway.configure(keys())
    assert not gateway.gate.grants


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (keys(role="none"), "'none' is not one of `roles`"),
        (keys(budget={"usd": 1}), "needs `prices`"),
        (keys(budget={"eur": 1}, prices=TOKENS), "is in eur, but `prices.currency` is usd"),
        ({"api_keys": [{"key": "k", "limits": {"requests": "1/m"}}]}, "needs a `name`"),
        ({"roles": {"r": {"remote": True}}}, "is held by hosts only"),
        ({"roles": {"r": {"budget": {"usd": 1}}}}, "needs `prices`"),
        (keys(weight=2), "is held by hosts only"),
    ],
)
def test_settings_with_mistakes(document, words):
    with pytest.raises(ValueError, match=words):
        GatewayConfig.model_validate({"hosts": HOSTS, **document})


# ---- processes


async def gateways(shared, server):
    """Start a second gateway beside the first, both with keys that have limits."""
    names = ("alice", "bob")
    more = {
        "api_keys": [{"name": name, "key": f"sk-{name}", "limits": {"requests": "20/d"}} for name in names],
        "prices": TOKENS,
    }
    hosts, shared.hosts = shared.hosts, {}
    other = Shared(shared.root / "other")
    for each in (shared, other):
        each.write_gateway(fleet={"store": server.url}, **more)
        each.start()
    shared.hosts = hosts
    for each in (shared, other):
        await each.until(lambda each=each: known(each, {"alone": False, "gateways": 2}))
    return other


async def known(gateway, limits):
    headers = [("Authorization", "Bearer sk-bob")]
    document = (await gateway.ask("GET", "/llmux/fleet", headers=headers)).json()
    return document["store"]["limits"] == limits


async def asks(gateway, key):
    return await gateway.chat("a", headers=[("Authorization", f"Bearer sk-{key}")])


@one_loop
async def test_two_gateways_as_processes(tmp_path):
    server, shared = Server(), Shared(tmp_path)
    other = None
    try:
        shared.join("one", server)
        other = await gateways(shared, server)
        for left in range(19, -1, -1):
            answer = await asks(shared, "alice")
            assert answer.status == 200
            assert answer.get("x-ratelimit-remaining-requests") == str(left)
        assert (await asks(shared, "alice")).status == 429

        async def refuses(gateway, key):
            return (await asks(gateway, key)).status == 429

        await other.until(lambda: refuses(other, "alice"))
        answer = await asks(other, "alice")
        assert answer.status == 429
        assert int(answer.get("Retry-After")) > 1000
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        server.stop()
        for each in (shared, other):
            await each.until(lambda each=each: known(each, {"alone": True, "gateways": 2}))
            statuses = [(await asks(each, "bob")).status for _ in range(15)]
            assert statuses == [200] * 10 + [429] * 5
        server.go_on()
        for each in (shared, other):
            await each.until(lambda each=each: known(each, {"alone": False, "gateways": 2}))
        await shared.until(lambda: refuses(shared, "bob"))
        await other.until(lambda: refuses(other, "bob"))
    finally:
        try:
            if other is not None:
                other.finish()
        finally:
            shared.finish()
            server.close()


@one_loop
async def test_a_spent_budget_stays_spent_when_a_gateway_was_killed(tmp_path):
    shared = Shared(tmp_path)
    usage = json.dumps({"usage": {"prompt_tokens": 300, "completion_tokens": 300}}).encode()
    do = {"body": base64.b64encode(usage).decode(), "headers": [["Content-Type", "application/json"]]}
    alice = [("Authorization", "Bearer sk-alice")]
    try:
        shared.add("one")
        key = {"name": "alice", "key": "sk-alice", "budget": {"usd": 0.0005, "per": "month"}}
        shared.write_gateway(api_keys=[key], prices=TOKENS, state="spent.json")
        shared.start()
        await shared.until(lambda: '"host_followed"' in shared.log)
        assert (await shared.chat("a", headers=alice, do=do)).status == 200
        refused = await shared.chat("a", headers=alice)
        assert (refused.status, refused.json()["error"]["code"]) == (429, "insufficient_quota")
        assert refused.get("x-should-retry") == "false"
        file = tmp_path / "spent.json"
        await shared.until(lambda: file.exists() and list(json.loads(file.read_text())["spent"].values()) == [600])
        shared.kill()
        shared.start()
        assert (await shared.chat("a", headers=alice)).status == 429
        assert shared.end() == 0
        file.unlink()
        file.mkdir()  # what cannot be written is told, and stops nothing
        shared.start()
        await shared.until(lambda: '"host_followed"' in shared.log.rpartition('"started"')[2])
        assert (await shared.chat("a", headers=alice, do=do)).status == 200
        await shared.until(lambda: '"state_file_unwritable"' in shared.log)
    finally:
        shared.finish()
