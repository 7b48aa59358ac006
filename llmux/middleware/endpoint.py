"""A request on its way through llmux: which model, when, and off to its engine."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterable
from urllib.parse import quote_plus, unquote_plus

from aiohttp import web

from llmux.config import Config, EngineDefinition
from llmux.core.effects import Admit
from llmux.errors import EngineError, UnknownModelError
from llmux.extract import Body, BodyBudget, BodyLimits, model_of, read_body
from llmux.middleware.paths import Kind, Route
from llmux.proxy import Exchange, Forwarder
from llmux.runtime import Switcher, Ticket
from llmux.upstream import EngineAddress, EngineRefusedError

GONE_POLL = 1.0  # seconds; only where aiohttp does not tell that a client has left


class Passage:
    """One request and what became of it; the caller reads it when ``Endpoint.serve`` is done."""

    __slots__ = ("drop_header", "exchange", "headers", "model", "request_id", "route", "ticket")

    def __init__(self, request_id: str, route: Route) -> None:
        self.request_id = request_id
        self.route = route
        self.drop_header: bytes | None = None  # the credential that was meant for llmux
        self.headers: list[tuple[str, str]] = []
        self.model: str | None = None
        self.ticket: Ticket | None = None
        self.exchange: Exchange | None = None

    @property
    def waited(self) -> float:
        """Seconds in the queue."""
        return self.ticket.waited if self.ticket is not None else 0.0


class Endpoint:
    """Serves the requests that name a model."""

    def __init__(self, switcher: Switcher, forwarder: Forwarder) -> None:
        self._switcher = switcher
        self._forwarder = forwarder
        self.configure(switcher.config)
        self._budget = BodyBudget(switcher.config.max_buffered)

    def configure(self, config: Config) -> None:
        """Take over a configuration's names and limits."""
        self._names = config.names
        self._limits = BodyLimits(config.max_body, config.max_buffered, config.body_idle_timeout)

    async def serve(self, request: web.Request, passage: Passage) -> web.StreamResponse:
        """Read the request, wait for its model, relay the answer.

        Raises a RequestError for what is refused, ClientGoneError when the client went away.
        """
        route = passage.route
        if not request.can_read_body:
            return await self._with_body(request, passage, None, _named(route, None))
        with await read_body(request, self._limits, self._budget) as body:
            return await self._with_body(request, passage, body, _named(route, body))

    async def _with_body(
        self, request: web.Request, passage: Passage, body: Body | None, name: str
    ) -> web.StreamResponse:
        model = self._names.get(name)
        if model is None:
            raise unknown_model(name, self._names)
        passage.model = model
        switcher = self._switcher
        ticket = passage.ticket = switcher.enter(model)
        try:
            while True:
                admission = ticket.admission or await self._admission(request, ticket)
                try:
                    return await self._attempt(request, passage, admission, body)
                except EngineRefusedError:
                    if admission.returned:
                        switcher.suspect(model, refused=True)
                        raise
                    switcher.give_back(ticket, switcher.activity(admission))
        finally:
            switcher.leave(ticket)

    async def _admission(self, request: web.Request, ticket: Ticket) -> Admit:
        if request.protocol._manager is None or request.protocol._manager.handler_cancellation:  # noqa: SLF001
            return await self._switcher.admission(ticket)
        # In a server that does not cancel the handlers of clients that have left, ask now and then.
        waiting = asyncio.ensure_future(self._switcher.admission(ticket))
        try:
            while not (await asyncio.wait({waiting}, timeout=GONE_POLL))[0]:
                if request.transport is None:
                    raise ConnectionResetError("the client has left")
            return waiting.result()
        finally:
            waiting.cancel()

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
        exchange = passage.exchange = Exchange(
            address=_address(definition.host, definition.port, definition.tls, definition.base_path),
            method=request.method,
            target=target.encode("utf-8", "surrogateescape"),
            raw_headers=request.raw_headers,
            body=body,
            request_id=passage.request_id,
            activity=activity,
            drop_header=passage.drop_header,
            extra_headers=[*passage.headers, ("X-LLMux-Queue-Seconds", f"{passage.waited:.3f}")],
            fresh_only=admission.returned,
        )
        passage.ticket.attach(exchange.cut)
        try:
            response = await self._forwarder.forward(request, exchange)
        except EngineRefusedError:
            raise
        except EngineError:
            self._switcher.suspect(admission.model, refused=False)
            raise
        if exchange.broken is not None and exchange.cut_off is None:
            self._switcher.suspect(admission.model, refused=False)
        return response


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
def _address(host: str, port: int, tls: bool, base_path: str) -> EngineAddress:
    return EngineAddress(host, port, tls, base_path)
