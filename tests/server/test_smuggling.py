"""What an attacker writes so that two readers of one connection see other requests: one is served, or none."""

from __future__ import annotations

import pytest

from tests.server.house import House

BODY = b'{"model":"a"}'
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
LENGTH = b"Content-Length: 13\r\n"
HIDDEN = b"GET /v1/hidden?model=a HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
WHOLE = b"d\r\n" + BODY + b"\r\n0\r\n\r\n"

# Where the request may end is not clear, or is said in a way which readers take differently.
UNCLEAR = {
    "length and chunks": POST + LENGTH + CHUNKED + b"\r\n" + WHOLE + HIDDEN,
    "chunks and length": POST + CHUNKED + LENGTH + b"\r\n" + WHOLE + HIDDEN,
    "two lengths": POST + LENGTH + b"Content-Length: 0\r\n\r\n" + BODY + HIDDEN,
    "a list of lengths": POST + b"Content-Length: 13, 13\r\n\r\n" + BODY + HIDDEN,
    "a signed length": POST + b"Content-Length: +13\r\n\r\n" + BODY,
    "a length in hex": POST + b"Content-Length: 0xd\r\n\r\n" + BODY,
    "a blank before the colon": POST + b"Content-Length : 13\r\n\r\n" + BODY,
    "another coding": POST + b"Transfer-Encoding: xchunked\r\n\r\n" + WHOLE,
    "chunks are not the last coding": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n" + WHOLE,
    "two codings": POST + CHUNKED + b"Transfer-Encoding: identity\r\n\r\n" + WHOLE,
    "a vertical tab": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n" + WHOLE,
    "a folded field": POST + b"X: a\r\n b\r\n" + LENGTH + b"\r\n" + BODY,
    "a folded coding": POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n" + WHOLE,
    "line feeds only": (POST + LENGTH + b"\r\n").replace(b"\r\n", b"\n") + BODY,
    "a line feed inside": POST + b"X: a\n" + LENGTH + b"\r\n" + BODY,
    "a carriage return inside": POST + b"X: a\rb\r\n" + LENGTH + b"\r\n" + BODY,
    "a null byte": POST + b"X: a\0b\r\n" + LENGTH + b"\r\n" + BODY,
    "an extension that ends in a line feed": POST + CHUNKED + b"\r\nd;a\n" + BODY + b"\r\n0\r\n\r\n",
    "chunks with line feeds": POST + CHUNKED + b"\r\nd\n" + BODY + b"\n0\n\n",
    "a chunk's size with 0x": POST + CHUNKED + b"\r\n0xd\r\n" + BODY + b"\r\n0\r\n\r\n",
    "a chunk's size that overflows": POST + CHUNKED + b"\r\n1000000000000000d\r\n" + BODY + b"\r\n0\r\n\r\n",
    "a chunk longer than its size": POST + CHUNKED + b"\r\nd\r\n" + BODY + b"XX0\r\n\r\n",
    "framing in a trailer": POST
    + CHUNKED
    + b"\r\nd\r\n"
    + BODY
    + b"\r\n0\r\nHost: x\r\nContent-Length: 3\r\n\r\n",
    "a blank in the target": POST.replace(b"/chat", b"/chat ") + LENGTH + b"\r\n" + BODY,
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}
# Clear, if unusual: served once, and what the engine gets is framed anew.
CLEAR = {
    "a tab before the coding": POST + b"Transfer-Encoding:\tchunked\r\n\r\n" + WHOLE,
    "an extension": POST + CHUNKED + b"\r\nd;a=b\r\n" + BODY + b"\r\n0\r\n\r\n",
    "an upgrade to h2c": POST
    + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    + LENGTH
    + b"\r\n"
    + BODY,
    "Connection names the length": POST + b"Connection: Content-Length\r\n" + LENGTH + b"\r\n" + BODY,
    "an underscore": POST + b"Content_Length: 99\r\n" + LENGTH + b"\r\n" + BODY,
    "an absolute target": POST.replace(b" /v1", b" http://127.0.0.1/v1") + LENGTH + b"\r\n" + BODY,
}


@pytest.mark.parametrize("name", UNCLEAR)
async def test_what_is_unclear_is_rejected_and_ends_the_connection(house: House, name: str):
    await house.open()
    assert (await house.chat("a")).status == 200
    line = await house.line()
    line.send(UNCLEAR[name])
    answer = await line.closed()
    assert answer.split(b" ", 2)[1] == b"400"
    assert answer.count(b"HTTP/1.") == 1, "a second answer to what was hidden in the first"
    assert len(house.engine.heads) == 1, "the engine saw something of it"


@pytest.mark.parametrize("name", CLEAR)
async def test_what_is_clear_is_served_once_and_framed_anew(house: House, name: str):
    await house.open()
    assert (await house.chat("a")).status == 200
    reply = await house.raw(CLEAR[name])
    assert reply.status == 200
    _, head = house.engine.heads
    lines = head.lower().split(b"\r\n")
    assert lines.count(b"content-length: 13") == 1
    assert not any(line.startswith((b"transfer-encoding", b"upgrade", b"connection")) for line in lines)
    assert house.engine.bodies[-1] == BODY


async def test_a_name_cannot_add_a_field_to_the_engine_s_head(house: House):
    await house.open()
    body = b'{"model":"a\\r\\nX-Evil: 1"}'
    reply = await house.raw(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert reply.status == 404
    assert b"X-Evil" not in b"".join(house.engine.heads)
    reply = await house.raw(
        POST.replace(b"completions", b"completions?model=a%0d%0aX-Evil:1") + LENGTH + b"\r\n" + BODY
    )
    assert reply.status == 200  # the body says which model; what the path says is passed as it came
    assert all(b"\r\nX-Evil" not in head for head in house.engine.heads)
