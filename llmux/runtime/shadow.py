"""Shadow policies from the configuration, and a watch over how long they think."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

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
    """Passes everything on to a policy; raises SlowShadowError when its answers take too long."""

    def __init__(self, policy: Policy, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._policy = policy
        self._slow = 0
        if hasattr(policy, "on_switch_completed"):
            self.on_switch_completed = policy.on_switch_completed

    def decide(self, now: Snapshot) -> Decision:
        """Ask it, and look at the clock."""
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
    """A policy that is asked what it would do, and is not followed; see ``llmux.core.model.Shadow``."""

    name: str
    policy: Policy
    dropped: str = ""  # why it is asked no more
    counts: Counter[tuple[str, bool]] = field(default_factory=Counter)  # (kind of answer, as the policy did)

    def asked(self, now: Snapshot, went: str | None) -> str:
        """Ask it, and count whether it would have led where the policy did."""
        if self.dropped:
            return ""
        try:
            kind, target = _meant(self.policy.decide(now), now)
        except RAISED as error:
            self.dropped = spelled(error)
            return self.dropped
        self.counts[kind, target == went] += 1
        return ""

    def switched(self, record: SwitchRecord) -> str:
        """Tell it of a switch that has ended."""
        tell = None if self.dropped else getattr(self.policy, "on_switch_completed", None)
        if tell is not None:
            try:
                tell(record)
            except RAISED as error:
                self.dropped = spelled(error)
                return self.dropped
        return ""


def _meant(decision: object, now: Snapshot) -> tuple[str, str | None]:
    """Return what kind of answer it is, and where it would have led."""
    if isinstance(decision, SwitchTo) and decision.model in now.waiting:
        return "switch", decision.model
    if isinstance(decision, Stay):
        return "stay", None
    if isinstance(decision, WaitUntil):
        return "wait", None
    return "nonsense", now.waiting[0]  # first come, first served would have been used


def load_shadows(config: Config, known: Iterable[Shadow] = (), before: Config | None = None) -> tuple[Shadow, ...]:
    """Make the shadows of a configuration; what did not change since ``before`` is taken from ``known``.

    Raises:
        PolicyLoadError: one of them cannot be had; the message names ``policy.shadow``.

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
    """Return what the shadows are called in metrics: what they use, with a number where that comes twice."""
    uses = [each.use for each in config.policy.shadow]
    return [
        use if uses.count(use) == 1 else f"{use}#{uses[: index + 1].count(use)}" for index, use in enumerate(uses)
    ]
