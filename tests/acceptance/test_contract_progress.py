"""Clients that wait are told where they stand, and what goes wrong after that makes the official SDKs raise."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re

import anthropic
import openai
import pytest

from tests.harness.lease.lab import Lab

HELLO = [{"role": "user", "content": "hi"}]
OPENAI, ANTHROPIC = "/v1/chat/completions", "/v1/messages"
COMMENT = re.compile(rb": llmux waiting, position (\d+), about (\d+) s\n")
FAST = {"progress": True, "progress_every": "20ms"}


def asleep(lab: Lab, **more) -> None:
    """Start llmux with a model whose wake is held up."""
    lab.write("a", **{**FAST, **more})
    lab.script("a", "wake", lab.hold("go"))
    lab.start()


class Tap:
    """Listens in on what llmux sends to one client, which uses the SDKs ``one`` (OpenAI's) or ``other``."""

    def __init__(self, port: int) -> None:
        self.raw = b""
        self._port = port
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self, one: openai.AsyncOpenAI, other: anthropic.AsyncAnthropic, retries: int) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self.one = one.with_options(base_url=f"{url}/v1", max_retries=retries)
        self.other = other.with_options(base_url=url, max_retries=retries)

    async def close(self) -> None:
        self._server.close()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _serve(self, reader, writer) -> None:
        task = asyncio.current_task()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._port)
        await asyncio.gather(self._pass_on(reader, up_writer), self._pass_on(up_reader, writer, note=True))

    async def _pass_on(self, reader, writer, *, note: bool = False) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if note:
                    self.raw += data
                writer.write(data)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    @property
    def head(self) -> dict[str, str]:
        """The fields of the first head, and its status."""
        first, *lines = self.raw.partition(b"\r\n\r\n")[0].decode().split("\r\n")
        fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return fields | {"status": first.split()[1]}

    @property
    def read(self) -> bytes:
        """The contents of the first body's chunks, as far as they have come."""
        rest, found = self.raw.partition(b"\r\n\r\n")[2], b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            found += rest[: int(size, 16)]
            rest = rest[int(size, 16) + 2 :] if int(size, 16) else b""
        return found

    async def stream(self, which: str, do: dict) -> list:
        headers = {"X-Do": json.dumps(do)}
        if which == "openai":
            create = self.one.chat.completions.create
            stream = await create(model="a", messages=HELLO, stream=True, extra_headers=headers)
            return [chunk async for chunk in stream]
        create = self.other.messages.stream
        async with create(model="a", messages=HELLO, max_tokens=9, extra_headers=headers) as stream:
            return [event async for event in stream]

    async def whole(self, which: str, do: dict):
        headers = {"X-Do": json.dumps(do)}
        if which == "openai":
            return await self.one.chat.completions.create(model="a", messages=HELLO, extra_headers=headers)
        return await self.other.messages.create(model="a", messages=HELLO, max_tokens=9, extra_headers=headers)


@contextlib.asynccontextmanager
async def taps(lab: Lab, count: int = 1, retries: int = 0):
    """Open some, with one pool of connections for each SDK: to make one takes longer than what is asked here."""
    found = [Tap(lab.port) for _ in range(count)]
    options = {"api_key": "k", "timeout": 30}
    async with openai.AsyncOpenAI(**options) as one, anthropic.AsyncAnthropic(**options) as other:
        for tap in found:
            await tap.open(one, other, retries)
        yield found
    for tap in found:
        await tap.close()


BOTH = ("openai", "anthropic")


async def ask(lab: Lab, *asks: tuple[str, str, dict], then: bytes = b"", release: str = "") -> list:
    """Ask with an SDK each (which, ``stream`` or ``whole``, what the engine does); return what came of it.

    The wake goes on when all have been told that they wait, the engine when all have been told ``then``.
    """
    async with taps(lab, len(asks)) as found:
        asking = [
            asyncio.create_task(getattr(tap, how)(which, do))
            for tap, (which, how, do) in zip(found, asks, strict=True)
        ]

        def all_told() -> bool:
            return all(tap.read or task.done() for tap, task in zip(found, asking, strict=True))

        await lab.until(all_told)
        lab.release("go")
        if release:
            await lab.until(lambda: all(then in tap.read for tap in found))
            lab.release(release)
        return list(zip(found, await asyncio.gather(*asking, return_exceptions=True), strict=True))


async def test_streams_begin_with_where_they_stand(lab):
    asleep(lab)
    kinds = [(which, {"sse": 5, "sse_body": body, "hold": "answer"}) for which in BOTH for body in (False, True)]
    text = "".join(f"t{n} " for n in range(5))
    asks = [(which, "stream", do) for which, do in kinds]
    found = await ask(lab, *asks, then=b": llmux waiting for the engine's first byte\n", release="answer")
    for (which, _), (client, events) in zip(kinds, found, strict=True):
        if which == "openai":
            assert "".join(event.choices[0].delta.content for event in events) == text
        else:
            assert "".join(event.text for event in events if event.type == "text") == text
        assert (b'event: ping\ndata: {"type": "ping"}\n\n' in client.read) is (which == "anthropic")
        assert client.head["status"] == "200"
        assert client.head["content-type"].startswith("text/event-stream")
        assert int(client.head["x-llmux-expected-seconds"]) >= 1
        assert float(client.head["x-llmux-queue-seconds"]) > 0
        assert client.head["x-request-id"]
    positions = {int(COMMENT.search(client.read)[1]) for client, _ in found}
    assert positions <= {1, 2, 3, 4}


def encoded(*parts: bytes) -> list[str]:
    return [base64.b64encode(part).decode() for part in parts]


ANSWERS = {
    "openai": b'{"id": "x", "object": "chat.completion", "created": 0, "model": "a", "choices": []}',
    "anthropic": b'{"id": "x", "type": "message", "role": "assistant", "model": "a", "content": []}',
}


async def test_json_begins_with_blanks(lab):
    asleep(lab)
    kinds = [
        (which, do)
        for which, body in ANSWERS.items()
        for do in ({"chunks": encoded(body[:9], body[9:])}, {"body": encoded(body)[0]})
    ]
    for (which, _), (client, message) in zip(
        kinds, await ask(lab, *((which, "whole", do) for which, do in kinds)), strict=True
    ):
        assert message.id == "x"
        assert client.read.strip() == ANSWERS[which]
        assert client.read.startswith(b"\n")
        assert client.head["content-type"] == "application/json"
    # What is awake is answered as ever.
    plain = await lab.chat("a", do={"headers": [["X-Engine", "1"]]})
    assert plain.get("X-Engine") == "1"
    assert plain.get("X-LLMux-Expected-Seconds") is None


RAISED = {"openai": openai.APIError, "anthropic": anthropic.APIStatusError}
UNREACHED = {"openai": openai.APIConnectionError, "anthropic": anthropic.APIConnectionError}


async def test_after_a_failed_wake_both_sdks_raise(lab):
    lab.write("a", **FAST)
    lab.script("a", "wake", lab.hold("go") + "; exit 1")
    lab.start()
    kinds = [(which, how) for which in BOTH for how in ("stream", "whole")]
    found = await ask(lab, *((which, how, {}) for which, how in kinds))
    for (which, how), (client, error) in zip(kinds, found, strict=True):
        if how == "stream":
            assert isinstance(error, RAISED[which]), error
            assert "wake" in str(error)
        else:  # broken off; whoever looks finds the error in it
            assert isinstance(error, UNREACHED[which]), error
            assert "wake" in json.loads(client.read)["error"]["message"]
    metrics = await lab.metrics()
    assert metrics['llmux_requests_total{model="a",status="503"}'] == len(kinds)
    assert metrics['llmux_requests_rejected_total{code="wake_failed",model="a"}'] == len(kinds)


GZIP = {
    "body": base64.b64encode(b"x").decode(),
    "headers": [["Content-Type", "text/event-stream"], ["Content-Encoding", "gzip"]],
}
WRONG = [
    ({"status": 400, "body": encoded(b'{"error": {"message": "too long a prompt"}}')[0]}, "too long a prompt"),
    ({"status": 500, "body": encoded(b"plain\nwords")[0]}, "plain"),
    ({"status": 500, "chunks": encoded(b'{"error": {"messa', b'ge": "in chunks"}}')}, "in chunks"),
    ({"status": 500, "body": encoded(b'{"error": "short"}')[0]}, "short"),
    ({"status": 200}, "not with an event stream"),
    (GZIP, "not with an event stream"),
    ({"fail": "reset"}, "engine"),
    ({"sse": 5, "fail": "reset", "fail_after": 3}, "engine"),
    ({"sse": 5, "fail": "eof", "fail_after": 3, "sse_body": True}, "engine"),
]


async def test_what_the_engine_does_wrong_is_an_error_event_or_breaks_json_off(lab):
    asleep(lab)
    streams = [(which, "stream", do, words) for which in BOTH for do, words in WRONG]
    kinds = [*streams, *((which, "whole", do, words) for which, _, do, words in streams if "sse" not in do)]
    found = await ask(lab, *(kind[:3] for kind in kinds))
    for (which, how, do, words), (client, error) in zip(kinds, found, strict=True):
        if how == "stream":
            assert isinstance(error, RAISED[which]), (do, error)
            assert words in str(error), (do, error)
        elif do == {"status": 200}:
            assert error.id == "x"
        else:
            assert isinstance(error, UNREACHED[which]), (do, error)
            said = json.loads(client.read)
            assert words.replace("an event stream", "JSON as it is") in json.dumps(said), do
            assert "error" in said


async def test_a_client_that_tries_again_gets_its_answer(lab):
    lab.write("a", **FAST)
    lab.script("a", "wake", lab.hold("go") + "; exit 1", times=1)
    lab.start()
    async with taps(lab, retries=4) as (tap,):
        asking = asyncio.create_task(tap.whole("openai", {}))
        await lab.until(lambda: tap.read)
        lab.release("go")
        assert (await asking).id == "x"


async def test_an_sdk_passes_over_interim_responses(lab):
    asleep(lab, progress=False)
    async with taps(lab) as (tap,):
        create = tap.one.chat.completions.with_raw_response.create
        headers = {"X-LLMux-Progress": "1xx"}
        asking = asyncio.create_task(create(model="a", messages=HELLO, extra_headers=headers))
        await lab.until(lambda: tap.raw.count(b"HTTP/1.1 102 Processing\r\n") > 1)
        lab.release("go")
        answer = await asking
        assert answer.parse().id == "x"
        assert int(answer.headers["x-llmux-expected-seconds"]) >= 1


async def test_a_drain_deadline_is_told_inside(lab):
    lab.write("a b", policy={"drain_timeout": "50ms"}, **FAST)
    lab.script("a", "wake", lab.hold("go"))
    lab.start()
    async with taps(lab) as (tap,):
        asking = asyncio.create_task(tap.stream("openai", {"hold": "never"}))
        await lab.until(lambda: tap.read)
        lab.release("go")
        await lab.until_phase("a", "AWAKE")
        other = asyncio.create_task(lab.chat("b"))
        with pytest.raises(openai.APIError, match="make room"):
            await asking
        assert (await other).status == 200
