"""TERM, once and again, with a hook or an answer under way."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time

import pytest

from tests.harness.lease.raw import Gone
from tests.harness.waiting import PATIENCE


async def test_term_lets_a_stream_finish_and_ends_the_queue(lab):
    lab.write("a b")
    lab.start()
    line = await lab.begin("a", do={"sse": 6, "hold_after": [2, "x"]})
    head = await line.head()
    waiting = [asyncio.create_task(lab.chat("b")) for _ in range(3)]
    await lab.until_model("b", queued=3)
    idle = await lab.wire()
    lab.signal(signal.SIGTERM)
    answers = await asyncio.wait_for(asyncio.gather(*waiting), PATIENCE)
    assert [a.status for a in answers] == [503] * 3
    assert all(a.json()["error"]["message"] for a in answers)
    assert all(a.get("X-Request-ID") for a in answers)
    with contextlib.suppress(ConnectionError, Gone):
        assert (await lab.chat("a")).status == 503, "no new admissions"
    lab.release("x")
    answer = await line.body(head)
    assert answer.whole
    assert answer.body.endswith(b"[DONE]\n\n")
    await line.close()
    await idle.close()
    assert lab.ended() == 0
    assert lab.order() == ["wake a"], "engines are left as they are"
    assert lab.journal("asleep") == []


async def test_the_grace_ends_a_stream_that_never_ends(lab):
    lab.write("a", shutdown_grace="300ms")
    lab.start()
    line = await lab.begin("a", do={"sse": 6, "hold_after": [2, "never"]})
    head = await line.head()
    before = time.monotonic()
    lab.signal(signal.SIGTERM)
    assert not (await line.body(head)).whole
    await line.close()
    assert lab.ended() == 0
    assert time.monotonic() - before > 0.25


async def test_a_second_term_ends_at_once(lab):
    lab.write("a", shutdown_grace="1h")
    lab.start()
    line = await lab.begin("a", do={"sse": 6, "hold_after": [2, "never"]})
    await line.head()
    lab.signal(signal.SIGTERM)
    await lab.until(lambda: "stopping" in lab.log)
    await asyncio.sleep(0.2)
    assert lab.process.poll() is None, "the stream is waited for"
    lab.signal(signal.SIGTERM)
    assert lab.ended() == 0
    await line.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_wake_under_way_is_ended(lab, number):
    lab.write("a")
    lab.script("a", "wake", "sleep 60")
    lab.start()
    task = asyncio.create_task(lab.chat("a"))
    await lab.until(lambda: lab.count("wake", "a"))
    lab.signal(number)
    assert (await task).status == 503
    assert lab.ended() == 0
    await lab.until(lambda: not lab.leftovers())


async def test_a_sleep_under_way_may_finish(lab):
    lab.write("a b")
    lab.script("a", "sleep", lab.hold("s"))
    lab.start()
    await lab.chat("a")
    task = asyncio.create_task(lab.chat("b"))
    await lab.until(lambda: lab.count("sleep", "a"))
    lab.signal(signal.SIGTERM)
    assert (await task).status == 503
    await asyncio.sleep(0.2)
    assert lab.process.poll() is None
    lab.release("s")
    assert lab.ended() == 0
    assert [h.rc for h in lab.hooks("sleep", "a", "end")] == ["0"]
    assert lab.count("wake", "b") == 0


async def test_on_exit_sleep(lab):
    lab.write("a", on_exit="sleep")
    lab.start()
    await lab.chat("a")
    assert lab.end() == 0
    assert lab.order() == ["wake a", "sleep a"]


async def test_a_hook_at_start_is_ended_by_term(lab):
    lab.write({"a": {"timeouts": {"alive": "1h"}}})
    lab.script("a", "alive", "sleep 600")
    lab.start(ready=False)
    await lab.until(lambda: lab.count("alive"))
    assert lab.end() == 0


async def test_term_again_and_again_ends_it_with_0(lab):
    lab.write("a")
    lab.start()
    process = lab.process
    while process.poll() is None:
        lab.signal(signal.SIGTERM)
        await asyncio.sleep(0.0005)
    lab.process = None
    assert process.returncode == 0


async def test_the_event_stream_does_not_hold_up_the_end(lab):
    lab.write("a", shutdown_grace="1h")
    lab.start()
    line = await lab.wire()
    await line.send(b"GET /llmux/events HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await line.head()).status == 200
    lab.signal(signal.SIGTERM)
    assert await asyncio.to_thread(lab.ended) == 0
    await line.close()


async def test_an_idle_connection_does_not_hold_up_the_end(lab):
    lab.write("a", shutdown_grace="1h")
    lab.start()
    idle, half = await lab.wire(), await lab.wire()
    await half.send(b"POST /v1/x HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    lab.signal(signal.SIGTERM)
    assert await asyncio.to_thread(lab.ended) == 0
    await idle.close()
    await half.close()


async def test_a_websocket_is_given_the_grace(lab):
    lab.write("a", shutdown_grace="300ms")
    lab.start()
    line = await lab.wire()
    await line.send(
        b"GET /v1/realtime?model=a HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    assert (await line.head()).status == 101
    before = time.monotonic()
    lab.signal(signal.SIGTERM)
    assert await asyncio.to_thread(lab.ended) == 0
    assert time.monotonic() - before > 0.25
    await line.close()
