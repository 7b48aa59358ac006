"""What a key may use: its grant, and what is left of its limits and its budget.

Grants are made when a configuration is loaded: from the key's own settings and, for what it does not set, from its
role's. The gate admits requests: all limits and the budget of a key are checked and debited in one step, without
awaiting anything, and settled when the request has ended, however it ended.

A request's cost is estimated from recent requests for its model; for a model without any it is ``UNKNOWN`` seconds
of the GPU. Its tokens are estimated from the size of its body and from recent answers of the model.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Protocol

from llmux.accounts.limits import Allowance, Budget, spell
from llmux.accounts.pricing import Prices, TokenPrice, micros, of_gpu, of_tokens, prices_of
from llmux.accounts.tokens import BYTES_PER_TOKEN, Answer, Tokens, tokens_of
from llmux.config import Config
from llmux.config.accounts import BudgetConfig, LimitsConfig, Rate
from llmux.errors import ForbiddenError, LimitError, QuotaError, RequestError

UNKNOWN = 5.0  # seconds of the GPU
UNKNOWN_TOKENS = 500.0  # of an answer
_WEIGHT = 0.3  # of the latest request in a mean
_AGAIN = 1.0  # seconds after which a client may retry if it is not known when there will be room

_LIFE = secrets.token_hex(6)  # makes the names of reservations unique among all llmux processes

Header = tuple[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class Grant:
    """What a key may use, by its configuration."""

    key: str
    models: frozenset[str] | None  # the names that it may request; None: all
    requests: tuple[Rate, ...] = ()
    tokens: tuple[Rate, ...] = ()
    concurrent: int | None = None
    budget: BudgetConfig | None = None

    @property
    def counts(self) -> bool:
        """Whether its use is counted, so that each request has to pass the gate."""
        return bool(self.requests or self.tokens or self.concurrent or self.budget)

    def allows(self, name: str) -> bool:
        """Whether it may request a name."""
        return self.models is None or name in self.models

    def refusal(self, name: str) -> ForbiddenError:
        """Return the error for a name that it may not request."""
        shown = name if len(name) <= 100 else name[:100] + "…"  # noqa: PLR2004 - it may be any, with `routes`
        return ForbiddenError(
            f"The key {self.key!r} may not use the model {shown!r}.", code="model_not_allowed", param="model"
        )


@dataclass(slots=True)
class _Balance:
    """What a key has left."""

    grant: Grant
    requests: list[Allowance]
    tokens: list[Allowance]
    budget: Budget | None
    running: int = 0


@dataclass(slots=True)
class _Model:
    """What recent requests for a model took."""

    seconds: float | None = None  # of the GPU, including its part of switches
    output: float | None = None  # tokens


@dataclass(slots=True)
class Passed:
    """One request that has passed the gate. ``ended`` is called once."""

    gate: Gate
    key: str
    model: str
    tokens: float
    reserved: int
    ident: str = ""  # of its reservation in the ledger
    served: str | None = None  # the model that served it, if it is another one
    awake_only: bool = False  # of its key's budget so much is spent that only what is awake serves it

    def ended(self, answer: tuple[Any, ...], seconds: float) -> None:
        """Settle it with the fields of an ``Answer``, and the seconds of the GPU that it took."""
        self.gate.settle(self, tokens_of(Answer(*answer)), seconds)


class Keeper(Protocol):
    """Where the use of budgets is kept: the ledger."""

    @property
    def rates(self) -> Mapping[str, TokenPrice]:
        """Known prices of remote models for which the configuration has none."""

    def spent(self, key: str, period: tuple[int, int]) -> int:
        """Return what a key has spent from a Unix time until another."""

    def reserve(self, ident: str, request_id: str, key: str, model: str, micros: int) -> None:
        """Record a reservation."""

    def release(self, ident: str) -> None:
        """Forget a reservation: its request has ended and was recorded."""


class Gate:
    """Admits requests. ``now`` is the loop's clock, ``awake(model)`` says whether a model can serve at once."""

    def __init__(
        self, now: Callable[[], float], awake: Callable[[str], bool], wall: Callable[[], float] = time.time
    ) -> None:
        self._now = now
        self._awake = awake
        self._prices: Prices | None = None
        self._balances: dict[str, _Balance] = {}
        self._former: dict[str, _Balance] = {}  # of keys that were removed while their requests were under way
        self._models: dict[str, _Model] = {}
        self._wall = wall  # a Unix time: the periods of budgets are days and months
        self._keeper: Keeper | None = None
        self._serial = 0
        self.grants: Mapping[str, Grant] = {}

    def configure(self, config: Config) -> None:
        """Apply a configuration; keys that remain keep what they have used."""
        self.hold_to(grants_of(config), prices_of(config))

    def hold_to(self, grants: Mapping[str, Grant], prices: Prices | None) -> None:
        """Set the grants, by the keys' names, and the prices."""
        self._prices = prices
        self.grants = grants
        balances, before = {}, self._former | self._balances
        for key, grant in self.grants.items():
            balances[key] = balance = _Balance(
                grant,
                [Allowance(rate) for rate in grant.requests],
                [Allowance(rate) for rate in grant.tokens],
                _budget(grant.budget),
            )
            if key in before:
                _carry_over(before.pop(key), balance)
            if balance.budget is not None and self._keeper is not None:
                balance.budget.known = partial(self._keeper.spent, key)
        self._balances = balances
        self._former = {key: balance for key, balance in before.items() if balance.running}

    def _balance(self, key: str) -> _Balance | None:
        """Return what a key has left, or had when it was removed: with its return its requests count again."""
        return self._balances.get(key) or self._former.get(key)

    def counted(self, key: str) -> Grant | None:
        """Return a key's grant if its use is counted."""
        grant = self.grants.get(key)
        return grant if grant is not None and grant.counts else None

    def kept_by(self, keeper: Keeper) -> None:
        """Begin budgets with what was spent in their period, and let reservations survive a crash."""
        self._keeper = keeper
        for key, balance in self._balances.items():
            if (budget := balance.budget) is not None:
                budget.turn(self._wall())
                budget.spent += keeper.spent(key, budget.period)
                budget.known = partial(keeper.spent, key)

    def may_spend(self, key: str, micros: int, passed: Passed | None = None) -> bool:
        """Whether so much is left of a key's budget, and the budget is not restricted to awake models.

        What is reserved for ``passed`` itself counts as left.
        """
        balance = self._balances.get(key)
        budget = None if balance is None else balance.budget
        if budget is None:
            return True
        budget.turn(self._wall())
        others = budget.reserved - (0 if passed is None else passed.reserved)
        return not budget.is_soft and budget.spent + others + micros <= budget.amount

    def budgets(self) -> dict[str, Budget]:
        """Return the budgets by key, in their current periods."""
        now = self._wall()
        found = {}
        for key, balance in self._balances.items():
            if balance.budget is not None:
                balance.budget.turn(now)
                found[key] = balance.budget
        return found

    def enter(
        self, grant: Grant, asked: str, model: str | None, size: int, request_id: str, headers: list[Header]
    ) -> Passed | None:
        """Admit a request, and add to its ``headers``; ``model`` is None if it is not chosen yet.

        ``size`` is that of its body, in bytes. Returns None if the key has neither limits nor a budget. Raises
        ForbiddenError, LimitError and QuotaError.
        """
        if not grant.allows(asked):
            raise grant.refusal(asked)
        balance = self._balances.get(grant.key)
        if balance is None:
            return None
        now, name = self._now(), model or asked
        known = self._models.get(name) or _Model()
        tokens = size / BYTES_PER_TOKEN + (UNKNOWN_TOKENS if known.output is None else known.output)
        reserved = 0 if balance.budget is None else self._estimate(name, known, tokens, size)
        try:
            self._check(balance, name, tokens, now)
        except RequestError as error:
            headers += _told(balance, now)
            if isinstance(error, QuotaError):
                headers.append(("x-should-retry", "false"))
            raise
        for allowance in balance.requests:
            allowance.take(now, 1)
        for allowance in balance.tokens:
            allowance.take(now, tokens)
        balance.running += 1
        if balance.budget is not None:
            balance.budget.reserved += reserved
        headers += _told(balance, now)
        passed = Passed(self, grant.key, name, tokens, reserved)
        passed.awake_only = balance.budget is not None and balance.budget.is_soft
        if balance.budget is not None and self._keeper is not None:
            self._serial += 1
            passed.ident = f"{_LIFE}-{self._serial}"
            self._keeper.reserve(passed.ident, request_id, grant.key, name, reserved)
        return passed

    def _check(self, balance: _Balance, model: str, tokens: float, now: float) -> None:
        grant, budget = balance.grant, balance.budget
        if budget is not None:
            budget.turn(self._wall())
            left = budget.period[1] - self._wall()
            if budget.is_spent or (budget.is_soft and not budget.awake_only):
                raise QuotaError(f"The budget of the key {grant.key!r} is spent; it begins anew in {spell(left)}.")
            if budget.is_soft and not self._awake(model):
                raise self.not_awake(grant.key, model)
            if budget.is_full:
                raise LimitError(
                    f"What the key {grant.key!r} has left of its budget is reserved by its requests under way.",
                    retry_after=_AGAIN,
                )
        if grant.concurrent is not None and balance.running >= grant.concurrent:
            raise LimitError(
                f"The key {grant.key!r} may have {grant.concurrent} requests under way at once.",
                retry_after=_AGAIN,
            )
        for what, allowances, count in (("requests", balance.requests, 1.0), ("tokens", balance.tokens, tokens)):
            for allowance in allowances:
                wait = allowance.wait(now, count)
                if wait > 0:
                    rate = allowance.rate
                    raise LimitError(
                        f"The key {grant.key!r} may use {rate.number} {what} in {spell(rate.seconds)};"
                        f" there is room in {spell(wait)}.",
                        retry_after=wait,
                    )

    def not_awake(self, key: str, model: str) -> QuotaError:
        """Return the error for a request of which the budget lets only what is awake serve it."""
        balance = self._balance(key)
        budget = None if balance is None else balance.budget
        again = "" if budget is None else f" It begins anew in {spell(budget.period[1] - self._wall())}."
        return QuotaError(
            f"The budget of the key {key!r} is nearly spent: only what is awake serves it, and {model!r} is not."
            f"{again}"
        )

    def settle(self, passed: Passed, tokens: Tokens, seconds: float) -> None:
        """Replace the estimate of a request by what it took."""
        total = tokens.input + tokens.output
        if total or seconds:
            known = self._models.setdefault(passed.model, _Model())
            known.seconds = _mean(known.seconds, seconds)
            known.output = _mean(known.output, float(tokens.output))
        if passed.ident and self._keeper is not None:
            self._keeper.release(passed.ident)
        balance = self._balance(passed.key)
        if balance is None:
            return
        balance.running -= 1
        for allowance in balance.tokens:
            allowance.correct(total - passed.tokens)
        if balance.budget is not None:
            balance.budget.turn(self._wall())
            # A reload may have taken the budget, with what was reserved of it, and another brought it back.
            balance.budget.reserved = max(0, balance.budget.reserved - passed.reserved)
            balance.budget.spent += self._cost(passed.served or passed.model, tokens, seconds)

    def _estimate(self, name: str, known: _Model, tokens: float, size: int) -> int:
        seconds = UNKNOWN if known.seconds is None else known.seconds
        read = round(size / BYTES_PER_TOKEN)
        return max(1, self._cost(name, Tokens(read, 0, round(tokens) - read), seconds))

    def _cost(self, name: str, tokens: Tokens, seconds: float) -> int:
        prices = self._prices
        if prices is None:
            return 0
        price = prices.models.get(name)
        if price is None and name in prices.elsewhere:
            price = None if self._keeper is None else self._keeper.rates.get(name)
            if price is None:
                return 0
        if price is None:
            return of_gpu(prices, round(seconds * 1e6), 0)[0]
        return of_tokens(price, (tokens.input, tokens.cached, tokens.output), 0)[0]


def _mean(before: float | None, latest: float) -> float:
    return latest if before is None else before + _WEIGHT * (latest - before)


def _budget(given: BudgetConfig | None) -> Budget | None:
    if given is None:
        return None
    return Budget(micros(given.amount), given.per, given.soft, given.then == "awake_only")


def _carry_over(before: _Balance, balance: _Balance) -> None:
    balance.running = before.running
    for old, new in ((before.requests, balance.requests), (before.tokens, balance.tokens)):
        known = {allowance.rate.seconds: allowance for allowance in old}
        for at, allowance in enumerate(new):
            same = known.get(allowance.rate.seconds)
            if same is not None and same.rate == allowance.rate:
                new[at] = same
    if before.budget is not None and balance.budget is not None:
        if before.budget.per == balance.budget.per:
            balance.budget.spent, balance.budget.period = before.budget.spent, before.budget.period
            balance.budget.newest = before.budget.newest
        balance.budget.reserved = before.budget.reserved


def _told(balance: _Balance, now: float) -> Iterable[Header]:
    """Yield OpenAI's headers for what is left of the limit that is nearest to its end."""
    for what, allowances in (("requests", balance.requests), ("tokens", balance.tokens)):
        lefts = [allowance.left(now) for allowance in allowances]
        if lefts:
            nearest = min(lefts, key=lambda left: left.remaining / left.limit)
            yield f"x-ratelimit-limit-{what}", str(nearest.limit)
            yield f"x-ratelimit-remaining-{what}", str(nearest.remaining)
            yield f"x-ratelimit-reset-{what}", spell(nearest.reset)


def grants_of(config: Config) -> dict[str, Grant]:
    """Return the grants of the keys that have any limit, by the keys' names."""
    names = {
        **config.names,
        **config.variants,
        **{name: name for name in (*config.virtual, *config.remote_models)},
    }
    found = {}
    seen: dict[tuple[str, ...], frozenset[str]] = {}  # most keys share their role's
    for entry in config.api_keys:
        role = None if entry.role is None else config.roles[entry.role]
        models = entry.models if entry.models is not None else None if role is None else role.models
        budget = entry.budget if entry.budget is not None else None if role is None else role.budget
        limits = [each for each in (entry.limits, None if role is None else role.limits) if each is not None]
        if entry.name is None or (models is None and budget is None and not limits):
            continue
        if models is not None and models not in seen:
            seen[models] = frozenset(_allowed(models, names))
        allowed = None if models is None else seen[models]
        found[entry.name] = Grant(
            entry.name,
            allowed,
            _first(limits, lambda given: given.requests),
            _first(limits, lambda given: given.tokens),
            next((given.concurrent for given in limits if given.concurrent is not None), None),
            budget,
        )
    return found


def _first(limits: Iterable[LimitsConfig], which: Callable[[LimitsConfig], tuple[Rate, ...]]) -> tuple[Rate, ...]:
    return next((rates for given in limits if (rates := which(given))), ())


def _allowed(globs: Iterable[str], names: Mapping[str, str]) -> Iterable[str]:
    """Yield the names that match a glob, or that stand for a model which matches one."""
    globs = tuple(globs)
    for name, model in names.items():
        if any(fnmatchcase(name, glob) or fnmatchcase(model, glob) for glob in globs):
            yield name
