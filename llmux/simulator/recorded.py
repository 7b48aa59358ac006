"""llmux's own record as a trace (arrivals, durations, costs of switches), and its replay.

In an exact replay an answer takes as long as recorded. To compare policies, an engine is fitted to the record of
each model, and an answer takes what it would have taken alone, longer with others beside it.

``replay`` plays it again, exactly: the recorded policy, every hook as long as recorded, and what operators did.
The switches must then be the recorded ones, which proves that the record has the reason for each. Exactness ends
with the record: see "The record" in ``llmux/OPERATING.md``.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
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
from llmux.core.spec import HookKind, Level, ModelSpec, Rules
from llmux.estimates import costs_of
from llmux.observability.record import RecordedRun, RecordError, read_record
from llmux.observability.state_file import load_costs
from llmux.plugins import load_policy
from llmux.simulator.cost_matrix import CostMatrix
from llmux.simulator.engine_model import Engines, Fit, Service, fit
from llmux.simulator.run import GAVE_UP, HOOK_ENDED, NEVER, SERVED, UNBOUNDED, Run, Scene
from llmux.simulator.trace import Job, Trace, TraceError

Line = Mapping[str, Any]
BYTES = 4  # of a request or an answer, per token: about

# What a record that was changed by hand, or written by another version, raises wherever it is used.
UNUSABLE = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)


@dataclass(frozen=True, slots=True)
class Recorded:
    """The last llmux that wrote into a record, from where its lines in the file begin."""

    name: str
    start: Line
    requests: list[Line]  # by arrival
    switches: list[Line]  # by their beginning
    decisions: list[Line]
    events: list[Line]
    deepenings: list[Line]  # the hooks that put sleeping models to a deeper level
    reloads: int
    lost: int  # missing lines

    def trace(self, *, refused: bool = False) -> Trace:
        """Return the requests as jobs, with those that were ``refused`` only if asked for."""
        means = _means((line["model"], line["service_s"]) for line in self.requests)
        jobs = [_job(line, means) for line in self.requests if refused or line["outcome"] != "refused"]
        return self._trace(jobs)

    def fits(self) -> Mapping[str, Fit]:
        """Fit an engine to each model that has answered a request."""
        services: dict[str, list[Service]] = defaultdict(list)
        for line in filter(_served, self.requests):
            services[line["model"]].append(_service(line))
        limits = {model["name"]: model["max_in_flight"] for model in self.start["models"]}
        return {model: fit(each, limits.get(model)) for model, each in services.items()}

    def fitted_trace(self, fits: Mapping[str, Fit]) -> Trace:
        """Return the requests as jobs for the engines in ``fits``; nothing is refused."""
        known = {model: zip(each.alone, each.first, strict=True) for model, each in fits.items()}
        means = {model: sum(each.alone) / len(each.alone) for model, each in fits.items()}
        jobs = []
        for line in self.requests:
            if line["outcome"] == "refused":
                continue
            job = _job(line, {})
            if _served(line):
                alone, first = next(known[line["model"]])
                job = replace(job, service=None, alone=alone, first=first)
            elif line["outcome"] != "held":
                job = replace(job, service=None, alone=means.get(line["model"], 0.0))
            jobs.append(job)
        return self._trace(jobs)

    def _trace(self, jobs: list[Job]) -> Trace:
        if not jobs:
            raise TraceError(f"{self.name}: has no requests")
        return Trace(self.name, jobs)

    def scene(self) -> Scene:
        """Return the models for comparing policies: as configured, except that no request is rejected."""
        specs = [_spec(model, hooks=False) for model in self.start["models"]]
        return Scene(specs, self.awake)

    def exact_specs(self) -> list[ModelSpec]:
        """Return the models as they were."""
        return [_spec(model, hooks=True) for model in self.start["models"]]

    @property
    def awake(self) -> frozenset[str]:
        """The models that were awake at the beginning of the record."""
        return frozenset(model["name"] for model in self.start["models"] if model["phase"] == "awake")

    @property
    def levels(self) -> Mapping[str, str]:
        """The sleep levels of models at the beginning of the record."""
        return {model["name"]: model["level"] for model in self.start["models"] if model.get("level") is not None}

    @property
    def rules(self) -> Rules:
        """The guard rails, except those that cut off what is in flight: recorded services include that."""
        rules = self.start["rules"]
        return Rules(
            request_timeout=rules["request_timeout"],
            max_wait=float("inf") if rules["max_wait"] is None else rules["max_wait"],
            min_active=rules["min_active"],
            drain_timeout=None,
            alive_every=0.0,
            capacity=rules["capacity"],
            host_memory=rules.get("host_memory"),
            default_model=rules.get("default_model"),
            default_after=float(rules.get("default_after", 0.0)),
        )

    @property
    def costs(self) -> CostMatrix | None:
        """The mean cost of each direction; None if no switch succeeded."""
        done = [line for line in self.switches if line["result"] == "success" and line["to"] is not None]
        if not done:
            return None
        pairs = _means(((line["from"][0], line["to"]), line["cost_s"]) for line in done if len(line["from"]) == 1)
        hooks = [hook for line in self.switches for hook in line["hooks"] if hook["ok"]]
        sleeps, wakes = (
            _means((hook["model"], hook["seconds"]) for hook in hooks if hook["hook"] == kind)
            for kind in ("sleep", "wake")
        )
        return CostMatrix(sum(line["cost_s"] for line in done) / len(done), pairs, sleeps, wakes)

    @property
    def end(self) -> float:
        """The time of the last thing in it."""
        ends = [line["arrival_s"] + line["wait_s"] + (line["service_s"] or 0.0) for line in self.requests]
        ends += [line["decided_s"] + line["duration_s"] for line in self.switches]
        latest: float = max([*ends, *(line["at"] for line in self.events), self.start["at"]])
        return latest


def read_recorded(path: Path) -> Recorded:
    """Read a record.

    Raises:
        RecordError: it cannot be read.
        TraceError: a line lacks a required value.

    """
    return recorded_from(path.name, read_record(path))


def recorded_from(name: str, runs: list[RecordedRun]) -> Recorded:
    """Return the last llmux of these runs; one that follows a reload continues the run before."""
    first = max(index for index, run in enumerate(runs) if index == 0 or run.start.get("because") != "reload")
    parts = runs[first:]

    def all_of(kind: Callable[[RecordedRun], list[Line]]) -> list[Line]:
        return [line for part in parts for line in kind(part)]

    begun = sum(run.start.get("because") != "reload" for run in runs)
    recorded = Recorded(
        f"{name} (the last of {begun} runs)" if begun > 1 else name,
        parts[0].start,
        all_of(lambda run: run.requests),
        all_of(lambda run: run.switches),
        all_of(lambda run: run.decisions),
        [line for line in all_of(lambda run: run.others) if line.get("type") in ("event", "tick", "stop")],
        [line for line in all_of(lambda run: run.others) if line.get("type") == "hook"],
        len(parts) - 1,
        sum(part.lost for part in parts),
    )
    try:
        recorded.requests.sort(key=lambda line: (float(line["arrival_s"]), int(line["id"])))
        recorded.switches.sort(key=lambda line: int(line["id"]))
        _ = recorded.end, recorded.costs, recorded.exact_specs(), recorded.rules
        for line in recorded.requests:
            _job(line, {})
    except UNUSABLE as error:
        raise unusable(name, error) from None
    return recorded


def unusable(name: str, error: Exception) -> RecordError:
    """Return the error for a record that was changed by hand, or written by another version."""
    return RecordError(f"{name}: a line lacks what a record's has, or has an invalid value: {error!r}")


def _served(line: Line) -> bool:
    """Return whether an engine worked on it for a known time."""
    return line["service_s"] is not None and line["outcome"] not in ("held", "refused")


def _service(line: Line) -> Service:
    arrived, wait, first = float(line["arrival_s"]), float(line["wait_s"]), line["first_byte_s"]
    admitted, seconds = arrived + wait, float(line["service_s"])
    began = admitted + seconds if first is None else min(max(arrived + float(first), admitted), admitted + seconds)
    return Service(
        admitted, admitted + seconds, began, int(line["prompt_bytes"] or 0), int(line["answer_bytes"] or 0)
    )


def _job(line: Line, means: Mapping[Any, float]) -> Job:
    service, wait = line["service_s"], float(line["wait_s"])
    left = line["outcome"] == "left" and service is None
    first = line["first_byte_s"]
    return Job(
        float(line["arrival_s"]),
        str(line["model"]),
        0,
        0,
        key=str(line.get("key", "")),
        service=means.get(line["model"], 0.0) if service is None else float(service),
        first=0.0 if first is None else max(0.0, first - wait),
        patience=wait if left else None,
        tokens=_tokens(line),
        keep=None if line.get("keep_s") is None else float(line["keep_s"]),
    )


def _tokens(line: Line) -> tuple[int, int]:
    """Return the tokens that the answer reported, else an estimate from the bytes."""
    told = line.get("tokens") or (None, None)
    given, made = (None if each is None else int(each) for each in told)
    guessed = (int(line[name] or 0) // BYTES for name in ("prompt_bytes", "answer_bytes"))
    asked, answered = guessed
    return asked if given is None else given, answered if made is None else made


def _spec(model: Line, *, hooks: bool) -> ModelSpec:
    companions = model["companions"]
    return ModelSpec(
        model["name"],
        hooks=frozenset(HookKind(kind) for kind in model["hooks"]) if hooks else ModelSpec("").hooks,
        max_in_flight=model["max_in_flight"],
        max_queued=model["max_queued"] if hooks else UNBOUNDED,
        memory=model["memory"],
        companions=None if companions is None else frozenset(companions),
        shared_address=model["shared_address"],
        idle_sleep=model["idle_sleep"],
        preload=bool(model["preload"]),
        keep_awake=bool(model.get("keep_awake")),
        levels=tuple(Level(str(name), int(need)) for name, need in model.get("levels", ()) if hooks),
    )


def _means(samples: Iterable[tuple[Any, float | None]]) -> dict[Any, float]:
    found: dict[Any, list[float]] = defaultdict(list)
    for key, seconds in samples:
        if seconds is not None:
            found[key].append(seconds)
    return {key: sum(each) / len(each) for key, each in found.items()}


# ---- an exact replay

TIE = 1e-7  # seconds: things closer together than this happen in the recorded order
LAST = 1 << 60
NEAR = 1e-6  # seconds: an end this near to the recorded one happens at the recorded time
DIGITS = 9  # of the recorded times
AFTER = 1e-6  # seconds by which the end is later than the last thing recorded


@dataclass(frozen=True, slots=True)
class Begun:
    """A switch that began: when, in seconds, from which models and to which."""

    time: float
    sources: tuple[str, ...]
    to: str | None

    @property
    def way(self) -> str:
        """The direction, in words."""
        return f"{'+'.join(self.sources) or 'nothing'} → {self.to or 'sleep'}"


@dataclass(slots=True)
class Comparison:
    """The recorded switches next to the replayed ones."""

    recorded: list[Begun]
    replayed: list[Begun]
    limits: list[str] = field(default_factory=list)  # why the two may differ

    @property
    def same(self) -> int:
        """How many switches are equal, up to the first that is not."""
        pairs = zip(self.recorded, self.replayed, strict=False)
        for index, (one, other) in enumerate(pairs):
            if (one.sources, one.to) != (other.sources, other.to):
                return index
        return min(len(self.recorded), len(self.replayed))

    @property
    def exact(self) -> bool:
        """Whether all switches are equal."""
        return self.same == len(self.recorded) == len(self.replayed)

    @property
    def apart(self) -> float:
        """The greatest difference, in seconds, between the beginnings of equal switches."""
        pairs = zip(self.recorded[: self.same], self.replayed, strict=False)
        return max((abs(one.time - other.time) for one, other in pairs), default=0.0)


def replay(recorded: Recorded, folder: Path | None = None) -> Comparison:
    """Replay a record and compare; files of its policy are relative to ``folder``. Raises PolicyLoadError."""
    used = recorded.start["policy"]
    run = _Replay(recorded, load_policy(used["use"], used["options"], folder or Path()))
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
    if start.get("fair"):
        found.append("keys were served in turns (`policy.fair`); whose turn it was is not replayed")
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
    """A run in which everything takes as long as recorded."""

    def __init__(self, recorded: Recorded, policy: Policy) -> None:
        scene = Scene(recorded.exact_specs(), recorded.awake, recorded.levels)
        trace = recorded.trace(refused=True)
        free = CostMatrix(0.0)  # not used: hooks have their own durations
        super().__init__(trace, policy, free, Engines(), recorded.rules, recorded.end + AFTER, scene)
        self.started = replace(self.started, **_asked(recorded.start))
        self.begun: list[Begun] = []
        load_costs(costs_of(self.core.state), recorded.start["costs"])
        self.core.state.costs.guesses = {
            name: (wake, sleep) for name, (wake, sleep) in recorded.start["guesses"].items()
        }
        self.next_deadline = lambda: None  # the record has the time of each
        # A policy may treat time zero as a moment like any other.
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
    """Return what operators had requested before. The record has the end of each pin and lease."""
    lease = start.get("lease")
    pins = {name: Pin() for name in start.get("pins", ())}
    return {
        "pins": pins,
        "lease": lease and Lease(None, waits=lease["waits"]),
        "manual": bool(start.get("manual")),
    }


def _near(recorded: float, time: float) -> float:
    """Return the recorded time if it is this one: rounding errors must not add up."""
    return recorded if abs(recorded - time) < NEAR else time


class _Act(NamedTuple):
    """An event that came neither from a client nor from a hook."""

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
