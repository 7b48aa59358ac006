"""Roles, limits and budgets of a gateway's keys over all gateways: each counts by itself, and tells the others.

Theory of operation
===================

A request is admitted by what is in memory here, and never waits for the store (the ``Gate`` of a host). Its use is
noted, and sent to the store with that of other requests: within a twentieth of a second after a use, and twice a
second (``store_sync``). The answer is the total use of all gateways, which replaces the estimate here. So a limit
may be exceeded by the requests that reach other gateways between two such exchanges; that is deducted from the
following requests, and over a longer time the limit holds.

- A *rate* is stored as the time at which it would be full again, on the store's clock (if that is set back, rates
  move with it; see ``llmux.accounts.limits``); a *budget* as what was spent in its period. A script adds uses, in
  numbered batches: a batch whose answer was lost is sent again, and counts once.
- What is *held* (requests in progress, reservations of budgets) each gateway sends as a whole, valid for a few
  seconds, so no count can drift, and what a dead gateway held expires.
- While the store cannot be used, each gateway takes its own share: its use counts as if each of the other gateways
  known last used as much. When the store is back, the real use replaces that.
- An emptied store gets what is known here; the largest spending that any gateway knows of a budget holds.

Spending is also kept in a file (``state``), which survives the end of all gateways, and of the store. What the
store has not confirmed is recorded there as a numbered batch before it is sent: a gateway restarted after a kill
sends it again, and each part counts once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmux.accounts.gate import Gate, Grant, Header, Passed
from llmux.accounts.limits import Allowance, period
from llmux.accounts.pricing import Prices, TokenPrice, micros, price_of
from llmux.accounts.tokens import Answer, Tokens, tokens_of
from llmux.fleet.store import NONSENSE, Told, Use

if TYPE_CHECKING:
    from llmux.config.gateway import GatewayConfig
    from llmux.fleet.store import Store
    from llmux.gateway.handler import Ear

_DAY = 86_400.0
_GRACE = _DAY  # seconds that a budget is kept after its period
_LAST = 3  # periods of a key's budget that are kept whatever the clock says: it may be wrong


@dataclass(frozen=True, slots=True, eq=False)
class OpenGrant(Grant):
    """A grant for the models, on any host, that match."""

    globs: tuple[str, ...] | None = None
    model_of: Callable[[str], str | None] = field(default=lambda _name: None)

    def allows(self, name: str) -> bool:
        """Whether it may request a name."""
        if self.globs is None:
            return True
        names = {name, self.model_of(name) or name}
        return any(fnmatchcase(each, glob) for each in names for glob in self.globs)


def grants_of(config: GatewayConfig, model_of: Callable[[str], str | None]) -> dict[str, Grant]:
    """Return the grants of the keys that have any limit, by the keys' names."""
    found: dict[str, Grant] = {}
    for entry in config.api_keys:
        if entry.name is None or not entry.managed:
            continue
        role = None if entry.role is None else config.roles[entry.role]
        limits = [each for each in (entry.limits, None if role is None else role.limits) if each is not None]
        models = entry.models if entry.models is not None else None if role is None else role.models
        budget = entry.budget if entry.budget is not None else None if role is None else role.budget
        found[entry.name] = OpenGrant(
            entry.name,
            None,
            next((each.requests for each in limits if each.requests), ()),
            next((each.tokens for each in limits if each.tokens), ()),
            next((each.concurrent for each in limits if each.concurrent is not None), None),
            budget,
            models,
            model_of,
        )
    return found


def prices_of(config: GatewayConfig) -> Prices | None:
    """Return the prices, where there are any."""
    given = config.prices
    if given is None:
        return None
    models = {name: price_of(one.input, one.cached, one.output) for name, one in given.models.items()}
    return Prices(given.currency, micros(given.gpu_hour), models)


@dataclass(slots=True)
class Metered(Passed):
    """An admitted request, and what is known of its time on its host."""

    sent_at: float | None = None  # when its host received it, on the loop's clock
    ear: Ear | None = None  # what was received from the host: how long the request waited there

    def ended(self, answer: tuple[Any, ...], seconds: float) -> None:
        """Settle it: its GPU time is its time on the host, less the wait in the queue."""
        assert isinstance(self.gate, SharedGate)
        if self.sent_at is not None:
            queued = 0.0 if self.ear is None else self.ear.queued
            seconds = max(0.0, self.gate.now() - self.sent_at - queued)
        self.gate.settle(self, tokens_of(Answer(*answer)), seconds)


@dataclass(slots=True)
class _Held:
    """What requests in progress hold of a key's limits, here and at other gateways."""

    running: int = 0
    reserved: int = 0
    others: tuple[int, int] = (0, 0)  # as it is counted in the balance


class SharedGate(Gate):
    """Admits requests by the use of all gateways."""

    def __init__(
        self,
        now: Callable[[], float],
        awake: Callable[[str], bool],
        wall: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(now, awake, wall)
        self.now = now
        self.alone = False  # the store cannot be used
        self.others = 0  # number of gateways, as last known
        self.used = asyncio.Event()  # set: there is use to send
        self._file: Path | None = None  # the file with the spending of budgets
        self._seq = 0
        self._since = 0.0  # on the store's clock: earlier changes are known
        self._anew = False  # the store was emptied
        self._pending: dict[str, float] = {}  # what was used, by its name in the store, not sent yet
        self._sent: dict[str, float] = {}  # the same, sent, but not answered
        self._full_at: dict[str, float] = {}  # of rates, as the store knows them, on the loop's clock
        self._spent: dict[str, int] = {}  # of budgets, the same
        self._rates: dict[str, Allowance] = {}
        self._held: dict[str, _Held] = {}
        self._tidied = 0.0  # the day, of Unix time
        self._saved = ""
        self._batch = "", 0  # which gateway sends it, and its number; a gateway that was killed has its own
        self.unsaved = asyncio.Event()  # set: something that is kept in the file may have changed
        self.unreadable = ""  # what is wrong with the file
        self._keeper = self

    # ---- the Keeper (budgets begin with what was spent before)

    @property
    def rates(self) -> Mapping[str, TokenPrice]:
        """Return nothing: the hosts know the prices of remote models."""
        return {}

    def spent(self, key: str, period: tuple[int, int]) -> int:
        """Return what a key is known to have spent in a period."""
        name = _budget(key, period[0])
        return round(self._spent.get(name, 0) + self._pending.get(name, 0) + self._sent.get(name, 0))

    def reserve(self, *_: object) -> None:
        """Do nothing: all reservations are saved in the file."""

    def release(self, *_: object) -> None:
        """Do nothing."""

    # ---- requests

    def configure_gateway(self, config: GatewayConfig, model_of: Callable[[str], str | None]) -> None:
        """Apply a gateway's configuration; ``model_of`` says which model a name stands for.

        Raises ConfigError if there is no place for the file of the budgets.
        """
        grants = grants_of(config, model_of)
        if self._file is None and any(grant.budget is not None for grant in grants.values()):
            self._load_file(config.state_path)
        self.hold_to(grants, prices_of(config))

    def hold_to(self, grants: Mapping[str, Grant], prices: Prices | None) -> None:
        """Apply a configuration; keys that remain keep what they have used."""
        super().hold_to(grants, prices)
        self._rates = {
            _rate(what, key, each): each
            for key, balance in self._balances.items()
            for what, allowances in (("requests", balance.requests), ("tokens", balance.tokens))
            for each in allowances
        }

    def enter(
        self, grant: Grant, asked: str, model: str | None, size: int, request_id: str, headers: list[Header]
    ) -> Metered | None:
        """Admit a request. Raises ForbiddenError, LimitError and QuotaError."""
        if not grant.counts and grant.allows(asked):
            return None
        passed = super().enter(grant, asked, model, size, request_id, headers)
        if passed is None:
            return None
        held = self._held.setdefault(passed.key, _Held())
        held.running += 1
        held.reserved += passed.reserved if self._balances[passed.key].budget is not None else 0
        self._use(passed.key, 1, passed.tokens, 0)
        return Metered(self, passed.key, passed.model, passed.tokens, passed.reserved, passed.ident)

    def settle(self, passed: Passed, tokens: Tokens, seconds: float) -> None:
        """Replace the estimate of a request by what it took."""
        balance = self._balances.get(passed.key)
        budget = None if balance is None else balance.budget
        if budget is not None:
            budget.turn(self._wall())
        before = 0 if budget is None else budget.spent
        super().settle(passed, tokens, seconds)
        held = self._held.setdefault(passed.key, _Held())
        held.running = max(0, held.running - 1)
        held.reserved = max(0, held.reserved - passed.reserved)
        if balance is not None:
            cost = 0 if budget is None else budget.spent - before
            self._use(passed.key, 0, tokens.input + tokens.output - passed.tokens, cost)

    def _use(self, key: str, requests: float, tokens: float, cost: int) -> None:
        """Record a use here."""
        balance, now = self._balances[key], self.now()
        more = self.others if self.alone else 0  # what the others are assumed to use
        for what, allowances, count in (
            ("requests", balance.requests, requests),
            ("tokens", balance.tokens, tokens),
        ):
            for allowance in allowances if count else ():
                self._note(_rate(what, key, allowance), count * allowance.rate.seconds / allowance.rate.number)
                if more and count > 0:
                    allowance.take(now, count * more)
                elif more:
                    allowance.correct(count * more)
        if balance.budget is not None and cost:
            self._note(_budget(key, balance.budget.period[0]), cost)
            balance.budget.spent += cost * more
        if more:
            held = self._held[key]
            self._others_hold(key, held.running * more, held.reserved * more)
        self.used.set()
        self.unsaved.set()

    def _note(self, name: str, amount: float) -> None:
        self._pending[name] = self._pending.get(name, 0.0) + amount

    def _others_hold(self, key: str, running: int, reserved: int) -> None:
        balance, held = self._balance(key), self._held.setdefault(key, _Held())
        if balance is not None:
            balance.running += running - held.others[0]
            if balance.budget is not None:
                balance.budget.reserved = max(0, balance.budget.reserved + reserved - held.others[1])
        held.others = running, reserved

    # ---- the store

    async def exchange(self, store: Store, gateway: str) -> None:
        """Send what was used, and learn what all have used. Raises StoreError."""
        self.used.clear()
        if not self._sent:
            self._sent, self._pending = self._pending, {}
            self._seq += 1
            self._batch = gateway, self._seq
            with contextlib.suppress(OSError):  # it is logged when the file is saved as usual
                self.save()
        uses = list(self._uses())
        held = {key: (each.running, each.reserved) for key, each in self._held.items() if each.running}
        teller, number = self._batch
        try:
            told = await store.use(teller, number, self._since, uses, held if teller == gateway else {})
        except Exception:
            self._lost()
            raise
        self._sent = {}
        # Sent next, if the store knew nothing, or another gateway has reported less.
        self._anew = (told.empty and not self._anew) or any(
            value < self._spent.get(name, 0) for name, value in told.values.items() if name.startswith("budget:")
        )
        if self._anew or teller != gateway:
            self.used.set()
        self._since = told.now - 1000.0
        self._take(told)
        self.unsaved.set()

    def _lost(self) -> None:
        """Continue alone."""
        if not self.alone:
            self.alone = True
            for key, held in self._held.items():
                self._others_hold(key, held.running * self.others, held.reserved * self.others)

    def _uses(self) -> Iterator[Use]:
        now, wall = self.now(), self._wall()
        names = dict(self._sent)
        if self._anew:
            names = dict.fromkeys([*self._spent, *self._full_at], 0.0) | names
        for name, amount in names.items():
            if name in self._rates or name in self._full_at:
                known = max(0.0, self._full_at.get(name, now) - now)
                yield Use(name, "rate", amount * 1000, known * 1000, 0)
            elif name.startswith("budget:"):
                kept = _kept_until(name) - wall
                if kept > 0 or amount:  # it may seem to be over because the clock is wrong
                    yield Use(name, "budget", amount, self._spent.get(name, 0), round(max(kept, _GRACE) * 1000))
            else:
                yield Use(name, "rate", amount * 1000, 0.0, 0)

    def _take(self, told: Told) -> None:
        self.alone, self.others = False, len(told.held)
        now = self.now()
        for name, value in told.values.items():
            if name.startswith("budget:"):
                self._spent[name] = max(round(value), self._spent.get(name, 0))  # it only grows
            else:
                self._full_at[name] = now + max(0.0, (value - told.now) / 1000)
            if (allowance := self._rates.get(name)) is not None:
                allowance.full_at = self._full_at[name] + self._pending.get(name, 0.0)
        wall = self._wall()
        sums: dict[str, tuple[int, int]] = {}
        for document in told.held:
            for key, (running, reserved) in document.items():
                before = sums.get(key, (0, 0))
                sums[key] = before[0] + running, before[1] + reserved
        for key, balance in self._balances.items():
            if balance.budget is not None:
                balance.budget.turn(wall)
                balance.budget.spent = self.spent(key, balance.budget.period)
        for key in {*sums, *self._held}:
            self._others_hold(key, *sums.get(key, (0, 0)))
        if wall // _DAY != self._tidied:
            self._tidied = wall // _DAY
            self._forget(now, wall)

    def _forget(self, now: float, wall: float) -> None:
        """Forget what counts no more: budgets of earlier periods, rates and keys that were removed."""
        last: dict[str, list[tuple[int, str]]] = {}
        for name in self._spent:
            _, since, key = name.split(":", 2)
            if key in self._balances:
                last.setdefault(key, []).append((int(since), name))
        kept = {name for names in last.values() for _, name in sorted(names)[-_LAST:]}
        self._spent = {
            name: spent for name, spent in self._spent.items() if name in kept or _kept_until(name) > wall
        }
        self._full_at = {name: at for name, at in self._full_at.items() if name in self._rates or at > now}
        nothing = _Held()
        self._held = {key: held for key, held in self._held.items() if held != nothing}

    # ---- the file

    def _load_file(self, file: Path) -> None:
        self._file = file
        try:
            document = json.loads(file.read_text())
            spent, reserved, untold = (
                {str(name): int(value) for name, value in document.get(part, {}).items()}
                for part in ("spent", "reserved", "untold")
            )
            batch = document.get("batch") or {"gateway": "", "number": 0, "spent": {}}
            told = {str(name): int(value) for name, value in batch["spent"].items()}
            self._batch = str(batch["gateway"]), int(batch["number"])
        except FileNotFoundError:
            return
        except (OSError, *NONSENSE) as error:
            self.unreadable = f"{file}: {error!r}"
            return
        self._sent = dict(told)
        self._spent = {
            name: max(0, each - untold.get(name, 0) - told.get(name, 0)) for name, each in spent.items()
        }
        for name, value in (*untold.items(), *reserved.items()):  # of a killed gateway: these count as spent
            self._note(name, value)

    def document(self) -> dict[str, Any]:
        """Return the saved state of budgets: spent, reserved here, and not confirmed by the store."""
        spent, reserved = {}, {}
        for key, budget in self.budgets().items():
            name = _budget(key, budget.period[0])
            spent[name] = self.spent(key, budget.period)
            if (held := self._held.get(key)) is not None and held.reserved:
                reserved[name] = held.reserved
        untold, told = (
            {name: round(uses[name]) for name in spent if uses.get(name)} for uses in (self._pending, self._sent)
        )
        found: dict[str, Any] = {"spent": spent, "reserved": reserved}
        if untold:
            found["untold"] = untold
        if told:
            found["batch"] = {"gateway": self._batch[0], "number": self._batch[1], "spent": told}
        return found

    def save(self) -> None:
        """Write the file if something has changed. Raises OSError."""
        text = json.dumps(self.document(), indent=1, sort_keys=True)
        if self._file is None or text == self._saved or not self.budgets():
            return
        self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = self._file.with_name(f".{self._file.name}")
        draft.touch(mode=0o600)
        draft.write_text(text)
        draft.replace(self._file)
        self._saved = text


def _rate(what: str, key: str, allowance: Allowance) -> str:
    return f"{what}:{allowance.rate.number}:{allowance.rate.seconds:g}:{key}"


def _budget(key: str, since: int) -> str:
    return f"budget:{since}:{key}"


def _kept_until(budget: str) -> float:
    """Return the Unix time until which a budget is kept; its name does not say whether it is of a day."""
    return period("month", int(budget.split(":", 2)[1]))[1] + _GRACE
