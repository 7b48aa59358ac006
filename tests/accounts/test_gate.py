"""What keys may: models, limits, budgets; as clients see it."""

import asyncio
import contextlib
import json
import sqlite3
import time

import anthropic
import openai
import pytest

from llmux.accounts.gate import UNKNOWN, grants_of
from llmux.config import Config
from llmux.core.phases import Phase
from llmux.middleware.fast_path import MOST
from tests.harness.sdks import anthropic_client, openai_client
from tests.server.house import until

CHAT = "/v1/chat/completions"
USAGE = b'{"usage":{"prompt_tokens":12,"completion_tokens":3}}'
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(USAGE), USAGE)
MODELS = {"small-1": {"aliases": ["gpt-mini"]}, "small-2": {}, "big": {}}


def keys(**alice):
    return [{"name": "alice", "key": "key-of-alice", **alice}, {"name": "bob", "key": "key-of-bob"}]


async def send(house, model="small-1", key="alice", *, path=CHAT, **body):
    return await house.ask("POST", path, {"model": model, **body}, Authorization=f"Bearer key-of-{key}")


async def listed(house, key):
    reply = await house.ask("GET", "/v1/models", Authorization=f"Bearer key-of-{key}")
    return [entry["id"] for entry in reply.json()["data"]]


async def test_a_key_may_use_the_models_of_its_role(house):
    await house.open(models=MODELS, roles={"free": {"models": ["small-*"]}}, api_keys=keys(role="free"))
    assert (await send(house, "small-2")).status == 200
    assert (await send(house, "gpt-mini")).status == 200  # an alias of one of them
    refused = await send(house, "big")
    assert (refused.status, refused.error["code"], refused.error["param"]) == (403, "model_not_allowed", "model")
    assert (await send(house, "big", "bob")).status == 200
    assert await listed(house, "alice") == ["small-1", "small-2"]
    assert "big" in await listed(house, "bob")
    one = await house.ask("GET", "/v1/models/big", Authorization="Bearer key-of-alice")
    assert one.status == 404
    assert "big" not in one.error["message"].replace("'big'", "")
    unknown = await send(house, "biggest")
    assert unknown.status == 404
    assert "big," not in unknown.error["message"]
    assert "small-2" in unknown.error["message"]


async def test_a_key_may_be_allowed_no_model(house):
    await house.open(models=MODELS, api_keys=keys(models=[]))
    assert (await send(house, "big")).error["code"] == "model_not_allowed"
    assert (await send(house, "big", "bob")).status == 200
    assert await listed(house, "alice") == []


async def test_a_key_is_not_told_where_a_rule_leads(house):
    routes = [{"when": {"model": "gpt-*"}, "to": "big"}]
    await house.open(models=MODELS, routes=routes, api_keys=keys(models=["small-1"]))
    refused = await send(house, "gpt-4")
    assert refused.error["message"] == "The key 'alice' may not use the model 'gpt-4'."
    assert refused.error["code"] == "model_not_allowed"
    assert (await send(house, "gpt-4", "bob")).status == 200


async def test_its_own_settings_go_before_its_roles(house):
    roles = {"free": {"models": ["small-*"], "limits": {"requests": "1/d", "concurrent": 9}}}
    own = {"role": "free", "models": ["big"], "limits": {"requests": "2/d"}}
    await house.open(models=MODELS, roles=roles, api_keys=keys(**own))
    assert (await send(house, "small-1")).status == 403
    assert [(await send(house, "big")).status for _ in range(3)] == [200, 200, 429]


@pytest.mark.parametrize("padding", [0, MOST])
async def test_requests_are_limited(house, padding):
    await house.open(models=MODELS, api_keys=keys(limits={"requests": ["2/m", "100/d"]}))
    first, second, third = [await send(house, padding="x" * padding) for _ in range(3)]
    assert (first.status, second.status, third.status) == (200, 200, 429)
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-reset-requests"].endswith("s")
    assert second.headers["x-ratelimit-remaining-requests"] == "0"
    assert third.error["code"] == "rate_limit_exceeded"
    assert 1 <= int(third.headers["retry-after"]) <= 30
    assert third.headers["x-ratelimit-remaining-requests"] == "0"
    assert (await send(house, key="bob")).status == 200


async def test_tokens_are_limited_by_what_answers_had(house):
    await house.open(models=MODELS, api_keys=keys(limits={"tokens": "1200/d"}))
    house.engine.says = WHOLE
    replies = [await send(house) for _ in range(4)]
    assert [reply.status for reply in replies] == [200, 200, 200, 200]  # 15 each, not what was thought at first
    left = [int(reply.headers["x-ratelimit-remaining-tokens"]) for reply in replies]
    assert left[0] < 800
    assert left[1:] == sorted(left[1:], reverse=True)
    assert left[3] > 1100


@pytest.mark.parametrize("padding", [0, MOST])
async def test_an_answer_that_is_counted_is_not_asked_for_in_a_compressed_form(house, padding):
    roles = {"free": {"limits": {"tokens": "99000000/d"}}}
    await house.open(models=MODELS, roles=roles, api_keys=keys(role="free"))
    for key in ("alice", "bob", "alice"):
        asked = {"Authorization": f"Bearer key-of-{key}", "Accept-Encoding": "gzip, br", "Accept": "*/*"}
        reply = await house.ask("POST", CHAT, {"model": "small-1", "padding": "x" * padding}, **asked)
        assert reply.status == 200
    codings = [b"\r\nAccept-Encoding: gzip, br\r\n" in head for head in house.engine.heads]
    assert codings == [False, True, False]
    assert all(b"\r\nAccept: */*\r\n" in head for head in house.engine.heads)


async def test_so_many_at_once(house):
    await house.open(models=MODELS, api_keys=keys(limits={"concurrent": 2}))
    lines = [
        await house.begin("POST", "/v1/hold", {"model": "small-1"}, Authorization="Bearer key-of-alice")
        for _ in range(2)
    ]
    await until(lambda: house.in_flight("small-1") == 2)
    refused = await send(house)
    assert (refused.status, refused.headers["retry-after"]) == (429, "1")
    lines[0].abort()
    await until(lambda: house.in_flight("small-1") == 1)
    held = await house.begin("POST", "/v1/hold", {"model": "small-1"}, Authorization="Bearer key-of-alice")
    house.engine.go.set()
    assert (await held.reply()).status == 200
    assert (await lines[1].reply()).status == 200


PRICES = {"currency": "usd", "models": {name: {"input": 1000, "output": 1000} for name in MODELS}}
EACH = 0.015  # of a request with that usage


async def priced(house, budget, models=MODELS, **more):
    house.engine.says = WHOLE
    await house.open(
        models=models,
        ledger="ledger.db",
        prices=PRICES,
        api_keys=keys(budget=budget),
        admin_key="key-of-admin",
        **more,
    )


async def test_a_budget_is_spent_and_no_more(house):
    await priced(house, {"usd": EACH * 3, "per": "month"})
    statuses = [(await send(house)).status for _ in range(5)]
    assert statuses == [200, 200, 200, 429, 429]
    refused = await send(house)
    assert (refused.error["code"], refused.error["type"]) == ("insufficient_quota", "insufficient_quota")
    assert refused.headers["x-should-retry"] == "false"
    assert "retry-after" not in refused.headers
    assert (await send(house, key="bob")).status == 200
    reply = await house.ask("GET", "/llmux/usage?by=key&key=alice", Authorization="Bearer key-of-bob")
    assert reply.json()["usage"][0]["cost"] == pytest.approx(EACH * 3)


async def test_what_was_spent_is_known_after_a_restart(house):
    await priced(house, {"usd": EACH * 3, "per": "day"})
    assert [(await send(house)).status for _ in range(2)] == [200, 200]
    await house.close()
    await priced(house, {"usd": EACH * 3, "per": "day"})
    assert house.front.gate.budgets()["alice"].spent == 30_000
    assert [(await send(house)).status for _ in range(3)] == [200, 429, 429]


async def test_a_clock_that_is_set_and_set_back_does_not_begin_a_budget_anew(house):
    await priced(house, {"usd": EACH * 3, "per": "month"})
    assert [(await send(house)).status for _ in range(2)] == [200, 200]
    gate = house.front.gate
    for wrong in (40 * 86_400, -40 * 86_400):
        gate._wall = lambda wrong=wrong: time.time() + wrong
        gate.budgets()
    assert (await send(house)).status == 200
    await house.ask("GET", "/llmux/usage", Authorization="Bearer key-of-bob")  # it is written
    gate._wall = time.time
    assert (await send(house)).status == 429
    assert gate.budgets()["alice"].spent == 45_000


async def test_what_was_spent_while_the_clock_was_ahead_is_of_that_day_alone(house, monkeypatch):
    await priced(house, {"usd": EACH * 3, "per": "day"})
    gate, now = house.front.gate, time.time()
    for days in (400, 0, 1):
        monkeypatch.setattr(time, "time", lambda days=days: now + 86_400 * days)
        gate._wall = time.time
        assert [(await send(house)).status for _ in range(4)] == [200, 200, 200, 429], days
        await house.ask("GET", "/llmux/usage", Authorization="Bearer key-of-bob")  # it is written


async def test_what_has_no_end_is_settled_too(house):
    await house.open(
        models=MODELS, ledger="ledger.db", prices={"gpu_hour": 1}, api_keys=keys(budget={"usd": 5, "per": "day"})
    )
    line = await house.begin("POST", "/v1/hold", {"model": "small-1"}, Authorization="Bearer key-of-alice")
    await until(lambda: house.in_flight("small-1"))
    budget = house.front.gate.budgets()["alice"]
    assert budget.reserved > 0
    await asyncio.sleep(0.05)
    line.abort()
    await until(lambda: not budget.reserved)
    assert budget.spent > 0


async def test_nearly_spent_only_what_is_awake(house):
    await priced(house, {"usd": EACH * 5, "per": "day", "soft": 0.5, "then": "awake_only"})
    assert [(await send(house)).status for _ in range(3)] == [200, 200, 200]
    refused = await send(house, "small-2")
    assert (refused.status, refused.error["code"]) == (429, "insufficient_quota")
    assert "awake" in refused.error["message"]
    assert house.switcher.core.state.models["small-2"].phase is Phase.ASLEEP
    replies = [await send(house) for _ in range(3)]
    assert [reply.status for reply in replies] == [200, 200, 429], [reply.body for reply in replies]


async def test_nearly_spent_other_names_lead_to_what_is_awake(house):
    """The answer is the same whichever way the request takes."""
    models = {**MODELS, "small-1": {"variants": {"v1": {}}}, "small-2": {"variants": {"v2": {}}}}
    virtual = {
        "first": {"first": ["small-2", "v1"]}, "split": {"split": {"small-2": 1e9, "v1": 1, "small-1": 1}},
        "kept": {"split": {"small-2": 1e9, "small-1": 1}, "sticky": "key"},
        "rungs": {"ladder": ["small-2", "v1"], "floor": {"*": "small-2"}}, "other": {"awake": ["small-2", "v2"]},
    }  # fmt: skip
    budget = {"usd": EACH * 40, "per": "day", "soft": 0.01, "then": "awake_only"}
    await priced(house, budget, models=models, virtual=virtual)
    assert (await send(house)).status == 200
    for opened in (True, False):
        house.front.fast_path.open = opened
        for name in ("v1", "first", "split", "kept"):
            reply = await send(house, name)
            assert (reply.status, reply.headers["x-llmux-served-by"]) == (200, "small-1")
        for name in ("v2", "rungs", "other"):
            reply = await send(house, name)
            assert (reply.status, reply.error["code"]) == (429, "insufficient_quota")
            assert [value for key, value in reply.fields if key == "x-should-retry"] == ["false"]
            assert "awake" in reply.error["message"]
    assert house.switcher.core.state.models["small-2"].phase is Phase.ASLEEP
    budget = house.front.gate.budgets()["alice"]
    assert (budget.reserved, budget.spent) == (0, round(EACH * 9 * 1e6))


@pytest.mark.parametrize("opened", [True, False])
async def test_nearly_spent_it_is_what_a_rule_leads_to_that_has_to_be_awake(house, opened):
    models = {**MODELS, "small-2": {"variants": {"v2": {}}}}
    virtual = {"warm": {"awake": ["big", "small-1"]}}
    routes = [
        {"when": {"path": "/v1/completions"}, "to": "v2"},
        {"when": {"model": "big"}, "to": "warm"},
        {"when": {"model": "small-2"}, "to": "small-1"},
    ]
    budget = {"usd": EACH * 40, "per": "day", "soft": 0.01, "then": "awake_only"}
    await priced(house, budget, models=models, virtual=virtual, routes=routes)
    assert (await send(house)).status == 200
    house.front.fast_path.open = opened
    refused = await send(house, path="/v1/completions")
    assert (refused.status, refused.error["code"]) == (429, "insufficient_quota")
    for name in ("big", "small-2"):
        reply = await send(house, name)
        assert (reply.status, reply.headers["x-llmux-served-by"]) == (200, "small-1")
    phases = [model.phase for model in house.switcher.core.state.models.values()]
    assert phases == [Phase.AWAKE, Phase.ASLEEP, Phase.ASLEEP]


async def test_the_gpus_time_is_spent(house):
    """Of a model of which nothing is known a request is thought to take some seconds."""
    prices = {"gpu_hour": 3600}  # one a second
    await house.open(
        models=MODELS, ledger="ledger.db", prices=prices, api_keys=keys(budget={"usd": 0.5, "per": "day"})
    )
    line = await house.begin("POST", "/v1/hold", {"model": "small-1"}, Authorization="Bearer key-of-alice")
    await until(lambda: house.in_flight("small-1"))
    assert house.front.gate.budgets()["alice"].reserved == UNKNOWN * 1e6
    later = await send(house)
    assert (later.status, later.error["code"]) == (429, "rate_limit_exceeded")  # reserved, not spent
    await asyncio.sleep(0.6)
    house.engine.go.set()
    assert (await line.reply()).status == 200
    assert house.front.gate.budgets()["alice"].spent >= 500_000
    spent = await send(house)
    assert (spent.status, spent.error["code"]) == (429, "insufficient_quota")


async def test_a_reload_keeps_what_was_used(house):
    await house.open(models=MODELS, api_keys=keys(limits={"requests": "2/d"}))
    assert (await send(house)).status == 200
    config = house.config(MODELS, api_keys=keys(limits={"requests": "2/d", "concurrent": 5}))
    house.front.configure(config)
    assert [(await send(house)).status for _ in range(2)] == [200, 429]
    house.front.configure(house.config(MODELS, api_keys=keys(limits={"requests": "5/d"})))
    assert (await send(house)).status == 200
    house.front.configure(house.config(MODELS, api_keys=keys()))
    assert [(await send(house)).status for _ in range(6)] == [200] * 6


TWO_AT_ONCE = {"limits": {"concurrent": 2}, "budget": {"usd": 10, "per": "day"}}


@pytest.mark.parametrize("before", [TWO_AT_ONCE, {"limits": {"concurrent": 2}}])
@pytest.mark.parametrize("between", [{}, {"limits": {"concurrent": 1}}])
async def test_what_is_under_way_counts_though_reloads_take_a_keys_limits_and_bring_them_back(
    house, before, between
):
    await house.open(models=MODELS, ledger="ledger.db", prices=PRICES, api_keys=keys(**before))
    alice = {"Authorization": "Bearer key-of-alice"}
    lines = [await house.begin("POST", "/v1/hold", {"model": "small-1"}, **alice) for _ in range(2)]
    await until(lambda: house.in_flight("small-1") == 2)
    for given in (between, TWO_AT_ONCE):
        house.front.configure(house.config(MODELS, ledger="ledger.db", prices=PRICES, api_keys=keys(**given)))
    assert (await send(house)).status == 429
    house.engine.go.set()
    assert [(await line.reply()).status for line in lines] == [200, 200]
    assert house.front.gate.budgets()["alice"].reserved == 0
    house.engine.go.clear()
    lines = [await house.begin("POST", "/v1/hold", {"model": "small-1"}, **alice) for _ in range(2)]
    await until(lambda: house.in_flight("small-1") == 2)
    assert (await send(house)).status == 429
    lines[0].abort()
    await until(lambda: house.in_flight("small-1") == 1)
    house.front.configure(house.config(MODELS, ledger="ledger.db", prices=PRICES, api_keys=keys()))
    house.engine.go.set()
    assert (await lines[1].reply()).status == 200  # and nothing is left of it
    house.front.configure(house.config(MODELS, ledger="ledger.db", prices=PRICES, api_keys=keys(**TWO_AT_ONCE)))
    assert (await send(house)).status == 200
    assert house.front.gate.budgets()["alice"].reserved == 0


async def test_a_first_budget_may_come_with_a_reload(house):
    """What was spent before it counts."""
    house.engine.says = WHOLE
    await house.open(models=MODELS, ledger="ledger.db", prices=PRICES, api_keys=keys())
    assert [(await send(house)).status for _ in range(2)] == [200, 200]
    await house.ask("GET", "/llmux/usage", Authorization="Bearer key-of-bob")  # they are written
    budget = {"usd": EACH * 3, "per": "day"}
    config = house.config(MODELS, ledger="ledger.db", prices=PRICES, api_keys=keys(budget=budget))
    house.switcher.replace(config)
    house.front.configure(config)
    assert house.front.gate.budgets()["alice"].spent == 30_000
    assert [(await send(house)).status for _ in range(2)] == [200, 429]
    await house.ask("GET", "/llmux/usage", Authorization="Bearer key-of-bob")
    budget = {"usd": EACH * 4, "per": "month"}  # what was spent on this day is of this month
    house.front.configure(house.config(MODELS, ledger="ledger.db", prices=PRICES, api_keys=keys(budget=budget)))
    assert [(await send(house)).status for _ in range(2)] == [200, 429]


async def test_the_sdks_understand(house):
    await priced(house, {"usd": EACH, "per": "day"})
    await send(house)
    url = f"http://127.0.0.1:{house.port}"
    body = {"model": "small-1", "messages": [{"role": "user", "content": "hi"}]}
    async with openai_client(url, api_key="key-of-alice", max_retries=2) as client:
        with pytest.raises(openai.RateLimitError) as refused:
            await client.chat.completions.create(**body)
    assert refused.value.code == "insufficient_quota"
    async with anthropic_client(url, api_key="key-of-alice", max_retries=2) as client:
        with pytest.raises(anthropic.RateLimitError):
            await client.messages.create(**body, max_tokens=3)
    await house.close()
    with contextlib.closing(sqlite3.connect(house.folder / "ledger.db")) as connection, connection:
        rows = connection.execute(
            "SELECT status, reason, count(*) FROM requests WHERE kind = 0 GROUP BY 1, 2"
        ).fetchall()
    assert rows == [(200, "", 1), (429, "insufficient_quota", 2)]  # neither SDK tried again


async def test_a_virtual_model_may_be_allowed(house):
    await house.open(
        models=MODELS, virtual={"warm": {"awake": ["small-1", "big"]}}, api_keys=keys(models=["warm"])
    )
    assert (await send(house, "warm")).status == 200
    assert (await send(house, "small-1")).status == 403
    assert await listed(house, "alice") == ["warm"]
    assert json.dumps(await listed(house, "bob")).count("small") == 2


async def test_what_a_refused_request_asked_for_is_seen(house):
    """By the name that was asked, and the model that would have served it where that is settled."""
    role = {"models": ["small-1", "warm"], "limits": {"requests": "1/d"}}
    await house.open(
        models=MODELS,
        ledger="ledger.db",
        virtual={"warm": {"awake": ["small-1", "big"]}},
        api_keys=keys(**role),
        admin_key="key-of-admin",
    )
    assert (await send(house)).status == 200
    asked = [("big", 403), ("gpt-mini", 429), ("warm", 429), ("no-such-model", 404)]
    for name, status in asked:
        assert (await send(house, name)).status == status
    expected = [(None, None, 404), ("warm", None, 429), ("gpt-mini", "small-1", 429), ("big", "big", 403)]
    seen = (await house.ask("GET", "/llmux/activity", Authorization="Bearer key-of-admin")).json()["requests"]
    assert [(one["asked"], one["model"], one["status"]) for one in seen][:4] == expected
    await house.close()
    with contextlib.closing(sqlite3.connect(house.folder / "ledger.db")) as connection, connection:
        found = connection.execute(
            "SELECT asked, served, status, target FROM requests ORDER BY id DESC"
        ).fetchall()
    assert found[:4] == [(asked or "", model or "", status, "") for asked, model, status in expected]


def test_keys_of_a_role_share_what_they_may_use():
    models = {
        f"m{number}": {"port": 9, "wake": ":", "sleep": ":", "alive": ":", "shared_address": True}
        for number in range(3)
    }
    keys = [{"name": name, "key": f"sk-{name}-0123456789", "role": "some"} for name in ("alice", "bob")]
    config = Config.model_validate(
        {"models": models, "roles": {"some": {"models": ["m1", "m2"]}}, "api_keys": keys}
    )
    grants = grants_of(config)
    assert grants["alice"].models is grants["bob"].models
    assert grants["bob"].models == {"m1", "m2"}
