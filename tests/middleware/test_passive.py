"""Paths on which a request neither wakes a model nor keeps it awake."""

import pytest
from pydantic import ValidationError

from llmux.config import Config
from llmux.core.phases import Phase
from tests.server.house import held, until

PASSIVE = ["/props", "/slots/**", "/v1/realtime", "/v1/stream"]


async def look(house, target="/props?model=a", **more):
    return await house.ask("GET", target, **more)


def phase(house, model="a"):
    return house.switcher.core.state.models[model].phase


async def test_a_model_that_sleeps_is_not_woken(house):
    await house.open("a b", passive=PASSIVE)
    for target in ("/props?model=a", "/slots/1?model=a", "/upstream/a/props"):
        reply = await look(house, target)
        assert (reply.status, reply.error["code"]) == (503, "asleep")
        assert reply.marked
    assert phase(house) is Phase.ASLEEP
    assert not house.log.named("switch_started")
    reply = await house.ask("POST", "/v1/realtime", {"model": "a"})
    assert reply.error["code"] == "asleep"


async def test_one_that_is_awake_answers(house):
    await house.open("a b", passive=PASSIVE)
    await house.chat("a")
    for target in ("/props?model=a", "/upstream/a/props", "/slots?model=a"):
        assert (await look(house, target)).status == 200
    assert house.engine.heads[-2].startswith(b"GET /props HTTP/1.1")
    assert (await house.ask("POST", "/v1/realtime", {"model": "a"})).status == 200
    assert (await look(house, "/other?model=a")).status == 404


async def test_only_paths_that_are_listed_are_passive(house):
    await house.open("a b", passive=PASSIVE)
    assert (await house.chat("a")).status == 200
    assert (await look(house, "/v1/x?model=b")).status == 200
    assert phase(house, "b") is Phase.AWAKE


@pytest.mark.parametrize("socket", [False, True])
async def test_what_is_open_holds_nothing_up_and_ends_with_the_engines_sleep(house, socket):
    await house.open("a b", passive=PASSIVE)
    await house.chat("a")
    if socket:
        fields = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec_WebSocket_Key": "x"}
        line = await house.begin("GET", "/v1/realtime?model=a", **fields)
        assert (await line.head()).status == 101
    else:
        line = await house.begin("POST", "/v1/stream", {"model": "a"})
        await line.reader.readuntil(b"data: 1\n\n")
    assert house.in_flight("a") == 0
    assert (await house.chat("b")).status == 200
    rest = await line.closed()
    assert (b"drain_deadline" in rest) is not socket
    assert phase(house) is Phase.ASLEEP
    assert not house.front._handler._passive._open


async def test_it_keeps_no_idle_model_awake(house):
    await house.open({"a": {"idle_sleep": "50ms"}, "b": {}}, passive=PASSIVE)
    busy = await house.begin("POST", "/v1/hold", {"model": "a"})
    await until(lambda: house.in_flight("a") == 1)
    line = await house.begin("POST", "/v1/stream", {"model": "a"})
    await line.reader.readuntil(b"data: 1\n\n")
    house.engine.go.set()
    assert (await busy.reply()).status == 200
    await line.closed()
    await until(lambda: phase(house) is Phase.ASLEEP)


async def test_it_is_served_while_its_model_drains(house):
    await house.open("a b", passive=PASSIVE)
    await house.chat("a")
    busy = await house.begin("POST", "/v1/hold", {"model": "a"})
    await until(lambda: house.in_flight("a") == 1)
    waiting = await house.begin("POST", "/v1/x", {"model": "b"})
    await until(lambda: phase(house) is Phase.DRAINING)
    assert (await look(house)).status == 200
    house.engine.go.set()
    assert [(await line.reply()).status for line in (busy, waiting)] == [200, 200]


async def test_an_engine_that_is_gone_is_found_out(house):
    await house.open("a b", passive=PASSIVE)
    await house.chat("a")
    await house.engine.stop()
    (house.folder / "a.up").unlink()
    assert (await look(house)).status == 502
    await until(lambda: phase(house) is not Phase.AWAKE)


async def test_a_stop_ends_it(house):
    await house.open("a b", passive=PASSIVE)
    await house.chat("a")
    line = await house.begin("POST", "/v1/stream", {"model": "a"})
    await line.reader.readuntil(b"data: 1\n\n")
    await house.close()
    assert b"stopping" in await line.closed()


async def test_a_reload_changes_the_paths_and_what_is_open_still_ends(house):
    switcher = await house.open({"a": {}, "b": {"wake": f"{held('b')}; touch $LLMUX_MODEL.up"}}, passive=PASSIVE)
    await house.chat("a")
    line = await house.begin("POST", "/v1/stream", {"model": "a"})
    await line.reader.readuntil(b"data: 1\n\n")
    config = house.config({"a": {}, "b": {}})
    switcher.replace(config)
    house.front.configure(config)
    assert (await look(house)).status == 404
    assert (await house.chat("b")).status == 200
    assert b"drain_deadline" in await line.closed()


@pytest.mark.parametrize("glob", ["x", "default", "/a**"])
def test_what_is_no_path_is_refused(glob):
    model = {"port": 8001, "wake": "true", "sleep": "true", "alive": "true"}
    with pytest.raises(ValidationError, match="passive"):
        Config(models={"q": model}, state=None, passive=[glob])
