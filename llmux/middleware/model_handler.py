"""A request on its way through llmux: find its model, wait for it, send it to its engine."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, cast
from urllib.parse import quote

from aiohttp import HttpVersion11, hdrs, web

from llmux.aiohttp_internals import cancels_handlers
from llmux.config import Config, EngineDefinition
from llmux.config.problems import in_short
from llmux.core.effects import Admit
from llmux.errors import BadRequestError, LateModelError, RequestError, UnavailableError, UnknownModelError
from llmux.extract import Body, BodyBudget, BodyLimits, model_of, read_body, refuse_announced
from llmux.middleware.context import QUEUE_SECONDS, RequestContext, deadline_of, keep_alive_of
from llmux.middleware.paths import COUNT, UPSTREAM, Kind, Route
from llmux.middleware.progress import (
    EXPECTED,
    INTERIM,
    Channel,
    InBody,
    Interim,
    ProgressNotifier,
    dialect_of,
    wanted,
)
from llmux.middleware.rewriting import MARKS, Rewritten, rename_in_query
from llmux.proxy import ClientGoneError, Exchange, Forwarder, RelayFactory
from llmux.proxy.aiohttp_client import TAP
from llmux.proxy.early_response import EarlyResponse
from llmux.proxy.heads import ACCEPT_ENCODING
from llmux.runtime import Switcher
from llmux.upstream import EngineRefusedError, engine_address

if TYPE_CHECKING:
    from llmux.accounts.captures import Captures
    from llmux.accounts.gate import Gate
    from llmux.middleware.counting import Counting
    from llmux.middleware.exact_usage import ExactUsage
    from llmux.middleware.passive import Passive
    from llmux.middleware.remotes import Remotes
    from llmux.middleware.rerouting import Routing
    from llmux.middleware.targeting import Targeting
    from llmux.middleware.translating import Translating

Serve = Callable[[web.Request, RequestContext, Body | None, str], Awaitable[web.StreamResponse]]
RELAY: web.RequestKey[RelayFactory] = web.RequestKey("RELAY", cast("type[RelayFactory]", Callable))
"""What relays its answer, if that is not passed unchanged."""
GONE_POLL = 0.5  # seconds; only if aiohttp does not report that a client has left


class Watch:
    """Cancels the handler of a client that has left, if the server does not do so."""

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


class ModelHandler:
    """Serves the requests that name a model."""

    def __init__(self, switcher: Switcher, forwarder: Forwarder) -> None:
        self._switcher = switcher
        self._forwarder = forwarder
        self.budget = BodyBudget(switcher.config.max_buffered)
        self._notifier = ProgressNotifier(switcher)
        self.targeting: Targeting | None = None
        self._remotes: Remotes | None = None
        self._routing: Routing | None = None
        self._passive: Passive | None = None
        self.gate: Gate | None = None
        self.captures: Captures | None = None
        self.configure(switcher.config)

    def configure(self, config: Config) -> None:
        """Apply a configuration's names and limits."""
        self._names = config.names
        self._variants = config.variants
        self.gate = self._with_gate(config, self.gate)
        self.exact_usage = _exact_usage(config, self.budget)
        self.captures = _captures(config, self._switcher, self.captures)
        self._listed = config.listed
        self._translating = _translating(config, self.budget)
        self._remotes = self._with_remotes(config, self._remotes)
        self.targeting = _targeting(config, self._switcher, self._remotes, self.budget, self.targeting)
        self._routing = self._with_routing(config, self._routing)
        self._passive = self._with_passive(config.passive, self._passive)
        self._limits = BodyLimits(config.max_body, config.max_buffered, config.body_idle_timeout)
        self.budget.max_buffered = config.max_buffered
        riding = config.policy.ride_along
        self._switcher.riders.configure(riding.minutes, riding.max_wait)
        self._progress = config.progress
        self.deadlines = {name: it.deadline for name, it in config.models.items() if it.deadline is not None}
        self._notifier.every = config.progress_every

    @functools.cached_property
    def _counting(self) -> Counting:
        from llmux.middleware.counting import Counting  # noqa: PLC0415 - many are never asked to count

        return Counting(self._switcher, self._forwarder)

    def _with_remotes(self, config: Config, before: Remotes | None) -> Remotes | None:
        """Return the handler of requests to other hosts, if there are any."""
        if before is not None:
            before.configure(config, self._translating, self.exact_usage)
            return before
        if not config.remotes:
            return None
        from llmux.middleware.remotes import Remotes  # noqa: PLC0415 - most configurations have no use for it

        remotes = Remotes(config, self._switcher, self._translating, self.exact_usage)
        self._forwarder.beside.append(remotes.close)
        return remotes

    def _with_routing(self, config: Config, before: Routing | None) -> Routing | None:
        """Return the handler of `routes` and `spill`, if there are any."""
        if before is not None:
            before.close()
        if not config.routes and not any(model.spill for model in config.models.values()):
            return None
        from llmux.middleware.rerouting import Routing  # noqa: PLC0415 - most configurations have no use for it

        assert self.targeting is not None
        return Routing(config, self._switcher, self.targeting, self.gate, before)

    def _with_gate(self, config: Config, before: Gate | None) -> Gate | None:
        """Return what checks the keys' limits, if any key is limited."""
        gate = before
        if gate is None:
            if not any(entry.managed for entry in config.api_keys):
                return None
            from llmux.accounts.gate import Gate  # noqa: PLC0415 - most configurations have no use for it

            gate = Gate(self._switcher.now, self._is_awake)
        gate.configure(config)
        if before is None and self._switcher.accounts is not None:  # after a reload: they started without it
            gate.kept_by(self._switcher.accounts)
        return gate

    def _is_awake(self, name: str) -> bool:
        """Whether a model is awake, or one of those to which another name may lead."""
        return self._switcher.is_awake(name) or (self.targeting is not None and self.targeting.any_awake(name))

    def _with_passive(self, globs: tuple[str, ...], before: Passive | None) -> Passive | None:
        """Return the handler of passive paths, if there are any."""
        if before is not None:
            before.close()
        if not globs:
            return None
        from llmux.middleware.passive import Passive  # noqa: PLC0415 - most configurations have no use for it

        return Passive(globs, self._switcher, self._attempt)

    async def serve(self, request: web.Request, context: RequestContext) -> web.StreamResponse:
        """Read the request, wait for its model, relay the answer.

        Raises a RequestError for what is refused, ClientGoneError when the client went away.
        """
        cancels = cancels_handlers(request)
        if cancels is None:
            raise ClientGoneError("The client has left.")
        if cancels:
            return await self._serve(request, context)
        with Watch(request):
            return await self._serve(request, context)

    async def _serve(self, request: web.Request, context: RequestContext) -> web.StreamResponse:
        return await serve_with_body(request, context, self._limits, self.budget, self._with_body)

    async def _with_body(
        self, request: web.Request, context: RequestContext, body: Body | None, name: str
    ) -> web.StreamResponse:
        if self.captures is not None and context.holder is not None and context.holder.captured:
            _capture(self.captures, request, body)
        asked, through = name, None
        if self._routing is not None:
            name, context.regions, reason = await self._routing.lead(name, context, body)
            through = None if reason is None else (reason, asked)
        model = self._names.get(name)
        if (context.ticket is not None or context.choice is not None) and (
            through is not None or not self._still_holds(model, context)
        ):
            self._start_again(context)
        if self.gate is not None and context.holder is not None and context.passed is None:
            # A name that only `routes` know cannot be among a key's models.
            known = through is None or asked in self._names or self._is_other_name(asked, context)
            self._let_in(self.gate, context, asked, asked if known else name, name)
        if model is not None and through is None:
            context.asked, context.model = name, model
            return await self._with_model(request, context, body)
        targeting = self.targeting
        if targeting is None or not targeting.knows(name, context):
            raise unknown_model(name, self._listed)
        context.asked = asked
        return await targeting.serve(name, request, context, body, self._with_model, through=through)

    def _still_holds(self, model: str | None, context: RequestContext) -> bool:
        """Whether what the fast path began is what the request asks for: a reload may have changed that since.

        ``model`` is the one that it names now.
        """
        if context.choice is not None:
            return context.choice.made_by is self.targeting
        passive = self._passive is not None and self._passive.matches(context.route.path)
        return not passive and context.ticket is not None and context.ticket.model == model

    def _start_again(self, context: RequestContext) -> None:
        """Give up what the fast path began. Raises what has ended it, unless no engine can have read it."""
        error, ticket, context.first_error = context.first_error, context.ticket, None
        if error is not None and ticket is not None and context.exchange is not None:
            refused = isinstance(error, EngineRefusedError)
            if refused or context.exchange.blames_engine(error):
                self._switcher.suspect(ticket.model, refused=refused)
            if not refused:
                raise error
        context.leave(UnavailableError.status)
        context.asked = context.model = context.choice = None
        context.may_leave = False
        context.headers = [field for field in context.headers if field[0] not in MARKS]

    def _is_other_name(self, name: str, context: RequestContext) -> bool:
        """Whether it is another known name: neither a model's nor an alias."""
        return self.targeting is not None and self.targeting.knows(name, context)

    def _let_in(self, gate: Gate, context: RequestContext, asked: str, name: str, led: str) -> None:
        """Check that the key may send this request now. Raises ForbiddenError, LimitError and QuotaError.

        ``name`` is what the key has to be allowed for the one that was ``asked`` for, ``led`` where `routes` lead.
        """
        model = self._names.get(led)
        grant = gate.grants.get(context.key)
        if grant is None:
            return
        if model is None and not self._is_other_name(name, context):
            config = self._switcher.config
            raise unknown_model(name, config.listed if grant.models is None else config.listed_among(grant.models))
        if not grant.allows(name):  # which is not told: a rule may have led there
            context.asked, context.model = name, model
            raise grant.refusal(asked)
        if not grant.counts:
            return
        try:
            ends = model or self._variants.get(led, led)
            context.passed = gate.enter(grant, name, ends, context.sent, context.request_id, context.headers)
        except RequestError:
            context.asked, context.model = name, model
            raise

    async def _with_model(
        self, request: web.Request, context: RequestContext, body: Body | None
    ) -> web.StreamResponse:
        if self._passive is not None and self._passive.matches(context.route.path):
            return await self._passive.serve(request, context, body)
        if context.route.path == COUNT and context.route.kind is Kind.FORWARD and body is not None:
            counted = await self._counting.answer(self._switcher.config, request, context, body)
            if counted is not None:
                return counted
        if self._routing is not None and (offer := self._routing.offer(context)) is not None:
            return await self._routing.serve(offer, request, context, body, self._fitted)
        return await self._fitted(request, context, body)

    async def _fitted(
        self, request: web.Request, context: RequestContext, body: Body | None
    ) -> web.StreamResponse:
        fitted = body if self._translating is None else self._translating.fit(context, body)
        if self.exact_usage is not None and fitted is body and context.route.kind is Kind.FORWARD:
            asking = await self.exact_usage.asking(context.route.path, body)
            if asking is not None:
                request[RELAY], fitted = self.exact_usage.relay, asking
        try:
            return await self._served(request, context, fitted)
        finally:
            if fitted is not None and body is not None and not fitted.shares(body):
                fitted.close()

    async def _served(
        self, request: web.Request, context: RequestContext, body: Body | None
    ) -> web.StreamResponse:
        model, switcher = context.model, self._switcher
        assert model is not None
        if context.ticket is None:  # else it was on the fast path
            deadline, keep = deadline_of(request, self.deadlines.get(model)), keep_alive_of(request)
            rides = context.holder is not None and context.holder.rides
            context.ticket = switcher.enter(model, context.key, rides=rides, deadline=deadline)
            context.ticket.keep = keep
            if rides:
                context.ticket.request_id = context.request_id
                await switcher.ride(context.ticket)
        ticket = context.ticket
        try:
            while True:
                admission = ticket.admission or await self._admission(request, context, body)
                try:
                    return await self._attempt(request, context, admission, body)
                except EngineRefusedError:
                    if admission.returned:
                        switcher.suspect(model, refused=True)
                        raise
                    switcher.give_back(ticket, switcher.activity(admission))
        finally:
            if context.channel is not None:
                self._notifier.remove(ticket)

    async def _admission(self, request: web.Request, context: RequestContext, body: Body | None) -> Admit:
        """Wait until the request is admitted; meanwhile send its client progress messages, if wanted."""
        ticket, since = context.ticket, self._switcher.now()
        assert ticket is not None
        waits = ticket.rejection is None
        if waits:
            ticket.request_id = context.request_id
            if context.channel is None:
                context.channel = await self._channel(request, context, body)
            if context.channel is not None:
                self._notifier.add(ticket, context.channel)
            if context.spillable is not None and self._routing is not None:
                self._routing.watch(ticket, context.spillable)
        try:
            return await self._switcher.admission(ticket)
        finally:
            if context.spillable is not None and self._routing is not None:
                self._routing.forget(ticket)
            if context.channel is not None and context.early is None:
                self._notifier.remove(ticket)
            if context.trace is not None and waits:
                context.trace.queued(ticket.model, since, self._switcher.now())

    async def _channel(self, request: web.Request, context: RequestContext, body: Body | None) -> Channel | None:
        ticket = context.ticket
        assert ticket is not None
        word = wanted(request, default=context.wants_progress(self._progress))
        if word == "off":
            return None
        if (expected := self._notifier.expected(ticket)) is not None:
            context.headers.append((EXPECTED, str(expected)))
        if word == INTERIM:
            return Interim(request)
        if isinstance(body, Rewritten) or context.may_leave:
            return None  # its answer is made when the request arrives
        dialect = await dialect_of(request, context.route, body)
        if dialect is None:
            return None

        def headers() -> list[tuple[str, str]]:
            waited = self._switcher.now() - ticket.arrived
            return [*context.headers, (QUEUE_SECONDS, f"{waited:.3f}")]

        return InBody(EarlyResponse(request, dialect), headers)

    async def _attempt(
        self, request: web.Request, context: RequestContext, admission: Admit, body: Body | None
    ) -> web.StreamResponse:
        definition = admission.definition
        assert isinstance(definition, EngineDefinition)
        assert context.ticket is not None
        target = context.route.target
        if definition.upstream_model is not None and context.route.kind is Kind.FORWARD:
            if body is not None and body.model is not None:
                body = await body.renamed(definition.upstream_model)
            else:
                target = rename_in_query(target, definition.upstream_model)
        activity = self._switcher.activity(admission)
        early = context.early
        drop = context.drop_headers
        relay = request.get(RELAY)
        if isinstance(body, Rewritten):
            target, relay = body.target, body.relay
        # An answer that has begun goes on uncompressed, and one that is read for what it costs has to be.
        counted = context.counted and context.route.kind is Kind.FORWARD
        if early is not None or relay is not None or counted:
            drop |= ACCEPT_ENCODING
        exchange = context.exchange = Exchange(
            address=engine_address(definition.host, definition.port, definition.tls, definition.base_path),
            method=request.method,
            target=target.encode("utf-8", "surrogateescape"),
            raw_headers=request.raw_headers,
            body=body,
            request_id=context.request_id,
            activity=activity,
            drop_headers=drop,
            below=_below(context.route),
            early=early,
            extra_headers=context.fields,
            anthropic=context.route.anthropic(request.raw_path),
            fresh_only=admission.returned or context.fresh_only,
            counted=context.counted,
            lost=context.lost,
        )
        context.ticket.attach(exchange.cut)
        try:
            response = await self._forward(request, context, exchange, relay)
        except Exception as error:
            if exchange.blames_engine(error):
                self._switcher.suspect(admission.model, refused=False)
            raise
        if exchange.blames_engine(None):
            self._switcher.suspect(admission.model, refused=False)
        return response

    async def _forward(
        self, request: web.Request, context: RequestContext, exchange: Exchange, relay: RelayFactory | None
    ) -> web.StreamResponse:
        if context.first_error is not None:
            error, context.first_error = context.first_error, None
            raise error
        if context.trace is None:
            return await self._forwarder.forward(request, exchange, relay)
        with context.attempted(exchange):
            return await self._forwarder.forward(request, exchange, relay)


async def serve_with_body(
    request: web.Request, context: RequestContext, limits: BodyLimits, budget: BodyBudget, serve: Serve
) -> web.StreamResponse:
    """Serve a request with its body, if it has one, and the model that it names. Raises RequestError."""
    route = context.route
    if not request.can_read_body:
        try:
            model = named_model(route, None)
        except BadRequestError:
            if route.path == "/v1/responses" and request.headers.get(hdrs.UPGRADE, "").lower() == "websocket":
                said = "A WebSocket must name its model as ?model=NAME: send this request without one."
                raise LateModelError(said, param="model") from None
            raise
        return await serve(request, context, None, model)
    expects = request.headers.get(hdrs.EXPECT)
    if expects is not None:
        refuse_announced(request, limits)
        meet_expectation(expects, request, context)
    with await read_body(request, limits, budget) as body:
        context.sent = body.size
        return await serve(request, context, body, named_model(route, body))


def meet_expectation(expects: str, request: web.Request, context: RequestContext) -> None:
    """Tell a client that waits to send its body to continue, now that path, key and size are in order."""
    if expects.strip().lower() != "100-continue":
        raise BadRequestError(f"llmux cannot meet the expectation {expects[:100]!r}", code="expectation_failed")
    if not context.told_to_send and request.transport is not None and request.version >= HttpVersion11:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def _exact_usage(config: Config, budget: BodyBudget) -> ExactUsage | None:
    """Return the handler of `usage: exact`, if it is set."""
    if config.usage != "exact" or config.ledger is None:
        return None
    from llmux.middleware.exact_usage import ExactUsage  # noqa: PLC0415 - most configurations have no use for it

    return ExactUsage(budget)


def _captures(config: Config, switcher: Switcher, before: Captures | None) -> Captures | None:
    """Return the captures, if they are configured."""
    captures, folder = before, config.captures_path
    if before is not None and before.folder != folder:
        switcher.metrics.registry.unregister(before)
        before.close_soon()
        captures = None
    if config.captures is None or folder is None:
        return None
    if captures is None:
        from llmux.accounts.captures import Captures  # noqa: PLC0415 - most configurations have no use for it

        captures = Captures(folder, switcher.log.emit)
        switcher.metrics.registry.register(captures)
    captures.configure(config.captures)
    return captures


def _capture(captures: Captures, request: web.Request, body: Body | None) -> None:
    sent = 0 if body is None else body.size
    capture = captures.begin(request.method, request.raw_path, request.raw_headers, body, sent)
    if capture is not None:
        request[TAP] = capture


def _targeting(
    config: Config, switcher: Switcher, remotes: Remotes | None, budget: BodyBudget, before: Targeting | None
) -> Targeting | None:
    """Return the handler of names that are not models', if there are any."""
    if not (config.variants or config.virtual or config.remotes or config.routes):
        return None
    from llmux.middleware.targeting import Targeting  # noqa: PLC0415 - most configurations have no use for it

    return Targeting(config, switcher, remotes, budget, before)


def _translating(config: Config, budget: BodyBudget) -> Translating | None:
    """Return the handler of engines that lack a dialect, if there are any."""
    if not config.spoken:
        return None
    from llmux.middleware.translating import Translating  # noqa: PLC0415 - most configurations have no use for it

    return Translating(config, budget)


def unknown_model(name: str, listed: Iterable[str]) -> UnknownModelError:
    """Return the error for a name that is not configured; it lists those that are, or the first of very many."""
    known = in_short(listed)
    shown = name if len(name) <= 100 else name[:100] + "…"  # noqa: PLR2004
    return UnknownModelError(f"model {shown!r} not found; configured are: {known}", param="model")


def named_model(route: Route, body: Body | None) -> str:
    """Return the model that a request names. Raises BadRequestError."""
    return route.model if route.kind is Kind.UPSTREAM else model_of(body, route.target.partition("?")[2])


def _below(route: Route) -> bytes:
    """Return what a client's path has before the engine's."""
    if route.kind is not Kind.UPSTREAM:
        return b""
    return UPSTREAM.encode() + quote(route.model, safe="/:").encode()
