"""The shared store, a real one: fenced leases, hosts that are found, a store that is frozen or emptied."""

from __future__ import annotations

import asyncio
import contextlib
import signal

import pytest

from llmux.fleet.store import Store, StoreError
from tests.harness.lease.fleet import Door
from tests.harness.lease.lab import Lab
from tests.harness.lease.raw import HOST
from tests.harness.store_server import Server
from tests.server.fixtures import one_loop

pytest.importorskip("redis")


async def eventually(condition):
    """Wait until something is so; a test's timeout bounds it."""
    pause = 0.02
    while not await condition():
        await asyncio.sleep(pause)
        pause = min(1.2 * pause, 0.1)


async def answers(store):
    try:
        await store.hosts()
    except StoreError:
        return False
    return True


@pytest.fixture
def server():
    found = Server()
    yield found
    found.close()


@pytest.fixture
async def store(server):
    found = Store(server.url)

    await eventually(lambda: answers(found))
    yield found
    await found.close()


# ---- leases


async def test_a_name_belongs_to_one_instance_until_its_lease_is_over(store, monkeypatch):
    lease = "llmux.fleet.store.LEASE"
    monkeypatch.setattr(lease, 60.0)
    assert await store.register("gpu1", "first", 1, {"url": "a"}) == "ok"
    assert await store.register("gpu1", "second", 1, {"url": "b"}) == "held"
    assert await store.hosts() == {"gpu1": {"url": "a"}}
    assert await store.register("gpu1", "first", 2, {"url": "c"}) == "ok"
    assert await store.register("gpu1", "first", 2, {"url": "d"}) == "overtaken"
    assert await store.hosts() == {"gpu1": {"url": "c"}}
    monkeypatch.setattr(lease, 0.05)
    assert await store.register("gpu1", "first", 3, {"url": "c"}) == "ok"
    monkeypatch.setattr(lease, 60.0)

    async def succeeds():
        return await store.register("gpu1", "second", 1, {"url": "b"}) == "ok"

    await eventually(succeeds)
    assert await store.register("gpu1", "first", 4, {"url": "a"}) == "held"  # it has been succeeded
    await store.deregister("gpu1", "first")
    assert await store.hosts() == {"gpu1": {"url": "b"}}
    await store.deregister("gpu1", "second")
    assert await store.hosts() == {}


async def test_a_wake_belongs_to_the_first_that_claims_it(store):
    assert (await store.claim("a", "one", 60.0)).host == "one"
    again = await store.claim("a", "two", 60.0)
    assert again.host == "one"
    assert 50 < again.remaining <= 60
    assert (await store.claim("a", "two", 60.0, over="three")).host == "one"
    assert (await store.claim("a", "two", 60.0, over="one")).host == "two"
    await store.claim("b", "one", 0.05)

    async def has_it():
        return (await store.claim("b", "two", 60.0)).host == "two"

    await eventually(has_it)
    known = await store.claims()
    assert {model: claim.host for model, claim in known.items()} == {"a": "two", "b": "two"}
    assert 50 < known["a"].remaining <= 60


async def test_a_look_at_the_claims_costs_what_is_claimed_and_not_what_there_is(store):
    assert await store.claims() == {}
    for number in range(200):
        await store.claim(f"m{number}", "one", 0.01)
    await store.claim("long", "one", 60.0)
    assert set(await store.claims()) <= {"long", *(f"m{number}" for number in range(200))}

    async def over():
        return set(await store.claims()) == {"long"}

    await eventually(over)
    await store.claim("more", "one", 60.0)
    assert await store._redis.zrange("{llmux}:wakes", 0, -1) == ["long", "more"]


async def test_a_claim_that_is_not_among_all_is_there_once_it_was_met(store):
    """Gateways of an llmux that did not keep them share a store with those that do, while they are updated."""
    await store._redis.set("{llmux}:wake:a", "one", px=60_000)
    assert (await store.claim("a", "two", 10.0)).host == "one"
    (claim,) = (await store.claims()).values()
    assert claim.host == "one"
    assert 50 < claim.remaining <= 60


async def test_gateways_see_what_the_others_have_where_while_these_live(store, monkeypatch):
    await store.fly("x", {"one": {"a": 2}})
    await store.fly("y", {"one": {"a": 1, "b": 1}, "two": {"a": 1}})
    assert await store.flights("x") == {"one": {"a": 1, "b": 1}, "two": {"a": 1}}
    assert await store.flights("z") == {"one": {"a": 3, "b": 1}, "two": {"a": 1}}
    monkeypatch.setattr("llmux.fleet.store.FLIGHT", 0.05)
    await store.fly("y", {"one": {"a": 9}})

    async def forgotten():
        return not await store.flights("x")

    await eventually(forgotten)


@pytest.mark.parametrize("ends", ["with an answer", "with an error"])
async def test_a_call_that_is_cancelled_ends_so_whatever_the_library_makes_of_it(monkeypatch, ends):
    """A gateway that was stopped while it connected went on for ever."""
    begun = asyncio.Event()

    class Swallows:
        async def eval(self, *_values):
            begun.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if ends == "with an error":
                    raise ConnectionError("swallowed") from None
            return []

    found = Store("redis://127.0.0.1:1/0")
    monkeypatch.setattr(found, "_redis", Swallows())
    task = asyncio.create_task(found.hosts())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_connections_that_the_server_has_closed_are_replaced_at_once(store):
    """As a server does after its `timeout`, or what stands before it."""
    await store.fly("x", {"one": {"a": 2}})
    other = Store(f"redis://{HOST}:{store.address.nodes[0][1]}/0")
    try:
        for number in range(3):
            assert await other._redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes") >= 1
            assert await store.register("gpu1", "i", number, {"url": "a"}) == "ok"
    finally:
        await other.close()


async def test_after_a_failover_the_address_counts_and_not_the_connection(server):
    """A master that becomes a replica keeps its connections; its name, or a proxy, leads to the new one."""
    master, target, links = Server(), [server.port], set()

    async def pass_on(reader, writer):
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def link(reader, writer):
        links.add(writer)
        there = await asyncio.open_connection(HOST, target[0])
        links.add(there[1])
        await asyncio.gather(pass_on(reader, there[1]), pass_on(there[0], writer))

    proxy = await asyncio.start_server(link, HOST, 0)
    store = Store(f"redis://{HOST}:{proxy.sockets[0].getsockname()[1]}/0")
    before = Store(server.url)
    try:
        assert await store.register("gpu1", "i", 1, {"url": "a"}) == "ok"
        await before._redis.execute_command("REPLICAOF", HOST, str(master.port))
        with pytest.raises(StoreError, match="it is a replica"):  # as long as the address leads there
            await store.register("gpu1", "i", 2, {"url": "a"})
        target[0] = master.port
        assert await store.register("gpu1", "i", 3, {"url": "a"}) == "ok"
        assert await store.hosts() == {"gpu1": {"url": "a"}}
    finally:
        await store.close()
        await before.close()
        for each in links:
            each.close()
        proxy.close()
        master.close()


REPLICA_6 = (
    b"-ERR Error running script (call to f_1): @user_script:9: @user_script: 9: -READONLY You can't write\r\n"
)


async def test_a_replica_of_redis_6_is_left_too():
    """It tells of it within the error of a script."""
    asked = []

    async def serve(reader, writer):
        asked.append(0)
        first = len(asked) == 1
        with contextlib.suppress(asyncio.IncompleteReadError):
            while count := int((await reader.readuntil(b"\r\n"))[1:]):
                words = []
                for _ in range(count):
                    size = int((await reader.readuntil(b"\r\n"))[1:])
                    words.append((await reader.readexactly(size + 2))[:-2])
                script = words[0] == b"EVAL"
                writer.write((REPLICA_6 if first else b"$2\r\nok\r\n") if script else b"+OK\r\n")
        writer.close()

    server = await asyncio.start_server(serve, HOST, 0)
    store = Store(f"redis://{HOST}:{server.sockets[0].getsockname()[1]}/0")
    try:
        assert await store.register("gpu1", "i", 1, {"url": "a"}) == "ok"
        assert len(asked) == 2
    finally:
        await store.close()
        server.close()


async def test_a_store_that_wants_a_password_is_said(server):
    del server
    guarded = Server("--requirepass", "secret")
    bare, right = Store(guarded.url), Store(guarded.url.replace("://", "://:secret@"))
    wrong = Store(guarded.url.replace("://", "://:nonsense@"))
    try:
        await eventually(lambda: answers(right))
        with pytest.raises(StoreError, match="wants a password: write the address as redis://:PASSWORD@host"):
            await bare.hosts()
        with pytest.raises(StoreError, match="refuses the password"):
            await wrong.hosts()
    finally:
        for each in (bare, right, wrong):
            await each.close()
        guarded.close()


async def test_a_store_whose_memory_is_full_is_said(server):
    store = Store(server.url)
    try:
        await eventually(lambda: answers(store))
        await store._redis.config_set("maxmemory", "1")  # of a byte
        with pytest.raises(StoreError, match="its memory is full: raise its `maxmemory`"):
            await store.register("one", "i", 1, {"url": "http://x"})
        assert await store.hosts() == {}
    finally:
        await store.close()


# ---- hosts and gateways, as processes


class Shared(Door):
    """A gateway that knows its hosts from the store alone."""

    def join(self, name: str, server: Server, models: str = "a b", *, called: str = "") -> Lab:
        lab = Lab(self.root / name)
        lab.write(models, fleet={"store": server.url, "name": called or name, "url": f"http://{HOST}:{lab.port}"})
        lab.start()
        self.hosts[name] = lab
        return lab

    def write_shared(self, server: Server) -> None:
        hosts, self.hosts = self.hosts, {}
        self.write_gateway(fleet={"store": server.url})
        self.hosts = hosts


@pytest.fixture
async def shared(tmp_path):
    found = Shared(tmp_path)
    yield found
    found.finish()


async def states(door):
    return {name: host["state"] for name, host in (await door.fleet())["hosts"].items()}


@one_loop
async def test_hosts_are_found_come_back_and_go(shared, server):
    shared.write_shared(server)
    shared.start(ready=False)
    one = shared.join("one", server)
    shared.join("two", server)
    await shared.until_hosts_are(one="ready", two="ready")
    served = (await shared.chat("a")).get("X-LLMux-Host")
    store = Store(server.url)
    assert (await store.claim("a", "another", 1.0)).host == served  # the gateway has said so
    await store.close()
    assert one.end() == 0

    async def gone():
        return "one" not in await states(shared)

    await shared.until(gone)
    assert (await shared.chat("a")).get("X-LLMux-Host") == "two"
    one.start()
    await shared.until_hosts_are(one="ready")


@one_loop
async def test_no_request_waits_for_the_store(shared, server):
    shared.join("one", server)
    shared.write_shared(server)
    shared.start()
    await shared.until_hosts_are(one="ready")
    assert (await shared.chat("a")).status == 200
    server.stop()
    await shared.until(lambda: '"store_lost"' in shared.log)
    for _ in range(5):
        answer = await shared.chat("b" if _ % 2 else "a")
        assert answer.status == 200
    notes = (await shared.get("/health")).json()["notes"]
    assert any("the store cannot be used, the last view holds" in note for note in notes)
    assert "llmux_fleet_store_up 0.0" in (await shared.get("/metrics")).body.decode()
    server.go_on()
    await shared.until(lambda: shared.log.count('"store_restored"') > 1)
    assert (await shared.get("/health")).json()["notes"] == []


@one_loop
async def test_a_store_that_was_emptied_forgets_no_host(shared, server):
    shared.join("one", server)
    shared.write_shared(server)
    shared.start()
    await shared.until_hosts_are(one="ready")
    server.restart()
    store = Store(server.url)

    async def whole():
        assert await states(shared) == {"one": "ready"}
        try:
            return "one" in await store.hosts()
        except StoreError:
            return False

    await eventually(whole)
    await store.close()
    assert (await shared.chat("a")).status == 200


@one_loop
async def test_a_name_that_is_taken_is_said_and_the_first_stays(shared, server):
    shared.join("one", server)
    store = Store(server.url)

    async def known():
        return "one" in await store.hosts()

    await eventually(known)
    other = shared.join("second", server, called="one")
    await other.until(lambda: "another llmux is called 'one' there" in other.log)
    assert (await store.hosts())["one"]["url"].endswith(str(shared.hosts["one"].port))
    await store.close()


@one_loop
@pytest.mark.parametrize("outage", ["stopped", "killed", "emptied", "restarted"])
async def test_requests_are_served_whatever_becomes_of_the_store(shared, server, outage):
    shared.join("one", server)
    limits = {"requests": "1M/d", "concurrent": 100}
    hosts, shared.hosts = shared.hosts, {}
    shared.write_gateway(
        fleet={"store": server.url}, api_keys=[{"name": "alice", "key": "sk-a", "limits": limits}]
    )
    shared.hosts = hosts
    shared.start()
    key = [("Authorization", "Bearer sk-a")]
    if outage == "emptied":
        store = Store(server.url)
        await store._redis.flushall()
        await store.close()
    else:
        {"stopped": server.stop, "killed": server.process.kill, "restarted": server.restart}[outage]()
    for model in "ababab":  # these wake and sleep, and their wakes are claimed
        assert (await shared.chat(model, headers=key)).status == 200
    if outage in {"stopped", "killed"}:
        await shared.until(lambda: '"store_lost"' in shared.log)
        assert (await shared.chat("a", headers=key)).status == 200
        assert (await shared.chat("b", headers=key)).status == 200
    if outage == "killed":
        server.restart()
    server.go_on()
    store = Store(server.url)

    async def whole():
        try:
            return "one" in await store.hosts() and "sk" not in str(await store._redis.keys("*"))
        except StoreError:
            return False

    await eventually(whole)
    await store.close()
    assert (await shared.chat("a", headers=key)).status == 200


@one_loop
async def test_a_gateway_that_starts_before_its_store_answers_finds_no_model_missing(shared, server):
    shared.join("one", server, "a b")
    store = Store(server.url)

    async def known():
        return "one" in await store.hosts()

    await eventually(known)
    server.stop()
    shared.write_shared(server)
    shared.start(ready=False)
    first = asyncio.create_task(shared.chat("a"))
    await shared.until(lambda: '"store_lost"' in shared.log)
    told = await shared.chat("a")
    assert (told.status, told.json()["error"]["code"]) == (503, "no_host")
    assert int(told.get("Retry-After")) > 0
    server.go_on()
    answer = await first
    assert (answer.status, answer.get("X-LLMux-Host")) == (200, "one")
    missing = await shared.chat("c")
    assert (missing.status, missing.json()["error"]["code"]) == (404, "model_not_found")
    await store.close()


@one_loop
async def test_with_an_empty_store_a_model_is_not_found_once_that_is_known(shared, server):
    shared.write_shared(server)
    shared.start(ready=False)
    answer = await shared.chat("a")
    while answer.json()["error"]["code"] == "no_host":  # a busy machine's store has not answered in time
        assert "store_lost" in shared.log
        answer = await shared.chat("a")
    assert (answer.status, answer.json()["error"]["code"]) == (404, "model_not_found")


# ---- hosts that are called wrongly


@one_loop
async def test_a_host_with_two_names_counts_once(shared, server):
    one = shared.join("one", server)
    store = Store(server.url)
    await eventually(lambda: answers(store))
    shared.write_shared(server)
    shared.start()
    await shared.until_hosts_are(one="ready")
    await store.register("copy", "other", 1, {"url": f"http://localhost:{one.port}"})
    await shared.until(lambda: "is followed as one already: give each host one name" in shared.log)
    document = (await shared.fleet())["hosts"]
    assert document["one"]["state"] == "ready"
    assert document["copy"]["state"] == "unknown"
    assert "is followed as one already" in document["copy"]["trouble"]
    assert shared.log.count('"report_refused"') == 1
    assert (await shared.chat("a")).get("X-LLMux-Host") == "one"
    await store.close()


@one_loop
async def test_a_name_of_the_configuration_is_not_taken_by_the_store(shared, server):
    shared.join("one", server)
    two = shared.join("two", server, called="one-more")
    shared.hosts = {"one-more": shared.hosts["one"]}  # as the gateway calls it
    shared.write_gateway(fleet={"store": server.url})
    shared.start()
    await shared.until(lambda: f"is in the store as well, at http://{HOST}:{two.port}" in shared.log)
    document = (await shared.fleet())["hosts"]
    assert document["one-more"]["url"].endswith(str(shared.hosts["one-more"].port))
    two.finish()


@one_loop
async def test_what_the_store_says_of_a_host_that_is_nonsense(shared, server):
    shared.join("one", server)
    store = Store(server.url)
    await eventually(lambda: answers(store))
    for name, url in (("a", "ftp://x"), ("b", "unix:relative"), ("c", "http://:1"), ("d", "")):
        await store.register(name, "i", 1, {"url": url})
    shared.write_shared(server)
    shared.start()
    await shared.until(lambda: shared.log.count("its entry in the store cannot be used") == 4)
    assert await states(shared) == {"one": "ready"}
    await store.close()


@one_loop
async def test_what_is_in_the_store_under_llmux_s_names_and_is_nonsense(shared, server):
    shared.join("one", server)
    store = Store(server.url)
    await eventually(lambda: answers(store))
    deep, far = "[" * 100_000, 10**15
    for name, text in (("a", "[]"), ("b", deep), ("c", "7"), ("d", "nothing"), ("e", '{"url": 1e999}')):
        entry = {"document": text, "until": far, "instance": "x"}
        await store._redis.hset(f"{{llmux}}:host:{name}", mapping=entry)
        await store._redis.zadd("{llmux}:hosts", {name: far})
    said = ("[]", deep, "7", "nothing", '{"one": 7}', '{"one": {"a": "x"}}', '{"one": {"a": 1e999}}')
    for number, text in enumerate(said):
        for kind in ("flight", "held"):
            await store._redis.set(f"{{llmux}}:{kind}:{number}", text.replace("one", "alice"))
            await store._redis.set(f"{{llmux}}:{kind}:{number}x", text)
        await store._redis.zadd("{llmux}:gateways", {str(number): far, f"{number}x": far})
    hosts, shared.hosts = shared.hosts, {}
    key = {"name": "alice", "key": "sk-a", "limits": {"requests": "1M/d", "concurrent": 100}}
    shared.write_gateway(fleet={"store": server.url}, api_keys=[key])
    shared.hosts = hosts
    shared.start()
    await shared.until(lambda: shared.log.count("its entry in the store cannot be used") == 5)
    shared.join("two", server)  # it goes on looking
    await shared.until(lambda: shared.log.count('"host_followed"') == 2)
    alice = [("Authorization", "Bearer sk-a")]
    document = (await shared.get("/llmux/fleet", headers=alice)).json()
    assert (sorted(document["hosts"]), document["store"]["trouble"]) == (["one", "two"], None)
    assert document["store"]["limits"] == {"alone": False, "gateways": 2 * len(said) + 1}
    assert (await shared.chat("a", headers=alice)).status == 200
    await store.close()


@one_loop
@pytest.mark.parametrize("how", ["KILL", "STOP"])
async def test_a_host_that_is_lost_gets_nothing_more(shared, how):
    """How soon that is, the soak measures: at once where connections are refused, 6 s after its last word else."""
    for name in ("one", "two"):
        shared.add(name)
    shared.write_gateway()
    shared.start()
    await shared.until_hosts(one="ready", two="ready")
    assert (await shared.chat("a")).status == 200
    host = (await shared.chat("a")).get("X-LLMux-Host")
    lost, placed = shared.hosts[host], f'llmux_fleet_placed_total{{host="{host}"}}'
    if how == "KILL":
        lost.kill()
    else:
        lost.signal(signal.SIGSTOP)

    async def known():
        return (await states(shared))[host] in ("unreachable", "stale")

    await shared.until(known)
    before = (await shared.metrics())[placed]
    for _ in range(5):
        answer = await shared.chat("a")
        assert answer.status == 200
        assert answer.get("X-LLMux-Host") != host
    assert (await shared.metrics())[placed] == before
    if how == "STOP":
        lost.signal(signal.SIGCONT)
    else:
        lost.start()
    await shared.until_hosts(one="ready", two="ready")
