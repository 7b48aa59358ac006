"""How deeply a model sleeps: its levels, and the host memory that they take.

A model may name levels, lightest first. It is put to sleep at the lightest for which there is host memory. Where
that is short, the least likely models that sleep already, and that no request waits for, are put deeper first:
their sleep hooks run again, with the deeper level, while the switch that needs the room drains. Such a model is
``DEEPENING``: off the GPU, in no model's way, and woken only after its hook has ended. If the hook fails it stays
at its level, and what was to come sleeps deeper instead.

A model's level is what the last sleep hook that succeeded was told; it is None where nothing is known: never slept
here, stopped, or reset. It counts against the host memory until the model is awake.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from llmux.core.effects import ModelDeepened, SleepHookFailed
from llmux.core.model import HookRun, Model, Switch
from llmux.core.phases import Phase, Trigger
from llmux.core.spec import HookKind, Level
from llmux.core.state import State


class Sleeper(NamedTuple):
    """A model for ``plan``: what it needs at each level that is open to it, falling; the first is the lightest."""

    name: str
    needs: tuple[int, ...]


def plan(sleepers: Sequence[Sleeper], room: int) -> dict[str, int]:
    """Say which of its levels each takes so that all fit into ``room``; the least likely come first, and go first.

    None is deeper than needed: none could be any lighter without the sum being too much. Where even the deepest
    levels are too much, all are at their deepest.
    """
    steps = {sleeper.name: 0 for sleeper in sleepers}
    total = sum(sleeper.needs[0] for sleeper in sleepers)
    for name, needs in sleepers:
        while total > room and steps[name] + 1 < len(needs):
            steps[name] += 1
            total += needs[steps[name]] - needs[steps[name] - 1]
    # A large one at the end may have made the small ones before it needless.
    for name, needs in reversed(sleepers):
        for step in range(steps[name]):
            more = needs[step] - needs[steps[name]]
            if total + more <= room:
                steps[name] = step
                total += more
                break
    return steps


def lightest(model: Model) -> str:
    """Return the name of the level at which a model would like to sleep; empty without levels."""
    levels = model.running.levels
    return levels[0].name if levels else ""


def at_stake(leaving: Iterable[Model], target: Model) -> dict[str, str]:
    """Return the levels that the cost of a switch depends on, by model."""
    levels = {model.name: lightest(model) for model in leaving if model.running.levels}
    if target.level is not None:
        levels[target.name] = target.level.name
    return levels


def _plan(s: State, coming: Iterable[Model], movable: Mapping[Model, Sequence[Level]]) -> dict[Model, Level]:
    """Say at which level each sleeps of those that come and of those that sleep already and may go deeper.

    Whatever else sleeps keeps its place; what goes deeper has left its old one once the others begin to. The least
    likely go deeper first: no request waits, rarely asked for, not used for long.
    """
    forced = {m: m.running.levels[-1] for m in coming if m.running.levels and not _has_choice(m)}
    options = {**movable, **{m: _open_to(m) for m in coming if m.running.levels and m not in forced}}
    if s.rules.host_memory is None:
        return forced | {model: levels[0] for model, levels in options.items()}
    room = s.rules.host_memory
    for model in s.models.values():
        if model not in options:
            level = forced.get(model) or (movable and model.deepening) or model.level
            room -= level.host_memory if level else 0
    likely = sorted(options, key=lambda m: (bool(m.queue), m.meter.arrival_rate(s.now), m.last_used, -m.order))
    steps = plan([Sleeper(m.name, tuple(level.host_memory for level in options[m])) for m in likely], room)
    return forced | {model: options[model][steps[model.name]] for model in likely}


def make_room(s: State, coming: Sequence[Model] = ()) -> None:
    """Put those that sleep already deeper, if the host memory is too short for them and for those that come."""
    if s.rules.host_memory is None or s.stopping:
        return
    target = s.switch.target if s.switch else None
    movable = {
        model: _open_to(model, model.level)
        for model in s.in_phase(Phase.ASLEEP)
        if model.level is not None and model is not target and not model.queue
        if model.prefetch is None and not model.sleep_backoff.active(s.now)
    }
    if movable:
        for model, level in _plan(s, coming, movable).items():
            if model in movable and level is not model.level:
                _deepen(s, model, level)


def clear_out(s: State, model: Model) -> bool:
    """Put a model that sleeps, and is configured no more, as deep as it can; say whether its hook was started."""
    if model.level is None or s.stopping or model.sleep_backoff.failures:
        return False
    deepest = _open_to(model, model.level)[-1]
    if deepest is model.level:
        return False
    _deepen(s, model, deepest)
    return True


def redefined(model: Model) -> None:
    """Take over what its level takes by a new configuration."""
    if model.level is not None and model.woken is None:
        name = model.level.name
        model.level = next((level for level in model.spec.levels if level.name == name), model.level)


def for_sleep(s: State, leaving: Sequence[Model]) -> Mapping[Model, Level]:
    """Say at which level each of those with levels is put to sleep now, whatever was planned."""
    return _plan(s, leaving, {}) if s.has_levels else {}


def awaited(s: State, switch: Switch) -> bool:
    """Whether a switch has to wait for hooks that put others deeper, or its target."""
    if s.stopping:
        return False
    makes_room = any(model.running.levels for model in switch.leaving)
    return any(makes_room or model is switch.target for model in s.in_phase(Phase.DEEPENING))


def deepened(s: State, run: HookRun, *, ok: bool, detail: str) -> None:
    """Take in the end of a hook that puts a sleeping model deeper."""
    model = run.model
    level, model.deepening = model.deepening, None
    before = model.level
    assert level is not None
    assert before is not None
    s.move(model, Trigger.DEEPENED)
    if ok:
        model.level = level
        model.sleep_backoff.clear()
        s.out.append(ModelDeepened(model.name, before.name, level.name, s.now - run.started))
        return
    model.last_error = f"sleep {detail}" if detail else "sleep failed"
    s.out.append(SleepHookFailed(model.name, None, model.last_error))
    if not s.stopping:
        s.back_off(model, HookKind.SLEEP, model.last_error)


def _deepen(s: State, model: Model, level: Level) -> None:
    model.deepening = level
    s.move(model, Trigger.DEEPEN)


def _has_choice(model: Model) -> bool:
    """Whether a model may sleep lightly; after a cleanup, or for good, it sleeps as deeply as it can."""
    lightly = model.phase in (Phase.DRAINING, Phase.FAULTED) and not model.cleanup.again
    return lightly and not model.removed


def _open_to(model: Model, now: Level | None = None) -> list[Level]:
    """Return the levels that a model may take, each of which takes less than the one before."""
    levels = list(model.running.levels)
    open_to = [now or levels.pop(0)]
    for level in levels:
        if level.host_memory < open_to[-1].host_memory:
            open_to.append(level)
    return open_to
