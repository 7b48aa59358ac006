"""Requests that leave this host. Imported only if there are remotes.

What goes out is the client's request: its path, its body with the remote's name of the model, and its headers
except those about this host or its clients (``KEPT_HERE``); the remote's key replaces the client's. The core is
not involved: no engine is needed.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from aiohttp import web

from llmux.config import Config
from llmux.config.remotes import RemoteConfig
from llmux.errors import BadRequestError, EngineError, ForbiddenError, RemoteError, UnavailableError
from llmux.extract import Body
from llmux.middleware.context import RequestContext
from llmux.middleware.exact_usage import ExactUsage, FilteringRelay, UsageFilter
from llmux.middleware.paths import COUNT
from llmux.middleware.rewriting import Rewritten, rename_in_query
from llmux.middleware.translating import Translating
from llmux.observability.metrics import RemoteRow
from llmux.proxy import Exchange, ExtraFields
from llmux.proxy.aiohttp_client import AiohttpClient
from llmux.proxy.guarded import Guard, PathLackedError, translating
from llmux.proxy.remote import Endpoint, GuardFactory, Timeouts, Watch
from llmux.runtime import Switcher, Ticket
from llmux.runtime.request_handle import UNCOUNTED
from llmux.targets.breaker import State
from llmux.upstream import EngineActivity, EngineAddress

KEPT_HERE = frozenset(
    {
        # whose client it is, to llmux and to others
        *(b"authorization", b"x-api-key", b"api-key", b"x-goog-api-key", b"cookie", b"origin", b"referer"),
        *(b"openai-organization", b"openai-project"),
        # where it came from
        *(b"forwarded", b"via", b"x-real-ip", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto"),
        *(b"x-forwarded-port", b"x-forwarded-prefix", b"x-forwarded-server"),
        # what is about the connection; answers are read for what they cost, so they come uncompressed
        *(b"upgrade", b"accept-encoding"),
    }
)
"""The client's headers that do not leave this host. Those that begin with ``x-llmux-`` do not either."""
_OWN = b"x-llmux-"
_NOT_PASSED_ON = frozenset({b"set-cookie", b"alt-svc", b"strict-transport-security"})  # of a remote's answers
_VERSION = b"2023-06-01"  # of Anthropic's API, for clients of another dialect
_MESSAGES = "/v1/messages"
_LACKS_FOR = 3600.0  # seconds for which a remote that does not count is not asked to: clients ask often
_ENDS_IN_VERSION = re.compile(r"/v\d+[a-z0-9]*(?:/openai)?\Z")  # Gemini's and others' begin with it
_BARE = frozenset({"/chat/completions", "/completions", "/embeddings"})  # llama.cpp's, which others have under /v1
_PATHS: Mapping[str, tuple[str, ...]] = {
    "chat": ("/v1/chat/completions",),
    "completions": ("/v1/completions",),
    "messages": (_MESSAGES,),
    "responses": ("/v1/responses",),
    "embeddings": ("/v1/embeddings",),
    "count_tokens": (COUNT,),
}


class Remote:
    """One remote of the configuration in force."""

    def __init__(self, name: str, settings: RemoteConfig, before: Remote | None) -> None:
        """``before`` is the same remote in the configuration which this one replaces."""
        self.name = name
        self.settings = settings
        self.secret = settings.secret
        address = settings.address
        limits = settings.timeouts
        # A new address means a new remote; with other limits the breaker keeps its state.
        same = before is not None and before.settings.url == settings.url
        self.endpoint: Endpoint = Endpoint(
            name,
            EngineAddress(address.host, address.port, address.tls, address.base_path),
            Timeouts(limits.connect, limits.first_byte, limits.idle, limits.total),
            ca=settings.ca,
            max_in_flight=settings.max_in_flight,
            breaker=before.endpoint.breaker if same and before is not None else None,
        )
        if same and before is not None:
            self.endpoint.latency = before.endpoint.latency
            self.endpoint.counts = before.endpoint.counts
        apis = settings.apis
        self._paths = None if apis is None else tuple(path for api in apis for path in _PATHS[api])
        self._counts = apis is None or "count_tokens" in apis
        self.lacks_until: dict[str, float] = {}
        """When it is asked again to count tokens for a model of its own, by the switcher's clock."""
        self._has_version = _ENDS_IN_VERSION.search(address.base_path) is not None

    def counts(self, model: str, now: float) -> bool:
        """Whether it is asked to count the tokens of requests for one of its models."""
        return self._counts and now >= self.lacks_until.get(model, -math.inf)

    def target(self, path: str, target: str) -> str:
        """Return a request's target, without the address. BadRequestError if the remote has no such path."""
        if path in _BARE:
            path = f"/v1{path}"
        paths = self._paths
        if paths is not None and not any(path == each or path.startswith(f"{each}/") for each in paths):
            spoken = ", ".join(self.settings.apis or ())
            raise BadRequestError(f"{self.name} does not take {path}: it speaks {spoken}", code="api_not_spoken")
        if self._has_version:
            path = path.removeprefix("/v1")
        _, question, query = target.partition("?")
        return f"{path}{question}{query}"

    def credentials(self, path: str) -> Iterable[tuple[bytes, bytes]]:
        """Yield the headers that carry the key, for a path."""
        messages = path == _MESSAGES or path.startswith(f"{_MESSAGES}/")
        if self.secret is None:
            return
        auth = self.settings.auth or ("x-api-key" if messages else "bearer")
        if auth == "bearer":
            yield b"Authorization", b"Bearer " + self.secret.encode()
        else:
            yield b"X-API-Key", self.secret.encode()


class Remotes:
    """The remotes of one configuration."""

    def __init__(
        self, config: Config, switcher: Switcher, translating: Translating | None, exact_usage: ExactUsage | None
    ) -> None:
        self._switcher = switcher
        self._remotes: dict[str, Remote] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self.configure(config, translating, exact_usage)

    def configure(self, config: Config, translating: Translating | None, exact_usage: ExactUsage | None) -> None:
        """Apply a configuration. ConfigError if a key's file is missing."""
        before = self._remotes
        remotes = {}
        for name, settings in config.remotes.items():
            old = before.get(name)
            kept = old is not None and old.settings == settings and old.secret == settings.secret
            remotes[name] = old if old is not None and kept else Remote(name, settings, old)
        for name, old in before.items():
            if remotes.get(name) is not old:
                task = asyncio.get_running_loop().create_task(old.endpoint.close(), name="llmux: close a remote")
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
        self._remotes = remotes
        self._models = config.remote_models
        self._for_all = config.remotes_for_all and not config.api_keys
        self._translating = translating
        self._exact_usage = exact_usage
        self._switcher.metrics.declare(self._models)
        self._switcher.metrics.remotes = self.rows
        self._switcher.remotes = self
        self._switcher.hooks.secrets = frozenset(one.secret for one in remotes.values() if one.secret is not None)

    def __contains__(self, name: str) -> bool:
        return name in self._models

    # ---- whether it may, and whether it can

    def may_leave(self, context: RequestContext) -> bool:
        """Whether a request may leave this host, by its key."""
        holder = context.holder
        return self._for_all if holder is None else holder.remote or holder.operator

    def allows(self, name: str, context: RequestContext) -> bool:
        """Whether a request may go to a remote's model, by its key and by the regions that `routes` allow."""
        if name not in self._models:  # a reload has removed it
            return False
        region = self._remotes[self._models[name][0]].settings.region
        return self.may_leave(context) and (context.regions is None or region in context.regions)

    def wait(self, name: str, context: RequestContext) -> float | None:
        """Return the seconds to the first byte of an answer; None if a request would be refused."""
        if not self.allows(name, context):
            return None
        endpoint = self._remotes[self._models[name][0]].endpoint
        return endpoint.latency if endpoint.wait(self._switcher.now()) is None else None

    def room(self, name: str, context: RequestContext) -> float:
        """Return how many requests like this one a remote's model takes now."""
        if not self.allows(name, context):
            return 0
        return self._remotes[self._models[name][0]].endpoint.room(self._switcher.now())

    # ---- a request

    async def serve(
        self, name: str, request: web.Request, context: RequestContext, body: Body | None, *, others: bool
    ) -> web.StreamResponse:
        """Let a remote serve a request. ``others``: if it fails, other targets will be tried.

        Raises ForbiddenError, BadRequestError, UnavailableError and RemoteError.
        """
        if name not in self._models:
            raise UnavailableError(f"A reload has removed {name!r}.")
        place, theirs = self._models[name]
        remote = self._remotes[place]
        self._let_go(name, context)
        self._make_room(remote)
        context.model = name
        if context.route.path == COUNT and body is not None:
            return await self._counted(theirs, remote, request, context, body, others=others)
        return await self._fitted(theirs, remote, request, context, body, others=others)

    async def _counted(
        self,
        theirs: str,
        remote: Remote,
        request: web.Request,
        context: RequestContext,
        body: Body,
        *,
        others: bool,
    ) -> web.StreamResponse:
        """Let a remote count the tokens of a request, or estimate them where it does not."""
        from llmux.middleware.counting import estimated  # noqa: PLC0415 - few ask for it

        if remote.counts(theirs, self._switcher.now()):
            try:
                return await self._fitted(theirs, remote, request, context, body, others=others, may_lack=True)
            except PathLackedError:
                remote.lacks_until[theirs] = self._switcher.now() + _LACKS_FOR
                context.exchange = None
        counted = await estimated(context, body)
        if counted is not None:
            return counted
        return await self._fitted(theirs, remote, request, context, body, others=others)

    async def _fitted(
        self,
        theirs: str,
        remote: Remote,
        request: web.Request,
        context: RequestContext,
        body: Body | None,
        *,
        others: bool,
        may_lack: bool = False,
    ) -> web.StreamResponse:
        fitted, relay = body, None
        if self._translating is not None:
            fitted = self._translating.fit(context, body)
        if isinstance(fitted, Rewritten):
            relay = translating(fitted.translation)
        elif self._exact_usage is not None:
            asking = await self._exact_usage.asking(context.route.path, body)
            if asking is not None:
                fitted, relay = asking, FilteringGuardedRelay
        try:
            return await self._sent(
                theirs, remote, request, context, fitted, relay, others=others, may_lack=may_lack
            )
        finally:
            if fitted is not None and body is not None and not fitted.shares(body):
                fitted.close()

    def _let_go(self, name: str, context: RequestContext) -> None:
        """Check that a request may go there."""
        if not self.may_leave(context):
            how = "its key does not allow it" if context.holder is not None else "nothing allows it"
            raise ForbiddenError(
                f"{name!r} is on another host, and this request may not leave this one: {how}.",
                code="remote_not_allowed",
                param="model",
            )
        if not self.allows(name, context):
            raise ForbiddenError(
                f"{name!r} is not in one of the regions that this request may go to:"
                f" {', '.join(sorted(context.regions or ()))}.",
                code="region_not_allowed",
                param="model",
            )

    def _make_room(self, remote: Remote) -> None:
        """Check that a remote takes a request now."""
        if self._switcher.core.state.stopping:
            raise UnavailableError("llmux is stopping.", code="stopping")
        wait = remote.endpoint.wait(self._switcher.now())
        if wait is not None:
            resting = remote.endpoint.breaker.state(self._switcher.now()) is not State.CLOSED
            why = "is left alone for a while" if resting else "has as many requests as it may have"
            raise UnavailableError(
                f"The remote {remote.name} {why}.",
                code="remote_resting" if resting else "remote_busy",
                retry_after=wait,
            )

    async def _sent(
        self,
        theirs: str,
        remote: Remote,
        request: web.Request,
        context: RequestContext,
        body: Body | None,
        relay: GuardFactory | None,
        *,
        others: bool,
        may_lack: bool,
    ) -> web.StreamResponse:
        switcher, name = self._switcher, context.model or ""
        path, target = context.route.path, context.route.target
        if isinstance(body, Rewritten):
            path = target = body.target
        if body is not None and body.compressed:
            raise BadRequestError(f"{name!r} is on another host: send plain JSON", code="invalid_json")
        if body is not None and body.model is not None:
            body = await body.renamed(theirs)
        else:
            target = rename_in_query(target, theirs)
        target = remote.target(path, target)
        self._make_room(remote)  # from here on no other request can intervene
        extra = ExtraFields.of(context.fields)
        exchange = context.exchange = Exchange(
            address=remote.endpoint.address,
            method=request.method,
            target=target.encode("utf-8", "surrogateescape"),
            raw_headers=tuple(_leaving(request.raw_headers, context.drop_headers)),
            body=body,
            request_id=context.request_id,
            activity=EngineActivity(counting=switcher.activities.counting),
            extra_headers=extra._replace(names=extra.names | _NOT_PASSED_ON),
            added_headers=tuple(_added(remote, path, request)),
            anthropic=context.route.anthropic(request.raw_path),
            counted=context.counted,
        )
        ticket = context.ticket = Ticket(UNCOUNTED, name, switcher.clock(), context.key)
        ticket.request_id, ticket.asked = context.request_id, context.asked
        ticket.attach(exchange.cut)
        switcher.elsewhere.add(ticket)
        before = remote.endpoint.breaker.state(switcher.now())
        try:
            with context.attempted(exchange):
                return await remote.endpoint.forward(
                    request, exchange, relay, secret=remote.secret, others=others, may_lack=may_lack
                )
        except PathLackedError:
            raise  # which is no failure
        except RemoteError as error:
            why = str(error.__cause__ or error)  # clients do not learn its address
            switcher.log.emit("remote_failed", remote=remote.name, error=why, request_id=context.request_id)
            raise
        finally:
            switcher.elsewhere.discard(ticket)
            self._tell(remote, before)

    def _tell(self, remote: Remote, before: State) -> None:
        """Log a change of a remote's breaker."""
        now, log = self._switcher.now(), self._switcher.log
        breaker = remote.endpoint.breaker
        state = breaker.state(now)
        if state is before:
            return
        if state is State.CLOSED:
            log.emit("remote_is_back", remote=remote.name)
        elif state is not State.HALF_OPEN:
            seconds = round(breaker.wait(now) or 0.0, 3)
            log.emit("remote_left_alone", remote=remote.name, secs=seconds, error=breaker.error)

    # ---- looking

    def document(self) -> dict[str, Any]:
        """Return what operators see of the remotes."""
        now = self._switcher.now()
        return {name: _document(remote, now) for name, remote in self._remotes.items()}

    def rows(self) -> Iterable[RemoteRow]:
        """Yield what the metrics show of each remote."""
        now = self._switcher.now()
        for name, remote in self._remotes.items():
            endpoint = remote.endpoint
            is_in = endpoint.breaker.state(now)
            states = {state.value: state is is_in for state in State}
            yield RemoteRow(name, states, endpoint.in_flight, dict(endpoint.counts))

    async def close(self) -> None:
        """Close all idle connections."""
        await asyncio.gather(*(remote.endpoint.close() for remote in self._remotes.values()))


class FilteringGuardedRelay(Guard, FilteringRelay):
    """The relay of a stream that was asked for its usage (`usage: exact`), without that for the client."""

    def __init__(
        self, client: AiohttpClient, exchange: Exchange, loop: asyncio.AbstractEventLoop, watch: Watch
    ) -> None:
        super().__init__(client, exchange, loop)
        self._watch = watch
        self._early = b""  # what only announces the answer

    def _pass(self, usage: UsageFilter, data: bytes) -> None:
        data, self._early = self._early + data, b""
        if not (self._watch.judged or (data and self._ready(data))):
            if not self.over:
                self._early = data
                self.exchange.activity.last_byte = self._loop.time()
            return
        super()._pass(usage, data)

    def let_go(self) -> None:
        """Pass on what has been held for long enough."""
        if self._filter is not None and self._early:
            self._pass(self._filter, b"")

    def response_ended(self) -> None:
        """Tell the end."""
        self._watch.judged = True
        super().response_ended()

    def response_lost(self, error: EngineError) -> None:
        """Break off, without the incomplete event."""
        self._filter = None
        super().response_lost(error)


def _document(remote: Remote, now: float) -> dict[str, Any]:
    endpoint = remote.endpoint
    breaker = endpoint.breaker
    wait = breaker.wait(now)
    return {
        "state": breaker.state(now).value,
        "region": remote.settings.region,
        "in_flight": endpoint.in_flight,
        "failures": breaker.failures,
        "last_error": breaker.error or None,
        "retry_in": wait,
        "latency": endpoint.latency or None,
        "requests": dict(endpoint.counts),
        "models": [f"{remote.name}/{model}" for model in remote.settings.models],
    }


def _leaving(headers: Iterable[tuple[bytes, bytes]], dropped: frozenset[bytes]) -> Iterable[tuple[bytes, bytes]]:
    for name, value in headers:
        lower = name.lower()
        if lower not in KEPT_HERE and lower not in dropped and not lower.startswith(_OWN):
            yield name, value


def _added(remote: Remote, path: str, request: web.Request) -> Iterable[tuple[bytes, bytes]]:
    yield from remote.credentials(path)
    if path.startswith(_MESSAGES) and "anthropic-version" not in request.headers:
        yield b"anthropic-version", _VERSION
