"""Where requests go instead of the model which they name: by `routes`, and by the `spill` of a model.

Imported only if the configuration has these. The rules themselves are pure (``targets.route_rules``); here they
get the data that they need.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from aiohttp import web

from llmux.config import Config
from llmux.core.model import Model
from llmux.errors import ForbiddenError, QueueFullError, RequestError, UnavailableError, WaitedTooLongError
from llmux.extract import Body
from llmux.middleware.context import RequestContext
from llmux.middleware.paths import Kind
from llmux.middleware.targeting import Targeting, may_fail_over
from llmux.runtime import Switcher, Ticket, wait_estimate
from llmux.targets.resolution import Reason
from llmux.targets.route_rules import DEAR, Content, Facts, Offer, content_of, follow, spills, worst_cost

if TYPE_CHECKING:
    from llmux.accounts.gate import Gate
    from llmux.accounts.pricing import Prices

LOOK = 0.25
"""Seconds between two checks of the waiting requests which may spill."""
_REJECTIONS = (UnavailableError, QueueFullError, WaitedTooLongError)
_FINAL = frozenset({"stopping"})


Locally = Callable[[web.Request, RequestContext, Body | None], Awaitable[web.StreamResponse]]


class SpilledError(RequestError):
    """A request has left its model's queue: it goes to a remote. Never sent to a client."""


class Led(NamedTuple):
    """The target of a rule: a name, and the regions of remotes which may serve it."""

    name: str
    regions: frozenset[str] | None
    reason: Reason | None = None


@dataclass(slots=True, eq=False)
class Spillable:
    """One request which may spill."""

    offer: Offer
    context: RequestContext
    worst: int | None


class Routing:
    """The `routes` and the `spill` of one configuration."""

    def __init__(
        self,
        config: Config,
        switcher: Switcher,
        targeting: Targeting,
        gate: Gate | None,
        before: Routing | None = None,
    ) -> None:
        """``before`` is that of the configuration which this one replaces."""
        self._switcher = switcher
        self._targeting = targeting
        self._gate = gate
        self._rules = config.routes
        self._waits = any(rule.when.wait_over is not None for rule in config.routes)
        self._roles = {entry.name: entry.role for entry in config.api_keys}
        self._names = config.names
        self._ends = {
            model.spill.to: config.leaves(model.spill.to)
            for model in config.models.values()
            if model.spill is not None
        }
        self._prices = _prices(config)
        self._offers = {
            name: Offer(model.spill.to, model.spill.over, _micros(model.spill.below))
            for name, model in config.models.items()
            if model.spill is not None
        }
        known = {} if before is None else before._waiting  # noqa: SLF001 - another of its kind
        self._waiting: dict[int, Spillable] = {
            number: one for number, one in known.items() if self._offers.get(one.context.model or "") == one.offer
        }
        self._timer: asyncio.TimerHandle | None = None
        if self._waiting:
            self._arm()

    # ---- `routes`

    async def lead(self, name: str, context: RequestContext, body: Body | None) -> Led:
        """Return where a request for a name goes. ForbiddenError where a rule refuses it."""
        if not self._rules or context.route.kind is not Kind.FORWARD:
            return Led(name, None)
        facts = self._facts(name, context)
        found = follow(self._rules, facts, None)
        if found.looks:
            found = follow(self._rules, facts, await content_of(body))
        rule = found.rule
        if rule is None:
            return Led(name, None)
        number = self._rules.index(rule)
        if rule.refuses:
            raise ForbiddenError(
                f"Requests like this one are not served here: rule {number + 1} of `routes` refuses them.",
                code="route_refused",
                param="model",
            )
        regions = None if rule.regions is None else frozenset(rule.regions)
        return Led(name, regions) if rule.to is None else Led(rule.to, regions, Reason.ROUTE)

    def _facts(self, name: str, context: RequestContext) -> Facts:
        key = context.key or None
        model = self._names.get(name)
        wait = self._expected(model) if self._waits and model is not None else None
        return Facts(name, context.route.path, key, None if key is None else self._roles.get(key), wait)

    # ---- `spill`

    def offer(self, context: RequestContext) -> Offer | None:
        """Return where a request may spill to; None if it may not at all."""
        assert context.model is not None
        offer = self._offers.get(context.model)
        holder = context.holder
        if offer is None or context.route.kind is not Kind.FORWARD or (holder is not None and holder.rides):
            return None
        return offer if self._targeting.may(offer.to, context) else None

    async def _worst_cost(self, offer: Offer, body: Body | None) -> int | None:
        """Return what a request may cost at worst; None if that does not matter."""
        if offer.below is None:
            return None
        content = await content_of(body)
        return max((self._worst(end, content) for end in self._ends[offer.to]), default=0)

    def _worst(self, end: str, content: Content) -> int:
        price = DEAR if self._prices is None else self._prices.models.get(end, DEAR)
        return worst_cost(price, content.text, content.files, content.limit, content.answers)

    def _expected(self, name: str) -> float | None:
        """Return the expected wait of a new request; None if it would be rejected."""
        state = self._switcher.core.state
        model = state.models.get(name)
        return None if model is None else wait_estimate.for_a_newcomer(state, model, self._switcher.now())

    def _spills_now(self, one: Spillable) -> bool:
        """Whether a new request goes to the remote."""
        state, name = self._switcher.core.state, one.context.model or ""
        if name not in state.models or state.stopping or not state.ready:
            return False
        return spills(one.offer, 0.0, self._expected(name), one.worst) and self._room(one) > 0

    def _spills_rejected(self, one: Spillable, error: RequestError) -> bool:
        """Whether a request that was rejected, and has had no answer, goes to the remote."""
        rejected = isinstance(error, _REJECTIONS) and error.code not in _FINAL
        return rejected and spills(one.offer, 0.0, None, one.worst) and self._room(one) > 0

    def _room(self, one: Spillable) -> float:
        """Return how many such requests the remote takes now; none if the key's budget does not allow it."""
        context = one.context
        if self._gate is not None and not self._gate.may_spend(context.key, one.worst or 0, context.passed):
            return 0
        return self._targeting.room(one.offer.to, context)

    def watch(self, ticket: Ticket, one: Spillable) -> None:
        """Check a waiting request regularly, until ``forget``: if it would wait too long, it leaves the queue."""
        self._waiting[ticket.id] = one
        if self._timer is None:
            self._arm()

    def forget(self, ticket: Ticket) -> None:
        """Stop checking a request."""
        self._waiting.pop(ticket.id, None)

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(LOOK, self._look)

    def _look(self) -> None:
        self._timer = None
        state = self._switcher.core.state
        by_model: dict[str, set[int]] = defaultdict(set)
        for number, one in self._waiting.items():
            by_model[one.context.model or ""].add(number)
        gone: Counter[str] = Counter()  # those that have not reached the remote yet, and take its room
        if not state.stopping:
            for name, numbers in by_model.items():
                model = state.models.get(name)
                if model is not None:
                    self._look_at(model, numbers, gone)
        if self._waiting:
            self._arm()

    def _look_at(self, model: Model, numbers: set[int], gone: Counter[str]) -> None:
        """Take requests that would wait too long out of a model's queue. Each shortens it for the rest."""
        state, now = self._switcher.core.state, self._switcher.now()
        awake = wait_estimate.until_awake(state, model, now)
        position = 0
        for request in list(model.queue.values()):
            position += 1
            one = self._waiting.get(request.id) if request.id in numbers else None
            if one is None:
                continue
            expected = awake + wait_estimate.in_queue(model, position)
            if not spills(one.offer, now - request.arrived, expected, one.worst):
                continue
            if self._room(one) <= gone[one.offer.to]:
                continue
            self._waiting.pop(request.id, None)
            if self._switcher.spill(request.id, SpilledError("It goes to a remote.")):
                position -= 1
                gone[one.offer.to] += 1

    async def serve(
        self, offer: Offer, request: web.Request, context: RequestContext, body: Body | None, locally: Locally
    ) -> web.StreamResponse:
        """Serve a request here, or by the remote if it would wait too long; if that fails, here after all."""
        model, headers = context.model, list(context.headers)
        assert model is not None
        waits = context.ticket is not None or self._expected(model) != 0.0
        worst = await self._worst_cost(offer, body) if waits else None
        one = context.spillable = Spillable(offer, context, worst)
        context.may_leave = True
        if context.ticket is not None or not self._spills_now(one):
            try:
                return await locally(request, context, body)
            except SpilledError as error:
                context.leave(error.status)
            except RequestError as error:
                if not may_fail_over(request, context, error) or not self._spills_rejected(one, error):
                    raise
                context.leave(error.status)
            context.headers = list(headers)
        context.spillable = None
        through = (Reason.SPILL, model)
        try:
            return await self._targeting.serve(
                offer.to, request, context, body, None, through=through, others=True
            )
        except RequestError as error:
            if not may_fail_over(request, context, error):
                raise
            context.leave(error.status)
        context.model, context.headers = model, headers
        return await locally(request, context, body)

    def close(self) -> None:
        """Stop checking: another configuration is in force."""
        if self._timer is not None:
            self._timer.cancel()


def _prices(config: Config) -> Prices | None:
    if config.prices is None:
        return None
    from llmux.accounts.pricing import prices_of  # noqa: PLC0415 - few have prices

    return prices_of(config)


def _micros(amount: float | None) -> int | None:
    return None if amount is None else round(amount * 1e6)
