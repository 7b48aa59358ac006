"""What reads bytes of strangers, each beside a second reader: any bytes, any cuts, the same meaning or an error.

A reader takes arbitrary bytes and raises ``AssertionError`` where the two differ. The first bytes say where the
rest is cut, so that a fuzzer which knows nothing of this finds the cuts as well.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import cast

from aiohttp import http_exceptions
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import HttpRequestParser, RawRequestMessage

from llmux.errors import BadRequestError, EngineError
from llmux.extract import ModelScanner, MultipartScanner
from llmux.extract.model_field import ModelField
from llmux.middleware import fast_head
from llmux.middleware.paths import Kind, Route
from llmux.upstream import EngineConnection, ResponseHead

Reader = Callable[[bytes], None]


def head(data: bytes) -> None:
    """Compare what the fast path reads in a request's head with what aiohttp reads in it."""
    seen, size, whole, _ = fast_head.read(data)
    if not seen.clean or seen.method not in {b"GET", b"POST"}:
        return  # aiohttp reads it
    assert data[:size].count(b"\r\n\r\n") == 1, "there are two heads in one"
    assert data[:size].endswith(b"\r\n\r\n")
    message = _aiohttp(data[:size])
    assert message.method.encode() == seen.method
    assert message.path == seen.target
    assert message.version == (1, 1)
    assert not message.chunked
    assert not message.upgrade
    assert message.should_close == seen.last
    assert not message.compression
    length = message.headers.get("Content-Length")
    assert whole - size == int(length or 0)
    assert (seen.length >= 0) == (length is not None)
    assert message.headers.getall("Host") == [seen.called.decode("latin-1")]
    if not seen.plain:
        return
    known = fast_head.KnownHead(seen, Route(Kind.FORWARD, "/v1/chat/completions"), (), None, {})
    engine = _aiohttp(known.engine_head(b"engine", b"%d" % (whole - size), b"id"))
    assert engine.path == message.path
    ours = {b"host", b"content-length", b"connection", b"x-request-id"}
    assert [field for field in engine.raw_headers if field[0].lower() not in ours] == [
        field for field in message.raw_headers if field[0].lower() not in ours
    ], "the engine is told other fields than the client sent"
    assert engine.headers.getall("Host") == ["engine"]
    assert engine.headers.getall("Content-Length") == [str(whole - size)]
    assert engine.headers.getall("X-Request-ID") == message.headers.getall("X-Request-ID", ["id"])


def _aiohttp(data: bytes) -> RawRequestMessage:
    loop = _loop()
    protocol = BaseProtocol(loop)
    parser = HttpRequestParser(protocol, loop, 2**16, max_line_size=2**16, max_field_size=2**16)
    try:
        messages, _, _ = parser.feed_data(data)
    except http_exceptions.HttpProcessingError as error:
        raise AssertionError(f"aiohttp rejects it: {error}") from error
    assert len(messages) == 1, "to aiohttp it is not one request"
    return cast("RawRequestMessage", messages[0][0])


def body(data: bytes) -> None:
    """Compare the model that is found in JSON, at any cuts, with what the parser of JSON says."""
    cuts, text = _cuts(data)
    found = _scan(ModelScanner(), text, cuts)
    assert found == _scan(ModelScanner(), text, [])
    try:
        meant = json.loads(text)
    except (ValueError, RecursionError):
        return  # the scanner may look at less: who gets the body rejects it
    if not isinstance(meant, dict):
        assert found is None
        return
    if any(key != "model" and key.lower() == "model" for key in meant) and "model" in meant:
        assert isinstance(found, str)
    elif isinstance(meant.get("model"), str) and isinstance(found, ModelField):
        assert found.name == meant["model"]
        assert json.loads(text[found.start : found.end]) == found.name
    elif "model" not in meant:
        assert found is None
    else:
        assert isinstance(found, str), "no name was read as one"


def form(data: bytes) -> None:
    """Compare the model that is found in a form at any cuts with that of the form in one piece."""
    cuts, text = _cuts(data)
    found = _scan(MultipartScanner(b"b"), text, cuts)
    whole = _scan(MultipartScanner(b"b"), text, [])
    assert found == whole
    if isinstance(whole, ModelField):
        assert text[whole.start : whole.end].decode() == whole.name


def _scan(scanner: ModelScanner | MultipartScanner, text: bytes, cuts: list[int]) -> ModelField | str | None:
    at = 0
    try:
        for cut in [*cuts, len(text)]:
            scanner.feed(text[at:cut])
            at = cut
        return scanner.finish()
    except BadRequestError as error:
        return error.code


class _Sink:
    """Writes down what an answer is."""

    def __init__(self) -> None:
        self.head: ResponseHead | None = None
        self.body = b""
        self.end = ""

    def response_started(self, head: ResponseHead) -> None:
        self.head = head

    def response_data(self, data: bytes) -> None:
        assert not self.end
        self.body += data

    def response_ended(self) -> None:
        assert not self.end
        self.end = "ended"

    def response_lost(self, error: EngineError) -> None:
        assert not self.end
        self.end = type(error).__name__


class _Wire:
    """A transport which keeps nothing."""

    def write(self, data: bytes) -> None: ...
    def abort(self) -> None: ...
    def close(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def is_closing(self) -> bool:
        return False

    def get_extra_info(self, _name: str, default: object = None) -> object:
        return default


def answer(data: bytes) -> None:
    """Compare an engine's answer that comes in pieces with the same in one, and its end with its framing."""
    cuts, text = _cuts(data)
    pieces, whole, plain = _answer(text, cuts), _answer(text, []), _answer(text, cuts, unchunk=True)
    assert pieces.end == whole.end
    assert (pieces.head is None) == (whole.head is None)
    assert plain.end == whole.end
    if whole.end == "ended":
        assert pieces.body == whole.body, "the same answer in pieces has other bytes"
        assert len(plain.body) <= len(whole.body)
    else:
        assert whole.body.startswith(pieces.body) or pieces.body.startswith(whole.body)
    assert whole.body in text, "bytes of its own making"


def _answer(text: bytes, cuts: list[int], *, unchunk: bool = False) -> _Sink:
    sink = _Sink()
    connection = EngineConnection(_loop())
    connection.connection_made(cast("asyncio.BaseTransport", _Wire()))
    connection.begin(sink)
    connection.write_whole(b"GET / HTTP/1.1\r\nHost: e\r\n\r\n")
    if unchunk:
        connection.unchunk()
    at = 0
    for cut in [*cuts, len(text)]:
        if at < cut and not sink.end:
            connection.data_received(text[at:cut])
        at = cut
    if not sink.end:
        connection.connection_lost(None)
    return sink


def _cuts(data: bytes) -> tuple[list[int], bytes]:
    """Return where the rest of the bytes is cut, and the rest."""
    if not data:
        return [], b""
    count = data[0] % 8
    text = data[1 + count :]
    return sorted(cut % (len(text) + 1) for cut in data[1 : 1 + count]), text


_LOOPS: list[asyncio.AbstractEventLoop] = []


def _loop() -> asyncio.AbstractEventLoop:
    if not _LOOPS:
        _LOOPS.append(asyncio.new_event_loop())
    return _LOOPS[0]


READERS: dict[str, Reader] = {"head": head, "body": body, "form": form, "answer": answer}

_POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:3000\r\nContent-Length: 14\r\n"
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
_CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
_FILE = b'Content-Disposition: form-data; name="file"; filename="a\\"b"\r\nContent-Type: audio/wav\r\n\r\n'
_MODEL = b"content-disposition:form-data;name=model"
SEEDS: dict[str, list[bytes]] = {
    "head": [
        _POST + b"Content-Type: application/json\r\nAuthorization: Bearer k\r\n\r\n",
        _POST + b"Connection: close\r\nX-Request-ID: a\r\nAccept: */*\r\n\r\n",
        _POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n folded\r\n\r\n",
        b"GET http://other/v1/models?a=b#c HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\nGET / HTTP/1.1\n\n",
        b"POST /v1/%2e/x HTTP/1.0\r\nUpgrade: h2c\r\nExpect: 100-continue\r\nHost : a\r\n\tb: c\r\n\r\n",
    ],
    "body": [
        b'\x00{"model": "qwen", "messages": [{"role": "user", "content": "\\u00e9 \\" {[ ]}"}]}',
        b'\x02\x05\x09{"a": {"model": "no"}, "mod\\u0065l": "yes", "model": "last", "n": -1.5e3}',
        b'\x01\x03 {"Model": "x", "model": "\\ud83d\\ude00", "b": [true, false, null, NaN]}\n',
        b'\x00["model"]',
    ],
    "form": [
        b'\x00--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n--b--\r\n',
        b"\x01\x28--b" + b" " * 64 + b"\r\n" + _MODEL + b"\r\n\r\nm\r\n--b--",
        b"\x03\x01\x10\x30pre\r\n--b \t\r\n" + _FILE + b"\r\n--\r\n-b\r\n--b\r\n" + _MODEL + b"\r\n\r\nm\r\n--b--",
    ],
    "answer": [
        b"\x00" + _ANSWER + _CHUNKED + b"5\r\nhello\r\n6;x=y\r\n world\r\n0\r\nT: v\r\n\r\n",
        b"\x02\x40\x50" + _ANSWER + b"Content-Length: 5\r\n\r\nhello",
        b"\x01\x20HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil it ends",
        b"\x00HTTP/1.1 204 No Content\r\n\r\n",
        b"\x00" + _ANSWER + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
}
