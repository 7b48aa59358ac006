"""Invariant 6 in numbers: what a waiter waits at most, whatever the policy says."""

from __future__ import annotations

import heapq
import itertools
import random

import pytest
from ledger import Ledger
from playbook import models

from llmux.core import Core
from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.policy import Stay, SwitchTo, WaitUntil
from llmux.core.spec import HookKind, Rules
from llmux.estimates import Estimates

SERVICE, SLEEP, WAKE, ALIVE = 4.0, 2.0, 5.0, 0.5
SWITCH = SERVICE + SLEEP + WAKE
TOOK = {HookKind.SLEEP: SLEEP, HookKind.WAKE: WAKE, HookKind.ALIVE: ALIVE}


class Stubborn:
    def decide(self, _now):
        return Stay()


class Favourite:
    def decide(self, now):
        return SwitchTo("m0") if "m0" in now.waiting else Stay()


class Youngest:
    def decide(self, now):
        return SwitchTo(now.waiting[-1])


class Later:
    def decide(self, now):
        return WaitUntil(now.time + 1e9)


def longest_wait(policy, count, rules, seconds, seed):
    """Let clients arrive for a while, with hooks and answers that end; return who waited longest."""
    rng, order = random.Random(seed), itertools.count()
    core = Core(models(*(f"m{number}" for number in range(count))), rules, policy, Estimates())
    ledger = Ledger(core)
    due = [(0.0, 0, ev.Started())]
    for number in range(count):
        time = 0.0
        while (time := time + rng.expovariate(rng.choice([0.1, 1.0]))) < seconds:
            heapq.heappush(due, (time, next(order) + 1, number))
    waits, request = [0.0], 0
    while due or ledger.queued or ledger.in_flight:
        deadline = core.next_deadline()
        if deadline is not None and (not due or deadline <= due[0][0]):
            now, event = max(deadline, ledger.now), ev.DeadlineReached()
        else:
            now, _, event = heapq.heappop(due)
        if isinstance(event, int):
            request += 1
            event = ev.RequestArrived(request, f"m{event}")
        for effect in ledger.feed(event, now):
            if isinstance(effect, fx.Admit):
                waits.append(effect.waited)
                end = now + rng.uniform(0.0, SERVICE)
                heapq.heappush(due, (end, next(order), ev.RequestFinished(effect.request)))
            elif isinstance(effect, fx.RunHook):
                heapq.heappush(due, (now + TOOK[effect.kind], next(order), ev.HookFinished(effect.hook, ok=True)))
            assert not isinstance(effect, fx.Reject)
    return max(waits)


@pytest.mark.parametrize("policy", [Stubborn, Favourite, Youngest, Later])
def test_nobody_waits_longer_than_the_bound(policy) -> None:
    rules = Rules(max_wait=20.0, min_active=1000.0)
    bound = rules.max_wait + SWITCH + 4 * SWITCH
    assert 0 < longest_wait(policy(), 4, rules, 200.0, seed=7) <= bound
