"""The state of the core and the few ways to change it that all its rooms share."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from llmux.core.agenda import Agenda
from llmux.core.costs import SwitchCosts
from llmux.core.decisions import DecisionRecord
from llmux.core.effects import (
    Admit,
    Effect,
    KillHook,
    PolicyOverruled,
    RecordHolders,
    Refusal,
    Reject,
    RunHook,
)
from llmux.core.errors import InvalidTransitionError
from llmux.core.model import HookRun, Lease, Model, Request, Shadow, Switch
from llmux.core.phases import KEPT, TRANSITIONS, Move, Phase
from llmux.core.policy import Policy
from llmux.core.spec import HookKind, ModelSpec, Rules
from llmux.core.transitions import Transitions

if TYPE_CHECKING:
    from llmux.core.evictions import Eviction

# What may be due for a model; the agenda's keys are (what, name).
MODEL_TIMERS = ("timeout", "overdue", "idle", "probe", "verify", "wake backoff", "sleep backoff", "pin")


class State:
    """Everything the core knows. Only ``Core.handle`` and what it calls change it."""

    def __init__(
        self, models: Iterable[ModelSpec], rules: Rules, policy: Policy, jitter: Callable[[], float]
    ) -> None:
        self.now = 0.0
        self.out: list[Effect] = []
        self.rules = rules
        self.policy = policy
        self.jitter = jitter
        self.models = {spec.name: Model(spec, order) for order, spec in enumerate(models)}
        self.requests: dict[int, Request] = {}
        self.hooks: dict[int, HookRun] = {}
        self.agenda = Agenda()
        self.costs = SwitchCosts()
        self.transitions = Transitions()
        self.switch: Switch | None = None
        self.queued = 0  # over all models
        self.started = False
        self.ready = False
        self.stopping = False
        self.stopped = False
        self.errands = False  # something may be to be done that no waiter asks for
        self.foresee = False  # an answer has ended: the policy may be asked who comes next
        self.calm = False  # nobody is served or waits, and there is a default model
        self.homeward = False  # it has been calm for long enough
        self.removals = False  # a removed model is still to be forgotten
        self.lease: Lease | None = None
        self.manual = rules.manual  # operators alone switch
        self.recorded: frozenset[str] = frozenset()
        self.leveled = any(model.spec.levels for model in self.models.values())  # whether any has levels
        self.recorded_levels: dict[str, str] = {}  # before the start
        self.recent: dict[str, int] = {}  # rank of last use before the start, 0 is the most recent
        self.overruled: set[str] = set()  # complaints about this policy that were already made
        self.last_decision: tuple[str, str | None] | None = None  # that was told, since the last switch began
        self.shadows: tuple[Shadow, ...] = ()
        self.decisions: deque[DecisionRecord] | None = None  # the last ones; None: none are kept
        self.decision_ids = 0
        self.eviction: Eviction | None = None  # the last one
        self.moves: deque[Move] = deque(maxlen=KEPT)  # the last ones, oldest first
        self.move_ids = 0
        self._hook_ids = 0
        self._switch_ids = 0

    def overrule(self, complaint: str) -> None:
        """Say, once for each kind, that the policy did what cannot be followed."""
        kind = complaint.partition(" ")[0]
        if kind not in self.overruled:
            self.overruled.add(kind)
            self.out.append(PolicyOverruled(complaint))

    # ---- phases

    def move(self, model: Model, phase: Phase) -> None:
        """Bring the model into another phase, if the table allows it."""
        if phase not in TRANSITIONS[model.phase]:
            raise InvalidTransitionError(f"{model.name}: {model.phase.name} → {phase.name}")
        self.move_ids += 1
        self.moves.append(Move(self.move_ids, self.now, model.name, model.phase, phase))
        model.phase = phase

    def holders(self) -> dict[str, ModelSpec]:
        """Return the models that may hold the GPU, with the definitions in force."""
        return {name: model.running for name, model in self.models.items() if model.holds}

    def record_holders(self) -> None:
        """Have the holders written down if they changed."""
        holders = frozenset(
            name for name, model in self.models.items() if model.holds and model.phase is not Phase.UNKNOWN
        )
        if holders != self.recorded:
            self.recorded = holders
            self.out.append(RecordHolders(holders))

    def in_phase(self, *phases: Phase) -> Iterator[Model]:
        """Yield the models in one of these phases, in the order of the configuration."""
        return (model for model in self.models.values() if model.phase in phases)

    # ---- hooks

    def run_hook(self, model: Model, kind: HookKind, deadline: float | None = None) -> int:
        """Start a hook and return its id. It is ended at ``deadline``, by default after its timeout."""
        self._hook_ids += 1
        hook = self._hook_ids
        if deadline is None:
            deadline = self.now + model.running.timeouts[kind]
        self.hooks[hook] = HookRun(hook, model, kind, self.now, deadline)
        self.agenda.set(("hook", hook), deadline)
        level = model.deepening or model.level if kind is not HookKind.ALIVE else None
        name = level.name if level else ""
        switch = self.switch
        if switch is not None and (model is switch.target or model in switch.leaving):
            target = switch.target.name if switch.target else ""
            effect = RunHook(
                hook, model.name, kind, model.running.definition, switch.id, switch.sources, target, name
            )
        else:
            effect = RunHook(hook, model.name, kind, model.running.definition, level=name)
        self.out.append(effect)
        return hook

    def kill_hook(self, run: HookRun, reason: str) -> None:
        """End a hook, once."""
        if not run.killed:
            run.killed = True
            self.out.append(KillHook(run.id, reason))

    def next_switch_id(self) -> int:
        """Give out a switch id."""
        self._switch_ids += 1
        return self._switch_ids

    # ---- requests

    def admit(self, request: Request) -> None:
        """Let a request, which is in no queue, through to its engine: it counts from here on."""
        model = request.model
        request.admitted = self.now
        model.in_flight[request.id] = request
        model.admissions += 1
        self.out.append(
            Admit(
                request.id,
                model.name,
                model.running.definition,
                model.epoch,
                request.returned,
                self.now - request.arrived,
            )
        )

    def unqueue(self, request: Request) -> None:
        """Take a request out of its queue."""
        del request.model.queue[request.id]
        self.queued -= 1

    def reject(self, request: Request, refusal: Refusal, message: str, retry_after: float | None = None) -> None:
        """Turn a request away that is in no queue."""
        self.requests.pop(request.id, None)
        waited = self.now - request.arrived
        self.out.append(Reject(request.id, request.model.name, refusal, message, retry_after, waited))
