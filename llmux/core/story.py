"""The recent events of the core and what it answered: attached to its errors, pasteable into a playbook test."""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from llmux.core import effects, events
from llmux.core.effects import Effect
from llmux.core.events import Event

LENGTH = 200
WIDTH = 115
ALIASES = {effects.__name__: "fx.", events.__name__: "ev."}


class Story:
    """The last ``LENGTH`` events with their times and effects."""

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: deque[tuple[float, Event, Sequence[Effect]]] = deque(maxlen=LENGTH)

    def add(self, now: float, event: Event, effects: Sequence[Effect]) -> None:
        """Remember one step."""
        self._entries.append((now, event, effects))

    def tell(self) -> str:
        """Return the story as Python: one ``at(time, event, effects…)`` after the other."""
        return "\n".join(
            step([as_python(now), as_python(event), *map(as_python, effects)])
            for now, event, effects in self._entries
        )


def step(parts: Sequence[str]) -> str:
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
        if not _has_default(field):
            arguments.append(as_python(content))
        elif content != _default(field):
            arguments.append(f"{field.name}={as_python(content)}")
    return ", ".join(arguments)


def _has_default(field: Field[Any]) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default
