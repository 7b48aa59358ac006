"""`usage: exact`: asks engines for the usage of streams whose clients did not, and hides it from these clients.

Imported only with that setting. An engine that is asked ends a stream of chat completions or completions with a
chunk without choices, which holds the usage. ``UsageFilter`` keeps that from the client; every other byte passes
unchanged, in whole events. llama.cpp moves its `timings` from the last chunk with a choice into the usage chunk:
they are put back, so a chunk with the reason of the end waits for the next event.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from llmux.errors import BadRequestError, EngineError
from llmux.extract import Body, BodyBudget, ModelScanner, Pace, scan_slowly
from llmux.extract.body import Store
from llmux.proxy.aiohttp_client import AiohttpClient
from llmux.proxy.early_response import ResumedRelay
from llmux.proxy.exchange import Exchange
from llmux.proxy.relay import Relay
from llmux.proxy.token_usage import BLOCK
from llmux.targets.field_scanner import Member, Rule, changes, last_of_each, scan, tree
from llmux.upstream import Framing, ResponseHead

PATHS = frozenset({"/v1/chat/completions", "/chat/completions", "/v1/completions", "/completions"})
"""Streams on these paths report their usage only if asked."""

MOST = 2**20  # bytes of one event; a longer one, and everything after it, passes unchanged
_ASKS = "include_usage"
_ASK = tree({f"stream_options.{_ASKS}": Rule(always=True, given=True)})
_NAMES = ("stream", "stream_options")
_END = re.compile(rb"\r?\n\r?\n")
_LAST = re.compile(rb'"finish_reason" ?: ?"')
_SUCCESS = range(200, 300)


class ExactUsage:
    """Makes streams report their usage."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self.relay = relay_without_usage

    def is_silent(self, path: str, document: Mapping[str, Any]) -> bool:
        """Whether a request is for a stream that will not report its usage."""
        return path in PATHS and _is_silent(document)

    async def asking(self, path: str, body: Body | None) -> Body | None:
        """Return a request that asks for the usage, instead of one for a stream that will not report it.

        None if it reports it, or is no stream, or not JSON: the engine judges that.
        """
        if body is None or path not in PATHS or body.form or body.compressed:
            return None
        flat = asking = None
        try:
            flat = await _flat(body, self._budget) if body.edited else body  # the changed field may be the same
            if _is_silent(await _options(flat)):
                asking = flat.edit(await changes(flat, _ASK))
        except (BadRequestError, ValueError, RecursionError):
            pass
        finally:
            if asking is None and flat is not None and flat is not body:
                flat.close()
        return asking


def _is_silent(document: Mapping[str, Any]) -> bool:
    if document.get("stream") is not True:
        return False
    options = document.get("stream_options")
    return not (isinstance(options, dict) and options.get(_ASKS) is True)


async def _options(body: Body) -> Mapping[str, Any]:
    """Return whether a request is for a stream, and asks for its usage."""
    found = last_of_each((await scan(body, 0, body.received, _NAMES)).found)
    options, asks = found.get("stream_options"), False
    if options is not None and b"".join(body.part(options.start, options.start + 1)) == b"{":
        within = last_of_each((await scan(body, options.start, options.end, (_ASKS,))).found)
        asks = _is_true(body, within.get(_ASKS))
    return {"stream": _is_true(body, found.get("stream")), "stream_options": {_ASKS: asks}}


def _is_true(body: Body, member: Member | None) -> bool:
    return member is not None and b"".join(body.part(member.start, min(member.end, member.start + 5))) == b"true"


async def _flat(body: Body, budget: BodyBudget) -> Body:
    """Return a body whose changes are applied, as if it had been received so."""
    store, scanner, pace = Store(budget), ModelScanner(), Pace()
    try:
        for data in body:
            await scan_slowly(scanner, data, pace)
            store.add(data)
        return Body(store, scanner.finish())
    except BaseException:
        store.close()
        raise


class UsageFilter:
    """Takes a stream and returns what its client gets."""

    def __init__(self) -> None:
        self.event = b""
        """The event that was removed."""
        self._rest = b""  # an incomplete event
        self._waiting = b""  # an event with the reason of the end
        self._open = False  # everything passes unchanged

    def feed(self, data: bytes) -> bytes:
        """Return what can be passed on now."""
        if self._open:
            return data
        data, passed, at = self._rest + data, [], 0
        while (found := _END.search(data, at)) is not None:
            event, at = data[at : found.end()], found.end()
            if b'"usage"' in event and (usage := _only_usage(event)) is not None:
                self.event = event
                passed.append(self._with_timings(usage))
                continue
            passed.append(self._flush())
            if _LAST.search(event):
                self._waiting = event
            else:
                passed.append(event)
        self._rest = data[at:]
        if len(self._rest) > MOST:
            self._open = True
            passed += [self._flush(), self._rest]
            self._rest = b""
        return b"".join(passed)

    def end(self) -> bytes:
        """Return the rest when the stream has ended, or broken off."""
        rest, self._rest = self._rest, b""
        return self._flush() + rest

    def _flush(self) -> bytes:
        waiting, self._waiting = self._waiting, b""
        return waiting

    def _with_timings(self, usage: dict[str, Any]) -> bytes:
        waiting = self._flush()
        at = waiting.rfind(b"}")
        if at < 0 or "timings" not in usage or b'"timings"' in waiting:
            return waiting
        timings = json.dumps(usage["timings"], separators=(",", ":")).encode()
        return b'%b,"timings":%b%b' % (waiting[:at], timings, waiting[at:])


def _only_usage(event: bytes) -> dict[str, Any] | None:
    """Return the document of an event that holds the usage and no choice."""
    lines = [line for line in event.splitlines() if line]
    if len(lines) != 1 or not lines[0].startswith(b"data:"):
        return None
    try:
        document = json.loads(lines[0][5:])
    except (ValueError, RecursionError):
        return None
    if (
        not isinstance(document, dict)
        or document.get("choices") != []
        or not isinstance(document.get("usage"), dict)
    ):
        return None
    return document


class FilteringRelay(Relay):
    """A relay that removes the usage from a stream; everything else passes unchanged."""

    _passes_chunks = False
    _filter: UsageFilter | None = None

    def response_started(self, head: ResponseHead) -> None:
        """Begin the client's answer."""
        self._filter = None
        streams = head.event_stream and not head.encoded and head.framing is not Framing.NONE
        if streams and head.status in _SUCCESS:
            self._filter = UsageFilter()
            if head.framing is Framing.CHUNKED:
                assert self._connection is not None
                self._connection.unchunk()
            fields = [field for field in head.fields if field[0] != b"content-length"]
            head = dataclasses.replace(head, framing=Framing.UNTIL_CLOSE, fields=fields, written={})
        super().response_started(head)

    def response_data(self, data: bytes) -> None:
        """Pass on everything but the usage."""
        if self._filter is None:
            super().response_data(data)
        else:
            self._pass(self._filter, self._filter.feed(data))

    def response_ended(self) -> None:
        """Tell the end."""
        if self._filter is not None:
            self._pass(self._filter, self._filter.end())
        super().response_ended()

    def response_lost(self, error: EngineError) -> None:
        """Break off."""
        if self._filter is not None and self._started:
            self._pass(self._filter, self._filter.end())
        super().response_lost(error)

    def _pass(self, usage: UsageFilter, data: bytes) -> None:
        if data or self._head or self._transport.is_closing():
            super().response_data(data)
        else:
            self.exchange.activity.last_byte = self._loop.time()
        if usage.event:  # the engine's report, which is read at the end
            self.exchange.keep(usage.event[-BLOCK:])
            usage.event = b""


class _ResumedFiltering(FilteringRelay, ResumedRelay):
    """The same behind an answer that began before the engine's."""


def relay_without_usage(client: AiohttpClient, exchange: Exchange, loop: asyncio.AbstractEventLoop) -> Relay:
    """Make the relay of a stream that was asked for its usage."""
    if exchange.early is None:
        return FilteringRelay(client, exchange, loop)
    return _ResumedFiltering(client, exchange, exchange.early, loop)
