"""Virtual models, asked for by clients: which model serves, what it is told, and what the answer says."""

import asyncio
import json

import pytest

from llmux.core.phases import Phase
from tests.server.house import held, until

WARM = {"warm": {"awake": ["a", "b"]}}
FAILS = {"wake": "false"}


async def asked(house, name, **more):
    reply = await house.ask("POST", "/v1/chat/completions", {"model": name, **more})
    return reply, reply.headers.get("x-llmux-served-by")


def switches(house):
    return [fields["to"] for fields in house.log.named("switch_started")]


def messages(*texts):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]}


async def test_what_is_awake_serves_and_is_called_by_its_own_name(house):
    await house.open("a b", virtual=WARM)
    assert (await house.chat("b")).status == 200
    reply, by = await asked(house, "warm", temperature=1.0)
    assert (reply.status, by) == (200, "b")
    assert json.loads(house.engine.bodies[-1]) == {"model": "b", "temperature": 1.0}
    assert reply.marked
    assert switches(house) == ["b"]


async def test_where_none_is_awake_the_first_is_woken(house):
    await house.open("a b", virtual=WARM)
    assert (await asked(house, "warm"))[1] == "a"
    assert switches(house) == ["a"]


async def test_one_that_is_being_woken_will_do(house):
    await house.open({"a": {}, "b": {"wake": f"{held('b')}; touch $LLMUX_MODEL.up"}}, virtual=WARM)
    first = await house.begin("POST", "/v1/x", {"model": "b"})
    await until(lambda: switches(house) == ["b"])
    second = await house.begin("POST", "/v1/x", {"model": "warm"})
    await until(lambda: house.queued("b") == 2)
    house.release("b")
    replies = [await first.reply(), await second.reply()]
    assert [reply.status for reply in replies] == [200, 200]
    assert replies[1].headers["x-llmux-served-by"] == "b"


async def test_after_a_start_the_choice_waits_until_it_is_known_what_runs(house):
    house.up("b")
    models = {"a": {}, "b": {"alive": f"{held('look')}; test -e $LLMUX_MODEL.up"}}
    opening = asyncio.create_task(house.open(models, virtual=WARM))
    await until(lambda: house.port)
    asking = asyncio.create_task(asked(house, "warm"))
    await asyncio.sleep(0.05)
    house.release("look")
    await opening
    reply, by = await asking
    assert (reply.status, by) == (200, "b")
    assert not switches(house)


async def test_a_request_that_waits_for_that_ends_when_llmux_stops(house):
    models = {"a": {"alive": held("never")}, "b": {}}
    opening = asyncio.create_task(house.open(models, virtual=WARM))
    await until(lambda: house.port)
    asking = asyncio.create_task(asked(house, "warm"))
    await asyncio.sleep(0.05)
    closing = asyncio.create_task(house.close())
    reply, _ = await asking
    assert reply.status == 503
    opening.cancel()
    await closing


async def test_the_next_one_is_tried_when_the_first_does_not_wake(house):
    await house.open({"a": FAILS, "b": {}}, virtual={"safe": {"first": ["a", "b"]}})
    reply, by = await asked(house, "safe")
    assert (reply.status, by) == (200, "b")
    assert json.loads(house.engine.bodies[-1]) == {"model": "b"}
    assert switches(house) == ["a", "b"]
    assert [name for name, _ in reply.fields].count("x-llmux-served-by") == 1
    assert not house.switcher.inside.tickets
    assert house.in_flight("b") == 0


@pytest.mark.parametrize("outer", [{"awake": ["safe"]}, {"ladder": ["safe"]}, {"split": {"safe": 1}}])
async def test_so_it_is_where_another_virtual_model_leads_to_it(house, outer):
    await house.open({"a": FAILS, "b": {}}, virtual={"safe": {"first": ["a", "b"]}, "v": outer})
    reply, by = await asked(house, "v")
    assert (reply.status, by) == (200, "b")
    assert switches(house) == ["a", "b"]


async def test_when_all_fail_the_last_error_is_told(house):
    await house.open({"a": FAILS, "b": FAILS}, virtual={"safe": {"first": ["a", "b"]}})
    reply, by = await asked(house, "safe")
    assert (reply.status, by) == (503, "b")
    assert reply.error["code"] in {"wake_failed", "backing_off"}
    assert not house.switcher.inside.tickets


async def test_what_the_engine_answers_is_final(house):
    await house.open("a b", virtual={"safe": {"first": ["a", "b"]}})
    house.engine.says = b"HTTP/1.1 500 Oops\r\nContent-Length: 2\r\n\r\nno"
    reply, by = await asked(house, "safe")
    assert (reply.status, by, reply.body) == (500, "a", b"no")
    assert switches(house) == ["a"]


async def test_a_ladder_takes_what_is_awake_at_or_above_its_floor(house):
    ladder = {"coder": {"ladder": ["a", "b", "c"], "floor": {"*": "b"}}}
    costs = {"a": {"cost": {"wake": 60}}, "b": {"cost": {"wake": 5}}, "c": {"cost": {"wake": 1}}}
    await house.open(costs, virtual=ladder)
    assert (await house.chat("c")).status == 200
    assert (await asked(house, "coder"))[1] == "b"  # c is below the floor, and b is woken sooner than a
    assert (await house.chat("a")).status == 200
    assert (await asked(house, "coder"))[1] == "a"


async def test_the_floor_goes_by_the_role_of_the_key(house):
    keys = [{"name": "ann", "key": "key-1", "role": "free"}, {"name": "ben", "key": "key-2"}]
    ladder = {"coder": {"ladder": ["a", "b"], "floor": {"free": "b", "*": "a"}}}
    await house.open("a b", virtual=ladder, api_keys=keys, roles={"free": {}})

    async def by(number):
        reply = await house.ask("POST", "/v1/x", {"model": "coder"}, Authorization=f"Bearer key-{number}")
        return reply.headers["x-llmux-served-by"]

    await house.ask("POST", "/v1/x", {"model": "b"}, Authorization="Bearer key-2")
    assert await by(1) == "b"
    assert await by(2) == "a"
    assert await by(1) == "a"


async def test_a_split_is_kept_by_each_key(house):
    keys = [{"name": f"k{n}", "key": f"key-{n}"} for n in range(24)]
    await house.open("a b", virtual={"ab": {"split": {"a": 1, "b": 1}, "sticky": "key"}}, api_keys=keys)
    served = {}
    for n in range(24):
        reply = await house.ask("POST", "/v1/x", {"model": "ab"}, Authorization=f"Bearer key-{n}")
        served[n] = reply.headers["x-llmux-served-by"]
    assert set(served.values()) == {"a", "b"}
    for n in (0, 5, 11):
        reply = await house.ask("POST", "/v1/x", {"model": "ab"}, Authorization=f"Bearer key-{n}")
        assert reply.headers["x-llmux-served-by"] == served[n]


async def test_a_conversation_keeps_its_target_while_that_is_awake(house):
    await house.open("a b", virtual={**WARM, "safe": {"first": ["a", "b"]}})
    await house.chat("b")
    assert (await asked(house, "warm", **messages("hi")))[1] == "b"
    # By its header, or by how it began: b would keep it, but a is awake now.
    await house.chat("a")
    assert (await asked(house, "warm", **messages("hi", "hello", "and?")))[1] == "a"
    # `first` keeps it although the one before it can be had again.
    assert (await asked(house, "safe", **messages("x")))[1] == "a"


async def test_first_keeps_a_conversation_where_it_went_when_the_first_failed(house):
    fails = {"wake": 'test -e fixed && touch "$LLMUX_MODEL.up"'}
    await house.open({"a": fails, "b": {}}, virtual={"safe": {"first": ["a", "b"]}})
    assert (await asked(house, "safe", **messages("one")))[1] == "b"
    (house.folder / "fixed").touch()
    await until(lambda: house.switcher.core.state.models["a"].wake_backoff.active(house.switcher.now()) is False)
    assert (await asked(house, "safe", **messages("one", "answer", "two")))[1] == "b"
    named = await house.ask("POST", "/v1/x", {"model": "safe"}, X_LLMux_Conversation="mine")
    assert named.headers["x-llmux-served-by"] == "a"
    assert (await asked(house, "safe", **messages("another")))[1] == "a"


async def test_a_header_that_names_no_conversation_is_refused(house):
    await house.open("a b", virtual=WARM)
    reply = await house.ask("POST", "/v1/x", {"model": "warm"}, X_LLMux_Conversation="x" * 300)
    assert (reply.status, reply.error["param"]) == (400, "X-LLMux-Conversation")


async def test_a_variant_as_a_target(house):
    models = {"a": {"variants": {"a:low": {"cap": {"max_tokens": 5}}}}, "b": {}}
    await house.open(models, virtual={"v": {"awake": ["a:low", "b"]}})
    reply, by = await asked(house, "v", max_tokens=99)
    assert (by, reply.headers["x-llmux-variant"]) == ("a", "a:low")
    assert json.loads(house.engine.bodies[-1]) == {"model": "a", "max_tokens": 5}


async def test_a_virtual_model_named_in_the_query(house):
    await house.open("a b", virtual=WARM)
    reply = await house.ask("GET", "/v1/x?model=warm&k=1")
    assert reply.headers["x-llmux-served-by"] == "a"
    assert house.engine.heads[-1].startswith(b"GET /v1/x?model=a&k=1 ")


async def test_decisions_and_metrics_say_why(house):
    await house.open("a b", virtual=WARM)
    await asked(house, "warm")
    await asked(house, "warm")
    document = (await house.ask("GET", "/llmux/decisions")).json()
    assert [(one["asked"], one["model"], one["reason"], one["way"]) for one in document["targets"]] == [
        ("warm", "a", "first", ["warm", "a"]),
        ("warm", "a", "awake", ["warm", "a"]),
    ]
    assert all(one["request_id"] and one["time"] > 1e9 for one in document["targets"])
    assert (await house.ask("GET", "/llmux/decisions?limit=0")).json()["targets"] == []
    metrics = (await house.ask("GET", "/metrics")).body.decode()
    assert 'llmux_targets_total{model="warm",reason="awake",target="a"} 1.0' in metrics


async def test_without_virtual_models_the_documents_are_as_ever(house):
    await house.open("a")
    assert list((await house.ask("GET", "/llmux/decisions")).json()) == ["decisions"]
    assert b"llmux_targets_total{" not in (await house.ask("GET", "/metrics")).body


async def test_they_are_listed(house):
    await house.open("a b", virtual={**WARM, "outer": {"split": {"warm": 1, "b": 2}}})
    listed = {entry["id"]: entry["llmux"] for entry in (await house.ask("GET", "/v1/models")).json()["data"]}
    assert list(listed) == ["a", "b", "outer", "warm"]
    more = {"aliases": [], "virtual": "split", "targets": ["warm", "b"]}
    assert listed["outer"] == {"state": Phase.ASLEEP.value, **more}
    await house.chat("b")
    one = (await house.ask("GET", "/v1/models/outer")).json()
    assert one["llmux"]["state"] == Phase.AWAKE.value
    assert "warm" in (await house.chat("nope")).error["message"]


@pytest.mark.parametrize("act", ["wake", "pin"])
async def test_operators_act_on_models_only(house, act):
    await house.open("a b", virtual=WARM)
    reply = await house.ask("POST", f"/llmux/models/warm/{act}", {})
    assert reply.status == 404


async def test_many_requests_meet_the_counts_of_a_split(house):
    await house.open("a", virtual={"v": {"split": {"a": 1}}, "w": {"split": {"v": 1}}})
    replies = await asyncio.gather(*(asked(house, "w", **messages(str(n))) for n in range(20)))
    assert {(reply.status, by) for reply, by in replies} == {(200, "a")}
    assert house.in_flight("a") == 0
