"""Hundreds of requests at once against a budget for ten; and that no way goes past limits and ledger."""

import asyncio
import contextlib
import json
import sqlite3

import pytest

from llmux.accounts.gate import Gate
from llmux.simulator.recorded import read_recorded
from tests.server.house import until

CHAT, HOLD = "/v1/chat/completions", "/v1/hold"
AT_ONCE = 100
ALICE, ADMIN = ({"Authorization": f"Bearer key-of-{name}"} for name in ("alice", "admin"))
KEYS = [{"name": "alice", "key": "key-of-alice"}]
BY_TOKENS = {"models": {"a": {"input": 1000, "output": 1000}}}  # a thousandth of a dollar each
BY_TIME = {"gpu_hour": 3600}  # a dollar a second


def answer(read, made):
    usage = json.dumps({"usage": {"prompt_tokens": read, "completion_tokens": made}}).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(usage), usage)


@pytest.fixture
def settled(monkeypatch):
    """What each request that was let in had reserved, and what it took."""
    found, settle = [], Gate.settle

    def noted(gate, passed, tokens, seconds):
        found.append((passed.reserved, gate._cost(passed.model, tokens, seconds)))
        settle(gate, passed, tokens, seconds)

    monkeypatch.setattr(Gate, "settle", noted)
    return found


async def send(house, path):
    """Send a request of 35 bytes: ten tokens, as far as its size tells."""
    line = await house.begin("POST", path, b'{"model": "a", "pad": "xxxxxxxxxxx"}'[:36], **ALICE)
    reply = await line.reply()
    line.close()
    return reply


@pytest.mark.parametrize(
    ("prices", "path", "larger"),
    [(BY_TOKENS, HOLD, 1), (BY_TOKENS, CHAT, 3), (BY_TIME, HOLD, 3), (BY_TIME, CHAT, 1)],
)
async def test_a_budget_is_overrun_by_no_more_than_estimates_are_wrong(house, settled, prices, path, larger):
    """Whether they all wait, or come and go; also where answers are three times what the first one was."""
    house.engine.says = answer(10, 10)
    given = {"ledger": "ledger.db", "prices": prices}
    await house.open("a", api_keys=[KEYS[0] | {"budget": {"usd": 50, "per": "month"}}], **given)
    gate = house.front.gate
    assert (await send(house, CHAT)).status == 200  # from here on it is known what one takes
    await until(lambda: gate.budgets()["alice"].spent)
    for_ten = 11 * gate.budgets()["alice"].spent / 1e6
    config = house.config("a", api_keys=[KEYS[0] | {"budget": {"usd": for_ten, "per": "month"}}], **given)
    house.switcher.replace(config)
    house.front.configure(config)
    house.engine.says = answer(10, 10 * (2 * larger - 1))
    tasks = [asyncio.create_task(send(house, path)) for _ in range(AT_ONCE)]
    if path == HOLD:
        await until(
            lambda: sum(task.done() for task in tasks) >= AT_ONCE - len(gate._balances["alice"].grant.key) * 9
        )
        await until(lambda: sum(task.done() for task in tasks) + gate._balances["alice"].running == AT_ONCE)
        house.engine.go.set()
    statuses = [reply.status for reply in await asyncio.gather(*tasks)]
    budget = gate.budgets()["alice"]
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) == len(settled) - 1 >= 1
    assert (budget.reserved, gate._balances["alice"].running) == (0, 0)
    assert budget.spent == sum(took for _, took in settled)
    error = sum(max(0, took - reserved) for reserved, took in settled)
    assert budget.spent - for_ten * 1e6 <= error + max(reserved for reserved, _ in settled)
    if prices is BY_TOKENS:
        assert statuses.count(200) <= 10
    await house.close()
    with contextlib.closing(sqlite3.connect(house.folder / "ledger.db")) as connection, connection:
        (kept,) = connection.execute("SELECT sum(cost) FROM requests WHERE key = 'alice'").fetchone()
        (count,) = connection.execute("SELECT count(*) FROM requests WHERE key = 'alice' AND kind = 0").fetchone()
    assert abs(kept - budget.spent) <= len(settled)  # rounding
    assert count == AT_ONCE + 1


WAYS = [
    *[("POST", path) for path in (
        CHAT, "/chat/completions", "/v1/completions", "/completion", "/infill", "/v1/responses", "/v1/messages",
        "/v1/embeddings", "/embedding", "/v1/rerank", "/score", "/pooling", "/classify", "/tokenize",
        "/detokenize", "/apply-template", "/sdapi/v1/txt2img", "/v1/audio/transcriptions",
        "/v1/images/generations",
    )],
    ("GET", "/v1/anything?model=a"),
    ("PUT", "/v1/files?model=a"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), WAYS)
async def test_every_way_counts(house, method, path):
    await _counts(house, method, path, "a")


@pytest.mark.parametrize("model", ["alias", "a:v", "any"])
@pytest.mark.parametrize(("method", "path"), [WAYS[0], WAYS[-1]])
async def test_every_name_counts(house, method, path, model):
    await _counts(house, method, path.replace("model=a", f"model={model}"), model)


@pytest.mark.parametrize("path", ["/props?model=a", "/slots?model=a"])
async def test_a_path_that_wakes_nothing_counts(house, path):
    house.up("a")
    await _counts(house, "GET", path, "a")


async def _counts(house, method, path, model):
    await house.open(
        {"a": {"aliases": ["alias"], "variants": {"a:v": {"set": {"x": 1}}}}},
        virtual={"any": {"first": ["a"]}},
        passive=["/props", "/slots"],
        ledger="ledger.db",
        api_keys=[KEYS[0] | {"limits": {"requests": "1/d"}}],
    )
    body = {"model": model} if method == "POST" else None
    replies = [await house.ask(method, path, body, **ALICE) for _ in range(2)]
    assert [reply.status for reply in replies] == [200, 429], replies[0].body
    await house.close()
    with contextlib.closing(sqlite3.connect(house.folder / "ledger.db")) as connection, connection:
        rows = connection.execute("SELECT key, served, status FROM requests ORDER BY id").fetchall()
    assert [(key, status) for key, _, status in rows] == [("alice", 200), ("alice", 429)]
    assert rows[0][1] == "a"


async def test_websockets_and_operators_ways_are_in_the_ledger(house):
    """`/upstream` is an operator's: no limit holds for it, but what it used is there, by its key."""
    limited = [KEYS[0] | {"limits": {"requests": "1/d"}}]
    await house.open("a", ledger="ledger.db", api_keys=limited, admin_key="key-of-admin")
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket"}
    line = await house.begin("GET", "/v1/realtime?model=a", **upgrade, **ALICE)
    assert (await line.reply()).status == 101
    assert (await house.ask("GET", "/v1/realtime?model=a", **upgrade, **ALICE)).status == 429
    line.abort()
    await until(lambda: not house.in_flight("a"))
    house.engine.says = answer(12, 3)
    assert (await house.ask("POST", f"/upstream/a{CHAT}", b"{}", **ADMIN)).status == 200
    assert (await house.ask("POST", f"/upstream/a{CHAT}", b"{}", **ALICE)).status == 401
    await house.close()
    with contextlib.closing(sqlite3.connect(house.folder / "ledger.db")) as connection, connection:
        rows = connection.execute("SELECT key, served, input, output, status FROM requests").fetchall()
    assert sorted(rows) == [
        ("admin_key", "a", 12, 3, 200),
        ("alice", "a", 0, 0, 429),
        ("alice", "a", 0, 0, 499),
    ]


async def test_a_record_says_whose_requests_were(house):
    """For `llmux simulate --budget`."""
    house.engine.says = answer(12, 3)
    keys = [*KEYS, "key-without-a-name"]
    await house.open("a", record="record.jsonl", api_keys=keys)
    for key in ("key-of-alice", "key-without-a-name"):
        assert (await house.ask("POST", CHAT, {"model": "a"}, Authorization=f"Bearer {key}")).status == 200
    house.engine.says = None
    assert (await house.ask("POST", CHAT, {"model": "a"}, **ALICE)).status == 200
    await house.close()
    jobs = read_recorded(house.folder / "record.jsonl").trace().jobs
    assert [(job.key, job.tokens) for job in jobs[:2]] == [("alice", (12, 3)), ("", (12, 3))]
    assert jobs[2].key == "alice"
    assert "key-of" not in (house.folder / "record.jsonl").read_text()
