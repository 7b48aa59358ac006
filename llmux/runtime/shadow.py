"""Shadow policies: they are asked what they would do, but not followed.

The core does not know them: its policy asks them as well (``Shadowed``). Their thinking time is measured; a shadow
that fails or thinks too long is dropped: it is never asked again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from llmux.config import Config
from llmux.core.policy import Decision, Policy, Snapshot, Stay, SwitchRecord, SwitchTo, WaitUntil
from llmux.core.policy_calls import RAISED, spelled
from llmux.errors import PolicyLoadError
from llmux.plugins import OPTIONS, USE, comes_from_file, load_policy

TOO_LONG = 0.05  # seconds: one such answer is enough
LONG = 0.005
PATIENCE = 10  # answers that may take so long


class SlowShadowError(Exception):
    """A shadow held up the event loop."""


class Timed:
    """Forwards everything to a policy; raises SlowShadowError when its answers take too long."""

    def __init__(self, policy: Policy, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._policy = policy
        self._slow = 0
        if hasattr(policy, "on_switch_completed"):
            self.on_switch_completed = policy.on_switch_completed

    def decide(self, now: Snapshot) -> Decision:
        """Ask it, and measure the time."""
        began = self._clock()
        decision = self._policy.decide(now)
        took = self._clock() - began
        if took > LONG:
            self._slow += 1
            if took > TOO_LONG or self._slow > PATIENCE:
                raise SlowShadowError(f"an answer took {took * 1000:.0f} ms")
        return decision


@dataclass(slots=True, eq=False)
class Shadow:
    """A policy that is asked what it would do, but not followed."""

    name: str
    policy: Policy
    dropped: str = ""  # why it is no longer asked
    counts: Counter[tuple[str, bool]] = field(default_factory=Counter)  # (kind of answer, as the policy did)

    def ask(self, now: Snapshot, went: str | None) -> None:
        """Ask it, and count whether it would have gone where the policy did; None: it stayed."""
        kind, target = _meant(self.policy.decide(now), now)
        self.counts[kind, target == went] += 1

    def tell(self, record: SwitchRecord) -> None:
        """Pass it a switch that has ended."""
        learn = getattr(self.policy, "on_switch_completed", None)
        if learn is not None:
            learn(record)


class Shadowed:
    """A policy with shadows. ``dropped(name, error)`` is called for each that fails."""

    def __init__(self, policy: Policy, shadows: Iterable[Shadow], dropped: Callable[[str, str], object]) -> None:
        self._policy = policy
        self._shadows = tuple(shadows)
        self._dropped = dropped

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the policy, other than its decisions."""
        return getattr(self._policy, name)

    def decide(self, now: Snapshot) -> Decision:
        """Ask the policy and, whatever that returns, its shadows."""
        went: str | None = now.waiting[0]  # where an invalid answer leads
        try:
            decision = self._policy.decide(now)
            went = _led(decision, now)
        finally:
            self._each(lambda shadow: shadow.ask(now, went))
        return decision

    def on_switch_completed(self, record: SwitchRecord) -> None:
        """Pass all of them a switch that has ended."""
        self._each(lambda shadow: shadow.tell(record))
        learn = getattr(self._policy, "on_switch_completed", None)
        if learn is not None:
            learn(record)

    def _each(self, do: Callable[[Shadow], None]) -> None:
        for shadow in self._shadows:
            if shadow.dropped:
                continue
            try:
                do(shadow)
            except RAISED as error:
                shadow.dropped = spelled(error)
                self._dropped(shadow.name, shadow.dropped)


def _meant(decision: object, now: Snapshot) -> tuple[str, str | None]:
    """Return what kind of answer it is, and where it would have led."""
    if isinstance(decision, SwitchTo) and decision.model in now.waiting:
        return "switch", decision.model
    if isinstance(decision, Stay):
        return "stay", None
    if isinstance(decision, WaitUntil):
        return "wait", None
    return "nonsense", now.waiting[0]  # first come, first served would have been used


def _led(decision: object, now: Snapshot) -> str | None:
    """Return where the core goes with an answer of the policy; None: it stays."""
    kind, target = _meant(decision, now)
    views = [now.models[name] for name in now.awake]
    idle = kind == "stay" and not any(view.in_flight or view.queued for view in views)
    late = isinstance(decision, WaitUntil) and not decision.time > now.time
    return now.waiting[0] if idle or late else target


def load_shadows(config: Config, known: Iterable[Shadow] = (), before: Config | None = None) -> tuple[Shadow, ...]:
    """Make the shadows of a configuration; those unchanged since ``before`` are taken from ``known``.

    Raises:
        PolicyLoadError: one of them cannot be loaded; the message names ``policy.shadow``.

    """
    old = dict(zip(_names(before), known, strict=True)) if before is not None else {}
    unchanged = [] if before is None or before.folder != config.folder else list(before.policy.shadow)
    shadows = []
    for index, (name, wanted) in enumerate(zip(_names(config), config.policy.shadow, strict=True)):
        if name in old and wanted in unchanged and not comes_from_file(wanted.use):
            shadows.append(old[name])
            continue
        place = f"policy.shadow[{index}]"
        try:
            policy = load_policy(wanted.use, wanted.options, config.folder)
        except PolicyLoadError as error:
            text = str(error).replace(USE, f"{place}.use").replace(OPTIONS, f"{place}.options")
            raise PolicyLoadError(text) from error
        shadow = Shadow(name, Timed(policy))
        if name in old:
            shadow.counts = old[name].counts
        shadows.append(shadow)
    return tuple(shadows)


def _names(config: Config) -> list[str]:
    """Return the shadows' names for metrics: what they use, numbered if it occurs twice."""
    uses = [each.use for each in config.policy.shadow]
    return [
        use if uses.count(use) == 1 else f"{use}#{uses[: index + 1].count(use)}" for index, use in enumerate(uses)
    ]
