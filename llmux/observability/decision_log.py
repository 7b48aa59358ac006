"""What was decided, and why: in words, with the figures that it was decided on; and why those left that left.

Folds over the core's ``Decided``. A decision that is only repeated (the policy is asked at every
event) stays one record, whose ``times`` grow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

from llmux.core.effects import By, Decided, Kind, ModelRemoved, PolicyAdopted
from llmux.core.model import Reason
from llmux.core.state import State
from llmux.observability.figures import Evicted, Figures, Serving, Waiting, figures
from llmux.observability.timeline import Timeline

KEPT = 200
SHOWN = 2  # further models with waiters that are named in words
MINUTE = 60.0
MILLISECONDS, INSTANT = 0.0995, 0.0005  # seconds below which they are shown as such, and as nothing

WORDS: dict[str, str] = {
    Reason.REQUESTED: "an operator asked for it",
    Reason.PINNED: "it is pinned",
    Reason.KEEP_AWAKE: "keep_awake applies to it, and there is room",
    Reason.DEFAULT: "it is the default model, and no request has come for default_after",
    Reason.PRELOAD: "preload",
    Reason.LEASE: "the GPU is lent to another job",
    Reason.IDLE: "no request for as long as idle_sleep",
    Reason.UNWANTED: "it was removed, or is one more than may be awake, or its engine is gone",
    Reason.STOPPING: "llmux stops, and on_exit says sleep",
}


@dataclass(slots=True)
class DecisionRecord:
    """One decision. Times are on the core's clock, in seconds."""

    id: int  # 1, 2, …
    time: float  # when it was made first
    kind: Kind
    target: str | None  # where to; None for stay and for going to sleep
    by: By  # what made it; ``min_active`` holds back what the policy wants
    said: str  # the policy's own reason, its fault, or the reason of a switch that no request waits for
    serving: tuple[Serving, ...]
    waiting: tuple[Waiting, ...]  # oldest waiter first; a few at most
    more: int = 0  # waiters of further models
    until: float | None = None  # when it ends by itself, for ``wait``
    last: float = 0.0  # when it was made last
    times: int = 1
    switch: int | None = None  # the switch that it led to
    leaving: tuple[str, ...] = ()  # what made room in that switch

    @property
    def reason(self) -> str:
        """What was done and why, in one line with the figures that matter."""
        if self.kind == "adopt":
            return self.said
        deed, *rest = filter(None, (self._deed(), self._why(), *self._figures()))
        return f"{deed}: {'; '.join(rest)}" if rest else deed

    def _deed(self) -> str:
        here, gone = (" and ".join(names) for names in ([each.model for each in self.serving], self.leaving))
        if self.kind == "switch":
            if self.target is None:
                return f"{gone} → asleep"
            return f"{gone} → {self.target}" if gone else f"wakes {self.target}"
        busy = sum(each.in_flight for each in self.serving)
        stays = f"{here} {'stay' if len(self.serving) > 1 else 'stays'}" if here else "no model is woken yet"
        if busy:
            stays += f" ({busy} in flight)"
        if self.until is None:
            return stays
        left = duration(self.until - self.last)
        if self.by == "min_active":
            return f"{stays} for {left} more (min_active), then {self.target}"
        return f"{stays}, decided again within {left}"

    def _why(self) -> str:
        if self.by == "overruled":
            return f"the oldest request first, because the policy {self.said}"
        if self.by == "max_wait":
            return f"{self.said}, as long as max_wait allows"
        if self.by == "manual":
            return "manual mode, only an operator switches"
        if self.by == "core":
            return WORDS.get(self.said, self.said)
        # What a policy says for a switch is mostly what the figures say; `explain -v` shows it.
        return "" if self.kind == "switch" or self.by == "min_active" else self.said

    def _figures(self) -> Iterator[str]:
        goes = self.kind == "switch"
        others = list(self.waiting)
        main = next((each for each in others if each.model == self.target), None)
        if main is None and self.target is None and not goes:
            main = next(iter(others), None)
        if main is not None:
            others.remove(main)
            longest = f", longest {duration(main.oldest)}" if main.oldest >= INSTANT else ""
            yield f"{main.queued} waiting{'' if goes else f' for {main.model}'}{longest}"
            what = "a switch" if (self.leaving if goes else self.serving) else "a wake"
            yield f"{what} takes {duration(main.cost)} ({measured(main.samples)})"
        named = [f"{each.queued} for {each.model}" for each in others[:SHOWN]]
        beyond = self.more + sum(each.queued for each in others[SHOWN:])
        if beyond:
            named.append(f"{beyond} for other models")
        if named:
            yield f"also waiting: {', '.join(named)}"


def measured(samples: int) -> str:
    """Say how often a cost was measured."""
    if not samples:
        return "assumed, not measured yet"
    return f"measured {samples} times" if samples > 1 else "measured once"


def duration(seconds: float) -> str:
    """Return seconds for people: ``40 ms``, ``0.25 s``, ``14 s``, ``3 min``."""
    if INSTANT <= seconds < MILLISECONDS:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 2 * MINUTE:
        return f"{seconds:.2g} s" if MILLISECONDS <= seconds < MINUTE / 6 else f"{seconds:.0f} s"
    return f"{seconds / MINUTE:.3g} min"


class DecisionLog:
    """The last ``kept`` decisions and the last evictions of one core."""

    def __init__(self, timeline: Timeline, kept: int = KEPT) -> None:
        self.records: deque[DecisionRecord] = deque(maxlen=kept)
        self.last_id = 0
        self.eviction: Evicted | None = None  # the last one
        self.evicted: dict[str, Evicted] = {}  # by model: the last time that it made room for another
        timeline.on(Decided, self._decided)
        timeline.on(ModelRemoved, self._removed)
        timeline.on(PolicyAdopted, self._adopted)

    def _decided(self, time: float, effect: Decided) -> None:
        made = effect.figures
        if not isinstance(made, Figures):
            last = self.records[-1]
            last.times += 1
            last.last, last.said, last.until = time, effect.said, effect.until
            return
        self.last_id += 1
        self.records.append(
            DecisionRecord(
                self.last_id,
                time,
                effect.kind,
                effect.target,
                effect.by,
                effect.said,
                made.serving,
                made.waiting,
                made.more,
                effect.until,
                last=time,
                switch=effect.switch,
                leaving=effect.leaving,
            )
        )

        if made.evicted is not None:
            self.eviction = made.evicted
            self.evicted.update(dict.fromkeys(made.evicted.left, made.evicted))

    def _adopted(self, time: float, effect: PolicyAdopted) -> None:
        self.last_id += 1
        said = f"{effect.policy} decides from now on, in place of {effect.before}: {effect.reason}"
        self.records.append(DecisionRecord(self.last_id, time, "adopt", None, "auto", said, (), (), last=time))

    def _removed(self, _time: float, effect: ModelRemoved) -> None:
        self.evicted.pop(effect.model, None)

    def latest(self, s: State, count: int) -> list[DecisionRecord]:
        """Return the last ``count`` decisions, oldest first; what still holds has the figures of this moment."""
        records = list(self.records)[-count:] if count > 0 else []
        if (
            records
            and records[-1].kind != "adopt"
            and records[-1].switch is None
            and s.switch is None
            and (now := figures(s)).waiting
        ):
            last = replace(records[-1], last=s.now, serving=now.serving, waiting=now.waiting, more=now.more)
            records[-1] = last
        return records

    def since(self, number: int) -> list[DecisionRecord]:
        """Return the decisions after the one with this id, oldest first."""
        new: list[DecisionRecord] = []
        for record in reversed(self.records):
            if record.id <= number:
                break
            new.append(record)
        return new[::-1]
