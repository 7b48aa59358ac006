"""What llmux refuses before its admission says so in a header, for gateways; no engine can say that."""

import pytest

from llmux.middleware.fast_path import MOST
from tests.server.house import held, until

CHAT = "/v1/chat/completions"
PATHS = [0, MOST]  # the fast path, and the other one


def refused(reply):
    return reply.status, reply.headers.get("x-llmux-refused")


async def ask(house, model, padding=0, path=CHAT, **headers):
    return await house.ask("POST", path, {"model": model, "padding": "x" * padding}, **headers)


@pytest.mark.parametrize("padding", PATHS)
async def test_a_wake_that_fails_and_the_backoff_after_it(house, padding):
    await house.open(models={"a": {"wake": "exit 3"}}, backoff={"first": 60, "max": 60})
    assert refused(await ask(house, "a", padding)) == (503, "wake_failed")
    assert refused(await ask(house, "a", padding)) == (503, "backing_off")


async def test_pins_leases_full_queues_and_deadlines(house):
    switcher = await house.open(models={"a": {}, "b": {"wake": held("go"), "max_queued": 1, "cost": {"wake": 60}}})
    await house.ask("POST", "/llmux/models/a/pin")
    assert refused(await ask(house, "b")) == (503, "pinned")
    await house.ask("POST", "/llmux/models/a/unpin")
    assert refused(await ask(house, "b", X_LLMux_Deadline="1s")) == (503, "deadline")
    line = await house.begin("POST", CHAT, {"model": "b"})
    await until(lambda: house.queued("b"))
    assert refused(await ask(house, "b")) == (429, "queue_full")
    house.release("go")
    assert (await line.reply()).status == 200
    await house.ask("POST", "/llmux/lease")
    assert refused(await ask(house, "a")) == (503, "leased")
    assert switcher.core.state.lease is not None


async def test_a_name_that_is_not_configured(house):
    await house.open()
    assert refused(await ask(house, "c")) == (404, "model_not_found")


async def test_bodies_that_are_too_many(house):
    await house.open(max_buffered=1000)
    for _ in range(3):
        assert refused(await ask(house, "a", 2000)) == (503, "bodies_full")
    (told,) = house.log.named("bodies_full")
    assert told["error"].endswith("of 1000")


async def test_what_has_waited_for_too_long_is_too_late_everywhere(house):
    await house.open(models={"a": {"wake": held("go")}}, policy={"request_timeout": "10ms"})
    assert refused(await ask(house, "a")) == (504, None)
    house.release("go")


@pytest.mark.parametrize("padding", PATHS)
async def test_what_was_cut_had_reached_its_engine(house, padding):
    """The same word as of a refusal, but the engine has worked on it."""
    house.up("a")
    await house.open(shutdown_grace=0)
    line = await house.begin("POST", "/v1/hold", {"model": "a", "padding": "x" * padding})
    await until(lambda: house.engine.heads)
    await house.close()
    reply = await line.reply()
    assert (reply.error["code"], *refused(reply)) == ("stopping", 503, None)


@pytest.mark.parametrize("padding", PATHS)
async def test_an_engine_cannot_say_it(house, padding):
    house.up("a")
    house.engine.says = (
        b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\nX-LLMux-Refused: leased\r\nX-Other: kept\r\n\r\nno"
    )
    await house.open()
    reply = await ask(house, "a", padding)
    assert refused(reply) == (503, None)
    assert reply.headers["x-other"] == "kept"


async def test_what_a_client_did_wrong_is_refused_everywhere(house):
    await house.open(api_keys=["right"])
    assert refused(await ask(house, "a")) == (401, None)
    assert refused(await house.ask("POST", CHAT, b"{", X_API_Key="right")) == (400, None)


# ---- taken back


async def test_a_request_that_waits_can_be_taken_back_by_its_gateway(house):
    keys = [{"name": "gateway", "key": "gate", "gateway": True}, {"name": "bob", "key": "own"}]
    await house.open(models={"a": {"wake": held("go")}}, api_keys=keys)
    headers = {"X-API-Key": "gate", "X-Request-ID": "one"}
    line = await house.begin("POST", CHAT, {"model": "a"}, **headers)
    await until(lambda: house.queued("a"))
    assert (await house.ask("POST", "/llmux/withdraw/one", {}, X_API_Key="own")).status == 403
    reply = await house.ask("POST", "/llmux/withdraw/one", {}, X_API_Key="gate")
    assert (reply.status, reply.json()["withdrawn"]) == (202, ["a"])
    assert refused(await line.reply()) == (503, "withdrawn")
    assert not house.queued("a")
    house.release("go")
    assert not house.engine.heads


async def test_one_that_was_admitted_stays_where_it_is(house):
    house.up("a")
    await house.open()
    line = await house.begin("POST", "/v1/hold", {"model": "a"}, X_Request_ID="one")
    await until(lambda: house.in_flight("a"))
    reply = await house.ask("POST", "/llmux/withdraw/one", {})
    assert (reply.status, reply.json()["withdrawn"]) == (202, [])
    house.engine.go.set()
    assert refused(await line.reply()) == (200, None)


# ---- whose requests a gateway's are


async def last(house):
    rows = (await house.ask("GET", "/llmux/activity", X_API_Key="gate")).json()["requests"]
    head = house.engine.heads[-1].lower()
    return rows[0]["key"], b"x-llmux-key" in head


@pytest.mark.parametrize("padding", PATHS)
async def test_a_gateway_tells_whose_its_requests_are(house, padding):
    house.up("a")
    keys = [{"name": "gateway", "key": "gate", "gateway": True}, {"name": "bob", "key": "own"}]
    await house.open(api_keys=keys)
    for _ in range(2):  # a head that is known would be on the fast path
        await ask(house, "a", padding, X_API_Key="gate", X_LLMux_Key="alice")
        assert await last(house) == ("alice", False)
    await ask(house, "a", padding, X_API_Key="gate")
    assert await last(house) == ("gateway", False)
    await ask(house, "a", padding, X_API_Key="own", X_LLMux_Key="alice")
    assert await last(house) == ("bob", True)  # to this key it is a header as any other
