"""Keeps its own books on what goes in and out of a core, and holds the seven invariants against them."""

from __future__ import annotations

from llmux.core import Core, admission, residency
from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.model import Model, Reason, Request
from llmux.core.phases import PHASES, CoreError, Phase, Stage
from llmux.core.spec import HookKind
from llmux.core.state import FIRST_COME
from llmux.core.timers import Timer
from llmux.estimates.fair_order import FairOrder
from llmux.observability.decision_log import DecisionLog, figures
from llmux.observability.timeline import Timeline

WANTED = ("requested", "pinned", "preload", "keep_awake", "default")
BY_HAND = (
    "requested",
    "pinned",
    "preload",
    "lease",
    "not wanted",
    "stopping",
    Reason.BACK,
)  # may begin in manual mode


class Ledger:
    """Feeds a core and checks every step."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.handle = core.handle
        self.order: FairOrder | None = None
        self.counters: dict[str, float] = {}
        core.state.figures = figures
        self.timeline = Timeline()
        self.decisions = DecisionLog(self.timeline)
        self.phases = {name: model.phase for name, model in core.state.models.items()}
        self.queued: dict[int, str] = {}
        self.riding: dict[int, str] = {}
        self.in_flight: dict[int, str] = {}
        self.done: set[int] = set()
        self.admissions: dict[int, int] = {}
        self.returns: dict[int, int] = {}
        self.hooks: dict[int, fx.RunHook] = {}
        self.killed: set[int] = set()
        self.prefetched = 0  # the last switch that had a prefetch
        self.answers: dict[int, fx.Answer] = {}
        self.switch: fx.SwitchStarted | None = None
        self.now = 0.0
        self.stopped = False
        self.awake: set[str] = set()  # according to the notices
        self.busy_at = 0.0  # when somebody was last served or waited
        self.levels: dict[str, str] = {}  # the last sleep hook that succeeded was told this
        self.plan_is_old = False  # a reload came while a switch was under way
        self.leased = self.lent = False  # lent: the foreign job was told that it may begin
        self.manual = core.state.manual

    def feed(self, event: ev.Event, now: float) -> list[fx.Effect]:
        """Hand over an event and check what comes back."""
        assert now >= self.now
        self.now = now
        self._stir()
        self._before(event)
        try:
            effects = self.handle(event, now)
        except CoreError as error:
            self.timeline.add(now, event, self.core.state.out)
            error.story = self.timeline.story()
            raise
        self.timeline.add(self.core.state.now, event, effects)
        self._sort_riders()
        for effect in effects:
            self._effect(effect)
        self._stir()
        self._after()
        if self.order is not None:
            self._fair(self.order)
        return effects

    def _sort_riders(self) -> None:
        """What rides along is in no queue; when it enters, it is as if it had just arrived."""
        riders = {r: m.name for m in self.core.state.models.values() for r in m.riders}
        for request in [r for r in self.queued if r in riders]:
            self.riding[request] = self.queued.pop(request)
        for request in [r for r in self.riding if r not in riders]:
            self.queued[request] = self.riding.pop(request)
        assert self.riding == riders

    def _stir(self) -> None:
        if self.queued or self.in_flight:
            self.busy_at = self.now

    def _before(self, event: ev.Event) -> None:
        match event:
            case ev.RequestArrived(request=request, model=model):
                self.queued[request] = model
                self.admissions[request] = 0
            case ev.RequestFinished(request=request):
                del self.in_flight[request]
                self.done.add(request)
            case ev.RequestAbandoned(request=request):
                books = (self.queued, self.riding, self.in_flight)
                assert sum(book.pop(request, None) is not None for book in books) == 1
                self.done.add(request)
            case ev.RequestReturned(request=request):
                self.queued[request] = self.in_flight.pop(request)
                self.returns[request] = self.returns.get(request, 0) + 1
                assert self.returns[request] == 1
            case ev.HookFinished(hook=hook, ok=ok):
                self._book_level(self.hooks.pop(hook), ok)
            case ev.Started(levels=levels):
                self.levels = dict(levels)
            case ev.ConfigReplaced():
                self.plan_is_old = self.switch is not None
                self.lent = False  # what it finds awake has to be put to sleep first
            case _:
                pass

    def _book_level(self, run: fx.RunHook, ok: bool) -> None:
        """Keep the level at which a model sleeps: what the last successful sleep was told, if nothing undid it."""
        if run.kind is HookKind.SLEEP and self.core.state.models[run.model].phase is Phase.SLEEPING:
            self.levels[run.model] = run.level if ok else ""
        elif run.kind is HookKind.SLEEP and ok:
            self.levels[run.model] = run.level
        elif run.kind in (HookKind.WAKE, HookKind.STOP):
            self.levels[run.model] = ""

    def _effect(self, effect: fx.Effect) -> None:
        assert not self.stopped, "an effect after Stopped"
        match effect:
            case fx.Admit() | fx.Reject() | fx.CancelRequests():
                self._request(effect)
            case fx.RunHook():
                self._hook(effect)
            case fx.KillHook(hook=hook):
                assert hook in self.hooks
                assert hook not in self.killed, "killed twice"
                self.killed.add(hook)
            case fx.Answer(ticket=ticket):
                assert ticket not in self.answers, "answered twice"
                self.answers[ticket] = effect
            case fx.Stopped():
                assert not self.in_flight
                assert not self.hooks
                assert not self.queued
                assert not self.riding
                self.stopped = True
            case _:
                self._notice(effect)

    def _request(self, effect: fx.Effect) -> None:
        match effect:
            case fx.Admit(request=request, model=model):
                assert not self.leased, "admitted under a lease"
                assert self.queued.pop(request) == model
                self.in_flight[request] = model
                self.admissions[request] += 1
                assert self.admissions[request] <= 1 + self.returns.get(request, 0), "invariant 2: admitted twice"
                assert not self.core.state.stopping
            case fx.Reject(request=request):
                del self.queued[request]
                self.done.add(request)
            case fx.CancelRequests(requests=requests):
                assert requests
                assert set(requests) <= self.in_flight.keys()

    def _notice(self, effect: fx.Effect) -> None:
        match effect:
            case fx.SwitchStarted(reason=reason, to=to):
                assert self.switch is None, "two switches"
                self.switch = effect
                assert not self.manual or reason in BY_HAND, "switched although only operators may"
                self._bounded(to, reason)
                self._unasked(effect)
            case fx.SwitchEnded(switch=switch):
                assert self.switch is not None
                assert self.switch.switch == switch
                self.switch = None
                self.plan_is_old = False
            case fx.PhaseChanged(model=model, source=source, target=target, why=why):
                assert self.phases.get(model, Phase.UNKNOWN) is source
                assert (target, why) in [row for (phase, _), row in PHASES.items() if phase is source]
                self.phases[model] = target
            case fx.ModelRemoved(model=model):
                self.phases.pop(model, None)
            case fx.ModelActivated(model=model):
                assert model not in self.awake
                self.awake.add(model)
            case fx.ModelDeactivated(model=model):
                self.awake.remove(model)
            case fx.LeaseSet(leased=leased):
                self.leased = leased
                self.lent = self.lent and leased
            case fx.LeaseHeld():
                assert self.leased
                assert not self.lent, "told twice"
                self.lent = True
            case fx.ManualSet(manual=manual):
                assert manual != self.manual
                self.manual = manual
            case _:
                pass

    def _unasked(self, effect: fx.SwitchStarted) -> None:
        """What begins by itself: who is to be kept awake is never idle; the default comes after quiet."""
        s = self.core.state
        kept = {name for name in effect.sources if s.models[name].spec.keep_awake}
        match effect.reason:
            case "idle":
                assert not kept
            case "keep_awake":
                assert not effect.sources
                assert s.models[effect.to].spec.keep_awake
            case "default":
                assert effect.to == s.rules.default_model
                assert not kept
                assert not self.queued
                assert not self.in_flight
                assert self.now >= self.busy_at + s.rules.default_after

    def _bounded(self, to: str | None, reason: str) -> None:
        """Invariant 6: the longest overdue goes first, unless something forbids it."""
        if to is None or reason in (*WANTED, Reason.BACK):
            return
        s = self.core.state
        left_out = {*self.switch.sources, to}
        late = [m for m in s.models.values() if m.name not in left_out and m.queue and m.phase is not Phase.AWAKE]
        late = [m.oldest().arrived for m in late if m.oldest().arrived + s.rules.max_wait <= self.now]
        assert not late or s.models[to].oldest().arrived <= min(late), (to, late)

    def _hook(self, effect: fx.RunHook) -> None:
        assert effect.hook not in self.hooks
        self.hooks[effect.hook] = effect
        s = self.core.state
        if s.stopping:
            assert effect.kind in (HookKind.SLEEP, HookKind.STOP), "begins something while stopping"
        if effect.kind is HookKind.PREFETCH:
            self._prefetch(effect)
            return
        if effect.kind in (HookKind.SLEEP, HookKind.STOP):
            assert effect.model not in self.in_flight.values(), "invariant 4: sleeps under load"
        if effect.kind is HookKind.WAKE:
            assert not self.leased, "woken under a lease"
            wanted = s.switch is not None and s.switch.requested
            assert wanted or effect.model in self.queued.values(), "invariant 5: nobody waits for it"
            if wanted and s.switch.cause is Reason.ANTICIPATED and not self.plan_is_old:
                assert s.rules.anticipate, "invariant 5: anticipated, which nobody allowed"
            holders = [
                m.running for m in s.models.values() if m.holds and m.phase is not Phase.UNKNOWN and not m.extra
            ]
            assert residency.fits(holders, s.rules.capacity), "invariant 1: not alone when it wakes"
            assert effect.model in s.recorded
            if effect.level:
                assert self.levels[effect.model] == effect.level, "wakes from a level where it does not sleep"
        if effect.kind is HookKind.SLEEP:
            self._sleeps_at(effect)
        lifecycle = [h for h in self._hooks(effect.model) if h.kind not in (HookKind.ALIVE, HookKind.PREFETCH)]
        assert len(lifecycle) <= 1, "two hooks of one model at once"

    def _sleeps_at(self, effect: fx.RunHook) -> None:
        """A sleep takes a level that there is host memory for, or the one that takes least."""
        s = self.core.state
        model = s.models[effect.model]
        levels = {level.name: level.host_memory for level in model.running.levels}
        assert effect.level in levels or not (effect.level or levels)
        if model.phase is Phase.DEEPENING:
            assert effect.switch == 0
            assert model.prefetch is None, "goes deeper beside its prefetch"
            assert model.deepening.host_memory < model.level.host_memory
            assert self.switch is None or self.switch.to != model.name, "goes deeper though it is to wake"
            assert not model.queue, "goes deeper though somebody waits for it"
            assert not s.stopping
        elif levels and s.rules.host_memory is not None:
            total = sum(m.level.host_memory for m in s.models.values() if m.level is not None)
            # All that leave start in one step: the last of them has seen all.
            fits = total <= s.rules.host_memory or levels[effect.level] == min(levels.values())
            assert fits, "sleeps lighter than there is host memory"

    def _hooks(self, model: str) -> list[fx.RunHook]:
        return [hook for hook in self.hooks.values() if hook.model == model]

    def _prefetch(self, effect: fx.RunHook) -> None:
        """It runs beside others that leave, once a switch, and beside no other hook of its model."""
        switch = self.core.state.switch
        assert switch is not None
        assert switch.target is not None
        assert effect.model == switch.target.name
        assert switch.target.phase is Phase.ASLEEP, "a prefetch of what may hold the GPU"
        assert switch.sources, "a prefetch beside nothing"
        assert effect.switch == switch.id > self.prefetched, "two prefetches in one switch"
        self.prefetched = switch.id
        beside = [hook for hook in self._hooks(effect.model) if hook.kind is not HookKind.ALIVE]
        assert beside == [effect], "a prefetch beside another hook of its model"

    def _after(self) -> None:
        s = self.core.state
        # A reload never alters the plan of a switch, so what leaves may need more room than it left.
        leaving = s.switch.leaving if s.switch is not None and self.plan_is_old else ()
        holders = [
            m.running
            for m in s.models.values()
            if m.holds and not m.extra and m.phase is not Phase.UNKNOWN and m not in leaving
        ]
        assert residency.fits(holders, s.rules.capacity), "invariant 1: two owners"
        if s.switch is not None and s.switch.stage is Stage.DRAINING and s.switch.target is not None:
            assert s.switch.requested or s.switch.target.queue, "nobody waits for it: to be called off"
        for model in s.models.values():
            assert not (model.riders and not model.extra and admission.is_open(s, model)), (
                "rides, though there is room"
            )
            assert not (model.riders and (model.removed or s.stopping))
            for rider in model.riders.values():
                assert (Timer.RIDE, rider) in s.timers, "rides along for ever"
            if s.turns is FIRST_COME and model.queue and model.phase is Phase.AWAKE and not self.leased:
                assert model.extra or not model.has_room, "a waiter although there is room"
        awake = {name for name, model in s.models.items() if model.phase in (Phase.AWAKE, Phase.DRAINING)}
        assert self.awake == awake, "the notices tell another story"
        for name, model in s.models.items():
            mine = {r for r, m in self.in_flight.items() if m == name}
            assert set(model.in_flight) == mine, "invariant 3: in-flight counts"
            waiting = {r for r, m in self.queued.items() if m == name}
            assert set(model.queue) == waiting
            arrivals = [r.arrived for r in model.queue.values()]
            assert arrivals == sorted(arrivals)
            if model.phase in (Phase.ASLEEP, Phase.DEEPENING):
                known = self.levels.get(name, "") if model.level is not None else ""
                assert (model.level.name if model.level is not None else "") == known
            assert (model.deepening is not None) == (model.phase is Phase.DEEPENING)
            if model.phase in (Phase.ASLEEP, Phase.SLEEPING, Phase.WAKING, Phase.DEEPENING):
                assert not model.in_flight or model.phase is Phase.WAKING
            assert (model.teardown is not None) == (model.phase is Phase.SLEEPING)
        assert s.queued == len(self.queued) == sum(len(m.queue) for m in s.models.values())
        assert (self.switch is None) == (s.switch is None)
        for hook in self.hooks.values():
            if hook.kind is HookKind.PREFETCH and hook.hook not in self.killed:
                assert s.switch is not None, "a prefetch outlives its switch"
                assert s.switch.id == hook.switch, "a prefetch outlives its switch"
                assert s.switch.stage is not Stage.CLEANUP, "a prefetch of what failed to wake"
        self._something_is_due()
        self._lease()

    def be_fair(self, order: FairOrder) -> None:
        """Order what waits by its keys, of which there are three; answers take a few tokens more or less."""
        self.order = order
        self.handle = order.attach(
            self.core, lambda request: "abc"[request % 3], lambda request: (request % 7, 40)
        )
        after, order.after = order.after, lambda now, effects: (self._let_in(order), after(now, effects))
        self._pick, order.pick = order.pick, self.pick

    def pick(self, model: Model) -> Request | None:
        """Let the order pick, and see that it is the oldest waiter of the key that stands lowest, if not held."""
        order = self.order
        assert order is not None
        known = order.present()
        waiting = [request for request in model.queue.values() if request.id in known]
        free = [request for request in waiting if order.admits(request)]
        rank = {request: order.fairness.rank("abc"[request.id % 3]) for request in free}
        chosen = self._pick(model)
        if waiting:
            held = chosen is None or chosen.id not in known  # such a one has ridden along until now
            assert held == (not free), "held back, or not, against the rules"
        if free:
            own = [request.arrived for request in free if request.id % 3 == chosen.id % 3]
            assert rank[chosen] == min(rank.values()), "a key lags behind one that is served"
            assert chosen.arrived == min(own)
        return chosen

    def _let_in(self, order: FairOrder) -> None:
        """See that only what is held back waits where there is room, by what was known in this step.

        What comes of the step may free it: then it is let in with the next, or when it is asked for again.
        """
        s, known = self.core.state, order.present()
        for model in s.models.values():
            if model.phase is Phase.AWAKE and s.lease is None and not model.extra and model.has_room:
                waiting = [request for request in model.queue.values() if request.id in known]
                assert not any(map(order.admits, waiting)), "a waiter although there is room"
                assert not model.queue or Timer.HELD in s.timers, "it is never asked for again"

    def _fair(self, order: FairOrder) -> None:
        """Its books are those of the core, and no counter falls."""
        present = order.present()
        assert {request for request, running in present.items() if running} == self.in_flight.keys()
        assert {request for request, running in present.items() if not running} == self.queued.keys()
        counters = order.fairness.counters()
        assert all(counters[key] >= counter for key, counter in self.counters.items()), "a counter falls"
        self.counters = counters
        for model in self.core.state.models.values():
            shown = order.waiters(model.name)
            assert shown == sorted(shown)
            assert len(shown) <= len(model.queue)

    def _lease(self) -> None:
        """Nothing holds the GPU that the foreign job has, and it gets it back."""
        s = self.core.state
        assert (s.lease is not None) == self.leased
        assert s.manual == self.manual
        if s.lease is None:
            assert Timer.LEASE not in s.timers
            return
        if self.lent:
            assert not any(m.holds and m.phase is not Phase.UNKNOWN for m in s.models.values()), "lent, and held"
        if s.lease.until is not None and not s.stopping:
            assert Timer.LEASE in s.timers, "a lease that never ends"
        switch = s.switch
        if switch is not None and switch.target is not None:
            assert switch.stage is not Stage.DRAINING, "drains for somebody under a lease"

    def _up_to_operators(self) -> bool:
        """Whether who waits may wait for an operator: manual mode, or a lease that is to be given back."""
        lease = self.core.state.lease
        return self.manual or (lease is not None and lease.waits)

    def _something_is_due(self) -> None:
        """Invariant 7, locally: whoever waits, waits for something that will come."""
        s = self.core.state
        # Nobody waits for a prefetch.
        hooks = [hook for hook in self.hooks.values() if hook.kind is not HookKind.PREFETCH]
        if self.queued and s.ready and not self._up_to_operators():
            assert self.in_flight or hooks or self.core.next_deadline() is not None, (
                "wedged: waiters, and nothing to wait for"
            )
            idle = s.switch is None and not self.in_flight and not hooks
            if idle:
                waits = Timer.ASK in s.timers or Timer.HELD in s.timers
                assert waits, "wedged: waiters, nothing under way, and no reason"
        if self.leased and s.ready and not s.stopping and s.switch is None and not self.lent:
            holders = [m for m in s.models.values() if m.holds]
            assert not holders or self.hooks or self.core.next_deadline() is not None, "never held, and no reason"
        for hook in self.hooks:
            assert hook in self.killed or (Timer.HOOK, hook) in s.timers
