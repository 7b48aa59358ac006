"""What ``llmux hooks test`` may find wrong with hooks, each by name, and how to repair it."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Wrong(enum.StrEnum):
    """A mistake that hooks make."""

    WAKE_FAILS = "wake-fails"
    WAKE_TOO_EARLY = "wake-too-early"
    WAKE_LIES = "wake-lies"
    WAKE_NOT_IDEMPOTENT = "wake-not-idempotent"
    WAKE_RESTARTS = "wake-restarts"
    CANARY_FAILS = "canary-fails"
    WRONG_SERVER = "wrong-server"
    PIPE_LEFT_OPEN = "pipe-left-open"
    IN_HOOKS_GROUP = "in-hooks-group"
    SLEEP_FAILS = "sleep-fails"
    SLEEP_TOO_EARLY = "sleep-too-early"
    SLEEP_NOT_IDEMPOTENT = "sleep-not-idempotent"
    SLEEP_ENDS_ANOTHER = "sleep-ends-another"
    CANNOT_GO_DEEPER = "cannot-go-deeper"
    ALIVE_AFTER_SLEEP = "alive-after-sleep"
    ALIVE_TAKES_A_STRANGER = "alive-takes-a-stranger"
    MEMORY_NOT_FREED = "memory-not-freed"
    VERIFY_FAILS = "verify-fails"
    VERIFY_ALWAYS_PASSES = "verify-always-passes"


REPAIRS: dict[Wrong, str] = {
    Wrong.WAKE_FAILS: "Run it by hand, with the model's `env`, until it exits with 0 once the engine answers.",
    Wrong.WAKE_TOO_EARLY: (
        "Let wake wait until the engine answers, as `until curl -fs $LLMUX_URL/health; do sleep 0.2; done`: "
        "llmux sends it requests as soon as wake has ended."
    ),
    Wrong.WAKE_LIES: (
        "Let wake fail when the engine does not come up, and look whether `port` is the engine's own."
    ),
    Wrong.WAKE_NOT_IDEMPOTENT: (
        "Let wake ask first whether the engine is awake, and exit with 0 then: llmux may wake what it only "
        "believes to be asleep."
    ),
    Wrong.WAKE_RESTARTS: "Let wake leave an engine alone that is awake: whoever it answers would be cut off.",
    Wrong.CANARY_FAILS: "See the engine's own log; wake may have to wait for more than its health.",
    Wrong.WRONG_SERVER: (
        "If it is yours, name it so (`--alias`, `--served-model-name`), or set `upstream_model` to what it is "
        "called there; if not, give the engine a port of its own."
    ),
    Wrong.PIPE_LEFT_OPEN: (
        "Start what stays with `setsid … </dev/null >engine.log 2>&1 &`: with llmux's pipe as its output it "
        "dies when llmux ends."
    ),
    Wrong.IN_HOOKS_GROUP: "Start it with `setsid`, so that it does not belong to the hook.",
    Wrong.SLEEP_FAILS: "Run it by hand, with the model's `env`, until it exits with 0 once the GPU is free.",
    Wrong.SLEEP_TOO_EARLY: (
        "Let sleep wait for the process, as `while kill -0 $pid; do sleep 0.1; done`: a port that is closed "
        "is no memory that is free."
    ),
    Wrong.SLEEP_NOT_IDEMPOTENT: (
        "Let sleep exit with 0 when nothing is awake: llmux runs it to clean up after engines that have crashed."
    ),
    Wrong.SLEEP_ENDS_ANOTHER: (
        "A number that is free is given to the next process. Let sleep remove its pid file once the engine has "
        "ended, and compare when the process was started before it signals it, as hooks/process.sh does."
    ),
    Wrong.CANNOT_GO_DEEPER: (
        "A model with `levels` is put to sleep again, deeper, while it sleeps: let sleep do that without the "
        "GPU, or leave that level out."
    ),
    Wrong.ALIVE_AFTER_SLEEP: (
        "Either sleep does nothing, and hides that (`|| true`), or alive does not look at the engine. Let "
        "alive ask the engine itself, and for its model."
    ),
    Wrong.ALIVE_TAKES_A_STRANGER: "Let alive look for the model's name in `/v1/models`, or for the process.",
    Wrong.MEMORY_NOT_FREED: (
        "Let sleep wait until nvidia-smi no longer shows it, or give `verify: ./hooks/gpu-free.sh`; if it is "
        "never freed, end the process."
    ),
    Wrong.VERIFY_FAILS: (
        "See what holds the memory; `timeouts.verify` may be too short, or verify's limit too strict."
    ),
    Wrong.VERIFY_ALWAYS_PASSES: "Let verify fail while the memory is in use: it may look at another GPU.",
}

WARNINGS = frozenset({Wrong.IN_HOOKS_GROUP, Wrong.ALIVE_TAKES_A_STRANGER, Wrong.VERIFY_ALWAYS_PASSES})
"""What works, but not on every day; the others are errors."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, and what was seen."""

    wrong: Wrong
    seen: str

    @property
    def warning(self) -> bool:
        """Whether it is none that a model cannot be run with."""
        return self.wrong in WARNINGS

    @property
    def repair(self) -> str:
        """What to do about it."""
        return REPAIRS[self.wrong]
