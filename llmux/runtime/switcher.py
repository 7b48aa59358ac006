"""What the core decides, carried out: requests enter and leave here, hooks are run, the state is kept."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from llmux.config import Config, EngineDefinition, first_costs, to_specs
from llmux.core import Core, admission
from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.effects import SWITCH_OVER, Admit, RunHook
from llmux.core.phases import Phase
from llmux.core.policy import Policy
from llmux.core.spec import HookKind, ModelSpec, Rules
from llmux.errors import INTERNAL_ERROR, CancelledRequestError, ConflictError, RequestError, UnavailableError
from llmux.estimates import Estimates, costs_of
from llmux.hookrunner import HookJob, HookResult, HookRunner
from llmux.observability.decision_log import DecisionLog, figures
from llmux.observability.metrics import GaugeRow, Metrics, Modes
from llmux.observability.notices import EventLog
from llmux.observability.record import RecordFile
from llmux.observability.request_log import RequestLog
from llmux.observability.state_file import StateStore
from llmux.observability.timeline import Timeline
from llmux.plugins import comes_from_file, load_policy
from llmux.runtime import wait_estimate
from llmux.runtime.driver import Act, Driver
from llmux.runtime.history import History
from llmux.runtime.persistence import Persistence
from llmux.runtime.policy_chooser import Chooser
from llmux.runtime.recorder import Recorder, open_record
from llmux.runtime.request_handle import AdmissionThrottle, InFlightGuard, Left, Outcome, Riders, Ticket
from llmux.runtime.shadow import Shadow, Shadowed, load_shadows
from llmux.upstream import EngineActivity
from llmux.version import __version__

if TYPE_CHECKING:
    from llmux.estimates.fairness import FairOrder
    from llmux.observability.audit import Audit


class Activities(dict[str, tuple[int, EngineActivity]]):
    """The epoch and the activity of each model's engine."""

    def __init__(self) -> None:
        super().__init__()
        self._watchers = 0

    def of(self, admission: Admit) -> EngineActivity:
        """Return the activity of the engine that serves this admission."""
        known = self.get(admission.model)
        if known is None or known[0] != admission.epoch:
            known = (admission.epoch, EngineActivity(counting=self.counting))
            self[admission.model] = known
        return known[1]

    @property
    def counting(self) -> bool:
        """Whether streamed events are counted."""
        return self._watchers > 0

    def streamed(self, model: str) -> int:
        """Return how many events a model's engine has streamed, as far as they were counted."""
        known = self.get(model)
        return 0 if known is None else known[1].streamed

    def watch(self) -> Callable[[], None]:
        """Count streamed events until the returned function is called and there is no other watcher."""
        self._count(1)
        return lambda: self._count(-1)

    def _count(self, more: int) -> None:
        self._watchers += more
        for _, activity in self.values():
            activity.counting = self.counting


def job_for(effect: RunHook) -> HookJob:
    """Return the job. Raises KeyError when the model has no such hook."""
    definition = effect.definition
    assert isinstance(definition, EngineDefinition)
    return HookJob(
        id=effect.hook,
        model=effect.model,
        kind=effect.kind,
        script=definition.scripts[effect.kind],
        cwd=definition.cwd,
        env=definition.env,
        url=definition.url,
        port=definition.port,
        switch=effect.switch,
        sources=effect.sources,
        target=effect.target,
        level=effect.level,
    )


def tell_end(result: HookResult, log: EventLog, metrics: Metrics) -> None:
    """Count and log the end of a hook. A prefetch that was ended with its switch has not failed, and was told."""
    kind = result.kind.value
    over = result.killed == SWITCH_OVER
    metrics.hook_ended(result.model, kind, result.duration, result.ok or over)
    if over:
        return
    code = -result.signal if result.signal is not None else result.exit_code
    output = result.tail or result.detail
    log.hook_ended(result.model, kind, ok=result.ok, seconds=result.duration, exit_code=code, output=output)


def line_to(log: EventLog) -> Callable[[HookJob, str], None]:
    """Return what logs a line that a hook printed."""
    return lambda job, line: log.hook_output(job.model, job.kind.value, line)


def orphan_to(log: EventLog) -> Callable[[HookJob], None]:
    """Return what logs that something holds a hook's output beyond its end."""
    return lambda job: log.emit("hook_left_pipe_open", model=job.model, hook=job.kind.value)


LOOK = 0.02  # seconds between two looks at what other hosts still serve, while llmux stops
WITHDRAWN = "withdrawn"  # the code of a request that a gateway has taken back
CHOICES = 200  # that are kept


class Accounts(Protocol):
    """What is told of each request that has ended: ``llmux.accounts``, where that is configured."""

    def start(self) -> None:
        """Begin. Raises ConfigError when the ledger cannot be used."""

    def configure(self, config: Config) -> None:
        """Take over a configuration."""

    def returned(self, request: int) -> None:
        """Take note that an admitted request waits again."""

    @property
    def rates(self) -> Mapping[str, Any]:
        """What is known of the prices of models elsewhere that the configuration has none for."""

    def spent(self, key: str, since: int) -> int:
        """Return what a key has spent since a Unix time, in millionths of the currency."""

    def reserve(self, ident: str, request_id: str, key: str, model: str, micros: int) -> None:
        """Keep a reservation."""

    def release(self, ident: str) -> None:
        """Forget a reservation."""

    def ended(self, ticket: int, request: tuple[Any, ...], answer: tuple[Any, ...]) -> float:
        """Take a request that has ended: the fields of ``llmux.accounts.ledger.Ended``, but for its shares.

        Return the seconds of the GPU that it took.
        """


class Remotes(Protocol):
    """What is known of endpoints on other hosts: ``llmux.middleware.remotes``, where there are some."""

    def document(self) -> dict[str, Any]:
        """Return what operators see of them, by name."""


class Switcher:
    """Runs the core: requests enter and leave here, hooks are run, notices told.

    ``on_sleep(activity)`` is called before an engine is put to sleep, so that idle connections to it can be
    closed; ``on_close()`` is awaited at the end. ``own``: the process is llmux's, and its metrics are told, too.
    """

    def __init__(
        self,
        config: Config,
        *,
        store: StateStore | None = None,
        log: EventLog | None = None,
        own: bool = False,
        on_sleep: Callable[[EngineActivity], None] = lambda _activity: None,
        on_close: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._policy = load_policy(config.policy.use, config.policy.options, config.folder)
        self.shadows = load_shadows(config)
        self.log = log or EventLog()
        self.now: Callable[[], float] = time.monotonic
        """Returns the time on the core's clock, in seconds."""
        self.config = config
        self.instance = secrets.token_hex(8)  # of no other process
        self.reports = 0  # that were made for gateways
        self.order: FairOrder | None = None
        """Whose turn it is, where that goes by key."""
        self.order = self._order_of(config)
        self.core = self._new_core(config)
        self.auto = Chooser(self)
        self.metrics = Metrics(
            self.gauges,
            shadows=lambda: ((shadow.name, shadow.counts) for shadow in self.shadows),
            modes=self.modes,
            process=own,
            auto=self.auto.looks,
        )
        self.metrics.declare(config.models)
        self.timeline = Timeline()
        self.decisions = DecisionLog(self.timeline)
        self.history = History(self.core.state, self.timeline, self.clock, line_to(self.log))
        self.hooks = HookRunner(
            on_line=self.history.line,
            on_orphan_pipe=orphan_to(self.log),
            on_ending=lambda _job: self._persistence.save(),
        )
        self.on_sleep = on_sleep
        self.on_close = on_close
        self.stopped = asyncio.Event()
        self.started_at = time.monotonic()
        self.last_reload_error: str | None = None
        self.recorder: Recorder | None = None
        self._unwatch: Callable[[], None] = lambda: None
        self._on_left: tuple[Left, ...] = ()
        self._persistence = Persistence(store, self.core.state, self.log, self.hooks.traces, self.clock)
        self._tickets: dict[int, Ticket] = {}
        self._commands: dict[int, asyncio.Future[fx.Answer]] = {}
        self.activities = Activities()
        self.activity = self.activities.of
        """Return what is known of the engine that serves an admission."""
        self.requests = RequestLog(self.clock)
        self.choices: deque[dict[str, Any]] = deque(maxlen=CHOICES)  # between targets, of virtual models
        self.accounts: Accounts | None = None
        self.audit: Audit | None = None
        self.remotes: Remotes | None = None
        self.elsewhere: set[Ticket] = set()  # of requests that other hosts serve; the core knows nothing of them
        self._throttle = AdmissionThrottle()
        self._serial = 0
        self._starting: asyncio.Task[None] | None = None
        self._driver = Driver(
            self.core,
            self.timeline,
            self._acts(),
            observers=(self.metrics.effect, self.log.effect),
            make_good=self._make_good,
            log=self.log,
        )
        self._uncount: Callable[[], None] = lambda: None
        self._take_turns(self.order)
        self.post = self._driver.post
        """Hand an event to the core, and carry out its answer."""
        self.riders = Riders(self.core.state, self.post)

    # ---- life

    def start(self) -> None:
        """Load the state and look at what runs. The loop runs, the port is bound.

        Raises StateLockedError when another llmux uses the same state file, ConfigError when the record cannot be
        written.
        """
        self.now = self._driver.now = asyncio.get_running_loop().time
        self.history.begin()
        if (audit := self._open_audit(self.config)) is not None:
            self._audit_into(audit)
            audit.put("started", version=__version__, pid=os.getpid(), models=list(self.config.models))
        if self.accounts is not None:
            self.accounts.start()
        if (record := open_record(self.config, self.log)) is not None:
            self._record_into(record, "start")
        self._persistence.open()
        self.auto.follow()
        for (source, target), cost in costs_of(self.core.state).pairs.items():
            self.metrics.cost_estimated((source,) if source else (), target, cost.seconds)
        self._starting = asyncio.get_running_loop().create_task(self._begin(), name="start")

    async def _begin(self) -> None:
        self.post(await self._persistence.begin())

    async def stop(self) -> None:
        """Stop in order: what runs may finish within the grace. Returns when all is quiet."""
        until = self.now() + self.config.shutdown_grace
        self.post(ev.ShutdownRequested())
        await self.stopped.wait()
        while self.elsewhere and self.now() < until:  # noqa: ASYNC110 - rarely, and not for long
            await asyncio.sleep(LOOK)
        for ticket in list(self.elsewhere):
            ticket.cut(fx.CutReason.STOPPING, None)
        await self.close()

    async def close(self) -> None:
        """End whatever hooks still run, keep the state, let go of everything."""
        self._driver.close()
        if self._starting is not None:
            self._starting.cancel()
        await self.auto.close()
        await self.hooks.close()
        if self.recorder is not None:
            self.recorder.end()
            await asyncio.to_thread(self.recorder.file.close)
        self._persistence.close()
        if self.audit is not None:
            self.audit.put("stopped")
            await asyncio.to_thread(self.audit.close)
        if self.on_close is not None:
            await self.on_close()

    def replace(self, config: Config) -> None:
        """Put a new configuration into force. Raises ConfigError or PolicyLoadError, and changes nothing then."""
        specs, rules = to_specs(config)
        policy = self._policy
        old, new = self.config, config.policy
        same = (old.policy.use, old.policy.options, old.folder) == (new.use, new.options, config.folder)
        if not same or any(map(comes_from_file, (new.use, *getattr(policy, "uses", ())))):
            policy = load_policy(new.use, new.options, config.folder)
        shadows = load_shadows(config, self.shadows, self.config)
        old_record = (self.config.record_path, self.config.record_size)
        moved = old_record != (config.record_path, config.record_size)
        other_audit = self.config.audit_path != config.audit_path
        audit = self._open_audit(config) if other_audit else self.audit
        record = open_record(config, self.log) if moved else None
        self.config = config
        self.metrics.declare(config.models)
        if self.accounts is not None:
            self.accounts.configure(config)
        self._follow(specs, rules, policy, shadows)
        self.auto.follow()
        if moved:
            self._record_into(record, "turned on")
        if other_audit:
            self._audit_into(audit)

    def _open_audit(self, config: Config) -> Audit | None:
        path = config.audit_path
        if path is None:
            return None
        from llmux.observability.audit import Audit  # noqa: PLC0415 - most configurations have no use for it

        return Audit(path, self.log.emit)

    def _audit_into(self, audit: Audit | None) -> None:
        """Begin an audit, or end it."""
        if self.audit is not None:
            self.audit.moved(audit, self.metrics.registry)
        elif audit is not None:
            self.metrics.registry.register(audit)
        self.audit = audit

    def _new_core(self, config: Config) -> Core:
        specs, rules = to_specs(config)
        core = Core(specs, rules, self._followed(), Estimates(), random.random)
        if self.order is not None:
            core.state.pick = self.order.pick
        core.state.figures = figures
        core.state.too_late = wait_estimate.too_late
        core.state.costs.guesses = first_costs(config)
        return core

    def _follow(
        self, specs: Iterable[ModelSpec], rules: Rules, policy: Policy, shadows: tuple[Shadow, ...]
    ) -> None:
        """Have the core follow what is new of a configuration that has been taken over."""
        order = self._order_of(self.config)
        if policy is not self._policy or shadows != self.shadows or order is not self.order:
            self._policy, self.shadows = policy, shadows
            self._take_turns(order)
            policy = self._followed()
        else:
            policy = self.core.state.policy
        pick = None if order is None else order.pick
        self.post(ev.ConfigReplaced(list(specs), rules, policy, first_costs(self.config), pick))

    def _take_turns(self, order: FairOrder | None) -> None:
        """Tell it from now on what happens; where an engine does not tell its tokens, events are counted."""
        self._uncount()
        self._uncount = (lambda: None) if order is None else self.activities.watch()
        self.order = self._driver.order = order

    def _order_of(self, config: Config) -> FairOrder | None:
        if config.policy.fair is None:
            return None
        from llmux.runtime.fair import order_of  # noqa: PLC0415 - most configurations have no use for it

        return order_of(config, self.order)

    def _followed(self) -> Policy:
        """Return the policy as the core follows it: with its shadows, and shown what counts."""
        policy = self._policy
        if self.shadows:
            policy = Shadowed(policy, self.shadows, self._shadow_dropped)
        return policy if self.order is None else self.order.policy(policy)

    def _shadow_dropped(self, name: str, error: str) -> None:
        self.log.emit("shadow_dropped", policy=name, error=error)

    def _record_into(self, file: RecordFile | None, because: str) -> None:
        """Begin a record, or end it."""
        old, self.recorder = self.recorder, None
        if old is not None:
            self._unwatch()
            self.off_left(old.request)
            old.end()
            old.file.close_soon()
        if file is not None:
            self.recorder = Recorder(self, file, because)
            self._unwatch = self._driver.watch(self.recorder.take)
            self.on_left(self.recorder.request)

    def on_left(self, tell: Left) -> None:
        """Have ``tell`` called with each ticket that has left."""
        self._on_left = (*self._on_left, tell)

    def off_left(self, tell: Left) -> None:
        """End that."""
        self._on_left = tuple(one for one in self._on_left if one != tell)

    # ---- requests

    def enter(self, model: str, key: str = "", *, rides: bool = False, deadline: float | None = None) -> Ticket:
        """Tell the core of a request for ``model``, a configured name. The ticket must be given to ``leave``.

        ``key`` is the name of the key that it showed. If it ``rides`` along, ``ride`` has to be awaited. It is
        rejected if it cannot be answered within ``deadline`` seconds.
        """
        self._serial += 1
        ticket = Ticket(self._serial, model, self.now(), key)
        self._tickets[ticket.id] = ticket
        ticket.rides = rides
        self.post(ev.RequestArrived(ticket.id, model, self.riders.seconds if rides else None, deadline, key))
        return ticket

    async def ride(self, ticket: Ticket) -> None:
        """Wait until a request rides along no longer: it is let through, rejected, or waits as any other."""
        if ticket.rides and ticket.rejection is None:
            self.riders.watch()
            ticket.waiter = asyncio.get_running_loop().create_future()
            try:
                await ticket.waiter
            finally:
                ticket.waiter = None

    async def admission(self, ticket: Ticket) -> fx.Admit:
        """Wait until the request is let through. Raises the RequestError with which it is rejected."""
        if ticket.admission is None and ticket.rejection is None:
            ticket.waiter = asyncio.get_running_loop().create_future()
            try:
                await ticket.waiter
            finally:
                ticket.waiter = None
        if ticket.rejection is not None:
            raise ticket.rejection
        assert ticket.admission is not None
        return ticket.admission

    def give_back(self, ticket: Ticket, activity: EngineActivity) -> None:
        """Queue an admitted request again: its engine was dead before anything was sent."""
        ticket.returned()
        self.post(ev.RequestReturned(ticket.id, connected=activity.connected))
        if self.accounts is not None:
            self.accounts.returned(ticket.id)

    def leave(
        self, ticket: Ticket, status: int | None = None, outcome: Outcome | None = None, sent: int = 0
    ) -> None:
        """End a request, wherever it stands: answered, failed, or abandoned by its client.

        For what is recorded: ``status`` is what its client was told, None for a guard that was held, ``outcome``
        what became of its exchange, and ``sent`` the bytes of its body.
        """
        if self._tickets.pop(ticket.id, None) is None:
            if ticket.asked is not None and self.recorder is not None:
                self.recorder.served_elsewhere(ticket, status, outcome, sent)
            return
        if ticket.admission is not None:
            self._persistence.used(ticket.model)
            if self.order is not None:
                self._charge(self.order, ticket, outcome, sent)
            self.post(ev.RequestFinished(ticket.id, ticket.keep))
        elif ticket.rejection is None:
            ticket.waited = self.now() - ticket.arrived
            self.post(ev.RequestAbandoned(ticket.id))
        elif ticket.rides or ticket.id in self.core.state.requests:  # cancelled, or by a mistake of llmux
            self.post(ev.RequestAbandoned(ticket.id))
        if ticket.rides:  # it came to nothing: it is as if it had not been there
            return
        for tell in self._on_left:
            tell(ticket, status, outcome, sent)

    def spill(self, request: int, why: RequestError) -> bool:
        """End a request that waits, in one step, with ``why`` for what awaits it. False where it does not wait.

        From here on the core knows nothing of it, so it cannot be admitted, too.
        """
        ticket = self._tickets.get(request)
        if ticket is None or ticket.admission is not None or ticket.rejection is not None:
            return False
        ticket.spilled = True
        self.leave(ticket)
        ticket.failed(why)
        self._go_on(ticket)
        return True

    def _charge(self, order: FairOrder, ticket: Ticket, outcome: Outcome | None, sent: int) -> None:
        from llmux.runtime.fair import tokens_of  # noqa: PLC0415

        order.served(ticket.id, tokens_of(outcome, sent))

    def hold(self, model: str) -> InFlightGuard:
        """Return a guard that keeps ``model`` awake and counted for as long as it is held."""
        return InFlightGuard(self, model)

    def open_activity(self, model: str) -> EngineActivity | None:
        """Return what is known of a model's engine, if a request for it would be let through at once."""
        state = self.core.state
        known, record = self.activities.get(model), state.models.get(model)
        if known is None or record is None or known[0] != record.epoch:
            return None
        return known[1] if admission.is_open(state, record) and not record.removed else None

    def suspect(self, model: str, *, refused: bool) -> None:
        """Tell that a connection to a model's engine was refused or broke off."""
        self.post(ev.EngineLost(model, refused=refused))

    # ---- operators

    async def command(self, make: Callable[[int], ev.Event]) -> fx.Answer:
        """Carry out an operator's command; ``make`` gets the ticket for its event. Raises ConflictError."""
        self._serial += 1
        future: asyncio.Future[fx.Answer] = asyncio.get_running_loop().create_future()
        self._commands[self._serial] = future
        self.post(make(self._serial))
        answer = await future
        if not answer.accepted:
            raise ConflictError(answer.reason)
        return answer

    async def force_switch(self, model: str) -> int | None:
        """Wake ``model`` whether or not a request waits for it; return the switch's id, None if it is awake."""
        return (await self.command(lambda ticket: ev.ActivationRequested(model, ticket))).switch

    def cancel(self, request_id: str) -> tuple[str, ...]:
        """End the requests that their clients call so, waiting or in flight; return the models they asked for."""
        known = (*self._tickets.values(), *self.elsewhere)
        found = [ticket for ticket in known if ticket.is_called(request_id)]
        for ticket in found:
            if ticket.admission is None and ticket not in self.elsewhere:
                ticket.failed(CancelledRequestError("An operator has cancelled this request."))
                self._go_on(ticket)
            else:
                ticket.cut(fx.CutReason.CANCELLED, None)
                self.metrics.request_cut(ticket.model, fx.CutReason.CANCELLED)
            self.log.emit("request_cancelled", model=ticket.model, request_id=request_id)
        return tuple(ticket.model for ticket in found)

    def withdraw(self, request_id: str) -> tuple[str, ...]:
        """Reject the requests that still wait and are called so: a gateway has a better host for them.

        Return the models they asked for. What has been admitted, or is served elsewhere, is left alone.
        """
        found = [
            ticket
            for ticket in self._tickets.values()
            if ticket.admission is None and ticket.rejection is None and ticket not in self.elsewhere
            if ticket.is_called(request_id)
        ]
        for ticket in found:
            ticket.failed(
                UnavailableError("The gateway has taken the request back.", code=WITHDRAWN, retry_after=1.0)
            )
            self._go_on(ticket)
        return tuple(ticket.model for ticket in found)

    # ---- looking

    def clock(self) -> float:
        """Return ``now()``; to be kept from before the start, which changes that."""
        return self.now()

    def subscribe(self, listener: Callable[[fx.Effect], None]) -> Callable[[], None]:
        """Have ``listener`` called with every effect, at once; it must be quick. Returns how to end it."""
        self._driver.subscribe(listener)
        return lambda: self._driver.unsubscribe(listener)

    def is_awake(self, model: str) -> bool:
        """Whether a model is awake."""
        found = self.core.state.models.get(model)
        return found is not None and found.phase is Phase.AWAKE

    def key_of(self, request: int) -> str:
        """Return the name of the key of a request that has not left; "" where there is none."""
        ticket = self._tickets.get(request)
        return "" if ticket is None else ticket.key

    def request_id(self, request: int) -> str:
        """Return what the client of a request that waits calls it; "" where that is not known."""
        ticket = self._tickets.get(request)
        return "" if ticket is None else ticket.request_id

    def gauges(self) -> Iterable[GaugeRow]:
        """Yield what each model looks like at this moment."""
        for name, model in self.core.state.models.items():
            yield GaugeRow(name, len(model.queue), len(model.in_flight), model.phase.value, model.pinned)

    def modes(self) -> Modes:
        """Return what operators have asked for at this moment."""
        return Modes(leased=self.core.state.lease is not None, manual=self.core.state.manual)

    def estimated_switch_cost(self, source: str | None, target: str) -> float | None:
        """Return the measured cost of a direction in seconds, None if it was never seen."""
        return costs_of(self.core.state).measured(source, target)

    # ---- effects

    def _acts(self) -> dict[type, Act]:
        return {
            fx.Admit: self._admit,
            fx.Reject: self._reject,
            fx.RequestQueued: self._queued,
            fx.CancelRequests: self._cut,
            fx.RunHook: self._run_hook,
            fx.KillHook: self._kill_hook,
            fx.RecordHolders: self._persistence.save,
            fx.Answer: self._answer,
            fx.Stopped: lambda _effect: self.stopped.set(),
            fx.ModelActivated: lambda effect: self._persistence.used(effect.model),
            fx.ModelDeepened: self._save,
            fx.SwitchEnded: self._save,
            fx.PinSet: self._save,
            fx.LeaseSet: self._save,
            fx.ManualSet: self._save,
            fx.ModelRemoved: self._removed,
        }

    def _make_good(self, event: ev.Event) -> None:
        """Answer what waits for an event that the core failed to handle."""
        mistake = RequestError(INTERNAL_ERROR)
        match event:
            case ev.RequestArrived() | ev.RequestReturned():
                ticket = self._tickets.get(event.request)
                if ticket is not None and ticket.admission is None and ticket.rejection is None:
                    ticket.failed(mistake)
                    self._go_on(ticket)
            case _:
                answer = self._commands.pop(getattr(event, "ticket", 0), None)
                if answer is not None and not answer.done():
                    answer.set_exception(mistake)

    def _admit(self, effect: fx.Admit) -> None:
        # A request that has left already is told to the core by an event that is still to come.
        if (ticket := self._tickets.get(effect.request)) is not None:
            ticket.admission, ticket.waited = effect, effect.waited
            if ticket.rides:
                ticket.got_off(self.now(), effect.waited)
            if ticket.waiter is not None:
                self._throttle.add(ticket.waiter)

    def _queued(self, effect: fx.RequestQueued) -> None:
        ticket = self._tickets.get(effect.request)
        if ticket is not None and ticket.rides:
            ticket.got_off(self.now(), 0.0)
            self._go_on(ticket)

    def _reject(self, effect: fx.Reject) -> None:
        if (ticket := self._tickets.get(effect.request)) is not None:
            if ticket.rides:
                ticket.got_off(self.now(), effect.waited)
            ticket.rejected(effect)
            self._go_on(ticket)

    def _go_on(self, ticket: Ticket) -> None:
        if ticket.waiter is not None:
            self._throttle.add(ticket.waiter)

    def _cut(self, effect: fx.CancelRequests) -> None:
        for request in effect.requests:
            if (ticket := self._tickets.get(request)) is not None:
                ticket.cut(effect.reason, effect.retry_after)

    def _answer(self, effect: fx.Answer) -> None:
        future = self._commands.pop(effect.ticket, None)
        if future is not None and not future.done():
            future.set_result(effect)

    def _run_hook(self, effect: fx.RunHook) -> None:
        if effect.kind in (HookKind.SLEEP, HookKind.STOP) and effect.model in self.activities:
            self.on_sleep(self.activities[effect.model][1])
        job = job_for(effect)
        self.hooks.start(job, self._hook_ended)
        self._persistence.save()  # with what tells its process from others

    def _kill_hook(self, effect: fx.KillHook) -> None:
        job = self.hooks.running.get(effect.hook)
        # A hook that has exited meanwhile is not killed: after a pause of llmux itself, its exit is noticed later
        # than its timeout.
        if self.hooks.kill(effect.hook, effect.reason) and job is not None:
            if effect.reason == fx.SWITCH_OVER:
                self.log.emit("prefetch_ended", model=job.model)
            else:
                self.log.emit("hook_killed", model=job.model, hook=job.kind.value, reason=effect.reason)

    def _hook_ended(self, result: HookResult) -> None:
        try:
            tell_end(result, self.log, self.metrics)
            self.history.hook_ended(result)
        except Exception as error:  # noqa: BLE001 - the core must hear of it
            self._driver.mistaken(error, result)
        known = self.activities.get(result.model)
        last_byte = known[1].last_byte if known is not None else None
        self.post(ev.HookFinished(result.id, result.ok, result.detail, last_byte))

    def _save(self, _effect: fx.Effect) -> None:
        self._persistence.save()

    def _removed(self, effect: fx.ModelRemoved) -> None:
        self.activities.pop(effect.model, None)
        self._persistence.forget(effect.model)
