"""What clients say about time: deadlines, which refuse at once what is hopeless, and keep-alives."""

import json

import pytest

from llmux.core.phases import Phase
from llmux.middleware.fast_path import MOST
from tests.server.house import until

CHAT = "/v1/chat/completions"
SLOW = {"cost": {"wake": "60s"}}


async def send(house, model, deadline=None, padding=0, path=CHAT):
    headers = {} if deadline is None else {"X-LLMux-Deadline": deadline}
    return await house.ask("POST", path, {"model": model, "padding": "x" * padding}, **headers)


@pytest.mark.parametrize("padding", [0, MOST])
async def test_what_cannot_be_in_time_is_refused_and_wakes_nothing(house, padding):
    await house.open(models={"a": SLOW, "b": {}})
    refused = await send(house, "a", "30s", padding)
    assert (refused.status, refused.error["code"]) == (503, "deadline")
    assert 25 <= int(refused.headers["retry-after"]) <= 35
    assert "within 30s" in refused.error["message"]
    assert house.switcher.core.state.models["a"].phase is Phase.ASLEEP
    assert (await house.ask("GET", "/llmux/decisions")).json()["decisions"] == []
    assert (await send(house, "a", "90s", padding)).status == 200


async def test_without_a_deadline_it_is_off(house):
    await house.open(models={"a": SLOW})
    assert (await send(house, "a")).status == 200


async def test_a_model_may_have_one_and_a_request_another(house):
    await house.open(models={"a": {**SLOW, "deadline": "10s"}})
    assert (await send(house, "a")).error["code"] == "deadline"
    assert (await send(house, "a", "2m")).status == 200
    assert (await send(house, "a")).status == 200  # it is awake, and answers at once


async def test_the_time_of_an_answer_counts(house):
    await house.open()
    await send(house, "a")
    house.switcher.core.state.models["a"].meter.service = 40.0
    assert (await send(house, "a", "30s")).error["code"] == "deadline"
    assert (await send(house, "a", "50s")).status == 200


async def test_those_that_wait_before_it_count(house):
    await house.open(models={"a": {"max_in_flight": 1}})
    line = await house.begin("POST", "/v1/hold", {"model": "a"})
    await until(lambda: house.in_flight("a"))
    house.switcher.core.state.models["a"].meter.service = 20.0
    assert (await send(house, "a", "30s")).error["code"] == "deadline"
    house.engine.go.set()
    assert (await line.reply()).status == 200


async def test_a_models_deadline_is_kept_on_both_ways(house, fast):
    await house.open(models={"a": {"deadline": "30s", "variants": {"v": {}}}}, virtual={"any": {"awake": ["a"]}})
    await send(house, "a", "1m")
    fast.clear()
    for service, status in ((10.0, 200), (40.0, 503)):
        house.switcher.core.state.models["a"].meter.service = service
        for name in ("a", "v", "any"):
            replies = []
            for opened in (True, False):
                house.front.fast_path.open = opened
                replies.append(await send(house, name))
            assert [reply.status for reply in replies] == [status, status]
            assert replies[0].body == replies[1].body
            house.switcher.core.state.models["a"].meter.service = service
    assert fast == [True] * 6
    assert not house.switcher.inside.tickets


@pytest.mark.parametrize("given", ["soon", "-1", "", "1 year"])
async def test_what_is_no_duration(house, given):
    await house.open()
    refused = await send(house, "a", given)
    assert (refused.status, refused.error["param"]) == (400, "X-LLMux-Deadline")


async def test_anthropics_dialect(house):
    await house.open(models={"a": SLOW})
    refused = await send(house, "a", "1s", path="/v1/messages")
    assert refused.status == 503
    assert refused.json()["type"] == "error"


def keeping(house, keep, padding=0):
    body = {"model": "a", "padding": "x" * padding}
    return house.ask("POST", "/v1/chat/completions", body, **{"X-LLMux-Keep-Alive": keep})


@pytest.mark.parametrize("padding", [0, MOST])
async def test_request_that_keeps_its_model_for_no_time_puts_it_to_sleep(house, padding):
    await house.open(models={"a": {"idle_sleep": "1h"}})
    a = house.switcher.core.state.models["a"]
    await send(house, "a")
    assert a.phase is Phase.AWAKE  # so the next one could take the fast path
    assert (await keeping(house, "0", padding)).status == 200
    await until(lambda: a.phase is Phase.ASLEEP)
    words = (await house.ask("GET", "/llmux/decisions")).json()["decisions"][-1]
    assert "keep-alive" in json.dumps(words)


async def test_how_long_is_a_duration_or_for_ever(house):
    await house.open(models={"a": {"idle_sleep": "1h"}})
    a = house.switcher.core.state.models["a"]
    for given, kept in (("10m", 600.0), ("90", 90.0), ("-1", None), ("-5m", None)):
        assert (await keeping(house, given)).status == 200
        await until(lambda: not a.in_flight)
        assert a.idle_after == kept
    assert (await send(house, "a")).status == 200
    assert a.idle_after is None  # as the last request that said something said


@pytest.mark.parametrize("given", ["soon", "--1", "", "-", "1 year", "nan"])
async def test_keep_alive_that_is_no_duration_wakes_nothing(house, given):
    await house.open()
    refused = await keeping(house, given)
    assert (refused.status, refused.error["param"]) == (400, "X-LLMux-Keep-Alive")
    assert house.switcher.core.state.models["a"].phase is Phase.ASLEEP
