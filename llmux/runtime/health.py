"""What is due and not done, and what takes long for a good reason: the truth behind ``/health``."""

from __future__ import annotations

from llmux.core import admission
from llmux.core.model import Model
from llmux.core.phases import Phase
from llmux.core.state import State
from llmux.core.timers import Timer

HOOK_GRACE = 10.0  # seconds past its timeout: TERM, 5 s, KILL, and the exit
DEADLINE_GRACE = 5.0


def problems(s: State, now: float) -> list[str]:
    """Say what is due and not done; empty while all is well."""
    found = [
        f"the {run.kind.value} hook of {run.model.name!r} runs {now - run.deadline:.0f} s past its timeout"
        for run in s.hooks.values()
        if now > run.deadline + HOOK_GRACE
    ]
    deadline = s.timers.next()
    if deadline is not None and now > deadline + DEADLINE_GRACE:
        found.append(f"a deadline passed {now - deadline:.0f} s ago and was not acted on")
    if s.ready and not s.stopping and _stuck(s, now):
        found.append(f"{s.queued} requests wait although nothing is under way")
    return found


def notes(s: State, now: float) -> list[str]:
    """Say what makes requests wait, though all is well."""
    found = []
    if not s.ready:
        found.append("looking at what runs")
    if s.stopping:
        found.append("stopping")
    if s.switch is not None:
        to = s.switch.target.name if s.switch.target else "sleep"
        seconds = now - s.switch.started
        found.append(f"switch {s.switch.id} to {to} is {s.switch.stage.value} since {seconds:.0f} s")
    if s.lease is not None:
        left = "" if s.lease.until is None else f" for {max(0.0, s.lease.until - now):.0f} s more"
        found.append(admission.because(f"the GPU is leased{left}", s.lease.reason))
    if s.manual:
        found.append("manual mode: only an operator switches")
    for model in s.models.values():
        found.extend(_model_notes(model, now))
    return found


def _model_notes(model: Model, now: float) -> list[str]:
    name, found = model.name, []
    if model.queue:
        found.append(f"{len(model.queue)} wait for {name!r}")
    if model.pin is not None:
        found.append(admission.because(f"{name!r} is pinned", model.pin.reason))
    pause = max(model.wake_backoff.remaining(now), model.sleep_backoff.remaining(now))
    if pause > 0:
        found.append(f"{name!r} is left alone for {pause:.0f} s: {model.last_error}")
    if model.phase in (Phase.FAULTED, Phase.LOST):
        found.append(f"{name!r} is {model.phase.value}: {model.last_error}")
    return found


def _stuck(s: State, now: float) -> bool:
    if not s.queued or s.switch is not None or s.lease is not None or s.manual or s.hooks:
        return False
    return (
        not any(
            model.in_flight
            or model.pinned
            or model.wake_backoff.active(now)
            or model.sleep_backoff.active(now)
            or (model.awake_since is not None and now < model.awake_since + s.rules.min_active)
            for model in s.models.values()
        )
        and Timer.ASK not in s.timers
    )
