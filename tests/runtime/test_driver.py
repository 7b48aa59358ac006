"""Whatever fails around the core, it goes on being fed, and nobody is left waiting."""

import asyncio

import pytest

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.spec import HookKind
from llmux.core.timers import Timer
from llmux.errors import RequestError
from tests.server.house import until


def broken(*_, **__):
    raise LookupError("broken")


def failing_at(core, kind):
    """Have the core fail at every event of a kind, before it does anything."""
    handle = core.handle

    def failing(event, now):
        if isinstance(event, kind):
            core.state.out = []
            broken()
        return handle(event, now)

    core.handle = failing


async def test_a_subscriber_that_raises_stops_nobody(house):
    switcher = await house.open()
    seen = []
    switcher.subscribe(broken)
    switcher.subscribe(seen.append)
    assert (await house.chat("a")).status == 200
    assert any(isinstance(effect, fx.ModelActivated) for effect in seen)
    assert house.log.named("internal_error")


async def test_a_subscriber_may_leave_while_it_is_told_something(house):
    switcher = await house.open()
    seen = []

    def once(_effect):
        end()
        end()

    end = switcher.subscribe(once)
    switcher.subscribe(seen.append)
    assert (await house.chat("a")).status == 200
    assert sum(isinstance(effect, fx.Admit) for effect in seen) == 1
    assert not house.log.named("internal_error")


async def test_a_subscriber_may_enter_and_leave(house):
    switcher = await house.open()
    tickets = []

    def meddle(effect):
        if isinstance(effect, fx.Admit) and effect.request < 100:
            tickets.append(switcher.enter("a"))
        for ticket in tickets:
            switcher.leave(ticket)

    end = switcher.subscribe(meddle)
    assert (await house.chat("a")).status == 200
    end()
    assert (await house.chat("b")).status == 200
    assert not house.in_flight("a")
    assert not house.log.named("internal_error")


async def test_requests_that_leave_while_the_core_decides_on_them_are_not_counted(house):
    switcher = await house.open()

    def leave(effect):
        if isinstance(effect, fx.SwitchStarted | fx.Admit):
            for ticket in list(switcher.inside.tickets.values()):
                switcher.leave(ticket)

    end = switcher.subscribe(leave)
    for model in "aab":
        switcher.enter(model)
    await until(lambda: switcher.core.state.switch is None)
    end()
    for model in "ab":
        assert not house.queued(model)
        assert not house.in_flight(model)
    assert not switcher.inside.tickets
    assert not switcher.core.state.requests
    assert not house.log.named("internal_error")


@pytest.mark.parametrize("observer", ["log", "metrics"])
async def test_a_log_or_a_metric_that_fails_stops_nobody(house, observer):
    switcher = await house.open()
    if observer == "log":
        switcher.log.effect = switcher.log.hook_ended = switcher.log.emit = broken
    else:
        switcher.metrics.effect = switcher.metrics.hook_ended = broken
    assert [(await house.chat(model)).status for model in "abab"] == [200] * 4


async def test_a_hook_that_cannot_be_run_counts_as_failed(house):
    switcher = await house.open()
    definition = switcher.core.state.models["a"].spec.definition
    script = definition.scripts.pop(HookKind.WAKE)
    reply = await house.chat("a")
    assert (reply.status, reply.error["code"]) == (503, "wake_failed")
    assert (await house.chat("b")).status == 200
    definition.scripts[HookKind.WAKE] = script
    await until(lambda: switcher.core.state.models["a"].wake_backoff.remaining(switcher.now()) == 0)
    assert (await house.chat("a")).status == 200


async def test_a_hook_runner_that_fails_counts_as_a_failed_hook(house):
    switcher = await house.open()
    start = switcher.hooks.start
    switcher.hooks.start = lambda job, done: broken() if job.kind is HookKind.WAKE else start(job, done)
    assert (await house.chat("a")).status == 503
    switcher.hooks.start = start
    assert (await house.chat("b")).status == 200


async def test_a_mistake_of_the_core_ends_the_request_that_it_was_made_at(house):
    switcher = await house.open()
    assert (await house.chat("a")).status == 200
    handle = switcher.core.handle
    failing_at(switcher.core, ev.RequestArrived)
    reply = await house.chat("a")
    assert (reply.status, reply.error["code"]) == (500, "internal_error")
    assert reply.marked
    switcher.core.handle = handle
    assert (await house.chat("b")).status == 200
    assert not switcher.inside.tickets


async def test_a_mistake_of_the_core_answers_the_operator(house):
    switcher = await house.open()
    failing_at(switcher.core, ev.ActivationRequested)
    with pytest.raises(RequestError):
        await switcher.force_switch("a")
    assert (await house.ask("POST", "/llmux/models/a/wake")).status == 500
    assert not switcher._commands


async def test_what_the_core_had_decided_before_a_mistake_is_carried_out(house):
    switcher = await house.open()
    handle = switcher.core.handle

    def failing(event, now):
        handle(event, now)
        raise LookupError("broken")

    assert (await house.chat("a")).status == 200
    switcher.core.handle = failing
    assert (await house.chat("a")).status == 200
    switcher.core.handle = handle
    assert not house.in_flight("a")


async def test_a_deadline_that_the_core_fails_at_does_not_spin(house):
    switcher = await house.open()
    failing_at(switcher.core, ev.DeadlineReached)
    switcher.core.state.timers.set(Timer.ASK, switcher.now())
    switcher.post(ev.EngineLost("nobody"))
    await until(lambda: house.log.named("internal_error"))
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(house.log.named("internal_error")) == 1
    assert (await house.chat("a")).status == 200


async def test_an_early_timer_is_set_again(house):
    switcher = await house.open()
    reached = []
    handle = switcher.core.handle

    def watched(event, now):
        effects = handle(event, now)
        reached.extend([now] if isinstance(event, ev.DeadlineReached) else [])
        return effects

    switcher.core.handle = watched
    timers = switcher.core.state.timers
    for _ in range(100):  # a busy machine may come to it when both times are past
        reached.clear()
        timers.set(Timer.ASK, switcher.now() + 0.03)
        switcher.post(ev.EngineLost("nobody"))
        timers.set(Timer.ASK, switcher.now() + 0.06)  # the timer is now early
        await until(lambda: timers.next() is None)
        if len(reached) > 1:
            break
    assert len(reached) > 1
    timers.set(Timer.ASK, switcher.now() + 3600)
    switcher.post(ev.EngineLost("nobody"))
    timers.set(Timer.ASK, switcher.now() + 0.01)  # and now late
    switcher.post(ev.EngineLost("nobody"))
    await until(lambda: timers.next() is None)


async def test_a_hook_that_ends_after_the_end_disturbs_nobody(house):
    switcher = await house.open(models={"a": {"sleep": "sleep 100"}, "b": {}}, shutdown_grace=0)
    assert (await house.chat("a")).status == 200
    line = await house.begin("POST", "/v1/x", {"model": "b"})
    await until(lambda: any(job.kind is HookKind.SLEEP for job in switcher.hooks.running.values()))
    switcher.post(ev.ShutdownRequested())
    await switcher.close()
    assert not switcher.hooks.running
    assert (await line.reply()).status == 503
    assert not house.log.named("internal_error")
