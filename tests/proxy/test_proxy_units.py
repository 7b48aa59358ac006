"""What needs no sockets: addresses, envelopes, the chunk tracker against every split."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmux.errors import EngineError, UnavailableError
from llmux.proxy import error_response
from llmux.proxy.exchange import path_of
from llmux.proxy.heads import response_head
from llmux.upstream import EngineAddress, EngineProtocolError
from llmux.upstream.head import ChunkTracker, Framing, are_chunks, is_one_chunk, parse_head


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
