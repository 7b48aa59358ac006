"""Requests on paths that neither wake a model nor keep it awake. Imported only where there are such paths.

They go to an awake engine at once, and are not counted: they do not wait, delay no switch, and keep no idle model
awake. Those still open when the engine goes to sleep are ended.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

from aiohttp import web

from llmux.config.access import glob_expression
from llmux.core import effects as fx
from llmux.core.phases import Phase
from llmux.core.spec import HookKind
from llmux.errors import UnavailableError
from llmux.extract import Body
from llmux.middleware.context import RequestContext
from llmux.runtime import Switcher, Ticket
from llmux.runtime.request_handle import UNCOUNTED
from llmux.upstream import EngineRefusedError

Attempt = Callable[[web.Request, RequestContext, fx.Admit, Body | None], Awaitable[web.StreamResponse]]

_ENDS = frozenset({HookKind.SLEEP, HookKind.STOP})


class Passive:
    """Serves the requests on such paths."""

    def __init__(self, globs: tuple[str, ...], switcher: Switcher, attempt: Attempt) -> None:
        self._paths = re.compile("|".join(map(glob_expression, globs)))
        self._switcher = switcher
        self._attempt = attempt
        self._open: dict[str, set[Ticket]] = {}
        self._closed = False
        self._unsubscribe = switcher.subscribe(self._take)

    def close(self) -> None:
        """Serve no more; open requests remain, and are ended when their engine goes to sleep."""
        self._closed = True
        self._let_go()

    def _let_go(self) -> None:
        if self._closed and not self._open:
            self._unsubscribe()

    def matches(self, path: str) -> bool:
        """Whether a path, in its normal form, is one of these."""
        return self._paths.fullmatch(path) is not None

    async def serve(self, request: web.Request, context: RequestContext, body: Body | None) -> web.StreamResponse:
        """Pass a request on to its model's engine. UnavailableError ``asleep`` if that is not awake."""
        name, switcher = context.model, self._switcher
        assert name is not None
        model = switcher.core.state.models[name]
        if model.phase is not Phase.AWAKE and model.phase is not Phase.DRAINING:
            raise UnavailableError(
                f"{name!r} is not awake, and a request on this path does not wake it (see `passive`).",
                code="asleep",
            )
        ticket = context.ticket = Ticket(UNCOUNTED, name, switcher.clock())
        admission = fx.Admit(UNCOUNTED, name, model.running.definition, model.epoch, returned=False, waited=0.0)
        ticket.admission = admission
        ticket.request_id = context.request_id
        tickets = self._open.setdefault(name, set())
        tickets.add(ticket)
        try:
            return await self._attempt(request, context, admission, body)
        except EngineRefusedError:
            switcher.suspect(name, refused=True)
            raise
        finally:
            tickets.discard(ticket)
            if not tickets:
                self._open.pop(name, None)
                self._let_go()

    def _take(self, effect: fx.Effect) -> None:
        match effect:
            case fx.RunHook(model=model, kind=kind) if kind in _ENDS:
                self._end(model, fx.CutReason.DRAIN_DEADLINE)
            case fx.Stopped():
                for model in list(self._open):
                    self._end(model, fx.CutReason.STOPPING)

    def _end(self, model: str, reason: fx.CutReason) -> None:
        for ticket in list(self._open.get(model, ())):
            ticket.cut(reason, None)
