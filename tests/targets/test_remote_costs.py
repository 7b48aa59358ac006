"""What a remote costs: rows of the ledger, budgets, and what a stream must tell for that."""

from __future__ import annotations

import contextlib
import json
import sqlite3

import pytest

from tests.server.house import until
from tests.targets.remote_host import STREAM_HEAD, RemoteHost, chunked, cut, error, then

OPEN = {"remotes_for_all": True}
PRICES = {"currency": "usd", "gpu_hour": 3600, "models": {"r/m": {"input": 1, "output": 2}}}
USAGE = {"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 1500}
COST = 1000 * 1 + 500 * 2  # millionths


@pytest.fixture
async def host():
    async with RemoteHost() as host:
        yield host


def rows(house):
    with contextlib.closing(sqlite3.connect(house.folder / "ledger.db")) as ledger, ledger:
        ledger.row_factory = sqlite3.Row
        return [dict(row) for row in ledger.execute("SELECT * FROM requests ORDER BY time")]


async def usage(house):
    document = (await house.ask("GET", "/llmux/usage?by=key,model")).json()
    return {(row["key"], row["model"]): (row["requests"], row["cost_micros"]) for row in document["usage"]}


def event(**more):
    document = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "x", "choices": [], **more}
    return b"data: " + json.dumps(document).encode() + b"\n\n"


TEXT = event(choices=[{"index": 0, "delta": {"content": "hi"}, "finish_reason": None}])


async def test_a_row_has_what_the_remotes_tokens_cost_and_no_time_of_the_gpu(house, host):
    await house.open("a", remotes={"r": host.settings()}, ledger="ledger.db", prices=PRICES, **OPEN)
    for model in ("r/m", "a"):
        await house.ask("POST", "/v1/chat/completions", {"model": model})
    found = await usage(house)
    assert found[None, "r/m"] == (1, COST)
    assert found[None, "a"][0] == 1
    document = (await house.ask("GET", "/llmux/usage?by=model")).json()
    [row] = [row for row in document["usage"] if row["model"] == "r/m"]
    assert (row["input_tokens"], row["output_tokens"], row["estimated"]) == (1000, 500, 0)
    assert (row["gpu_seconds"], row["switch_seconds"]) == (0, 0)


async def test_what_spills_costs_what_the_remote_takes_and_its_wait_is_told(house, host):
    model = {"wake": "until [ -e release.a ]; do sleep 0.01; done", "cost": {"wake": 60}}
    spill = {"spill": {"to": "r/m", "over": "20s", "below": 0.05}}
    await house.open(
        {"a": model | spill}, remotes={"r": host.settings()}, ledger="ledger.db", prices=PRICES, **OPEN
    )
    assert (await house.ask("POST", "/v1/chat/completions", {"model": "a"})).status == 200
    assert await usage(house) == {(None, "r/m"): (1, COST)}
    [row] = (await house.ask("GET", "/llmux/activity")).json()["requests"]
    assert (row["model"], row["status"]) == ("r/m", 200)


@pytest.mark.parametrize("exact", [False, True])
async def test_a_stream_that_does_not_tell_its_usage_is_asked_for_it(house, host, exact):
    def answer_of(asked):
        wants = asked.json().get("stream_options") == {"include_usage": True}
        return TEXT + (event(usage=USAGE) if wants else b"") + b"data: [DONE]\n\n"

    async def say(host, writer):
        writer.write(STREAM_HEAD + chunked(answer_of(host.asked[-1])) + b"0\r\n\r\n")

    host.says = [say]
    more = {"usage": "exact"} if exact else {}
    await house.open("a", remotes={"r": host.settings()}, ledger="ledger.db", prices=PRICES, **OPEN, **more)
    reply = await house.ask("POST", "/v1/chat/completions", {"model": "r/m", "stream": True})
    assert reply.body == TEXT + b"data: [DONE]\n\n"
    [row] = (await house.ask("GET", "/llmux/usage?by=model")).json()["usage"]
    assert (row["estimated"], row["cost_micros"] == COST) == (not exact, exact)


async def test_a_stream_that_breaks_off_after_that_ends_in_an_error(house, host):
    host.says = [then(STREAM_HEAD + chunked(TEXT + b"data: {"), cut)]
    await house.open("a", remotes={"r": host.settings()}, ledger="ledger.db", usage="exact", **OPEN)
    line = await house.begin("POST", "/v1/chat/completions", {"model": "r/m", "stream": True})
    assert (await line.head()).status == 200
    sent = await line.closed()
    assert TEXT in sent
    assert b"data: {\n" not in sent
    assert b"r broke off in the middle of its answer." in sent


async def test_a_budget_pays_for_remotes_and_once_it_is_soft_nothing_spills(house, host):
    keys = [{"name": "k", "key": "key", "remote": True, "budget": {"usd": 1, "soft": 0.003, "then": "awake_only"}}]
    model = {"cost": {"wake": 60}, "spill": {"to": "r/m", "over": "20s"}}
    await house.open(
        {"a": model, "b": {}}, remotes={"r": host.settings()}, ledger="ledger.db", prices=PRICES, api_keys=keys
    )

    async def asked(model):
        return await house.ask("POST", "/v1/chat/completions", {"model": model}, Authorization="Bearer key")

    assert (await asked("a")).headers["x-llmux-served-by"] == "r/m"
    budget = house.front.gate.budgets()["k"]
    await until(lambda: budget.spent == COST)
    assert (await asked("r/m")).status == 200
    await until(lambda: budget.spent == 2 * COST)
    assert budget.reserved == 0
    reply = await asked("r/m")
    assert (reply.status, reply.error["code"]) == (429, "insufficient_quota")
    assert not house.front.gate.may_spend("k", 0)
    assert len(host.asked) == 2


async def test_what_failed_there_is_a_row_without_a_cost(house, host):
    host.says = [error("500 Oops")]
    await house.open("a", remotes={"r": host.settings()}, ledger="ledger.db", prices=PRICES, **OPEN)
    await house.ask("POST", "/v1/chat/completions", {"model": "r/m"})
    assert await usage(house) == {(None, "r/m"): (1, 0)}


async def test_remote_models_are_listed_and_shown(house, host):
    await house.open("a", remotes={"r": host.settings(region="eu")}, **OPEN)
    listed = (await house.ask("GET", "/v1/models")).json()["data"]
    assert [entry["id"] for entry in listed] == ["a", "r/m"]
    shown = (await house.ask("GET", "/v1/models/r/m")).json()
    assert shown == listed[1]
    assert shown["status"] == {"value": "loaded"}
    assert (shown["llmux"]["remote"], shown["llmux"]["region"], shown["llmux"]["state"]) == ("r", "eu", "remote")
    assert (await house.ask("POST", "/llmux/models/r/m/wake")).status == 404
