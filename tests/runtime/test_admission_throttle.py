"""Those who have waited go on a few at a time, so that the loop gets to its sockets in between."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from llmux.errors import RequestError
from llmux.runtime.request_handle import AT_ONCE, AdmissionThrottle
from tests.server.house import until


async def test_the_loop_turns_in_between_and_the_order_stays():
    loop = asyncio.get_running_loop()
    throttle = AdmissionThrottle()
    waiters = [loop.create_future() for _ in range(3 * AT_ONCE + 1)]
    order: list[int] = []
    for n, waiter in enumerate(waiters):
        waiter.add_done_callback(lambda _, n=n: order.append(n))
    for waiter in waiters:
        throttle.add(waiter)
    done = [sum(w.done() for w in waiters)]
    while done[-1] < len(waiters):
        await asyncio.sleep(0)
        done.append(sum(w.done() for w in waiters))
    assert done[0] == AT_ONCE
    assert max(b - a for a, b in pairwise(done)) == AT_ONCE
    await asyncio.sleep(0)
    assert order == sorted(order)


async def test_one_that_has_left_takes_nobody_s_turn():
    loop = asyncio.get_running_loop()
    throttle = AdmissionThrottle()
    waiters = [loop.create_future() for _ in range(2 * AT_ONCE)]
    for waiter in waiters[:AT_ONCE]:
        waiter.cancel()
    for waiter in waiters:
        throttle.add(waiter)
    assert all(w.done() for w in waiters)


async def test_later_ones_find_room_again():
    loop = asyncio.get_running_loop()
    throttle = AdmissionThrottle()
    for _ in range(3):
        waiters = [loop.create_future() for _ in range(AT_ONCE)]
        for waiter in waiters:
            throttle.add(waiter)
        assert all(w.done() for w in waiters)
        await asyncio.sleep(0)
        await asyncio.sleep(0)


async def test_one_that_leaves_while_it_is_due_is_passed_over():
    loop = asyncio.get_running_loop()
    throttle = AdmissionThrottle()
    waiters = [loop.create_future() for _ in range(AT_ONCE + 2)]
    for waiter in waiters:
        throttle.add(waiter)
    waiters[AT_ONCE].cancel()
    await waiters[-1]


@pytest.mark.parametrize("grace", ["30s", "0s"])
async def test_the_stop_waits_for_those_who_are_told(house, grace):
    switcher = await house.open("a", policy={"manual": True}, shutdown_grace=grace)
    tickets = [switcher.enter("a") for _ in range(200 * AT_ONCE)]
    waiting = [asyncio.create_task(switcher.admission(ticket)) for ticket in tickets]
    await until(lambda: all(ticket.waiter is not None for ticket in tickets))
    await switcher.stop()
    assert all(ticket.waiter is None or ticket.waiter.done() for ticket in tickets)
    for task in waiting:
        with pytest.raises(RequestError, match="stopping"):
            await task
