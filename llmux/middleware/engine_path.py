"""The fast path of a host: requests go to the engines of models that are awake."""

from __future__ import annotations

from llmux.config import EngineDefinition
from llmux.extract.json_object import with_model
from llmux.middleware.context import Reporting, RequestContext
from llmux.middleware.fast_path import COPIED, Connection, FastPath, FastRequest, Match, extra_fields, usual_fields
from llmux.middleware.model_handler import ModelHandler
from llmux.proxy import Exchange, Forwarder
from llmux.upstream import EngineConnection, EngineLostError, engine_address

_CONVERSATION = b"x-llmux-conversation"


class EnginePath(FastPath):
    """Serves requests that their models' engines take at once."""

    def __init__(self, reporting: Reporting, forwarder: Forwarder, models: ModelHandler) -> None:
        super().__init__(reporting, forwarder, models.budget, reporting.switcher.open_activity)
        self._models = models

    def _admit(self, client: Connection, match: Match, context: RequestContext, data: bytes) -> bool:
        asked, model, head, request_id, _, activity, body, _, digits = match
        switcher, size = self._switcher, len(body)
        fitted = body
        targeting = self._models.targeting
        if targeting is not None and asked in targeting.others:
            context.model = None
            found = targeting.at_once(asked, head.value(_CONVERSATION), context, body)
            if found is None:
                return False
            model, fitted = found
            digits, activity = b"%d" % len(fitted), switcher.open_activity(model)
        if activity is None:
            return False
        key = "" if head.holder is None else head.holder.name or ""
        ticket = context.ticket = switcher.enter(model, key, deadline=self._models.deadlines.get(model))
        admission = ticket.admission
        definition = None if admission is None else admission.definition
        sent: bytes | None = fitted
        if isinstance(definition, EngineDefinition) and definition.upstream_model is not None:
            sent = with_model(fitted, definition.upstream_model)
            digits = b"" if sent is None else b"%d" % len(sent)
        if (
            admission is None
            or sent is None
            or not isinstance(definition, EngineDefinition)
            or definition.base_path
            or switcher.activities.get(model) != (admission.epoch, activity)
        ):
            return False
        ident = request_id.encode()
        address = engine_address(definition.host, definition.port, definition.tls, definition.base_path)
        exchange = context.exchange = Exchange(
            address=address,
            request_id=request_id,
            activity=activity,
            extra_headers=extra_fields(ident, context.headers) if context.headers else usual_fields(ident),
            anthropic=head.anthropic,
            counted=switcher.accounts is not None or context.passed is not None,
        )
        request = EngineRequest(self, client, context, exchange, data, size)
        client.fast_request = request  # from here on it ends what is held for it
        self.budget.held += size  # there is room for it, see ``match_known``
        request.keep_alive = not head.last
        ticket.on_cut = exchange.cut  # it was admitted in this very call, so it was not cut before
        exchange.on_cut = request.cut
        first = head.engine_head(address.host_header, digits, ident)
        held = sent is body and size > COPIED
        connection = self.forwarder.pool.take(activity)
        self._send(request, connection, first, memoryview(data)[-size:] if held else sent)
        return True


class EngineRequest(FastRequest):
    """One request on the way to its engine."""

    __slots__ = ()

    def _answered(self) -> None:
        context, exchange = self.context, self.exchange
        if exchange.broken is not None and exchange.blames_engine(None):
            assert context.model is not None
            self._path.reporting.switcher.suspect(context.model, refused=False)

    def _failed(self, error: Exception, connection: EngineConnection | None) -> None:
        context = self.context
        context.fresh_only = connection is not None and connection.was_stale(error)
        context.first_error = None if context.fresh_only else error
        if connection is not None and connection.taken and isinstance(error, EngineLostError):
            context.lost = error
