"""A client's connection whose requests are offered to the fast path before aiohttp sees them.

aiohttp's parser keeps state within a request, so the two can take turns only where one request ends and the next
begins. ``_owed`` says how far that is; once it is unknown, everything goes to aiohttp.
"""

from __future__ import annotations

import asyncio
from typing import Any

from llmux.aiohttp_internals import ServerConnection
from llmux.core.admission import RESTART
from llmux.errors import BadRequestError, UnavailableError
from llmux.middleware.authentication import network_of
from llmux.middleware.context import RequestContext
from llmux.middleware.fast_head import MOST_DIGITS, UNKNOWN, FastHead, read
from llmux.middleware.fast_path import FastPath, FastRequest, LastHead

HOLD = 0.25  # seconds that the rest of a request may take; beyond that aiohttp waits for it
SMALL = 64 * 1024  # bytes of a body whose rest is waited for before the request's key is looked at
MOST_AHEAD = 64 * 1024  # bytes that a client may send before its last request is answered


class ClientConnection(ServerConnection):
    """One client's connection. ``control``: it came over the control socket."""

    __slots__ = (
        "_address",
        "_ahead",
        "_busy",
        "_fast_path",
        "_half",
        "_held",
        "_last_head",
        "_missing",
        "_owed",
        "_parts",
        "_timer",
        "begun",
        "control",
        "fast_request",
        "handed_over",
        "head_since",
        "refused",
        "reserved",
        "since",
        "unsent",
    )

    def __init__(self, *args: Any, fast_path: FastPath, control: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.control = control
        self.refused = 0  # requests without a valid key
        self.fast_request: FastRequest | None = None  # the one in progress
        # The next request that aiohttp begins, which was on the fast path:
        self.handed_over: RequestContext | None = None
        self.since = 0.0  # the end of the last answer, on the loop's clock
        self.head_since = 0.0  # since when a head is due: the first one, or one that has begun; 0: none
        self.begun = False  # some of that head is there
        self.unsent = 0  # bytes of answers that the client had not taken at the last check
        self.reserved = False  # beyond `max_connections`: for health and operators only
        self._fast_path = fast_path
        self._address: str | None = None
        self._busy = 0  # requests that aiohttp has begun to handle
        self._owed = 0  # bytes to come of a request whose beginning aiohttp has; UNKNOWN
        self._half = False  # aiohttp has half a head, which came together with a whole request
        self._last_head: LastHead | None = None  # most clients send the same again and again
        self._held = b""  # received and not passed on yet
        self._parts: list[bytes] = []  # of a request, the rest of whose body is waited for
        self._missing = 0  # bytes of that rest
        self._ahead = False  # too much is held: reading is paused
        self._timer: asyncio.TimerHandle | None = None  # runs out when the rest of a held request takes too long

    def data_received(self, data: bytes) -> None:
        """Offer received bytes to the fast path, if a request begins here."""
        if self.fast_request is not None:
            self.keep(data)
            return
        if self._missing:
            self._gather(data)
            return
        if self._held:
            data = self._held + data
            self._held = b""
        if not data or self._owed < 0 or not self._fast_path.open:
            self._pass_on(data)
        elif self._owed:
            self._owed -= len(data)
            self._pass_on(data)
        else:
            self._at_boundary(data)

    def _at_boundary(self, data: bytes) -> None:
        path, last = self._fast_path, self._last_head
        head = None
        if last is not None and data.startswith(last[1]) and last[0] is path.known:
            _, before, after, known = last
            start = len(before)
            end = data.find(b"\r", start, start + MOST_DIGITS + 1)
            digits = data[start:end]
            if data.startswith(after, end) and digits.isdigit():
                head, size = known, end + len(after)
        if head is None:
            head, _, size, digits, self._last_head = path.recall(data)
        if head is not None and not (self._busy or self.ends):
            total = size + int(digits)
            if total - size <= path.most:
                if total > len(data) and head.names:
                    self._hold(data, total - len(data))
                    return
                match = path.match_known(data, head, size, total, digits)
                if match is not None:
                    path.start(self, match, data)
                    return
        self._at_new_head(data)

    def _at_new_head(self, data: bytes) -> None:
        path = self._fast_path
        seen = head, size, total, _ = read(data)
        missing = total - len(data)
        fit = head.clean and total - size <= path.most and (head.plain or missing <= 0)
        if fit and not (self._busy or self.ends):
            if missing > 0 and (total - size <= SMALL or self._is_worth_holding(head)):
                self._hold(data, missing)
                return
            match = path.match(data, seen) if head.plain and missing <= 0 else None
            if match is not None:
                path.start(self, match, data)
                return
            refusal = None if missing > 0 or self.writing_paused else path.refusal(self, head)
            if refusal is not None:
                self._refuse(*refusal, data[total:])
                return
        self._owed = missing if total >= 0 and missing >= 0 else UNKNOWN
        self._pass_on(data)
        self._half = total >= 0 > missing and _ends_in_half_a_head(data, total)

    # ---- a request whose body is still arriving

    def _is_worth_holding(self, head: FastHead) -> bool:
        """Whether the fast path serves requests with such a head; others hold nothing before they are judged."""
        known = self._fast_path.judge(head)
        return known is not None and bool(known.names)

    def _hold(self, data: bytes, missing: int) -> None:
        """Wait for the rest of a request, but not for long."""
        self._timer = self.loop.call_later(HOLD, self._pass_on_parts)
        self._missing = missing + len(data)
        self._gather(data)

    def _gather(self, data: bytes) -> None:
        budget = self._fast_path.budget
        self._parts.append(data)
        self._missing -= len(data)
        budget.held += len(data)
        if self._missing <= 0:
            self._missing = 0
            self.data_received(self._gathered())
        elif budget.held > budget.max_buffered:
            self._pass_on_parts()  # the model handler refuses it

    def _gathered(self) -> bytes:
        """Return the parts, which are not counted as held any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        parts, self._parts = self._parts, []
        data = b"".join(parts)
        self._fast_path.budget.held -= len(data)
        return data

    def _pass_on_parts(self) -> None:
        """Give what has come of a request to aiohttp, which waits for the rest."""
        self._owed, self._missing = self._missing, 0
        self._pass_on(self._gathered())

    # ----

    def _refuse(self, answer: bytes, keep_alive: bool, rest: bytes) -> None:
        """Answer a request without aiohttp."""
        assert self.transport is not None
        self.transport.write(answer)
        self._held = rest
        self.go_on(keep_alive=keep_alive)

    @property
    def address(self) -> str:
        """The address under which its wrong keys are counted."""
        if self._address is None:
            peer = None if self.transport is None else self.transport.get_extra_info("peername")
            self._address = network_of(str(peer[0])) if isinstance(peer, tuple) else ""
        return self._address

    def _pass_on(self, data: bytes) -> None:
        """Give bytes to aiohttp."""
        added = self.pass_on(data, _broken)
        self._half = False
        if added:
            self._busy += added
            self.head_since = 0.0
            self.begun = False
        elif not self.begun and data and self.awaits_request:
            self.begun = True
            self.head_since = self.head_since or self.loop.time()

    def request_answered(self, *, keep_alive: bool) -> None:
        """Record that aiohttp has answered a request."""
        if not keep_alive:
            self._owed = UNKNOWN
        self._busy -= 1
        self.since = self.loop.time()
        if self._half and not self._busy:
            self._half, self.begun, self.head_since = False, True, self.since

    # ---- the fast path

    def keep(self, data: bytes) -> None:
        """Hold bytes that arrive while a request is in progress."""
        self._held += data
        if len(self._held) > MOST_AHEAD and not self._ahead and self.transport is not None:
            self._ahead = True
            self.transport.pause_reading()

    def go_on(self, *, keep_alive: bool) -> None:
        """Handle the bytes that were held: the request is over."""
        self.fast_request = None
        transport = self.transport
        if transport is None:
            return
        if not keep_alive or self.ends or transport.is_closing():
            self.force_close()
            return
        self.since = self.loop.time()
        self.head_since = 0.0
        if self._held:
            self.loop.call_soon(self._next)
        if self._ahead:
            self._ahead = False
            transport.resume_reading()

    def _next(self) -> None:
        if self._held and self.fast_request is None and self.transport is not None:
            self.data_received(b"")

    def hand_over(self, context: RequestContext, raw: bytes) -> None:
        """Give the request to aiohttp after all."""
        self.fast_request = None
        if self.transport is None or self.ends:
            context.client_left()
            self.force_close()
            return
        self.handed_over = context
        if self._held:
            raw, self._held, self._owed = raw + self._held, b"", UNKNOWN
        if self._ahead:
            self._ahead = False
            self.transport.resume_reading()
        self._pass_on(raw)

    # ---- the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the first request."""
        self.head_since = self.loop.time()
        if self.reserved:
            self._owed = UNKNOWN  # the fast path gets none of it
        super().connection_made(transport)

    @property
    def waits(self) -> bool:
        """Whether no request is in progress: the next bytes are a head, or the rest of one."""
        return self.awaits_request and self.fast_request is None and not (self._held or self._missing)

    def close(self) -> None:
        """Take no more requests. aiohttp does not read on, so one whose body is still arriving is refused."""
        if self._missing:
            self._pass_on_parts()
        super().close()
        self.end_body(UnavailableError("llmux is stopping", code="stopping", retry_after=RESTART))

    def connection_lost(self, exc: BaseException | None) -> None:
        """End the request in progress."""
        self._gathered()
        self._missing = 0
        super().connection_lost(exc)
        if self.fast_request is not None:
            self.fast_request.client_closed()
        if self.handed_over is not None:
            self.handed_over.client_left()
            self.handed_over = None


def _broken() -> Exception:
    return BadRequestError("The body's framing is broken.", code="incomplete_body")


def _ends_in_half_a_head(data: bytes, start: int) -> bool:
    """Whether the last of the requests that begin at ``start`` lacks the end of its head."""
    while start < len(data):
        total = read(data[start:])[2]
        if total < 0:
            return b"\r\n\r\n" not in data[start:]
        start += total
    return False
