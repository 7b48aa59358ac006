"""The rules that choose a host for a request.

A route is a class with one method, ``place(model, fleet)``. It is called whenever a request needs a host, answers
at once from what the ``fleet`` shows (see ``fleet_view``; read-only), and returns one of its hosts, or None: the
request then waits in the gateway until something has changed. It may keep state of its own. It cannot break
anything: a host that it may not choose is not used, and if it raises, the request goes to the host with the fewest
requests in flight.

Shipped are ``least_wait``, and the usual rules of other systems for comparison. Your own route is named
``module:Class`` or ``./file.py:Class``; if it has a pydantic model ``Options`` as an attribute, the options of the
configuration are validated by it and passed to the constructor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

from pydantic import BaseModel, Field

from llmux.core.phases import Phase
from llmux.fleet.fleet_view import Fleet, Host

FORGOTTEN = 60.0  # seconds over which the waiting that a copy would have saved fades


class Route(Protocol):
    """What a route implements.

    With an attribute ``moves = True``, a request queued on a host is taken back while another host would serve it
    sooner by more than a switch costs, or already wakes its model: once each.
    """

    def place(self, model: str, fleet: Fleet) -> Host | None:
        """Return the host for a request for ``model``, or None to queue it. May not block."""


def least(hosts: Iterable[Host], fleet: Fleet, model: str) -> Host | None:
    """Return the host with the fewest of this gateway's requests; of several, the one that the hash prefers.

    This is the usual practice: each gateway counts its own. Counts that others report are late.
    """
    return min(hosts, key=lambda host: (len(host.own), fleet.tie(model, host)), default=None)


class Random:
    """Any host that has the model."""

    def place(self, model: str, fleet: Fleet) -> Host | None:
        """Roll the dice."""
        hosts = fleet.candidates(model)
        return hosts[int(fleet.dice() * len(hosts))] if hosts else None


class RoundRobin:
    """One host after the other, as nginx does by default."""

    def __init__(self) -> None:
        self._turn: dict[str, int] = {}

    def place(self, model: str, fleet: Fleet) -> Host | None:
        """Take the next one."""
        hosts = fleet.candidates(model)
        if not hosts:
            return None
        turn = self._turn.get(model, -1) + 1
        self._turn[model] = turn
        return hosts[turn % len(hosts)]


class LeastInFlight:
    """The host with the fewest requests, whatever it has awake: ``least_conn``."""

    def place(self, model: str, fleet: Fleet) -> Host | None:
        """Take the least loaded."""
        return least(fleet.candidates(model), fleet, model)


class PowerOfTwo:
    """Of two hosts drawn at random, the one with fewer requests."""

    def place(self, model: str, fleet: Fleet) -> Host | None:
        """Draw two."""
        hosts = fleet.candidates(model)
        if not hosts:
            return None
        two = [hosts[int(fleet.dice() * len(hosts))] for _ in range(2)]
        return min(two, key=lambda host: len(host.own))


class Static:
    """Each model on its own host, for good: where its hash says, among those that can be reached."""

    def place(self, model: str, fleet: Fleet) -> Host | None:
        """Take the first by rendezvous hashing."""
        return min(fleet.candidates(model), key=lambda host: fleet.tie(model, host), default=None)


class Affinity:
    """The least loaded host where the model is awake; else the one whose awake model was used least recently.

    As in llama-swap, Ray Serve and consistent hashing with bounded loads, no host takes more than ``bound`` times
    the mean load of its kind while another one has less; then the model gets another copy.
    """

    class Options(BaseModel):
        """How far a holder may be ahead of the others."""

        bound: float = Field(default=1.25, ge=1, description="Load of a holder, over the mean of all hosts.")
        least: int = Field(default=8, ge=0, description="Requests that a holder may have in any case.")

    def __init__(self, options: Options | None = None) -> None:
        self._options = options or self.Options()
        self._used: dict[str, float] = {}  # host → when a request went there last

    def place(self, model: str, fleet: Fleet) -> Host | None:
        """Keep the model where it is, within the bound."""
        hosts, now = fleet.candidates(model), fleet.time
        if not hosts:
            return None
        holders = [host for host in hosts if host.holds(model)]
        chosen = least(holders, fleet, model)
        if chosen is not None and len(holders) < len(hosts):
            load = len(chosen.own)
            mean = sum(len(host.own) for host in hosts) / len(hosts)
            if load >= max(self._options.least, self._options.bound * (mean + 1.0)):
                chosen = None
        if chosen is None:
            others = [host for host in hosts if not host.holds(model)]
            chosen = min(others, key=lambda host: (self._used.get(host.name, -math.inf), fleet.tie(model, host)))
        self._used[chosen.name] = now
        return chosen


class LeastWait:
    """The host where the request waits least, with what its wake costs others.

    - **Awake somewhere**: the least wait among the holders. Each host forecasts it; what was placed there since is
      added.
    - **A second copy**: as in the ski-rental problem, each wait that a fresh copy would have saved is added up;
      when the sum reaches what the copy costs, its own wake and what it displaces, it is made.
    - **Cold everywhere**: the least sum of wait and of what leaves; ties go by a hash on which all gateways agree.
    - **Nothing fresh**: the gateway's own counts.
    """

    moves = True

    class Options(BaseModel):
        """When a second copy is made."""

        copies: float = Field(
            default=1.0, gt=0, description="Saved waiting at which a copy is made, in costs of it."
        )

    def __init__(self, options: Options | None = None) -> None:
        self._options = options or self.Options()
        self._debts: dict[str, tuple[float, float]] = {}  # model → seconds of waiting to be saved, and as of when

    def place(self, model: str, fleet: Fleet) -> Host | None:
        """Compare waits."""
        here, wait = fleet.shortest(model)
        if here is not None and wait <= 0.0:
            return here
        claimed = fleet.claimed(model)
        if claimed is not None and claimed.name in fleet.excluded:
            claimed = None
        if here is None and claimed is not None:
            return claimed
        weight = fleet.weight(here, model)
        there, cost, burden = fleet.cheapest(model, weight)
        if here is None:
            return there or least(fleet.candidates(model), fleet, model)
        if there is None or claimed is not None:
            return here
        if wait > cost + burden:
            return there
        saved = wait if here.of(model).phase is Phase.AWAKE else 0.0
        # The request at hand waits for the copy, and no longer for the holder.
        price = cost + burden * weight - saved
        return there if self._worth_it(model, saved, price, fleet.time) else here

    def _worth_it(self, model: str, saved: float, price: float, now: float) -> bool:
        """Add to the seconds of waiting that a copy would have saved, and say whether to make it."""
        debt, then = self._debts.get(model, (0.0, now))
        debt = debt * math.exp((then - now) / FORGOTTEN) + saved
        if debt >= self._options.copies * price:
            self._debts.pop(model, None)
            return True
        self._debts[model] = debt, now
        return False


SHIPPED: dict[str, type] = {
    "least_wait": LeastWait,
    "affinity": Affinity,
    "least_in_flight": LeastInFlight,
    "power_of_two": PowerOfTwo,
    "random": Random,
    "round_robin": RoundRobin,
    "static": Static,
}
