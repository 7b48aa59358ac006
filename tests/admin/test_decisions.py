"""``GET /llmux/decisions``, and what the status and the live events say of them."""

import json

import pytest

from tests.server.house import until

FIELDS = {
    "id", "time", "last", "times", "kind", "by", "awake", "target", "reason", "said", "until", "switch", "serving",
    "waiting", "leaving", "more",
}  # fmt: skip


async def test_decisions_are_told_by_path_status_and_events(house):
    await house.open(models={"a": {}, "b": {}})
    line = await house.line()
    line.send(b"GET /llmux/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    await until(lambda: house.switcher._driver.subscribers)
    assert (await house.chat("a")).status == 200
    assert (await house.chat("b")).status == 200
    found = (await house.ask("GET", "/llmux/decisions")).json()["decisions"]
    assert [(one["kind"], one["awake"], one["target"], one["switch"]) for one in found] == [
        ("switch", [], "a", 1),
        ("switch", ["a"], "b", 2),
    ]
    assert set(found[0]) == FIELDS
    assert found[0]["reason"].startswith("wakes a: ")
    assert found[1]["waiting"][0]["model"] == "b"
    assert found[0]["time"] <= found[1]["time"]
    status = (await house.ask("GET", "/llmux/status")).json()
    assert [one["id"] for one in status["decisions"]] == [1, 2]
    assert [one["id"] for one in (await house.ask("GET", "/llmux/decisions?limit=1")).json()["decisions"]] == [2]
    told = []
    for _ in found:
        seen = await line.reader.readuntil(b"event: decision\ndata: ")
        assert b"policy_decided" not in seen
        told.append(json.loads(await line.reader.readuntil(b"\n")))
    assert [one["id"] for one in told] == [1, 2]
    assert set(told[0]) == FIELDS


@pytest.mark.parametrize("limit", ["", "-1", "x", "1.5", "9" * 5000, "%D9%A1"])
async def test_a_limit_that_is_no_number(house, limit):
    await house.open()
    reply = await house.ask("GET", f"/llmux/decisions?limit={limit}")
    assert reply.status == 400
    assert b"limit" in reply.body
