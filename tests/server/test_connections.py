"""Connections of which nothing comes, and what goes on when there are too many."""

from __future__ import annotations

import asyncio
import resource
import socket

import pytest

from llmux import process, server
from llmux.app import build_app
from llmux.config.gateway import GatewayConfig
from llmux.gateway.service import build_gateway
from llmux.upstream import native, sockets
from tests.server.house import House, Log, message, until

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
SHORT = {"header_timeout": "200ms", "keepalive_timeout": "1h"}
IDLE = {"header_timeout": "1h", "keepalive_timeout": "200ms"}
LONG = {"header_timeout": "1h", "keepalive_timeout": "1h"}  # until what has to be in time has been


@pytest.fixture
async def house(tmp_path):
    async with asyncio.timeout(60), House(tmp_path) as found:
        found.up("a")
        yield found


async def until_told(house) -> None:
    await until(lambda: house.log.named("too_many_connections"))


@pytest.mark.parametrize(
    "sent", [b"", b"\r\n", b"P", b"POST /v1/chat", HEAD, HEAD + b"X-Y: z", b"GET /health HTTP/1.1"]
)
async def test_a_head_that_does_not_come_closes_the_connection(house, sent):
    await house.open("a", **SHORT)
    line = await house.line()
    line.send(sent)
    answer = await line.closed()
    assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n") if sent else answer == b""


async def test_half_a_head_behind_a_whole_request_is_due_from_the_answer_on(house):
    await house.open("a", **LONG)
    line = await house.line()
    line.send(message("GET", "/v1/models") + b"GET /v1/mo")
    assert (await line.reply()).status == 200
    house.switcher.replace(house.config("a", **SHORT))
    assert (await line.closed()).startswith(b"HTTP/1.1 408 Request Timeout\r\n")


@pytest.mark.parametrize("first", ["fast path", "aiohttp", "none"])
async def test_a_head_that_is_dripped_is_cut_whatever_comes(house, first):
    await house.open("a", **LONG)
    line = await house.line()
    if first == "fast path":
        line.send(message("POST", "/v1/chat/completions", {"model": "a"}))
    elif first == "aiohttp":
        line.send(message("GET", "/v1/models"))
    if first != "none":
        assert (await line.reply()).status == 200
    house.switcher.replace(house.config("a", **SHORT))
    line.send(HEAD + b"X-Long: ")

    async def drip():
        while True:
            line.send(b"x")
            await asyncio.sleep(0.01)

    dripping = asyncio.create_task(drip())
    await line.closed()  # what comes after the close may reset it before the 408 is read
    dripping.cancel()


@pytest.mark.parametrize("how", ["fast path", "aiohttp"])
async def test_an_idle_connection_is_closed_after_its_answer(house, how):
    await house.open("a", **LONG)
    line = await house.line()
    for _ in range(3):
        fast = message("POST", "/v1/chat/completions", {"model": "a"})
        line.send(fast if how == "fast path" else message("GET", "/v1/models"))
        assert (await line.reply()).status == 200
    house.switcher.replace(house.config("a", **IDLE))
    assert await line.closed() == b""


async def test_what_is_under_way_is_never_cut(house):
    await house.open("a", **LONG)
    fast = await house.begin("POST", "/v1/hold", {"model": "a"})
    slow = await house.begin("POST", "/v1/hold", {"model": "a"}, Expect="100-continue")
    stream = await house.begin("POST", "/v1/stream", {"model": "a"})
    socket = await house.begin(
        "GET", "/v1/realtime?model=a", Connection="Upgrade", Upgrade="websocket", Sec_WebSocket_Key="x" * 24
    )
    events = await house.begin("GET", "/llmux/events")
    body = b'{"model": "a"}'
    upload = await house.line()
    upload.send(HEAD + b"Content-Length: %d\r\n\r\n" % (len(body) + 2_000_000) + body)
    assert (await stream.head()).status == 200
    assert (await socket.head()).status == 101
    assert (await events.head()).status == 200
    house.switcher.replace(house.config("a", header_timeout="500ms", keepalive_timeout="500ms"))
    for _ in range(100):
        upload.send(b" " * 20_000)
        await asyncio.sleep(0.01)
    silent = await house.line()
    assert await silent.closed() == b""  # the others have been looked at meanwhile
    assert (await upload.reply()).status == 200
    for line in (stream, socket, events):
        assert not line.reader.at_eof()
    house.engine.go.set()
    assert (await fast.reply()).status == 200
    assert (await slow.reply()).status in {100, 200}


def test_a_client_whose_machine_is_gone_is_noticed_within_minutes():
    with process._listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        listener.setblocking(True)
        with listener.accept()[0] as ours:
            assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            idle, every, probes = (
                ours.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            assert idle + every * probes <= 120


def test_a_kernel_without_the_options_of_probes(monkeypatch):
    monkeypatch.setattr(sockets, "_KEPT_ALIVE", [(9999, 1)])  # no kernel has it
    with process._listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        pass


async def test_an_answer_that_is_not_taken_counts_as_idle(house):
    await house.open("a", **IDLE)
    line = await house.line()
    line.writer.transport.pause_reading()
    line.send(message("GET", "/metrics") * 300)  # more than sockets hold
    connections = house._runner.server._connections
    await until(lambda: not connections)


async def test_when_connections_run_out_the_longest_idle_gives_way(house, monkeypatch):
    monkeypatch.setattr(server, "SETTLED", 0.0)
    await house.open("a", max_connections=3)
    lines = []
    for _ in range(3):
        lines.append(await house.line())
        lines[-1].send(message("GET", "/v1/models"))
        assert (await lines[-1].reply()).status == 200
        await asyncio.sleep(0.01)  # the loop's clock may count milliseconds
    lines[0].send(message("GET", "/v1/models"))
    assert (await lines[0].reply()).status == 200
    fourth = await house.chat("a")
    assert fourth.status == 200
    assert await lines[1].closed() == b""  # the first has been used since
    for line in (lines[0], lines[2]):
        line.send(message("GET", "/v1/models"))
        assert (await line.reply()).status == 200


@pytest.mark.parametrize("sent", [b"", HEAD])
async def test_silent_connections_give_way(house, monkeypatch, sent):
    monkeypatch.setattr(server, "SETTLED", 0.0)
    await house.open("a", max_connections=4)
    lines = [await house.line() for _ in range(40)]
    for line in lines:
        line.send(sent)
    for _ in range(5):
        assert (await house.chat("a")).status == 200


async def test_health_and_operators_have_a_reserve(house):
    await house.open("a b", max_connections=2)
    busy = [await house.begin("POST", "/v1/hold", {"model": "a"}) for _ in range(2)]
    await until(lambda: house.in_flight("a") == 2)
    half = []
    for _ in range(2 * server.RESERVE):
        half.append(await house.line())
        half[-1].send(HEAD)
        await half[-1].writer.drain()
    await until_told(house)
    for _ in range(2 * server.RESERVE):
        health = await house.ask("GET", "/health")
        assert (health.status, health.headers["connection"]) == (200, "close")
        assert health.marked
    assert (await house.ask("GET", "/ready")).status == 200
    assert (await house.ask("GET", "/llmux/status")).status == 200
    assert (await house.ask("POST", "/llmux/models/a/pin", {})).status == 202
    assert (await house.ask("POST", "/llmux/models/a/unpin", {})).status == 202
    for refused in (
        await house.chat("a"),
        await house.ask("GET", "/v1/models"),
        await house.ask("GET", "/llmux/events"),
        await house.ask("POST", "/v1/chat/completions", b"x" * 3_000_000),
    ):
        assert (refused.status, refused.error["code"]) == (503, "too_many_connections")
        assert refused.headers["retry-after"] == "1"
        assert refused.marked
    house.engine.go.set()
    for line in busy:
        assert (await line.reply()).status == 200


async def test_the_reserve_is_for_operators_only(house):
    await house.open("a b", max_connections=1, admin_key="secret")
    busy = await house.begin("POST", "/v1/hold", {"model": "a"})
    await until(lambda: house.in_flight("a") == 1)
    assert (await house.ask("POST", "/llmux/models/a/pin", {})).status == 503
    assert (await house.ask("POST", "/llmux/models/a/pin", {}, X_API_Key="secret")).status == 202
    assert (await house.ask("GET", "/health")).status == 200
    house.engine.go.set()
    assert (await busy.reply()).status == 200


async def test_beyond_the_reserve_the_answer_does_not_wait_for_a_request(house, monkeypatch):
    monkeypatch.setattr(server, "RESERVE", 0)
    await house.open("a", max_connections=1)
    busy = await house.begin("POST", "/v1/hold", {"model": "a"})
    await until(lambda: house.in_flight("a") == 1)
    line = await house.line()
    refused = await line.reply()
    assert (refused.status, refused.error["code"], refused.headers["retry-after"]) == (
        503,
        "too_many_connections",
        "1",
    )
    assert await line.closed() == b""
    house.engine.go.set()
    assert (await busy.reply()).status == 200


async def test_a_reload_changes_the_timeouts(house):
    await house.open("a", header_timeout="1h")
    line = await house.line()
    line.send(HEAD)
    await until(lambda: house._runner.server._connections)
    house.switcher.replace(house.config("a", **SHORT))
    assert (await line.closed()).startswith(b"HTTP/1.1 408 ")


class Opener:
    """The native relay's library, which says how many streams it was to be opened for."""

    def __init__(self):
        self.streams = 0

    def relay_open(self, streams, _most_fd):
        self.streams = streams


@pytest.mark.parametrize("given", [None, 60, 440])
@pytest.mark.parametrize("files", [256, 1024, 20_000, 1_000_000])
async def test_streams_that_are_lent_take_no_files_from_connections_and_hooks(house, monkeypatch, files, given):
    opener = Opener()
    monkeypatch.setattr(native, "_library", opener)
    monkeypatch.setattr(native.NativeRelay, "left", 0)
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (files, files))
    app, _ = build_app(house.config(max_connections=given), log=Log())
    limit = server.Runner(app, Log())._limit
    assert native.NativeRelay(asyncio.get_running_loop(), opener)._open() is False
    assert opener.streams == 0 or 2 * limit + server.RESERVED + 2 * opener.streams <= files
    assert (
        opener.streams
        == {
            256: {None: 16, 60: 4, 440: 0}[given],
            1024: 8 if given == 440 else 64,
            20_000: 1250,
            1_000_000: 4096,
        }[files]
    )


@pytest.mark.parametrize("files", [64, 96, 128, 200])
async def test_of_few_open_files_half_are_left_to_all_but_connections(house, monkeypatch, files):
    """Hooks need some: where none can be started, nothing can be put to sleep, and no model answers."""
    monkeypatch.setattr(native.NativeRelay, "left", 0)
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (files, files))
    app, _ = build_app(house.config(), log=Log())
    assert 16 <= server.Runner(app, Log())._limit <= files // 4


async def test_a_gateway_leaves_as_many_files_to_streams_as_a_host(monkeypatch):
    monkeypatch.setattr(native.NativeRelay, "left", 0)
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (1024, 1024))
    given = {"hosts": {"one": {"url": "http://127.0.0.1:3000"}}}
    gateway = build_gateway(GatewayConfig.model_validate(given), log=Log())[0]
    lent = 0 if native.which() == "python" else 64
    assert server.Runner(gateway, Log())._limit == (1024 - server.RESERVED) // 2 - lent
