"""Runs the core of a revision and the current one side by side, and compares their effects, one by one.

    .venv/bin/python tests/benchmarks/same_core.py --revision f51077b --events 1000000 --seed 1

The walk is that of ``tests/core/world.py``: capacities, groups, levels, pins, leases, reloads, manual mode,
anticipation. After every event the effects, the next deadline and the state of each model must be equal.
Effects of only one of the two (a notice that is new) are left out, and counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import importlib
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter, deque
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).parents[2]
STEPS = 250
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "core")]

import world  # noqa: E402

from llmux.core import effects as fx  # noqa: E402
from llmux.core import events as ev  # noqa: E402


class DifferenceError(Exception):
    """The two cores do not answer alike."""


def load(revision: str) -> Any:
    """Return the package ``llmux.core`` of a revision, under another name."""
    rooms = subprocess.run(
        ["git", "ls-tree", "--name-only", revision, "llmux/core", "llmux/estimates"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    archive = subprocess.run(
        ["git", "archive", revision, *rooms],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    folder = Path(tempfile.mkdtemp(prefix="same-core-"))
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    (folder / "llmux").rename(folder / "llmux_then")
    (folder / "llmux_then" / "__init__.py").write_text("")
    for file in folder.rglob("*.py"):
        file.write_text(file.read_text().replace("from llmux.", "from llmux_then."))
    sys.path.insert(0, str(folder))
    return importlib.import_module("llmux_then.core")


def _estimates() -> Any:
    made = importlib.import_module("llmux_then.estimates")
    return made.Meters() if hasattr(made, "Meters") else made.Estimates()


def _meters() -> list[Any]:
    """Return what the other core is handed to measure with; until lately it did so itself."""
    try:
        return [_estimates()]
    except ImportError:
        return []


class Translator:
    """Makes the other core's values out of those of this one: by the names of classes and fields."""

    def __init__(self) -> None:
        self.events = importlib.import_module("llmux_then.core.events")
        self.model = importlib.import_module("llmux_then.core.model")
        self.spec = importlib.import_module("llmux_then.core.spec")
        self.policy = importlib.import_module("llmux_then.core.policy")
        self._known: dict[int, tuple[Any, Any]] = {}

    def __call__(self, value: Any) -> Any:
        """Return the other core's value."""
        kind = value.__class__
        if kind in (int, float, str, bool, type(None)):
            return value
        if isinstance(value, enum.Enum):
            return getattr(self._class(kind), value.name)
        if kind.__name__ == "ModelSpec":
            known = self._known.get(id(value))
            if known is None:
                known = self._known[id(value)] = (value, self._made(value))
            return known[1]
        if isinstance(value, tuple | list | frozenset):
            return kind(self(each) for each in value)
        if isinstance(value, Mapping):
            return {self(key): self(each) for key, each in value.items()}
        return self._made(value) if dataclasses.is_dataclass(value) else value

    def _made(self, value: Any) -> Any:
        if isinstance(value, Exception):
            return value
        kind = self._class(value.__class__)
        known = {field.name for field in dataclasses.fields(kind)}  # one of an earlier day has fewer fields
        made = {
            field.name: self(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.init and field.name in known
        }
        return kind(**made)

    def _class(self, kind: type) -> Any:
        for module in (self.events, self.model, self.spec, self.policy):
            if hasattr(module, kind.__name__):
                return getattr(module, kind.__name__)
        raise TypeError(f"the other core has no {kind.__name__}")


class Tape:
    """A policy of this core, whose answers the other core's policy repeats."""

    def __init__(self, policy: Any, tapes: Tapes) -> None:
        self._policy, self._tapes = policy, tapes

    def decide(self, now: Any) -> Any:
        """Ask, and keep what was shown and answered."""
        return self._tapes.keep("decide", self._policy.decide, now)

    def anticipate(self, now: Any) -> Any:
        """Ask, and keep what was shown and answered."""
        return self._tapes.keep("anticipate", self._policy.anticipate, now)

    def on_switch_completed(self, record: Any) -> None:
        """Pass it on."""
        self._tapes.keep("on_switch_completed", self._policy.on_switch_completed, record)


class Echo:
    """The other core's policy."""

    def __init__(self, tapes: Tapes) -> None:
        self._tapes = tapes

    def decide(self, now: Any) -> Any:
        """Answer what the policy has answered."""
        return self._tapes.repeat("decide", now)

    def anticipate(self, now: Any) -> Any:
        """Answer what the policy has answered."""
        return self._tapes.repeat("anticipate", now)

    def on_switch_completed(self, record: Any) -> None:
        """Raise what the policy has raised."""
        self._tapes.repeat("on_switch_completed", record)


def shown(now: Any) -> Any:
    """Return what a policy sees."""
    if hasattr(now, "from_models"):
        return tuple(getattr(now, field.name) for field in dataclasses.fields(now))
    return now.time, now.awake, now.waiting, [
        (
            each.name, each.awake, each.queued, each.in_flight, each.limit, each.oldest_arrival, each.awake_since,
            each.admissions, each.oldest_admission, each.last_served, each.arrival_rate, each.service_time,
            each.switch_cost, {name: tuple(one) for name, one in each.successors.items()}, list(each.arrivals()),
        )
        for each in now.models.values()
    ]  # fmt: skip


class Tapes:
    """What the policies and the jitter of this core have said, to be repeated in the same order."""

    def __init__(self, translate: Translator) -> None:
        self.translate = translate
        self.answers: deque[tuple[str, Any, Any]] = deque()
        self.jitters: deque[float] = deque()

    def keep(self, what: str, ask: Any, now: Any) -> Any:
        """Ask a policy, and keep its answer."""
        seen = shown(now)
        try:
            answer = ask(now)
        except RuntimeError as error:
            self.answers.append((what, seen, error))
            raise
        self.answers.append((what, seen, self.translate(answer)))
        return answer

    def repeat(self, what: str, now: Any) -> Any:
        """Return the next answer."""
        if not self.answers:
            raise DifferenceError(f"only the other core asks {what}")
        kind, seen, answer = self.answers.popleft()
        if kind != what:
            raise DifferenceError(f"the other core asks {what} where this one asks {kind}")
        if seen != shown(now):
            raise DifferenceError(f"{what} is shown\n  {shown(now)}\ninstead of\n  {seen}")
        if isinstance(answer, RuntimeError):
            raise answer
        return answer

    def jitter(self) -> float:
        """Return the next number."""
        if not self.jitters:
            raise DifferenceError("only the other core asks for a jitter")
        return self.jitters.popleft()


class Twin:
    """What a ``World`` drives in place of its ledger: both cores, and the books that the world needs."""

    then: Any = None
    translate: Translator
    told: ClassVar[Counter[str]] = Counter()
    events: ClassVar[Counter[str]] = Counter()
    moved: ClassVar[Counter[str]] = Counter()  # answers to requests that stand elsewhere in their step
    new: frozenset[str] = frozenset()

    def __init__(self, core: Any) -> None:
        self.core = core
        self.tapes = Tapes(self.translate)
        state = core.state
        state.policy = Tape(state.policy, self.tapes)
        jitter = state.jitter

        def kept() -> float:
            number = jitter()
            self.tapes.jitters.append(number)
            return number

        state.jitter = kept
        specs = [self.translate(model.spec) for model in state.models.values()]
        self.other = self.then.Core(
            specs, self.translate(state.rules), Echo(self.tapes), *_meters(), jitter=self.tapes.jitter
        )
        self.queued: dict[int, str] = {}
        self.riding: dict[int, str] = {}
        self.in_flight: dict[int, str] = {}
        self.hooks: dict[int, Any] = {}
        self.killed: set[int] = set()
        self.answers: dict[int, Any] = {}
        self.returns: dict[int, int] = {}
        self.done: set[int] = set()
        self.stopped = False
        self.last: deque[tuple[float, Any, Any, Any]] = deque(maxlen=8)

    @property
    def leased(self) -> bool:
        """Whether the GPU is lent."""
        return self.core.state.lease is not None

    def feed(self, event: Any, now: float) -> list[Any]:
        """Hand the event to both, and compare."""
        if isinstance(event, ev.ConfigReplaced):
            event = self._reload(event)
        self._before(event)
        self.events[event.__class__.__name__] += 1
        translated = self._translated(event)
        mine = self.core.handle(event, now)
        theirs = self.other.handle(translated, now)
        self.last.append((now, event, mine, theirs))
        self._compare(mine, theirs)
        for effect in mine:
            self._book(effect)
        return mine

    def _reload(self, event: Any) -> Any:
        policy = event.policy
        if getattr(self.core.state.policy, "_policy", None) is policy:
            policy = self.core.state.policy
        elif not isinstance(policy, Tape):
            policy = Tape(policy, self.tapes)
        return dataclasses.replace(event, policy=policy)

    def _translated(self, event: Any) -> Any:
        if not isinstance(event, ev.ConfigReplaced):
            return self.translate(event)
        same = event.policy is self.core.state.policy
        policy = self.other.state.policy if same else Echo(self.tapes)
        return self.translate.events.ConfigReplaced(
            self.translate(event.models),
            self.translate(event.rules),
            policy,
            dict(event.first_guesses),
        )

    def _compare(self, mine: list[Any], theirs: list[Any]) -> None:
        left = [as_tuple(effect) for effect in mine if effect.__class__.__name__ not in self.new]
        right = [as_tuple(effect) for effect in theirs]
        self.told.update(effect.__class__.__name__ for effect in mine)
        if left != right and not self._only_moved(left, right):
            raise DifferenceError("effects\n  then " + "\n       ".join(map(repr, right)) + "\n  now  "
                                  + "\n       ".join(map(repr, left)))  # fmt: skip
        if self.tapes.answers or self.tapes.jitters:
            raise DifferenceError(f"only this core asks: {self.tapes.answers}, {self.tapes.jitters}")
        deadlines = self.other.next_deadline(), self.core.next_deadline()
        if deadlines[0] != deadlines[1]:
            raise DifferenceError(f"next deadline: then {deadlines[0]}, now {deadlines[1]}")
        then, now = (
            {n: (m.phase.value, list(m.queue), sorted(m.in_flight), m.last_error, m.extra, m.pinned)
             for n, m in core.state.models.items()}
            for core in (self.other, self.core)
        )  # fmt: skip
        if then != now:
            raise DifferenceError(f"models\n  then {then}\n  now  {now}")

    def _only_moved(self, left: list[Any], right: list[Any]) -> bool:
        """Whether only answers to requests stand elsewhere, those of each model in the same order."""
        answers = {"Admit", "Reject"}

        def others(told: list[Any]) -> list[Any]:
            return [one for one in told if one[0] not in answers]

        def by_model(told: list[Any]) -> dict[str, list[Any]]:
            found: dict[str, list[Any]] = {}
            for one in told:
                if one[0] in answers:
                    found.setdefault(one[2], []).append(one)
            return found

        if others(left) != others(right) or by_model(left) != by_model(right):
            return False
        first = next(pair for pair in zip(right, left, strict=True) if pair[0] != pair[1])
        what = f"{first[0][0]} before {first[1][0]}, now after it"
        if what not in self.moved:
            print(f"in another order within one step, {what}: {self.last[-1][1]}"[:250])
        self.moved[what] += 1
        return True

    def _before(self, event: Any) -> None:
        match event:
            case ev.RequestArrived(request=request, model=model):
                self.queued[request] = model
            case ev.RequestFinished(request=request):
                del self.in_flight[request]
                self.done.add(request)
            case ev.RequestAbandoned(request=request):
                self.queued.pop(request, None)
                self.in_flight.pop(request, None)
                self.done.add(request)
            case ev.RequestReturned(request=request):
                self.queued[request] = self.in_flight.pop(request)
                self.returns[request] = 1
            case ev.HookFinished(hook=hook):
                del self.hooks[hook]
            case _:
                pass

    def _book(self, effect: Any) -> None:
        match effect:
            case fx.Admit(request=request):
                self.in_flight[request] = self.queued.pop(request)
            case fx.Reject(request=request):
                del self.queued[request]
                self.done.add(request)
            case fx.RunHook():
                self.hooks[effect.hook] = effect
            case fx.KillHook(hook=hook):
                self.killed.add(hook)
            case fx.Answer(ticket=ticket):
                self.answers[ticket] = effect
            case fx.Stopped():
                self.stopped = True
            case _:
                pass


_FIELDS: dict[type, tuple[str, ...]] = {}
REWORDED = (
    ("for which nobody waits", "for which no request waits"),
    ("which is no decision", "which is not a decision"),
)
"""What is said in other words now."""


def as_tuple(effect: Any) -> tuple[Any, ...]:
    """Return an effect as values that compare across the two cores."""
    kind = effect.__class__
    fields = _FIELDS.get(kind)
    if fields is None:
        fields = _FIELDS[kind] = tuple(field.name for field in dataclasses.fields(kind))
    values = [getattr(effect, name) for name in fields]
    for then, now in REWORDED:
        values = [value.replace(then, now) if isinstance(value, str) else value for value in values]
    return kind.__name__, *values


def main() -> int:
    """Walk, and say how far it went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--revision", default="f51077b")
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--new", nargs="*", default=["PhaseChanged", "Decided"])
    parser.add_argument("--keep-going", action="store_true", help="count the walks that differ, and go on")
    given = parser.parse_args()
    Twin.then = load(given.revision)
    Twin.translate = Translator()
    Twin.new = frozenset(given.new)
    world.Ledger = Twin  # type: ignore[misc,assignment]
    world.World.look = lambda _self: None  # type: ignore[method-assign,assignment]
    began, seed, differ = time.process_time(), given.seed, 0
    while sum(Twin.events.values()) < given.events:
        here = None
        try:
            here = world.World(random.Random(seed))
            for _ in range(STEPS):
                here.step()
            here.settle()
        except Exception as error:  # noqa: BLE001
            differ += 1
            print(f"seed {seed}: {type(error).__name__}: {error}")
            if here is not None:
                for now, event, *_ in here.ledger.last:
                    print(f"  {now:g} {event}"[:300])
            if not given.keep_going:
                return 1
        Twin.translate._known.clear()
        seed += 1
    events = sum(Twin.events.values())
    print(f"{events} events of {seed - given.seed} walks, {differ} of them differ, "
          f"{time.process_time() - began:.0f} s of CPU time")  # fmt: skip
    print("in another order within one step", dict(Twin.moved.most_common()))
    print("events", dict(Twin.events.most_common()))
    print("effects", dict(Twin.told.most_common()))
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
