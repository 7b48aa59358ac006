"""``policy.fair``: whose turn it is goes by what each key has had."""

import json

import pytest

from llmux.core.phases import Phase
from llmux.errors import ConfigError
from tests.cli.invoking import said
from tests.server.house import until

CHAT = "/v1/chat/completions"
KEYS = [
    {"name": "flood", "key": "key-of-flood"},
    {"name": "alice", "key": "key-of-alice", "weight": 3},
]
FAIR = {"fair": {"switch_second": 10}}


async def begin(house, model, key, path=CHAT):
    return await house.begin("POST", path, {"model": model}, Authorization=f"Bearer key-of-{key}")


async def send(house, model, key):
    return await (await begin(house, model, key)).reply()


def waiting(house, model="a"):
    return len(house.switcher.core.state.models[model].queue)


@pytest.mark.parametrize(("policy", "second"), [(FAIR, "alice"), ({}, "flood")])
async def test_a_flood_does_not_hold_up_others(house, policy, second):
    await house.open(models={"a": {"max_in_flight": 1}, "b": {}}, api_keys=KEYS, policy=policy)
    held = await begin(house, "a", "flood", "/v1/hold")
    await until(lambda: house.in_flight("a"))
    flood = []
    for count in range(1, 4):
        flood.append(await begin(house, "a", "flood"))
        await until(lambda count=count: waiting(house) == count)
    alice = await begin(house, "a", "alice")
    await until(lambda: waiting(house) == 4)
    house.engine.go.set()
    for line in (held, *flood, alice):
        assert (await line.reply()).status == 200
    ended = sorted(house.switcher.requests.rows(9), key=lambda row: row["id"])
    assert [row["key"] for row in ended][:2] == ["flood", second]


async def test_tokens_and_switches_are_counted(house):
    await house.open(api_keys=KEYS, policy={"fair": {"input": 1, "output": 10, "switch_second": 0}})
    assert (await send(house, "a", "flood")).status == 200
    order = house.switcher.order
    first = order.fairness.counters()["flood"]
    assert first > 0
    assert (await send(house, "a", "alice")).status == 200
    assert order.fairness.counters()["alice"] == pytest.approx(first + first / 3)  # lifted; its weight is 3
    assert order.present() == {}
    status = (await house.ask("GET", "/llmux/status", Authorization="Bearer key-of-alice")).json()
    assert status["policy"]["fair"] == {key: round(each, 1) for key, each in order.fairness.counters().items()}


async def test_a_reload_keeps_the_counters_and_may_end_it(house):
    switcher = await house.open(api_keys=KEYS, policy=FAIR)
    await send(house, "a", "flood")
    order, before = switcher.order, switcher.order.fairness.counters()
    switcher.replace(house.config(api_keys=KEYS, policy={"fair": {"input": 7}}))
    assert switcher.order is order
    assert order.fairness.counters() == before
    switcher.replace(house.config(api_keys=KEYS))
    assert switcher.order is None
    await send(house, "b", "flood")
    assert order.fairness.counters() == before
    switcher.replace(house.config(api_keys=KEYS, policy=FAIR))
    assert (await send(house, "a", "flood")).status == 200
    assert switcher.order is not order
    assert switcher.order.fairness.counters()["flood"] > 0


async def test_it_goes_with_shadows_and_is_explained(house):
    await house.open(
        models={"a": {"max_in_flight": 1}, "b": {}},
        api_keys=KEYS,
        policy={**FAIR, "use": "idle", "shadow": ["fifo"]},
    )
    held = await begin(house, "a", "flood", "/v1/hold")
    await until(lambda: house.in_flight("a"))
    line = await begin(house, "b", "alice")
    await until(lambda: waiting(house, "b"))
    house.switcher.order.fairness.served("flood", (10**6, 0))  # as if it had been served much meanwhile
    house.switcher.suspect("b", refused=False)  # an event, at which whose turn it is is looked at
    await until(lambda: house.switcher.core.state.models["a"].phase is Phase.DRAINING)
    text = " ".join((await said(house, "explain", "-v", LLMUX_API_KEY="key-of-alice")).replace("│", " ").split())
    assert "its key has had less than those that are served" in text
    house.engine.go.set()
    assert (await held.reply()).status == (await line.reply()).status == 200
    assert house.switcher.shadows[0].counts


@pytest.mark.parametrize(
    ("keys", "policy", "said"),
    [
        (KEYS, {"fair": {"by": "model"}}, "policy.fair.by"),
        (KEYS, {"fair": {"input": -1}}, "policy.fair.input"),
        (KEYS, {"fair": {"input": 0, "output": 0, "switch_second": 0}}, "counts nothing"),
        ([], {"fair": {}}, "policy.fair: needs `api_keys` with names"),
        (["key-of-none"], {"fair": {}}, "policy.fair: needs `api_keys` with names"),
        ([{"key": "key-of-none", "weight": 2}], {}, "its `weight` goes by that"),
        ([{"name": "a", "key": "key-of-a", "weight": 0}], {}, "weight"),
    ],
)
def test_what_cannot_be(house, keys, policy, said):
    with pytest.raises(ConfigError) as caught:
        house.config(api_keys=keys, policy=policy)
    assert said in str(caught.value)


async def test_without_it_nothing_of_it_is_there(house):
    switcher = await house.open(api_keys=KEYS)
    assert switcher.order is None
    assert (await send(house, "a", "flood")).status == 200
    assert (
        "fair"
        not in (await house.ask("GET", "/llmux/status", Authorization="Bearer key-of-alice")).json()["policy"]
    )
    assert "fair" not in json.dumps(
        (await house.ask("GET", "/llmux/decisions", Authorization="Bearer key-of-alice")).json()
    )
