"""Reads the head of a request without aiohttp, when there is nothing in it that needs judging.

It is stricter than aiohttp: what it does not understand at first sight it does not judge at all.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from llmux.proxy.heads import HOP_BY_HOP

UNKNOWN = -1

_MOST_HEAD = 16 * 1024
_HEAD = re.compile(
    rb"([A-Z]{1,16}) (/[!\"$-~]{0,1024}) HTTP/1\.1\r\n"  # no #: the model handler cuts it
    rb"((?:[A-Za-z0-9_-]{1,64}: [!-~](?:[ -~]*[!-~])?\r\n){1,100})\r\n"
)
# Fields that the model handler looks at: their values decide over more than bytes to pass on.
_JUDGED = HOP_BY_HOP - {b"connection"} | {
    b"content-encoding",
    b"expect",
    b"origin",
    b"sec-fetch-site",
    b"sec-websocket-key",
}
_FRAMING = frozenset({b"transfer-encoding", b"upgrade", b"expect", b"sec-websocket-key"})
_CREDENTIALS = frozenset({b"authorization", b"x-api-key"})
_SPECIAL = _JUDGED | _CREDENTIALS | {b"host", b"content-length", b"content-type", b"connection", b"x-request-id"}


class FastHead(NamedTuple):
    """What a request's first bytes say."""

    total: int  # its length, head and body; UNKNOWN
    plain: bool  # a POST whose length is known, and nothing in its head needs judging
    clean: bool  # nothing in its head needs judging, whatever it asks for
    method: bytes
    size: int  # of the head, in bytes
    target: str
    given_id: bytes | None
    lines: list[bytes]  # of the engine's head
    host: int  # where Host stands among them, without its value
    called: bytes  # that value
    credentials: list[int]  # where credentials stand


_UNREAD = FastHead(
    UNKNOWN,
    plain=False,
    clean=False,
    method=b"",
    size=0,
    target="",
    given_id=None,
    lines=[],
    host=0,
    called=b"",
    credentials=[],
)


def read(data: bytes) -> FastHead:  # noqa: C901, PLR0912, once for every request: one loop, no calls
    """Read a head, and make the engine's from it."""
    found = _HEAD.match(data, 0, _MOST_HEAD)
    if found is None:
        return _UNREAD
    method, target, fields = found.groups()
    clean = True
    form = False
    length = 0
    host = -1
    called = b""
    given_id = None
    seen = 0
    lines = [b"%b %b HTTP/1.1" % (method, target)]
    credentials: list[int] = []
    for line in fields.split(b"\r\n"):
        name, _, value = line.partition(b": ")
        lower = name.lower()
        if lower not in _SPECIAL:
            lines.append(line)
            continue
        if lower == b"content-length":
            if seen & 1 or not value.isdigit() or len(value) > 15:  # noqa: PLR2004
                return _UNREAD
            seen |= 1
            length = int(value)
            lines.append(line)
        elif lower == b"host":
            clean = clean and host < 0
            host = len(lines)
            called = value
            lines.append(name)
        elif lower == b"content-type":
            form = form or value[:10].lower().startswith(b"multipart/")
            lines.append(line)
        elif lower == b"x-request-id":
            clean = clean and given_id is None
            given_id = value
            lines.append(line)
        elif lower == b"connection":
            clean = clean and value.lower() == b"keep-alive"
            if value.lower() not in {b"keep-alive", b"close"}:
                return _UNREAD
        elif lower in _CREDENTIALS:
            credentials.append(len(lines))
            lines.append(line)
        else:
            clean = False
            if lower in _FRAMING:
                return _UNREAD
    lines.pop()  # the empty string after the last field
    end = found.end()
    clean = clean and host > 0
    plain = clean and not form and seen == 1 and method == b"POST"
    target = target.decode("ascii")
    return FastHead(end + length, plain, clean, method, end, target, given_id, lines, host, called, credentials)
