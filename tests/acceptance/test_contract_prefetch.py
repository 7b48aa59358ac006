"""The prefetch hook, seen from outside: beside the drain, never waited for, gone with its switch."""

from __future__ import annotations

import asyncio
import signal

import pytest

PREFETCH = {"prefetch": "sh ./hook.sh prefetch"}
FAILURES = 'llmux_hook_failures_total{hook="prefetch",model="b"}'
RUNS = 'llmux_hook_duration_seconds_count{hook="prefetch",model="b"}'


@pytest.fixture
async def draining(lab):
    """An answer of a is held, and b is asked for; both tasks."""
    tasks: list[asyncio.Task] = []

    async def begin(**b):
        lab.write({"a": {}, "b": {**PREFETCH, **b}})
        lab.start()
        assert (await lab.chat("a")).status == 200
        tasks.append(asyncio.create_task(lab.chat("a", do={"hold": "answer"})))
        await lab.until_model("a", in_flight=1)
        tasks.append(asyncio.create_task(lab.chat("b")))
        await lab.until(lambda: lab.count("prefetch", "b"))
        return tasks

    yield begin
    for task in tasks:
        task.cancel()


def hooks_of(lab, pid: int) -> list[str]:
    return [command for number, command in lab.processes() if number == pid]


async def counted(lab) -> tuple[float, float]:
    """Wait until one prefetch has been counted; return how many were, and how many failed."""

    async def there():
        metrics = await lab.metrics()
        return (metrics[RUNS], metrics[FAILURES]) if RUNS in metrics else None

    return await lab.until(there)


async def test_a_prefetch_runs_while_the_other_model_still_answers(lab, draining):
    tasks = await draining()
    await lab.until(lambda: lab.count("prefetch", "b", "end"))
    (run,) = lab.hooks("prefetch")
    assert (run.model, run.hook, run.source, run.to) == ("b", "prefetch", "a", "b")
    assert run.switch
    assert not lab.count("sleep")
    lab.release("answer")
    assert [answer.status for answer in await asyncio.gather(*tasks)] == [200, 200]
    assert lab.order() == ["wake a", "sleep a", "wake b"]
    assert await counted(lab) == (1, 0)


async def test_a_prefetch_that_fails_is_told_and_changes_nothing(lab, draining):
    lab.script("b", "prefetch", "echo no such disk >&2; exit 3")
    tasks = await draining()
    lab.release("answer")
    assert [answer.status for answer in await asyncio.gather(*tasks)] == [200, 200]
    await lab.until(lambda: "hook_failed" in lab.log)
    assert "no such disk" in lab.log
    assert await counted(lab) == (1, 1)
    assert (await lab.status())["models"]["b"]["last_error"] is None


async def test_the_wake_does_not_wait_for_a_prefetch_which_ends_with_the_switch(lab, draining):
    lab.script("b", "prefetch", "sleep 77 & wait")
    tasks = await draining()
    (run,) = lab.hooks("prefetch")
    lab.release("answer")
    assert [answer.status for answer in await asyncio.gather(*tasks)] == [200, 200]
    await lab.until(lambda: not [command for command in lab.leftovers() if "sleep 77" in command])
    assert not hooks_of(lab, run.pid)
    await lab.until(lambda: "prefetch_ended" in lab.log)
    assert "hook_failed" not in lab.log
    assert await counted(lab) == (1, 0)


async def test_a_switch_that_is_called_off_ends_the_prefetch(lab, draining):
    lab.script("b", "prefetch", "sleep 77 & wait")
    tasks = await draining()
    tasks[1].cancel()
    await lab.until(lambda: not [command for command in lab.leftovers() if "hook.sh prefetch" in command])
    lab.release("answer")
    assert (await tasks[0]).status == 200
    assert lab.order() == ["wake a"]


async def test_a_prefetch_past_its_timeout_is_ended(lab, draining):
    lab.script("b", "prefetch", "sleep 77 & wait")
    tasks = await draining(timeouts={"prefetch": "1s"})
    await lab.until(lambda: not [command for command in lab.leftovers() if "hook.sh prefetch" in command])
    lab.release("answer")
    assert [answer.status for answer in await asyncio.gather(*tasks)] == [200, 200]
    assert await counted(lab) == (1, 1)


async def test_term_ends_a_prefetch(lab, draining):
    lab.script("b", "prefetch", "sleep 77 & wait")
    tasks = await draining()
    lab.signal(signal.SIGTERM)
    assert (await tasks[1]).status == 503
    await lab.until(lambda: not [command for command in lab.leftovers() if "hook.sh prefetch" in command])
    lab.release("answer")
    assert (await tasks[0]).status == 200
    assert lab.ended() == 0


async def test_the_prefetch_of_a_killed_llmux_is_ended_by_the_next(lab, draining):
    lab.script("b", "prefetch", "sleep 77 & wait")
    await draining()
    (run,) = lab.hooks("prefetch")
    lab.kill()
    assert hooks_of(lab, run.pid)
    lab.start()
    assert not hooks_of(lab, run.pid)
    assert "leftover_hook_ended" in lab.log
    lab.release("answer")
    assert lab.order() == ["wake a"]
