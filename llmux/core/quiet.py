"""What comes back by itself: the default model when all is quiet, and what is to be kept awake as soon as it fits.

Quiet begins when the last request has ended, however it ended: served, turned away, or gone; and at the start.
After ``default_after`` seconds of it the default model is woken, once in each quiet, so that its own idle sleep is
not undone, nor a wake that fails repeated for ever. What an operator put to sleep sleeps until it is asked for.
"""

from __future__ import annotations

from llmux.core import admission
from llmux.core.model import Model
from llmux.core.phases import Phase
from llmux.core.state import State

AWAY = (Phase.ASLEEP, Phase.DEEPENING, Phase.LOST)


def watch(s: State) -> None:
    """See whether quiet has begun or ended. Called after every event while there is a default model."""
    calm = not s.requests and s.ready and not s.stopping
    if calm == s.calm:
        return
    s.calm = calm
    if calm:
        s.agenda.set("quiet", s.now + s.rules.default_after)
    else:
        forget(s)


def forget(s: State) -> None:
    """It is not quiet, or has to begin anew."""
    s.agenda.cancel("quiet")
    s.calm = s.homeward = False


def keepsakes(s: State) -> list[Model]:
    """Return those to be kept awake that are not, and for which nobody has to leave."""
    away = [model for model in s.in_phase(*AWAY) if model.spec.keep_awake and _free_to_wake(model)]
    return [model for model in away if admission.who_leaves(s, model) == ()]


def default(s: State) -> Model | None:
    """Return the default model if it may come back now: it displaces nobody that is to be kept awake."""
    model = s.models.get(s.rules.default_model or "")
    if model is None or model.phase not in AWAY or not _free_to_wake(model):
        return None
    leaving = admission.who_leaves(s, model)
    return None if leaving is None or any(other.spec.keep_awake for other in leaving) else model


def _free_to_wake(model: Model) -> bool:
    return not (model.removed or model.put_away)
