"""A request on its way through llmux: which model, when, and off to its engine."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING
from urllib.parse import quote_plus, unquote_plus

from aiohttp import HttpVersion11, hdrs, web

from llmux.config import Config, EngineDefinition
from llmux.core.effects import Admit
from llmux.errors import BadRequestError, EngineError, RequestError, UnknownModelError
from llmux.extract import Body, BodyBudget, BodyLimits, model_of, read_body, refuse_announced
from llmux.middleware.herald import EXPECTED, Herald, InBody, Interim, Voice
from llmux.middleware.keyring import Holder
from llmux.middleware.paths import Kind, Route
from llmux.middleware.progress import INTERIM, dialect_of, wish
from llmux.proxy import ClientGoneError, Exchange, Forwarder
from llmux.proxy.early import Early
from llmux.runtime import Switcher, Ticket
from llmux.upstream import EngineAddress, EngineRefusedError

if TYPE_CHECKING:
    from llmux.tracing import RequestTrace

GONE_POLL = 0.5  # seconds; only where aiohttp does not tell that a client has left


class Handover:
    """A request that could not end on the lane (see ``lane``), for the long way to go on with."""

    __slots__ = ("began", "error", "fresh_only", "request_id", "ticket")

    def __init__(
        self,
        ticket: Ticket,
        request_id: str,
        began: float,
        error: Exception | None = None,
        *,
        fresh_only: bool = False,
    ) -> None:
        self.ticket = ticket
        self.request_id = request_id
        self.began = began
        self.error = error  # what its first attempt ended with
        self.fresh_only = fresh_only  # it met a connection that had died while idle


class Passage:
    """One request and what became of it; the caller reads it when ``Endpoint.serve`` is done."""

    __slots__ = (
        "drop_headers",
        "exchange",
        "handover",
        "headers",
        "holder",
        "model",
        "request_id",
        "route",
        "ticket",
        "told_to_send",
        "trace",
        "voice",
    )

    def __init__(self, request_id: str, route: Route, *, told_to_send: bool = True) -> None:
        self.request_id = request_id
        self.route = route
        self.told_to_send = told_to_send  # False: a client that expects it is still to be told `100 Continue`
        self.holder: Holder | None = None  # whose key it showed
        self.drop_headers: frozenset[bytes] = frozenset()  # credentials that were meant for llmux
        self.headers: list[tuple[str, str]] = []
        self.model: str | None = None
        self.handover: Handover | None = None  # it was on the lane before
        self.ticket: Ticket | None = None
        self.exchange: Exchange | None = None
        self.trace: RequestTrace | None = None
        self.voice: Voice | None = None  # how its client is told where it stands

    @property
    def early(self) -> Early | None:
        """The answer, if it has begun before the engine's."""
        return self.voice.early if isinstance(self.voice, InBody) and self.voice.early.begun else None

    @property
    def waited(self) -> float:
        """Seconds in the queue."""
        return self.ticket.waited if self.ticket is not None else 0.0


class Watch:
    """Cancels the handler of a client that has left, in a server that does not do so by itself."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> None:
        self._timer = self._loop.call_later(GONE_POLL, self._look)

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        if self._request.transport is not None:
            self.__enter__()
        elif self._task is not None:
            self._task.cancel()


class Endpoint:
    """Serves the requests that name a model."""

    def __init__(self, switcher: Switcher, forwarder: Forwarder) -> None:
        self._switcher = switcher
        self._forwarder = forwarder
        self.budget = BodyBudget(switcher.config.max_buffered)
        self._herald = Herald(switcher)
        self.configure(switcher.config)

    def configure(self, config: Config) -> None:
        """Take over a configuration's names and limits."""
        self._names = config.names
        self._limits = BodyLimits(config.max_body, config.max_buffered, config.body_idle_timeout)
        self.budget.max_buffered = config.max_buffered
        self._progress = config.progress
        self._herald.every = config.progress_every

    async def serve(self, request: web.Request, passage: Passage) -> web.StreamResponse:
        """Read the request, wait for its model, relay the answer.

        Raises a RequestError for what is refused, ClientGoneError when the client went away.
        """
        protocol = request.protocol
        manager = protocol._manager  # noqa: SLF001 - it alone knows; None: the client has left already
        if manager is None:
            raise ClientGoneError("The client has left.")
        if manager.handler_cancellation:
            return await self._serve(request, passage)
        with Watch(request):
            return await self._serve(request, passage)

    async def _serve(self, request: web.Request, passage: Passage) -> web.StreamResponse:
        route = passage.route
        if not request.can_read_body:
            return await self._with_body(request, passage, None, _named(route, None))
        expects = request.headers.get(hdrs.EXPECT)
        if expects is not None:
            refuse_announced(request, self._limits)
            _meet(expects, request, passage)
        with await read_body(request, self._limits, self.budget) as body:
            return await self._with_body(request, passage, body, _named(route, body))

    async def _with_body(
        self, request: web.Request, passage: Passage, body: Body | None, name: str
    ) -> web.StreamResponse:
        model = self._names.get(name)
        if model is None:
            raise unknown_model(name, self._names)
        passage.model = model
        switcher = self._switcher
        handover = passage.handover
        ticket = passage.ticket = switcher.enter(model) if handover is None else handover.ticket
        try:
            while True:
                admission = ticket.admission or await self._admission(request, passage, body)
                try:
                    return await self._attempt(request, passage, admission, body)
                except EngineRefusedError:
                    if admission.returned:
                        switcher.suspect(model, refused=True)
                        raise
                    switcher.give_back(ticket, switcher.activity(admission))
        finally:
            if passage.voice is not None:
                self._herald.remove(ticket)
            switcher.leave(ticket)

    async def _admission(self, request: web.Request, passage: Passage, body: Body | None) -> Admit:
        """Wait until the request is let through; meanwhile tell its client where it stands, if that is wanted."""
        ticket, since = passage.ticket, self._switcher.now()
        assert ticket is not None
        waits = ticket.rejection is None
        if waits:
            ticket.request_id = passage.request_id
            if passage.voice is None:
                passage.voice = await self._voice(request, passage, body)
            if passage.voice is not None:
                self._herald.add(ticket, passage.voice)
        try:
            return await self._switcher.admission(ticket)
        finally:
            if passage.voice is not None and passage.early is None:
                self._herald.remove(ticket)
            if passage.trace is not None and waits:
                passage.trace.queued(ticket.model, since, self._switcher.now())

    async def _voice(self, request: web.Request, passage: Passage, body: Body | None) -> Voice | None:
        ticket, holder = passage.ticket, passage.holder
        assert ticket is not None
        by_key = None if holder is None else holder.progress
        word = wish(request, default=self._progress if by_key is None else by_key)
        if word == "off":
            return None
        if (expected := self._herald.expected(ticket)) is not None:
            passage.headers.append((EXPECTED, str(expected)))
        if word == INTERIM:
            return Interim(request)
        dialect = await dialect_of(request, passage.route, body)
        if dialect is None:
            return None

        def headers() -> list[tuple[str, str]]:
            waited = self._switcher.now() - ticket.arrived
            return [*passage.headers, ("X-LLMux-Queue-Seconds", f"{waited:.3f}")]

        return InBody(Early(request, dialect), headers)

    async def _attempt(
        self, request: web.Request, passage: Passage, admission: Admit, body: Body | None
    ) -> web.StreamResponse:
        definition = admission.definition
        assert isinstance(definition, EngineDefinition)
        assert passage.ticket is not None
        target = passage.route.target
        if definition.upstream_model is not None and passage.route.kind is Kind.FORWARD:
            if body is not None and body.field is not None:
                body = body.replace_model(definition.upstream_model)
            else:
                target = rename_in_query(target, definition.upstream_model)
        activity = self._switcher.activity(admission)
        early = passage.early
        drop = passage.drop_headers
        exchange = passage.exchange = Exchange(
            address=engine_address(definition.host, definition.port, definition.tls, definition.base_path),
            method=request.method,
            target=target.encode("utf-8", "surrogateescape"),
            raw_headers=request.raw_headers,
            body=body,
            request_id=passage.request_id,
            activity=activity,
            # What has begun goes on uncompressed.
            drop_headers=drop if early is None else drop | {b"accept-encoding"},
            early=early,
            extra_headers=[*passage.headers, ("X-LLMux-Queue-Seconds", f"{passage.waited:.3f}")],
            fresh_only=admission.returned,
        )
        passage.ticket.attach(exchange.cut)
        handover = passage.handover
        try:
            if handover is not None:
                exchange.fresh_only |= handover.fresh_only
                error, handover.error = handover.error, None
                if error is not None:
                    raise error
            response = await self._forward(request, passage, exchange)
        except EngineRefusedError:
            raise
        except EngineError:
            self._switcher.suspect(admission.model, refused=False)
            raise
        if exchange.broken is not None and exchange.cut_off is None:
            self._switcher.suspect(admission.model, refused=False)
        return response

    async def _forward(self, request: web.Request, passage: Passage, exchange: Exchange) -> web.StreamResponse:
        trace = passage.trace
        if trace is None:
            return await self._forwarder.forward(request, exchange)
        exchange.drop_headers |= trace.fields
        exchange.added_headers = trace.sending(self._switcher.now())
        failure = None
        try:
            return await self._forwarder.forward(request, exchange)
        except RequestError as error:
            failure = error.code
            raise
        finally:
            failure = failure or exchange.broken
            trace.sent(self._switcher.now(), exchange.status, exchange.first_byte_at, failure)


def _meet(expects: str, request: web.Request, passage: Passage) -> None:
    """Tell a client that waits for it to send its body, now that its path, key and size are in order."""
    if expects.strip().lower() != "100-continue":
        raise BadRequestError(f"llmux cannot meet the expectation {expects[:100]!r}", code="expectation_failed")
    if not passage.told_to_send and request.transport is not None and request.version >= HttpVersion11:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def unknown_model(name: str, names: Iterable[str]) -> UnknownModelError:
    """Return the error for a name that is not configured; it lists those that are."""
    known = ", ".join(sorted(names))
    shown = name if len(name) <= 100 else name[:100] + "…"  # noqa: PLR2004
    return UnknownModelError(f"model {shown!r} not found; configured are: {known}", param="model")


def rename_in_query(target: str, model: str) -> str:
    """Replace the value of every ``model`` in a target's query; nothing else changes."""
    path, question, query = target.partition("?")
    pairs = query.split("&")
    for index, pair in enumerate(pairs):
        key, equals, _ = pair.partition("=")
        if equals and unquote_plus(key) == "model":
            pairs[index] = f"{key}={quote_plus(model)}"
    return f"{path}{question}{'&'.join(pairs)}"


def _named(route: Route, body: Body | None) -> str:
    return route.model if route.kind is Kind.UPSTREAM else model_of(body, route.target.partition("?")[2])


@functools.lru_cache(maxsize=256)
def engine_address(host: str, port: int, tls: bool, base_path: str) -> EngineAddress:
    """Return an engine's address, the same object every time."""
    return EngineAddress(host, port, tls, base_path)
