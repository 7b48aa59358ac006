"""The three machines of the core as tables, ``(state, trigger) → (next state, why)``, and their errors.

- ``PHASES``: where a model stands between the request queue and the GPU;
- ``STAGES``: how far the switch under way has come;
- ``STEPS``: how one model is taken off the GPU.

What acts names what has happened; the table alone says what follows. ``State.move``, ``switching.move`` and
``teardown.step_ended`` alone look into them, and what belongs to a state is done as it is entered or left.
``diagram()`` draws each for the documentation. What the core raises is only ever a programming error of the shell
or of the core itself.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TypeVar


class CoreError(Exception):
    """The core was driven against its rules. ``story`` holds its recent events, as a pasteable playbook."""

    story: str = ""

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text}\n{self.story}" if self.story else text


class InvalidTransitionError(CoreError):
    """A phase was to follow another that it may not follow."""


class InvalidEventError(CoreError):
    """An event speaks of a request or a hook that does not exist, or came twice."""


class Phase(enum.StrEnum):
    """Where a model stands between the request queue and the GPU."""

    UNKNOWN = "unknown"  # until its first alive has ended
    ASLEEP = "asleep"
    WAKING = "waking"
    AWAKE = "awake"
    DRAINING = "draining"
    DEEPENING = "deepening"  # asleep, and its sleep hook runs again: host memory is short
    SLEEPING = "sleeping"  # sleep, stop, verify, and the cleanup after a failure
    LOST = "lost"  # the engine is gone, cleanup is owed
    FAULTED = "faulted"  # a sleep failed: it is not known what holds the GPU


# In these phases a model holds the GPU, as far as can be known.
HOLDING = frozenset(
    {Phase.UNKNOWN, Phase.WAKING, Phase.AWAKE, Phase.DRAINING, Phase.SLEEPING, Phase.LOST, Phase.FAULTED}
)


class Trigger(enum.StrEnum):
    """What happens to a model."""

    ADOPT = "adopt"
    NOT_ALIVE = "not alive"
    MISSING = "missing"
    WAKE = "wake"
    WOKEN = "woken"
    DEEPEN = "deepen"
    DEEPENED = "deepened"
    DRAIN = "drain"
    REOPEN = "reopen"
    LOSE = "lose"
    ABANDON = "abandon"
    SLEEP = "sleep"
    SLEPT = "slept"
    STILL_RUNS = "still runs"
    ANSWERS = "answers"
    UNCLEAR = "unclear"
    RESET = "reset"


PHASES: Mapping[tuple[Phase, Trigger], tuple[Phase, str]] = {
    (Phase.UNKNOWN, Trigger.ADOPT): (Phase.AWAKE, "alive: adopted"),
    (Phase.UNKNOWN, Trigger.NOT_ALIVE): (Phase.ASLEEP, "not alive"),
    (Phase.UNKNOWN, Trigger.MISSING): (Phase.LOST, "not alive, but the state file says it may hold the GPU"),
    (Phase.ASLEEP, Trigger.WAKE): (Phase.WAKING, "wake hook starts"),
    (Phase.ASLEEP, Trigger.DEEPEN): (Phase.DEEPENING, "host memory is short: deeper"),
    (Phase.DEEPENING, Trigger.DEEPENED): (Phase.ASLEEP, "sleep hook ended"),
    (Phase.WAKING, Trigger.WOKEN): (Phase.AWAKE, "wake succeeded"),
    (Phase.WAKING, Trigger.SLEEP): (Phase.SLEEPING, "wake failed: cleanup"),
    (Phase.WAKING, Trigger.ABANDON): (Phase.LOST, "wake ended, cleanup has to wait"),
    (Phase.AWAKE, Trigger.DRAIN): (Phase.DRAINING, "has to leave"),
    (Phase.AWAKE, Trigger.LOSE): (Phase.LOST, "engine gone"),
    (Phase.DRAINING, Trigger.SLEEP): (Phase.SLEEPING, "drained: sleep hook starts"),
    (Phase.DRAINING, Trigger.REOPEN): (Phase.AWAKE, "cancelled: reopened"),
    (Phase.DRAINING, Trigger.LOSE): (Phase.LOST, "engine gone"),
    (Phase.SLEEPING, Trigger.SLEPT): (Phase.ASLEEP, "sleep (or stop) succeeded, verify passed"),
    (Phase.SLEEPING, Trigger.STILL_RUNS): (Phase.AWAKE, "sleep failed, engine still runs"),
    (Phase.SLEEPING, Trigger.ANSWERS): (Phase.AWAKE, "wake and cleanup failed, yet the engine answers"),
    (Phase.SLEEPING, Trigger.UNCLEAR): (Phase.FAULTED, "sleep failed, engine does not answer"),
    (Phase.LOST, Trigger.WAKE): (Phase.WAKING, "its own request"),
    (Phase.LOST, Trigger.SLEEP): (Phase.SLEEPING, "cleanup"),
    (Phase.LOST, Trigger.RESET): (Phase.ASLEEP, "reset"),
    (Phase.FAULTED, Trigger.SLEEP): (Phase.SLEEPING, "next try"),
    (Phase.FAULTED, Trigger.RESET): (Phase.ASLEEP, "reset"),
}


class Stage(enum.StrEnum):
    """How far a switch has come; the value is the ``phase`` in ``/llmux/status``, or how the switch ended."""

    DRAINING = "draining"
    SLEEPING = "sleeping"
    WAKING = "waking"
    CLEANUP = "cleanup"
    SUCCESS = "success"
    ABANDONED = "abandoned"
    FAILURE = "failure"


ENDS = frozenset({Stage.SUCCESS, Stage.ABANDONED, Stage.FAILURE})


class Turn(enum.StrEnum):
    """What happens to a switch."""

    DRAINED = "drained"
    FREE = "free"
    CALLED_OFF = "called off"
    SLEPT = "slept"
    PUT_AWAY = "put away"
    NOT_WANTED = "not wanted"
    WOULD_NOT_SLEEP = "would not sleep"
    WOKEN = "woken"
    WOULD_NOT_WAKE = "would not wake"
    CLEANED_UP = "cleaned up"
    STOPPING = "stopping"


STAGES: Mapping[tuple[Stage, Turn], tuple[Stage, str]] = {
    (Stage.DRAINING, Turn.DRAINED): (Stage.SLEEPING, "all that leaves has drained"),
    (Stage.DRAINING, Turn.FREE): (Stage.WAKING, "nothing has to leave"),
    (Stage.DRAINING, Turn.CALLED_OFF): (Stage.ABANDONED, "no request waits for it any more"),
    (Stage.SLEEPING, Turn.SLEPT): (Stage.WAKING, "all that leaves is asleep"),
    (Stage.SLEEPING, Turn.PUT_AWAY): (Stage.SUCCESS, "all is asleep, and there is nothing to wake"),
    (Stage.SLEEPING, Turn.NOT_WANTED): (Stage.ABANDONED, "no request waits for it any more"),
    (Stage.SLEEPING, Turn.WOULD_NOT_SLEEP): (Stage.FAILURE, "something would not sleep"),
    (Stage.SLEEPING, Turn.STOPPING): (Stage.ABANDONED, "llmux stops"),
    (Stage.WAKING, Turn.WOKEN): (Stage.SUCCESS, "the target is awake"),
    (Stage.WAKING, Turn.WOULD_NOT_WAKE): (Stage.CLEANUP, "the wake hook failed"),
    (Stage.WAKING, Turn.STOPPING): (Stage.ABANDONED, "llmux stops"),
    (Stage.CLEANUP, Turn.CLEANED_UP): (Stage.FAILURE, "the cleanup is over, or has to wait for answers"),
    (Stage.CLEANUP, Turn.STOPPING): (Stage.ABANDONED, "llmux stops"),
}


class Step(enum.StrEnum):
    """The steps by which a model leaves the GPU, which are hooks, and what comes of them."""

    SLEEP = "sleep"
    VERIFY = "verify"
    STOP = "stop"
    ALIVE = "alive"
    ASLEEP = "asleep"
    RUNNING = "running"
    FAULTED = "faulted"


class Finding(enum.StrEnum):
    """What a step has shown."""

    OK = "ok"
    OK_UNVERIFIED = "ok, to be verified"
    NOT_YET = "not yet"
    FAILED = "failed"
    FAILED_STOPPABLE = "failed, stop is left"
    DEAD = "not alive"
    DEAD_UNVERIFIED = "not alive, to be verified"
    DEAD_ASSUMED = "not alive, several times"


STEPS: Mapping[tuple[Step, Finding], tuple[Step, str]] = {
    (Step.SLEEP, Finding.OK): (Step.ASLEEP, "sleep succeeded, there is no verify"),
    (Step.SLEEP, Finding.OK_UNVERIFIED): (Step.VERIFY, "sleep succeeded"),
    (Step.SLEEP, Finding.FAILED_STOPPABLE): (Step.STOP, "sleep failed"),
    (Step.SLEEP, Finding.FAILED): (Step.ALIVE, "sleep failed, there is no stop"),
    (Step.VERIFY, Finding.OK): (Step.ASLEEP, "verify passed"),
    (Step.VERIFY, Finding.NOT_YET): (Step.VERIFY, "again in half a second, until its timeout"),
    (Step.VERIFY, Finding.FAILED_STOPPABLE): (Step.STOP, "verify never passed"),
    (Step.VERIFY, Finding.FAILED): (Step.ALIVE, "verify never passed, stop was tried or is not there"),
    (Step.STOP, Finding.OK): (Step.ASLEEP, "stop succeeded, there is no verify"),
    (Step.STOP, Finding.OK_UNVERIFIED): (Step.VERIFY, "stop succeeded"),
    (Step.STOP, Finding.FAILED): (Step.ALIVE, "stop failed"),
    (Step.ALIVE, Finding.OK): (Step.RUNNING, "the engine answers: awake again, and served"),
    (Step.ALIVE, Finding.DEAD): (Step.FAULTED, "it does not answer: it is not known what holds the GPU"),
    (Step.ALIVE, Finding.DEAD_UNVERIFIED): (Step.VERIFY, "a cleanup, and verify has not been asked"),
    (Step.ALIVE, Finding.DEAD_ASSUMED): (
        Step.ASLEEP,
        "a cleanup, with neither verify nor stop: several tries over a minute",
    ),
}

S = TypeVar("S", bound=enum.StrEnum)
T = TypeVar("T", bound=enum.StrEnum)


def following(table: Mapping[tuple[S, T], tuple[S, str]], what: str, state: S, trigger: T) -> tuple[S, str]:
    """Return what the table says follows for ``what``, and why; InvalidTransitionError if it says nothing."""
    row = table.get((state, trigger))
    if row is None:
        raise InvalidTransitionError(f"{what}: {state.name} knows no {trigger.name}")
    return row
