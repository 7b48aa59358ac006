"""Playbooks: given these events at these times, exactly these effects. Every step goes through the ledger.

    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        …
    )

``steps`` has short words for events and effects. A ``Story`` prints steps with the events and effects themselves,
which a playbook takes as well; ``ANY`` stands for what only the shell could have made.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple
from unittest.mock import ANY

from ledger import Ledger
from steps import Moment, Part, Reply

from llmux.core import Core
from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.policy import SwitchTo, WaitUntil
from llmux.core.spec import DEFAULT_TIMEOUTS, HookKind, ModelSpec, Rules
from llmux.estimates import Estimates
from llmux.observability.timeline import EXPLAIN, as_python

THREE = frozenset({HookKind.WAKE, HookKind.SLEEP, HookKind.ALIVE})


def unexplained(made: Sequence[fx.Effect]) -> list[fx.Effect]:
    """Return the effects that a playbook tells: those that only explain others are left out."""
    return [effect for effect in made if effect.__class__ not in EXPLAIN]


class Oldest:
    """First come, first served."""

    def decide(self, now: Any) -> SwitchTo:
        return SwitchTo(now.waiting[0])


class Later:
    """Never, as good as."""

    def decide(self, now: Any) -> WaitUntil:
        return WaitUntil(now.time + 1e9)


class Mute:
    """Has no answer."""

    def decide(self, _now: Any) -> None:
        return None


class Step(NamedTuple):
    time: float
    event: ev.Event | Reply
    effects: tuple[Part, ...]


def at(time: float, event: ev.Event | Reply, *effects: Part) -> Step:
    """One step of a playbook."""
    return Step(time, event, effects)


def models(
    *names: str, verify: bool = False, stop: bool = False, prefetch: bool = False, **fields: Any
) -> list[ModelSpec]:
    """Specs that differ by name only."""
    optional = ((HookKind.VERIFY, verify), (HookKind.STOP, stop), (HookKind.PREFETCH, prefetch))
    extra = {kind for kind, given in optional if given}
    timeouts = {**DEFAULT_TIMEOUTS, **fields.pop("timeouts", {})}
    return [ModelSpec(name, hooks=THREE | extra, timeouts=timeouts, **fields) for name in names]


class Playbook:
    """A core with its ledger, to be called with steps."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.ledger = Ledger(core)
        self.moment = Moment()

    def feed(self, time: float, event: ev.Event) -> list[fx.Effect]:
        """Hand over one event."""
        if isinstance(event, ev.ConfigReplaced) and event.policy is ANY:
            event = dataclasses.replace(event, policy=self.core.state.policy)
        self.moment.forget(event)
        found = self.ledger.feed(event, time)
        for effect in found:
            self.moment.learn(effect)
        return found

    def __call__(self, *steps: Step) -> None:
        for number, step in enumerate(steps, 1):
            time, event = step.time, step.event(self.moment) if callable(step.event) else step.event
            before = copy.copy(self.moment)
            found = unexplained(self.feed(time, event))
            expected = before.expect(step.effects)
            assert found == expected, (
                f"step {number}, {as_python(event)} at {time}:\n  expected\n    "
                + "\n    ".join(map(as_python, expected))
                + "\n  found\n    "
                + "\n    ".join(map(as_python, found))
            )


def given(
    specs: Iterable[ModelSpec],
    awake: Iterable[str] = (),
    policy: Any = None,
    holders: Iterable[str] = (),
    first_guesses: Any = None,
    levels: Any = None,
    **rules: Any,
) -> Playbook:
    """Return a playbook at time 0, adoption done: ``awake`` were found running, ``holders`` were recorded."""
    core = Core(specs, Rules(**rules), policy or Oldest(), Estimates())
    core.state.costs.guesses = first_guesses or {}
    play = Playbook(core)
    awake = list(awake)
    play.feed(0.0, ev.Started(frozenset(holders), tuple(awake), levels=levels or {}))
    for hook in list(play.ledger.hooks.values()):
        play.feed(0.0, ev.HookFinished(hook.hook, hook.model in awake))
    return play
