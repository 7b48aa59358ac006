"""How long requests will have to wait: an estimate, from what switches and answers have taken so far. Pure.

The time until a model is awake is the sum of

- the rest of the switch under way (of its drain and its expected cost), or of a lease. A lease without an end
  counts as a minute, as does the wait for an operator in manual mode;
- the turns of the other models with waiting requests, the longest waiting first, as if the policy were `fifo`:
  each is a switch, and the answers to those that wait there now (at least ``min_active``);
- the drain of the models that leave (at least the rest of their ``min_active``) and the switch's expected cost.

A drain takes as long as the mean answer, less the time that the youngest one in flight has run. If a model takes
only so many at once, further requests wait for as many answers as there are rounds before theirs. It leaves out
other decisions of a policy, failures, and later arrivals; no estimate is kept, so each is computed from scratch.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence

from llmux.config.setting_types import format_duration
from llmux.core import admission, levels, residency
from llmux.core.effects import Refusal
from llmux.core.model import Model, Switch
from llmux.core.phases import Phase, Stage
from llmux.core.spec import HookKind
from llmux.core.state import Block, State


class Turns:
    """Whose turn comes when, as it looks at ``now``: reckoned once, however many models are asked about."""

    def __init__(self, s: State, now: float) -> None:
        self._arrived: list[float] = []  # of the oldest waiter of each that has a turn, in their order
        self._before = [_first(s, now)]  # seconds until the turn of each begins, and what is awake by then
        under_way = s.switch.target if s.switch is not None else None
        for model in residency.waiting_models(s):
            if model is not under_way and (oldest := model.oldest()) is not None:
                seconds, before = self._before[-1]
                self._arrived.append(oldest.arrived)
                self._before.append((seconds + (_switch(s, before, model, now) + _turn(s, model)), model))

    def until(self, model: Model) -> tuple[float, Model | None]:
        """Return the seconds until a switch to it begins, and what is awake by then, if not the present one."""
        own = model.oldest()
        return self._before[-1 if own is None else bisect_left(self._arrived, own.arrived)]


def until_awake(s: State, model: Model, now: float, turns: Turns | None = None) -> float:
    """Return the seconds until ``model`` is awake for the requests which wait for it, as it looks at ``now``."""
    if model.phase is Phase.AWAKE and s.lease is None:
        return 0.0
    if s.switch is not None and s.switch.target is model:
        return _rest(s, s.switch, now)
    seconds, before = (turns or Turns(s, now)).until(model)
    return seconds + _switch(s, before, model, now)


def _first(s: State, now: float) -> tuple[float, Model | None]:
    """Return the seconds until the first turn begins, and what is awake by then, if not the present one."""
    switch, seconds = s.switch, 0.0
    before: Model | None = None
    if switch is not None:
        seconds = _rest(s, switch, now)
        if switch.target is not None:
            before = switch.target
            seconds += _turn(s, before)
    if s.lease is not None and s.lease.until is not None:
        seconds = max(seconds, s.lease.until - now)
    elif s.lease is not None or s.manual:
        seconds = max(seconds, admission.OPEN_END)
    return seconds, before


def in_queue(model: Model, position: int) -> float:
    """Return the seconds that the request at ``position`` (from 1 on) waits for others once its model is awake."""
    limit = model.spec.max_in_flight
    if limit is None:
        return 0.0
    if model.phase is Phase.AWAKE:  # all places are taken, and become free one after the other
        return model.meter.service * position / limit
    return model.meter.service * ((position - 1) // limit)


def for_a_newcomer(s: State, model: Model, now: float, turns: Turns | None = None) -> float | None:
    """Return how long a request arriving at ``now`` would wait; None if it would be rejected."""
    if admission.is_open(s, model):
        return 0.0
    if admission.blocked(s, model) is not None or len(model.queue) >= model.spec.max_queued:
        return None
    return until_awake(s, model, now, turns) + in_queue(model, len(model.queue) + 1)


def rest_of_switch(s: State, now: float) -> float:
    """Return how long the switch under way still takes, its drain included; 0 when there is none."""
    return 0.0 if s.switch is None else _rest(s, s.switch, now)


def too_late(s: State, model: Model, deadline: float) -> Block | None:
    """Say why a request arriving now is rejected, if it would be answered too late.

    That is when the expected wait and the mean of the model's answers are longer than ``deadline``.
    """
    wait, service = for_a_newcomer(s, model, s.now), model.meter.service
    if wait is None or wait + service <= deadline:  # None: it is refused for another reason
        return None
    message = (
        f"An answer of {model.name!r} cannot be had within {format_duration(deadline)}: a request waits about"
        f" {format_duration(round(wait, 1))}, and is answered in {format_duration(round(service, 1))}."
    )
    return Refusal.DEADLINE, message, max(1.0, wait + service - deadline)


def _turn(s: State, model: Model) -> float:
    """Return how long the answers to a model's waiting requests take."""
    waiting, limit = len(model.queue), model.spec.max_in_flight
    rounds = math.ceil(waiting / limit) if limit is not None else min(1, waiting)
    return max(s.rules.min_active, model.meter.service * rounds)


def _switch(s: State, before: Model | None, target: Model, now: float) -> float:
    """Return what a switch takes if ``before`` was served last; None: from the present state."""
    if before is not None:
        return residency.switch_cost(s, [before], target)
    leaving = residency.who_leaves(s, target) or ()
    held = [
        model.awake_since + s.rules.min_active - now
        for model in leaving
        if model.phase is Phase.AWAKE and model.awake_since is not None
    ]
    return max(0.0, *held, _drain(s, leaving, now)) + residency.switch_cost(s, leaving, target)


def _drain(s: State, leaving: Iterable[Model], now: float) -> float:
    longest = max((_youngest(model, now) for model in leaving), default=0.0)
    timeout = s.rules.drain_timeout
    return longest if timeout is None else min(longest, timeout)


def _youngest(model: Model, now: float) -> float:
    """Return how long the youngest answer in flight may still take."""
    request = next(reversed(model.in_flight.values()), None)
    if request is None or request.admitted is None:
        return 0.0
    return max(0.0, model.meter.service - (now - request.admitted))


def _rest(s: State, switch: Switch, now: float) -> float:
    """Return how long the switch under way still takes."""
    if switch.stage is Stage.DRAINING:
        return _drain(s, switch.leaving, now) + _cost(s, switch.leaving, switch.target)
    if switch.stage is Stage.SLEEPING:
        return max(
            0.0,
            _cost(s, switch.leaving, switch.target) - (now - (now if switch.drained is None else switch.drained)),
        )
    target = switch.target
    if switch.stage is Stage.WAKING and target is not None:
        level = target.level.name if target.level is not None else ""
        wakes = (run.started for run in s.hooks.values() if run.model is target and run.kind is HookKind.WAKE)
        began = next(wakes, now)
        return max(0.0, s.costs.wake_of(target.name, level) - (now - began))
    return 0.0


def _cost(s: State, leaving: Sequence[Model], target: Model | None) -> float:
    if target is not None:
        return residency.switch_cost(s, leaving, target)
    return max(s.costs.sleep_of(model.name, levels.lightest(model)) for model in leaving)
