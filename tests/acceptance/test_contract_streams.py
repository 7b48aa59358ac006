"""Streams, clients that leave, drains, answers that break off."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from pathlib import Path

import anthropic
import openai
import pytest

from llmux.upstream import native
from tests.harness.lease.lab import Lab
from tests.harness.lease.raw import Gone, request, uid
from tests.harness.waiting import PATIENCE


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    found = Lab(tmp_path_factory.mktemp("streams"))
    found.write("a")
    found.start()
    yield found
    found.finish()


async def idle(lab, model: str = "a") -> None:
    await lab.until_model(model, in_flight=0, queued=0)


def openai_client(lab) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{lab.port}/v1", api_key="k", max_retries=0, timeout=PATIENCE
    )


def anthropic_client(lab) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(
        base_url=f"http://127.0.0.1:{lab.port}", api_key="k", max_retries=0, timeout=PATIENCE
    )


HELLO = [{"role": "user", "content": "hi"}]


async def openai_stream(lab, do: dict, texts: list[str]) -> None:
    more = {"extra_headers": {"X-Do": json.dumps(do)}, "messages": HELLO}
    async with openai_client(lab) as client:
        async for chunk in await client.chat.completions.create(model="a", stream=True, **more):
            texts.append(chunk.choices[0].delta.content)  # noqa: PERF401 (kept when it raises)


async def anthropic_stream(lab, do: dict, events: list[str]) -> None:
    more = {"extra_headers": {"X-Do": json.dumps(do)}, "messages": HELLO}
    async with anthropic_client(lab) as client:
        async for event in await client.messages.create(model="a", stream=True, max_tokens=9, **more):
            events.append(event.type)  # noqa: PERF401 (kept when it raises)


async def test_two_hundred_streams_at_once(shared):
    names = [f"gate{n}" for n in (0,)]
    tasks = [
        asyncio.create_task(shared.chat("a", do={"sse": 20, "hold_after": [5, names[0]]})) for _ in range(200)
    ]
    await shared.until_model("a", in_flight=200)
    shared.release(names[0])
    answers = await asyncio.gather(*tasks)
    assert all(a.whole and a.body.count(b"data: ") == 21 for a in answers)
    await idle(shared)


async def test_chunks_arrive_as_they_are_made(shared):
    line = await shared.begin("a", do={"sse": 3, "hold_after": [1, "paced"]})
    head = await line.head()
    assert head.status == 200
    first = await asyncio.wait_for(line.reader.readuntil(b"\n\n"), PATIENCE)
    assert b"t0" in first
    shared.release("paced")
    rest = await asyncio.wait_for(line.reader.readuntil(b"[DONE]\n\n"), PATIENCE)
    assert b"t2" in rest
    await line.close()


async def test_headers_are_passed_before_the_first_byte(shared):
    line = await shared.begin("a", do={"sse": 1, "hold_after": [0, "headonly"]})
    assert (await line.head()).status == 200
    shared.release("headonly")
    await line.close()


@pytest.mark.parametrize("how", ["close", "reset", "half"])
@pytest.mark.parametrize("when", ["before headers", "mid-stream"])
async def test_the_engine_notices_that_the_client_left(shared, how, when):
    name = f"{how}{when}".replace(" ", "")
    do = {"hold": name} if when == "before headers" else {"sse": 5, "hold_after": [2, name]}
    line = await shared.wire()
    data = request("POST", "/v1/chat/completions", body={"model": "a"}, do=do)
    await line.send(data)
    await shared.until(lambda: [r for r in shared.journal("request") if r["uid"] == uid(data)])
    if when == "mid-stream":
        await line.head()
    if how == "close":
        await line.close()
    elif how == "reset":
        await line.reset()
    else:
        line.writer.write_eof()
    await shared.until(lambda: [r for r in shared.journal("gone") if r["uid"] == uid(data)])
    await idle(shared)
    await line.close()
    shared.release(name)
    assert (await shared.chat("a")).status == 200


async def test_a_client_that_floods_and_leaves_frees_its_place(shared):
    for _ in range(20):
        line = await shared.begin("a", do={"sse": 2000})
        await line.head()
        await line.reset()
    await idle(shared)


@pytest.mark.parametrize("how", ["close", "half"])
async def test_leaving_the_queue_means_no_wake(lab, how):
    lab.write("a b")
    lab.start()
    first = await lab.begin("a", do={"hold": "x"})
    await lab.until_model("a", in_flight=1)
    waiter = await lab.begin("b")
    await lab.until_model("b", queued=1)
    await lab.until_phase("a", "DRAINING")
    if how == "close":
        await waiter.close()
    else:
        waiter.writer.write_eof()
    await lab.until_model("b", queued=0)
    await lab.until_phase("a", "AWAKE")
    assert (await lab.chat("a")).status == 200
    lab.release("x")
    assert (await first.head()).status == 200
    await first.close()
    await waiter.close()
    await idle(lab)
    assert lab.order() == ["wake a"]
    assert (await lab.status())["switch"] is None


async def test_leaving_during_the_sleep_hook_means_no_wake(lab):
    lab.write("a b")
    lab.script("a", "sleep", lab.hold("s"))
    lab.start()
    await lab.chat("a")
    waiter = await lab.begin("b")
    await lab.until(lambda: lab.count("sleep", "a"))
    await waiter.close()
    await lab.until_model("b", queued=0)
    lab.release("s")
    await lab.until_phase("a", "ASLEEP")

    async def over():
        return (await lab.status())["switch"] is None

    await lab.until(over)
    assert lab.order() == ["wake a", "sleep a"]
    metrics = await lab.metrics()
    assert metrics['llmux_switch_total{from="a",result="abandoned",to="b"}'] == 1


async def test_leaving_during_the_wake_lets_it_finish(lab):
    lab.write("a b")
    lab.script("a", "wake", lab.hold("w"))
    lab.start()
    waiter = await lab.begin("a")
    await lab.until(lambda: lab.count("wake", "a"))
    await waiter.close()
    await lab.until_model("a", queued=0)
    lab.release("w")
    await lab.until_phase("a", "AWAKE")
    assert (await lab.chat("a")).status == 200
    assert lab.order() == ["wake a"]
    assert len(lab.journal("request")) == 1


async def test_dead_waiters_cause_no_second_switch(lab):
    """Many wait for b and leave while a drains; c, who stays, is served."""
    lab.write("a b c")
    lab.start()
    first = await lab.begin("a", do={"hold": "x"})
    await lab.until_model("a", in_flight=1)
    dead = [await lab.begin("b") for _ in range(5)]
    await lab.until_model("b", queued=5)
    alive = asyncio.create_task(lab.chat("c"))
    await lab.until_model("c", queued=1)
    for line in dead:
        await line.close()
    await lab.until_model("b", queued=0)
    lab.release("x")
    assert (await first.head()).status == 200
    await first.close()
    assert (await alive).status == 200
    assert lab.order() == ["wake a", "sleep a", "wake c"]


async def test_a_running_stream_is_not_cut_by_a_switch(lab):
    lab.write("a b")
    lab.start()
    line = await lab.begin("a", do={"sse": 10, "hold_after": [3, "x"]})
    head = await line.head()
    other = asyncio.create_task(lab.chat("b"))
    await lab.until_phase("a", "DRAINING")
    late = asyncio.create_task(lab.chat("a"))
    await lab.until_model("a", queued=1)
    await asyncio.sleep(0.1)
    assert lab.order() == ["wake a"], "the drain waits for the stream"
    lab.release("x")
    answer = await line.body(head)
    await line.close()
    assert answer.whole
    assert answer.body.endswith(b"[DONE]\n\n")
    assert (await other).status == 200
    assert (await late).status == 200
    assert lab.order() == ["wake a", "sleep a", "wake b", "sleep b", "wake a"]


async def test_drain_timeout_cuts_the_stream_so_that_sdks_raise(lab):
    lab.write("a b", policy={"drain_timeout": "200ms"})
    lab.start()
    await lab.chat("a")
    do = {"sse": 5, "hold_after": [2, "never"]}
    anthropic_do = {"sse": 5, "hold_after": [4, "never"]}

    texts, events = [], []

    async def by_openai():
        with pytest.raises(openai.APIError):
            await openai_stream(lab, do, texts)

    async def by_anthropic():
        with pytest.raises(anthropic.APIError):
            await anthropic_stream(lab, anthropic_do, events)

    tasks = [asyncio.create_task(by_openai()), asyncio.create_task(by_anthropic())]
    raw = await lab.begin("a", do={"sse": 5, "hold_after": [2, "never"]})
    sized = await lab.begin("a", do={"sse": 5, "hold_after": [2, "never"], "sse_body": True})
    silent = await lab.begin("a", do={"hold": "never"})
    heads = [await raw.head(), await sized.head()]
    await lab.until_model("a", in_flight=5)
    assert (await lab.chat("b")).status == 200
    await asyncio.gather(*tasks)
    assert texts == ["t0 ", "t1 "]
    assert events[-1] == "content_block_delta"
    answer = await raw.body(heads[0])
    assert not answer.whole, "the body has no proper end"
    assert b"error" in answer.body.split(b"t1 ")[-1]
    assert b'"error"' in answer.body
    answer = await sized.body(heads[1])
    assert not answer.whole
    assert b'"error"' not in answer.body, "a sized body gets no extra event"
    answer = await silent.body(await silent.head())
    assert answer.status == 503
    assert answer.get("Retry-After")
    for line in (raw, sized, silent):
        await line.close()
    assert lab.order() == ["wake a", "sleep a", "wake b"]


async def test_a_drain_deadline_of_zero_never_sleeps_under_a_request(lab):
    lab.write("a b", policy={"drain_before_switch": False})
    lab.start()
    line = await lab.begin("a", do={"sse": 5, "hold_after": [2, "never"]})
    head = await line.head()
    assert (await lab.chat("b")).status == 200
    assert not (await line.body(head)).whole
    await line.close()


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("how", ["eof", "reset"])
async def test_an_engine_that_breaks_off_in_mid_stream(shared, how, partial):
    answer = await shared.chat("a", do={"sse": 6, "fail": how, "fail_after": 3, "partial": partial})
    assert answer.status == 200
    assert not answer.whole
    assert b"t2 " in answer.body
    if partial:
        assert b'"error"' not in answer.body, "no event is put into the middle of a chunk"
    else:
        assert b'"error"' in answer.body
        event = answer.body.rsplit(b"\n\n", 2)[-2]
        assert event.lstrip(b"\n").startswith((b"data: ", b"event: error")), event
    await idle(shared)


def shared_sockets(lab) -> int:
    """Return how many sockets of llmux have two descriptors: one is the native relay's."""
    links = []
    for file in Path(f"/proc/{lab.process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(str(file.readlink()))
    return sum(count > 1 for name, count in Counter(links).items() if name.startswith("socket:"))


@pytest.mark.skipif(native.which() == "python", reason="it is not compiled here")
@pytest.mark.parametrize("end", ["whole", "engine", "client"])
async def test_a_stream_that_the_native_relay_passes_on_ends_as_any_does(shared, end):
    do = {"sse": 90, "interval": 0.01, "hold_after": [80, f"lent{end}"]}
    if end == "engine":
        do |= {"fail": "reset", "fail_after": 85}
    line = await shared.wire()
    data = request("POST", "/v1/chat/completions", body={"model": "a"}, do=do)
    await line.send(data)
    head = await line.head()
    await shared.until(lambda: shared_sockets(shared) == 2)
    if end == "client":
        await line.close()
        await shared.until(lambda: [r for r in shared.journal("gone") if r["uid"] == uid(data)])
        shared.release("lentclient")
    else:
        shared.release(f"lent{end}")
        answer = await line.body(head)
        assert answer.whole is (end == "whole")
        assert all(b"t%d " % number in answer.body for number in range(90 if end == "whole" else 85))
        assert (b'"error"' in answer.body) is (end == "engine")
        await line.close()
    await idle(shared)
    await shared.until(lambda: not shared_sockets(shared))


async def test_sdks_raise_when_the_engine_breaks_off(shared):
    texts, events = [], []
    with pytest.raises(openai.APIError):
        await openai_stream(shared, {"sse": 6, "fail": "reset", "fail_after": 3}, texts)
    with pytest.raises(anthropic.APIError):
        await anthropic_stream(shared, {"sse": 6, "fail": "eof", "fail_after": 4}, events)
    assert texts == ["t0 ", "t1 ", "t2 "]
    assert len(events) == 4


async def test_sdks_get_their_answers_and_their_errors(shared):
    async with openai_client(shared) as client:
        done = await client.chat.completions.create(model="a", messages=HELLO)
        assert done.choices[0].message.content == "a"
        texts = []
        await openai_stream(shared, {"sse": 3}, texts)
        assert texts == ["t0 ", "t1 ", "t2 "]
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="zz", messages=HELLO)
        assert missing.value.code == "model_not_found"
        assert [m.id async for m in client.models.list()] == ["a"]
    async with anthropic_client(shared) as client:
        async with client.messages.stream(
            model="a", messages=HELLO, max_tokens=5, extra_headers={"X-Do": '{"sse": 3}'}
        ) as stream:
            assert await stream.get_final_text() == "t0 t1 t2 "
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.create(model="zz", messages=HELLO, max_tokens=5)


async def test_a_sized_answer_that_breaks_off_is_short(shared):
    answer = await shared.chat(
        "a", do={"sse": 6, "sse_body": True, "fail": "eof", "fail_after": 3, "partial": True}
    )
    assert answer.status == 200
    assert not answer.whole
    await idle(shared)


async def test_a_pooled_connection_that_died_is_no_error(lab):
    """The engine closes the kept connection on the next request's bytes, without a byte of answer."""
    lab.write("a")
    lab.start()
    dropped = len(lab.journal("dropped"))
    for _ in range(3):
        assert (await lab.chat("a", do={"drop_next": True})).status == 200
        data = request("POST", "/v1/x", body={"model": "a"})
        answer = await lab.raw(data)
        assert answer.status == 200, answer.body
    assert len(lab.journal("dropped")) > dropped, "the test means a pooled connection"


@pytest.mark.parametrize("do", [{"fail": "crash"}, {"delay": 1.5, "fail": "eof"}], ids=["dies", "gives up later"])
@pytest.mark.parametrize("size", [10, 200_000], ids=["short", "long"])
async def test_what_an_engine_may_have_run_is_not_sent_again_on_a_kept_connection_either(lab, do, size):
    lab.write("a")
    lab.start()
    for _ in range(2):
        assert (await lab.chat("a")).status == 200  # a connection is kept
        data = request("POST", "/v1/x", body={"model": "a", "text": "x" * size}, do=do)
        answer = await lab.raw(data)
        assert answer.status == 502, answer.body
        assert len([line for line in lab.journal("request") if line["uid"] == uid(data)]) == 1


async def test_an_idle_connection_that_the_engine_closed_is_no_error(lab):
    lab.write({"a": {"env": {"KEY": "a", "IDLE_CLOSE": "0.05"}}})
    lab.start()
    for _ in range(6):
        assert (await lab.chat("a")).status == 200
        await asyncio.sleep(0.06)
    assert lab.order() == ["wake a"]


async def test_a_fresh_connection_is_written_to_only_once(lab):
    """eof without an answer on a fresh connection: 502, and not a second delivery."""
    lab.write("a")
    lab.start()
    data = request("POST", "/v1/x", body={"model": "a"}, do={"fail": "eof"})
    answer = await lab.raw(data)
    assert answer.status == 502
    assert len([r for r in lab.journal("request") if r["uid"] == uid(data)]) == 1


async def test_closing_after_the_answer_is_no_disconnect(shared):
    data = request("POST", "/v1/x", body={"model": "a"}, headers=[("Connection", "close")])
    async with await shared.wire() as line:
        answer = await line.ask(data)
        assert answer.status == 200
        assert await asyncio.wait_for(line.reader.read(), PATIENCE) == b""
    async with await shared.wire() as line:
        line.writer.write_eof()
        with pytest.raises(Gone):
            await line.head()
