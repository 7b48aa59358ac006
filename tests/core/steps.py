"""What happens in most steps of a playbook, said shortly: an event, a reply to a hook, an effect.

    at(1.0, asks(1, "b"), queued(1, "b"), begins("b", "a"), leaves("a", 1.0)),
    at(2.0, failed("sleep a", "exited with 1"), unslept("a", "sleep exited with 1"), run("alive a")),

Each stands for the whole event or the whole effects, and nothing less is compared. What the playbook knows by
itself is filled in: the number of the hook that is replied to, or of the next one; and the switch that the step is
in, with where it comes from and leads to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from unittest.mock import ANY

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.spec import HookKind, ModelSpec, Rules


class Moment:
    """What a playbook knows when a step begins; the effects of the step go on from there."""

    def __init__(self) -> None:
        self.hooks: dict[int, fx.RunHook] = {}  # under way
        self.last_hook = 0
        self.switch = fx.SwitchStarted(0, (), None, "")  # the last that has begun

    @property
    def route(self) -> tuple[int, tuple[str, ...], str | None]:
        return self.switch.switch, self.switch.sources, self.switch.to

    def hook(self, kind: HookKind, model: str) -> int:
        """Return the number of a hook under way: of the last, where one that was killed has not ended yet."""
        return max(number for number, run in self.hooks.items() if (run.kind, run.model) == (kind, model))

    def learn(self, effect: fx.Effect) -> None:
        if isinstance(effect, fx.RunHook):
            self.last_hook = effect.hook
            self.hooks[effect.hook] = effect
        elif isinstance(effect, fx.SwitchStarted):
            self.switch = effect

    def forget(self, event: ev.Event) -> None:
        if isinstance(event, ev.HookFinished):
            self.hooks.pop(event.hook, None)

    def expect(self, parts: Iterable[Part]) -> list[fx.Effect]:
        """Return the effects that the parts of a step stand for."""
        effects: list[fx.Effect] = []
        for part in parts:
            for effect in part(self) if callable(part) else (part,):
                self.learn(effect)
                effects.append(effect)
        return effects


__all__ = [
    "accepted",
    "admitted",
    "adopted",
    "again",
    "alone",
    "asks",
    "awake",
    "backs_off",
    "begins",
    "drained",
    "ends",
    "failed",
    "fails",
    "faults",
    "holders",
    "leaves",
    "lost",
    "ok",
    "queued",
    "refused",
    "replaced",
    "run",
    "sleeps",
    "unslept",
    "wakes",
]

Reply = Callable[[Moment], ev.Event]
Part = fx.Effect | Callable[[Moment], Iterable[fx.Effect]]


def asks(request: int, model: str) -> ev.RequestArrived:
    return ev.RequestArrived(request, model)


def replaced(specs: Iterable[ModelSpec], **rules: Any) -> ev.ConfigReplaced:
    """A new configuration, with the policy as it was."""
    return ev.ConfigReplaced(specs, Rules(**rules), ANY)


def ok(hook: str, last_byte: float | None = None) -> Reply:
    """``hook``, as "sleep a", has succeeded."""
    return lambda now: ev.HookFinished(now.hook(*_named(hook)), ok=True, last_byte=last_byte)


def failed(hook: str, detail: str = "", last_byte: float | None = None) -> Reply:
    return lambda now: ev.HookFinished(now.hook(*_named(hook)), ok=False, detail=detail, last_byte=last_byte)


def _named(hook: str) -> tuple[HookKind, str]:
    kind, _, model = hook.partition(" ")
    return HookKind(kind), model


# ---- requests


def queued(request: int, model: str, depth: int = 1) -> fx.RequestQueued:
    return fx.RequestQueued(request, model, depth)


def admitted(request: int, model: str, waited: float = 0.0, *, epoch: int = 1, of: Any = None) -> fx.Admit:
    return fx.Admit(request, model, of, epoch, returned=False, waited=waited)


def refused(
    request: int, model: str, why: str, message: str, retry_after: float | None = None, waited: float = 0.0
) -> fx.Reject:
    return fx.Reject(request, model, fx.Refusal(why), message, retry_after, waited)


# ---- hooks


def run(hook: str, of: Any = None, level: str = "") -> Part:
    """Run a hook of the switch under way."""
    kind, model = _named(hook)

    def effects(now: Moment) -> Iterable[fx.Effect]:
        switch = now.switch
        yield fx.RunHook(now.last_hook + 1, model, kind, of, switch.switch, switch.sources, switch.to or "", level)

    return effects


def alone(hook: str, of: Any = None, level: str = "") -> Part:
    """Run a hook outside of any switch: a look at an engine, a cleanup."""
    kind, model = _named(hook)
    return lambda now: [fx.RunHook(now.last_hook + 1, model, kind, of, level=level)]


def leaves(model: str, active: float) -> Part:
    """A model is drained at once, and leaves the GPU: it had it for so many seconds."""
    return _all(drained(), sleeps(model, active))


def sleeps(model: str, active: float) -> Part:
    """A model leaves the GPU: it had it for so many seconds."""
    return _all(fx.ModelDeactivated(model, active), run(f"sleep {model}"))


def wakes(model: str, *holders: str) -> Part:
    """A model wakes; ``holders`` may hold the GPU beside it."""
    return _all(fx.RecordHolders(frozenset({model, *holders})), run(f"wake {model}"))


def holders(*models: str) -> fx.RecordHolders:
    return fx.RecordHolders(frozenset(models))


# ---- switches


def begins(to: str | None, *sources: str, why: str = "policy") -> Part:
    """A switch begins: the policy decided it, or it has another reason."""

    def effects(now: Moment) -> Iterable[fx.Effect]:
        if why == "policy":
            yield fx.PolicyDecided("switch", to, "")
        yield fx.SwitchStarted(now.switch.switch + 1, sources, to, why)

    return effects


def drained(seconds: float = 0.0) -> Part:
    return lambda now: [fx.SwitchDrained(*now.route, seconds)]


def awake(model: str, duration: float | None = None) -> Part:
    """A model is awake, in the switch under way."""
    return lambda now: [fx.ModelActivated(model, *now.route[:2], duration)]


def again(model: str) -> Part:
    """A model that should have left is awake again."""
    return lambda now: [fx.ModelActivated(model, now.switch.switch, (), None)]


def adopted(model: str) -> fx.ModelActivated:
    """A model is found awake, without a switch."""
    return fx.ModelActivated(model, 0, (), None)


def ends(
    duration: float,
    drain: float = 0.0,
    cost: float | None = None,
    estimate: float | None = None,
    result: str = "success",
) -> Part:
    return lambda now: [fx.SwitchEnded(*now.route, result, duration, drain, cost, estimate)]


def fails(error: str, duration: float, drain: float = 0.0) -> Part:
    """The switch fails."""
    return lambda now: [
        fx.SwitchFailed(*now.route, error),
        fx.SwitchEnded(*now.route, "failure", duration, drain, None, None),
    ]


def unslept(model: str, error: str) -> Part:
    """The sleep hook of a model has failed."""
    return lambda now: [fx.SleepHookFailed(model, now.route[2], error)]


def backs_off(hook: str, error: str, failures: int = 1, seconds: float = 1.0) -> fx.BackoffStarted:
    kind, model = _named(hook)
    return fx.BackoffStarted(model, kind, failures, seconds, error)


def lost(model: str, error: str, active: float | None = None) -> Part:
    """An engine is gone; ``active``: its model had the GPU for so many seconds."""
    left = [] if active is None else [fx.ModelDeactivated(model, active)]
    return _all(*left, fx.ModelLost(model, error))


def faults(model: str, error: str, failures: int = 1, seconds: float = 1.0) -> Part:
    """It is not known what holds the GPU; the next try waits for the backoff."""
    return _all(fx.ModelFaulted(model, error), backs_off(f"sleep {model}", error, failures, seconds))


def accepted(ticket: int) -> Part:
    """A command is done by the switch under way."""
    return lambda now: [fx.Answer(ticket, accepted=True, switch=now.route[0])]


def _all(*parts: Part) -> Part:
    def effects(now: Moment) -> Iterable[fx.Effect]:
        for part in parts:
            yield from part(now) if callable(part) else (part,)

    return effects
