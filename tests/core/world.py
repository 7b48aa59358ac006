"""A random world around a core: clients, engines, hooks, operators and a clock, all out of one seed."""

from __future__ import annotations

import math
import random
from collections.abc import Collection
from typing import Any

from ledger import Ledger

from llmux.core import Core, residency
from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.model import Lease, Pin
from llmux.core.phases import Phase
from llmux.core.policy import Stay, SwitchTo, WaitUntil
from llmux.core.policy_calls import LiveSnapshot
from llmux.core.spec import DEFAULT_TIMEOUTS, HookKind, Level, Memory, ModelSpec, Rules
from llmux.estimates import Estimates
from llmux.estimates.fair_order import FairOrder, FairPolicy
from llmux.estimates.fairness import Fairness
from llmux.observability.decision_log import KEPT
from llmux.runtime import status_document, wait_estimate
from llmux.runtime.shadow import Shadow, Shadowed

BASE = {HookKind.WAKE, HookKind.SLEEP, HookKind.ALIVE}

HABITS = {  # what happens, and how often
    "arrive": 300,
    "finish": 200,
    "leave_queue": 50,
    "break_off": 20,
    "find_dead": 30,
    "some_hook": 200,
    "wait": 100,
    "suspect": 20,
    "operate": 50,
    "replace": 15,
    "look": 20,
    "shut_down": 1,
}
DEEDS, WEIGHTS = list(HABITS), list(HABITS.values())


class WildPolicy:
    """Answers at random, nonsense included."""

    def __init__(self, world: World) -> None:
        self.world = world

    def decide(self, now):
        rng = self.world.rng
        dice = rng.random()
        if dice < 0.5:
            return SwitchTo(rng.choice(now.waiting))
        if dice < 0.7:
            return Stay()
        if dice < 0.85:
            return WaitUntil(now.time + rng.choice([0, 0.5, 5, 500, float("inf"), float("nan")]))
        if dice < 0.9:
            raise RuntimeError("policy is ill")
        if dice < 0.95:
            return SwitchTo("nobody")
        return rng.choice([None, "llama", 7])

    def anticipate(self, now):
        rng = self.world.rng
        dice = rng.random()
        if dice < 0.4:
            return SwitchTo(rng.choice(list(now.models)))
        if dice < 0.9:
            return Stay()
        if dice < 0.95:
            raise RuntimeError("policy is ill")
        return rng.choice([None, "llama", SwitchTo("nobody"), WaitUntil(now.time + 5)])

    def on_switch_completed(self, _record):
        if self.world.rng.random() < 0.1:
            raise RuntimeError("policy is ill")


class World:
    """One walk. ``step()`` does one random thing; ``settle()`` lets everything end."""

    def __init__(self, rng: random.Random, *, classes: bool = False) -> None:
        self.rng = rng
        self.classes = classes  # some requests ride along, and some have deadlines
        self.capacity = rng.choice([None, None, 10, 16, {"0": 8, "1": 6}])
        self.rules_capacity = self.capacity
        self.grouped = rng.random() < 0.3
        self.host_memory = rng.choice([None, 8, 20])
        self.names = [f"m{i}" for i in range(rng.randint(1, 5))]
        self.specs = {name: self._spec(name) for name in self.names}
        self.policy = WildPolicy(self)
        self.rules = self._rules()
        self.core = Core(self.specs.values(), self.rules, self.policy, Estimates(), self._jitter)
        self.core.state.too_late = wait_estimate.too_late
        self.core.state.policy = self._with_shadows(self.policy)
        self.ledger = Ledger(self.core)
        if classes:
            self.ledger.be_fair(FairOrder(Fairness()))
        self.now = 0.0
        self.next_request = 0
        self.next_ticket = 0
        self.health = rng.choice([1.0, 0.9, 0.6, 0.3])
        holders = frozenset(n for n in self.names if rng.random() < 0.2)
        if rng.random() < 0.9:
            levels = {n: rng.choice(["l0", "l1", "gone"]) for n in self.names}
            recent = tuple(rng.sample(self.names, rng.randint(0, len(self.names))))
            self.feed(ev.Started(holders, recent, levels=levels, **self._asked()))
        else:
            self.arrive()
            self.feed(ev.Started())

    def _spec(self, name: str) -> ModelSpec:
        rng = self.rng
        hooks = BASE | {k for k in (HookKind.VERIFY, HookKind.STOP, HookKind.PREFETCH) if rng.random() < 0.4}
        return ModelSpec(
            name,
            definition=rng.randint(0, 10**6),
            hooks=frozenset(hooks),
            timeouts={**DEFAULT_TIMEOUTS, HookKind.WAKE: rng.choice([1.0, 1800.0])},
            max_in_flight=rng.choice([None, 1, 2]),
            max_queued=rng.choice([1, 3, 1000]),
            memory=self._memory(),
            levels=self._levels(),
            companions=frozenset(n for n in self.names if rng.random() < 0.6) if self.grouped else None,
            shared_address=rng.choice([None, None, "x"]),
            idle_sleep=rng.choice([None, 3.0]),
            preload=rng.random() < 0.2,
            keep_awake=rng.random() < 0.1,
        )

    def _asked(self):
        """What operators had asked of the last llmux, for names that may be gone, and times that may be over."""
        rng = self.rng

        def until() -> float | None:
            return rng.choice([None, -1.0, 0.0, 2.0, 50.0])

        lease = Lease(until(), waits=rng.random() < 0.5, id="0") if rng.random() < 0.2 else None
        pins = {name: Pin(until()) for name in [*self.names, "stranger"] if rng.random() < 0.1}
        return {"pins": pins, "lease": lease, "manual": rng.choice([None, None, None, True, False])}

    def _memory(self) -> Memory | None:
        if not isinstance(self.capacity, dict):
            return self.rng.randint(1, 10) if self.capacity else None
        return {gpu: self.rng.randint(0, 6) for gpu in self.capacity}

    def _levels(self) -> tuple[Level, ...]:
        if self.host_memory is None and self.rng.random() < 0.8:
            return ()
        needs = sorted((self.rng.randint(0, 9) for _ in range(self.rng.randint(0, 3))), reverse=True)
        return tuple(Level(f"l{depth}", need) for depth, need in enumerate(needs))

    def _rules(self) -> Rules:
        rng = self.rng
        return Rules(
            request_timeout=rng.choice([None, 5.0, 0.0]),
            max_wait=rng.choice([0.0, 5.0, 600.0]),
            min_active=rng.choice([0.0, 2.0]),
            anticipate=rng.random() < 0.5,
            manual=rng.random() < 0.1,
            lease_waits=rng.random() < 0.5,
            drain_timeout=rng.choice([None, 0.0, 3.0]),
            alive_every=rng.choice([0.0, 15.0]),
            alive_failures=rng.choice([1, 3]),
            backoff_first=rng.choice([0.0, 1.0]),
            capacity=self.rules_capacity,
            host_memory=self.host_memory,
            default_model=rng.choice([None, None, *self.names]),
            default_after=rng.choice([0.5, 3.0]),
            sleep_on_exit=rng.random() < 0.3,
        )

    def _with_shadows(self, policy: Any) -> Any:
        shadows = [Shadow(str(number), WildPolicy(self)) for number in range(self.rng.choice([0, 0, 2]))]
        return Shadowed(policy, shadows, lambda *_: None) if shadows else policy

    def _jitter(self) -> float:
        return self.rng.random()

    def look(self) -> None:
        """What a policy is shown agrees with itself, and with what went in and out."""
        now = LiveSnapshot(self.core.state)
        for view in now.models.values():
            assert view.queued == len(list(view.arrivals())) == list(self.ledger.queued.values()).count(view.name)
            assert view.in_flight == list(self.ledger.in_flight.values()).count(view.name)
            assert view.awake == (view.name in now.awake) == (view.awake_since is not None)
            assert (view.oldest_arrival is None) == (view.queued == 0)
            assert view.switch_cost >= 0
            assert view.arrival_rate >= 0
            assert view.service_time >= 0
        self._look_ahead()
        self._look_back()

    def _look_ahead(self) -> None:
        """Of everybody who waits it can be said how long, whatever is the case."""
        s = self.core.state
        turns = wait_estimate.Turns(s, self.now)
        for model in s.models.values():
            assert 0 <= wait_estimate.until_awake(s, model, self.now) < math.inf
            assert wait_estimate.in_queue(model, 1) <= wait_estimate.in_queue(model, 2) < math.inf
            newcomer = wait_estimate.for_a_newcomer(s, model, self.now)
            assert newcomer is None or 0 <= newcomer < math.inf
            assert wait_estimate.for_a_newcomer(s, model, self.now, turns) == newcomer
            assert turns.until(model) == one_by_one(s, model, self.now)
        for name, each in status_document.figures(s, self.now).items():  # which reckons what is alike once
            model = s.models[name]
            leaving = () if each.phase is Phase.AWAKE else residency.who_leaves(s, model) or ()
            assert each.evicts == tuple(other.name for other in leaving if other is not model)
            cost = 0.0 if each.phase is Phase.AWAKE else residency.switch_cost(s, leaving, model)
            assert (each.expected_wait, each.switch_cost) == (
                wait_estimate.for_a_newcomer(s, model, self.now),
                cost,
            )

    def _look_back(self) -> None:
        """Every decision says why, in order; a switch under way is one of them."""
        s = self.core.state
        records = self.ledger.decisions.latest(s, KEPT)
        last = self.ledger.decisions.last_id
        assert [record.id for record in records] == list(range(last - len(records) + 1, last + 1))
        for record in records:
            assert any(word in record.reason for word in (" stay", "wakes ", " → ", "no model is woken yet"))
            assert (record.kind == "switch") == (record.switch is not None)
            assert record.time <= record.last <= s.now
        if s.switch is not None:
            assert any(record.switch == s.switch.id for record in records)

    def feed(self, event: ev.Event) -> list[fx.Effect]:
        return self.ledger.feed(event, self.now)

    def arrive(self) -> None:
        self.next_request += 1
        name = self.rng.choice(self.names) if self.rng.random() < 0.98 else "stranger"
        self.feed(ev.RequestArrived(self.next_request, name, **(self._class() if self.classes else {})))

    def _class(self) -> dict[str, Any]:
        rng = self.rng
        rides = rng.choice([None, None, 0.0, 1.0, 30.0])
        deadline = rng.choice([0.0, 15.0, 100.0]) if rng.random() < 0.2 else None
        if rng.random() < 0.05:
            self.feed(ev.RidesEnded())
        return {"rides": rides, "deadline": deadline}

    def step(self) -> None:
        """Do something; what cannot be done now is nothing."""
        if self.ledger.stopped:
            return
        self.now += self.rng.choice([0, 0, 0, 0.01, 0.3, 2.0])
        (deed,) = self.rng.choices(DEEDS, WEIGHTS)
        getattr(self, deed)()

    def _any(self, among: Collection[int]) -> int | None:
        return self.rng.choice(list(among)) if among else None

    def finish(self) -> None:
        if (request := self._any(self.ledger.in_flight)) is not None:
            self.feed(ev.RequestFinished(request))

    def leave_queue(self) -> None:
        if (request := self._any(self.ledger.queued | self.ledger.riding)) is not None:
            self.feed(ev.RequestAbandoned(request))

    def break_off(self) -> None:
        if (request := self._any(self.ledger.in_flight)) is not None:
            self.feed(ev.RequestAbandoned(request))

    def find_dead(self) -> None:
        if (request := self._any(self.ledger.in_flight)) is None:
            return
        if self.ledger.returns.get(request):
            self.feed(ev.RequestFinished(request))
        else:
            self.feed(ev.RequestReturned(request, connected=self.rng.random() < 0.7))

    def some_hook(self) -> None:
        if (hook := self._any(self.ledger.hooks)) is not None:
            self.end_hook(hook, self.rng.random() < self.health)

    def suspect(self) -> None:
        self.feed(ev.EngineLost(self.rng.choice(self.names), refused=self.rng.random() < 0.5))

    def shut_down(self) -> None:
        self.feed(ev.ShutdownRequested())

    def end_hook(self, hook: int, ok: bool) -> None:
        # A hook that is ended may have succeeded at that very moment.
        ok = ok and (hook not in self.ledger.killed or self.rng.random() < 0.2)
        last_byte = self.now - self.rng.choice([1, 100]) if self.rng.random() < 0.3 else None
        self.feed(ev.HookFinished(hook, ok, "" if ok else "exited with 1", last_byte))

    def wait(self) -> bool:
        deadline = self.core.next_deadline()
        if deadline is None or deadline == float("inf"):
            return False
        self.now = max(self.now, deadline)
        self.feed(ev.DeadlineReached())
        return True

    def operate(self) -> None:
        rng = self.rng
        self.next_ticket += 1
        name, ticket = rng.choice([*self.names, "stranger"]), self.next_ticket
        until = rng.choice([None, self.now + 2.0])
        self.feed(
            rng.choice(
                [
                    ev.ActivationRequested(name, ticket),
                    ev.SleepRequested(name, ticket),
                    ev.ResetRequested(name, ticket),
                    ev.PinChanged(name, ticket, pinned=True, until=self.now + 2.0),
                    ev.PinChanged(name, ticket, pinned=rng.random() < 0.3, until=until),
                    self._lease(ticket, until),
                    ev.ManualChanged(ticket, rng.random() < 0.4),
                ]
            )
        )
        assert ticket in self.ledger.answers, "a command without an answer"

    def _lease(self, ticket: int, until: float | None) -> ev.LeaseChanged:
        rng = self.rng
        leased, waits = rng.random() < 0.5, rng.choice([None, True, False])
        name = rng.choice(["", "0", "1"])
        return ev.LeaseChanged(ticket, leased, until, waits=waits, id=name, renew=leased and rng.random() < 0.3)

    def replace(self) -> None:
        rng = self.rng
        for name in list(self.specs):
            if rng.random() < 0.2 and len(self.specs) > 1:
                del self.specs[name]
            elif rng.random() < 0.2:
                self.specs[name] = self._spec(name)
        if rng.random() < 0.3:
            name = rng.choice(self.names)
            self.specs.setdefault(name, self._spec(name))
        if self.capacity and rng.random() < 0.3:
            self.rules_capacity = rng.choice([None, 5, 10, 16, {"0": 4, "1": 8}, {"0": 12, "1": 8}])
        if rng.random() < 0.2:
            self.host_memory = rng.choice([None, 4, 8, 20])
        if rng.random() < 0.1:
            self.grouped = not self.grouped
        self.rules = self._rules()
        policy = self.policy if rng.random() < 0.5 else WildPolicy(self)
        guesses = {name: (rng.choice([None, 3.0]), None) for name in self.specs}
        policy = self._with_shadows(policy)
        turns = self.ledger.order if self.classes else None
        if turns is not None:
            policy = FairPolicy(policy, turns)
        self.feed(ev.ConfigReplaced(list(self.specs.values()), self.rules, policy, guesses, turns))

    def settle(self) -> None:
        """Invariant 7: with hooks that end and answers that end, every request ends."""
        ledger = self.ledger
        if not ledger.stopped and self.rng.random() < 0.1:
            self.shut_down()
        if ledger.stopped:
            self._all_ended()
            return
        self.next_ticket += 2
        lease = self.core.state.lease
        if lease is not None and (lease.until is None or self.rng.random() < 0.5):  # else it ends by itself
            self.feed(ev.LeaseChanged(self.next_ticket, leased=False))
        self.feed(ev.ManualChanged(self.next_ticket - 1, manual=False))
        for name in self.names:
            self.next_ticket += 1
            self.feed(ev.PinChanged(name, self.next_ticket, pinned=False))
        for _ in range(5000):
            leased = ledger.leased and not ledger.core.state.stopping
            waiting = ledger.queued or ledger.riding
            if not waiting and not ledger.in_flight and not ledger.hooks and not leased:
                break
            if ledger.hooks:
                self.end_hook(self.rng.choice(list(ledger.hooks)), ok=True)
            elif ledger.in_flight:
                self.now += 0.1
                self.feed(ev.RequestFinished(next(iter(ledger.in_flight))))
            else:
                assert self.wait(), "wedged: nothing will ever happen"
        self._all_ended()

    def _all_ended(self) -> None:
        ledger, s = self.ledger, self.core.state
        assert not ledger.queued, f"left waiting for ever: {ledger.queued}"
        assert not ledger.riding, f"left riding for ever: {ledger.riding}"
        assert not ledger.in_flight
        assert ledger.done == set(range(1, self.next_request + 1)), "invariant 2: a request without an end"
        assert ledger.stopped == s.stopping
        assert s.stopping or not ledger.leased, "a lease that never ends"
        if s.stopping:
            assert self.core.next_deadline() is None
            if s.ready and s.rules.sleep_on_exit and not any(s.in_phase(Phase.UNKNOWN)):
                assert not any(s.in_phase(Phase.AWAKE, Phase.LOST, Phase.FAULTED)), "left awake"


def walk(seed: int, steps: int, *, classes: bool = False) -> None:
    """Walk, and tell seed and story if it goes wrong."""
    world = None
    try:
        world = World(random.Random(seed), classes=classes)
        for _ in range(steps):
            world.step()
        world.settle()
    except Exception as error:
        story = world.ledger.timeline.story() if world else ""
        raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}\n{story[-3000:]}") from error


def one_by_one(s, model, now):
    """Return when a model's turn begins, and after which: reckoned for it alone, as it looks at ``now``."""
    own, under_way = model.oldest(), s.switch.target if s.switch is not None else None
    earlier = [
        (oldest.arrived, other.order, other)
        for other in s.models.values()
        if other is not model and other is not under_way and other.phase is not Phase.AWAKE
        if (oldest := other.oldest()) is not None and (own is None or oldest.arrived < own.arrived)
    ]
    seconds, before = wait_estimate._first(s, now)
    for _, _, other in sorted(earlier, key=lambda entry: entry[:2]):
        seconds += wait_estimate._switch(s, before, other, now) + wait_estimate._turn(s, other)
        before = other
    return seconds, before
