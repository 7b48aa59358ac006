"""The fast path of a gateway: requests go to hosts at once, if the placement has one for them.

The safety argument is that of ``handler``, which gets a request, with its trip, whenever anything but an answer
comes back.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, cast

from llmux.gateway.handler import HOST, Ear, FromHost, GatewayHandler, PlacedContext, changes_for
from llmux.middleware.context import Reporting, RequestContext
from llmux.middleware.fast_head import FastHead, KnownHead
from llmux.middleware.fast_path import COPIED, Connection, FastPath, FastRequest, Match, Pieces, extra_fields
from llmux.middleware.progress import HEADER
from llmux.proxy import Exchange, Forwarder
from llmux.upstream import EngineActivity, EngineConnection, ResponseHead

if TYPE_CHECKING:
    from llmux.accounts.gate import Gate, Grant
    from llmux.gateway.shared_limits import Metered

_PROGRESS = HEADER.lower().encode() + b":"
_ANYWHERE = EngineActivity()  # the placement says which host it is, when the request has entered


class HostPath(FastPath):
    """Serves requests that a host gets at once."""

    _context = PlacedContext

    def __init__(self, reporting: Reporting, forwarder: Forwarder, handler: GatewayHandler) -> None:
        super().__init__(reporting, forwarder, handler.budget, lambda _model: _ANYWHERE)
        self.handler = handler

    def judge(self, head: FastHead) -> KnownHead | None:
        """Return what is known of requests with a plain head. None if they cannot be served here.

        That of a client which wants to be told its position cannot: its request may have to wait at the host.
        """
        if any(line.lower().startswith(_PROGRESS) for line in head.lines):
            return None
        known = super().judge(head)
        by_key = None if known is None or known.holder is None else known.holder.progress
        return None if (self.handler.progress if by_key is None else by_key) else known

    def _grant(self, gate: Gate, key: str) -> Grant | None:
        return gate.grants.get(key)  # names come and go with the hosts: the gate knows which of them it may use

    def _give_up(self, client: Connection, context: RequestContext, error: Exception) -> bool:
        assert isinstance(context, PlacedContext)
        if context.trip is not None and context.trip.host is not None:
            context.first_error = error  # it has taken its order, and gets no other
        return super()._give_up(client, context, error)

    def _admit(self, client: Connection, match: Match, context: RequestContext, data: bytes) -> bool:
        assert isinstance(context, PlacedContext)
        _, model, head, request_id, _, _, body, _, digits = match
        handler, size = self.handler, len(body)
        trip = context.trip = handler.dispatcher.enter(model)
        trip.request_id = request_id
        host = None if trip.next_host is None else handler.hosts.get(trip.next_host)
        if host is None or host.address.base_path:
            return False
        context.rode = trip.go().waited
        ident = request_id.encode()
        told = [*context.headers, (HOST, host.name)]
        exchange = context.exchange = Exchange(
            address=host.address,
            request_id=request_id,
            activity=host.activity,
            extra_headers=extra_fields(ident, told, b"%.3f" % context.rode),
            anthropic=head.anthropic,
            once=True,
        )
        request = HostRequest(self, client, context, exchange, data, size)
        client.fast_request = request  # from here on it ends what is held for it
        self.budget.held += size  # there is room for it, see ``match_known``
        handler.begin(exchange)
        request.keep_alive = not head.last
        request.ear = Ear(
            lambda _position, seconds: handler.dispatcher.waiting(trip, seconds),
            partial(handler.dispatcher.began, trip),
        )
        if context.passed is not None:
            passed = cast("Metered", context.passed)
            passed.sent_at, passed.ear = self._switcher.now(), request.ear
            host.activity.counting = True
        exchange.on_cut = request.cut
        changes = partial(changes_for, host, context.key)
        first = head.changed_head(host, host.address.host_header, digits, ident, changes)
        connection = self.forwarder.pool.take(host.activity)
        self._send(request, connection, first, memoryview(data)[-size:] if size > COPIED else body)
        return True


class HostRequest(FromHost, FastRequest):
    """One request on the way to its host."""

    __slots__ = ("ear",)

    def send(self, connection: EngineConnection, pieces: Pieces) -> None:
        """Send the request, unless it is over."""
        connection.on_interim = self.ear.interim
        super().send(connection, pieces)

    def begin(self, head: ResponseHead) -> None:
        """Begin the client's answer."""
        FastRequest.response_started(self, head)

    def _leave(self) -> GatewayHandler:
        handler = cast("HostPath", self._path).handler
        handler.end(self.exchange)
        return handler

    def _answered(self) -> None:
        trip = cast("PlacedContext", self.context).trip
        assert trip is not None
        self._leave().dispatcher.ended(trip)

    def _failed(self, error: Exception, connection: EngineConnection | None) -> None:  # noqa: ARG002
        self._leave()
        self.context.first_error = error
