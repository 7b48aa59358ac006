"""The guard rails: time limits, queue limits, placement, policies of the user's own."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
import yaml

from tests.harness.waiting import PATIENCE


async def test_min_active(lab):
    lab.write("a b", policy={"min_active": "700ms"})
    lab.start()
    await lab.chat("a")
    assert (await lab.chat("b")).status == 200
    woke = lab.hooks("wake", "a", "end")[0].t
    slept = lab.hooks("sleep", "a")[0].t
    assert slept - woke >= 0.6


async def test_max_in_flight(lab):
    lab.write({"a": {"max_in_flight": 2}})
    lab.start()
    lines = [asyncio.create_task(lab.chat("a", do={"hold": f"h{n}"})) for n in range(5)]
    await lab.until_model("a", in_flight=2, queued=3)
    await lab.until(lambda: len(lab.journal("request")) == 2)
    await asyncio.sleep(0.05)
    assert len(lab.journal("request")) == 2
    for n in range(5):
        lab.release(f"h{n}")
    assert [(await one).status for one in lines] == [200] * 5


async def test_max_queued_counts_only_waiters(lab):
    lab.write({"a": {"max_in_flight": 1, "max_queued": 0}})
    lab.start()
    assert (await lab.chat("a")).status == 429, "nobody may wait for the wake"
    assert (await lab.post("/llmux/models/a/wake")).status == 202
    await lab.until_phase("a", "AWAKE")
    first = asyncio.create_task(lab.chat("a", do={"hold": "x"}))
    await lab.until_model("a", in_flight=1)
    assert (await lab.chat("a")).status == 429
    lab.release("x")
    assert (await first).status == 200


async def test_idle_sleep_begins_at_the_last_byte(lab):
    lab.write({"a": {"idle_sleep": "400ms"}, "b": {}})
    lab.start()
    line = await lab.begin("a", do={"sse": 6, "hold_after": [5, "x"]})
    head = await line.head()
    await asyncio.sleep(0.6)  # longer than what counts as idle
    before_the_end = time.time()
    lab.release("x")
    assert (await line.body(head)).whole
    await line.close()
    await lab.until_phase("a", "ASLEEP")
    assert lab.hooks("sleep", "a")[0].t - before_the_end >= 0.38
    assert (await lab.chat("a")).status == 200
    assert lab.order() == ["wake a", "sleep a", "wake a"]


async def test_a_request_during_an_idle_sleep_waits_and_wakes(lab):
    lab.write({"a": {"idle_sleep": "200ms"}})
    lab.script("a", "sleep", lab.hold("s"))
    lab.start()
    await lab.chat("a")
    await lab.until(lambda: lab.count("sleep", "a"))
    task = asyncio.create_task(lab.chat("a"))
    await lab.until_model("a", queued=1)
    lab.release("s")
    assert (await task).status == 200


async def test_preload(lab):
    lab.write({"a": {}, "b": {"preload": True}})
    lab.start()
    await lab.until_phase("b", "AWAKE")
    assert lab.order() == ["wake b"]


async def test_the_default_model_comes_back_when_all_is_quiet(lab):
    lab.write("a b", default_model="a", default_after="400ms")
    lab.start()
    await lab.until_phase("a", "AWAKE")
    line = await lab.begin("b", do={"sse": 6, "hold_after": [5, "x"]})
    head = await line.head()
    await asyncio.sleep(0.6)  # longer than the quiet
    before_the_end = time.time()
    lab.release("x")
    assert (await line.body(head)).whole
    await line.close()
    await lab.until_phase("a", "AWAKE")
    assert lab.order() == ["wake a", "sleep a", "wake b", "sleep b", "wake a"]
    assert lab.hooks("sleep", "b")[0].t - before_the_end >= 0.38
    assert "it is the default model" in (await lab.status())["decisions"][-1]["reason"]
    # What an operator puts to sleep stays asleep.
    assert (await lab.post("/llmux/models/a/sleep")).status == 202
    await lab.until_phase("a", "ASLEEP")
    await asyncio.sleep(0.6)
    assert await lab.phase("a") == "ASLEEP"


async def test_keep_awake(lab):
    lab.check_holding = False
    small = {**sized("small", 4), "keep_awake": True}
    big, all_of_it = sized("big", 12), sized("all", 20)
    lab.write({"small": small, "big": big, "all": all_of_it}, capacity="20GiB", idle_sleep="300ms")
    lab.start()
    await lab.until_phase("small", "AWAKE")
    assert (await lab.chat("big")).status == 200
    await lab.until_phase("big", "ASLEEP")
    assert await lab.phase("small") == "AWAKE"  # idle for longer than the other
    assert (await lab.chat("all")).status == 200
    await lab.until_phase("small", "AWAKE")  # as soon as the other has gone to sleep
    made = (await lab.status())["last_eviction"]
    assert (made["left"], made["for"]) == (["small"], "all")
    assert made["reason"].startswith(
        "small makes room for all: it needs 20GiB (16GiB free); small (4GiB) cannot be"
    )
    entries = {entry["id"]: entry["llmux"] for entry in (await lab.get("/v1/models")).json()["data"]}
    assert entries["small"]["evicted"]["reason"] == made["reason"]
    assert entries["small"]["memory"] == made["models"][0]["memory"] == 4 * 2**30
    assert (entries["small"]["state"], entries["small"]["pinned"], entries["big"]["evicted"]) == (
        "awake",
        False,
        None,
    )
    assert lab.order() == [
        *("wake small", "wake big", "sleep big"),
        *("sleep small", "wake all", "sleep all", "wake small"),
    ]


def sized(key: str, size: int) -> dict:
    return {"memory": f"{size}GiB", "env": {"KEY": key, "LEASE_CAPACITY": "20", "LEASE_SIZE": str(size)}}


async def test_what_fits_together_is_awake_together(lab):
    lab.check_holding = False
    lab.write({"a": sized("a", 8), "b": sized("b", 8), "c": sized("c", 12), "d": sized("d", 20)}, capacity="20GiB")
    lab.start()
    await lab.chat("a")
    await lab.chat("b")
    assert lab.order() == ["wake a", "wake b"]
    assert (await lab.status())["awake"] == ["a", "b"]
    await lab.chat("c")
    assert lab.count("sleep") == 1, "one of the two is enough"
    assert len((await lab.status())["awake"]) == 2
    await lab.chat("d")
    assert (await lab.status())["awake"] == ["d"]
    assert lab.count("sleep") == 3


async def test_models_outside_the_switch_serve_all_along(lab):
    lab.check_holding = False
    lab.write({"a": sized("a", 8), "b": sized("b", 12), "c": sized("c", 12)}, capacity="20GiB")
    lab.script("c", "wake", lab.hold("w"))
    lab.start()
    await lab.chat("a")
    await lab.chat("b")
    task = asyncio.create_task(lab.chat("c"))
    await lab.until(lambda: lab.count("wake", "c"))
    assert lab.order() == ["wake a", "wake b", "sleep b", "wake c"]
    assert (await lab.chat("a")).status == 200
    lab.release("w")
    assert (await task).status == 200


async def test_a_model_that_can_never_fit_is_refused_at_load(lab):
    lab.write({"a": sized("a", 30)}, capacity="20GiB")
    process = lab.spawn("-c", str(lab.file))
    assert process.wait(PATIENCE) not in (0, -9)
    assert "memory" in lab.log


async def test_models_that_take_turns_on_one_address(lab):
    env = {"ENGINE": "stop"}
    lab.write(
        {
            "a": {"shared_address": True, "env": {"KEY": "a", **env}},
            "b": {"shared_address": True, "port": lab.port + 1, "env": {"KEY": "b", **env}},
        }
    )

    config = yaml.safe_load(lab.file.read_text())
    config["models"]["b"]["port"] = config["models"]["a"]["port"]
    lab.file.write_text(yaml.safe_dump(config))
    lab.start()
    for name in "aabbab":
        answer = await lab.chat(name)
        assert (answer.status, answer.json()["engine"]) == (200, name)


POLICIES = """
from llmux.core.policy import Stay, SwitchTo, WaitUntil

class Never:
    def decide(self, now):
        return Stay("never")

class Raises:
    def decide(self, now):
        raise RuntimeError("oops")

class Unknown:
    def decide(self, now):
        return SwitchTo("no-such-model")

class Awake:
    def decide(self, now):
        return SwitchTo(next(iter(now.awake), next(iter(now.models))))

class Past:
    def decide(self, now):
        return WaitUntil(now.time - 1)

class Rubbish:
    def decide(self, now):
        return 42

class Later:
    def decide(self, now):
        oldest = min(now.models[name].oldest_arrival for name in now.waiting)
        if now.time < oldest + 0.3:
            return WaitUntil(oldest + 0.3)
        return SwitchTo(now.waiting[0])

class Done:
    def decide(self, now):
        return SwitchTo(now.waiting[0])

    def on_switch_completed(self, switch):
        raise RuntimeError("after all")
"""


@pytest.mark.parametrize("name", ["Never", "Raises", "Unknown", "Awake", "Past", "Rubbish", "Later", "Done"])
async def test_no_policy_can_starve_anyone(lab, name):
    (lab.root / "mine.py").write_text(POLICIES)
    lab.write("a b", policy={"use": f"./mine.py:{name}"})
    lab.start()
    for model in "abab":
        assert (await lab.chat(model)).status == 200, name


async def test_max_wait_is_enforced_over_the_policy(lab):
    """The policy stays while a is busy, which is its right; max_wait ends that."""
    (lab.root / "mine.py").write_text(POLICIES)
    lab.write("a b", policy={"use": "./mine.py:Never", "max_wait": "400ms", "min_active": "1h"})
    lab.start()
    await lab.chat("a")
    stop = asyncio.Event()

    async def busy():
        while not stop.is_set():
            answer = await lab.chat("a", do={"delay": 0.05})
            assert answer.status == 200

    tasks = [asyncio.create_task(busy()) for _ in range(3)]
    before = time.monotonic()
    answer = await lab.chat("b")
    took = time.monotonic() - before
    stop.set()
    await asyncio.gather(*tasks)
    assert answer.status == 200
    assert took > 0.35


async def test_both_are_served_under_steady_load(lab):
    lab.write("a b")
    lab.start()
    served = {"a": 0, "b": 0}

    async def client(name: str):
        while min(served.values()) < 20:
            assert (await lab.chat(name, do={"delay": 0.01})).status == 200
            served[name] += 1

    await asyncio.gather(*(client(n) for n in "aaabbb"))
    status = await lab.status()
    assert all(m["in_flight"] == 0 and m["queued"] == 0 for m in status["models"].values())


async def test_a_storm_of_clients_that_come_and_go(lab):
    """Random disconnects over three models: the books balance afterwards."""

    lab.write("a b c", policy={"drain_timeout": "300ms"})
    lab.start()
    chance = random.Random(7)

    async def one(n: int):
        name = "abc"[n % 3]
        line = await lab.begin(name, do=chance.choice([{"sse": 30, "interval": 0.01}, {"delay": 0.02}, {}]))
        await asyncio.sleep(chance.random() * 0.6)
        await (line.reset() if n % 2 else line.close())

    async def stay(name: str):
        return (await lab.chat(name)).status

    leaving = [asyncio.create_task(one(n)) for n in range(60)]
    staying = [asyncio.create_task(stay("abc"[n % 3])) for n in range(12)]
    await asyncio.gather(*leaving)
    assert set(await asyncio.gather(*staying)) <= {200, 503}

    async def idle():
        status = await lab.status()
        return all(m["in_flight"] == 0 and m["queued"] == 0 for m in status["models"].values())

    await lab.until(idle)
    assert (await lab.chat("b")).status == 200


async def test_more_connections_than_may_be_are_told(lab):
    lab.write("a", max_connections=3)
    lab.start()
    held = []

    async def served() -> bool:
        """Open one more, unless what was closed before has not been taken note of yet."""
        wire = await lab.wire()
        await wire.send(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        if (await wire.body(await wire.head())).status == 503:
            await wire.close()
            return False
        held.append(wire)
        return True

    for _ in range(3):
        await lab.until(served)
    async with await lab.wire() as surplus:
        await surplus.send(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = await surplus.body(await surplus.head())
        assert answer.status == 503
        assert answer.get("Retry-After") == "1"
        assert answer.get("X-LLMux-Queue-Seconds") == "0.000"
        assert b"too_many_connections" in answer.body
    await held.pop().close()
    await lab.until(served)


async def test_the_next_model_of_an_agent_is_woken_before_it_is_asked(lab):
    lab.write("a b", policy={"anticipate": True})
    lab.start()
    for model in "ababababa":
        await lab.chat(model)
        await asyncio.sleep(0.05)  # it thinks
    await lab.until_phase("b", "AWAKE")  # and nobody has asked for it
    assert "likely to be asked next" in lab.log
