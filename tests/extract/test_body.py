"""Bodies read from real clients through a real server."""

import asyncio
import contextlib
import gzip
import json
import os
import tempfile

import pytest
from aiohttp import web

from llmux.errors import LLMuxError, RequestError, UnavailableError
from llmux.extract import SLICE, Body, BodyBudget, BodyLimits, ModelField, model_of, read_body
from llmux.extract.body import MEMORY, Store
from llmux.extract.json_object import members_of
from tests.harness.waiting import PATIENCE

MIB = 1024 * 1024


class Server:
    """Answers with what it made of the body; keeps the last outcome."""

    def __init__(self):
        self.limits = BodyLimits(max_body=4 * MIB, max_buffered=6 * MIB, idle_timeout=30)
        self.budget = BodyBudget(self.limits.max_buffered)
        self.outcomes = asyncio.Queue()
        self.hold = asyncio.Event()
        self.hold.set()
        self.seen = asyncio.Queue()
        self.rename = None
        self.port = 0

    async def handle(self, request):
        self.seen.put_nowait(request)
        try:
            body = await read_body(request, self.limits, self.budget)
        except RequestError as error:
            self.outcomes.put_nowait(error)
            return web.Response(status=error.status, text=error.code)
        with body:
            assert self.budget.held == body._store.size
            await self.hold.wait()
            try:
                name = model_of(body, request.rel_url.raw_query_string)
            except RequestError as error:
                name = error.code
            sent = body if self.rename is None else await body.renamed(self.rename)
            plain = b"".join(sent)
            assert plain == b"".join([data async for data in sent])
            assert all(len(data) <= SLICE for data in sent)
            assert len(plain) == sent.size
            assert sent.single == (plain if len(plain) <= SLICE else None)
            self.outcomes.put_nowait((name, body.spooled, sent.model))
        body.close()
        return web.Response(body=plain, headers={"X-Model": name})


@pytest.fixture
async def server():
    server = Server()
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", server.handle)
    runner = web.AppRunner(app, auto_decompress=False, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.port = runner.addresses[0][1]
    try:
        yield server
    finally:
        await runner.cleanup()
    assert server.budget.held == 0


def head(length=None, path="/v1/x", kind="application/json", more=""):
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n{size}\r\n{more}\r\n".encode()


def chunked(data, size):
    parts = [data[i : i + size] for i in range(0, len(data), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@contextlib.asynccontextmanager
async def connection(server):
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def answer(reader):
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines[1:] if line)
    body = await reader.readexactly(int(headers["Content-Length"]))
    return int(lines[0].split()[1]), headers.get("X-Model"), body


async def exchange(server, *data):
    async with connection(server) as (reader, writer):
        receiving = asyncio.create_task(answer(reader))
        with contextlib.suppress(ConnectionError):
            for part in data:
                writer.write(part)
                await writer.drain()
        return await receiving


async def posted(server, body, **how):
    return await exchange(server, head(len(body), **how), body)


async def test_a_small_body_comes_back_as_it_was(server):
    body = b' {"model" : "m", "x": 1.0}\n'
    assert await posted(server, body) == (200, "m", body)
    assert await server.outcomes.get() == ("m", False, "m")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_json_is_read_whatever_its_content_type(server, kind):
    assert await posted(server, b'{"model":"m"}', kind=kind) == (200, "m", b'{"model":"m"}')


async def test_byte_by_byte_in_chunks(server):
    body = b'{"x":"\\"","mod\\u0065l":"m"}'
    assert await exchange(server, head(), chunked(body, 1)) == (200, "m", body)


@pytest.mark.parametrize("size", [SLICE, SLICE + 1, MEMORY, MEMORY + 1, 3 * MIB])
@pytest.mark.parametrize("name", ["other", "m" * 500, 'q"\u00e9'])
async def test_the_model_is_replaced_in_place(server, size, name):
    server.rename = name
    start, end = b'{"a":"', b'","model":"m","z":1.00}'
    body = start + os.urandom(size).hex().encode()[: size - len(start + end)] + end
    assert len(body) == size
    status, model, back = await posted(server, body)
    assert (status, model) == (200, "m")
    assert back == body.replace(b'"m"', json.dumps(name, ensure_ascii=False).encode())
    assert (await server.outcomes.get())[1] is (size > MEMORY)


async def test_a_form(server):
    server.rename = "n\u00e9w"
    form = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n%b\r\n'
        b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--b--\r\n'
    ) % os.urandom(2 * MIB)
    status, model, back = await posted(server, form, kind="multipart/form-data; boundary=b")
    assert (status, model) == (200, "m")
    assert back == form.replace(b"\r\nm\r\n", "\r\nn\u00e9w\r\n".encode())


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary=b"])
async def test_a_bad_form(server, kind):
    assert await posted(server, b'{"model":"m"}', kind=kind) == (400, None, b"invalid_form")


async def test_a_request_without_a_body(server):
    server.rename = "n"
    get = b"GET /v1/x%b HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data\r\n\r\n"
    assert await exchange(server, get % b"") == (200, "model_required", b"")
    assert await exchange(server, get % b"?model=q") == (200, "q", b"")


async def test_body_before_query(server):
    assert await posted(server, b'{"model":"m"}', path="/v1/x?model=q") == (200, "m", b'{"model":"m"}')
    assert await posted(server, b'{"x":1}', path="/v1/x?model=q") == (200, "q", b'{"x":1}')
    assert await posted(server, b"[1]", path="/v1/x?model=q") == (200, "q", b"[1]")
    assert await posted(server, b"[1]") == (200, "model_required", b"[1]")
    assert await posted(server, b'{"model":1}', path="/v1/x?model=q") == (400, None, b"bad_request")


async def test_a_compressed_body_is_left_alone(server):
    server.rename = "n"
    body = gzip.compress(b'{"model":"m"}')
    more = "Content-Encoding: gzip\r\n"
    assert await posted(server, body, more=more) == (200, "compressed_body", body)
    assert await posted(server, body, more=more, path="/?model=q") == (200, "q", body)
    assert await posted(server, b'{"model":"m"}', more="Content-Encoding: identity\r\n") == (
        200,
        "m",
        b'{"model":"n"}',
    )


async def test_an_announced_body_that_is_too_large_is_refused_unread(server):
    assert await exchange(server, head(4 * MIB + 1)) == (413, None, b"body_too_large")


async def test_a_chunked_body_that_is_too_large(server):
    body = b"x" * (4 * MIB)
    assert (await exchange(server, head(), chunked(body, 100_000)))[0] == 200
    assert await exchange(server, head(), chunked(body + b"x", 100_000)) == (413, None, b"body_too_large")


async def test_malformed_json_is_refused(server):
    assert await posted(server, b'{"model":"m"') == (400, None, b"invalid_json")
    body = b'{"model":"m"}' + b" " * MIB * 2 + b"x"
    assert await posted(server, body) == (400, None, b"invalid_json")
    assert server.budget.held == 0


async def test_all_bodies_together_are_bounded(server):
    server.hold.clear()
    body = b'{"model":"m"}' + b" " * (4 * MIB - 13)
    first = asyncio.create_task(posted(server, body))
    while server.budget.held < len(body):  # noqa: ASYNC110 (the budget has no event to wait for)
        await asyncio.sleep(0.01)
    assert await posted(server, body) == (503, None, b"bodies_full")
    error = await server.outcomes.get()
    assert isinstance(error, UnavailableError)
    assert error.retry_after
    assert server.budget.held == len(body)
    server.hold.set()
    assert await first == (200, "m", body)


@pytest.mark.parametrize("sent", [b"", b'{"model":', b'{"model":"m"' + b" " * MIB * 2])
async def test_a_silent_client_gets_408(server, sent):
    server.limits = BodyLimits(idle_timeout=0.1)
    assert await exchange(server, head(3 * MIB), sent) == (408, None, b"request_timeout")
    assert server.budget.held == 0


async def test_a_slow_client_is_no_silent_one(server):
    server.limits = BodyLimits(idle_timeout=2.0)
    body = b'{"model":"m"}'
    async with connection(server) as (reader, writer):
        writer.write(head(len(body)))
        for start in range(0, len(body), 2):
            await asyncio.sleep(0.35)
            writer.write(body[start : start + 2])
        assert await answer(reader) == (200, "m", body)


@pytest.mark.parametrize("sent", [b"", b'{"model":', b'{"model":"m"' + b" " * MIB * 2])
async def test_a_client_that_leaves(server, sent):
    async with connection(server) as (_, writer):
        writer.write(head(3 * MIB) + sent)
        await writer.drain()
        await server.seen.get()
        while server.budget.held < len(sent):  # noqa: ASYNC110 (the budget has no event to wait for)
            await asyncio.sleep(0.01)
    error = await asyncio.wait_for(server.outcomes.get(), PATIENCE)
    assert error.code == "incomplete_body"
    assert server.budget.held == 0


async def test_broken_chunks_end_like_silence(server):
    # The server's parser does not tell the body's reader: it waits in vain.
    server.limits = BodyLimits(idle_timeout=0.1)
    async with connection(server) as (_, writer):
        writer.write(head() + b"1\r\n{\r\n")
        await server.seen.get()
        writer.write(b"zz\r\n")
        error = await asyncio.wait_for(server.outcomes.get(), PATIENCE)
    assert error.code == "request_timeout"


async def test_a_reader_that_is_cancelled_holds_nothing(server):
    async with connection(server) as (_, writer):
        writer.write(head(3 * MIB) + b"x" * MIB * 2)
        request = await server.seen.get()
        while server.budget.held < 2 * MIB:  # noqa: ASYNC110 (the budget has no event to wait for)
            await asyncio.sleep(0.01)
        request.task.cancel()
        while server.budget.held:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_full_disk(server, monkeypatch):
    class Full:
        def write(self, _data):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    assert (await posted(server, b"x" * 2 * MIB))[::2] == (503, b"bodies_full")


async def test_no_folder_for_the_file(server, monkeypatch):
    def refuse(**_):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert (await posted(server, b"x" * 2 * MIB))[::2] == (503, b"bodies_full")


class Turns:
    """Counts the turns of the loop that another task gets."""

    def __init__(self):
        self.count = 0

    async def __aenter__(self):
        self._task = asyncio.create_task(self._take())
        return self

    async def __aexit__(self, *_):
        self._task.cancel()

    async def _take(self):
        while True:
            await asyncio.sleep(0)
            self.count += 1


async def test_others_get_their_turn_while_a_large_body_is_read(server):
    server.limits = BodyLimits()
    server.budget.max_buffered = 64 * MIB
    body = b'{"messages":[%b{}],"model":"m"}' % (b'{"role":"user","content":"hi"},' * 300_000)
    async with connection(server) as (_, writer):
        writer.write(head(len(body)))
        async with Turns() as turns:
            writer.write(body)
            outcome = await asyncio.wait_for(server.outcomes.get(), 20)
    assert outcome[:2] == ("m", True)
    assert turns.count > 20


async def test_a_view_shares_and_is_replaced_again():
    budget = BodyBudget(100)
    store = Store(budget)
    store.add(b'{"model":')
    store.add(b'"m"}')
    body = Body(store, ModelField("m", 9, 12))
    first = await body.renamed("long name")
    second = await first.renamed("n")
    assert (body.single, first.single, second.single) == (
        b'{"model":"m"}',
        b'{"model":"long name"}',
        b'{"model":"n"}',
    )
    assert (body.model, first.model, second.model) == ("m", "long name", "n")
    assert (body.size, first.size, second.size) == (13, 21, 13)
    second.close()
    first.close()
    assert budget.held == 0
    with pytest.raises(ValueError, match="closed"):
        _ = body.single


async def test_a_model_that_takes_long_to_find_holds_nobody_up():
    keys = ",".join(f'"\\u006b{number}":1' for number in range(60_000))
    data = f'{{"x":{{"model":"y"}},"model":"m",{keys}}}'.encode()
    store, members = Store(BodyBudget(2 * MIB)), members_of(data)
    assert members is not None
    store.add(data)
    with Body(store, None, members=members) as body:
        async with Turns() as turns:
            renamed = await body.renamed("new")
        assert turns.count > 10
        assert b"".join(renamed) == data.replace(b'"m"', b'"new"')
        assert renamed.model == "new"


def test_errors_are_of_the_tree():
    with pytest.raises(LLMuxError):
        BodyBudget(1).take(2)
