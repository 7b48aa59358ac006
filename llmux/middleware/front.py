"""The first to handle a request: its ID, origin, path and key; and the last to handle the answer.

Whatever happens further in becomes a response with llmux's headers here, in the dialect of the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

from llmux.aiohttp_internals import RelayedResponse, answer_has_begun
from llmux.config import Config
from llmux.config.access import Access
from llmux.config.setting_types import is_loopback as is_loopback_host
from llmux.errors import (
    INTERNAL_ERROR,
    BadRequestError,
    EngineError,
    ForbiddenError,
    MethodNotAllowedError,
    PathRefusedError,
    RequestError,
    TooManyAttemptsError,
    UnauthorizedError,
    UnavailableError,
)
from llmux.extract import BodyBudget
from llmux.middleware.authentication import Keys, is_control
from llmux.middleware.classes import Classes
from llmux.middleware.context import QUEUE_SECONDS, REFUSED, Reporting, RequestContext, request_id
from llmux.middleware.engine_path import EnginePath
from llmux.middleware.fast_path import FastPath
from llmux.middleware.model_handler import ModelHandler
from llmux.middleware.origin import ANY, METHODS, Hosts, Origins, Verdict
from llmux.middleware.paths import ADMIN_PREFIXES, OPEN_PATHS, PAGE, ForwardedPaths, Kind, Route, with_slash
from llmux.observability.metrics import Metrics
from llmux.observability.notices import EventLog
from llmux.proxy import Forwarder, error_response
from llmux.proxy.aiohttp_client import TAP, Tap
from llmux.proxy.envelope import no_key, refused_too_often
from llmux.runtime import Switcher

if TYPE_CHECKING:
    from llmux.accounts.gate import Gate
    from llmux.observability.audit import Audit
    from llmux.observability.spans import RequestTrace, Tracing

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

TELL_EVERY = 10.0  # seconds between two log lines about bodies that cannot be kept
_SHOWN = 100  # characters of a refused Host
_SERVED = frozenset({Kind.FORWARD, Kind.UPSTREAM})
_OPERATED = frozenset({Kind.OWN, Kind.UPSTREAM})
_READING = frozenset({hdrs.METH_GET, hdrs.METH_HEAD, hdrs.METH_OPTIONS})
_NO_KEY = frozenset({UnauthorizedError.code, TooManyAttemptsError.code})
_NEVER = frozenset({hdrs.METH_CONNECT, hdrs.METH_TRACE})
WITHDRAW = "/llmux/withdraw/"  # for gateways
EVENTS = "/llmux/events"
TELL_MORE = frozenset({EVENTS, "/llmux/history"})  # shows more to operators
HEADERS: web.RequestKey[list[tuple[str, str]]] = web.RequestKey("HEADERS", list)
"""Headers for the response of a handler that prepares it by itself."""
OPERATOR: web.RequestKey[bool] = web.RequestKey("OPERATOR", bool)
"""Whether a request for one of llmux's own paths comes from an operator."""
OPTIONS: web.RequestKey[dict[str, Any]] = web.RequestKey("OPTIONS", dict)
"""Details of an operator's allowed request, for the audit."""
GRANT: web.RequestKey[Any] = web.RequestKey("GRANT", object)
"""What the key of such a request may use; None: everything."""


class RequestHandler(Protocol):
    """Serves the requests that name a model."""

    budget: BodyBudget

    @property
    def gate(self) -> Gate | None:
        """What checks the keys' limits; None if no key is limited."""

    async def serve(self, request: web.Request, context: RequestContext) -> web.StreamResponse:
        """Serve a request. Raises a RequestError if it is refused, ClientGoneError when the client went away."""


class AccessSettings(Access, Protocol):
    """The settings that decide which requests are accepted."""

    @property
    def host(self) -> str:
        """The address to listen on."""

    @property
    def called(self) -> Sequence[str]:
        """The names by which it may be called."""

    @property
    def cors(self) -> Sequence[str]:
        """The origins of web pages that may call it."""

    @property
    def access_log(self) -> bool:
        """Whether there is a log line for each request."""


class Front:
    """llmux as an aiohttp middleware.

    In llmux's own application (``own=True``) it answers for every path. In another application it takes the
    forwarded paths, and leaves all others to the application's own routes.
    """

    def __init__(
        self,
        switcher: Switcher,
        forwarder: Forwarder,
        *,
        own: bool = False,
        tracing: Tracing | None = None,
        handler: RequestHandler | None = None,
    ) -> None:
        """``handler`` serves requests that name a model, instead of a ``ModelHandler``."""
        self._switcher = switcher
        self._own = own
        self._tracing = tracing
        self._log: EventLog = switcher.log
        self._metrics: Metrics = switcher.metrics
        self._reporting = Reporting(switcher)
        self._models = ModelHandler(switcher, forwarder) if handler is None else None
        self._handler: RequestHandler = self._models or handler  # type: ignore[assignment]
        self.fast_path = self._make_fast_path(self._reporting, forwarder)
        self.port = switcher.config.port
        self._host = switcher.config.host  # changing it needs a restart
        self._keys = Keys()
        self._tell_bodies_at = -math.inf
        self._readers: dict[int, web.Request] = {}  # of the streams of events
        self._judging: set[asyncio.Task[None]] = set()
        self.configure(switcher.config)

    def configure(self, config: Config) -> None:
        """Apply a configuration: names, paths, origins, keys, limits."""
        paths = ForwardedPaths((*config.forward, *config.passive), config.names)
        hosts = self.let_in(config, paths)
        assert self._models is not None
        self._models.configure(config)
        alone = self._tracing is None
        counted = ForwardedPaths(config.forward, config.names, without=config.passive) if config.passive else paths
        exact = self._models.exact_usage
        self.fast_path.configure(
            counted,
            Classes(config).names,
            most=config.max_body,
            keys=self._keys,
            hosts=hosts,
            alone=alone,
            gate=self._models.gate,
            is_silent=None if exact is None else exact.is_silent,
        )

    def _make_fast_path(self, reporting: Reporting, forwarder: Forwarder) -> FastPath:
        assert self._models is not None
        return EnginePath(reporting, forwarder, self._models)

    def let_in(self, config: AccessSettings, paths: ForwardedPaths) -> Hosts:
        """Apply the checks of requests: by their paths, origins, keys and the name that they call llmux by."""
        named = [name for name in config.called if name != ANY]
        origins, hosts = (
            Origins(config.cors, port=self.port, hosts=(config.host, socket.gethostname(), *named)),
            Hosts(config.called, held=self._own and not config.api_keys and is_loopback_host(self._host)),
        )
        self._paths, self._origins, self._hosts = paths, origins, hosts
        self._keys.configure(config)
        self._reporting.access_log = config.access_log
        for request in self._readers.values():
            task = asyncio.get_running_loop().create_task(self._judge_again(request), name="llmux: a reader's key")
            self._judging.add(task)
            task.add_done_callback(self._judging.discard)
        return hosts

    def middleware(self) -> Middleware:
        """Return it in the shape that ``web.Application(middlewares=[…])`` takes."""

        @web.middleware
        async def llmux(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await self.handle(request, handler)

        return llmux

    def server_handler(self, application: Handler) -> Callable[[Any], Awaitable[web.StreamResponse]]:
        """Return the handler for a server of llmux's own: only llmux's own paths go through the application.

        The application's routes do not concern the other paths, and finding that out takes a seventh of the time
        that llmux spends on a small request.
        """

        async def receive(request: web.Request) -> web.StreamResponse:
            kind = self._paths.decide(request.raw_path, request.method).kind
            if kind is Kind.OWN and request.method != hdrs.METH_OPTIONS and hdrs.EXPECT not in request.headers:
                return await application(request)
            return await self.handle(request, application, direct=True)

        return receive

    async def handle(self, request: web.Request, handler: Handler, *, direct: bool = False) -> web.StreamResponse:
        """Serve one request. ``direct``: it has not been through an application."""
        route = self._paths.decide(request.raw_path, request.method)
        if not self._own and route.kind is not Kind.FORWARD:
            return await handler(request)
        context = self._context(request, route, told_to_send=not direct)
        verdict = self._origins.check(request.headers.get(hdrs.ORIGIN), request.headers.get(hdrs.HOST))
        context.headers[:0] = [("X-Request-ID", context.request_id), *verdict.headers.items()]
        status: int | None = 500
        failure = None
        context.trace = None if self._tracing is None else self._begin_trace(self._tracing, request, context)
        response = None
        try:
            response = await self._serve(request, handler, context, verdict)
            status = response.status
        except RequestError as error:
            response = self._refuse(request, context, error)
            status, failure = error.status, error.code
        except web.HTTPException as error:
            response = self._translate(request, context, error)
            status = response.status
        except (ConnectionError, asyncio.CancelledError):
            status = None
            raise
        except Exception as error:
            self._log.emit("internal_error", error=repr(error), exc_info=error, request_id=context.request_id)
            if answer_has_begun(request):
                raise ConnectionResetError("the answer is under way already") from error
            response = self._refuse(request, context, RequestError(INTERNAL_ERROR))
        finally:
            self._finish(context, status, failure)
            if (tap := request.get(TAP)) is not None:
                _tell_end(tap, context, response, status, failure)
            if self._switcher.audit is not None:
                self._audit(self._switcher.audit, request, context, status, failure)
        return response

    def _context(self, request: web.Request, route: Route, *, told_to_send: bool) -> RequestContext:
        context: RequestContext | None = getattr(request.protocol, "handed_over", None)
        if context is None:
            given = request_id(request.headers.get("X-Request-ID"))
            return RequestContext(self._reporting, given, route, self._switcher.now(), told_to_send=told_to_send)
        request.protocol.handed_over = None  # type: ignore[attr-defined]
        context.route = route
        return context

    def _finish(self, context: RequestContext, status: int | None, failure: str | None) -> None:
        """Finish a request; without a status its client has left. llmux's own paths are not counted."""
        if context.route.kind is Kind.OWN:
            if status is None:
                self._log.emit("client_left", model=None, request_id=context.request_id)
        elif status is None:
            context.client_left()
        else:
            context.finish(status, failure)

    async def _serve(
        self, request: web.Request, handler: Handler, context: RequestContext, verdict: Verdict
    ) -> web.StreamResponse:
        route = context.route
        _refuse_unusual(request)
        if not is_control(request):
            await self._judge_page(request, route, verdict)
        if getattr(request.protocol, "reserved", False):
            context.headers.append((hdrs.CONNECTION, "close"))
            await self._refuse_surplus(request, route)
        if request.method == hdrs.METH_OPTIONS:
            answer = self._origins.options(request.headers)
            context.headers = [context.headers[0], *answer.headers.items()]
            return _with_headers(web.Response(status=answer.status), context)
        match route.kind:
            case Kind.MALFORMED:
                raise BadRequestError(route.reason, code="malformed_request")
            case Kind.REFUSED:
                self._log.emit("path_refused", path=route.path, reason=route.reason)
                raise PathRefusedError(f"This path is not forwarded: {route.reason}.")
            case Kind.OWN:
                await self._authorize_own(request, context)
                request[HEADERS] = [*context.headers, (QUEUE_SECONDS, "0.000")]
                with self._follows(request, route):
                    return _with_headers(await handler(request), context)
            case Kind.UPSTREAM:
                context.holder, context.drop_headers = await self._keys.operator(request)
                request[OPTIONS] = {}
                place = with_slash(request.raw_path, route)
                if place is not None and request.method in _READING and _shows_pages(request):
                    return _with_headers(web.Response(status=308, headers={hdrs.LOCATION: place}), context)
            case Kind.FORWARD:
                let = self._keys.of_client(await self._keys.client(request), request)
                context.holder, context.drop_headers = let
        return await self._handler.serve(request, context)

    async def _judge_page(self, request: web.Request, route: Route, verdict: Verdict) -> None:
        """Refuse requests that a page of another site makes a browser send. Raises ForbiddenError."""
        headers = request.headers
        host = self._hosts.refused(headers.getall(hdrs.HOST, ()), headers)
        if host is not None and not await self._keys.shows_one(request):  # a foreign page knows no key
            self._log.emit("host_refused", host=host[:_SHOWN], path=route.path)
            raise ForbiddenError(
                f"The Host {host[:_SHOWN]!r} is neither localhost nor a loopback address: if it is a name of this"
                " llmux, add it to `hosts` in the configuration.",
                code="host_not_allowed",
            )
        reason = "" if verdict.allowed or _is_page(request, route) else verdict.reason
        if verdict.allowed and not _is_visit(request, route):
            sites = headers.getall("Sec-Fetch-Site", ())
            reason = self._origins.check_site(sites, headers.get(hdrs.ORIGIN)) if sites else ""
        if reason:
            site, origin = headers.get("Sec-Fetch-Site"), headers.get(hdrs.ORIGIN)
            self._log.emit("origin_refused", origin=origin, site=site, path=route.path)
            raise ForbiddenError(reason, code="origin_not_allowed")

    def _begin_trace(self, tracing: Tracing, request: web.Request, context: RequestContext) -> RequestTrace | None:
        route = context.route
        if route.kind not in _SERVED:
            return None
        return tracing.request(request.method, route.path, request.headers, context.began, self._switcher.now())

    def _audit(
        self, audit: Audit, request: web.Request, context: RequestContext, status: int | None, failure: str | None
    ) -> None:
        """Write what an operator did, or tried to, and which keys were refused, to the audit."""
        route, method = context.route, request.method
        told: dict[str, Any] = {
            "from": "control socket" if is_control(request) else request.remote,
            "status": status,
            "error": failure,
            "request_id": context.request_id,
        }
        if failure in _NO_KEY:
            audit.refused("key_refused", method=method, path=route.path, **told)
            return
        if method in _READING or route.kind not in _OPERATED or route.path.startswith(WITHDRAW):
            return
        if OPTIONS not in request:  # not an operator's request
            if status == ForbiddenError.status:
                audit.refused("refused", method=method, path=route.path, **told)
            return
        by = "operator" if context.holder is None else context.holder.name or "operator"
        if route.kind is Kind.UPSTREAM:
            if self._paths.decide(route.path, method).kind is Kind.FORWARD:
                return  # a normal request of a client
            audit.put("operated", act=f"{method} {route.path}", model=route.model, by=by, **told)
            return
        said = request[OPTIONS]
        options = dict(said)
        if "id" in request.query:
            options["id"] = request.query["id"]
        audit.operated(method, route.path, options=options or None, by=by, **told)

    async def _authorize_own(self, request: web.Request, context: RequestContext) -> None:
        route = context.route
        if route.path.startswith(ADMIN_PREFIXES):
            context.holder = (await self._keys.operator(request)).holder
            request[OPTIONS] = {}
        elif route.path not in OPEN_PATHS and not _is_page(request, route):
            if route.path in TELL_MORE:  # first: it may wait, and a reload meanwhile may end the key
                request[OPERATOR] = await self._is_operator(request)
            let = await self._keys.client(request)
            if route.path.startswith(WITHDRAW) and let.holder is not None and not let.may_withdraw:
                raise ForbiddenError("This takes the key of a gateway: one with `gateway: true`.")
            if self.gate is not None and let.holder is not None and let.holder.name is not None:
                request[GRANT] = self.gate.grants.get(let.holder.name)

    @contextlib.contextmanager
    def _follows(self, request: web.Request, route: Route) -> Iterator[None]:
        """Remember the reader of a stream of events, which may last longer than its key."""
        if route.path == EVENTS:
            self._readers[id(request)] = request
        try:
            yield
        finally:
            self._readers.pop(id(request), None)

    async def _judge_again(self, request: web.Request) -> None:
        """End a stream of events whose key is none any more, or no operator's."""
        try:
            await self._keys.client(request)
            same = request[OPERATOR] == await self._is_operator(request)
        except RequestError:
            same = False
        if not same and id(request) in self._readers and request.transport is not None:
            request.transport.abort()  # one that does not read would never see a proper close

    async def _refuse_surplus(self, request: web.Request, route: Route) -> None:
        """When there are too many connections, refuse all requests but health and operators'."""
        if route.kind is Kind.OWN and route.path != EVENTS:  # a stream of events would last
            if route.path in OPEN_PATHS:
                return
            if route.path.startswith("/llmux/") and await self._is_operator(request):
                return
        raise UnavailableError(
            "llmux has too many open connections.", code="too_many_connections", retry_after=1.0
        )

    def close(self) -> None:
        """Write pending captures; waits for that, but not long."""
        if self._models is not None and self._models.captures is not None:
            self._models.captures.close()

    @property
    def gate(self) -> Gate | None:
        """What checks the keys' limits; None if no key is limited."""
        return self._handler.gate

    async def _is_operator(self, request: web.Request) -> bool:
        try:
            let = await self._keys.operator(request)
        except RequestError:
            return False
        # Without a key, an unknown name may be that of a web page and point here (DNS rebinding).
        return let.holder is not None or self._origins.is_here(request.headers.get(hdrs.HOST))

    def _refuse(self, request: web.Request, context: RequestContext, error: RequestError) -> web.StreamResponse:
        if context.ticket is None or context.ticket.rejection is None:
            self._metrics.request_rejected(context.model, error.code)
        if error.code == "bodies_full" and (now := time.monotonic()) >= self._tell_bodies_at:
            self._tell_bodies_at = now + TELL_EVERY
            self._log.emit("bodies_full", error=error.message, request_id=context.request_id)
        if isinstance(error, EngineError) and self._models is not None:
            self._log.emit("engine_broke_off", model=context.model, error=error.message)
        anthropic = context.route.anthropic(request.raw_path)
        if context.early is not None:
            return context.early.fail(error, anthropic=anthropic, request_id=context.request_id)
        headers = context.fields
        if (refused := context.refused_with(error)) is not None:
            headers.append((REFUSED, refused))
        headers.extend(no_key(error))
        response = error_response(error, anthropic=anthropic, headers=headers)
        if isinstance(error, UnauthorizedError | TooManyAttemptsError) and refused_too_often(request.protocol):
            response.force_close()
        if error.code == "malformed_request" and hdrs.TRANSFER_ENCODING in request.headers:
            response.force_close()  # the end of its body is uncertain
        return response

    def _translate(
        self, request: web.Request, context: RequestContext, error: web.HTTPException
    ) -> web.StreamResponse:
        """Put what aiohttp or a handler raised into the envelope; a response that is no error is unchanged."""
        if isinstance(error, web.HTTPNotFound):
            said, path = "llmux has nothing here.", context.route.path
            if path != request.path:  # which routes take as it is, slash by slash
                said = f"No such path: if {path} is meant, the client's base address has a slash too many."
            return self._refuse(request, context, PathRefusedError(said, code="not_found"))
        if isinstance(error, web.HTTPMethodNotAllowed):
            allowed = ", ".join(sorted(error.allowed_methods))
            response = self._refuse(request, context, MethodNotAllowedError(f"This path takes {allowed}."))
            response.headers[hdrs.ALLOW] = allowed
            return response
        response = web.Response(status=error.status, headers=error.headers, body=error.body)
        return _with_headers(response, context)


def _refuse_unusual(request: web.Request) -> None:
    """Refuse requests that a server in front of engines does not need, and parsers disagree about."""
    if request.method in _NEVER:
        raise web.HTTPMethodNotAllowed(request.method, METHODS.split(", "))
    codings = request.headers.getall(hdrs.TRANSFER_ENCODING, ())
    if codings and (len(codings) > 1 or codings[0].strip().lower() != "chunked"):
        raise BadRequestError(
            "A request's Transfer-Encoding must be chunked, and nothing else.", code="malformed_request"
        )


def _is_page(request: web.Request, route: Route) -> bool:
    """Whether this requests a file of the page. Browsers send the page's origin with each of them."""
    ours = route.path == PAGE or route.path.startswith(f"{PAGE}/")
    # A browser that requests the bare address is redirected to the page.
    ours = ours or (route.path == "/" and _shows_pages(request))
    return ours and route.kind is Kind.OWN and request.method in {hdrs.METH_GET, hdrs.METH_HEAD}


def _shows_pages(request: web.Request) -> bool:
    """Whether a browser sends it, for its user to see."""
    return "text/html" in request.headers.get(hdrs.ACCEPT, "")


def _is_visit(request: web.Request, route: Route) -> bool:
    """Whether a link opens the page in a tab: that changes nothing, and the link's site sees nothing of it."""
    headers = request.headers
    opens = headers.get("Sec-Fetch-Mode") == "navigate" and headers.get("Sec-Fetch-Dest") == "document"
    return opens and _is_page(request, route)


def _tell_end(
    tap: Tap, context: RequestContext, response: web.StreamResponse | None, status: int | None, failure: str | None
) -> None:
    own = response.body if isinstance(response, web.Response) else None
    tap.ended(
        own if isinstance(own, bytes) else None,
        request_id=context.request_id,
        key=context.key,
        asked=context.asked,
        model=context.model,
        status=status,
        error=failure or (None if context.exchange is None else context.exchange.broken),
        waited=context.waited,
    )


def _with_headers(response: web.StreamResponse, context: RequestContext) -> web.StreamResponse:
    if not response.prepared and not isinstance(response, RelayedResponse):
        for name, value in context.headers:
            response.headers[name] = value
        response.headers[QUEUE_SECONDS] = "0.000"
    return response


Names = Mapping[str, str]
