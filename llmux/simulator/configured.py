"""Runs with a configuration's own rules: memory, groups, sleep levels, prefetch, and the settings of each model.

The production core decides which models are awake together, which have to leave and at which level they sleep.
This module gives each hook of a switch its own duration: sleeps in parallel, then the wake, and a prefetch during
the drain, which shortens the wake.

A run begins with every model asleep. Requests are not rejected for ``max_queued`` or ``request_timeout``, as
rejected requests would be missing from the waits.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from llmux.config import Config, first_costs
from llmux.core.effects import CancelRequests, Effect, KillHook, ModelActivated, ModelDeactivated, RunHook
from llmux.core.events import Event, HookFinished, RequestFinished
from llmux.core.policy import Policy
from llmux.core.spec import HookKind, ModelSpec, Rules
from llmux.simulator.cost_matrix import CostMatrix
from llmux.simulator.engine_model import Engines
from llmux.simulator.run import ACT, NOTED, UNBOUNDED, Outcome, Run, Scene, Visit
from llmux.simulator.simulation import carry_out
from llmux.simulator.spilling import Spill
from llmux.simulator.trace import Trace, TraceError

NO_HALVES: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True, slots=True)
class HookSeconds:
    """How long hooks take, in seconds. ``guesses`` (wake, sleep) fill in what ``costs`` lacks for a model.

    A model's wake and sleep at a level take what was measured, or given, for that level; else what applies without
    levels. If only the cost of a whole switch is known, all of it is spent in the wake.
    """

    costs: CostMatrix
    guesses: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config, costs: CostMatrix, factor: float = 1.0) -> HookSeconds:
        """Return ``factor`` times what ``costs`` and the configuration's first guesses say."""
        guesses = {
            name: (None if wake is None else wake * factor, None if sleep is None else sleep * factor)
            for name, (wake, sleep) in first_costs(config).items()
        }
        return cls(costs.scaled(factor), guesses)

    def sleep(self, model: str, level: str) -> float:
        """Return the seconds of a sleep hook, its verify included."""
        known = self.costs.levels.get(("sleep", model, level), self.costs.sleeps.get(model))
        if known is None:
            known = self.guesses.get(model, NO_HALVES)[1]
        return known or 0.0

    def wake(self, model: str, level: str, sources: tuple[str, ...]) -> float:
        """Return the seconds of a wake hook after ``sources`` have been put to sleep."""
        known = self.costs.levels.get(("wake", model, level))
        if known is not None:
            return known
        if len(sources) == 1 and not level and (sources[0], model) in self.costs.pairs:
            return max(0.0, self.costs.pairs[sources[0], model] - self.sleep(sources[0], ""))
        known = self.costs.wakes.get(model)
        if known is None:
            known = self.guesses.get(model, NO_HALVES)[0]
        if known is None:
            known = self.costs.default
        if known is None:
            raise TraceError(f"no cost is given for a wake of {model!r}; add it to `wake:`, or `default:`")
        return known

    def prefetch(self, model: str) -> float:
        """Return the seconds that a prefetch hook takes; a wake after it is shorter by as much."""
        return self.costs.prefetches.get(model, 0.0)


def simulate_specs(
    trace: Trace,
    specs: Sequence[ModelSpec],
    rules: Rules,
    policy: Policy,
    times: HookSeconds,
    engines: Engines,
    *,
    horizon: float | None = None,
    progress: Callable[[float], None] | None = None,
    spill: Spill | None = None,
    prepare: Callable[[Run], None] | None = None,
) -> Outcome:
    """Run ``trace`` under ``rules``; ``times`` gives the duration of every hook.

    Raises:
        TraceError: it has a model that is not in ``specs``, or a cost is missing.

    """
    known = {spec.name for spec in specs}
    stray = next((name for name in trace.models if name not in known), None)
    if stray is not None:
        raise TraceError(f"{trace.name}: asks for {stray!r}, which is not one of the configuration's models")
    scene = Scene([replace(spec, max_queued=UNBOUNDED) for spec in specs], frozenset())
    rules = replace(rules, request_timeout=None, alive_every=0.0, manual=False)

    def again(
        traffic: Trace, candidate: Policy, costs: CostMatrix, fitted: Engines, _awake: frozenset[str]
    ) -> Outcome:
        told = HookSeconds(costs, times.guesses)
        return _ConfiguredRun(traffic, candidate, told, fitted, rules, None, scene).go(None)

    run = _ConfiguredRun(trace, policy, times, engines, rules, horizon, scene)
    return carry_out(run, policy, again, progress, spill, prepare)


class _ConfiguredRun(Run):
    """A run in which several models may be awake, and every hook takes its own time."""

    def __init__(
        self,
        trace: Trace,
        policy: Policy,
        times: HookSeconds,
        engines: Engines,
        rules: Rules,
        horizon: float | None,
        scene: Scene,
    ) -> None:
        super().__init__(trace, policy, times.costs, engines, rules, horizon, scene)
        self.core.state.costs.guesses = times.guesses
        self.times = times
        self.noted = NOTED | {KillHook, ModelActivated, ModelDeactivated, CancelRequests}
        self.awake: dict[str, float] = {}  # since when
        self.waking: dict[str, float] = {}  # since when
        self.prefetching: dict[str, float] = {}  # since when, beside a switch
        self.cut: list[tuple[float, int]] = []  # heap of (time, job): answers that were cut off
        self.heaps = (*self.heaps, (ACT, self.cut))

    # ---- hooks

    def _run_hook(self, effect: RunHook, pending: list[Event]) -> None:
        match effect.kind:
            case HookKind.WAKE:
                self.waking[effect.model] = self.time
                seconds = self.times.wake(effect.model, effect.level, effect.sources)
                begun = self.prefetching.pop(effect.model, None)
                if begun is not None:
                    seconds = max(0.0, seconds - min(self.time - begun, self.times.prefetch(effect.model)))
            case HookKind.SLEEP:
                seconds = self.times.sleep(effect.model, effect.level)
            case HookKind.PREFETCH:
                self.prefetching[effect.model] = self.time
                seconds = self.times.prefetch(effect.model)
            case HookKind.ALIVE:
                pending.append(HookFinished(effect.hook, ok=effect.model in self.awake))
                return
            case _:
                pending.append(HookFinished(effect.hook, ok=True))
                return
        heapq.heappush(self.hooks, (self.time + seconds, effect.hook))

    # ---- effects that are recorded

    def _note(self, effect: Effect) -> None:
        match effect:
            case KillHook():
                self.failing.add(effect.hook)
                self.hooks[:] = [(0.0 if hook == effect.hook else end, hook) for end, hook in self.hooks]
                heapq.heapify(self.hooks)
            case ModelActivated():
                self._stretch(self.waking, effect.model, "switch")
                self.awake[effect.model] = self.time
            case ModelDeactivated():
                self._stretch(self.awake, effect.model, "awake")
            case CancelRequests():
                self._cut(effect)
            case _:
                super()._note(effect)

    def _cut(self, effect: CancelRequests) -> None:
        serving = self.serving[effect.model]
        for index in effect.requests:
            serving.cut(index, self.time)
            self.timed[:] = [each for each in self.timed if each[1] != index]
            heapq.heappush(self.cut, (self.time, index))
        heapq.heapify(self.timed)
        if not serving.streams and serving in self.busy:
            self.busy.remove(serving)

    def _act(self) -> None:
        """End an answer that has reached its time limit; a user asks again after an error, too."""
        index = heapq.heappop(self.cut)[1]
        self.outcome.cut += 1
        self._follow_up(index)
        self.feed(RequestFinished(index, self.jobs[index].keep))

    def _stretch(self, since: dict[str, float], model: str, what: str) -> None:
        begun = since.pop(model, None)
        if begun is not None and self.time > begun:
            self.outcome.residency.append(Visit(begun, self.time, model, what))

    def _end(self) -> Outcome:
        outcome = super()._end()
        for model in list(self.awake):
            self._stretch(self.awake, model, "awake")
        return outcome
