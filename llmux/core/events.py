"""What happens to the core, in the past tense.

The shell builds these from sockets, processes, signals and the clock, and hands each to ``Core.handle``
with the time at which it is handled. Request ids, tickets and hook ids are the shell's own positive integers,
except hook ids, which the core gives out in ``RunHook``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llmux.core.model import Lease, Pin
from llmux.core.policy import Policy
from llmux.core.spec import ModelSpec, Rules
from llmux.core.state import Turns


class Event:
    """Something that has happened."""

    __slots__ = ()


@dataclass(slots=True)
class Started(Event):
    """llmux has started and its port is bound.

    ``holders`` are the models that may hold the GPU according to the state file, ``recent`` the models in the
    order of their last use, most recent first, ``gone`` the definitions of holders that are configured no more:
    they are put to sleep as removed models are. ``levels`` are the levels at which models slept. What operators
    had asked of the last llmux is in ``pins``, ``lease`` and ``manual`` (None: as configured).
    """

    holders: frozenset[str] = frozenset()
    recent: tuple[str, ...] = ()
    gone: tuple[ModelSpec, ...] = ()
    levels: Mapping[str, str] = field(default_factory=dict)
    pins: Mapping[str, Pin] = field(default_factory=dict)
    lease: Lease | None = None
    manual: bool | None = None


@dataclass(slots=True)
class RequestArrived(Event):
    """A request that names ``model`` (its canonical name, no alias) wants in.

    It is rejected if ``deadline`` seconds are too short for its answer. For ``rides`` seconds it causes no switch,
    and is served only if there is room for it anyway. Fairness goes by ``key``.
    """

    request: int
    model: str
    rides: float | None = None
    deadline: float | None = None
    key: str = ""


@dataclass(slots=True)
class RidesEnded(Event):
    """From now on all that rides along may cause a switch; it waits as if it had just arrived."""


@dataclass(slots=True)
class RequestAbandoned(Event):
    """The client left; queued or in flight, the request is over."""

    request: int


@dataclass(slots=True)
class RequestReturned(Event):
    """An admitted request found its engine dead before anything was sent; it wants to be queued again.

    ``connected`` says whether any connection to this engine was ever accepted since it was woken.
    """

    request: int
    connected: bool = True


@dataclass(slots=True)
class RequestFinished(Event):
    """The last byte of an admitted request's answer is out, or it failed; the engine is done with it.

    ``keep`` replaces the model's ``idle_sleep`` until it is woken again (negative: never sleep; None: as before).
    """

    request: int
    keep: float | None = None


@dataclass(slots=True)
class HookFinished(Event):
    """A hook's process has ended (or could not be started).

    ``detail`` is for people: how it ended and the tail of what it printed. ``last_byte`` is when a response
    of the model's engine last delivered a byte, None if never; it is read for ``alive`` only.
    """

    hook: int
    ok: bool
    detail: str = ""
    last_byte: float | None = None


@dataclass(slots=True)
class EngineLost(Event):
    """A connection to the model's engine was refused, or broke off while it was serving.

    It is a suspicion: the core has ``alive`` confirm it.
    """

    model: str
    refused: bool = False


@dataclass(slots=True)
class ActivationRequested(Event):
    """An operator wants the model awake. ``ticket`` comes back in ``Answer``."""

    model: str
    ticket: int


@dataclass(slots=True)
class SleepRequested(Event):
    """An operator wants the model asleep."""

    model: str
    ticket: int


@dataclass(slots=True)
class ResetRequested(Event):
    """An operator has repaired the model by hand: clear its backoff, and its fault."""

    model: str
    ticket: int


@dataclass(slots=True)
class PinChanged(Event):
    """The model is pinned until ``until`` (None: until unpinned), or unpinned (``pinned=False``)."""

    model: str
    ticket: int
    pinned: bool = True
    until: float | None = None
    reason: str = ""


@dataclass(slots=True)
class LeaseChanged(Event):
    """The whole GPU is lent to a foreign job until ``until`` (None: until ended), or given back.

    ``id`` is the lease's name; with ``renew`` it must be that of the lease that is there. ``waits`` says whether
    requests wait for its end (None: as the rules say). ``leased=False`` without ``id`` ends any lease.
    """

    ticket: int
    leased: bool = True
    until: float | None = None
    reason: str = ""
    waits: bool | None = None
    id: str = ""
    renew: bool = False


@dataclass(slots=True)
class ManualChanged(Event):
    """From now on operators alone switch (``manual``), or the policy does again."""

    ticket: int
    manual: bool = True


@dataclass(slots=True)
class ConfigReplaced(Event):
    """A new configuration is in force."""

    models: Sequence[ModelSpec]
    rules: Rules
    policy: Policy
    first_guesses: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    turns: Turns | None = None  # says which of a model's waiters is let in next; None: the oldest


@dataclass(slots=True)
class PolicyChosen(Event):
    """Of the policies that ``use: auto`` chooses among, ``name`` decides from now on; ``reason`` is in words."""

    name: str
    reason: str = ""


@dataclass(slots=True)
class DeadlineReached(Event):
    """The time that ``next_deadline()`` named has come."""


@dataclass(slots=True)
class ShutdownRequested(Event):
    """Stop: no new admissions, let streams finish within the grace."""
