"""A hook to run, and how it ended: plain values and the words for people."""

from __future__ import annotations

import os
import signal as signals
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmux.core.spec import HookKind

QUIET_KINDS = frozenset({HookKind.ALIVE, HookKind.VERIFY})
"""Hooks that run over and over: their output belongs into the log at debug level only."""

DETAIL_LINES = 3
DETAIL_CHARS = 500


@dataclass(frozen=True, slots=True)
class HookJob:
    """One hook to run. ``id`` is unique among the hooks under way.

    ``script`` is given to ``sh -c`` in the folder ``cwd``. ``env`` is the model's own. ``switch`` is 0 and
    ``sources`` and ``target`` are empty outside a switch; ``port`` is 0 when the address has none. ``level`` is
    the sleep level to go to, or to wake from; empty where there is none.
    """

    id: int
    model: str
    kind: HookKind
    script: str
    cwd: Path | str
    env: Mapping[str, str] = field(default_factory=dict)
    url: str = ""
    port: int = 0
    switch: int = 0
    sources: tuple[str, ...] = ()
    target: str = ""
    level: str = ""

    @property
    def quiet(self) -> bool:
        """Whether its output is of interest only when something is being looked into."""
        return self.kind in QUIET_KINDS


@dataclass(frozen=True, slots=True)
class HookResult:
    """How a hook ended.

    ``exit_code`` and ``signal`` are both None when it could not be started, could not be ended, or its
    status was lost. ``duration`` is in seconds, from its start to this result. ``killed`` is the reason that
    llmux had to end it, None when it ended by itself. ``tail`` is the last 2 KiB at most that it printed
    before its exit, control characters escaped. ``detail`` tells people how it ended, with its last lines.
    """

    id: int
    model: str
    kind: HookKind
    ok: bool
    exit_code: int | None = None
    signal: int | None = None
    duration: float = 0.0
    killed: str | None = None
    tail: str = ""
    detail: str = ""


KEPT_BACK = frozenset({"LLMUX_ADMIN_KEY", "LLMUX_API_KEY"})


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """What the kernel says of a process that has exited; both None: the kernel no longer knows."""

    code: int | None = None
    signal: int | None = None

    @property
    def ok(self) -> bool:
        """Whether it exited with 0."""
        return self.code == 0


def environment(job: HookJob, inherited: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return what the hook sees: ``inherited`` (llmux's own by default), the model's ``env``, ``LLMUX_*``.

    The later wins. Names travel as values of variables, so that no shell ever reads them as text. The keys of
    whoever operates llmux are kept back: an engine, and what it runs, would inherit them.
    """
    own = os.environ if inherited is None else inherited
    return {
        **{name: value for name, value in own.items() if name not in KEPT_BACK},
        **job.env,
        "LLMUX_MODEL": job.model,
        "LLMUX_HOOK": job.kind.value,
        "LLMUX_PORT": str(job.port) if job.port else "",
        "LLMUX_URL": job.url,
        "LLMUX_SWITCH_ID": str(job.switch) if job.switch else "",
        "LLMUX_FROM": ",".join(job.sources),
        "LLMUX_TO": job.target,
        "LLMUX_SLEEP_LEVEL": job.level,
    }


def not_started(job: HookJob, error: Exception | str) -> HookResult:
    """Return the result of a hook that could not be started."""
    return HookResult(job.id, job.model, job.kind, ok=False, detail=f"could not be started: {error}")


def describe(
    status: ExitStatus, tail: str, *, killed: str | None = None, after: float = 0.0, unending: bool = False
) -> str:
    """Say how a hook ended.

    ``after`` (seconds) is when it was killed, ``unending`` says that even KILL did not help.
    """
    if killed == "timeout":
        ending = f"ran past its timeout of {format_seconds(after)} and was ended"
    elif killed == "stopping":
        ending = "was ended because llmux is stopping"
    elif killed is not None:
        ending = f"was ended: {killed}"
    elif status.signal is not None:
        ending = f"killed by {signal_name(status.signal)}"
    elif status.code is not None:
        ending = f"exited with {status.code}"
    else:
        ending = "exited, but how is not known (something else has waited for it)"
    if unending:
        ending += ", but its processes do not go away"
    said = last_lines(tail)
    return f"{ending}: {said}" if said else ending


def last_lines(tail: str) -> str:
    """Return the last few lines on one line, at most some 500 characters."""
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    said = " | ".join(lines[-DETAIL_LINES:])
    return said if len(said) <= DETAIL_CHARS else "…" + said[-DETAIL_CHARS:]


def signal_name(number: int) -> str:
    """Return ``SIGKILL`` for 9, ``signal 40`` for one without a name."""
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"signal {number}"


def format_seconds(seconds: float) -> str:
    """Return ``0.2 s``, ``5 s``, ``1800 s``: with a decimal only where it says something."""
    short = 10.0
    return f"{seconds:.1f}".removesuffix(".0") + " s" if seconds < short else f"{seconds:.0f} s"
