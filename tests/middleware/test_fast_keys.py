"""Keys on the short way: with limits, of gateways, two in one request; the same as the long way."""

from __future__ import annotations

import asyncio
import re

import pytest

from tests.harness.waiting import PATIENCE
from tests.server.house import House, message, until

CHAT = "/v1/chat/completions"
USAGE = b'{"usage":{"prompt_tokens":12,"completion_tokens":3}}'
TIMELY = {
    "content-length", "date", "retry-after", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-requests",
    "x-ratelimit-reset-tokens",
}  # fmt: skip
KEYS = [
    {"name": "alice", "key": "key-of-alice", "limits": {"requests": "9/d", "tokens": "30000/d", "concurrent": 2}},
    {"name": "bob", "key": "key-of-bob", "limits": {"requests": "9/d", "tokens": "30000/d", "concurrent": 2}},
    {"name": "free", "key": "key-of-free"},
    {"name": "gateway", "key": "key-of-gateway", "gateway": True},
]


@pytest.fixture
async def house(tmp_path):
    async with asyncio.timeout(PATIENCE), House(tmp_path) as found:
        found.engine.says = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(USAGE), USAGE)
        found.up("a")
        await found.open("a b", api_keys=KEYS, ledger="ledger.db")
        await found.raw(request("key-of-free"))  # leaves a connection to the engine behind
        yield found


def request(key: str, path: str = CHAT, **headers: str) -> bytes:
    return message("POST", path, {"model": "a"}, X_Request_ID="mine", Authorization=f"Bearer {key}", **headers)


def timeless(reply) -> tuple:
    """What differs is when a limit is whole again, with the length of that, and what is left of the tokens."""
    fields = [(name, "" if name in TIMELY else value) for name, value in reply.fields]
    return reply.status, fields, re.sub(rb"[\d.hm]+s|alice|bob", b"", reply.body)


def last(house) -> tuple:
    (row,) = house.switcher.requests.rows(1)
    return row["key"], row["model"], row["status"], row["input_tokens"], row["output_tokens"]


async def test_limits_are_told_and_counted_alike_both_ways(house, fast):
    short = [await house.raw(request("key-of-alice")) for _ in range(10)]
    ways = list(fast)
    house.front.fast_path.open = False
    long = [await house.raw(request("key-of-bob")) for _ in range(10)]
    assert ways == [True] * 10
    assert fast == ways
    assert [reply.status for reply in short] == [200] * 9 + [429]
    assert [timeless(reply) for reply in short] == [timeless(reply) for reply in long]
    assert short[8].headers["x-ratelimit-remaining-requests"] == "0"
    assert short[9].error["code"] == "rate_limit_exceeded"
    assert len(house.engine.bodies) == 1 + 18


async def test_what_the_engine_says_of_limits_is_replaced_both_ways(house):
    theirs = b"HTTP/1.1 200 OK\r\nX-RateLimit-Limit-Requests: 7\r\nContent-Length: 2\r\n\r\nok"
    house.engine.says = theirs
    told = []
    for opened, key in ((True, "key-of-alice"), (False, "key-of-bob"), (True, "key-of-free")):
        house.front.fast_path.open = opened
        told.append(await house.raw(request(key)))
    assert timeless(told[0]) == timeless(told[1])
    limits = [
        [value for name, value in one.fields if name.lower() == "x-ratelimit-limit-requests"] for one in told
    ]
    assert limits == [["9"], ["9"], ["7"]]


async def test_one_that_is_handed_over_passes_its_limits_once(house, fast):
    """Its engine's idle connection has died; a model's engine is gone."""
    await house.raw(request("key-of-alice"))
    for task in list(house.engine._tasks):
        task.cancel()
    again = await house.raw(request("key-of-alice"))
    assert again.status == 200
    assert again.headers["x-ratelimit-remaining-requests"] == "7"
    assert fast == [True, True]
    balance = house.front.gate._balances["alice"]
    assert balance.running == 0
    used = balance.tokens[0].left(house.switcher.now())
    assert 28 <= used.limit - used.remaining <= 31  # 15 tokens each, and the limit grows back


async def test_so_many_at_once_and_each_that_leaves_makes_room(house, fast):
    lines = [await house.line() for _ in range(3)]
    for line in lines[:2]:
        line.send(request("key-of-alice", "/v1/hold"))
    await until(lambda: house.in_flight("a") == 2)
    lines[2].send(request("key-of-alice", "/v1/hold"))
    refused = await lines[2].reply()
    assert (refused.status, refused.headers["retry-after"]) == (429, "1")
    lines[0].abort()
    await until(lambda: house.in_flight("a") == 1)
    lines[2].send(request("key-of-alice", "/v1/hold"))
    await until(lambda: house.in_flight("a") == 2)
    house.engine.go.set()
    assert [(await line.reply()).status for line in lines[1:]] == [200, 200]
    assert fast == [True] * 4


async def test_a_gateways_requests_are_their_clients_both_ways(house, fast):
    told = []
    for opened in (True, True, False):
        house.front.fast_path.open = opened
        for name in ("alice", "", "x" * 300):
            headers = {"X_LLMux_Key": name} if name else {}
            data = request("key-of-gateway", X_LLMux_Progress="1xx", **headers)
            reply = await house.raw(data)
            left = reply.headers.get("x-ratelimit-remaining-requests")
            told.append((last(house), left, house.engine.heads[-1]))
            assert b"llmux" not in told[-1][2].lower()
    assert fast == [True] * 6
    assert told[0][0] == ("alice", "a", 200, 12, 3)
    assert told[1][0][0] == told[2][0][0] == "gateway"
    assert [(row, head) for row, _, head in told[:3]] == [(row, head) for row, _, head in told[3:6]]
    assert [(row, head) for row, _, head in told[:3]] == [(row, head) for row, _, head in told[6:]]
    assert [left for _, left, _ in told] == ["8", None, None, "7", None, None, "6", None, None]


@pytest.mark.parametrize("first", [True, False])
async def test_of_two_keys_the_first_kind_counts_in_whatever_order(house, fast, first):
    keys = [("Authorization", "Bearer key-of-bob"), ("X_API_Key", "key-of-free")]
    holders = []
    for opened in (True, False):
        house.front.fast_path.open = opened
        await house.raw(message("POST", CHAT, {"model": "a"}, **dict(keys if first else keys[::-1])))
        holders.append(last(house)[0])
    assert fast == [True]
    assert holders == ["bob", "bob"]
