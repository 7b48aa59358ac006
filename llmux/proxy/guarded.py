"""The relays of answers from endpoints on other hosts, which differ from those of engines.

- An error, 400 or above, is read completely before any of it is passed on: so that another endpoint may be tried
  instead, and so that the key, if an error repeats it, does not reach the client.
- Only whole events of a stream are passed on. If it breaks off, the error event follows the last whole one; and
  until the first event, another endpoint may be tried: if that is an error, too.
"""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from llmux.errors import EngineError, RemoteError, RequestError
from llmux.proxy.aiohttp_client import AiohttpClient
from llmux.proxy.exchange import Exchange
from llmux.proxy.relay import Relay
from llmux.proxy.translated import TranslatingRelay
from llmux.targets.codecs import Translation
from llmux.targets.codecs.sse import EventParser
from llmux.upstream import EngineConnection, Framing, ResponseHead

if TYPE_CHECKING:
    from llmux.proxy.remote import GuardFactory, Watch

MOST_HELD = 1024 * 1024
"""Bytes of one event that are held back until it is whole; a longer one is passed on in pieces."""
WORTH_ANOTHER = frozenset({408, 429})
"""The statuses below 500 with which another endpoint may succeed."""
LACKED = frozenset({404, 405, 501})
"""The statuses that say that the endpoint does not know a path."""
_REDIRECT = 300
_NOT_MODIFIED = 304
_ERROR = 400
_UNAUTHORIZED = 401
_SERVER_ERROR = 500
# What marks a stream as complete if its connection's end may be a cut.
_ENDS = (b"[DONE]", b"message_stop", b"response.completed", b"response.incomplete", b"response.failed")
# Events that only announce an answer, and those that say that there will be none.
_ANNOUNCING = frozenset({"ping", "message_start", "response.created", "response.queued", "response.in_progress"})
_FAILING = frozenset({"error", "response.failed"})
_REFRAMED = frozenset({b"content-length", b"transfer-encoding"})


class RemoteAnswerError(RemoteError):
    """The endpoint answered with an error with which another one may succeed."""

    code = "remote_failed"

    def __init__(self, message: str, status: int, retry_after: float | None) -> None:
        super().__init__(message, retry_after=retry_after)
        self.status = status


class PathLackedError(RemoteAnswerError):
    """The endpoint does not know a path that some lack."""


class Guard(Relay):
    """The common part of relays for other hosts: time limits, and errors that are read completely."""

    __slots__ = ()
    _passes_chunks = False  # every byte counts against the time limits
    _watch: Watch

    @property
    def held(self) -> bool:
        """Whether reading is paused because the client does not read."""
        return self._draining is not None

    def _drained(self, task: asyncio.Task[None]) -> None:
        super()._drained(task)
        self.exchange.activity.last_byte = self._loop.time()  # the pause does not count as the endpoint's silence

    def attach(
        self, connection: EngineConnection, on_end: Callable[[Exception | None], None] | None = None
    ) -> None:
        """Use this connection, and begin to wait for the answer."""
        super().attach(connection, on_end)
        self._watch.sent(self)

    def response_started(self, head: ResponseHead) -> None:
        """Begin the client's answer, unless it is an error."""
        assert self._connection is not None
        self._watch.answered(head.status, retry_after_of(head), stream=head.event_stream)
        if head.status < _REDIRECT or head.status == _NOT_MODIFIED:
            super().response_started(head)
            return
        self.exchange.status = head.status
        self._watch.refusal = head
        if head.framing is Framing.CHUNKED:
            self._connection.unchunk()

    def response_data(self, data: bytes) -> None:
        """Pass bytes on; keep those of an error."""
        if self._watch.refusal is None:
            super().response_data(data)
        else:
            self.exchange.activity.last_byte = self._loop.time()
            self._watch.keep(data)

    def response_ended(self) -> None:
        """Finish; an error is delivered as a whole."""
        refusal = self._watch.refusal
        if refusal is None:
            super().response_ended()
        else:
            self._judge(refusal)

    def response_lost(self, error: EngineError) -> None:
        """Break off. An incomplete error is delivered as it is."""
        refusal = self._watch.refusal
        if refusal is not None:
            self._judge(refusal)
        elif self._started:
            super().response_lost(EngineError(self._watch.broke_off))
        else:
            super().response_lost(error)

    def _ready(self, events: bytes) -> bool:
        """Return whether the first whole events of a stream are passed on.

        While they only announce an answer, and another endpoint could give one, they are not. If another is tried
        because they report an error, this is over.
        """
        watch = self._watch
        failing = begins_with_error(events[watch.looked :])
        if failing is None:
            held = watch.holds and len(events) <= MOST_HELD
            watch.looked = len(events) if held else 0
            return not held
        watch.judged = True
        if failing:
            return not self._began_badly()
        watch.begun()
        return True

    def let_go(self) -> None:
        """Pass on what has been held for long enough."""

    def _began_badly(self) -> bool:
        """Note that the stream began with an error; return whether another endpoint is tried instead."""
        watch = self._watch
        watch.failed = True
        if watch.others and not self._started:
            self.expire(RemoteError(f"{watch.name} answered with an error in its stream.", code="remote_failed"))
        return self.over

    def expire(self, error: RequestError) -> None:
        """End it, as when the endpoint takes too long."""
        if self.over:
            return
        between = self._between_chunks
        if self._connection is not None:
            self._connection.abort()
        if self._started:
            self._break_off(error, between_chunks=between)
        else:
            self._settle(error)

    def _judge(self, head: ResponseHead) -> None:
        """Pass an error on, or let another endpoint be tried."""
        watch, status = self._watch, head.status
        watch.refusal = None
        if status == _UNAUTHORIZED:
            # It is about llmux's key, but would seem to be about the client's. And some repeat parts of the key.
            error = f"{watch.name} does not accept the key that llmux has for it."
            self._settle(RemoteError(error, code="remote_key"))
            return
        if status < _ERROR:
            # A client that followed it would bypass llmux.
            self._settle(RemoteError(f"{watch.name} answered with a redirect ({status}): its `url` is not right."))
            return
        if watch.may_lack and status in LACKED:
            self._settle(PathLackedError(f"{watch.name} does not know the path ({status}).", status, None))
            return
        if watch.others and (status >= _SERVER_ERROR or status in WORTH_ANOTHER):
            error = f"{watch.name} answered with {status}."
            self._settle(RemoteAnswerError(error, status, retry_after_of(head)))
            return
        assert self._connection is not None
        body = watch.kept()
        self._connection.length = b"%d" % len(body)
        super().response_started(_with_length(head))
        super().response_data(body)
        super().response_ended()


class GuardedRelay(Guard):
    """The sink of an exchange with another host whose answer passes unchanged."""

    __slots__ = ("_held", "_until_close", "_watch", "_whole_events")

    def __init__(
        self, client: AiohttpClient, exchange: Exchange, loop: asyncio.AbstractEventLoop, watch: Watch
    ) -> None:
        super().__init__(client, exchange, loop)
        self._watch = watch
        self._held = b""  # the beginning of an event, or what only announces an answer
        self._whole_events = False
        self._until_close = False

    def response_started(self, head: ResponseHead) -> None:
        """Begin the client's answer, unless it is an error."""
        super().response_started(head)
        if self._event_stream and self._watch.refusal is None and head.framing is not Framing.LENGTH:
            assert self._connection is not None
            self._connection.unchunk()
            self._chunk, self._whole_events = self._chunked, True
            self._until_close = head.framing is Framing.UNTIL_CLOSE

    def response_data(self, data: bytes) -> None:
        """Pass bytes on: for an event stream, whole events."""
        if not self._whole_events:
            self._watch.begun()  # it is not looked into
            super().response_data(data)
            return
        self.exchange.activity.last_byte = self._loop.time()
        if self._held:
            data = self._held + data
        end = len(data) if data.endswith((b"\n\n", b"\n\r\n")) else end_of_events(data)
        if len(data) - end > MOST_HELD:
            end = len(data)
        if end and not self._watch.judged and not self._ready(data[:end]):
            if self.over:
                return
            end = 0
        self._held = data[end:]
        if end:
            super().response_data(data[:end])

    def let_go(self) -> None:
        """Pass on what has been held for long enough."""
        if end := end_of_events(self._held):
            data, self._held, self._watch.looked = self._held[:end], self._held[end:], 0
            super().response_data(data)

    def response_ended(self) -> None:
        """Tell the end."""
        if self._until_close and not self._is_whole():
            self._lose(EngineError(self._watch.broke_off))
            return
        if self._whole_events and (self._held or self._head):
            held, self._held = self._held, b""
            super().response_data(held)
        super().response_ended()

    def _is_whole(self) -> bool:
        last = b"".join((*self.exchange.tail, self._held))
        return any(end in last for end in _ENDS)

    def _lose(self, error: RequestError) -> None:
        if self._started:
            self._break_off(error)
        else:
            self._settle(error)


class TranslatingGuardedRelay(Guard, TranslatingRelay):
    """The same for an answer that the client gets in another dialect."""

    __slots__ = ("_early", "_silent", "_watch")

    def __init__(
        self,
        client: AiohttpClient,
        exchange: Exchange,
        loop: asyncio.AbstractEventLoop,
        translation: Translation,
        watch: Watch,
    ) -> None:
        TranslatingRelay.__init__(self, client, exchange, loop, translation)
        self._watch = watch
        self._early = b""  # what only announces the answer
        self._silent = False  # the client has not been told that it is kept open

    def _keep_open(self) -> None:
        self._silent = self._watch.holds and not self._started
        if not self._silent:
            super()._keep_open()

    def let_go(self) -> None:
        """Pass on what has been held for long enough, or tell the client that it is kept open."""
        if self._early:
            data, self._early, self._watch.looked = self._early, b"", 0
            super()._send(data)
        elif self._silent and not self._started:
            self._keep_open()

    def _send(self, data: bytes) -> None:
        if data and self._stream is not None and not self._watch.judged:
            data, self._early = self._early + data, b""
            if not self._ready(data):
                if not self.over:
                    self._early = data
                return
        super()._send(data)


def translating(translation: Translation) -> GuardFactory:
    """Return what makes the relay of an answer that is translated."""
    return lambda client, exchange, loop, watch: TranslatingGuardedRelay(
        client, exchange, loop, translation, watch
    )


def _with_length(head: ResponseHead) -> ResponseHead:
    """Return the head of an answer whose body is there: as long as that is, and readable as it is."""
    fields = [field for field in head.fields if field[0] not in _REFRAMED]
    fields.append((b"content-length", b"Content-Length", b""))
    return dataclasses.replace(head, framing=Framing.LENGTH, fields=fields, event_stream=False, written={})


def begins_with_error(events: bytes) -> bool | None:
    """Return whether the first event that says something is an error; None if none does."""
    for name, text in EventParser().feed(events):
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            document = None
        document = document if isinstance(document, dict) else {}
        kind = str(name or document.get("type"))
        if kind not in _ANNOUNCING:
            return kind in _FAILING or bool(document.get("error")) or document.get("object") == "error"
    return None


def end_of_events(data: bytes) -> int:
    """Return where the last whole event ends."""
    plain = data.rfind(b"\n\n")
    other = data.rfind(b"\n\r\n")
    return max(plain + 2 if plain >= 0 else 0, other + 3 if other >= 0 else 0)


def retry_after_of(head: ResponseHead) -> float | None:
    """Return the seconds for which an answer asks its client to wait, None where it does not."""
    for lower, _, value in head.fields:
        if lower == b"retry-after":
            return _seconds(value.decode("latin-1").strip())
    return None


def _seconds(text: str) -> float | None:
    if text.isdecimal():
        return float(text[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
