"""Plays a record again, exactly: the recorded policy, every hook as long as it was, and what operators did.

The switches must then be the recorded ones, which proves that the record tells why each was made.
Exactness ends where the record does: see "The record" in ``llmux/OPERATING.md``.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from llmux.core.effects import Effect, RunHook, SwitchStarted
from llmux.core.events import (
    ActivationRequested,
    DeadlineReached,
    Event,
    HookFinished,
    LeaseChanged,
    ManualChanged,
    PinChanged,
    ResetRequested,
    ShutdownRequested,
    SleepRequested,
)
from llmux.core.model import Lease, Pin
from llmux.core.policy import Policy
from llmux.core.spec import HookKind
from llmux.estimates import costs_of
from llmux.observability.state_file import load_costs
from llmux.plugins import load_policy
from llmux.simulator.cost_matrix import CostMatrix
from llmux.simulator.engine_model import Engines
from llmux.simulator.recorded import Line, Recorded
from llmux.simulator.run import GAVE_UP, HOOK_ENDED, NEVER, SERVED, Run, Scene

TIE = 1e-7  # seconds: what is closer together happens in the recorded order
LAST = 1 << 60
NEAR = 1e-6  # seconds: what ends so near to where it ended ends there
DIGITS = 9  # of the record's times
AFTER = 1e-6  # seconds by which the end is later than the last thing that happened


@dataclass(frozen=True, slots=True)
class Begun:
    """A switch that began: when, in seconds, from which models and to which."""

    time: float
    sources: tuple[str, ...]
    to: str | None

    @property
    def way(self) -> str:
        """From where to where, in words."""
        return f"{'+'.join(self.sources) or 'nothing'} → {self.to or 'sleep'}"


@dataclass(slots=True)
class Comparison:
    """The recorded switches beside the replayed ones."""

    recorded: list[Begun]
    replayed: list[Begun]
    limits: list[str] = field(default_factory=list)  # why the two may differ

    @property
    def same(self) -> int:
        """How many switches are the same, up to the first that is not."""
        pairs = zip(self.recorded, self.replayed, strict=False)
        for index, (one, other) in enumerate(pairs):
            if (one.sources, one.to) != (other.sources, other.to):
                return index
        return min(len(self.recorded), len(self.replayed))

    @property
    def exact(self) -> bool:
        """Whether all are."""
        return self.same == len(self.recorded) == len(self.replayed)

    @property
    def apart(self) -> float:
        """The most, in seconds, by which switches that are the same began at another time."""
        pairs = zip(self.recorded[: self.same], self.replayed, strict=False)
        return max((abs(one.time - other.time) for one, other in pairs), default=0.0)


def replay(recorded: Recorded, policy: Policy | None = None, folder: Path | None = None) -> Comparison:
    """Replay a record and compare; ``policy`` replaces the recorded one, whose files are relative to ``folder``.

    Raises PolicyLoadError.
    """
    if policy is None:
        used = recorded.start["policy"]
        policy = load_policy(used["use"], used["options"], folder or Path())
    run = _Replay(recorded, policy)
    run.go(None)
    told = [Begun(line["decided_s"], tuple(line["from"]), line["to"]) for line in recorded.switches]
    return Comparison(told, run.begun, _limits(recorded))


def _limits(recorded: Recorded) -> list[str]:
    start = recorded.start
    found = []
    if start.get("because") != "start":
        found.append(
            "it begins while llmux was running: what the policy had learnt, and what waited, are not in it"
        )
    if recorded.reloads:
        found.append("the configuration was read again; the replay goes on with the old one")
    if recorded.lost:
        found.append(f"{recorded.lost} lines could not be written")
    if any(line.get("event") == "lost_engine" for line in recorded.events):
        found.append("an engine was lost; replayed ones never are")
    if any(line["result"] == "failure" for line in recorded.switches):
        found.append("a switch failed; the pause after it is ±20 % by chance")
    return found


class _Replay(Run):
    """A run in which everything takes as long as it did."""

    def __init__(self, recorded: Recorded, policy: Policy) -> None:
        scene = Scene(recorded.exact_specs(), recorded.awake, recorded.levels)
        trace = recorded.trace(refused=True)
        free = CostMatrix(0.0)  # not asked: hooks have their own durations
        super().__init__(trace, policy, free, Engines(), recorded.rules, recorded.end + AFTER, scene)
        self.started = replace(self.started, **_asked(recorded.start))
        self.begun: list[Begun] = []
        load_costs(costs_of(self.core.state), recorded.start["costs"])
        self.core.state.costs.guesses = {
            name: (wake, sleep) for name, (wake, sleep) in recorded.start["guesses"].items()
        }
        self.next_deadline = lambda: None  # the record says when that was
        # A policy may take the clock's zero for a moment like others.
        clock, handle = float(recorded.start["clock"]), self.core.handle
        self.handle = lambda event, now: handle(event, round(clock + now, DIGITS))
        self._ready = float(recorded.start["at"])
        self._durations: dict[tuple[int, str, str], deque[Line]] = defaultdict(deque)
        for line in recorded.switches:
            for hook in line["hooks"]:
                self._durations[line["id"], hook["model"], hook["hook"]].append(hook)
        for hook in recorded.deepenings:
            self._durations[0, hook["model"], hook["hook"]].append(hook)
        self._acts = _acts(recorded)
        times = [(act.time, index) for index, act in enumerate(self._acts)]
        heapq.heapify(times)
        self._times = times
        self.heaps = (*self.heaps, (7, times))
        self._order_of_hooks: dict[int, int] = {}
        self._requests = recorded.requests
        self._orders = [line["order"] for line in recorded.requests]

    def _next(self) -> tuple[float, int]:
        first, _ = super()._next()
        waiting = [(0, self.arrivals[-1]), *((number, entry) for number, heap in self.heaps for entry in heap)]
        tied = ((self._order(what, entry[1]), what, entry) for what, entry in waiting if entry[0] <= first + TIE)
        _, what, entry = min(tied)
        for number, heap in self.heaps:
            if number == what and heap[0] != entry:
                heap.remove(entry)
                heapq.heapify(heap)
                heapq.heappush(heap, (-1.0, entry[1]))  # it is the next of its kind
        return max(entry[0], self.time), what

    def _order(self, what: int, index: int) -> int:
        if what == 0:
            return self._orders[index][0] if index >= 0 else LAST
        if what in (SERVED, GAVE_UP):
            return self._orders[index][1] or LAST
        return self._order_of_hooks.get(index, LAST) if what == HOOK_ENDED else self._acts[index].order

    def _anybody_left(self) -> bool:
        return True  # until the end of the record: idle models go to sleep after the last request

    def _act(self) -> None:
        self.feed(self._acts[heapq.heappop(self._times)[1]].event)

    def _run_hook(self, effect: RunHook, pending: list[Event]) -> None:
        if effect.kind is HookKind.ALIVE:
            if not self.core.state.ready:
                self._end_at(self._ready, effect, ok=effect.model in self.awake_at_start)
            else:
                pending.append(HookFinished(effect.hook, ok=True))
            return
        known = self._durations.get((effect.switch, effect.model, effect.kind.value)) or None
        hook: dict[str, Any] = dict(known.popleft()) if known else {"seconds": 0.0, "ok": True}
        seconds = hook["seconds"]
        self._order_of_hooks[effect.hook] = hook.get("order", LAST)
        end = NEVER if seconds is None else self.time + seconds
        if known is not None and seconds is not None:
            end = _near(round(hook["at"] + seconds, DIGITS), end)
        self._end_at(end, effect, ok=hook["ok"])

    def _end_of(self, index: int, time: float) -> float:
        line = self._requests[index]
        service = line["service_s"]
        if service is None:
            return time
        return _near(round(line["arrival_s"] + line["wait_s"] + service, DIGITS), time)

    def _end_at(self, time: float, effect: RunHook, *, ok: bool) -> None:
        if not ok:
            self.failing.add(effect.hook)
        heapq.heappush(self.hooks, (time, effect.hook))

    def _note(self, effect: Effect) -> None:
        if isinstance(effect, SwitchStarted):
            self.begun.append(Begun(self.time, effect.sources, effect.to))
        super()._note(effect)


def _asked(start: Line) -> dict[str, Any]:
    """Return what operators had asked for before. The record has the end of each pin and lease."""
    lease = start.get("lease")
    pins = {name: Pin() for name in start.get("pins", ())}
    return {
        "pins": pins,
        "lease": lease and Lease(None, waits=lease["waits"]),
        "manual": bool(start.get("manual")),
    }


def _near(recorded: float, time: float) -> float:
    """Return the recorded moment if it is this one: rounding errors must not add up."""
    return recorded if abs(recorded - time) < NEAR else time


class _Act(NamedTuple):
    """What came neither from a client nor from a hook."""

    time: float
    order: int
    event: Event


def _acts(recorded: Recorded) -> list[_Act]:
    acts = [
        _Act(line["at"], line["order"], event) for line in recorded.events if (event := _event(line)) is not None
    ]
    asked = {line["switch"] for line in recorded.decisions if (line["by"], line["said"]) == ("core", "requested")}
    for line in recorded.switches:
        if line["id"] in asked:
            to, sources = line["to"], line["from"]
            event = SleepRequested(sources[0], 0) if to is None else ActivationRequested(to, 0)
            acts.append(_Act(line["decided_s"], line["order"], event))
    return sorted(acts, key=lambda act: act[:2])


def _event(line: Line) -> Event | None:
    event: Event | None = None
    match line.get("event", line["type"]):
        case "tick":
            event = DeadlineReached()
        case "pin":
            event = PinChanged(line["model"], 0, pinned=line["pinned"])
        case "lease":
            event = LeaseChanged(0, leased=line["leased"], waits=line.get("waits", False))
        case "manual":
            event = ManualChanged(0, line["manual"])
        case "stopping":
            event = ShutdownRequested()
        case "reset":
            event = ResetRequested(line["model"], 0)
    return event
