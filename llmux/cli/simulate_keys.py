"""``llmux simulate … --budget KEY=… --fair key``: each key's waits, switches and cost, before and after.

Requests are admitted by the same gate as in production, and their share of the GPU is computed by the same code;
both in virtual time.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from llmux.accounts.gate import Gate, Grant, Passed, grants_of
from llmux.accounts.pricing import Prices, micros, of_gpu, of_tokens, prices_of
from llmux.accounts.shares import Shares
from llmux.accounts.tokens import BYTES_PER_TOKEN, Tokens
from llmux.cli.terminal import terminal
from llmux.config import Config
from llmux.config.accounts import HOUSE, BudgetConfig
from llmux.core.effects import Admit, Effect, ModelRemoved, PhaseChanged, Reject, SwitchEnded, SwitchStarted
from llmux.core.events import Event, RequestAbandoned, RequestFinished
from llmux.core.phases import Phase
from llmux.errors import LimitError, QuotaError
from llmux.estimates.fair_order import FairOrder
from llmux.estimates.fairness import Fairness
from llmux.estimates.fairness import Prices as Counted
from llmux.simulator.run import Outcome, Run
from llmux.simulator.statistics import wait_of
from llmux.simulator.trace import Job, Trace, TraceError

CONFIGURED = "config"
"""``--budget config``: what the configuration says of its keys."""
ALL = "*"
AS_IT_IS = "as it is"
COUNTED = ("input", "output", "switch_second")
_PER = ("day", "month")
_MILLION = 1e6


class Keyed(NamedTuple):
    """The options of keys."""

    prices: Prices | None
    grants: Mapping[str, Grant]
    fair: Fair | None
    starts: float  # the Unix time at which the traffic begins
    title: str
    traffic: str  # where it comes from


class Fair(NamedTuple):
    """How the GPU is divided among keys."""

    prices: Counted
    weights: Mapping[str, float]


@dataclass(slots=True)
class KeyFigures:
    """Results for a key's requests. Seconds, and millionths of the currency."""

    requests: int = 0
    refused: int = 0
    mean_wait: float = 0.0
    p95_wait: float = 0.0
    max_wait: float = 0.0
    switches: int = 0  # for whose target one of its requests waited
    gpu_seconds: float = 0.0  # its share of the time that the GPU was held, without switches
    switch_seconds: float = 0.0
    cost_micros: int | None = None


def asked(
    budgets: Sequence[str] | None,
    fair: str | None,
    gpu_hour: float | None,
    traffic: Trace | None,
    plan: Config | None,
    starts: float,
    *,
    policies: Sequence[str] | None = None,
    **others: object,
) -> Keyed | None:
    """Parse the options of keys; None without any. ``others`` cannot be combined with them. Raises TraceError."""
    if not budgets and fair is None:
        if gpu_hour is not None:
            raise TraceError("--gpu-hour is about keys; add --budget, as --budget alice=5/month, or --fair key")
        return None
    title = " ".join([*(f"--budget {text}" for text in budgets or ()), *([f"--fair {fair}"] if fair else [])])
    if policies is not None and len(policies) > 1:
        raise TraceError(f"{title}: give --policy once; the two tables are without and with this")
    for name, value in others.items():
        if value:
            raise TraceError(f"--{name.replace('_', '-')} cannot be combined with {title}")
    assert traffic is not None
    keys = sorted({job.key for job in traffic.jobs})
    if keys == [""]:
        raise TraceError(
            f"{traffic.name}: says of no request which key sent it; a record does where there are `api_keys` with"
            " names, and a trace in its column `key`"
        )
    prices = _prices(plan, gpu_hour)
    if budgets and prices is None:
        raise TraceError("--budget: the price is not known; add --gpu-hour 0.90, or --config with `prices`")
    grants: dict[str, Grant] = {}
    for text in budgets or ():
        assert prices is not None
        grants |= _configured(plan) if text == CONFIGURED else _grants(text, prices.currency, keys)
    return Keyed(
        prices, grants, None if fair is None else _fair(fair, keys), starts, f"with {title}", traffic.name
    )


def _fair(text: str, keys: Sequence[str]) -> Fair:
    """Parse ``key,alice=3,switch_second=500``: weights of keys, and what is counted."""
    first, *words = text.split(",")
    counted, weights = {}, {}
    try:
        if first != "key":
            raise ValueError  # noqa: TRY301
        for word in words:
            name, _, value = word.partition("=")
            number = float(value)
            if name in COUNTED and 0 <= number < math.inf:
                counted[name] = number
            elif name in keys and 0 < number < math.inf:
                weights[name] = number
            else:
                raise ValueError  # noqa: TRY301
    except ValueError:
        known = ", ".join(filter(None, keys))
        raise TraceError(
            f"--fair {text}: write key, and perhaps weights above 0 of {known}, or {', '.join(COUNTED)}:"
            " key,alice=3,switch_second=500"
        ) from None
    return Fair(Counted(**counted), weights)


def _prices(plan: Config | None, gpu_hour: float | None) -> Prices | None:
    prices = None if plan is None else prices_of(plan)
    if gpu_hour is None:
        return prices
    if not 0 <= gpu_hour < math.inf:
        raise TraceError("--gpu-hour: must be an amount from 0 on, as 0.90")
    return replace(prices or Prices("usd", 0, {}), gpu_hour=micros(gpu_hour))


def _configured(plan: Config | None) -> Mapping[str, Grant]:
    if plan is None:
        raise TraceError("--budget config: add --config, whose keys are meant")
    return {name: grant for name, grant in grants_of(plan).items() if grant.counts}


def _grants(text: str, currency: str, keys: Sequence[str]) -> Mapping[str, Grant]:
    name, budget = _budget(text, currency)
    if name != ALL and name not in keys:
        known = ", ".join(filter(None, keys))
        raise TraceError(f"--budget {text}: no request is by {name!r}; there are {known}")
    return {key: Grant(key, None, budget=budget) for key in (keys if name == ALL else [name])}


def _budget(text: str, currency: str) -> tuple[str, BudgetConfig]:
    """Parse ``alice=5/month,soft=0.8,then=awake_only``."""
    key, _, rest = text.rpartition("=") if text.count("=") == 1 else text.partition("=")
    amount, *more = rest.split(",")
    number, slash, per = amount.partition("/")
    words = dict(word.partition("=")[::2] for word in more)
    wrong = f"--budget {text}: write KEY=AMOUNT/month or /day, and perhaps ,soft=0.8,then=awake_only"
    if not key or (slash and per not in _PER) or not {"soft", "then"} >= words.keys():
        raise TraceError(wrong)
    try:
        return key, BudgetConfig.model_validate(
            {"amount": number, "currency": currency, "per": per or "month", **words}
        )
    except ValueError:
        raise TraceError(wrong) from None


@dataclass(slots=True)
class Books:
    """The accounts of a run by key."""

    gate: Gate | None
    prices: Prices | None
    shares: Shares
    jobs: Sequence[Job]
    passed: dict[int, Passed] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    switches: Counter[str] = field(default_factory=Counter)
    own: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    switch: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    cost: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def lets_in(self, index: int) -> bool:
        """Return whether the gate admits a job."""
        job = self.jobs[index]
        grant = None if self.gate is None else self.gate.grants.get(job.key)
        if self.gate is None or grant is None:
            return True
        size = round(job.size[0] * BYTES_PER_TOKEN)
        try:
            passed = self.gate.enter(grant, job.model, job.model, size, "", [])
        except (LimitError, QuotaError):
            self.refused.add(index)
            return False
        if passed is not None:
            self.passed[index] = passed
        return True

    def take(self, event: Event, effects: Iterable[Effect], now: float) -> None:
        """Record an event and the effects of the core."""
        ended = [event.request] if isinstance(event, RequestFinished | RequestAbandoned) else []
        for effect in effects:
            match effect:
                case Admit():
                    self.shares.admitted(now, effect)
                case PhaseChanged():
                    self.shares.phase_changed(now, effect)
                case ModelRemoved():
                    self.shares.removed(now, effect)
                case SwitchStarted(to=to):
                    waiting = () if to is None else self.shares.waiters(to)
                    self.switches.update({self.jobs[each].key for each in waiting})
                    self.shares.switch_started(now, effect)
                case SwitchEnded():
                    self.shares.switch_ended(now, effect)
                case Reject(request=request):
                    ended.append(request)
        for request in ended:
            self._ended(request, now)

    def _ended(self, index: int, now: float) -> None:
        job = self.jobs[index]
        own, switch = self.shares.ended(now, index, job.key)
        self.own[job.key] += own
        self.switch[job.key] += switch
        read, made = job.size
        if self.prices is not None and (price := self.prices.models.get(job.model)) is not None:
            self.cost[job.key] += of_tokens(price, (read, 0, made), 0)[0]
        else:
            self._owe(job.key, own + switch)
        passed = self.passed.pop(index, None)
        if passed is not None:
            passed.gate.settle(passed, Tokens(read, 0, made), own + switch)

    def _owe(self, key: str, seconds: float) -> None:
        if self.prices is not None:
            self.cost[key] += of_gpu(self.prices, round(seconds * 1e6), 0)[0]

    def close(self, now: float) -> None:
        """Charge what belongs to no request."""
        house, due = self.shares.take(now)
        self.own[HOUSE] += house
        self._owe(HOUSE, house)
        for key, seconds, _ in due:
            self.switch[key] += seconds
            self._owe(key, seconds)


def _attach(run: Run, keyed: Keyed | None, prices: Prices | None) -> Books:
    """Keep the accounts of a run. Without ``keyed`` every request is admitted."""
    state, jobs = run.core.state, run.jobs
    gate = None
    if keyed is not None:
        gate = Gate(
            lambda: run.time,
            lambda model: state.models[model].phase is Phase.AWAKE,
            lambda: keyed.starts + run.time,
        )
        gate.hold_to(keyed.grants, keyed.prices)
    shares = Shares(lambda model: tuple(state.models[model].queue), lambda index: jobs[index].key)
    books = Books(gate, prices, shares, jobs)
    state.explain = True  # phases are reported
    handle: Callable[[Event, float], list[Effect]] = run.handle
    if keyed is not None and keyed.fair is not None:
        order = FairOrder(Fairness(keyed.fair.prices, keyed.fair.weights))
        handle = order.attach(run.core, shares.key_of, lambda index: jobs[index].size)

    def observed(event: Event, now: float) -> list[Effect]:
        effects = handle(event, now)
        books.take(event, effects, now)
        return effects

    run.handle, run.lets_in = observed, books.lets_in
    return books


Figures = Mapping[str, Mapping[str, KeyFigures]]
"""The figures of each key, by how it was run."""


def compare(keyed: Keyed, simulate: Callable[[Callable[[Run], None]], Outcome]) -> Figures:
    """Run the traffic as it is, and with the options; ``simulate`` calls what it is given with the run."""
    found = {}
    for title, held in ((AS_IT_IS, None), (keyed.title, keyed)):
        kept: list[Books] = []

        def prepare(run: Run, held: Keyed | None = held, kept: list[Books] = kept) -> None:
            kept.append(_attach(run, held, keyed.prices))

        outcome = simulate(prepare)
        kept[0].close(outcome.end)
        found[title] = _figures(outcome, kept[0])
    return found


def _figures(outcome: Outcome, books: Books) -> dict[str, KeyFigures]:
    waits: dict[str, list[float]] = defaultdict(list)
    figures: dict[str, KeyFigures] = defaultdict(KeyFigures)
    for index, job in enumerate(books.jobs):
        mine = figures[job.key]
        mine.requests += 1
        mine.refused += index in books.refused
        if (wait := wait_of(outcome, index)) is not None:
            waits[job.key].append(wait)
    for key in {*figures, *books.own, *books.switch}:
        mine, mine_waits = figures[key], sorted(waits[key])
        if mine_waits:
            mine.mean_wait = sum(mine_waits) / len(mine_waits)
            mine.p95_wait = mine_waits[int(0.95 * (len(mine_waits) - 1))]
            mine.max_wait = mine_waits[-1]
        mine.switches = books.switches[key]
        mine.gpu_seconds, mine.switch_seconds = books.own[key], books.switch[key]
        mine.cost_micros = None if books.prices is None else books.cost[key]
    return dict(sorted(figures.items(), key=lambda each: (each[0] == HOUSE, each[0])))


def show(keyed: Keyed, policy: str, found: Figures, *, as_json: bool) -> None:
    """Print the figures."""
    currency = "" if keyed.prices is None else keyed.prices.currency
    if as_json:
        ways = {title: {key: asdict(each) for key, each in keys.items()} for title, keys in found.items()}
        typer.echo(json.dumps({"policy": policy, "currency": currency, "keys": ways}, indent=2))
        return
    console = terminal()
    typer.echo(f"{keyed.traffic}:")
    for title, keys in found.items():
        heads = ("asked", "refused", "mean", "p95", "switches", "switching", "GPU", *filter(None, [currency]))
        places = 2 if max(each.cost_micros or 0 for each in keys.values()) >= _MILLION / 10 else 4
        columns = (Column(head, justify="right", no_wrap=True) for head in heads)
        table = Table("key", *columns, title=f"{policy}, {title}", title_justify="left", box=SIMPLE_HEAD)
        for key, each in keys.items():
            table.add_row(
                key or "(none)",
                str(each.requests),
                str(each.refused),
                f"{each.mean_wait:.1f}",
                f"{each.p95_wait:.1f}",
                str(each.switches),
                f"{each.switch_seconds:.0f}",
                f"{each.gpu_seconds:.0f}",
                *([] if each.cost_micros is None else [f"{each.cost_micros / _MILLION:.{places}f}"]),
            )
        console.print(table)
    console.print(
        "Times are seconds; mean and p95 are waits. switches: those for whose model a request of the key waited;"
        " switching: its part of them; GPU: its part of the other time that the GPU was held."
    )
