"""Requests come and go in every order, and are counted once."""

import asyncio

import pytest

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.errors import UnavailableError, UnknownModelError
from tests.harness.ports import free_port
from tests.server.house import held, refused, until


async def test_a_ticket_is_left_once_however_often_it_is_given(house):
    switcher = await house.open()
    ticket = switcher.enter("a")
    await switcher.admission(ticket)
    assert house.in_flight("a") == 1
    for _ in range(3):
        switcher.leave(ticket)
    assert not house.in_flight("a")
    assert not house.log.named("internal_error")


async def test_a_waiter_that_leaves_wakes_nothing(house):
    switcher = await house.open(models={"a": {"wake": f"{held('a')}; touch a.up"}, "b": {}})
    first = switcher.enter("a")
    second = switcher.enter("b")
    switcher.leave(second)
    house.release("a")
    await switcher.admission(first)
    switcher.leave(first)
    assert not (house.folder / "b.up").exists()


async def test_a_task_that_is_cancelled_after_its_admission_and_before_its_turn(house):
    switcher = await house.open()

    async def one():
        async with switcher.hold("a"):
            raise AssertionError("not reached")

    task = asyncio.create_task(one())
    switcher.subscribe(lambda effect: task.cancel() if isinstance(effect, fx.Admit) else None)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not house.in_flight("a")
    assert not switcher.inside.tickets


async def test_an_unknown_or_removed_model_is_refused(house):
    switcher = await house.open()
    async with refused(UnknownModelError), switcher.hold("nobody"):
        pass
    assert not switcher.inside.tickets


async def test_a_guard_keeps_its_model_awake(house):
    switcher = await house.open()
    async with switcher.hold("a") as admission:
        assert admission.model == "a"
        line = await house.begin("POST", "/v1/x", {"model": "b"})
        await until(lambda: house.queued("b"))
        assert (house.folder / "a.up").exists()
    assert (await line.reply()).status == 200
    assert not (house.folder / "a.up").exists()


@pytest.mark.parametrize("drain_timeout", [0, 0.01])
async def test_a_guard_is_ended_at_the_drains_deadline(house, drain_timeout):
    switcher = await house.open(policy={"drain_timeout": drain_timeout})
    async with refused(UnavailableError), switcher.hold("a"):
        line = await house.begin("POST", "/v1/x", {"model": "b"})
        await asyncio.Event().wait()
    assert (await line.reply()).status == 200
    assert asyncio.current_task().cancelling() == 0


async def test_a_guard_does_not_hold_up_the_end(house):
    switcher = await house.open(shutdown_grace=0.01)
    async with refused(UnavailableError), switcher.hold("a"):
        switcher.post(ev.ShutdownRequested())
        await asyncio.Event().wait()
    await switcher.stopped.wait()


async def test_somebody_elses_cancellation_passes_a_guard(house):
    switcher = await house.open()
    entered = asyncio.Event()

    async def one():
        async with switcher.hold("a"):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(one())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not house.in_flight("a")


async def test_a_switch_can_be_forced_with_nobody_waiting(house):
    switcher = await house.open()
    assert await switcher.force_switch("a") == 1
    await until(lambda: switcher.core.state.switch is None)
    assert (house.folder / "a.up").exists()
    assert await switcher.force_switch("a") is None
    assert await switcher.force_switch("b") == 2
    await until(lambda: switcher.core.state.switch is None)
    assert not (house.folder / "a.up").exists()


async def test_a_request_is_given_back_once_when_its_engine_is_dead(house):
    port = free_port()
    await house.open(models={"a": {"port": port, "alive": "false"}})
    reply = await house.chat("a")
    assert reply.status == 503
    assert reply.marked
    await until(lambda: not house.switcher.inside.tickets)
    assert not house.log.named("internal_error")


@pytest.mark.parametrize("phase", ["body", "queued", "in flight", "streaming"])
async def test_a_client_that_leaves_is_noticed(house, phase):
    await house.open(models={"a": {}, "b": {"wake": f"{held('b')}; touch b.up"}})
    line = await house.line()
    if phase == "body":
        line.send(b"POST /v1/x HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        await until(lambda: house._runner.server.connections)
    elif phase == "queued":
        line = await house.begin("POST", "/v1/x", {"model": "b"})
        await until(lambda: house.queued("b"))
    elif phase == "in flight":
        line = await house.begin("POST", "/v1/hold", {"model": "a"})
        await until(lambda: house.engine.bodies)
    else:
        line = await house.begin("POST", "/v1/stream", {"model": "a"})
        await line.reader.readuntil(b"data: 1")
    line.abort()
    await until(lambda: house.log.named("client_left") or phase == "body")
    await until(lambda: not house.switcher.inside.tickets and not house.engine.open)
    house.release("b")
    assert not house.log.named("internal_error")
    assert not house.log.named("engine_broke_off")
