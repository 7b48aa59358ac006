"""Carries out the core's decisions: requests enter and leave here, hooks run, the state is saved."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from llmux.config import Config, EngineDefinition, first_costs, to_specs
from llmux.core import Core, admission
from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.effects import RunHook
from llmux.core.phases import Phase
from llmux.core.policy import Policy
from llmux.core.spec import HookKind, ModelSpec, Rules
from llmux.errors import INTERNAL_ERROR, ConflictError, RequestError
from llmux.estimates import Estimates, costs_of
from llmux.hookrunner import HookJob, HookResult, HookRunner
from llmux.observability import open_audit, put_audit
from llmux.observability.decision_log import DecisionLog, figures
from llmux.observability.metrics import GaugeRow, Metrics, Modes
from llmux.observability.notices import EventLog, line_to, orphan_to, tell_end
from llmux.observability.record import RecordFile
from llmux.observability.request_log import RequestLog
from llmux.observability.state_file import StateStore
from llmux.observability.timeline import Timeline
from llmux.plugins import comes_from_file, load_policy
from llmux.runtime import wait_estimate
from llmux.runtime.driver import Act, Driver
from llmux.runtime.engine_locks import EngineLocks, engine_of, engines_of
from llmux.runtime.history import History
from llmux.runtime.persistence import Persistence
from llmux.runtime.policy_chooser import Chooser
from llmux.runtime.recorder import Recorder, open_record
from llmux.runtime.request_handle import InFlightGuard
from llmux.runtime.requests import Accounts, Activities, Requests, order_of
from llmux.runtime.shadow import Shadow, Shadowed, load_shadows
from llmux.upstream import EngineActivity
from llmux.version import __version__

if TYPE_CHECKING:
    from llmux.estimates.fair_order import FairOrder
    from llmux.observability.audit import Audit


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


LOOK = 0.02  # seconds between two checks for requests on other hosts, while llmux stops
CHOICES = 200  # that are kept


class Remotes(Protocol):
    """The endpoints on other hosts: ``llmux.middleware.remotes``, if there are some."""

    def document(self) -> dict[str, Any]:
        """Return what operators see of them, by name."""


class Switcher:
    """Runs the core: requests enter and leave here, hooks run, notices are published.

    ``on_sleep(activity)`` is called before an engine is put to sleep, so that idle connections to it can be
    closed; ``on_close()`` is awaited at the end. ``own``: the process is llmux's; its metrics are published, too.
    """

    engine_locks: EngineLocks | None = None
    """Held from before the first hook until the end, if this is set before the start."""

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
        self.instance = secrets.token_hex(8)  # unique to this process
        self.reports = 0  # the number of reports made for gateways
        self.order = order_of(config, None)
        """The order of the keys, with ``fair``."""
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
            on_started=self._hooks_changed,  # with what tells their processes from others
            on_ending=lambda job: self._hooks_changed([job]),
        )
        self.on_sleep = on_sleep
        self.on_close = on_close
        self.stopped = asyncio.Event()
        self.started_at = time.monotonic()
        self.last_reload_error: str | None = None
        self.recorder: Recorder | None = None
        self._unwatch: Callable[[], None] = lambda: None
        self._persistence = Persistence(store, self.core.state, self.log, self.hooks.traces, self.clock)
        self._commands: dict[int, asyncio.Future[fx.Answer]] = {}
        self.activities = Activities()
        self.activity = self.activities.of
        """Return the activity of the engine that serves an admission."""
        self.requests = RequestLog(self.clock)
        self.choices: deque[dict[str, Any]] = deque(maxlen=CHOICES)  # between targets, of virtual models
        self.accounts: Accounts | None = None
        self.audit: Audit | None = None
        self.remotes: Remotes | None = None
        self.inside = inside = Requests(self, self._persistence.used)
        self.riders, self.elsewhere = inside.riders, inside.elsewhere
        self.enter, self.leave, self.give_back = inside.enter, inside.leave, inside.give_back
        self.admission, self.ride, self.spill = inside.admission, inside.ride, inside.spill
        self.cancel, self.withdraw = inside.cancel, inside.withdraw
        self.key_of, self.request_id = inside.key_of, inside.request_id
        self.on_left, self.off_left = inside.on_left, inside.off_left
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
        """Pass an event to the core, and carry out the effects."""

    # ---- life

    def start(self) -> None:
        """Load the state and check which engines run. The loop runs, the port is bound.

        Raises StateLockedError when another llmux uses the same state file, ConfigError when the record cannot be
        written.
        """
        self.now = self._driver.now = asyncio.get_running_loop().time
        self.history.begin()
        if (audit := open_audit(self.config.audit_path, self.log.emit)) is not None:
            self.audit = put_audit(audit, self.audit, self.metrics.registry)
            audit.put("started", version=__version__, pid=os.getpid(), models=list(self.config.models))
        if self.accounts is not None:
            self.accounts.start()
        if (record := open_record(self.config, self.log)) is not None:
            self._record_into(record, "start")
        self._persistence.open()
        if self.engine_locks is not None:
            self.engine_locks.follow(self._engines)
        self.auto.follow()
        # The last first: there are series for so many only.
        for (source, target), cost in reversed(costs_of(self.core.state).pairs.items()):
            self.metrics.cost_estimated((source,) if source else (), target, cost.seconds)
        self._starting = asyncio.get_running_loop().create_task(self._begin(), name="start")

    async def _begin(self) -> None:
        started = await self._persistence.begin()
        taken = {} if self.engine_locks is None else self.engine_locks.taken
        for spec in started.gone:  # moved into the configuration of another llmux: its engine is not ours to stop
            if self._engine_of(spec) in taken:
                self.log.emit("holder_unknown", model=spec.name)
        gone = tuple(spec for spec in started.gone if self._engine_of(spec) not in taken)
        self.post(replace(started, gone=gone))

    async def stop(self) -> None:
        """Stop in order: requests in flight may finish within the grace. Returns when all have ended."""
        until = self.now() + self.config.shutdown_grace
        self.post(ev.ShutdownRequested())
        await self.stopped.wait()
        # Thousands that were queued are told a few in each turn of the loop.
        while self.inside.throttle or (self.elsewhere and self.now() < until):  # noqa: ASYNC110 - not for long
            await asyncio.sleep(LOOK)
        for ticket in list(self.elsewhere):
            ticket.cut(fx.CutReason.STOPPING, None)
        await self.close()

    async def close(self) -> None:
        """End all hooks that still run, save the state, release everything."""
        self._driver.close()
        if self._starting is not None:
            self._starting.cancel()
        await self.auto.close()
        await self.hooks.close()
        if self.recorder is not None:
            self.recorder.end()
            await asyncio.to_thread(self.recorder.file.close)
        self._persistence.close()
        if self.engine_locks is not None:
            self.engine_locks.close()
        if self.audit is not None:
            self.audit.put("stopped")
            await asyncio.to_thread(self.audit.close)
        if self.on_close is not None:
            await self.on_close()

    def replace(self, config: Config) -> None:
        """Apply a new configuration. Raises ConfigError or PolicyLoadError, and changes nothing then."""
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
        audit = open_audit(config.audit_path, self.log.emit) if other_audit else self.audit
        record = open_record(config, self.log) if moved else None
        self.config = config
        self.metrics.declare(config.models)
        if self.accounts is not None:
            self.accounts.configure(config)
        self._follow(specs, rules, policy, shadows)
        if self.engine_locks is not None:
            self.engine_locks.look()
        self.auto.follow()
        if moved:
            self._record_into(record, "turned on")
        if other_audit:
            self.audit = put_audit(audit, self.audit, self.metrics.registry)

    def _engines(self) -> Iterable[str]:
        """Return the addresses of all engines that are configured, or run as they were configured before."""
        running = [self._engine_of(model.running) for model in self.core.state.models.values()]
        gone = [self._engine_of(spec) for spec in self._persistence.gone]
        return [*engines_of(self.config), *running, *gone]

    @staticmethod
    def _engine_of(spec: ModelSpec) -> str:
        assert isinstance(spec.definition, EngineDefinition)
        return engine_of(spec.definition)

    def _new_core(self, config: Config) -> Core:
        specs, rules = to_specs(config)
        core = Core(specs, rules, self._followed(), Estimates(), random.random)
        if self.order is not None:
            core.state.turns = self.order
        core.state.figures = figures
        core.state.too_late = wait_estimate.too_late
        core.state.costs.guesses = first_costs(config)
        return core

    def _follow(
        self, specs: Iterable[ModelSpec], rules: Rules, policy: Policy, shadows: tuple[Shadow, ...]
    ) -> None:
        """Make the core follow what is new in a configuration that has been applied."""
        order = order_of(self.config, self.order)
        if policy is not self._policy or shadows != self.shadows or order is not self.order:
            self._policy, self.shadows = policy, shadows
            self._take_turns(order)
            policy = self._followed()
        else:
            policy = self.core.state.policy
        self.post(ev.ConfigReplaced(list(specs), rules, policy, first_costs(self.config), order))

    def _take_turns(self, order: FairOrder | None) -> None:
        """Feed it the core's steps from now on; if an engine does not report its tokens, events are counted."""
        self._uncount()
        self._uncount = (lambda: None) if order is None else self.activities.watch()
        self.order = self._driver.order = order

    def _followed(self) -> Policy:
        """Return the policy for the core: with its shadows, and shown only what counts."""
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

    # ---- requests

    def hold(self, model: str) -> InFlightGuard:
        """Return a guard that keeps ``model`` awake and counted for as long as it is held."""
        return InFlightGuard(self, model)

    def open_activity(self, model: str) -> EngineActivity | None:
        """Return the activity of a model's engine, if a request for it would be admitted at once."""
        state = self.core.state
        known, record = self.activities.get(model), state.models.get(model)
        if known is None or record is None or known[0] != record.epoch:
            return None
        return known[1] if admission.is_open(state, record) and not record.removed else None

    def suspect(self, model: str, *, refused: bool) -> None:
        """Report that a connection to a model's engine was refused or broke off."""
        self.post(ev.EngineLost(model, refused=refused))

    # ---- operators

    async def command(self, make: Callable[[int], ev.Event]) -> fx.Answer:
        """Carry out an operator's command; ``make`` gets the ticket for its event. Raises ConflictError."""
        number = self.inside.number()
        future: asyncio.Future[fx.Answer] = asyncio.get_running_loop().create_future()
        self._commands[number] = future
        self.post(make(number))
        answer = await future
        if not answer.accepted:
            raise ConflictError(answer.reason)
        return answer

    async def force_switch(self, model: str) -> int | None:
        """Wake ``model`` whether or not a request waits for it; return the switch's id, None if it is awake."""
        return (await self.command(lambda ticket: ev.ActivationRequested(model, ticket))).switch

    # ---- looking

    def clock(self) -> float:
        """Return ``now()``; may be kept from before the start, which changes ``now``."""
        return self.now()

    def subscribe(self, listener: Callable[[fx.Effect], None]) -> Callable[[], None]:
        """Call ``listener`` with every effect, at once; it must be quick. Returns how to end it."""
        return self._driver.subscribe(listener)

    def is_awake(self, model: str) -> bool:
        """Whether a model is awake."""
        found = self.core.state.models.get(model)
        return found is not None and found.phase is Phase.AWAKE

    def gauges(self) -> Iterable[GaugeRow]:
        """Yield the present state of each model."""
        for name, model in self.core.state.models.items():
            yield GaugeRow(name, len(model.queue), len(model.in_flight), model.phase.value, model.pinned)

    def modes(self) -> Modes:
        """Return the modes that operators have set."""
        return Modes(leased=self.core.state.lease is not None, manual=self.core.state.manual)

    def estimated_switch_cost(self, source: str | None, target: str) -> float | None:
        """Return the measured cost of a direction in seconds, None if it was never seen."""
        return costs_of(self.core.state).measured(source, target)

    # ---- effects

    def _acts(self) -> dict[type, Act]:
        return {
            **self.inside.acts(),
            fx.RunHook: self._run_hook,
            fx.KillHook: self._kill_hook,
            fx.RecordHolders: lambda _effect: self._persistence.save_soon(),
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
        """Answer the requests that wait for an event that the core failed to handle."""
        mistake = RequestError(INTERNAL_ERROR)
        match event:
            case ev.RequestArrived() | ev.RequestReturned():
                self.inside.make_good(event.request, mistake)
            case _:
                answer = self._commands.pop(getattr(event, "ticket", 0), None)
                if answer is not None and not answer.done():
                    answer.set_exception(mistake)

    def _answer(self, effect: fx.Answer) -> None:
        future = self._commands.pop(effect.ticket, None)
        if future is not None and not future.done():
            future.set_result(effect)

    def _run_hook(self, effect: fx.RunHook) -> None:
        if effect.kind in (HookKind.SLEEP, HookKind.STOP) and effect.model in self.activities:
            self.on_sleep(self.activities[effect.model][1])
        self.hooks.start(job_for(effect), self._hook_ended)

    def _kill_hook(self, effect: fx.KillHook) -> None:
        job = self.hooks.running.get(effect.hook)
        # A hook that has exited meanwhile is not killed: after a pause of llmux itself, its exit is noticed after
        # its timeout.
        if self.hooks.kill(effect.hook, effect.reason) and job is not None:
            if effect.reason == fx.SWITCH_OVER:
                self.log.emit("prefetch_ended", model=job.model)
            else:
                self.log.emit("hook_killed", model=job.model, hook=job.kind.value, reason=effect.reason)

    def _hook_ended(self, result: HookResult) -> None:
        try:
            tell_end(result, self.log, self.metrics)
            self.history.hook_ended(result)
        except Exception as error:  # noqa: BLE001 - the core must get the result
            self._driver.mistaken(error, result)
        last_byte = self.activities.last_byte(result.model)
        self.post(ev.HookFinished(result.id, result.ok, result.detail, last_byte))

    def _hooks_changed(self, jobs: Iterable[HookJob]) -> None:
        self._persistence.hooks_changed([job.kind for job in jobs])

    def _save(self, _effect: fx.Effect) -> None:
        self._persistence.save()

    def _removed(self, effect: fx.ModelRemoved) -> None:
        self.activities.pop(effect.model, None)
        self._persistence.forget(effect.model)
        if self.engine_locks is not None:
            self.engine_locks.look_soon()
