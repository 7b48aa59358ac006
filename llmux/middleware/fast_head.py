"""Reads the head of a request without aiohttp, if it needs no closer look.

It is stricter than aiohttp: it leaves every head that it does not fully understand to aiohttp.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from llmux.middleware.authentication import Holder
from llmux.middleware.paths import Route
from llmux.proxy.heads import HOP_BY_HOP

if TYPE_CHECKING:
    from llmux.accounts.gate import Grant

UNKNOWN = -1
MOST_DIGITS = 15  # of a length

MOST_KNOWN = 2048  # bytes of a head that is remembered
LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: (\d{1,15})\r\n")

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
    b"x-llmux-deadline",
    b"x-llmux-keep-alive",
}
_FRAMING = frozenset({b"transfer-encoding", b"upgrade", b"expect", b"sec-websocket-key"})
_CREDENTIALS = frozenset({b"authorization", b"x-api-key"})
# Fields that may stand in a head once (RFC 9110): aiohttp rejects a request which has one of them twice.
_ONCE = frozenset(
    {
        b"content-location",
        b"content-range",
        b"content-type",
        b"etag",
        b"max-forwards",
        b"server",
        b"user-agent",
    }
)
_SPECIAL = _JUDGED | _CREDENTIALS | _ONCE | {b"host", b"content-length", b"connection", b"x-request-id"}


class FastHead(NamedTuple):
    """What a request's head says, except the length of the body."""

    plain: bool  # a POST of known length whose head needs no closer look
    clean: bool  # the head needs no closer look, whatever the request is
    last: bool  # the client wants its connection closed after the answer
    method: bytes
    target: str
    given_id: bytes | None
    lines: list[bytes]  # of the engine's head
    host: int  # the index of Host among them, without its value
    length: int  # the index of Content-Length, without its value; -1: it has none
    called: bytes  # the value of Host
    credentials: list[int]  # the indexes of credentials


_UNREAD = FastHead(
    plain=False,
    clean=False,
    last=False,
    method=b"",
    target="",
    given_id=None,
    lines=[],
    host=0,
    length=-1,
    called=b"",
    credentials=[],
)

# A head, its length in bytes, that of the whole request (UNKNOWN), and the digits of Content-Length.
Seen = tuple[FastHead, int, int, bytes]
UNSEEN: Seen = (_UNREAD, 0, UNKNOWN, b"")


def read(data: bytes) -> Seen:  # noqa: C901, PLR0912, PLR0915, one loop, no calls
    """Read a head, and make the engine's head from it."""
    found = _HEAD.match(data, 0, _MOST_HEAD)
    if found is None:
        return UNSEEN
    method, target, fields = found.groups()
    clean = True
    form = last = False
    length = -1
    digits = b""
    host = -1
    called = b""
    given_id = None
    lines = [b"%b %b HTTP/1.1" % (method, target)]
    credentials: list[int] = []
    once: set[bytes] = set()
    for line in fields.split(b"\r\n"):
        name, _, value = line.partition(b": ")
        lower = name.lower()
        if lower not in _SPECIAL:
            lines.append(line)
            continue
        if lower == b"content-length":
            if length >= 0 or not value.isdigit() or len(value) > MOST_DIGITS:
                return UNSEEN
            length = len(lines)
            digits = value
            lines.append(name)
        elif lower == b"host":
            clean = clean and host < 0
            host = len(lines)
            called = value
            lines.append(name)
        elif lower in _ONCE:
            if lower in once:
                return UNSEEN
            once.add(lower)
            form = form or (lower == b"content-type" and value[:10].lower().startswith(b"multipart/"))
            lines.append(line)
        elif lower == b"x-request-id":
            clean = clean and given_id is None
            given_id = value
            lines.append(line)
        elif lower == b"connection":
            if value.lower() not in {b"keep-alive", b"close"}:
                return UNSEEN
            last = last or value.lower() == b"close"
        elif lower in _CREDENTIALS:
            credentials.append(len(lines))
            lines.append(line)
        else:
            clean = False
            if lower in _FRAMING:
                return UNSEEN
    lines.pop()  # the empty string after the last field
    size = found.end()
    clean = clean and host > 0
    plain = clean and not form and length >= 0 and method == b"POST"
    head = FastHead(
        plain, clean, last, method, target.decode("ascii"), given_id, lines, host, length, called, credentials
    )
    return head, size, size + int(digits or b"0"), digits


_Around = tuple[bytes, bytes, bytes]  # what stands before and after a length's digits, and after the ID
_PLACES = 64  # whose heads are remembered with one of a client's


class KnownHead:
    """What is known of requests with one head, and of those that differ from it only in the body's length.

    Valid as long as the configuration is in force with which it was made.
    """

    __slots__ = (
        "_ends",
        "_host",
        "_length",
        "_lines",
        "_without",
        "anthropic",
        "given_id",
        "grant",
        "holder",
        "last",
        "names",
        "route",
    )

    def __init__(
        self,
        head: FastHead,
        route: Route,
        dropped: Sequence[int],
        holder: Holder | None,
        names: Mapping[str, str],
        grant: Grant | None = None,
        without: frozenset[bytes] = frozenset(),
    ) -> None:
        """``dropped``: the lines of the head that must not go on; ``holder``: that of its key.

        ``names`` are those for which requests with it can be served here, and their models; ``grant`` is what
        its key may use, if that is counted. ``without`` are other fields that do not go on, in lower case.
        """
        self.names = names
        self.route = route
        self.holder = holder
        self.grant = grant
        self.anthropic = route.anthropic("")
        self.given_id = head.given_id
        self.last = head.last
        self._lines = [b"" if at in dropped else line + b"\r\n" for at, line in enumerate(head.lines)]
        self._without = without
        self._host = head.host
        self._length = head.length
        self._ends: dict[object, _Around] = {}  # by the engine's Host, or by what else it is for

    def value(self, name: bytes) -> str | None:
        """Return the value of the first field with this name, in lower case; None if there is none."""
        for line in self._lines:
            field, _, value = line.partition(b": ")
            if field.lower() == name:
                return value[:-2].decode("ascii")
        return None

    def engine_head(self, host: bytes, digits: bytes, request_id: bytes) -> bytes:
        """Return the head for the engine; ``digits`` are the body's length."""
        before, after, end = self._ends.get(host) or self._make(host, host, frozenset(), ())
        if self.given_id is None:
            return b"%b%b%b%b%b" % (before, digits, after, request_id, end)
        return before + digits + after

    def changed_head(
        self,
        place: object,
        host: bytes,
        digits: bytes,
        request_id: bytes,
        changes: Callable[[], tuple[frozenset[bytes], Sequence[tuple[bytes, bytes]]]],
    ) -> bytes:
        """Return the head for a ``place``; its ``changes`` are fields that it does not get, and those added."""
        before, after, end = self._ends.get(place) or self._make(place, host, *changes())
        if self.given_id is None:
            return b"%b%b%b%b%b" % (before, digits, after, request_id, end)
        return before + digits + after

    def _make(
        self, place: object, host: bytes, without: frozenset[bytes], added: Sequence[tuple[bytes, bytes]]
    ) -> _Around:
        without |= self._without
        lines = [b"" if line.partition(b":")[0].lower() in without else line for line in self._lines]
        lines[self._host] = lines[self._host][:-2] + b": " + host + b"\r\n"
        at = self._length
        before = b"".join([*lines[:at], lines[at][:-2], b": "])
        after = b"".join([b"\r\n", *lines[at + 1 :]])
        end = b"".join([*(b"%b: %b\r\n" % field for field in added), b"\r\n"])
        if self.given_id is None:
            made = before, after + b"X-Request-ID: ", b"\r\n" + end
        else:
            made = before, after + end, b""
        if len(self._ends) >= _PLACES:
            self._ends.clear()
        self._ends[place] = made
        return made
