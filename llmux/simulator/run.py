"""One run of the core in virtual time: arrivals go in, effects are carried out at once or when they are due.

A switch's whole cost is spent in its wake hook; sleep hooks and ``alive`` take no time. At the start ``alive``
passes only for the model of the first request.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmux.core import Core
from llmux.core.effects import (
    Admit,
    Effect,
    PolicyOverruled,
    Reject,
    RunHook,
    SwitchDrained,
    SwitchEnded,
    SwitchStarted,
)
from llmux.core.events import (
    DeadlineReached,
    Event,
    HookFinished,
    RequestAbandoned,
    RequestArrived,
    RequestFinished,
    Started,
)
from llmux.core.policy import Decision, EngineView, ModelView, Policy, Snapshot, SwitchRecord
from llmux.core.spec import HookKind, ModelSpec, Rules
from llmux.estimates import Estimates
from llmux.simulator.cost_matrix import CostMatrix
from llmux.simulator.engine_model import Engines, Serving
from llmux.simulator.trace import Trace, TraceError

if TYPE_CHECKING:
    from llmux.simulator.spilling import Spill, Spilling


NEVER = float("inf")
# The kinds of next events, besides arrivals (0) and ends of streams (1).
HOOK_ENDED, FOLLOWS, DEADLINE, SERVED, GAVE_UP, ACT, LOOK, SPILL = 2, 3, 4, 5, 6, 7, 8, 9
REPORT_EVERY = 256  # events between two calls of ``progress``
NOTED = frozenset({Reject, SwitchStarted, SwitchDrained, SwitchEnded, PolicyOverruled})
UNBOUNDED = 1 << 40  # max_queued: rejected requests would be missing from the waits


@dataclass(slots=True)
class Visit:
    """A period of the GPU's time. ``what`` is ``awake``, ``drain`` (of ``model``) or ``switch`` (to it)."""

    start: float
    end: float
    model: str
    what: str


@dataclass(slots=True)
class Outcome:
    """What happened to each job (by its index in the trace) and to the GPU. Times in seconds, None: not yet."""

    trace: Trace
    end: float
    arrived: list[float | None]
    admitted: list[float | None]
    finished: list[float | None]
    first_token: list[float | None]
    visits: list[Visit] = field(default_factory=list)
    switches: int = 0
    overruled: list[str] = field(default_factory=list)  # invalid decisions of the policy, each kind once
    residency: list[Visit] = field(default_factory=list)  # for each model, if several may be awake
    adopted: list[tuple[float, str]] = field(default_factory=list)  # by ``use: auto``: when, and which policy
    refused: int = 0  # requests that were rejected
    cut: int = 0  # answers that were cut off by ``drain_timeout``
    spilled: list[int] = field(default_factory=list)  # jobs that a remote served instead
    spill_cost: float | None = None  # what it charged, if its price is known


@dataclass(frozen=True, slots=True)
class Scene:
    """The models, and which are awake when a run begins."""

    specs: Sequence[ModelSpec]
    awake: frozenset[str]
    levels: Mapping[str, str] = field(default_factory=dict)  # at which the others sleep

    @classmethod
    def of(cls, trace: Trace, engines: Engines) -> Scene:
        """Return the scene of a trace. Raises TraceError for an empty one."""
        names = trace.models
        if not names:
            raise TraceError(f"{trace.name}: nothing arrives")
        specs = [ModelSpec(name, max_in_flight=engines.of(name).slots, max_queued=UNBOUNDED) for name in names]
        return cls(specs, frozenset(names[:1]))


class Run:
    """The clock, the engines, and the events that are due."""

    def __init__(
        self,
        trace: Trace,
        policy: Policy,
        costs: CostMatrix,
        engines: Engines,
        rules: Rules,
        horizon: float | None,
        scene: Scene,
    ) -> None:
        names = trace.models
        self.noted = NOTED
        self.specs = scene.specs
        self.jobs, self.costs = trace.jobs, costs
        self.serving = {name: Serving(engines.of(name)) for name in names}
        self.busy: list[Serving] = []  # engines with streams
        self.until = NEVER if horizon is None else horizon
        self.awake_at_start = scene.awake
        self.started = Started(levels=scene.levels)
        self.core = Core(scene.specs, rules, policy, Estimates(), explain=False)
        self.handle, self.next_deadline = self.core.handle, self.core.next_deadline
        count = len(trace.jobs)
        self.outcome = Outcome(trace, 0.0, [None] * count, [None] * count, [None] * count, [None] * count)
        self.time = 0.0
        self.next_done = Serving(engines.usual)  # the engine whose stream ends next
        self.hooks: list[tuple[float, int]] = []  # heap of (time, hook)
        self.spawned: list[tuple[float, int]] = []  # heap of (time, job): successors
        self.timed: list[tuple[float, int]] = []  # heap of (time, job): ends of jobs whose service is known
        self.leaving: list[tuple[float, int]] = []  # heap of (time, job): ends of patience
        self.failing: set[int] = set()  # hooks that will fail
        self.looks: list[tuple[float, int]] = []  # when a policy that chooses among others looks back
        self.look: Callable[[], None] = lambda: None
        self.spilling: Spilling | None = None
        self.price: Spill | None = None
        self.lets_in: Callable[[int], bool] | None = None  # returns whether a job may be sent; None: each may
        self.heaps: tuple[tuple[int, list[tuple[float, int]]], ...] = (
            (HOOK_ENDED, self.hooks),
            (FOLLOWS, self.spawned),
        )
        if any(job.service is not None or job.patience is not None for job in trace.jobs):
            self.heaps = (*self.heaps, (SERVED, self.timed), (GAVE_UP, self.leaving))
        if hasattr(policy, "makers"):
            self.heaps = (*self.heaps, (LOOK, self.looks))
        arrivals = [(job.arrival, index) for index, job in enumerate(trace.jobs) if job.arrival is not None]
        self.arrivals = [(NEVER, -1), *sorted(arrivals, reverse=True)]  # reversed: the next one is at the end
        self.stage = Visit(0.0, NEVER, next(iter(sorted(scene.awake)), ""), "awake")

    def spill(self, spill: Spill | None) -> None:
        """Send requests to a remote when they would wait too long."""
        if spill is not None:
            from llmux.simulator.spilling import Spilling  # noqa: PLC0415 - few runs have a use for it

            self.spilling, self.price = Spilling(self, spill), spill
            self.heaps = (*self.heaps, (SPILL, self.spilling.due))

    def go(self, progress: Callable[[float], None] | None) -> Outcome:
        """Run to the end."""
        handlers = (
            self._arrive,
            self._finish,
            self._hook_ended,
            self._follow,
            self._deadline,
            self._served,
            self._give_up,
            self._act,
            self._look,
            self._spill,
        )
        turns = 0
        self.feed(self.started)
        while True:
            time, what = self._next()
            if time >= self.until or (self.arrivals[-1][0] == NEVER and not self._anybody_left()):
                break
            self.time = max(time, self.time)
            handlers[what]()
            turns += 1
            if progress is not None and not turns % REPORT_EVERY:
                progress(self.time)
        return self._end()

    def _next(self) -> tuple[float, int]:
        """Return when the next event is due, and the index of its handler."""
        time, what = self.arrivals[-1][0], 0
        for serving in self.busy:
            done = serving.time + (serving.streams[0][0] - serving.made) / serving.speed
            if done <= time:
                time, what, self.next_done = done, 1, serving
        for number, heap in self.heaps:
            if heap:
                when = heap[0][0]
                if when < time:
                    time, what = when, number
        due = self.next_deadline()
        if due is not None and due < time:
            return due, DEADLINE
        return time, what

    def _anybody_left(self) -> bool:
        there = self.spilling is not None and self.spilling.due
        return bool(self.busy or self.timed or self.core.state.queued or self.hooks or self.spawned or there)

    # ---- events

    def _arrive(self) -> None:
        self._ask(self.arrivals.pop()[1])

    def _follow(self) -> None:
        self._ask(heapq.heappop(self.spawned)[1])

    def _ask(self, job: int) -> None:
        if self.lets_in is not None and not self.lets_in(job):
            self.outcome.refused += 1
            self._follow_up(job)
            return
        self.outcome.arrived[job] = self.time
        if self.spilling is not None and self.spilling.takes(job):
            return
        patience = self.jobs[job].patience
        if patience is not None:
            heapq.heappush(self.leaving, (self.time + patience, job))
        self.feed(RequestArrived(job, self.jobs[job].model))

    def _hook_ended(self) -> None:
        hook = heapq.heappop(self.hooks)[1]
        self.feed(HookFinished(hook, ok=hook not in self.failing))

    def _served(self) -> None:
        self._answered(heapq.heappop(self.timed)[1])

    def _give_up(self) -> None:
        index = heapq.heappop(self.leaving)[1]
        if self.outcome.admitted[index] is None and self.outcome.arrived[index] is not None:
            self.outcome.arrived[index] = None
            self.feed(RequestAbandoned(index))

    def _act(self) -> None:
        """Carry out an operator's action; only a replay has any."""

    def _look(self) -> None:
        """Let a policy that chooses among others look back; see ``look_back``."""
        heapq.heappop(self.looks)
        self.look()

    def _spill(self) -> None:
        assert self.spilling is not None
        self.spilling.act()

    def spilled(self, job: int, first_token: float) -> None:
        """Record that a remote serves a job from now on, and when its first token comes."""
        self.outcome.spilled.append(job)
        self.outcome.admitted[job] = self.time
        self.outcome.first_token[job] = first_token

    def answered_elsewhere(self, job: int) -> None:
        """Record that a remote has answered."""
        self.outcome.finished[job] = self.time
        self._follow_up(job)

    def _deadline(self) -> None:
        self.feed(DeadlineReached())

    def _finish(self) -> None:
        """Remove the stream that is done; others that are done at the same time follow in the next turns."""
        serving = self.next_done
        index = serving.finish(self.time)
        if not serving.streams:
            self.busy.remove(serving)
        self._answered(index)

    def _answered(self, index: int) -> None:
        self.outcome.finished[index] = self.time
        self._follow_up(index)
        self.feed(RequestFinished(index, self.jobs[index].keep))

    def _follow_up(self, index: int) -> None:
        """Schedule the job that waits for the end of this one."""
        job = self.jobs[index]
        if job.successor is not None:
            heapq.heappush(self.spawned, (self.time + job.think, job.successor))

    # ---- effects

    def feed(self, event: Event) -> None:
        """Pass an event to the core, and carry out the effects."""
        pending = [event]
        for each in pending:
            for effect in self.handle(each, self.time):
                kind = effect.__class__
                if kind is Admit:
                    self._admit(effect.request)  # type: ignore[union-attr]
                elif kind is RunHook:
                    self._run_hook(effect, pending)  # type: ignore[arg-type]
                elif kind in self.noted:
                    self._note(effect)

    def _admit(self, index: int) -> None:
        self.outcome.admitted[index] = self.time
        job = self.jobs[index]
        if job.service is not None:
            self.outcome.first_token[index] = self.time + min(job.first, job.service)
            heapq.heappush(self.timed, (self._end_of(index, self.time + job.service), index))
            return
        serving = self.serving[job.model]
        if not serving.streams:
            self.busy.append(serving)
        serving.add(index, job, self.time)

    def _end_of(self, _index: int, time: float) -> float:
        """Return the end of an answer that would end at ``time``."""
        return time

    def _run_hook(self, effect: RunHook, pending: list[Event]) -> None:
        if effect.kind is HookKind.WAKE:
            cost = (
                self.costs.of(effect.sources[0], effect.model) if effect.sources else self.costs.cold(effect.model)
            )
            heapq.heappush(self.hooks, (self.time + cost, effect.hook))
        else:
            ok = effect.kind is not HookKind.ALIVE or effect.model in self.awake_at_start
            pending.append(HookFinished(effect.hook, ok=ok))

    def _note(self, effect: Effect) -> None:
        """Record which model had the GPU."""
        kind = effect.__class__
        if kind is Reject:
            self.outcome.arrived[effect.request] = None  # type: ignore[union-attr]
            self.outcome.refused += 1
        elif kind is SwitchStarted:
            self._stage(self.stage.model, "drain")
        elif kind is SwitchDrained:
            self._stage(effect.to or "", "switch")  # type: ignore[union-attr]
        elif kind is SwitchEnded:
            self.outcome.switches += 1
            self._stage(effect.to or "", "awake")  # type: ignore[union-attr]
        elif kind is PolicyOverruled:
            self.outcome.overruled.append(effect.answer)  # type: ignore[union-attr]

    def _stage(self, model: str, what: str) -> None:
        self.stage.end = self.time
        if self.stage.end > self.stage.start:
            self.outcome.visits.append(self.stage)
        self.stage = Visit(self.time, NEVER, model, what)

    # ---- the end

    def _end(self) -> Outcome:
        outcome = self.outcome
        end = self.until if self.until < NEVER else self.time
        self.time = outcome.end = end
        self._stage("", "awake")
        for serving in self.serving.values():
            serving.place_first_tokens(end, outcome.first_token)
        if self.price is not None:
            outcome.spill_cost = self.price.cost([self.jobs[job] for job in outcome.spilled])
            for job in outcome.spilled:
                first = outcome.first_token[job]
                outcome.first_token[job] = None if first is None or first > end else first
        return outcome


class Misjudged:
    """Calls ``policy``, but every cost, arrival rate and service time it sees is multiplied by a factor."""

    def __init__(self, policy: Policy, factor: float) -> None:
        self._policy = policy
        self._factor = factor

    def decide(self, now: Snapshot) -> Decision:
        """Ask the policy."""
        return self._policy.decide(_Shown(now, self._factor))

    def on_switch_completed(self, record: SwitchRecord) -> None:
        """Pass a switch to the policy: its cost is measured, and right."""
        inform = getattr(self._policy, "on_switch_completed", None)
        if inform is not None:
            inform(record)


class _Shown:
    """A snapshot with wrong models."""

    def __init__(self, now: Snapshot, factor: float) -> None:
        self.time = now.time
        self.awake = now.awake
        self.waiting = now.waiting
        self.models: Mapping[str, ModelView] = {
            name: _ShownModel(model, factor) for name, model in now.models.items()
        }


class _ShownModel:
    """A model with wrong averages."""

    def __init__(self, model: ModelView, factor: float) -> None:
        self._model = model
        self._factor = factor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @property
    def switch_cost(self) -> float:
        """Seconds, wrong."""
        return self._model.switch_cost * self._factor

    @property
    def arrival_rate(self) -> float:
        """Arrivals per second, wrong."""
        return self._model.arrival_rate * self._factor

    @property
    def service_time(self) -> float:
        """Seconds, wrong."""
        return self._model.service_time * self._factor

    @property
    def engine(self) -> EngineView:
        """An engine of the wrong speed."""
        return _ShownEngine(self._model.engine, self._factor)


class _ShownEngine:
    """An engine with a wrong speed."""

    def __init__(self, engine: EngineView, factor: float) -> None:
        self._engine, self._factor = engine, factor
        self.slots = engine.slots

    @property
    def most(self) -> float:
        """Answers a second, wrong."""
        return self._engine.most / self._factor

    def throughput(self, in_flight: int) -> float:
        """Answers a second, wrong."""
        return self._engine.throughput(in_flight) / self._factor

    def drain(self, in_flight: int) -> float:
        """Seconds, wrong."""
        return self._engine.drain(in_flight) * self._factor

    def serving(self, waiting: int, limit: int | None) -> float:
        """Seconds, wrong."""
        return self._engine.serving(waiting, limit) * self._factor
