"""What needs no sockets: addresses, envelopes, the chunk tracker against every split."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmux.errors import EngineError, UnavailableError
from llmux.proxy import error_response
from llmux.proxy.exchange import path_of
from llmux.proxy.heads import response_head
from llmux.upstream import EngineAddress, EngineConnection, EngineLostError, EngineProtocolError
from llmux.upstream import connection as connection_module
from llmux.upstream.head import ChunkTracker, Framing, ResponseHead, are_chunks, is_one_chunk, parse_head


@pytest.mark.parametrize(
    ("url", "expected", "host"),
    [
        ("http://127.0.0.1:8001", EngineAddress("127.0.0.1", 8001), b"127.0.0.1:8001"),
        ("http://box/", EngineAddress("box", 80), b"box"),
        ("https://box", EngineAddress("box", 443, tls=True), b"box"),
        ("https://box:80/a/b/", EngineAddress("box", 80, tls=True, base_path="/a/b"), b"box:80"),
        ("http://[::1]:8001", EngineAddress("::1", 8001), b"[::1]:8001"),
    ],
)
def test_an_address_from_a_url(url: str, expected: EngineAddress, host: bytes) -> None:
    address = EngineAddress.from_url(url)
    assert address == expected
    assert address.host_header == host
    assert str(address) == url.rstrip("/")


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:1",
        "ftp://a",
        "http://",
        "http://a:b@c",
        "http://a?x",
        "http://a#x",
        "http://a/ü",
        "http://a:99999",
    ],
)
def test_urls_that_are_no_address(url: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011, each has its own words
        EngineAddress.from_url(url)


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"/a?b", b"/a?b"),
        (b"http://h/a", b"/a"),
        (b"http://h", b"/"),
        (b"*", b"*"),
        (b"http://h/http://x", b"/http://x"),
    ],
)
def test_the_path_of_a_target(target: bytes, path: bytes) -> None:
    assert path_of(target) == path


async def test_openais_envelope() -> None:
    response = error_response(
        UnavailableError("wait", code="faulted", retry_after=1.2), anthropic=False, headers=[("X-Request-ID", "r")]
    )
    assert response.status == 503
    assert response.headers["Retry-After"] == "2"
    assert response.headers["X-Request-ID"] == "r"
    assert response.content_type == "application/json"
    assert isinstance(response.body, bytes)
    assert json.loads(response.body) == {
        "error": {"message": "wait", "type": "service_unavailable", "code": "faulted", "param": None}
    }


async def test_anthropics_envelope() -> None:
    response = error_response(EngineError("broke"), anthropic=True, headers=[("X-Request-ID", "r")])
    assert response.status == 502
    assert "Retry-After" not in response.headers
    assert isinstance(response.body, bytes)
    assert json.loads(response.body) == {
        "type": "error",
        "error": {"type": "api_error", "message": "broke"},
        "request_id": "r",
    }


@pytest.mark.parametrize("retry_after", [0.0, 0.2, 1.0])
async def test_retry_after_is_at_least_a_second(retry_after: float) -> None:
    response = error_response(UnavailableError("x", retry_after=retry_after), anthropic=False)
    assert response.headers["Retry-After"] == "1"


BODY = b"5;a=b\r\nhello\r\n1\r\n\n\r\nB\r\n0123456789\r\r\n000\r\nX: y\r\nZ: \r\n\r\n"
BOUNDARIES = {0, 14, 20, 36}


def test_the_tracker_finds_the_same_end_and_the_same_boundaries_however_the_body_is_split() -> None:
    for first in range(len(BODY) + 1):
        for second in range(first, len(BODY) + 1):
            tracker = ChunkTracker()
            payload: list[bytes] = []
            ends = []
            offset = 0
            for part in (BODY[:first], BODY[first:second], BODY[second:] + b"rest"):
                if not ends and part:
                    end = tracker.feed(part, payload)
                    if end >= 0:
                        ends.append(offset + end)
                    else:
                        assert tracker.between_chunks is (offset + len(part) in BOUNDARIES)
                offset += len(part)
            assert ends == [len(BODY)]
            assert b"".join(payload) == b"hello\n0123456789\r"


def test_the_tracker_byte_by_byte() -> None:
    tracker = ChunkTracker()
    for number in range(len(BODY) - 1):
        assert tracker.feed(BODY[number : number + 1]) == -1
        assert tracker.between_chunks is (number + 1 in BOUNDARIES)
    assert tracker.feed(BODY[-1:]) == 1


@given(
    st.binary(max_size=40) | st.builds(lambda body: b"%x\r\n%b\r\n" % (len(body), body), st.binary(max_size=40))
)
@example(b"0\r\n\r\n")
@example(b"5\r\nabcdef\r\n")
@example(b"5\r\nab\r\n1\r\na\r\n")
@example(b"05\r\nabcde\r\n")
@example(b"+5\r\nabcde\r\n")
@example(b"")
@example(b"\r\n")
@example(b"-" * 4101 + b"\r\n")
@example(b"3e8\r\n" + b"x" * 999 + b"\n\r")
def test_what_counts_as_one_chunk_is_one(data):
    if is_one_chunk(data):
        tracker = ChunkTracker()
        contents: list[bytes] = []
        assert tracker.feed(data, contents) == -1
        assert tracker.between_chunks
        assert len(contents) == 1
        assert contents[0]


CHUNKS = st.binary(max_size=40).map(lambda body: b"%x\r\n%b\r\n" % (len(body), body))


@given(st.lists(CHUNKS, min_size=1, max_size=4).map(b"".join), st.data())
@example(b"1\r\na\r\n1\r\nb\r\n", None)
@example(b"5\r\nab\r\n1\r\na\r\n", None)
@example(b"1\r\na\r\n0\r\n\r\n", None)
@example(b"1\r\na\n\r", None)
@example(b"1\r", None)
@example(b"5\r\nabcd\n\r\na!", None)
@example(b"a\r\n12345678\r\n\r\na!", None)
@example(b"", None)
def test_what_counts_as_whole_chunks_is_that(data, change):
    if change is not None and change.draw(st.booleans()):
        at = change.draw(st.integers(0, len(data) - 1))
        data = data[:at] + change.draw(st.binary(max_size=2)) + data[at + change.draw(st.integers(0, 2)) :]
    if are_chunks(data):
        tracker = ChunkTracker()
        assert tracker.feed(data) == -1
        assert tracker.between_chunks


@given(st.lists(st.binary(min_size=1, max_size=4095), min_size=1, max_size=5))
def test_chunks_as_they_usually_are_count_as_such(bodies):
    assert are_chunks(b"".join([b"%x\r\n%b\r\n" % (len(body), body) for body in bodies]))


@given(st.binary(min_size=1, max_size=4095))
def test_a_chunk_as_they_usually_are_counts_as_one(body):
    assert is_one_chunk(b"%x\r\n%b\r\n" % (len(body), body))


HEAD = b"HTTP/1.1 200 OK\r\nServer: x\r\nContent-Length: %b\r\nX-A: Content-Length: 3\r\n\r\n"


@pytest.mark.parametrize("name", [b"Content-Length", b"content-length", b"CONTENT-LENGTH", b"Content-length"])
@pytest.mark.parametrize("value", [b"0", b"7", b"00012", b"123456789012345"])
def test_the_head_of_an_answer_is_written_as_it_came_whatever_its_length(name, value):
    data = (HEAD % value).replace(b"Content-Length", name, 1)
    for _ in range(2):  # the second one is known
        head, length = parse_head(data, to_head_request=False, upgrade=False)
        assert head is not None
        assert (head.framing, length) == (Framing.LENGTH, value)
        assert response_head(head, length, extra=[], chunked=False, connection=None) == data


@pytest.mark.parametrize(
    "fields",
    [
        b"Content-Length: 3\r\nContent-Length: 3\r\n",
        b"Content-Length: 3\r\ncontent-length: 4\r\n",
        b"Content-Length: 3x\r\n",
        b"Content-Length: -3\r\n",
        b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n",
        b"Content-Length: 99999999999999999999\r\n",
    ],
)
def test_a_length_that_says_nothing_clear_is_refused_each_time(fields):
    for _ in range(2):
        with pytest.raises(EngineProtocolError):
            parse_head(b"HTTP/1.1 200 OK\r\n%b\r\n" % fields, to_head_request=False, upgrade=False)


@pytest.mark.parametrize("before", [b"\r\n", b"\r", b"\n\n", b" "])
def test_nothing_may_stand_before_the_head_of_an_answer(before):
    with pytest.raises(EngineProtocolError, match="not HTTP"):
        parse_head(before + b"HTTP/1.1 200 OK\r\n\r\n", to_head_request=False, upgrade=False)


class Sink:
    """Notes what a connection tells of an answer."""

    def __init__(self) -> None:
        self.told: list[object] = []
        self.body = b""

    def response_started(self, head: ResponseHead) -> None:
        self.told.append((head.status, head.framing, head.keep_alive, head.fields))

    def response_data(self, data: bytes) -> None:
        self.body += data

    def response_ended(self) -> None:
        self.told.append("ended")

    def response_lost(self, error: Exception) -> None:
        self.told.append(repr(error))


class Wire:
    """A transport that takes what it is given."""

    def __init__(self) -> None:
        self.closing = False

    def write(self, data: bytes) -> None:
        pass

    def abort(self) -> None:
        self.closing = True

    def is_closing(self) -> bool:
        return self.closing

    def get_extra_info(self, _name: str) -> None:
        return None


def answered(
    connection: EngineConnection, pieces: list[bytes], *, to_head_request: bool = False, told: bytes = b""
) -> tuple[Any, ...]:
    """Return what a connection makes of one more answer."""
    sink = Sink()
    connection.begin(sink, head_request=to_head_request, told=told)
    connection.write_whole(b"request")
    for piece in pieces:
        connection.data_received(piece)
    length = connection.length if isinstance(next(iter(sink.told), None), tuple) else b""
    return sink.told, sink.body, length, connection.reusable, connection._sink is sink


def connected(loop: asyncio.AbstractEventLoop) -> EngineConnection:
    connection = EngineConnection(loop)
    connection.connection_made(Wire())  # type: ignore[arg-type]
    return connection


LENGTHS = ["", "0", "2", "02", "2x", "x", "-2", "999999999999999", "1" * 16, "2\r\nContent-Length: 2", "2 "]
HEADS = st.builds(
    lambda status, name, after: f"HTTP/1.1 {status}\r\nServer: x\r\n{name}\r\n{after}\r\n".encode(),
    st.sampled_from(["200 OK", "204 No", "404 Not Found", "100 Continue"]),
    st.sampled_from(
        ["Content-Length: {}", "content-length:{}", "CONTENT-LENGTH: {}", "X-A: {}", "Transfer-Encoding: chunked"]
    ),
    st.sampled_from(["", "X-B: 1\r\n", "Content-Length: 2\r\n", "Connection: close\r\n"]),
)
ANSWERS = st.tuples(st.sampled_from(LENGTHS), st.booleans(), st.integers(0, 200))
BODIES = st.sampled_from([b"", b"ok", b"okay", b"2\r\nok\r\n0\r\n\r\n", b"2\r\nok\r\n"])


@settings(max_examples=400)
@given(HEADS, BODIES, st.lists(ANSWERS, min_size=2, max_size=4), HEADS, st.integers(0, 3))
@example(b"HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", b"ok", [("2", False, 0), ("2x", False, 0)], b"", 9)
@example(b"HTTP/1.1 200 OK\r\nCONTENT-LENGTH: {}\r\n\r\n", b"ok", [("2", False, 0)] * 2, b"", 9)
def test_a_head_means_the_same_to_a_connection_that_has_seen_one_like_it(head, body, answers, other, at):
    """Whatever came before on a connection, it makes of an answer what a fresh one makes of it."""
    loop = asyncio.new_event_loop()
    try:
        used = connected(loop)
        for number, (length, to_head_request, cut) in enumerate(answers):
            whole = (other if number == at else head).replace(b"{}", length.encode()) + body
            pieces = [piece for piece in (whole[:cut], whole[cut:]) if piece]
            found = answered(used, pieces, to_head_request=to_head_request)
            assert found == answered(connected(loop), pieces, to_head_request=to_head_request)
            if not used.reusable or found[-1]:  # it would not be used again
                break
    finally:
        loop.close()


ECHO = b"POST / HTTP/1.1\r\nX-Request-ID: mine\r\n\r\n"


@settings(max_examples=400)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "X-Request-ID: mine\r\n", "x-request-id: mine\r\n", "X-A: mine\r\n"]),
            st.sampled_from(["Content-Length: {}\r\n", "Content-Length: {}\r\nX-Request-ID: mine\r\n"]),
            st.sampled_from([b"ok", b"mine", ECHO, b"\r\n" + ECHO, ECHO[17:], b"\n" + ECHO[17:]]),
            st.lists(st.integers(1, 120), max_size=2),
        ),
        min_size=2,
        max_size=3,
    )
)
@example(
    [("X-Request-ID: mine\r\n", "Content-Length: {}\r\n", b"ok", []), ("", "Content-Length: {}\r\n", ECHO, [17])]
)
def test_an_answer_loses_the_id_in_its_head_and_nothing_else(answers):
    """However it is split, and whatever the answers before it on the connection were."""
    loop = asyncio.new_event_loop()
    try:
        used = connected(loop)
        for before, after, body, cuts in answers:
            head = f"HTTP/1.1 200 OK\r\n{before}{after.format(len(body))}\r\n".encode()
            whole = head + body
            at = [0, *sorted(cuts), len(whole)]
            pieces = [piece for start, end in itertools.pairwise(at) if (piece := whole[start:end])]
            told, read, *_ = answered(used, pieces, told="mine")
            assert (told[-1], read) == ("ended", body)
    finally:
        loop.close()


def test_a_head_that_comes_again_is_not_parsed_again(monkeypatch):
    """But for the length, which may be another; after a request for a head alone it is parsed once more."""
    parsed = []
    parse = connection_module.parse_head

    def noted(data, **options):
        parsed.append(data)
        return parse(data, **options)

    monkeypatch.setattr(connection_module, "parse_head", noted)
    loop = asyncio.new_event_loop()
    try:
        used = connected(loop)
        for body in (b"ok", b"a longer one", b"", b"ok"):
            data = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nX-A: 1\r\n\r\n%b" % (len(body), body)
            told, read, length, reusable, _ = answered(used, [data])
            assert (told[-1], read, int(length), reusable) == ("ended", body, len(body), True)
        assert len(parsed) == 1
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-A: 1\r\n\r\n"
        assert answered(used, [head], to_head_request=True)[0][-1] == "ended"
        assert answered(used, [head], to_head_request=False)[0][-1] != "ended"
    finally:
        loop.close()
    assert len(parsed) == 3


@pytest.mark.parametrize("paused", [False, True])
def test_a_connection_whose_request_was_not_read_is_not_used_again(paused):
    """An engine may answer before it has read all, and never read the rest."""
    loop = asyncio.new_event_loop()
    try:
        connection, sink = connected(loop), Sink()
        connection.begin(sink, whole=[b"large"])
        if paused:
            connection.pause_writing()
        connection.data_received(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
    finally:
        loop.close()
    assert (sink.told[-1], sink.body, connection.reusable) == ("ended", b"no", not paused)


@pytest.mark.parametrize("paused", [False, True])
def test_a_request_that_was_not_sent_to_its_end_is_stale_however_late(paused, monkeypatch):
    """An engine that reads a large one slowly may die in the midst of it: it has not begun with it."""
    monkeypatch.setattr(connection_module, "STALE_WITHIN", 0.0)
    loop = asyncio.new_event_loop()
    try:
        connection, sink = connected(loop), Sink()
        connection.pooled = True
        connection.begin(sink, whole=[b"large"])
        if paused:
            connection.pause_writing()
        connection.connection_lost(None)
    finally:
        loop.close()
    assert "EngineLostError" in str(sink.told)
    assert connection.was_stale(EngineLostError("gone")) is paused
    assert connection.taken is not paused
