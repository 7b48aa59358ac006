"""The first to see a request: its id, its origin, its path, its key; and the last to see the answer.

Whatever happens further in, here it becomes a response with llmux's headers, in the dialect of the client.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

from llmux.config import Config
from llmux.config.address import is_loopback as is_loopback_host
from llmux.errors import (
    BadRequestError,
    EngineError,
    ForbiddenError,
    MethodNotAllowedError,
    PathRefusedError,
    RequestError,
    UnauthorizedError,
)
from llmux.middleware.endpoint import Endpoint, Passage
from llmux.middleware.hosts import ANY, Hosts
from llmux.middleware.identity import request_id
from llmux.middleware.keys import Keys, is_control
from llmux.middleware.lane import Lane
from llmux.middleware.origin import METHODS, Origins, Verdict
from llmux.middleware.paths import ForwardedPaths, Kind, Route
from llmux.observability.metrics import Metrics
from llmux.observability.notices import EventLog
from llmux.proxy import Forwarder, error_response
from llmux.proxy.relay import RelayedResponse
from llmux.runtime import Switcher

if TYPE_CHECKING:
    from llmux.tracing import RequestTrace, Tracing

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_SHOWN = 100  # characters of a refused Host
GONE = 499  # nginx's status for a client that closed its connection; only ever seen in metrics and logs
_SERVED = frozenset({Kind.FORWARD, Kind.UPSTREAM})
_NEVER = frozenset({hdrs.METH_CONNECT, hdrs.METH_TRACE})
OPEN_PATHS = frozenset({"/health", "/ready"})
ADMIN_PREFIXES = ("/llmux/models/", "/llmux/lease", "/llmux/manual")
TELL_MORE = frozenset({"/llmux/events", "/llmux/history"})  # to operators
HEADERS: web.RequestKey[list[tuple[str, str]]] = web.RequestKey("HEADERS", list)
"""What a handler that prepares its response by itself has to put on it."""
OPERATOR: web.RequestKey[bool] = web.RequestKey("OPERATOR", bool)
"""Whether a request for one of llmux's own paths comes from an operator."""
PAGE = "/llmux/ui"  # it tells nothing by itself, and a browser that opens it has no key to show yet

_MESSAGES = re.compile(r"(?:https?://[^/?#]*)?/+v1/+messages(?![^/?#;\\])", re.IGNORECASE)


class Front:
    """llmux as an aiohttp middleware.

    In llmux's own application (``own=True``) it answers for every path. In somebody else's it takes the
    forwarded paths, and leaves all others to the application's own routes.
    """

    def __init__(
        self, switcher: Switcher, forwarder: Forwarder, *, own: bool = False, tracing: Tracing | None = None
    ) -> None:
        self._switcher = switcher
        self._own = own
        self._tracing = tracing
        self._log: EventLog = switcher.log
        self._metrics: Metrics = switcher.metrics
        self._endpoint = Endpoint(switcher, forwarder)
        self.lane = Lane(switcher, forwarder, self._endpoint.budget)
        self.port = switcher.config.port
        self._host = switcher.config.host  # another takes a restart
        self._keys = Keys()
        self.configure(switcher.config)

    def configure(self, config: Config) -> None:
        """Take over a configuration: names, paths, origins, keys, limits."""
        named = [name for name in config.hosts if name != ANY]
        paths, origins, hosts = (
            ForwardedPaths(config.forward, config.names),
            Origins(config.cors, port=self.port, hosts=(config.host, socket.gethostname(), *named)),
            Hosts(config.hosts, held=self._own and not config.api_keys and is_loopback_host(self._host)),
        )
        self._paths, self._origins, self._hosts = paths, origins, hosts
        self._keys.configure(config)
        self._access_log = config.access_log
        self._endpoint.configure(config)
        most, log = config.max_body, config.access_log
        alone = self._tracing is None
        self.lane.configure(
            paths, config.names, most=most, access_log=log, keys=self._keys, hosts=hosts, alone=alone
        )

    def middleware(self) -> Middleware:
        """Return it in the shape that ``web.Application(middlewares=[…])`` takes."""

        @web.middleware
        async def llmux(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await self.handle(request, handler)

        return llmux

    def server_handler(self, application: Handler) -> Callable[[Any], Awaitable[web.StreamResponse]]:
        """Return the handler for a server of llmux's own: only llmux's own paths go through the application.

        For the others its routes have nothing to say, and to find that out takes a seventh of the time that
        llmux spends on a small request.
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
        handover = getattr(request.protocol, "handover", None)
        if handover is None:
            began = self._switcher.now()
            passage = Passage(request_id(request.headers.get("X-Request-ID")), route, told_to_send=not direct)
        else:
            request.protocol.handover = None  # type: ignore[attr-defined]
            began = handover.began
            passage = Passage(handover.request_id, route, told_to_send=True)
            passage.handover, passage.ticket = handover, handover.ticket
        verdict = self._origins.check(request.headers.get(hdrs.ORIGIN), request.headers.get(hdrs.HOST))
        passage.headers = [("X-Request-ID", passage.request_id), *verdict.headers.items()]
        status, failure = 500, None
        passage.trace = None if self._tracing is None else self._begin_trace(self._tracing, request, route, began)
        try:
            response = await self._serve(request, handler, passage, verdict)
            status = response.status
        except RequestError as error:
            response = self._refuse(request, passage, error)
            status, failure = error.status, error.code
        except web.HTTPException as error:
            response = self._translate(request, passage, error)
            status = response.status
        except (ConnectionError, asyncio.CancelledError):
            status = GONE
            self._log.emit("client_left", model=passage.model, request_id=passage.request_id)
            raise
        except Exception as error:
            self._log.emit("internal_error", error=repr(error), exc_info=error, request_id=passage.request_id)
            if request.writer.output_size > 0:
                raise ConnectionResetError("the answer is under way already") from error
            response = self._refuse(request, passage, RequestError("llmux made a mistake; its log says more."))
        finally:
            if handover is not None:
                self._switcher.leave(handover.ticket)
            if route.kind is not Kind.OWN:
                self._account(passage, status, began, failure)
        return response

    async def _serve(
        self, request: web.Request, handler: Handler, passage: Passage, verdict: Verdict
    ) -> web.StreamResponse:
        route = passage.route
        _refuse_unusual(request)
        if not is_control(request):
            await self._judge_page(request, route, verdict)
        if request.method == hdrs.METH_OPTIONS:
            answer = self._origins.options(request.headers)
            passage.headers = [passage.headers[0], *answer.headers.items()]
            return _with_headers(web.Response(status=answer.status), passage)
        match route.kind:
            case Kind.MALFORMED:
                raise BadRequestError(route.reason, code="malformed_request")
            case Kind.REFUSED:
                self._log.emit("path_refused", path=route.path, reason=route.reason)
                raise PathRefusedError(f"This path is not forwarded: {route.reason}.")
            case Kind.OWN:
                await self._authorize_own(request, route)
                request[HEADERS] = [*passage.headers, ("X-LLMux-Queue-Seconds", "0.000")]
                return _with_headers(await handler(request), passage)
            case Kind.UPSTREAM:
                passage.holder, passage.drop_headers = await self._keys.operator(request)
            case Kind.FORWARD:
                passage.holder, passage.drop_headers = await self._keys.client(request)
        return await self._endpoint.serve(request, passage)

    async def _judge_page(self, request: web.Request, route: Route, verdict: Verdict) -> None:
        """Refuse what a web page from elsewhere has a browser send. Raises ForbiddenError."""
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

    def _begin_trace(
        self, tracing: Tracing, request: web.Request, route: Route, began: float
    ) -> RequestTrace | None:
        if route.kind not in _SERVED:
            return None
        return tracing.request(request.method, route.path, request.headers, began, self._switcher.now())

    def _end_trace(self, passage: Passage, status: int, failure: str | None) -> None:
        assert passage.trace is not None
        if failure is None and passage.exchange is not None:
            failure = passage.exchange.broken
        passage.trace.ended(
            self._switcher.now(),
            status,
            failure,
            model=passage.model,
            request_id=passage.request_id,
            key=passage.holder.name if passage.holder is not None else None,
            queue_seconds=passage.waited,
        )

    async def _authorize_own(self, request: web.Request, route: Route) -> None:
        if route.path.startswith(ADMIN_PREFIXES):
            await self._keys.operator(request)
        elif route.path not in OPEN_PATHS and not _is_page(request, route):
            await self._keys.client(request)
            if route.path in TELL_MORE:
                request[OPERATOR] = await self._is_operator(request)

    async def _is_operator(self, request: web.Request) -> bool:
        try:
            let = await self._keys.operator(request)
        except RequestError:
            return False
        # Without a key a name that is not this machine's may be a web page's that points here (DNS rebinding).
        return let.holder is not None or self._origins.is_here(request.headers.get(hdrs.HOST))

    def _refuse(self, request: web.Request, passage: Passage, error: RequestError) -> web.StreamResponse:
        if passage.ticket is None or passage.ticket.rejection is None:
            self._metrics.request_rejected(passage.model, error.code)
        if isinstance(error, EngineError):
            self._log.emit("engine_broke_off", model=passage.model, error=error.message)
        path = passage.route.path
        if path:
            anthropic = path == "/v1/messages" or path.startswith("/v1/messages/")
        else:  # refused or malformed: nobody knows what it means, but it was somebody's
            anthropic = _MESSAGES.match(request.raw_path) is not None
        if passage.early is not None:
            return passage.early.fail(error, anthropic=anthropic, request_id=passage.request_id)
        headers = [*passage.headers, ("X-LLMux-Queue-Seconds", f"{passage.waited:.3f}")]
        if isinstance(error, UnauthorizedError):
            headers.append((hdrs.WWW_AUTHENTICATE, "Bearer"))
        return error_response(error, anthropic=anthropic, headers=headers)

    def _translate(self, request: web.Request, passage: Passage, error: web.HTTPException) -> web.StreamResponse:
        """Put what aiohttp or a handler raised into the envelope; what is no error stays as it is."""
        if isinstance(error, web.HTTPNotFound):
            return self._refuse(request, passage, PathRefusedError("llmux has nothing here.", code="not_found"))
        if isinstance(error, web.HTTPMethodNotAllowed):
            allowed = ", ".join(sorted(error.allowed_methods))
            response = self._refuse(request, passage, MethodNotAllowedError(f"This path takes {allowed}."))
            response.headers[hdrs.ALLOW] = allowed
            return response
        response = web.Response(status=error.status, headers=error.headers, body=error.body)
        return _with_headers(response, passage)

    def _account(self, passage: Passage, status: int, began: float, failure: str | None) -> None:
        if passage.trace is not None:
            self._end_trace(passage, status, failure)
        exchange = passage.exchange
        first = None if exchange is None or exchange.first_byte_at is None else exchange.first_byte_at - began
        if first is None and status != GONE:
            first = self._switcher.now() - began  # llmux's own answer
        tokens = (None, None) if exchange is None else exchange.usage
        whole = self._switcher.requests.add(
            passage.model,
            status,
            began=began,
            waited=passage.waited,
            first_byte=first,
            request_id=passage.request_id,
            tokens=tokens,
            error=failure if failure is not None or exchange is None else exchange.broken,
        )
        self._metrics.request_ended(passage.model, status, passage.waited, first, whole, tokens)
        recorder = self._switcher.recorder
        if recorder is not None and passage.ticket is not None:
            if exchange is None:
                recorder.request(passage.ticket, status)
            else:
                recorder.request(
                    passage.ticket,
                    status,
                    sent=exchange.body.size if exchange.body is not None else 0,
                    got=exchange.bytes_out,
                    first=exchange.first_byte_at,
                    broken=exchange.broken is not None,
                )
        if self._access_log:
            self._log.emit(
                "request_finished",
                model=passage.model,
                status=status,
                waited_secs=round(passage.waited, 3),
                duration_secs=round(self._switcher.now() - began, 3),
                request_id=passage.request_id,
                key=passage.holder.name if passage.holder is not None else None,
            )


def _refuse_unusual(request: web.Request) -> None:
    """Refuse what a server in front of engines has no use for, and parsers disagree about."""
    if request.method in _NEVER:
        raise web.HTTPMethodNotAllowed(request.method, METHODS.split(", "))
    codings = request.headers.getall(hdrs.TRANSFER_ENCODING, ())
    if codings and (len(codings) > 1 or codings[0].strip().lower() != "chunked"):
        raise BadRequestError(
            "A request's Transfer-Encoding must be chunked, and nothing else.", code="malformed_request"
        )


def _is_page(request: web.Request, route: Route) -> bool:
    """Whether this asks for a file of the page. Browsers send the page's origin with each of them."""
    ours = route.path == PAGE or route.path.startswith(f"{PAGE}/")
    # A browser that was given the address alone is shown the way to the page.
    ours = ours or (route.path == "/" and "text/html" in request.headers.get(hdrs.ACCEPT, ""))
    return ours and route.kind is Kind.OWN and request.method in {hdrs.METH_GET, hdrs.METH_HEAD}


def _is_visit(request: web.Request, route: Route) -> bool:
    """Whether a link opens the page in a tab: that changes nothing, and the link's site sees nothing of it."""
    headers = request.headers
    opens = headers.get("Sec-Fetch-Mode") == "navigate" and headers.get("Sec-Fetch-Dest") == "document"
    return opens and _is_page(request, route)


def _with_headers(response: web.StreamResponse, passage: Passage) -> web.StreamResponse:
    if not response.prepared and not isinstance(response, RelayedResponse):
        for name, value in passage.headers:
            response.headers[name] = value
        response.headers["X-LLMux-Queue-Seconds"] = "0.000"
    return response
