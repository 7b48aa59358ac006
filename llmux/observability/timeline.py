"""What has happened to one core: a bounded sequence of steps, each an event with its time and its effects.

The driver adds every step; nothing else remembers. What llmux tells of its past is made from the steps: the story
(recent steps as a pasteable playbook) and the phases from this file, decisions and evictions by ``decision_log``.
A long memory of few things is a ``Fold``: it picks from each step what it keeps, and keeps so many.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from itertools import takewhile
from typing import Any, NamedTuple, Protocol, TypeVar, get_args

from llmux.core import effects, events
from llmux.core.effects import Effect, PhaseChanged
from llmux.core.events import Event
from llmux.core.phases import Phase

LENGTH = 200  # steps
MOVES = 5000  # an hour of a switch every six seconds
WIDTH = 115
ALIASES = {effects.__name__: "fx.", events.__name__: "ev."}


class Step(NamedTuple):
    """An event, and what the core answered. ``time`` is on the core's clock, in seconds."""

    time: float
    event: Event
    effects: Sequence[Effect]


class Move(NamedTuple):
    """A model came from one phase into another."""

    id: int  # 1, 2, …; grows by one with each move, of whatever model
    time: float  # on the core's clock, in seconds
    model: str
    source: Phase
    target: Phase


_new = tuple.__new__  # Step(…) would be a call of Python's own, with each event


class Timeline:
    """The last ``length`` steps, and the last moves of all models.

    ``on(kind, take)`` has ``take(time, effect)`` called with each effect of a kind as its step is added.
    """

    def __init__(self, length: int = LENGTH) -> None:
        self.steps: deque[Step] = deque(maxlen=length)
        self.moves: deque[Move] = deque(maxlen=MOVES)
        self.last_move = 0
        self._folds: dict[type, tuple[Callable[[float, Any], None], ...]] = {PhaseChanged: (self._moved,)}

    def on(self, kind: type, take: Callable[[float, Any], None]) -> None:
        """Fold the effects of a kind into another memory."""
        self._folds[kind] = (*self._folds.get(kind, ()), take)

    def add(self, time: float, event: Event, effects: Sequence[Effect]) -> None:
        """Remember a step."""
        self.steps.append(_new(Step, (time, event, effects)))
        folds = self._folds
        for effect in effects:
            takes = folds.get(effect.__class__)
            if takes is not None:
                for take in takes:
                    take(time, effect)

    def _moved(self, time: float, effect: PhaseChanged) -> None:
        self.last_move += 1
        self.moves.append(Move(self.last_move, time, effect.model, effect.source, effect.target))

    def moves_since(self, number: int) -> list[Move]:
        """Return the moves after the one with this id, oldest first."""
        return after(self.moves, number)

    def story(self) -> str:
        """Return the steps as Python: one ``at(time, event, effects…)`` after the other."""
        return "\n".join(
            laid_out([as_python(each) for each in (time, event, *effects) if each.__class__ not in EXPLAIN])
            for time, event, effects in self.steps
        )


class _Numbered(Protocol):
    @property
    def id(self) -> int: ...


_N = TypeVar("_N", bound=_Numbered)


def after(entries: Sequence[_N], number: int) -> list[_N]:
    """Return the entries after the one with this id, oldest first; their ids grow."""
    return list(takewhile(lambda entry: entry.id > number, reversed(entries)))[::-1]


EXPLAIN = frozenset(get_args(effects.Explanation))
"""Effects that only explain others."""


def laid_out(parts: Sequence[str]) -> str:
    """Lay one ``at(…)`` out as the formatter would."""
    line = f"        at({', '.join(parts)}),"
    if len(line) <= WIDTH:
        return line
    return "\n".join(["        at(", *(f"            {part}," for part in parts), "        ),"])


def as_python(value: object) -> str:
    """Write a value as the expression that makes it; what only its owner could make is ``ANY``."""
    text = "ANY"
    match value:
        case enum.Enum():
            text = f"{_class(value)}.{value.name}"
        case float() if math.isinf(value):
            text = f'float("{value}")'
        case None | bool() | int() | float() | str():
            text = repr(value)
        case tuple():
            text = f"({', '.join(map(as_python, value))}{',' if len(value) == 1 else ''})"
        case list():
            text = f"[{', '.join(map(as_python, value))}]"
        case frozenset():
            text = f"frozenset({{{', '.join(sorted(map(as_python, value)))}}})" if value else "frozenset()"
        case Mapping():
            text = f"{{{', '.join(f'{as_python(key)}: {as_python(each)}' for key, each in value.items())}}}"
        case _ if is_dataclass(value) and type(value).__module__.startswith("llmux.core."):
            text = f"{_class(value)}({_arguments(value)})"
    return text


def _class(value: object) -> str:
    return ALIASES.get(type(value).__module__, "") + type(value).__name__


def _arguments(value: Any) -> str:
    """Write what has no default by place, and by name what differs from its default."""
    arguments = []
    for field in fields(value):
        content = getattr(value, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if default is MISSING:
            arguments.append(as_python(content))
        elif content != default:
            arguments.append(f"{field.name}={as_python(content)}")
    return ", ".join(arguments)
