"""How long a policy takes to decide: 20 models, 1,000 waiting. ``python -m tests.benchmarks.decide``."""

from __future__ import annotations

import time
from pathlib import Path

from llmux.core import Core
from llmux.core.effects import RunHook
from llmux.core.events import HookFinished, RequestArrived, Started
from llmux.core.policy import Policy, Snapshot, SwitchRecord, WaitUntil
from llmux.core.spec import ModelSpec, Rules
from llmux.estimates import Estimates
from llmux.plugins import known_policies, load_policy

MODELS, WAITING, RUNNING = 20, 1000, 8
ROUNDS, CALLS = 30, 50


class Looks:
    """Waits, and keeps what it is shown."""

    shown: Snapshot

    def decide(self, now: Snapshot) -> WaitUntil:
        """Keep the live view."""
        self.shown = now
        return WaitUntil(now.time + 50.0)


def crowded() -> Snapshot:
    """Return the view of a core whose first model is busy while all others have waiters."""
    policy = Looks()
    core = Core(
        [ModelSpec(f"m{i}", max_in_flight=16) for i in range(MODELS)], Rules(alive_every=0.0), policy, Estimates()
    )
    for effect in core.handle(Started(), 0.0):
        if isinstance(effect, RunHook):
            core.handle(HookFinished(effect.hook, ok=effect.model == "m0"), 0.0)
    for number in range(RUNNING):
        core.handle(RequestArrived(number, "m0"), 0.0)
    for number in range(WAITING):
        core.handle(RequestArrived(RUNNING + number, f"m{1 + number % (MODELS - 1)}"), number * 0.01)
    return policy.shown


def seconds(policy: Policy, now: Snapshot) -> float:
    """Return the seconds of a decision, the best of several rounds."""
    learn = getattr(policy, "on_switch_completed", None)
    if learn is not None:
        learn(SwitchRecord(1, ("m0",), "m1", "success", 1.0, 10.0, 0.0))
    best = float("inf")
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        for _ in range(CALLS):
            policy.decide(now)
        best = min(best, (time.perf_counter() - begun) / CALLS)
    return best


if __name__ == "__main__":
    for name in known_policies():
        print(f"{name:12} {seconds(load_policy(name, {}, Path()), crowded()) * 1e6:6.1f} µs")
